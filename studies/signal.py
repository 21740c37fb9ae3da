"""What carries the signal? Correlations with the reward, of everything that is trained on the way.

    python -m studies.signal --task sentiment        writes studies/results/signal.json

For answers of the base to the validation prompts, x is the log-ratio that a method would tilt the
base along; see studies/corr.py for what its correlation with the reward says. The method's own
settings are chosen by it: it takes a minute where a frontier takes an hour.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from common.answers import answer_logprobs, attached
from common.config import run, setting
from common.dial import scaled
from common.hf import model_digest
from lora import stack
from studies import tasks
from studies.corr import correlation, within
from studies.frontier import DPO_LRS, Experiment
from studies.sampling import Policy, encode_prompts, sample_answers
from studies.shared import write_result

# The base's answers to each validation prompt.
ANSWERS = 8

# The λ of base + λ (good - bad).
LAMBDA = 0.5


@dataclass
class Config:
    task: str = setting("sentiment", f"one of {', '.join(tasks.TASKS)}")
    seed: int = setting(0, "seed of the pairs and of what is trained", group="run")
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    dtype: str = setting("float32", "of the model", group="run")
    work: str = setting("/tmp/rahf-frontier", "folder of the stages, reused", group="run")


class Signal:
    """The base's answers to the validation prompts, their rewards, and log-probabilities."""

    def __init__(self, experiment):
        self.experiment = experiment
        positive, negative = tasks.TASKS[experiment.task].instructions
        prompts = experiment.prompts["valid"]
        self.encoded = encode_prompts(
            experiment.tokenizer, prompts, positive=positive, negative=negative
        )
        drawn = sample_answers(
            experiment.model,
            experiment.tokenizer,
            self.encoded,
            Policy(),
            ANSWERS,
            20_000,
            tasks.ANSWER_TOKENS,
        )
        self.answers = [[answer.ids for answer in answers] for answers in drawn]
        self.rewards = rewards_of(experiment.scorer, prompts, drawn)
        self.base = self.logprobs(None)

    def logprobs(self, weights, prompt="plain"):
        """Σ log π of each answer under the base with an adapter (or None), [P, n]."""
        model = self.experiment.model
        prompts = [pair.prompts[prompt].tolist() for pair in self.encoded for _ in range(ANSWERS)]
        ids = list(itertools.chain.from_iterable(self.answers))
        with attached(model, weights):
            sums = answer_logprobs(model, prompts, ids, self.experiment.tokenizer.pad_token_id)
        return np.array(sums).reshape(-1, ANSWERS)

    def measure(self, x):
        """The correlation of x with the reward, its error, and the spread of x in nats."""
        value, error = correlation(x, self.rewards)
        return {"corr": value, "error": error, "spread": float(within(x).std())}


def rewards_of(scorer, prompts, drawn):
    """The rewards [P, n] of the answers to each prompt."""
    return np.array(
        [[scorer(q, answer.text) for answer in answers] for q, answers in zip(prompts, drawn)]
    )


def measure(config):
    """{what: figures} of everything that is trained on the pairs of one task and seed."""
    experiment = Experiment(config, config.seed)
    signal = Signal(experiment)
    figures = {}

    def add(name, x):
        figures[name] = signal.measure(x)
        values = figures[name]
        print(f"{name}: corr {values['corr']:.3f} ± {values['error']:.3f}", flush=True)

    told = [signal.logprobs(None, prompt) for prompt in ("positive", "negative")]
    add("base, p+ against p-", told[0] - told[1])
    for name, variant in (("γ = 0", experiment.without_contrast()), ("γ = 1", experiment)):
        good, bad = variant.dual()
        x = [signal.logprobs(weights) for weights in (good, bad)]
        add(f"good, {name}", x[0] - signal.base)
        add(f"good against bad, {name}", x[0] - x[1])
        total = stack(scaled(good, LAMBDA), scaled(bad, -LAMBDA))
        add(f"base + {LAMBDA:g} (good - bad), {name}", signal.logprobs(total) - signal.base)
        for layers in ("upper", "middle"):
            aligned = variant.aligned("dual", layers)
            add(f"DUAL, {layers} layers, {name}", signal.logprobs(aligned) - signal.base)
    for lr in DPO_LRS:
        add(f"DPO, lr {lr:g}", signal.logprobs(experiment.dpo(lr)) - signal.base)
    return figures


def main(config):
    tasks.check_scorers()
    result = {"task": config.task, "seed": config.seed, "digest": model_digest(config.model)[:12]}
    write_result("signal", {**result, "figures": measure(config)})


if __name__ == "__main__":
    run(main, Config)
