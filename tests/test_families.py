"""Every family through every stage, and what it leaves behind: adapters that PEFT loads, a merged model, refusals."""
import json

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import align
import collect
import dual
import evaluate
import model as M
import scit
from conftest import FAMILIES, SIZES, go, make_model
from files import UserError
from lora import LoRA, load_adapter, save_adapter
from test_lora import filled, logits

CPU = ["--device", "cpu"]
ATTENTION = {"phi": "dense k_proj q_proj v_proj", "phi3": "o_proj qkv_proj", "gpt_neox": "dense query_key_value",
             "gpt2": "attn.c_attn attn.c_proj", "opt": "k_proj out_proj q_proj v_proj", "falcon": "dense query_key_value",
             "bloom": "dense query_key_value"}


def test_all_stages_run_and_the_adapter_loads_everywhere(family, tiny, tokenizer, tmp_path):
    """Stages of both methods; PEFT gives our logits on the original base before and after its merge; so does the merged model."""
    base = make_model(family)
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    source = ["--model", tmp_path / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "2", "--lr", "1e-2", *CPU]
    go(scit, *source)
    go(dual, *source)
    for method, more in (("scit", ["--lora-targets", "attention"]), ("dual", ["--merge", "True"])):
        go(collect, "--out", tmp_path, "--method", method, "--layers", "1", "2", "--limit", "8", *CPU)
        go(align, "--out", tmp_path, "--method", method, "--steps", "3", "--lr", "1e-2", "--batch-size", "4", *more, *CPU)
    go(evaluate, "--out", tmp_path, "--limit", "3", "--max-new-tokens", "3", *CPU)
    assert len(json.loads((tmp_path / "evaluate" / "report.json").read_text())["models"]) == 8
    base = M.load_model(str(tmp_path / "model"), torch.float32, "cpu")
    for method in ("scit", "dual"):
        before, folder = logits(base), tmp_path / method / "align"
        adapter = LoRA(base.base_model, factors=load_adapter(folder, base.base_model)).eval()
        ours = logits(base)
        adapter.remove()
        assert (ours - before).abs().max() > 1e-3
        peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), folder).eval()
        found = {name.removeprefix(f"base_model.model.{base.base_model_prefix}.") for name, m in peft.named_modules() if isinstance(m, LoraLayer)}
        assert found == set(adapter.names)
        assert torch.allclose(logits(peft), ours, atol=1e-5)
        assert torch.allclose(logits(peft.merge_and_unload()), ours, atol=1e-5)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "dual" / "merged", dtype=torch.float32)
    assert torch.allclose(logits(merged), ours, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "dual" / "merged").get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "model").get_vocab()
    assert not (tmp_path / "dual" / "align" / "model.safetensors").exists()


def test_attention_targets_and_the_names_that_peft_gets(family, tmp_path):
    """attention is what lies in attention modules; names are the shortest that match nothing else, as PEFT's own matching shows."""
    model = make_model(family)
    model.save_pretrained(tmp_path / "base")
    adapter = filled(model, targets="attention", blocks=2)
    save_adapter(tmp_path, adapter.factors(), model.base_model, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ATTENTION.get(family, "k_proj o_proj q_proj v_proj").split() and config["layers_to_transform"] == [0, 1]
    assert config["modules_to_save"] is None and not {"rank_pattern", "alpha_pattern"} & set(config)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    found = {name.removeprefix(f"base_model.model.{model.base_model_prefix}.") for name, m in peft.named_modules() if isinstance(m, LoraLayer)}
    assert found == set(adapter.names) and torch.allclose(logits(peft), logits(model), atol=1e-5)


def test_adapter_of_other_linears_in_other_blocks(tmp_path):
    """Attention in all blocks and everything in the first two, stacked, from a trunk cut after them: PEFT still finds just these."""
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path / "base")
    first, second = filled(model, 1, targets="attention"), filled(model, 2, blocks=2)
    from lora import stack
    one, ours = stack(first.factors(), second.factors()), logits(model)
    trunk = M.load_model(str(tmp_path / "base"), torch.float32, "cpu", blocks=2)
    save_adapter(tmp_path, one, trunk, "base")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert sum(isinstance(m, LoraLayer) for m in peft.modules()) == len(one.pairs) == 4 * 2 + 2 * 2
    assert torch.allclose(logits(peft), ours, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checkpointed_blocks_train_the_same_adapter(family, dtype, tmp_path):
    """Gradients of A and B are those without checkpointing, with dropout too, and not zero; far less is kept for the backward."""
    make_model(family).save_pretrained(tmp_path)
    found = {}
    for checkpointing in (False, True):
        model = M.load_model(str(tmp_path), dtype, "cpu", checkpointing=checkpointing)
        adapter = filled(model, dropout=0.3).train()
        torch.manual_seed(1)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
            loss = model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits.float().square().mean()
        loss.backward()
        found[checkpointing] = [p.grad for p in adapter.parameters()], sum(kept)
    assert all(grad.abs().max() > 0 for grad in found[True][0])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(found[False][0], found[True][0]))
    assert found[True][1] < 0.5 * found[False][1]


def test_fp16_trains(tiny, tmp_path):
    """All stages in fp16 with checkpointing: finite weights, and B has moved in every linear."""
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "25", "--dtype", "float16", "--gradient-checkpointing", "True"]
    for stage, args in ((scit, source), (dual, source), (collect, ["--out", tmp_path, "--method", "dual"]),
                        (align, ["--out", tmp_path, "--method", "dual", "--steps", "25", "--gradient-checkpointing", "True"])):
        go(stage, *args, *CPU)
    trunk = make_model("llama").base_model
    for folder in ("scit/adapter", "dual/good", "dual/bad", "dual/align"):
        pairs = load_adapter(tmp_path / folder, trunk).pairs
        assert all(A.isfinite().all() and B.isfinite().all() and B.abs().max() > 0 for A, B in pairs.values()), folder


@pytest.mark.parametrize("kind, words", [("t5", "T5Config"), ("bert", "looks ahead"), ("bart", "no plain stack of decoder blocks.*decoder.layers (12)"),
                                         ("llama4_text", "no trunk under the name 'language_model'")])
def test_models_that_do_not_fit_are_refused_with_the_reason(kind, words, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES)
    if kind == "t5":
        config.save_pretrained(tmp_path)
    else:
        model = AutoModelForCausalLM.from_config(config)
        for p in model.parameters():
            p.data.mul_(10)                   # as in a trained model, tokens then matter to each other
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refusal:
        M.load_model(str(tmp_path), torch.float32, "cpu")
    first, _, second = words.partition(".*")
    assert first in str(refusal.value) and second in str(refusal.value)


def test_blocks_may_differ(tmp_path):
    """A stack of Mamba and attention blocks: each block has its own linears, and PEFT finds all of them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("jamba", **{**SIZES, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False})).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = filled(model)
    assert {"mamba", "self_attn", "feed_forward"} == {name.split(".")[2] for name in adapter.names}
    save_adapter(tmp_path, adapter.factors(), model.base_model, "base")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert sum(isinstance(m, LoraLayer) for m in peft.modules()) == len(adapter.names)
    assert torch.allclose(logits(peft), logits(model), atol=1e-4)
    assert len(LoRA(model.base_model, targets="attention").names) == 2 * 4 and len(FAMILIES) == 17
