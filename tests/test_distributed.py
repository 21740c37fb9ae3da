"""Stages that torchrun starts as several processes: the same result as in one."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from helpers import CPU, ROOT, command_line, go, listing, script_of, stage1_source
from rank import run_ranks
from safetensors.torch import load_file

import align
import collect
import dual
import evaluate
import scit
from common import config

STAGE1 = {"scit": scit, "dual": dual}
# 60 pairs in batches of 13: the fifth of an epoch has 8; of 3 processes one has fewer than others
STEPS = ["--steps", "6", "--batch-size", "13", "--tokens-per-pass", "600"]

# more files than processes
COLLECT = ["--layers", "1", "3", "--tokens-per-pass", "500"]


def torchrun(processes, stage, *args):
    """A stage that torchrun has started on the CPU, as a Popen."""
    command = ["torchrun", "--nproc-per-node", str(processes), *script_of(stage)]
    command += [*command_line(stage, args), "--device", "cpu"]
    # a session of its own, so that nothing is left when a test fails
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process, timeout=120):
    """(exit code, stdout, stderr) of a Popen that ends in time; if not, it is killed."""
    try:
        stdout, stderr = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, stdout, stderr


@pytest.fixture(scope="module")
def run_stage(tmp_path_factory):
    """A function that runs a stage in one process, or in several with what torchrun tells them.
    Returns what it printed."""

    def run(processes, stage, *args):
        if processes == 1:
            return go(stage, *args, *CPU)
        arguments = [*command_line(stage, args), "--device", "cpu"]
        script = ROOT / f"{stage.__name__}.py"
        folder = tmp_path_factory.mktemp("ranks")
        printed, *others = run_ranks(processes, script, arguments, folder)
        assert not any(others), "the first process alone prints"
        return printed

    return run


def run_all(run_stage, processes, method, source, out):
    """Stage 1 into a folder, for DUAL all three stages: what follows is the same for SCIT."""
    run_stage(processes, STAGE1[method], *source, "--out", out, *STEPS)
    if method == "dual":
        run_stage(processes, collect, "--out", out, *COLLECT)
        run_stage(processes, align, "--out", out, *STEPS, "--lr", "1e-2")


def last_line(path):
    """The last line of a training log that has a loss."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line][-1]


@pytest.fixture(scope="module", params=["scit", "dual"])
def method(request):
    return request.param


@pytest.fixture(scope="module")
def alone(method, run_stage, tiny, tmp_path_factory):
    """What run_all makes with one process."""
    out = tmp_path_factory.mktemp("alone")
    run_all(run_stage, 1, method, stage1_source(tiny, out)[:4], out)
    return out


def test_two_processes_do_what_one_does(method, alone, run_stage, tiny, tmp_path):
    run_all(run_stage, 2, method, stage1_source(tiny, tmp_path)[:4], tmp_path)
    paths = [path.relative_to(alone) for path in alone.rglob("adapter_model.safetensors")]
    assert len(paths) == {"scit": 1, "dual": 3}[method]
    for path in paths:
        expected, found = load_file(alone / path), load_file(tmp_path / path)
        for name, tensor in expected.items():
            difference = (found[name] - tensor).norm() / tensor.norm()
            assert difference < 1e-4, f"{path}: {name} is off by {difference}"


def test_the_first_gradient(method, run_stage, tiny, tmp_path):
    """The norm of the gradient, and the loss, after one step. 3 processes share 13 pairs."""
    lines = {}
    for processes in (1, 3):
        source = stage1_source(tiny, tmp_path / str(processes))
        options = ["--steps", "1", "--batch-size", "13"]
        run_stage(processes, STAGE1[method], *source, *options)
        lines[processes] = last_line(tmp_path / str(processes) / method / f"{method}.log")
    compared = [name for name in lines[1] if "second" not in name]
    assert {"loss", "contrast", "num_tokens"} < set(compared)
    for name in compared:
        assert lines[3][name] == pytest.approx(lines[1][name], rel=1e-6), name


def test_processes_without_an_example(run_stage, tiny, tmp_path):
    """The last batch of an epoch has one pair for three processes."""
    lines = {}
    for processes in (1, 3):
        source = stage1_source(tiny, tmp_path / str(processes))
        options = ["--limit", "7", "--steps", "4", "--batch-size", "3"]
        run_stage(processes, dual, *source, *options)
        lines[processes] = last_line(tmp_path / str(processes) / "dual" / "dual.log")
    for name in ("loss", "contrast", "grad_norm/good", "grad_norm/bad"):
        assert lines[3][name] == pytest.approx(lines[1][name], rel=1e-4), name


def collections(folder):
    """The bytes of a collection's files; its manifest says what made it."""
    files = listing(folder)
    return {name: content for name, content in files.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("method", ["dual"], indirect=True, scope="module")
def test_collections_are_byte_equal(method, alone, run_stage, tmp_path):
    """Three processes record the files that one records; also where files are fewer than
    processes."""
    for name in ("good", "bad"):
        shutil.copytree(alone / method / name, tmp_path / method / name)
    expected = collections(alone / method / "collect")
    assert len(expected) > 6
    run_stage(3, collect, "--out", tmp_path, *COLLECT)
    assert collections(tmp_path / method / "collect") == expected
    few = ["--out", tmp_path, "--limit", "2", "--layers", "1"]
    run_stage(3, collect, *few)
    found = collections(tmp_path / method / "collect")
    assert len(found) <= 4
    run_stage(1, collect, *few)
    assert collections(tmp_path / method / "collect") == found


def test_the_first_process_goes_first(tmp_path):
    """The others wait for what it makes, as for the embedded default; then all see it."""
    script = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from common import distributed
distributed.join("cpu")
made = pathlib.Path({str(tmp_path / "made")!r})
with distributed.first_process_first():
    if distributed.is_first():
        time.sleep(1)
        made.write_text("made")
    assert made.exists()
assert distributed.largest(distributed.RANK, 3 - distributed.RANK) == [1, 3]
print("from", distributed.RANK)
distributed.leave()
"""
    (tmp_path / "script.py").write_text(script)
    command = ["torchrun", "--nproc-per-node", "2", tmp_path / "script.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from 0\n"


def workers_of(process):
    """The ids of the processes that a torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return list(map(int, children.split()))


def wait_for(condition, process, seconds=60):
    """Wait until a condition holds while a process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        if time.monotonic() > end:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"nothing in {seconds} s")
        time.sleep(0.05)


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(run_stage, tiny, tmp_path):
    """kill -9 in the middle of dual.py; then a signal to torchrun; then the rest."""
    source = [*stage1_source(tiny, tmp_path), *STEPS, "--steps", "30"]
    source += ["--checkpoint-minutes", "0"]
    checkpoint = tmp_path / "dual" / ".checkpoint-dual"
    process = torchrun(2, dual, *source)
    wait_for(checkpoint.exists, process)
    workers = workers_of(process)
    os.kill(workers[1], signal.SIGKILL)
    start = time.monotonic()
    code, _, _ = finish(process)
    assert code != 0
    assert time.monotonic() - start < 20
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    killed_at = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < killed_at < 30

    process = torchrun(2, dual, *source)
    wait_for(lambda: torch.load(checkpoint, weights_only=True)["step"] > killed_at, process)
    process.send_signal(signal.SIGTERM)
    _, _, stderr = finish(process)
    assert stderr.count("stopped; to resume: torchrun --nproc-per-node 2 dual.py") == 1
    stopped_at = torch.load(checkpoint, weights_only=True)["step"]

    code, stdout, stderr = finish(torchrun(2, dual, *source))
    assert code == 0, stderr
    assert f"resuming after step {stopped_at}" in stdout
    assert (tmp_path / "dual" / "bad" / "stage.json").exists()
    # as a run of two processes that nothing has stopped
    again = tmp_path / "again"
    run_stage(2, dual, *source, "--out", again)
    for name in ("good", "bad"):
        path = f"dual/{name}/adapter_model.safetensors"
        assert (tmp_path / path).read_bytes() == (again / path).read_bytes()


def test_evaluate_is_one_process(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(config, "WORLD_SIZE", 2)
    refused(evaluate, "--out", tmp_path, words="torchrun: this runs in one process")


def test_bad_input_is_one_line(tiny, tmp_path):
    """Found before the processes have met, and after."""
    source = stage1_source(tiny, tmp_path)
    for args, message in (
        (["--lr", "none"], "--lr"),
        (["--batch-size", "1"], "--batch-size 1: 2 processes share a step's batch"),
    ):
        code, _, stderr = finish(torchrun(2, dual, *source, *args))
        assert code == 1
        lines = [line for line in stderr.splitlines() if line.startswith("dual.py: ")]
        assert len(lines) == 1, stderr
        assert lines[0].startswith("dual.py: error: ")
        assert message in lines[0]
        # of the process, in torchrun's report
        assert re.search(r"exitcode\s*: 2", stderr)
