"""Everything that only a GPU can tell, in three parts of at most nine minutes each.

    python -m studies.gpu --part 1     the kernel: its tests, its benchmark, a profile of a step
    python -m studies.gpu --part 2     an 8B shape, random weights: speed and memory of each stage
    python -m studies.gpu --part 3     the embedded default with its scores, a 1B shape, the
                                       authors' way beside ours, the rest of the tests
    python -m studies.gpu --part 1 --tiny True       the same on the CPU in seconds, for a test

Each figure is appended to studies/results/gpu.jsonl as soon as it is there. Every piece runs in a
process of its own (with --tiny, most run in this one): one that fails, or runs out of memory or
time, is recorded as such, and the next begins.
"""

import contextlib
import io
import json
import runpy
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch

import align
import collect
import dual
import scit
from common import log, training
from common.answers import GenerationSettings, generate
from common.config import run, setting
from common.hf import choose_device, load_model, load_tokenizer
from common.stages import versions
from studies import bench_pipeline
from studies.shared import RESULTS, machine

# Pairs of the random shapes, and the steps of a training stage: the speed is that of the last ten,
# without what the first ones cost once.
PAIRS = 400
STEPS = {"dual": 20, "scit": 20, "align": 60}
ANSWERS, ANSWER_TOKENS = 128, 64

# The most seconds of a piece. With less than LEAST_SECONDS left of its part it is not begun.
MOST_SECONDS, LEAST_SECONDS = 240, 15


@dataclass
class Config:
    part: Literal[0, 1, 2, 3] = setting(0, "1, 2 or 3; 0 is for --piece alone")
    tiny: bool = setting(False, "tiny shapes, a few tests: to see that everything runs")
    minutes: float = setting(9, "the time of a part", minimum=0.1)
    work: str = setting("/tmp/rahf-gpu", "folder of models and stages", group="run")
    to: str = setting(str(RESULTS), "folder of gpu.jsonl", group="run")
    piece: str | None = setting(
        None,
        "for the program itself: what to measure in this process, STAGE:SHAPE:default or :cudnn",
        group="run",
    )


# ---------------------------------------------------------------- one stage in this process


def prepare(work, shape, pairs):
    """A folder with a random model of a shape, its pairs, and stage-1 adapters of both methods."""
    out = Path(work) / shape
    if not (out / "ready").exists():
        vocab_size = bench_pipeline.SHAPES[shape]["vocab_size"]
        bench_pipeline.make_tokenizer(vocab_size).save_pretrained(out / "model")
        model = bench_pipeline.make_model(shape)
        model.save_pretrained(out / "model")
        rows = bench_pipeline.make_rows(pairs, 700, vocab_size)
        (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for method in ("scit", "dual"):
            bench_pipeline.write_stage1(out, method, model)
        (out / "ready").touch()
    return out


@contextmanager
def busy_samples():
    """Within the context a list fills with (time, percent of the time that the GPU was busy), as
    nvidia-smi samples it. It stays empty without one."""
    samples = []
    command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen([*command, "-lms", "100"], stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        yield samples
        return

    def read():
        for line in process.stdout:
            if line.strip().isdigit():
                samples.append((time.perf_counter(), int(line)))

    threading.Thread(target=read, daemon=True).start()
    try:
        yield samples
    finally:
        process.kill()


def measure_stage(stage, out, tiny):
    """Run a stage. Returns the tokens and seconds of all that it times itself, and its summary of
    them; of the last steps (of collect: of the second half) the MFU and the share of the time in
    which the GPU was busy; and the last line of its log."""
    name, figures = stage.__name__, {}
    steps = 2 if tiny else STEPS.get(name)
    speed_summary = training.speed_summary

    def remember(tokens, seconds, flops_per_token, device):
        """In place of the stage's own summary: its numbers, and the end of what it has timed."""
        summary = speed_summary(tokens, seconds, flops_per_token, device)
        figures.update({"tokens": tokens, "seconds": seconds, "summary": summary})
        timed.update({"end": time.perf_counter(), "flops": flops_per_token})
        timed["peak"] = training.peak_flops(device)
        return summary

    timed, shared = {}, {"out": str(out)}
    if stage in (scit, dual):
        source = {"model": str(out / "model"), "data": [str(out / "pairs.jsonl")]}
        # its own folder: the adapters that collect takes are there already
        shared |= {**source, "out": str(out / "trained"), "steps": steps, "lr": 2e-4}
    elif stage is collect:
        shared |= {"method": "dual", "limit": 32 if tiny else 200, "max_gb": 100}
        shared["compute_dtype"] = bench_pipeline.default_dtype()
    else:
        shared |= {"method": "dual", "steps": steps, "strength": align.STRENGTH}
    with (
        busy_samples() as samples,
        mock.patch.object(log, "speed_summary", remember),
        mock.patch.object(collect, "speed_summary", remember),
    ):
        stage.main(stage.Config(**shared))
    rate, last_seconds = figures["tokens"] / figures["seconds"], figures["seconds"] / 2
    if stage is not collect:
        folder = out / "dual" if stage is align else out / "trained" / name
        lines = [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]
        # without the versions, and the rewards at the end
        lines = [line for line in lines if "tokens_per_second" in line]
        figures["last line of the log"] = lines[-1]
        rate = lines[-1]["tokens_per_second"]
        last_seconds = lines[-1]["seconds"] - (lines[-2]["seconds"] if lines[1:] else 0)
    if timed["peak"]:
        figures["MFU"] = rate * timed["flops"] / timed["peak"]
    start = timed["end"] - last_seconds
    percents = [percent for moment, percent in samples if start < moment < timed["end"]]
    figures["busy"] = sum(percents) / len(percents) / 100 if percents else None
    return figures


def measure_answers(out, tiny):
    """Answers as a sweep draws them: {"tokens", "seconds", "tokens/s"}."""
    device = choose_device(None)
    tokenizer = load_tokenizer(str(out / "model"))
    model = load_model(str(out / "model"), bench_pipeline.default_dtype(), device)
    rows = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    count, length = (8, 4) if tiny else (ANSWERS, ANSWER_TOKENS)
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows[:count]]
    settings = GenerationSettings(length, 64, 0)
    start = time.perf_counter()
    answers = generate(model, tokenizer, prompts, settings, sample=True)
    seconds = time.perf_counter() - start
    tokens = sum(map(len, answers))
    return {"tokens": tokens, "seconds": seconds, "tokens/s": tokens / seconds}


def measure_piece(config):
    """What --piece names, measured in this process and printed as a line of JSON."""
    name, shape, attention = config.piece.split(":")
    out = prepare(config.work, shape, 40 if config.tiny else PAIRS)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    # the models' loading turns cuDNN's attention off
    keep = mock.patch.object(torch.backends.cuda, "enable_cudnn_sdp", lambda enabled: None)
    with keep if attention == "cudnn" else nullcontext():
        if name == "answers":
            figures = measure_answers(out, config.tiny)
        else:
            stages = {"dual": dual, "scit": scit, "collect": collect, "align": align}
            figures = measure_stage(stages[name], out, config.tiny)
    if torch.cuda.is_available():
        figures["peak GB"] = torch.cuda.max_memory_allocated() / 1e9
    print(json.dumps(figures))


# ---------------------------------------------------------------- the pieces of a part


def last_json(text):
    """The last line of an output that is a JSON object."""
    return json.loads([line for line in text.splitlines() if line.startswith("{")][-1])


def all_json(text):
    """The rows of a benchmark, each a line of JSON: those of one that is cut off, too."""
    return {"rows": [json.loads(line) for line in text.splitlines() if line.startswith("{")]}


def last_lines(text):
    return {"last lines": text.strip().splitlines()[-6:]}


def stage_pieces(config, shape, names, attention="default"):
    """{name: (command, parse)} of stages at a shape. attention: "default" or "cudnn"."""
    pieces = {}
    for name in names:
        command = ["-m", "studies.gpu", "--work", config.work, "--tiny", str(config.tiny)]
        command += ["--piece", f"{name}:{shape}:{attention}"]
        label = f"{name}, {shape}" + (", cuDNN attention" if attention == "cudnn" else "")
        pieces[label] = (command, last_json)
    return pieces


def embedded_pieces(config):
    """The embedded default by the README's commands, and its scores. Tiny: a world and a base that
    know next to nothing, and one method."""
    out = str(Path(config.work) / "embedded")
    pieces, methods, source, few, limit = {}, ("dual", "scit"), [], [], []
    if config.tiny:
        methods, few = ("dual",), ["--steps", "3"]
        limit = ["--limit", "4", "--max-new-tokens", "4"]
        world = ["--steps", "2", "--documents", "256", "--pairs", "20", "--kinds", "tool"]
        pieces["world"] = (["-m", "common.toy", "--out", out, *world], last_lines)
        folder = Path(out) / "toy" / "seed0"
        source = ["--model", str(folder / "model"), "--data", str(folder / "pairs.jsonl")]
    for method in methods:
        stage1 = [f"{method}.py", "--out", out, *source, *few]
        which = ["--out", out, "--method", method]
        pieces[f"embedded {method}"] = (stage1, last_lines)
        pieces[f"embedded {method} collect"] = (["collect.py", *which], last_lines)
        align_more = [*few, "--strength", "0.2"] if config.tiny else []
        pieces[f"embedded {method} align"] = (["align.py", *which, *align_more], last_lines)

    def scores(_):
        return json.loads((Path(out) / "evaluate" / "report.json").read_text())["models"]

    pieces["embedded evaluate"] = (["evaluate.py", "--out", out, *limit], scores)
    return pieces


def authors_pieces(config, shape):
    """Ours and the authors' way, each form for itself: one that does not fit is recorded so."""
    pieces = {}
    pairs, work = 8 if config.tiny else 96, str(Path(config.work) / "authors")
    for method in ("dual",) if config.tiny else ("dual", "scit"):
        # the other forms read the inputs; align reads what collect has written
        for form in ("inputs", *bench_pipeline.FORMS):
            command = ["-m", "studies.bench_pipeline", "--shape", shape, "--work", work]
            command += ["--worker", f"{form}:{method}:{pairs}"]
            pieces[f"authors' way, {shape}: {form}, {method}"] = (command, last_json)
    return pieces


def tests(selection):
    return (["-m", "pytest", "-q", "-p", "no:cacheprovider", *selection], last_lines)


def pieces_of(config):
    """{name: (arguments of python, function of its output that returns the figures)}."""
    shapes = {"8b": "tiny", "1b": "tiny"} if config.tiny else {"8b": "8b", "1b": "1b"}
    if config.part == 1:
        few = ["-k", "one_layer"] if config.tiny else []
        profile = ["-m", "tools.profile", "--out", str(Path(config.work) / shapes["1b"])]
        profile += ["--method", "dual", *(["--steps", "10"] if config.tiny else [])]
        return {
            "tests of the kernel": tests(["tests/test_kernel.py", *few]),
            "benchmark of the kernel, headline and smallest": (
                ["-m", "kernel.bench", "--shapes", "headline", "dual"],
                all_json,
            ),
            **stage_pieces(config, shapes["1b"], ["collect"]),
            "profile of a step": (profile, last_lines),
            "benchmark of the kernel, other shapes": (
                ["-m", "kernel.bench", "--shapes", "dual" if config.tiny else "width", "scit"],
                all_json,
            ),
        }
    if config.part == 2:
        stages = ["dual", "scit", "collect", "align"]
        pieces = stage_pieces(config, shapes["8b"], [*stages, "answers"])
        return pieces | stage_pieces(config, shapes["8b"], ["dual", "align"], "cudnn")
    rest = ["tests", "--ignore", "tests/test_kernel.py", "--ignore", "tests/test_gpu.py"]
    rest += ["-n", "8", "--dist", "loadfile"]
    few = ["tests/test_dial.py", "-k", "power"]
    return {
        **embedded_pieces(config),
        **stage_pieces(config, shapes["1b"], ["dual", "collect", "align"]),
        **authors_pieces(config, shapes["1b"]),
        "the other tests": tests(few if config.tiny else rest),
    }


def run_in_process(arguments, seconds):
    """(exit code, output, errors) of Python with some arguments, in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout, done.stderr


def run_here(arguments, seconds):
    """The same in this process, which saves the seconds that each new one takes to start."""
    module = arguments[0] == "-m"
    name, *rest = arguments[module:]
    output = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [name, *rest]),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            if module:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
        except SystemExit as stop:
            return stop.code or 0, output.getvalue(), ""
    return 0, output.getvalue(), ""


def run_piece(arguments, parse, seconds, runner=run_in_process):
    """The figures of a piece, or why it has "failed", and the seconds that it took as a whole."""
    start = time.perf_counter()
    try:
        code, output, errors = runner(arguments, seconds)
        figures = {"failed": (output + errors)[-1500:]} if code else parse(output)
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        figures = {"failed": f"not done after {seconds:.0f} s: {output[-1500:]}"}
        # nothing of what it has printed so far is lost
        figures |= all_json(output[: output.rfind("\n") + 1])
    except Exception as error:
        # an output that nobody expected shall not cost the other pieces
        figures = {"failed": f"{type(error).__name__}: {error}"}
    return {"process seconds": round(time.perf_counter() - start, 1), **figures}


def nvidia_smi():
    """What nvidia-smi prints, or None."""
    try:
        return subprocess.run(["nvidia-smi"], check=False, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return None


def main(config):
    if config.piece:
        measure_piece(config)
        return
    Path(config.work).mkdir(parents=True, exist_ok=True)
    path = Path(config.to) / "gpu.jsonl"
    made = {"part": config.part, "machine": machine(), "versions": versions()}

    def append(line):
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps({**line, **made}), file=file)

    append({"piece": "machine", "cuda": torch.version.cuda, "nvidia-smi": nvidia_smi()})
    end = time.perf_counter() + 60 * config.minutes
    for name, (arguments, parse) in pieces_of(config).items():
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            figures = {"failed": "no time was left"}
        else:
            alone = not config.tiny or "pytest" in arguments
            seconds = min(left, MOST_SECONDS)
            figures = run_piece(arguments, parse, seconds, run_in_process if alone else run_here)
        append({"piece": name, **figures})
        text = json.dumps(figures)
        print(f"{name}: {text if len(text) < 400 else text[:400] + ' ...'}", flush=True)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main, Config)
