"""How good is a model, and has it collapsed? Preferences, answers, judge, reward model.

evaluate.py compares models with it; tools/sweep.py chooses among adapters with it.

A scorer is a callable (dialogues, replies) -> list of floats, where a dialogue is a tuple of
(role, text) turns and a reply is a text.
"""

import importlib
import json
import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from common import toy
from common.answers import (
    GenerationSettings,
    answer_logprobs,
    attached,
    generate,
    kl_to_base,
    repeated_ngrams,
    stop_tokens,
    text_of,
)
from common.chat import chat_form, render_chat, render_transcript
from common.config import UserError, first_line
from common.data import RESPONSES, collate, split_into_passes, tokenize
from common.hf import (
    check_ids,
    choose_tokens_per_pass,
    context_length,
    loading_options,
    response_logprobs,
    token_mean,
    try_or_refuse,
)
from lora import AdapterWeights, enable_only

# ---------------------------------------------------------------- scorers


def inherited_judge(settings):
    """The judge that a stage's settings name, where it is the embedded default's own; else None.

    A name from a file is not imported: whoever wrote the file would choose what runs here.
    """
    judge = settings.get("judge")
    if judge in (None, toy.JUDGE):
        return judge
    print(f"the judge {judge} of an earlier stage is not taken: give it as --judge")
    return None


def load_judge(name):
    """The scorer that calls "module:function", a function (prompt, response) -> number.

    UserError where there is none, or, when it scores, where an answer makes it fail.
    """
    module, _, function = name.partition(":")
    # at the end, so that no file in the working directory stands in for a library
    sys.path.append(os.getcwd())
    try:
        judge = getattr(importlib.import_module(module), function)
    except Exception as error:
        # somebody else's module may fail in any way
        raise UserError(
            f"--judge {name}: {first_line(error)}; give it as module:function"
        ) from None

    def judge_one(turns, reply):
        where = f"on the answer {reply[:60]!r}"
        try:
            score = judge(render_transcript(turns), reply)
        except Exception as error:
            message = f"--judge {name} fails {where}: {first_line(error)}"
            raise UserError(message) from None
        try:
            value = math.nan if isinstance(score, str) else float(score)
        except Exception:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"--judge {name} returns {score!r} {where}: a number is needed")
        return value

    def score(dialogues, replies):
        return [judge_one(turns, reply) for turns, reply in zip(dialogues, replies)]

    return score


def check_reward_model(name):
    """UserError unless a model folder or hub name holds a classifier with one label."""
    config = try_or_refuse(
        "read its config",
        name,
        lambda: AutoConfig.from_pretrained(name, trust_remote_code=False),
        "--reward-model",
    )
    if config.num_labels != 1:
        raise UserError(
            f"--reward-model {name} has {config.num_labels} labels: a reward model has one"
        )


def load_classifier(name, dtype):
    """The sequence classifier of a model folder or hub name. dtype: "float32" or "bfloat16".

    UserError where its files lack weights.
    """
    options = loading_options(name)
    model, loading = try_or_refuse(
        "read its weights",
        name,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            name, dtype=getattr(torch, dtype), **options
        ),
        "--reward-model",
    )
    missing = sorted(loading["missing_keys"])
    if missing:
        # such as the head of a language model: its scores would be random
        raise UserError(
            f"--reward-model {name} lacks {', '.join(missing)}: it is no trained classifier"
        )
    return model.eval()


def load_reward_model(name, dtype, device, batch_size):
    """The scorer that returns the rewards of a sequence classifier with one label.

    It reads dialogue and reply as its own chat template renders them. Without a template it reads
    question and reply as a pair where its tokenizer has a separator, else a transcript. Inputs
    that are too long lose their beginning.
    """
    check_reward_model(name)
    tokenizer = try_or_refuse(
        "read its tokenizer",
        name,
        lambda: AutoTokenizer.from_pretrained(
            name, truncation_side="left", trust_remote_code=False
        ),
        "--reward-model",
    )
    model = load_classifier(name, dtype).to(device)
    pad_id = tokenizer.pad_token_id
    if pad_id is None or pad_id != model.config.pad_token_id:
        # a classifier that does not know the padding cannot read padded batches
        batch_size = 1
    max_length = min(tokenizer.model_max_length, longest_input(model))
    with naming_reward_model(name):
        form = chat_form(tokenizer) if tokenizer.chat_template else None

    def encode_chat(dialogues, replies):
        """Ids by the chat template: control tokens that a text spells out stay text."""
        texts = []
        for turns, reply in zip(dialogues, replies):
            with naming_reward_model(name):
                texts.append(render_chat(tokenizer, turns, reply=reply, form=form))
        ids = [ids[-max_length:].tolist() for ids in tokenize(tokenizer, texts, form.controls)]
        return tokenizer.pad({"input_ids": ids}, padding=batch_size > 1, return_tensors="pt")

    def encode_texts(dialogues, replies):
        """Ids of question and reply as a pair, or of one transcript."""
        if tokenizer.sep_token:
            columns = [[question(turns) for turns in dialogues], list(replies)]
        else:
            pairs = zip(dialogues, replies)
            columns = [[f"{render_transcript(turns)} {reply}" for turns, reply in pairs]]
        return tokenizer(
            *columns,
            padding=batch_size > 1,
            truncation=True,
            max_length=max_length,
            return_tensors="pt",
        )

    @torch.no_grad()
    def score(dialogues, replies):
        rewards = []
        for start in range(0, len(replies), batch_size):
            part = slice(start, start + batch_size)
            encode = encode_chat if form else encode_texts
            encoded = encode(dialogues[part], replies[part])
            check_ids(name, encoded["input_ids"].max().item(), "--reward-model")
            logits = model(**encoded.to(device)).logits
            rewards += logits[:, 0].float().tolist()
        for reward, reply in zip(rewards, replies):
            if not math.isfinite(reward):
                raise UserError(
                    f"--reward-model {name} gives {reward} on the answer {reply[:60]!r}"
                )
        return rewards

    return score


@contextmanager
def naming_reward_model(name):
    """Within the context, what the chat template refuses is said of the reward model."""
    try:
        yield
    except UserError as error:
        # it has no such setting
        message = str(error).removesuffix("; use --template plain")
        raise UserError(f"--reward-model {name}: {message}") from None


def longest_input(model):
    """The longest input of a classifier in tokens. RoBERTa and its relatives count positions from
    the padding's id on."""
    longest = context_length(model.config)
    for module_name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if module_name.endswith("position_embeddings") and padding is not None:
            longest -= padding + 1
    return longest


def question(turns):
    """A dialogue as one text: a single turn as it was asked, several turns as a transcript."""
    return turns[0][1] if len(turns) == 1 else render_transcript(turns)


# ---------------------------------------------------------------- log-probabilities


@torch.no_grad()
def preferences(model, pairs, prompt, pad_id, tokens_per_pass=None):
    """How a model rates chosen against rejected responses, P = mean log π(r_t | ...).

    prompt: "plain", "positive" or "negative". Returns the share of pairs with
    P(chosen) > P(rejected), the mean difference, and the NLL per token of the chosen responses.
    """
    # two inputs a pair
    pass_size = choose_tokens_per_pass(tokens_per_pass, model.device) // 2
    lengths = [pair.max_length() for pair in pairs]
    margins = []
    nll = 0.0
    n_tokens = 0
    for indices in split_into_passes(range(len(pairs)), lengths, pass_size):
        n = len(indices)
        examples = [pairs[i].input(prompt, "chosen") for i in indices]
        examples += [pairs[i].input(prompt, "rejected") for i in indices]
        logprobs, mask = response_logprobs(model, collate(examples, pad_id, model.device))
        chosen, rejected = token_mean(logprobs, mask).view(2, n)
        margins.append(chosen - rejected)
        nll -= logprobs[:n].sum().item()
        n_tokens += mask[:n].sum().item()
    margins = torch.cat(margins)
    return (margins > 0).float().mean().item(), margins.mean().item(), nll / n_tokens


# ---------------------------------------------------------------- the implicit reward


@dataclass
class ImplicitReward:
    """The judge that comes with every stage 1: log π+(r | q) - log π-(r | q), in nats an answer.

    π+ and π- are what stage 1 has learned of preferred and dispreferred behaviour: DUAL's good and
    bad model, SCIT's one model under p+ and under p-. As it judges by the models that h+ and h- are
    of, it tells whether an adapter moves the right way, not whether it has moved too far.
    """

    plus: AdapterWeights
    minus: AdapterWeights
    plus_prompt: str = "plain"
    minus_prompt: str = "plain"

    def __call__(self, model, pairs, answers, pad_id, tokens_per_pass=None):
        """The rewards of answers (lists of ids), one to each pair. No adapter is enabled."""

        def logprobs(weights, prompt):
            prompts = prompts_of(pairs, prompt)
            with attached(model, weights):
                return answer_logprobs(model, prompts, answers, pad_id, tokens_per_pass)

        plus = logprobs(self.plus, self.plus_prompt)
        minus = logprobs(self.minus, self.minus_prompt)
        return [p - m for p, m in zip(plus, minus)]


def implicit_rewards(adapters):
    """{name: ImplicitReward} of the methods whose stage 1 is there. adapters: {kind:
    AdapterWeights}, of which the kinds scit, good and bad count."""
    rewards = {}
    if "scit" in adapters:
        weights = adapters["scit"]
        rewards["implicit_scit"] = ImplicitReward(weights, weights, "positive", "negative")
    if {"good", "bad"} <= set(adapters):
        rewards["implicit_dual"] = ImplicitReward(adapters["good"], adapters["bad"])
    return rewards


@torch.no_grad()
def reward_metrics(model, adapters, adapter, pairs, prompt, beta, pad_id, tokens_per_pass):
    """What trainers of DPO report, under their names, of some held-out pairs.

    adapters: all LoRA on the model; adapter: the one of them that is measured, given its prompt
    ("plain" or "positive"). The reward of a response r is β (log π(r | p, q) - log π_base(r | q)).
    Returns {"rewards/margins": mean of chosen minus rejected, "rewards/accuracies": how often that
    is above 0, "logps/chosen", "logps/rejected": means of log π, summed over a response}.
    """
    answers = [pair.responses[name].tolist() for name in RESPONSES for pair in pairs]

    def logps(enabled, prompt):
        prompts = prompts_of(pairs, prompt) * len(RESPONSES)
        with enable_only(enabled, among=adapters):
            sums = answer_logprobs(model, prompts, answers, pad_id, tokens_per_pass)
        return torch.tensor(sums).view(len(RESPONSES), len(pairs))

    policy, base = logps([adapter], prompt), logps([], "plain")
    ratios = policy - base  # [chosen | rejected, n]
    margins = ratios[0] - ratios[1]
    return {
        "rewards/margins": beta * margins.mean().item(),
        "rewards/accuracies": (margins > 0).float().mean().item(),
        "logps/chosen": policy[0].mean().item(),
        "logps/rejected": policy[1].mean().item(),
    }


@dataclass
class Scoring:
    """How models are scored. scorers: {"judge" | "reward": scorer}; implicit: {name:
    ImplicitReward}."""

    scorers: dict
    implicit: dict
    generation: GenerationSettings
    tokens_per_pass: int | None = None


# ---------------------------------------------------------------- models


def prompts_of(pairs, prompt):
    """The ids of each pair's prompt, lists: "plain", "positive" or "negative"."""
    return [pair.prompts[prompt].tolist() for pair in pairs]


def score_model(model, adapter, tokenizer, pairs, prompt, scoring, keep=None):
    """Score one model on pairs: how it rates their responses, and how it answers their prompts.

    adapter: the LoRA that is attached to the model, or None; prompt: "plain", "positive" or
    "negative"; scoring: Scoring; keep: a function that is given the rows before a scorer sees
    them. Returns the report {figure: number}, and the greedy and sampled answers as rows in
    AlpacaEval's form (but for the generator's name), each with its scores, the sampled ones also
    with their KL to the base.
    """
    pad_id, tokens_per_pass = tokenizer.pad_token_id, scoring.tokens_per_pass
    accuracy, margin, chosen_nll = preferences(model, pairs, prompt, pad_id, tokens_per_pass)
    report = {
        "preference_accuracy": accuracy,
        "preference_margin": margin,
        "chosen_nll": chosen_nll,
    }

    dialogues = [pair.pair.prompt for pair in pairs]
    prompts, plain = prompts_of(pairs, prompt), prompts_of(pairs, "plain")
    end_token = pairs[0].end_token
    stops = stop_tokens(model, tokenizer, end_token)
    rows = []
    answers = []
    for decoding, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        new_answers = generate(
            model,
            tokenizer,
            prompts,
            scoring.generation,
            sample=temperature > 0,
            end_token=end_token,
        )
        replies = [text_of(tokenizer, answer, stops) for answer in new_answers]
        new_rows = [
            {"instruction": question(turns), "output": reply, "temperature": temperature}
            for turns, reply in zip(dialogues, replies)
        ]
        if keep:
            keep(new_rows)
        all_scores = {name: scorer(dialogues, replies) for name, scorer in scoring.scorers.items()}
        with enable_only([], among=[adapter] if adapter else []):
            for name, reward in scoring.implicit.items():
                all_scores[name] = reward(model, pairs, new_answers, pad_id, tokens_per_pass)
        for name, scores in all_scores.items():
            report[f"{name}_{decoding}"] = sum(scores) / len(scores)
            for row, score in zip(new_rows, scores):
                row[name] = score
        rows += new_rows
        answers += new_answers

    # new_answers are now the sampled ones
    kl = kl_to_base(model, adapter, prompts, plain, new_answers, pad_id, tokens_per_pass)
    for row, value in zip(new_rows, kl):
        row["kl_to_base"] = value
    n_tokens = sum(map(len, answers))
    with enable_only([], among=[adapter] if adapter else []):
        logprobs = answer_logprobs(model, plain * 2, answers, pad_id, tokens_per_pass)
    mean_kl, kl_error = mean_and_error(kl)
    report |= {
        "kl_to_base": mean_kl,
        "kl_error": kl_error,
        "kl_per_token": sum(kl) / sum(map(len, new_answers)),
        "own_nll_under_base": -sum(logprobs) / n_tokens,
        "repeated_ngrams": repeated_ngrams(answers),
        "mean_length": n_tokens / len(answers),
        "ended": sum(answer[-1] in stops for answer in answers) / len(answers),
    }
    return report, rows


def mean_and_error(values):
    """The mean of some numbers and its standard error."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def score_models(model, adapters, tokenizer, pairs, scoring, answers_path):
    """score_model for several adapters on one base, {name: (AdapterWeights or None, prompt)}.

    Returns {name: report} and all rows of samples.jsonl. answers_path: a file for the answers as
    they come, without their scores; it is left behind where a scorer fails.
    """
    reports = {}
    samples = []
    bar = tqdm(adapters.items(), desc="score", unit="model")
    with open(answers_path, "w", encoding="utf-8") as file:
        for name, (weights, prompt) in bar:
            bar.set_postfix_str(name)

            def keep(rows, name=name):
                write_rows(file, [{"generator": name, **row} for row in rows])

            with attached(model, weights) as adapter:
                try:
                    reports[name], rows = score_model(
                        model, adapter, tokenizer, pairs, prompt, scoring, keep
                    )
                except UserError as error:
                    raise UserError(f"{error}; the answers so far are in {answers_path}") from None
            samples += [{"generator": name, **row} for row in rows]
    Path(answers_path).unlink()
    return reports, samples


def write_rows(file, rows):
    """Append rows to an open file of JSON lines."""
    file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    file.flush()


# ---------------------------------------------------------------- comparing models


def signs_of_collapse(report, base):
    """The signs of collapse in a model's report beside its base's, as text; "" without any."""
    signs = []
    nll = report["own_nll_under_base"]
    base_nll = base["own_nll_under_base"]
    if nll > 3 * base_nll:
        signs.append(
            "the base finds its answers strange "
            f"(NLL {nll:.2f} per token, the base's own {base_nll:.2f})"
        )
    if report["repeated_ngrams"] > base["repeated_ngrams"] + 0.1:
        signs.append(f"it repeats itself ({report['repeated_ngrams']:.0%} of the 4-grams)")
    return " and ".join(signs)


def win_rate(scores, base_scores, z=1.96):
    """How often a model scores above its base, prompt by prompt; a tie counts half.

    Returns (rate, low, high), with Wilson's 95% interval.
    """
    n = len(scores)
    wins = sum((a > b) + (a == b) / 2 for a, b in zip(scores, base_scores))
    rate = wins / n
    center = rate + z * z / (2 * n)
    half_width = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return rate, (center - half_width) / scale, (center + half_width) / scale


def figures_to_choose_by(reports):
    """What models are compared by, in words, and {name: figure}: their reward or the judge's score,
    greedy and sampled averaged, else the implicit reward of the sampled answers."""
    base = reports["base"]
    for scorer in ("reward", "judge"):
        greedy, sampled = f"{scorer}_greedy", f"{scorer}_sampled"
        if greedy in base:
            figures = {name: (r[greedy] + r[sampled]) / 2 for name, r in reports.items()}
            return f"the best {scorer}", figures
    columns = ("implicit_scit_sampled", "implicit_dual_sampled")
    column = next(column for column in columns if column in base)
    return "the highest implicit reward", {name: r[column] for name, r in reports.items()}


def choose_best(reports, max_kl=math.inf):
    """The best of several models beside their base, {"base" | name: report}, and why.

    The highest figure wins, of the models that show no sign of collapse and are at most max_kl
    nats from the base. Where there is none, the one that is nearest to the base wins, of those
    without a sign of collapse if possible.
    """
    base = reports["base"]
    candidates = [name for name in reports if name != "base"]
    collapses = {name: signs_of_collapse(reports[name], base) for name in candidates}
    sound = [name for name in candidates if not collapses[name]]
    kl = {name: reports[name]["kl_to_base"] for name in candidates}
    near = [name for name in sound if kl[name] <= max_kl]
    criterion, figures = figures_to_choose_by(reports)
    best = max(near, key=figures.get) if near else min(sound or candidates, key=kl.get)

    if max_kl < math.inf:
        criterion += f" at {max_kl:g} nats or less"
    reasons = [f"with {criterion} ({figures[best]:.3f}; base {figures['base']:.3f})"]
    if kl[best] > max_kl:
        reasons.append(f"WARNING: it is {kl[best]:.1f} nats from the base")
    if figures[best] <= figures["base"]:
        reasons.append("WARNING: it is no better than the base")
    for name in candidates:
        if collapses[name]:
            reasons.append(f"{name} shows a collapse: {collapses[name]}")
    return best, "; ".join(reasons)


def markdown_table(reports):
    """The reports of several models, {name: {column: number}}, as a Markdown table."""
    columns = list(next(iter(reports.values())))
    widths = [max(len(name) for name in reports)]
    widths += [max(len(column), 6) for column in columns]
    lines = [["", *columns], ["-" * width for width in widths]]
    for name, report in reports.items():
        lines.append([name, *(f"{report[column]:.3f}" for column in columns)])
    padded = [map(str.rjust, line, widths) for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in padded)
