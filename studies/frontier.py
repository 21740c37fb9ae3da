"""Reward over KL on a real chat model: RAHF beside DPO, arithmetic with weights and logits, and
prompting.

    python -m studies.frontier --task sentiment --seeds 0 1 2     measures what is missing
    python -m studies.frontier --wrong-labels 0.3 --methods base DUAL "DPO, lr 0.0005" "robust DPO"
    python -m studies.frontier_report                             table and figure of what is there

A unit is one policy of one task and seed. Its line is appended to studies/results/frontier.jsonl as
soon as it is measured, and a later call goes on where this one stopped. Every policy gives four
answers to each of the 128 test prompts; the noise is the same for all policies (see
studies/sampling.py). A seed draws the pairs (see studies/tasks.py), the adapters and the noise.
With --wrong-labels a share of the training pairs is swapped, drawn by the seed: a task of its own.
"""

import copy
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import align
import collect
import dual
import scit
from common.config import UserError, run, setting
from common.dial import scaled
from common.hf import load_tokenizer, model_digest
from common.stages import versions, write_json
from lora import load_adapter
from studies import tasks
from studies.sampling import Policy, encode_prompts, load_sampler, sample_answers
from studies.shared import RESULTS, machine, quietly, swap_labels, weight_difference

LINES = RESULTS / "frontier.jsonl"

# The answers to each test prompt.
ANSWERS = 4

# The learning rate of the DPO that knows how many labels are wrong.
ROBUST_LR = 5e-4

# DPO has as many steps and pairs in a step as dual.py, and three learning rates to choose from.
DPO_LRS = (2e-4, 5e-4, 1e-3)
SCALES = (0.35, 0.6, 1.0, 1.5)
DPO_SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0)
LAMBDAS = (0.25, 0.5, 1.0)
BEST_OF = (2, 4, 8, 16)
BEST_OF_N = "best of n by the scorer"


@dataclass
class Config:
    task: str = setting("sentiment", f"one of {', '.join(tasks.TASKS)}")
    seeds: list[int] = setting(None, "seeds to measure; empty takes 0")
    methods: list[str] = setting(None, "methods to measure; empty takes all")
    strengths: list[float] = setting(None, "strengths to measure of them; empty takes all")
    wrong_labels: float = setting(
        0.0, "share of the training pairs that are swapped", minimum=0, maximum=1, group="data"
    )
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    dtype: str = setting(
        "float32", "of the model; bfloat16 is twice as fast on a CPU that has it", group="run"
    )
    work: str = setting("/tmp/rahf-frontier", "folder of the stages, reused", group="run")


# ---------------------------------------------------------------- one task and seed


class Experiment:
    """One task and seed: its pairs, what is trained on them, and what is measured."""

    def __init__(self, config, seed):
        self.task, self.seed, self.model_folder = config.task, seed, config.model
        self.scorer = tasks.TASKS[config.task].score
        # those of stage 1 that differ from its defaults
        self.stage1_settings = {}
        # what collect computes in
        self.compute_dtype = collect.Config.compute_dtype
        self.dtype = config.dtype
        # another model, another folder
        self.digest = model_digest(config.model)[:12]
        # the task's name in the lines
        self.name, self.wrong_labels = config.task, config.wrong_labels
        if self.wrong_labels:
            self.name += f", {self.wrong_labels:.0%} wrong labels"
        self.out = Path(config.work) / f"{self.digest}-{config.dtype}" / f"{self.name}-{seed}"
        self.out.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_sampler(config.model, config.dtype)
        self.prompts = tasks.make_prompts()
        self.pairs = tasks.PAIRS / f"{config.task}-{seed}.jsonl.gz"
        if not self.pairs.exists():
            # those of most seeds are not in the repository
            self.pairs = Path(config.work) / "pairs" / self.pairs.name
            if not self.pairs.exists():
                folder = str(self.pairs.parent)
                tasks.main(tasks.Config(config.model, seed, config.dtype, folder))
        if self.wrong_labels:
            rows = swap_labels(tasks.read_rows(self.pairs), self.wrong_labels, seed)
            self.pairs = self.out / f"swapped-{self.pairs.name}"
            tasks.write_rows(self.pairs, rows)

    # what is trained, once

    def run_stage(self, stage, **settings):
        """Run a stage; its seconds are added to what the folder's stages have taken."""
        shared = {"out": str(self.out), "device": "cpu", "seed": self.seed}
        if stage is collect:
            shared["compute_dtype"] = self.compute_dtype
        name = f"{settings['method']} {stage.__name__}" if "method" in settings else stage.__name__
        self.add_seconds(name, quietly(stage, **shared, **settings))

    def add_seconds(self, name, seconds):
        path = self.out / "seconds.json"
        taken = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**taken, name: round(seconds, 1)})

    def seconds(self):
        """{folder: {stage: seconds}} of all stages that have run so far."""
        paths = sorted(self.out.rglob("seconds.json"))
        return {str(p.parent.relative_to(self.out)): json.loads(p.read_text()) for p in paths}

    def stage1(self, stage):
        name = stage.__name__
        # the last one that the stage writes
        folder = self.out / name / ("bad" if name == "dual" else "adapter")
        if not (folder / "stage.json").exists():
            positive, negative = tasks.TASKS[self.task].instructions
            source = {"model": self.model_folder, "data": [str(self.pairs)], "dtype": self.dtype}
            source |= {"positive": positive, "negative": negative}
            self.run_stage(stage, **source, **self.stage1_settings)

    def load(self, folder):
        return load_adapter(self.out / folder, self.model.base_model)

    def dual(self):
        """(good, bad) AdapterWeights."""
        self.stage1(dual)
        return self.load("dual/good"), self.load("dual/bad")

    def scit(self):
        """AdapterWeights of the instructed model."""
        self.stage1(scit)
        return self.load("scit/adapter")

    def variant(self, name, **settings):
        """The Experiment of the same pairs whose stage 1 has other settings."""
        other = copy.copy(self)
        other.out = self.out / name
        other.stage1_settings = settings
        return other

    def without_contrast(self):
        """The Experiment of the same pairs whose DUAL has no contrast, as in the paper."""
        return self.variant("without-contrast", contrast=0.0)

    def as_published(self):
        """AdapterWeights of RAHF-DUAL with the authors' settings: no contrast, LoRA on q and v,
        some blocks of the middle third, α 5."""
        targets = {"lora_targets": "q_proj,v_proj"}
        other = self.variant("published", contrast=0.0, **targets)
        if not (other.out / "dual" / "align" / "stage.json").exists():
            other.stage1(dual)
            other.run_stage(collect, method="dual", layers=["middle"])
            other.run_stage(align, method="dual", alpha=5.0, **targets)
        return other.load("dual/align")

    def aligned(self, method, layers="upper", rank=None):
        """AdapterWeights of RAHF as align.py trains it, not scaled. rank: how many directions v is
        projected on; None takes v as it is."""
        folder = self.out / method / (f"align-{layers}" + (f"-rank-{rank}" if rank else ""))
        if not (folder / "stage.json").exists():
            self.stage1({"dual": dual, "scit": scit}[method])
            if not (self.out / method / "collect" / "stage.json").exists():
                self.run_stage(collect, method=method, layers=["upper", "middle"])
            self.run_stage(
                align, method=method, layers=[layers], strength=align.STRENGTH, rank=rank
            )
            (self.out / method / "align").rename(folder)
        return load_adapter(folder, self.model.base_model)

    def dpo(self, lr, wrong_labels=0.0):
        """AdapterWeights of DPO; with wrong_labels by the loss that allows for that share."""
        name = "robust-dpo" if wrong_labels else "dpo"
        folder = self.out / f"{name}-{lr:g}"
        if not (folder / "dpo.json").exists():
            command = [sys.executable, "-m", "studies.dpo", "--model", self.model_folder]
            command += ["--data", str(self.pairs), "--to", str(folder), "--lr", str(lr)]
            command += ["--dtype", self.dtype, "--wrong-labels", str(wrong_labels)]
            steps, batch_size = dual.Config.steps, dual.Config.batch_size
            command += ["--steps", str(steps), "--batch-size", str(batch_size)]
            start = time.perf_counter()
            subprocess.run([*command, "--seed", str(self.seed)], check=True)
            self.add_seconds(f"{name} {lr:g}", time.perf_counter() - start)
        return load_adapter(folder, self.model.base_model)

    def settings(self):
        """What the stages that have run so far were told, {folder: settings}."""
        names = ["steps", "batch_size", "lr", "layers", "limit", "rank"]
        # of stage 1's losses
        names += ["contrast", "beta", "reduction", "smoothing", "anchor"]
        settings = {}
        for path in sorted(self.out.rglob("stage.json")):
            manifest = json.loads(path.read_text())
            told = {name: manifest["settings"].get(name) for name in names}
            folder = str(path.parent.relative_to(self.out))
            settings[folder] = {**told, "alpha": manifest.get("alpha")}
        return settings

    # what is measured

    def policies(self):
        """{(method, strength): function that returns its Policy}. Strength scales an adapter, or is
        the λ of arithmetic."""

        def of(weights, scale=1.0):
            return Policy([(1.0, scaled(weights, scale), "plain")])

        def weights(strength):
            return of(weight_difference(*self.dual(), strength))

        def logits(strength):
            good, bad = self.dual()
            terms = [(1.0, None, "plain"), (strength, good, "plain"), (-strength, bad, "plain")]
            return Policy(terms)

        methods = {
            "base": (lambda _: Policy(), (0.0,)),
            "base told p+": (lambda _: Policy([(1.0, None, "positive")]), (0.0,)),
            "preferred-SFT": (lambda scale: of(self.without_contrast().dual()[0], scale), (1.0,)),
            "DUAL": (lambda scale: of(self.aligned("dual"), scale), SCALES),
            # a projection of v, which in the tiny world keeps less of what wrong labels add
            "DUAL, rank 8": (lambda scale: of(self.aligned("dual", rank=8), scale), SCALES),
        }
        for lr in DPO_LRS:
            methods[f"DPO, lr {lr:g}"] = (lambda scale, lr=lr: of(self.dpo(lr), scale), DPO_SCALES)
        if self.wrong_labels:
            robust = functools.partial(self.dpo, ROBUST_LR, self.wrong_labels)
            methods["robust DPO"] = (lambda scale: of(robust(), scale), DPO_SCALES)
        methods |= {
            "weights": (weights, LAMBDAS),
            "logits": (logits, LAMBDAS),
            "DUAL, γ = 0": (
                lambda scale: of(self.without_contrast().aligned("dual"), scale),
                SCALES[1:3],
            ),
            "SCIT": (lambda scale: of(self.aligned("scit"), scale), SCALES),
            "RAHF as published": (lambda scale: of(self.as_published(), scale), (0.5, 1.0)),
        }
        policies = {}
        for method, (make_policy, strengths) in methods.items():
            for strength in strengths:
                policies[method, strength] = functools.partial(make_policy, strength)
        return policies

    def draw(self, policy, prompts, count, noise):
        """`count` Answers of a policy to each prompt."""
        positive, negative = tasks.TASKS[self.task].instructions
        encoded = encode_prompts(self.tokenizer, prompts, positive=positive, negative=negative)
        seed = noise + self.seed
        return sample_answers(
            self.model, self.tokenizer, encoded, policy, count, seed, tasks.ANSWER_TOKENS
        )

    def measure_best_of(self):
        """{n: figures} of the best of n answers of the base by the scorer itself: what could be had
        by a method that knew the reward. The KL is log n - (n - 1) / n, or less where answers tie.
        """
        start = time.perf_counter()
        drawn = self.draw(Policy(), self.prompts["test"], BEST_OF[-1], 20_000)
        rewards = np.sort(rewards_of(self.scorer, self.prompts["test"], drawn))
        figures = {}
        for n in BEST_OF:
            expected = rewards @ weights_of_best(n, BEST_OF[-1])
            figures[n] = {
                "reward": [round(float(value), 4) for value in expected],
                "kl": [round(math.log(n) - (n - 1) / n, 4)] * len(expected),
                "seconds": round(time.perf_counter() - start, 1),
            }
        return figures

    def measure(self, policy):
        """The figures of one policy on the test prompts."""
        start = time.perf_counter()
        drawn = self.draw(policy, self.prompts["test"], ANSWERS, 10_000)
        rewards = rewards_of(self.scorer, self.prompts["test"], drawn)
        answers = list(itertools.chain.from_iterable(drawn))
        bigrams = []
        for answer in answers:
            bigrams += itertools.pairwise(answer.text.split())
        unrelated = [answers[0] for answers in self.draw(policy, tasks.UNRELATED, 1, 10_000)]
        return {
            "reward": [round(float(np.mean(row)), 4) for row in rewards],
            "kl": [mean_kl(group) for group in drawn],
            "sigma": round(float(np.std(rewards)), 4),
            "distinct2": round(len(set(bigrams)) / len(bigrams), 4),
            "length": round(float(np.mean([len(answer.ids) for answer in answers])), 2),
            "ended": round(float(np.mean([answer.ended for answer in answers])), 4),
            "kl off task": mean_kl(unrelated),
            "first answers": [answer.text for answer in answers[:12:4]],
            "seconds": round(time.perf_counter() - start, 1),
        }


def mean_kl(answers):
    """The mean KL of some Answers."""
    return round(float(np.mean([answer.kl for answer in answers])), 4)


def rewards_of(scorer, prompts, drawn):
    """The rewards [P, n] of n answers to each of P prompts."""
    rewards = []
    for prompt, answers in zip(prompts, drawn):
        rewards.append([scorer(prompt, answer.text) for answer in answers])
    return np.array(rewards)


def weights_of_best(n, drawn):
    """The weights [drawn] of ascending values whose weighted sum is the expected largest of n of
    them: the k-th is the largest of C(k - 1, n - 1) of the C(drawn, n) choices."""
    choices = [math.comb(k, n - 1) for k in range(drawn)]
    return np.array(choices) / math.comb(drawn, n)


# ---------------------------------------------------------------- lines


def read_lines():
    """{(task, seed, method, strength): line} of what was measured. UserError where the lines are of
    several models."""
    if not LINES.exists():
        return {}
    whole = [text for text in LINES.read_text(encoding="utf-8").splitlines() if text.endswith("}")]
    lines = [json.loads(text) for text in whole]
    if len({line["digest"] for line in lines}) > 1:
        raise UserError(f"{LINES} has figures of several models: keep those of one")
    keys = ("task", "seed", "method", "strength")
    return {tuple(line[key] for key in keys): line for line in lines}


def append_line(line):
    """Append a line to LINES, on a new line where a run was killed while it wrote."""
    cut_off = LINES.exists() and not LINES.read_bytes().endswith(b"\n")
    with LINES.open("a", encoding="utf-8") as file:
        file.write("\n" * cut_off + json.dumps(line, ensure_ascii=False) + "\n")


def measure_missing(config, seed):
    """Measure the rows of one task and seed that have no line yet."""
    lines = read_lines()
    experiment = Experiment(config, seed)
    if any(line["digest"] != experiment.digest for line in lines.values()):
        raise UserError(f"--model {config.model}: {LINES} has figures of another model")
    same_run = [line for key, line in lines.items() if key[:2] == (experiment.name, seed)]
    if any(line["dtype"] != config.dtype for line in same_run):
        raise UserError(f"--dtype {config.dtype}: {LINES} has figures of this seed in another one")
    policies = experiment.policies()
    methods, strengths = map(set, zip(*policies))
    if unknown := set(config.methods or []) - methods - {BEST_OF_N}:
        choices = ", ".join([*sorted(methods), BEST_OF_N])
        raise UserError(f"--methods {min(unknown)}: choose from {choices}")
    if unknown := set(config.strengths or []) - strengths:
        choices = ", ".join(f"{strength:g}" for strength in sorted(strengths))
        raise UserError(f"--strengths {min(unknown):g}: choose from {choices}")
    made = {"digest": experiment.digest, "dtype": config.dtype}
    made |= {"machine": machine(), "versions": versions()}
    if not config.methods or BEST_OF_N in config.methods:
        missing = [n for n in BEST_OF if (experiment.name, seed, BEST_OF_N, n) not in lines]
        for n, figures in experiment.measure_best_of().items() if missing else ():
            if n in missing:
                line = {"task": experiment.name, "seed": seed, "method": BEST_OF_N, "strength": n}
                append_line({**line, **figures, **made})
    for (method, strength), make_policy in policies.items():
        key = (experiment.name, seed, method, strength)
        wanted = method in (config.methods or [method])
        if not wanted or strength not in (config.strengths or [strength]) or key in lines:
            continue
        policy = make_policy()
        line = {"task": experiment.name, "seed": seed, "method": method, "strength": strength}
        line["seconds of stages"] = experiment.seconds()
        line |= {**experiment.measure(policy), "settings": experiment.settings(), **made}
        append_line(line)
        reward, kl = np.mean(line["reward"]), np.mean(line["kl"])
        print(f"{key}: reward {reward:.3f}, KL {kl:.2f}", flush=True)


def main(config):
    tasks.check_task(config.task)
    if importlib.util.find_spec("trl") is None:
        raise UserError("DPO needs `pip install trl`")
    for seed in config.seeds or [0]:
        measure_missing(config, seed)


if __name__ == "__main__":
    run(main, Config)
