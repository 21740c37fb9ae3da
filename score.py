"""What a model says and what it is worth: preferences, answers, judge, reward model, signs of collapse.

evaluate.py uses it to compare models, align.py to choose among the adapters of a sweep.
"""
import importlib
import math
import os
import sys

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

import data
from files import UserError
from lora import LoRA, only
from model import pick_tokens, read_model, response_logprobs, token_mean
from pairs import chat, render


def load_judge(name):
    """The callable (prompt, response) -> [0, 1] that "module:function" names, as a scorer: (dialogues, replies) -> floats."""
    module, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--judge {name}: {error}; give it as module:function") from None
    return lambda dialogues, replies: [float(judge(render(turns), reply)) for turns, reply in zip(dialogues, replies)]


def check_reward_model(name):
    """UserError unless a folder or hub name has a classifier of one label."""
    labels = read_model("config", name, lambda: AutoConfig.from_pretrained(name), "--reward-model").num_labels
    if labels != 1:
        raise UserError(f"--reward-model {name} has {labels} labels: a reward model has one")


def load_reward_model(name, dtype, device, batch_size):
    """A sequence classifier of one label as a scorer: (dialogues, replies) -> rewards.

    It reads what its own chat template makes of dialogue and reply; without one, question and reply as a pair where its tokenizer
    has a separator, else the HH form. What is too long loses its beginning.
    """
    check_reward_model(name)
    tokenizer = read_model("tokenizer", name, lambda: AutoTokenizer.from_pretrained(name, truncation_side="left"), "--reward-model")
    model, loading = read_model("weights", name, lambda: AutoModelForSequenceClassification.from_pretrained(
        name, dtype=dtype, output_loading_info=True), "--reward-model")
    if loading["missing_keys"]:
        raise UserError(f"--reward-model {name} lacks {', '.join(sorted(loading['missing_keys']))}: it is no trained classifier")
    model.eval().to(device)
    size = batch_size if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == model.config.pad_token_id else 1     # no padding, no batch
    longest = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 2**30)

    def texts(turns, reply):
        if tokenizer.chat_template:
            return [chat(tokenizer, turns, reply=reply)]
        return [question(turns), reply] if tokenizer.sep_token else [f"{render(turns)} {reply}"]

    @torch.no_grad()
    def score(dialogues, replies):
        read, rewards = [texts(turns, reply) for turns, reply in zip(dialogues, replies)], []
        for i in range(0, len(read), size):
            inputs = tokenizer(*map(list, zip(*read[i:i + size])), padding=size > 1, truncation=True, max_length=longest,
                               add_special_tokens=not tokenizer.chat_template, return_tensors="pt")
            rewards += model(**inputs.to(device)).logits[:, 0].float().tolist()
        return rewards
    return score


def question(turns):
    """A dialogue of one turn as it was asked, a longer one in the HH form."""
    return turns[0][1] if len(turns) == 1 else render(turns)


@torch.no_grad()
def preferences(model, pairs, prompt, pad_id, tokens_per_pass=None):
    """(share of pairs with P(chosen) > P(rejected), mean difference, NLL per token of chosen), P = mean log π(r_t | ...)."""
    margins, nll, tokens = [], 0.0, 0
    for part in data.micro_batches(range(len(pairs)), [pair.longest() for pair in pairs], pick_tokens(tokens_per_pass, model.device) // 2):
        group = [pairs[i] for i in part]
        examples = [pair.example(prompt, response) for response in ("chosen", "rejected") for pair in group]
        logprobs, mask = response_logprobs(model, data.collate(examples, pad_id, model.device))
        chosen, rejected = token_mean(logprobs, mask).view(2, -1)
        margins.append(chosen - rejected)
        nll, tokens = nll - logprobs[:len(group)].sum().item(), tokens + mask[:len(group)].sum().item()
    margins = torch.cat(margins)
    return (margins > 0).float().mean().item(), margins.mean().item(), nll / tokens


def stop_tokens(model, tokenizer, end=None):
    """The tokens that end an answer: those of the model's generation config, else EOS, and the template's own."""
    stop = model.generation_config.eos_token_id or tokenizer.eos_token_id
    return {*(stop if isinstance(stop, list) else [stop]), end} - {None}


@torch.no_grad()
def generate(model, tokenizer, prompts, sample, max_new_tokens, batch_size, seed, end=None):
    """Answers to prompts (lists of ids), greedy or sampled at temperature 1: lists of ids, with EOS, or the token `end`, where it came."""
    stops = stop_tokens(model, tokenizer, end)
    # the model's own distribution: no top-k, no top-p, and below nothing of its generation config, such as a penalty on repetition
    how = dict(do_sample=sample, eos_token_id=list(stops) or None, pad_token_id=tokenizer.pad_token_id)
    how |= dict(temperature=1.0, top_k=0, top_p=1.0) if sample else {}
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    torch.manual_seed(seed)
    answers, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for i in range(0, len(prompts), batch_size):
        group = order[i:i + batch_size]
        width = max(len(prompts[j]) for j in group)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(prompts[j])) + prompts[j] for j in group])       # left-padded
        attention = torch.tensor([[0] * (width - len(prompts[j])) + [1] * len(prompts[j]) for j in group])
        room = GenerationConfig(max_new_tokens=max(1, min(max_new_tokens, context - width)), **how)
        own, model.generation_config = model.generation_config, GenerationConfig()
        new = model.generate(input_ids=ids.to(model.device), attention_mask=attention.to(model.device), generation_config=room)[:, width:]
        model.generation_config = own
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
def nll_under(model, pairs, answers, pad_id, tokens_per_pass):
    """NLL per token of answers after the plain prompts: high for text that the model finds strange."""
    nll = tokens = 0.0
    examples = [(pair.prompts["plain"].tolist() + answer, len(pair.prompts["plain"])) for pair, answer in zip(pairs, answers)]
    for part in data.micro_batches(range(len(pairs)), [len(ids) for ids, _ in examples], pick_tokens(tokens_per_pass, model.device)):
        logprobs, mask = response_logprobs(model, data.collate([examples[i] for i in part], pad_id, model.device))
        nll, tokens = nll - logprobs.sum().item(), tokens + mask.sum().item()
    return nll / tokens


def text_of(tokenizer, answer):
    """An answer as text, ended where the model goes on to write the next human turn."""
    return tokenizer.decode(answer, skip_special_tokens=True).split("\n\nHuman:")[0].strip()


def score_model(model, adapter, tokenizer, pairs, prompt, scorers, max_new_tokens, batch_size, seed, tokens_per_pass=None):
    """The figures of one model on pairs, and its answers, greedy and at temperature 1, as rows of samples.jsonl (less its name).

    adapter: the one that is on the model, or None; prompt: "plain", "positive" or "negative"; scorers: {"judge" | "reward": scorer}.
    """
    accuracy, margin, chosen_nll = preferences(model, pairs, prompt, tokenizer.pad_token_id, tokens_per_pass)
    report, rows, answers = {"preference_accuracy": accuracy, "preference_margin": margin, "chosen_nll": chosen_nll}, [], []
    dialogues, stops = [pair.pair.prompt for pair in pairs], stop_tokens(model, tokenizer, pairs[0].end)
    for how in ("greedy", "sampled"):
        new = generate(model, tokenizer, [pair.prompts[prompt].tolist() for pair in pairs], how == "sampled", max_new_tokens, batch_size,
                       seed, pairs[0].end)
        replies = [text_of(tokenizer, answer) for answer in new]
        # AlpacaEval's fields, less generator
        found = [{"instruction": question(turns), "output": reply, "temperature": float(how == "sampled")} for turns, reply in zip(dialogues, replies)]
        for name, scorer in scorers.items():
            scores = scorer(dialogues, replies)
            for row, score in zip(found, scores):
                row[name] = score
            report[f"{name}_{how}"] = sum(scores) / len(scores)
        rows, answers = rows + found, answers + new
    with only([adapter] if adapter else []):
        own_nll = nll_under(model, pairs * 2, answers, tokenizer.pad_token_id, tokens_per_pass)
    return report | {"own_nll_under_base": own_nll, "repeated_ngrams": repeated_ngrams(answers),
                     "mean_length": sum(map(len, answers)) / len(answers), "ended": sum(answer[-1] in stops for answer in answers) / len(answers)}, rows


def score_models(model, adapters, tokenizer, pairs, scorers, max_new_tokens, batch_size, seed, tokens_per_pass):
    """score_model for each of {name: (Factors or None, prompt)} on one base: {name: figures}, and all rows of samples.jsonl."""
    reports, samples = {}, []
    for name, (factors, prompt) in (bar := tqdm(adapters.items(), desc="score", unit="model")):
        bar.set_postfix_str(name)
        adapter = LoRA(model.base_model, factors=factors).eval() if factors else None
        reports[name], rows = score_model(model, adapter, tokenizer, pairs, prompt, scorers, max_new_tokens, batch_size, seed, tokens_per_pass)
        samples += [{"generator": name, **row} for row in rows]
        if adapter:
            adapter.remove()
    return reports, samples


def collapsed(report, base):
    """What speaks for a collapse, as words, of a model's figures beside those of its base; "" where nothing does."""
    signs = []
    if report["own_nll_under_base"] > 3 * base["own_nll_under_base"]:
        signs.append(f"the base finds its answers strange (NLL {report['own_nll_under_base']:.2f} per token, its own {base['own_nll_under_base']:.2f})")
    if report["repeated_ngrams"] > base["repeated_ngrams"] + 0.1:
        signs.append(f"it repeats itself ({report['repeated_ngrams']:.0%} of the 4-grams)")
    return " and ".join(signs)


def win_rate(scores, base, z=1.96):
    """Share of prompts on which a model scores above its base, ties as half, with Wilson's 95% interval: (rate, low, high)."""
    n, rate = len(scores), sum((a > b) + (a == b) / 2 for a, b in zip(scores, base)) / len(scores)
    centre, half = rate + z * z / (2 * n), z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return rate, (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)


def choose(reports):
    """The best of several models beside their base, {"base" | name: figures}, and why. Those with signs of collapse are out; then
    counts the reward or the judge (greedy and sampled), or, without any, the NLL per token of the held-out chosen replies."""
    names = [name for name in reports if name != "base"]
    sound = [name for name in names if not collapsed(reports[name], reports["base"])]
    scorer = next((scorer for scorer in ("reward", "judge") if f"{scorer}_greedy" in reports["base"]), None)
    if scorer:
        sign, ground, figure = 1, f"the best {scorer}", {name: (row[f"{scorer}_greedy"] + row[f"{scorer}_sampled"]) / 2 for name, row in reports.items()}
    else:
        sign, ground, figure = -1, "the lowest NLL of the held-out chosen replies", {name: row["chosen_nll"] for name, row in reports.items()}
    best = max(sound or names, key=lambda name: sign * figure[name])
    out = [f"{name} shows a collapse: {collapsed(reports[name], reports['base'])}" for name in names if name not in sound]
    return best, "; ".join([f"with {ground} ({figure[best]:.3f}; base {figure['base']:.3f})",
                            *(["WARNING: it is no better than the base"] if sign * figure[best] <= sign * figure["base"] else []), *out])


def table(reports):
    """Figures of several models, {name: {column: number}}, as a Markdown table."""
    columns = list(next(iter(reports.values())))
    widths = [max(len(name) for name in reports), *(max(len(column), 6) for column in columns)]
    lines = [["", *columns], ["-" * width for width in widths],
             *([name, *(f"{row[column]:.3f}" for column in columns)] for name, row in reports.items())]
    return "\n".join("| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths)) + " |" for line in lines)
