"""What collect.py writes and align.py reads: hidden states, packed response by response.

The tensors of a shard, a safetensors file of some responses, T recorded positions in all:

    base.l, plus.l, minus.l    [T, D]          b, h+ and h- of layer l; v.l = h+ - h- in place of
                                               plus and minus with --store diff
    ids                        int32 [Σ n]     <q, r> of the responses, one after the other
    lengths, starts            int32 [R]       n of each response, and its first recorded position
    statistics                 fp64 [3, L]     Σ|v|, Σ|b| and Σ|v|/|b| of each layer
"""

from dataclasses import dataclass

import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence

from common.config import UserError
from common.data import sample, split_into_passes, to_device

# At most this many responses are read to find the principal directions of v.
DIRECTION_SAMPLE = 4096


def recorded_mask(response, last_prompt_token):
    """The positions whose states are recorded: the response's, and maybe the one before it.

    response: bool [B, S], marks the response's tokens. Returns bool [B, S].
    """
    return response | response.roll(-1, 1) if last_prompt_token else response


def recorded_length(pair, response, last_prompt_token):
    """How many positions are recorded of an EncodedPair's "chosen" or "rejected" response."""
    return len(pair.responses[response]) + last_prompt_token


@dataclass
class CollectedBatch:
    """Some collected responses as the training step needs them.

    ids: int64 [B, S], padded on the right. positions: int64 [T], where in [B * S] states were
    recorded. base, plus, minus: lists of L tensors [T, D]: b, h+ and h-. base is None where it was
    not stored; minus is None where plus holds v = h+ - h-.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    base: list | None
    plus: list
    minus: list | None


@dataclass
class CollectedResponse:
    """Where a response lies in its shard: the shard's tensors (views of the mapped file), its part
    of their ids, its rows of their states."""

    tensors: dict
    ids: slice
    rows: slice
    first_recorded: int


class Collection:
    """The responses of some shards. Their states are read from the mapped files as needed."""

    def __init__(self, paths, layers, store, pad_id):
        """layers: those to read. store: collect's setting, "full" or "diff". UserError where the
        shards hold no response."""
        self.layers = layers
        self.pad_id = pad_id
        self.plus_name = "plus" if store == "full" else "v"
        # a list of L tensors U [k, D] here replaces v by its projection v U^T U
        self.directions = None
        self.responses = []
        for path in paths:
            self.responses += read_shard(path)
        if not self.responses:
            raise UserError("the collection has no responses: run `python collect.py` again")
        self.has_base = f"base.{layers[0]}" in self.responses[0].tensors
        # tokens of each response with its prompt, and of its recorded part
        self.lengths = [r.ids.stop - r.ids.start for r in self.responses]
        self.recorded_lengths = [r.rows.stop - r.rows.start for r in self.responses]

    def keep_random(self, count, seed):
        """Keep this many responses: neighbours in a shard are of similar length."""
        kept = sample(range(len(self.responses)), count, seed)
        for name in ("responses", "lengths", "recorded_lengths"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in kept])

    def prompts(self, last_prompt_token):
        """The ids of the different prompts <q>, lists. last_prompt_token: collect's setting."""
        prompts = {}
        for response in self.responses:
            ids = response.tensors["ids"][response.ids]
            prompts[tuple(ids[: response.first_recorded + last_prompt_token].tolist())] = None
        return [list(prompt) for prompt in prompts]

    def read(self, indices, device):
        """The CollectedBatch of some responses. On a GPU the copies may still be under way."""
        responses = [self.responses[i] for i in indices]
        ids = [r.tensors["ids"][r.ids].long() for r in responses]
        first_recorded = torch.tensor([r.first_recorded for r in responses])
        lengths = torch.tensor([len(sequence) for sequence in ids])
        ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)  # [B, S]
        column = torch.arange(ids.shape[1])
        recorded = (column >= first_recorded[:, None]) & (column < lengths[:, None])
        states = {}
        for name in ("base", self.plus_name, "minus"):
            if f"{name}.{self.layers[0]}" not in responses[0].tensors:
                continue
            states[name] = []
            for layer in self.layers:
                parts = [r.tensors[f"{name}.{layer}"][r.rows] for r in responses]
                packed = None
                if device.type == "cuda":
                    # straight into pinned memory, from which the copy does not block
                    size = (sum(len(part) for part in parts), parts[0].shape[1])
                    packed = torch.empty(size, dtype=parts[0].dtype, pin_memory=True)
                packed = torch.cat(parts, out=packed)  # [T, D]
                states[name].append(packed.to(device, non_blocking=True))
        plus, minus = states[self.plus_name], states.get("minus")
        if self.directions is not None:
            plus, minus = project(plus, minus, self.directions), None
        positions = recorded.flatten().nonzero()[:, 0]
        ids, positions = to_device(ids, device), to_device(positions, device)
        return CollectedBatch(ids, positions, states.get("base"), plus, minus)

    def differences(self, device, tokens_per_pass):
        """v of a random sample of the responses, pass by pass: lists of L tensors [T, D]."""
        drawn = sample(range(len(self.responses)), DIRECTION_SAMPLE, seed=0)
        for part in split_into_passes(drawn, self.lengths, tokens_per_pass):
            batch = self.read(part, device)
            yield difference(batch.plus, batch.minus)


def read_shard(path):
    """The CollectedResponses of a shard. The file is mapped; states are read when they are used."""
    with safe_open(path, "pt") as file:
        # its tensors are views of the mapped file
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    responses = []
    id_start = row_start = 0
    lengths, first_recorded = tensors["lengths"].tolist(), tensors["starts"].tolist()
    for length, first in zip(lengths, first_recorded):
        ids = slice(id_start, id_start + length)
        rows = slice(row_start, row_start + length - first)
        responses.append(CollectedResponse(tensors, ids, rows, first))
        id_start, row_start = ids.stop, rows.stop
    return responses


def difference(plus, minus):
    """v = h+ - h- in fp32, per layer. minus None: plus holds v already."""
    if minus is None:
        return [v.float() for v in plus]
    return [p.float() - m.float() for p, m in zip(plus, minus)]


def project(plus, minus, directions):
    """v U^T U per layer, [T, D]: the part of v in the span of the rows of U [k, D]."""
    projected = []
    for v, U in zip(difference(plus, minus), directions):
        projected.append((v @ U.T @ U).to(plus[0].dtype))
    return projected


def principal_directions(batches, k):
    """The top k uncentred principal directions of v, per layer.

    batches: iterable of lists of L tensors v [T, D]. They come from the second moment Σ v v^T
    [D, D], summed in fp32. Returns L orthonormal U [k, D], and L lists of the cumulative shares
    of Σ|v|² that the first 1, 2, ... D directions hold. UserError where v is NaN or infinite.
    """
    moments = None
    for batch in batches:
        if moments is None:
            moments = [torch.zeros(v.shape[1], v.shape[1], device=v.device) for v in batch]
        for moment, v in zip(moments, batch):
            moment.addmm_(v.float().T, v.float())
    directions, shares = [], []
    for moment in moments:
        if not moment.isfinite().all():
            # eigh would fail with a less helpful message
            raise UserError("h+ - h- is NaN or infinite: train stage 1 at a lower --lr")
        # eigenvalues ascend
        values, vectors = torch.linalg.eigh(moment)
        directions.append(vectors.flip(1)[:, :k].T.contiguous())
        total = values.sum().clamp(min=1e-30)
        shares.append((values.flip(0).cumsum(0) / total).tolist())
    return directions, shares
