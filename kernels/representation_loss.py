"""RAHF's alignment loss (paper section 3.3) over L target layers and T packed response tokens:

    r    = h - (b + α (h+ - h-))                per layer, per response token
    l2:    loss = Σ ||r||_2 / denom             the authors' code
    mse:   loss = Σ ||r||² / D / denom          the paper's square, per element

h is the trained model's own hidden state, dense [B, S, D]; b, h+ and h- were collected and are packed [T, D].
A row map joins the two: index[b * S + s] is the packed row of that token, or -1.
"""
import torch


def response_index(mask):
    """Row map of a mask: bool [B, S] -> int32 [B*S], the marked tokens numbered in order, -1 elsewhere."""
    flat = mask.flatten()
    return torch.where(flat, flat.cumsum(0) - 1, -1).to(torch.int32)


def representation_loss(hidden, base, plus, minus, index, alpha, kind="l2", denom=None, scale=1.0, backend="auto"):
    """The alignment loss and its per-token residual norms.

    hidden: list of L tensors [B, S, D] (float, need a gradient); base, plus, minus: lists of L tensors [T, D] of any
    float dtype (minus None: plus already holds v = h+ - h-); index: int32 [B*S], see response_index; alpha: α;
    kind: "l2" or "mse"; denom: default L*T; scale: a factor on the loss, such as 1 / accumulation steps.
    Returns (loss, norms): scalar and detached [L, T] = ||r||_2, in fp32 (fp64 where hidden is fp64).
    Raises ValueError where shapes, types or the backend don't fit.
    """
    check(hidden, base, plus, minus, index, kind, backend)
    denom = max(1, len(base) * len(base[0])) if denom is None else denom
    return torch_loss(hidden, base, plus, minus, index, alpha, kind, denom, scale)


def check(hidden, base, plus, minus, index, kind, backend):
    """Refuse what does not fit, before any arithmetic."""
    if kind not in ("l2", "mse"):
        raise ValueError(f"kind {kind!r}: must be 'l2' or 'mse'")
    if backend not in ("auto", "torch"):
        raise ValueError(f"backend {backend!r}: must be 'auto' or 'torch'")
    packed = {"base": base, "plus": plus, **({} if minus is None else {"minus": minus})}
    if not hidden or any(len(states) != len(hidden) for states in packed.values()):
        raise ValueError(f"hidden has {len(hidden)} layers, " + ", ".join(f"{name} {len(states)}" for name, states in packed.items()))
    B, S, D = hidden[0].shape
    shape = (base[0].shape[0], D)
    for name, states, wanted in [("hidden", hidden, (B, S, D)), *((n, s, shape) for n, s in packed.items())]:
        for layer, state in enumerate(states):
            if tuple(state.shape) != wanted:
                raise ValueError(f"{name}[{layer}] has shape {tuple(state.shape)}, expected {wanted}")
            if state.device != hidden[0].device:
                raise ValueError(f"{name}[{layer}] is on {state.device}, hidden[0] on {hidden[0].device}")
    if index.dtype != torch.int32 or index.shape != (B * S,):
        raise ValueError(f"index is {index.dtype} {tuple(index.shape)}, expected torch.int32 {(B * S,)}")


def torch_loss(hidden, base, plus, minus, index, alpha, kind, denom, scale):
    """The loss in plain PyTorch, differentiated by autograd: the reference, and the backend without a GPU."""
    dtype = torch.promote_types(hidden[0].dtype, torch.float32)
    rows = (index >= 0).nonzero()[:, 0]                                  # [T] positions in B*S ...
    order = index[rows].long()                                           # ... and their packed rows
    D, total, norms = hidden[0].shape[-1], 0.0, []
    for layer, h in enumerate(hidden):
        v = plus[layer].to(dtype) if minus is None else plus[layer].to(dtype) - minus[layer].to(dtype)
        target = base[layer].to(dtype) + alpha * v                       # b + α (h+ - h-)
        r = h.flatten(0, 1)[rows].to(dtype) - target[order]              # [T, D]
        norm = torch.linalg.vector_norm(r, dim=-1)                       # [T]; its gradient at r = 0 is 0
        total = total + (norm.sum() if kind == "l2" else r.square().sum() / D)
        norms.append(torch.zeros(len(target), dtype=dtype, device=r.device).index_copy(0, order, norm.detach()))
    return total * (scale / denom), torch.stack(norms)
