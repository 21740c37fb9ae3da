"""The slope of a frontier, reward over KL, read without drawing an answer from the aligned model.

A small tilt of the base, π ∝ π_base e^(s x), raises the expected reward by s cov(x, R) and costs
s² var(x) / 2 nats. So at KL k it gains

    gain = corr(x, R) · σ_R · sqrt(2 k)

where x = Σ_t log π+(r_t) - log π-(r_t) is the log-ratio that the tilt goes along, of an answer r of
the base, R its reward and σ_R the standard deviation of R within prompts. The correlation is taken
within prompts, too: what differs from prompt to prompt alone is lost to any policy. This is the
gain to first order, and it takes some forward passes.

A model is tilted token by token: π(v) ∝ π_base(v) e^(s x(v)) at each position. Its log-ratio to the
base is then Σ_t (s x_t - log Z_t) with log Z_t ≈ s E[x_t] + s² var(x_t) / 2, mean and variance over
the base's next token. The first part centres x_t. The second depends on the text so far but not on
the token that is chosen; it grows with s², and far from the base it may dominate the log-ratio and
its correlation. So a policy is measured at a small scale. The log-ratio between two models that are
far from the base (DUAL's good and bad) has such parts, too: its correlation is that of tilting
whole answers, and a model that is tilted token by token may reach less or more.
"""

import numpy as np


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
