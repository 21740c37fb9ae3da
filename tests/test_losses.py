"""The losses of the three stages against plain formulas in float64, and what must not change them."""
import math
import random

import pytest
import torch
from safetensors.torch import load_file

import align
import collect
import data
import dual
import scit
import toy
from conftest import go, make_model
from kernels import representation_loss, response_index
from lora import LoRA
from pairs import parse_row


@pytest.fixture(scope="module")
def pairs(tokenizer):
    rows = toy.preference_rows(toy.split_requests(list(toy.ASK), 0), 40, random.Random(0))
    return data.encode(tokenizer, [parse_row(row, 0)[0] for row in rows[:12]])


def log_p(model, ids, start):
    """[log π(r_t | everything before)] over the response, one unpadded forward, in float64."""
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [logprobs[t - 1, ids[t]].item() for t in range(start, len(ids))]


def mean(values):
    return sum(values) / len(values)


def test_scit_loss_by_the_equation(pairs):
    """NLL (token mean over own-instruction and anchor examples) + (1-ε) softplus(P~ - P) + ε softplus(P - P~)."""
    model, chosen, anchors, eps = make_model("llama").double(), pairs[:3], pairs[:1], 0.2
    terms, tokens = [], []
    for pair in chosen:
        for own, other, response in (("positive", "negative", "chosen"), ("negative", "positive", "rejected")):
            P, P_other = (mean(log_p(model, *pair.example(prompt, response))) for prompt in (own, other))
            terms.append((1 - eps) * math.log1p(math.exp(P_other - P)) + eps * math.log1p(math.exp(P - P_other)))
            tokens += log_p(model, *pair.example(own, response))
    for pair in anchors:
        for response in ("chosen", "rejected"):
            tokens += log_p(model, *pair.example("plain", response))
    loss, contrast, P = scit.batch_loss(model, chosen, anchors, 1, eps)
    assert contrast.item() == pytest.approx(mean(terms), rel=1e-5)
    assert loss.item() == pytest.approx(mean(terms) - mean(tokens), rel=1e-5)
    assert P[0, 1, 0].item() == pytest.approx(mean(log_p(model, *chosen[0].example("negative", "chosen"))), rel=1e-5)


def test_scit_contrast_at_no_difference_is_ln_2():
    P = torch.randn(5)
    assert scit.contrast_loss(P, P, 0.2).item() == pytest.approx(math.log(2))


def test_dual_loss_by_the_equation(pairs):
    model = make_model("llama").double()
    for response in ("chosen", "rejected"):
        tokens = [x for pair in pairs for x in log_p(model, *pair.example("plain", response))]
        nll, count = dual.response_nll(model, pairs, response, 1)
        assert (nll / count).item() == pytest.approx(-mean(tokens), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_order_and_batch_size_change_no_stage_1_loss(family, pairs):
    """Sums over one batch of 8, over its reverse, and over batches of 1 (no padding) agree."""
    model, some = make_model(family), pairs[:8]
    with torch.no_grad():
        whole = scit.batch_loss(model, some, some[:3], 1, 0.2)
        back = scit.batch_loss(model, some[::-1], some[:3][::-1], 1, 0.2)
        single = torch.cat([scit.batch_loss(model, [pair], [], 1, 0.2)[2] for pair in some])
        assert torch.allclose(whole[0], back[0], atol=1e-5) and torch.allclose(whole[2], single, atol=1e-5)
        one = dual.response_nll(model, some, "chosen", 1)
        many = [dual.response_nll(model, [pair], "chosen", 1) for pair in some]
        assert torch.allclose(one[0], sum(nll for nll, _ in many), rtol=1e-5) and one[1] == sum(n for _, n in many)


def test_padding_and_batch_size_change_no_alignment_loss(pairs):
    """The alignment loss of 8 responses together equals the token-weighted mean of each alone."""
    model = make_model("llama")
    trunk, layers = model.base_model, [1, 2]
    examples = [pair.example("plain", "chosen") for pair in pairs[:8]]
    torch.manual_seed(0)
    collected = []                            # random b, h+, h- for every recorded position of every response
    for ids, start in examples:
        n = len(ids) - start + 1
        collected.append([[torch.randn(n, 32) for _ in layers] for _ in range(3)])

    def loss(indices, kind):
        batch = data.collate([(examples[i][0], examples[i][1] - 1) for i in indices], 1)
        hidden = align.hidden_states(trunk, layers, batch.ids)
        states = [[torch.cat([collected[i][k][j] for i in indices]) for j in range(len(layers))] for k in range(3)]
        value, norms = representation_loss(hidden, *states, response_index(batch.response), 0.5, kind=kind)
        return value, norms
    for kind in ("l2", "mse"):
        with torch.no_grad():
            whole, norms = loss(range(8), kind)
            parts = [loss([i], kind) for i in range(8)]
        weights = torch.tensor([p[1].shape[1] for p in parts], dtype=torch.float)
        assert whole.item() == pytest.approx(((torch.stack([p[0] for p in parts]) * weights).sum() / weights.sum()).item(), rel=1e-5)
        assert torch.allclose(norms, torch.cat([p[1] for p in parts], 1), atol=1e-4)


@pytest.mark.parametrize("method", ["scit", "dual"])
def test_recorded_states_are_those_of_unpadded_inputs(method, pairs):
    """h+, h-, b of a padded batch against one forward of each response alone, with the adapters that each needs."""
    model = make_model("llama")
    adapters = {}
    for name in {"scit": ["scit"], "dual": ["good", "bad"]}[method]:
        adapters[name] = LoRA(model.base_model).eval()
        for B in adapters[name].B:
            torch.nn.init.normal_(B, std=0.05)
    config = collect.Config(layers=[1, 2], stimulus="instructed", base="original")
    some = [(pair, response) for pair in pairs[:4] for response in ("chosen", "rejected")]
    with torch.no_grad():
        base, plus, minus = collect.record_states(model.base_model, adapters, method, config, some, 1)
        at = 0
        for pair, response in some:
            up, down = list(adapters.values())[0], list(adapters.values())[-1]
            for states, on, prompt in ((base, [], "plain"), (plus, [up], "positive"), (minus, [down], "negative")):
                ids, start = pair.example(prompt, response)
                with collect.only(adapters.values(), *on):
                    alone = collect.hidden_states(model.base_model, [1, 2], torch.tensor([ids]))
                for layer in range(2):
                    expected = alone[layer][0, start - 1:]       # the last prompt token and the response
                    assert torch.allclose(states[layer][at:at + len(expected)], expected, atol=1e-4)
            at += len(expected)
    assert at == len(base[0])


def test_micro_batches_hold_a_batch_within_a_budget():
    lengths = [5, 3, 9, 4, 2, 9]
    parts = data.micro_batches([0, 1, 2, 3, 5], lengths, 12)
    assert parts == [[1, 3], [0], [2], [5]] and data.micro_batches([4, 0, 1], lengths, 15) == [[4, 0, 1]]
    assert data.micro_batches([2], lengths, 1) == [[2]]


def test_shards_hold_the_same_whatever_a_pass_holds_and_begin_with_the_longest(pairs):
    examples = [(pair, response) for pair in pairs for response in ("chosen", "rejected")]
    lengths = [pair.length("plain", response) for pair, response in examples]
    plans = [collect.plan_shards(examples, lengths, collect.Config(shard_mb=0.01, tokens_per_pass=tokens), 100) for tokens in (10**6, 60)]
    one, many = ([sum(shard, []) for shard in plan] for plan in plans)
    assert one == many and len(one) >= 3 and max(map(len, plans[0])) == 1 < max(map(len, plans[1]))
    ordered = [pair.length("plain", response) for shard in one for pair, response in shard]
    assert ordered == sorted(lengths, reverse=True)
    assert all(sum(data.recorded_length(example, collect.Config()) * 100 for example in shard) <= 10_000 for shard in one)


@pytest.mark.parametrize("method", ["scit", "dual"])
def test_parts_of_a_step_train_the_same_adapter(method, tiny, tmp_path):
    """Steps in many forward passes: adapters of all stages within rounding of those of one pass a step."""
    found = {}
    for tokens in (10**6, 150):
        out = tmp_path / str(tokens)
        more = ["--out", out, "--steps", "4", "--tokens-per-pass", tokens, "--device", "cpu"]
        go(scit if method == "scit" else dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", *more)
        go(collect, "--out", out, "--device", "cpu")
        go(align, *more)
        found[tokens] = [load_file(path) for path in sorted(out.rglob("adapter_model.safetensors"))]
    assert len(found[150]) == 3
    for one, many in zip(*found.values()):
        for name in one:
            assert (one[name] - many[name]).abs().max() <= 2e-3 * one[name].abs().max(), name


def test_a_share_of_the_pairs_is_anchored_and_of_a_single_one_it(tiny, tmp_path, monkeypatch):
    own, seen = scit.batch_loss, []
    monkeypatch.setattr(scit, "batch_loss", lambda *args: seen.append((len(args[1]), len(args[2]))) or own(*args))
    for size, share, anchors in ((1, 0.375, 1), (8, 0.375, 3), (4, 1, 4), (4, 0, 0)):
        seen.clear()
        go(scit, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", "--batch-size", size, "--anchor", share,
           "--tokens-per-pass", 10**6, "--device", "cpu")
        assert seen[0] == (size, anchors)


def test_reading_ahead_keeps_the_order_and_ends(monkeypatch):
    made = []

    def make(item):
        made.append(item)
        return (item,)
    got = []
    for (item,) in data.one_ahead(make, iter(range(1, 6)), torch.device("cpu")):
        got.append((item, len(made)))
    assert [item for item, _ in got] == [1, 2, 3, 4, 5] and made == [1, 2, 3, 4, 5] and got[-1][1] == 5
    with pytest.raises(ZeroDivisionError):
        list(data.one_ahead(lambda item: 1 / 0, iter([1]), torch.device("cpu")))
