"""Rows, splits, tokens, masks and batches."""

import copy
import gzip
import itertools
import json
import sys
import types

import pytest
import torch
from helpers import SHARED, load_pairs
from templates import CHATML, NO_SYSTEM, SILENT, STRICT
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from common import rows as rows_module
from common.chat import render_chat, render_transcript
from common.config import NEGATIVE, POSITIVE, UserError
from common.data import choose_template, collate, encode_pairs, prepare_pairs, shuffled_batches
from common.pairs import (
    HISTORY_FIELDS,
    PROMPT_FIELDS,
    SYSTEM_FIELDS,
    UNPLACED_FIELDS,
    Pair,
    parse_columns,
    parse_row,
    split_of,
)

START = "\n\nHuman: Hi.\n\nAssistant: Hello."
QUESTION = f"{START}\n\nHuman: And?"
HH = {
    "chosen": f"{QUESTION}\n\nAssistant: Good.",
    "rejected": f"{QUESTION}\n\nAssistant: Bad.",
}
TRL = {"prompt": "And?", "chosen": "Good.", "rejected": "Bad."}
TURNS = (("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real pairs and model")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


def system(text):
    return {"from": "system", "value": text}


# ---------------------------------------------------------------- rows


def test_hh_transcript_is_split_into_turns():
    pair, reason = parse_row(HH, 0)
    assert reason is None
    assert pair.prompt == TURNS
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")
    assert render_transcript(pair.prompt) + " " + pair.chosen == HH["chosen"]


def test_prompt_chosen_rejected_row():
    pair, _ = parse_row(TRL, 0)
    assert pair.prompt == (("user", "And?"),)
    assert pair.chosen == "Good."
    whole, _ = parse_row({**TRL, "prompt": f"{QUESTION}\n\nAssistant:"}, 0)
    assert whole.prompt == parse_row(HH, 0)[0].prompt


def test_a_transcript_that_ends_before_the_reply_is_counted(tmp_path):
    rows = [
        {**HH, "rejected": QUESTION},
        {**HH, "rejected": f"{START}\n\nHuman:"},
        {"chosen": f"{START}\n\nHuman:", "rejected": f"{START}\n\nHuman:"},
        HH,
    ]
    pairs, skipped, form = load_pairs(write(tmp_path / "rows.jsonl", rows), 0)
    assert form == "transcripts"
    assert len(pairs) == 1
    assert skipped == {"empty": 2, "differing in the prompt": 1}


PROMPT_TURNS = [user("Hi."), assistant("Hello."), user("And?")]
CHOSEN_DIALOGUE = [*PROMPT_TURNS, assistant("Good.")]
REJECTED_DIALOGUE = [*PROMPT_TURNS, assistant("Bad.")]

# The same pair in every form.
FORMS = {
    "transcripts": HH,
    "prompt as a transcript": {
        "prompt": f"{QUESTION}\n\nAssistant:",
        "chosen": " Good.",
        "rejected": " Bad.",
    },
    "prompt as turns, replies as text": {
        "prompt": PROMPT_TURNS,
        "chosen": "Good.",
        "rejected": "Bad.",
    },
    "all as turns": {
        "prompt": PROMPT_TURNS,
        "chosen": [assistant("Good.")],
        "rejected": [assistant("Bad.")],
    },
    "turns without prompt": {"chosen": CHOSEN_DIALOGUE, "rejected": REJECTED_DIALOGUE},
    "prompt repeated as turns": {
        "prompt": PROMPT_TURNS,
        "chosen": CHOSEN_DIALOGUE,
        "rejected": REJECTED_DIALOGUE,
    },
    "prompt as text, replies as whole dialogues": {
        "prompt": "And?",
        "chosen": CHOSEN_DIALOGUE,
        "rejected": REJECTED_DIALOGUE,
    },
    "conversations": {
        "conversations": [human("Hi."), gpt("Hello."), human("And?")],
        "chosen": gpt("Good."),
        "rejected": gpt("Bad."),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form):
    pair, reason = parse_row(FORMS[form], 0)
    assert reason is None
    assert (pair.prompt, pair.chosen, pair.rejected) == (TURNS, "Good.", "Bad.")


def test_instruction_rows():
    row = {"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}
    pair, _ = parse_row(row, 0)
    assert (pair.prompt, pair.chosen) == ((("user", "Add.\n1 and 2"),), "3")
    pair, _ = parse_row({**row, "input": None}, 0)
    assert pair.prompt == (("user", "Add."),)


def test_text_without_prompt():
    pair, _ = parse_row({"chosen": "The sky is blue.", "rejected": "The sky is black."}, 0)
    # "bl" is not part of the prompt
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        (("user", "The sky is"),),
        "blue.",
        "black.",
    )
    assert parse_row({"chosen": "a", "rejected": "b"}, 0) == (None, "differing in the prompt")


def test_system_turn_is_kept():
    row = {
        "conversations": [system("Be brief."), human("And?")],
        "chosen": gpt("Good."),
        "rejected": gpt("Bad."),
    }
    pair, _ = parse_row(row, 0)
    assert pair.prompt == (("system", "Be brief."), ("user", "And?"))
    assert render_transcript(pair.prompt) == "\n\nBe brief.\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {**TRL, "chosen": "Good.</s></s>", "rejected": "Bad.</s>"},
        {**TRL, "chosen": "<s> Good.", "rejected": "<s>Bad.</s>"},
        {**TRL, "prompt": "And?\r\n", "chosen": "Good.\r\n", "rejected": "\r\nBad."},
    ],
)
def test_special_tokens_and_line_ends_are_removed(row):
    pair, _ = parse_row(row, 0, ("<s>", "</s>"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "And?"),), "Good.", "Bad.")


def test_prompt_repeated_inside_replies_is_removed():
    row = {
        "prompt": "What is\nit?",
        "chosen": "What is it? Good.",
        "rejected": "What is it?\n\nBad.",
    }
    pair, _ = parse_row(row, 0)
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")


@pytest.mark.parametrize(
    "prompt, chosen, rejected",
    [
        ("Hi", "Hi there.", "Hi you."),
        ("Say hello.", "Say hello. Good.", "No."),
        ("Say hello", "Say hello, ok", "Say helloo"),
    ],
)
def test_replies_that_only_resemble_the_prompt_stay(prompt, chosen, rejected):
    pair, _ = parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, 0)
    assert (pair.chosen, pair.rejected) == (chosen, rejected)


def test_transcripts_inside_ordinary_text_stay_text():
    log = "Here it is:\n\nHuman: Hi\n\nAssistant: Hello!"
    prompt = "Read this.\n\nHuman: A\n\nAssistant: B"
    pair, _ = parse_row({"prompt": prompt, "chosen": log, "rejected": "No."}, 0)
    assert pair.prompt == (("user", prompt),)
    assert pair.chosen == log


@pytest.mark.parametrize("field", ["question", "input"])
def test_system_and_question_columns(field):
    row = {
        "system": "Be brief.",
        field: "What colour is the sky?",
        "chosen": "The sky is blue.",
        "rejected": "The sky is black.",
    }
    pair, _ = parse_row(row, 0)
    assert pair.prompt == (("system", "Be brief."), ("user", "What colour is the sky?"))
    assert pair.chosen == "The sky is blue."


def test_history_column():
    row = {"instruction": "And?", "input": "", "chosen": "Good.", "rejected": "Bad."}
    pair, _ = parse_row({**row, "history": [["Hi.", "Hello."]]}, 0)
    assert pair.prompt == TURNS


def test_a_dialogue_that_the_assistant_begins_is_left_out():
    row = {
        "conversations": [gpt("Hello."), human("And?")],
        "chosen": gpt("Good."),
        "rejected": gpt("Bad."),
    }
    assert parse_row(row, 0) == (None, "beginning with the assistant")


def test_a_reply_that_is_only_a_special_token_is_empty():
    assert parse_row({**TRL, "chosen": "</s>"}, 0, ("<s>", "</s>")) == (None, "empty")


def test_windows_line_ends_inside_a_reply_and_other_scripts(tmp_path, tokenizer):
    row = {"prompt": "素数とは何ですか。", "chosen": "Привет,\r\nмир 🌍", "rejected": "שלום"}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    [pair], _, _ = load_pairs(path, 0)
    assert pair.prompt == (("user", "素数とは何ですか。"),)
    assert (pair.chosen, pair.rejected) == ("Привет,\nмир 🌍", "שלום")
    [encoded] = encode_pairs(tokenizer, [pair])
    assert tokenizer.decode(encoded.responses["chosen"][:-1]) == " Привет,\nмир 🌍"


@pytest.mark.parametrize("history", [5, [[1, 2]], ["Hi."], [["Hi.", None]]])
def test_a_malformed_history_names_its_line(tmp_path, history):
    row = {"instruction": "And?", "input": "", "history": history}
    row |= {"chosen": "Good.", "rejected": "Bad."}
    with pytest.raises(UserError, match="line 1: field 'history'"):
        load_pairs(write(tmp_path / "a.jsonl", [row]), 0)


def test_useless_rows_are_skipped_and_counted(tmp_path):
    rows = [
        HH,
        {**HH, "rejected": HH["rejected"].replace("Bad.", "  ")},
        {**HH, "rejected": HH["chosen"]},
        {**HH, "rejected": HH["rejected"].replace("Hi.", "Ho.")},
    ]
    pairs, skipped, form = load_pairs(write(tmp_path / "rows.jsonl", rows), 0)
    assert form == "transcripts"
    assert len(pairs) == 1
    assert skipped == {"empty": 1, "identical": 1, "differing in the prompt": 1}


@pytest.mark.parametrize(
    "row, words",
    [
        ({"chosen": "a"}, "'rejected' is missing"),
        ({**TRL, "chosen": 1}, "field 'chosen' holds '1'"),
        ([1], "not an object"),
        ({**TRL, "split": "dev"}, "'dev'"),
        ({**TRL, "prompt": ["x"]}, "field 'prompt' holds"),
        ({**TRL, "chosen": [assistant("x")]}, "different kinds"),
        (HH, "the form 'transcripts', the rows before it 'prompt'"),
        ({**TRL, "prompt": " "}, "does not end with a user turn"),
        ({**TRL, "prompt": []}, "does not end with a user turn"),
        ({**TRL, "prompt": "Assistant:"}, "does not end with a user turn"),
        ({**TRL, "prompt": [{"role": "tool", "content": "x"}]}, "expected a turn"),
        ({**TRL, "prompt": [{"role": ["user"], "content": "x"}]}, "expected a turn"),
        (
            {"prompt": "q", "chosen": [user("x")], "rejected": [user("y")]},
            "does not end with the assistant's reply",
        ),
    ],
)
def test_bad_rows_are_named_by_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", [TRL, row])
    with pytest.raises(UserError, match="line 2") as error:
        load_pairs(path, 0)
    assert words in str(error.value)
    assert str(path) in str(error.value)


# ---------------------------------------------------------------- whole dialogues beside a prompt


def transcript(turns):
    """Turns of FORMS as one HH-RLHF transcript."""
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


SYSTEM_TURN = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "prompt",
    ["Hi.", "And?", "", None, [], [user("Hi.")], [user(" Hi. ")], PROMPT_TURNS, PROMPT_TURNS[-1:]],
)
@pytest.mark.parametrize("write_replies", [list, transcript])
def test_a_prompt_that_whole_dialogues_repeat_is_read_once(prompt, write_replies):
    row = {"prompt": prompt, "chosen": write_replies(CHOSEN_DIALOGUE)}
    row["rejected"] = write_replies(REJECTED_DIALOGUE)
    pair, _ = parse_row(row, 0)
    assert (pair.prompt, pair.chosen, pair.rejected) == (TURNS, "Good.", "Bad.")


def test_a_system_turn_of_the_prompt_alone_is_kept():
    dialogues = {"chosen": CHOSEN_DIALOGUE, "rejected": REJECTED_DIALOGUE}
    for prompt in ([SYSTEM_TURN], [SYSTEM_TURN, user("Hi.")], [SYSTEM_TURN, *PROMPT_TURNS]):
        pair, _ = parse_row({"prompt": prompt, **dialogues}, 0)
        assert pair.prompt == (("system", "Be brief."), *TURNS)
    with_system = {name: [SYSTEM_TURN, *turns] for name, turns in dialogues.items()}
    for prompt in ("Hi.", [user("Hi.")], [SYSTEM_TURN, user("Hi.")]):
        pair, _ = parse_row({"prompt": prompt, **with_system}, 0)
        assert pair.prompt == (("system", "Be brief."), *TURNS)


def test_dialogues_that_repeat_the_end_of_the_prompt_continue_it():
    last = PROMPT_TURNS[-1]
    row = {"prompt": PROMPT_TURNS, "chosen": [last, assistant("Good.")]}
    row["rejected"] = [last, assistant("Bad.")]
    assert parse_row(row, 0)[0].prompt == TURNS


def test_dialogues_of_something_else_than_the_prompt_are_refused():
    row = {"prompt": "Why?", "chosen": CHOSEN_DIALOGUE, "rejected": REJECTED_DIALOGUE}
    with pytest.raises(ValueError, match=r"'prompt' ends with a turn of the user.*ignore=prompt"):
        parse_row(row, 0)
    assert parse_row(row, 0, columns=parse_columns(["ignore=prompt"]))[0].prompt == TURNS


def test_a_formatted_prompt_beside_its_own_dialogue_is_read_once():
    prompt = "<|user|>\nHi.</s>\n<|assistant|>\nHello.</s>\n<|user|>\nAnd?</s>\n<|assistant|>\n"
    row = {"prompt": prompt, "chosen": CHOSEN_DIALOGUE, "rejected": REJECTED_DIALOGUE}
    assert parse_row(row, 0)[0].prompt == TURNS


def test_replies_that_are_dialogues_themselves_stay_text():
    row = {"prompt": "Write a dialogue."}
    row["chosen"] = "Human: Hi.\n\nAssistant: Hello."
    row["rejected"] = "Human: Hi.\n\nAssistant: Go."
    pair, _ = parse_row(row, 0)
    assert pair.prompt == (("user", "Write a dialogue."),)
    assert pair.chosen == row["chosen"]


ASKED = [user("What?")]
ANSWERED = [*ASKED, assistant("Good.")]
BOTH = {"chosen": ANSWERED, "rejected": [*ASKED, assistant("Bad.")]}
TEXTS = {"chosen": "Good.", "rejected": "Bad."}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ANSWERED, **BOTH},
        {"conversations": [human("What?"), gpt("Bad.")], **BOTH},
        {"messages": [SYSTEM_TURN, *ANSWERED], **BOTH},
        {"messages": ANSWERED, **TEXTS},
        {"prompt": "\n\nHuman: What?\n\nAssistant: Good.", **BOTH},
        {"prompt": "\n\nHuman: What?\n\nAssistant: Good.", **TEXTS},
        {"history": [["What?", "Good."]], "prompt": "What?", **TEXTS},
        {"conversation_history": [["What?", ""]], "prompt": "What?", **TEXTS},
    ],
)
def test_a_prompt_field_that_holds_the_reply_too(row):
    """The reply never becomes a part of the prompt."""
    pair, _ = parse_row(row, 0)
    assert [turn for turn in pair.prompt if turn[0] != "system"] == [("user", "What?")]
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")


@pytest.mark.parametrize("replies", [BOTH, TEXTS])
def test_a_prompt_field_with_a_third_reply_is_refused(replies):
    with pytest.raises(ValueError, match=r"'messages' ends with another reply.*ignore=messages"):
        parse_row({"messages": [*ASKED, assistant("Perhaps.")], **replies}, 0)


@pytest.mark.parametrize(
    "prompt",
    [
        "<s>[INST] <<SYS>>\nBe a pirate.\n<</SYS>>\n\nWhat? [/INST]",
        "<|im_start|>system\nBe a pirate.<|im_end|>\n<|im_start|>user\nWhat?<|im_end|>",
        "[INST] Who? [/INST] Nobody.</s>[INST] What? [/INST]",
    ],
)
def test_a_formatted_prompt_that_holds_more_than_the_dialogue_is_refused(prompt):
    with pytest.raises(ValueError, match="--columns ignore=prompt"):
        parse_row({"prompt": prompt, **BOTH}, 0)
    bare = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert parse_row({"prompt": bare, **BOTH}, 0)[0].prompt == (("user", "What?"),)


def test_prompts_of_languages_without_spaces_are_removed_too():
    prompt = "请介绍一下长城的历史，并说明它为什么重要。"
    row = {"prompt": prompt, "chosen": f"{prompt}\n长城很长。", "rejected": f"{prompt}不知道。"}
    pair, _ = parse_row(row, 0)
    assert (pair.chosen, pair.rejected) == ("长城很长。", "不知道。")
    row = {"prompt": "What is it?", "chosen": "What is it?Good.", "rejected": "What is it? Bad."}
    assert parse_row(row, 0)[0].chosen == "Good."
    row = {"prompt": "I can", "chosen": "I cannot.", "rejected": "I candle."}
    assert parse_row(row, 0)[0].chosen == "I cannot."


# ---------------------------------------------------------------- every field is read, or named

SKY = {"chosen": "The sky is blue.", "rejected": "The sky is black."}
ASK = "What colour is the sky?"


@pytest.mark.parametrize("name", PROMPT_FIELDS)
def test_the_question_in_another_field(name):
    # an instruction is always a text
    values = [ASK] if name == "instruction" else [ASK, [user(ASK)]]
    for value in values:
        pair, _ = parse_row({**SKY, name: value}, 0)
        assert (pair.prompt, pair.chosen) == ((("user", ASK),), SKY["chosen"])


@pytest.mark.parametrize("value", [ASK, [ASK], [user(ASK)]])
def test_an_unknown_field_that_may_hold_the_prompt_is_named(value):
    """Else the shared beginning of the replies would become the prompt."""
    with pytest.raises(ValueError, match=r"'ask' may: .*--columns prompt=FIELD"):
        parse_row({**SKY, "ask": value}, 0)
    pair, _ = parse_row({**SKY, "ask": value}, 0, columns=parse_columns(["ignore=ask"]))
    assert pair.prompt == (("user", "The sky is"),)


def test_a_score_is_no_prompt():
    row = {**SKY, "score": 3.5, "tags": [], "note": None, "prompt_id": 7}
    assert parse_row(row, 0)[0].prompt == (("user", "The sky is"),)


def test_dialogues_without_prompt_need_no_other_field():
    row = {"chosen": CHOSEN_DIALOGUE, "rejected": REJECTED_DIALOGUE, "source": "somewhere"}
    assert parse_row(row, 0)[0].prompt == TURNS


def test_a_second_prompt_field_may_repeat_the_first_one():
    row = {"prompt": "Hi.", "chosen": [user("Hi."), assistant("Good.")]}
    row["rejected"] = [user("Hi."), assistant("Bad.")]
    for messages in (row["chosen"], [user("Hi.")], []):
        assert parse_row({**row, "messages": messages}, 0)[0].prompt == (("user", "Hi."),)
    conflict = {**row, "messages": [user("Ho.")]}
    with pytest.raises(ValueError, match="'messages' holds something else than 'prompt'"):
        parse_row(conflict, 0)
    pair, _ = parse_row({**TRL, "query": "Ho."}, 0, columns=parse_columns(["prompt=query"]))
    assert pair.prompt == (("user", "Ho."),)
    with pytest.raises(ValueError, match="'chosen_response' holds something else than 'chosen'"):
        parse_row({**TRL, "chosen_response": "Other."}, 0)


HISTORIES = {
    "pairs": [["Hi.", "Hello."]],
    "texts in turn": ["Hi.", "Hello."],
    "turns": PROMPT_TURNS[:2],
    "ShareGPT turns": [human("Hi."), gpt("Hello.")],
    "turns with the prompt": PROMPT_TURNS,
    "objects": [{"user": "Hi.", "assistant": "Hello."}],
    "questions and answers": [{"question": "Hi.", "answer": "Hello."}],
    "transcript": START,
    "JSON": json.dumps([["Hi.", "Hello."]]),
    "turns as JSON": json.dumps(PROMPT_TURNS[:2]),
}


@pytest.mark.parametrize("form", HISTORIES)
@pytest.mark.parametrize("name", HISTORY_FIELDS)
def test_history_in_every_form(form, name):
    rows = [
        TRL,
        {"instruction": "And?", "input": "", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": [user("And?")], "chosen": [assistant("Good.")], "rejected": [assistant("Bad.")]},
        {"prompt": PROMPT_TURNS, "chosen": "Good.", "rejected": "Bad."},
    ]
    for row in rows:
        if (form, name) == ("texts in turn", "context"):
            # they may be passages to read
            with pytest.raises(ValueError, match="field 'context' holds neither turns"):
                parse_row({**row, name: HISTORIES[form]}, 0)
            continue
        pair, _ = parse_row({**row, name: HISTORIES[form]}, 0)
        assert (pair.prompt, pair.chosen) == (TURNS, "Good.")


@pytest.mark.parametrize("history", [PROMPT_TURNS, [user("And?")]])
def test_a_history_as_json_may_be_the_whole_prompt(history):
    """... as the same history as a list is."""
    replies = {"chosen": "Good.", "rejected": "Bad."}
    prompt = parse_row({"history": history, **replies}, 0)[0].prompt
    assert prompt[-1] == ("user", "And?")
    assert parse_row({"history": json.dumps(history), **replies}, 0)[0].prompt == prompt


def test_dialogues_that_differ_in_whitespace_alone_are_the_same():
    before = "\n\nHuman: Two  words?\n\nAssistant:"
    row = {"chosen": f"{before} Good.", "rejected": f"{before.replace('  ', ' ')} Bad."}
    assert parse_row(row, 0)[0].rejected == "Bad."


@pytest.mark.parametrize("history", [None, [], "", "[]", [[]]])
def test_an_empty_history_is_none(history):
    assert parse_row({**TRL, "history": history}, 0)[0].prompt == (("user", "And?"),)


@pytest.mark.parametrize("history", ["A text.", ["Hi."], [["a", "b", "c"]], [{"q": "x", "a": "y"}]])
def test_a_history_of_another_form_is_named(history):
    with pytest.raises(ValueError, match=r"field 'history' holds neither turns.*ignore=history"):
        parse_row({**TRL, "history": history}, 0)


@pytest.mark.parametrize("name", SYSTEM_FIELDS)
def test_system_text_in_every_field(name):
    for value in ("Be brief.", [SYSTEM_TURN], SYSTEM_TURN):
        pair, _ = parse_row({**TRL, name: value}, 0)
        assert pair.prompt == (("system", "Be brief."), ("user", "And?"))
    repeated = {**TRL, "prompt": [SYSTEM_TURN, user("And?")], name: "Be brief."}
    assert parse_row(repeated, 0)[0].prompt == (("system", "Be brief."), ("user", "And?"))
    other = {**repeated, name: "Be kind."}
    assert parse_row(other, 0)[0].prompt[:2] == (("system", "Be kind."), ("system", "Be brief."))


@pytest.mark.parametrize("name", UNPLACED_FIELDS)
def test_a_part_of_the_dialogue_without_a_place_is_named(name):
    ignore = parse_columns([f"ignore={name}"])
    in_row = {**TRL, name: [{"name": "search"}]}
    in_turn = {**TRL, "prompt": [{**user("And?"), name: "Let me see."}]}
    for row in (in_row, in_turn):
        with pytest.raises(ValueError, match=f"field '{name}'.*no place.*--columns ignore={name}"):
            parse_row(row, 0)
        assert parse_row(row, 0, columns=ignore)[0].prompt == (("user", "And?"),)
    for empty in (None, "", [], "[]", {}):
        assert parse_row({**TRL, name: empty}, 0)[0].chosen == "Good."


@pytest.mark.parametrize("value", [b"bytes", {"bytes": b"x", "path": None}, object(), [object()]])
def test_content_that_is_no_text_is_named(value):
    with pytest.raises(ValueError, match="'image' holds a part of the dialogue"):
        parse_row({**TRL, "image": value}, 0)


def test_columns_that_lose_a_prompt_say_so(tmp_path, capsys, tokenizer):
    """A passage belongs to the prompt; where --columns drops a field, it is listed."""
    row = {"prompt": "And?", "context": "A passage.", "split": "train", **TEXTS}
    with pytest.raises(ValueError, match="--columns instruction=prompt input=context"):
        parse_row(row, 0)
    columns = parse_columns(["instruction=prompt", "input=context"])
    assert parse_row(row, 0, columns=columns)[0].prompt == (("user", "And?\nA passage."),)
    path = write(tmp_path / "a.jsonl", [row])
    prepare_pairs([path], ("train",), tokenizer, 256, 0, columns=["prompt=context"])
    assert "not read: 'prompt'" in capsys.readouterr().out


def test_numbers_beside_a_prompt_are_not_read(tmp_path, capsys, tokenizer):
    row = {**TRL, "conversation": 17, "thinking": True, "split": "train"}
    path = write(tmp_path / "a.jsonl", [row])
    prepare_pairs([path], ("train",), tokenizer, 256, 0)
    assert "not read: 'thinking', 'conversation'" in capsys.readouterr().out
    row = {**TRL, "conversation": [{"input": "And?", "output": "Good."}]}
    assert parse_row(row, 0) == parse_row(TRL, 0)


def test_other_fields_are_listed_once(tokenizer, tmp_path, capsys):
    row = {**TRL, "prompt": [{**user("And?"), "weight": 1}], "split": "train"}
    rows = [{**row, "id": 5, "source": "x"}, {**row, "id": 6, "score": 1.0}]
    path = write(tmp_path / "a.jsonl", rows)
    prepare_pairs([path], ("train",), tokenizer, 256, 0, columns=["ignore=source"])
    printed = capsys.readouterr().out
    assert printed.count("not read: 'source', 'id', 'prompt.weight', 'score'\n") == 1
    write(path, [{**row, "prompt": "And?"}])
    prepare_pairs([path], ("train",), tokenizer, 256, 0)
    assert "not read" not in capsys.readouterr().out


def test_replies_in_other_fields():
    row = {"prompt": "And?", "chosen_response": "Good.", "rejected_response": "Bad."}
    assert parse_row(row, 0) == parse_row(TRL, 0)


def test_columns_are_mapped(tokenizer, tmp_path):
    row = {"ask": "And?", "good": "Good.", "bad": "Bad.", "who": "Be brief.", "split": "odd"}
    row |= {"question": "Not this?", "tools": "[search]"}
    path = write(tmp_path / "a.jsonl", [row])
    names = ["prompt=ask", "chosen=good", "rejected=bad", "system=who"]
    columns = [*names, "ignore=split", "ignore=tools"]
    prepared = prepare_pairs([path], ("all",), tokenizer, 256, 0, columns=columns)
    pair = prepared["all"][0].pair
    assert pair.prompt == (("system", "Be brief."), ("user", "And?"))
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")

    swapped = parse_columns(["chosen=rejected", "rejected=chosen"])
    pair, _ = parse_row(TRL, 0, columns=swapped)
    assert (pair.chosen, pair.rejected) == ("Bad.", "Good.")
    dolly = {"question": "Add.", "context": "1 and 2", "chosen": "3", "rejected": "4"}
    columns = parse_columns(["instruction=question", "input=context"])
    assert parse_row(dolly, 0, columns=columns)[0].prompt == (("user", "Add.\n1 and 2"),)
    columns = parse_columns(["instruction=question", "ignore=input", "ignore=context"])
    dolly |= {"input": "Not."}
    assert parse_row(dolly, 0, columns=columns)[0].prompt == (("user", "Add."),)
    with pytest.raises(UserError, match="line 1: --columns prompt=nothing: the row has no field"):
        load_pairs(path, 0, columns=["prompt=nothing"])


@pytest.mark.parametrize("item", ["prompt", "prompt=", "answer=x", "=x"])
def test_bad_column_settings(item):
    with pytest.raises(UserError, match=f"--columns {item}: expected FIELD=COLUMN"):
        parse_columns([item])
    with pytest.raises(UserError, match="prompt is already a"):
        parse_columns(["prompt=a", "prompt=b"])


# ---------------------------------------------------------------- formats and tags in texts


@pytest.mark.parametrize(
    "prompt, marker",
    [
        ("<s>[INST] And? [/INST]", "[INST]"),
        ("<s> And?", "<s>"),
        ("<|im_start|>user\nAnd?<|im_end|>\n", "<|im_start|>"),
        ("### Instruction:\nAdd.", "### Instruction:"),
    ],
)
def test_a_formatted_prompt_is_named(tokenizer, tmp_path, capsys, prompt, marker):
    row = {**TRL, "split": "train"}
    path = write(tmp_path / "a.jsonl", [{**row, "prompt": prompt}, row])
    prepare_pairs([path], ("train",), tokenizer, 256, 0)
    assert f"a.jsonl: 1 prompts hold {marker!r}" in capsys.readouterr().out
    write(path, [{**row, "prompt": "What does <s>this</s> mean?"}])
    prepare_pairs([path], ("train",), tokenizer, 256, 0)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "reply, expected",
    [
        ("<s>Old</s> new.", "<s>Old</s> new."),
        ("New, not <s>old</s>.", "New, not <s>old</s>."),
        ("</s> closes it.", "</s> closes it."),
        ("It begins with <s>", "It begins with <s>"),
        ("Good.</s> </s>", "Good."),
        ("<s> Good.", "Good."),
        ("Good.<|im_end|>", "Good.<|im_end|>"),
    ],
)
def test_a_replys_own_tags_stay(reply, expected):
    pair, _ = parse_row({**TRL, "chosen": reply}, 0, ("<s>", "</s>"))
    assert pair.chosen == expected


def test_a_tokenizer_without_bos_or_eos():
    row = {**TRL, "chosen": "Good.</s>"}
    assert parse_row(row, 0, (None, "</s>"))[0].chosen == "Good."
    assert parse_row(row, 0, ("<s>", None))[0].chosen == "Good.</s>"
    assert parse_row(row, 0, ("</s>", "</s>"))[0].chosen == "Good."


# ---------------------------------------------------------------- rows that are refused by name


@pytest.mark.parametrize(
    "row, words",
    [
        ({**TRL, "prompt": "\n\nAssistant:"}, "does not end with a user turn"),
        ({**TRL, "prompt": "\n\nAssistant:", "system": "x"}, "does not end with a user turn"),
        (
            {"prompt": "\n\nAssistant:", "chosen": [assistant("x")], "rejected": [assistant("y")]},
            "",
        ),
        ({**TRL, "chosen": "Half \ud83d"}, "'chosen' holds '\\ud83d', one half"),
        ({**TRL, "prompt": "Half \ud83d"}, "the prompt holds '\\ud83d', one half"),
        ({**TRL, "history": [["\udc00", "x"]]}, "the prompt holds '\\udc00', one half"),
        ({**TRL, "system": 5}, "field 'system' holds '5'"),
        ({**TRL, "system": ["x"]}, "field 'system' holds 'x'"),
        ({**TRL, "system": [user("x")]}, "'system' holds turns of other roles"),
        ({"prompt": "", "chosen": "A b.", "rejected": "A c."}, "--columns prompt=FIELD"),
        ({**TRL, "tools": "search"}, "field 'tools'"),
        ({"prompt": "q", "answer\ud800": "x"}, "the row has 'prompt', 'answer\\ud800'"),
    ],
)
def test_rows_that_raised_are_named(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", [TRL, row])
    with pytest.raises(UserError, match="line 2: ") as error:
        load_pairs(path, 0)
    assert words in str(error.value)
    # it can be printed
    str(error.value).encode()


# ---------------------------------------------------------------- splits and long rows


def test_a_dialogue_and_its_continuation_are_in_one_split():
    for i in range(200):
        start = (("user", f"question {i}"),)
        longer = (*start, ("assistant", "Yes."), ("user", "And?"))
        with_system = (("system", "Be brief."), *longer)
        assert split_of(start, 0) == split_of(longer, 0) == split_of(with_system, 0)


def test_files_with_and_without_split_are_refused_together(tokenizer, tmp_path):
    with_split = write(tmp_path / "a.jsonl", [{**TRL, "split": "train"}])
    without = write(tmp_path / "b.jsonl", [TRL])
    message = r"a\.jsonl has a field 'split' and .*b\.jsonl has none.*ignore=split"
    for paths in ([with_split, without], [without, with_split]):
        with pytest.raises(UserError, match=message):
            prepare_pairs(paths, ("train",), tokenizer, 256, 0)
    columns = ["ignore=split"]
    paths = [with_split, without]
    assert len(prepare_pairs(paths, ("all",), tokenizer, 256, 0, columns=columns)["all"]) == 2
    mixed = write(tmp_path / "c.jsonl", [{**TRL, "split": "train"}, TRL])
    with pytest.raises(UserError, match="line 2: this row has no split"):
        load_pairs(mixed, 0)


def test_the_source_digest_tells_other_data_and_other_splits(tokenizer, tmp_path):
    rows = [{**TRL, "prompt": f"Question {i}?"} for i in range(100)]
    path = write(tmp_path / "a.jsonl", rows)

    def digest(splits, seed=0, **options):
        return prepare_pairs([path], splits, tokenizer, 256, seed, **options).source_digest

    first = digest(("train", "valid"))
    assert digest(("test",), limit=3, template="plain") == first
    assert digest(("test",), seed=1) != first
    assert digest(("all",), columns=["chosen=rejected", "rejected=chosen"]) != first
    write(path, rows[:-1])
    assert digest(("all",)) != first


@pytest.mark.parametrize("tokens, times", [(128, 0), (60, 1)])
def test_long_rows_are_tokenized_once_at_most(
    tokenizer, tmp_path, monkeypatch, capsys, tokens, times
):
    """Not at all where no 64 tokens have that many characters."""
    n = tokens * max(map(len, tokenizer.get_vocab()))
    long_text = "¶" * n
    fits = {**TRL, "split": "train"}
    rows = [{**fits, "chosen": long_text}, {**fits, "prompt": long_text}, fits]
    path = write(tmp_path / "a.jsonl", rows)
    tokenized = []
    tokenize = type(tokenizer).__call__

    def count_characters(self, texts, **options):
        tokenized.append(sum(map(len, texts)))
        return tokenize(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", count_characters)
    prepared = prepare_pairs([path], ("train",), tokenizer, 64, 0)
    assert len(prepared["train"]) == 1
    assert "2 of train over 64 tokens" in capsys.readouterr().out
    # the short row takes less than 500
    assert 2 * n * times <= sum(tokenized) < 2 * n * times + 500


# ---------------------------------------------------------------- files


def test_gzip_list_and_byte_order_mark(tmp_path):
    line = json.dumps(TRL)
    (tmp_path / "a.json").write_text(json.dumps([TRL, TRL]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(f"\ufeff{line}\r\n{line}\r\n".encode()))
    assert load_pairs(tmp_path / "a.json", 0) == load_pairs(tmp_path / "b.gz", 0)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(UserError, match=r"c\.gz"):
        load_pairs(tmp_path / "c.gz", 0)


@needs_shared
def test_real_conversations_load_with_the_counts_of_an_independent_count():
    path = SHARED / "data/dpo_en_demo.json"
    rows = json.loads(path.read_text())
    usable = []
    for row in rows:
        chosen = row["chosen"]["value"].strip()
        rejected = row["rejected"]["value"].strip()
        if chosen and rejected and chosen != rejected:
            usable.append(row)
    pairs, skipped, form = load_pairs(path, 0)
    assert form == "conversations"
    assert len(pairs) == len(usable)
    assert sum(skipped.values()) == len(rows) - len(usable)
    with_system = sum(pair.prompt[0][0] == "system" for pair in pairs)
    assert with_system == sum(row["conversations"][0]["from"] == "system" for row in usable) == 80
    lengths = [len(pair.prompt) for pair in pairs]
    assert lengths == [len(row["conversations"]) for row in usable]


@needs_shared
def test_real_pairs_load_with_the_counts_of_an_independent_count():
    path = SHARED / "data/hh_harmless_test.jsonl.gz"
    rows = same_prompt = empty = identical = 0
    with gzip.open(path, "rt") as lines:
        for line in lines:
            row = json.loads(line)
            prompt, chosen = row["chosen"].rsplit("\n\nAssistant:", 1)
            other_prompt, rejected = row["rejected"].rsplit("\n\nAssistant:", 1)
            rows += 1
            if prompt != other_prompt:
                continue
            same_prompt += 1
            if not chosen.strip() or not rejected.strip():
                empty += 1
            elif chosen.strip() == rejected.strip():
                identical += 1
    pairs, skipped, form = load_pairs(path, 0)
    assert form == "transcripts"
    assert len(pairs) == same_prompt - empty - identical
    assert sum(skipped.values()) == rows - len(pairs)
    assert skipped.get("empty", 0) == empty
    assert skipped.get("differing in the prompt", 0) == rows - same_prompt


def test_a_limit_draws_at_random(tokenizer, tmp_path):
    rows = [{**TRL, "prompt": f"Question {i}?", "split": "train"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)

    def questions(limit):
        prepared = prepare_pairs([path], ("train",), tokenizer, 256, 0, limit=limit)
        return [encoded.pair.prompt[0][1] for encoded in prepared["train"]]

    numbers = [int(text.removeprefix("Question ").rstrip("?")) for text in questions(20)]
    assert len(set(numbers)) == 20
    assert max(numbers) > 100
    assert numbers != sorted(numbers)
    assert questions(None) == [f"Question {i}?" for i in range(200)]


def test_several_files_and_counts(tokenizer, tmp_path, capsys):
    hh = {**HH, "split": "train"}
    a = write(tmp_path / "a.jsonl", [{**TRL, "split": "train"}])
    b = write(tmp_path / "b.jsonl", [hh, {**hh, "rejected": HH["chosen"]}])
    assert len(prepare_pairs([a, b], ("train",), tokenizer, 256, 0)["train"]) == 2
    printed = capsys.readouterr().out
    assert "a.jsonl: 1 rows, form: prompt" in printed
    assert "b.jsonl: 2 rows, form: transcripts" in printed
    assert "1 identical" in printed


def test_limit_and_length(tokenizer, tmp_path, capsys):
    rows = [
        {**TRL, "split": "train"},
        {**TRL, "prompt": "why " * 50, "split": "train"},
        {**TRL, "prompt": "x", "split": "valid"},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    prepared = prepare_pairs([path], ("train", "valid"), tokenizer, 60, 0)
    assert len(prepared["train"]) == 1
    assert "1 of train over 60 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-length"):
        prepare_pairs([path], ("train",), tokenizer, 5, 0)


# ---------------------------------------------------------------- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose data set has the files that are in this list; each file's one row names it."""
    files = ["README.md"]

    def download(name, file, repo_type):
        return write(tmp_path / "downloaded.jsonl", [{**TRL, "chosen": file}])

    monkeypatch.setattr(rows_module.HfApi, "list_repo_files", lambda self, name, repo_type: files)
    monkeypatch.setattr(rows_module, "hf_hub_download", download)
    return files


def loaded_from(source):
    """What the rows of a source say in "chosen"."""
    return [pair.chosen for pair in load_pairs(source, 0)[0]]


def test_hub_files_of_a_split(hub):
    hub += ["data/train-0.jsonl", "data/test-0.jsonl"]
    assert loaded_from("hub:someone/pairs:test") == ["data/test-0.jsonl"]
    assert loaded_from("hub:someone/pairs") == ["data/train-0.jsonl"]


def test_hub_folder_of_splits(hub):
    hub += ["latest/train.jsonl", "latest/test.jsonl", "constraint.json", "dataset_infos.json"]
    assert loaded_from("hub:someone/pairs:test") == ["latest/test.jsonl"]
    assert loaded_from("hub:someone/pairs:latest") == ["latest/train.jsonl"]


def test_hub_data_in_other_formats(hub, monkeypatch):
    """They are read by the package datasets; where it is missing, one line says so."""
    hub += ["train.parquet"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_pairs("hub:someone/pairs", 0)

    def load_dataset(name, split):
        return [{**TRL, "chosen": f"{name} {split}"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert loaded_from("hub:someone/pairs:test") == ["someone/pairs test"]


def test_hub_errors_are_one_line(monkeypatch):
    def fail(self, name, repo_type):
        raise RuntimeError("no such repository\nmore")

    monkeypatch.setattr(rows_module.HfApi, "list_repo_files", fail)
    with pytest.raises(UserError, match=r"hub:someone/none: no such repository$"):
        load_pairs("hub:someone/none", 0)


# ---------------------------------------------------------------- chat templates


@pytest.fixture
def chat_tokenizer(tokenizer):
    """A tokenizer with the special tokens of chat templates."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return copied


def encode_chat(tokenizer, *prompt):
    """The EncodedPair of a prompt by the tokenizer's chat template."""
    [encoded] = encode_pairs(tokenizer, [Pair(prompt, "Good.", "Bad.", "train")], template="chat")
    return encoded


def decode_prompts(tokenizer, encoded):
    """The texts of the plain, positive and negative prompt."""
    return [tokenizer.decode(encoded.prompts[name]) for name in ("plain", "positive", "negative")]


def test_turns_of_one_role_are_joined_for_strict_templates(chat_tokenizer):
    """What a template refuses all the same is one clear line."""
    chat_tokenizer.chat_template = STRICT
    turns = (("user", "Hi."), ("assistant", "A."), ("assistant", "B."), ("user", "And?"))
    plain, positive, _ = decode_prompts(chat_tokenizer, encode_chat(chat_tokenizer, *turns))
    assert "<|im_start|>assistant\nA.\n\nB.<|im_end|>" in plain
    assert positive == plain.replace("Hi.", f"{POSITIVE}\n\nHi.", 1)
    message = "refuses a dialogue of assistant, user: Roles must alternate"
    with pytest.raises(UserError, match=message):
        render_chat(chat_tokenizer, (("assistant", "A."), ("user", "And?")))


def test_a_reply_ends_with_the_first_special_token_after_it(chat_tokenizer):
    """Generation stops at that token."""
    chat_tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>\n<|end|>")
    encoded = encode_chat(chat_tokenizer, ("user", "And?"))
    assert chat_tokenizer.decode(encoded.responses["chosen"]) == "Good.<|im_end|>"
    assert chat_tokenizer.decode([encoded.end_token]) == "<|im_end|>"


@pytest.mark.parametrize(
    "expression, day",
    [
        ("strftime_now('%d %b %Y')", "26 Jul 2024"),
        ("strftime_now(format='%Y-%m-%d')", "2024-07-26"),
        ("strftime_now('%Y')|int - 1", "2023"),
    ],
)
def test_a_template_that_writes_todays_date_writes_the_same_tomorrow(
    chat_tokenizer, expression, day
):
    """Else a run past midnight would have other pairs, and a later stage other prompts."""
    date = "{% if strftime_now is defined %}{{ " + expression + " }}{% endif %}"
    chat_tokenizer.chat_template = f"\n  {date}\n{CHATML}"
    assert render_chat(chat_tokenizer, (("user", "Hi"),)).text.startswith(f"\n{day}")


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, SILENT])
@pytest.mark.parametrize("system_turns", [(), (("system", "Be brief."),)])
def test_chat_template(chat_tokenizer, template, system_turns):
    """p+ and p- are the system turn, or open the user turn where the template has no system turn.

    r is the same in all inputs and ends as the template ends it.
    """
    chat_tokenizer.chat_template = template
    encoded = encode_chat(chat_tokenizer, *system_turns, ("user", "And?"))
    plain, positive, negative = decode_prompts(chat_tokenizer, encoded)
    ending = "And?<|im_end|>\n<|im_start|>assistant\n"
    assert plain.endswith(ending)
    assert ("Be brief." in plain) == bool(system_turns)
    instruction = "\n\n".join([POSITIVE, *(text for _, text in system_turns)])
    if template == CHATML:
        start = f"<|im_start|>system\n{instruction}<|im_end|>\n<|im_start|>user\n"
    else:
        start = f"<|im_start|>user\n{instruction}\n\n"
    assert positive == start + ending
    assert positive.replace(POSITIVE, NEGATIVE) == negative
    assert chat_tokenizer.decode(encoded.responses["chosen"]) == "Good.<|im_end|>"


def test_choosing_a_template(tokenizer, monkeypatch):
    assert choose_template("auto", tokenizer) == "plain"
    assert choose_template("plain", tokenizer) == "plain"
    with pytest.raises(UserError, match="no chat template"):
        choose_template("chat", tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", CHATML, raising=False)
    assert choose_template("auto", tokenizer) == "chat"
    assert choose_template("chat", tokenizer) == "chat"
    assert choose_template("plain", tokenizer) == "plain"


# ---------------------------------------------------------------- splits and tokens


def test_split_is_seeded_and_ignores_order():
    prompts = [(("user", f"question {i}"),) for i in range(2000)]
    splits = [split_of(prompt, 0) for prompt in prompts]
    assert 60 < splits.count("valid") < 140
    assert 150 < splits.count("test") < 250
    assert splits == [split_of(prompt, 0) for prompt in reversed(prompts)][::-1]
    assert splits != [split_of(prompt, 1) for prompt in prompts]


def encode_one(tokenizer, chosen="Gladly! You need a saw.", rejected="So what?"):
    prompt = (("user", "How do I cut a plank?"),)
    [encoded] = encode_pairs(tokenizer, [Pair(prompt, chosen, rejected, "train")])
    return encoded


def test_inputs_differ_in_the_instruction_only(tokenizer):
    encoded = encode_one(tokenizer)
    plain = encoded.prompts["plain"].tolist()
    for name, instruction in (("positive", POSITIVE), ("negative", NEGATIVE)):
        prompt = encoded.prompts[name].tolist()
        extra = len(prompt) - len(plain)
        # all but the instruction is the same, token by token
        assert prompt[extra:] == plain
        assert tokenizer.decode(prompt[:extra]) == instruction
    for response in ("chosen", "rejected"):
        examples = [encoded.input(name, response) for name in encoded.prompts]
        endings = {tuple(ids[start:]) for ids, start in examples}
        # the response's tokens line up
        assert endings == {tuple(encoded.responses[response].tolist())}


def test_lengths_are_those_of_the_examples(tokenizer):
    encoded = encode_one(tokenizer)
    lengths = []
    for prompt, response in itertools.product(encoded.prompts, encoded.responses):
        ids, _ = encoded.input(prompt, response)
        assert encoded.length(prompt, response) == len(ids)
        lengths.append(len(ids))
    assert encoded.max_length() == max(lengths)


def test_plain_prompt_is_what_a_server_would_tokenize(tokenizer):
    encoded = encode_one(tokenizer)
    text = render_transcript(encoded.pair.prompt)
    assert encoded.prompts["plain"].tolist() == tokenizer(text)["input_ids"]
    ids, _ = encoded.input("plain", "chosen")
    assert ids[:-1] == tokenizer(text + " " + encoded.pair.chosen)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id


def test_response_that_the_tokenizer_would_merge_with_the_prompt():
    """A tokenizer that merges "Assistant:" with what follows must keep the prompt whole."""
    text = "\n\nHuman: How do I cut a plank?\n\nAssistant: Yes. No."
    characters = sorted(set(POSITIVE + NEGATIVE + text))
    vocab = {token: i for i, token in enumerate(["<s>", *characters, ": "])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " ")]))
    bpe.decoder = decoders.Fuse()
    bpe.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    merging = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<s>", bos_token="<s>")
    encoded = encode_one(merging, "Yes.", "No.")
    prompt = encoded.prompts["plain"]
    response = encoded.responses["chosen"]
    assert prompt[0] == merging.bos_token_id
    assert merging.decode(prompt[-1:]) == ":"
    assert merging.decode(response[:-1]) == " Yes."
    assert response.tolist().count(merging.eos_token_id) == 1


@needs_shared
def test_real_tokenizer_round_trip():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    encoded = encode_one(tokenizer)
    text = render_transcript(encoded.pair.prompt)
    ids, _ = encoded.input("plain", "chosen")
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.strip() == f"{text} {encoded.pair.chosen}".strip()
    assert encoded.prompts["plain"].tolist() == tokenizer(text)["input_ids"]


# ---------------------------------------------------------------- batches


def test_collate_marks_real_and_response_tokens():
    batch = collate([([5, 6, 7], 1), ([8, 9, 10, 11], 3)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.attention.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.response.tolist() == [[False, True, True, False], [False, False, False, True]]


def test_batches_cover_all_and_group_by_length():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 500, (1000,), generator=generator).tolist()
    # an epoch of 1000 examples has 63 batches: 62 of 16 examples and one of 8
    first = list(itertools.islice(shuffled_batches(lengths, 16, 0), 63))
    second = list(itertools.islice(shuffled_batches(lengths, 16, 0, skip=63), 63))
    assert sorted(itertools.chain(*first)) == list(range(1000))
    assert sorted(itertools.chain(*second)) == list(range(1000))
    assert first != second
    padded = 0
    for batch in first:
        padded += len(batch) * max(lengths[i] for i in batch)
    # less than a tenth of padding; unsorted it is about 90%
    assert padded < 1.10 * sum(lengths)
    assert first != list(itertools.islice(shuffled_batches(lengths, 16, 1), 63))
