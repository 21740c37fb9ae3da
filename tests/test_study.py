"""The study of wrong labels in small: its pieces by hand, one experiment on the smaller world."""

import json
import math
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SMALL_WORLD, make_model, random_adapter

import collect
from common import toy
from common.data import encode_pairs
from common.pairs import parse_row
from lora import load_adapter
from studies import shared, start, toy_base
from studies import wrong_labels as study
from studies.shared import swap_labels


@pytest.fixture(scope="module")
def pairs(tokenizer):
    requests = toy.split_requests(list(toy.ASK), 0)
    rows = toy.preference_rows(requests, 40, random.Random(0))
    return encode_pairs(tokenizer, [parse_row(row, 0)[0] for row in rows[:3]])


def test_swap_exchanges_that_share_of_the_training_rows_alone():
    rows = []
    for i in range(70):
        split = "train" if i < 50 else "test"
        rows.append({"chosen": f"good {i}", "rejected": f"bad {i}", "split": split})
    swapped = swap_labels(rows, 0.3, seed=1)
    wrong = [i for i in range(70) if swapped[i] != rows[i]]
    assert len(wrong) == 15 and max(wrong) < 50 and wrong != list(range(15))
    for i in wrong:
        assert swapped[i] == {"chosen": f"bad {i}", "rejected": f"good {i}", "split": "train"}
    assert swap_labels(rows, 0.3, seed=1) == swapped
    assert swap_labels(rows, 0.0, seed=1) == rows


@torch.no_grad()
def log_probability(model, pair, response):
    """log π(r | q), a sum over the response's tokens: one unpadded forward."""
    ids, start = pair.input("plain", response)
    logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    targets = torch.tensor(ids[start:])
    return logits.log_softmax(-1)[start - 1 : -1].gather(1, targets[:, None]).sum().item()


def test_dpo_loss_by_the_equation(pairs):
    model = make_model("llama").double()
    base_margins = []
    for pair in pairs:
        chosen, rejected = (log_probability(model, pair, r) for r in ("chosen", "rejected"))
        base_margins.append(chosen - rejected)
    adapter = random_adapter(model)
    terms = []
    for pair, base_margin in zip(pairs, base_margins):
        chosen, rejected = (log_probability(model, pair, r) for r in ("chosen", "rejected"))
        # -log σ(β Δ) = log(1 + exp(-β Δ)) with β = 0.1
        terms.append(math.log1p(math.exp(-0.1 * (chosen - rejected - base_margin))))
    loss = study.dpo_loss(model, adapter, pairs, 1)
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-4)
    loss.backward()
    assert all(A.grad.abs().max() > 0 for A in adapter.A)


def test_interval_by_hand():
    """Seed means .2, .4, .6, .8 and 1: mean .6, standard deviation 0.3162, t = 2.776."""
    values = np.array([[mean - 0.1, mean + 0.1] for mean in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert study.interval(values) == pytest.approx([0.6, 0.6 - 0.3926, 0.6 + 0.3926], abs=1e-3)


GOOD = {"greedy": "11", "sampled": ["10"]}
BAD = {"greedy": "10", "sampled": ["00"]}


def validation_scores(share, best):
    """Hand-made verdicts of all settings, good at {method: its best value} and for strength 2."""
    tried = {
        "sft": study.SFT_STEPS,
        "dpo": study.DPO_LRS,
        "weights": study.LAMBDAS[share >= 0.3],
        "dual": study.ALPHAS["dual"][share >= 0.3],
        "scit": study.ALPHAS["scit"][share >= 0.3],
    }
    scores = {}
    for name, values in tried.items():
        for value in values:
            scores[f"{name} {value:g}"] = GOOD if value == best[name] else BAD
    for method in study.METHODS:
        for form in study.FORMS:
            scores[study.form_name(method, form)] = GOOD if form["strength"] == 2 else BAD
    return scores


def test_the_best_settings_are_chosen_at_each_share(monkeypatch, capsys):
    """And one form for all shares; a value at the edge of those tried is reported."""
    monkeypatch.setattr(study, "FORMS", [{"strength": 1}, {"strength": 2}])
    clean = {"sft": 150, "dpo": 3e-4, "weights": 1.0, "dual": 1.0, "scit": 0.25}
    wrong = {"sft": 300, "dpo": 3e-4, "weights": 2.0, "dual": 1.0, "scit": 0.25}
    scores = {"0.0": validation_scores(0.0, clean), "0.3": validation_scores(0.3, wrong)}
    chosen = study.choose_settings({"0": scores, "1": scores})
    assert chosen == {"form": {"strength": 2}, "shares": {"0.0": clean, "0.3": wrong}}
    assert "scit 0.25 is at the edge" in capsys.readouterr().out


@pytest.fixture
def experiment(world, tmp_path):
    """One seed of the smaller world with 30% wrong labels."""
    seed_folder = tmp_path / "seed0"
    seed_folder.mkdir()
    (seed_folder / "toy").symlink_to(world[0].parent.parent)
    config = study.Config(phase="measure", work=str(tmp_path))
    world_config = toy.Config(out=str(seed_folder), **SMALL_WORLD)
    return study.Experiment(config, 0, 0.3, world_config)


def test_one_experiment(experiment, world):
    """Few steps: swapped data reach the stages, λ scales weights, verdicts are of test pairs."""
    clean = world[1].read_text().splitlines()
    used = Path(experiment.source["data"][0]).read_text().splitlines()
    pairs_of_rows = zip(map(json.loads, clean), map(json.loads, used))
    assert sum(a["chosen"] != b["chosen"] for a, b in pairs_of_rows) == 90

    experiment.run_stage(study.dual, seed=0, steps=60, **experiment.source)
    folder, trunk = experiment.out / "dual", experiment.model.base_model
    good, bad = (load_adapter(folder / name, trunk) for name in ("good", "bad"))
    base = experiment.score(None)
    assert experiment.score(study.weight_difference(good, bad, 0.0)) == base

    sft = experiment.score(experiment.sft(60))
    weights = experiment.score(experiment.weights(1.0))
    for score in (base, sft, weights):
        assert [len(run) for run in (score["greedy"], *score["sampled"])] == [180] * 4
    assert study.mean(sft["greedy"]) >= study.mean(base["greedy"]) + 0.1

    scores = {"base": base, "sft": sft, "weights": weights}
    table = study.summarize({"0": {"0.3": scores}, "1": {"0.3": scores}})["0.3"]
    assert table["sft"]["greedy"][0] == pytest.approx(study.mean(sft["greedy"]), abs=1e-4)
    assert table["sft"]["sampled_minus_sft"] == [0, 0, 0]
    expected = study.mean(*weights["sampled"]) - study.mean(*sft["sampled"])
    assert table["weights"]["sampled_minus_sft"][0] == pytest.approx(expected, abs=2e-4)


def test_scores_are_kept_and_resumed(tmp_path):
    class CountingExperiment:
        out = tmp_path
        calls = 0

        def score(self, weights):
            self.calls += 1
            return {"greedy": "1", "sampled": ["0"], "of": weights}

    experiment = CountingExperiment()
    for settings, calls in (("a", 2), ("a", 2), ("b", 4)):
        scores = study.Scores(experiment, "choose", settings)
        scores.add("base")
        scores.add("sft 75", str, 75)
        assert experiment.calls == calls
        assert scores["sft 75"]["of"] == "75" and scores["base"]["of"] is None


# ---------------------------------------------------------------- align's start


def test_the_cut_is_the_best_approximation_of_its_rank():
    model = make_model("llama")
    weights = random_adapter(model, rank=6, alpha=9).weights()
    for rank in (2, 6):
        cut = start.cut_to_rank(weights, rank)
        for name, (A, B) in weights.tensors.items():
            delta = (weights.alpha / weights.rank) * B @ A
            U, S, Vh = torch.linalg.svd(delta)
            expected = U[:, :rank] * S[:rank] @ Vh[:rank]
            low_A, low_B = cut.tensors[name]
            assert low_A.shape[0] == low_B.shape[1] == cut.rank == rank
            torch.testing.assert_close(cut.alpha / cut.rank * low_B @ low_A, expected)


def test_the_study_of_starts(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    config = start.Config(out=str(copy), steps=20)
    start.main(config)
    result = json.loads((tmp_path / "start.json").read_text())["collected in"]["float32"]
    # the base is α |v| away from its target
    manifest = json.loads((copy / "dual" / "collect" / "stage.json").read_text())
    distance, alpha = result["base"]["distance"], result["base"]["alpha"]
    assert distance == pytest.approx(alpha * manifest["norm_v"][0], rel=0.2)
    for name in ("trained from nothing", "trained from the cut sum"):
        losses = result[name]["losses"]
        assert list(losses) == ["10", "20"]
    assert result["trained from nothing"]["distance"] < distance
    rounding = result["rounding of b"]["distance"]
    assert rounding < 1e-3 * distance
    # a second collection is a second run
    states = {"layers": manifest["settings"]["layers"], "compute_dtype": "bfloat16"}
    collect.main(collect.Config(out=str(copy), method="dual", **states))
    start.main(config)
    runs = json.loads((tmp_path / "start.json").read_text())["collected in"]
    assert runs["float32"] == result
    assert runs["bfloat16"]["rounding of b"]["distance"] > 10 * rounding
    assert f"| base | {distance:.2f} |" in start.table(runs)


def test_muon_takes_the_matrices_of_the_blocks_and_its_updates_are_orthogonal():
    """In float32 within eight bits of what it does in bfloat16."""
    updates = []
    for context in (nullcontext(), toy_base.in_float32()):
        model = make_model("llama")
        muon, adamw = toy_base.make_optimizers(model, 1e-3, 1.0)
        trained = [p for o in (muon, adamw) for group in o.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in model.parameters()}
        matrices = [p for group in muon.param_groups for p in group["params"]]
        assert len(matrices) == 7 * model.config.num_hidden_layers
        matrix = matrices[0]
        before = matrix.detach().clone()
        matrix.grad = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(0))
        muon.param_groups[0]["weight_decay"] = 0.0
        with context:
            muon.step()
        updates.append(matrix.detach() - before)
    singular = torch.linalg.svdvals(updates[1])
    assert singular.min() > 0.3 and singular.max() < 1.3
    assert 0 < (updates[0] - updates[1]).norm() < 0.03 * updates[1].norm()


def test_the_study_of_the_bases_optimizer(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_base, "RESULTS", tmp_path)
    monkeypatch.setattr(shared, "RESULTS", tmp_path)
    monkeypatch.setattr(toy, "Config", partial(toy.Config, documents=300, width=16, blocks=2))
    config = toy_base.Config(steps=[1, 12], documents=50)
    toy_base.main(config)
    found = json.loads((tmp_path / "toy_base.json").read_text())
    nll = {(line["optimizer"], line["steps"]): line["nll"] for line in found["runs"]}
    assert len(nll) == 2 * len(toy_base.OPTIMIZERS)
    for name in toy_base.OPTIMIZERS:
        assert nll[name, 12] < nll[name, 1] < 7
    # a later call has nothing left to do
    toy_base.main(config)
    assert json.loads((tmp_path / "toy_base.json").read_text())["runs"] == found["runs"]
