"""Real pairs on a real model: DUAL at two strengths, from pairs that people have labelled.

    python -m studies.hh --data PATH       (needs out/smollm2: python -m studies.smollm2)

dual and collect run with their defaults, align without its scaling: its one adapter is scaled to
each KL here, on validation prompts. On held-out pairs the study measures how often a policy prefers
the chosen response, by its mean log-probability per token, and by its log-ratio to the base, summed
over the response. It scores the answers to their prompts, too, and keeps some of them to be read.
Writes studies/results/hh.json, policy by policy.
"""

import contextlib
import io
from dataclasses import dataclass, field
from pathlib import Path

import align
import collect
import dual
from common.answers import GenerationSettings, attached
from common.config import run, setting
from common.data import sample
from common.dial import dial, scaled
from common.hf import load_model, load_tokenizer, model_digest
from common.score import Scoring, implicit_rewards, prompts_of, reward_metrics, score_model
from common.stage1 import open_stage1
from common.stages import read_stage
from lora import load_adapter
from studies.shared import quietly, write_result
from tools.sweep import read_pairs

# The test pairs that are scored, and the validation pairs whose prompts the adapter is scaled on.
TEST_PAIRS, VALIDATION_PAIRS = 200, 64

# So many sampled answers of each policy are kept.
SHOWN = 8

# Strengths in nats an answer.
KLS = (2.0, 5.0)

# What the table shows of a policy's figures. The rewards are its log-ratios to the base.
COLUMNS = ("preference_accuracy", "rewards/accuracies", "rewards/margins", "implicit_dual_sampled")
COLUMNS += ("kl_to_base", "repeated_ngrams", "mean_length")


@dataclass
class Config:
    data: str = field(metadata={"help": "preference pairs"})
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    kl: list[float] = setting(
        None, f"strengths in nats an answer; empty takes {KLS[0]:g} and {KLS[1]:g}", minimum=1e-3
    )
    dtype: str = setting("float32", "of the base model", group="run")
    work: str = setting("/tmp/rahf-hh", "folder of the stages", group="run")


class Study:
    """The stages' adapters on their base, and the pairs that nothing was trained on."""

    def __init__(self, config):
        self.generation = GenerationSettings(max_new_tokens=64, batch_size=64, seed=0)
        self.tokenizer = load_tokenizer(config.model)
        self.model = load_model(config.model, config.dtype, "cpu")
        folder = Path(config.work) / "dual"
        manifest = read_stage(folder / "collect", "collect", "python -m studies.hh")
        self.held_out = {}
        with contextlib.redirect_stdout(io.StringIO()):
            for split, count in (("valid", VALIDATION_PAIRS), ("test", TEST_PAIRS)):
                pairs = read_pairs(manifest, split, self.tokenizer)[split]
                self.held_out[split] = sample(pairs, count, self.generation.seed)
        self.stage1 = open_stage1(config.work, "dual").load_weights(self.model.base_model)
        self.aligned = load_adapter(folder / "align", self.model.base_model)

    def scale_to(self, kl):
        """(scale, AdapterWeights) of the aligned adapter at a KL in nats an answer."""
        valid = self.held_out["valid"]
        prompts, end_token = prompts_of(valid, "plain"), valid[0].end_token
        scale, _ = dial(
            self.model, self.tokenizer, self.aligned, prompts, end_token, kl, self.generation
        )
        return scale, scaled(self.aligned, scale)

    def score(self, weights):
        """The figures of one policy on the test pairs, and its first sampled answers."""
        pairs, pad_id = self.held_out["test"], self.tokenizer.pad_token_id
        scoring = Scoring({}, implicit_rewards(self.stage1), self.generation)
        with attached(self.model, weights) as adapter:
            report, rows = score_model(self.model, adapter, self.tokenizer, pairs, "plain", scoring)
            if adapter:
                report |= reward_metrics(
                    self.model, [adapter], adapter, pairs, "plain", 1.0, pad_id, None
                )
        sampled = [row for row in rows if row["temperature"]]
        answers = [{name: row[name] for name in ("instruction", "output")} for row in sampled]
        return {**report, "answers": answers[:SHOWN]}


def table(policies):
    """The figures of all policies as a table in markdown."""
    lines = [f"| | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in policies.items():
        # the base has no log-ratio to itself
        cells = [f"{figures[column]:.2f}" if column in figures else "" for column in COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(config):
    shared = {"out": config.work, "device": "cpu"}
    source = {"model": config.model, "data": [config.data], "dtype": config.dtype}
    seconds = {}
    # with a strength align does not scale its adapter: Study.scale_to does
    for stage, settings in (
        (dual, source),
        (collect, {}),
        (align, {"strength": align.STRENGTH}),
    ):
        seconds[stage.__name__] = round(quietly(stage, **shared, **settings), 1)

    study = Study(config)
    policies = {"base": None, "good": study.stage1["good"], "bad": study.stage1["bad"]}
    scales = {}
    for kl in config.kl or KLS:
        scales[f"kl {kl:g}"], policies[f"kl {kl:g}"] = study.scale_to(kl)
    settings = {"model": model_digest(config.model)[:12], "data": Path(config.data).name}
    settings |= {"dtype": config.dtype, "test pairs": len(study.held_out["test"])}
    measured = {}
    for name, weights in policies.items():
        measured[name] = study.score(weights)
        result = {"settings": settings, "seconds": seconds, "scales": scales}
        write_result("hh", {**result, "policies": measured})
    print(table(measured))


if __name__ == "__main__":
    run(main, Config)
