"""Rows, splits, tokens, masks and batches."""
import copy
import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

import data
from conftest import SHARED
from files import UserError
from pairs import Pair, load_pairs, parse_row, split_of

HH = {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Bad."}
TRL = {"prompt": "And?", "chosen": "Good.", "rejected": "Bad."}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hh_transcript_is_split_into_turns():
    pair, reason = parse_row(HH, 0)
    assert reason is None
    assert pair.prompt == (("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")
    assert data.render(pair.prompt) + " " + pair.chosen == HH["chosen"]


def test_prompt_chosen_rejected_row():
    pair, _ = parse_row(TRL, 0)
    assert pair.prompt == (("user", "And?"),) and pair.chosen == "Good."
    whole, _ = parse_row({**TRL, "prompt": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"}, 0)
    assert whole.prompt == parse_row(HH, 0)[0].prompt


def test_a_transcript_that_ends_before_the_reply_is_counted(tmp_path):
    start = "\n\nHuman: Hi.\n\nAssistant: Hello."
    rows = [{**HH, "rejected": f"{start}\n\nHuman: And?"}, {**HH, "rejected": f"{start}\n\nHuman:"}, {"chosen": f"{start}\n\nHuman:", "rejected": f"{start}\n\nHuman:"}, HH]
    pairs, skipped, form = load_pairs(write(tmp_path / "rows.jsonl", rows), 0)
    assert form == "transcripts" and len(pairs) == 1 and skipped == {"empty": 2, "differing in the prompt": 1}


U, A = (lambda text: {"role": "user", "content": text}), (lambda text: {"role": "assistant", "content": text})
ASKED = (("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))
FORMS = {                                     # the same pair in every form
    "transcripts": HH,
    "prompt as a transcript": {"prompt": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:", "chosen": " Good.", "rejected": " Bad."},
    "prompt as turns, replies as text": {"prompt": [U("Hi."), A("Hello."), U("And?")], "chosen": "Good.", "rejected": "Bad."},
    "all as turns": {"prompt": [U("Hi."), A("Hello."), U("And?")], "chosen": [A("Good.")], "rejected": [A("Bad.")]},
    "turns without prompt": {"chosen": [U("Hi."), A("Hello."), U("And?"), A("Good.")], "rejected": [U("Hi."), A("Hello."), U("And?"), A("Bad.")]},
    "prompt repeated as turns": {"prompt": [U("Hi."), A("Hello."), U("And?")], "chosen": [U("Hi."), A("Hello."), U("And?"), A("Good.")],
                                 "rejected": [U("Hi."), A("Hello."), U("And?"), A("Bad.")]},
    "prompt as text, replies as whole dialogues": {"prompt": "And?", "chosen": [U("Hi."), A("Hello."), U("And?"), A("Good.")], "rejected": [U("Hi."), A("Hello."), U("And?"), A("Bad.")]},
    "conversations": {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": "And?"}],
                      "chosen": {"from": "gpt", "value": "Good."}, "rejected": {"from": "gpt", "value": "Bad."}},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pair(form):
    pair, reason = parse_row(FORMS[form], 0)
    assert reason is None and (pair.prompt, pair.chosen, pair.rejected) == (ASKED, "Good.", "Bad.")


def test_instruction_rows_and_text_without_prompt():
    pair, _ = parse_row({"instruction": "Add.", "input": "1 and 2", "chosen": "3", "rejected": "4"}, 0)
    assert (pair.prompt, pair.chosen) == ((("user", "Add.\n1 and 2"),), "3")
    assert parse_row({"instruction": "Add.", "input": None, "chosen": "3", "rejected": "4"}, 0)[0].prompt == (("user", "Add."),)
    pair, _ = parse_row({"chosen": "The sky is blue.", "rejected": "The sky is black."}, 0)           # "bl" is not of the prompt
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "The sky is"),), "blue.", "black.")
    assert parse_row({"chosen": "a", "rejected": "b"}, 0) == (None, "differing in the prompt")


def test_system_turn_is_kept():
    pair, _ = parse_row({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "And?"}],
                              "chosen": {"from": "gpt", "value": "Good."}, "rejected": {"from": "gpt", "value": "Bad."}}, 0)
    assert pair.prompt == (("system", "Be brief."), ("user", "And?"))
    assert data.render(pair.prompt) == "\n\nBe brief.\n\nHuman: And?\n\nAssistant:"


@pytest.mark.parametrize("row", [
    {**TRL, "chosen": "Good.</s></s>", "rejected": "Bad.</s>"}, {**TRL, "chosen": "<s> Good.", "rejected": "<s>Bad.</s>"},
    {**TRL, "prompt": "And?\r\n", "chosen": "Good.\r\n", "rejected": "\r\nBad."}])
def test_traps_leave_the_pair_as_it_is(row):
    pair, _ = parse_row(row, 0, ("<s>", "</s>"))
    assert (pair.prompt, pair.chosen, pair.rejected) == ((("user", "And?"),), "Good.", "Bad.")


def test_prompt_repeated_inside_replies_is_taken_off_and_a_likeness_is_not():
    pair, _ = parse_row({"prompt": "What is\nit?", "chosen": "What is it? Good.", "rejected": "What is it?\n\nBad."}, 0)
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")
    for prompt, chosen, rejected in [("Hi", "Hi there.", "Hi you."), ("Say hello.", "Say hello. Good.", "No."), ("Say hello", "Say hello, ok", "Say helloo")]:
        pair, _ = parse_row({"prompt": prompt, "chosen": chosen, "rejected": rejected}, 0)
        assert (pair.chosen, pair.rejected) == (chosen, rejected)


def test_transcripts_inside_ordinary_text_stay_text():
    log = "Here it is:\n\nHuman: Hi\n\nAssistant: Hello!"
    pair, _ = parse_row({"prompt": f"Read this.\n\nHuman: A\n\nAssistant: B", "chosen": log, "rejected": "No."}, 0)
    assert pair.prompt == (("user", "Read this.\n\nHuman: A\n\nAssistant: B"),) and pair.chosen == log


@pytest.mark.parametrize("field", ["question", "input"])
def test_system_question_and_history_columns(field):
    pair, _ = parse_row({"system": "Be brief.", field: "What colour is the sky?", "chosen": "The sky is blue.", "rejected": "The sky is black."}, 0)
    assert pair.prompt == (("system", "Be brief."), ("user", "What colour is the sky?")) and pair.chosen == "The sky is blue."
    pair, _ = parse_row({"instruction": "And?", "input": "", "history": [["Hi.", "Hello."]], "chosen": "Good.", "rejected": "Bad."}, 0)
    assert pair.prompt == ASKED
    opened = {"conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "And?"}], "chosen": {"from": "gpt", "value": "Good."}, "rejected": {"from": "gpt", "value": "Bad."}}
    assert parse_row(opened, 0) == (None, "beginning with the assistant")


def test_what_is_only_a_special_token_is_empty():
    assert parse_row({**TRL, "chosen": "</s>"}, 0, ("<s>", "</s>")) == (None, "empty")


def test_windows_line_ends_inside_a_reply_and_other_scripts(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({"prompt": "素数とは何ですか。", "chosen": "Привет,\r\nмир 🌍", "rejected": "שלום"}, ensure_ascii=False).encode() + b"\r\n")
    pairs, _, _ = load_pairs(path, 0)
    assert (pairs[0].prompt[0][1], pairs[0].chosen, pairs[0].rejected) == ("素数とは何ですか。", "Привет,\nмир 🌍", "שלום")
    pair = data.encode(tokenizer, pairs[:1])[0]
    assert tokenizer.decode(pair.responses["chosen"][:-1]) == " Привет,\nмир 🌍"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real pairs are not at hand")
def test_real_conversations_load_with_the_counts_of_an_independent_count():
    rows = json.loads((SHARED / "data/dpo_en_demo.json").read_text())
    usable = [row for row in rows if row["chosen"]["value"].strip() and row["rejected"]["value"].strip() and row["chosen"]["value"].strip() != row["rejected"]["value"].strip()]
    pairs, skipped, form = load_pairs(SHARED / "data/dpo_en_demo.json", 0)
    assert form == "conversations" and len(pairs) == len(usable) and sum(skipped.values()) == len(rows) - len(usable)
    assert sum(pair.prompt[0][0] == "system" for pair in pairs) == sum(row["conversations"][0]["from"] == "system" for row in usable) == 80
    assert [len(pair.prompt) for pair in pairs] == [len(row["conversations"]) for row in usable]


@pytest.mark.parametrize("history", [5, [[1, 2]], ["Hi."], [["Hi.", None]]])
def test_a_malformed_history_names_its_line(tmp_path, history):
    row = {"instruction": "And?", "input": "", "history": history, "chosen": "Good.", "rejected": "Bad."}
    with pytest.raises(UserError, match="line 1: field 'history'"):
        load_pairs(write(tmp_path / "a.jsonl", [row]), 0)


def test_a_limit_draws_at_random(tokenizer, tmp_path):
    rows = [{"prompt": f"Question {i}?", "chosen": "Good.", "rejected": "Bad.", "split": "train"} for i in range(200)]
    path = write(tmp_path / "a.jsonl", rows)
    drawn = [pair.pair.prompt[0][1] for pair in data.prepare([path], ("train",), tokenizer, 256, 0, limit=20)["train"]]
    numbers = [int(text[9:-1]) for text in drawn]
    assert len(set(numbers)) == 20 and max(numbers) > 100 and numbers != sorted(numbers)
    whole = [pair.pair.prompt[0][1] for pair in data.prepare([path], ("train",), tokenizer, 256, 0)["train"]]
    assert whole == [f"Question {i}?" for i in range(200)]


def test_several_files_and_counts(tokenizer, tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", [{**TRL, "split": "train"}]), write(tmp_path / "b.jsonl", [{**HH, "split": "train"}, {**HH, "split": "train", "rejected": HH["chosen"]}])
    assert len(data.prepare([a, b], ("train",), tokenizer, 256, 0)["train"]) == 2
    said = capsys.readouterr().out
    assert "a.jsonl: 1 rows, form: prompt" in said and "b.jsonl: 2 rows, form: transcripts" in said and "1 identical" in said


def test_hub_data(tmp_path, monkeypatch):
    """JSON files of the split by huggingface_hub; other formats by datasets, or one line that says so."""
    import sys
    import types
    import pairs
    listed = ["README.md", "data/train-0.jsonl", "data/test-0.jsonl"]
    monkeypatch.setattr(pairs.HfApi, "list_repo_files", lambda self, name, repo_type: listed)
    monkeypatch.setattr(pairs, "hf_hub_download", lambda name, file, repo_type: write(tmp_path / "x.jsonl", [{**TRL, "chosen": file}]))
    assert load_pairs("hub:someone/pairs:test", 0)[0][0].chosen == "data/test-0.jsonl"
    assert load_pairs("hub:someone/pairs", 0)[0][0].chosen == "data/train-0.jsonl"
    listed[1:] = ["latest/train.jsonl", "latest/test.jsonl", "constraint.json", "dataset_infos.json"]
    assert load_pairs("hub:someone/pairs:test", 0)[0][0].chosen == "latest/test.jsonl" and len(load_pairs("hub:someone/pairs:latest", 0)[0]) == 1
    listed[1:] = ["train.parquet"]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install datasets"):
        load_pairs("hub:someone/pairs", 0)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda name, split: [{**TRL, "chosen": f"{name} {split}"}]))
    assert load_pairs("hub:someone/pairs:test", 0)[0][0].chosen == "someone/pairs test"
    monkeypatch.setattr(pairs.HfApi, "list_repo_files", lambda self, name, repo_type: (_ for _ in ()).throw(Exception("no such repository\nmore")))
    with pytest.raises(UserError, match="hub:someone/none: no such repository$"):
        load_pairs("hub:someone/none", 0)


CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
SILENT = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


STRICT = ("{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + CHATML)


@pytest.fixture
def chatty(tokenizer):
    """A tokenizer with the special tokens of chat templates."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return copied


def test_templates_that_insist_on_turns(chatty):
    """Two turns in a row of one role are joined; what a template refuses all the same is one clear line."""
    chatty.chat_template = STRICT
    pair = data.encode(chatty, [Pair((("user", "Hi."), ("assistant", "A."), ("assistant", "B."), ("user", "And?")), "Good.", "Bad.", "train")], template="chat")[0]
    plain, up = (chatty.decode(pair.prompts[name]) for name in ("plain", "positive"))
    assert "<|im_start|>assistant\nA.\n\nB.<|im_end|>" in plain and up == plain.replace("Hi.", f"{data.POSITIVE}\n\nHi.", 1)
    with pytest.raises(UserError, match="refuses a dialogue of assistant, user: Roles must alternate"):
        data.chat(chatty, (("assistant", "A."), ("user", "And?")))


def test_templates_that_think_or_end_otherwise(chatty):
    """An open think block is closed in the prompt; a reply ends with the first special token after it, and generation stops there."""
    chatty.chat_template = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}").replace("<|im_end|>\n", "<|im_end|>\n<|end|>")
    pair = data.encode(chatty, [Pair((("user", "And?"),), "Good.", "Bad.", "train")], template="chat")[0]
    assert chatty.decode(pair.prompts["plain"]).endswith("assistant\n<think>\n\n</think>\n\n") and chatty.decode(pair.responses["chosen"]) == "Good.<|end|>"
    chatty.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>\n<|end|>")
    pair = data.encode(chatty, [Pair((("user", "And?"),), "Good.", "Bad.", "train")], template="chat")[0]
    assert chatty.decode(pair.responses["chosen"]) == "Good.<|im_end|>" and chatty.decode([pair.end]) == "<|im_end|>"


def test_a_template_that_writes_todays_date_writes_the_same_tomorrow(chatty):
    """Else a run over midnight would be of other pairs, and a later stage of other prompts."""
    for written, day in (("strftime_now('%d %b %Y')", "26 Jul 2024"), ("strftime_now(format='%Y-%m-%d')", "2024-07-26"), ("strftime_now('%Y')|int - 1", "2023")):
        chatty.chat_template = "\n  {% if strftime_now is defined %}{{ " + written + " }}{% endif %}\n" + CHATML
        assert data.chat(chatty, (("user", "Hi"),)).startswith(f"\n{day}")


@pytest.mark.parametrize("template", [CHATML, NO_SYSTEM, SILENT])
def test_chat_template(chatty, monkeypatch, template):
    """p+ and p- are the system turn, or open the user's where the template has none; r is the same in all and ends as the template ends it."""
    tokenizer, chatty.chat_template = chatty, template
    for system in ((), (("system", "Be brief."),)):
        pair = data.encode(tokenizer, [Pair((*system, ("user", "And?")), "Good.", "Bad.", "train")], template="chat")[0]
        plain, up, down = (tokenizer.decode(pair.prompts[name]) for name in ("plain", "positive", "negative"))
        assert up.replace(data.POSITIVE, data.NEGATIVE) == down and data.POSITIVE in up and plain.endswith("And?<|im_end|>\n<|im_start|>assistant\n")
        before = "\n\n".join([data.POSITIVE, *(text for _, text in system)])
        assert up == (f"<|im_start|>system\n{before}<|im_end|>\n<|im_start|>user\nAnd?" if template == CHATML else
                      f"<|im_start|>user\n{before}\n\nAnd?") + "<|im_end|>\n<|im_start|>assistant\n"
        assert ("Be brief." in plain) == bool(system)
        assert tokenizer.decode(pair.responses["chosen"]) == "Good.<|im_end|>"


def test_picking_a_template(tokenizer, monkeypatch):
    assert data.pick_template("auto", tokenizer) == data.pick_template("plain", tokenizer) == "plain"
    with pytest.raises(UserError, match="no chat template"):
        data.pick_template("chat", tokenizer)
    monkeypatch.setattr(tokenizer, "chat_template", CHATML, raising=False)
    assert data.pick_template("auto", tokenizer) == "chat" and data.pick_template("plain", tokenizer) == "plain"


def test_useless_rows_are_skipped_and_counted(tmp_path):
    rows = [HH, {**TRL, "chosen": "  "}, {**TRL, "rejected": "Good."}, {**HH, "rejected": HH["rejected"].replace("Hi.", "Ho.")}]
    rows[1:3] = [{**HH, "rejected": HH["rejected"].replace("Bad.", "  ")}, {**HH, "rejected": HH["chosen"]}]
    pairs, skipped, form = load_pairs(write(tmp_path / "rows.jsonl", rows), 0)
    assert form == "transcripts"
    assert len(pairs) == 1 and skipped == {"empty": 1, "identical": 1, "differing in the prompt": 1}


@pytest.mark.parametrize("row, words", [
    ({"chosen": "a"}, "'rejected' is missing"), ({**TRL, "chosen": 1}, "field 'chosen' holds '1'"), ([1], "not an object"), ({**TRL, "split": "dev"}, "'dev'"),
    ({**TRL, "prompt": ["x"]}, "field 'prompt' holds"), ({**TRL, "chosen": [{"role": "assistant", "content": "x"}]}, "different kinds"), (HH, "'transcripts', that of the rows before 'prompt'"),
    ({**TRL, "prompt": " "}, "does not end with a user's turn"), ({**TRL, "prompt": [{"role": "tool", "content": "x"}]}, "no turn of role"),
    ({**TRL, "prompt": [{"role": ["user"], "content": "x"}]}, "no turn of role"),
    ({"prompt": "q", "chosen": [{"role": "user", "content": "x"}], "rejected": [{"role": "user", "content": "y"}]}, "does not end with the assistant's reply")])
def test_bad_rows_are_named_by_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", [TRL, row])
    with pytest.raises(UserError, match="line 2") as error:
        load_pairs(path, 0)
    assert words in str(error.value) and str(path) in str(error.value)


def test_gzip_list_and_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([TRL, TRL]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(("\ufeff" + json.dumps(TRL) + "\r\n" + json.dumps(TRL) + "\r\n").encode()))
    assert load_pairs(tmp_path / "a.json", 0) == load_pairs(tmp_path / "b.gz", 0)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(UserError, match="c.gz"):
        load_pairs(tmp_path / "c.gz", 0)


def test_split_is_seeded_and_ignores_order():
    prompts = [(("user", f"question {i}"),) for i in range(2000)]
    splits = [split_of(p, 0) for p in prompts]
    assert 60 < splits.count("valid") < 140 and 150 < splits.count("test") < 250
    assert splits == [split_of(p, 0) for p in reversed(prompts)][::-1]
    assert splits != [split_of(p, 1) for p in prompts]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real pairs are not at hand")
def test_real_pairs_load_with_the_counts_of_an_independent_count():
    path, same, empty, identical, n = SHARED / "data/hh_harmless_test.jsonl.gz", 0, 0, 0, 0
    for line in gzip.open(path, "rt"):
        (p, c), (q, r) = (json.loads(line)[k].rsplit("\n\nAssistant:", 1) for k in ("chosen", "rejected"))
        n, same = n + 1, same + (p == q)
        empty, identical = empty + (p == q and not (c.strip() and r.strip())), identical + (p == q and c.strip() == r.strip() != "")
    pairs, skipped, form = load_pairs(path, 0)
    assert form == "transcripts" and len(pairs) == same - empty - identical and sum(skipped.values()) == n - len(pairs)
    assert skipped.get("empty", 0) == empty and skipped.get("differing in the prompt", 0) == n - same


def encoded(tokenizer, chosen="Gladly! You need a saw.", rejected="So what?"):
    return data.encode(tokenizer, [Pair((("user", "How do I cut a plank?"),), chosen, rejected, "train")])[0]


def test_inputs_differ_in_the_instruction_only(tokenizer):
    pair = encoded(tokenizer)
    plain, positive, negative = (pair.prompts[name].tolist() for name in ("plain", "positive", "negative"))
    p, n = len(positive) - len(plain), len(negative) - len(plain)
    assert positive[p:] == negative[n:] == plain                 # all but the instruction is the same, token by token
    assert tokenizer.decode(positive[:p]) == data.POSITIVE and tokenizer.decode(negative[:n]) == data.NEGATIVE
    for response in ("chosen", "rejected"):
        ends = [pair.example(name, response) for name in pair.prompts]
        assert len({tuple(ids[start:]) for ids, start in ends}) == 1      # the response's tokens line up


def test_plain_prompt_is_what_a_server_would_tokenize(tokenizer):
    pair = encoded(tokenizer)
    assert pair.prompts["plain"].tolist() == tokenizer(data.render(pair.pair.prompt))["input_ids"]
    assert pair.example("plain", "chosen")[0][:-1] == tokenizer(data.render(pair.pair.prompt) + " " + pair.pair.chosen)["input_ids"]
    assert pair.responses["chosen"][-1] == tokenizer.eos_token_id


def test_response_that_the_tokenizer_would_merge_with_the_prompt():
    """A tokenizer that makes one token of "Assistant:" and what follows it must not eat the prompt's end."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast
    chars = sorted(set(data.POSITIVE + data.NEGATIVE + "\n\nHuman: How do I cut a plank?\n\nAssistant: Yes. No."))
    vocab = {c: i for i, c in enumerate(["<s>", *chars, ": "])}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[(":", " ")]))
    bpe.decoder = decoders.Fuse()
    merging = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<s>", bos_token="<s>")
    pair = encoded(merging, "Yes.", "No.")
    assert merging.decode(pair.prompts["plain"][-1:]) == ":"
    assert merging.decode(pair.responses["chosen"][:-1]) == " Yes."
    assert pair.prompts["plain"][0] == merging.bos_token_id and pair.responses["chosen"].tolist().count(merging.eos_token_id) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model is not at hand")
def test_real_tokenizer_round_trip():
    real = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    pair = encoded(real)
    text = real.decode(pair.example("plain", "chosen")[0], skip_special_tokens=True)
    assert text.strip() == (data.render(pair.pair.prompt) + " " + pair.pair.chosen).strip()
    assert pair.prompts["plain"].tolist() == real(data.render(pair.pair.prompt))["input_ids"]


def test_collate_marks_real_and_response_tokens():
    batch = data.collate([([5, 6, 7], 1), ([8, 9, 10, 11], 3)], pad_id=0)
    assert batch.ids.tolist() == [[5, 6, 7, 0], [8, 9, 10, 11]]
    assert batch.attention.tolist() == [[True, True, True, False], [True] * 4]
    assert batch.response.tolist() == [[False, True, True, False], [False, False, False, True]]


def test_batches_cover_all_and_group_by_length():
    lengths = torch.randint(1, 500, (1000,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = data.batches(lengths, 16, torch.Generator().manual_seed(0))
    assert sorted(i for group in groups for i in group) == list(range(1000))
    padded = sum(max(lengths[i] for i in group) * len(group) for group in groups)
    assert padded < 1.10 * sum(lengths)                          # less than a tenth of padding; unsorted it is about 90%
    assert groups != data.batches(lengths, 16, torch.Generator().manual_seed(1))


def test_limit_and_length(tokenizer, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [{**TRL, "split": "train"}, {**TRL, "prompt": "why " * 50, "split": "train"}, {**TRL, "prompt": "x", "split": "valid"}])
    found = data.prepare([path], ("train", "valid"), tokenizer, 60, 0)
    assert len(found["train"]) == 1 and "1 of train over 60 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-length"):
        data.prepare([path], ("train",), tokenizer, 5, 0)
