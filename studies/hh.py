"""Real pairs on a real model: DUAL at two strengths, from pairs that people have labelled.

    python -m studies.hh --data PATH       (needs out/smollm2: python -m studies.smollm2)

dual runs with its defaults, collect in the model's dtype (studies/signal.py saw no loss in it),
align without its scaling: its one adapter is scaled to each KL here, on validation prompts. On
held-out pairs the study measures how often a policy prefers the chosen response, by its mean
log-probability per token, and by its log-ratio to the base, summed over the response. It scores the
policy's answers to their prompts, too. Writes studies/results/hh.json, policy by policy, with some
of the answers; all of them are in the work folder, with their prompts. A later call goes on where
this one stopped.
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import align
import collect
import dual
from common.answers import GenerationSettings, attached
from common.config import UserError, run, setting
from common.data import sample
from common.dial import dial, scaled
from common.hf import load_model, load_tokenizer, model_digest
from common.score import (
    Scoring,
    implicit_rewards,
    prompts_of,
    reward_metrics,
    score_model,
    write_rows,
)
from common.stage1 import open_stage1
from common.stages import MANIFEST, read_stage
from lora import load_adapter
from studies.shared import measured_before, quietly, write_result
from tools.sweep import read_pairs

# The test pairs that are scored, and the validation pairs whose prompts the adapter is scaled on.
TEST_PAIRS, VALIDATION_PAIRS = 200, 64

# How refusals begin, and how many of each policy's greedy answers are in the result file.
APOLOGIES = ("I'm sorry", "I am sorry", "Sorry")
SHOWN = 16

# Strengths in nats an answer.
KLS = (2.0, 5.0)

# What the table shows of a policy's figures. The rewards are its log-ratios to the base.
COLUMNS = ("preference_accuracy", "rewards/accuracies", "rewards/margins", "implicit_dual_sampled")
COLUMNS += ("kl_to_base", "repeated_ngrams", "mean_length", "apologies")


@dataclass
class Config:
    data: str = field(metadata={"help": "preference pairs"})
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    kl: list[float] = setting(
        None, f"strengths in nats an answer; empty takes {KLS[0]:g} and {KLS[1]:g}", minimum=1e-3
    )
    dtype: str = setting("float32", "of the base model", group="run")
    work: str = setting("/tmp/rahf-hh", "folder of the stages, reused", group="run")


def run_stages(config, out):
    """Run the stages that have not written to the folder out yet. Returns the collection's
    manifest. UserError where they ran on other data."""
    source = {"model": config.model, "data": [config.data], "dtype": config.dtype}
    stages = (
        ("bad", dual, source),
        ("collect", collect, {"compute_dtype": config.dtype}),
        # with a strength align does not scale its adapter: Study.aligned_at does
        ("align", align, {"strength": align.STRENGTH}),
    )
    for folder, stage, settings in stages:
        if not (out / "dual" / folder / MANIFEST).exists():
            quietly(stage, out=str(out), device="cpu", **settings)
    collected = read_stage(out / "dual" / "collect", "collect", "python -m studies.hh")
    if collected["settings"]["data"] != [config.data]:
        trained_on = ", ".join(collected["settings"]["data"])
        raise UserError(
            f"--work {config.work}: its stages ran on {trained_on}: name another folder"
        )
    return collected


class Study:
    """The stages' adapters on their base, and the pairs that nothing was trained on."""

    def __init__(self, config, out, collected):
        """out: the stages' folder; collected: the manifest of its collection."""
        self.generation = GenerationSettings(max_new_tokens=64, batch_size=64, seed=0)
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_model(config.model, config.dtype, "cpu")
        self.held_out = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for split, count in (("valid", VALIDATION_PAIRS), ("test", TEST_PAIRS)):
                pairs = read_pairs(collected, split, self.tokenizer)[split]
                self.held_out[split] = sample(pairs, count, self.generation.seed)
        self.stage1 = open_stage1(out, "dual").load_weights(self.model.base_model)
        self.aligned = load_adapter(out / "dual" / "align", self.model.base_model)

    def aligned_at(self, kl):
        """(AdapterWeights, scale) of the aligned adapter at a KL in nats an answer."""
        valid = self.held_out["valid"]
        prompts, end_token = prompts_of(valid, "plain"), valid[0].end_token
        scale, _ = dial(
            self.model, self.tokenizer, self.aligned, prompts, end_token, kl, self.generation
        )
        return scaled(self.aligned, scale), scale

    def score(self, weights):
        """The figures of one policy on the test pairs, and its answers as common.score.score_model
        returns them."""
        pairs, pad_id = self.held_out["test"], self.tokenizer.pad_token_id
        scoring = Scoring({}, implicit_rewards(self.stage1), self.generation)
        with attached(self.model, weights) as adapter:
            report, rows = score_model(self.model, adapter, self.tokenizer, pairs, "plain", scoring)
            if adapter:
                report |= reward_metrics(
                    self.model, [adapter], adapter, pairs, "plain", 1.0, pad_id, None
                )
        return report, rows


def read_greedy(rows):
    """How often the greedy answers begin with an apology, and the first of them. rows: of
    Study.score."""
    answers = [row["output"] for row in rows if row["temperature"] == 0]
    apologies = [answer.replace("’", "'").startswith(APOLOGIES) for answer in answers]
    return {"apologies": sum(apologies) / len(answers), "answers": answers[:SHOWN]}


def table(policies):
    """The figures of all policies as a table in markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in policies.items():
        # the base has no log-ratio to itself
        cells = [f"{figures[column]:.2f}" if column in figures else "" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config):
    settings = {"model": model_digest(config.model)[:12], "data": Path(config.data).name}
    settings["dtype"] = config.dtype
    out = Path(config.work) / "-".join(settings.values())
    collected = run_stages(config, out)
    study = Study(config, out, collected)
    settings["pairs"] = collected["inputs"]["pairs"][:12]
    settings["test pairs"] = len(study.held_out["test"])
    measured = measured_before("hh", settings, "policies")

    # {policy: function that returns its AdapterWeights and their scale}
    policies = {"base": lambda: (None, 0.0)}
    for kl in config.kl or KLS:
        policies[f"aligned, {kl:g} nats"] = lambda kl=kl: study.aligned_at(kl)
    policies["good"] = lambda: (study.stage1["good"], 1.0)
    for name, load in policies.items():
        if name not in measured:
            weights, scale = load()
            report, rows = study.score(weights)
            with open(out / f"{name}.jsonl", "w", encoding="utf-8") as file:
                write_rows(file, rows)
            measured[name] = {"scale": scale, **report, **read_greedy(rows)}
            write_result("hh", {"settings": settings, "policies": measured})
    print(table(measured))


if __name__ == "__main__":
    run(main, Config)
