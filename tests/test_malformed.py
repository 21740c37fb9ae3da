"""150 malformed inputs from a seed: rows, adapters, collected shards, manifests, models, settings.

Each ends with exit code 2 and one line on standard error, and changes no file."""

import gzip
import json
import random
import shutil

import pytest
from helpers import listing, without_logs

import align
import collect
import dual
import evaluate
import scit
from tools import sweep

CASES = 150

ROW = {"prompt": "And?", "chosen": "Good.", "rejected": "Bad."}
JUNK = (None, 5, 1.5, True, [], {}, ["x"], {"x": 1}, [[]], "")

QUICK = ["--steps", "1", "--device", "cpu"]
SCIT = ["--method", "scit"]

# Arguments that no run may accept, by the scripts that they are for.
STAGE1_SETTINGS = [
    "--steps 0",
    "--steps x",
    "--steps",
    "--lr nan",
    "--lr -1",
    "--lr x",
    "--batch-size 0",
    "--device nowhere",
    "--device mps",
    "--device cuda:99",
    "--dtype int8",
    "--dtype float16",
    "--limit 0",
    "--seed x",
    "--lora-targets nothing",
    "--lora-rank 0",
    "--lora-dropout x",
    "--nonsense 1",
    "--max-length 1",
    "--template chat",
    "--template x",
    "--model ./no/where",
    "--data ./nothing.jsonl",
    "--gradient-checkpointing maybe",
    "--restart maybe",
    "--checkpoint-minutes -1",
    "--tokens-per-pass 0",
]
COLLECT_SETTINGS = [
    "--layers 4",
    "--layers -5",
    "--layers up",
    "--store half",
    "--store lowrank",
    "--rank 3",
    "--max-gb -1",
    "--max-gb 1e-12",
    "--max-gb 1e-4",
    "--base none",
    "--stimulus none",
    "--max-length 2",
]
ALIGN_SETTINGS = [
    "--alpha x",
    "--alpha nan",
    "--alpha 1 --strength 1",
    "--strength inf",
    "--strength 0.2 0.3",
    "--rank 0",
    "--rank 999",
    "--kind l3",
    "--layers 99",
    "--layers x",
    "--method both",
]
SWEEP_SETTINGS = [
    "",
    "--strength",
    "--strength 0.2 0.2",
    "--strength 0.2 inf",
    "--strength 0.2 nan",
    "--alpha 1 --strength 1",
    "--alpha 1 2 --judge x",
    "--alpha 1 2 --reward-model ./no/where",
    "--alpha 1 2 --rank 999",
]
SETTINGS = (
    (scit, STAGE1_SETTINGS),
    (dual, STAGE1_SETTINGS),
    (collect, COLLECT_SETTINGS),
    (align, ALIGN_SETTINGS),
    (sweep, SWEEP_SETTINGS),
)

# Files of one stage, and the stage that reads them.
FILES = (
    ("scit/adapter/adapter_model.safetensors", collect),
    ("scit/adapter/adapter_config.json", collect),
    ("scit/collect/shard-00000.safetensors", align),
    ("scit/collect/validation-shard-00000.safetensors", align),
    ("scit/collect/base_adapter/adapter_model.safetensors", align),
    ("scit/align/adapter_model.safetensors", evaluate),
)
MANIFESTS = (
    ("scit/adapter/stage.json", collect),
    ("scit/collect/stage.json", align),
    ("scit/align/stage.json", evaluate),
)
MANIFEST_KEYS = ("kind", "version", "settings", "digests")


# ---------------------------------------------------------------- damage


def random_bytes(rng, count):
    return bytes(rng.randrange(256) for _ in range(count))


def without(mapping, key):
    return {name: value for name, value in mapping.items() if name != key}


def bad_rows(rng):
    """The bytes of a file in which at least one row is no preference pair."""
    row = json.dumps(ROW)
    good_rows = [row] * rng.randrange(4)
    kind = rng.randrange(9)
    if kind == 0:
        return random_bytes(rng, rng.randrange(1, 200)) + b"\xff"
    if kind == 1:
        compressed = gzip.compress("\n".join([row] * 50).encode())
        return compressed[: -rng.randrange(9, 30)]
    if kind == 2:
        # a good row of another form than the one before it
        good_rows = [row]
        bad_row = json.dumps({"instruction": "x", "chosen": "a", "rejected": "b"})
    elif kind == 3:
        bad_row = row[: rng.randrange(1, 40)]
    else:
        bad_row = json.dumps(bad_value(rng))
    return "\n".join([*good_rows, bad_row]).encode()


def bad_value(rng):
    """What JSON may say instead of a preference pair."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice([5, None, "text", [ROW], True])
    if kind == 1:
        return without(ROW, rng.choice(["chosen", "rejected"]))
    if kind == 2:
        field = rng.choice(["chosen", "rejected", "prompt"])
        return {**ROW, field: rng.choice([value for value in JUNK if value != ""])}
    if kind == 3:
        return {**ROW, "split": rng.choice(["dev", 7, ["train"], {"a": 1}])}
    turns = [5, "x", [], [{"from": "robot", "value": "x"}], [{"from": "human"}]]
    return {
        "conversations": rng.choice(turns),
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }


def damaged(rng, content):
    """Bytes cut short, with one bit flipped, with a header that lies about sizes, or others."""
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        changed = bytearray(content)
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 2:
        return rng.randrange(2**40, 2**62).to_bytes(8, "little") + content[8:]
    return random_bytes(rng, rng.randrange(300))


def bad_manifest(rng, content):
    """The bytes of a stage.json that is not JSON, lacks a key, holds junk, or is no object."""
    manifest = json.loads(content)
    key = rng.choice(MANIFEST_KEYS)
    kind = rng.randrange(4)
    if kind == 0:
        return damaged(rng, content)[:-1] + b"~"
    if kind == 1:
        return json.dumps(without(manifest, key)).encode()
    if kind == 2:
        value = rng.choice(JUNK)
        # settings may be any object, the other keys may not
        if key == "settings" and isinstance(value, dict):
            value = None
        return json.dumps({**manifest, key: value}).encode()
    return json.dumps(rng.choice(JUNK)).encode()


def bad_model_file(rng, content):
    """The bytes of a model's file: empty, half a file, noise, or a header that lies."""
    kind = rng.randrange(5)
    if kind == 0:
        return b""
    if kind == 1:
        return b"{"
    if kind == 2:
        return random_bytes(rng, 100)
    if kind == 3:
        return content[: len(content) // 2]
    return (2**50).to_bytes(8, "little") + content[8:]


# ---------------------------------------------------------------- cases
# Each takes a random generator, the folder with a finished run in out/ and a model and pairs in
# tiny/, spoils something in it, and returns the stage that must refuse it and its arguments.


def source_in(folder):
    return ["--model", folder / "tiny/model", "--data", folder / "tiny/pairs.jsonl", *QUICK]


def method_for(stage):
    """evaluate.py looks at both methods, the others must be told one."""
    return [] if stage is evaluate else SCIT


def spoil_rows(rng, folder):
    (folder / "tiny/pairs.jsonl").write_bytes(bad_rows(rng))
    return rng.choice([scit, dual]), source_in(folder)


def spoil_file(rng, folder):
    name, stage = rng.choice(FILES)
    path = folder / "out" / name
    content = path.read_bytes()
    new_content = damaged(rng, content)
    path.write_bytes(new_content if new_content != content else b"")
    return stage, method_for(stage)


def spoil_manifest(rng, folder):
    name, stage = rng.choice(MANIFESTS)
    path = folder / "out" / name
    path.write_bytes(bad_manifest(rng, path.read_bytes()))
    return stage, method_for(stage)


def spoil_model(rng, folder):
    name = rng.choice(["config.json", "tokenizer.json", "model.safetensors"])
    path = folder / "tiny/model" / name
    path.write_bytes(bad_model_file(rng, path.read_bytes()))
    return rng.choice([scit, dual]), source_in(folder)


def spoil_settings(rng, folder):
    stage, pool = rng.choice(SETTINGS)
    args = source_in(folder) if stage in (scit, dual) else SCIT
    return stage, [*args, *rng.choice(pool).split()]


KINDS = (spoil_rows, spoil_file, spoil_manifest, spoil_model, spoil_settings)


@pytest.mark.parametrize("i", range(CASES))
def test_malformed(i, done, tiny, tmp_path, fails):
    rng = random.Random(i)
    shutil.copytree(done, tmp_path / "out")
    shutil.copytree(tiny, tmp_path / "tiny")
    spoil = KINDS[i % len(KINDS)]
    stage, args = spoil(rng, tmp_path)
    before = without_logs(listing(tmp_path))
    code, lines = fails(stage, "--out", tmp_path / "out", *args)
    assert code == 2, (args, lines)
    assert len(lines) == 1, (args, lines)
    assert lines[0].startswith(f"{stage.__name__.rpartition('.')[2]}.py: error: ")
    assert without_logs(listing(tmp_path)) == before
