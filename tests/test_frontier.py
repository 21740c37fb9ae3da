"""The real-model studies on numbers made by hand, and on a tiny random model: scorers, pairs,
correlation, common noise, exact KL, interpolation."""

import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model, random_adapter

import align
from common.answers import answer_logprobs, kl_to_base
from common.config import UserError
from common.data import encode_pairs
from common.pairs import Pair
from studies import (
    corr,
    defaults,
    frontier,
    frontier_report,
    hh,
    sampling,
    shared,
    signal,
    smollm2,
    tasks,
)
from studies.sampling import Policy, logprobs_of_answers, sample_answers


def test_no_subject_is_in_two_splits():
    splits = tasks.make_prompts()
    assert {split: len(prompts) for split, prompts in splits.items()} == {
        "valid": 128,
        "test": 128,
        "train": 744,
    }
    assert len({prompt for prompts in splits.values() for prompt in prompts}) == 1000
    subjects = [s for text in tasks.SUBJECTS.values() for s in text.split(", ")]
    assert len(subjects) == 100


def test_plain_words_in_short_sentences_score_high():
    """4.71 letters / words + 0.5 words / sentences - 21.43, by hand."""
    assert tasks.plain("", "The cat sat. It ran.") == 1.0
    text = "Considerable metropolitan infrastructure deteriorates."
    letters, words = 12 + 12 + 14 + 12, 4
    grade = 4.71 * letters / words + 0.5 * words - 21.43
    assert grade > 20
    assert tasks.plain("", text) == -1.0
    middle = "People there often enjoy wonderful concerts, but tickets cost money."
    grade = 4.71 * 57 / 10 + 0.5 * 10 - 21.43
    assert tasks.plain("", middle) == pytest.approx(1 - grade / 10)
    assert tasks.plain("", "...") == -1.0


def test_a_pair_is_the_best_and_the_worst_answer():
    def length(prompt, response):
        return len(response)

    assert tasks.best_and_worst(length, "q", ["aa", "aaaa", "a", "a"], 3) == ("aaaa", "a")
    assert tasks.best_and_worst(length, "q", ["aa", "aaaa"], 3) is None
    assert tasks.best_and_worst(length, "q", ["", "aaaa"], 3) is None


def test_the_committed_pairs_are_those_of_the_prompts():
    prompts = tasks.make_prompts()
    for task in ("sentiment", "plain"):
        rows = tasks.read_rows(tasks.PAIRS / f"{task}-0.jsonl.gz")
        assert len(rows) > 400
        assert all(row["prompt"] in prompts[row["split"]] for row in rows)
    difference = tasks.TASKS["plain"].difference
    for row in rows:
        scores = [tasks.plain("", row[response]) for response in ("chosen", "rejected")]
        assert scores[0] - scores[1] >= difference


def test_correlation_within_prompts_by_hand():
    """What differs from prompt to prompt alone does not count."""
    rng = np.random.default_rng(0)
    rewards = rng.normal(size=(200, 8))
    x = 0.5 * rewards + rng.normal(size=(200, 8))
    offsets = 100 * rng.normal(size=(200, 1))
    value, error = corr.correlation(x + offsets, rewards - offsets)
    centred = [(v - v.mean(1, keepdims=True)).ravel() for v in (x, rewards)]
    assert value == pytest.approx(np.corrcoef(*centred)[0, 1], abs=1e-6)
    assert 0.01 < error < 0.05
    assert corr.correlation(3 * rewards, rewards)[0] == pytest.approx(1)


@pytest.fixture(scope="module")
def encoded(tokenizer):
    prompts = ["Hello, I am Ada.", "What is 1 plus 2?", "Hi! My name is Bela."]
    pairs = [Pair((("user", prompt),), "", "", "test") for prompt in prompts]
    return encode_pairs(tokenizer, pairs)


def test_policies_share_their_noise_and_report_the_exact_kl(encoded, tokenizer):
    model = make_model("llama")

    def draw(policy, seed=0):
        return sample_answers(model, tokenizer, encoded, policy, 2, seed, 8)

    base = draw(Policy())
    assert draw(Policy()) == base
    assert draw(Policy(), seed=1) != base
    assert all(answer.kl == 0 for answers in base for answer in answers)
    adapter = random_adapter(model)
    weights = adapter.weights()
    adapter.remove()
    # the same policy in another form draws the same answers
    halves = Policy([(0.5, weights, "plain"), (0.5, weights, "plain")])
    drawn = draw(Policy([(1.0, weights, "plain")]))
    assert [[a.ids for a in answers] for answers in draw(halves)] == [
        [a.ids for a in answers] for answers in drawn
    ]
    adapter = random_adapter(model)
    prompts = [pair.prompts["plain"].tolist() for pair in encoded for _ in range(2)]
    answers = [answer for per_prompt in drawn for answer in per_prompt]
    ids = [answer.ids for answer in answers]
    kl = kl_to_base(model, adapter, prompts, prompts, ids, tokenizer.pad_token_id)
    assert [answer.kl for answer in answers] == pytest.approx(kl, rel=1e-3)
    assert not torch.equal(torch.tensor(kl), torch.zeros(len(kl)))


def test_answers_to_a_prompt_read_once_have_the_same_logprobs(encoded, tokenizer, monkeypatch):
    # two batches
    monkeypatch.setattr(sampling, "BATCH", 4)
    model = make_model("llama")
    prompts = [pair.prompts["plain"].tolist() for pair in encoded]
    answers = [[[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], [[5], [6, 5]]]
    expected = answer_logprobs(
        model,
        [prompt for prompt in prompts for _ in range(2)],
        [answer for group in answers for answer in group],
        tokenizer.pad_token_id,
    )
    found = logprobs_of_answers(model, prompts, answers, tokenizer.pad_token_id)
    assert found.shape == (3, 2)
    assert found.ravel().tolist() == pytest.approx(expected, rel=1e-5)


def test_reward_at_a_budget_is_linear_in_the_root_of_kl():
    rewards, kls = np.array([0.4, 0.8, 0.6]), np.array([0.0, 4.0, 1.0])
    assert frontier_report.at_budget(rewards, kls, 1.0) == pytest.approx(0.6)
    assert frontier_report.at_budget(rewards, kls, 2.25) == pytest.approx(0.7)
    assert frontier_report.at_budget(rewards, kls, 0.25) == pytest.approx(0.5)
    assert frontier_report.at_budget(rewards, kls, 5.0) is None


def test_the_best_of_n_by_hand():
    """Of all pairs of 1, 2 and 4 the larger ones are 2, 4 and 4."""
    assert frontier.weights_of_best(2, 3) @ [1, 2, 4] == pytest.approx(10 / 3)
    assert frontier.weights_of_best(1, 3).tolist() == pytest.approx([1 / 3] * 3)
    assert frontier.weights_of_best(3, 3).tolist() == [0, 0, 1]


def test_the_report_of_made_up_lines(tmp_path):
    """A method that is 0.1 better than DPO at every prompt and strength is ahead by 0.1. DPO's
    learning rate is the one that is best on the first seed, even where it is not on a later one."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(scale=0.1, size=16)
    lines = {}
    for seed in (0, 1, 2):
        rows = [
            ("base", 0.0, 0.0, 0.0),
            ("DUAL", 0.5, 0.3, 1.0),
            ("DUAL", 1.0, 0.6, 4.0),
            ("DPO, lr 0.0005", 1.0, 0.2, 1.0),
            ("DPO, lr 0.001", 1.0, 0.5 if seed else 0.1, 4.0),
        ]
        # the last seed has neither the weaker DUAL nor the other DPO
        for method, strength, gain, kl in rows[:1] + rows[2:4] if seed == 2 else rows:
            line = {"reward": (prompts + gain).tolist(), "kl": [kl] * 16, "sigma": 0.5}
            line |= {"distinct2": 1.0, "length": 9.0, "ended": 0.5, "kl off task": 0.1}
            lines["made up", seed, method, strength] = line
    figures = frontier_report.Figures(lines, "made up")
    summary = frontier_report.summarize(figures)
    json.dumps(summary)
    budgets = summary["at budgets"]
    assert budgets["DUAL"]["1"]["reward"][0] == pytest.approx(prompts.mean() + 0.3)
    assert budgets["DUAL"]["1"]["seeds"] == [0, 1, 2]
    assert "2" not in budgets["DPO, lr 0.0005"]
    ahead = summary["ahead of the best DPO"]["DUAL"]
    assert (ahead["1"]["rival"], ahead["1"]["seeds"]) == ("DPO, lr 0.0005", [0, 1, 2])
    assert ahead["1"]["difference"] == pytest.approx((0.1, 0.1, 0.1))
    # DUAL has no 5 nats. At 2 nats it has 0.3 √2, DPO 0.1 √½ on the first seed, then 0.5 √½
    assert set(ahead) == {"1", "2"}
    gap = 0.3 * 2**0.5 - 0.3 * 2**-0.5
    assert (ahead["2"]["rival"], ahead["2"]["seeds"]) == ("DPO, lr 0.001", [0, 1])
    assert ahead["2"]["difference"] == pytest.approx((gap,) * 3)
    [row] = [r for r in summary["rows"] if (r["method"], r["strength"]) == ("DUAL", 0.5)]
    assert row["efficiency"] == pytest.approx(0.3 / (0.5 * 2**0.5))
    assert "| DUAL | 0.5 | 2 |" in frontier_report.markdown(summary)
    assert "| DUAL | 1 | 3 |" in frontier_report.markdown(summary)


@pytest.fixture
def small_study(tiny, tmp_path, monkeypatch):
    """The studies on a tiny random model, on one task and fewer prompts: (Config, tmp_path)."""
    prompts = {split: some[:6] for split, some in tasks.make_prompts().items()}
    monkeypatch.setattr(tasks, "make_prompts", lambda: prompts)
    monkeypatch.setattr(tasks, "UNRELATED", tasks.UNRELATED[:4])
    monkeypatch.setattr(tasks, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(tasks, "PAIRS", tmp_path / "pairs")
    (tmp_path / "pairs").mkdir()
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"], _, row["chosen"] = row["chosen"].rpartition("\n\nAssistant: ")
        row["prompt"] = row["prompt"].removeprefix("\n\nHuman: ")
        row["rejected"] = row["rejected"].rpartition("\n\nAssistant: ")[2]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "pairs" / "plain-0.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.setattr(frontier, "LINES", tmp_path / "frontier.jsonl")
    model, work = str(tiny / "model"), str(tmp_path / "work")
    return frontier.Config(task="plain", model=model, work=work)


def test_a_frontier_measures_what_is_missing(small_study):
    """Every row that needs no other library, once; the second call finds all of them."""
    methods = ["base", "base told p+", "preferred-SFT", "DUAL", "weights", "logits", "SCIT"]
    methods += ["DUAL, rank 8", "DUAL, γ = 0", "RAHF as published", frontier.BEST_OF_N]
    small_study.methods, small_study.strengths = methods, [0.25]
    frontier.measure_missing(small_study, 0)
    measured = {key[2:] for key in frontier.read_lines() if key[2] != frontier.BEST_OF_N}
    assert measured == {("weights", 0.25), ("logits", 0.25)}
    small_study.strengths = None
    frontier.measure_missing(small_study, 0)
    lines = frontier.read_lines()
    assert len(lines) == 3 + 2 * 4 + 3 + 3 + 4 + 2 + 2 + 4
    kl = {key[2:]: np.mean(line["kl"]) for key, line in lines.items()}
    assert kl["base", 0.0] == 0
    best = [np.mean(lines["plain", 0, frontier.BEST_OF_N, n]["reward"]) for n in frontier.BEST_OF]
    assert best == sorted(best) and best[0] < best[-1]
    published = lines["plain", 0, "RAHF as published", 1.0]["settings"]["published/dual/align"]
    assert published["alpha"] == 5
    for method, strengths in (("DUAL", frontier.SCALES), ("weights", frontier.LAMBDAS)):
        values = [kl[method, strength] for strength in strengths]
        assert 0 < values[0] < values[-1]
    assert lines["plain", 0, "DUAL", 1.0]["settings"]["dual/good"]["contrast"] == 1.0
    told = lines["plain", 0, "preferred-SFT", 1.0]["settings"]
    assert told["without-contrast/dual/good"]["contrast"] == 0.0
    content = frontier.LINES.read_bytes()
    frontier.measure_missing(small_study, 0)
    assert frontier.LINES.read_bytes() == content
    small_study.dtype = "bfloat16"
    with pytest.raises(UserError, match="--dtype bfloat16"):
        frontier.measure_missing(small_study, 0)
    frontier_report.markdown(frontier_report.summarize(frontier_report.Figures(lines, "plain")))


def test_wrong_labels_are_a_task_of_their_own(small_study, tmp_path):
    small_study.wrong_labels, small_study.methods = 0.5, ["base", "DUAL, rank 8"]
    small_study.strengths = [0.0, 1.0]
    frontier.measure_missing(small_study, 0)
    task = ("plain, 50% wrong labels", 0)
    lines = frontier.read_lines()
    assert list(lines) == [(*task, "base", 0.0), (*task, "DUAL, rank 8", 1.0)]
    told = lines[*task, "DUAL, rank 8", 1.0]["settings"]
    assert told["dual/align-upper-rank-8"]["rank"] == 8
    [swapped] = Path(small_study.work).rglob("swapped-plain-0.jsonl.gz")
    before = tasks.read_rows(tmp_path / "pairs" / "plain-0.jsonl.gz")
    after = tasks.read_rows(swapped)
    changed = [b != a for b, a in zip(before, after)]
    training = [row["split"] == "train" for row in before]
    assert sum(changed) == round(0.5 * sum(training))
    assert all(t for c, t in zip(changed, training) if c)
    for b, a in zip(before, after):
        assert {b["chosen"], b["rejected"]} == {a["chosen"], a["rejected"]}


def test_the_signal_of_everything_that_is_trained(small_study, monkeypatch, tmp_path):
    monkeypatch.setattr(signal, "DPO_LRS", ())
    monkeypatch.setattr(signal, "DUAL_VARIANTS", {"γ 0": {"contrast": 0.0}})
    monkeypatch.setattr(signal, "SCIT_VARIANTS", {"no anchors": {"anchor": 0.0}})
    monkeypatch.setattr(signal, "RESULTS", tmp_path)
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    settings = {"task": "plain", "model": small_study.model, "work": small_study.work}
    with pytest.raises(UserError, match=r"--figures 'SKIT': choose from .*SCIT, no anchors"):
        signal.measure(signal.Config(figures=["SKIT"], **settings))
    # of the aligned adapters one is enough
    names = ["base, p+ against p-", "good against bad", "weights", "good against bad, γ 0", "SCIT"]
    names += ["SCIT, no anchors", "SCIT aligned, upper layers", "weights, γ 0"]
    names += ["DUAL aligned, upper layers, states in bfloat16", "DUAL aligned, rank 2"]
    settings["figures"] = names
    figures = signal.measure(signal.Config(**settings))
    assert list(figures) == settings["figures"]
    for values in figures.values():
        assert -1 <= values["corr"] <= 1
        assert values["spread"] > 0
    # policies are scaled to one spread
    for name in ("weights", "weights, γ 0", "SCIT aligned, upper layers"):
        assert figures[name]["spread"] == pytest.approx(signal.SPREAD, rel=0.5)
    pair, other = figures["good against bad"], figures["good against bad, γ 0"]
    assert pair["corr"] != other["corr"]
    assert figures["SCIT"]["corr"] != figures["SCIT, no anchors"]["corr"]
    assert f"| SCIT | {figures['SCIT']['corr']:.2f} ± " in signal.markdown(figures)
    work = Path(small_study.work)
    [rounded] = work.rglob("rounded states/dual/collect/stage.json")
    assert json.loads(rounded.read_text())["settings"]["compute_dtype"] == "bfloat16"
    [stage1] = work.rglob("plain-0/dual/good/stage.json")
    assert (rounded.parent.parent / "good" / "stage.json").read_bytes() == stage1.read_bytes()
    # a later call measures nothing again
    monkeypatch.setattr(signal.Signal, "measure", None)
    assert signal.measure(signal.Config(**settings)) == figures


def test_the_defaults_study_goes_on_with_the_missing_task(small_study, monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    # a random model learns nothing that would move it by nats
    monkeypatch.setattr(align, "KL", 0.02)
    both, one = dict(tasks.TASKS), {"plain": tasks.TASKS["plain"]}
    work = str(tmp_path / "defaults")
    monkeypatch.setattr(tasks, "TASKS", one)
    defaults.main(defaults.Config(model=small_study.model, work=work))
    result = json.loads((tmp_path / "defaults.json").read_text())["tasks"]
    assert set(result["plain"]["seconds"]) == {"dual", "collect", "align", "evaluate"}
    models = result["plain"]["models"]
    assert models["base"]["kl_to_base"] == 0 < models["dual_aligned"]["kl_to_base"]
    base = f"| plain | base | {models['base']['judge_sampled']:.2f} | 0.00 |"
    assert base in defaults.table(result)

    def measure(config, task):
        assert task != "plain", "measured again"
        return result["plain"]

    monkeypatch.setattr(defaults, "measure", measure)
    monkeypatch.setattr(tasks, "TASKS", both)
    defaults.main(defaults.Config(model=small_study.model, work=work))
    assert set(json.loads((tmp_path / "defaults.json").read_text())["tasks"]) == set(both)


def test_real_pairs_at_two_strengths(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    source = {"model": str(tiny / "model"), "data": str(tiny / "pairs.jsonl")}
    config = hh.Config(**source, kl=[0.01, 0.04], work=str(tmp_path / "hh"))
    hh.main(config)
    result = json.loads((tmp_path / "hh.json").read_text())
    policies = result["policies"]
    weak, strong = policies["aligned, 0.01 nats"], policies["aligned, 0.04 nats"]
    assert list(policies) == ["base", "aligned, 0.01 nats", "aligned, 0.04 nats", "good"]
    assert weak["scale"] < strong["scale"]
    assert 0 < weak["kl_to_base"] < strong["kl_to_base"]
    assert all(len(figures["answers"]) > 3 for figures in policies.values())
    assert policies["good"]["kl_to_base"] > 0
    base = f"| base | {policies['base']['preference_accuracy']:.2f} |  |  |"
    assert base in hh.table(policies)

    # a later call trains nothing again, and measures what is missing
    monkeypatch.setattr(hh, "quietly", None)
    del policies["aligned, 0.04 nats"]
    shared.write_result("hh", {"settings": result["settings"], "policies": policies})
    scored = []
    answers = ["Sorry, no.", "I’m sorry.", "Sorrel is a herb.", "Yes."]
    rows = [{"temperature": 0.0, "output": answer} for answer in answers]
    rows.append({"temperature": 1.0, "output": "Sorry!"})
    assert hh.read_greedy(rows) == {"apologies": 0.5, "answers": answers}
    monkeypatch.setattr(hh.Study, "score", lambda study, weights: scored.append(1) or ({}, rows))
    hh.main(config)
    again = json.loads((tmp_path / "hh.json").read_text())["policies"]
    assert len(scored) == 1 and again.pop("aligned, 0.04 nats")["scale"] == strong["scale"]
    assert again == policies

    # other data under the same name
    other = tmp_path / "other" / "pairs.jsonl"
    other.parent.mkdir()
    other.write_bytes((tiny / "pairs.jsonl").read_bytes())
    config.data = str(other)
    with pytest.raises(UserError, match=r"--work .*: its stages ran on .*: name another folder"):
        hh.main(config)


# ---------------------------------------------------------------- what is missing


@pytest.mark.parametrize("name, value", [("methods", ["DUALL"]), ("strengths", [0.25, 0.7])])
def test_what_no_policy_has_is_refused(small_study, name, value):
    setattr(small_study, name, value)
    with pytest.raises(UserError, match=f"--{name} {value[-1]}: choose from .*(DUAL|0.25)"):
        frontier.measure_missing(small_study, 0)
    assert not frontier.LINES.exists()


def test_a_missing_package_is_named_with_its_remedy(monkeypatch, refused, tmp_path):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    words = ["--source package", "pip install gguf accelerate"]
    refused(smollm2, "--source", "package", "--to", tmp_path / "model", words=words)


def test_a_missing_scorer_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    tasks.vader.cache_clear()
    with pytest.raises(UserError, match="pip install vaderSentiment"):
        tasks.sentiment("", "Good.")


def test_an_unknown_task_is_refused(refused):
    refused(frontier, "--task", "rhymes", words=["--task rhymes", "sentiment, plain"])


def test_a_frontier_goes_on_after_a_line_cut_off_in_the_middle(monkeypatch, tmp_path):
    """What was being written when a run was killed is measured again."""
    line = {"task": "plain", "seed": 0, "method": "base", "strength": 0.0, "digest": "d"}
    path = tmp_path / "frontier.jsonl"
    monkeypatch.setattr(frontier, "LINES", path)
    frontier.append_line(line)
    with path.open("a") as file:
        file.write('{"task": "plain", "seed": 0, "method": "DU')
    frontier.append_line({**line, "method": "DUAL"})
    assert list(frontier.read_lines()) == [("plain", 0, "base", 0.0), ("plain", 0, "DUAL", 0.0)]
    frontier.append_line({**line, "method": "DPO", "digest": "e"})
    with pytest.raises(UserError, match="several models"):
        frontier.read_lines()
