"""KL to the base, log-probabilities of answers and implicit rewards against whole logits; the dial
against known curves."""

import math

import pytest
import torch
from helpers import make_model, random_adapter

from common import answers
from common.config import UserError
from common.dial import next_scale, scale_to_kl, scaled
from common.score import ImplicitReward

PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
BASE_PROMPTS = [[6, 7], [9], [12, 13]]
ANSWERS = [[20, 21, 22, 0], [30], [40, 41, 42, 43, 44, 0]]


@torch.no_grad()
def all_logprobs(model, prompt, answer):
    """log π(v | prompt, answer up to t) of every v, at each position t of the answer: [T, V], in
    float64."""
    logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].double()
    return logits.log_softmax(-1)[len(prompt) - 1 : -1]


@pytest.mark.parametrize("max_logits", [2**26, 800 * 4])
def test_kl_is_that_of_whole_logits(max_logits, monkeypatch):
    """Each answer alone, without padding, over the whole vocabulary; the prompts may differ."""
    monkeypatch.setattr(answers, "MAX_LOGITS", max_logits)
    model = make_model("llama")
    expected = []
    base = [all_logprobs(model, p, a) for p, a in zip(BASE_PROMPTS, ANSWERS)]
    adapter = random_adapter(model)
    for prompt, answer, log_base in zip(PROMPTS, ANSWERS, base):
        log_p = all_logprobs(model, prompt, answer)
        expected.append((log_p.exp() * (log_p - log_base)).sum().item())
    for tokens_per_pass in (4096, 8):
        kl = answers.kl_to_base(model, adapter, PROMPTS, BASE_PROMPTS, ANSWERS, 1, tokens_per_pass)
        assert kl == pytest.approx(expected, rel=1e-4)
    assert min(expected) > 0.01
    assert adapter.enabled


def test_kl_of_the_base_is_zero():
    model = make_model("llama")
    kl = answers.kl_to_base(model, None, PROMPTS, PROMPTS, ANSWERS, 1)
    assert kl == pytest.approx([0, 0, 0], abs=1e-6)


def test_logprobs_of_answers_are_those_of_whole_logits():
    model = make_model("gpt2")
    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS):
        logprobs = all_logprobs(model, prompt, answer)
        expected.append(logprobs[range(len(answer)), answer].sum().item())
    for tokens_per_pass in (4096, 8):
        sums = answers.answer_logprobs(model, PROMPTS, ANSWERS, 1, tokens_per_pass)
        assert sums == pytest.approx(expected, rel=1e-5)


def test_implicit_reward_is_the_difference_of_logprobs():
    """Under plus on its prompt, minus under minus on its own."""
    model = make_model("llama")

    class Pair:
        prompts = {"positive": torch.tensor([5, 6]), "negative": torch.tensor([7])}  # noqa: RUF012

    weights, expected = [], []
    for seed, prompt in ((1, "positive"), (2, "negative")):
        adapter = random_adapter(model, seed)
        logprobs = all_logprobs(model, Pair.prompts[prompt].tolist(), ANSWERS[0])
        expected.append(logprobs[range(len(ANSWERS[0])), ANSWERS[0]].sum().item())
        weights.append(adapter.weights())
        adapter.remove()
    reward = ImplicitReward(*weights, "positive", "negative")
    [value] = reward(model, [Pair], [ANSWERS[0]], 1)
    assert value == pytest.approx(expected[0] - expected[1], rel=1e-3)
    assert abs(value) > 0.01


def test_scaled_weights_change_a_layer_in_proportion():
    model = make_model("llama")
    adapter = random_adapter(model)
    adapter.remove()
    linear = model.base_model.layers[0].mlp.up_proj
    x = torch.randn(3, linear.in_features)
    plain = linear(x)
    for factor in (0.5, 2.0):
        with answers.attached(model, adapter.weights()):
            change = linear(x) - plain
        with answers.attached(model, scaled(adapter.weights(), factor)):
            assert torch.allclose(linear(x) - plain, factor * change, atol=1e-5)
    assert change.abs().max() > 0.01


CURVES = {
    "square": lambda scale: 6 * scale**2,
    "steep": lambda scale: 1.5 * math.expm1(2 * scale),
    "slow": lambda scale: 2 * scale**1.2,
}


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("target", [0.5, 2, 5])
def test_the_dial_finds_the_scale(curve, target):
    kl_at = CURVES[curve]
    scale, measured = scale_to_kl(kl_at, target)
    assert kl_at(scale) == pytest.approx(target, rel=0.1)
    assert measured[scale] == kl_at(scale)
    assert len(measured) <= 5


def test_between_two_scales_kl_is_a_power():
    assert next_scale({1.0: 8.0, 0.5: 1.0}, 2.0) == pytest.approx(0.5 * 2 ** (1 / 3))
    assert next_scale({1.0: 8.0}, 2.0) == pytest.approx(0.5)


@pytest.mark.parametrize("kl_at", [lambda scale: 0.3 * scale, lambda scale: min(1.0, scale)])
def test_a_kl_out_of_reach_says_what_was_reached(kl_at):
    with pytest.raises(UserError, match=r"--kl 5 is out of reach: scaled by 4 the adapter is 1"):
        scale_to_kl(kl_at, 5)


@pytest.mark.parametrize("kl", [0.0, math.nan, math.inf])
def test_an_adapter_without_a_finite_kl_is_refused(kl):
    with pytest.raises(UserError, match="KL is"):
        scale_to_kl(lambda scale: kl, 1)
