"""Preference pairs: reading them in the forms they come in, the instructions p+ and p-, tokens, masks and batches.

A file holds one row a pair, as JSON lines or one JSON list, gzipped or not. All rows of a file have one of these forms:
    transcripts     {"chosen": "\\n\\nHuman: q\\n\\nAssistant: r_h", "rejected": "\\n\\nHuman: q\\n\\nAssistant: r_l"}       HH-RLHF
    prompt          {"prompt" (or "question"): q, "chosen": r_h, "rejected": r_l}   strings, or lists of {"role", "content"}   TRL
    no prompt       {"chosen": q + r_h, "rejected": q + r_l}             the same; the prompt is what both begin with
    conversations   {"conversations": [{"from", "value"}, ...], "chosen": {"from", "value"}, "rejected": {...}}       ShareGPT
    instruction     {"instruction": q, "input": more of q or "", "chosen": r_h, "rejected": r_l}                     Alpaca
A row may carry "system": a text; and "split": "train", "valid" or "test"; other rows are split by a hash of seed and prompt.
"""
import hashlib
import os
import re
from dataclasses import dataclass

import torch
from jinja2 import TemplateError

from files import UserError, hub_rows, read_rows

# The two instructions, the only place where they stand. They differ in their adjectives alone,
# so that h+ - h- encodes what the adjectives mean and nothing of the form.
POSITIVE = "You are a helpful, honest and polite assistant."
NEGATIVE = "You are a useless, dishonest and rude assistant."

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPLITS = {"valid": 0.05, "test": 0.10}       # shares of the pairs; the rest is "train"


@dataclass(frozen=True)
class Pair:
    """One preference: a dialogue up to the last assistant turn, and two replies to it."""
    prompt: tuple                             # ((role, text), ...): maybe a system turn, then user and assistant in turn
    chosen: str
    rejected: str
    split: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of a pair: three prompts (plain, positive, negative) and two responses (chosen, rejected)."""
    pair: Pair
    prompts: dict                             # {"plain" | "positive" | "negative": list of ids}
    responses: dict                           # {"chosen" | "rejected": list of ids, with EOS}
    end: int | None                           # the token that ends a response, if any

    def example(self, prompt, response):
        """(ids of prompt + response, number of prompt ids)."""
        return self.prompts[prompt] + self.responses[response], len(self.prompts[prompt])


# ---------------------------------------------------------------- reading

def parse_transcript(text):
    """An HH-RLHF transcript as a tuple of (role, text) turns; empty where the text does not begin as one."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    return () if parts[0] else tuple((ROLES[role.lower()], turn.strip()) for role, turn in zip(parts[1::2], parts[2::2]))


def parse_turns(turns, field):
    """A list of {"role", "content"} or {"from", "value"}, or one of them, as (role, text) turns. ValueError where it is none."""
    found = []
    for turn in turns if isinstance(turns, list) else [turns]:
        role, text = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) if isinstance(turn, dict) else (None, None)
        if role not in ROLES or not isinstance(text, str):
            raise ValueError(f"field {field!r} holds {str(turn)[:60]!r}, no turn of role {', '.join(ROLES)} with a text")
        found.append((ROLES[role], tidy(text)))
    return tuple(found)


def tidy(text):
    """Line ends as on Unix, nothing around the text."""
    return text.replace("\r\n", "\n").strip()


def form_of(row):
    """Which of the forms above a row has. ValueError where it has none."""
    if not isinstance(row, dict):
        raise ValueError("not an object with the fields chosen and rejected")
    for name in ("chosen", "rejected"):
        if name not in row:
            raise ValueError(f"field {name!r} is missing")
    for form in ("conversations", "instruction", "prompt", "question"):
        if form in row:
            return form
    return "transcripts" if isinstance(row["chosen"], str) and parse_transcript(row["chosen"]) else "no prompt"


def parse_replies(row, form):
    """(prompt turns, chosen, rejected) of a row, or None where the two replies belong to different prompts."""
    prompt, asked = (), None                  # asked: the prompt where it is one text
    if form == "instruction":
        parts = [row["instruction"], row.get("input") or ""]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError("field 'instruction' or 'input' is not a string")
        history = [(role, tidy(text)) for pair in row.get("history") or () for role, text in zip(("user", "assistant"), pair)]
        prompt = (*history, ("user", tidy("\n".join(parts))))
    elif form in ("prompt", "question") and isinstance(row[form], str):
        asked = tidy(row[form])
        prompt = parse_transcript(asked) or (("user", asked),)
        prompt = prompt[:-1] if prompt[-1] == ("assistant", "") else prompt          # a transcript that ends with "Assistant:"
    elif form not in ("transcripts", "no prompt"):
        prompt = parse_turns(row[form], form)
    chosen, rejected = (tidy(row[name]) if isinstance(row[name], str) else parse_turns(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("fields 'chosen' and 'rejected' are of different kinds")
    if form == "transcripts":
        chosen, rejected = parse_transcript(chosen), parse_transcript(rejected)
    elif isinstance(chosen, str):
        start = f"{asked} " if asked and " " in asked else ""                        # the prompt repeated inside both replies
        if form == "no prompt":
            start = os.path.commonprefix([chosen, rejected])
            start = start[:max(start.rfind(" "), start.rfind("\n")) + 1]             # whole words
            prompt = (("user", start.strip()),)
        if all(re.sub(r"\s", " ", reply).startswith(re.sub(r"\s", " ", start)) for reply in (chosen, rejected)):
            chosen, rejected = chosen[len(start):].strip(), rejected[len(start):].strip()
        return (prompt, chosen, rejected) if prompt[-1][1] or form != "no prompt" else None
    if not chosen or not rejected or chosen[-1][0] != "assistant" or rejected[-1][0] != "assistant":
        raise ValueError("field 'chosen' or 'rejected' does not end with the assistant's reply")
    before = chosen[:-1]
    if before != rejected[:-1]:
        return None
    repeated = before[-len(prompt):] == prompt or before[-1:] == (("user", asked),)  # the prompt repeated inside the dialogue
    return before if repeated else prompt + before, chosen[-1][1], rejected[-1][1]


def parse_row(row, seed, specials=()):
    """A row as a Pair; None and the reason where it cannot teach a preference. Raises ValueError on a wrong type.

    specials: texts such as the tokenizer's BOS and EOS, taken off the replies' ends, since encode() adds its own.
    """
    parsed = parse_replies(row, form_of(row))
    if parsed is None:
        return None, "differing in the prompt"
    prompt, *replies = parsed
    if not prompt or prompt[-1][0] != "user" or not prompt[-1][1]:
        raise ValueError("its prompt does not end with a user's turn")
    if isinstance(row.get("system"), str) and row["system"].strip() and prompt[0][0] != "system":
        prompt = (("system", tidy(row["system"])), *prompt)
    if [role for role, _ in prompt if role != "system"][0] != "user":
        return None, "beginning with the assistant"
    for special in specials * 2:              # twice: doubled, or one within the other
        replies = [reply.removeprefix(special).removesuffix(special).strip() for reply in replies]
    if not all(replies):
        return None, "empty"
    if replies[0] == replies[1]:
        return None, "identical"
    split = row.get("split") or split_of(prompt, seed)
    if split not in ("train", *SPLITS):
        raise ValueError(f"field 'split' is {split!r}, not train, valid or test")
    return Pair(prompt, *replies, split), None


def split_of(prompt, seed):
    """The split of a prompt: a hash, so that it depends on neither the order nor the number of rows."""
    share = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:6]) / 2**48
    for split, size in SPLITS.items():
        if share < size:
            return split
        share -= size
    return "train"


def load_pairs(path, seed, specials=()):
    """All usable pairs of a file or hub:owner/name[:split], {reason: count} of the rows left out, and the rows' form. UserError names a bad row."""
    pairs, skipped, form = [], {}, None
    for place, row in hub_rows(path) if str(path).startswith("hub:") else read_rows(path):
        try:
            form, before = form_of(row), form
            if before not in (None, form):
                raise ValueError(f"its form is {form!r}, that of the rows before {before!r}: give files of one form each")
            pair, reason = parse_row(row, seed, specials)
        except ValueError as error:
            raise UserError(f"{path} {place}: {error}") from None
        if pair:
            pairs.append(pair)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    return pairs, skipped, form


# ---------------------------------------------------------------- tokens

def render(turns):
    """A dialogue in the HH form, up to where the assistant's reply begins."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "".join(f"\n\n{names[role]}{text}" for role, text in turns) + "\n\nAssistant:"


def chat(tokenizer, turns, instruction=""):
    """A dialogue by the tokenizer's chat template, up to where the assistant's reply begins.

    The instruction opens the system turn; where the template has no system turn, the first user turn.
    """
    system, messages = "\n\n".join(filter(None, (instruction.strip(), *(text for role, text in turns if role == "system")))), []
    for role, text in turns:
        if messages and messages[-1]["role"] == role:        # many templates refuse two turns in a row of one role
            messages[-1]["content"] += f"\n\n{text}"
        elif role != "system":
            messages.append({"role": role, "content": text})

    def written(messages):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return f"{text}\n</think>\n\n" if text.rstrip().endswith("<think>") else text
    try:
        text = written([{"role": "system", "content": system}, *messages] if system else messages)
        if system in text:
            return text
    except TemplateError:                     # this is how a template says that it knows no system turn
        pass
    messages[0]["content"] = f"{system}\n\n{messages[0]['content']}".strip()
    try:
        return written(messages)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a dialogue of {', '.join(m['role'] for m in messages)}: {error}; use --template plain") from None


def around_reply(tokenizer):
    """What the chat template puts right before and after a reply, up to the token that ends it: (text, ids)."""
    asked, reply = [{"role": "user", "content": "?"}], {"role": "assistant", "content": "REPLY"}
    whole, begun = tokenizer.apply_chat_template([*asked, reply], tokenize=False, enable_thinking=False), chat(tokenizer, (("user", "?"),))
    before, _, after = whole.removeprefix(begun).partition("REPLY") if whole.startswith(begun) else ("", "", "")
    ids, ends = tokenizer(after, add_special_tokens=False)["input_ids"], {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return before, [tokenizer.eos_token_id] if end is None else ids[:end + 1]


def encode(tokenizer, pair, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """Tokenize a pair once, in parts, so that p+ and p- inputs differ in the instruction's tokens only and r is the same in all:

        plain:  <p, q, r> = [BOS] + ids(p) + ids(q) + ids(r) + [EOS],    <q, r> = [BOS] + ids(q) + ids(r) + [EOS]
        chat:   the model's chat template, p in its system turn
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if template == "chat":
        dialogue, up, down = (chat(tokenizer, pair.prompt, instruction) for instruction in ("", positive, negative))
        query, (before, eos) = ids(dialogue), around_reply(tokenizer)
        prompts = {"plain": query, "positive": ids(up), "negative": ids(down)}
    else:
        dialogue, before = render(pair.prompt), " "
        query = ids(dialogue)
        prompts = {"plain": bos + query, "positive": bos + ids(positive) + query, "negative": bos + ids(negative) + query}

    def response(reply):
        whole = ids(dialogue + before + reply)                                      # what a model would continue with, unless the
        joined = whole[:len(query)] == query                                        # tokenizer merges the reply with the prompt's end
        return (whole[len(query):] if joined else ids(before + reply)) + eos
    return Encoded(pair, prompts, {"chosen": response(pair.chosen), "rejected": response(pair.rejected)}, eos[-1] if eos else None)


def pick_template(template, tokenizer):
    """ "chat" or "plain" of a setting; "auto" takes the tokenizer's chat template where it has one."""
    if template == "chat" and not tokenizer.chat_template:
        raise UserError("--template chat: the tokenizer has no chat template; use --template plain")
    return template if template != "auto" else "chat" if tokenizer.chat_template else "plain"


def prepare(paths, splits, tokenizer, max_length, seed, limit=None, positive=POSITIVE, negative=NEGATIVE, template="plain"):
    """The encoded pairs of each split asked for: {split: list of Encoded}, with a line that counts them.

    paths: files or hub:owner/name[:split]. Pairs with an input of over max_length tokens are left out; limit keeps the first.
    """
    pairs, skipped, found = [], {}, {}
    specials = tuple(filter(None, (tokenizer.bos_token, tokenizer.eos_token)))
    for path in paths:
        some, left_out, form = load_pairs(path, seed, specials)
        print(f"{path}: {len(some) + sum(left_out.values()):,} rows, form: {form}")
        pairs += some
        skipped = {reason: skipped.get(reason, 0) + left_out.get(reason, 0) for reason in {**skipped, **left_out}}
    counts, named = [f"{n} {reason}" for reason, n in skipped.items()], ", ".join(map(str, paths))
    for split in splits:
        encoded = [encode(tokenizer, pair, positive, negative, template) for pair in pairs if pair.split == split]
        found[split] = [e for e in encoded if max(map(len, e.prompts.values())) + max(map(len, e.responses.values())) <= max_length]
        counts.append(f"{len(encoded) - len(found[split])} of {split} over {max_length} tokens")
        if not found[split]:
            raise UserError(f"{named}: no {split} pair is left of {len(pairs)} ({'; '.join(counts)}): raise --max-length or add rows")
        found[split] = found[split][:limit]
    print(", ".join(f"{len(found[split])} {split} pairs" for split in splits) + f" (left out: {', '.join(counts)})")
    return found


# ---------------------------------------------------------------- batches

@dataclass
class Batch:
    """Right-padded examples. ids int64, attention and response bool, all [B, S]; response marks r's tokens."""
    ids: torch.Tensor
    attention: torch.Tensor
    response: torch.Tensor


def collate(examples, pad_id, device="cpu"):
    """Pad a list of (ids, number of prompt ids) to the longest."""
    lengths = torch.tensor([len(ids) for ids, _ in examples])
    starts = torch.tensor([start for _, start in examples])
    position = torch.arange(int(lengths.max()))
    ids = torch.full((len(examples), len(position)), pad_id)
    attention = position < lengths[:, None]                                     # [B, S]
    ids[attention] = torch.tensor([token for ids_, _ in examples for token in ids_])
    response = attention & (position >= starts[:, None])
    return Batch(ids.to(device), attention.to(device), response.to(device))


def batches(lengths, size, generator):
    """Indices 0..len(lengths)-1, each once, in shuffled batches of about the same length (less padding)."""
    order, groups = torch.randperm(len(lengths), generator=generator), []
    for pool in order.split(32 * size):       # sort within a pool only, so that batches stay random
        pool = torch.tensor(sorted(pool.tolist(), key=lengths.__getitem__))
        groups += [group[torch.randperm(len(group), generator=generator)].tolist() for group in pool.split(size)]
    return [groups[i] for i in torch.randperm(len(groups), generator=generator)]


def endless_batches(lengths, size, seed):
    """batches() epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(lengths, size, generator)
