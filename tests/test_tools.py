"""The tools that look at or pass on what align.py trained: profile and export."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import HERE, go, listing, logits_of, make_model, some_batch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
)

import evaluate
from common.hf import load_model, quantizing_options
from common.stages import read_stage
from lora import LoRA, load_adapter
from tools import export, profile

# ---------------------------------------------------------------- profile


def test_profile_traces_steps_and_trains_nothing(done, tmp_path):
    """A trace that a browser reads, with the steps in it; figures that hold together; no
    adapter."""
    shutil.copytree(done / "dual" / "collect", tmp_path / "dual" / "collect")
    before = listing(tmp_path)
    output = go(profile, "--out", tmp_path, *HERE)
    figures = re.search(
        r"a step (\S+) ms; loss and gradient (\S+) ms of it \((\S+)%\), (\S+) MB at (\S+) GB/s",
        output,
    )
    step, part, share, megabytes, rate = map(float, figures.groups())
    assert 0 < part < step
    assert share == pytest.approx(100 * part / step, rel=0.02, abs=0.06)
    assert rate == pytest.approx(megabytes / part, rel=0.02)

    trace = tmp_path / "dual" / "align_trace.json"
    events = json.loads(trace.read_text())["traceEvents"]
    steps = [e for e in events if e.get("name") == "step" and e.get("cat") == "user_annotation"]
    assert len(steps) == 5
    trace.unlink()
    assert listing(tmp_path) == before


# ---------------------------------------------------------------- export


@pytest.fixture
def aligned(done, tmp_path):
    """A folder with the aligned adapter of a finished run, and the base model's folder."""
    shutil.copytree(done / "dual" / "align", tmp_path / "dual" / "align")
    return tmp_path, read_stage(done / "dual" / "align", "align", "")["settings"]["model"]


def test_exported_model_is_the_base_with_its_adapter(aligned):
    out, model_folder = aligned
    base = load_model(model_folder, "float32", "cpu")
    batch = some_batch()
    base_logits = logits_of(base, batch)
    weights = load_adapter(out / "dual" / "align", base.base_model)
    LoRA(base.base_model, weights=weights).eval()
    expected = logits_of(base, batch)
    assert not torch.equal(expected, base_logits)

    output = go(export, "--out", out, *HERE)
    folder = out / "dual" / "merged"
    assert f"wrote {folder}" in output
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits_of(merged, batch), expected, atol=1e-5)
    vocabulary = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert vocabulary == AutoTokenizer.from_pretrained(model_folder).get_vocab()
    settings = read_stage(out / "dual" / "align", "align", "")["settings"]
    assert read_stage(folder, "merged", "")["settings"]["steps"] == settings["steps"]


def test_exported_model_may_have_another_dtype(aligned):
    out, _ = aligned
    go(export, "--out", out, "--dtype", "bfloat16", *HERE)
    merged = AutoModelForCausalLM.from_pretrained(out / "dual" / "merged", dtype="auto")
    assert merged.dtype == torch.bfloat16


def test_exported_adapter_has_its_files_and_a_card(aligned):
    """PEFT loads it; the card tells what it is, and of evaluate's figures those of this adapter."""
    out, model_folder = aligned
    output = go(export, "--out", out, "--form", "adapter", *HERE)
    folder = out / "dual" / "export"
    assert f"wrote {folder}" in output
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "stage.json",
    }
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder).eval()
    ours = load_model(model_folder, "float32", "cpu")
    LoRA(ours.base_model, weights=load_adapter(out / "dual" / "align", ours.base_model)).eval()
    batch = some_batch()
    assert torch.allclose(logits_of(loaded, batch), logits_of(ours, batch), atol=1e-5)

    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model is None and card.data.license is None
    settings = read_stage(out / "dual" / "align", "align", "")["settings"]
    # of a local folder its name alone, in all files
    assert "`model`" in card.text
    for path in folder.iterdir():
        assert str(Path(model_folder).parent).encode() not in path.read_bytes(), path
    for name in export.SETTINGS:
        assert f"| {name} | {settings[name]} |" in card.text
    assert "has not been run on this adapter" in card.text

    go(evaluate, "--out", out, "--limit", "4", "--max-new-tokens", "4", *HERE)
    go(export, "--out", out, "--form", "adapter", *HERE)
    text = (folder / "README.md").read_text()
    report = json.loads((out / "evaluate" / "report.json").read_text())
    accuracy = report["models"]["dual_aligned"]["preference_accuracy"]
    [row] = [line for line in text.splitlines() if "dual_aligned" in line]
    assert float(row.split("|")[2]) == pytest.approx(accuracy, abs=1e-3)

    # another adapter since then
    manifest = read_stage(out / "dual" / "align", "align", "")
    assert export.read_report(out, "dual", manifest) == report
    manifest["digests"]["adapter_model.safetensors"] = "another"
    assert export.read_report(out, "dual", manifest) is None
    card = export.model_card("merged", "dual", manifest, None)
    assert card.data.library_name == "transformers"
    assert "has not been run on this adapter" in card.text


def test_a_damaged_report_is_refused(aligned, fails):
    out, _ = aligned
    go(evaluate, "--out", out, "--limit", "2", "--max-new-tokens", "2", *HERE)
    (out / "evaluate" / "report.json").write_text('{"adapters": ')
    code, lines = fails(export, "--out", out, *HERE)
    assert code == 2
    assert "report.json is missing or not the file" in lines[-1]


def test_settings_of_sampling_are_exported_as_they_are(aligned, monkeypatch):
    """transformers up to 5.22 refuses to save a generation config like this one."""
    out, model_folder = aligned
    path = Path(model_folder) / "generation_config.json"
    before = path.read_text()
    path.write_text(json.dumps({**json.loads(before), "temperature": 0.9, "top_p": 0.6}))

    def validate(self, strict=False, **_):
        if self.temperature not in (None, 1.0) and not self.do_sample and strict:
            raise ValueError("GenerationConfig is invalid")

    monkeypatch.setattr(GenerationConfig, "validate", validate)
    try:
        go(export, "--out", out, *HERE)
    finally:
        path.write_text(before)
    exported = json.loads((out / "dual" / "merged" / "generation_config.json").read_text())
    assert (exported["temperature"], exported["top_p"]) == (0.9, 0.6)
    assert exported["eos_token_id"] == json.loads(before)["eos_token_id"]


def test_what_a_card_may_name(tmp_path, monkeypatch):
    """Names on the hub as they are; of a path its last part."""
    for name in ("org/model-7b", "gpt2", "hub:org/data:train"):
        assert export.public_name(name) == name
    for name in ("/home/someone/secret/model", "./secret/model", "secret/files/model", tmp_path):
        assert export.public_name(str(name)) == Path(name).name
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    assert export.public_name("out/model-that-was-there") == "model-that-was-there"


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_card_tells_the_scale_and_the_quantized_base(quantize, aligned):
    out, _ = aligned
    manifest = read_stage(out / "dual" / "align", "align", "")
    manifest["settings"] |= {"quantize": quantize, "model": "org/base", "dtype": "bfloat16"}
    manifest |= {"scale": 0.5, "kl_at_scale": [[0.5, 2.9], [1.0, 9.0]]}
    report = {
        "models": {"base": {"a": 1.0}, "dual_aligned": {"a": 2.0}},
        "settings": {"pairs": 4, "data": ["d.jsonl"], "split": "train", "own_data": False},
    }
    card = export.model_card("adapter", "dual", manifest, report)
    assert "scaled by 0.5" in card.text and "2.9 nats" in card.text
    [line] = [line for line in card.text.splitlines() if "quantization_config=" in line]
    told = eval(
        line.strip().removeprefix("quantization_config=").removesuffix(","),
        {"BitsAndBytesConfig": BitsAndBytesConfig},
    )
    used = quantizing_options(quantize, torch.bfloat16, torch.device("cpu"))["quantization_config"]
    # the head is left out by default
    used.llm_int8_skip_modules = None
    assert told.to_dict() == used.to_dict()
    assert "which training may have seen" in card.text
    assert card.data.base_model == "org/base"
    report["settings"]["split"] = "test"
    card = export.model_card("adapter", "dual", manifest, report)
    assert "held out from all training" in card.text


def test_export_for_another_model_is_refused(aligned, tokenizer, tmp_path, fails):
    out, _ = aligned
    make_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    code, lines = fails(export, "--out", out, "--model", tmp_path / "other", *HERE)
    assert code == 2
    assert len(lines) == 1
    assert f"--model {tmp_path / 'other'}: this is another model" in lines[0]
    assert not (out / "dual" / "merged").exists()


def test_export_without_an_aligned_adapter_names_the_command(tmp_path, fails):
    code, lines = fails(export, "--out", tmp_path, *HERE)
    assert code == 2
    assert "python align.py" in lines[-1]
