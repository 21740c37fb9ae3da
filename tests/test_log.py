"""What a run reports: a tracker on request, and the names that other trainers use."""

import json
import math
import sqlite3
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import HERE, go, make_model, random_adapter, stage1_source, succeed

import dual
from common import score
from common.data import encode_pairs
from common.pairs import Pair


class Tracker(SimpleNamespace):
    """A tracker that notes its calls, and fails where it is told to."""

    def __init__(self, fail=None):
        super().__init__(calls=[], fail=fail)

    def note(self, call, /, *args, **options):
        self.calls.append((call, args, options))
        if self.fail == call:
            raise ConnectionError("no route to host")

    def init(self, **options):
        self.note("init", **options)

    def log(self, line, step):
        self.note("log", line, step=step)

    def finish(self):
        self.note("finish")


@pytest.fixture
def tracked(tiny, tmp_path, monkeypatch):
    """A function that gives the arguments of a short run that reports to a tracker."""

    def prepare(tracker):
        monkeypatch.setitem(sys.modules, "wandb", tracker)
        return [*stage1_source(tiny, tmp_path), "--steps", "20", "--report-to", "wandb", *HERE]

    return prepare


def test_a_tracker_gets_every_line_of_the_log(tracked, tmp_path):
    tracker = Tracker()
    go(dual, *tracked(tracker))
    lines = (tmp_path / "dual" / "dual.log").read_text().splitlines()
    names = [name for name, _, _ in tracker.calls]
    assert names == ["init", "log", "log", "log", "finish"]
    assert tracker.calls[0][2]["config"]["steps"] == 20
    for line, (_, (reported,), options) in zip(lines[1:], tracker.calls[1:-1]):
        assert reported == json.loads(line)
        assert options["step"] == reported["step"]
    assert "tokens_per_second" in tracker.calls[1][1][0]
    assert "rewards/margins" in tracker.calls[3][1][0]


def test_a_tracker_that_fails_in_the_middle_warns_once_and_the_run_goes_on(tracked, tmp_path):
    tracker = Tracker(fail="log")
    output = go(dual, *tracked(tracker))
    assert output.count("WARNING: no longer reported to wandb: ") == 1
    assert [name for name, _, _ in tracker.calls] == ["init", "log", "finish"]
    assert (tmp_path / "dual" / "good" / "stage.json").exists()


def test_a_tracker_that_is_missing_or_cannot_begin_is_refused(tracked, fails, tmp_path):
    for tracker, words in (
        (None, "pip install wandb"),
        (Tracker(fail="init"), "cannot begin: no route to host"),
    ):
        code, lines = fails(dual, *tracked(tracker))
        assert code == 2
        assert len(lines) == 1
        assert "--report-to wandb" in lines[0] and words in lines[0]
        assert not (tmp_path / "dual" / "good").exists()


def test_trackio_without_account_and_network(tiny, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    source = stage1_source(tiny, tmp_path / "out")
    succeed(dual, *source, "--steps", "10", "--report-to", "trackio", *HERE)
    [database] = (tmp_path / "trackio").glob("rahf*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select * from metrics").fetchall()
    text = str(rows)
    assert "tokens_per_second" in text and "rewards/margins" in text


def test_reward_metrics_by_hand(tokenizer):
    """Against one unpadded forward pass a response."""
    model = make_model("llama")
    adapter = random_adapter(model)
    pairs = encode_pairs(
        tokenizer,
        [
            Pair((("user", "Hi"),), "yes, I do", "no", "valid"),
            Pair((("user", "And you?"),), "no", "I do not know", "valid"),
        ],
    )
    found = score.reward_metrics(model, [adapter], adapter, pairs, "positive", 0.3, 1, 64)

    @torch.no_grad()
    def logps(prompt):
        rows = []
        for response in ("chosen", "rejected"):
            row = []
            for pair in pairs:
                ids, start = pair.input(prompt, response)
                logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                row.append(sum(logits[t - 1, ids[t]].item() for t in range(start, len(ids))))
            rows.append(row)
        return rows

    policy = logps("positive")
    adapter.remove()
    base = logps("plain")
    margins = [0.3 * ((policy[0][i] - base[0][i]) - (policy[1][i] - base[1][i])) for i in range(2)]
    assert found["rewards/margins"] == pytest.approx(sum(margins) / 2, rel=1e-3)
    assert found["rewards/accuracies"] == sum(margin > 0 for margin in margins) / 2
    assert found["logps/chosen"] == pytest.approx(sum(policy[0]) / 2, rel=1e-4)
    assert found["logps/rejected"] == pytest.approx(sum(policy[1]) / 2, rel=1e-4)
    assert not math.isclose(found["logps/chosen"], sum(base[0]) / 2, rel_tol=1e-3)
