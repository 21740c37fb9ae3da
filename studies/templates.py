"""What common/chat.py makes of other people's chat templates.

    python -m studies.templates FOLDER            writes studies/results/templates.json

Every .jinja file of the folder is put on a small tokenizer that has the markers of the template as
special tokens. A template is refused in one line, or it works: prompts and replies are compared
with the template's own rendering of the same dialogue, in one turn and in several, with and
without instruction, with control tokens inside texts, with thoughts in a reply. What differs from
the template's generation prompt is named. The written summary holds names and outcomes only.
"""

import argparse
import contextlib
import json
import re
from collections import Counter
from pathlib import Path

from transformers.utils import logging

from common import toy
from common.answers import text_of
from common.chat import (
    chat_form,
    chat_prompt,
    chat_reply,
    render_turns,
    template_source,
)
from common.config import POSITIVE, UserError, first_line
from common.data import encode_pairs
from common.pairs import Pair

RESULTS = Path(__file__).parent / "results" / "templates.json"

# How special tokens look, those of the templates in question.
MARKER = re.compile(
    r"<[^<>\s'\"{}()=]{1,60}>|\[/?[A-Z_]{2,30}\]|[\]\[]~!?b[\[\]]|\[e~\[|〈\|[A-Z]+\|〉|\[gMASK\]"
)

QUESTION = ("user", "What is a fjord, in short?")
DIALOGUES = {
    "one turn": (QUESTION,),
    "system": (("system", "Answer like a sailor."), QUESTION),
    "three turns": (QUESTION, ("assistant", "A long inlet."), ("user", "Where are many?")),
    "four turns": (
        ("system", "Answer like a sailor."),
        QUESTION,
        ("assistant", "A long inlet."),
        ("user", "Where are many?"),
    ),
}
REPLY = "Most of them are in Norway."
THOUGHTS = "<think>\nI count them.\n</think>\n\n"

# What a difference means: the explanations of the summary.
EXPLANATIONS = {
    "format": "the template writes format before a reply that its generation prompt lacks: it is "
    "part of the prompt",
    "other beginning": "the generation prompt is not how the template writes the beginning of a "
    "reply (most open thoughts, or close empty ones, there): the prompt is taken from the whole",
    "closed": "the template leaves a block of thoughts open before a reply that has none: the "
    "prompt closes it",
    "blank": "blank space that the generation prompt lacks stands before a reply: the reply begins "
    "with it",
    "system in user turn": "the template takes no system turn, or loses its text: the instruction "
    "opens the first user turn",
    "content as list": "the template wants the content of a message as a list",
    "end before next turn": "the template leaves the last reply open: it ends with what the "
    "template writes between a reply and the next turn",
    "end is EOS": "the template writes no token after a reply: it ends with EOS",
}


def tokenizer_for(source):
    """A small tokenizer with the markers of a template as special tokens."""
    tokenizer = toy.train_tokenizer(["a"])
    tokenizer.add_special_tokens({"bos_token": "<BOS>", "eos_token": "<EOS>"})
    markers = set(MARKER.findall(source))
    tokenizer.chat_template = source
    with contextlib.suppress(UserError):
        # markers that the template puts together
        markers |= set(MARKER.findall(render_turns(tokenizer, DIALOGUES["three turns"])))
    tokenizer.add_tokens(sorted(markers), special_tokens=True)
    return tokenizer


def render_as_served(tokenizer, messages, **options):
    """The template's own rendering, with which ours is compared; "" where it fails."""
    date = "{% macro strftime_now(f) %}{{ f.replace('%d', '26').replace('%m', '07')"
    date += ".replace('%b', 'Jul').replace('%B', 'July').replace('%Y', '2024') }}{% endmacro %}\n"
    source = date + template_source(tokenizer)
    options = {"tokenize": False, "enable_thinking": False, **options}
    try:
        return tokenizer.apply_chat_template(messages, chat_template=source, **options)
    except Exception:
        return ""


def as_messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


# ---------------------------------------------------------------- checks of one template


def encode(tokenizer, turns, reply=REPLY):
    [encoded] = encode_pairs(tokenizer, [Pair(turns, reply, "In Chile.", "train")], template="chat")
    return encoded


def differences(tokenizer):
    """The names of what differs between prompts and the template's generation prompt."""
    form = chat_form(tokenizer)
    turns = DIALOGUES["one turn"]
    prompt = chat_prompt(tokenizer, form, turns).text.text
    generated = render_as_served(tokenizer, as_messages(turns), add_generation_prompt=True)
    whole = render_as_served(tokenizer, as_messages((*turns, ("assistant", REPLY))))
    before, _, tail = whole.rpartition(REPLY)
    names = []
    if not whole:
        names.append("content as list")
    elif not before.startswith(prompt):
        names.append("closed")
    elif generated != prompt:
        names.append("format" if prompt.startswith(generated) else "other beginning")
    if form.blank:
        names.append("blank")
    if whole and form.end_text not in tail:
        is_eos = form.end == [tokenizer.eos_token_id]
        names.append("end is EOS" if is_eos else "end before next turn")
    system = render_as_served(tokenizer, as_messages((*DIALOGUES["system"], ("assistant", REPLY))))
    if whole and "like a sailor" not in system:
        names.append("system in user turn")
    return names


def check_reply(tokenizer, turns):
    """What is wrong with prompt and reply of a dialogue, as phrases."""
    encoded = encode(tokenizer, turns)
    form = chat_form(tokenizer)
    ids, n_prompt = encoded.input("plain", "chosen")
    text = tokenizer.decode(ids)
    end = tokenizer.decode(form.end)
    wrong = []
    if not text.endswith(REPLY + end):
        wrong.append("the reply is not the text and the end token")
    own = chat_prompt(tokenizer, form, turns)
    if tokenizer.decode(ids[:n_prompt]) != own.text.text:
        wrong.append("the ids of the prompt are not its text")
    served = render_as_served(tokenizer, as_messages((*turns, ("assistant", REPLY))))
    written = text.removesuffix(end)
    if REPLY in served and all(turn in served for _, turn in turns):
        before = served.rpartition(REPLY)[0] + REPLY
        closed = re.sub(rf"\n</[\w:]*think[\w:]*>\n\n{re.escape(REPLY)}$", REPLY, written)
        if before not in (written, closed):
            wrong.append("prompt and reply are not the template's own text")
    for _, turn in turns:
        if turn not in text:
            wrong.append("a turn is lost")
    positive = tokenizer.decode(encoded.prompts["positive"])
    if positive.count(POSITIVE) != 1:
        wrong.append(f"the instruction occurs {positive.count(POSITIVE)} times")
    if text_of(tokenizer, encoded.responses["chosen"].tolist(), set(form.end[-1:])) != REPLY:
        wrong.append("an answer like the reply is not judged as it")
    return wrong


def check_literals(tokenizer):
    """What is wrong where turns and reply spell out control tokens, as phrases."""
    form = chat_form(tokenizer)
    spelled = " ".join(text for text in form.controls.values() if text)[:400]
    turns = (("user", f"What do {spelled} mean?"),)
    ids, _ = encode(tokenizer, turns, f"That {spelled} ends it.").input("plain", "chosen")
    neutral, _ = encode(tokenizer, DIALOGUES["one turn"]).input("plain", "chosen")
    wrong = []
    if [i for i in ids if i in form.controls] != [i for i in neutral if i in form.controls]:
        wrong.append("a text became a control token")
    if tokenizer.decode(ids).count(spelled) != 2:
        wrong.append("a text with control tokens is not what it was")
    return wrong


def check_thoughts(tokenizer):
    """What is wrong where a reply brings its own block of thoughts, as phrases."""
    encoded = encode(tokenizer, DIALOGUES["one turn"], THOUGHTS + REPLY)
    form = chat_form(tokenizer)
    text = tokenizer.decode(encoded.input("plain", "chosen")[0])
    wrong = []
    after_question = text.rpartition(QUESTION[1])[2]
    before_thoughts = after_question.partition(THOUGHTS)[0]
    if re.search(r"think>|THINKING|THINK\]|think<\|sep|thought", before_thoughts):
        wrong.append("a second block of thoughts stands before the reply's own")
    if not after_question.endswith(THOUGHTS + REPLY + tokenizer.decode(form.end)):
        wrong.append("a reply with thoughts is not its text")
    answer = text_of(tokenizer, encoded.responses["chosen"].tolist(), set(form.end[-1:]))
    if answer != REPLY:
        wrong.append("an answer is judged with its thoughts")
    other = text_of(tokenizer, encoded.responses["rejected"].tolist(), set(form.end[-1:]))
    if other != "In Chile.":
        wrong.append("the reply without thoughts is not its text")
    return wrong


def study(source):
    """{"outcome": "works" | "refused" | "wrong", and why} of a template."""
    tokenizer = tokenizer_for(source)
    wrong = []
    try:
        for name, turns in DIALOGUES.items():
            wrong += [f"{name}: {what}" for what in check_reply(tokenizer, turns)]
        wrong += check_literals(tokenizer)
        wrong += check_thoughts(tokenizer)
        names = differences(tokenizer)
    except UserError as error:
        return {"outcome": "refused", "line": first_line(error)}
    if wrong:
        return {"outcome": "wrong", "wrong": wrong}
    return {"outcome": "works", "differences": names}


def show(tokenizer, turns=DIALOGUES["one turn"]):
    """The end of a prompt, and a reply, as they are tokenized."""
    form = chat_form(tokenizer)
    prompt = chat_prompt(tokenizer, form, turns)
    reply = chat_reply(form, prompt, "R").text + tokenizer.decode(form.end)
    return f"{prompt.text.text[-60:]!r} + {reply!r}"


def main(folder):
    logging.set_verbosity_error()
    results = {}
    for path in sorted(Path(folder).glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        results[path.stem] = study(source)
        outcome, *rest = results[path.stem].values()
        print(f"{path.stem}: {outcome} {rest[0] or ''}")
        if outcome != "refused":
            print(f"    {show(tokenizer_for(source))}")
    counts = Counter(result["outcome"] for result in results.values())
    named = Counter(name for result in results.values() for name in result.get("differences", ()))
    print(dict(counts), dict(named))
    summary = {
        "templates": len(results),
        "outcomes": counts,
        "differences": named,
        "explanations": EXPLANATIONS,
        "results": results,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", help="folder of .jinja files")
    main(parser.parse_args().folder)
