"""Stage 2: record hidden states of preferred and dispreferred behaviour (paper section 3.2).

    python collect.py                                    after scit.py or dual.py
    python collect.py --layers 10 12 14 16 18 --max-gb 200

For each response r, chosen and rejected, and each target layer l, at the same token positions:

    SCIT:  h+ = A(π_scit, <p+, q, r>, l)    h- = A(π_scit, <p-, q, r>, l)
    DUAL:  h+ = A(π_good, <q, r>, l)        h- = A(π_bad, <q, r>, l)
    base:  b  = A(π_base, <q, r>, l)        what align.py will move by α (h+ - h-); with --base
                                            stage1 that of the SCIT or the good model

A(π, x, l) is the output of decoder block l, counted from 0. The states are recorded at the
response's tokens and at the last prompt token, whose state predicts the response's first token.
h+ - h- compares two models (or instructions) on the same tokens, not r_h with r_l. The paper
instructs DUAL's models, too (--stimulus instructed); its code leaves the last prompt token out.
Nothing above the highest target layer is loaded or run ("trunk": a model without its head).

The responses run in passes: a pass is a padded batch of them, run once each for b, h+ and h-.
Whole passes fill a shard, which becomes one file: one thread records it, a second one writes it
while the next is recorded. With torchrun the files are divided among the processes. Writes
OUT/METHOD/collect, which is all that align.py needs besides the base model.
"""

import itertools
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from common.checkpoint import Signals
from common.collection import recorded_length
from common.config import UserError, run, setting
from common.data import (
    RESPONSES,
    collate,
    digest_pairs,
    prepare_pairs,
    sample,
    split_into_passes,
)
from common.distributed import is_first, leave, share_of, sum_over_processes
from common.hf import (
    check_ids,
    check_same_model,
    choose_device,
    choose_layers,
    choose_tokens_per_pass,
    context_length,
    hidden_states,
    load_config,
    load_tokenizer,
    load_trunk,
)
from common.stage1 import open_stage1
from common.stages import atomic_write, claim, fill, inherit, next_command, write_stage
from common.training import memory_summary, parameters_run, speed_summary
from lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, enable_only

# a few hundred pairs are enough; the states of more take much disk space
LIMIT = 500

# at most this many validation pairs are recorded, for the distances that align.py reports
VALIDATION_PAIRS = 64

# the states of the training pairs go into at least this many files, if there are as many passes
MIN_SHARDS = 16

DEFAULT_STIMULUS = {"scit": "instructed", "dual": "plain"}


@dataclass
class RecordingSettings:
    """The settings that tools/survey.py has too: whose states are recorded on which pairs, and
    under which stimulus, that is with or without an instruction."""

    base: Literal["original", "stage1"] | None = setting(
        None,
        "whose states are b, under the plain prompt: those of the original model, or of stage 1's "
        "(the SCIT or good model), which is then what moves; empty takes what the embedded default "
        "says, else original",
    )
    stimulus: Literal["plain", "instructed"] | None = setting(
        None,
        "DUAL: <q, r> to both models, or p+ to the good and p- to the bad (the paper); "
        "empty takes plain for DUAL; SCIT is always instructed",
    )
    last_prompt_token: bool = setting(
        True, "record the last prompt token too; the authors leave it out"
    )
    method: Literal["scit", "dual"] | None = setting(
        None, "which stage 1 to use; empty takes the one that is there"
    )
    model: str | None = setting(
        None, "model folder or hub name; empty takes stage 1's", group="data"
    )
    data: list[str] | None = setting(
        None, "preference pairs, as in stage 1; empty takes stage 1's", group="data"
    )
    columns: list[str] | None = setting(
        None,
        "what the fields of --data mean, as in stage 1; empty takes stage 1's, unless --data is "
        "given",
        group="data",
    )
    max_length: int | None = setting(
        None, "longest input in tokens; empty takes stage 1's", minimum=2, group="data"
    )
    limit: int | None = setting(
        None,
        f"record this many training pairs, drawn at random, and no more validation pairs; empty "
        f"takes {LIMIT}; the embedded default has its own",
        minimum=1,
        group="data",
    )
    tokens_per_pass: int | None = setting(
        None,
        "most tokens in one forward pass, padding included; "
        "empty takes 4096 on a GPU, 2048 on the CPU",
        minimum=1,
        group="run",
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    seed: int | None = setting(
        None,
        "seed that draws the validation pairs; empty takes stage 1's; splits and --limit always go "
        "by stage 1's",
        group="run",
    )
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )
    compute_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "what the model computes in (on a GPU with products in TF32); bfloat16 halves the memory, "
        "but rounds by as much as the norm of a small v",
        group="run",
    )


@dataclass
class Config(RecordingSettings):
    """The settings of this stage."""

    layers: list[str] | None = setting(
        None,
        "target layers: numbers from 0, negative from the top, or upper, middle, last, all; "
        "empty takes all of fewer than 12 blocks, else upper",
    )
    store: Literal["full", "diff"] = setting(
        "full", "what is written: h+ and h-, or only their difference v", group="run"
    )
    store_base: bool = setting(
        True, "write b too; without it align runs the base model again in each step", group="run"
    )
    states_dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "dtype of the written states; empty takes that of stage 1's model", group="run"
    )
    max_gb: float = setting(20, "most gigabytes to write", minimum=0, group="run")
    shard_mb: float = setting(
        512,
        "most megabytes of a shard; two are held in memory, with a GPU three",
        minimum=0,
        group="run",
    )


def record_states(trunk, adapters, config, examples, pad_id):
    """b, h+ and h- of some examples, packed without padding, in the dtype that the model computes
    in.

    examples: list of (EncodedPair, "chosen" | "rejected"). Returns (base, plus, minus): lists of
    L tensors [T, D], T the recorded positions of all examples, one example after the other.
    """

    def states(prompt, enabled):
        inputs = []
        for pair, response in examples:
            ids, prompt_length = pair.input(prompt, response)
            # one token earlier: the last prompt token is recorded, too
            inputs.append((ids, prompt_length - int(config.last_prompt_token)))
        batch = collate(inputs, pad_id, trunk.device)
        with enable_only(enabled, among=adapters.values()):
            dense = hidden_states(trunk, config.layers, batch.ids)  # L x [B, S, D]
        # L x [T, D]
        return [h.flatten(0, 1).index_select(0, batch.positions) for h in dense]

    if config.method == "scit":
        plus_adapters = minus_adapters = [adapters["scit"]]
    else:
        plus_adapters, minus_adapters = [adapters["good"]], [adapters["bad"]]
    base_adapters = plus_adapters if config.base == "stage1" else []
    base_prompt, plus_prompt, minus_prompt = prompts_run(config)

    base = states(base_prompt, base_adapters)  # b
    plus = states(plus_prompt, plus_adapters)  # h+
    minus = states(minus_prompt, minus_adapters)  # h-
    return base, plus, minus


@dataclass
class Shard:
    """What becomes one file.

    examples: list of (EncodedPair, "chosen" | "rejected"). states: {"base.12": [T, D], ...}, T the
    recorded positions of all examples. norms: fp32 [T, 2, L], |v| and |b|. copied: the CUDA event
    after which both are there; None on the CPU.
    """

    examples: list
    states: dict
    norms: torch.Tensor
    copied: torch.cuda.Event | None


def record_shard(passes, run_pass, config, width, device):
    """Record the examples of some passes: a Shard in memory.

    passes: lists of (EncodedPair, response); run_pass: a function of one pass that returns base,
    plus and minus. On a GPU the copies to pinned memory may still be under way on return:
    write_shard waits for them while the next shard is recorded.
    """
    examples = list(itertools.chain.from_iterable(passes))
    T, pinned = count_recorded(examples, config), device.type == "cuda"
    dtype = getattr(torch, config.states_dtype)
    stored = ["plus", "minus"] if config.store == "full" else ["v"]
    stored += ["base"] if config.store_base else []
    states = {
        f"{name}.{layer}": torch.empty(T, width, dtype=dtype, pin_memory=pinned)
        for name in stored
        for layer in config.layers
    }
    norms = torch.empty(T, 2, len(config.layers), pin_memory=pinned)
    start = 0
    for part in passes:
        base, plus, minus = run_pass(part)
        v = [p - m for p, m in zip(plus, minus)]  # v = h+ - h-
        rows = slice(start, start + len(v[0]))
        start = rows.stop
        recorded = {"base": base, "plus": plus, "minus": minus, "v": v}
        for name in stored:
            for layer, state in zip(config.layers, recorded[name]):
                states[f"{name}.{layer}"][rows].copy_(state, non_blocking=True)
        # [t, 2, L], t the positions of this pass
        part_norms = torch.stack([norms_of(v), norms_of(base)], 1)
        norms[rows].copy_(part_norms, non_blocking=True)
        # free them before the next pass
        del base, plus, minus, v, recorded, state, part_norms
    copied = None
    if pinned:
        copied = torch.cuda.Event()
        copied.record()
    return Shard(examples, states, norms, copied)


def norms_of(states):
    """|state| at each position: L x [t, D] -> fp32 [t, L]."""
    return torch.stack([state.float().norm(dim=-1) for state in states], 1)


def write_shard(path, shard, config):
    """Write a Shard to a file, with the sums Σ|v|, Σ|b| and Σ|v|/|b| per layer as statistics
    [3, L]. UserError at NaN or infinity."""
    if shard.copied:
        shard.copied.synchronize()
    norm_v, norm_b = shard.norms.double().unbind(1)  # [T, L]
    if not (norm_v + norm_b).isfinite().all():
        refuse_states(norm_v + norm_b, shard.examples, config)
    statistics = torch.stack([norm_v, norm_b, norm_v / norm_b]).sum(1)
    # what align needs to run <q, r> again: ids, their number, the first recorded position
    inputs = [pair.input("plain", response) for pair, response in shard.examples]
    starts = [prompt_length - config.last_prompt_token for _, prompt_length in inputs]
    tensors = {
        "ids": list(itertools.chain.from_iterable(ids for ids, _ in inputs)),
        "lengths": [len(ids) for ids, _ in inputs],
        "starts": starts,
    }
    tensors = {name: torch.tensor(values, dtype=torch.int32) for name, values in tensors.items()}
    with atomic_write(path) as tmp_path:
        save_file({**shard.states, **tensors, "statistics": statistics}, tmp_path)


def record_files(folder, files, run_pass, config, width, device):
    """Record the shards {file name: passes} into a folder; a second thread writes one while the
    next is recorded. At most two are in memory, on a GPU three (see record_shard)."""
    writing = None
    with ThreadPoolExecutor(1) as writer:
        for name, passes in files.items():
            shard = record_shard(passes, run_pass, config, width, device)
            if writing:
                # what the writer has raised is raised here
                writing.result()
            writing = writer.submit(write_shard, folder / name, shard, config)
            del shard
        if writing:
            writing.result()


def refuse_states(norms, examples, config):
    """Raise the UserError that names layer and response of the first norm, of [T, L], that is NaN
    or infinite."""
    position, layer = (~norms.isfinite()).nonzero()[0].tolist()
    for pair, response in examples:
        position -= recorded_length(pair, response, config.last_prompt_token)
        if position < 0:
            break
    question = pair.pair.prompt[-1][1][:60]
    raise UserError(
        f"the states of layer {config.layers[layer]} are NaN or infinite in the {response} "
        f"response to {question!r}: train stage 1 at a lower --lr"
    )


# ---------------------------------------------------------------- planning


def examples_of(pairs):
    """Both responses of each pair: a list of (EncodedPair, "chosen" | "rejected")."""
    return [(pair, response) for pair in pairs for response in RESPONSES]


def token_bytes(config, width):
    """The bytes that one recorded token takes."""
    stored = 2 if config.store == "full" else 1
    itemsize = getattr(torch, config.states_dtype).itemsize
    return (stored + config.store_base) * len(config.layers) * width * itemsize


def check_disk(pairs, config, bytes_per_token, folder):
    """Print what will be written. UserError if --max-gb or the disk is too small for it.

    An unfinished collection in `folder` will be resumed or deleted: its space counts as free.
    """

    def pair_bytes(pair):
        total = 0
        for response in RESPONSES:
            recorded = recorded_length(pair, response, config.last_prompt_token)
            total += recorded * bytes_per_token + 4 * pair.length("plain", response)
        return total

    train_bytes = sum(map(pair_bytes, pairs["train"]))
    valid_bytes = sum(map(pair_bytes, pairs["valid"]))
    total_gb, max_bytes = (train_bytes + valid_bytes) / 1e9, config.max_gb * 1e9
    if train_bytes + valid_bytes > max_bytes:
        mean_bytes = train_bytes / len(pairs["train"])
        # pairs differ in length: leave some room
        fitting = max(0, int(0.95 * (max_bytes - valid_bytes) / mean_bytes))
        raise UserError(
            f"{len(pairs['train']):,} training pairs take {total_gb:.3g} GB, over --max-gb "
            f"{config.max_gb:g}, which holds about {fitting:,} pairs: set --limit or --max-gb"
        )
    partial_files = (folder / ".collect.partial").glob("*.safetensors")
    free = shutil.disk_usage(config.out).free + sum(path.stat().st_size for path in partial_files)
    if total_gb > free / 1e9:
        raise UserError(
            f"{config.out}: {total_gb:.3g} GB are needed and {free / 1e9:.3g} GB are free: "
            "set --limit or --store diff"
        )
    print(f"{total_gb:.3g} GB to write, {bytes_per_token:,} bytes of states per token")


def plan_passes(examples, lengths, tokens_per_pass):
    """The examples in lists, one for each pass; the longest inputs come first, so that what does
    not fit in memory shows early."""
    # split_into_passes goes from short to long
    parts = split_into_passes(range(len(lengths)), lengths, tokens_per_pass)[::-1]
    passes = []
    for part in parts:
        passes.append([examples[i] for i in part])
    return passes


def plan_shards(passes, sizes, shard_bytes, min_shards):
    """The passes in shards of at most `shard_bytes`, or of one pass: lists of passes.

    sizes: the bytes of each pass. There are at least min_shards, if there are as many passes.
    """
    shards, filled = [[]], 0
    for part, size in zip(passes, sizes):
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(part)
        filled += size
    if len(shards) < min(min_shards, len(passes)):
        # too few: try again with smaller shards
        return plan_shards(passes, sizes, 0.9 * min(shard_bytes, sum(sizes)), min_shards)
    return shards


def prompts_run(config):
    """The prompts under which each response is run, for b, h+ and h-."""
    if config.stimulus == "instructed":
        return ("plain", "positive", "negative")
    return ("plain", "plain", "plain")


def input_lengths(example, config):
    """The tokens of the three inputs of an example, (EncodedPair, response): for b, h+ and h-."""
    pair, response = example
    return [pair.length(prompt, response) for prompt in prompts_run(config)]


def plan_files(examples, config, bytes_per_token):
    """{file name: its passes, lists of (EncodedPair, response)} and the names by split, as they
    stand in the manifest."""
    files, names = {}, {}
    for key, split, file_name in (
        ("validation_shards", "valid", "validation-shard"),
        ("shards", "train", "shard"),
    ):
        names[key] = []
        lengths = [max(input_lengths(example, config)) for example in examples[split]]
        passes = plan_passes(examples[split], lengths, config.tokens_per_pass)
        sizes = [count_recorded(part, config) * bytes_per_token for part in passes]
        # many, so that little is lost when a run is interrupted
        min_shards = MIN_SHARDS if split == "train" else 1
        for i, shard in enumerate(plan_shards(passes, sizes, config.shard_mb * 1e6, min_shards)):
            name = f"{file_name}-{i:05d}.safetensors"
            files[name] = shard
            names[key].append(name)
    return files, names


# ---------------------------------------------------------------- the stage


def main(config):
    # 1. what stage 1 says, and the pairs
    stage1, tokenizer, pairs = open_inputs(config)
    settings = stage1.manifest["settings"]
    config.states_dtype = config.states_dtype or settings["dtype"]
    config.layers = choose_layers(config.layers, load_config(config.model).num_hidden_layers)
    pairs["valid"] = sample(pairs["valid"], VALIDATION_PAIRS, config.seed)
    folder = Path(config.out) / config.method

    with claim(folder / "collect"):
        # 2. the model up to the highest target layer, and its adapters
        device = choose_device(config.device)
        config.tokens_per_pass = choose_tokens_per_pass(config.tokens_per_pass, device)
        n_blocks, quantize = config.layers[-1] + 1, settings["quantize"]
        trunk = load_trunk(config.model, n_blocks, config.compute_dtype, device, quantize=quantize)
        check_same_model(config.model, tokenizer, stage1.manifest, f"{config.out}/{config.method}")
        adapters = stage1.load_adapters(trunk)

        # 3. what it will take
        width = trunk.config.get_text_config().hidden_size
        bytes_per_token = token_bytes(config, width)
        if is_first():
            check_disk(pairs, config, bytes_per_token, folder)
        examples = {split: examples_of(pairs[split]) for split in pairs}
        tokens = {split: count_recorded(examples[split], config) for split in examples}
        print(
            f"{memory_summary(trunk)}; layers {config.layers} of width {width} in "
            f"{config.states_dtype}, {sum(tokens.values()):,} tokens"
        )
        prompt = "positive" if config.stimulus == "instructed" else "plain"
        ids, _ = pairs["train"][0].input(prompt, "chosen")
        print(f"one input: {tokenizer.decode(ids)!r}")

        # 4. record, shard by shard: an interrupted run goes on with the missing ones
        files, names = plan_files(examples, config, bytes_per_token)
        manifest = {
            "settings": {**settings, **vars(config)},
            "method": config.method,
            "inputs": {**stage1.manifest["inputs"], "pairs": pairs.source_digest},
            "adapters": {
                kind: m["digests"][ADAPTER_WEIGHTS] for kind, m in stage1.manifests.items()
            },
            "hidden_size": width,
            "token_bytes": bytes_per_token,
            "end_token": pairs["train"][0].end_token,
            **names,
        }
        depends_on = {
            **manifest["settings"],
            "model_digest": manifest["inputs"]["model"],
            "adapters": manifest["adapters"],
            "pairs": digest_pairs(pairs),
            # the passes decide which responses stand in which file
            "size of a pass": config.tokens_per_pass,
        }
        # this process's share, of which an interrupted run may have left some
        share = share_of(list(files))
        n_passes = sum(len(files[name]) for name in share)
        start = time.perf_counter()
        with (
            Signals() as signals,
            tqdm(total=n_passes, desc="collect", unit="pass", disable=not is_first()) as bar,
            write_stage(folder / "collect", "collect", manifest, depends_on) as new,
            fast_float32(),
        ):

            @torch.no_grad()
            def run_pass(part):
                signals.check()
                bar.update()
                return record_states(trunk, adapters, config, part, tokenizer.pad_token_id)

            missing = {name: files[name] for name in share if not (new / name).exists()}
            bar.update(n_passes - sum(map(len, missing.values())))
            record_files(new, missing, run_pass, config, width, device)
            # summed over the processes, which also waits until each has written its files
            run_tokens = torch.tensor(count_input_tokens(missing, config))
            sum_over_processes([run_tokens])
            seconds = time.perf_counter() - start
            leave()
            if not is_first():
                return
            if config.base == "stage1":
                # align then needs no folder of stage 1
                copy_adapter(next(iter(stage1.folders.values())), new / "base_adapter")
            manifest |= {"tokens": sum(tokens.values()), "tokens_train": tokens["train"]}
            manifest |= read_statistics([new / name for name in files], manifest["tokens"])

    # 5. report
    print(speed_summary(run_tokens.item(), seconds, 2 * parameters_run(trunk), device))
    for i, layer in enumerate(config.layers):
        print(
            f"  layer {layer}: |v| {manifest['norm_v'][i]:.3f}, "
            f"|b| {manifest['norm_b'][i]:.3f}, mean |v|/|b| {manifest['ratio'][i]:.3f}"
        )
    print(
        f"wrote {folder / 'collect'}: {manifest['tokens']:,} tokens of "
        f"{sum(map(len, examples.values())):,} responses in {len(files)} shards"
    )
    print(next_command("align.py", config.out, config.method))


def open_inputs(config):
    """Stage1Output, tokenizer and pairs {"train" | "valid": [EncodedPair]}; completes config."""
    stage1 = open_stage1(config.out, config.method)
    settings, source = stage1.manifest["settings"], f"{config.out}/{stage1.method}"
    inherited = ["model", "max_length", "seed"]
    own_data = config.data is not None
    if not own_data:
        inherited += ["data", "columns"]
    inherit(config, settings, inherited, source)
    defaults = {"limit": LIMIT, "base": "original"}
    fill(config, defaults, settings.get("collect", {}), source)
    config.max_length = min(config.max_length, context_length(load_config(config.model)))
    config.method = stage1.method
    if config.method == "scit" and config.stimulus == "plain":
        raise UserError(
            "--stimulus plain: SCIT's model knows right from wrong by the instruction alone"
        )
    config.stimulus = config.stimulus or DEFAULT_STIMULUS[config.method]
    tokenizer = load_tokenizer(config.model)
    pairs = prepare_pairs(
        config.data,
        ("train", "valid"),
        tokenizer,
        config.max_length,
        settings["split_seed"],
        config.limit,
        positive=settings["positive"],
        negative=settings["negative"],
        template=settings["template"],
        columns=config.columns,
    )
    check_ids(config.model, pairs.max_id)
    if own_data:
        print("--data: these pairs need not be those that stage 1 was trained on")
        # the embedded default's judge knows no other data
        settings["judge"] = None
    elif pairs.source_digest != stage1.manifest["inputs"]["pairs"]:
        raise UserError(
            f"{', '.join(config.data)}: these are other pairs than {source} was trained on: bring "
            f"those back, run `python {stage1.method}.py` again, or name the pairs with --data"
        )
    return stage1, tokenizer, pairs


def count_recorded(examples, config):
    """How many positions are recorded of some examples."""
    return sum(
        recorded_length(pair, response, config.last_prompt_token) for pair, response in examples
    )


def count_input_tokens(files, config):
    """How many tokens run through the model for the files {name: passes}."""
    passes = itertools.chain.from_iterable(files.values())
    examples = itertools.chain.from_iterable(passes)
    return sum(sum(input_lengths(example, config)) for example in examples)


@contextmanager
def fast_float32():
    """Within the context a GPU multiplies float32 matrices in TF32: 10 bits of mantissa, of which
    bfloat16 has 7, at half its speed."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def copy_adapter(source, target):
    """Copy an adapter's two files."""
    target.mkdir(exist_ok=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(source / name, target / name)


def read_statistics(paths, tokens):
    """Means over all recorded tokens, per layer: |v|, |b| and |v|/|b|, from the shards."""
    sums = 0
    for path in paths:
        with safe_open(path, "pt") as file:
            sums = sums + file.get_tensor("statistics")  # [3, L]
    norm_v, norm_b, ratio = (sums / tokens).tolist()
    return {"norm_v": norm_v, "norm_b": norm_b, "ratio": ratio}


if __name__ == "__main__":
    run(main, Config, distributed=True)
