"""A run that is cut off goes on and ends as one never stopped; faults of the machine end in one line; what is there stays whole."""
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

import align
import checkpoint
import collect
import dual
import files
import lora
import scit
from conftest import ROOT, go
from test_errors import done, listing  # noqa: F401

CPU = ["--device", "cpu"]
SWEEP = ["--strength", "0.1", "0.2", "--max-new-tokens", "2"]


def stages(tiny, out):
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", out, "--steps", "7", "--lora-dropout", "0.2", *CPU]
    more = ["--out", out, "--method", "dual", "--steps", "7", "--lora-dropout", "0.2", *CPU]
    return {"scit": (scit, source), "dual": (dual, source), "align": (align, more), "sweep": (align, [*more, *SWEEP])}


def adapters(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("adapter_model.safetensors"))}


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """Adapters of every stage, run without a stop; dropout makes the random state count."""
    found = {}
    for name in ("scit", "dual", "align", "sweep"):
        out = tmp_path_factory.mktemp(name)
        if name in ("align", "sweep"):
            go(dual, *stages(tiny, out)["dual"][1])
            go(collect, "--out", out, *CPU)
        stage, args = stages(tiny, out)[name]
        go(stage, *args)
        found[name] = adapters(out)
    return found


@pytest.mark.parametrize("how", ["signal", "killed"])
@pytest.mark.parametrize("name, calls", [("scit", 3), ("dual", 4), ("dual", 10), ("align", 5), ("sweep", 3), ("sweep", 9)])
def test_a_run_that_was_cut_off_ends_as_one_never_stopped(name, calls, how, undisturbed, tiny, tmp_path, monkeypatch, capfd):
    """By a signal after the n-th step of all; or killed there, when the last checkpoint is two steps old."""
    if name in ("align", "sweep"):
        go(dual, *stages(tiny, tmp_path)["dual"][1])
        go(collect, "--out", tmp_path, *CPU)
    stage, args = stages(tiny, tmp_path)[name]
    own, count = checkpoint.Checkpoint.after, []

    def after(self, step):
        count.append(step)
        if len(count) == calls - 2 and how == "killed":
            self.save(step)
        if len(count) == calls:
            if how == "killed":
                raise ZeroDivisionError                     # nothing is saved on the way
            self.note(signal.SIGTERM, None)
        own(self, step)
    monkeypatch.setattr(checkpoint.Checkpoint, "after", after)
    capfd.readouterr()
    with pytest.raises(SystemExit if how == "signal" else ZeroDivisionError) as stop:
        go(stage, *args)
    if how == "signal":
        err = capfd.readouterr().err.strip().splitlines()[-1]
        assert stop.value.code == 143 and f"{stage.__name__}.py: stopped; to go on: python " in err and "--lora-dropout 0.2" in err
    monkeypatch.setattr(checkpoint.Checkpoint, "after", own)
    said = go(stage, *args)
    at = count[-1] if how == "signal" else count[calls - 3]
    assert f"goes on after step {at}" in said
    assert adapters(tmp_path) == undisturbed[name]
    assert not list(tmp_path.rglob(".checkpoint*")) and not list(tmp_path.rglob("*.partial"))
    steps = [json.loads(line).get("step") for line in open(tmp_path / ("scit" if stage is scit else "dual") / f"{stage.__name__}.log")]
    assert None in steps and 7 in steps


def test_other_settings_are_refused_and_restart_begins_anew(undisturbed, tiny, tmp_path, monkeypatch, capfd):
    stage, args = stages(tiny, tmp_path)["scit"]
    own = checkpoint.Checkpoint.after
    monkeypatch.setattr(checkpoint.Checkpoint, "after", lambda self, step: (self.note(signal.SIGINT, None) if step == 4 else None, own(self, step)))
    with pytest.raises(SystemExit) as stop:
        go(stage, *args)
    assert stop.value.code == 130
    monkeypatch.setattr(checkpoint.Checkpoint, "after", own)
    for more, words in ((["--lr", "0.1"], "a run with lr 0.006, not 0.1"), (["--seed", "3"], "seed 0, not 3")):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            go(stage, *args, *more)
        assert stop.value.code == 2 and words in (err := capfd.readouterr().err) and "--restart True" in err
    whole = (tmp_path / "scit" / ".checkpoint-scit").read_bytes()
    (tmp_path / "scit" / ".checkpoint-scit").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(SystemExit) as stop:
        go(stage, *args)
    assert stop.value.code == 2 and "cannot be read" in capfd.readouterr().err
    assert "goes on" not in go(stage, *args, "--restart", "True") and adapters(tmp_path) == undisturbed["scit"]


def test_collect_goes_on_at_the_first_missing_shard(tiny, tmp_path, monkeypatch):
    go(dual, *stages(tiny, tmp_path)["dual"][1])
    args = ["--out", tmp_path, "--store", "lowrank", "--tokens-per-pass", "100", "--shard-mb", "0.03", *CPU]
    own, recorded = collect.record_states, []
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.append(1) or own(*a))
    go(collect, *args)
    cut = len(recorded) * 3 // 4
    recorded.clear()
    want = {path.name: path.read_bytes() for path in (tmp_path / "dual" / "collect").glob("*.safetensors")}
    record = json.loads((tmp_path / "dual" / "collect" / "stage.json").read_text())
    shutil.rmtree(tmp_path / "dual" / "collect")
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.append(1) or (1 / 0 if len(recorded) == cut else own(*a)))
    with pytest.raises(ZeroDivisionError):
        go(collect, *args)
    kept = sorted(path.name for path in (tmp_path / "dual" / ".collect.partial").glob("shard*"))
    assert 1 < len(kept) < len(record["shards"])
    recorded.clear()
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.append(1) or own(*a))
    go(collect, *args)
    assert {path.name: path.read_bytes() for path in (tmp_path / "dual" / "collect").glob("*.safetensors")} == want
    again = json.loads((tmp_path / "dual" / "collect" / "stage.json").read_text())
    assert again["ratio"] == record["ratio"] and again["energy"] == record["energy"] and again["digests"] == record["digests"]
    assert not (tmp_path / "dual" / ".collect.partial").exists()
    # passes of another size are no other settings: a run that the memory stopped goes on with smaller ones, and its shards hold the same
    shutil.rmtree(tmp_path / "dual" / "collect")
    recorded.clear()
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.append(1) or (1 / 0 if len(recorded) == cut else own(*a)))
    with pytest.raises(ZeroDivisionError):
        go(collect, *args)
    monkeypatch.setattr(collect, "record_states", own)
    assert ".collect.partial: goes on" in go(collect, *args, "--tokens-per-pass", "60")
    for name in record["shards"]:
        old, new = safetensors.torch.load(want[name]), load_file(tmp_path / "dual" / "collect" / name)
        assert all(torch.allclose(old[key].double(), new[key].double(), atol=1e-5) for key in old) and old.keys() == new.keys()
    # cut off again, and then other settings: nothing of before is taken
    shutil.rmtree(tmp_path / "dual" / "collect")
    recorded.clear()
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.append(1) or (1 / 0 if len(recorded) == cut else own(*a)))
    with pytest.raises(ZeroDivisionError):
        go(collect, *args)
    recorded.clear()
    monkeypatch.setattr(collect, "record_states", lambda *a: recorded.extend(a[4]) or own(*a))
    go(collect, *args, "--layers", "1")
    assert len(recorded) == 120 + 40 + 120 and json.loads((tmp_path / "dual" / "collect" / "stage.json").read_text())["settings"]["layers"] == [1]


def test_collect_goes_on_where_it_was_cut_off_while_sealing(tiny, tmp_path, monkeypatch):
    """All shards are there and a digest is being made: the rerun records nothing again, and the disk counts what is there."""
    go(dual, *stages(tiny, tmp_path)["dual"][1])
    own = files.file_digest
    monkeypatch.setattr(files, "file_digest", lambda path: 1 / 0 if "shard" in str(path) else own(path))
    with pytest.raises(ZeroDivisionError):
        go(collect, "--out", tmp_path, *CPU)
    monkeypatch.setattr(files, "file_digest", own)
    monkeypatch.setattr(collect, "record_states", lambda *args: 1 / 0)
    held = sum(path.stat().st_size for path in (tmp_path / "dual" / ".collect.partial").glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=held // 10))
    said = go(collect, "--out", tmp_path, *CPU)
    assert ".collect.partial: goes on" in said and (tmp_path / "dual" / "collect" / "stage.json").is_file()
    assert not (tmp_path / "dual" / "collect" / "resume_key").exists()


def test_a_sweep_is_not_narrowed_by_an_old_checkpoint(tiny, tmp_path, monkeypatch, capfd):
    """Its refusal is the sweep's, not a warning; one method's checkpoint is none of the other's; --restart is not in the command to go on."""
    go(dual, *stages(tiny, tmp_path)["dual"][1])
    go(collect, "--out", tmp_path, *CPU)
    stage, args = stages(tiny, tmp_path)["sweep"]
    own = checkpoint.Checkpoint.after
    monkeypatch.setattr(checkpoint.Checkpoint, "after", lambda self, step: (self.note(signal.SIGTERM, None) if step == 4 else None, own(self, step)))
    with pytest.raises(SystemExit):
        go(stage, "--restart", *args)
    err = capfd.readouterr().err.strip().splitlines()[-1]
    assert err.endswith(shlex.join(map(str, args))) and "to go on: python " in err and "--restart" not in err
    monkeypatch.setattr(checkpoint.Checkpoint, "after", own)
    with pytest.raises(SystemExit) as stop:
        go(stage, *args, "--lr", "5e-4")
    assert stop.value.code == 2 and "is of a run with lr 0.001, not 0.0005" in capfd.readouterr().err and not (tmp_path / "dual" / "sweep").exists()
    go(scit, *stages(tiny, tmp_path)["scit"][1])
    go(collect, "--out", tmp_path, "--method", "scit", *CPU)
    go(align, "--out", tmp_path, "--method", "scit", "--strength", "0.1", "--steps", "2", *CPU)


def test_a_diverged_run_leaves_no_checkpoint(tiny, tmp_path, capfd, monkeypatch):
    stage, args = stages(tiny, tmp_path)["scit"]
    with pytest.raises(SystemExit) as stop:
        go(stage, *args, "--lr", "1e30", "--checkpoint-minutes", "0")
    assert stop.value.code == 2 and re.search(r"the loss is (nan|inf) at step \d", capfd.readouterr().err) and not list(tmp_path.rglob(".checkpoint*"))
    own = lora.descend

    def poisoned(losses, adapter, *more):     # the loss is finite, what the last step makes of the adapter is not
        loss = own(losses, adapter, *more)
        adapter.B[-1].data[0, 0] = float("nan")
        return loss
    monkeypatch.setattr(lora, "descend", poisoned)
    with pytest.raises(SystemExit) as stop:
        go(stage, *args, "--steps", "1")
    assert stop.value.code == 2 and "numbers in the adapter at step 1: lower --lr" in capfd.readouterr().err
    assert not list(tmp_path.rglob(".checkpoint*")) and not (tmp_path / "scit" / "adapter").exists()


def test_nan_in_the_states_names_layer_and_example(tiny, tmp_path, monkeypatch, capfd):
    go(dual, *stages(tiny, tmp_path)["dual"][1])
    own = collect.record_states

    def poisoned(*args):
        base, plus, minus = own(*args)
        plus[2][-1, 5] = float("nan")
        return base, plus, minus
    monkeypatch.setattr(collect, "record_states", poisoned)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        go(collect, "--out", tmp_path, *CPU)
    err = capfd.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and "layer 2 are NaN" in err and re.search(r"the (chosen|rejected) response to '\w", err)
    assert not (tmp_path / "dual" / "collect").exists()


def test_a_signal_to_a_real_process(tiny, tmp_path):
    """SIGINT while it trains: the step is finished, exit 130, one line with the command; the rerun goes on and ends."""
    command = [sys.executable, "scit.py", "--model", str(tiny / "model"), "--data", str(tiny / "pairs.jsonl"), "--out", str(tmp_path), "--steps", "120", *CPU]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(600):
        if (tmp_path / "scit" / "scit.log").exists() and (tmp_path / "scit" / "scit.log").read_text().count("\n") > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("scit.py: stopped; to go on: python scit.py --model")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "goes on after step" in again.stdout and (tmp_path / "scit" / "adapter" / "stage.json").is_file()


def limited(size):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.parametrize("script, size", [("collect.py", 20_000), ("align.py", 20_000), ("dual.py", 20_000)])
def test_no_room_is_one_line_and_exit_1(script, size, done, tmp_path):  # noqa: F811
    """No file may grow beyond a limit, as on a full disk: what was there stays, byte for byte."""
    shutil.copytree(done, tmp_path / "out")
    before = listing(tmp_path / "out")
    settings = json.loads(before["dual/good/stage.json"])["settings"]
    source = ["--model", settings["model"], "--data", settings["data"][0], "--steps", "2"] if script == "dual.py" else ["--method", "dual"]
    end = subprocess.run([sys.executable, script, "--out", tmp_path / "out", *source, *CPU], cwd=ROOT, capture_output=True, text=True, preexec_fn=limited(size))
    lines = [line for line in end.stderr.splitlines() if "error" in line]
    assert end.returncode == 1 and len(lines) == 1 and lines[0].startswith(f"{script}: error: ") and "Traceback" not in end.stderr, end.stderr[-800:]
    after = listing(tmp_path / "out")
    assert {name: after.get(name) for name in before if not name.endswith(".log")} == {name: before[name] for name in before if not name.endswith(".log")}


def test_out_cannot_be_a_file(tiny, tmp_path):
    (tmp_path / "file").touch()
    end = subprocess.run([sys.executable, "dual.py", "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path / "file", "--steps", "1", *CPU],
                         cwd=ROOT, capture_output=True, text=True)
    assert end.returncode == 1 and "error" in end.stderr and "Traceback" not in end.stderr


def test_killed_between_the_two_renames(done, tmp_path):  # noqa: F811
    """The earlier folder has its other name and the new one not yet its own: the earlier is found again."""
    shutil.copytree(done / "dual", tmp_path / "dual")
    (tmp_path / "dual" / "collect").rename(tmp_path / "dual" / ".collect.old")
    go(align, "--out", tmp_path, "--steps", "2", *CPU)
    assert (tmp_path / "dual" / "collect").is_dir() and not (tmp_path / "dual" / ".collect.old").exists()


def test_nothing_is_executed_and_nothing_outside_is_read(done, tmp_path, capfd):  # noqa: F811
    """A checkpoint with code in it is refused unrun; a record whose names lead out of its folder too."""
    import pickle
    shutil.copytree(done, tmp_path / "out")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'run'}",)
    (tmp_path / "out" / "dual" / ".checkpoint-align-strength_0.25").write_bytes(pickle.dumps(Evil()))
    for change in (lambda: None, lambda: path.write_text(json.dumps(resealed({**record, "shards": ["../../../secret"]})))):
        path = tmp_path / "out" / "dual" / "collect" / "stage.json"
        record = json.loads(path.read_text())
        change()
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            go(align, "--out", tmp_path / "out", "--method", "dual", "--steps", "2", *CPU)
        assert stop.value.code == 2
    assert "stage record" in capfd.readouterr().err and not (tmp_path / "run").exists()


def resealed(record):
    return {**record, "seal": files.seal(record)}


def test_random_states_are_part_of_a_checkpoint(tmp_path):
    class Config:
        checkpoint_minutes, restart = 10, False
    adapter = torch.nn.Linear(2, 2)
    torch.manual_seed(3)
    checkpoint.Checkpoint(tmp_path / "c", {"a": 1}, Config, adapter=adapter).save(5)
    want = torch.rand(3)
    torch.manual_seed(4)
    assert checkpoint.Checkpoint(tmp_path / "c", {"a": 1, "device": "other"}, Config, adapter=torch.nn.Linear(2, 2)).step == 5 and torch.equal(torch.rand(3), want)


def powerless():
    """Root without its power over permissions: what any other user is."""
    if os.geteuid() == 0:
        import ctypes
        for capability in (1, 2):             # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None, use_errno=True).prctl(24, capability, 0, 0, 0) == 0          # PR_CAPBSET_DROP


@pytest.mark.parametrize("what, code", [("out", 1), ("data", 2), ("adapter", 1), ("model", 2)])
def test_what_may_not_be_read_or_written(what, code, done, tiny, tmp_path):  # noqa: F811
    shutil.copytree(done, tmp_path / "out")
    shutil.copytree(tiny, tmp_path / "tiny")
    source = ["--model", tmp_path / "tiny" / "model", "--data", tmp_path / "tiny" / "pairs.jsonl"]
    command = ["collect.py", "--method", "dual"] if what == "adapter" else ["dual.py", *source, "--steps", "1"]
    path = {"out": tmp_path / "out", "data": tmp_path / "tiny" / "pairs.jsonl", "adapter": tmp_path / "out" / "dual" / "good" / "adapter_model.safetensors",
            "model": tmp_path / "tiny" / "model" / "model.safetensors"}[what]
    before = listing(tmp_path / "out")
    for folder in [tmp_path / "out" / "dual", tmp_path / "out"] if what == "out" else []:
        folder.chmod(0o555)
    if what == "out":
        (tmp_path / "out" / "dual" / "dual.log").chmod(0o444)
    else:
        path.chmod(0)
    end = subprocess.run([sys.executable, *command, "--out", tmp_path / "out", *CPU], cwd=ROOT, capture_output=True, text=True, preexec_fn=powerless)
    for place in (path, tmp_path / "out" / "dual", tmp_path / "out" / "dual" / "dual.log"):
        place.chmod(0o755)
    lines = [line for line in end.stderr.splitlines() if "error" in line]
    assert end.returncode == code and len(lines) == 1 and ("cannot read its weights" if what == "model" else "ermission denied") in lines[0] and "Traceback" not in end.stderr, end.stderr[-600:]
    assert listing(tmp_path / "out") == before
