"""Which strength? Make an adapter for each value, score all of them, and keep the best.

    python -m tools.sweep --kl 1 2 4 8                   after collect.py
    python -m tools.sweep --strength 0.1 0.25 0.4 --judge my_module:my_judge
    python -m tools.sweep --alpha 0.5 1 2 --reward-model PATH_OR_HUB_NAME

Values of --kl are scales of one adapter, which is trained once. For values of --strength or --alpha
an adapter is trained each, the one that align.py would train. They are scored on validation pairs.
The best has the highest reward or judge's score. Without either it has the highest implicit
reward (see common/score.py), which rises with strength: then --max-kl bounds how far an adapter may
be from the base. Adapters that show signs of collapse are out. Writes all of them and their table
to OUT/METHOD/sweep, and the best to OUT/METHOD/align.
"""

import dataclasses
import gc
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import align
from common.answers import GenerationSettings
from common.config import TrainingDiverged, UserError, run, setting
from common.data import prepare_pairs, sample
from common.dial import dial, scaled
from common.hf import choose_device, load_model, load_tokenizer
from common.score import (
    Scoring,
    check_reward_model,
    choose_best,
    implicit_rewards,
    inherited_judge,
    load_judge,
    load_reward_model,
    markdown_table,
    prompts_of,
    score_models,
)
from common.stage1 import open_stage1
from common.stages import (
    MANIFEST,
    claim,
    next_command,
    read_stage,
    verified_path,
    write_json,
    write_stage,
)
from lora import load_adapter, save_adapter
from tools.plots import check_plot, plot_sweep

# the adapters are scored on at most this many validation pairs
SCORED_PAIRS = 200

# prompts answered at a time, and answers that a reward model reads at a time
BATCH = 64


@dataclass
class Config(align.Config):
    """The settings of align.py, with several values of kl, strength or alpha."""

    kl: list[float] | None = setting(None, "values of --kl, see align.py", minimum=1e-3)
    strength: list[float] | None = setting(None, "values of ρ, see align.py")
    alpha: list[float] | None = setting(None, "values of α, see align.py")
    judge: str | None = setting(
        None,
        "module:function that scores (prompt, response); empty takes the embedded default's, where "
        "stage 1 ran on it",
    )
    max_kl: float = setting(
        5, "without judge and reward model: the KL of the best, in nats, at most", minimum=0
    )
    plot: str | None = setting(
        None, "also draw the scores over the KL: a .png, .pdf or .svg", group="run"
    )
    reward_model: str | None = setting(
        None, "sequence classifier of one label that scores the answers: folder or hub name"
    )


def plan_runs(config):
    """{name: align.Config} of the adapters. UserError unless there are values of one setting."""
    given = [name for name in ("kl", "strength", "alpha") if getattr(config, name)]
    if len(given) != 1:
        raise UserError("give several values of --kl, of --strength or of --alpha")
    setting_name = given[0]
    values = getattr(config, setting_name)
    shared = {field.name: getattr(config, field.name) for field in dataclasses.fields(align.Config)}
    runs = {}
    for value in values:
        run_settings = {**shared, "kl": None, "strength": None, "alpha": None, setting_name: value}
        runs[f"{setting_name}_{value:g}"] = align.Config(**run_settings)
    if len(runs) < len(values):
        text = " ".join(f"{value:g}" for value in values)
        raise UserError(f"--{setting_name} {text}: give each value once")
    return runs


def read_pairs(manifest, split, tokenizer):
    """The PreparedPairs of a split of those that were collected. manifest: collect's or align's."""
    collected = manifest["settings"]
    pairs = prepare_pairs(
        collected["data"],
        (split,),
        tokenizer,
        collected["max_length"],
        collected["split_seed"],
        positive=collected["positive"],
        negative=collected["negative"],
        template=collected["template"],
        columns=collected["columns"],
    )
    if pairs.source_digest != manifest["inputs"]["pairs"]:
        raise UserError(
            f"{', '.join(collected['data'])}: these are other pairs than those that were "
            "collected: bring those back, or run `python collect.py` again"
        )
    return pairs


def train_missing(runs, sweep_folder):
    """Train the adapters that an interrupted sweep has not written yet. Returns the names of all
    that are there: one whose training diverges is left out, with a warning."""
    names = []
    for name, run_config in runs.items():
        if not (sweep_folder / name / MANIFEST).is_file():
            print(f"{name}:")
            try:
                align.main(run_config, sweep_folder / name)
            except TrainingDiverged as error:
                print(f"WARNING: left out: {error}")
                continue
            finally:
                # hooks and their layers refer to each other: only this frees the model's memory
                gc.collect()
        names.append(name)
    if not names:
        raise UserError("no adapter of the sweep is left: lower --lr or the values")
    return names


def scale_missing(config, names, trained, sweep_folder, model, tokenizer, pairs):
    """Scale the trained adapter to each KL, where an interrupted sweep has not done so yet. Returns
    the names of all that are there: one whose KL is out of reach is left out, with a warning."""
    manifest = read_stage(trained, "align", "python -m tools.sweep")
    weights = load_adapter(verified_path(trained, manifest), model.base_model)
    prompts, end_token = prompts_of(pairs, "plain"), pairs[0].end_token
    generation = GenerationSettings(config.max_new_tokens, BATCH, config.seed)
    made = []
    for name, kl in zip(names, config.kl):
        if (sweep_folder / name / MANIFEST).is_file():
            made.append(name)
            continue
        print(f"{name}:")
        pass_size = config.tokens_per_pass
        try:
            scale, measured = dial(
                model, tokenizer, weights, prompts, end_token, kl, generation, pass_size
            )
        except UserError as error:
            print(f"WARNING: left out: {error}")
            continue
        settings = {**manifest["settings"], "kl": kl}
        result = {**manifest, "settings": settings, "scale": scale, "kl_at_scale": measured}
        with write_stage(sweep_folder / name, "align", result) as new:
            new_weights = scaled(weights, scale)
            save_adapter(new, new_weights, model.base_model, config.model, settings["lora_dropout"])
        made.append(name)
    if not made:
        raise UserError("no adapter of the sweep is left: ask for other values of --kl")
    return made


def main(config):
    # 1. the values, the collection, and everything that scoring will need: fail early
    check_plot(config.plot)
    runs = plan_runs(config)
    first = dataclasses.replace(next(iter(runs.values())))
    manifest = align.complete_settings(first)
    collected, folder = manifest["settings"], Path(config.out) / first.method
    for name in ("method", "model", "seed", "layers", "steps", "batch_size", "lr"):
        setattr(config, name, getattr(first, name))
    config.judge = config.judge or inherited_judge(collected)
    scorers = {"judge": load_judge(config.judge)} if config.judge else {}
    if config.reward_model:
        check_reward_model(config.reward_model)
    stage1 = None
    try:
        stage1 = open_stage1(config.out, config.method)
    except UserError:
        # its adapters are the judge where there is no other; else they may have gone
        if not scorers and not config.reward_model:
            raise
    tokenizer = load_tokenizer(config.model)
    pairs = read_pairs(manifest, "valid", tokenizer)
    pairs = sample(pairs["valid"], SCORED_PAIRS, config.seed)

    # 2. train, where an earlier run of this sweep has not
    settings = {**collected, **vars(config)}
    depends_on = {**settings, "collected": manifest["digests"]}
    # scaled adapters serve sweeps of other values, too, as long as the answers are as long
    depends_on["values"] = config.max_new_tokens if config.kl else list(runs)
    result = {"settings": settings, "method": config.method}
    with (
        claim(folder / "sweep", folder / "align"),
        write_stage(folder / "sweep", "sweep", result, depends_on, config.restart) as new,
    ):
        device, dtype = choose_device(config.device), collected["dtype"]
        if config.kl:
            # one adapter for all: at the strength that align.py trains it with
            trained = {"kl": None, "strength": first.strength, "alpha": first.alpha}
            trained = dataclasses.replace(next(iter(runs.values())), **trained)
            train_missing({"trained": trained}, new)
            model = load_model(config.model, dtype, device, quantize=collected["quantize"])
            names = scale_missing(config, list(runs), new / "trained", new, model, tokenizer, pairs)
        else:
            names = train_missing(runs, new)
            model = load_model(config.model, dtype, device, quantize=collected["quantize"])

        # 3. score
        if config.reward_model:
            reward_model = load_reward_model(config.reward_model, dtype, device, BATCH)
            scorers["reward"] = reward_model
        adapters = {"base": (None, "plain")}
        for name in names:
            adapters[name] = (load_adapter(new / name, model.base_model), "plain")
        generation = GenerationSettings(config.max_new_tokens, BATCH, config.seed)
        implicit = implicit_rewards(stage1.load_weights(model.base_model) if stage1 else {})
        scoring = Scoring(scorers, implicit, generation, config.tokens_per_pass)
        answers_path = folder / "sweep_answers.jsonl"
        reports, _ = score_models(model, adapters, tokenizer, pairs, scoring, answers_path)
        # the implicit reward rises with every nat
        best, why = choose_best(reports, math.inf if scorers else config.max_kl)
        text = f"{markdown_table(reports)}\n\nbest: {best}, {why}\n"
        print(text)
        summary = {"best": best, "why": why, "pairs": len(pairs), "models": reports}
        write_json(new / "sweep.json", {**summary, "settings": settings})
        (new / "sweep.md").write_text(text, encoding="utf-8")

        # 4. the best becomes the aligned adapter, before the sweep counts as complete
        best_manifest = read_stage(new / best, "align", "python -m tools.sweep")
        best_manifest["settings"]["judge"] = config.judge
        with write_stage(folder / "align", "align", best_manifest) as aligned:
            for path in verified_path(new / best, best_manifest).glob("adapter*"):
                shutil.copy(path, aligned)

    if config.plot:
        plot_sweep(config.plot, reports, [*scorers, *implicit], best)
    print(f"wrote {folder / 'align'}: {best}; all adapters and their table: {folder / 'sweep'}")
    align.print_warnings(folder, adapters[best][0])
    print(next_command("evaluate.py", config.out))


if __name__ == "__main__":
    run(main, Config)
