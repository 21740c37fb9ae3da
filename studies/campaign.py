"""kill -9 at random moments in all stages; memory over many pairs; what the checks cost.

    python -m studies.campaign --kills 50                writes studies/results/campaign.json
    python -m studies.campaign --soak 50000              memory of collect and align over so many
                                                         short pairs; adds to the same file
    python -m studies.campaign --checks True             what digests and checkpoints cost

After a kill the stage is run again until it succeeds. In the end every safetensors file must be
the one that an undisturbed run has written.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

import align
import collect
import dual
from common import checkpoint, stages, toy
from common.config import NEGATIVE, POSITIVE, UserError, run, setting
from common.stages import file_digest, versions, write_json
from studies.shared import RESULTS, quietly

RESULT = RESULTS / "campaign.json"

# A small world, and checkpoints every 1.2 seconds.
WORLD = ["--kinds", "tool,misdeed", "--blocks", "4", "--pairs", "300"]
WORLD += ["--steps", "150", "--documents", "4800"]
CHECKPOINT_OFTEN = ["--checkpoint-minutes", "0.02"]

# The next stage of each method, and the folder that it waits for.
NEXT_STAGE = {
    "scit": ("collect scit", "scit/adapter"),
    "dual": ("collect dual", "dual/bad"),
    "collect scit": ("align scit", "scit/collect"),
    "collect dual": ("sweep dual", "dual/collect"),
}


@dataclass
class Config:
    kills: int = setting(0, "how often a stage is killed", minimum=0)
    soak: int = setting(0, "pairs of the soak", minimum=0)
    checks: bool = setting(False, "measure what the checks cost, on the embedded default")
    seed: int = setting(0, "seed of the moments", group="run")
    work: str = setting("/tmp/rahf-campaign", "folder of the stages", group="run")


class Process:
    """A command of the project in an interpreter of its own. Its output goes to a file: a pipe
    that nobody reads would stop it."""

    def __init__(self, command):
        self.file = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [sys.executable, *command], stdout=self.file, stderr=subprocess.STDOUT
        )

    def output(self):
        self.file.seek(0)
        return self.file.read()

    def expect(self, code):
        """Wait for the end; RuntimeError with the output at another exit code."""
        if self.popen.wait() != code:
            raise RuntimeError(f"exit code {self.popen.returncode}, not {code}:\n{self.output()}")


# ---------------------------------------------------------------- kills


def commands(out, source):
    """The commands of all stages of both methods, {name: arguments of python}."""
    run_settings = ["--device", "cpu", "--out", str(out)]
    scit_out = [*run_settings, "--method", "scit"]
    dual_out = [*run_settings, "--method", "dual"]
    stage1 = [*source, *run_settings, "--steps", "60", *CHECKPOINT_OFTEN]
    sweep = ["--strength", "0.1", "0.2", "--steps", "40", "--max-new-tokens", "4"]
    return {
        "scit": ["scit.py", *stage1],
        "dual": ["dual.py", *stage1],
        "collect scit": ["collect.py", *scit_out, "--shard-mb", "2"],
        "collect dual": ["collect.py", *dual_out, "--shard-mb", "2", "--store", "diff"],
        "align scit": [
            "align.py",
            *scit_out,
            "--strength",
            "0.25",
            "--steps",
            "60",
            *CHECKPOINT_OFTEN,
        ],
        "sweep dual": ["-m", "tools.sweep", *dual_out, *sweep, *CHECKPOINT_OFTEN],
    }


def weight_digests(out):
    """{path: digest} of all safetensors files of the stages."""
    paths = sorted(Path(out).rglob("*.safetensors"))
    return {str(path.relative_to(out)): file_digest(path) for path in paths}


def run_with_kills(name, out, source, seconds, kills, config, rng):
    """Run one stage until it succeeds, killed up to twice on the way; adds to the list kills."""
    killed_here = False
    for attempt in range(3):
        process = Process(commands(out, source)[name])
        moment = None
        if attempt < 2 and len(kills) < config.kills and rng.random() < 0.8:
            moment = rng.uniform(0.2, 1.0) * seconds
        try:
            process.popen.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            process.popen.send_signal(signal.SIGKILL)
            process.popen.wait()
            killed_here = True
            kills.append({"stage": name, "after": round(moment, 2)})
            next_stage, needed = NEXT_STAGE.get(name, (None, ""))
            if next_stage and rng.random() < 0.3 and not (out / needed).exists():
                # the next stage must refuse an unfinished folder
                Process(commands(out, source)[next_stage]).expect(2)
                kills[-1]["later stage refused"] = True
            continue
        process.expect(0)
        if killed_here:
            kills[-1]["went on from a checkpoint"] = "resuming" in process.output()
        return


def kill_campaign(config):
    """Run whole pipelines with kills wherever they fall. Yields the summary after each pipeline,
    so that an interrupted campaign leaves a result."""
    work, rng = Path(config.work), random.Random(config.seed)
    shutil.rmtree(work, ignore_errors=True)
    Process(["-m", "common.toy", "--out", str(work / "world"), *WORLD]).expect(0)
    world = work / "world" / "toy" / "seed0"
    source = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl")]
    source += ["--max-length", "200"]

    seconds = {}
    for name, command in commands(work / "undisturbed", source).items():
        start = time.time()
        Process(command).expect(0)
        seconds[name] = time.time() - start
    expected = weight_digests(work / "undisturbed")

    kills = []
    while len(kills) < config.kills:
        out = work / "killed"
        shutil.rmtree(out, ignore_errors=True)
        for name in seconds:
            run_with_kills(name, out, source, seconds[name], kills, config, rng)
        digests = weight_digests(out)
        paths = sorted({*expected, *digests})
        differing = [path for path in paths if digests.get(path) != expected.get(path)]
        if differing:
            raise RuntimeError(f"after {len(kills)} kills these files differ: {differing}")
        print(f"{len(kills)} kills, all files as in the undisturbed run", flush=True)
        by_stage = Counter(kill["stage"] for kill in kills)
        resumed = [kill for kill in kills if kill.get("went on from a checkpoint")]
        yield {
            "kills": len(kills),
            "by stage": {name: by_stage[name] for name in seconds},
            "reruns that went on from a checkpoint": len(resumed),
            "all files as undisturbed": True,
            "log": kills,
        }


# ---------------------------------------------------------------- soak


def resident_memory(pid):
    """(anonymous, file-backed) resident memory of a process, in megabytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")]


def write_short_pairs(folder, count):
    """A random model and `count` short pairs."""
    rng = random.Random(0)
    docs = toy.documents(toy.split_requests(list(toy.ASK), 0), 2000, rng)
    texts = [prompt + reply for prompt, reply in docs]
    tokenizer = toy.train_tokenizer([*texts, POSITIVE, NEGATIVE])
    torch.manual_seed(0)
    toy.make_base(toy.Config(width=32, blocks=4), tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with open(folder / "pairs.jsonl", "w") as file:
        for i in range(count):
            row = {"prompt": f"Say {i}.", "chosen": f"Gladly {i % 97}."}
            row |= {"rejected": f"No {i % 89}.", "split": "train" if i % 500 else "valid"}
            print(json.dumps(row), file=file)


def watch_memory(command):
    """Run a command. Returns its seconds and its memory at half time and at the end."""
    process, start, samples = Process(command), time.time(), []
    while process.popen.poll() is None:
        # no memory is left of a process that has just ended
        with contextlib.suppress(OSError, KeyError):
            samples.append((time.time() - start, *resident_memory(process.popen.pid)))
        time.sleep(0.25)
    process.expect(0)
    # the last samples may be of an interpreter that is shutting down
    second_half = samples[len(samples) // 2 : -2]
    return {
        "seconds": round(samples[-1][0], 1),
        "anonymous MB at half time": round(second_half[0][1], 1),
        "anonymous MB at the end": round(second_half[-1][1], 1),
        "file-backed MB at the end": round(second_half[-1][2], 1),
    }


def soak(config):
    """Memory of each stage over many short pairs: does it grow in the second half?"""
    out = Path(config.work) / "soak"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    write_short_pairs(out, config.soak)
    source = ["--model", str(out / "model"), "--data", str(out / "pairs.jsonl")]
    run_settings = ["--device", "cpu", "--out", str(out)]
    # one epoch of both responses
    steps = str(2 * config.soak // 64)
    stage_commands = {
        "dual": ["dual.py", *source, "--steps", "20"],
        "collect": ["collect.py", "--layers", "1", "--shard-mb", "20", "--limit", str(config.soak)],
        "align": ["align.py", "--alpha", "1", "--steps", steps, "--batch-size", "64"],
    }
    figures = {"pairs": config.soak}
    for name, command in stage_commands.items():
        figures[name] = watch_memory([*command, *run_settings])
        print(name, figures[name], flush=True)
    return figures


# ---------------------------------------------------------------- checks


def checks(config):
    """The share of each stage's time that digests and checkpoints take, embedded default."""
    out = str(Path(config.work) / "checks")
    toy.ensure_world(toy.Config(out=out))
    spent = 0.0

    def timed(function):
        def call(*args):
            nonlocal spent
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent += time.perf_counter() - start

        return call

    stages.file_digest = timed(stages.file_digest)
    checkpoint.Checkpoint.save = timed(checkpoint.Checkpoint.save)
    figures = {}
    for stage in (dual, collect, align):
        spent = 0.0
        seconds = quietly(stage, out=out)
        share = round(spent / seconds, 4)
        figures[stage.__name__] = {
            "seconds": round(seconds, 2),
            "of it checks and checkpoints": share,
        }
        print(stage.__name__, figures[stage.__name__], flush=True)
    return figures


def main(config):
    if not (config.kills or config.soak or config.checks):
        raise UserError("give --kills, --soak or --checks")
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"versions": versions(), "machine": f"{os.cpu_count()} CPUs"}
    if config.kills:
        for summary in kill_campaign(config):
            result["kills"] = summary
            write_json(RESULT, result)
    if config.checks:
        result["checks"] = checks(config)
    if config.soak:
        result["soak"] = soak(config)
    write_json(RESULT, result)


if __name__ == "__main__":
    run(main, Config)
