"""The table and the figure of studies/frontier.py: reward over KL, and who is ahead of DPO.

    python -m studies.frontier_report      writes studies/results/frontier.json and frontier.png

Methods are compared at the same KL: the reward of each is interpolated between its strengths.
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
    """What was measured for one task: rewards and KLs by prompt."""

    def __init__(self, lines, task):
        """lines: as read_lines returns them."""
        self.lines = {key[1:]: line for key, line in lines.items() if key[0] == task}
        self.strengths = defaultdict(dict)
        for seed, method, strength in self.lines:
            self.strengths[method].setdefault(strength, []).append(seed)
        self.n_prompts = len(next(iter(self.lines.values()))["reward"])

    def seeds(self, method):
        """The seeds for which every strength of a method and the base are there."""
        sets = [set(seeds) for seeds in self.strengths[method].values()]
        return sorted(set.intersection(*sets, set(self.strengths["base"][0.0])))

    def curve(self, method, seed, prompts):
        """(rewards, KLs) of a method's strengths over some prompts, the base's first."""
        lines = [self.lines[seed, "base", 0.0]]
        if method != "base":
            lines += [self.lines[seed, method, strength] for strength in self.strengths[method]]
        rewards = np.array([np.array(line["reward"])[prompts].mean() for line in lines])
        return rewards, np.array([np.array(line["kl"])[prompts].mean() for line in lines])

    def at_budgets(self, methods, seeds=None, draws=500):
        """{method: {budget: (mean, standard error, draws)}}, seeds pooled: all that a method has,
        or those given. The prompts are drawn anew for each draw of the bootstrap, alike for all
        methods."""
        rng = np.random.default_rng(0)
        samples = [np.arange(self.n_prompts)]
        samples += list(rng.integers(self.n_prompts, size=(draws, self.n_prompts)))
        result = {}
        for method in methods:
            result[method] = {}
            for budget in BUDGETS:
                values = []
                for prompts in samples:
                    rewards = [
                        at_budget(*self.curve(method, seed, prompts), budget)
                        for seed in seeds or self.seeds(method)
                    ]
                    values.append(np.mean(rewards) if rewards and None not in rewards else None)
                drawn = [value for value in values[1:] if value is not None]
                if values[0] is not None and len(drawn) > 0.9 * draws:
                    result[method][budget] = (values[0], float(np.std(drawn)), values[1:])
        return result


def difference(ours, theirs):
    """(mean, low, high) of the paired difference of two entries of at_budgets, 95% interval."""
    pairs = zip(ours[2], theirs[2])
    drawn = [a - b for a, b in pairs if a is not None and b is not None]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return ours[0] - theirs[0], float(low), float(high)


def summarize(figures):
    """The rows of the table, the rewards at the budgets, and the differences to the best DPO, on
    the seeds that a method and all of DPO's learning rates have in common."""
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
    methods = [name for name, values in figures.strengths.items() if max(values) > 0]
    budgets = figures.at_budgets(methods)
    dpo = [name for name in methods if "DPO" in name]
    differences = {}
    for method in [name for name in methods if name not in dpo]:
        seeds = [set(figures.seeds(name)) for name in [method, *dpo]]
        common = set.intersection(*seeds)
        if not common:
            continue
        compared = figures.at_budgets([method, *dpo], sorted(common))
        for budget in BUDGETS:
            rivals = [compared[name][budget] for name in dpo if budget in compared[name]]
            if budget in compared[method] and rivals:
                best = max(rivals, key=lambda rival: rival[0])
                ahead = difference(compared[method][budget], best)
                differences.setdefault(method, {})[f"{budget:g}"] = ahead
    at_budgets = {
        method: {f"{budget:g}": values[:2] for budget, values in by_budget.items()}
        for method, by_budget in budgets.items()
    }
    return {"rows": rows, "at budgets": at_budgets, "ahead of the best DPO": differences}


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
    head = "".join(f" KL {budget:g} |" for budget in BUDGETS)
    lines += ["", f"| |{head}", "|---|" + "---|" * len(BUDGETS)]
    for method, values in summary["at budgets"].items():
        cells = []
        for budget in BUDGETS:
            mean, error = values.get(f"{budget:g}", (None, None))
            cells.append("" if mean is None else f"{mean:.3f} ± {error:.3f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(figures_by_task):
    """frontier.png: a panel for each task, reward over KL, a line for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = len(figures_by_task)
    # a method has its colour in all panels
    methods = dict.fromkeys(m for figures in figures_by_task.values() for m in figures.strengths)
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    figure, axes = pyplot.subplots(1, count, figsize=(6 * count, 4.5), squeeze=False)
    for axis, (task, figures) in zip(axes[0], figures_by_task.items()):
        everything = np.arange(figures.n_prompts)
        for method in figures.strengths:
            seeds = figures.seeds(method)
            if method == "base" or not seeds:
                continue
            curves = [figures.curve(method, seed, everything) for seed in seeds]
            rewards, kls = (np.mean(values, 0) for values in zip(*curves))
            order = np.argsort(kls)
            axis.plot(kls[order], rewards[order], marker="o", label=method, color=colours[method])
        axis.set(title=task, xlabel="KL to the base, nats an answer", ylabel="reward")
        axis.set_xlim(0, 15)
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
            for budget, (mean, low, high) in budgets.items():
                print(f"{method} at KL {budget}: {mean:+.3f} [{low:+.3f}, {high:+.3f}] to DPO")
    write_result("frontier", summaries)
    try:
        plot(figures)
    except ImportError:
        print("no figure: it needs `pip install matplotlib`")


if __name__ == "__main__":
    run(main, Config)
