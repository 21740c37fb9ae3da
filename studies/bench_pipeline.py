"""Collect and align, and stage 1, against the authors' way (studies/authors.py).

    python -m studies.bench_pipeline                     4 blocks of width 256 on the CPU
    python -m studies.bench_pipeline --shape 8b          on a GPU, random weights; also 1b
    python -m studies.bench_pipeline --shape tiny --scaling True --rounds 3
                       1,000 to 8,000 pairs: time for a pair and peak memory of each stage

Our forward passes have at most 2,048 tokens (4,096 on a GPU); "align, whole batches" does not
split its batches. "align, nothing read" has its targets in memory. The authors' way comes in two
forms: inputs padded to their window (768 tokens for SCIT, 320 for DUAL), and to the longest of
the batch. Lengths are as in HH-RLHF's harmless pairs.

Each measurement is a process of its own, and the forms take turns. Memory is the peak above what
the process held after its imports: on the CPU anonymous memory, as mapped files can be dropped at
any time. With --save True it writes studies/results/bench_pipeline_SHAPE.json or scaling.json.
"""

import contextlib
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import align
import collect
import dual
import scit
from common.collection import CollectedBatch, Collection
from common.config import run, setting
from common.data import collate, prepare_pairs
from common.hf import (
    choose_device,
    choose_dtype,
    find_blocks,
    load_tokenizer,
    load_trunk,
    model_digests,
)
from common.stages import read_stage, write_stage
from common.training import peak_flops
from lora import LoRA, save_adapter
from studies import authors
from studies.shared import write_result

# Deciles of HH-RLHF's harmless pairs, in tokens (1.3 a word).
PROMPT_LENGTHS = (9, 18, 26, 49, 79, 108, 138, 172, 220, 324, 700)
RESPONSE_LENGTHS = (2, 12, 17, 23, 30, 39, 49, 65, 84, 121, 400)

# The authors' window. Instruction and roles take some of it.
WINDOW = {"scit": 768, "dual": 320}
INSTRUCTION_LENGTH = 24

SHAPES = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    "cpu": {
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 128256,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}
LAYERS = {"tiny": [1], "cpu": [1, 2], "1b": [7, 9, 11, 13], "8b": [10, 12, 14, 16, 18]}
ALPHA = 0.5

# What is measured, and the ratios that are taken within a round.
FORMS = (
    "collect",
    "align",
    "align, whole batches",
    "align, nothing read",
    "longest",
    "window",
    "stage1",
    "authors stage1",
)
RATIOS = (
    ("collect + align", "longest"),
    ("collect + align", "window"),
    ("align", "longest"),
    ("align", "window"),
    ("align, whole batches", "longest"),
    ("align", "align, nothing read"),
    ("stage1", "authors stage1"),
)
COMPARED_WITH = {
    "longest": "padded to the longest of a batch",
    "window": "padded to the authors' window",
    "authors stage1": "full logits, random batches",
    "align, nothing read": "the same, its targets at hand",
}
SCALING_PAIRS = (1000, 2000, 4000, 8000)


@dataclass
class Config:
    shape: Literal["tiny", "cpu", "1b", "8b"] = setting("cpu", "width and blocks of the model")
    pairs: int = setting(96, "training pairs", minimum=2)
    batch_size: int = setting(16, "responses in a step", minimum=1)
    rounds: int = setting(5, "measurements of each form", minimum=1)
    methods: str = setting("scit,dual", "methods to measure")
    scaling: bool = setting(False, "measure growth with the number of pairs instead")
    work: str = setting("/tmp/rahf-bench", "folder of models, pairs and stages", group="run")
    save: bool = setting(False, "write a file in studies/results", group="run")
    worker: str | None = setting(
        None, "for the program itself: what to measure in this process", group="run"
    )


# ---------------------------------------------------------------- inputs


def default_dtype():
    """The stages' default on this machine: bfloat16 on a GPU that has it, else float32."""
    return choose_dtype(None, choose_device(None))


def folder_of(config, method, pairs):
    return Path(config.work) / f"{config.shape}-{method}-{pairs}"


def prepare(config, method, pairs):
    """A folder with a random model, a tokenizer, pairs and stage-1 adapters."""
    out = folder_of(config, method, pairs)
    if (out / "ready").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    vocab_size = SHAPES[config.shape]["vocab_size"]
    make_tokenizer(vocab_size).save_pretrained(out / "model")
    model = make_model(config.shape)
    model.save_pretrained(out / "model")
    rows = make_rows(pairs, WINDOW[method] - INSTRUCTION_LENGTH, vocab_size)
    (out / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_stage1(out, method, model)
    (out / "ready").touch()


def make_tokenizer(vocab_size):
    """A tokenizer whose tokens are the words w0, w1, ..."""
    vocabulary = {"<|end|>": 0, "<|unk|>": 1}
    vocabulary |= {f"w{i}": i + 2 for i in range(vocab_size - 2)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|end|>", pad_token="<|end|>", unk_token="<|unk|>"
    )


def make_model(shape):
    """A random Llama, made on the GPU where there is one."""
    special_tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    llama_config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, **special_tokens)
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, default_dtype()))
    try:
        with choose_device(None):
            return LlamaForCausalLM(llama_config)
    finally:
        torch.set_default_dtype(torch.float32)


def make_rows(pairs, max_length, vocab_size):
    """Preference rows of random words with HH-RLHF's lengths, two of them for validation."""
    rng = random.Random(0)
    rows = []
    while len(rows) < pairs + 2:
        lengths = [draw(rng, PROMPT_LENGTHS), *(draw(rng, RESPONSE_LENGTHS) for _ in range(2))]
        if lengths[0] + max(lengths[1:]) > max_length:
            continue
        row = {}
        for name, length in zip(("prompt", "chosen", "rejected"), lengths):
            words = [f"w{rng.randrange(vocab_size - 2)}" for _ in range(length)]
            row[name] = " ".join(words)
        row["split"] = "train" if len(rows) < pairs else "valid"
        rows.append(row)
    return rows


def draw(rng, deciles):
    """A random length with these deciles."""
    i = rng.randrange(10)
    return round(deciles[i] + rng.random() * (deciles[i + 1] - deciles[i]))


def write_stage1(out, method, model):
    """Random adapters where scit.py or dual.py would write theirs."""
    settings = {
        **vars(scit.Config()),
        "model": str(out / "model"),
        "data": [str(out / "pairs.jsonl")],
        "template": "plain",
        "out": str(out),
        "dtype": default_dtype(),
        "max_length": WINDOW[method],
        "split_seed": 0,
    }
    tokenizer = load_tokenizer(settings["model"])
    pairs = prepare_pairs(settings["data"], ("valid",), tokenizer, WINDOW[method], 0)
    inputs = {**model_digests(settings["model"], tokenizer), "pairs": pairs.source_digest}
    manifest = {"settings": settings, "inputs": inputs}
    kinds = ("scit",) if method == "scit" else ("good", "bad")
    for kind in kinds:
        adapter = LoRA(model.base_model)
        for B in adapter.B:
            B.data.normal_(std=0.02)
        with write_stage(adapter_folder(out, kind), kind, manifest) as new:
            save_adapter(new, adapter.weights(), model.base_model, settings["model"])
        adapter.remove()


def adapter_folder(out, kind):
    return out / "scit" / "adapter" if kind == "scit" else out / "dual" / kind


# ---------------------------------------------------------------- one measurement


class Memory:
    """The peak of this process's memory within the context, in bytes: anonymous memory above what
    it was at the start; with a GPU, all that was allocated there."""

    def __enter__(self):
        self.start = self.peak = self.anonymous()
        self.watching = True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def anonymous():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status has no RssAnon")

    def watch(self):
        while self.watching:
            self.peak = max(self.peak, self.anonymous())
            time.sleep(0.005)

    def __exit__(self, *exception):
        self.watching = False
        self.thread.join()
        self.bytes = self.peak - self.start
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated()


def run_form(config, form, method, pairs):
    """What one measurement measures: one epoch of a form."""
    out = folder_of(config, method, pairs)
    device = choose_device(None)
    layers = LAYERS[config.shape]
    if form == "collect":
        names = [str(layer) for layer in layers]
        shared = {"out": str(out), "method": method, "layers": names, "max_gb": 1e6}
        collect.main(collect.Config(**shared, limit=pairs, compute_dtype=default_dtype()))
    elif form.startswith("align"):
        reading = contextlib.nullcontext()
        if form == "align, nothing read":
            reading = read_nothing(SHAPES[config.shape]["hidden_size"], device)
        settings = {
            "steps": math.ceil(2 * pairs / config.batch_size),
            "batch_size": config.batch_size,
            "tokens_per_pass": 10**9 if form == "align, whole batches" else None,
        }
        with reading:
            align.main(
                align.Config(out=str(out), method=method, alpha=ALPHA, restart=True, **settings)
            )
    elif form == "stage1":
        stage = scit if method == "scit" else dual
        batch_size = 8 if method == "scit" else config.batch_size
        stage.main(
            stage.Config(
                out=str(out / "own"),
                restart=True,
                model=str(out / "model"),
                data=[str(out / "pairs.jsonl")],
                steps=math.ceil(pairs / batch_size),
                batch_size=batch_size,
                max_length=WINDOW[method],
                **({"reduction": "mean", "beta": 1.0} if method == "scit" else {"contrast": 0.0}),
            )
        )
    elif form == "authors stage1":
        authors.train_stage1(
            str(out / "model"),
            [str(out / "pairs.jsonl")],
            method,
            WINDOW[method],
            config.batch_size,
            default_dtype(),
            device,
        )
    else:
        kind = "scit" if method == "scit" else "good"
        folder = adapter_folder(out, kind)
        settings = read_stage(folder, kind, "python -m studies.bench_pipeline")["settings"]
        window = WINDOW[method] if form == "window" else None
        authors.train_align(out, settings, method, layers, ALPHA, window, config.batch_size, device)


def read_nothing(width, device):
    """Within the context, align.py finds its states in memory. Any states will do: they cost the
    same."""
    states = torch.randn(10**4, width, device=device, dtype=getattr(torch, default_dtype()))

    def read(self, indices, device):
        responses = [self.responses[i] for i in indices]
        examples = [(r.tensors["ids"][r.ids].tolist(), r.first_recorded) for r in responses]
        batch = collate(examples, self.pad_id, device)
        tokens = sum(self.recorded_lengths[i] for i in indices)
        layers = [states[:tokens]] * len(self.layers)
        return CollectedBatch(batch.ids, batch.positions, layers, layers, layers)

    return mock.patch.object(Collection, "read", read)


def work(config):
    """Measure one form in this process and print seconds and bytes as JSON."""
    form, method, pairs = config.worker.split(":")
    if form == "inputs":
        prepare(config, method, int(pairs))
        print(json.dumps({}))
        return
    # of an interrupted measurement
    partial = folder_of(config, method, pairs) / method / ".collect.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with Memory() as memory:
        start = time.perf_counter()
        run_form(config, form, method, int(pairs))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "bytes": memory.bytes}))


def measure(config, form, method, pairs):
    """{"seconds", "bytes"} of one form, measured in a process of its own."""
    command = [sys.executable, "-m", "studies.bench_pipeline", "--shape", config.shape]
    command += ["--work", config.work, "--batch-size", str(config.batch_size)]
    command += ["--worker", f"{form}:{method}:{pairs}"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{form}, {method}: {done.stderr[-2000:]}")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    return json.loads(lines[-1])


# ---------------------------------------------------------------- comparison


def spread(values):
    median = statistics.median(values)
    return {
        "median": round(median, 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def compare(config):
    """Every form in turns, round after round; ratios are taken within a round."""
    measured = {}
    for method in config.methods.split(","):
        prepare(config, method, config.pairs)
        rounds = []
        for _ in range(config.rounds):
            row = {form: measure(config, form, method, config.pairs) for form in FORMS}
            collected, aligned = row["collect"], row["align"]
            row["collect + align"] = {
                "seconds": collected["seconds"] + aligned["seconds"],
                "bytes": max(collected["bytes"], aligned["bytes"]),
            }
            rounds.append(row)
        measured[method] = summarize(config, method, rounds)
        print(json.dumps({method: measured[method]}), flush=True)
    return measured


def summarize(config, method, rounds):
    """What is kept of the rounds, [{form: {"seconds", "bytes"}}]."""
    responses, tokens = count_tokens(config, method)
    summary = {"responses": responses, "tokens": tokens, "seconds": {}, "peak MB": {}}
    for form in rounds[0]:
        summary["seconds"][form] = spread([row[form]["seconds"] for row in rounds])
        summary["peak MB"][form] = spread([row[form]["bytes"] / 1e6 for row in rounds])
    summary["ratios"] = {}
    for ours, theirs in RATIOS:
        speeds = [row[theirs]["seconds"] / row[ours]["seconds"] for row in rounds]
        memories = [row[ours]["bytes"] / row[theirs]["bytes"] for row in rounds]
        ratio = {"speed": spread(speeds), "memory": spread(memories)}
        summary["ratios"][f"{ours} / {theirs}"] = ratio
    medians = {form: seconds["median"] for form, seconds in summary["seconds"].items()}
    timed = ("collect + align", "align", "longest", "window")
    summary["tokens a second"] = {form: round(tokens / medians[form]) for form in timed}
    peak = peak_flops(choose_device(None))
    if peak:
        flops = 4 * block_parameters(config, method) * tokens
        summary["align, model FLOP utilisation"] = round(flops / medians["align"] / peak, 3)
    return summary


def count_tokens(config, method):
    """The number of responses, and the tokens of all plain inputs."""
    out = folder_of(config, method, config.pairs)
    tokenizer = load_tokenizer(str(out / "model"))
    data = [str(out / "pairs.jsonl")]
    pairs = prepare_pairs(data, ("train",), tokenizer, WINDOW[method], 0)["train"]
    tokens = 0
    for pair in pairs:
        tokens += pair.length("plain", "chosen") + pair.length("plain", "rejected")
    return 2 * len(pairs), tokens


def block_parameters(config, method):
    """The parameters of the blocks that align runs. Each takes 4 floating-point operations a
    token: the forward pass, and the backward pass to the inputs."""
    name = str(folder_of(config, method, config.pairs) / "model")
    n_blocks = LAYERS[config.shape][-1] + 1
    trunk = load_trunk(name, n_blocks, "bfloat16", torch.device("cpu"))
    return sum(p.numel() for p in find_blocks(trunk)[1].parameters())


def markdown(measured):
    """The table of the ratios."""
    lines = ["| | | speed | peak memory |", "|---|---|---|---|"]
    for method, summary in measured.items():
        for name, ratio in summary["ratios"].items():
            ours, theirs = name.split(" / ")
            ours = ours.replace("stage1", f"{method}.py")
            cells = [
                f"{method.upper()}: {ours}",
                f"against {COMPARED_WITH[theirs]}",
                f"{in_words(ratio['speed'])} x",
                f"{in_words(ratio['memory'])} of it",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def in_words(values):
    return f"{values['median']:.2f} ({values['least']:.2f} to {values['most']:.2f})"


# ---------------------------------------------------------------- growth with the pairs


def measure_growth(config):
    """Milliseconds for a pair and peak memory of each stage of DUAL, one epoch, by number of pairs
    of the same lengths: medians of the rounds."""
    for pairs in SCALING_PAIRS:
        prepare(config, "dual", pairs)
    rows = {}
    for _ in range(config.rounds):
        for pairs in SCALING_PAIRS:
            for stage in ("stage1", "collect", "align"):
                row = measure(config, stage, "dual", pairs)
                rows.setdefault((stage, pairs), []).append(row)
                print(stage, pairs, row, flush=True)
    measured = {}
    for (stage, pairs), measurements in rows.items():
        seconds = statistics.median(row["seconds"] for row in measurements)
        peak = statistics.median(row["bytes"] for row in measurements)
        figures = {"ms a pair": round(1e3 * seconds / pairs, 3), "peak MB": round(peak / 1e6, 1)}
        measured.setdefault(stage, {})[pairs] = figures
    return measured


def growth(measured):
    """The table of the growth."""
    counts = list(next(iter(measured.values())))
    titles = [f"{int(count):,}" for count in counts]
    lines = ["| pairs | " + " | ".join(titles) + " |", "|---" * (len(counts) + 1) + "|"]
    for stage, rows in measured.items():
        label = f"{stage.replace('stage1', 'dual.py')}: ms a pair, peak MB"
        cells = [f"{row['ms a pair']:.1f}, {row['peak MB']:.0f}" for row in rows.values()]
        lines.append("| " + " | ".join([label, *cells]) + " |")
    return "\n".join(lines)


def main(config):
    if config.worker:
        work(config)
        return
    measured = measure_growth(config) if config.scaling else compare(config)
    print(growth(measured) if config.scaling else markdown(measured))
    if config.save:
        name = "scaling" if config.scaling else f"bench_pipeline_{config.shape}"
        write_result(name, {"settings": vars(config), "found": measured})


if __name__ == "__main__":
    run(main, Config)
