"""Scores: reward model, win rate, repeated n-grams, fields of samples, each by hand."""
import copy
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import data
import dual
import evaluate
import scit
import score
from conftest import SIZES, go, make_model
from files import UserError
from test_data import CHATML
from test_errors import done  # noqa: F401

TURNS = (("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))


@pytest.fixture
def reward_model(tokenizer, tmp_path):
    """A folder with a random classifier of one label; yields a function that makes one."""
    def make(name="reward", labels=1, pad=True, template=None):
        torch.manual_seed(0)
        config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": 810, "num_labels": labels, "pad_token_id": 1 if pad else None})
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        model.save_pretrained(tmp_path / name)
        own = copy.deepcopy(tokenizer)
        own.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        own.save_pretrained(tmp_path / name)
        if template:
            (tmp_path / name / "chat_template.jinja").write_text(template)
        return str(tmp_path / name), model
    return make


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("pad", [True, False])
def test_rewards_are_those_of_the_classifier_on_each_text_alone(reward_model, pad, template):
    folder, model = reward_model(pad=pad, template=template)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    dialogues, replies = [TURNS, TURNS[:2], TURNS], ["Good.", "A longer reply to it.", "Bad."]
    rewards = score.load_reward_model(folder, torch.float32, "cpu", 3)(dialogues, replies)
    if template:
        system = "<|im_start|>system\nBe brief.<|im_end|>\n"
        texts = [system + "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nGood.<|im_end|>\n",
                 system + "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\nA longer reply to it.<|im_end|>\n"]
    else:
        texts = ["\n\nBe brief.\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good.", "\n\nBe brief.\n\nHuman: Hi.\n\nAssistant: A longer reply to it."]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.item() for text in texts]
    assert rewards[:2] == pytest.approx(alone, abs=1e-5) and len(set(rewards)) == 3


def test_what_is_no_reward_model_is_refused(reward_model, tiny, tmp_path):
    with pytest.raises(UserError, match="has 2 labels"):
        score.load_reward_model(reward_model("two", labels=2)[0], torch.float32, "cpu", 2)
    shutil.copytree(tiny / "model", tmp_path / "lm")                                # a language model: its score would be random
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}))
    with pytest.raises(UserError, match="lacks score.weight: it is no trained classifier"):
        score.load_reward_model(str(tmp_path / "lm"), torch.float32, "cpu", 2)
    with pytest.raises(UserError, match="--reward-model ./no/such: no such folder"):
        score.load_reward_model("./no/such", torch.float32, "cpu", 2)


def test_a_tokenizer_with_a_separator_gets_question_and_reply_as_a_pair(tokenizer, tmp_path):
    """As encoders such as DeBERTa reward models read them; a dialogue of several turns is one question."""
    from tokenizers.processors import TemplateProcessing
    torch.manual_seed(0)
    paired = copy.deepcopy(tokenizer)
    paired.add_special_tokens({"sep_token": "<|sep|>", "cls_token": "<|cls|>"})
    ids = {token: paired.convert_tokens_to_ids(token) for token in ("<|sep|>", "<|cls|>")}
    paired.backend_tokenizer.post_processor = TemplateProcessing(single="<|cls|> $A <|sep|>", pair="<|cls|> $A <|sep|> $B <|sep|>", special_tokens=list(ids.items()))
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **{**SIZES, "vocab_size": 810, "num_labels": 1})).eval()
    model.save_pretrained(tmp_path / "bert")
    paired.save_pretrained(tmp_path / "bert")
    rewards = score.load_reward_model(str(tmp_path / "bert"), torch.float32, "cpu", 2)([TURNS, TURNS[1:2]], ["Good.", "Bad."])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([paired(*texts)["input_ids"]])).logits.item() for texts in ((data.render(TURNS), "Good."), ("Hi.", "Bad."))]
    assert rewards == pytest.approx(alone, abs=1e-5) and paired("Hi.", "Bad.")["input_ids"].count(ids["<|sep|>"]) == 2


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_answers_end_where_the_context_does(kind, tokenizer):
    """A prompt of 110 tokens in a context of 128 leaves room for 18, whatever is asked for; learned positions go no further."""
    model = make_model(kind)
    model.generation_config.eos_token_id = None
    answers = score.generate(model, tokenizer, [[5] * 110, [6] * 100], False, 64, 2, 0)
    assert all(len(answer) <= 18 for answer in answers) and max(map(len, answers)) > 0


def test_answers_are_the_models_own_whatever_its_generation_config_adds(tokenizer):
    model = make_model("llama")
    want = [score.generate(model, tokenizer, [[5, 6, 7]] * 3, sample, 20, 3, 0) for sample in (False, True)]
    config = model.generation_config
    for name, value in {"repetition_penalty": 5.0, "no_repeat_ngram_size": 2, "top_k": 3, "top_p": 0.5, "min_p": 0.5, "typical_p": 0.3, "temperature": 0.3,
                        "num_beams": 2, "suppress_tokens": list(range(2, 400)), "min_new_tokens": 15}.items():
        setattr(config, name, value)
    assert [score.generate(model, tokenizer, [[5, 6, 7]] * 3, sample, 20, 3, 0) for sample in (False, True)] == want


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_answers_of_a_padded_batch_are_those_of_each_prompt_alone(kind, tokenizer):
    model, prompts = make_model(kind), [[5, 6, 7], [9] * 30 + [11, 12], [40, 41, 42, 43, 44, 45, 46]]
    alone = [score.generate(model, tokenizer, [prompt], False, 12, 1, 0)[0] for prompt in prompts]
    assert score.generate(model, tokenizer, prompts, False, 12, 3, 0) == alone and len(set(map(tuple, alone))) == 3


def test_models_of_scit_get_their_own_instructions(tiny, tmp_path, monkeypatch):
    """Those of its own run, whatever a run of DUAL beside it was given."""
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", "--device", "cpu"]
    go(scit, *source, "--positive", "Be nice.", "--negative", "Be rude.")
    go(dual, *source)
    own, seen = data.prepare, []
    monkeypatch.setattr(data, "prepare", lambda *args: seen.append(args[6:8]) or own(*args))
    go(evaluate, "--out", tmp_path, "--limit", "2", "--max-new-tokens", "2", "--device", "cpu")
    assert seen == [("Be nice.", "Be rude.")]


def test_long_texts_lose_their_beginning(reward_model):
    folder, _ = reward_model()
    scorer = score.load_reward_model(folder, torch.float32, "cpu", 2)
    a, b, c = scorer([(("user", "word " * 300),), (("user", "other " + "word " * 300),), (("user", "word " * 300),)], ["Good.", "Good.", "Bad."])
    assert a == pytest.approx(b, abs=1e-5) and abs(a - c) > 1e-4


def test_win_rate_by_hand():
    """Two wins, one tie, one loss of four: 0.625; Wilson's interval at n = 4."""
    rate, low, high = score.win_rate([2, 2, 1, 0], [1, 1, 1, 1])
    centre, half = (0.625 + 1.96**2 / 8) / (1 + 1.96**2 / 4), 1.96 * (0.625 * 0.375 / 4 + 1.96**2 / 64)**0.5 / (1 + 1.96**2 / 4)
    assert (rate, low, high) == pytest.approx((0.625, centre - half, centre + half))
    rate, low, high = score.win_rate([1] * 100, [0] * 100)
    assert rate == 1 and low == pytest.approx(0.963, abs=1e-3) and high == pytest.approx(1)


def test_repeated_ngrams_by_hand():
    assert score.repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5 and score.repeated_ngrams([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]) == 0


def test_evaluate_with_a_reward_model(reward_model, done, tmp_path):  # noqa: F811
    """Mean reward and win rate recomputed from samples.jsonl, whose rows have AlpacaEval's fields; the judge beside it."""
    shutil.copytree(done, tmp_path / "out")
    said = go(evaluate, "--out", tmp_path / "out", "--reward-model", reward_model()[0], "--judge", "toy:judge", "--limit", "6", "--max-new-tokens", "6", "--device", "cpu")
    report = json.loads((tmp_path / "out" / "evaluate" / "report.json").read_text())
    rows = [json.loads(line) for line in open(tmp_path / "out" / "evaluate" / "samples.jsonl")]
    assert all({"instruction", "output", "generator", "temperature", "reward", "judge"} == set(row) for row in rows)
    assert not any("Human:" in row["instruction"] for row in rows)                  # single turns: as they were asked
    for how, temperature in (("greedy", 0), ("sampled", 1)):
        rewards = {name: [row["reward"] for row in rows if row["generator"] == name and row["temperature"] == temperature] for name in report["models"]}
        for name, row in report["models"].items():
            assert row[f"reward_{how}"] == pytest.approx(sum(rewards[name]) / 6)
        wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards["dual_aligned"], rewards["base"])) / 6
        rate, low, high = report["win_rate_over_base"]["dual_aligned"][f"reward_{how}"]
        assert rate == pytest.approx(wins) and low <= rate <= high and f"reward, {how} {rate:.2f} [{low:.2f}, {high:.2f}]" in said
