"""The slope of a frontier, reward over KL, read without drawing an answer from the aligned model.

A small tilt of the base, π ∝ π_base e^(s x), raises the expected reward by s cov(x, R) and costs
s² var(x) / 2 nats. So at KL k it gains

    gain = corr(x, R) · σ_R · sqrt(2 k)

where x = Σ_t log π+(r_t) - log π-(r_t) is the log-ratio that the tilt goes along, of an answer r of
the base, R its reward and σ_R the standard deviation of R within prompts. The correlation is taken
within prompts, too: what differs from prompt to prompt alone is lost to any policy. To first order
it bounds what a method can reach that goes along x, and it takes some forward passes.
"""

import numpy as np
import torch

from common.answers import attached
from common.data import collate, split_into_passes
from common.hf import response_logprobs

TOKENS_PER_PASS = 4096


@torch.no_grad()
def sum_logprobs(model, weights, encoded, answers, prompt="plain"):
    """Σ_t log π(r_t | q, r_<t) of each answer under the model with an adapter: numpy [P, n].

    encoded: P EncodedPairs; answers: for each of them n lists of ids; weights: AdapterWeights or
    None for the base.
    """
    examples = []
    for pair, ids in zip(encoded, answers):
        start = pair.prompts[prompt].tolist()
        examples += [(start + answer, len(start)) for answer in ids]
    lengths = [len(ids) for ids, _ in examples]
    sums = np.zeros(len(examples))
    with attached(model, weights):
        for part in split_into_passes(range(len(examples)), lengths, TOKENS_PER_PASS):
            batch = collate([examples[i] for i in part], 0, model.device)
            sums[list(part)] = response_logprobs(model, batch)[0].sum(1).tolist()
    return sums.reshape(len(encoded), -1)


def within(values):
    """Values [P, n] without the mean of their prompt."""
    return values - values.mean(1, keepdims=True)


def correlation(x, rewards, draws=1000):
    """Pearson's correlation of x and R [P, n] within prompts, and its standard error by a
    bootstrap over prompts."""
    x, rewards = within(x), within(rewards)
    # the sums of each prompt: enough for every resampling
    sums = np.stack([(x * rewards).sum(1), (x * x).sum(1), (rewards * rewards).sum(1)], 1)

    def value(totals):
        return totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2])

    drawn = np.random.default_rng(0).integers(len(x), size=(draws, len(x)))
    return float(value(sums.sum(0))), float(value(sums[drawn].sum(1)).std())
