"""Whole runs by command line, on a smaller world and on the real tiny model: their numbers, not that they run."""
import functools
import gc
import json
import re
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file

import align
import collect
import data
import dual
import evaluate
import scit
import toy
from conftest import SHARED, go, make_model, succeed
from files import read_stage
from lora import LoRA, load_adapter
from model import hidden_states, load_model
from pairs import load_pairs

CPU = ["--device", "cpu"]


def report(out, *args):
    succeed("evaluate.py", "--out", out, "--judge", "toy:judge", "--limit", "90", *CPU, *args)
    return json.loads((out / "evaluate" / "report.json").read_text())


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """Both methods, run on the smaller world: (folder, what align printed for each method)."""
    out, source = tmp_path_factory.mktemp("runs"), ["--model", world[0], "--data", world[1]]
    succeed("dual.py", *source, "--out", out, "--steps", "100", *CPU)
    succeed("collect.py", "--out", out, "--layers", "1", "2", *CPU)
    said = {"dual": succeed("align.py", "--out", out, *CPU)}
    succeed("scit.py", *source, "--out", out, "--steps", "200", *CPU)
    succeed("collect.py", "--out", out, "--method", "scit", "--layers", "1", "2", *CPU)
    said["scit"] = succeed("align.py", "--out", out, "--method", "scit", *CPU)
    return out, said


def test_alignment_works(runs):
    """Aligned models answer right and politely much more often than the base of their LoRA."""
    out, _ = runs
    found = report(out)
    models = found["models"]
    assert set(models) == {"base", "scit_plus", "scit_minus", "scit_plain", "scit_aligned", "good", "bad", "dual_aligned"}
    for model in models.values():
        assert set(model) == {"preference_accuracy", "preference_margin", "chosen_nll", "judge_greedy", "judge_sampled",
                              "own_nll_under_base", "repeated_ngrams", "mean_length", "ended"}
    greedy = {name: model["judge_greedy"] for name, model in models.items()}
    assert greedy["base"] <= 0.65 and greedy["scit_minus"] <= 0.1
    assert greedy["scit_aligned"] >= greedy["scit_plain"] + 0.1 and greedy["dual_aligned"] >= greedy["base"] + 0.3
    for name, least in (("scit_plus", 0.4), ("scit_aligned", 0.6), ("good", 0.8), ("dual_aligned", 0.7)):
        assert greedy[name] >= least and models[name]["preference_accuracy"] >= 0.9, (name, models[name])
        assert models[name]["repeated_ngrams"] < 0.05
    assert models["bad"]["preference_accuracy"] < 0.5 and models["scit_minus"]["preference_margin"] < 0
    samples = [json.loads(line) for line in open(out / "evaluate" / "samples.jsonl")]
    assert len(samples) == 8 * 2 * 90
    rows = [row["judge"] for row in samples if row["generator"] == "dual_aligned" and row["temperature"] == 0]
    assert sum(rows) / len(rows) == pytest.approx(greedy["dual_aligned"])


def test_held_out_states_reach_their_target(runs):
    out, said = runs
    for method in ("scit", "dual"):
        record = read_stage(out / method / "align", "align", "")
        assert all(end < 0.6 * start for start, end in zip(record["distance_start"], record["distance_end"]))
        collected = read_stage(out / method / "collect", "collect", "")
        for layer, ratio, alpha in zip(collected["settings"]["layers"], collected["ratio"], record["alphas"]):
            assert alpha == pytest.approx(0.25 / ratio) and f"layer {layer}: α {alpha:.3g}, α|v|/|h| 0.25" in said[method]


def test_written_adapter_applies_to_the_original_base_alone(runs, world):
    """Distances measured afresh, from the written adapter on the whole original model, are those that align reported."""
    out, _ = runs
    for method in ("scit", "dual"):
        record, folder = read_stage(out / method / "align", "align", ""), out / method / "collect"
        model = load_model(str(world[0]), torch.float32, "cpu")
        LoRA(model.base_model, factors=load_adapter(out / method / "align", model.base_model)).eval()
        held, layers, alphas = load_file(folder / "held_out-00000.safetensors"), record["settings"]["layers"], record["alphas"]
        sums, at_id, at = torch.zeros(len(layers)), 0, 0
        for length, start in zip(held["lengths"].tolist(), held["starts"].tolist()):
            ids = held["ids"][at_id:at_id + length].long()[None]
            with torch.no_grad():
                states = hidden_states(model.base_model, layers, ids)
            for i, layer in enumerate(layers):
                b, p, m = (held[f"{name}.{layer}"][at:at + length - start] for name in ("base", "plus", "minus"))
                sums[i] += (states[i][0, start:] - b - alphas[i] * (p - m)).norm(dim=1).sum()
            at_id, at = at_id + length, at + length - start
        assert sums.tolist() == pytest.approx([d * at for d in record["distance_end"]], rel=1e-3)


def test_difference_alone_trains_the_same_adapter(runs, world, tmp_path):
    """--store diff: two thirds of the bytes, the same logits within 1e-5."""
    out, _ = runs
    shutil.copytree(out / "dual", tmp_path / "dual")
    go(collect, "--out", tmp_path, "--store", "diff", "--layers", "1", "2", *CPU)
    go(align, "--out", tmp_path, *CPU)
    assert read_stage(tmp_path / "dual" / "collect", "collect", "")["token_bytes"] < \
        0.7 * read_stage(out / "dual" / "collect", "collect", "")["token_bytes"]
    found = []
    for folder in (out, tmp_path):
        model = load_model(str(world[0]), torch.float32, "cpu")
        LoRA(model.base_model, factors=load_adapter(folder / "dual" / "align", model.base_model)).eval()
        with torch.no_grad():
            found.append(model(input_ids=torch.arange(2, 200)[None]).logits)
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[0].abs().max()


def logits_of(world, folder):
    model = load_model(str(world[0]), torch.float32, "cpu")
    LoRA(model.base_model, factors=load_adapter(folder, model.base_model)).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 200)[None]).logits


def test_all_directions_and_alpha_are_the_papers_form(runs, world, tmp_path):
    """--rank D --alpha: the same adapter as without directions, within rounding; a smaller rank is another one."""
    out, _ = runs
    shutil.copytree(out / "dual" / "collect", tmp_path / "dual" / "collect")
    found = {}
    for name, more in (("paper", []), ("all", ["--rank", "128"]), ("two", ["--rank", "2"])):
        go(align, "--out", tmp_path, "--alpha", "1", "--steps", "40", *more, *CPU)
        found[name] = logits_of(world, tmp_path / "dual" / "align")
    size = found["paper"].abs().max()
    assert (found["all"] - found["paper"]).abs().max() <= 1e-4 * size < (found["two"] - found["paper"]).abs().max()


def test_low_rank_without_base_trains_the_same_adapter(runs, world, tmp_path):
    """Coefficients alone on disk, b from the model with the adapter off, for both methods: the full collection's adapter at that rank."""
    out, _ = runs
    for method in ("dual", "scit"):
        shutil.copytree(out / method, tmp_path / method)
        go(align, "--out", tmp_path, "--method", method, "--rank", "8", "--steps", "40", *CPU)
        full, record = logits_of(world, tmp_path / method / "align"), read_stage(tmp_path / method / "align", "align", "")
        said = go(collect, "--out", tmp_path, "--method", method, "--store", "lowrank", "--rank", "16", "--store-base", "no", "--layers", "1", "2", *CPU)
        collected = read_stage(tmp_path / method / "collect", "collect", "")
        assert collected["token_bytes"] == 2 * 16 * 4 and len(re.findall(r"16 directions hold \d+% of", said)) == 2
        go(align, "--out", tmp_path, "--method", method, "--rank", "8", "--steps", "40", *CPU)
        again = read_stage(tmp_path / method / "align", "align", "")
        assert (logits_of(world, tmp_path / method / "align") - full).abs().max() <= 1e-3 * full.abs().max()
        assert again["distance_start"] == pytest.approx(record["distance_start"], rel=1e-3)
        assert again["distance_end"] == pytest.approx(record["distance_end"], rel=1e-2)


def test_directions_are_those_of_numpy(runs, tmp_path):
    """U, its share of |v|² and |v|/|h| against a singular value decomposition and a mean, from the shards."""
    out, _ = runs
    shutil.copytree(out / "dual", tmp_path / "dual")
    shards = [load_file(path) for path in sorted((out / "dual" / "collect").glob("*.safetensors"))]
    go(collect, "--out", tmp_path, "--store", "lowrank", "--rank", "3", "--layers", "1", "2", *CPU)
    stored, record = load_file(tmp_path / "dual" / "collect" / "directions.safetensors"), read_stage(tmp_path / "dual" / "collect", "collect", "")
    for i, layer in enumerate((1, 2)):
        v = torch.cat([shard[f"plus.{layer}"] - shard[f"minus.{layer}"] for shard in shards if len(shard["lengths"]) > 128]).double()
        _, values, vectors = torch.linalg.svd(v, full_matrices=False)
        U = stored[f"directions.{layer}"].double()
        assert torch.allclose((U @ vectors[:3].T).abs(), torch.eye(3, dtype=torch.double), atol=1e-3)
        assert record["energy"][i] == pytest.approx((values[:3].square().sum() / values.square().sum()).item(), rel=1e-3)
        ratio = torch.cat([(shard[f"plus.{layer}"] - shard[f"minus.{layer}"]).norm(dim=1) / shard[f"base.{layer}"].norm(dim=1) for shard in shards]).mean()
        assert record["ratio"][i] == pytest.approx(ratio.item(), rel=1e-4)


def test_strength_is_the_mean_share_of_length(runs, tmp_path):
    out, _ = runs
    shutil.copytree(out / "dual" / "collect", tmp_path / "dual" / "collect")
    said = go(align, "--out", tmp_path, "--strength", "0.3", "--steps", "1", *CPU)
    ratio, alphas = read_stage(out / "dual" / "collect", "collect", "")["ratio"], read_stage(tmp_path / "dual" / "align", "align", "")["alphas"]
    assert alphas == pytest.approx([0.3 / r for r in ratio]) and said.count("α|v|/|h| 0.30") == 2
    held = load_file(out / "dual" / "collect" / "held_out-00000.safetensors")              # the fresh adapter is the identity: it starts α |v| away
    away = [alpha * (held[f"plus.{layer}"] - held[f"minus.{layer}"]).norm(dim=1).mean().item() for alpha, layer in zip(alphas, (1, 2))]
    go(align, "--out", tmp_path, "--strength", "0.3", "--steps", "1", *CPU)
    assert read_stage(tmp_path / "dual" / "align", "align", "")["distance_start"] == pytest.approx(away, rel=1e-3)


def test_prompt_shows_base_and_aligned_side_by_side(runs):
    out, _ = runs
    said = go(evaluate, "--out", out, "--prompt", "Hello, I am Ada.", *CPU)
    assert re.findall(r"^ *(\w+): \S", said, re.M) == ["base", "scit_aligned", "dual_aligned"]


def test_profile_traces_steps_and_trains_nothing(runs, tmp_path):
    """A trace that a browser reads, with the steps in it; figures that hold together; no adapter."""
    out, _ = runs
    shutil.copytree(out / "dual" / "collect", tmp_path / "dual" / "collect")
    said = go(align, "--out", tmp_path, "--profile", "True", *CPU)
    step, part, share, moved, rate = map(float, re.search(r"a step (\S+) ms; loss and gradient (\S+) ms of it \((\S+)%\), (\S+) MB at (\S+) GB/s", said).groups())
    assert 0 < part < step and share == pytest.approx(100 * part / step, rel=0.02, abs=0.06) and rate == pytest.approx(moved / part, rel=0.02)
    events = json.loads((tmp_path / "dual" / "align_trace.json").read_text())["traceEvents"]
    assert sum(event.get("name") == "step" and event.get("cat") == "user_annotation" for event in events) == 5
    assert not (tmp_path / "dual" / "align").exists()


def test_alpha_0_starts_at_the_target(runs, tmp_path):
    """The collected base states are the base's: at α = 0 the first distance is at most 1e-6 |h| in fp32; 0 where they are run again."""
    out, _ = runs
    for method in ("scit", "dual"):
        shutil.copytree(out / method / "collect", tmp_path / method / "collect")
        go(align, "--out", tmp_path, "--method", method, "--alpha", "0", "--steps", "1", "--lr", "0", *CPU)
        start = read_stage(tmp_path / method / "align", "align", "")["distance_start"]
        norms = read_stage(out / method / "collect", "collect", "")["norm_h"]
        assert all(d <= 1e-6 * h for d, h in zip(start, norms))
    shutil.copytree(out / "dual", tmp_path / "again" / "dual")
    go(collect, "--out", tmp_path / "again", "--store-base", "no", "--layers", "1", "2", *CPU)
    go(align, "--out", tmp_path / "again", "--alpha", "0", "--steps", "1", "--lr", "0", *CPU)
    assert read_stage(tmp_path / "again" / "dual" / "align", "align", "")["distance_start"] == [0.0, 0.0]


def test_same_seed_same_bytes_another_seed_not(tiny, tmp_path):
    """All stages of both methods: adapters byte-equal for one seed on one machine, different for another."""
    def adapters(name, seed):
        out = tmp_path / name
        source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", out, "--seed", seed, "--steps", "5", *CPU]
        go(scit, *source), go(dual, *source)
        for method in ("scit", "dual"):
            go(collect, "--out", out, "--method", method, *CPU)
            go(align, "--out", out, "--method", method, "--steps", "5", *CPU)
        return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*.safetensors")}
    first, again, other = adapters("a", 0), adapters("b", 0), adapters("c", 1)
    assert len(first) == 10 and first == again
    assert all(first[name] != other[name] for name in first)


def test_paper_settings_and_stimuli_run(tiny, tmp_path):
    """Settings away from the defaults: squared loss, instructed DUAL, the good model as base, no last prompt token, several shards."""
    out = tmp_path
    go(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", out, "--steps", "2", "--lora-targets", "q_proj,v_proj", *CPU)
    go(collect, "--out", out, "--stimulus", "instructed", "--base", "instructed", "--last-prompt-token", "False",
            "--layers", "0", "-1", "--shard-mb", "0.1", "--tokens-per-pass", "300", *CPU)
    record = read_stage(out / "dual" / "collect", "collect", "")
    assert record["settings"]["layers"] == [0, 3] and len(record["shards"]) > 3
    shards = [load_file(out / "dual" / "collect" / name) for name in record["shards"]]
    assert all(int((s["lengths"] - s["starts"]).sum()) == len(s["base.3"]) == len(s["minus.0"]) for s in shards)
    held = [sum(s[f"{name}.{layer}"].nbytes for name in ("base", "plus", "minus") for layer in (0, 3)) for s in shards]
    assert all(size <= 1e5 or len(s["lengths"]) == 1 for size, s in zip(held, shards)) and max(held) > 8e4
    said = go(align, "--out", out, "--kind", "mse", "--layers", "0", "--steps", "3", "--lora-rank", "12", *CPU)
    assert "WARNING: the adapter has rank 20" in said
    factors = load_adapter(out / "dual" / "align", make_model("llama").base_model)
    assert factors.rank == 20 and {name.split(".")[1] for name in factors.weights} == {"0", "1", "2", "3"}


def test_contrast_that_stays_at_ln_2_is_said(tiny, tmp_path):
    said = go(scit, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", "--lr", "1e-6", *CPU)
    assert "WARNING: the contrast has not left ln 2" in said


def test_another_seed_later_moves_no_pair_to_another_split(tiny, tmp_path, monkeypatch, capfd):
    """What stage 1 has trained on is never evaluated on; `--split all` takes what there is, were it of one split only."""
    rows = [{key: value for key, value in json.loads(line).items() if key != "split"} for line in open(tiny / "pairs.jsonl")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own, seeds = data.prepare, []
    monkeypatch.setattr(data, "prepare", lambda *args: seeds.append(args[4]) or own(*args))
    source = ["--model", tiny / "model", "--data", tmp_path / "pairs.jsonl", "--out", tmp_path, "--steps", "1", *CPU]
    go(dual, *source)
    go(collect, "--out", tmp_path, "--seed", "1", *CPU)
    go(align, "--out", tmp_path, "--seed", "2", "--strength", "0.1", "0.2", "--steps", "1", "--max-new-tokens", "2", *CPU)
    go(evaluate, "--out", tmp_path, "--seed", "3", "--max-new-tokens", "2", *CPU)
    assert seeds == [0] * 4                   # in collect, in the sweep and in evaluate as in dual
    asked = {json.loads(line)["instruction"] for line in open(tmp_path / "evaluate" / "samples.jsonl")}
    pairs = load_pairs(tmp_path / "pairs.jsonl", 0)[0]
    assert asked == {pair.prompt[0][1] for pair in pairs if pair.split == "test"} and {pair.split for pair in pairs} == {"train", "valid", "test"}
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({**row, "split": "test"}) + "\n" for row in rows[:5]))
    said = go(evaluate, "--out", tmp_path, "--data", tmp_path / "one.jsonl", "--split", "all", "--max-new-tokens", "2", *CPU)
    assert "5 all pairs" in said
    go(scit, *source, "--seed", "1")
    with pytest.raises(SystemExit):
        go(evaluate, "--out", tmp_path, *CPU)
    assert "have splits of different seeds" in capfd.readouterr().err


def test_the_embedded_default_needs_no_argument_but_its_judge_no_other_data(tiny, tmp_path, monkeypatch):
    """All stages of an untrained toy with their own defaults; answers to other pairs are not judged by the toy's oracle."""
    monkeypatch.setattr(toy, "Config", functools.partial(toy.Config, steps=2, documents=320, pairs=40, width=32))
    out = ["--out", tmp_path, *CPU]
    go(scit, *out, "--steps", "2"), go(collect, *out), go(align, *out, "--steps", "2")
    settings = read_stage(tmp_path / "scit" / "align", "align", "")["settings"]
    assert (settings["strength"], settings["layers"], settings["judge"], settings["dtype"]) == (0.25, [0, 1, 2, 3, 4, 5], "toy:judge", "float32")
    for more, judged in (([], True), (["--data", tiny / "pairs.jsonl"], False)):
        go(evaluate, *out, "--limit", "3", "--max-new-tokens", "2", *more)
        report = json.loads((tmp_path / "evaluate" / "report.json").read_text())
        assert ("judge_greedy" in report["models"]["base"]) == judged and report["settings"]["pairs"] == 3
    request = next(iter(toy.RIGHT))
    for opening in ("", "You are polite."):
        assert toy.judge(f"{opening}\n\nHuman: {request}\n\nAssistant:", toy.RIGHT[request][0]) == 1 and toy.judge(f"{opening}\n\nHuman: {request}\n\nAssistant:", "No.") == 0


def test_max_gb_takes_whole_pairs(tiny, tmp_path):
    go(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", *CPU)
    said = go(collect, "--out", tmp_path, "--max-gb", "1.5e-3", *CPU)
    record = read_stage(tmp_path / "dual" / "collect", "collect", "")
    shards, n = record["shards"], int(re.search(r"holds ([\d,]+) training pairs", said)[1])
    sizes = [(tmp_path / "dual" / "collect" / name).stat().st_size for name in [*shards, *record["held_out"]]]
    assert 0 < n < 60 and 1.4e6 < sum(sizes) < 1.5e6 + 5000 * len(sizes)           # less headers
    assert sum(len(load_file(tmp_path / "dual" / "collect" / name)["lengths"]) for name in shards) == 2 * n


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real model and pairs are not at hand")
def test_real_weights_and_real_pairs(tmp_path):
    """A short run of both methods; the whole one is in the README."""
    source = ["--model", SHARED / "models/stories260K", "--data", SHARED / "data/hh_harmless_test.jsonl.gz", "--out", tmp_path,
              "--limit", "150", "--max-length", "200", *CPU]
    go(dual, *source, "--steps", "40")
    go(collect, "--out", tmp_path, "--limit", "150", *CPU)
    go(align, "--out", tmp_path, "--steps", "100", *CPU)
    record = read_stage(tmp_path / "dual" / "align", "align", "")
    assert all(end <= 0.6 * start for start, end in zip(record["distance_start"], record["distance_end"]))
    go(scit, *source, "--steps", "6")
    go(collect, "--out", tmp_path, "--method", "scit", "--limit", "20", *CPU)
    go(align, "--out", tmp_path, "--method", "scit", "--steps", "20", *CPU)
    go(evaluate, "--out", tmp_path, "--limit", "8", "--max-new-tokens", "8", *CPU)
    report = json.loads((tmp_path / "evaluate" / "report.json").read_text())["models"]
    assert len(report) == 8 and all("judge_greedy" not in model and model["chosen_nll"] > 0 for model in report.values())


def test_collect_holds_one_pass_at_a_time(tiny, tmp_path, monkeypatch):
    """No state of an earlier pass is alive when one is recorded; what is kept of it is in its shard."""
    go(dual, "--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", *CPU)
    own, alive = collect.record_states, []

    def watched(*args):
        gc.collect()
        alive.append(sum(ref() is not None for ref in states))
        found = own(*args)
        states.extend(weakref.ref(x) for part in found for x in part)
        return found
    states = []
    monkeypatch.setattr(collect, "record_states", watched)
    go(collect, "--out", tmp_path, "--tokens-per-pass", "200", *CPU)
    assert len(alive) > 10 and max(alive) == 0
