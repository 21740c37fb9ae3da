"""The table and the figure of studies/frontier.py: reward over KL, and who is ahead of DPO.

    python -m studies.frontier_report      writes studies/results/frontier.json and frontier.png

Methods are compared at the same KL: the reward of each is interpolated between its strengths. The
rival is the DPO whose learning rate is best at that KL on the first seed; other seeds need no more
than that one.
"""

import math
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from common.config import UserError, run
from studies.frontier import LINES, read_lines
from studies.shared import RESULTS, write_result

# The KL in nats at which methods are compared.
BUDGETS = (1.0, 2.0, 5.0, 10.0)


@dataclass
class Config:
    """No settings: everything that was measured is reported."""


def at_budget(rewards, kls, budget):
    """The reward of a method at a KL, by interpolation between its strengths; None out of reach.

    rewards, kls: the mean of each strength, the base's first (KL 0). Near the base reward grows as
    sqrt(KL), so it is taken as linear in sqrt(KL).
    """
    order = np.argsort(kls)
    if budget > kls[order[-1]]:
        return None
    return float(np.interp(math.sqrt(budget), np.sqrt(kls[order]), rewards[order]))


class Figures:
    """What was measured for one task: rewards and KLs by prompt.

    lines: {(seed, method, strength): line}; strengths: {method: {strength: seeds}}; everything: the
    indices of all prompts.
    """

    def __init__(self, lines, task):
        """lines: as read_lines returns them."""
        self.lines = {key[1:]: line for key, line in lines.items() if key[0] == task}
        self.strengths = defaultdict(dict)
        for seed, method, strength in self.lines:
            self.strengths[method].setdefault(strength, []).append(seed)
        self.everything = np.arange(len(next(iter(self.lines.values()))["reward"]))

    def seeds(self, method):
        """The seeds for which something of a method was measured, and the base."""
        measured = {seed for seeds in self.strengths[method].values() for seed in seeds}
        return sorted(measured & set(self.strengths["base"][0.0]))

    def curve(self, method, seed, prompts):
        """(rewards, KLs) over some prompts of the base and of the strengths that were measured of a
        method on a seed."""
        lines = [self.lines[seed, "base", 0.0]]
        for strength, seeds in self.strengths[method].items():
            if seed in seeds:
                lines.append(self.lines[seed, method, strength])
        rewards = np.array([np.array(line["reward"])[prompts].mean() for line in lines])
        return rewards, np.array([np.array(line["kl"])[prompts].mean() for line in lines])

    def seeds_that_reach(self, method, budget):
        """The seeds on which a method's strengths go as far as a KL."""
        curves = {seed: self.curve(method, seed, self.everything) for seed in self.seeds(method)}
        return [seed for seed, curve in curves.items() if at_budget(*curve, budget) is not None]

    def reward_at(self, budget, method, seeds, draws=500):
        """(mean, standard error, draws) of a method's reward at a KL, seeds pooled; None where
        there are no seeds. The prompts are drawn anew for each draw of the bootstrap, alike for all
        methods."""
        rng = np.random.default_rng(0)
        n_prompts = len(self.everything)
        samples = [self.everything, *rng.integers(n_prompts, size=(draws, n_prompts))]
        values = []
        for prompts in samples:
            curves = [self.curve(method, seed, prompts) for seed in seeds]
            rewards = [at_budget(*curve, budget) for curve in curves]
            values.append(np.mean(rewards) if rewards and None not in rewards else None)
        drawn = [value for value in values[1:] if value is not None]
        # a method that barely reaches the KL does not on every draw
        if values[0] is None or len(drawn) < 0.9 * draws:
            return None
        return float(values[0]), float(np.std(drawn)), values[1:]


def difference(ours, theirs):
    """(mean, low, high) of the paired difference of two results of reward_at, 95% interval."""
    pairs = zip(ours[2], theirs[2])
    drawn = [a - b for a, b in pairs if a is not None and b is not None]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ours[0] - theirs[0], float(low), float(high)


def rows_of(figures):
    """The rows of the table: what was measured of each method and strength, seeds pooled."""
    rows = []
    for method, strengths in figures.strengths.items():
        for strength, seeds in sorted(strengths.items()):
            lines = [figures.lines[seed, method, strength] for seed in seeds]
            base = [figures.lines[seed, "base", 0.0] for seed in seeds]
            reward = np.mean([np.mean(line["reward"]) for line in lines])
            per_prompt = np.mean([line["reward"] for line in lines], 0)
            kl = np.mean([np.mean(line["kl"]) for line in lines])
            gain = reward - np.mean([np.mean(line["reward"]) for line in base])
            sigma = np.mean([line["sigma"] for line in base])
            efficiency = gain / (sigma * math.sqrt(2 * kl)) if kl > 0.01 else None
            row = {"method": method, "strength": strength, "seeds": seeds}
            row |= {"reward": float(reward), "kl": float(kl), "efficiency": efficiency}
            row["error"] = float(per_prompt.std(ddof=1) / math.sqrt(len(per_prompt)))
            for name in ("distinct2", "length", "ended", "kl off task"):
                # the best of n has none of them
                values = [line[name] for line in lines if name in line]
                row[name] = float(np.mean(values)) if values else None
            rows.append(row)
    return rows


def best_dpo(figures, methods, budget):
    """The DPO that is best at a KL on the first seed, or None where none reaches it."""
    first = figures.seeds("base")[0]
    rewards = {}
    for method in methods:
        if "DPO" in method and first in figures.seeds_that_reach(method, budget):
            curve = figures.curve(method, first, figures.everything)
            rewards[method] = at_budget(*curve, budget)
    return max(rewards, key=rewards.get, default=None)


def summarize(figures):
    """The rows of the table, the rewards at the budgets, and the differences to the best DPO, on
    the seeds on which a method and that DPO reach the KL."""
    methods = [name for name, values in figures.strengths.items() if max(values) > 0]
    at_budgets, ahead = {}, {}
    for budget in BUDGETS:
        rival = best_dpo(figures, methods, budget)
        rival_seeds = figures.seeds_that_reach(rival, budget) if rival else []
        for method in methods:
            seeds = figures.seeds_that_reach(method, budget)
            values = figures.reward_at(budget, method, seeds)
            cells = at_budgets.setdefault(method, {})
            if values:
                cells[f"{budget:g}"] = {"reward": values[:2], "seeds": seeds}
            common = sorted(set(seeds) & set(rival_seeds))
            if "DPO" in method or not common:
                continue
            ours, theirs = (figures.reward_at(budget, name, common) for name in (method, rival))
            if ours and theirs:
                compared = {"rival": rival, "seeds": common, "difference": difference(ours, theirs)}
                ahead.setdefault(method, {})[f"{budget:g}"] = compared
    return {"rows": rows_of(figures), "at budgets": at_budgets, "ahead of the best DPO": ahead}


def markdown(summary):
    """The table of one task's rows, and that of its rewards at the budgets."""
    lines = ["| | strength | seeds | reward | KL | gain / (σ √(2 KL)) | off task |"]
    lines.append("|---|" + "---|" * 6)
    for row in summary["rows"]:
        efficiency, off_task = (
            "" if row[name] is None else f"{row[name]:.2f}"
            for name in ("efficiency", "kl off task")
        )
        reward = f"{row['reward']:.3f} ± {row['error']:.3f}"
        lines.append(
            f"| {row['method']} | {row['strength']:g} | {len(row['seeds'])} | {reward} "
            f"| {row['kl']:.2f} | {efficiency} | {off_task} |"
        )
    head = "".join(f" KL {budget:g} (seeds) |" for budget in BUDGETS)
    lines += ["", f"| |{head}", "|---|" + "---|" * len(BUDGETS)]
    for method, values in summary["at budgets"].items():
        cells = []
        for budget in BUDGETS:
            cell = values.get(f"{budget:g}")
            if cell:
                reward, error = cell["reward"]
                cells.append(f"{reward:.3f} ± {error:.3f} ({len(cell['seeds'])})")
            else:
                cells.append("")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(figures_by_task):
    """frontier.png: a panel for each task, reward over KL, a line for each method and seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(figures_by_task)
    # a method has its colour in all panels
    methods = dict.fromkeys(m for figures in figures_by_task.values() for m in figures.strengths)
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, 4.5), squeeze=False)
    for axis, (task, figures) in zip(axes[0], figures_by_task.items()):
        for method in figures.strengths:
            # a line for each seed
            for i, seed in enumerate(figures.seeds(method) if method != "base" else []):
                rewards, kls = figures.curve(method, seed, figures.everything)
                order = np.argsort(kls)
                label = None if i else method
                axis.plot(kls[order], rewards[order], "o-", label=label, color=colours[method])
        axis.set(title=task, xlabel="KL to the base, nats an answer", ylabel="reward")
        # rewards are linear in the root of KL: at_budget interpolates along the lines
        axis.set_xscale("function", functions=(np.sqrt, np.square))
        axis.set_xlim(0, 15)
        axis.set_xticks([0, *BUDGETS, 15])
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "frontier.png", dpi=110)


def main(config):
    lines = read_lines()
    if not lines:
        raise UserError(f"{LINES} is missing or empty: run `python -m studies.frontier` first")
    found = dict.fromkeys(key[0] for key in lines)
    figures = {task: Figures(lines, task) for task in found}
    summaries = {task: summarize(figures[task]) for task in figures}
    for task, summary in summaries.items():
        print(f"\n{task}\n\n{markdown(summary)}\n")
        for method, budgets in summary["ahead of the best DPO"].items():
            for budget, compared in budgets.items():
                mean, low, high = compared["difference"]
                print(
                    f"{method} at KL {budget}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] to "
                    f"{compared['rival']}, seeds {compared['seeds']}"
                )
    write_result("frontier", summaries)
    try:
        plot(figures)
    except ImportError:
        print("no figure: it needs `pip install matplotlib`")


if __name__ == "__main__":
    run(main, Config)
