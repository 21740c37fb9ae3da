"""The survey and the sweep: their numbers one example at a time, what they recommend and choose, by hand."""
import json

import pytest
import torch

import align
import collect
import data
import dual
import scit
import score
import survey
from conftest import go, succeed
from files import UserError, read_stage
from lora import LoRA, load_adapter, only
from model import hidden_states, load_model, load_tokenizer
from test_model import filled, some_batch

CPU = ["--device", "cpu"]


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_states_moved_onto_an_adapters_give_its_answer(model, layer):
    """The survey's ground: the base with its states in one block put where an adapter up to that block has them says what the adapted model says."""
    batch = some_batch()
    with torch.no_grad():
        before = hidden_states(model.base_model, [layer], batch.ids)[0]
        adapter = filled(model, blocks=layer + 1)
        after = hidden_states(model.base_model, [layer], batch.ids)[0]
        adapted = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits[batch.attention]
        adapter.enabled = False
        with survey.moved(model.base_model, layer, batch.attention, (after - before)[batch.attention]):
            moved = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits[batch.attention]
        base = model(input_ids=batch.ids, attention_mask=batch.attention.long()).logits[batch.attention]
    assert torch.allclose(moved, adapted, atol=1e-4) and not torch.allclose(base, adapted, atol=1e-2)


@pytest.mark.parametrize("method, more", [("scit", []), ("dual", []), ("dual", ["--last-prompt-token", "False", "--tokens-per-pass", "150"])])
def test_figures_one_example_at_a_time(method, more, tiny, tmp_path):
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "10", "--lr", "2e-2", *CPU]
    go(scit if method == "scit" else dual, *source)
    go(collect, "--out", tmp_path, "--method", method, "--survey", "True", *more, *CPU)
    found = json.loads((tmp_path / method / "survey.json").read_text())
    assert not (tmp_path / method / "collect").exists()

    record = read_stage(tmp_path / method / ("adapter" if method == "scit" else "good"), "scit" if method == "scit" else "good", "")["settings"]
    tokenizer, model = load_tokenizer(record["model"]), load_model(record["model"], torch.float32, "cpu")
    pairs = data.prepare(record["data"], ("train", "valid"), tokenizer, record["max_length"], record["seed"])
    adapters = [LoRA(model.base_model, factors=load_adapter(tmp_path / method / name, model.base_model)).eval()
                for name in (("adapter",) if method == "scit" else ("good", "bad"))]
    first = 0 if more else 1                  # with the last prompt token or without

    def states(pair, response):
        """b, h+, h- of one response, [4, T, D] each, in float64, and its plain ids and their prompt's length."""
        found = []
        for prompt, on in (("plain", adapters[:1] if method == "scit" else []), ("positive" if method == "scit" else "plain", adapters[:1]),
                           ("negative" if method == "scit" else "plain", adapters[-1:])):
            ids, start = pair.example(prompt, response)
            with only(adapters, *on), torch.no_grad():
                hidden = hidden_states(model.base_model, range(4), torch.tensor([ids]))
            found.append(torch.stack([h[0, start - first:].double() for h in hidden]))
        return found
    trained = [states(pair, response) for pair in pairs["train"] for response in ("chosen", "rejected")]
    v = torch.cat([up - down for _, up, down in trained], 1)                        # [4, T, D]
    base = torch.cat([b for b, _, _ in trained], 1)
    ratio, mean = (v.norm(dim=2) / base.norm(dim=2)).mean(1), v.mean(1)
    projections, nll, tokens = {"chosen": [], "rejected": []}, torch.zeros(5, len(survey.STRENGTHS), dtype=torch.double), 0
    for pair in pairs["valid"]:
        for response in ("chosen", "rejected"):
            b, up, down = states(pair, response)
            projections[response].append(torch.einsum("ltd,ld->lt", b, mean).mean(1))
        b, up, down = states(pair, "chosen")
        ids, start = pair.example("plain", "chosen")
        tokens += len(ids) - start
        for row in range(5):
            for j, rho in enumerate(survey.STRENGTHS):
                def hook(module, args, output):
                    output[0, start - first:] += (rho / ratio[row - 1] * (up - down)[row - 1]).float()
                    return output
                handle = model.base_model.layers[row - 1].register_forward_hook(hook) if row else None
                with only(adapters, *(adapters[:1] if method == "scit" else [])), torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
                if handle:
                    handle.remove()
                nll[row, j] -= sum(logits[t - 1, ids[t]] for t in range(start, len(ids)))
    nll /= tokens
    assert found["base_nll"] == pytest.approx(nll[0, 0].item(), rel=1e-5)
    chosen, rejected = (torch.stack(projections[name], 1) for name in ("chosen", "rejected"))
    for l, block in enumerate(found["blocks"]):
        assert block["layer"] == l and block["ratio"] == pytest.approx(ratio[l].item(), rel=1e-4)
        assert block["nll"] == pytest.approx(nll[l + 1].tolist(), rel=1e-4)
        wins = sum((a > b).item() for a in chosen[l] for b in rejected[l])
        assert block["auc"] == pytest.approx(wins / len(chosen[l]) / len(rejected[l]), abs=0.01)
        values = torch.linalg.svdvals(v[l]).square()
        assert block["shares"][:3] == pytest.approx((values.cumsum(0) / values.sum())[:3].tolist(), rel=1e-3)


def blocks(*nlls, shares=(0.5, 0.95, 1.0) + (1.0,) * 29):
    return [{"layer": l, "nll": list(nll), "shares": list(shares)} for l, nll in enumerate(nlls)]


def test_recommendation_by_hand():
    """Gains .1, .5, .4 and .2 over the base's 2.0: blocks 1 and 2 reach half of the best; ρ 0.25 has their lowest sum."""
    found = blocks([1.9] * 5, [1.9, 1.6, 1.5, 1.7, 3], [1.95, 1.7, 1.65, 1.6, 3], [1.8] * 5)
    assert survey.recommend(found, 2.0) == ([1, 2], [0.15, 0.25, 0.4], 2, 2)
    assert survey.recommend(blocks([1.9, 2, 3, 3, 3]), 2.0)[:2] == ([0], [0.1, 0.15])                    # at the grid's edge
    assert survey.recommend(blocks(*[[1.5] * 5] * 20), 2.0)[0] == [0, 4, 8, 11, 15, 19]                # six of twenty, the highest among them
    assert survey.recommend(blocks([1.5] * 5, shares=[i / 32 for i in range(1, 33)]), 2.0)[2:] == (None, 29)
    with pytest.raises(UserError, match="train stage 1 longer"):
        survey.recommend(blocks([2.0] * 5, [2.1] * 5), 2.0)


def figures(**changes):
    return {"chosen_nll": 1.0, "own_nll_under_base": 0.5, "repeated_ngrams": 0.01, **changes}


def test_choice_by_hand():
    """The judge counts where there is one, the NLL of chosen replies else; what has collapsed is out, unless all have."""
    plain = {"base": figures(), "a": figures(chosen_nll=0.8), "b": figures(chosen_nll=0.7), "c": figures(chosen_nll=0.1, own_nll_under_base=1.6)}
    best, why = score.choose(plain)
    assert best == "b" and "lowest NLL" in why and "0.700; base 1.000" in why and "c shows a collapse" in why and "strange" in why
    judged = {name: {**row, "judge_greedy": g, "judge_sampled": s} for (name, row), (g, s) in zip(plain.items(), ((0, 0), (0.9, 0.5), (0.6, 0.7), (1, 1)))}
    assert score.choose(judged)[0] == "a" and "best judge (0.700" in score.choose(judged)[1]
    rewarded = {name: {**row, "reward_greedy": g, "reward_sampled": g} for (name, row), g in zip(judged.items(), (-1, -3, -2, 5))}
    assert score.choose(rewarded)[0] == "b" and "best reward (-2.000; base -1.000); WARNING: it is no better than the base" in score.choose(rewarded)[1]
    assert "WARNING" not in why
    assert score.choose({"base": figures(), "a": figures(repeated_ngrams=0.2), "b": figures(repeated_ngrams=0.3, chosen_nll=0.5)})[0] == "b"


def make_trunk(world):
    return load_model(str(world[0]), torch.float32, "cpu").base_model


def test_sweep_keeps_every_adapter_and_marks_the_best(world, tmp_path):
    """Each adapter is the one that its setting alone gives, byte for byte; the collapsed one is named and not chosen; align is the best."""
    succeed("dual.py", "--model", world[0], "--data", world[1], "--out", tmp_path, "--steps", "100", *CPU)
    go(collect, "--out", tmp_path, "--layers", "1", "2", *CPU)
    said = go(align, "--out", tmp_path, "--strength", "0.02", "0.25", "4", "--judge", "toy:judge", "--max-new-tokens", "24", "--steps", "80", "--merge", "True", *CPU)
    folder = tmp_path / "dual" / "sweep"
    found = json.loads((folder / "sweep.json").read_text())
    rows = found["models"]
    assert list(rows) == ["base", "strength_0.02", "strength_0.25", "strength_4"] and found["best"] == "strength_0.25" and "best judge" in found["why"]
    assert rows["strength_0.25"]["judge_greedy"] > rows["strength_0.02"]["judge_greedy"] + 0.2
    assert "strength_4 shows a collapse" in found["why"] and score.collapsed(rows["strength_4"], rows["base"]) and not score.collapsed(rows["strength_0.25"], rows["base"])
    text = (folder / "sweep.md").read_text()
    assert text.count("\n| ") == 5 and "best: strength_0.25" in text and text in said + "\n" and f"{rows['base']['chosen_nll']:.3f}" in text
    weights = {name: (folder / name / "adapter_model.safetensors").read_bytes() for name in list(rows)[1:]}
    assert len(set(weights.values())) == 3
    assert (tmp_path / "dual" / "align" / "adapter_model.safetensors").read_bytes() == weights["strength_0.25"]
    record = read_stage(tmp_path / "dual" / "align", "align", "")
    assert record["settings"]["strength"] == 0.25 and record["settings"]["alpha"] is None
    assert found["settings"]["data"] == [str(world[1])]
    assert read_stage(tmp_path / "dual" / "merged", "merged", "")["settings"]["strength"] == 0.25
    merged = load_model(str(tmp_path / "dual" / "merged"), torch.float32, "cpu")
    down = "layers.1.mlp.down_proj"
    A, B = load_adapter(tmp_path / "dual" / "align", make_trunk(world)).weights[down]
    assert torch.allclose(merged.base_model.get_submodule(down).weight, make_trunk(world).get_submodule(down).weight + 2 * B @ A, atol=1e-6)
    # the base's row is what evaluate measures on the same pairs
    tokenizer, model = load_tokenizer(str(world[0])), load_model(str(world[0]), torch.float32, "cpu")
    pairs = data.prepare([world[1]], ("valid",), tokenizer, 256, 0)["valid"]
    assert rows["base"]["chosen_nll"] == pytest.approx(score.preferences(model, pairs, "plain", tokenizer.pad_token_id)[2], rel=1e-5)
    for name, value in (("strength_0.25", "0.25"), ("strength_4", "4")):
        go(align, "--out", tmp_path, "--strength", value, "--steps", "80", *CPU)
        assert (tmp_path / "dual" / "align" / "adapter_model.safetensors").read_bytes() == weights[name]
    said = go(align, "--out", tmp_path, "--alpha", "-0.5", "1", "1e30", "--kind", "mse", "--steps", "2", "--max-new-tokens", "2", *CPU)
    assert "WARNING: left out: align-alpha_1e+30: the loss is inf at step 1" in said and "merged is of an earlier adapter" in said
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"alpha_-0.5", "alpha_1"}                # nothing of the sweep before


def test_a_sweep_fails_at_its_start_where_its_end_would(tiny, tmp_path, capfd):
    (tmp_path / "pairs.jsonl").write_bytes((tiny / "pairs.jsonl").read_bytes())
    go(dual, "--model", tiny / "model", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path, "--steps", "2", *CPU)
    go(collect, "--out", tmp_path, *CPU)
    (tmp_path / "pairs.jsonl").unlink()
    for more, words in (([], "pairs.jsonl"), (["--judge", "no:such"], "--judge"), (["--reward-model", "./no"], "--reward-model"), (["--strength", "0.2", "0.2"], "each once"),
                        (["--alpha", "nan", "1"], "nan is no number"), (["--alpha", "inf", "1"], "finite")):
        values = [] if more and more[0] in ("--strength", "--alpha") else ["--alpha", "1", "2"]
        capfd.readouterr()
        with pytest.raises(SystemExit):
            go(align, "--out", tmp_path, *values, *more, *CPU)
        assert words in (err := capfd.readouterr().err) and len(err.strip().splitlines()) == 1, err
    assert not (tmp_path / "dual" / "sweep").exists()


def test_survey_where_nothing_differs_and_of_a_sorted_file(tiny, tmp_path, capfd):
    go(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", "--lr", "0", *CPU)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        go(collect, "--out", tmp_path, "--survey", "True", *CPU)
    assert "h+ and h- must differ" in capfd.readouterr().err
    drawn = data.sample(list(range(1000)), 100, 0)
    assert len(set(drawn)) == 100 and 300 < sum(drawn) / 100 < 700 and drawn == data.sample(list(range(1000)), 100, 0) != data.sample(list(range(1000)), 100, 1)
