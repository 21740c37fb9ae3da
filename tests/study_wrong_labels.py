"""Wrong labels on the embedded default: a share of the training pairs swapped at random, validation and test pairs clean.

    python tests/study_wrong_labels.py --phase choose       seeds of their own, validation pairs: the settings
    python tests/study_wrong_labels.py --phase measure      fresh seeds, test pairs, at those settings; table and figure

The first writes tests/results/wrong_labels_settings.json, the second tests/results/wrong_labels.json. About half an hour
and an hour on two free cores. Every method but the new form gets what is best for it at each share of wrong labels: SFT its
length, DPO its learning rate, the paper's RAHF its α, weight arithmetic its λ. The new form has one strength ρ, one rank
and one choice of layers for all shares and both methods, chosen on two shares.
"""
import contextlib
import io
import json
import math
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

import align
import collect
import data
import dual
import scit
import toy
from files import run, setting, versions, write_json
from lora import Factors, LoRA, load_adapter, only, stack
from model import load_model, load_tokenizer, response_logprobs
from score import generate, text_of

RESULTS = Path(__file__).parent / "results"
METHODS, TUNED = ("dual", "scit"), (0.0, 0.3)
STEPS, LRS = (75, 150, 300, 600), (1e-4, 3e-4, 1e-3)       # of SFT; of DPO, chosen on the shares TUNED: at .2 and .4 it has that of .3
LAMBDAS = (0.5, 1.0, 2.0), (0.5, 1.0, 2.0, 4.0)            # for few and for many wrong labels: with them the useful strength grows
ALPHAS = {"dual": ((0.5, 1.0, 2.0, 4.0), (0.5, 1.0, 2.0, 4.0, 6.0)), "scit": ((0.25, 0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, 4.0))}
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}        # 97.5% quantile of t, by number of seeds
FORMS = [{"strength": strength, "rank": 8, "layers": [layers]} for strength in (0.15, 0.25, 0.4) for layers in ("middle", "all")]


@dataclass
class Config:
    phase: Literal["choose", "measure"] = setting("measure", "choose settings on validation pairs, or measure on test pairs")
    seeds: list[int] | None = field(default=None, metadata={"help": "empty: 0 1 to choose, 3 4 5 6 7 to measure"})
    shares: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.3, 0.4], metadata={"help": "shares of wrong labels"})
    work: str = setting("/tmp/rahf-wrong-labels", "folder of the stages, reused")
    workers: int = setting(2, "processes, of one thread each", least=1)


def swap(rows, share, seed):
    """The rows with chosen and rejected exchanged in a random share of the training ones."""
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    wrong = set(random.Random(seed).sample(train, round(share * len(train))))
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} if i in wrong else row for i, row in enumerate(rows)]


def dpo_loss(model, adapter, pairs, pad_id, beta=0.1):
    """-log σ(β [log π(r_h)/π_base(r_h) - log π(r_l)/π_base(r_l)]) with sums over tokens (Rafailov et al. 2023), mean over the pairs."""
    batch = data.collate([pair.example("plain", response) for response in ("chosen", "rejected") for pair in pairs], pad_id)
    ratio = response_logprobs(model, batch)[0].sum(1)
    with torch.no_grad(), only([adapter]):
        reference = response_logprobs(model, batch)[0].sum(1)
    chosen, rejected = (ratio - reference).view(2, -1)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def difference(good, bad, strength):
    """Weights of base + λ (good - bad) as one adapter."""
    return stack(Factors(good.weights, good.rank, good.alpha * strength), Factors(bad.weights, bad.rank, -bad.alpha * strength))


class Unit:
    """One seed and one share of wrong labels: both first stages and both collections, and what is trained and scored on them."""

    def __init__(self, config, seed, share, world=None):
        self.seed, out = seed, Path(config.work) / f"seed{seed}"
        self.out = out / f"wrong{share}"
        made = toy.ensure(world or toy.Config(out=str(out), seed=seed, device="cpu"))
        self.source = {"model": made["model"], "data": [str(self.out / "pairs.jsonl")]}
        self.out.mkdir(exist_ok=True)
        rows = [json.loads(line) for line in open(made["data"][0])]
        Path(self.source["data"][0]).write_text("".join(json.dumps(row) + "\n" for row in swap(rows, share, seed)))
        self.tokenizer, self.model = load_tokenizer(made["model"]), load_model(made["model"], torch.float32, "cpu")
        split = "valid" if config.phase == "choose" else "test"
        self.samplings = 1 if config.phase == "choose" else 3
        with contextlib.redirect_stdout(io.StringIO()):
            pairs = data.prepare(self.source["data"], ("train", split), self.tokenizer, 256, seed)
        self.train_pairs, self.pairs = pairs["train"], pairs[split]

    def stage(self, module, **settings):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            module.main(module.Config(out=str(self.out), device="cpu", **settings))

    def first_stages(self):
        if (self.out / "scit" / "collect").is_dir():
            return
        self.stage(dual, seed=self.seed, **self.source)
        self.stage(scit, seed=self.seed, **self.source)
        for method in ("dual", "scit"):
            self.stage(collect, method=method, layers=["all"])

    def trained(self, loss_of, lr, steps, size=16):
        """An adapter trained with loss_of(adapter, pairs); schedule and size as in dual.py."""
        torch.manual_seed(self.seed)
        adapter = LoRA(self.model.base_model)
        optimizer, warm_up = torch.optim.AdamW(adapter.parameters(), lr=lr, weight_decay=0.0), max(1, steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps))))
        draws = data.endless_batches([pair.length("plain", "chosen") for pair in self.train_pairs], size, self.seed)
        for _ in range(steps):
            loss_of(adapter, [self.train_pairs[i] for i in next(draws)]).backward()
            torch.nn.utils.clip_grad_norm_(adapter.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        adapter.remove()
        return adapter.factors()

    def sft(self, steps):
        def loss(adapter, pairs):
            nll, tokens = dual.response_nll(self.model, pairs, "chosen", self.tokenizer.pad_token_id)
            return nll / tokens
        return self.trained(loss, dual.Config.lr, steps)

    def dpo(self, lr):
        return self.trained(lambda adapter, pairs: dpo_loss(self.model, adapter, pairs, self.tokenizer.pad_token_id), lr, 150)

    def rahf(self, method, **settings):
        self.stage(align, method=method, **{name: [value] if name in ("alpha", "strength") else value for name, value in settings.items()})
        return load_adapter(self.out / method / "align", self.model.base_model)

    def weights(self, strength):
        good, bad = (load_adapter(self.out / "dual" / name, self.model.base_model) for name in ("good", "bad"))
        return difference(good, bad, strength)

    def score(self, factors):
        """The judge's verdict on every answer, "1" or "0": greedy, and sampled at temperature 1 with one seed or three."""
        adapter = LoRA(self.model.base_model, factors=factors).eval() if factors else None
        found = []
        for i in range(1 + self.samplings):
            answers = generate(self.model, self.tokenizer, [pair.prompts["plain"].tolist() for pair in self.pairs], i > 0, 64, len(self.pairs), 1000 * self.seed + i)
            found.append("".join(str(int(toy.judge(data.render(pair.pair.prompt), text_of(self.tokenizer, answer))))
                                 for pair, answer in zip(self.pairs, answers)))
        if adapter:
            adapter.remove()
        return {"greedy": found[0], "sampled": found[1:]}


PAPER = {"layers": ["middle"]}


def unit(config, seed, share, settings):
    """All scores of a seed and a share, {name: verdicts}, kept in the work folder as they are done."""
    torch.set_num_threads(1)
    u = Unit(config, seed, share)
    path = u.out / f"{config.phase}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    found = kept["scores"] if kept.get("settings") == settings and kept else {}
    u.first_stages()

    def add(name, make, *args, **arguments):
        if name not in found:
            found[name] = u.score(make(*args, **arguments))
            write_json(path, {"settings": settings, "scores": found})
    add("base", lambda: None)
    if config.phase == "choose":
        both = share in TUNED                                # what costs most is chosen on two shares
        for x in LAMBDAS[share >= 0.3]:
            add(f"weights {x:g}", u.weights, x)
        for x in STEPS:
            add(f"sft {x:g}", u.sft, x)
        for x in LRS if both else ():
            add(f"dpo {x:g}", u.dpo, x)
        for method in METHODS:
            for x in ALPHAS[method][share >= 0.3]:
                add(f"{method} {x:g}", u.rahf, method, alpha=x, **PAPER)
            for form in FORMS if both else ():
                add(f"{method} form {json.dumps(form)}", u.rahf, method, **form)
    else:
        best, form = settings["shares"][str(share)], settings["form"]
        add("sft", u.sft, best["sft"])
        for method in METHODS:                               # from the paper's form to the new one, change by change
            add(f"{method}_paper", u.rahf, method, alpha=best[method], **PAPER)
            add(f"{method}_new", u.rahf, method, **form)
            add(f"{method}_strength_only", u.rahf, method, strength=form["strength"], **PAPER)
        add("dual_rank_only", u.rahf, "dual", alpha=best["dual"], rank=form["rank"], **PAPER)
        add("dpo", u.dpo, best["dpo"])
        add("weights", u.weights, best["weights"])
        for method in METHODS if share == 0 else ():         # what `python align.py` does when nothing is said
            add(f"{method}_default", u.rahf, method)
    print(f"seed {seed}, {share:.0%} wrong: " + ", ".join(f"{name} {mean(s['greedy']):.2f}/{mean(*s['sampled']):.2f}" for name, s in found.items()), flush=True)
    return found


def mean(*verdicts):
    return sum(v.count("1") for v in verdicts) / sum(map(len, verdicts))


def choose(units):
    """The best settings by (greedy + sampled) / 2 on the validation pairs, mean over seeds. {"form", "shares": {share: {name: value}}}"""
    shares = list(next(iter(units.values())))

    def value(name, share):
        scores = [units[seed][share][name] for seed in units]
        return sum(mean(s["greedy"]) + mean(*s["sampled"]) for s in scores) / 2 / len(scores)

    def best(name, values, share):
        found = max(values, key=lambda x: value(f"{name} {x:g}", share))
        if found in (values[0], values[-1]):
            print(f"{share}: {name} {found:g} is at the edge of {values}")
        return found
    tuned = [str(share) for share in TUNED]
    form = max(FORMS, key=lambda form: sum(value(f"{method} form {json.dumps(form)}", share) for method in METHODS for share in tuned))
    chosen = {}
    for share in shares:
        wrong = float(share) >= 0.3
        chosen[share] = {"sft": best("sft", STEPS, share), "weights": best("weights", LAMBDAS[wrong], share),
                         "dpo": best("dpo", LRS, tuned[float(share) > 0]), **{method: best(method, ALPHAS[method][wrong], share) for method in METHODS}}
    return {"form": form, "shares": chosen}


def interval(values):
    """Mean and 95% interval by Student's t over the seeds' means, which vary with the seed and with its items. values: float [seeds, items]."""
    means = values.mean(1)
    half = STUDENT[len(means)] * means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return [round(float(x), 4) for x in (means.mean(), means.mean() - half, means.mean() + half)]


def summary(units):
    """{share: {model: {greedy | sampled | greedy_minus_sft | sampled_minus_sft: [mean, low, high]}}}."""
    def verdicts(share, name, how):                          # [seeds, items]: the part of the answers to an item that is right
        scores = [unit[share][name] for unit in units.values()]
        runs = [[score["greedy"]] if how == "greedy" else score["sampled"] for score in scores]
        return np.array([np.mean([[int(verdict) for verdict in run] for run in seed], 0) for seed in runs])
    table = {}
    for share, models in next(iter(units.values())).items():
        table[share] = {name: {} for name in models}
        for name, row in table[share].items():
            for how in ("greedy", "sampled"):
                ours = verdicts(share, name, how)
                row[how], row[f"{how}_minus_sft"] = interval(ours), interval(ours - verdicts(share, "sft", how))
    return table


NAMES = {"base": "base", "sft": "preferred-SFT", "dpo": "DPO", "weights": "weights: base + λ (good − bad)",
         "dual_paper": "DUAL, paper's form, best α", "dual_rank_only": "DUAL + rank", "dual_strength_only": "DUAL + ρ", "dual_new": "**DUAL, new form**",
         "scit_paper": "SCIT, paper's form, best α", "scit_strength_only": "SCIT + ρ", "scit_new": "**SCIT, new form**"}
CLEAN = ("base", "sft", "dual_paper", "dual_default", "scit_paper", "scit_default")


def cell(middle, low, high):
    return f"{middle:.2f} ± {(high - low) / 2:.2f}"


def clean_markdown(table):
    """The README's table of the defaults: clean labels, greedy and sampled."""
    names = {**NAMES, "dual_default": "**DUAL, the default**", "scit_default": "**SCIT, the default**"}
    rows = ["| | greedy | T = 1 |", "|---|---|---|"]
    return "\n".join(rows + [f"| {names[name]} | {cell(*table['0.0'][name]['greedy'])} | {cell(*table['0.0'][name]['sampled'])} |" for name in CLEAN])


def markdown(table, key="sampled"):
    """The README's table: a row a model, a column a share, mean ± half of the interval."""
    rows = ["| | " + " | ".join(f"{float(share):.0%} wrong" for share in table) + " |", "|---" * (len(table) + 1) + "|"]
    for name, label in NAMES.items():
        rows.append(f"| {label} | " + " | ".join(cell(*table[share][name][key]) for share in table) + " |")
    return "\n".join(rows)


def figure(table, path):
    """Share of right and polite answers against the share of wrong labels, with the intervals."""
    from matplotlib import pyplot
    plot, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, how in zip(axes, ("greedy", "sampled")):
        for i, name in enumerate(("sft", "dpo", "weights", "dual_paper", "dual_new", "scit_paper", "scit_new")):
            x = np.array([float(share) for share in table]) + 0.004 * (i - 3)
            middle, low, high = np.array([table[share][name][how] for share in table]).T
            axis.errorbar(x, middle, [middle - low, high - middle], label=NAMES[name].strip("*"), marker="o", markersize=4, capsize=2, linestyle="--" if "paper" in name else "-")
        axis.set(title={"greedy": "greedy", "sampled": "temperature 1"}[how], xlabel="share of training labels swapped", ylim=(0, 1.03))
    axes[0].set_ylabel("right and polite answers")
    axes[0].legend(fontsize=8)
    plot.savefig(path, dpi=110)


def main(config):
    seeds = config.seeds or ([0, 1] if config.phase == "choose" else [3, 4, 5, 6, 7])
    settings = json.loads((RESULTS / "wrong_labels_settings.json").read_text())["settings"] if config.phase == "measure" else None
    for seed in seeds:                                       # before two processes would train the same base
        toy.ensure(toy.Config(out=f"{config.work}/seed{seed}", seed=seed, device="cpu"))
    units = {str(seed): {} for seed in seeds}
    with ProcessPoolExecutor(config.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = {pool.submit(unit, config, seed, share, settings): (str(seed), str(share)) for share in config.shares for seed in seeds}
        try:
            for job in as_completed(jobs):
                seed, share = jobs[job]
                units[seed][share] = job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    units = {seed: {share: row[share] for share in sorted(row)} for seed, row in units.items()}
    cpu = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown") if os.path.exists("/proc/cpuinfo") else "unknown"
    made = {"command": "python " + " ".join(sys.argv), "machine": f"{config.workers} processes of one thread, {cpu}", "versions": versions(), "seeds": seeds}
    if config.phase == "choose":
        scores = {seed: {share: {name: [round(mean(s["greedy"]), 4), round(mean(*s["sampled"]), 4)] for name, s in found.items()} for share, found in row.items()}
                  for seed, row in units.items()}
        write_json(RESULTS / "wrong_labels_settings.json", {**made, "settings": choose(units), "greedy and sampled": scores})
        print((RESULTS / "wrong_labels_settings.json").read_text().partition('"greedy and sampled"')[0])
        return
    table = summary(units)
    write_json(RESULTS / "wrong_labels.json", {**made, "settings": settings, "summary": table, "verdicts": units})
    for key in next(iter(table["0.0"].values())):
        print(f"\n{key}\n{markdown(table, key)}")
    print(f"\n{clean_markdown(table)}")
    try:
        figure(table, RESULTS / "wrong_labels.png")
    except ImportError:
        print("no figure: matplotlib is not installed")


if __name__ == "__main__":
    run(main, Config)
