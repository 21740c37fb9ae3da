"""Wrong labels: a share of the training pairs of the embedded default swapped at random.

    python -m studies.wrong_labels --phase choose        settings, by validation pairs of two seeds
    python -m studies.wrong_labels --phase measure       test pairs of five other seeds at those
                                                         settings; table and figure

Validation and test pairs are clean. The first command writes wrong_labels_settings.json, the
second wrong_labels.json and .png, all in studies/results. On two free cores they take about half
an hour and an hour.

Every method but the new form gets what is best for it at each share of wrong labels: SFT its
length, the paper's RAHF its α, weight arithmetic its λ, DPO its learning rate (tried at 0% and 30%
alone). The new form has one strength ρ, one rank and one choice of layers for all shares and both
methods, chosen on two shares.
"""

import contextlib
import io
import json
import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import align
import collect
import dual
import scit
from common import toy
from common.answers import GenerationSettings, attached, generate, text_of
from common.chat import render_transcript
from common.config import run, setting
from common.data import collate, prepare_pairs, shuffled_batches
from common.hf import load_model, load_tokenizer, response_logprobs
from common.score import prompts_of
from common.stages import write_json
from common.training import cosine_with_warmup
from lora import LoRA, enable_only, load_adapter
from studies.shared import RESULTS, processor, quietly, swap_labels, weight_difference, write_result

METHODS = ("dual", "scit")
# The seeds of each phase, and how often every answer is sampled.
SEEDS = {"choose": (0, 1), "measure": (3, 4, 5, 6, 7)}
SAMPLINGS = {"choose": 1, "measure": 3}

# The shares of wrong labels, and the settings that are tried. What takes longest, DPO and the
# new form, is tried on two shares only.
SHARES = (0.0, 0.2, 0.3, 0.4)
TUNED_SHARES = (0.0, 0.3)
SFT_STEPS = (75, 150, 300, 600)
DPO_LRS = (1e-4, 3e-4, 1e-3)
DPO_STEPS = 150
# The useful strengths grow with the wrong labels: values for less than 30% of them, and for more.
LAMBDAS = ((0.5, 1.0, 2.0), (0.5, 1.0, 2.0, 4.0))
ALPHAS = {
    "dual": ((0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0, 6.0)),
    "scit": ((0.25, 0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, 4.0)),
}
PAPER_LAYERS = {"layers": ["middle"]}
FORMS = [
    {"strength": strength, "rank": 8, "layers": [layers]}
    for strength in (0.15, 0.25, 0.4)
    for layers in ("middle", "all")
]

# 97.5% quantile of Student's t, by number of seeds.
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}

# The rows of the tables.
NAMES = {
    "base": "base",
    "sft": "preferred-SFT",
    "dpo": "DPO",
    "weights": "weights: base + λ (good − bad)",
    "dual_paper": "DUAL, paper's form, best α",
    "dual_rank_only": "DUAL + rank",
    "dual_strength_only": "DUAL + ρ",
    "dual_new": "**DUAL, new form**",
    "scit_paper": "SCIT, paper's form, best α",
    "scit_strength_only": "SCIT + ρ",
    "scit_new": "**SCIT, new form**",
}
CLEAN_NAMES = {
    "base": "base",
    "sft": "preferred-SFT",
    "dual_paper": "DUAL, paper's form, best α",
    "dual_default": "**DUAL, the default**",
    "scit_paper": "SCIT, paper's form, best α",
    "scit_default": "**SCIT, the default**",
}
PLOTTED = ("sft", "dpo", "weights", "dual_paper", "dual_new", "scit_paper", "scit_new")


@dataclass
class Config:
    phase: Literal["choose", "measure"] = setting(
        "measure", "choose settings on validation pairs, or measure on test pairs"
    )
    seeds: list[int] | None = setting(
        None, "empty takes 0 1 to choose and 3 4 5 6 7 to measure", group="run"
    )
    work: str = setting("/tmp/rahf-wrong-labels", "folder of the stages, reused", group="run")
    workers: int = setting(2, "processes, of one thread each", minimum=1, group="run")


# ---------------------------------------------------------------- one seed, one share


def dpo_loss(model, adapter, pairs, pad_id, beta=0.1):
    """The DPO loss (Rafailov et al. 2023), mean over the pairs; π sums over tokens:

    -log σ( β [log π(r_h)/π_base(r_h) - log π(r_l)/π_base(r_l)] )
    """
    examples = [pair.input("plain", "chosen") for pair in pairs]
    examples += [pair.input("plain", "rejected") for pair in pairs]
    batch = collate(examples, pad_id)
    logprob = response_logprobs(model, batch)[0].sum(1)  # [2n]
    with torch.no_grad(), enable_only([], among=[adapter]):
        base_logprob = response_logprobs(model, batch)[0].sum(1)
    chosen, rejected = (logprob - base_logprob).view(2, -1)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


class Experiment:
    """One seed and one share of wrong labels: all that is trained and scored on it."""

    def __init__(self, config, seed, share, world_config=None):
        """world_config: toy.Config of a smaller world, for tests."""
        seed_folder = Path(config.work) / f"seed{seed}"
        self.seed = seed
        self.out = seed_folder / f"wrong{share}"
        self.out.mkdir(parents=True, exist_ok=True)
        world_config = world_config or toy.Config(out=str(seed_folder), seed=seed, device="cpu")
        world = toy.ensure_world(world_config)
        source_lines = Path(world["data"][0]).read_text().splitlines()
        rows = [json.loads(line) for line in source_lines]
        lines = [json.dumps(row) + "\n" for row in swap_labels(rows, share, seed)]
        (self.out / "pairs.jsonl").write_text("".join(lines))
        self.source = {"model": world["model"], "data": [str(self.out / "pairs.jsonl")]}

        self.tokenizer = load_tokenizer(world["model"])
        self.model = load_model(world["model"], "float32", "cpu")
        split = "valid" if config.phase == "choose" else "test"
        with contextlib.redirect_stdout(io.StringIO()):
            data = self.source["data"]
            pairs = prepare_pairs(data, ("train", split), self.tokenizer, 256, seed)
        self.train_pairs, self.pairs = pairs["train"], pairs[split]
        self.samplings = SAMPLINGS[config.phase]

    def run_stage(self, stage, **settings):
        later = toy.LATER_OF_SCIT if settings.get("method") == "scit" else toy.LATER
        suited = getattr(stage.Config, "embedded_default", None) or later[stage.__name__]
        if "alpha" in settings:
            suited = {name: value for name, value in suited.items() if name != "strength"}
        quietly(stage, out=str(self.out), device="cpu", **{**suited, **settings})

    def prepare(self):
        """Stage 1 and the collection of both methods, once."""
        if (self.out / "scit" / "collect").is_dir():
            return
        for stage in (dual, scit):
            self.run_stage(stage, seed=self.seed, **self.source)
        for method in METHODS:
            self.run_stage(collect, method=method, layers=["all"])

    def train(self, loss_of, lr, steps, batch_size=16):
        """The weights of an adapter trained by loss_of(adapter, pairs), as dual.py would."""
        torch.manual_seed(self.seed)
        adapter = LoRA(self.model.base_model)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_with_warmup(steps))
        lengths = [pair.length("plain", "chosen") for pair in self.train_pairs]
        batches = shuffled_batches(lengths, batch_size, self.seed)
        for _ in range(steps):
            loss_of(adapter, [self.train_pairs[i] for i in next(batches)]).backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        adapter.remove()
        return adapter.weights()

    def sft(self, steps):
        def loss_of(adapter, pairs):
            examples = [pair.input("plain", "chosen") for pair in pairs]
            batch = collate(examples, self.tokenizer.pad_token_id)
            logprobs, mask = response_logprobs(self.model, batch)
            return -logprobs.sum() / mask.sum()

        return self.train(loss_of, toy.DUAL["lr"], steps)

    def dpo(self, lr):
        def loss_of(adapter, pairs):
            return dpo_loss(self.model, adapter, pairs, self.tokenizer.pad_token_id)

        return self.train(loss_of, lr, DPO_STEPS)

    def rahf(self, method, **settings):
        self.run_stage(align, method=method, **settings)
        return load_adapter(self.out / method / "align", self.model.base_model)

    def weights(self, strength):
        good = load_adapter(self.out / "dual" / "good", self.model.base_model)
        bad = load_adapter(self.out / "dual" / "bad", self.model.base_model)
        return weight_difference(good, bad, strength)

    def score(self, weights):
        """The judge's verdict on the answer to every prompt as text, a "1" or "0" each: for the
        greedy answers, and for one or three samplings at temperature 1."""
        verdicts = []
        prompts = prompts_of(self.pairs, "plain")
        with attached(self.model, weights):
            for i in range(1 + self.samplings):
                generation = GenerationSettings(
                    max_new_tokens=64, batch_size=len(prompts), seed=1000 * self.seed + i
                )
                answers = generate(self.model, self.tokenizer, prompts, generation, sample=i > 0)
                verdicts.append("".join(map(self.verdict, self.pairs, answers)))
        return {"greedy": verdicts[0], "sampled": verdicts[1:]}

    def verdict(self, pair, answer):
        prompt = render_transcript(pair.pair.prompt)
        return str(int(toy.judge(prompt, text_of(self.tokenizer, answer))))


# ---------------------------------------------------------------- the two phases


class Scores(dict):
    """{name of a model: its verdicts}, kept in a file as they are made: an interrupted study
    resumes after the last one."""

    def __init__(self, experiment, phase, settings):
        self.experiment = experiment
        self.path = experiment.out / f"{phase}.json"
        self.settings = settings
        if self.path.exists():
            kept = json.loads(self.path.read_text())
            if kept["settings"] == settings:
                self.update(kept["scores"])

    def add(self, name, train=None, *args, **settings):
        """Score the adapter that train(*args, **settings) returns; without train, the base."""
        if name in self:
            return
        self[name] = self.experiment.score(train(*args, **settings) if train else None)
        write_json(self.path, {"settings": self.settings, "scores": self})


def try_settings(experiment, share, scores):
    """Score all settings that are tried at a share of wrong labels."""
    many_wrong = share >= 0.3
    tuned = share in TUNED_SHARES
    scores.add("base")
    for value in LAMBDAS[many_wrong]:
        scores.add(f"weights {value:g}", experiment.weights, value)
    for value in SFT_STEPS:
        scores.add(f"sft {value:g}", experiment.sft, value)
    for value in DPO_LRS if tuned else ():
        scores.add(f"dpo {value:g}", experiment.dpo, value)
    for method in METHODS:
        for value in ALPHAS[method][many_wrong]:
            paper = {"alpha": value, **PAPER_LAYERS}
            scores.add(f"{method} {value:g}", experiment.rahf, method, **paper)
        for form in FORMS if tuned else ():
            scores.add(form_name(method, form), experiment.rahf, method, **form)


def form_name(method, form):
    return f"{method} form {json.dumps(form)}"


def measure_chosen(experiment, share, scores, settings):
    """Score all models of the tables at the chosen settings."""
    best, form = settings["shares"][str(share)], settings["form"]
    rahf = experiment.rahf
    scores.add("base")
    scores.add("sft", experiment.sft, best["sft"])
    # from the paper's form to the new one, change by change
    for method in METHODS:
        paper = {"alpha": best[method], **PAPER_LAYERS}
        strength_only = {"strength": form["strength"], **PAPER_LAYERS}
        scores.add(f"{method}_paper", rahf, method, **paper)
        scores.add(f"{method}_new", rahf, method, **form)
        scores.add(f"{method}_strength_only", rahf, method, **strength_only)
    rank_only = {"alpha": best["dual"], "rank": form["rank"], **PAPER_LAYERS}
    scores.add("dual_rank_only", rahf, "dual", **rank_only)
    scores.add("dpo", experiment.dpo, best["dpo"])
    scores.add("weights", experiment.weights, best["weights"])
    for method in METHODS if share == 0 else ():
        # what `python align.py` does without settings
        scores.add(f"{method}_default", rahf, method)


def run_experiment(config, seed, share, settings):
    """{name: verdicts} of one seed and one share; settings: the chosen ones, None to choose."""
    torch.set_num_threads(1)
    experiment = Experiment(config, seed, share)
    experiment.prepare()
    scores = Scores(experiment, config.phase, settings)
    if config.phase == "choose":
        try_settings(experiment, share, scores)
    else:
        measure_chosen(experiment, share, scores, settings)
    print(f"seed {seed}, {share:.0%} wrong (greedy, sampled):")
    for name, score in scores.items():
        print(f"    {name}: {mean(score['greedy']):.2f}, {mean(*score['sampled']):.2f}", flush=True)
    return dict(scores)


# ---------------------------------------------------------------- choosing and summing up


def mean(*verdicts):
    """The share of "1" in some texts of "1" and "0"."""
    return sum(text.count("1") for text in verdicts) / sum(map(len, verdicts))


def choose_settings(results):
    """The best settings on validation pairs: {"form": form, "shares": {share: {name: value}}}.

    results: {seed: {share: {name: verdicts}}}. The best has the highest (greedy + sampled) / 2,
    averaged over seeds.
    """
    shares = list(next(iter(results.values())))
    tuned = [str(share) for share in TUNED_SHARES]

    def value_of(name, share):
        scores = [results[seed][share][name] for seed in results]
        total = sum(mean(score["greedy"]) + mean(*score["sampled"]) for score in scores)
        return total / 2 / len(scores)

    def best(name, values, share):
        best_value = max(values, key=lambda value: value_of(f"{name} {value:g}", share))
        if best_value in (values[0], values[-1]):
            print(f"{share}: {name} {best_value:g} is at the edge of {values}")
        return best_value

    def value_of_form(form):
        names = [form_name(method, form) for method in METHODS]
        return sum(value_of(name, share) for name in names for share in tuned)

    chosen = {}
    for share in shares:
        many_wrong = float(share) >= 0.3
        chosen[share] = {
            "sft": best("sft", SFT_STEPS, share),
            "weights": best("weights", LAMBDAS[many_wrong], share),
            # tried on two shares: any wrong labels take what is best at the second
            "dpo": best("dpo", DPO_LRS, tuned[float(share) > 0]),
        }
        for method in METHODS:
            chosen[share][method] = best(method, ALPHAS[method][many_wrong], share)
    return {"form": max(FORMS, key=value_of_form), "shares": chosen}


def interval(values):
    """Mean and 95% interval, [mean, low, high], of float [seeds, items].

    By Student's t over the seeds' means, which vary with the seed and with its items.
    """
    means = values.mean(1)
    half = math.nan
    if len(means) > 1:
        half = STUDENT[len(means)] * means.std(ddof=1) / math.sqrt(len(means))
    return [round(float(x), 4) for x in (means.mean(), means.mean() - half, means.mean() + half)]


def right_answers(score, decoding):
    """For each item the share of its answers that are right: float [items]."""
    runs = [score["greedy"]] if decoding == "greedy" else score["sampled"]
    return np.mean([np.array(list(run), dtype=float) for run in runs], 0)


def summarize(results):
    """{share: {model: {"greedy" | "sampled" | "greedy_minus_sft" | "sampled_minus_sft":
    [mean, low, high]}}} of {seed: {share: {name: verdicts}}}."""

    def right(share, name, decoding):
        rows = [right_answers(result[share][name], decoding) for result in results.values()]
        return np.array(rows)  # [seeds, items]

    table = {}
    for share, models in next(iter(results.values())).items():
        table[share] = {name: {} for name in models}
        for name, row in table[share].items():
            for decoding in ("greedy", "sampled"):
                values = right(share, name, decoding)
                row[decoding] = interval(values)
                row[f"{decoding}_minus_sft"] = interval(values - right(share, "sft", decoding))
    return table


# ---------------------------------------------------------------- tables and figure


def cell(middle, low, high):
    return f"{middle:.2f} ± {(high - low) / 2:.2f}"


def markdown(table, key="sampled"):
    """A table with a row a model and a column a share: mean ± half of the interval."""
    titles = [f"{float(share):.0%} wrong" for share in table]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(table) + 1) + "|"]
    for name, label in NAMES.items():
        cells = [cell(*table[share][name][key]) for share in table]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def clean_markdown(table):
    """The table of the defaults: clean labels, greedy and sampled."""
    lines = ["| | greedy | T = 1 |", "|---|---|---|"]
    for name, label in CLEAN_NAMES.items():
        row = table["0.0"][name]
        lines.append(f"| {label} | {cell(*row['greedy'])} | {cell(*row['sampled'])} |")
    return "\n".join(lines)


def draw_figure(table, path):
    """Right and polite answers against the share of wrong labels, with the intervals."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    shares = np.array([float(share) for share in table])
    for axis, decoding, title in zip(axes, ("greedy", "sampled"), ("greedy", "temperature 1")):
        for i, name in enumerate(PLOTTED):
            middle, low, high = np.array([table[share][name][decoding] for share in table]).T
            axis.errorbar(
                # beside one another, so that the intervals can be told apart
                shares + 0.004 * (i - 3),
                middle,
                [middle - low, high - middle],
                label=NAMES[name].strip("*"),
                marker="o",
                markersize=4,
                capsize=2,
                linestyle="--" if "paper" in name else "-",
            )
        axis.set(title=title, xlabel="share of training labels swapped", ylim=(0, 1.03))
    axes[0].set_ylabel("right and polite answers")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- the study


def run_all(config, seeds, settings):
    """{seed: {share: {name: verdicts}}}, seeds and shares as text, from several processes."""
    for seed in seeds:
        # before two processes would train the same base
        toy.ensure_world(toy.Config(out=f"{config.work}/seed{seed}", seed=seed, device="cpu"))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, mp_context=spawn) as pool:
        jobs = {}
        for share in SHARES:
            for seed in seeds:
                jobs[seed, share] = pool.submit(run_experiment, config, seed, share, settings)
        try:
            for job in as_completed(jobs.values()):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    results = {}
    for seed in seeds:
        results[str(seed)] = {str(share): jobs[seed, share].result() for share in SHARES}
    return results


def rounded_scores(results):
    """{seed: {share: {name: [greedy, sampled]}}}."""
    table = {}
    for seed, shares in results.items():
        table[seed] = {}
        for share, scores in shares.items():
            table[seed][share] = {}
            for name, score in scores.items():
                figures = [mean(score["greedy"]), mean(*score["sampled"])]
                table[seed][share][name] = [round(figure, 4) for figure in figures]
    return table


def main(config):
    seeds = config.seeds or list(SEEDS[config.phase])
    made = {"machine": f"{config.workers} processes of one thread, {processor()}", "seeds": seeds}
    if config.phase == "choose":
        results = run_all(config, seeds, None)
        settings = choose_settings(results)
        print(json.dumps(settings, indent=2))
        scores = {"greedy and sampled": rounded_scores(results)}
        write_result("wrong_labels_settings", {**made, "settings": settings, **scores})
        return
    settings = json.loads((RESULTS / "wrong_labels_settings.json").read_text())["settings"]
    results = run_all(config, seeds, settings)
    table = summarize(results)
    result = {"settings": settings, "summary": table, "verdicts": results}
    write_result("wrong_labels", {**made, **result})
    for key in ("greedy", "greedy_minus_sft", "sampled", "sampled_minus_sft"):
        print(f"\n{key}\n{markdown(table, key)}")
    print(f"\n{clean_markdown(table)}")
    try:
        draw_figure(table, RESULTS / "wrong_labels.png")
    except ImportError:
        print("no figure: matplotlib is not installed")


if __name__ == "__main__":
    run(main, Config)
