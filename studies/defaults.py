"""What the defaults give on a real model: the README's four commands, on both of its tasks.

    python -m studies.defaults           (needs out/smollm2: python -m studies.smollm2)

No stage is told more than model, pairs, dtype and folder; align scales its adapter to its default
KL. Writes studies/results/defaults.json, task by task; a later call goes on with the missing ones.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import align
import collect
import dual
import evaluate
from common.config import run, setting
from common.hf import model_digest
from studies import tasks
from studies.shared import machine, measured_before, quietly, write_result

# What the table shows of evaluate's figures.
COLUMNS = ("judge_sampled", "kl_to_base", "repeated_ngrams", "mean_length", "ended")


@dataclass
class Config:
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    dtype: str = setting("float32", "of the base model", group="run")
    work: str = setting("/tmp/rahf-defaults", "folder of the stages", group="run")


def measure(config, task):
    """The seconds of each stage, and what evaluate reports of the test pairs, {model: figures}."""
    out = Path(config.work) / task
    data = str(tasks.PAIRS / f"{task}-0.jsonl.gz")
    source = {"model": config.model, "data": [data], "dtype": config.dtype}
    seconds = {}
    for stage, settings in (
        (dual, source),
        (collect, {}),
        (align, {}),
        (evaluate, {"judge": f"studies.tasks:{task}"}),
    ):
        took = quietly(stage, out=str(out), device="cpu", **settings)
        seconds[stage.__name__] = round(took, 1)
    report = json.loads((out / "evaluate" / "report.json").read_text(encoding="utf-8"))
    figures = {"pairs": report["settings"]["pairs"], "models": report["models"]}
    return {"machine": machine(), "seconds": seconds, **figures}


def table(measured):
    """The models of all tasks as a table in markdown."""
    lines = [f"| task | model | {' | '.join(COLUMNS)} |", "|---|---|" + "---|" * len(COLUMNS)]
    for task, result in measured.items():
        for name in ("base", "base_plus", "dual_aligned"):
            values = [f"{result['models'][name][column]:.2f}" for column in COLUMNS]
            lines.append(f"| {task} | {name} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(config):
    settings = {"dtype": config.dtype, "digest": model_digest(config.model)[:12]}
    measured = measured_before("defaults", settings, "tasks")
    for task in tasks.TASKS:
        if task not in measured:
            measured[task] = measure(config, task)
            write_result("defaults", {"settings": settings, "tasks": measured})
    print(table(measured))


if __name__ == "__main__":
    run(main, Config)
