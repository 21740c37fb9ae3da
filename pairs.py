"""Preference pairs: reading them from files and the hub in the forms they come in; and dialogues as text.

A file holds one row a pair, as JSON lines or one JSON list, gzipped or not. All rows of a file have one of these forms:
    transcripts     {"chosen": "\\n\\nHuman: q\\n\\nAssistant: r_h", "rejected": "\\n\\nHuman: q\\n\\nAssistant: r_l"}       HH-RLHF
    prompt          {"prompt" (or "question", "input"): q, "chosen": r_h, "rejected": r_l}   strings, or lists of {"role", "content"}   TRL
    no prompt       {"chosen": q + r_h, "rejected": q + r_l}             the same; the prompt is what both begin with
    conversations   {"conversations": [{"from", "value"}, ...], "chosen": {"from", "value"}, "rejected": {...}}       ShareGPT
    instruction     {"instruction": q, "input": more of q or "", "chosen": r_h, "rejected": r_l}                     Alpaca
A row may carry "system": a text; and "split": "train", "valid" or "test"; other rows are split by a hash of seed and prompt.
"""
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass

from huggingface_hub import HfApi, hf_hub_download
from jinja2 import TemplateError

from files import UserError

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
SPLITS = {"valid": 0.05, "test": 0.10}       # shares of the pairs; the rest is "train"


@dataclass(frozen=True)
class Pair:
    """One preference: a dialogue up to the last assistant turn, and two replies to it."""
    prompt: tuple                             # ((role, text), ...): maybe a system turn, then user and assistant in turn
    chosen: str
    rejected: str
    split: str


def read_rows(path):
    """(place, row) of every row of a JSON or JSON-lines file, gzipped or not, as it is read; place is "line 3" or "row 3"."""
    try:
        with open(path, "rb") as raw:
            zipped = raw.peek(2)[:2] == b"\x1f\x8b"
            text = io.TextIOWrapper(gzip.open(raw) if zipped else raw, encoding="utf-8-sig", newline="\n")
            numbered = ((i, line) for i, line in enumerate(text, 1) if line.strip())
            i, first = next(numbered, (0, ""))
            if first.lstrip().startswith("["):
                yield from ((f"row {i}", row) for i, row in enumerate(json.loads(first + text.read()), 1))
                return
            for i, line in itertools.chain([(i, first)] if first else [], numbered):
                yield f"line {i}", json.loads(line)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"--data {path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{'' if first.lstrip().startswith('[') else f' line {i}'}: not JSON: {error}") from None


def hub_rows(source):
    """(place, row) for every row of hub:owner/name[:split]: JSON files by huggingface_hub, other formats by `datasets`.

    A split is a word in a file's path, such as train, or a folder of splits, of which the train files are then taken.
    """
    name, _, split = source.removeprefix("hub:").partition(":")

    def having(word, names):
        return [file for file in names if re.search(rf"(^|[/_.-]){re.escape(word)}([/_.-]|$)", file)]
    try:
        names = [file for file in HfApi().list_repo_files(name, repo_type="dataset") if re.search(r"\.jsonl?(\.gz)?$", file) and "dataset_info" not in file]
        wanted = having(split or "train", names) or (names if len(names) == 1 and not split else [])
        wanted = having("train", wanted) or wanted
        if wanted:
            return [(f"{file} {place}", row) for file in wanted for place, row in read_rows(hf_hub_download(name, file, repo_type="dataset"))]
        from datasets import load_dataset
        return [(f"row {i}", row) for i, row in enumerate(load_dataset(name, split=split or "train"), 1)]
    except ImportError:
        raise UserError(f"--data {source}: no JSON file of {split or 'train'} among {', '.join(names) or 'its files'}; other formats need "
                        "`pip install datasets`") from None
    except UserError:
        raise
    except Exception as error:                # other people's networks and files: whatever it is, one line
        raise UserError(f"--data {source}: {(str(error).strip() or type(error).__name__).splitlines()[0]}") from None


def parse_transcript(text):
    """An HH-RLHF transcript as a tuple of (role, text) turns; empty where the text does not begin as one."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text.strip())
    return () if parts[0] else tuple((ROLES[role.lower()], turn.strip()) for role, turn in zip(parts[1::2], parts[2::2]))


def parse_turns(turns, field):
    """A list of {"role", "content"} or {"from", "value"}, or one of them, as (role, text) turns. ValueError where it is none."""
    found = []
    for turn in turns if isinstance(turns, list) else [turns]:
        role, text = (turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
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
    for form in ("conversations", "instruction", "prompt", "question", "input"):
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
        history = row.get("history") or []
        if not isinstance(history, list) or not all(isinstance(pair, list) and all(isinstance(text, str) for text in pair) for pair in history):
            raise ValueError("field 'history' is not a list of pairs of strings")
        history = [(role, tidy(text)) for pair in history for role, text in zip(("user", "assistant"), pair)]
        prompt = (*history, ("user", tidy("\n".join(parts))))
    elif form in ("prompt", "question", "input") and isinstance(row[form], str):
        asked = tidy(row[form])
        prompt = parse_transcript(asked) or (("user", asked),)
        prompt = prompt[:-1] if prompt[-1] == ("assistant", "") else prompt          # a transcript that ends with "Assistant:"
    elif form not in ("transcripts", "no prompt"):
        prompt = parse_turns(row[form], form)
    chosen, rejected = (tidy(row[name]) if isinstance(row[name], str) else parse_turns(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("fields 'chosen' and 'rejected' are of different kinds")
    if form == "transcripts":
        chosen, rejected = (turns if not turns or turns[-1][0] == "assistant" else (*turns, ("assistant", ""))               # it ends before the reply
                            for turns in (parse_transcript(chosen), parse_transcript(rejected)))
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
    if not any(replies):
        return None, "empty"
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
    share = int.from_bytes(hashlib.sha256(f"{seed} {prompt}".encode()).digest()[:6], "big") / 2**48
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


# ---------------------------------------------------------------- dialogues as text

# Put before every chat template: those that write today's date write this one, so that tomorrow's stage reads the same prompts.
A_DAY = ("{% macro strftime_now(format) %}{{ format.replace('%d', '26').replace('%m', '07').replace('%b', 'Jul').replace('%B', 'July')"
         ".replace('%Y', '2024') }}{% endmacro %}\n")


def render(turns):
    """A dialogue in the HH form, up to where the assistant's reply begins."""
    names = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}
    return "".join(f"\n\n{names[role]}{text}" for role, text in turns) + "\n\nAssistant:"


def messages(turns):
    """A dialogue as role/content messages without its system turns; turns in a row of one role, which many templates refuse, become one."""
    found = []
    for role, text in turns:
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n\n{text}"
        elif role != "system":
            found.append({"role": role, "content": text})
    return found


def rendered(tokenizer, messages, **how):
    """Messages as the tokenizer's chat template writes them, without thinking."""
    return tokenizer.apply_chat_template(messages, chat_template=A_DAY + tokenizer.get_chat_template(), tokenize=False, enable_thinking=False, **how)


def chat(tokenizer, turns, instruction="", reply=None):
    """A dialogue by the tokenizer's chat template, up to where the assistant's reply begins, or with a reply.

    The instruction opens the system turn; where the template has no system turn, the first user turn.
    """
    system, dialogue = "\n\n".join(filter(None, (instruction.strip(), *(text for role, text in turns if role == "system")))), messages(turns)

    def written(dialogue):
        if reply is not None:
            return rendered(tokenizer, [*dialogue, {"role": "assistant", "content": reply}])
        text = rendered(tokenizer, dialogue, add_generation_prompt=True)
        return f"{text}\n</think>\n\n" if text.rstrip().endswith("<think>") else text
    try:
        text = written([{"role": "system", "content": system}, *dialogue] if system else dialogue)
        if system in text:
            return text
    except TemplateError:                     # this is how a template says that it knows no system turn
        pass
    dialogue[0]["content"] = f"{system}\n\n{dialogue[0]['content']}".strip()
    try:
        return written(dialogue)
    except TemplateError as error:
        raise UserError(f"the chat template refuses a dialogue of {', '.join(m['role'] for m in dialogue)}: {error}; use --template plain") from None


def around_reply(tokenizer):
    """What the chat template puts right before and after a reply, up to the token that ends it: (text, ids)."""
    asked, reply = [{"role": "user", "content": "?"}], {"role": "assistant", "content": "REPLY"}
    whole, begun = rendered(tokenizer, [*asked, reply]), chat(tokenizer, (("user", "?"),))
    before, _, after = whole.removeprefix(begun).partition("REPLY") if whole.startswith(begun) else ("", "", "")
    ids, ends = tokenizer(after, add_special_tokens=False)["input_ids"], {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    end = next((i for i, token in enumerate(ids) if token in ends), None)
    return before, ids[:end + 1] if end is not None else [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
