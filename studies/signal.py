"""What carries the signal? Correlations with the reward, of everything that is trained on the way.

    python -m studies.signal --task sentiment        writes studies/results/signal.json
    python -m studies.signal --figures SCIT "SCIT, lr 1e-3"       those alone

For answers of the base to the validation prompts, x is the log-ratio that a method would tilt the
base along; see studies/corr.py for what its correlation with the reward says. The method's own
settings are chosen by this correlation: it takes minutes of forward passes where a frontier takes
an hour of sampling. Each is written as soon as it is there, and a later call goes on with the
missing ones.
"""

import copy
import json
import shutil
from dataclasses import dataclass
from functools import partial

import dual
from common.answers import attached
from common.config import UserError, run, setting
from common.dial import scaled
from common.hf import model_digest
from common.score import prompts_of
from studies import tasks
from studies.corr import correlation, within
from studies.frontier import DPO_LRS, Experiment, rewards_of
from studies.sampling import Policy, encode_prompts, logprobs_of_answers, sample_answers
from studies.shared import RESULTS, weight_difference, write_result

# The base's answers to each validation prompt.
ANSWERS = 8

# The spread of x in nats that adapters are scaled to before they are measured: a correlation says
# where a policy goes only near the base (see studies/corr.py).
SPREAD = 1.0

# How many directions of each layer align projects v on.
RANKS = (2, 8)

# Stage 1 with other settings than the default's: {name: settings of dual.py}.
DUAL_VARIANTS = {
    "γ 0 (the paper)": {"contrast": 0.0},
    "γ 4": {"contrast": 4.0},
    "γ 16": {"contrast": 16.0},
    "lr 1e-3": {"lr": 1e-3},
    "120 steps": {"steps": 120},
}

# The same of scit.py.
SCIT_VARIANTS = {
    "β 1 (the paper)": {"beta": 1.0},
    "mean over tokens (the authors)": {"reduction": "mean", "beta": 1.0},
    "no anchors (the paper)": {"anchor": 0.0},
    "lr 1e-3": {"lr": 1e-3},
    "120 steps": {"steps": 120},
}


@dataclass
class Config:
    task: str = setting("sentiment", f"one of {', '.join(tasks.TASKS)}")
    figures: list[str] = setting(None, "figures to measure, in this order; empty takes all")
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
        self.answers = []
        for answers in drawn:
            self.answers.append([answer.ids for answer in answers])
        self.rewards = rewards_of(experiment.scorer, prompts, drawn)
        self.base = self.logprobs(None)

    def logprobs(self, weights, prompt="plain"):
        """Σ log π of each answer under the base with an adapter (or None), [P, n]."""
        model = self.experiment.model
        prompts = prompts_of(self.encoded, prompt)
        pad_id = self.experiment.tokenizer.pad_token_id
        with attached(model, weights):
            return logprobs_of_answers(model, prompts, self.answers, pad_id)

    def measure(self, x):
        """The correlation of x with the reward, its error, and the spread of x in nats."""
        value, error = correlation(x, self.rewards)
        return {"corr": value, "error": error, "spread": float(within(x).std())}


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


def of_base(signal):
    return signal.logprobs(None, "positive") - signal.logprobs(None, "negative")


def of_policy(load, signal):
    """A policy against the base, scaled to about SPREAD. load: a function that returns its
    AdapterWeights."""
    weights = load()
    x = signal.logprobs(weights) - signal.base
    scale = SPREAD / within(x).std()
    return signal.logprobs(scaled(weights, scale)) - signal.base


def of_pair(variant, signal):
    """DUAL's good model against its bad one."""
    good, bad = variant.dual()
    return signal.logprobs(good) - signal.logprobs(bad)


def of_instructed(variant, signal):
    """SCIT's model under p+ against itself under p-."""
    instructed = variant.scit()
    return signal.logprobs(instructed, "positive") - signal.logprobs(instructed, "negative")


def weights_of(variant):
    return weight_difference(*variant.dual(), 1.0)


def aligned_to_rounded_states(experiment, rounded):
    """AdapterWeights of DUAL with an experiment's good and bad model, but aligned to states that
    collect computed in bfloat16, in the folder of another experiment."""
    experiment.stage1(dual)
    for name in ("good", "bad"):
        shutil.copytree(
            experiment.out / "dual" / name, rounded.out / "dual" / name, dirs_exist_ok=True
        )
    return rounded.aligned("dual")


def log_ratios(experiment):
    """{figure: function of a Signal that trains what it needs and returns its x [P, n]}."""
    # in a folder of their own: a line of the frontier names all settings in its folder
    others = copy.copy(experiment)
    others.out = experiment.out.with_name(f"signal-{experiment.out.name}")
    ratios = {"base, p+ against p-": of_base}
    variants = {"": experiment}
    for name, settings in DUAL_VARIANTS.items():
        variants[f", {name}"] = others.variant(f"dual, {name}", **settings)
    for name, variant in variants.items():
        ratios[f"good against bad{name}"] = partial(of_pair, variant)
        ratios[f"weights{name}"] = partial(of_policy, partial(weights_of, variant))
    for lr in DPO_LRS:
        ratios[f"DPO, lr {lr:g}"] = partial(of_policy, partial(experiment.dpo, lr))
    ratios["SCIT"] = partial(of_instructed, experiment)
    for name, settings in SCIT_VARIANTS.items():
        variant = others.variant(f"scit, {name}", **settings)
        ratios[f"SCIT, {name}"] = partial(of_instructed, variant)
    for method in ("dual", "scit"):
        for layers in ("upper", "middle"):
            load = partial(experiment.aligned, method, layers)
            ratios[f"{method.upper()} aligned, {layers} layers"] = partial(of_policy, load)
    for rank in RANKS:
        load = partial(experiment.aligned, "dual", rank=rank)
        ratios[f"DUAL aligned, rank {rank}"] = partial(of_policy, load)
    rounded = others.variant("rounded states")
    rounded.compute_dtype = "bfloat16"
    load = partial(aligned_to_rounded_states, experiment, rounded)
    ratios["DUAL aligned, upper layers, states in bfloat16"] = partial(of_policy, load)
    return ratios


def measure(config):
    """Measure what has no figure yet. Returns the Figures."""
    experiment = Experiment(config, config.seed)
    ratios = log_ratios(experiment)
    if unknown := set(config.figures or []) - set(ratios):
        raise UserError(f"--figures {min(unknown)!r}: choose from {'; '.join(ratios)}")
    figures = Figures(config)
    missing = [name for name in dict.fromkeys(config.figures or ratios) if name not in figures]
    if missing:
        signal = Signal(experiment)
        for name in missing:
            figures.add(name, signal.measure(ratios[name](signal)))
    return figures


def markdown(figures):
    """The table of one run's figures, by their correlation."""
    lines = ["| log-ratio x | correlation with the reward | spread of x in nats |", "|---|---|---|"]
    for name, values in sorted(figures.items(), key=lambda item: item[1]["corr"]):
        corr = f"{values['corr']:.2f} ± {values['error']:.2f}"
        lines.append(f"| {name} | {corr} | {values['spread']:.1f} |")
    return "\n".join(lines)


def main(config):
    tasks.check_task(config.task)
    print(markdown(measure(config)))


if __name__ == "__main__":
    run(main, Config)
