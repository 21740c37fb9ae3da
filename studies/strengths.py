"""One prompt answered at several strengths: what DUAL does to the embedded default.

    python -m studies.strengths                          writes studies/results/strengths.json

Stage 1 and collect with their defaults, then align.py at ρ = -0.25, 0.25 (the default) and 0.5;
the base model is ρ = 0. Greedy answers to the first test prompt of each kind of request. The
README shows one of them.
"""

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import align
import collect
import dual
from common import toy
from common.answers import GenerationSettings, attached, generate, text_of
from common.config import run, setting
from common.data import prepare_pairs
from common.hf import load_model, load_tokenizer
from common.score import prompts_of
from lora import load_adapter
from studies.shared import configure, write_result

DEFAULT = toy.LATER["align"]["strength"]
STRENGTHS = (-DEFAULT, 0.0, DEFAULT, 2 * DEFAULT)


@dataclass
class Config:
    work: str = setting("/tmp/rahf-strengths", "folder of the stages, reused")


def train_all(out):
    """Run the stages; returns {strength: AdapterWeights}, None for the base."""
    stage1 = configure(dual, out=out, device="cpu")
    world = toy.source_or_default(stage1)
    model = load_model(world["model"], "float32", "cpu")
    if not (Path(out) / "dual" / "collect").is_dir():
        dual.main(stage1)
        collect.main(collect.Config(out=out, device="cpu"))
    adapters = {}
    for strength in STRENGTHS:
        adapters[strength] = None
        if strength:
            align.main(align.Config(out=out, device="cpu", strength=strength))
            folder = Path(out) / "dual" / "align"
            adapters[strength] = load_adapter(folder, model.base_model)
    return world, model, adapters


def first_of_each_kind(pairs):
    """{kind of request: its first pair}."""
    kind_of = {}
    for kind, items in toy.ITEMS.items():
        for item in items:
            kind_of |= {form.format(*item.slots): kind for form in toy.ASK[kind]}
    first = {}
    for pair in pairs:
        question = pair.pair.prompt[-1][1]
        first.setdefault(kind_of[question], pair)
    return first


def markdown(answers, kind):
    """The README's table: the answers to one question."""
    lines = ["| strength ρ | answer |", "|---|---|"]
    for strength, answer in answers[kind]["answers"].items():
        lines.append(f"| {strength} | {answer} |")
    return "\n".join(lines)


def main(config):
    with contextlib.redirect_stdout(io.StringIO()):
        world, model, adapters = train_all(config.work)
        tokenizer = load_tokenizer(world["model"])
        pairs = prepare_pairs(world["data"], ("test",), tokenizer, 256, 0)["test"]
    chosen = first_of_each_kind(pairs)
    answers = {}
    for kind, pair in chosen.items():
        answers[kind] = {"question": pair.pair.prompt[-1][1], "answers": {}}
    generation = GenerationSettings(max_new_tokens=64, batch_size=8, seed=0)
    prompts = prompts_of(chosen.values(), "plain")
    for strength, weights in adapters.items():
        with attached(model, weights):
            replies = generate(model, tokenizer, prompts, generation)
        for kind, reply in zip(chosen, replies):
            answers[kind]["answers"][f"{strength:g}"] = text_of(tokenizer, reply)
    for kind in answers:
        print(answers[kind]["question"], markdown(answers, kind), sep="\n")
    write_result("strengths", {"answers": answers})


if __name__ == "__main__":
    run(main, Config)
