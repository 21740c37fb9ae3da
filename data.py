"""Preference pairs: reading them, the instructions p+ and p-, tokens, masks and batches.

A file holds one row a pair, as JSON lines or one JSON list, gzipped or not, in one of two forms:
    {"chosen": "\\n\\nHuman: q\\n\\nAssistant: r_h", "rejected": "\\n\\nHuman: q\\n\\nAssistant: r_l"}     HH-RLHF transcripts
    {"prompt": "q", "chosen": "r_h", "rejected": "r_l"}
A row may carry "split": "train", "valid" or "test"; other rows are split by a hash of seed and prompt.
"""
import gzip
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from files import UserError

# The two instructions, the only place where they stand. They differ in their adjectives alone,
# so that h+ - h- encodes what the adjectives mean and nothing of the form.
POSITIVE = "You are a helpful, honest and polite assistant."
NEGATIVE = "You are a useless, dishonest and rude assistant."

ROLES = {"Human": "user", "Assistant": "assistant"}
SPLITS = {"valid": 0.05, "test": 0.10}       # shares of the pairs; the rest is "train"


@dataclass(frozen=True)
class Pair:
    """One preference: a dialogue up to the last assistant turn, and two replies to it."""
    prompt: tuple                             # ((role, text), ...), ending with a user turn
    chosen: str
    rejected: str
    split: str


@dataclass(frozen=True)
class Encoded:
    """Token ids of a pair: three prompts (plain, positive, negative) and two responses (chosen, rejected)."""
    pair: Pair
    prompts: dict                             # {"plain" | "positive" | "negative": list of ids}
    responses: dict                           # {"chosen" | "rejected": list of ids, with EOS}

    def example(self, prompt, response):
        """(ids of prompt + response, number of prompt ids)."""
        return self.prompts[prompt] + self.responses[response], len(self.prompts[prompt])


# ---------------------------------------------------------------- reading

def parse_transcript(text):
    """An HH-RLHF transcript as a tuple of (role, text) turns."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    return tuple((ROLES[role], turn.strip()) for role, turn in zip(parts[1::2], parts[2::2]))


def parse_row(row, seed):
    """A row as a Pair; None and the reason where it cannot teach a preference. Raises ValueError on a wrong type."""
    if not isinstance(row, dict):
        raise ValueError("not an object with the fields chosen and rejected")
    for name in ("chosen", "rejected", *(("prompt",) if "prompt" in row else ())):
        if not isinstance(row.get(name), str):
            raise ValueError(f"field {name!r} is {'missing' if name not in row else 'not a string'}")
    if "prompt" in row:
        prompt = parse_transcript(row["prompt"]) or (("user", row["prompt"].strip()),)
        if prompt[-1] == ("assistant", ""):   # a transcript that ends with "Assistant:"
            prompt = prompt[:-1]
        chosen, rejected = row["chosen"].strip(), row["rejected"].strip()
    else:
        turns, other = parse_transcript(row["chosen"]), parse_transcript(row["rejected"])
        if len(turns) < 2 or turns[-1][0] != "assistant":
            raise ValueError("field 'chosen' is no transcript '\\n\\nHuman: ...\\n\\nAssistant: ...', and there is no field 'prompt'")
        if other[:-1] != turns[:-1] or other[-1][0] != "assistant":
            return None, "differing in the prompt"
        prompt, chosen, rejected = turns[:-1], turns[-1][1], other[-1][1]
    if not chosen or not rejected:
        return None, "empty"
    if chosen == rejected:
        return None, "identical"
    split = row.get("split") or split_of(prompt, seed)
    if split not in ("train", *SPLITS):
        raise ValueError(f"field 'split' is {split!r}, not train, valid or test")
    return Pair(prompt, chosen, rejected, split), None


def split_of(prompt, seed):
    """The split of a prompt: a hash, so that it depends on neither the order nor the number of rows."""
    share = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:6]) / 2**48
    for split, size in SPLITS.items():
        if share < size:
            return split
        share -= size
    return "train"


def read_rows(path):
    """(place, row) for every row of a JSON or JSON-lines file, gzipped or not; place is "line 3" or "row 3"."""
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"--data {path}: {error}") from None
    if text.lstrip().startswith("["):
        try:
            return [(f"row {i}", row) for i, row in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise UserError(f"{path}: not JSON: {error}") from None
    rows = []
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append((f"line {i}", json.loads(line)))
            except ValueError as error:
                raise UserError(f"{path} line {i}: not JSON: {error}") from None
    return rows


def load_pairs(path, seed):
    """All usable pairs of a file, and {reason: count} of the rows left out. UserError names a bad row."""
    pairs, skipped = [], {}
    for place, row in read_rows(path):
        try:
            pair, reason = parse_row(row, seed)
        except ValueError as error:
            raise UserError(f"{path} {place}: {error}") from None
        if pair:
            pairs.append(pair)
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    return pairs, skipped


# ---------------------------------------------------------------- tokens

def render(turns):
    """A dialogue in the HH form, up to where the assistant's reply begins."""
    names = {role: name for name, role in ROLES.items()}
    return "".join(f"\n\n{names[role]}: {text}" for role, text in turns) + "\n\nAssistant:"


def encode(tokenizer, pair, positive=POSITIVE, negative=NEGATIVE):
    """Tokenize a pair once, in parts, so that every input of the method is a concatenation of the same ids:

        <p, q, r> = [BOS] + ids(p) + ids(q) + ids(r) + [EOS],    <q, r> = [BOS] + ids(q) + ids(r) + [EOS]

    p+ and p- inputs then differ in the instruction's tokens only, and the tokens of r are the same in all.
    """
    def ids(text):
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    dialogue = render(pair.prompt)
    query = ids(dialogue)

    def response(text):
        whole = ids(f"{dialogue} {text}")     # what a model would continue with, unless the tokenizer
        joined = whole[:len(query)] == query  # merges the reply with the prompt's last token
        return (whole[len(query):] if joined else ids(f" {text}")) + eos
    return Encoded(pair, {"plain": bos + query, "positive": bos + ids(positive) + query, "negative": bos + ids(negative) + query},
                   {"chosen": response(pair.chosen), "rejected": response(pair.rejected)})


def prepare(path, splits, tokenizer, max_length, seed, limit=None, positive=POSITIVE, negative=NEGATIVE):
    """The encoded pairs of each split asked for: {split: list of Encoded}, with a line that counts them.

    Pairs of which any input is longer than max_length tokens are left out; limit keeps the first ones of a split.
    """
    pairs, skipped = load_pairs(path, seed)
    counts, found = [f"{n} {reason}" for reason, n in skipped.items()], {}
    for split in splits:
        encoded = [encode(tokenizer, pair, positive, negative) for pair in pairs if pair.split == split]
        found[split] = [e for e in encoded if max(map(len, e.prompts.values())) + max(map(len, e.responses.values())) <= max_length]
        counts.append(f"{len(encoded) - len(found[split])} of {split} over {max_length} tokens")
        if not found[split]:
            raise UserError(f"{path}: no {split} pair is left of {len(pairs)} ({'; '.join(counts)}): raise --max-length or add rows")
        found[split] = found[split][:limit]
    print(f"{path}: " + ", ".join(f"{len(found[split])} {split} pairs" for split in splits) + f" (left out: {', '.join(counts)})")
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
