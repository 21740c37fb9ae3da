"""Scores: reward model, win rate, repeated n-grams, fields of the samples, all computed by hand."""

import copy
import json
import shutil

import pytest
import torch
from helpers import HERE, SIZES, go, make_model, random_adapter
from templates import CHATML
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import dual
import evaluate
import scit
from common import score
from common.answers import GenerationSettings, generate, repeated_ngrams
from common.chat import render_transcript
from common.config import UserError
from lora import save_adapter

TURNS = (("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."), ("user", "And?"))

# TURNS and a reply, and its first two turns and a reply, as the reward model reads them
PLAIN_TEXTS = [
    "\n\nBe brief.\n\nHuman: Hi.\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: Good.",
    "\n\nBe brief.\n\nHuman: Hi.\n\nAssistant: A longer reply to it.",
]
CHATML_TEXTS = [
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi.<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n"
    "<|im_start|>user\nAnd?<|im_end|>\n"
    "<|im_start|>assistant\nGood.<|im_end|>\n",
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nHi.<|im_end|>\n"
    "<|im_start|>assistant\nA longer reply to it.<|im_end|>\n",
]


# ---------------------------------------------------------------- reward models


@pytest.fixture
def reward_model(tokenizer, tmp_path):
    """A function that writes a random classifier and returns its folder and the model."""

    def make(name="reward", labels=1, pad=True, template=None, family="llama"):
        torch.manual_seed(0)
        options = {"vocab_size": 810, "num_labels": labels, "pad_token_id": 1 if pad else None}
        config = AutoConfig.for_model(family, **{**SIZES, **options})
        model = AutoModelForSequenceClassification.from_config(config).eval()
        for p in model.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        model.save_pretrained(tmp_path / name)
        chat_tokenizer = copy.deepcopy(tokenizer)
        chat_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        chat_tokenizer.save_pretrained(tmp_path / name)
        if template:
            (tmp_path / name / "chat_template.jinja").write_text(template)
        return str(tmp_path / name), model

    return make


def reward_of(model, ids):
    """The reward of one input without padding."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.item()


@pytest.mark.parametrize(
    "family, template", [("llama", None), ("llama", CHATML), ("qwen3", CHATML)]
)
@pytest.mark.parametrize("pad", [True, False])
def test_rewards_are_those_of_the_classifier_on_single_texts(reward_model, pad, family, template):
    folder, model = reward_model(pad=pad, template=template, family=family)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scorer = score.load_reward_model(folder, "float32", "cpu", 3)
    rewards = scorer([TURNS, TURNS[:2], TURNS], ["Good.", "A longer reply to it.", "Bad."])
    texts = CHATML_TEXTS if template else PLAIN_TEXTS
    expected = [reward_of(model, tokenizer(text)["input_ids"]) for text in texts]
    assert rewards[:2] == pytest.approx(expected, abs=1e-5)
    assert len(set(rewards)) == 3


def test_a_classifier_of_two_labels_is_refused(reward_model):
    folder, _ = reward_model("two", labels=2)
    with pytest.raises(UserError, match="has 2 labels"):
        score.load_reward_model(folder, "float32", "cpu", 2)


def test_a_language_model_is_refused_as_reward_model(tiny, tmp_path):
    """Its config can be read as that of a classifier, but its scores would be random."""
    shutil.copytree(tiny / "model", tmp_path / "lm")
    path = tmp_path / "lm" / "config.json"
    labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **labels}))
    message = "lacks score.weight: it is no trained classifier"
    with pytest.raises(UserError, match=message):
        score.load_reward_model(str(tmp_path / "lm"), "float32", "cpu", 2)


def test_a_missing_reward_model_is_refused():
    with pytest.raises(UserError, match=r"--reward-model ./no/such: no such folder"):
        score.load_reward_model("./no/such", "float32", "cpu", 2)


def test_a_tokenizer_with_a_separator_gets_question_and_reply_as_a_pair(tokenizer, tmp_path):
    """Encoders such as DeBERTa reward models read such pairs; several turns are one question."""
    torch.manual_seed(0)
    pair_tokenizer = copy.deepcopy(tokenizer)
    pair_tokenizer.add_special_tokens({"sep_token": "<|sep|>", "cls_token": "<|cls|>"})
    special_tokens = [
        (token, pair_tokenizer.convert_tokens_to_ids(token)) for token in ("<|sep|>", "<|cls|>")
    ]
    pair_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|cls|> $A <|sep|>",
        pair="<|cls|> $A <|sep|> $B <|sep|>",
        special_tokens=special_tokens,
    )
    config = AutoConfig.for_model("bert", **{**SIZES, "vocab_size": 810, "num_labels": 1})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path / "bert")
    pair_tokenizer.save_pretrained(tmp_path / "bert")

    scorer = score.load_reward_model(str(tmp_path / "bert"), "float32", "cpu", 2)
    rewards = scorer([TURNS, TURNS[1:2]], ["Good.", "Bad."])
    expected = [
        reward_of(model, pair_tokenizer(render_transcript(TURNS), "Good.")["input_ids"]),
        reward_of(model, pair_tokenizer("Hi.", "Bad.")["input_ids"]),
    ]
    assert rewards == pytest.approx(expected, abs=1e-5)
    separator_id = dict(special_tokens)["<|sep|>"]
    assert pair_tokenizer("Hi.", "Bad.")["input_ids"].count(separator_id) == 2


def test_a_reward_model_with_another_tokenizers_files_is_refused(reward_model, tokenizer):
    folder, _ = reward_model()
    other = copy.deepcopy(tokenizer)
    other.add_tokens([f"<extra {i}>" for i in range(100)])
    other.save_pretrained(folder)
    scorer = score.load_reward_model(folder, "float32", "cpu", 2)
    message = f"--reward-model {folder}: its tokenizer has written the id .* for 810 ids only"
    with pytest.raises(UserError, match=message):
        scorer([TURNS], ["<extra 99>"])


def test_a_template_that_refuses_is_said_of_the_reward_model(reward_model):
    folder, _ = reward_model(template="{{ raise_exception('not today') }}")
    with pytest.raises(UserError, match=f"--reward-model {folder}: .*not today") as refused:
        score.load_reward_model(folder, "float32", "cpu", 2)([TURNS], ["Good."])
    assert "--template" not in str(refused.value)


def test_positions_that_begin_after_the_padding_are_not_overrun(tokenizer, tmp_path):
    """RoBERTa's table of 34 positions takes 32 tokens."""
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": 810, "num_labels": 1, "pad_token_id": 1}
    config = AutoConfig.for_model("roberta", **{**sizes, "max_position_embeddings": 34})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = 10**9
    tokenizer.save_pretrained(tmp_path)
    scorer = score.load_reward_model(str(tmp_path), "float32", "cpu", 2)
    [reward] = scorer([TURNS], ["Good. " * 40])
    ids = tokenizer(f"{render_transcript(TURNS)} " + "Good. " * 40)["input_ids"][-32:]
    assert reward == pytest.approx(reward_of(model, ids), abs=1e-5)


def test_long_inputs_lose_their_beginning(reward_model):
    folder, _ = reward_model()
    scorer = score.load_reward_model(folder, "float32", "cpu", 2)
    long = (("user", "word " * 300),)
    longer = (("user", "other " + "word " * 300),)
    good, good_after_longer, bad = scorer([long, longer, long], ["Good.", "Good.", "Bad."])
    assert good == pytest.approx(good_after_longer, abs=1e-5)
    assert abs(good - bad) > 1e-4


def test_control_tokens_inside_texts_are_text_for_a_reward_model_too(reward_model, monkeypatch):
    folder, model = reward_model(template=CHATML)
    seen = []
    forward = type(model).forward

    def record(self, input_ids=None, **options):
        seen.append(input_ids)
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", record)
    rewards = score.load_reward_model(folder, "float32", "cpu", 4)
    turns = (("user", "Say <|im_end|> please."),)
    rewards([turns], ["Fine <|im_end|> more."])
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    # the template's own: after the question and after the reply
    assert (seen[-1] == end).sum() == 2


def test_an_adapter_beside_a_reward_model_is_not_added(reward_model):
    folder, _ = reward_model()
    before = score.load_reward_model(folder, "float32", "cpu", 1)([TURNS], ["Good."])
    adapter = random_adapter(make_model("llama"))
    save_adapter(folder, adapter.weights(), make_model("llama").base_model, folder)
    assert score.load_reward_model(folder, "float32", "cpu", 1)([TURNS], ["Good."]) == before


def test_a_reward_that_is_no_number_is_refused(reward_model):
    folder, model = reward_model()
    model.score.weight.data.fill_(float("nan"))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match=r"--reward-model .* gives nan on the answer 'Good.'"):
        score.load_reward_model(folder, "float32", "cpu", 1)([TURNS], ["Good."])


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_answers_end_where_the_context_does(kind, tokenizer):
    """A prompt of 110 tokens in a context of 128 leaves room for 18 tokens, no matter how many
    are asked for: learned positions end there. Its neighbour of 100 tokens has room for 28."""
    model = make_model(kind)
    model.generation_config.eos_token_id = None
    settings = GenerationSettings(max_new_tokens=64, batch_size=2, seed=0)
    answers = generate(model, tokenizer, [[5] * 110, [6] * 100], settings)
    # a pad token may come early, as the models are random
    assert [len(answer) for answer in answers] == [18, 28]


def test_the_head_never_gets_states_with_gaps(tokenizer):
    """Of a slice of the prompts' states PyTorch would copy the head's weights for each prompt."""
    model = make_model("llama")
    contiguous = []
    head = model.get_output_embeddings()
    forward = head.forward

    def watched(states):
        contiguous.append(states.is_contiguous())
        return forward(states)

    head.forward = watched
    settings = GenerationSettings(max_new_tokens=3, batch_size=4, seed=0)
    generate(model, tokenizer, [[5, 6, 7]] * 4, settings)
    assert contiguous
    assert all(contiguous)


def test_answers_ignore_the_generation_config(tokenizer):
    model = make_model("llama")
    settings = GenerationSettings(max_new_tokens=20, batch_size=3, seed=0)

    def answers():
        prompts = [[5, 6, 7]] * 3
        greedy = generate(model, tokenizer, prompts, settings)
        sampled = generate(model, tokenizer, prompts, settings, sample=True)
        return greedy, sampled

    expected = answers()
    options = {
        "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 2,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.5,
        "typical_p": 0.3,
        "temperature": 0.3,
        "num_beams": 2,
        "suppress_tokens": list(range(2, 400)),
        "min_new_tokens": 15,
    }
    for name, value in options.items():
        setattr(model.generation_config, name, value)
    assert answers() == expected
    assert model.generation_config.repetition_penalty == 5.0


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_answers_of_a_padded_batch_are_those_of_single_prompts(kind, tokenizer):
    model = make_model(kind)
    prompts = [[5, 6, 7], [9] * 30 + [11, 12], [40, 41, 42, 43, 44, 45, 46]]
    settings = GenerationSettings(max_new_tokens=12, batch_size=3, seed=0)
    single = [generate(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert generate(model, tokenizer, prompts, settings) == single
    assert len({tuple(answer) for answer in single}) == 3


def test_repeated_ngrams_by_hand():
    assert repeated_ngrams([[1, 2, 3, 4, 1, 2, 3, 4]]) == 1 / 5
    assert repeated_ngrams([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4]]) == 0


def test_win_rate_by_hand():
    """Two wins, one tie and one loss of four: 0.625, with Wilson's interval at n = 4."""
    rate, low, high = score.win_rate([2, 2, 1, 0], [1, 1, 1, 1])
    center = (0.625 + 1.96**2 / 8) / (1 + 1.96**2 / 4)
    half_width = 1.96 * (0.625 * 0.375 / 4 + 1.96**2 / 64) ** 0.5 / (1 + 1.96**2 / 4)
    assert (rate, low, high) == pytest.approx((0.625, center - half_width, center + half_width))

    rate, low, high = score.win_rate([1] * 100, [0] * 100)
    assert rate == 1
    assert low == pytest.approx(0.963, abs=1e-3)
    assert high == pytest.approx(1)


# ---------------------------------------------------------------- evaluate.py


def test_models_of_scit_are_given_the_instructions_of_their_run(tiny, tmp_path, monkeypatch):
    """Whatever instructions a run of DUAL in the same folder was given."""
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path]
    source += ["--steps", "1", *HERE]
    go(scit, *source, "--positive", "Be nice.", "--negative", "Be rude.")
    go(dual, *source)
    prepare_pairs = evaluate.prepare_pairs
    instructions = []

    def record_instructions(*args, positive, negative, **options):
        instructions.append((positive, negative))
        return prepare_pairs(*args, positive=positive, negative=negative, **options)

    monkeypatch.setattr(evaluate, "prepare_pairs", record_instructions)
    limits = ["--limit", "2", "--max-new-tokens", "2"]
    go(evaluate, "--out", tmp_path, *limits, *HERE)
    assert instructions == [("Be nice.", "Be rude.")]


def test_evaluate_with_a_reward_model(reward_model, done, tmp_path):
    """Mean reward and win rate are recomputed from samples.jsonl, whose rows have AlpacaEval's
    fields; a judge scores too."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    scorers = ["--reward-model", reward_model()[0], "--judge", "common.toy:judge"]
    limits = ["--limit", "6", "--max-new-tokens", "6"]
    output = go(evaluate, "--out", out, *scorers, *limits, *HERE)

    report = json.loads((out / "evaluate" / "report.json").read_text())
    lines = (out / "evaluate" / "samples.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    fields = {"instruction", "output", "generator", "temperature", "reward", "judge"}
    fields |= {"implicit_scit", "implicit_dual"}
    for row in rows:
        assert set(row) == fields | ({"kl_to_base"} if row["temperature"] else set())
    # single turns stand there as they were asked
    assert not any("Human:" in row["instruction"] for row in rows)
    for decoding, temperature in (("greedy", 0), ("sampled", 1)):
        rewards = {name: [] for name in report["models"]}
        for row in rows:
            if row["temperature"] == temperature:
                rewards[row["generator"]].append(row["reward"])
        for name, figures in report["models"].items():
            assert figures[f"reward_{decoding}"] == pytest.approx(sum(rewards[name]) / 6)
        pairs = zip(rewards["dual_aligned"], rewards["base"])
        wins = sum((a > b) + 0.5 * (a == b) for a, b in pairs)
        wins_over_base = report["win_rate_over_base"]["dual_aligned"]
        rate, low, high = wins_over_base[f"reward_{decoding}"]
        assert rate == pytest.approx(wins / 6)
        assert low <= rate <= high
        assert f"reward, {decoding} {rate:.2f} [{low:.2f}, {high:.2f}]" in output

    # what the sampled answers of a model cost, and how often two scorers disagree about them
    sampled = [row for row in rows if row["temperature"]]
    told = [row for row in sampled if row["generator"] == "base_plus"]
    base = [row for row in sampled if row["generator"] == "base"]
    kl = torch.tensor([row["kl_to_base"] for row in told])
    figures = report["models"]["base_plus"]
    assert figures["kl_to_base"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert figures["kl_error"] == pytest.approx(kl.std().item() / 6**0.5, rel=1e-4)
    assert report["models"]["base"]["kl_to_base"] == pytest.approx(0, abs=1e-5)
    differences = torch.tensor(
        [
            [row[scorer] - base_row[scorer] for row, base_row in zip(told, base)]
            for scorer in ("reward", "implicit_dual")
        ]
    )
    product = differences.prod(0)
    share = (product < 0).sum() / (product != 0).sum()
    shares = report["disagreement"]["base_plus"]
    assert shares["reward and implicit_dual"] == pytest.approx(share.item())
    assert len(shares) <= 4
