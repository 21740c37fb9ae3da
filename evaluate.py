"""Did it work? Base, instructed and aligned models side by side, on test pairs that no stage has trained on.

    python evaluate.py                                            every model that is in OUT
    python evaluate.py --data test.jsonl --split all --judge my_module:my_judge
    python evaluate.py --reward-model PATH_OR_HUB_NAME            mean reward, and how often the aligned model wins over its base
    python evaluate.py --prompt "How do I cut a plank?"           answers of base and aligned, nothing written

Preference accuracy does not see a collapsed model, so every model also answers the prompts itself, greedily and at
temperature 1. A judge, any callable (prompt, response) -> [0, 1], or a reward model scores the answers; their NLL under
the base, their length and their repeated n-grams show a collapse without one. Writes OUT/evaluate/report.json and
samples.jsonl, whose rows have AlpacaEval's fields.
"""
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
from files import RECORD, UserError, checked, inherit, new_stage, read_stage, restore, run, setting, versions, write_json
from lora import LoRA, load_adapter
from model import load_model, load_tokenizer, model_digest, pick_device
from pairs import Pair
from score import generate, load_judge, load_reward_model, score_models, table, text_of, win_rate

MODELS = {                                    # name: (folder of its adapter under OUT, kind, prompt that it gets)
    "base": (None, None, "plain"),
    "scit_plus": ("scit/adapter", "scit", "positive"),
    "scit_minus": ("scit/adapter", "scit", "negative"),
    "scit_plain": ("scit/adapter", "scit", "plain"),
    "scit_aligned": ("scit/align", "align", "plain"),
    "good": ("dual/good", "good", "plain"),
    "bad": ("dual/bad", "bad", "plain"),
    "dual_aligned": ("dual/align", "align", "plain"),
}


@dataclass
class Config:
    out: str = setting("out", "folder of all stages")
    device: str | None = setting(None, "cpu, cuda, cuda:1; empty takes the GPU where there is one")
    prompt: str | None = setting(None, "only answer this, by base and aligned models")
    judge: str | None = setting(None, "module:function that scores (prompt, response); empty inherits, unless --data is given")
    reward_model: str | None = setting(None, "a sequence classifier of one label, folder or hub name, that scores the answers")
    split: Literal["test", "valid", "train", "all"] = setting("test", "pairs to evaluate on")
    limit: int = setting(200, "use so many pairs only, drawn at random", least=1)
    max_new_tokens: int = setting(64, "longest answer", least=1)
    batch_size: int = setting(64, "prompts answered at a time", least=1)
    tokens_per_pass: int | None = setting(None, "most tokens in a forward pass; empty takes 4096 on a GPU, 2048 on the CPU", least=1)
    model: str | None = setting(None, "model folder or hub name; empty inherits")
    data: list[str] | None = setting(None, "preference pairs, as in stage 1; empty inherits")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of the model; empty inherits")
    max_length: int | None = setting(None, "longest input in tokens; empty inherits", least=2)
    seed: int | None = setting(None, "seed of the sampling; empty inherits; the split stays that of stage 1")


def main(config):
    # the models that are there, and what their stages say
    out = Path(config.out)
    names = [name for name, (folder, _, _) in MODELS.items() if folder is None or (restore(out / folder) and (out / folder / RECORD).is_file())]
    records = {}
    for name in names[1:]:
        folder, kind, _ = MODELS[name]
        records[name] = read_stage(out / folder, kind, "python align.py" if kind == "align" else f"python {folder.partition('/')[0]}.py")
    if not records:
        raise UserError(f"no adapter in {out}: run `python scit.py` or `python dual.py` first")
    latest = records[names[-1]]
    settings = latest["settings"]
    judge = None if config.data else settings.get("judge")           # one that comes with a data set knows no other
    inherit(config, {**settings, "judge": judge}, ("model", "data", "dtype", "max_length", "seed", "judge"), out / MODELS[names[-1]][0])
    if len({(record["settings"]["split_seed"], record["settings"]["template"]) for record in records.values()}) > 1:
        raise UserError(f"{' and '.join(str(out / MODELS[name][0]) for name in records)} have splits of different seeds or other templates: "
                        "use another --out for each")
    told = records.get("scit_plus", latest)["settings"]     # SCIT's models alone are told p+ or p-
    device = pick_device(config.device)
    scorers = {"judge": load_judge(config.judge)} if config.judge else {}
    if config.reward_model:
        scorers["reward"] = load_reward_model(config.reward_model, config.dtype, device, config.batch_size)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, device)
    digest = model_digest(config.model)
    for name, record in records.items():
        if record["model_digest"] != digest:
            raise UserError(f"{out / MODELS[name][0]} was made for another model than {config.model}: run its stage again or use another --out")

    factors = {name: load_adapter(checked(out / MODELS[name][0], record), model.base_model) for name, record in records.items()}

    if config.prompt is not None:
        pair = data.encode(tokenizer, [Pair((("user", config.prompt),), "", "", "test")], template=settings["template"])[0]
        for name in names:
            if name == "base" or name.endswith("aligned"):
                adapter = LoRA(model.base_model, factors=factors[name]).eval() if name in factors else None
                answer = generate(model, tokenizer, [pair.prompts["plain"].tolist()], False, config.max_new_tokens, 1, config.seed, pair.end)[0]
                print(f"{name:>12}: {text_of(tokenizer, answer)}")
                if adapter:
                    adapter.remove()
        return

    pairs = data.prepare(config.data, (config.split,), tokenizer, config.max_length, settings["split_seed"], config.limit,
                         told["positive"], told["negative"], settings["template"])[config.split]
    report, samples = score_models(model, {name: (factors.get(name), MODELS[name][2]) for name in names}, tokenizer, pairs, scorers,
                                   config.max_new_tokens, config.batch_size, config.seed, config.tokens_per_pass)
    wins = {}                                 # over the base, prompt by prompt
    for name in names[1:]:
        for scorer in scorers:
            for how, temperature in (("greedy", 0.0), ("sampled", 1.0)):
                mine, base = ([row[scorer] for row in samples if row["generator"] == who and row["temperature"] == temperature] for who in (name, "base"))
                wins.setdefault(name, {})[f"{scorer}_{how}"] = win_rate(mine, base)

    with new_stage(out / "evaluate", "evaluate", {"settings": vars(config)}) as new:
        write_json(new / "report.json", {
            "models": report, "win_rate_over_base": wins, "versions": versions(),
            "settings": {**vars(config), "split_seed": settings["split_seed"], "pairs": len(pairs)}})
        (new / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    print(f"\n{table(report)}\n")
    for name, rates in wins.items():
        print(f"{name} wins over base: " + ", ".join(f"{what.replace('_', ', ')} {rate:.2f} [{low:.2f}, {high:.2f}]"
                                                     for what, (rate, low, high) in rates.items()))
    print(f"wrote {out / 'evaluate'}: {len(pairs)} {config.split} pairs, {len(samples):,} answers in samples.jsonl")


if __name__ == "__main__":
    run(main, Config)
