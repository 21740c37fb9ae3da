"""Rows, splits, tokens, masks and batches."""
import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

import data
from conftest import SHARED
from files import UserError

HH = {"chosen": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good.", "rejected": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Bad."}
TRL = {"prompt": "And?", "chosen": "Good.", "rejected": "Bad."}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_hh_transcript_is_split_into_turns():
    pair, reason = data.parse_row(HH, 0)
    assert reason is None
    assert pair.prompt == (("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))
    assert (pair.chosen, pair.rejected) == ("Good.", "Bad.")
    assert data.render(pair.prompt) + " " + pair.chosen == HH["chosen"]


def test_prompt_chosen_rejected_row():
    pair, _ = data.parse_row(TRL, 0)
    assert pair.prompt == (("user", "And?"),) and pair.chosen == "Good."
    whole, _ = data.parse_row({**TRL, "prompt": "\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"}, 0)
    assert whole.prompt == data.parse_row(HH, 0)[0].prompt


def test_useless_rows_are_skipped_and_counted(tmp_path):
    rows = [HH, {**TRL, "chosen": "  "}, {**TRL, "rejected": "Good."}, {**HH, "rejected": HH["rejected"].replace("Hi.", "Ho.")}]
    pairs, skipped = data.load_pairs(write(tmp_path / "rows.jsonl", rows), 0)
    assert len(pairs) == 1 and skipped == {"empty": 1, "identical": 1, "differing in the prompt": 1}


@pytest.mark.parametrize("row, words", [
    ({"chosen": "a"}, "'rejected' is missing"), ({"chosen": 1, "rejected": "b"}, "'chosen' is not a string"), ([1], "not an object"),
    ({"chosen": "a", "rejected": "b"}, "no transcript"), ({**TRL, "split": "dev"}, "'dev'"), ({**TRL, "prompt": ["x"]}, "'prompt' is not a string")])
def test_bad_rows_are_named_by_line(tmp_path, row, words):
    path = write(tmp_path / "rows.jsonl", [HH, row])
    with pytest.raises(UserError, match="line 2") as error:
        data.load_pairs(path, 0)
    assert words in str(error.value) and str(path) in str(error.value)


def test_gzip_list_and_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([TRL, HH]))
    (tmp_path / "b.gz").write_bytes(gzip.compress(("\ufeff" + json.dumps(TRL) + "\r\n" + json.dumps(HH) + "\r\n").encode()))
    assert data.load_pairs(tmp_path / "a.json", 0) == data.load_pairs(tmp_path / "b.gz", 0)
    (tmp_path / "c.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    with pytest.raises(UserError, match="c.gz"):
        data.load_pairs(tmp_path / "c.gz", 0)


def test_split_is_seeded_and_ignores_order():
    prompts = [(("user", f"question {i}"),) for i in range(2000)]
    splits = [data.split_of(p, 0) for p in prompts]
    assert 60 < splits.count("valid") < 140 and 150 < splits.count("test") < 250
    assert splits == [data.split_of(p, 0) for p in reversed(prompts)][::-1]
    assert splits != [data.split_of(p, 1) for p in prompts]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real pairs are not at hand")
def test_real_pairs_load_with_the_counts_of_an_independent_count():
    path, same, empty, identical, n = SHARED / "data/hh_harmless_test.jsonl.gz", 0, 0, 0, 0
    for line in gzip.open(path, "rt"):
        (p, c), (q, r) = (json.loads(line)[k].rsplit("\n\nAssistant:", 1) for k in ("chosen", "rejected"))
        n, same = n + 1, same + (p == q)
        empty, identical = empty + (p == q and not (c.strip() and r.strip())), identical + (p == q and c.strip() == r.strip() != "")
    pairs, skipped = data.load_pairs(path, 0)
    assert len(pairs) == same - empty - identical and sum(skipped.values()) == n - len(pairs)
    assert skipped.get("empty", 0) == empty and skipped.get("differing in the prompt", 0) == n - same


def encoded(tokenizer, chosen="Gladly! You need a saw.", rejected="So what?"):
    return data.encode(tokenizer, data.Pair((("user", "How do I cut a plank?"),), chosen, rejected, "train"))


def test_inputs_differ_in_the_instruction_only(tokenizer):
    pair = encoded(tokenizer)
    plain, positive, negative = (pair.prompts[name] for name in ("plain", "positive", "negative"))
    p, n = len(positive) - len(plain), len(negative) - len(plain)
    assert positive[p:] == negative[n:] == plain                 # all but the instruction is the same, token by token
    assert tokenizer.decode(positive[:p]) == data.POSITIVE and tokenizer.decode(negative[:n]) == data.NEGATIVE
    for response in ("chosen", "rejected"):
        ends = [pair.example(name, response) for name in pair.prompts]
        assert len({tuple(ids[start:]) for ids, start in ends}) == 1      # the response's tokens line up


def test_plain_prompt_is_what_a_server_would_tokenize(tokenizer):
    pair = encoded(tokenizer)
    assert pair.prompts["plain"] == tokenizer(data.render(pair.pair.prompt))["input_ids"]
    assert pair.prompts["plain"] + pair.responses["chosen"][:-1] == tokenizer(data.render(pair.pair.prompt) + " " + pair.pair.chosen)["input_ids"]
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
    assert pair.prompts["plain"][0] == merging.bos_token_id and pair.responses["chosen"].count(merging.eos_token_id) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model is not at hand")
def test_real_tokenizer_round_trip():
    real = AutoTokenizer.from_pretrained(SHARED / "models/stories260K")
    pair = encoded(real)
    text = real.decode(pair.prompts["plain"] + pair.responses["chosen"], skip_special_tokens=True)
    assert text.strip() == (data.render(pair.pair.prompt) + " " + pair.pair.chosen).strip()
    assert pair.prompts["plain"] == real(data.render(pair.pair.prompt))["input_ids"]


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
    found = data.prepare(path, ("train", "valid"), tokenizer, 60, 0)
    assert len(found["train"]) == 1 and "1 of train over 60 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-length"):
        data.prepare(path, ("train",), tokenizer, 5, 0)
