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
or run. Writes OUT/METHOD/collect, which is all that align.py needs besides the base model.

Beyond the paper, `--store lowrank` keeps of v = h+ - h- its coefficients c = v U^T alone, where the rows of U [k, D] are
the top k uncentred principal directions of v at that layer, found in a pass over a sample before.

`--survey` measures every block and recommends layers, strength and rank, see survey.py.
"""
import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tqdm import tqdm

import data
from checkpoint import Signals
from files import UserError, checked, choose_method, inherit, new_stage, next_command, read_stage, run, setting
from lora import CONFIG, WEIGHTS, LoRA, load_adapter, only, sizes
from model import hidden_states, load_config, load_model, load_tokenizer, model_digest, pick_device, pick_layers, principal_directions
from survey import HELD_OUT, survey

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.float64: "F64"}    # safetensors' names
ADAPTERS = {"scit": {"scit": "adapter"}, "dual": {"good": "good", "bad": "bad"}}     # method: {kind: folder}


@dataclass
class Config:
    out: str = setting("out", "folder of all stages")
    method: Literal["scit", "dual"] | None = setting(None, "whose stage 1 to use; empty takes the one that is there")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    layers: list[str] | None = setting(None, "target layers: numbers from 0, negative from the top, or middle, last, all; empty: all of fewer than 12, else middle")
    base: Literal["instructed", "original"] | None = setting(
        None, "base of target and LoRA: the SCIT or good model, or the original; empty: instructed for SCIT, original for DUAL")
    stimulus: Literal["plain", "instructed"] = setting("plain", "DUAL: <q, r> to both models, or p+ to good and p- to bad (the paper)")
    last_prompt_token: bool = setting(True, "record the last prompt token too; the authors leave it out")
    store: Literal["full", "diff", "lowrank"] = setting("full", "plus and minus, their difference v, or its coefficients on a few directions")
    rank: int | None = setting(None, "directions a layer, for --store lowrank; empty: 8", least=1)
    store_base: bool = setting(True, "store b too; without it align runs the base again in each step")
    max_gb: float = setting(20, "most gigabytes to write; only a random share of the pairs is used beyond", least=0)
    shard_mb: float = setting(512, "size of a shard in megabytes", least=0)
    batch_size: int = setting(32, "responses in a forward pass, at most", least=1)
    tokens_per_pass: int = setting(4096, "tokens in a forward pass, padding included, at most", least=1)
    limit: int | None = setting(None, "use so many training pairs only, drawn at random", least=1)
    survey: bool = setting(False, "collect nothing: measure every block, and recommend layers, strength and rank")
    model: str | None = setting(None, "model folder or hub name; empty inherits from stage 1")
    data: list[str] | None = setting(None, "preference pairs, as in stage 1; empty inherits")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of the model and the states; empty inherits")
    max_length: int | None = setting(None, "longest input in tokens; empty inherits", least=2)
    seed: int | None = setting(None, "seed of the split and the order; empty inherits")


def record_states(trunk, adapters, method, config, pairs, pad_id, device):
    """The states of a batch of (pair, "chosen" | "rejected"), packed without padding, in the model's own dtype.

    Returns (base, plus, minus): lists of L tensors [T, D], T the recorded positions of the batch, example by example.
    """
    def states(on, prompt):
        batch = data.collate([pair.example(prompt, response) for pair, response in pairs], pad_id, device)
        with only(adapters.values(), *on):
            dense = hidden_states(trunk, config.layers, batch.ids, batch.attention)             # L x [B, S, D]
        mask = recorded(batch.response, config.last_prompt_token)
        return [h[mask] for h in dense]                                                         # L x [T, D]
    if method == "scit":
        up = down = [adapters["scit"]]
    else:
        up, down = [adapters["good"]], [adapters["bad"]]
    instructed = method == "scit" or config.stimulus == "instructed"
    base = states(up if config.base == "instructed" else [], "plain")                           # b
    plus = states(up, "positive" if instructed else "plain")                                    # h+
    minus = states(down, "negative" if instructed else "plain")                                 # h-
    return base, plus, minus


def recorded(response, last_prompt_token):
    """Mask of the recorded positions: bool [B, S] of the response tokens -> the same plus the position before them."""
    return response | response.roll(-1, 1) if last_prompt_token else response


def recorded_length(example, config):
    """Number of positions recorded of a (pair, "chosen" | "rejected")."""
    return len(example[0].responses[example[1]]) + config.last_prompt_token


def sampled_differences(examples, record, config):
    """v of a random sample of the examples, batch by batch: lists of L tensors [T, D]."""
    drawn = data.sample(examples, data.SAMPLE, config.seed)
    for i in tqdm(range(0, len(drawn), config.batch_size), desc="directions", unit="batch"):
        _, plus, minus = record(drawn[i:i + config.batch_size])
        yield [p.float() - m.float() for p, m in zip(plus, minus)]


def write_tensors(path, shapes, parts):
    """A safetensors file written piece by piece, so that only one piece is in memory.

    shapes: {name: (dtype, shape)} of the whole; parts: dicts of tensors, to be laid end to end along their first dimension.
    """
    header, ends = {}, {}
    for name, (dtype, shape) in shapes.items():
        begin = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
        ends[name] = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    with open(aside, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for name, tensor in part.items():
                file.seek(8 + len(text) + ends[name])
                ends[name] += file.write(tensor.contiguous().cpu().view(torch.uint8).numpy())      # bf16 has no type in numpy
        file.flush()
        os.fsync(file.fileno())
    if any(ends[name] != entry["data_offsets"][1] for name, entry in header.items()):
        raise ValueError(f"{path}: the parts do not fill the shapes")
    aside.rename(path)


def plan_shards(examples, config, token_bytes):
    """The examples in batches of similar length, and these in shards of about config.shard_mb: lists of lists of lists."""
    lengths, shards, held = [pair.length("plain", response) for pair, response in examples], [[]], 0
    groups = data.batches(lengths, config.batch_size, torch.Generator().manual_seed(config.seed))
    for group in (part for group in groups for part in data.parts(group, lengths, config.tokens_per_pass)):
        if held >= config.shard_mb * 1e6:
            shards.append([])
            held = 0
        shards[-1].append([examples[i] for i in group])
        held += sum(recorded_length(example, config) for example in shards[-1][-1]) * token_bytes
    return shards


def record_shard(path, batches, record, directions, config, stored, after):
    """Record some batches into one file, each written as it comes, so that no more than one is in memory.

    stored: {"plus" | "minus" | "v" | "c" | "base": numbers a token and layer}, what is kept of the states. Per layer also
    Σ|v|, Σ|b| and Σ|v|/|b|, as statistics [3, L]. after: called after each batch. UserError at NaN or infinity.
    """
    examples, statistics = sum(batches, []), torch.zeros(3, len(config.layers), dtype=torch.float64)
    dtype, T = getattr(torch, config.dtype), sum(recorded_length(example, config) for example in examples)
    shapes = {"statistics": (torch.float64, statistics.shape), "ids": (torch.int32, (sum(pair.length("plain", response) for pair, response in examples),)),
              "lengths": (torch.int32, (len(examples),)), "starts": (torch.int32, (len(examples),)),
              **{f"{name}.{layer}": (dtype, (T, width)) for name, width in stored.items() for layer in config.layers}}

    def parts():
        for batch in batches:
            base, plus, minus = record(batch)
            v = [p - m for p, m in zip(plus, minus)]                                            # h+ - h-
            norm_v, norm_b = (torch.stack([state.float().norm(dim=-1) for state in states]) for states in (v, base))          # [L, T]
            statistics.add_(torch.stack([norm_v, norm_b, norm_v / norm_b]).sum(-1).cpu())
            states = {"plus": plus, "minus": minus, "v": v, "base": base}
            if directions:
                states["c"] = [(x.float() @ U.T).to(x.dtype) for x, U in zip(v, directions)]    # c = v U^T: [T, k]
            of_batch = [pair.example("plain", response) for pair, response in batch]
            if not (norm_v + norm_b).isfinite().all():
                layer, position = (~(norm_v + norm_b).isfinite()).nonzero()[0].tolist()
                ends = torch.tensor([recorded_length(example, config) for example in batch]).cumsum(0)
                pair, response = batch[int((ends <= position).sum())]
                raise UserError(f"the states of layer {config.layers[layer]} are NaN or infinite in the {response} response to "
                                f"{pair.pair.prompt[-1][1][:60]!r}: take --dtype bfloat16 or float32, or train stage 1 at a lower --lr")
            after()
            yield {f"{name}.{layer}": state for name in stored for layer, state in zip(config.layers, states[name])} | {
                "ids": torch.tensor([token for ids, _ in of_batch for token in ids], dtype=torch.int32),
                "lengths": torch.tensor([len(ids) for ids, _ in of_batch], dtype=torch.int32),
                "starts": torch.tensor([start - config.last_prompt_token for _, start in of_batch], dtype=torch.int32)}
        yield {"statistics": statistics}
    write_tensors(path, shapes, parts())


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
    torch.manual_seed(config.seed)

    # the model up to the highest target layer, and the pairs
    config.layers = pick_layers(["all"] if config.survey else config.layers, load_config(config.model).num_hidden_layers)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, getattr(torch, config.dtype), device, blocks=None if config.survey else config.layers[-1] + 1)
    trunk = model.base_model
    if model_digest(config.model) != first["model_digest"]:
        raise UserError(f"--model {config.model} is not the model that {config.out}/{method} was trained on: run `python {method}.py` again")
    adapters = {}
    for kind, folder in stage1.items():
        adapters[kind] = LoRA(trunk, factors=load_adapter(checked(folder, records[kind]), trunk)).eval()
    pairs = data.prepare(config.data, ("train", "valid"), tokenizer, config.max_length, config.seed, config.limit,
                         settings["positive"], settings["negative"], settings["template"])
    pairs["valid"] = data.sample(pairs["valid"], 64 if not config.survey else HELD_OUT, config.seed)
    examples = {split: [(pair, response) for pair in pairs[split] for response in ("chosen", "rejected")] for split in pairs}

    signals = Signals()

    def record(batch):
        signals.check()
        return record_states(trunk, adapters, method, config, batch, tokenizer.pad_token_id, device)

    if config.survey:
        with only(adapters.values(), *([next(iter(adapters.values()))] if config.base == "instructed" else [])):           # the model that b is of
            layers, strengths, rank = survey(model, record, pairs, config, tokenizer.pad_token_id, Path(config.out) / method / "survey.json")
        same = "".join(f" --{name.replace('_', '-')} {getattr(config, name)}" for name in ("base", "stimulus", "last_prompt_token")
                       if getattr(config, name) not in (getattr(Config, name), {"scit": "instructed", "dual": "original"}[method]))
        print(next_command("collect.py", config.out, config.method) + f" --layers {' '.join(map(str, layers))}{same}")
        print(next_command("align.py", config.out, config.method) + f" --strength {' '.join(map(str, strengths))}" + (f" --rank {rank}" if rank else ""))
        return

    # what it will take
    width, itemsize = trunk.config.get_text_config().hidden_size, torch.finfo(trunk.dtype).bits // 8
    if config.rank and config.store != "lowrank":
        raise UserError("--rank goes with --store lowrank; align.py has a --rank of its own for other collections")
    config.rank = config.rank or min(8, width)
    if config.rank > width:
        raise UserError(f"--rank {config.rank}: the hidden states are {width} wide")
    stored = {"full": {"plus": width, "minus": width}, "diff": {"v": width}, "lowrank": {"c": config.rank}}[config.store]
    stored |= {"base": width} if config.store_base else {}
    token_bytes = len(config.layers) * sum(stored.values()) * itemsize
    tokens = {split: [recorded_length(example, config) for example in examples[split]] for split in examples}
    ids = {split: sum(4 * pair.length("plain", response) for pair, response in examples[split]) for split in examples}
    needed = {split: sum(tokens[split]) * token_bytes + ids[split] for split in examples}
    share = min(1.0, config.max_gb * 1e9 / needed["train"])
    if share < 1:                             # a random share of the pairs, both responses of each
        kept = torch.randperm(len(pairs["train"]), generator=torch.Generator().manual_seed(config.seed))[:int(share * len(pairs["train"]))].tolist()
        if not kept:
            raise UserError(f"--max-gb {config.max_gb:g} holds no pair: all of them take {needed['train'] / 1e9:.3g} GB")
        examples["train"], tokens["train"] = ([values[2 * i + j] for i in kept for j in (0, 1)] for values in (examples["train"], tokens["train"]))
        print(f"--max-gb {config.max_gb:g} holds {len(kept):,} training pairs, {share:.1%} of them")
    total, free = share * needed["train"] + needed["valid"], shutil.disk_usage(config.out).free
    free += sum(path.stat().st_size for path in (Path(config.out) / method / ".collect.partial").glob("*.safetensors"))      # kept or deleted
    print(f"{sizes(trunk)}; layers {config.layers} of width {width} in {config.dtype}: {sum(map(sum, tokens.values())):,} tokens of "
          f"{token_bytes:,} bytes of states, {total / 1e9:.3g} GB to write")
    if total > free:
        raise UserError(f"{config.out}: {total / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free: lower --max-gb or use --store diff or lowrank")
    seen = "positive" if method == "scit" or config.stimulus == "instructed" else "plain"
    print("one input: " + repr(tokenizer.decode(examples["train"][0][0].example(seen, "chosen")[0])))

    # recording
    folder, directions = Path(config.out) / method / "collect", None
    result = {"settings": {**settings, **vars(config)}, "method": method, "model_digest": first["model_digest"], "hidden_size": width,
              "adapters": {kind: r["digests"][WEIGHTS] for kind, r in records.items()}, "token_bytes": token_bytes}
    with signals, new_stage(folder, "collect", result, {**result["settings"], **result, "settings": None, "pairs": data.digest(pairs)}) as new, torch.no_grad():
        if config.store == "lowrank":
            if not (new / "directions.safetensors").exists():
                directions, shares = principal_directions(sampled_differences(examples["train"], record, config), config.rank)
                found = {f"directions.{layer}": U.to(trunk.dtype) for layer, U in zip(config.layers, directions)}
                found["energy"] = torch.tensor([share[config.rank - 1] for share in shares], dtype=torch.float64)
                write_tensors(new / "directions.safetensors", {name: (x.dtype, x.shape) for name, x in found.items()}, [found])
            found = load_file(new / "directions.safetensors", device=str(device))
            directions, result["energy"] = [found[f"directions.{layer}"].float() for layer in config.layers], found["energy"].tolist()
        shards = plan_shards(examples["train"], config, token_bytes)
        result["shards"] = [f"shard-{i:05d}.safetensors" for i in range(len(shards))]
        files = dict(zip(["heldout.safetensors", *result["shards"]], [sum(plan_shards(examples["valid"], config, token_bytes), []), *shards]))
        with tqdm(total=sum(map(len, files.values())), desc="collect", unit="batch") as bar:
            for name, batches in files.items():
                if (new / name).exists():     # of a run that was cut off
                    bar.update(len(batches))
                else:
                    record_shard(new / name, batches, record, directions, config, stored, bar.update)
        statistics = sum(safe_open(new / name, "pt").get_tensor("statistics") for name in files)                 # Σ|v|, Σ|b|, Σ|v|/|b|: [3, L]
        if config.base == "instructed":       # align needs no other stage's folder
            (new / "base_adapter").mkdir(exist_ok=True)
            for name in (CONFIG, WEIGHTS):
                shutil.copy(next(iter(stage1.values())) / name, new / "base_adapter" / name)
        result["tokens"], result["tokens_train"] = sum(map(sum, tokens.values())), sum(tokens["train"])
        result["norm_v"], result["norm_h"], result["ratio"] = (statistics / result["tokens"]).tolist()
    for i, layer in enumerate(config.layers):
        print(f"  layer {layer}: |v| {result['norm_v'][i]:.3f}, |h| {result['norm_h'][i]:.3f}, mean |v|/|h| {result['ratio'][i]:.3f}"
              + (f", {config.rank} directions hold {result['energy'][i]:.0%} of |v|²" if directions else ""))
    print(f"wrote {folder}: {result['tokens']:,} tokens of {sum(map(len, examples.values())):,} responses in {len(result['shards'])} shards and heldout.safetensors")
    print(next_command("align.py", config.out, config.method))


if __name__ == "__main__":
    run(main, Config)
