"""A base model in 4 or 8 bits, through all stages (bitsandbytes, which runs on a CPU, too)."""

import pytest
import torch
from helpers import HERE, go, logits_of, make_model, some_batch, stage1_source
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import align
import collect
import dual
import evaluate
import scit
from common import hf
from common.stages import read_stage
from tools import export, survey, sweep

pytest.importorskip("bitsandbytes")

CONFIGS = {
    "4bit": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8bit": {"load_in_8bit": True},
}


def quantized(folder, kind):
    """The model of a folder as transformers itself quantizes it, not packed for CPUs with bfloat16:
    the layers of tests are too small for that."""
    config = BitsAndBytesConfig(**CONFIGS[kind])
    device_map = {"": HERE[1]}
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, device_map=device_map
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_stages_on_a_quantized_base(kind, tiny, tmp_path, fails):
    """What is recorded are the states of the quantized model; the adapter applies to it in PEFT;
    the later stages inherit the setting; there is nothing to merge into."""
    quick = ["--steps", "2", *HERE]
    go(dual, *stage1_source(tiny, tmp_path), "--quantize", kind, *quick)
    go(survey, "--out", tmp_path, "--limit", "4", *HERE)
    go(collect, "--out", tmp_path, "--layers", "1", "--limit", "8", *HERE)
    go(align, "--out", tmp_path, "--strength", "0.3", "--kl", "0.01", "--lr", "1e-2", *quick)
    manifest = read_stage(tmp_path / "dual" / "align", "align", "")
    assert manifest["settings"]["quantize"] == kind

    model = quantized(tiny / "model", kind)
    collected = read_stage(tmp_path / "dual" / "collect", "collect", "")
    shard = load_file(tmp_path / "dual" / "collect" / collected["shards"][0])
    length, start = int(shard["lengths"][0]), int(shard["starts"][0])
    ids = shard["ids"][None, :length].long().to(model.device)
    with torch.no_grad():
        [states] = hf.hidden_states(model.model, [1], ids)
    recorded = shard["base.1"][: length - start].float()
    expected = states[0, start:].float().cpu()
    assert (recorded - expected).norm() < 1e-2 * expected.norm()
    plain = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    with torch.no_grad():
        [other] = hf.hidden_states(plain.model, [1], ids.cpu())
    assert (other[0, start:] - expected).norm() > 2e-3 * expected.norm()

    output = go(evaluate, "--out", tmp_path, "--limit", "2", "--max-new-tokens", "2", *HERE)
    assert "dual_aligned" in output
    ours = hf.load_model(str(tiny / "model"), "float32", model.device, quantize=kind)
    batch = some_batch()
    base_logits = logits_of(ours, batch)
    assert torch.allclose(base_logits, logits_of(model, batch), atol=1e-4)
    aligned = logits_of(PeftModel.from_pretrained(model, tmp_path / "dual" / "align"), batch)
    assert (aligned - base_logits).abs().max() > 1e-3

    code, lines = fails(export, "--out", tmp_path, *HERE)
    assert code == 2 and len(lines) == 1
    assert kind in lines[0] and "--form adapter" in lines[0]
    go(export, "--out", tmp_path, "--form", "adapter", *HERE)


@torch.no_grad()
def test_a_state_does_not_depend_on_other_rows_or_later_tokens_in_8_bits(tmp_path, tokenizer):
    """Of a model whose states have columns that stand out, as those of large models do."""
    model = make_model("llama")
    for block in model.model.layers:
        block.input_layernorm.weight[:3] *= 20
        block.post_attention_layernorm.weight[:3] *= 20
    model.save_pretrained(tmp_path)
    model = hf.load_model(str(tmp_path), "float32", torch.device(HERE[1]), quantize="8bit")
    torch.manual_seed(0)
    ids = torch.randint(2, 700, (2, 12)).to(model.device)
    [alone] = hf.hidden_states(model.base_model, [2], ids[:1, :6])
    [among_others] = hf.hidden_states(model.base_model, [2], ids)
    assert (among_others[0, :6] - alone[0]).norm() < 1e-4 * alone.norm()


def test_on_no_cpu_a_layer_in_4_bits_takes_the_form_without_gradient(tiny, monkeypatch):
    """bitsandbytes packs weights for inference where the CPU has bfloat16."""
    import bitsandbytes

    monkeypatch.setattr(
        bitsandbytes.nn.Linear4bit, "support_avx512bf16_for_cpu", True, raising=False
    )
    model = hf.load_model(str(tiny / "model"), "float32", torch.device("cpu"), quantize="4bit")
    linears = hf.find_linears(model.base_model).values()
    assert not any(linear.support_avx512bf16_for_cpu for linear in linears)


def test_what_bitsandbytes_leaves_as_it_is_is_refused(tmp_path, tiny, tokenizer, fails):
    """Falcon's linear layers are of a class of their own."""
    make_model("falcon").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_bytes((tiny / "pairs.jsonl").read_bytes())
    code, lines = fails(dual, *stage1_source(tmp_path, tmp_path), "--quantize", "4bit", *HERE)
    assert code == 2 and len(lines) == 1
    assert "bitsandbytes leaves" in lines[0] and "without --quantize" in lines[0]


def test_evaluate_refuses_two_methods_on_different_bases(tiny, tmp_path, fails):
    go(dual, *stage1_source(tiny, tmp_path), "--quantize", "4bit", "--steps", "1", *HERE)
    go(scit, *stage1_source(tiny, tmp_path), "--steps", "1", *HERE)
    code, lines = fails(evaluate, "--out", tmp_path, *HERE)
    assert code == 2 and "different --quantize" in lines[0]


def test_scit_and_a_sweep_on_a_quantized_base(tiny, tmp_path):
    quick = ["--steps", "2", *HERE]
    go(scit, *stage1_source(tiny, tmp_path), "--quantize", "4bit", *quick)
    go(collect, "--out", tmp_path, "--layers", "1", "--limit", "8", *HERE)
    go(sweep, "--out", tmp_path, "--strength", "0.1", "0.2", "--max-new-tokens", "2", *quick)
    assert (tmp_path / "scit" / "align" / "adapter_model.safetensors").exists()


def test_four_bits_take_an_eighth_of_the_memory(tiny):
    sizes = {}
    for kind in (None, "8bit", "4bit"):
        model = hf.load_model(str(tiny / "model"), "float32", torch.device("cpu"), quantize=kind)
        linears = hf.find_linears(model.base_model).values()
        sizes[kind] = sum(linear.weight.nbytes for linear in linears)
        # parameters are counted as such, not as bytes
        assert model.num_parameters() == sum(
            p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny / "model").parameters()
        )
    assert sizes["8bit"] == sizes[None] / 4
    assert sizes["4bit"] == sizes[None] / 8


def test_a_missing_package_is_named(tiny, tmp_path, fails, monkeypatch):
    monkeypatch.setattr(hf, "find_spec", lambda name: None)
    code, lines = fails(dual, *stage1_source(tiny, tmp_path), "--quantize", "4bit", *HERE)
    assert code == 2 and len(lines) == 1
    assert "--quantize 4bit" in lines[0] and "pip install bitsandbytes accelerate" in lines[0]
