"""Preference pairs: read from files and from the hub, in the forms that data sets come in.

A file holds one row per pair, as JSON lines or as one JSON list, gzipped or not. All rows of a file
have the same form (q: the prompt, r_h: the chosen reply, r_l: the rejected reply):

    transcripts     HH-RLHF: {"chosen": "\\n\\nHuman: q\\n\\nAssistant: r_h", "rejected": ...}
    prompt          TRL: {"prompt": q, "chosen": r_h, "rejected": r_l}; the fields are strings or
                    lists of {"role", "content"}; the prompt may be called "question" or "input"
    no prompt       TRL: {"chosen": q + r_h, "rejected": q + r_l}; both begin with the prompt
    conversations   ShareGPT: {"conversations": [{"from", "value"}, ...], "chosen": {"from",
                    "value"}, "rejected": {"from", "value"}}
    instruction     Alpaca: {"instruction": q, "input": more of q or "", "history": earlier turns
                    [[user, assistant], ...], "chosen": r_h, "rejected": r_l}; history is optional

Any row may have a "system" text and a "split": train, valid or test. Without a split, a hash of
the seed and the prompt decides. To read another form, add its prompt field to
PROMPT_FIELDS and a parser to ROW_PARSERS.
"""

import gzip
import hashlib
import io
import json
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from huggingface_hub import HfApi, hf_hub_download

from common.config import UserError, first_line

# Fields that hold the prompt. The first one that a row has names the form of the row.
PROMPT_FIELDS = ("conversations", "instruction", "prompt", "question", "input")
REPLY_FIELDS = ("chosen", "rejected")

# Fields of one turn of a dialogue, and what the roles are called.
ROLE_FIELDS = ("role", "from")
TEXT_FIELDS = ("content", "value")
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}

SPLITS = ("train", "valid", "test")
# Shares of the pairs; the rest is "train".
SPLIT_SHARES = {"valid": 0.05, "test": 0.10}
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class Pair:
    """One preference: a dialogue that ends with a user turn, and two replies to it."""

    # ((role, text), ...): perhaps a system turn, then the turns of user and assistant
    prompt: tuple
    chosen: str
    rejected: str
    split: str


class ParsedRow(NamedTuple):
    """What every form of row is reduced to. prompt: a tuple of (role, text) turns."""

    prompt: tuple
    chosen: str
    rejected: str


# ---------------------------------------------------------------- reading files


def read_rows(path):
    """Yield (place, row) for the rows of a JSON or JSON-lines file, gzipped or not.

    place is "line 3" or "row 3", for error messages. UserError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.peek(2)[:2] == GZIP_MAGIC
            stream = gzip.GzipFile(fileobj=file) if is_gzip else file
            # A byte order mark is dropped. Lines end with \n only: JSON strings may hold others.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
            yield from json_rows(text, path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"--data {path}: {error}") from None


def json_rows(text, path):
    """Yield (place, row) of an open text file: one JSON list or JSON lines."""
    is_first = True
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            for i, row in enumerate(parse_json(line + text.read(), path), 1):
                yield f"row {i}", row
            return
        is_first = False
        yield f"line {number}", parse_json(line, f"{path} line {number}")


def parse_json(text, place):
    """json.loads whose errors name the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


# ---------------------------------------------------------------- reading from the hub


def hub_rows(source):
    """[(place, row), ...] of hub:owner/name[:split].

    JSON files are read directly, other formats by the package `datasets`. The split is a word in a
    file's path, such as test, or a folder of splits, of which the train files are then taken.
    """
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        all_files = HfApi().list_repo_files(name, repo_type="dataset")
        json_files = [file for file in all_files if is_json_data(file)]
        files = files_of_split(json_files, split)
        if not files:
            return rows_by_datasets(source, name, split, json_files)
        rows = []
        for file in files:
            path = hf_hub_download(name, file, repo_type="dataset")
            rows += [(f"{file} {place}", row) for place, row in read_rows(path)]
        return rows
    except UserError:
        raise
    except Exception as error:
        # Other people's networks and files can fail in any way: whatever it is becomes one line.
        raise UserError(f"--data {source}: {first_line(error)}") from None


def is_json_data(file):
    """Whether a file of a data set is JSON and not the description of the data set."""
    is_json = re.search(r"\.jsonl?(\.gz)?$", file) is not None
    return is_json and "dataset_info" not in file


def files_of_split(files, split):
    """Those of the files that belong to the split, or to "train" where the split is empty."""
    selected = files_with_word(files, split or "train")
    if not selected and not split and len(files) == 1:
        selected = files
    return files_with_word(selected, "train") or selected


def files_with_word(files, word):
    """Those of the files whose path has the word between separators."""
    pattern = re.compile(rf"(^|[/_.-]){re.escape(word)}([/_.-]|$)")
    return [file for file in files if pattern.search(file)]


def rows_by_datasets(source, name, split, json_files):
    """[(place, row), ...] of a data set in any format that the package `datasets` reads."""
    split = split or "train"
    try:
        from datasets import load_dataset
    except ImportError:
        files = ", ".join(json_files) or "its files"
        raise UserError(
            f"--data {source}: no JSON file of the split {split} among {files}; "
            "other formats need `pip install datasets`"
        ) from None
    return [(f"row {i}", row) for i, row in enumerate(load_dataset(name, split=split), 1)]


# ---------------------------------------------------------------- texts and turns


def tidy(text):
    """The text with Unix line ends and without surrounding whitespace."""
    return text.replace("\r\n", "\n").strip()


def parse_transcript(text):
    """An HH-RLHF transcript as (role, text) turns; () where the text does not begin as one."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    # parts: what precedes the first name, name, text, name, text, ...
    if parts[0]:
        return ()
    return tuple(
        (ROLES[name.lower()], turn.strip()) for name, turn in zip(parts[1::2], parts[2::2])
    )


def parse_turns(value, field):
    """One turn {"role", "content"} or {"from", "value"}, or a list of them, as (role, text) turns.

    Raises ValueError that names the field where the value is neither.
    """
    turns = value if isinstance(value, list) else [value]
    return tuple(parse_turn(turn, field) for turn in turns)


def parse_turn(turn, field):
    """One turn as (role, text). Raises ValueError that names the field."""
    role = text = None
    if isinstance(turn, dict):
        role = first_value(turn, ROLE_FIELDS)
        text = first_value(turn, TEXT_FIELDS)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise ValueError(
            f"field {field!r} holds {str(turn)[:60]!r}: expected a turn with a text and "
            f"one of the roles {', '.join(ROLES)}"
        )
    return ROLES[role], tidy(text)


def first_value(turn, fields):
    """The value of the first of the fields that the turn has, else None."""
    return next((turn[field] for field in fields if field in turn), None)


# ---------------------------------------------------------------- one parser per form of row
# Each takes a row and its form and returns a ParsedRow, or None where the two replies belong to
# different prompts. They raise ValueError where a field has the wrong type.


def form_of(row):
    """The form of a row, a key of ROW_PARSERS. Raises ValueError where it has none."""
    if not isinstance(row, dict):
        raise ValueError("not an object with the fields 'chosen' and 'rejected'")
    for field in REPLY_FIELDS:
        if field not in row:
            raise ValueError(f"field {field!r} is missing")
    for field in PROMPT_FIELDS:
        if field in row:
            return field
    is_transcript = isinstance(row["chosen"], str) and parse_transcript(row["chosen"])
    return "transcripts" if is_transcript else "no prompt"


def parse_transcript_row(row, form):
    """HH-RLHF: two transcripts that differ in the last turn."""
    chosen, rejected = parse_replies(row)
    return split_dialogues(parse_whole_transcript(chosen), parse_whole_transcript(rejected))


def parse_whole_transcript(text):
    """A transcript as turns; where it ends before the assistant's reply, that reply is empty."""
    turns = parse_transcript(text)
    if turns and turns[-1][0] != "assistant":
        turns = (*turns, ("assistant", ""))
    return turns


def parse_prompt_row(row, form):
    """TRL: a prompt as text, transcript or turns, and replies as text or dialogues."""
    if not isinstance(row[form], str):
        return parse_conversation_row(row, form)
    prompt_text = tidy(row[form])
    prompt = parse_transcript(prompt_text) or (("user", prompt_text),)
    if prompt[-1] == ("assistant", ""):
        # a transcript that ends with "Assistant:"
        prompt = prompt[:-1]
    chosen, rejected = parse_replies(row)
    if isinstance(chosen, str):
        chosen, rejected = remove_repeated_prompt(prompt_text, chosen, rejected)
        return ParsedRow(prompt, chosen, rejected)
    return split_dialogues(chosen, rejected, prompt, prompt_text)


def parse_row_without_prompt(row, form):
    """TRL: two dialogues or two texts that begin with the same prompt."""
    chosen, rejected = parse_replies(row)
    if not isinstance(chosen, str):
        return split_dialogues(chosen, rejected)
    # The prompt is what both begin with, up to the end of a word: "blue" and "black" share no "bl".
    end = 0
    for i, (character, other) in enumerate(zip(chosen, rejected)):
        if character != other:
            break
        if character in " \n":
            end = i + 1
    prompt = chosen[:end].strip()
    if not prompt:
        return None
    return ParsedRow((("user", prompt),), chosen[end:].strip(), rejected[end:].strip())


def parse_conversation_row(row, form):
    """ShareGPT: the prompt as a list of turns, and replies as turns, dialogues or texts."""
    prompt = parse_turns(row[form], form)
    return combine(prompt, *parse_replies(row))


def parse_instruction_row(row, form):
    """Alpaca: an instruction with an optional input and earlier turns."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("field 'instruction' or 'input' is not a string")
    prompt = (*parse_history(row), ("user", tidy("\n".join(parts))))
    return combine(prompt, *parse_replies(row))


def parse_history(row):
    """The field "history", [[user, assistant], ...], as turns."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(is_list_of_texts(pair) for pair in history):
        raise ValueError("field 'history' is not a list of pairs of strings")
    turns = []
    for pair in history:
        turns += [(role, tidy(text)) for role, text in zip(("user", "assistant"), pair)]
    return turns


def is_list_of_texts(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


ROW_PARSERS = {
    "transcripts": parse_transcript_row,
    "prompt": parse_prompt_row,
    "question": parse_prompt_row,
    "input": parse_prompt_row,
    "no prompt": parse_row_without_prompt,
    "conversations": parse_conversation_row,
    "instruction": parse_instruction_row,
}


# ---------------------------------------------------------------- what the parsers share


def parse_replies(row):
    """chosen and rejected: two texts or two tuples of turns."""
    chosen = parse_reply(row, "chosen")
    rejected = parse_reply(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("fields 'chosen' and 'rejected' are of different kinds")
    return chosen, rejected


def parse_reply(row, field):
    """A reply as a text or as turns, whichever it is."""
    value = row[field]
    return tidy(value) if isinstance(value, str) else parse_turns(value, field)


def combine(prompt, chosen, rejected):
    """A ParsedRow from a prompt and two texts or dialogues."""
    if isinstance(chosen, str):
        return ParsedRow(prompt, chosen, rejected)
    return split_dialogues(chosen, rejected, prompt)


def split_dialogues(chosen, rejected, prompt=(), prompt_text=None):
    """A ParsedRow from two dialogues that end with the reply; None where they differ before it.

    prompt: the turns of the row's prompt. The dialogues may repeat it or continue it.
    prompt_text: the prompt as the row has it, where it is one text.
    """
    for turns in (chosen, rejected):
        if not turns or turns[-1][0] != "assistant":
            raise ValueError("field 'chosen' or 'rejected' does not end with the assistant's reply")
    before = chosen[:-1]
    if before != rejected[:-1]:
        return None
    repeats_prompt = before[-len(prompt) :] == prompt or before[-1:] == (("user", prompt_text),)
    if not repeats_prompt:
        before = prompt + before
    return ParsedRow(before, chosen[-1][1], rejected[-1][1])


def remove_repeated_prompt(prompt, chosen, rejected):
    """The replies without the prompt where both begin with it; whitespace is compared loosely.

    A prompt of one word stays: "Hi" and "Hi there." is a greeting and an answer to it.
    """
    if " " not in prompt:
        return chosen, rejected
    start = unify_whitespace(f"{prompt} ")
    for reply in (chosen, rejected):
        if not unify_whitespace(reply).startswith(start):
            return chosen, rejected
    return chosen[len(start) :].strip(), rejected[len(start) :].strip()


def unify_whitespace(text):
    """The text with a space for each whitespace character; its length stays the same."""
    return re.sub(r"\s", " ", text)


# ---------------------------------------------------------------- rows to pairs


def parse_row(row, seed, specials=()):
    """(Pair, None), or (None, reason) where the row cannot teach a preference.

    specials: texts of special tokens, such as BOS and EOS, that are removed from the ends of the
    replies, because encode_pairs adds them. Raises ValueError where a field has the wrong type.
    """
    form = form_of(row)
    parsed = ROW_PARSERS[form](row, form)
    if parsed is None:
        return None, "differing in the prompt"
    prompt, chosen, rejected = parsed
    if not chosen and not rejected:
        return None, "empty"
    if not prompt or prompt[-1][0] != "user" or not prompt[-1][1]:
        raise ValueError("the prompt does not end with a user turn that has a text")

    prompt = add_system_turn(prompt, row)
    first_role = next(role for role, _ in prompt if role != "system")
    if first_role != "user":
        return None, "beginning with the assistant"

    chosen = remove_specials(chosen, specials)
    rejected = remove_specials(rejected, specials)
    if not chosen or not rejected:
        return None, "empty"
    if chosen == rejected:
        return None, "identical"

    split = row.get("split") or split_of(prompt, seed)
    if split not in SPLITS:
        raise ValueError(f"field 'split' is {split!r}: expected one of {', '.join(SPLITS)}")
    return Pair(prompt, chosen, rejected, split), None


def add_system_turn(prompt, row):
    """The prompt with the row's "system" text in front, unless it has a system turn."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or prompt[0][0] == "system":
        return prompt
    return (("system", tidy(system)), *prompt)


def remove_specials(reply, specials):
    """The reply without special tokens at its ends."""
    # twice: a token may be doubled, or stand inside another
    for special in specials * 2:
        reply = reply.removeprefix(special).removesuffix(special).strip()
    return reply


def split_of(prompt, seed):
    """The split of a prompt: a hash, so that it depends on neither order nor number of rows."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    # uniform in [0, 1)
    position = int.from_bytes(digest[:6], "big") / 2**48
    for split, share in SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"


def load_pairs(path, seed, specials=()):
    """The usable pairs of a file or of hub:owner/name[:split].

    Returns (pairs, {reason: count} of the rows left out, the rows' form). A bad row raises a
    UserError that names it.
    """
    rows = hub_rows(path) if str(path).startswith("hub:") else read_rows(path)
    pairs = []
    skipped = Counter()
    form = None
    for place, row in rows:
        try:
            row_form = form_of(row)
            if form not in (None, row_form):
                raise ValueError(
                    f"this row has the form {row_form!r}, the rows before it {form!r}: "
                    "put each form in a separate file"
                )
            form = row_form
            pair, reason = parse_row(row, seed, specials)
        except ValueError as error:
            raise UserError(f"{path} {place}: {error}") from None
        if pair:
            pairs.append(pair)
        else:
            skipped[reason] += 1
    return pairs, skipped, form
