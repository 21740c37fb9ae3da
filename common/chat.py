"""Dialogues as text: the plain Human/Assistant form, and the chat template of a tokenizer.

A dialogue is a tuple of (role, text) turns with the roles user, assistant and system.
"""

from jinja2 import TemplateError

from common.config import UserError

PLAIN_NAMES = {"user": "Human: ", "assistant": "Assistant: ", "system": ""}

# Put in front of every chat template. Templates that write today's date write this one instead, so
# that a later stage, or a run that passes midnight, reads the same prompts.
FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ format.replace('%d', '26').replace('%m', '07').replace('%b', 'Jul')"
    ".replace('%B', 'July').replace('%Y', '2024') }}"
    "{% endmacro %}\n"
)


def render_transcript(turns):
    """A dialogue in the form of HH-RLHF, up to where the assistant's reply begins."""
    written = "".join(f"\n\n{PLAIN_NAMES[role]}{text}" for role, text in turns)
    return f"{written}\n\nAssistant:"


def render_chat(tokenizer, turns, instruction="", reply=None):
    """A dialogue by the tokenizer's chat template: with the reply, or up to where it begins.

    The instruction opens the system turn; where the template has no system turn, the first user
    turn. UserError where the template refuses the dialogue.
    """
    system_texts = [text for role, text in turns if role == "system"]
    system = "\n\n".join(text for text in (instruction.strip(), *system_texts) if text)
    dialogue = merged_messages(turns)
    if reply is not None:
        dialogue.append({"role": "assistant", "content": reply})
    expects_reply = reply is None

    system_message = [{"role": "system", "content": system}] if system else []
    try:
        text = apply_template(tokenizer, system_message + dialogue, expects_reply)
        # some templates drop the system turn without a word
        if system in text:
            return text
    except TemplateError:
        # others refuse it
        pass
    dialogue[0]["content"] = f"{system}\n\n{dialogue[0]['content']}".strip()
    try:
        return apply_template(tokenizer, dialogue, expects_reply)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in dialogue)
        raise UserError(
            f"the chat template refuses a dialogue of {roles}: {error}; use --template plain"
        ) from None


def merged_messages(turns):
    """User and assistant turns as {"role", "content"} messages.

    Many templates refuse two turns of one role in a row: such turns become one message.
    """
    messages = []
    for role, text in turns:
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
        elif role != "system":
            messages.append({"role": role, "content": text})
    return messages


def apply_template(tokenizer, messages, expects_reply):
    """Messages as the chat template writes them, without thinking.

    expects_reply: end where the assistant's reply begins.
    """
    text = tokenizer.apply_chat_template(
        messages,
        chat_template=FIXED_DATE + tokenizer.get_chat_template(),
        tokenize=False,
        enable_thinking=False,
        add_generation_prompt=expects_reply,
    )
    if expects_reply and text.rstrip().endswith("<think>"):
        # the template opens a block of thoughts whatever enable_thinking says: close it
        text += "\n</think>\n\n"
    return text


def reply_delimiters(tokenizer):
    """What the chat template writes around a reply: (the text before it, the ids after it).

    The ids reach up to the token that ends the reply. They are [EOS] where the template writes
    none, and [] where there is no EOS either.
    """
    question = (("user", "?"),)
    prompt = render_chat(tokenizer, question)
    dialogue = render_chat(tokenizer, question, reply="REPLY")
    before = ""
    after = ""
    if dialogue.startswith(prompt):
        before, _, after = dialogue.removeprefix(prompt).partition("REPLY")

    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    special_ids = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for i, token in enumerate(ids):
        if token in special_ids:
            return before, ids[: i + 1]
    return before, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
