"""Which layers should move, how far, and in how many directions? Run before collect.py.

    python -m tools.survey                               after scit.py or dual.py

The idea is what align.py could reach at best. An adapter that hits its targets in block l leaves
the states b + α v there, and the blocks above turn them into an answer. So the base model runs on
validation pairs with just that put in place, block by block and strength by strength, and its NLL
of the chosen responses tells which of these states are good: too weak a move does little, too
strong a one makes states that the blocks above have never seen. Nothing of this is in the paper.

Writes OUT/METHOD/survey.json and prints the collect.py and tools.sweep commands that follow.
"""

import contextlib
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import collect
from common.collection import (
    difference,
    principal_directions,
    recorded_length,
    recorded_mask,
)
from common.config import UserError, run, setting
from common.data import collate, sample, split_into_passes
from common.hf import (
    check_same_model,
    choose_device,
    choose_tokens_per_pass,
    find_blocks,
    load_model,
    response_logprobs,
)
from common.stages import next_command, versions, write_json
from lora import enable_only
from tools.plots import check_plot, plot_survey

# ρ: states moved by this share of their norm
STRENGTHS = (0.1, 0.15, 0.25, 0.4, 0.6)

# at most this many layers are recommended: their states take disk space
MAX_LAYERS = 6


@dataclass
class Config(collect.RecordingSettings):
    """What is run under which stimulus is set as in collect.py."""

    train_pairs: int = setting(256, "training pairs to measure v on, at most", minimum=1)
    valid_pairs: int = setting(128, "validation pairs to score moved states on, at most", minimum=1)
    plot: str | None = setting(
        None, "also draw NLL and |v|/|b| over the blocks: a .png, .pdf or .svg", group="run"
    )


def both_responses(pairs, tokens_per_pass):
    """Both responses of each pair, pass by pass: lists of (EncodedPair, "chosen" | "rejected"),
    the chosen one of each pair before the rejected one."""
    lengths = [pair.max_length() for pair in pairs]
    passes = []
    for part in split_into_passes(range(len(pairs)), lengths, tokens_per_pass // 2):
        passes.append(collect.examples_of([pairs[i] for i in part]))
    return passes


@contextlib.contextmanager
def moved_states(trunk, layer, mask, shift):
    """Within the context the output of decoder block `layer` is moved by shift [T, D] at the T
    positions that mask, bool [B, S], marks."""

    def move(module, args, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[mask] += shift.to(states.dtype)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    hook = find_blocks(trunk)[1][layer].register_forward_hook(move)
    try:
        yield
    finally:
        hook.remove()


# ---------------------------------------------------------------- measuring


def measure_v(record, passes):
    """v over training pairs: (mean |v|/|b| [L], mean v: L tensors [D], shares of Σ|v|² that the
    top 1, 2, ... D directions hold: L lists)."""
    ratio_sums, v_sums, tokens = [], [], []

    def differences():
        for examples in tqdm(passes, desc="survey v", unit="pass"):
            base, plus, minus = record(examples)
            v = difference(plus, minus)  # L x [T, D]
            ratios = [(x.norm(dim=-1) / b.float().norm(dim=-1)).sum() for x, b in zip(v, base)]
            ratio_sums.append(torch.stack(ratios))
            v_sums.append(torch.stack([x.sum(0) for x in v]))
            tokens.append(len(v[0]))
            # these are the states of all blocks
            del base, plus, minus
            yield v

    _, shares = principal_directions(differences(), 1)
    ratio = sum(ratio_sums) / sum(tokens)
    mean_v = sum(v_sums) / sum(tokens)
    if not ((ratio > 0) & ratio.isfinite()).all():
        raise UserError(
            f"|v|/|b| is {ratio.tolist()} in the blocks: h+ and h- must differ; "
            "train stage 1 longer, or at another --lr"
        )
    return ratio, mean_v, shares


def measure_moves(model, record, passes, ratio, mean_v, config, pad_id):
    """What moved states are worth on validation pairs.

    Returns the NLL per token of the chosen responses with block l moved by strength j, [1 + L, J],
    row 0 with nothing moved; and the projection of each response's mean b on the mean v,
    [L, 2 n], chosen and rejected in turns.
    """
    nll = torch.zeros(1 + len(ratio), len(STRENGTHS))
    chosen_tokens, projections = 0, []
    for examples in tqdm(passes, desc="survey α", unit="pass"):
        base, plus, minus = record(examples)
        lengths = [
            recorded_length(pair, response, config.last_prompt_token) for pair, response in examples
        ]
        projections.append(mean_projections(base, mean_v, lengths))
        chosen = [pair.input("plain", "chosen") for pair, _ in examples[::2]]
        batch = collate(chosen, pad_id, model.device)
        mask = recorded_mask(batch.response, config.last_prompt_token)
        is_chosen = torch.arange(len(examples)).remainder(2).eq(0)
        of_chosen = is_chosen.repeat_interleave(torch.tensor(lengths)).to(model.device)  # [T]
        nll[0, 0] -= response_logprobs(model, batch)[0].sum().cpu()
        for layer in range(len(ratio)):
            v = (plus[layer] - minus[layer])[of_chosen]
            for j, strength in enumerate(STRENGTHS):
                shift = v * (strength / ratio[layer])  # α v
                with moved_states(model.base_model, layer, mask, shift):
                    nll[layer + 1, j] -= response_logprobs(model, batch)[0].sum().cpu()
        chosen_tokens += batch.response.sum().item()
    return (nll / chosen_tokens).tolist(), torch.cat(projections, 1)


def mean_projections(base, mean_v, lengths):
    """b · mean v averaged over each response: [L, B]. base: L x [T, D]; lengths: B lengths."""
    rows = []
    for b, direction in zip(base, mean_v):
        responses = (b.float() @ direction).split(lengths)
        rows.append(torch.stack([projection.mean() for projection in responses]))
    return torch.stack(rows)


def auc_per_layer(projections):
    """How well the projections [L, 2 n] tell chosen (even) from rejected (odd): area under the ROC
    curve, as Mann-Whitney's statistic, in which ties count half."""
    chosen, rejected = projections[:, ::2], projections[:, 1::2]
    signs = torch.sign(chosen[:, :, None] - rejected[:, None])
    return (0.5 + 0.5 * signs).mean((1, 2)).tolist()


# ---------------------------------------------------------------- recommending


def recommend(blocks, base_nll):
    """(layers, strengths, rank or None, directions that hold 90% of |v|²) from the measurements.

    Layers: of the blocks whose NLL falls at least half as far as that of the best block, at most
    MAX_LAYERS at equal distances. Strengths: the one with the lowest NLL over these layers and its
    neighbours. Rank: where an eighth of the width holds 90%. UserError where no move helps.
    """
    gains = [base_nll - min(block["nll"]) for block in blocks]
    useful = [block for block, gain in zip(blocks, gains) if gain >= max(gains) / 2 > 0]
    if not useful:
        raise UserError(
            f"in no block and at no strength does the NLL of chosen responses fall below "
            f"{base_nll:.3f}: train stage 1 longer"
        )
    # from the highest block downwards, at equal distances
    count = min(MAX_LAYERS, len(useful))
    picked = [useful[round(i)] for i in torch.linspace(len(useful) - 1, 0, count).tolist()][::-1]
    nll_sums = torch.tensor([block["nll"] for block in picked], dtype=torch.float64).sum(0).tolist()
    best = nll_sums.index(min(nll_sums))
    strengths = list(STRENGTHS[max(0, best - 1) : best + 2])
    shares = torch.tensor([block["shares"] for block in picked], dtype=torch.float64)
    directions = 1 + (shares < 0.9).sum(1).max().item()
    width = shares.shape[1]
    rank = directions if 8 * directions <= width else None
    return [block["layer"] for block in picked], strengths, rank, directions


def print_table(blocks, base_nll):
    """Print the measurements, a row for each block."""
    print(
        f"NLL per token of validation pairs' chosen responses: {base_nll:.3f}; "
        "with the states of one block moved by ρ times their norm:"
    )
    titles = "".join(f"{f'ρ {strength:g}':>8}" for strength in STRENGTHS)
    print(f"{'block':>5} {'|v|/|b|':>8} {'AUC':>6} {'1 direction':>12}{titles}")
    for block in blocks:
        nlls = "".join(f"{nll:>8.3f}" for nll in block["nll"])
        print(
            f"{block['layer']:>5} {block['ratio']:>8.3f} {block['auc']:>6.3f} "
            f"{block['shares'][0]:>12.1%}{nlls}"
        )


def print_next_commands(config, stage1_settings, layers, strengths, rank):
    """Print the collect.py and tools.sweep commands that follow from the recommendation."""
    command = next_command("collect.py", config.out, config.method)
    command += f" --layers {' '.join(map(str, layers))} --base {config.base}"
    if config.model != stage1_settings["model"]:
        command += f" --model {shlex.quote(config.model)}"
    if (config.data, config.columns) != (stage1_settings["data"], stage1_settings["columns"]):
        command += f" --data {shlex.join(config.data)}"
        command += f" --columns {shlex.join(config.columns)}" if config.columns else ""
    if config.method == "dual" and config.stimulus != "plain":
        command += f" --stimulus {config.stimulus}"
    if not config.last_prompt_token:
        command += " --last-prompt-token False"
    print(command)
    command = next_command("-m tools.sweep", config.out, config.method)
    command += f" --strength {' '.join(map(str, strengths))}"
    print(command + (f" --rank {rank}" if rank else ""))


@torch.no_grad()
def main(config):
    # 1. stage 1's adapters on the whole model, and the pairs
    check_plot(config.plot)
    stage1, tokenizer, pairs = collect.open_inputs(config)
    device = choose_device(config.device)
    config.tokens_per_pass = choose_tokens_per_pass(config.tokens_per_pass, device)
    quantize = stage1.manifest["settings"]["quantize"]
    model = load_model(config.model, config.compute_dtype, device, quantize=quantize)
    check_same_model(config.model, tokenizer, stage1.manifest, f"{config.out}/{config.method}")
    adapters = stage1.load_adapters(model.base_model)
    config.layers = list(range(len(find_blocks(model.base_model)[1])))
    pad_id = tokenizer.pad_token_id

    def record(examples):
        return collect.record_states(model.base_model, adapters, config, examples, pad_id)

    train = sample(pairs["train"], config.train_pairs, config.seed)
    valid = sample(pairs["valid"], config.valid_pairs, config.seed)

    # 2. measure; b is of the first adapter's model, or of the original one
    first_adapter = next(iter(adapters.values()))
    enabled = [first_adapter] if config.base == "stage1" else []
    with enable_only(enabled, among=adapters.values()), collect.fast_float32():
        ratio, mean_v, shares = measure_v(record, both_responses(train, config.tokens_per_pass))
        passes = both_responses(valid, config.tokens_per_pass)
        nll, projections = measure_moves(model, record, passes, ratio, mean_v, config, pad_id)
    auc = auc_per_layer(projections)
    blocks = []
    for layer in config.layers:
        block = {"layer": layer, "ratio": ratio[layer].item(), "auc": auc[layer]}
        blocks.append({**block, "shares": shares[layer], "nll": nll[layer + 1]})
    base_nll = nll[0][0]
    print_table(blocks, base_nll)

    # 3. recommend; the measurements are written first, as no recommendation may be possible
    path = Path(config.out) / config.method / "survey.json"
    measured = {"blocks": blocks, "strengths": STRENGTHS, "base_nll": base_nll}
    measured |= {"versions": versions(), "settings": vars(config)}
    write_json(path, measured)
    layers, strengths, rank, directions = recommend(blocks, base_nll)
    recommended = {"layers": layers, "strengths": strengths, "rank": rank}
    write_json(path, {**measured, "recommended": recommended})
    at_end = ", at an end of the grid" if len(strengths) < 3 else ""
    print(
        f"layers {layers}: moving their states helps at least half as much as in the best block\n"
        f"strengths {strengths}: the lowest NLL over these layers, and its neighbours{at_end}\n"
        f"rank {rank or 'not limited'}: {directions} of {len(shares[0])} directions hold 90% of "
        f"|v|² in these layers\nwrote {path}"
    )
    if config.plot:
        plot_survey(config.plot, blocks, STRENGTHS, base_nll)
    print_next_commands(config, stage1.manifest["settings"], layers, strengths, rank)


if __name__ == "__main__":
    run(main, Config)
