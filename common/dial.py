"""Scale an adapter until its answers have a given KL divergence from the base's.

Scaling an adapter by s, s B A x in place of B A x, moves the model along a line from its base
through what was trained. It trades reward for KL without training again (linear interpolation
towards the start: WARP, arXiv 2406.16768). KL grows with s about as s² near the base; where it
stands is measured on answers that the scaled model draws at temperature 1.
"""

import dataclasses
import math

from tqdm import tqdm

from common.answers import attached, generate, kl_to_base
from common.checkpoint import Signals
from common.config import UserError

# A measured KL may be off from what was asked for by this factor.
TOLERANCE = 1.1

# An adapter is scaled up to this at most: beyond, nothing like it has been trained.
MAX_SCALE = 4.0

# The scales that are measured at most.
MAX_MEASURED = 8


def scaled(weights, factor):
    """AdapterWeights of factor times the same change."""
    return dataclasses.replace(weights, alpha=weights.alpha * factor)


def dial(model, tokenizer, weights, prompts, end_token, kl, generation, tokens_per_pass=None):
    """The scale at which an adapter's answers are `kl` nats from the base's.

    weights: AdapterWeights; prompts: lists of ids, to each of which one answer is sampled;
    end_token, generation: see generate. Returns (scale, [(scale, KL)] of all that were measured).
    UserError where the KL is out of reach.
    """
    pad_id = tokenizer.pad_token_id

    def kl_at(scale):
        signals.check()
        # the seed of the GenerationSettings makes the answers at two scales alike
        with attached(model, scaled(weights, scale)) as adapter:
            answers = generate(
                model, tokenizer, prompts, generation, sample=True, end_token=end_token
            )
            values = kl_to_base(model, adapter, prompts, prompts, answers, pad_id, tokens_per_pass)
        return sum(values) / len(values)

    with Signals() as signals:
        scale, measured = scale_to_kl(kl_at, kl)
    return scale, sorted(measured.items())


def next_scale(measured, target):
    """The scale to measure next. measured: {scale: KL > 0}.

    Between two measured KLs the target is interpolated by a power law, KL ~ scale^e. Outside of
    them it is extrapolated from the nearest with e = 2.
    """
    below = [scale for scale, kl in measured.items() if kl <= target]
    above = [scale for scale, kl in measured.items() if kl > target]
    if below and above:
        low, high = max(below), min(above)
        exponent = math.log(measured[high] / measured[low]) / math.log(high / low)
    else:
        low, exponent = (max(below) if below else min(above)), 2.0
    return low * (target / measured[low]) ** (1 / exponent)


def scale_to_kl(kl_at, target):
    """The scale at which an adapter is `target` nats from the base, within TOLERANCE.

    kl_at: a function of a scale that returns the measured KL. Returns (scale, {scale: KL} of all
    that were measured). UserError where the target is out of reach.
    """
    measured = {}
    scale = 1.0
    for _ in tqdm(range(MAX_MEASURED), desc="dial", unit="scale"):
        measured[scale] = kl_at(scale)
        if not 0 < measured[scale] < math.inf:
            raise UserError(f"--kl {target:g}: the adapter's KL is {measured[scale]}")
        if max(target / measured[scale], measured[scale] / target) <= TOLERANCE:
            return scale, measured
        scale = min(MAX_SCALE, next_scale(measured, target))
        if scale in measured:
            break
    strongest = max(measured)
    if measured[strongest] < target:
        raise UserError(
            f"--kl {target:g} is out of reach: scaled by {strongest:.2g} the adapter "
            f"is {measured[strongest]:.3g} nats from the base: ask for less, or train longer or at "
            "a higher --strength"
        )
    curve = ", ".join(f"{kl:.3g} at {scale:.3g}" for scale, kl in sorted(measured.items()))
    raise UserError(f"--kl {target:g}: no scale is within 10% of it, the KL is {curve}")
