"""`collect.py --survey`: which layers to move, how far, and on how many directions.

Its ground is what align.py could reach at best. An adapter that hits its targets in block l leaves the states b + α v there,
and the blocks above make the answer of them. So the base runs on held-out pairs with just that put in place, block by block
and strength by strength, and its NLL of the chosen responses says which such states are good ones: too weak a move does
little, too strong a one makes states that the blocks above do not know. Nothing of it is in the paper.
"""
import contextlib

import torch
from tqdm import tqdm

import data
from files import UserError, versions, write_json
from model import find_blocks, principal_directions, response_logprobs

STRENGTHS = (0.1, 0.15, 0.25, 0.4, 0.6)       # ρ: states moved by such a share of their length
PAIRS, HELD_OUT = 256, 128                    # at most; the first ones to know v from, the others to judge by
MOST = 6                                      # layers to recommend, at most: their states take the disk


@contextlib.contextmanager
def moved(trunk, layer, mask, shift):
    """Within the context, the output of decoder block `layer` is moved by shift [T, D] at the T positions marked in mask bool [B, S]."""
    def hook(module, args, output):
        h = (output[0] if isinstance(output, tuple) else output).clone()
        h[mask] += shift.to(h.dtype)
        return (h, *output[1:]) if isinstance(output, tuple) else h
    handle = find_blocks(trunk)[1][layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def passes(pairs, tokens):
    """Both responses of each pair, in parts that fit a forward pass: lists of (pair, "chosen" | "rejected")."""
    parts = data.micro_batches(range(len(pairs)), [pair.longest() for pair in pairs], tokens // 2)
    return [[(pairs[i], response) for i in part for response in ("chosen", "rejected")] for part in parts]


@torch.no_grad()
def survey(model, record, pairs, config, pad_id, path):
    """Measure every block of a model, print the table and what it speaks for, write both as JSON. Returns (layers, strengths, rank or None).

    record: a function of a list of (pair, "chosen" | "rejected") that returns base, plus, minus of all blocks, lists of
    L tensors [T, D]; pairs: {"train": [...], "valid": [...]}; config: that of collect.py.
    """
    train, held_out = (passes(data.sample(some, count, config.seed), config.tokens_per_pass)
                       for some, count in ((pairs["train"], PAIRS), (pairs["valid"], HELD_OUT)))
    totals, tokens = [], 0                    # batch by batch: Σ|v|/|b| [L] and Σv [L, D]

    def differences():
        nonlocal tokens
        for group in tqdm(train, desc="survey v", unit="pass"):
            base, plus, minus = record(group)
            v = [p.float() - m.float() for p, m in zip(plus, minus)]                            # h+ - h-
            totals.append((torch.stack([(x.norm(dim=-1) / b.float().norm(dim=-1)).sum() for x, b in zip(v, base)]), torch.stack([x.sum(0) for x in v])))
            tokens += len(v[0])
            yield v
            del base, plus, minus, v          # they are of all blocks
    shares = principal_directions(differences(), 1)[1]
    ratio, mean_v = (sum(total) / tokens for total in zip(*totals))                             # mean |v|/|b|, mean v
    if not ((ratio > 0) & ratio.isfinite()).all():
        raise UserError(f"|v|/|h| is {ratio.tolist()} in the blocks: h+ and h- must differ; train stage 1 longer, or at another --lr")

    nll, chosen_tokens, projections = torch.zeros(1 + len(ratio), len(STRENGTHS)), 0, []        # row 0: nothing moved
    for group in tqdm(held_out, desc="survey α", unit="pass"):
        base, plus, minus = record(group)
        lengths = [data.recorded_length(example, config) for example in group]
        projections.append(torch.stack([torch.stack([x.mean() for x in (b.float() @ m).split(lengths)]) for b, m in zip(base, mean_v)]))     # [L, B]
        batch = data.collate([pair.example("plain", "chosen") for pair, _ in group[::2]], pad_id, model.device)
        mask = data.recorded(batch.response, config.last_prompt_token)
        of_chosen = torch.arange(len(group)).remainder(2).eq(0).repeat_interleave(torch.tensor(lengths)).to(model.device)                    # [T]
        for l in range(-1, len(ratio)):
            for j, rho in enumerate(STRENGTHS if l >= 0 else [0]):
                alpha_v = (plus[l] - minus[l])[of_chosen] * (rho / ratio[l])
                with moved(model.base_model, l, mask, alpha_v) if l >= 0 else contextlib.nullcontext():
                    nll[l + 1, j] -= response_logprobs(model, batch)[0].sum().cpu()
        chosen_tokens += batch.response.sum().item()
    nll = (nll / chosen_tokens).tolist()
    chosen, rejected = torch.cat(projections, 1)[:, ::2], torch.cat(projections, 1)[:, 1::2]    # [L, n] each
    auc = (0.5 + 0.5 * torch.sign(chosen[:, :, None] - rejected[:, None])).mean((1, 2)).tolist()     # Mann-Whitney: ties count as half
    blocks = [{"layer": l, "ratio": ratio[l].item(), "auc": auc[l], "shares": shares[l], "nll": nll[l + 1]} for l in range(len(ratio))]

    print(f"NLL per token of held-out chosen responses: {nll[0][0]:.3f}; with the states of one block moved by a share ρ of their length:")
    print(f"{'block':>5} {'|v|/|h|':>8} {'AUC':>6} {'1 direction':>12}" + "".join(f"{f'ρ {rho:g}':>8}" for rho in STRENGTHS))
    for block in blocks:
        print(f"{block['layer']:>5} {block['ratio']:>8.3f} {block['auc']:>6.3f} {block['shares'][0]:>12.1%}" + "".join(f"{x:>8.3f}" for x in block["nll"]))
    measured = {"blocks": blocks, "strengths": STRENGTHS, "base_nll": nll[0][0], "versions": versions(), "settings": vars(config)}
    write_json(path, measured)                # the table stays, whatever comes of it
    layers, strengths, rank, needed = recommend(blocks, nll[0][0])
    write_json(path, {**measured, "recommended": {"layers": layers, "strengths": strengths, "rank": rank}})
    print(f"layers {layers}: to move the states there helps at least half as much as in the best block\n"
          f"strengths {strengths}: the lowest NLL over these layers, and its neighbours" + (", at an end of the grid" if len(strengths) < 3 else "") + "\n"
          f"rank {rank or 'not limited'}: {needed} of {len(shares[0])} directions hold 90% of |v|² in these layers\nwrote {path}")
    return layers, strengths, rank


def recommend(blocks, base_nll):
    """(layers, strengths, rank or None, directions that hold 90% of |v|²) that a survey speaks for. UserError where no move helps.

    Layers: of the blocks whose NLL falls at least half as far as that of the best one, at most MOST at equal distances.
    Strengths: the ρ with the lowest NLL over these layers, and its neighbours. Rank: where an eighth of the width holds 90%.
    """
    gains = [base_nll - min(block["nll"]) for block in blocks]
    useful = [block for block, gain in zip(blocks, gains) if gain >= max(gains) / 2 > 0]
    if not useful:
        raise UserError(f"in no block and at no strength does the NLL of chosen responses fall below {base_nll:.3f}: train stage 1 longer")
    picked = [useful[round(i)] for i in torch.linspace(len(useful) - 1, 0, min(MOST, len(useful))).tolist()][::-1]
    sums = [sum(block["nll"][j] for block in picked) for j in range(len(STRENGTHS))]
    best, needed = sums.index(min(sums)), max(1 + sum(share < 0.9 for share in block["shares"]) for block in picked)
    rank = needed if 8 * needed <= len(picked[0]["shares"]) else None
    return [block["layer"] for block in picked], list(STRENGTHS[max(0, best - 1):best + 2]), rank, needed
