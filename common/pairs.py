"""Preference pairs out of rows, in the forms that data sets come in.

All rows of a file have the same form (q: the prompt, r_h: the chosen reply, r_l: the rejected one):

    transcripts     HH-RLHF: {"chosen": "\\n\\nHuman: q\\n\\nAssistant: r_h", "rejected": ...}
    prompt          TRL: {"prompt": q, "chosen": r_h, "rejected": r_l}; each is a text or a list of
                    {"role", "content"} or {"from", "value"}; the replies may be whole dialogues
                    that repeat the prompt; PROMPT_FIELDS are the names that the prompt may have
    instruction     Alpaca: {"instruction": q, "input": more of q or "", "chosen", "rejected"}
    no prompt       TRL: {"chosen": q + r_h, "rejected": q + r_l}; both begin with the prompt

Any row may have a system text (SYSTEM_FIELDS), earlier turns (HISTORY_FIELDS) and a "split": train,
valid or test. Without a split, a hash of the seed and the first user turn decides.

No field is passed over in silence. A field that holds a part of the dialogue and has no place here
is an error that names it, all others are listed as not read, and the setting --columns says what a
field means: `--columns prompt=ask chosen=good rejected=bad ignore=tools`.
"""

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from common.config import UserError
from common.rows import read_source

# ---------------------------------------------------------------- the fields of a row

# Earlier turns. Where no other field holds the prompt, these do.
HISTORY_FIELDS = ("history", "chat_history", "conversation_history", "context")

# The prompt. The first one that a row has names its form, the first one with a text is read; the
# others may repeat it.
PROMPT_FIELDS = (
    "conversations",
    "instruction",
    "prompt",
    "question",
    "query",
    "prompt_messages",
    "messages",
    "conversation",
    "dialogue",
    "dialog",
    "problem",
    "input",
    *HISTORY_FIELDS,
)

# Fields that are read with another one, and hold the prompt only where no other does.
SECONDARY_FIELDS = ("input", *HISTORY_FIELDS)

SYSTEM_FIELDS = ("system", "system_prompt", "system_message")

REPLY_FIELDS = {
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
}

# Parts of a dialogue that have no place in a pair, as fields of a row or of a turn.
UNPLACED_FIELDS = (
    "tools",
    "tool_calls",
    "functions",
    "function_call",
    "documents",
    "images",
    "image",
    "videos",
    "audios",
    "initial_reason_steps",
    "thinking",
    "reasoning",
    "reasoning_content",
)

# What --columns can name: fields of a pair, and the columns to leave out.
COLUMN_NAMES = (
    "prompt",
    "instruction",
    "input",
    "history",
    "system",
    "chosen",
    "rejected",
    "split",
    "ignore",
)

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

# Names of the two texts in histories of {"user": text, "assistant": text}.
EXCHANGE_FIELDS = (
    ("user", "assistant"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "output"),
)

# Fields that are read, or refused where they hold something.
KNOWN_FIELDS = {
    *PROMPT_FIELDS,
    *SYSTEM_FIELDS,
    *REPLY_FIELDS["chosen"],
    *REPLY_FIELDS["rejected"],
    *UNPLACED_FIELDS,
    "split",
}
KNOWN_TURN_FIELDS = {*ROLE_FIELDS, *TEXT_FIELDS, *UNPLACED_FIELDS}

# Signs of a prompt that somebody has already written in the format of a model.
FORMAT_MARKERS = re.compile(
    r"(?m)^<s>|^<bos>|\[INST\]|<<SYS>>|<\|im_start\|>|<\|start_header_id\|>|<\|begin_of_text\|>"
    r"|<start_of_turn>|<\|start\|>|<\|(?:user|system|assistant)\|>|<\|START_OF_TURN_TOKEN\|>"
    r"|<｜User｜>|^### (?:Instruction|Human|User):|\bUSER:|\b(?:Assistant|ASSISTANT):\s*\Z"
)
# What such a format is made of, besides the texts.
FORMAT_PARTS = re.compile(
    r"<[^<>\s]*>|<<|>>|\[/?\w+\]|\b(?:user|human|assistant|system|model|instruction|response)\b",
    re.IGNORECASE,
)

SURROGATES = re.compile("[\ud800-\udfff]")

SPLITS = ("train", "valid", "test")
# Shares of the pairs; the rest is "train".
SPLIT_SHARES = {"valid": 0.05, "test": 0.10}


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


# ---------------------------------------------------------------- the setting --columns


class Columns(NamedTuple):
    """The setting --columns. sources: {field of a pair: column that holds it}."""

    sources: dict
    ignored: frozenset


def parse_columns(columns):
    """The setting --columns, a list of "field=column" or None, as Columns."""
    sources, ignored = {}, set()
    for item in columns or []:
        name, _, column = item.partition("=")
        if name not in COLUMN_NAMES or not column:
            raise UserError(
                f"--columns {item}: expected FIELD=COLUMN with one of the fields "
                f"{', '.join(COLUMN_NAMES)}"
            )
        if name == "ignore":
            ignored.add(column)
        elif name in sources:
            raise UserError(f"--columns {item}: {name} is already {sources[name]}")
        else:
            sources[name] = column
    return Columns(sources, frozenset(ignored))


NO_COLUMNS = parse_columns(None)


def rename_columns(row, columns):
    """The row with the fields that --columns names, without those that it leaves out.

    Raises ValueError where a column is missing.
    """
    if columns == NO_COLUMNS:
        return row
    sources, ignored = columns
    left_out = {*ignored, *sources, *sources.values()}
    if "prompt" in sources or "instruction" in sources:
        # The prompt was chosen, so that other fields for it do not count.
        left_out |= set(PROMPT_FIELDS) - set(HISTORY_FIELDS)
        if "instruction" in sources and "input" not in ignored:
            left_out.discard("input")
    renamed = {name: value for name, value in row.items() if name not in left_out}
    for name, column in sources.items():
        if column not in row:
            raise ValueError(f"--columns {name}={column}: the row has no field {column!r}")
        renamed[name] = row[column]
    if not ignored:
        return renamed
    return {name: without_turn_fields(value, ignored) for name, value in renamed.items()}


def without_turn_fields(value, ignored):
    """A field's value without the ignored fields of its turns."""
    if isinstance(value, list):
        return [without_turn_fields(item, ignored) for item in value]
    if isinstance(value, dict):
        return {name: item for name, item in value.items() if name not in ignored}
    return value


# ---------------------------------------------------------------- what a row's fields are for


class Fields(NamedTuple):
    """The names of a row's fields that are read; None or () where the row has none."""

    chosen: str
    rejected: str
    prompt: str | None
    # more of the prompt, below an instruction
    input: str | None
    history: str | None
    system: tuple
    # they must hold nothing that the others do not hold
    repeating: tuple


def assign_fields(row):
    """The Fields of a row. Raises ValueError that names a missing field or one without a place."""
    for name in UNPLACED_FIELDS:
        if holds_content(row.get(name)):
            raise ValueError(no_place(f"field {name!r}", name))
    chosen, *more_chosen = reply_fields(row, "chosen")
    rejected, *more_rejected = reply_fields(row, "rejected")
    prompt, *prompts = prompt_fields(row) or [None]

    input_field = history = None
    if prompt == "instruction" and "input" in row:
        input_field = "input"
    histories = [name for name in HISTORY_FIELDS if name in prompts]
    if histories:
        history = histories[0]
    system = tuple(name for name in SYSTEM_FIELDS if is_given(row.get(name)))

    repeating = [name for name in prompts if name not in (input_field, history)]
    # such as the number of a conversation
    repeating = [name for name in repeating if not is_number(row[name])]
    repeating += more_chosen + more_rejected
    return Fields(chosen, rejected, prompt, input_field, history, system, tuple(repeating))


def no_place(what, name):
    """The message for a part of the dialogue that a pair cannot hold."""
    return (
        f"{what} holds a part of the dialogue that has no place in a pair: write it into the "
        f"prompt or the replies, or leave it out with --columns ignore={name}"
    )


def holds_text(value):
    """Whether a field's value has any text in it. An empty list may also be written as JSON."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return any(map(holds_text, value.values()))
    return isinstance(value, list) and any(map(holds_text, value))


def holds_content(value):
    """Whether a field's value has a text or anything else than numbers in it, such as an image."""
    if isinstance(value, dict):
        return any(map(holds_content, value.values()))
    if isinstance(value, list):
        return any(map(holds_content, value))
    if value is None or is_number(value):
        return False
    return holds_text(value) if isinstance(value, str) else True


def is_number(value):
    """Whether a value is a number or a truth value, which holds no part of a dialogue."""
    return isinstance(value, (bool, int, float))


def is_given(value):
    """Whether a field's value has a text, or is something that cannot be one, such as a number."""
    if isinstance(value, dict):
        return any(map(is_given, value.values()))
    if isinstance(value, list):
        return any(map(is_given, value))
    return value is not None and (not isinstance(value, str) or holds_text(value))


def reply_fields(row, reply):
    """The fields that hold a reply; ValueError where there is none."""
    names = [name for name in REPLY_FIELDS[reply] if row.get(name) is not None]
    if not names:
        raise ValueError(
            f"field {reply!r} is missing: name the field that holds it with --columns "
            f"{reply}=FIELD, or, where the rows say in another field which reply is better, write "
            f"the better one to 'chosen' (the row has {quoted(row)})"
        )
    return names


def prompt_fields(row):
    """The fields that hold a prompt: those that are not empty, in the order of preference."""
    return [name for name in PROMPT_FIELDS if is_given(row.get(name))]


def primary_fields(row):
    """The fields of a row that are there for the prompt alone, even if they are empty."""
    return [name for name in PROMPT_FIELDS if name in row and name not in SECONDARY_FIELDS]


def unread_fields(row, fields):
    """The names of fields that are not read, those of turns included, in the order of the row."""
    unread = [name for name in row if name not in KNOWN_FIELDS]
    unread += [name for name in UNPLACED_FIELDS if is_number(row.get(name))]
    unread += [name for name in prompt_fields(row)[1:] if is_number(row[name])]
    for name in (fields.prompt, fields.history, fields.chosen, fields.rejected):
        value = row.get(name)
        for turn in value if isinstance(value, list) else [value]:
            if isinstance(turn, dict) and first_value(turn, ROLE_FIELDS):
                unread += [f"{name}.{item}" for item in turn if item not in KNOWN_TURN_FIELDS]
    return list(dict.fromkeys(unread))


def quoted(names):
    """Names of fields for a message: other people's names may hold anything."""
    return ", ".join(map(repr, names)) or "no fields"


# ---------------------------------------------------------------- texts and turns


def tidy(text):
    """The text with Unix line ends and without surrounding whitespace."""
    return text.replace("\r\n", "\n").strip()


def normalize(text):
    """The text with one space for any whitespace, to compare texts with."""
    return " ".join(text.split())


def parse_transcript(text):
    """An HH-RLHF transcript as (role, text) turns; () where the text does not begin as one."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    # parts: what precedes the first name, name, text, name, text, ...
    if parts[0]:
        return ()
    return tuple(
        (ROLES[name.lower()], turn.strip()) for name, turn in zip(parts[1::2], parts[2::2])
    )


def parse_whole_transcript(text):
    """A transcript as turns; where it ends before the assistant's reply, that reply is empty."""
    turns = parse_transcript(text)
    if turns and turns[-1][0] != "assistant":
        turns = (*turns, ("assistant", ""))
    return turns


def parse_turns(value, name):
    """One turn {"role", "content"} or {"from", "value"}, or a list of them, as (role, text) turns.

    Raises ValueError that names the field where the value is neither.
    """
    turns = value if isinstance(value, list) else [value]
    return tuple(parse_turn(turn, name) for turn in turns)


def parse_turn(turn, name):
    """One turn as (role, text). Raises ValueError that names the field."""
    role = text = None
    if isinstance(turn, dict):
        for unplaced in UNPLACED_FIELDS:
            if holds_content(turn.get(unplaced)):
                raise ValueError(no_place(f"field {unplaced!r} of a turn in {name!r}", unplaced))
        role = first_value(turn, ROLE_FIELDS)
        text = first_value(turn, TEXT_FIELDS)
    if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
        raise ValueError(
            f"field {name!r} holds {str(turn)[:60]!r}: expected a turn with a text and "
            f"one of the roles {', '.join(ROLES)}"
        )
    return ROLES[role], tidy(text)


def first_value(turn, names):
    """The value of the first of the fields that the turn has, else None."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def decode_json(value):
    """A list of turns that is written as a JSON text as the list; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        decoded = json.loads(value)
    except (ValueError, RecursionError):
        return value
    is_turns = decoded and all(isinstance(item, dict) for item in decoded)
    has_roles = is_turns and all(first_value(item, ROLE_FIELDS) for item in decoded)
    return decoded if has_roles else value


# ---------------------------------------------------------------- the prompt


def parse_prompt(row, fields):
    """The turns of the row's prompt, () where it has none or an empty one."""
    name = fields.prompt
    if name is None:
        return ()
    if name == "instruction":
        return parse_instruction(row, fields)
    decode = decode_history if name in HISTORY_FIELDS else decode_json
    value = decode(row[name])
    if isinstance(value, str):
        return parse_text_prompt(value)
    if name in HISTORY_FIELDS:
        return parse_history(row, name)
    return parse_turns(value, name)


def parse_text_prompt(text):
    """A prompt that is one text: a transcript, else a user turn."""
    turns = parse_transcript(tidy(text)) or (("user", tidy(text)),)
    if turns[-1] == ("assistant", ""):
        # a transcript that ends with "Assistant:"
        return turns[:-1]
    return turns


def parse_instruction(row, fields):
    """Alpaca: an instruction with an optional input."""
    parts = [row["instruction"]]
    if fields.input and row[fields.input]:
        parts.append(row[fields.input])
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("field 'instruction' or 'input' is not a string")
    return (("user", tidy("\n".join(parts))),)


def parse_history(row, name):
    """Earlier turns: turns, pairs of texts, texts in turn, or a transcript."""
    value = decode_history(row[name])
    if isinstance(value, tuple):
        return value
    are_objects = isinstance(value, list) and all(isinstance(turn, dict) for turn in value)
    if are_objects and any(first_value(turn, ROLE_FIELDS) for turn in value):
        return parse_turns(value, name)
    turns = []
    for exchange in exchanges_of(row, name, value):
        turns += [(role, tidy(text)) for role, text in zip(("user", "assistant"), exchange)]
    return tuple(turns)


def exchanges_of(row, name, value):
    """A history without roles as pairs of texts. Raises ValueError where it is none.

    Texts in turn are one, unless they are called context: these may be passages to read.
    """
    if is_list_of_texts(value) and len(value) % 2 == 0 and name != "context":
        return list(zip(value[::2], value[1::2]))
    exchanges = []
    if isinstance(value, list):
        exchanges = [parse_exchange(item) if isinstance(item, dict) else item for item in value]
    if not exchanges or not all(is_exchange(exchange) for exchange in exchanges):
        first = prompt_fields(row)[0]
        raise ValueError(
            f"field {name!r} holds neither turns nor pairs of strings: read it with --columns "
            f"history={name}, or, where it is a text that belongs to {first!r}, with --columns "
            f"instruction={first} input={name}, or leave it out with --columns ignore={name}"
        )
    return exchanges


def decode_history(value):
    """A history that is a text as turns (a transcript) or as the list that it holds as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return parse_transcript(value) or value


def parse_exchange(exchange):
    """{"user": text, "assistant": text} as a pair of texts; None where it is none."""
    for names in EXCHANGE_FIELDS:
        if set(exchange) == set(names):
            return [exchange[name] for name in names]
    return None


def is_exchange(value):
    return isinstance(value, (list, tuple)) and len(value) == 2 and is_list_of_texts([*value])


def is_list_of_texts(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def parse_system(row, fields):
    """The row's system texts as system turns. Raises ValueError where one is no text."""
    turns = []
    for name in fields.system:
        value = decode_json(row[name])
        parsed = (("system", tidy(value)),) if isinstance(value, str) else parse_turns(value, name)
        if any(role != "system" for role, _ in parsed):
            raise ValueError(f"field {name!r} holds turns of other roles than system")
        turns += [turn for turn in parsed if turn[1] and turn not in turns]
    return tuple(turns)


# ---------------------------------------------------------------- the replies


def parse_reply(row, name):
    """A reply as a text or as turns, whichever it is."""
    value = decode_json(row[name])
    return tidy(value) if isinstance(value, str) else parse_turns(value, name)


def parse_whole_row(row, fields):
    """The row as a ParsedRow, or None where the two replies belong to different prompts.

    Raises ValueError where a field has the wrong type or cannot be placed.
    """
    prompt = parse_prompt(row, fields)
    chosen = parse_reply(row, fields.chosen)
    rejected = parse_reply(row, fields.rejected)
    if prompt and prompt[-1] == ("assistant", ""):
        prompt = prompt[:-1]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("fields 'chosen' and 'rejected' are of different kinds")
    if isinstance(chosen, str):
        if not are_transcripts(chosen, rejected, prompt):
            return parse_text_replies(row, fields, prompt, chosen, rejected)
        chosen, rejected = parse_whole_transcript(chosen), parse_whole_transcript(rejected)
    return parse_dialogues(row, fields, prompt, chosen, rejected)


def are_transcripts(chosen, rejected, prompt):
    """Whether two texts are transcripts of the row's dialogue.

    Beside a prompt they may also be replies that happen to look like transcripts: then they repeat
    no turn of the prompt.
    """
    turns = parse_transcript(chosen)
    if not prompt:
        return bool(turns)
    other = parse_transcript(rejected)
    if not turns or not other or turns[0] != other[0]:
        return False
    return any(same_turns((turn,), (repeated,)) for turn in turns for repeated in prompt)


def parse_dialogues(row, fields, prompt, chosen, rejected):
    """A ParsedRow from two dialogues that end with the reply; None where they differ before it.

    They may repeat the prompt, at their beginning or their end, or continue it.
    """
    for turns in (chosen, rejected):
        if not turns or turns[-1][0] != "assistant":
            raise ValueError("field 'chosen' or 'rejected' does not end with the assistant's reply")
    before = chosen[:-1]
    if not same_turns(before, rejected[:-1]):
        return None
    if prompt:
        prompt_text = row[fields.prompt]
        if isinstance(prompt_text, str):
            as_user_turn = (("user", tidy(prompt_text)),)
            if same_turns(before[-1:], as_user_turn) or is_formatted(prompt_text, before):
                prompt = ()
        asked = split_system(prompt[:-1])[1]
        if prompt and prompt[-1][0] == "assistant" and ends_with(before, asked):
            # "messages" is often prompt and reply; a third reply is a contradiction
            check_is_reply(prompt[-1], (chosen[-1], rejected[-1]), fields.prompt)
            prompt = prompt[:-1]
        before = join_dialogues(prompt, before, fields.prompt)
    return ParsedRow(before, chosen[-1][1], rejected[-1][1])


def check_is_reply(turn, replies, name):
    """Raise ValueError unless the turn that ends the field's dialogue is one of the two replies."""
    if not any(same_turns((turn,), (reply,)) for reply in replies):
        raise ValueError(
            f"field {name!r} ends with another reply than 'chosen' and 'rejected': leave it out "
            f"with --columns ignore={name}"
        )


def is_formatted(text, turns):
    """Whether a prompt is nothing but these turns, written in the format of a model."""
    if not turns or not FORMAT_MARKERS.search(text.strip()):
        return False
    for _, turn_text in sorted(turns, key=lambda turn: -len(turn[1])):
        if turn_text not in text:
            return False
        text = text.replace(turn_text, " ", 1)
    # a system text, or earlier turns, would be left
    return not re.search(r"\w", FORMAT_PARTS.sub(" ", text))


def parse_text_replies(row, fields, prompt, chosen, rejected):
    """A ParsedRow from two replies that are texts, whether or not they repeat the prompt."""
    if fields.prompt is None and not primary_fields(row):
        return parse_shared_beginning(row, fields, chosen, rejected)
    if fields.prompt and isinstance(row[fields.prompt], str):
        chosen, rejected = remove_repeated_prompt(tidy(row[fields.prompt]), chosen, rejected)
    if prompt and prompt[-1][0] == "assistant":
        replies = (("assistant", chosen), ("assistant", rejected))
        check_is_reply(prompt[-1], replies, fields.prompt)
        prompt = prompt[:-1]
    return ParsedRow(prompt, chosen, rejected)


def parse_shared_beginning(row, fields, chosen, rejected):
    """A row without a prompt: what both texts begin with, up to the end of a word, is the prompt.

    "blue" and "black" share no "bl". Raises ValueError where another field could hold the prompt.
    """
    others = [name for name in unread_fields(row, fields) if holds_text(row.get(name))]
    if others:
        raise ValueError(
            f"no field is known to hold the prompt, but {quoted(others)} may: name it with "
            "--columns prompt=FIELD, or leave it out with --columns ignore=FIELD"
        )
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


def remove_repeated_prompt(prompt, chosen, rejected):
    """The replies without the prompt where both begin with it; whitespace is compared loosely.

    A prompt of one word stays: "Hi" and "Hi there." is a greeting and an answer to it. Of languages
    that write no spaces, a prompt of ten characters is more than a word.
    """
    is_word = " " not in prompt and (prompt.isascii() or len(prompt) < 10)
    start = unify_whitespace(prompt)
    for reply in (chosen, rejected):
        following = reply[len(start) :][:1]
        inside_a_word = start[-1:].isalnum() and following.isalnum()
        if is_word or inside_a_word or not unify_whitespace(reply).startswith(start):
            return chosen, rejected
    return chosen[len(start) :].strip(), rejected[len(start) :].strip()


def unify_whitespace(text):
    """The text with a space for each whitespace character; its length stays the same."""
    return re.sub(r"\s", " ", text)


# ---------------------------------------------------------------- parts of one dialogue


def join_dialogues(first, second, name):
    """The turns of two parts of a dialogue, where the second may repeat the first.

    The second may begin or end with the first, or begin with the first one's last turns. System
    turns at the beginning of either stand in front. name: the field of the first part, for the
    ValueError where the second neither repeats nor continues it.
    """
    first_system, first = split_system(first)
    second_system, second = split_system(second)
    system = first_system + tuple(turn for turn in second_system if turn not in first_system)
    if first and same_turns(second[-len(first) :], first):
        return system + second
    for n in range(min(len(first), len(second)), 0, -1):
        if same_turns(first[-n:], second[:n]):
            return system + first + second[n:]
    if first and second and first[-1][0] == second[0][0]:
        raise ValueError(
            f"field {name!r} ends with a turn of the {first[-1][0]}, and the turns that follow it "
            f"begin with another one: leave it out with --columns ignore={name}"
        )
    return system + first + second


def split_system(turns):
    """(The system turns at the beginning, the other turns)."""
    n = 0
    while n < len(turns) and turns[n][0] == "system":
        n += 1
    return turns[:n], turns[n:]


def same_turns(turns, others):
    """Whether two lists of turns are the same but for whitespace."""
    if len(turns) != len(others):
        return False
    return all(a == b and normalize(x) == normalize(y) for (a, x), (b, y) in zip(turns, others))


def ends_with(turns, others):
    """Whether a list of turns ends with others, of which there is at least one."""
    return bool(others) and same_turns(turns[-len(others) :], others)


def add_context(row, fields, prompt, replies):
    """The prompt with the row's history and system text in front of it."""
    if fields.history:
        history = parse_history(row, fields.history)
        repeats_prompt = ends_with(history[:-1], prompt) and history[-1][0] == "assistant"
        if repeats_prompt and normalize(history[-1][1]) in ("", *map(normalize, replies)):
            # with its reply
            history = history[:-1]
        prompt = join_dialogues(history, prompt, fields.history)
    system = parse_system(row, fields)
    present = [turn for turn in prompt if turn[0] == "system"]
    return (*(turn for turn in system if turn not in present), *prompt)


def check_repeated(row, fields, parsed):
    """Raise ValueError where a second field for prompt or reply says something else than the first.

    Data sets repeat things: "messages" beside "prompt" and "chosen" is often prompt and reply.
    """
    if not fields.repeating:
        return
    known = {normalize(text) for _, text in parsed.prompt}
    known |= {normalize(parsed.chosen), normalize(parsed.rejected)}
    for name in (fields.prompt, fields.chosen, fields.rejected):
        if isinstance(row.get(name), str):
            known.add(normalize(row[name]))
    for name in fields.repeating:
        try:
            repeats = all(normalize(text) in known for text in texts_of(row, name))
        except ValueError:
            repeats = False
        if not repeats:
            raise ValueError(
                f"field {name!r} holds something else than {quoted(first_fields(fields, name))}: "
                f"choose one with --columns, or leave it out with --columns ignore={name}"
            )


def texts_of(row, name):
    """The texts of a field that holds a text, turns, or pairs of texts."""
    value = decode_json(row[name])
    if isinstance(value, str):
        turns = parse_transcript(value) or (("user", value),)
    elif isinstance(value, list):
        turns = parse_history(row, name)
    else:
        turns = parse_turns(value, name)
    return [text for _, text in turns if text]


def first_fields(fields, name):
    """The field that is read where the field `name` repeats it."""
    for reply, names in REPLY_FIELDS.items():
        if name in names:
            return [getattr(fields, reply)]
    return [fields.prompt]


# ---------------------------------------------------------------- rows to pairs


def form_of(row):
    """The form of a row, as it is printed. Raises ValueError where it has none."""
    fields = assign_fields(row)
    primary = primary_fields(row)
    if primary or fields.prompt:
        return primary[0] if primary else fields.prompt
    chosen = row[fields.chosen]
    return "transcripts" if isinstance(chosen, str) and parse_transcript(chosen) else "no prompt"


def parse_row(row, seed, specials=(), columns=NO_COLUMNS):
    """(Pair, None), or (None, reason) where the row cannot teach a preference.

    specials: the texts of the tokens that the tokenizer puts in front of a text and at its end,
    BOS and EOS, which are removed there because encode_pairs adds them; None for one that it lacks.
    Raises ValueError where a field has the wrong type or no place.
    """
    row = checked_row(row, columns)
    fields = assign_fields(row)
    parsed = parse_whole_row(row, fields)
    if parsed is None:
        return None, "differing in the prompt"
    if not parsed.chosen and not parsed.rejected:
        return None, "empty"
    prompt = add_context(row, fields, parsed.prompt, (parsed.chosen, parsed.rejected))
    if not prompt or prompt[-1][0] != "user" or not prompt[-1][1]:
        raise ValueError(
            "the prompt does not end with a user turn that has a text: name the field that holds "
            "the prompt with --columns prompt=FIELD"
        )
    check_repeated(row, fields, parsed._replace(prompt=prompt))
    check_characters(prompt, parsed)

    first_role = next(role for role, _ in prompt if role != "system")
    if first_role != "user":
        return None, "beginning with the assistant"

    chosen = remove_specials(parsed.chosen, specials)
    rejected = remove_specials(parsed.rejected, specials)
    if not chosen or not rejected:
        return None, "empty"
    if chosen == rejected:
        return None, "identical"

    split = row.get("split") or split_of(prompt, seed)
    if split not in SPLITS:
        raise ValueError(
            f"field 'split' is {split!r}: expected one of {', '.join(SPLITS)}; "
            "--columns ignore=split draws a split instead"
        )
    return Pair(prompt, chosen, rejected, split), None


def checked_row(row, columns):
    """A row with its columns renamed. Raises ValueError where it is no object."""
    if not isinstance(row, dict):
        raise ValueError("not an object with the fields 'chosen' and 'rejected'")
    return rename_columns(row, columns)


def check_characters(prompt, parsed):
    """Raise ValueError where a text has characters that no tokenizer can read."""
    texts = {"the prompt": "\n".join(text for _, text in prompt)}
    texts |= {"'chosen'": parsed.chosen, "'rejected'": parsed.rejected}
    for name, text in texts.items():
        match = SURROGATES.search(text)
        if match:
            raise ValueError(
                f"{name} holds {match[0]!r}, one half of a character that the file has cut in two: "
                "repair or remove the row"
            )


def remove_specials(reply, specials):
    """The reply without the tokenizer's own BOS in front and EOS at the end, even if doubled.

    "<s>old</s> new" is markup: a BOS whose EOS stands inside the reply stays.
    """
    if not specials:
        return reply
    begin, *ends = specials
    ends = [end for end in ends if end]
    reply = remove_ends(reply, ends)
    is_markup = any(end in reply for end in ends if end != begin)
    while begin and not is_markup and reply.startswith(begin):
        reply = reply.removeprefix(begin).strip()
    return reply


def remove_ends(reply, ends):
    """The reply without any of these texts at its end."""
    shortened = None
    while shortened != reply:
        shortened = reply
        for end in ends:
            reply = reply.removesuffix(end).strip()
    return reply


def split_of(prompt, seed):
    """The split of a prompt: a hash of its first user turn.

    It depends on neither order nor number of rows, and a dialogue and its own continuation are in
    the same split.
    """
    first = next(text for role, text in prompt if role == "user")
    digest = hashlib.sha256(f"{seed} {normalize(first)}".encode()).digest()
    # uniform in [0, 1)
    position = int.from_bytes(digest[:6], "big") / 2**48
    for split, share in SPLIT_SHARES.items():
        if position < share:
            return split
        position -= share
    return "train"


# ---------------------------------------------------------------- files


@dataclass
class PairsFile:
    """The pairs of a file or of hub:owner/name[:split], and what was noticed in reading it."""

    path: str
    pairs: list = field(default_factory=list)
    # {reason: number of rows left out}
    skipped: Counter = field(default_factory=Counter)
    form: str | None = None
    # None for a file without rows
    has_split: bool | None = None
    # names of fields in the order in which they came
    not_read: dict = field(default_factory=dict)
    # {marker: number of prompts that hold it}
    formatted: Counter = field(default_factory=Counter)

    def add(self, row, seed, specials, columns):
        """Read one row. Raises ValueError where it is bad or unlike the rows before it."""
        renamed = checked_row(row, columns)
        form = form_of(renamed)
        if self.form not in (None, form):
            raise ValueError(
                f"this row has the form {form!r}, the rows before it {self.form!r}: "
                "put each form in a separate file"
            )
        pair, reason = parse_row(row, seed, specials, columns)
        has_split = bool(renamed.get("split"))
        if self.has_split not in (None, has_split):
            raise ValueError(
                f"this row has {'a' if has_split else 'no'} split, unlike the rows before it: "
                "give all rows a field 'split', or draw all splits with --columns ignore=split"
            )
        self.form, self.has_split = form, has_split
        sources = columns.sources
        # a field whose name --columns has given to another one is not read either
        left_out = [n for n in row if n not in renamed or sources.get(n, n) != n]
        unread = left_out + unread_fields(renamed, assign_fields(renamed))
        unread = [name for name in unread if name not in sources.values()]
        self.not_read.update(dict.fromkeys(unread))
        if pair is None:
            self.skipped[reason] += 1
            return
        self.pairs.append(pair)
        self.formatted.update(markers_in(pair.prompt))

    def describe(self):
        """The lines to print about the file."""
        rows = len(self.pairs) + sum(self.skipped.values())
        lines = [f"{self.path}: {rows:,} rows, form: {self.form}"]
        if self.not_read:
            lines.append(f"{self.path}: not read: {quoted(self.not_read)}")
        for marker, count in self.formatted.items():
            lines.append(
                f"warning: {self.path}: {count:,} prompts hold {marker!r}: they seem to be "
                "formatted for a model already, and this format is read as text; better data "
                "hold the bare dialogue"
            )
        return lines


def markers_in(prompt):
    """The different signs of a model's format in the turns of a prompt."""
    markers = set()
    for _, text in prompt:
        markers.update(FORMAT_MARKERS.findall(text))
    return markers


def read_pairs(path, seed, specials=(), columns=NO_COLUMNS):
    """The PairsFile of a file or of hub:owner/name[:split]. UserError that names a bad row."""
    file = PairsFile(str(path))
    for place, row in read_source(path):
        try:
            file.add(row, seed, specials, columns)
        except ValueError as error:
            raise UserError(f"{path} {place}: {error}") from None
    return file
