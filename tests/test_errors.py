"""Bad input ends with one clear line on standard error, exit code 2, no traceback, and nothing half-written."""
import json
import shutil

import pytest
import torch

import align
import collect
import dual
import evaluate
import files
import scit
import toy
from conftest import call, go, make_model
from model import pick_device, principal_directions

QUICK = ["--steps", "2", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A folder in which all stages of both methods have run, two steps each."""
    out = tmp_path_factory.mktemp("done")
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", out]
    for stage, args in [(scit, [*source, *QUICK]), (dual, [*source, *QUICK])]:
        go(stage, *args)
    for method in ("scit", "dual"):
        go(collect, "--out", out, "--method", method, "--layers", "1", "--device", "cpu")
        go(align, "--out", out, "--method", method, *QUICK)
    return out


@pytest.mark.parametrize("stage", [scit, dual, collect, align, evaluate, toy])
def test_help_is_printed(stage):
    assert "--seed" in files.Parser(stage.Config, allow_abbrev=False).format_help()


def listing(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def refused(capfd, tmp_path):
    """Call a stage that must refuse: one line on standard error that holds the words; the folder as it was."""
    def check(stage, *args, words, folder=None):
        folder = folder or tmp_path
        before = listing(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            go(stage, *args)
        lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith(f"{stage.__name__}.py: error: "), lines
        for word in words if isinstance(words, tuple) else (words,):
            assert word in lines[0]
        assert listing(folder) == before
    return check


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished folder that a test may spoil."""
    shutil.copytree(done, tmp_path / "out")
    return tmp_path / "out"


def test_as_a_user_sees_it(tmp_path):
    """One case through a real interpreter: exit code 2, one line, no traceback."""
    result = call("collect.py", "--out", tmp_path)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "run `python scit.py` or `python dual.py` first" in result.stderr


@pytest.mark.parametrize("args, words", [
    (["--stepz", "3"], ("--stepz", "did you mean --steps?")),
    (["--steps", "many"], ("--steps", "many")), (["--steps", "0"], ("--steps", "less than 1")), (["--lr", "-1"], "--lr"),
    (["--lr", "nan"], "nan is no number"), (["--anchor", "1.5"], ("--anchor", "more than 1")), (["--lora-dropout", "2"], "more than 1"),
    (["--dtype", "int8"], "--dtype"), (["--device", "tpu"], "--device tpu"),
    (["--model", "somewhere"], "--data go together"),
    (["--model", "./nowhere", "--data", "x"], ("--model ./nowhere", "no such folder"))])
def test_settings(refused, tmp_path, args, words):
    refused(scit, "--out", tmp_path, *args, words=words)


@pytest.mark.parametrize("content, words", [
    (None, "No such file"), (b"\xff\xfe\x00", "utf-8"), (b"\x1f\x8bgarbage", "rows.jsonl"), (b"not json\n", ("line 1", "not JSON")), (b'[{"chosen": ', "not JSON"),
    (b'{"chosen": "a"}\n', ("line 1", "'rejected' is missing")), (b'{"prompt": "q", "chosen": "a", "rejected": 3}\n', ("line 1", "'rejected' holds '3'")),
    (b"", "no train pair is left"), (b'{"prompt": "q", "chosen": "a", "rejected": "a"}\n', ("no train pair is left", "1 identical"))])
def test_rows(refused, tiny, tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    for stage in (scit, dual):
        refused(stage, "--model", tiny / "model", "--data", path, "--out", tmp_path, words=words)


def test_nothing_left_after_max_length(refused, tiny, tmp_path):
    refused(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--max-length", "5", words=("no train pair is left", "over 5 tokens", "--max-length"))


def test_missing_earlier_stage_names_the_command(refused, tmp_path):
    refused(collect, "--out", tmp_path, "--method", "dual", words="run `python dual.py` first")
    refused(align, "--out", tmp_path, words="run `python collect.py` first")
    refused(align, "--out", tmp_path, "--method", "scit", words="run `python collect.py` first")
    refused(evaluate, "--out", tmp_path, words="run `python scit.py` or `python dual.py` first")


def test_both_methods_need_a_choice(refused, done):
    for stage in (collect, align):
        refused(stage, "--out", done, words=("--method scit", "--method dual"), folder=done)


def test_layers_out_of_range_or_not_collected(refused, done):
    refused(collect, "--out", done, "--method", "scit", "--layers", "4", words=("--layers 4", "0 to 3"), folder=done)
    refused(align, "--out", done, "--method", "scit", "--layers", "0", words=("--layers 0", "holds layers [1]"), folder=done)


def test_strengths_and_ranks(refused, done, tmp_path):
    refused(align, "--out", done, "--method", "scit", "--alpha", "1", "--strength", "0.2", words=("--alpha", "--strength"), folder=done)
    refused(align, "--out", done, "--method", "scit", "--rank", "33", words=("--rank 33", "32 directions"), folder=done)
    refused(collect, "--out", done, "--method", "scit", "--store", "lowrank", "--rank", "33", words=("--rank 33", "32 wide"), folder=done)
    refused(collect, "--out", done, "--method", "scit", "--rank", "3", words="--store lowrank", folder=done)
    refused(collect, "--out", done, "--method", "scit", "--layers", "upper", words=("--layers upper", "middle, last, all"), folder=done)


def test_unknown_linears(refused, done):
    refused(align, "--out", done, "--method", "scit", "--lora-targets", "q_porj", words=("q_porj", "blocks have q_proj, k_proj"), folder=done)


def test_strength_where_nothing_differs(refused, copy):
    path = copy / "scit" / "collect" / "stage.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "ratio": [0.0]} | {"seal": files.seal({**record, "ratio": [0.0]})}))
    refused(align, "--out", copy, "--method", "scit", "--strength", "0.2", words=("--strength", "h+ and h- must differ"), folder=copy)


def test_unfinished_other_kind_other_version(refused, copy):
    path = copy / "scit" / "collect" / "stage.json"
    record = json.loads(path.read_text())
    for change, words in [({"version": 99}, "version 99"), ({"kind": "align"}, "is align")]:
        path.write_text(json.dumps({**record, **change}))
        refused(align, "--out", copy, "--method", "scit", words=(words, "python collect.py"), folder=copy)
    path.write_text(json.dumps({**record, "ratio": [0.0]}))
    refused(align, "--out", copy, "--method", "scit", words="has been changed since it was written", folder=copy)
    path.write_text("{")
    refused(align, "--out", copy, "--method", "scit", words="not a stage record", folder=copy)
    path.unlink()
    refused(align, "--out", copy, "--method", "scit", words="unfinished", folder=copy)


def test_changed_files_are_noticed(refused, copy):
    for name, stage in [("scit/adapter/adapter_model.safetensors", collect), ("scit/collect/shard-00000.safetensors", align),
                        ("scit/collect/base_adapter/adapter_model.safetensors", align), ("scit/align/adapter_model.safetensors", evaluate)]:
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        refused(stage, "--out", copy, *(["--method", "scit"] if stage is not evaluate else []), words=name.rpartition("/")[2], folder=copy)
        (copy / name).write_bytes(whole)


def test_another_model(refused, done, tmp_path, tokenizer):
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for stage in (collect, align):
        refused(stage, "--out", done, "--method", "scit", "--model", tmp_path / "other", words=("another model" if stage is align else "is not the model"), folder=done)
    refused(evaluate, "--out", done, "--model", tmp_path / "other", words="another model", folder=done)


def test_not_enough_disk(refused, done, monkeypatch):
    usage = shutil.disk_usage(done)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused(collect, "--out", done, "--method", "dual", words=("GB are free", "--max-gb"), folder=done)
    refused(collect, "--out", done, "--method", "dual", "--max-gb", "1e-9", words="--max-gb", folder=done)


def test_worlds_that_cannot_be(refused, tmp_path):
    refused(toy, "--out", tmp_path, "--kinds", "tool,boat", words=("--kinds boat", "island,sum"))
    refused(toy, "--out", tmp_path, "--width", "12", words=("--width 12", "multiple of 8"))


@pytest.mark.parametrize("stage, words", [(scit, "lower --tokens-per-pass, or lower --batch-size, or set --gradient-checkpointing True"), (toy, "take --device cpu"),
                                          (collect, "lower --tokens-per-pass"), (evaluate, "lower --tokens-per-pass, or lower --batch-size")])
def test_a_full_gpu_names_settings_that_there_are(stage, words, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(stage, "main", lambda config: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(SystemExit) as stop:
        go(stage, "--out", tmp_path)
    assert stop.value.code == 1 and capfd.readouterr().err == f"{stage.__name__}.py: error: out of GPU memory: {words}\n"


@pytest.mark.parametrize("name, chosen", [(None, []), ("cuda", []), ("cuda:1", [torch.device("cuda:1")])])
def test_a_gpu_is_taken_by_its_number(name, chosen, monkeypatch):
    own, taken = torch.empty, []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda size, device: own(size))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: taken.append(device))
    assert pick_device(name) == torch.device(name or "cuda") and taken == chosen


def test_nan_in_the_directions_is_said():
    with pytest.raises(files.UserError, match="NaN or infinite"):
        principal_directions([[torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])]], 1)


@pytest.mark.parametrize("judge", ["nonsense", "toy:nothing", "no_such_module:f"])
def test_judge(refused, done, judge):
    refused(evaluate, "--out", done, "--judge", judge, words=("--judge", "module:function"), folder=done)


def test_a_failing_stage_leaves_what_was_there(copy, monkeypatch):
    """A crash while writing: the earlier folder stays whole, nothing half-written stays beside it."""
    before = listing(copy)
    monkeypatch.setattr(align, "save_adapter", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        go(align, "--out", copy, "--method", "scit", *QUICK)
    after = listing(copy)
    after.pop("scit/align.log"), before.pop("scit/align.log"), after.pop("scit/.checkpoint-align-strength_0.25")     # from which it goes on
    assert after == before


def test_a_loss_that_is_not_finite_ends_the_stage_and_saves_nothing(refused, done, tmp_path):
    shutil.copytree(done, tmp_path / "out")
    before = listing(tmp_path / "out")
    for stage in (scit, dual, align):
        more = ["--method", "scit"] if stage is align else ["--model", json.loads(before["scit/adapter/stage.json"])["settings"]["model"],
                                                               "--data", json.loads(before["scit/adapter/stage.json"])["settings"]["data"][0]]
        with pytest.raises(SystemExit):
            go(stage, "--out", tmp_path / "out", *more, "--lr", "1e30", "--steps", "12", "--device", "cpu")
    after = listing(tmp_path / "out")
    assert {name: after[name] for name in after if not name.endswith(".log")} == {name: before[name] for name in before if not name.endswith(".log")}
