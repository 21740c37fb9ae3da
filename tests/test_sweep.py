"""The sweep: what it chooses, by hand, and what it refuses. A whole one is in test_pipeline.py."""

import pytest
from helpers import HERE, go, stage1_source

import collect
import dual
from common import score
from tools import sweep

# ---------------------------------------------------------------- choosing


def report(**changes):
    figures = {"implicit_dual_sampled": 1.0, "kl_to_base": 0.0, "own_nll_under_base": 0.5}
    return {**figures, "repeated_ngrams": 0.01, **changes}


# c has collapsed: the base finds its answers strange; d is far from the base
REPORTS = {
    "base": report(),
    "a": report(implicit_dual_sampled=2.0, kl_to_base=1.0),
    "b": report(implicit_dual_sampled=3.0, kl_to_base=4.0),
    "c": report(implicit_dual_sampled=9.0, kl_to_base=3.0, own_nll_under_base=1.6),
    "d": report(implicit_dual_sampled=7.0, kl_to_base=9.0),
}


def with_scores(reports, scorer, scores):
    """Reports with the greedy and sampled scores of a judge or reward model."""
    scored = {}
    for (name, row), (greedy, sampled) in zip(reports.items(), scores):
        scored[name] = {**row, f"{scorer}_greedy": greedy, f"{scorer}_sampled": sampled}
    return scored


def test_without_a_scorer_the_implicit_reward_decides_and_what_has_collapsed_is_out():
    best, why = score.choose_best(REPORTS, max_kl=5)
    assert best == "b"
    assert "highest implicit reward at 5 nats or less (3.000; base 1.000)" in why
    assert "c shows a collapse" in why
    assert "strange" in why
    assert "WARNING" not in why
    assert score.choose_best(REPORTS)[0] == "d"
    best, why = score.choose_best(REPORTS, max_kl=0.5)
    assert best == "a"
    assert "WARNING: it is 1.0 nats from the base" in why


def test_a_judge_decides_where_there_is_one():
    judged = with_scores(REPORTS, "judge", [(0, 0), (0.9, 0.5), (0.6, 0.7), (1, 1), (0, 0)])
    best, why = score.choose_best(judged)
    assert best == "a"
    assert "best judge (0.700" in why


def test_a_reward_model_decides_before_a_judge():
    judged = with_scores(REPORTS, "judge", [(0, 0), (0.9, 0.5), (0.6, 0.7), (1, 1), (0, 0)])
    rewarded = with_scores(judged, "reward", [(-1, -1), (-3, -3), (-2, -2), (5, 5), (-4, -4)])
    best, why = score.choose_best(rewarded)
    assert best == "b"
    assert "best reward (-2.000; base -1.000); WARNING: it is no better than the base" in why


def test_where_all_have_collapsed_one_of_them_is_chosen():
    collapsed = {
        "base": report(),
        "a": report(repeated_ngrams=0.2, kl_to_base=2.0),
        "b": report(repeated_ngrams=0.3, kl_to_base=1.0),
    }
    assert score.choose_best(collapsed)[0] == "b"


# ---------------------------------------------------------------- the tool


def test_an_adapter_that_diverges_is_left_out(done, tmp_path):
    """Nothing of an earlier sweep stays, and an earlier export is named."""
    (tmp_path / "dual").mkdir()
    (tmp_path / "dual" / "collect").symlink_to(done / "dual" / "collect")
    (tmp_path / "dual" / "merged").mkdir()
    options = ["--out", tmp_path, "--kind", "mse", "--steps", "2", "--max-new-tokens", "2", *HERE]
    options += ["--judge", "common.toy:judge"]
    go(sweep, *options, "--alpha", "0.5", "2")
    output = go(sweep, *options, "--alpha", "-0.5", "1", "1e30")
    assert "WARNING: left out: alpha_1e+30: the loss is" in output
    assert "merged holds an earlier adapter" in output
    folders = {path.name for path in (tmp_path / "dual" / "sweep").iterdir() if path.is_dir()}
    assert folders == {"alpha_-0.5", "alpha_1"}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--alpha", "1", "2"], "pairs.jsonl"),
        (["--alpha", "1", "2", "--judge", "no:such"], "--judge"),
        (["--alpha", "1", "2", "--reward-model", "./no"], "--reward-model"),
        (["--strength", "0.2", "0.2"], "each value once"),
        (["--alpha", "nan", "1"], "nan is not a finite number"),
        (["--alpha", "inf", "1"], "finite"),
        (["--alpha", "1", "--strength", "0.1"], "of --strength or of --alpha"),
        ([], "of --kl, of --strength or of --alpha"),
    ],
)
def test_a_sweep_fails_at_its_start_where_its_end_would(options, words, without_pairs, fails):
    """Also where the pairs are gone, which are needed only for the scores."""
    code, lines = fails(sweep, "--out", without_pairs, *options, *HERE)
    assert code == 2
    assert len(lines) == 1
    assert words in lines[0]
    assert not (without_pairs / "dual" / "sweep").exists()


@pytest.fixture(scope="module")
def without_pairs(tiny, tmp_path_factory):
    """A folder with a collection whose pairs were deleted."""
    folder = tmp_path_factory.mktemp("without-pairs")
    (folder / "model").symlink_to(tiny / "model")
    (folder / "pairs.jsonl").write_bytes((tiny / "pairs.jsonl").read_bytes())
    go(dual, *stage1_source(folder, folder), "--steps", "2", *HERE)
    go(collect, "--out", folder, "--layers", "1", *HERE)
    (folder / "pairs.jsonl").unlink()
    return folder
