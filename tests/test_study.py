"""The study of wrong labels in small: its pieces by hand, and one unit on the smaller world."""
import json
import math

import numpy as np
import pytest
import torch

import study_wrong_labels as study
import toy
from conftest import SMALL_WORLD
from lora import LoRA, load_adapter
from test_losses import log_p, pairs  # noqa: F401


def test_swap_exchanges_just_that_share_of_training_rows():
    rows = [{"chosen": f"good {i}", "rejected": f"bad {i}", "split": "train" if i < 50 else "test"} for i in range(70)]
    swapped = study.swap(rows, 0.3, seed=1)
    wrong = [i for i, (a, b) in enumerate(zip(rows, swapped)) if a != b]
    assert len(wrong) == 15 and max(wrong) < 50 and wrong != list(range(15))
    assert all(swapped[i] == {"chosen": f"bad {i}", "rejected": f"good {i}", "split": "train"} for i in wrong)
    assert study.swap(rows, 0.3, seed=1) == swapped and study.swap(rows, 0.0, seed=1) == rows


def test_dpo_loss_by_the_equation(pairs):  # noqa: F811
    from conftest import make_model
    model = make_model("llama").double()
    reference = [[sum(log_p(model, *pair.example("plain", response))) for response in ("chosen", "rejected")] for pair in pairs[:3]]
    adapter = LoRA(model.base_model)
    with torch.no_grad():
        for B in adapter.B:
            B.normal_(std=0.05)
    terms = []
    for pair, (chosen, rejected) in zip(pairs[:3], reference):
        margin = sum(log_p(model, *pair.example("plain", "chosen"))) - chosen - sum(log_p(model, *pair.example("plain", "rejected"))) + rejected
        terms.append(math.log1p(math.exp(-0.1 * margin)))
    loss = study.dpo_loss(model, adapter, pairs[:3], 1)
    assert loss.item() == pytest.approx(sum(terms) / 3, rel=1e-4)
    loss.backward()
    assert all(A.grad.abs().max() > 0 for A in adapter.A)


def test_interval_by_hand():
    """Seed means .2, .4, .6, .8 and 1: mean .6, standard deviation 0.3162, t = 2.776."""
    values = np.array([[m - 0.1, m + 0.1] for m in (0.2, 0.4, 0.6, 0.8, 1.0)])
    assert study.interval(values) == pytest.approx([0.6, 0.6 - 0.3926, 0.6 + 0.3926], abs=1e-3)


def test_choice_takes_the_best_of_each(monkeypatch, capsys):
    """A hand-made validation table: one best value a share, the new form the same for all, an edge said."""
    monkeypatch.setattr(study, "FORMS", [{"strength": 1}, {"strength": 2}])
    good, bad = {"greedy": "11", "sampled": ["10"]}, {"greedy": "10", "sampled": ["00"]}

    def row(share):
        names = {"sft": study.STEPS, "dpo": study.LRS, "weights": study.LAMBDAS[share >= 0.3], **{m: study.ALPHAS[m][share >= 0.3] for m in study.METHODS}}
        best = {"sft": 300 if share else 150, "dpo": 3e-4, "weights": 2.0 if share else 1.0, "dual": 1.0, "scit": 0.25}
        return {f"{name} {x:g}": good if x == best[name] else bad for name, xs in names.items() for x in xs} | {
            f'{m} form {{"strength": {x}}}': good if x == 2 else bad for m in study.METHODS for x in (1, 2)}
    found = study.choose({seed: {str(share): row(share) for share in (0.0, 0.3)} for seed in "01"})
    assert found == {"form": {"strength": 2}, "shares": {"0.0": {"sft": 150, "dpo": 3e-4, "weights": 1.0, "dual": 1.0, "scit": 0.25},
                                                         "0.3": {"sft": 300, "dpo": 3e-4, "weights": 2.0, "dual": 1.0, "scit": 0.25}}}
    assert "scit 0.25 is at the edge" in capsys.readouterr().out


def test_one_unit(world, tmp_path):
    """30% wrong labels, few steps: swapped data reach the stages; λ moves weights; verdicts are of the test pairs."""
    config = study.Config(phase="measure", work=str(tmp_path))
    settings = dict(zip((name.removeprefix("--") for name in SMALL_WORLD[::2]), SMALL_WORLD[1::2]))
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "toy").symlink_to(world[0].parent.parent)
    unit = study.Unit(config, 0, 0.3, toy.Config(out=str(tmp_path / "seed0"), kinds=settings["kinds"], blocks=int(settings["blocks"]), lr=float(settings["lr"]),
                                                 pairs=int(settings["pairs"]), steps=int(settings["steps"]), documents=int(settings["documents"])))
    clean = [json.loads(line) for line in open(world[1])]
    used = [json.loads(line) for line in open(unit.source["data"][0])]
    assert sum(a["chosen"] != b["chosen"] for a, b in zip(clean, used)) == 90
    unit.stage(study.dual, seed=0, steps=60, **unit.source)
    good, bad = (load_adapter(unit.out / "dual" / name, unit.model.base_model) for name in ("good", "bad"))
    assert unit.score(study.difference(good, bad, 0.0)) == unit.score(None)
    scores = {name: unit.score(factors) for name, factors in (("base", None), ("sft", unit.sft(60)), ("weights", unit.weights(1.0)))}
    assert all(len(run) == 180 for score in scores.values() for run in [score["greedy"], *score["sampled"]]) and len(scores["sft"]["sampled"]) == 3
    assert study.mean(scores["sft"]["greedy"]) >= study.mean(scores["base"]["greedy"]) + 0.1
    table = study.summary({"0": {"0.3": scores}, "1": {"0.3": scores}})["0.3"]
    assert table["sft"]["greedy"][0] == pytest.approx(study.mean(scores["sft"]["greedy"]), abs=1e-4) and table["sft"]["sampled_minus_sft"] == [0, 0, 0]
    assert table["weights"]["sampled_minus_sft"][0] == pytest.approx(study.mean(*scores["weights"]["sampled"]) - study.mean(*scores["sft"]["sampled"]), abs=2e-4)
