"""Whole runs by command line, on a smaller world and on the real tiny model: their numbers, not
just that they run."""

import functools
import json
import re
import shutil
import weakref

import pytest
import torch
from helpers import CPU, HERE, SHARED, go, listing, load_pairs, make_model, stage1_source, suited
from safetensors.torch import load_file

import align
import collect
import dual
import evaluate
import scit
from common import score, stage1, toy
from common.answers import GenerationSettings, attached, generate, kl_to_base
from common.collection import Collection, principal_directions
from common.config import parse_command_line
from common.data import prepare_pairs
from common.hf import hidden_states, load_model, load_tokenizer
from common.stages import read_stage
from lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoRA, load_adapter
from tools import export, sweep

METHODS = ("scit", "dual")
LAYERS = ["--layers", "1", "2"]


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Both methods, run on the smaller world: (folder, what align printed for both methods). Not
    to be changed."""
    out = tmp_path_factory.mktemp("runs")
    source = ["--model", world[0], "--data", world[1], "--out", out, "--dtype", "float32"]
    outputs = {}
    for stage, method, steps in ((dual, "dual", 100), (scit, "scit", 200)):
        go(stage, *source, *suited(stage), "--steps", steps, *HERE)
        later = ["--out", out, "--method", method, *HERE]
        base = "stage1" if method == "scit" else "original"
        go(collect, *later, *LAYERS, "--base", base)
        outputs[method] = go(align, *later, *suited(align))
    return out, outputs


@pytest.fixture
def collected(runs, tmp_path):
    """A folder with the collections of the runs alone, in which a test may run align."""
    out, _ = runs
    for method in METHODS:
        shutil.copytree(out / method / "collect", tmp_path / method / "collect")
    return tmp_path


def manifest_of(folder, kind="align"):
    return read_stage(folder, kind, "")


def adapted_model(world, folder):
    """The base model of the smaller world with a written adapter."""
    model = load_model(str(world[0]), "float32", "cpu")
    LoRA(model.base_model, weights=load_adapter(folder, model.base_model)).eval()
    return model


@torch.no_grad()
def adapted_logits(world, folder):
    """Logits [1, 198, V] of the base model with a written adapter, at some ids."""
    ids = torch.arange(2, 200)[None]
    return adapted_model(world, folder)(input_ids=ids).logits


def relative_difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


# ---------------------------------------------------------------- does it work?


def test_alignment_works(runs):
    """Aligned models answer right and politely much more often than the base of their LoRA."""
    out, _ = runs
    go(evaluate, "--out", out, "--judge", "common.toy:judge", "--limit", "90", *HERE)
    models = json.loads((out / "evaluate" / "report.json").read_text())["models"]
    scit_models = {"scit_plus", "scit_minus", "scit_plain", "scit_aligned"}
    assert set(models) == {"base", "base_plus", *scit_models, "good", "bad", "dual_aligned"}
    for model in models.values():
        assert set(model) == {
            "preference_accuracy",
            "preference_margin",
            "chosen_nll",
            "judge_greedy",
            "judge_sampled",
            "implicit_scit_greedy",
            "implicit_scit_sampled",
            "implicit_dual_greedy",
            "implicit_dual_sampled",
            "kl_to_base",
            "kl_error",
            "kl_per_token",
            "own_nll_under_base",
            "repeated_ngrams",
            "mean_length",
            "ended",
        }
    greedy = {name: model["judge_greedy"] for name, model in models.items()}
    assert greedy["base"] <= 0.65
    assert greedy["scit_minus"] <= 0.1
    assert greedy["scit_aligned"] >= greedy["scit_plain"] + 0.1
    assert greedy["dual_aligned"] >= greedy["base"] + 0.3
    # The small base model is trained from scratch and differs between machines: on one the good and
    # DUAL's aligned model had 0.63, with a base that was never right; on others over 0.7.
    minima = {"scit_plus": 0.4, "scit_aligned": 0.55, "good": 0.55, "dual_aligned": 0.55}
    for name, minimum in minima.items():
        assert greedy[name] >= minimum, (name, models[name])
        assert models[name]["preference_accuracy"] >= 0.9, (name, models[name])
        assert models[name]["repeated_ngrams"] < 0.05, (name, models[name])
    assert models["bad"]["preference_accuracy"] < 0.5
    assert models["scit_minus"]["preference_margin"] < 0

    lines = (out / "evaluate" / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 9 * 2 * 90
    scores = [
        row["judge"]
        for row in samples
        if row["generator"] == "dual_aligned" and row["temperature"] == 0
    ]
    assert sum(scores) / len(scores) == pytest.approx(greedy["dual_aligned"])


def test_an_adapter_is_scaled_to_the_kl_that_was_asked_for(world, collected):
    """Measured on other answers; the checkpoint of a --kl out of reach serves the next one."""
    args = ["--out", collected, "--method", "dual", *suited(align), *HERE]
    with pytest.raises(SystemExit):
        go(align, *args, "--kl", "500")
    assert (collected / "dual" / ".checkpoint-align").exists()
    output = go(align, *args, "--kl", "1.5")
    assert "resuming after step 150" in output
    manifest = manifest_of(collected / "dual" / "align")
    weights = load_file(collected / "dual" / "align" / ADAPTER_WEIGHTS)
    config = json.loads((collected / "dual" / "align" / ADAPTER_CONFIG).read_text())
    assert config["lora_alpha"] == pytest.approx(16 * manifest["scale"])
    assert f"scaled by {manifest['scale']:.3g}: KL" in output

    tokenizer = load_tokenizer(str(world[0]))
    pairs = prepare_pairs([world[1]], ("test",), tokenizer, 256, 0)["test"]
    prompts = [pair.prompts["plain"].tolist() for pair in pairs]
    generation = GenerationSettings(64, 64, seed=5)
    model = load_model(str(world[0]), "float32", "cpu")
    with attached(model, load_adapter(collected / "dual" / "align", model.base_model)) as adapter:
        answers = generate(model, tokenizer, prompts, generation, sample=True)
        kl = kl_to_base(model, adapter, prompts, prompts, answers, tokenizer.pad_token_id)
    assert 1.5 / 1.25 < sum(kl) / len(kl) < 1.5 * 1.25

    # the weights themselves are those that were trained
    go(align, *args)
    unscaled = load_file(collected / "dual" / "align" / ADAPTER_WEIGHTS)
    assert all(torch.equal(weights[name], unscaled[name]) for name in weights)


def test_validation_states_reach_their_target(runs):
    out, outputs = runs
    for method in METHODS:
        manifest = manifest_of(out / method / "align")
        for start, end in zip(manifest["distance_start"], manifest["distance_end"]):
            assert end < 0.6 * start
        collection = manifest_of(out / method / "collect", "collect")
        ratios, alpha = collection["ratio"], manifest["alpha"]
        assert alpha == pytest.approx(0.25 * len(ratios) / sum(ratios))
        assert f"α {alpha:.3g}\n" in outputs[method]
        for layer, ratio in zip(collection["settings"]["layers"], ratios):
            assert f"layer {layer}: α|v|/|b| {alpha * ratio:.2f}" in outputs[method]


@pytest.mark.parametrize("method", METHODS)
def test_the_written_adapter_applies_to_the_original_base_alone(method, runs, world):
    """Distances measured afresh, one response at a time, from the written adapter on the whole
    original model, are those that align reported."""
    out, _ = runs
    manifest = manifest_of(out / method / "align")
    layers, alpha = manifest["settings"]["layers"], manifest["alpha"]
    model = adapted_model(world, out / method / "align")
    collection = manifest_of(out / method / "collect", "collect")
    sums, tokens = torch.zeros(len(layers)), 0
    for name in collection["validation_shards"]:
        shard = load_file(out / method / "collect" / name)
        id_start = row_start = 0
        for length, first in zip(shard["lengths"].tolist(), shard["starts"].tolist()):
            ids = shard["ids"][id_start : id_start + length].long()[None]
            rows = slice(row_start, row_start + length - first)
            with torch.no_grad():
                states = hidden_states(model.base_model, layers, ids)
            for i, layer in enumerate(layers):
                b, plus, minus = (
                    shard[f"{kind}.{layer}"][rows] for kind in ("base", "plus", "minus")
                )
                target = b + alpha * (plus - minus)
                sums[i] += (states[i][0, first:] - target).norm(dim=1).sum()
            id_start += length
            row_start = rows.stop
        tokens += row_start
    assert (sums / tokens).tolist() == pytest.approx(manifest["distance_end"], rel=1e-3)


def test_prompt_shows_base_and_aligned_side_by_side(runs):
    out, _ = runs
    output = go(evaluate, "--out", out, "--prompt", "Hello, I am Ada.", *HERE)
    names = re.findall(r"^ *(\w+): \S", output, re.MULTILINE)
    assert names == ["base", "scit_aligned", "dual_aligned"]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model and pairs are not at hand")
def test_real_weights_and_real_pairs(tmp_path):
    """A short run of both methods on a real tiny model and real pairs."""
    source = ["--model", SHARED / "models/stories260K"]
    source += ["--data", SHARED / "data/hh_harmless_test.jsonl.gz"]
    source += ["--out", tmp_path, "--limit", "150", "--max-length", "200", *HERE]
    source += ["--dtype", "float32"]
    go(dual, *source, "--steps", "30", "--batch-size", "4")
    go(collect, "--out", tmp_path, "--limit", "60", *HERE)
    go(align, "--out", tmp_path, "--steps", "60", "--batch-size", "8", *HERE)
    manifest = manifest_of(tmp_path / "dual" / "align")
    for start, end in zip(manifest["distance_start"], manifest["distance_end"]):
        assert end <= 0.6 * start
    go(scit, *source, "--steps", "6")
    later = ["--out", tmp_path, "--method", "scit", *HERE]
    go(collect, *later, "--limit", "20")
    go(align, *later, "--steps", "20")
    go(evaluate, "--out", tmp_path, "--limit", "8", "--max-new-tokens", "8", *HERE)
    report = json.loads((tmp_path / "evaluate" / "report.json").read_text())["models"]
    assert len(report) == 9
    for model in report.values():
        assert "judge_greedy" not in model
        assert model["chosen_nll"] > 0


# ---------------------------------------------------------------- what align makes of a collection


def test_the_difference_alone_trains_the_same_adapter(runs, world, tmp_path):
    """--store diff: two thirds of the bytes, the same logits within 1e-5."""
    out, _ = runs
    shutil.copytree(out / "dual", tmp_path / "dual")
    go(collect, "--out", tmp_path, "--store", "diff", *LAYERS, *HERE)
    go(align, "--out", tmp_path, *suited(align), *HERE)
    full = manifest_of(out / "dual" / "collect", "collect")
    diff = manifest_of(tmp_path / "dual" / "collect", "collect")
    assert diff["token_bytes"] < 0.7 * full["token_bytes"]
    expected = adapted_logits(world, out / "dual" / "align")
    logits = adapted_logits(world, tmp_path / "dual" / "align")
    assert relative_difference(logits, expected) <= 1e-5


def test_without_stored_base_align_trains_the_same_adapter(runs, world, tmp_path):
    """b comes from the model with the adapter off, and v alone is on disk, for both methods."""
    out, _ = runs
    for method in METHODS:
        shutil.copytree(out / method, tmp_path / method)
        later = ["--out", tmp_path, "--method", method, *HERE]
        training = ["--rank", "8", "--steps", "15"]
        base = "stage1" if method == "scit" else "original"
        folder = tmp_path / method / "align"
        go(align, *later, *training)
        expected, before = adapted_logits(world, folder), manifest_of(folder)
        go(collect, *later, *LAYERS, "--base", base, "--store", "diff", "--store-base", "no")
        collection = manifest_of(tmp_path / method / "collect", "collect")
        assert collection["token_bytes"] == 2 * collection["hidden_size"] * 4
        go(align, *later, *training)
        after = manifest_of(folder)
        assert relative_difference(adapted_logits(world, folder), expected) <= 1e-3
        assert after["distance_start"] == pytest.approx(before["distance_start"], rel=1e-3)
        assert after["distance_end"] == pytest.approx(before["distance_end"], rel=1e-2)


def test_all_directions_are_the_papers_form(collected, world):
    """--rank D is the same adapter as without directions, within rounding; a small rank is not."""
    logits = {}
    for name, rank in (("paper", []), ("all", ["--rank", "128"]), ("two", ["--rank", "2"])):
        args = ["--out", collected, "--method", "dual", "--alpha", "1", "--steps", "15", *HERE]
        output = go(align, *args, *rank)
        assert output.count(" directions hold ") == (2 if rank else 0)
        logits[name] = adapted_logits(world, collected / "dual" / "align")
    assert relative_difference(logits["all"], logits["paper"]) <= 1e-4
    assert relative_difference(logits["two"], logits["paper"]) > 1e-4


def test_directions_are_those_of_numpy(runs):
    """U and its share of |v|² against a singular value decomposition, v U^T U and |v|/|b| against
    their formulas, from the shards themselves."""
    out, _ = runs
    folder, layers, k = out / "dual" / "collect", [1, 2], 3
    manifest = manifest_of(folder, "collect")
    paths = [folder / name for name in manifest["shards"]]
    collection = Collection(paths, layers, "full", pad_id=1)
    device = torch.device("cpu")
    directions, shares = principal_directions(collection.differences(device, 2048), k)

    shards = [load_file(path) for path in paths]
    validation = [load_file(folder / name) for name in manifest["validation_shards"]]
    everything = range(len(collection.responses))
    collection.directions = directions
    batch = collection.read(everything, device)
    assert batch.minus is None
    for i, layer in enumerate(layers):
        v = torch.cat([difference_in(shard, layer) for shard in shards])  # [T, D]
        _, values, vectors = torch.linalg.svd(v, full_matrices=False)
        U = directions[i].double()
        assert torch.allclose((U @ vectors[:k].T).abs(), torch.eye(k).double(), atol=1e-3)
        energy = values.square().cumsum(0) / values.square().sum()
        assert shares[i] == pytest.approx(energy.tolist(), rel=1e-3)
        projected = v @ vectors[:k].T @ vectors[:k]
        assert torch.allclose(batch.plus[i].double(), projected, atol=1e-3 * v.abs().max().item())
        ratios = []
        for shard in [*shards, *validation]:
            norms = shard[f"base.{layer}"].double().norm(dim=1)
            ratios.append(difference_in(shard, layer).norm(dim=1) / norms)
        assert manifest["ratio"][i] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-4)


def difference_in(shard, layer):
    """v = h+ - h- of a shard's tensors, float64 [T, D]."""
    return (shard[f"plus.{layer}"] - shard[f"minus.{layer}"]).double()


def test_strength_is_the_mean_share_of_length(runs, collected):
    args = ["--out", collected, "--method", "dual", "--strength", "0.3", "--steps", "1", *HERE]
    output = go(align, *args)
    manifest = manifest_of(collected / "dual" / "align")
    ratios = manifest_of(collected / "dual" / "collect", "collect")["ratio"]
    assert manifest["alpha"] == pytest.approx(0.3 / (sum(ratios) / 2))
    assert f"layer 1: α|v|/|b| {manifest['alpha'] * ratios[0]:.2f}" in output
    # the new adapter changes nothing yet: its states are α |v| away from their targets
    shard = load_file(collected / "dual" / "collect" / "validation-shard-00000.safetensors")
    distances = []
    for layer in (1, 2):
        distances.append(manifest["alpha"] * difference_in(shard, layer).norm(dim=1).mean().item())
    assert manifest["distance_start"] == pytest.approx(distances, rel=1e-3)


def test_alpha_0_starts_at_the_target(runs, collected, tmp_path):
    """The recorded states b are the base's: at α = 0 the first distance is at most 1e-6 |h| in
    fp32, and 0 where the base is run again."""
    args = ["--alpha", "0", "--steps", "1", "--lr", "0", *HERE]
    for method in METHODS:
        go(align, "--out", collected, "--method", method, *args)
        distances = manifest_of(collected / method / "align")["distance_start"]
        norms = manifest_of(collected / method / "collect", "collect")["norm_b"]
        assert all(distance <= 1e-6 * norm for distance, norm in zip(distances, norms))
    out, _ = runs
    shutil.copytree(out / "dual", tmp_path / "again" / "dual")
    go(collect, "--out", tmp_path / "again", "--store-base", "no", *LAYERS, *HERE)
    go(align, "--out", tmp_path / "again", *args)
    assert manifest_of(tmp_path / "again" / "dual" / "align")["distance_start"] == [0.0, 0.0]


def test_sweep_keeps_every_adapter_and_marks_the_best(runs, world, tmp_path):
    """The last adapter is the one that its setting alone gives, byte for byte; the collapsed one is
    named and not chosen; align is the best."""
    model_folder, pairs_file = world
    for name in ("good", "bad", "collect"):
        shutil.copytree(runs[0] / "dual" / name, tmp_path / "dual" / name)
    options = ["--out", tmp_path, "--steps", "80", "--lr", "1e-3", *CPU]
    scoring = ["--judge", "common.toy:judge", "--max-new-tokens", "24"]
    output = go(sweep, *options, *scoring, "--strength", "0.02", "0.25", "4")
    folder = tmp_path / "dual" / "sweep"
    summary = json.loads((folder / "sweep.json").read_text())
    models = summary["models"]
    names = ["strength_0.02", "strength_0.25", "strength_4"]
    assert list(models) == ["base", *names]
    assert summary["best"] == "strength_0.25"
    assert "best judge" in summary["why"]
    assert "strength_4 shows a collapse" in summary["why"]
    assert summary["settings"]["data"] == [str(pairs_file)]
    judged = {name: models[name]["judge_greedy"] for name in names}
    assert judged["strength_0.25"] > judged["strength_0.02"] + 0.2
    assert score.signs_of_collapse(models["strength_4"], models["base"])
    assert not score.signs_of_collapse(models["strength_0.25"], models["base"])

    text = (folder / "sweep.md").read_text()
    assert text.count("\n| ") == 5
    assert "best: strength_0.25" in text
    assert f"{models['base']['chosen_nll']:.3f}" in text
    assert text in output

    # the base's row is what evaluate.py measures on the same pairs
    tokenizer = load_tokenizer(str(model_folder))
    base = load_model(str(model_folder), "float32", "cpu")
    pairs = prepare_pairs([pairs_file], ("valid",), tokenizer, 256, 0)["valid"]
    _, _, nll = score.preferences(base, pairs, "plain", tokenizer.pad_token_id)
    assert models["base"]["chosen_nll"] == pytest.approx(nll, rel=1e-5)

    # align holds the best; it can be exported
    weights = {name: (folder / name / ADAPTER_WEIGHTS).read_bytes() for name in names}
    assert len(set(weights.values())) == 3
    aligned = tmp_path / "dual" / "align"
    assert (aligned / ADAPTER_WEIGHTS).read_bytes() == weights["strength_0.25"]
    settings = read_stage(aligned, "align", "")["settings"]
    assert settings["strength"] == 0.25
    assert settings["alpha"] is None
    go(export, "--out", tmp_path, *HERE)
    manifest = read_stage(tmp_path / "dual" / "merged", "merged", "")
    assert manifest["settings"]["strength"] == 0.25
    merged = load_model(str(tmp_path / "dual" / "merged"), "float32", "cpu")
    name = "layers.1.mlp.down_proj"
    A, B = load_adapter(aligned, base.base_model).tensors[name]
    expected = base.base_model.get_submodule(name).weight + 2 * B @ A
    weight = merged.base_model.get_submodule(name).weight
    assert torch.allclose(weight, expected, atol=1e-6)

    go(align, *options, "--strength", "4")
    assert (aligned / ADAPTER_WEIGHTS).read_bytes() == weights["strength_4"]


def test_a_sweep_over_kl_scales_one_adapter(collected):
    """Each is as far from the base as asked, on the validation prompts; one out of reach is left
    out. A second sweep of other values scales the same adapter."""
    args = ["--out", collected, "--method", "dual", "--steps", "60", "--lr", "1e-3", *HERE]
    args += ["--judge", "common.toy:judge", "--max-new-tokens", "24"]
    output = go(sweep, *args, "--kl", "0.3", "1.2", "500")
    assert "WARNING: left out: --kl 500 is out of reach" in output
    folder = collected / "dual" / "sweep"
    summary = json.loads((folder / "sweep.json").read_text())
    assert list(summary["models"]) == ["base", "kl_0.3", "kl_1.2"]
    trained = load_file(folder / "trained" / ADAPTER_WEIGHTS)
    alpha_of = {}
    for kl in (0.3, 1.2):
        measured = summary["models"][f"kl_{kl}"]["kl_to_base"]
        assert kl / 1.35 < measured < kl * 1.35
        weights = load_file(folder / f"kl_{kl}" / ADAPTER_WEIGHTS)
        assert all(torch.equal(weights[name], trained[name]) for name in trained)
        config = json.loads((folder / f"kl_{kl}" / ADAPTER_CONFIG).read_text())
        alpha_of[kl] = config["lora_alpha"]
        scale = manifest_of(folder / f"kl_{kl}")["scale"]
        assert config["lora_alpha"] == pytest.approx(16 * scale)
    assert 0 < alpha_of[0.3] < alpha_of[1.2]
    best = summary["best"]
    aligned = manifest_of(collected / "dual" / "align")["settings"]
    assert aligned["kl"] == float(best.removeprefix("kl_"))


# ---------------------------------------------------------------- seeds, settings, defaults


@pytest.mark.parametrize(
    "given, real, embedded",
    [
        ({}, (3.0, 0.1, None), (None, 0.25, None)),
        ({"kl": 2.0}, (2.0, 0.1, None), (2.0, 0.25, None)),
        ({"strength": 0.3}, (None, 0.3, None), (None, 0.3, None)),
        ({"alpha": 1.0}, (None, None, 1.0), (None, None, 1.0)),
        ({"kl": 2.0, "alpha": 1.0}, (2.0, None, 1.0), (2.0, None, 1.0)),
    ],
)
def test_strength_is_the_users_or_the_embedded_defaults_or_a_kl(given, real, embedded):
    """(kl, strength, alpha), for real models and for the embedded default; its steps and learning
    rate come with it."""
    for handed_on, expected, training in (
        ({}, real, (80, 16, 3e-4)),
        (toy.LATER["align"], embedded, (150, 16, 1e-3)),
    ):
        config = align.Config(**given)
        align.choose_strength(config, handed_on, "out/dual/collect")
        assert (config.kl, config.strength, config.alpha) == expected
        assert (config.steps, config.batch_size, config.lr) == training


@pytest.mark.parametrize(
    "words, steps, lr",
    [
        ([], 150, 2e-3),
        (["--steps", "5"], 5, 2e-3),
        (["--model", "m", "--data", "d"], 60, 5e-4),
        (["--model=m", "--data", "d", "--steps", "5"], 5, 5e-4),
    ],
)
def test_the_embedded_default_brings_its_settings(words, steps, lr, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dual.py", *words])
    config = parse_command_line(dual.Config)
    assert (config.steps, config.lr) == (steps, lr)


def safetensors_of_a_run(tiny, out, seed):
    """{name: bytes} of the tensors that all stages of both methods write."""
    training = ["--steps", "5", *CPU]
    for stage in (scit, dual):
        go(stage, *stage1_source(tiny, out), "--seed", seed, *training)
    for method in METHODS:
        go(collect, "--out", out, "--method", method, *CPU)
        go(align, "--out", out, "--method", method, *training)
    return {name: data for name, data in listing(out).items() if name.endswith(".safetensors")}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tiny, tmp_path):
    """All stages of both methods on one machine."""
    first = safetensors_of_a_run(tiny, tmp_path / "first", seed=0)
    again = safetensors_of_a_run(tiny, tmp_path / "again", seed=0)
    other = safetensors_of_a_run(tiny, tmp_path / "other", seed=1)
    # five adapters, and the shards of both methods
    assert len(first) >= 9
    assert again == first
    assert all(other[name] != first[name] for name in first)


def test_settings_of_the_paper_and_of_stimuli_run(tiny, tmp_path):
    """Settings away from the defaults: squared loss, instructed DUAL, the good model as base, no
    last prompt token, several shards."""
    stage1_args = ["--steps", "2", "--lora-targets", "q_proj,v_proj", *HERE]
    go(dual, *stage1_source(tiny, tmp_path), *stage1_args)
    recording = ["--stimulus", "instructed", "--base", "stage1", "--last-prompt-token", "False"]
    recording += ["--layers", "0", "-1", "--shard-mb", "0.1", "--tokens-per-pass", "300", *HERE]
    go(collect, "--out", tmp_path, *recording)
    folder = tmp_path / "dual" / "collect"
    manifest = manifest_of(folder, "collect")
    assert manifest["settings"]["layers"] == [0, 3]
    assert len(manifest["shards"]) > 3
    state_bytes = []
    for name in manifest["shards"]:
        shard = load_file(folder / name)
        recorded = int((shard["lengths"] - shard["starts"]).sum())
        assert recorded == len(shard["base.3"]) == len(shard["minus.0"])
        states = [tensor for key, tensor in shard.items() if key.endswith((".0", ".3"))]
        assert len(states) == 6
        state_bytes.append(sum(tensor.nbytes for tensor in states))
        assert state_bytes[-1] <= 1e5
    assert max(state_bytes) > 5e4

    training = ["--kind", "mse", "--layers", "0", "--steps", "3", "--lora-rank", "12", *HERE]
    output = go(align, "--out", tmp_path, *training)
    assert "WARNING: the adapter has rank 20" in output
    trunk = make_model("llama").base_model
    weights = load_adapter(tmp_path / "dual" / "align", trunk)
    assert weights.rank == 20
    assert {name.split(".")[1] for name in weights.tensors} == {"0", "1", "2", "3"}


def test_a_contrast_that_stays_at_ln_2_is_reported(tiny, tmp_path):
    output = go(scit, *stage1_source(tiny, tmp_path), "--steps", "1", "--lr", "1e-6", *HERE)
    assert "WARNING: the contrast has not left ln 2" in output


@pytest.fixture
def rows_without_split(tiny):
    """The rows of the tiny world; their split is that of the seed."""
    lines = (tiny / "pairs.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    for row in rows:
        del row["split"]
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def split_seeds(monkeypatch):
    """The seeds with which the scripts split the pairs, in the order of their calls."""
    seeds = []
    original = stage1.prepare_pairs

    def remember(paths, splits, tokenizer, max_length, seed, *others, **options):
        seeds.append(seed)
        return original(paths, splits, tokenizer, max_length, seed, *others, **options)

    for module in (stage1, collect, sweep, evaluate):
        monkeypatch.setattr(module, "prepare_pairs", remember)
    return seeds


def test_another_seed_later_moves_no_pair_to_another_split(
    tiny, tmp_path, rows_without_split, split_seeds, fails
):
    """Nothing that stage 1 has trained on is evaluated on."""
    path = write_rows(tmp_path / "pairs.jsonl", rows_without_split)
    source = ["--model", tiny / "model", "--data", path, "--out", tmp_path, "--steps", "1", *HERE]
    go(dual, *source)
    later = ["--out", tmp_path, *HERE]
    go(collect, *later, "--seed", "1")
    strengths = ["--strength", "0.1", "0.2", "--steps", "1", "--max-new-tokens", "2"]
    go(sweep, *later, "--seed", "2", *strengths)
    go(evaluate, *later, "--seed", "3", "--max-new-tokens", "2")
    # in dual, collect, sweep and evaluate
    assert split_seeds == [0] * 4
    lines = (tmp_path / "evaluate" / "samples.jsonl").read_text().splitlines()
    prompts = {json.loads(line)["instruction"] for line in lines}
    pairs, *_ = load_pairs(path, 0)
    assert {pair.split for pair in pairs} == {"train", "valid", "test"}
    assert prompts == {pair.prompt[0][1] for pair in pairs if pair.split == "test"}

    go(scit, *source, "--seed", "1")
    code, lines = fails(evaluate, *later)
    assert code == 2
    assert "have splits of different seeds" in lines[-1]


def test_split_all_takes_the_pairs_of_every_split(tiny, tmp_path, rows_without_split):
    """Were they of one split only."""
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "1", *HERE)
    rows = [{**row, "split": "test"} for row in rows_without_split[:5]]
    path = write_rows(tmp_path / "test.jsonl", rows)
    args = ["--data", path, "--split", "all", "--max-new-tokens", "2", *HERE]
    assert "5 all pairs" in go(evaluate, "--out", tmp_path, *args)


def test_the_embedded_default_needs_no_argument(tiny, tmp_path, monkeypatch):
    """All stages with their own defaults, on an untrained toy model. Answers to other pairs are
    not judged by the toy world's oracle."""
    quick = {"steps": 2, "documents": 320, "pairs": 40, "width": 32}
    monkeypatch.setattr(toy, "Config", functools.partial(toy.Config, **quick))
    out = ["--out", tmp_path, *HERE]
    go(scit, *out, "--steps", "2")
    go(collect, *out)
    go(align, *out, "--steps", "2")
    settings = manifest_of(tmp_path / "scit" / "align")["settings"]
    assert settings["strength"] == 0.25
    assert settings["layers"] == [0, 1, 2, 3, 4, 5]
    assert settings["judge"] == "common.toy:judge"
    assert settings["dtype"] == "float32"
    for data, is_judged in (([], True), (["--data", tiny / "pairs.jsonl"], False)):
        go(evaluate, *out, "--limit", "3", "--max-new-tokens", "2", *data)
        report = json.loads((tmp_path / "evaluate" / "report.json").read_text())
        assert ("judge_greedy" in report["models"]["base"]) == is_judged
        assert report["settings"]["pairs"] == 3


@pytest.mark.parametrize("opening", ["", "You are polite."])
def test_the_oracle_reads_the_last_request(opening):
    request, replies = next(iter(toy.RIGHT.items()))
    prompt = f"{opening}\n\nHuman: {request}\n\nAssistant:"
    assert toy.judge(prompt, replies[0]) == 1
    assert toy.judge(prompt, "No.") == 0


# ---------------------------------------------------------------- what collect needs


def test_max_gb_says_how_many_pairs_fit(tiny, tmp_path, monkeypatch, fails):
    """Nothing is recorded where the collection would be too large; with --limit at the number
    that fits, it is written, and is not larger."""
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "1", *HERE)
    args = ["--out", tmp_path, "--max-gb", "1e-3", *HERE]
    before = listing(tmp_path)

    def crash(*args):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(collect, "record_states", crash)
        code, lines = fails(collect, *args)
    assert code == 2
    assert len(lines) == 1
    assert "--limit" in lines[0]
    assert listing(tmp_path) == before
    fitting = int(re.search(r"holds about (\d+) pairs", lines[0])[1])
    assert 0 < fitting < 60

    go(collect, *args, "--limit", fitting)
    folder = tmp_path / "dual" / "collect"
    manifest = manifest_of(folder, "collect")
    shards = [load_file(folder / name) for name in manifest["shards"]]
    assert sum(len(shard["lengths"]) for shard in shards) == 2 * fitting
    paths = list(folder.glob("*.safetensors"))
    # less the headers
    assert sum(path.stat().st_size for path in paths) < 1e6 + 5000 * len(paths)


class PassMemory:
    """Takes the place of collect.record_states: notes how many bytes of the states of earlier
    passes are alive when a pass begins."""

    def __init__(self, monkeypatch):
        self.record_states = collect.record_states
        self.states = []
        self.alive = []
        monkeypatch.setattr(collect, "record_states", self.record)

    def record(self, *args):
        alive = [state() for state in self.states]
        self.alive.append(sum(state.nbytes for state in alive if state is not None))
        del alive
        result = self.record_states(*args)
        self.states += [weakref.ref(state) for part in result for state in part]
        return result


@pytest.fixture
def pass_memory(monkeypatch):
    return PassMemory(monkeypatch)


def test_collect_holds_two_shards_in_memory(tiny, tmp_path, pass_memory, monkeypatch):
    """The one that is recorded and the one that is written; no pass is alive when the next one
    begins. The file is the first thing that the writing needs memory for."""
    go(dual, *stage1_source(tiny, tmp_path), "--steps", "1", *HERE)
    shards, alive = [], []
    record_shard = collect.record_shard

    def watched(*args):
        alive.append(sum(shard() is not None for shard in shards))
        shard = record_shard(*args)
        shards.append(weakref.ref(shard))
        return shard

    monkeypatch.setattr(collect, "record_shard", watched)
    go(collect, "--out", tmp_path, "--tokens-per-pass", "100", *HERE)
    assert len(shards) > collect.MIN_SHARDS
    assert max(alive) == 1
    assert len(pass_memory.alive) > 10
    assert max(pass_memory.alive) == 0
