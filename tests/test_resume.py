"""An interrupted run resumes and ends as one that never stopped. Faults of the machine end in one
line. What an earlier run wrote stays whole."""

import ctypes
import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    CPU,
    ROOT,
    call,
    command_line,
    go,
    listing,
    script_of,
    stage1_source,
    without_logs,
)

import align
import collect
import dual
import scit
from common import stages
from common.checkpoint import Checkpoint
from tools import sweep

STEPS = 7

# small passes and shards, so that there are many
COLLECT = ["--tokens-per-pass", "100", "--shard-mb", "0.1", *CPU]


def command_of(name, tiny, out):
    """(stage, arguments) of a short run. With dropout the state of the random generator counts."""
    training = ["--steps", STEPS, "--lora-dropout", "0.2", *CPU]
    later = ["--out", out, "--method", "dual", *training]
    return {
        "scit": (scit, [*stage1_source(tiny, out), *training]),
        "dual": (dual, [*stage1_source(tiny, out), *training]),
        "align": (align, later),
        "sweep": (sweep, [*later, "--strength", "0.1", "0.2", "--max-new-tokens", "2"]),
    }[name]


def adapters(out):
    """{relative path: bytes} of the adapters in a folder."""
    return {name: data for name, data in listing(out).items() if name.endswith("model.safetensors")}


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def dual_done(tiny, tmp_path_factory):
    """A folder in which dual.py has run. Not to be changed."""
    out = tmp_path_factory.mktemp("dual_done")
    stage, args = command_of("dual", tiny, out)
    go(stage, *args)
    return out


@pytest.fixture(scope="module")
def collected(dual_done, tmp_path_factory):
    """A folder in which dual.py and collect.py have run. Not to be changed."""
    out = tmp_path_factory.mktemp("collected")
    shutil.copytree(dual_done / "dual", out / "dual")
    go(collect, "--out", out, *CPU)
    return out


@pytest.fixture(scope="module")
def prepare(collected):
    """A function that puts into a folder what a stage needs: align and sweep read a collection."""

    def copy(name, out):
        if name in ("align", "sweep"):
            shutil.copytree(collected / "dual", out / "dual")

    return copy


@pytest.fixture(scope="module")
def uninterrupted(tiny, prepare, tmp_path_factory):
    """{stage: its adapters} of runs without a stop."""
    expected = {}
    for name in ("scit", "dual", "align", "sweep"):
        out = tmp_path_factory.mktemp(name)
        prepare(name, out)
        stage, args = command_of(name, tiny, out)
        go(stage, *args)
        expected[name] = adapters(out)
    return expected


# ---------------------------------------------------------------- ways to stop a training run


class StepWatcher:
    """Takes the place of Checkpoint.after_step within the process: counts the steps, and stops
    the run after some step of all: with a signal, or as if it were killed."""

    def __init__(self, monkeypatch):
        self.after_step = Checkpoint.after_step
        self.steps = []
        self.stop_after = None
        self.signal_number = None
        monkeypatch.setattr(Checkpoint, "after_step", self.bound())

    def bound(self):
        def after_step(checkpoint, step, loss):
            self.steps.append(step)
            if self.signal_number:
                self.send_signal(checkpoint)
            else:
                self.kill(checkpoint, step)
            self.after_step(checkpoint, step, loss)

        return after_step

    def send_signal(self, checkpoint):
        if len(self.steps) == self.stop_after:
            checkpoint.receive(self.signal_number, None)

    def kill(self, checkpoint, step):
        """The last checkpoint is two steps old, and nothing is saved at the end."""
        if self.stop_after and len(self.steps) == self.stop_after - 2:
            checkpoint.save(step)
        if len(self.steps) == self.stop_after:
            raise ZeroDivisionError

    def interrupt(self, stop_after, signal_number=signal.SIGTERM):
        """Send a signal after this many steps from here on."""
        self.steps.clear()
        self.stop_after = stop_after
        self.signal_number = signal_number

    def kill_after(self, stop_after):
        """Raise an exception after this many steps from here on."""
        self.interrupt(stop_after, None)

    def let_run(self):
        self.interrupt(None, None)


@pytest.fixture
def watcher(monkeypatch):
    return StepWatcher(monkeypatch)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("how", ["signal", "killed"])
@pytest.mark.parametrize(
    "name, stop_after",
    [("scit", 3), ("dual", 4), ("align", 5), ("sweep", 3), ("sweep", 11)],
)
def test_an_interrupted_run_ends_as_one_that_never_stopped(
    name, stop_after, how, uninterrupted, tiny, prepare, tmp_path, watcher, fails
):
    prepare(name, tmp_path)
    stage, args = command_of(name, tiny, tmp_path)
    if how == "signal":
        watcher.interrupt(stop_after)
        code, lines = fails(stage, *args)
        assert code == 143
        script = f"{stage.__name__.rpartition('.')[2]}.py"
        assert lines[-1].startswith(f"{script}: stopped; to resume: python ")
        assert "--lora-dropout 0.2" in lines[-1]
        saved_step = watcher.steps[-1]
    else:
        watcher.kill_after(stop_after)
        with pytest.raises(ZeroDivisionError):
            go(stage, *args)
        saved_step = watcher.steps[-3]
    watcher.let_run()
    output = go(stage, *args)
    assert f"resuming after step {saved_step}, from" in output
    assert adapters(tmp_path) == uninterrupted[name]
    assert not list(tmp_path.rglob(".checkpoint*"))
    assert not list(tmp_path.rglob("*.partial"))
    log_name = {
        "scit": "scit/scit.log",
        "dual": "dual/dual.log",
        "align": "dual/align.log",
        "sweep": "dual/sweep/strength_0.2.log",
    }[name]
    steps = [line.get("step") for line in read_log(tmp_path / log_name)]
    # the versions' line has none
    assert {None, STEPS} <= set(steps)


def test_a_refused_run_leaves_the_log_and_a_restarted_one_begins_it_anew(
    tiny, tmp_path, watcher, fails, monkeypatch
):
    monkeypatch.setattr("common.log.LOG_INTERVAL", 2)
    stage, args = command_of("dual", tiny, tmp_path)
    log = tmp_path / "dual" / "dual.log"
    watcher.interrupt(4)
    fails(stage, *args)
    watcher.let_run()
    interrupted = log.read_text()
    assert [line.get("step") for line in read_log(log)] == [None, 2, 4]
    code, _ = fails(stage, *args, "--lr", "0.1")
    assert code == 2
    assert log.read_text() == interrupted
    go(stage, *args, "--restart", "True")
    # the last line has the rewards
    steps = [line.get("step") for line in read_log(log)]
    assert steps == [None, 2, 4, 6, STEPS, STEPS]


def test_other_settings_are_refused_and_restart_starts_again(
    uninterrupted, tiny, tmp_path, watcher, fails
):
    stage, args = command_of("scit", tiny, tmp_path)
    watcher.interrupt(4, signal.SIGINT)
    code, _ = fails(stage, *args)
    assert code == 130
    watcher.let_run()
    for changed, words in [
        (["--lr", "0.1"], "a run with lr 0.0005, not 0.1"),
        (["--seed", "3"], "seed 0, not 3"),
    ]:
        code, lines = fails(stage, *args, *changed)
        assert code == 2
        assert words in lines[-1]
        assert "--restart" in lines[-1]
    path = tmp_path / "scit" / ".checkpoint-scit"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    code, lines = fails(stage, *args)
    assert code == 2
    assert "cannot be read" in lines[-1]
    assert "resuming" not in go(stage, *args, "--restart", "True")
    assert adapters(tmp_path) == uninterrupted["scit"]


def test_the_command_to_resume_is_the_command_without_restart(
    tiny, prepare, tmp_path, watcher, fails
):
    prepare("align", tmp_path)
    stage, args = command_of("align", tiny, tmp_path)
    watcher.interrupt(2)
    _, lines = fails(stage, "--restart", *args)
    assert "to resume: python " in lines[-1]
    assert lines[-1].endswith(shlex.join(command_line(stage, args)))
    assert "--restart" not in lines[-1]


def test_a_checkpoint_of_one_method_is_not_that_of_the_other(
    tiny, prepare, tmp_path, watcher, fails
):
    prepare("align", tmp_path)
    stage, args = command_of("align", tiny, tmp_path)
    watcher.interrupt(2)
    fails(stage, *args)
    watcher.let_run()
    stage, args = command_of("scit", tiny, tmp_path)
    go(stage, *args)
    go(collect, "--out", tmp_path, "--method", "scit", *CPU)
    output = go(align, "--out", tmp_path, "--method", "scit", "--steps", "2", *CPU)
    assert "resuming" not in output
    assert (tmp_path / "dual" / ".checkpoint-align").is_file()


def test_a_diverged_run_leaves_no_checkpoint(tiny, tmp_path, fails, monkeypatch):
    stage, args = command_of("scit", tiny, tmp_path)
    code, lines = fails(stage, *args, "--lr", "1e30", "--checkpoint-minutes", "0")
    assert code == 2
    assert re.search(r"the loss is (nan|inf) at step \d", lines[-1])
    assert not list(tmp_path.rglob(".checkpoint*"))

    original = Checkpoint.after_step

    def poisoned(checkpoint, step, loss):
        """The loss is finite, but not what the last step made of the adapter."""
        checkpoint.state["adapter"].B[-1].data[0, 0] = float("nan")
        original(checkpoint, step, loss)

    monkeypatch.setattr(Checkpoint, "after_step", poisoned)
    code, lines = fails(stage, *args, "--steps", "1")
    assert code == 2
    assert "numbers in the adapter at step 1: lower --lr" in lines[-1]
    assert not list(tmp_path.rglob(".checkpoint*"))
    assert not (tmp_path / "scit" / "adapter").exists()


def test_random_states_are_part_of_a_checkpoint(tmp_path):
    config = SimpleNamespace(steps=9, checkpoint_minutes=10, restart=False, device="cpu")
    torch.manual_seed(3)
    Checkpoint(tmp_path / "c", config, {"a": 1}, adapter=torch.nn.Linear(2, 2)).save(5)
    expected = torch.rand(3)
    torch.manual_seed(4)
    # another device is no other run
    config.device = "other"
    checkpoint = Checkpoint(tmp_path / "c", config, {"a": 1}, adapter=torch.nn.Linear(2, 2))
    assert checkpoint.step == 5
    assert torch.equal(torch.rand(3), expected)


def test_a_signal_to_a_real_process(tiny, tmp_path):
    """SIGINT while it trains: the step is finished, exit code 130, one line with the command. The
    next run resumes and completes."""
    args = [*stage1_source(tiny, tmp_path), "--steps", "120", *CPU]
    command = [sys.executable, *script_of(scit), *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "scit" / "scit.log"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) > 2:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    expected = "scit.py: stopped; to resume: python scit.py --model"
    assert err.strip().splitlines()[-1].startswith(expected)
    result = call(scit, *args)
    assert result.returncode == 0
    assert "resuming after step" in result.stdout
    assert (tmp_path / "scit" / "adapter" / "stage.json").is_file()


# ---------------------------------------------------------------- the sweep


@pytest.fixture
def interrupted_sweep(tiny, prepare, tmp_path, watcher, fails):
    """The arguments of a sweep that was interrupted in the fourth step of its second adapter. An
    adapter that align wrote before is there."""
    prepare("sweep", tmp_path)
    go(align, "--out", tmp_path, "--steps", "1", *CPU)
    _, args = command_of("sweep", tiny, tmp_path)
    watcher.interrupt(STEPS + 4)
    code, _ = fails(sweep, *args)
    assert code == 143
    watcher.let_run()
    return args


def test_a_sweep_resumes_at_the_adapter_in_training(
    interrupted_sweep, uninterrupted, tmp_path, watcher
):
    partial = tmp_path / "dual" / ".sweep.partial"
    written = partial / "strength_0.1" / "adapter_model.safetensors"
    assert written.is_file()
    assert (partial / ".checkpoint-strength_0.2").is_file()
    time_written = written.stat().st_mtime_ns
    output = go(sweep, *interrupted_sweep)
    assert f"{partial}: resuming" in output
    assert "resuming after step 4" in output
    # nothing is trained again
    assert watcher.steps == [5, 6, 7]
    written = tmp_path / "dual" / "sweep" / "strength_0.1" / "adapter_model.safetensors"
    assert written.stat().st_mtime_ns == time_written
    assert adapters(tmp_path) == uninterrupted["sweep"]
    assert not partial.exists()
    assert not (tmp_path / "dual" / "sweep" / "resume_key").exists()


def test_a_sweep_that_was_interrupted_while_scoring_trains_nothing_again(
    uninterrupted, tiny, prepare, tmp_path, watcher, monkeypatch
):
    prepare("sweep", tmp_path)
    _, args = command_of("sweep", tiny, tmp_path)

    def crash(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(sweep, "score_models", crash)
        with pytest.raises(ZeroDivisionError):
            go(sweep, *args)
    assert not (tmp_path / "dual" / "align").exists()
    watcher.let_run()
    go(sweep, *args)
    assert watcher.steps == []
    assert adapters(tmp_path) == uninterrupted["sweep"]


def test_a_sweep_with_other_settings_starts_again(interrupted_sweep, tmp_path, watcher):
    output = go(sweep, *interrupted_sweep, "--lr", "5e-4")
    partial = tmp_path / "dual" / ".sweep.partial"
    assert f"{partial}: made with other settings, deleted" in output
    assert "resuming" not in output
    assert len(watcher.steps) == 2 * STEPS
    for value in ("0.1", "0.2"):
        folder = tmp_path / "dual" / "sweep" / f"strength_{value}"
        settings = stages.read_stage(folder, "align", "")["settings"]
        assert settings["lr"] == 5e-4


def test_a_sweep_writes_align_at_its_end(interrupted_sweep, uninterrupted, tmp_path):
    """Interrupted, it has changed nothing in OUT/METHOD/align; at the end the best one is there,
    which align's own run would have written."""
    settings = stages.read_stage(tmp_path / "dual" / "align", "align", "")["settings"]
    assert settings["steps"] == 1
    go(sweep, *interrupted_sweep)
    folder = tmp_path / "dual"
    best = json.loads((folder / "sweep" / "sweep.json").read_text())["best"]
    content = (folder / "align" / "adapter_model.safetensors").read_bytes()
    assert content == (folder / "sweep" / best / "adapter_model.safetensors").read_bytes()
    manifest = stages.read_stage(folder / "align", "align", "")
    assert stages.verified_path(folder / "align", manifest).is_dir()
    assert f"strength_{manifest['settings']['strength']:g}" == best


# ---------------------------------------------------------------- collect


class PassWatcher:
    """Takes the place of collect.record_states: counts the passes and their examples, and fails
    at the pass number `fail_at`."""

    def __init__(self, monkeypatch):
        self.record_states = collect.record_states
        self.passes = []
        self.fail_at = None
        monkeypatch.setattr(collect, "record_states", self.record)

    def record(self, trunk, adapters, config, examples, pad_id):
        self.passes.append(len(examples))
        if len(self.passes) == self.fail_at:
            raise ZeroDivisionError
        return self.record_states(trunk, adapters, config, examples, pad_id)

    def restart(self, fail_at=None):
        self.passes.clear()
        self.fail_at = fail_at


@pytest.fixture
def pass_watcher(monkeypatch):
    return PassWatcher(monkeypatch)


@pytest.fixture
def interrupted_collect(dual_done, tmp_path, pass_watcher):
    """What a whole run of collect wrote, its files and its manifest; that folder is gone, and a
    second run was killed at three quarters of its passes."""
    shutil.copytree(dual_done / "dual", tmp_path / "dual")
    folder = tmp_path / "dual" / "collect"
    go(collect, "--out", tmp_path, *COLLECT)
    files = {name: data for name, data in listing(folder).items() if name != "stage.json"}
    manifest = stages.read_stage(folder, "collect", "")
    shutil.rmtree(folder)
    pass_watcher.restart(fail_at=len(pass_watcher.passes) * 3 // 4)
    with pytest.raises(ZeroDivisionError):
        go(collect, "--out", tmp_path, *COLLECT)
    kept = list((tmp_path / "dual" / ".collect.partial").glob("shard*"))
    assert 1 < len(kept) < len(manifest["shards"])
    return SimpleNamespace(folder=folder, files=files, manifest=manifest)


def test_collect_resumes_at_the_first_missing_shard(interrupted_collect, tmp_path, pass_watcher):
    passes = pass_watcher.fail_at * 4 // 3
    pass_watcher.restart()
    output = go(collect, "--out", tmp_path, *COLLECT)
    assert ".collect.partial: resuming" in output
    assert 0 < len(pass_watcher.passes) < passes / 2
    files = listing(interrupted_collect.folder)
    manifest = json.loads(files.pop("stage.json"))
    assert files == interrupted_collect.files
    assert manifest == interrupted_collect.manifest
    assert not (tmp_path / "dual" / ".collect.partial").exists()


@pytest.mark.parametrize("setting", [("--layers", "1"), ("--tokens-per-pass", "60")])
def test_collect_with_other_settings_starts_again(
    setting, interrupted_collect, tmp_path, pass_watcher
):
    """The size of a pass decides which responses stand in which shard."""
    pass_watcher.restart()
    output = go(collect, "--out", tmp_path, *COLLECT, *setting)
    assert ".collect.partial: made with other settings, deleted" in output
    # both responses of all training and validation pairs
    assert sum(pass_watcher.passes) == 120 + 40
    manifest = stages.read_stage(interrupted_collect.folder, "collect", "")
    if setting[0] == "--layers":
        assert manifest["settings"]["layers"] == [1]


def test_collect_resumes_where_only_digests_are_missing(dual_done, tmp_path, monkeypatch):
    """All shards are written when it is interrupted: the next run records nothing, and counts
    their space on the disk as free."""
    shutil.copytree(dual_done / "dual", tmp_path / "dual")
    file_digest = stages.file_digest

    def crash_at_shards(path):
        if "shard" in path.name:
            raise ZeroDivisionError
        return file_digest(path)

    def crash(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(stages, "file_digest", crash_at_shards)
        with pytest.raises(ZeroDivisionError):
            go(collect, "--out", tmp_path, *CPU)
    partial = tmp_path / "dual" / ".collect.partial"
    written = sum(path.stat().st_size for path in partial.glob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)

    def almost_full(path):
        return usage._replace(free=written // 10)

    monkeypatch.setattr(collect, "record_states", crash)
    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    output = go(collect, "--out", tmp_path, *CPU)
    assert ".collect.partial: resuming" in output
    assert (tmp_path / "dual" / "collect" / "stage.json").is_file()
    assert not (tmp_path / "dual" / "collect" / "resume_key").exists()


def test_nan_in_the_states_names_layer_and_response(dual_done, tmp_path, monkeypatch, fails):
    shutil.copytree(dual_done / "dual", tmp_path / "dual")
    original = collect.record_states

    def poisoned(*args):
        base, plus, minus = original(*args)
        plus[2][-1, 5] = float("nan")
        return base, plus, minus

    monkeypatch.setattr(collect, "record_states", poisoned)
    code, lines = fails(collect, "--out", tmp_path, *CPU)
    assert code == 2
    assert "layer 2 are NaN" in lines[-1]
    assert re.search(r"the (chosen|rejected) response to '\w", lines[-1])
    assert not (tmp_path / "dual" / "collect").exists()


# ---------------------------------------------------------------- faults of the machine


def run_restricted(restrict, stage, *args):
    """Run a stage in an interpreter of its own, restrict() being called in it first."""
    command = [sys.executable, *script_of(stage), *map(str, args)]
    return subprocess.run(
        command, cwd=ROOT, check=False, capture_output=True, text=True, preexec_fn=restrict
    )


def error_of(result, stage):
    """The one line on standard error that says what failed; there is no traceback."""
    assert "Traceback" not in result.stderr, result.stderr[-800:]
    lines = [line for line in result.stderr.splitlines() if "error" in line]
    assert len(lines) == 1, result.stderr[-800:]
    assert lines[0].startswith(f"{stage.__name__}.py: error: ")
    return lines[0]


def no_large_files():
    """No file may grow beyond a limit, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


@pytest.mark.parametrize("stage", [collect, align, dual])
def test_a_full_disk_is_one_line_and_exit_code_1(stage, done, tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = without_logs(listing(out))
    args = ["--out", out, "--method", "dual"]
    if stage is dual:
        args = [*stage1_source(tiny, out), "--steps", "2"]
    result = run_restricted(no_large_files, stage, *args, *CPU)
    assert result.returncode == 1
    error_of(result, stage)
    after = listing(out)
    assert {name: after.get(name) for name in before} == before


def test_out_cannot_be_a_file(tiny, tmp_path):
    (tmp_path / "file").touch()
    result = call(dual, *stage1_source(tiny, tmp_path / "file"), "--steps", "1", *CPU)
    assert result.returncode == 1
    error_of(result, dual)


def drop_privileges():
    """Take from root its power over permissions, which no other user has."""
    CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, PR_CAPBSET_DROP = 1, 2, 24
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            assert libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0


@pytest.mark.parametrize(
    "name, stage, code, words",
    [
        ("out/dual/good/adapter_model.safetensors", collect, 1, "ermission denied"),
        ("tiny/pairs.jsonl", dual, 2, "ermission denied"),
        ("tiny/model/model.safetensors", dual, 2, "cannot read its weights"),
    ],
)
def test_what_may_not_be_read(name, stage, code, words, done, tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    shutil.copytree(tiny, tmp_path / "tiny")
    before = listing(out)
    args = ["--out", out, "--method", "dual"]
    if stage is dual:
        args = [*stage1_source(tmp_path / "tiny", out), "--steps", "1"]
    (tmp_path / name).chmod(0)
    result = run_restricted(drop_privileges, stage, *args, *CPU)
    (tmp_path / name).chmod(0o644)
    assert result.returncode == code
    assert words in error_of(result, stage)
    assert listing(out) == before


def test_what_may_not_be_written(done, tiny, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    before = listing(out)
    paths = [out / "dual" / "dual.log", out / "dual", out]
    for path in paths:
        path.chmod(0o555)
    args = [*stage1_source(tiny, out), "--steps", "1", *CPU]
    result = run_restricted(drop_privileges, dual, *args)
    for path in paths:
        path.chmod(0o755)
    assert result.returncode == 1
    assert "ermission denied" in error_of(result, dual)
    assert listing(out) == before


# ---------------------------------------------------------------- what an earlier run wrote


def test_killed_between_the_two_renames(done, tmp_path):
    """The earlier folder has its other name and the new one not yet its own: the earlier is used
    again."""
    shutil.copytree(done / "dual", tmp_path / "dual")
    (tmp_path / "dual" / "collect").rename(tmp_path / "dual" / ".collect.old")
    go(align, "--out", tmp_path, "--steps", "2", *CPU)
    assert (tmp_path / "dual" / "collect").is_dir()
    assert not (tmp_path / "dual" / ".collect.old").exists()


class Malicious:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_in_a_checkpoint_is_run(done, tmp_path, fails):
    shutil.copytree(done, tmp_path / "out")
    code_file = tmp_path / "out" / "dual" / ".checkpoint-align"
    malicious = Malicious(f"touch {tmp_path / 'run'}")
    # the protocol that torch.load expects
    code_file.write_bytes(pickle.dumps(malicious, protocol=2))
    args = ["--out", tmp_path / "out", "--method", "dual", "--steps", "2", *CPU]
    code, lines = fails(align, *args)
    assert code == 2
    assert "cannot be read" in lines[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd"])
def test_no_file_outside_a_folder_is_read(name, done, tmp_path, fails):
    shutil.copytree(done, tmp_path / "out")
    path = tmp_path / "out" / "dual" / "collect" / "stage.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "shards": [name]}))
    code, lines = fails(align, "--out", tmp_path / "out", "--method", "dual", *CPU)
    assert code == 2
    assert "not a valid stage manifest" in lines[-1]
