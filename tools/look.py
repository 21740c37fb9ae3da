"""A picture of what the method sees: one HTML page of held-out pairs.

    python -m tools.look                                 after align.py

Every token of both responses of a pair is shaded by the implicit reward log π+ - log π- (DUAL: good
against bad; SCIT: p+ against p-), or by how far align wants its state to move in a layer,
α|v|/|b|; a heat map shows all layers. Below are the answers of the base and of the aligned model.
It shows where in a response the preference sits, and whether it sits in the wrong place: length, an
end token, a mark of the template. Writes OUT/METHOD/look.html, which needs nothing else.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import collect
from common.answers import GenerationSettings, attached, generate, stop_tokens, text_of
from common.config import UserError, run, setting
from common.data import collate, sample, split_into_passes
from common.hf import (
    check_ids,
    check_same_model,
    choose_device,
    choose_tokens_per_pass,
    load_model,
    load_tokenizer,
    response_logprobs,
)
from common.score import prompts_of
from common.stage1 import check_adapters, open_stage1
from common.stages import atomic_write, choose_method, inherit, read_stage, verified_path
from lora import enable_only, load_adapter
from tools.sweep import read_pairs

PAGE = Path(__file__).with_name("look.html")

# answers are generated for so many prompts at a time
BATCH = 32


@dataclass
class Config:
    pairs: int = setting(24, "pairs to show, drawn at random", minimum=1)
    split: Literal["train", "valid", "test"] = setting("test", "which pairs")
    max_new_tokens: int = setting(64, "longest answer in tokens", minimum=1)
    method: Literal["scit", "dual"] | None = setting(
        None, "whose adapters to look at; empty takes those that are there"
    )
    model: str | None = setting(
        None, "the base model, if it has moved; empty takes align's", group="data"
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    seed: int | None = setting(None, "seed that draws the pairs; empty takes align's", group="run")
    tokens_per_pass: int | None = setting(
        None,
        "most tokens in one forward pass, padding included; "
        "empty takes 4096 on a GPU, 2048 on the CPU",
        minimum=1,
        group="run",
    )
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )


@torch.no_grad()
def token_rewards(model, adapters, method, examples, pad_id):
    """log π+(r_t | ...) - log π-(r_t | ...) at each token of some responses: a list of lists.

    examples: list of (EncodedPair, "chosen" | "rejected").
    """
    sides = [(["good"], "plain"), (["bad"], "plain")]
    if method == "scit":
        sides = [(["scit"], "positive"), (["scit"], "negative")]
    logprobs = []
    for enabled, prompt in sides:
        inputs = [pair.input(prompt, response) for pair, response in examples]
        batch = collate(inputs, pad_id, model.device)
        with enable_only([adapters[kind] for kind in enabled], among=adapters.values()):
            dense, mask = response_logprobs(model, batch)
        logprobs.append([row[marked] for row, marked in zip(dense, mask)])
    return [(plus - minus).tolist() for plus, minus in zip(*logprobs)]


@torch.no_grad()
def token_moves(trunk, adapters, settings, alpha, examples, pad_id):
    """α|v|/|b| at each token of some responses, in each layer: a list of L lists for each.

    settings: a collect.Config. The value says how far align.py wants a state to move, as a share
    of its norm.
    """
    base, plus, minus = collect.record_states(trunk, adapters, settings, examples, pad_id)
    moves = [
        abs(alpha) * (p.float() - m.float()).norm(dim=-1) / b.float().norm(dim=-1)
        for b, p, m in zip(base, plus, minus)
    ]
    lengths = [len(pair.responses[response]) for pair, response in examples]
    # L x [T] to [L, T], cut into the tokens of each response
    return [part.tolist() for part in torch.stack(moves).split(lengths, 1)]


def token_texts(tokenizer, ids):
    """The text that each token adds: some tokenizers write a token alone without its space. A
    character in several tokens belongs to the last of them."""
    texts, before = [], ""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n])
        unfinished = text.endswith("\ufffd") and n < len(ids)
        texts.append("" if unfinished else text[len(before) :])
        before = before if unfinished else text
    return texts


def rounded(values):
    """Numbers, in lists of any depth, with as many digits as the page shows."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return round(values, 3)


def describe_pairs(model, tokenizer, adapters, pairs, settings, alpha, tokens_per_pass):
    """What the page shows of each pair but for the answers: dicts."""
    pad_id = tokenizer.pad_token_id
    described = [None] * len(pairs)
    lengths = [pair.max_length() for pair in pairs]
    # two inputs a pair
    for part in tqdm(
        split_into_passes(range(len(pairs)), lengths, tokens_per_pass // 2),
        desc="look",
        unit="pass",
    ):
        examples = collect.examples_of([pairs[i] for i in part])
        rewards = token_rewards(model, adapters, settings.method, examples, pad_id)
        moves = token_moves(model.base_model, adapters, settings, alpha, examples, pad_id)
        shown = []
        for (pair, response), reward, move in zip(examples, rewards, moves):
            ids = pair.responses[response].tolist()
            tokens = token_texts(tokenizer, ids)
            shown.append({"tokens": tokens, "reward": rounded(reward), "moves": rounded(move)})
        for k, i in enumerate(part):
            turns = [list(turn) for turn in pairs[i].pair.prompt]
            described[i] = {"prompt": turns, "chosen": shown[2 * k], "rejected": shown[2 * k + 1]}
    return described


def write_page(path, title, data):
    """Write the page with its data. Texts are data, never markup: "<" is escaped in the JSON, and
    the page's script puts texts into text nodes. UserError where a number is NaN or infinite."""
    page = PAGE.read_text(encoding="utf-8")
    try:
        text = json.dumps({"title": title, **data}, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise UserError("NaN or infinite rewards or moves: train stage 1 at a lower --lr") from None
    text = text.replace("<", "\\u003c")
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(page.replace("PAGE_DATA", text), encoding="utf-8")


def main(config):
    # 1. what align.py has written, and what it was made from
    required = {"scit": "align", "dual": "align"}
    method = choose_method(config.out, config.method, required, ["python align.py"])
    folder = Path(config.out) / method / "align"
    manifest = read_stage(folder, "align", "python align.py")
    inherit(config, manifest["settings"], ("model", "seed"), folder)
    settings = manifest["settings"]
    stage1 = open_stage1(config.out, method)
    check_adapters(config.out, method, manifest["adapters"])
    device = choose_device(config.device)
    tokens_per_pass = choose_tokens_per_pass(config.tokens_per_pass, device)
    tokenizer = load_tokenizer(config.model)
    prepared = read_pairs(manifest, config.split, tokenizer)
    check_ids(config.model, prepared.max_id)
    pairs = sample(prepared[config.split], config.pairs, config.seed)

    # 2. the rewards and moves of every token, by the models of stage 1
    # in what collect computed in: bfloat16 rounds by as much as the norm of a small v
    dtype, quantize = settings["compute_dtype"], settings["quantize"]
    model = load_model(config.model, dtype, device, quantize=quantize)
    check_same_model(config.model, tokenizer, manifest, folder)
    adapters = stage1.load_adapters(model.base_model)
    recording = collect.Config(
        method=method,
        layers=settings["layers"],
        stimulus=settings["stimulus"],
        base=settings["base"],
        # the state of a token, not the one before it
        last_prompt_token=False,
    )
    # With the original base it is what the scaled adapter moves states by; with another one the
    # scale is that of stage 1's adapter, too.
    alpha = manifest["alpha"]
    if settings["base"] == "original":
        alpha *= manifest["scale"]
    described = describe_pairs(model, tokenizer, adapters, pairs, recording, alpha, tokens_per_pass)

    # 3. the answers of base and aligned model
    for adapter in adapters.values():
        adapter.remove()
    prompts = prompts_of(pairs, "plain")
    generation = GenerationSettings(config.max_new_tokens, BATCH, config.seed)
    weights = load_adapter(verified_path(folder, manifest), model.base_model)
    stops = stop_tokens(model, tokenizer, pairs[0].end_token)
    for name, adapter in (("base", None), ("aligned", weights)):
        with attached(model, adapter):
            answers = generate(model, tokenizer, prompts, generation, end_token=pairs[0].end_token)
        for shown, answer in zip(described, answers):
            shown[name] = text_of(tokenizer, answer, stops)

    # 4. the page
    path = folder.parent / "look.html"
    against = {"scit": "log π(p+) − log π(p−)", "dual": "log π_good − log π_bad"}[method]
    data = {"layers": settings["layers"], "alpha": alpha, "reward": against, "pairs": described}
    # align then projects v on some directions, which are not kept
    data["of"] = f"of all v, before --rank {settings['rank']}" if settings["rank"] else ""
    write_page(path, f"RAHF-{method.upper()}: {len(pairs)} {config.split} pairs", data)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.2g} MB: open it in a browser")


if __name__ == "__main__":
    run(main, Config)
