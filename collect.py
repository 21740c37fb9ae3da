"""Stage 2: record the hidden states under the preferred and the dispreferred stimulus (paper section 3.2).

    python collect.py                                    after scit.py or dual.py
    python collect.py --layers 10 12 14 16 18 --max-gb 200
    python collect.py --store lowrank --rank 8 --store-base no       some numbers a token instead of vectors
    python collect.py --survey                           which layers and which strength? collects nothing

For each response r, chosen and rejected, and each target layer l, at the same token positions:

    SCIT:  h+ = A(π_scit, <p+, q, r>, l)     h- = A(π_scit, <p-, q, r>, l)
    DUAL:  h+ = A(π_good, <q, r>, l)         h- = A(π_bad, <q, r>, l)          (--stimulus instructed: with p+ and p-)
    base:  b  = A(π_base, <q, r>, l)         what align.py will move by α (h+ - h-)

A target layer l is the output of decoder block l, counted from 0. Recorded are the response's positions and the
last prompt token, whose state predicts the response's first token. Nothing above the highest target is loaded
or run. Writes OUT/METHOD/collect, all that align.py needs besides the base model
(and, for the table of a sweep, the pairs).

Beyond the paper, `--store lowrank` keeps of v = h+ - h- its coefficients c = v U^T alone, where the rows of U [k, D] are
the top k uncentred principal directions of v at that layer, found in a pass over a sample before.

`--survey` measures every block and recommends layers, strength and rank, see survey.py.
"""
import itertools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
from checkpoint import Signals
from files import UserError, checked, choose_method, inherit, new_stage, next_command, read_stage, run, setting, written_whole
from lora import CONFIG, WEIGHTS, LoRA, load_adapter, only, sizes
from model import (hidden_states, load_config, load_model, load_tokenizer, model_digest, pick_device, pick_layers, pick_tokens,
                   principal_directions)
from survey import HELD_OUT, survey

ADAPTERS = {"scit": {"scit": "adapter"}, "dual": {"good": "good", "bad": "bad"}}     # method: {kind: folder}


@dataclass
class Config:
    out: str = setting("out", "folder of all stages")
    method: Literal["scit", "dual"] | None = setting(None, "whose stage 1 to use; empty takes the one that is there")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    layers: list[str] | None = setting(None, "target layers: numbers from 0, negative from the top, or middle, last, all; empty: all of fewer "
                                             "than 12, else middle")
    base: Literal["instructed", "original"] | None = setting(
        None, "base of target and LoRA: the SCIT or good model, or the original; empty: instructed for SCIT, original for DUAL")
    stimulus: Literal["plain", "instructed"] = setting("plain", "DUAL: <q, r> to both models, or p+ to good and p- to bad (the paper)")
    last_prompt_token: bool = setting(True, "record the last prompt token too; the authors leave it out")
    store: Literal["full", "diff", "lowrank"] = setting("full", "plus and minus, their difference v, or its coefficients on a few directions")
    rank: int | None = setting(None, "directions a layer, for --store lowrank; empty: 8", least=1)
    store_base: bool = setting(True, "store b too; without it align runs the base again in each step")
    max_gb: float = setting(20, "most gigabytes to write; only a random share of the pairs is used beyond", least=0)
    shard_mb: float = setting(128, "size of a shard in megabytes, which is held in memory", least=0)
    tokens_per_pass: int | None = setting(None, "most tokens in a forward pass, padding included; empty takes 4096 on a GPU, 2048 on the CPU", least=1)
    limit: int | None = setting(None, "use so many pairs of each split only, drawn at random", least=1)
    survey: bool = setting(False, "collect nothing: measure every block, and recommend layers, strength and rank")
    model: str | None = setting(None, "model folder or hub name; empty inherits from stage 1")
    data: list[str] | None = setting(None, "preference pairs, as in stage 1; empty inherits")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of the model and the states; empty inherits")
    max_length: int | None = setting(None, "longest input in tokens; empty inherits", least=2)
    seed: int | None = setting(None, "seed of the order; empty inherits; the split stays that of stage 1")


def instructed(method, config):
    """Whether h+ and h- are of inputs with p+ and p-."""
    return method == "scit" or config.stimulus == "instructed"


def record_states(trunk, adapters, method, config, pairs, pad_id):
    """The states of a batch of (pair, "chosen" | "rejected"), packed without padding, in the model's own dtype.

    Returns (base, plus, minus): lists of L tensors [T, D], T the recorded positions of the batch, example by example.
    """
    def states(on, prompt):
        batch = data.collate([pair.example(prompt, response) for pair, response in pairs], pad_id, trunk.device)
        with only(adapters.values(), *on):
            dense = hidden_states(trunk, config.layers, batch.ids)                              # L x [B, S, D]
        mask = data.recorded(batch.response, config.last_prompt_token)
        return [h[mask] for h in dense]                                                         # L x [T, D]
    if method == "scit":
        up = down = [adapters["scit"]]
    else:
        up, down = [adapters["good"]], [adapters["bad"]]
    positive, negative = ("positive", "negative") if instructed(method, config) else ("plain", "plain")
    base = states(up if config.base == "instructed" else [], "plain")                           # b
    plus = states(up, positive)                                                                # h+
    minus = states(down, negative)                                                             # h-
    return base, plus, minus


def input_length(example, method, config):
    """Tokens of the longest input that is run for a (pair, "chosen" | "rejected")."""
    pair, response = example
    return max(pair.length(prompt, response) for prompt in (pair.prompts if instructed(method, config) else ["plain"]))


def stored_directions(path, examples, lengths, record, config, trunk):
    """The top directions U [k, D] of v per layer, in fp32, and the shares of Σ|v|² that they hold: read from path, where they are not
    there found in a sample and written."""
    if not path.exists():
        def differences():
            """v of a random sample, pass by pass: lists of L tensors [T, D]."""
            drawn = data.sample(range(len(examples)), data.SAMPLE, config.seed)
            for part in tqdm(data.micro_batches(drawn, lengths, config.tokens_per_pass), desc="directions", unit="pass"):
                _, plus, minus = record([examples[i] for i in part])
                yield [p.float() - m.float() for p, m in zip(plus, minus)]
        directions, shares = principal_directions(differences(), config.rank)
        found = {f"directions.{layer}": U.to(trunk.dtype).cpu() for layer, U in zip(config.layers, directions)}
        found["energy"] = torch.tensor([share[config.rank - 1] for share in shares], dtype=torch.float64)
        with written_whole(path) as aside:
            save_file(found, aside)
    found = load_file(path, device=str(trunk.device))
    return [found[f"directions.{layer}"].float() for layer in config.layers], found["energy"].tolist()


def plan_store(config, width):
    """What is kept of the states: {"plus" | "minus" | "v" | "c" | "base": numbers a token and layer}, and their bytes a token."""
    stored = {"full": {"plus": width, "minus": width}, "diff": {"v": width}, "lowrank": {"c": config.rank}}[config.store]
    stored |= {"base": width} if config.store_base else {}
    return stored, len(config.layers) * sum(stored.values()) * getattr(torch, config.dtype).itemsize


def fit_disk(examples, config, token_bytes, folder):
    """The examples {split: [(pair, "chosen" | "rejected")]}, of the training pairs a random share that --max-gb holds. UserError where
    the disk is too small; folder: whose unfinished collection goes on or is deleted."""
    def written(some):
        return [data.recorded_length(example, config) * token_bytes + 4 * example[0].length("plain", example[1]) for example in some]
    room, train = config.max_gb * 1e9 - sum(written(examples["valid"])), examples["train"]
    of_pairs = [chosen + rejected for chosen, rejected in zip(written(train)[::2], written(train)[1::2])]
    if sum(of_pairs) > room:
        order = data.sample(range(len(of_pairs)), len(of_pairs), config.seed)
        kept = [i for i, end in zip(order, itertools.accumulate(of_pairs[i] for i in order)) if end <= room]
        if not kept:
            raise UserError(f"--max-gb {config.max_gb:g} holds no pair: the held-out ones take {config.max_gb - room / 1e9:.3g} GB, the others "
                            f"{sum(of_pairs) / 1e9:.3g}")
        examples = {**examples, "train": [train[2 * i + j] for i in kept for j in (0, 1)]}
        print(f"--max-gb {config.max_gb:g} holds {len(kept):,} training pairs, {len(kept) / len(order):.1%} of them")
    total, free = sum(map(sum, map(written, examples.values()))), shutil.disk_usage(config.out).free
    free += sum(path.stat().st_size for path in (folder / ".collect.partial").glob("*.safetensors"))
    if total > free:
        raise UserError(f"{config.out}: {total / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free: lower --max-gb or use --store diff or lowrank")
    print(f"{total / 1e9:.3g} GB to write, {token_bytes:,} bytes of states per token")
    return examples


def plan_shards(examples, lengths, config, token_bytes):
    """The examples in shards of at most config.shard_mb of states, or one response, the longest first (what does not fit in memory shows
    early), and each in forward passes: lists of lists of passes, which are lists of examples. What is in a shard, and where, does not
    depend on the size of a pass: a run that goes on may take another."""
    shards, held = [[]], 0
    for i in sorted(range(len(examples)), key=lengths.__getitem__, reverse=True):
        size = data.recorded_length(examples[i], config) * token_bytes
        if held and held + size > config.shard_mb * 1e6:
            shards.append([])
            held = 0
        held += size
        shards[-1].append(i)
    return [[[examples[i] for i in part[::-1]] for part in data.micro_batches(shard[::-1], lengths, config.tokens_per_pass)[::-1]]
            for shard in shards]


def record_shard(path, passes, record, directions, config, stored, after):
    """Record some passes into one file, held in memory until it is whole. Per layer also Σ|v|, Σ|b| and Σ|v|/|b|, as statistics [3, L].

    stored: as plan_store says; after: called after each pass. UserError at NaN or infinity.
    """
    examples, dtype = sum(passes, []), getattr(torch, config.dtype)
    T, ids = sum(data.recorded_length(example, config) for example in examples), sum(pair.length("plain", response) for pair, response in examples)
    shapes = {"ids": ((ids,), torch.int32), "lengths": ((len(examples),), torch.int32), "starts": ((len(examples),), torch.int32),
              **{f"{name}.{layer}": ((T, width), dtype) for name, width in stored.items() for layer in config.layers}}
    tensors, at = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}, dict.fromkeys(shapes, 0)
    statistics = torch.zeros(3, len(config.layers), dtype=torch.float64)
    for batch in passes:
        base, plus, minus = record(batch)
        v = [p - m for p, m in zip(plus, minus)]                                                # h+ - h-
        norm_v, norm_b = (torch.stack([state.float().norm(dim=-1) for state in states]) for states in (v, base))              # [L, T]
        check_finite(norm_v + norm_b, batch, config)
        statistics += torch.stack([norm_v, norm_b, norm_v / norm_b]).sum(-1).cpu()
        states = {"plus": plus, "minus": minus, "v": v, "base": base}
        if directions:
            states["c"] = [(x.float() @ U.T).to(x.dtype) for x, U in zip(v, directions)]        # c = v U^T: [T, k]
        inputs = [pair.example("plain", response) for pair, response in batch]
        new = {f"{name}.{layer}": state for name in stored for layer, state in zip(config.layers, states[name])} | {
            "ids": torch.tensor([token for tokens, _ in inputs for token in tokens]), "lengths": torch.tensor([len(tokens) for tokens, _ in inputs]),
            "starts": torch.tensor([start - config.last_prompt_token for _, start in inputs])}
        for name, tensor in new.items():
            tensors[name][at[name]:at[name] + len(tensor)] = tensor
            at[name] += len(tensor)
        del base, plus, minus, v, states, new                                                   # before the next pass
        after()
    assert all(at[name] == len(tensors[name]) for name in at)
    with written_whole(path) as aside:
        save_file({**tensors, "statistics": statistics}, aside)


def check_finite(norms, batch, config):
    """UserError that names layer and response where one of the norms [L, T] of a batch's states is NaN or infinite."""
    if not norms.isfinite().all():
        layer, position = (~norms.isfinite()).nonzero()[0].tolist()
        ends = torch.tensor([data.recorded_length(example, config) for example in batch]).cumsum(0)
        pair, response = batch[int((ends <= position).sum())]
        raise UserError(f"the states of layer {config.layers[layer]} are NaN or infinite in the {response} response to "
                        f"{pair.pair.prompt[-1][1][:60]!r}: take --dtype bfloat16 or float32, or train stage 1 at a lower --lr")


def main(config):
    # what the earlier stage says
    method = choose_method(config.out, config.method, {"scit": "adapter", "dual": "good"}, ["python scit.py", "python dual.py"])
    stage1 = {kind: Path(config.out) / method / folder for kind, folder in ADAPTERS[method].items()}
    records = {kind: read_stage(folder, kind, f"python {method}.py") for kind, folder in stage1.items()}
    first = next(iter(records.values()))
    if any(record["settings"] != first["settings"] for record in records.values()):
        raise UserError(f"{' and '.join(map(str, stage1.values()))} come from different runs: run `python {method}.py` again")
    settings = first["settings"]
    inherit(config, settings, ("model", "data", "dtype", "max_length", "seed"), f"{config.out}/{method}")
    config.base = config.base or {"scit": "instructed", "dual": "original"}[method]
    device = pick_device(config.device)
    config.tokens_per_pass = pick_tokens(config.tokens_per_pass, device)
    torch.manual_seed(config.seed)

    # the model up to the highest target layer, and the pairs
    config.layers = pick_layers(["all"] if config.survey else config.layers, load_config(config.model).num_hidden_layers)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, device, blocks=None if config.survey else config.layers[-1] + 1)
    trunk = model.base_model
    if model_digest(config.model) != first["model_digest"]:
        raise UserError(f"--model {config.model} is not the model that {config.out}/{method} was trained on: run `python {method}.py` again")
    adapters = {}
    for kind, folder in stage1.items():
        adapters[kind] = LoRA(trunk, factors=load_adapter(checked(folder, records[kind]), trunk)).eval()
    pairs = data.prepare(config.data, ("train", "valid"), tokenizer, config.max_length, settings["split_seed"], config.limit,
                         settings["positive"], settings["negative"], settings["template"])
    pairs["valid"] = data.sample(pairs["valid"], 64 if not config.survey else HELD_OUT, config.seed)
    examples = {split: [(pair, response) for pair in pairs[split] for response in ("chosen", "rejected")] for split in pairs}

    signals = Signals()

    def record(batch):
        signals.check()
        return record_states(trunk, adapters, method, config, batch, tokenizer.pad_token_id)

    if config.survey:
        with only(adapters.values(), *([next(iter(adapters.values()))] if config.base == "instructed" else [])):           # the model that b is of
            layers, strengths, rank = survey(model, record, pairs, config, tokenizer.pad_token_id, Path(config.out) / method / "survey.json")
        same = "".join(f" --{name.replace('_', '-')} {getattr(config, name)}" for name in ("base", "stimulus", "last_prompt_token")
                       if getattr(config, name) not in (getattr(Config, name), {"scit": "instructed", "dual": "original"}[method]))
        print(next_command("collect.py", config.out, config.method) + f" --layers {' '.join(map(str, layers))}{same}")
        print(next_command("align.py", config.out, config.method) + f" --strength {' '.join(map(str, strengths))}" + (f" --rank {rank}" if rank else ""))
        return

    # what it will take
    width = trunk.config.get_text_config().hidden_size
    if config.rank and config.store != "lowrank":
        raise UserError("--rank goes with --store lowrank; align.py has a --rank of its own for other collections")
    if config.store == "lowrank":
        config.rank = config.rank or min(8, width)
        if config.rank > width:
            raise UserError(f"--rank {config.rank}: the hidden states are {width} wide")
    stored, token_bytes = plan_store(config, width)
    examples = fit_disk(examples, config, token_bytes, Path(config.out) / method)
    tokens = {split: sum(data.recorded_length(example, config) for example in some) for split, some in examples.items()}
    lengths = {split: [input_length(example, method, config) for example in some] for split, some in examples.items()}
    print(f"{sizes(trunk)}; layers {config.layers} of width {width} in {config.dtype}, {sum(tokens.values()):,} tokens")
    seen = "positive" if instructed(method, config) else "plain"
    print("one input: " + repr(tokenizer.decode(examples["train"][0][0].example(seen, "chosen")[0])))

    # recording
    folder, directions = Path(config.out) / method / "collect", None
    result = {"settings": {**settings, **vars(config)}, "method": method, "model_digest": first["model_digest"], "hidden_size": width,
              "adapters": {kind: r["digests"][WEIGHTS] for kind, r in records.items()}, "token_bytes": token_bytes}
    depends_on = {**result["settings"], **result, "settings": None, "pairs": data.digest(pairs)}
    with signals, new_stage(folder, "collect", result, depends_on) as new, torch.no_grad():
        if config.store == "lowrank":
            directions, result["energy"] = stored_directions(new / "directions.safetensors", examples["train"], lengths["train"],
                                                                      record, config, trunk)
        files = {}                            # {name: its passes}
        for part, split in (("held_out", "valid"), ("shards", "train")):
            shards = plan_shards(examples[split], lengths[split], config, token_bytes)
            result[part] = [f"{part.removesuffix('s')}-{i:05d}.safetensors" for i in range(len(shards))]
            files |= zip(result[part], shards)
        with tqdm(total=sum(map(len, files.values())), desc="collect", unit="pass") as bar:
            for name, passes in files.items():
                if (new / name).exists():     # of a run that was cut off
                    bar.update(len(passes))
                else:
                    record_shard(new / name, passes, record, directions, config, stored, bar.update)
        statistics = sum(safe_open(new / name, "pt").get_tensor("statistics") for name in files)                 # Σ|v|, Σ|b|, Σ|v|/|b|: [3, L]
        if config.base == "instructed":       # align needs no other stage's folder
            (new / "base_adapter").mkdir(exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                shutil.copy(next(iter(stage1.values())) / name, new / "base_adapter" / name)
        result["tokens"], result["tokens_train"] = sum(tokens.values()), tokens["train"]
        result["norm_v"], result["norm_h"], result["ratio"] = (statistics / result["tokens"]).tolist()
    for i, layer in enumerate(config.layers):
        print(f"  layer {layer}: |v| {result['norm_v'][i]:.3f}, |h| {result['norm_h'][i]:.3f}, mean |v|/|h| {result['ratio'][i]:.3f}"
              + (f", {config.rank} directions hold {result['energy'][i]:.0%} of |v|²" if directions else ""))
    print(f"wrote {folder}: {result['tokens']:,} tokens of {sum(map(len, examples.values())):,} responses in {len(files)} shards")
    print(next_command("align.py", config.out, config.method))


if __name__ == "__main__":
    run(main, Config)
