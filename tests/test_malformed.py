"""150 malformed inputs from a seed: rows, adapters, collected shards, records, models, settings. Each ends with exit code 2, one line
on standard error, no traceback, and what was there untouched."""
import gzip
import json
import random
import shutil

import pytest

import align
import collect
import dual
import evaluate
import scit
from conftest import go
from test_errors import done, listing  # noqa: F401

ROW = {"prompt": "And?", "chosen": "Good.", "rejected": "Bad."}
JUNK = (None, 5, 1.5, True, [], {}, ["x"], {"x": 1}, [[]], "")
CASES = 150


def bad_rows(rng):
    """The bytes of a file in which at least one row is no preference pair."""
    good = [json.dumps(ROW)] * rng.randrange(4)
    kind = rng.randrange(9)
    if kind == 0:
        return bytes(rng.randrange(256) for _ in range(rng.randrange(1, 200))) + b"\xff"
    if kind == 1:
        return gzip.compress("\n".join([json.dumps(ROW)] * 50).encode())[:-rng.randrange(9, 30)]
    if kind == 2:
        row = rng.choice([5, None, "text", [ROW], True])
    elif kind == 3:
        row = {key: value for key, value in ROW.items() if key != rng.choice(("chosen", "rejected"))}
    elif kind == 4:
        row = {**ROW, rng.choice(("chosen", "rejected", "prompt")): rng.choice([x for x in JUNK if x != ""])}
    elif kind == 5:
        row = {**ROW, "split": rng.choice(("dev", 7, ["train"], {"a": 1}))}
    elif kind == 6:
        row = {"conversations": rng.choice((5, "x", [], [{"from": "robot", "value": "x"}], [{"from": "human"}])), "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
    elif kind == 7:
        return "\n".join([json.dumps(ROW), json.dumps({"instruction": "x", "chosen": "a", "rejected": "b"})]).encode()
    else:
        return "\n".join([*good, json.dumps(ROW)[:rng.randrange(1, 40)]]).encode()
    return "\n".join([*good, json.dumps(row)]).encode()


def damaged(rng, whole):
    """Bytes cut short, with one bit flipped, with a header that lies about sizes, or others."""
    kind = rng.randrange(4)
    if kind == 0:
        return whole[:rng.randrange(len(whole))]
    if kind == 1:
        at = rng.randrange(len(whole))
        return whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1:]
    if kind == 2:
        return rng.randrange(2**40, 2**62).to_bytes(8, "little") + whole[8:]
    return bytes(rng.randrange(256) for _ in range(rng.randrange(300)))


SETTINGS = ["--steps 0", "--steps x", "--steps", "--lr nan", "--lr -1", "--lr x", "--batch-size 0", "--device nowhere", "--device cuda:99", "--dtype int8", "--limit 0",
            "--seed x", "--lora-targets nothing", "--lora-rank 0", "--nonsense 1", "--max-length 1", "--template chat", "--template x", "--model ./no/where", "--data ./nothing.jsonl",
            "--lora-dropout x", "--gradient-checkpointing maybe", "--restart maybe", "--checkpoint-minutes -1", "--tokens-per-pass 0"]
ALIGN = ["--alpha x", "--alpha nan", "--alpha 1 --strength 1", "--strength inf", "--strength 0.2 0.2", "--rank 0", "--rank 999", "--kind l3", "--layers 99", "--layers x", "--method both", "--judge x --alpha 1 2"]
COLLECT = ["--layers 4", "--layers -5", "--layers up", "--store half", "--rank 3", "--store lowrank --rank 99", "--max-gb -1", "--max-gb 1e-12", "--base none", "--stimulus none", "--max-length 2"]


@pytest.mark.parametrize("i", range(CASES))
def test_malformed(i, done, tiny, tmp_path, capfd):  # noqa: F811
    rng, out = random.Random(i), tmp_path / "out"
    shutil.copytree(done, out)
    source, quick = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl"], ["--steps", "1", "--device", "cpu"]
    stage, args = rng.choice((scit, dual)), [*source, *quick]
    kind = ("rows", "files", "record", "model", "settings")[i % 5]
    if kind == "rows":
        (tmp_path / "rows").write_bytes(bad_rows(rng))
        args = [*source[:2], "--data", tmp_path / "rows", *quick]
    elif kind == "files":                     # of a stage before
        name, stage = rng.choice((("scit/adapter/adapter_model.safetensors", collect), ("scit/adapter/adapter_config.json", collect), ("scit/collect/shard-00000.safetensors", align),
                                  ("scit/collect/held_out-00000.safetensors", align), ("scit/collect/base_adapter/adapter_model.safetensors", align), ("scit/align/adapter_model.safetensors", evaluate)))
        whole = (out / name).read_bytes()
        (out / name).write_bytes(new if (new := damaged(rng, whole)) != whole else b"")
        args = [] if stage is evaluate else ["--method", "scit"]
    elif kind == "record":
        name, stage = rng.choice((("scit/adapter", collect), ("scit/collect", align), ("scit/align", evaluate)))
        path = out / name / "stage.json"
        record, how = json.loads(path.read_text()), rng.randrange(4)
        key = rng.choice(list(record))
        if how == 0:
            path.write_bytes(damaged(rng, path.read_bytes())[:-1] + b"~")
        elif how == 1:
            path.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        elif how == 2:
            path.write_text(json.dumps({**record, key: rng.choice(JUNK)}))
        else:
            path.write_text(json.dumps(rng.choice(JUNK)))
        args = [] if stage is evaluate else ["--method", "scit"]
    elif kind == "model":
        shutil.copytree(tiny / "model", tmp_path / "model")
        name = rng.choice(("config.json", "tokenizer.json", "model.safetensors"))
        whole = (tmp_path / "model" / name).read_bytes()
        (tmp_path / "model" / name).write_bytes(rng.choice((b"", b"{}"[:1], bytes(rng.randrange(256) for _ in range(100)), whole[:len(whole) // 2], (2**50).to_bytes(8, "little") + whole[8:])))
        args = ["--model", tmp_path / "model", *source[2:], *quick]
    else:
        stage, pool, args = rng.choice(((scit, SETTINGS, args), (dual, SETTINGS, args), (align, ALIGN, ["--method", "scit"]), (collect, COLLECT, ["--method", "scit"])))
        args = [*args, *rng.choice(pool).split()]
    before = listing(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        go(stage, "--out", out, *args)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip() and "it/s" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith(f"{stage.__name__}.py: error: "), (args, stop.value.code, lines[-3:])
    assert {name: x for name, x in listing(tmp_path).items() if not name.endswith(".log")} == {name: x for name, x in before.items() if not name.endswith(".log")}
