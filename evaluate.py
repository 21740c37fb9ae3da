"""Did it work? Base, instructed and aligned models side by side, on pairs that no stage trained on.

    python evaluate.py                              every model in OUT
    python evaluate.py --data test.jsonl --split all --judge my_module:my_judge
    python evaluate.py --reward-model PATH_OR_HUB_NAME
                       mean reward, and how often the aligned model wins over its base
    python evaluate.py --prompt "How do I cut a plank?"
                       answers of base and aligned models; writes nothing

Preference accuracy does not notice a collapsed model, so every model also answers the prompts
itself, greedily and at temperature 1. The implicit reward of stage 1 scores the answers (see
common/score.py), and so does a judge, any callable (prompt, response) -> number, or a reward model.
A reward has a price: `kl_to_base` is how far a model has moved, in nats an answer. Beside the
trained models stands the base that is told p+, since prompting costs nothing. Writes
OUT/evaluate/report.json and samples.jsonl, whose rows have AlpacaEval's fields.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from common.answers import GenerationSettings, attached, generate, stop_tokens, text_of
from common.config import UserError, run, setting
from common.data import encode_pairs, prepare_pairs
from common.hf import (
    check_ids,
    check_same_model,
    choose_device,
    context_length,
    load_config,
    load_model,
    load_tokenizer,
)
from common.pairs import Pair
from common.score import (
    Scoring,
    implicit_rewards,
    inherited_judge,
    load_judge,
    load_reward_model,
    markdown_table,
    score_models,
    win_rate,
    write_rows,
)
from common.stage1 import check_adapters
from common.stages import (
    MANIFEST,
    claim,
    find_folder,
    inherit,
    read_stage,
    verified_path,
    versions,
    write_json,
    write_stage,
)
from lora import ADAPTER_WEIGHTS, load_adapter


class Model(NamedTuple):
    """The base with one adapter: where its stage wrote it, and the prompt that it is given."""

    folder: str
    kind: str
    script: str
    prompt: str


# In the order of the stages: settings are inherited from the last one present. The base itself has
# no adapter.
MODELS = {
    "scit_plus": Model("scit/adapter", "scit", "scit.py", "positive"),
    "scit_minus": Model("scit/adapter", "scit", "scit.py", "negative"),
    "scit_plain": Model("scit/adapter", "scit", "scit.py", "plain"),
    "scit_aligned": Model("scit/align", "align", "align.py", "plain"),
    "good": Model("dual/good", "good", "dual.py", "plain"),
    "bad": Model("dual/bad", "bad", "dual.py", "plain"),
    "dual_aligned": Model("dual/align", "align", "align.py", "plain"),
}


@dataclass
class Config:
    prompt: str | None = setting(
        None, "only answer this prompt, with the base and the aligned models"
    )
    judge: str | None = setting(
        None,
        "module:function that scores (prompt, response); empty takes the embedded default's, where "
        "the stages ran on it and --data is not given",
    )
    reward_model: str | None = setting(
        None, "sequence classifier of one label that scores the answers: folder or hub name"
    )
    max_new_tokens: int = setting(64, "longest answer in tokens", minimum=1)
    model: str | None = setting(None, "model folder or hub name; empty inherits", group="data")
    data: list[str] | None = setting(
        None, "preference pairs, as in stage 1; empty inherits", group="data"
    )
    columns: list[str] | None = setting(
        None,
        "what the fields of --data mean, as in stage 1; empty inherits, unless --data is given",
        group="data",
    )
    split: Literal["test", "valid", "train", "all"] = setting(
        "test", "pairs to evaluate on", group="data"
    )
    max_length: int | None = setting(
        None, "longest input in tokens; empty inherits", minimum=2, group="data"
    )
    limit: int = setting(
        200, "use this many pairs at most, drawn at random", minimum=1, group="data"
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    seed: int | None = setting(
        None, "seed of the sampling, not of the data split; empty inherits", group="run"
    )
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "dtype of the base model; empty inherits", group="run"
    )
    batch_size: int = setting(64, "prompts answered at a time", minimum=1, group="run")
    tokens_per_pass: int | None = setting(
        None,
        "most tokens in one forward pass; empty takes 4096 on a GPU, 2048 on the CPU",
        minimum=1,
        group="run",
    )


# ---------------------------------------------------------------- what the earlier stages wrote


def read_manifests(out):
    """{name: manifest} of the MODELS whose adapter is in `out`, at least one.

    UserError if there is none, if they were trained on different splits or templates, or if an
    aligned model was made from other adapters than those of its stage 1.
    """
    manifests = {}
    for name, model in MODELS.items():
        folder = find_folder(out / model.folder)
        if (folder / MANIFEST).is_file():
            manifests[name] = read_stage(folder, model.kind, f"python {model.script}")
    if not manifests:
        raise UserError(f"no adapter in {out}: run `python scit.py` or `python dual.py` first")

    for name, manifest in manifests.items():
        if name.endswith("aligned"):
            check_adapters(out, manifest["method"], manifest["adapters"])
    settings = [manifest["settings"] for manifest in manifests.values()]
    if len({(s["split_seed"], s["template"], s["quantize"]) for s in settings}) > 1:
        folders = " and ".join(str(out / MODELS[name].folder) for name in manifests)
        raise UserError(
            f"{folders} have splits of different seeds, different templates or different "
            "--quantize: use another --out for each"
        )
    return manifests


def load_adapters(out, manifests, model, model_name, tokenizer):
    """{name: AdapterWeights}. UserError if one is damaged or belongs to another model."""
    adapters = {}
    for name, manifest in manifests.items():
        folder = out / MODELS[name].folder
        check_same_model(model_name, tokenizer, manifest, folder)
        adapters[name] = load_adapter(verified_path(folder, manifest), model.base_model)
    return adapters


def check_pairs(pairs, manifests, config):
    """UserError where inherited data are not the pairs, with the splits, of every training run."""
    for name, manifest in manifests.items():
        if manifest["inputs"].get("pairs") != pairs.source_digest:
            raise UserError(
                f"{', '.join(config.data)}: these are other pairs than those of "
                f"{Path(config.out) / MODELS[name].folder}, so that its {config.split} pairs may "
                "have been trained on: name pairs that no stage has seen with --data"
            )


def load_scorers(config, device):
    """{"judge" | "reward": scorer} of those that the settings name."""
    scorers = {}
    if config.judge:
        scorers["judge"] = load_judge(config.judge)
    if config.reward_model:
        scorers["reward"] = load_reward_model(
            config.reward_model, config.dtype, device, config.batch_size
        )
    return scorers


# ---------------------------------------------------------------- answers and win rates


def print_answers(model, tokenizer, adapters, config, template):
    """Print the answers of the base and the aligned models to config.prompt."""
    pair = Pair((("user", config.prompt),), "", "", "test")
    encoded = encode_pairs(tokenizer, [pair], template=template)[0]
    prompt = encoded.prompts["plain"].tolist()
    check_ids(config.model, max(prompt))
    context = context_length(model.config)
    if len(prompt) >= context:
        raise UserError(
            f"--prompt: it has {len(prompt)} tokens, which leave no room for an answer in the "
            f"model's {context}: shorten it"
        )
    generation = GenerationSettings(config.max_new_tokens, batch_size=1, seed=config.seed)
    stops = stop_tokens(model, tokenizer, encoded.end_token)
    aligned = [name for name in adapters if name.endswith("aligned")]
    for name in ["base", *aligned]:
        with attached(model, adapters.get(name)):
            answers = generate(model, tokenizer, [prompt], generation, end_token=encoded.end_token)
        print(f"{name:>12}: {text_of(tokenizer, answers[0], stops)}")


def scores_of(samples, name, scorer, temperature):
    """The scores of one model's answers, prompt by prompt."""
    return [
        row[scorer]
        for row in samples
        if row["generator"] == name and row["temperature"] == temperature
    ]


def win_rates(samples, names, scorers):
    """How often models win over the base, prompt by prompt.

    Returns {name: {"judge_greedy" | ...: (rate, low, high)}}.
    """
    wins = {}
    for name in names:
        for scorer in scorers:
            for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                rate = win_rate(
                    scores_of(samples, name, scorer, temperature),
                    scores_of(samples, "base", scorer, temperature),
                )
                wins.setdefault(name, {})[f"{scorer}_{decoding}"] = rate
    return wins


def disagreement(samples, name, scorers, implicit):
    """How often an implicit reward and a scorer disagree whether a model's sampled answer is better
    than the base's, over the prompts on which both see a difference.

    Returns {"judge and implicit_dual" | ...: share}.
    """

    def signs(scorer):
        pairs = zip(scores_of(samples, name, scorer, 1.0), scores_of(samples, "base", scorer, 1.0))
        return [(a > b) - (a < b) for a, b in pairs]

    shares = {}
    for scorer in scorers:
        for reward in implicit:
            both = [(a, b) for a, b in zip(signs(scorer), signs(reward)) if a and b]
            if both:
                shares[f"{scorer} and {reward}"] = sum(a != b for a, b in both) / len(both)
    return shares


def describe_wins(rates):
    """The win rates of one model as text."""
    parts = []
    for name, (rate, low, high) in rates.items():
        parts.append(f"{name.replace('_', ', ')} {rate:.2f} [{low:.2f}, {high:.2f}]")
    return ", ".join(parts)


def print_report(report):
    """Print the table of all models, their win rates, and how often scorers disagree."""
    print(f"\n{markdown_table(report['models'])}\n")
    for name, rates in report["win_rate_over_base"].items():
        print(f"{name} wins over base: {describe_wins(rates)}")
        for both, share in report["disagreement"][name].items():
            print(f"  {both} disagree on {share:.0%} of the prompts")


# ---------------------------------------------------------------- main


def main(config):
    # 1. The adapters in OUT, and what their stages were told. A judge that comes with the
    #    embedded default knows no other data.
    out = Path(config.out)
    manifests = read_manifests(out)
    latest = list(manifests)[-1]
    settings = manifests[latest]["settings"]
    inherited = ["model", "dtype", "max_length", "seed"]
    own_data = config.data is not None
    if not own_data:
        inherited += ["data", "columns"]
        if config.judge is None:
            inherited.append("judge")
            settings = {**settings, "judge": inherited_judge(settings)}
    inherit(config, settings, inherited, out / MODELS[latest].folder)
    config.max_length = min(config.max_length, context_length(load_config(config.model)))

    target = out / "evaluate"
    with claim(target):
        # 2. Scorers, model and adapters.
        device = choose_device(config.device)
        scorers = load_scorers(config, device)
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, config.dtype, device, quantize=settings["quantize"])
        adapters = load_adapters(out, manifests, model, config.model, tokenizer)
        if config.prompt is not None:
            print_answers(model, tokenizer, adapters, config, settings["template"])
            return

        # 3. The pairs. The instructions are those of SCIT's run, if there was one.
        instructions = manifests.get("scit_plus", manifests[latest])["settings"]
        prepared = prepare_pairs(
            config.data,
            (config.split,),
            tokenizer,
            config.max_length,
            settings["split_seed"],
            config.limit,
            positive=instructions["positive"],
            negative=instructions["negative"],
            template=settings["template"],
            columns=config.columns,
        )
        if own_data:
            print("--data: whether a stage has trained on these pairs is not known")
        else:
            check_pairs(prepared, manifests, config)
        check_ids(config.model, prepared.max_id)
        pairs = prepared[config.split]

        # 4. Every model's scores and answers, and how often they beat those of the base.
        models = {"base": (None, "plain"), "base_plus": (None, "positive")}
        for name, weights in adapters.items():
            models[name] = (weights, MODELS[name].prompt)
        # SCIT's three models share one adapter
        by_kind = {MODELS[name].kind: weights for name, weights in adapters.items()}
        generation = GenerationSettings(config.max_new_tokens, config.batch_size, config.seed)
        implicit = implicit_rewards(by_kind)
        scoring = Scoring(scorers, implicit, generation, config.tokens_per_pass)
        answers_path = out / "evaluate_answers.jsonl"
        reports, samples = score_models(model, models, tokenizer, pairs, scoring, answers_path)
        others = list(models)[1:]
        wins = win_rates(samples, others, [*scorers, *implicit])
        disagreements = {name: disagreement(samples, name, scorers, implicit) for name in others}

        # 5. Save and print.
        report = {
            "models": reports,
            "win_rate_over_base": wins,
            "disagreement": disagreements,
            "versions": versions(),
            # by which the card that tools.export writes knows its adapter
            "adapters": {name: manifests[name]["digests"][ADAPTER_WEIGHTS] for name in adapters},
            "settings": {
                **vars(config),
                "split_seed": settings["split_seed"],
                "quantize": settings["quantize"],
                "pairs": len(pairs),
                "own_data": own_data,
            },
        }
        with write_stage(target, "evaluate", {"settings": vars(config)}) as new:
            write_json(new / "report.json", report)
            with open(new / "samples.jsonl", "w", encoding="utf-8") as file:
                write_rows(file, samples)
    print_report(report)
    print(
        f"wrote {target}: {len(pairs)} {config.split} pairs, {len(samples):,} answers in "
        "samples.jsonl"
    )


if __name__ == "__main__":
    run(main, Config)
