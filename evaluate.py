"""Did it work? Base, instructed and aligned models side by side, on test pairs that no stage has trained on.

    python evaluate.py                                            every model that is in OUT
    python evaluate.py --data test.jsonl --split all --judge my_module:my_judge
    python evaluate.py --prompt "How do I cut a plank?"           answers of base and aligned, nothing written

Preference accuracy does not see a collapsed model, so every model also answers the prompts itself, greedily and at
temperature 1. A judge, any callable (prompt, response) -> [0, 1], scores the answers; their NLL under the base,
their length and their repeated n-grams show a collapse without one. Writes OUT/evaluate/report.json and samples.jsonl.
"""
import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm
from transformers import GenerationConfig

import data
from files import RECORD, UserError, checked, inherit, new_stage, read_stage, run, setting, versions, write_json
from lora import LoRA, load_adapter
from model import load_model, load_tokenizer, model_digest, pick_device, response_logprobs, token_mean

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
    judge: str | None = setting(None, "module:function that scores (prompt, response); empty inherits")
    split: Literal["test", "valid", "train", "all"] = setting("test", "pairs to evaluate on")
    limit: int = setting(200, "use the first pairs only", least=1)
    max_new_tokens: int = setting(64, "longest answer", least=1)
    batch_size: int = setting(64, "prompts in a forward pass", least=1)
    model: str | None = setting(None, "model folder or hub name; empty inherits")
    data: list[str] | None = setting(None, "preference pairs, as in stage 1; empty inherits")
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(None, "of the model; empty inherits")
    max_length: int | None = setting(None, "longest input in tokens; empty inherits", least=2)
    seed: int | None = setting(None, "seed of the split and of the sampling; empty inherits")


def load_judge(name):
    """The callable that "module:function" names."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--judge {name}: {error}; give it as module:function") from None


@torch.no_grad()
def preferences(model, pairs, prompt, pad_id, device, batch_size):
    """(share of pairs with P(chosen) > P(rejected), mean difference, NLL a token of chosen), P = mean log π(r_t | ...)."""
    margins, nll, tokens = [], 0.0, 0
    for i in range(0, len(pairs), batch_size):
        group = pairs[i:i + batch_size]
        examples = [pair.example(prompt, response) for response in ("chosen", "rejected") for pair in group]
        logprobs, mask = response_logprobs(model, data.collate(examples, pad_id, device))
        chosen, rejected = token_mean(logprobs, mask).view(2, -1)
        margins.append(chosen - rejected)
        nll, tokens = nll - logprobs[:len(group)].sum().item(), tokens + mask[:len(group)].sum().item()
    margins = torch.cat(margins)
    return (margins > 0).float().mean().item(), margins.mean().item(), nll / tokens


@torch.no_grad()
def generate(model, tokenizer, prompts, sample, config, seed, end=None):
    """Answers to prompts (lists of ids), greedy or sampled at temperature 1: lists of ids, with EOS, or the token `end`, where it came."""
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    stops = {*(stop if isinstance(stop, list) else [stop]), end} - {None}
    # temperature 1 means the model's own distribution: no top-k, no top-p
    how = GenerationConfig(do_sample=sample, max_new_tokens=config.max_new_tokens, eos_token_id=list(stops) or None, pad_token_id=tokenizer.pad_token_id,
                           **(dict(temperature=1.0, top_k=0, top_p=1.0) if sample else {}))
    torch.manual_seed(seed)
    answers, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for i in range(0, len(prompts), config.batch_size):
        group = order[i:i + config.batch_size]
        width = max(len(prompts[j]) for j in group)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompts[j])) + prompts[j] for j in group])       # left-padded
        attention = torch.tensor([[0] * (width - len(prompts[j])) + [1] * len(prompts[j]) for j in group])
        new = model.generate(input_ids=ids.to(model.device), attention_mask=attention.to(model.device), generation_config=how)[:, width:]
        for j, answer in zip(group, new.tolist()):
            answers[j] = answer[:next((k + 1 for k, token in enumerate(answer) if token in stops), len(answer))]
    return answers


def repeated_ngrams(answers, n=4):
    """Share of the n-grams that have occurred before in the same answer."""
    repeated = total = 0
    for answer in answers:
        grams = [tuple(answer[i:i + n]) for i in range(len(answer) - n + 1)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return repeated / max(1, total)


@torch.no_grad()
def nll_under(model, pairs, answers, pad_id, device, batch_size):
    """NLL a token of answers after the plain prompts: high for text that the model finds strange."""
    nll = tokens = 0.0
    for i in range(0, len(pairs), batch_size):
        examples = [(pair.prompts["plain"] + answer, len(pair.prompts["plain"]))
                    for pair, answer in zip(pairs[i:i + batch_size], answers[i:i + batch_size])]
        logprobs, mask = response_logprobs(model, data.collate(examples, pad_id, device))
        nll, tokens = nll - logprobs.sum().item(), tokens + mask.sum().item()
    return nll / tokens


def text_of(tokenizer, answer):
    """An answer as text, ended where the model goes on to write the next human turn."""
    return tokenizer.decode(answer, skip_special_tokens=True).split("\n\nHuman:")[0].strip()


def evaluate_model(model, adapter, tokenizer, pairs, prompt, judge, config):
    """The report's figures of one model, and its answers as rows of samples.jsonl (less the model's name)."""
    accuracy, margin, chosen_nll = preferences(model, pairs, prompt, tokenizer.pad_token_id, model.device, config.batch_size)
    scores, rows, answers = {}, [], []
    for sample in (False, True):
        new = generate(model, tokenizer, [pair.prompts[prompt] for pair in pairs], sample, config, config.seed, pairs[0].end)
        found = [{"instruction": data.render(pair.pair.prompt), "output": text_of(tokenizer, answer), "temperature": float(sample)}
                 for pair, answer in zip(pairs, new)]
        if judge:
            for row in found:
                row["judge"] = float(judge(row["instruction"], row["output"]))
            scores[sample] = sum(row["judge"] for row in found) / len(found)
        rows, answers = rows + found, answers + new
    if adapter:
        adapter.enabled = False
    own_nll = nll_under(model, pairs * 2, answers, tokenizer.pad_token_id, model.device, config.batch_size)
    return {"preference_accuracy": accuracy, "preference_margin": margin, "chosen_nll": chosen_nll,
            "judge_greedy": scores.get(False), "judge_sampled": scores.get(True), "own_nll_under_base": own_nll,
            "repeated_ngrams": repeated_ngrams(answers), "mean_length": sum(map(len, answers)) / len(answers)}, rows


def main(config):
    # the models that are there, and what their stages say
    out = Path(config.out)
    names = [name for name, (folder, _, _) in MODELS.items() if folder is None or (out / folder / RECORD).is_file()]
    records = {}
    for name in names[1:]:
        folder, kind, _ = MODELS[name]
        records[name] = read_stage(out / folder, kind, "python align.py" if kind == "align" else f"python {folder.partition('/')[0]}.py")
    if not records:
        raise UserError(f"no adapter in {out}: run `python scit.py` or `python dual.py` first")
    latest = records[names[-1]]
    settings = latest["settings"]
    inherit(config, {"judge": None, **settings}, ("model", "data", "dtype", "max_length", "seed", "judge"), out / MODELS[names[-1]][0])
    judge, device = config.judge and load_judge(config.judge), pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, getattr(torch, config.dtype), device)
    digest = model_digest(config.model)
    for name, record in records.items():
        if record["model_digest"] != digest:
            raise UserError(f"{out / MODELS[name][0]} was made for another model than {config.model}: run its stage again or use another --out")

    factors = {name: load_adapter(checked(out / MODELS[name][0], record), model.base_model) for name, record in records.items()}

    def attach(name):
        return LoRA(model.base_model, factors=factors[name]).eval() if name in factors else None

    if config.prompt is not None:
        pair = data.encode(tokenizer, data.Pair((("user", config.prompt),), "", "", "test"), template=settings["template"])
        for name in names:
            if name == "base" or name.endswith("aligned"):
                adapter = attach(name)
                print(f"{name:>12}: {text_of(tokenizer, generate(model, tokenizer, [pair.prompts['plain']], False, config, config.seed, pair.end)[0])}")
                if adapter:
                    adapter.remove()
        return

    splits = ("train", "valid", "test") if config.split == "all" else (config.split,)
    pairs = data.prepare(config.data, splits, tokenizer, config.max_length, config.seed, None, settings["positive"], settings["negative"], settings["template"])
    pairs = sum(pairs.values(), [])[:config.limit]
    report, samples = {}, []
    for name in (bar := tqdm(names, desc="evaluate", unit="model")):
        bar.set_postfix_str(name)
        adapter = attach(name)
        report[name], rows = evaluate_model(model, adapter, tokenizer, pairs, MODELS[name][2], judge, config)
        samples += [{"generator": name, **row} for row in rows]
        if adapter:
            adapter.remove()

    with new_stage(out / "evaluate", "evaluate", {"settings": vars(config)}) as new:
        write_json(new / "report.json", {"models": report, "settings": {**vars(config), "pairs": len(pairs)}, "versions": versions()})
        (new / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
    columns = list(report["base"])
    print(f"\n{'':>14}" + "".join(f"{column.replace('_', ' '):>21}" for column in columns))
    for name, row in report.items():
        print(f"{name:>14}" + "".join(f"{'-' if row[c] is None else format(row[c], '.3f'):>21}" for c in columns))
    print(f"wrote {out / 'evaluate'}: {len(pairs)} {config.split} pairs, {len(samples):,} answers in samples.jsonl")


if __name__ == "__main__":
    run(main, Config)
