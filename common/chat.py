r"""Dialogues as text: the plain Human/Assistant form, and the chat template of a tokenizer.

A dialogue is a tuple of (role, text) turns with the roles user, assistant and system.

A chat template is read off one rendered text: the whole dialogue, with a placeholder as the reply.

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nREPLY<|im_end|>\n
    `--------------- the prompt: all of the text before the reply ---------------'     `-- tail --'

* The prompt is what stands before the reply. Whatever format the template puts there (an empty
  block of thoughts, a channel, a START_RESPONSE) belongs to it. Only blank space that the
  template's own generation prompt lacks is left to the reply, where the model has to write it.
* The reply ends with the first token after it that can end a turn (`end_of_reply`).
* Every turn's text and the instruction must occur in the whole (`render_turns`).
* Strings in a turn that look like control tokens never reach the template: stand-ins take their
  places and are replaced in the rendered text, so that these places are known (`mask`, `unmask`).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from common.config import UserError, first_line

PLAIN_NAMES = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}

# Put in front of every chat template. Templates that write today's date write this one instead, so
# that a later stage, or a run that passes midnight, reads the same prompts.
FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ format.replace('%d', '26').replace('%m', '07').replace('%b', 'Jul')"
    ".replace('%B', 'July').replace('%Y', '2024') }}"
    "{% endmacro %}\n"
)

# Stand for the reply, and for the turns of the dialogue that chat_form() reads the template with.
REPLY = "@@reply@@"
QUESTION = "@@question@@"
NEXT_QUESTION = "@@next question@@"
# Stands for the n-th string that is masked.
STAND_IN = "@@literal-{}@@"
STAND_INS = re.compile(r"@@literal-(\d+)@@")

# Texts that are masked as a whole.
SHORT = re.compile(r"[^/\n@]{1,12}")

# What begins and ends a block of thoughts.
OPEN = (
    r"(?:<(?:\w+:)?think(?::\w+)?>|\[THINK\]|<\|START_THINKING\|>|<\|inner_prefix\|>"
    r"|<\|channel>thought|<\|open\|>think<\|sep\|>)"
)
CLOSE = (
    r"(?:</(?:\w+:)?think(?::\w+)?>|\[/THINK\]|<\|END_THINKING\|>|<\|inner_suffix\|>"
    r"|<channel\|>|<\|close\|>think<\|sep\|>(?:<\|open\|>response<\|sep\|>)?)"
)
# A reply that begins with thoughts, and one that also ends them.
OPEN_THOUGHTS = re.compile(rf"\s*{OPEN}")
THOUGHTS = re.compile(rf"\s*(?P<open>{OPEN})(?P<thoughts>.*?)(?P<close>{CLOSE})", re.DOTALL)
# Thoughts without the opening tag, which was part of the prompt: a closing one ends a line.
ENDED_THOUGHTS = re.compile(rf"(?!\s*{OPEN})(?:(?!{OPEN}).)*?</think>(?=\s*\n)", re.DOTALL)
OPENING = "<think>"
# The block that a template puts before a reply: empty, left open, or only its end.
BLOCK = re.compile(rf"(?:{OPEN}\s*{CLOSE}|{OPEN}|{CLOSE})\s*\Z")
OPEN_BLOCK = re.compile(rf"{OPEN}\s*\Z")

# Tokens that a vocabulary may have for markup in texts: they control nothing.
PLAIN_MARKUP = re.compile(
    r"</?(?:a|b|blockquote|br|caption|code|dd|div|dl|dt|em|h[1-6]|hr|i|img|li|ol|p|pre|s|span"
    r"|strike|strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul)/?>"
)


# ---------------------------------------------------------------- the plain form


def render_transcript(turns):
    """A dialogue in the form of HH-RLHF, up to where the assistant's reply begins."""
    written = "".join(f"\n\n{PLAIN_NAMES[role]}{text}" for role, text in turns)
    return f"{written}\n\nAssistant:"


# ---------------------------------------------------------------- one call of the template


def template_source(tokenizer):
    """The text of the tokenizer's chat template. UserError where it has none to take."""
    source = tokenizer.chat_template
    if isinstance(source, dict):
        if "default" not in source:
            raise UserError(
                f"the tokenizer has the chat templates {', '.join(sorted(source))} and none called "
                "default; use --template plain"
            )
        source = source["default"]
    if not source:
        raise UserError("the tokenizer has no chat template; use --template plain")
    return source


def apply_template(tokenizer, source, messages, thinking=False, expects_reply=False):
    """Messages as the chat template with this source writes them.

    thinking: what the template is told where it asks. expects_reply: end with the template's
    generation prompt. UserError where the template fails: it is somebody else's program, and may
    fail in any way.
    """
    try:
        return tokenizer.apply_chat_template(
            messages,
            chat_template=FIXED_DATE + source,
            tokenize=False,
            enable_thinking=thinking,
            add_generation_prompt=expects_reply,
        )
    except Exception as error:
        raise UserError(first_line(error)) from None


def merged_messages(turns):
    """The user and assistant turns as {"role", "content"} messages.

    Many templates refuse two turns of one role in a row: such turns become one message.
    """
    messages = []
    for role, text in turns:
        if role == "system":
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        else:
            messages.append({"role": role, "content": text})
    return messages


def arrangements(turns, instruction):
    """Yield the messages of a dialogue in the ways that templates want them, most usual first.

    The instruction opens the system turn; where the template has none, the first user turn. The
    content of a message is a text; where the template wants one, a list.
    """
    system_texts = [text for role, text in turns if role == "system"]
    system = "\n\n".join(text for text in (instruction.strip(), *system_texts) if text)
    with_system = merged_messages(turns)
    in_first_turn = merged_messages(turns)
    ways = [with_system]
    if system:
        with_system.insert(0, {"role": "system", "content": system})
        in_first_turn[0]["content"] = f"{system}\n\n{in_first_turn[0]['content']}".strip()
        ways.append(in_first_turn)
    yield from ways
    for messages in ways:
        yield [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            for message in messages
        ]


def render_turns(tokenizer, turns, instruction="", thinking=False, expects_reply=False):
    """A dialogue by the chat template, in the first of its arrangements that loses no text.

    UserError that says why where there is none: templates refuse dialogues, and many drop a system
    turn, or every text, without a word.
    """
    source = template_source(tokenizer)
    problem = None
    for messages in arrangements(turns, instruction):
        try:
            text = apply_template(tokenizer, source, messages, thinking, expects_reply)
            lost = lost_turn(text, turns, instruction)
        except UserError as error:
            lost = str(error)
        if not lost:
            return text
        # what is said of messages of the usual kind is of more use
        if problem is None or isinstance(messages[0]["content"], str):
            problem = lost
    dialogue = merged_messages([turn for turn in turns if turn[1] != REPLY])
    roles = ", ".join(message["role"] for message in dialogue)
    raise UserError(
        f"the chat template refuses a dialogue of {roles}: {problem}; use --template plain"
    )


def lost_turn(text, turns, instruction):
    """What a rendered text lacks of its dialogue, as a phrase; "" where it has everything.

    Templates trim texts, and drop the thoughts of earlier turns.
    """
    if instruction.strip() not in text:
        return "it drops the instruction"
    for role, turn in turns:
        kept = without_thoughts(turn) if role == "assistant" else turn
        if kept.strip() not in text:
            what = "the reply" if turn == REPLY else f"the text of the {role} turn"
            return f"it drops {what}"
    return ""


# ---------------------------------------------------------------- control tokens inside texts


@dataclass(frozen=True)
class Text:
    """A text, and the (start, end) spans of it in which control tokens are only spelled out."""

    text: str
    literals: tuple = ()

    @classmethod
    def literal(cls, text):
        """A text without control tokens, whatever it spells out."""
        return cls(text, ((0, len(text)),))

    def __add__(self, other):
        length = len(self.text)
        moved = tuple((length + start, length + end) for start, end in other.literals)
        return Text(self.text + other.text, self.literals + moved)


def is_marker(text):
    """Whether an added token can be a control token: visible, one word, and no plain markup.

    Gemma's vocabulary has line breaks, runs of spaces and HTML tags as added tokens.
    """
    has_letter = any(character.isalnum() for character in text)
    has_sign = not text.isalnum()
    is_word = len(text.split()) == 1
    return has_letter and has_sign and is_word and not PLAIN_MARKUP.fullmatch(text)


def control_tokens(tokenizer, written=""):
    """{id: text} of the tokens that control a model: they never stand for a part of a text.

    These are the special tokens, and those of the added tokens that the template itself writes.
    Other added tokens are words. written: what the template writes.
    """
    tokens = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    for i, token in tokenizer.added_tokens_decoder.items():
        text = str(token)
        if token.special or (text in written and is_marker(text)):
            tokens[i] = text
    return tokens


def literal_pattern(controls):
    """What is masked in the turns of a dialogue: a pattern.

    The texts of control tokens; the ends of blocks of thoughts, at which templates cut a turn; and
    our own stand-ins.
    """
    others = [OPEN, CLOSE, STAND_INS.pattern, re.escape(REPLY)]
    return either(controls.values(), others, first="<[@")


def control_pattern(controls):
    """The texts of control tokens: a pattern."""
    return either(controls.values())


def either(texts, patterns=(), first=""):
    """One pattern for texts and patterns. first: the characters that the patterns begin with."""
    longest_first = sorted(filter(None, texts), key=len, reverse=True)
    # A vocabulary may have thousands of texts: most characters are passed over at one glance.
    firsts = re.escape("".join(sorted({*first, *(text[0] for text in longest_first)})))
    if not firsts:
        # matches nothing
        return re.compile(r"(?!)")
    parts = [*map(re.escape, longest_first), *patterns]
    return re.compile(f"(?=[{firsts}])(?:{'|'.join(parts)})")


def mask(text, pattern, originals):
    """The text with a stand-in for each match of the pattern; the matches go to `originals`.

    Short texts are masked as a whole, because only a stand-in shows whether a template has written
    them: "user" is also the name of a role. Switches such as /no_think stay visible.
    """

    def stand_in(match):
        originals.append(match[0])
        return STAND_IN.format(len(originals) - 1)

    if SHORT.fullmatch(text):
        return SHORT.sub(stand_in, text)
    return pattern.sub(stand_in, text)


def mask_turn(role, text, pattern, originals):
    """The masked text of a turn. The tags of its block of thoughts stay, for the template."""
    block = THOUGHTS.match(text) if role == "assistant" else None
    if not block:
        return mask(text, pattern, originals)
    thoughts = mask(block["thoughts"], pattern, originals)
    answer = mask(text[block.end() :], pattern, originals)
    return block["open"] + thoughts + block["close"] + answer


def unmask(text, originals):
    """A rendered text with the originals in the places of their stand-ins: a Text."""
    # text, number, text, number, ..., text
    written, *rest = STAND_INS.split(text)
    unmasked = Text(written)
    for number, written in zip(rest[::2], rest[1::2]):
        unmasked += Text.literal(originals[int(number)]) + Text(written)
    return unmasked


# ---------------------------------------------------------------- what surrounds a reply


@dataclass(frozen=True)
class ChatForm:
    """What a tokenizer's chat template writes around every reply: see chat_form()."""

    # {id: text} of the control tokens
    controls: dict
    # what is masked in a dialogue
    literals: re.Pattern
    # blank space between the prompt and a reply: the reply begins with it
    blank: str
    # ids after a reply, up to and with the token that ends it; [] where there is none
    end: list

    @property
    def end_text(self):
        """The text of the token that ends a reply."""
        return self.controls.get(self.end[-1], "") if self.end else ""


class ChatPrompt(NamedTuple):
    """A prompt in the chat template."""

    text: Text
    # what the template puts between this prompt and a reply
    lead: str


def chat_form(tokenizer):
    """Read off two dialogues what the chat template writes around a reply: a ChatForm."""
    question = (("user", QUESTION),)
    before, tail = around_reply(render_turns(tokenizer, (*question, ("assistant", REPLY))))
    try:
        next_turns = (*question, ("assistant", REPLY), ("user", NEXT_QUESTION))
        following = render_turns(tokenizer, next_turns)
        next_tail = around_reply(following)[1].partition(NEXT_QUESTION)[0]
    except UserError:
        next_tail = ""
    controls = control_tokens(tokenizer, f"{before}{tail}{next_tail}")
    end = end_of_reply(tokenizer, before, tail, next_tail)
    if end:
        controls.setdefault(end[-1], tokenizer.convert_ids_to_tokens(end[-1]))
    return ChatForm(controls, literal_pattern(controls), blank_before_reply(tokenizer, before), end)


def around_reply(whole):
    """A rendered dialogue's text before and after the reply."""
    before, _, after = whole.rpartition(REPLY)
    return before, after


def blank_before_reply(tokenizer, before):
    """The blank space before a reply that is not the prompt's.

    The prompt ends where the generation prompt ends, or, where the template writes more before a
    reply, behind the last of it that is visible. Of a generation prompt that the template itself
    does not keep before a reply, what both have in common counts.
    """
    if OPEN_BLOCK.search(before):
        # close_block() ends the prompt
        return ""
    generated = render_or_nothing(tokenizer, (("user", QUESTION),), expects_reply=True)
    # what stands before the question may differ
    opening = before.rpartition(QUESTION)[2]
    asked = generated.rpartition(QUESTION)[2]
    return opening[max(shared_length(opening, asked), len(opening.rstrip())) :]


def end_of_reply(tokenizer, before, tail, next_tail):
    """The ids after a reply, up to and with the token that ends it.

    tail: what the template writes after the last reply; next_tail: what it writes between a reply
    and the next question, which matters for templates that leave the last reply open. A token that
    begins the reply does not end it, unless both agree on it: a separator of turns. [EOS] where
    neither has a token that can end a turn, [] where there is no EOS either.
    """
    candidates = [ids_up_to_marker(tokenizer, text) for text in (tail, next_tail)]
    ends = [ids[-1] for ids in candidates if ids]
    is_separator = len(ends) == 2 and ends[0] == ends[1]
    beginning = beginning_of_reply(tokenizer, before)
    for ids in candidates:
        if ids and (is_separator or ids[-1] not in beginning):
            return ids
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def ids_up_to_marker(tokenizer, text):
    """The ids of a text that follows a reply, up to and with the first token that can end a turn.

    [] where there is none. Such a token is special, or an added one that is a marker.
    """
    added = tokenizer.get_added_vocab()
    can_end = {*control_tokens(tokenizer), *(i for token, i in added.items() if is_marker(token))}
    ids = ids_after(tokenizer, REPLY, text)
    for i, token in enumerate(ids):
        if token in can_end:
            return ids[: i + 1]
    return []


def beginning_of_reply(tokenizer, before):
    """The ids with which a reply's turn begins: the last control token before the reply, and all
    that the dialogue lacks where no reply is asked for."""
    controls = control_tokens(tokenizer, before)
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    beginning = {*[token for token in ids if token in controls][-1:]}
    ended = render_or_nothing(tokenizer, (("user", QUESTION),))
    if ended:
        ended_ids = tokenizer(ended, add_special_tokens=False)["input_ids"]
        beginning.update(ids[shared_length(ids, ended_ids) :])
    return beginning


def shared_length(first, second):
    """How many items two sequences share at their beginnings."""
    for i, (a, b) in enumerate(zip(first, second)):
        if a != b:
            return i
    return min(len(first), len(second))


def ids_after(tokenizer, before, text):
    """The ids of a text as they continue the text before it."""
    ids = tokenizer(before, add_special_tokens=False)["input_ids"]
    whole = tokenizer(before + text, add_special_tokens=False)["input_ids"]
    if whole[: len(ids)] == ids:
        return whole[len(ids) :]
    # The tokenizer merges both: keep them apart.
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render_or_nothing(tokenizer, turns, **options):
    """render_turns, "" where the template refuses the dialogue."""
    try:
        return render_turns(tokenizer, turns, **options)
    except UserError:
        return ""


# ---------------------------------------------------------------- prompts and replies


def chat_prompt(tokenizer, form, turns, instruction="", thinking=False):
    """The ChatPrompt of a dialogue. UserError where the template refuses it.

    thinking: the replies bring their own blocks of thoughts, so the prompt ends before the place
    of such a block.
    """
    rendered, _ = render_around_reply(tokenizer, form, turns, instruction, thinking)
    before = close_block(rendered.text)
    text = before.removesuffix(form.blank)
    start = start_of_block(before)
    if thinking and start < len(before):
        text = before[:start]
    return ChatPrompt(Text(text, rendered.literals), before[len(text) :])


def render_around_reply(tokenizer, form, turns, instruction="", thinking=False):
    """(the Text before the reply, the text after it)."""
    originals = []
    masked = [(role, mask_turn(role, text, form.literals, originals)) for role, text in turns]
    instruction = mask(instruction, form.literals, originals)
    whole = render_turns(tokenizer, (*masked, ("assistant", REPLY)), instruction, thinking)
    before, after = around_reply(whole)
    return unmask(before, originals), after


def start_of_block(before):
    """Where the block of thoughts begins that ends the text before a reply; else its length."""
    block = BLOCK.search(before)
    return block.start() if block else len(before)


def close_block(before):
    """The text before a reply, a block of thoughts that it leaves open closed.

    Else the reply would stand among the thoughts.
    """
    block = OPEN_BLOCK.search(before)
    if not block:
        return before
    return f"{before}\n{closing_tag(block[0].strip())}\n\n"


def closing_tag(tag):
    """The end of a block of thoughts that begins with the tag."""
    if tag == "<|channel>thought":
        return "<channel|>"
    if tag.startswith("<|"):
        return tag.replace("START", "END").replace("prefix", "suffix").replace("open", "close")
    return f"{tag[0]}/{tag[1:]}"


def has_thoughts(reply):
    """Whether a reply begins with a closed block of thoughts of its own."""
    return bool(THOUGHTS.match(reply) or ENDED_THOUGHTS.match(reply))


def without_thoughts(reply):
    """A reply without the block of thoughts that it begins with; "" where that does not end."""
    block = THOUGHTS.match(reply) or ENDED_THOUGHTS.match(reply)
    if block:
        return reply[block.end() :]
    return "" if OPEN_THOUGHTS.match(reply) else reply


def chat_reply(form, prompt, reply):
    """A reply as it continues a ChatPrompt: a Text.

    A block of thoughts that the reply brings takes the place of the template's empty one. The end
    token that the reply already carries is taken off.
    """
    if form.end_text and reply.rstrip().endswith(form.end_text):
        reply = reply.rstrip().removesuffix(form.end_text).rstrip()
    if not has_thoughts(reply):
        return Text(prompt.lead) + Text.literal(reply)
    # a lead that is no blank space is the template's empty block
    lead = "" if prompt.lead.strip() else prompt.lead
    return Text(lead) + reply_text(reply)


def reply_text(reply):
    """A reply as a Text: the tags of its block of thoughts are control tokens, where they are
    tokens. The opening one, which may have been part of another prompt, is put back."""
    block = THOUGHTS.match(reply)
    if not block and ENDED_THOUGHTS.match(reply):
        reply = f"{OPENING}\n{reply.lstrip()}"
        block = THOUGHTS.match(reply)
    if not block:
        return Text.literal(reply)
    return Text(reply, (block.span("thoughts"), (block.end(), len(reply))))


def render_chat(tokenizer, turns, instruction="", reply=None, form=None):
    """The Text of a dialogue by the tokenizer's chat template: with the reply, or up to where it
    begins.

    form: the tokenizer's ChatForm, for callers that render many dialogues. UserError where the
    template refuses the dialogue.
    """
    form = form or chat_form(tokenizer)
    if reply is None:
        return chat_prompt(tokenizer, form, turns, instruction).text
    rendered, after = render_around_reply(tokenizer, form, turns, instruction)
    before = rendered.text
    if has_thoughts(reply):
        before = before[: start_of_block(before)]
    return Text(close_block(before), rendered.literals) + reply_text(reply) + Text(after)
