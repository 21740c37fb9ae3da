"""What carries the signal? Correlations with the reward, of everything that is trained on the way.

    python -m studies.signal --task sentiment        writes studies/results/signal.json

For answers of the base to the validation prompts, x is the log-ratio that a method would tilt the
base along; see studies/corr.py for what its correlation with the reward says. The method's own
settings are chosen by it: it takes a minute where a frontier takes an hour. Each figure is written
as soon as it is there, and a later call goes on with the missing ones.
"""

import itertools
import json
from dataclasses import dataclass
from functools import partial

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
from studies.shared import RESULTS, write_result

# The base's answers to each validation prompt.
ANSWERS = 8

# The λ of base + λ (good - bad).
LAMBDA = 0.5

# Stage 1 with other settings than the default's: {name: settings of dual.py}.
VARIANTS = {
    "γ 0 (the paper)": {"contrast": 0.0},
    "γ 4": {"contrast": 4.0},
    "γ 16": {"contrast": 16.0},
    "lr 1e-3": {"lr": 1e-3},
    "120 steps": {"steps": 120},
}


@dataclass
class Config:
    task: str = setting("sentiment", f"one of {', '.join(tasks.TASKS)}")
    wrong_labels: float = setting(0.0, "as in studies.frontier", group="data")
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


class Figures(dict):
    """{what: figures} of one task, seed and model, kept in studies/results/signal.json."""

    def __init__(self, config):
        self.path = RESULTS / "signal.json"
        self.kept = {}
        if self.path.exists():
            self.kept = json.loads(self.path.read_text(encoding="utf-8"))["runs"]
        digest = model_digest(config.model)[:12]
        self.name = f"{config.task}, seed {config.seed}, {config.dtype}, model {digest}"
        if config.wrong_labels:
            self.name += f", {config.wrong_labels:.0%} wrong labels"
        super().__init__(self.kept.get(self.name, {}))

    def add(self, name, figures):
        self[name] = figures
        print(f"{name}: corr {figures['corr']:.3f} ± {figures['error']:.3f}", flush=True)
        write_result("signal", {"runs": {**self.kept, self.name: self}})


def measure(config):
    """Measure everything that is trained on the pairs of one task and seed, or by arithmetic.
    Returns the Figures."""
    experiment = Experiment(config, config.seed)
    signal = Signal(experiment)
    figures = Figures(config)

    def add_policy(name, load):
        """A policy by its log-ratio to the base. load: a function that returns its weights."""
        if name not in figures:
            figures.add(name, signal.measure(signal.logprobs(load()) - signal.base))

    def add_pair(name, variant):
        """The two models of stage 1, by their log-ratio and by arithmetic with their weights."""
        if f"weights{name}" in figures:
            return
        good, bad = variant.dual()
        x = signal.logprobs(good) - signal.logprobs(bad)
        figures.add(f"good against bad{name}", signal.measure(x))
        add_policy(f"weights{name}", lambda: stack(scaled(good, LAMBDA), scaled(bad, -LAMBDA)))

    if "base, p+ against p-" not in figures:
        x = signal.logprobs(None, "positive") - signal.logprobs(None, "negative")
        figures.add("base, p+ against p-", signal.measure(x))
    add_pair("", experiment)
    for layers in ("upper", "middle"):
        add_policy(f"DUAL, {layers} layers", partial(experiment.aligned, "dual", layers))
    for lr in DPO_LRS:
        add_policy(f"DPO, lr {lr:g}", partial(experiment.dpo, lr))
    for name, settings in VARIANTS.items():
        add_pair(f", {name}", experiment.variant(name, **settings))
    return figures


def main(config):
    tasks.check_scorers()
    measure(config)


if __name__ == "__main__":
    run(main, Config)
