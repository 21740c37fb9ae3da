"""The losses of the three stages against plain formulas in float64, and what must not change
them."""

import itertools
import math
import random

import pytest
import torch
from helpers import CPU, go, make_model, random_adapter, stage1_source
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

import align
import collect
import dual
import scit
from common import toy
from common.collection import recorded_length
from common.data import (
    RESPONSES,
    collate,
    encode_pairs,
    prepare_pairs,
    shuffled_batches,
    split_into_passes,
)
from common.hf import hidden_states, load_model, load_tokenizer
from common.pairs import parse_row
from common.stages import read_stage
from kernel import representation_loss
from lora import LoRA, enable_only, load_adapter

METHODS = {"scit": scit, "dual": dual}

# SCIT's contrast as the authors have it, as the paper has it, and as it is by default
MEAN = scit.Config(reduction="mean", beta=1.0, smoothing=0.2)
PAPER = scit.Config(reduction="sum", beta=1.0, smoothing=0.0)


@pytest.fixture(scope="module")
def pairs(tokenizer):
    requests = toy.split_requests(list(toy.ASK), 0)
    rows = toy.preference_rows(requests, 40, random.Random(0))
    return encode_pairs(tokenizer, [parse_row(row, 0)[0] for row in rows[:12]])


def log_probabilities(model, ids, start):
    """log π(r_t | everything before) over the response, [T] in float64: one unpadded forward."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    targets = torch.tensor(ids[start:])
    return logits.log_softmax(-1)[start - 1 : -1].gather(1, targets[:, None])[:, 0]


# ---------------------------------------------------------------- stage 1


def scit_reference(model, pairs, anchors, config):
    """SCIT's loss one example at a time: (NLL per token, contrast).

    The NLL is over own-instruction and anchor examples; the contrast is
    (1-ε) softplus(P~ - P) + ε softplus(P - P~), P being β times the mean or the sum of log π.
    """
    smoothing = config.smoothing

    def P_of(logprobs):
        return config.beta * (logprobs.sum() if config.reduction == "sum" else logprobs.mean())

    contrasts, learned = [], []
    for pair in pairs:
        for prompt, opposite, response in (
            ("positive", "negative", "chosen"),
            ("negative", "positive", "rejected"),
        ):
            logprobs = log_probabilities(model, *pair.input(prompt, response))
            P = P_of(logprobs)
            P_opposite = P_of(log_probabilities(model, *pair.input(opposite, response)))
            right = torch.log1p(torch.exp(P_opposite - P))
            wrong = torch.log1p(torch.exp(P - P_opposite))
            contrasts.append((1 - smoothing) * right + smoothing * wrong)
            learned.append(logprobs)
    for pair in anchors:
        for response in ("chosen", "rejected"):
            learned.append(log_probabilities(model, *pair.input("plain", response)))
    return -torch.cat(learned).mean(), torch.stack(contrasts).mean()


def dual_reference(model, adapters, pairs, config):
    """The parts of DUAL's loss one example at a time: (NLL per token of the good model, of the bad
    model, contrast)."""
    logprobs = {}
    for name, adapter in adapters.items():
        with enable_only([adapter], among=adapters.values()):
            for response in ("chosen", "rejected"):
                examples = [pair.input("plain", response) for pair in pairs]
                logprobs[name, response] = [log_probabilities(model, *one) for one in examples]
    contrasts = []
    for i in range(len(pairs)):
        x = [
            logprobs["good", response][i].sum() - logprobs["bad", response][i].sum()
            for response in ("chosen", "rejected")
        ]
        contrasts.append(torch.log1p(torch.exp(-config.beta * (x[0] - x[1]))))
    good, bad = logprobs["good", "chosen"], logprobs["bad", "rejected"]
    return -torch.cat(good).mean(), -torch.cat(bad).mean(), torch.stack(contrasts).mean()


def good_and_bad(model, **options):
    """Two adapters on a model, of different weights."""
    return nn.ModuleDict(
        {
            name: random_adapter(model, seed, **options)
            for seed, name in enumerate(("good", "bad"), 1)
        }
    )


def response_tokens(pairs):
    """The tokens of both responses of some pairs."""
    return sum(len(ids) for pair in pairs for ids in pair.responses.values())


@torch.no_grad()
@pytest.mark.parametrize("config", [MEAN, PAPER, scit.Config()])
def test_scit_loss_by_the_equation(config, pairs):
    model = make_model("llama").double()
    expected_nll, expected_contrast = scit_reference(model, pairs[:3], pairs[:1], config)
    nll, contrast, P = scit.scit_loss(model, pairs[:3], pairs[:1], 1, config)
    tokens = response_tokens(pairs[:3]) + response_tokens(pairs[:1])
    # a sum over the two responses of three pairs
    assert contrast.item() / 6 == pytest.approx(expected_contrast.item(), rel=1e-5)
    assert (nll / tokens).item() == pytest.approx(expected_nll.item(), rel=1e-5)
    P_opposite = log_probabilities(model, *pairs[0].input("negative", "chosen"))
    P_opposite = config.beta * (
        P_opposite.sum() if config.reduction == "sum" else P_opposite.mean()
    )
    assert P[0, 1, 0].item() == pytest.approx(P_opposite.item(), rel=1e-5)


def test_scit_contrast_at_no_difference_is_ln_2():
    P = torch.randn(5)
    assert scit.contrast_loss(P, P, 0.2).item() / 5 == pytest.approx(math.log(2))


@pytest.mark.parametrize("smoothing", [0, 0.2, 0.5])
def test_scit_contrast_is_never_below_its_minimum(smoothing):
    margins = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    losses = [scit.contrast_loss(m, torch.zeros(()), smoothing).item() for m in margins]
    assert min(losses) == pytest.approx(scit.least_contrast(smoothing), abs=1e-5)


def dual_sums(model, adapters, pairs, config):
    """dual_loss's sums: the NLL of the good and of the bad model, and the contrast, which is the
    same for both."""
    other = None
    if config.contrast:
        with enable_only([adapters["bad"]], among=adapters.values()):
            other = dual.sum_logprobs(model, pairs, RESPONSES, 1)
    nlls, contrasts = [], []
    for name, adapter in adapters.items():
        with enable_only([adapter], among=adapters.values()):
            nll, contrast, other = dual.dual_loss(model, name, pairs, other, 1, config)
        nlls.append(nll)
        contrasts.append(contrast)
    assert contrasts[0].item() == pytest.approx(contrasts[1].item(), rel=1e-5)
    return torch.stack([*nlls, contrasts[0]])


def dual_parts(model, adapters, pairs, config):
    """dual_loss's parts as means: over the tokens of each model's responses, and over pairs."""
    good, bad, contrast = dual_sums(model, adapters, pairs, config)
    tokens = [sum(len(pair.responses[r]) for pair in pairs) for r in ("chosen", "rejected")]
    return good / tokens[0], bad / tokens[1], contrast / len(pairs)


@torch.no_grad()
@pytest.mark.parametrize("contrast", [0, 1])
def test_dual_loss_by_the_equation(contrast, pairs):
    model = make_model("llama").double()
    adapters = good_and_bad(model).double()
    config = dual.Config(contrast=contrast, beta=0.3)
    parts = dual_parts(model, adapters, pairs, config)
    expected = dual_reference(model, adapters, pairs, config)
    assert [part.item() for part in parts[:2]] == pytest.approx(
        [part.item() for part in expected[:2]], rel=1e-5
    )
    assert parts[2].item() == pytest.approx(expected[2].item() if contrast else 0, rel=1e-5)


def test_duals_contrast_at_no_difference_is_ln_2():
    logprobs = torch.randn(2, 5)
    assert dual.contrast_loss(logprobs, logprobs, 0.1).item() / 5 == pytest.approx(math.log(2))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_order_and_batch_size_change_no_stage_1_loss(family, pairs):
    """Sums over one batch of 8, over its reverse, and over batches of 1 (no padding) agree."""
    model, some = make_model(family), pairs[:8]
    nll, contrast, P = scit.scit_loss(model, some, some[:3], 1, MEAN)
    reversed_nll, reversed_contrast, _ = scit.scit_loss(model, some[::-1], some[:3][::-1], 1, MEAN)
    assert torch.allclose(nll, reversed_nll, rtol=1e-5)
    assert torch.allclose(contrast, reversed_contrast, rtol=1e-5)
    single_P = [scit.scit_loss(model, [pair], [], 1, MEAN)[-1] for pair in some]
    assert torch.allclose(P, torch.cat(single_P), atol=1e-5)

    adapters = good_and_bad(model)
    whole = dual_sums(model, adapters, some, dual.Config())
    singles = [dual_sums(model, adapters, [pair], dual.Config()) for pair in some]
    assert torch.allclose(whole, sum(singles), rtol=1e-5)


def test_a_share_of_the_pairs_is_anchored_and_a_single_one_too(tiny, tmp_path, monkeypatch):
    scit_loss = scit.scit_loss
    counts = []

    def counting(model, pairs, anchors, *others):
        counts.append((len(pairs), len(anchors)))
        return scit_loss(model, pairs, anchors, *others)

    monkeypatch.setattr(scit, "scit_loss", counting)
    source = stage1_source(tiny, tmp_path)
    options = ["--steps", "1", "--tokens-per-pass", 10**6, *CPU]
    for batch_size, anchor, expected in ((1, 0.375, 1), (8, 0.375, 3), (4, 1, 4), (4, 0, 0)):
        counts.clear()
        go(scit, *source, *options, "--batch-size", batch_size, "--anchor", anchor)
        # the first is the step, the others are the validation
        assert counts[0] == (batch_size, expected)


# ---------------------------------------------------------------- stages 2 and 3


def test_padding_and_batch_size_change_no_alignment_loss(pairs):
    """The alignment loss of 8 responses together is the token-weighted mean of each alone."""
    model = make_model("llama")
    layers = [1, 2]
    examples = [pair.input("plain", "chosen") for pair in pairs[:8]]
    torch.manual_seed(0)
    # random b, h+, h- [T, D] for each response and layer
    recorded = []
    for ids, start in examples:
        shape = (3, len(layers), len(ids) - start + 1, 32)
        recorded.append(torch.randn(shape))

    def loss_and_norms(indices, kind):
        # the last prompt token is recorded too
        batch = collate([(examples[i][0], examples[i][1] - 1) for i in indices], 1)
        hidden = hidden_states(model.base_model, layers, batch.ids)
        packed = torch.cat([recorded[i] for i in indices], 2)
        base, plus, minus = (list(states) for states in packed)
        return representation_loss(hidden, base, plus, minus, batch.positions, 0.5, kind=kind)

    for kind in ("l2", "mse"):
        with torch.no_grad():
            whole, norms = loss_and_norms(range(8), kind)
            singles = [loss_and_norms([i], kind) for i in range(8)]
        weighted = sum(loss * part.shape[1] for loss, part in singles) / norms.shape[1]
        assert whole.item() == pytest.approx(weighted.item(), rel=1e-5)
        assert torch.allclose(norms, torch.cat([part for _, part in singles], 1), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("method", ["scit", "dual"])
def test_recorded_states_are_those_of_unpadded_inputs(method, pairs):
    """h+, h-, b of a padded batch against one forward of each response alone, with the adapters
    that it needs."""
    model = make_model("llama")
    kinds = ["scit"] if method == "scit" else ["good", "bad"]
    adapters = {kind: random_adapter(model, seed) for seed, kind in enumerate(kinds)}
    positive_adapter, negative_adapter = adapters[kinds[0]], adapters[kinds[-1]]
    config = collect.Config(
        method=method, layers=[1, 2], stimulus="instructed", base="original", device="cpu"
    )
    examples = collect.examples_of(pairs[:4])
    base, plus, minus = collect.record_states(model.base_model, adapters, config, examples, 1)
    stimuli = (
        (base, [], "plain"),
        (plus, [positive_adapter], "positive"),
        (minus, [negative_adapter], "negative"),
    )
    row = 0
    for pair, response in examples:
        for states, enabled, prompt in stimuli:
            ids, start = pair.input(prompt, response)
            with enable_only(enabled, among=adapters.values()):
                alone = hidden_states(model.base_model, [1, 2], torch.tensor([ids]))
            for layer in range(2):
                # the last prompt token and the response
                expected = alone[layer][0, start - 1 :]
                recorded = states[layer][row : row + len(expected)]
                assert torch.allclose(recorded, expected, atol=1e-4)
        row += recorded_length(pair, response, last_prompt_token=True)
    assert row == len(base[0])


def test_passes_hold_a_batch_within_a_budget():
    lengths = [5, 3, 9, 4, 2, 9]
    assert split_into_passes([0, 1, 2, 3, 5], lengths, 12) == [[1, 3], [0], [2], [5]]
    assert split_into_passes([4, 0, 1], lengths, 15) == [[4, 0, 1]]
    assert split_into_passes([2], lengths, 1) == [[2]]


def test_passes_are_full_and_begin_with_the_longest():
    lengths = torch.randint(10, 90, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    passes = collect.plan_passes(range(500), lengths, 400)
    assert sorted(itertools.chain(*passes)) == list(range(500))
    widths = [max(lengths[i] for i in part) for part in passes]
    assert widths == sorted(widths, reverse=True)
    sizes = [len(part) * width for part, width in zip(passes, widths)]
    assert max(sizes) <= 400
    # the next longer response would not fit; what is left over is the pass of the longest
    for longer, part in itertools.pairwise(passes):
        assert (len(part) + 1) * min(lengths[i] for i in longer) > 400


def test_shards_are_whole_passes_of_a_size():
    passes = [[i] for i in range(100)]
    for shard_bytes, largest, count in ((62.5, 6, 17), (35, 3, 34), (5, 1, 100), (1e9, 100, 1)):
        shards = collect.plan_shards(passes, [10] * 100, shard_bytes, 1)
        assert list(itertools.chain(*shards)) == passes
        assert len(shards) == count
        assert max(map(len, shards)) == largest


def test_there_are_as_many_shards_as_asked_for_where_there_are_passes():
    rng = random.Random(0)
    for case in range(300):
        sizes = [rng.uniform(0.3, 1.2) for _ in range(rng.randrange(1, 60))]
        sizes = [5] * 4 + [1] * 16 if case == 0 else sizes
        passes = [[i] for i in range(len(sizes))]
        shards = collect.plan_shards(passes, sizes, 1e9, 16)
        assert list(itertools.chain(*shards)) == passes
        assert len(shards) >= min(16, len(passes))


def test_states_of_training_pairs_are_in_sixteen_files_at_least(pairs):
    """Whatever --shard-mb says, if there are as many passes."""
    examples = {"train": collect.examples_of(pairs), "valid": collect.examples_of(pairs[:4])}
    config = collect.Config(stimulus="plain", tokens_per_pass=40)
    files, names = collect.plan_files(examples, config, bytes_per_token=100)
    assert len(names["shards"]) >= collect.MIN_SHARDS
    assert len(names["validation_shards"]) == 1
    planned = itertools.chain.from_iterable(files[name] for name in names["shards"])
    assert len(list(itertools.chain(*planned))) == len(examples["train"])


# ---------------------------------------------------------------- the steps of whole stages


@pytest.mark.parametrize("method", METHODS)
def test_parts_of_a_step_train_the_same_adapter(method, tiny, tmp_path):
    """Steps in many forward passes: the adapters of all stages are within rounding those of one
    pass a step."""
    adapters = []
    for tokens in (10**6, 150):
        out = tmp_path / str(tokens)
        options = ["--steps", "4", "--tokens-per-pass", tokens, *CPU]
        go(METHODS[method], *stage1_source(tiny, out), *options)
        go(collect, "--out", out, *CPU)
        go(align, "--out", out, *options)
        paths = sorted(out.rglob("adapter_model.safetensors"))
        adapters.append([load_file(path) for path in paths])
    assert len(adapters[0]) == {"scit": 2, "dual": 3}[method]
    for one_pass, many_passes in zip(*adapters):
        for name, tensor in one_pass.items():
            assert (tensor - many_passes[name]).abs().max() <= 2e-3 * tensor.abs().max(), name


@pytest.fixture
def steps():
    """A list of (weights, gradients) of the trained adapter at each optimizer step."""
    steps = []

    def before_step(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        weights = [p.detach().clone() for p in parameters]
        steps.append((weights, [p.grad.clone() for p in parameters]))

    hook = register_optimizer_step_pre_hook(before_step)
    yield steps
    hook.remove()


# of the adapters whose gradients are checked: a small scale, so that they are not clipped
LORA_ALPHA = 2


def check_gradients(step, adapter, loss_of):
    """Compare a step's gradients with those of loss_of() in float64.

    adapter: one on a float64 model; it gets the step's weights.
    """
    weights, gradients = step
    parameters = list(adapter.double().parameters())
    with torch.no_grad():
        for parameter, weight in zip(parameters, weights):
            parameter.copy_(weight)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(), parameters)])
    # clipping would hide a wrong scale
    assert 0 < expected.norm() < 1
    gradient = torch.cat([g.flatten() for g in gradients]).double()
    assert (gradient - expected).norm() <= 1e-4 * expected.norm()


def training_pairs(tiny):
    paths, tokenizer = [tiny / "pairs.jsonl"], load_tokenizer(str(tiny / "model"))
    return prepare_pairs(paths, ("train",), tokenizer, 128, 0)["train"]


def test_gradients_of_scits_steps(tiny, tmp_path, steps):
    """In steps of several passes; the last pass is smaller, and the anchors are in some of them."""
    options = ["--steps", "3", "--batch-size", "5", "--tokens-per-pass", "900"]
    scale = ["--lora-alpha", LORA_ALPHA]
    go(scit, *stage1_source(tiny, tmp_path), *options, *scale, *CPU)
    model = load_model(str(tiny / "model"), "float32", "cpu").double()
    adapter = LoRA(model.base_model, alpha=LORA_ALPHA)
    pairs = training_pairs(tiny)
    lengths = [pair.length("positive", "chosen") for pair in pairs]
    assert len(steps) == 3
    for step, indices in zip(steps, shuffled_batches(lengths, 5, seed=0)):
        batch = [pairs[i] for i in indices]

        def loss(batch=batch):
            # two anchors: 0.375 of five, rounded up
            return sum(scit_reference(model, batch, batch[:2], scit.Config()))

        check_gradients(step, adapter, loss)


@pytest.mark.parametrize("contrast", [0, 1])
def test_gradients_of_duals_steps(contrast, tiny, tmp_path, steps):
    options = ["--steps", "3", "--batch-size", "5", "--tokens-per-pass", "600"]
    scale = ["--lora-alpha", LORA_ALPHA, "--contrast", contrast]
    go(dual, *stage1_source(tiny, tmp_path), *options, *scale, *CPU)
    model = load_model(str(tiny / "model"), "float32", "cpu").double()
    adapters = good_and_bad(model, alpha=LORA_ALPHA)
    pairs = training_pairs(tiny)
    lengths = [pair.length("plain", "chosen") for pair in pairs]
    assert len(steps) == 3
    for step, indices in zip(steps, shuffled_batches(lengths, 5, seed=0)):
        batch = [pairs[i] for i in indices]

        def loss(batch=batch):
            good, bad, part = dual_reference(model, adapters, batch, dual.Config())
            return good + bad + contrast * part

        check_gradients(step, adapters, loss)


def read_responses(folder, layers):
    """What collect recorded, in float64: for each response (ids, first recorded position,
    b, h+ and h- [3, L, T, D])."""
    responses = []
    for name in read_stage(folder, "collect", "")["shards"]:
        shard = load_file(folder / name)
        id_start = row = 0
        for length, first in zip(shard["lengths"].tolist(), shard["starts"].tolist()):
            ids = shard["ids"][id_start : id_start + length].long()
            rows = slice(row, row + length - first)
            states = []
            for kind, layer in itertools.product(("base", "plus", "minus"), layers):
                states.append(shard[f"{kind}.{layer}"][rows].double())
            responses.append((ids, first, torch.stack(states).unflatten(0, (3, len(layers)))))
            id_start += length
            row = rows.stop
    return responses


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["l2", "mse"])
def test_gradients_of_aligns_steps(kind, method, tiny, tmp_path, steps):
    """Against states that transformers returns for one unpadded response at a time."""
    go(METHODS[method], *stage1_source(tiny, tmp_path), "--steps", "5", "--lr", "1e-2", *CPU)
    base = ["--base", "stage1" if method == "scit" else "original"]
    go(collect, "--out", tmp_path, "--layers", "0", "2", *base, *CPU)
    options = ["--steps", "3", "--batch-size", "5", "--tokens-per-pass", "150", "--kind", kind]
    steps.clear()
    go(align, "--out", tmp_path, *options, "--lora-alpha", LORA_ALPHA, *CPU)
    model = load_model(str(tiny / "model"), "float32", "cpu").double()
    if method == "scit":
        # b is of stage 1's model
        folder = tmp_path / "scit" / "adapter"
        weights = load_adapter(folder, model.base_model)
        LoRA(model.base_model, weights=weights).double().requires_grad_(False)
    # its blocks 0 to 2 alone have an adapter
    adapter = random_adapter(model, blocks=3, alpha=LORA_ALPHA)
    alpha = read_stage(tmp_path / method / "align", "align", "")["alpha"]
    responses = read_responses(tmp_path / method / "collect", [0, 2])

    def distances(ids, first, states):
        """r = A(π_lora, <q, r>, l) - (b + α (h+ - h-)), [L, T, D]."""
        output = model.base_model(input_ids=ids[None], output_hidden_states=True)
        hidden = [output.hidden_states[layer + 1][0, first:] for layer in (0, 2)]
        base, plus, minus = states
        return torch.stack(hidden) - (base + alpha * (plus - minus))

    lengths = [len(ids) for ids, _, _ in responses]
    assert len(steps) == 3
    for step, indices in zip(steps, shuffled_batches(lengths, 5, seed=0)):
        batch = [responses[i] for i in indices]

        def loss(batch=batch):
            r = torch.cat([distances(*response) for response in batch], 1)
            return r.norm(dim=-1).mean() if kind == "l2" else r.square().mean()

        check_gradients(step, adapter, loss)
