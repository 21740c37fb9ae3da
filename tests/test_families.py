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
from lora import LoRA, descend, load_adapter, save_adapter, stack
from test_lora import logits
from test_model import filled

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
    one, ours = stack(first.factors(), second.factors()), logits(model)
    trunk = M.load_model(str(tmp_path / "base"), torch.float32, "cpu", blocks=2)
    save_adapter(tmp_path, one, trunk, "base")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert sum(isinstance(m, LoraLayer) for m in peft.modules()) == len(one.weights) == 4 * 2 + 2 * 2
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
        weights = load_adapter(tmp_path / folder, trunk).weights
        assert all(A.isfinite().all() and B.isfinite().all() and B.abs().max() > 0 for A, B in weights.values()), folder


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


def test_of_a_mixture_of_experts_attention_is_adapted(tmp_path):
    """Where blocks hold shared experts of plain linears, PEFT would put LoRA elsewhere: both targets are attention, and PEFT agrees."""
    torch.manual_seed(0)
    more = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=8, qk_nope_head_dim=8,
                v_head_dim=8, head_dim=8, moe_intermediate_size=16, first_k_dense_replace=1, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("deepseek_v3", **{**SIZES, **more})).eval()
    model.save_pretrained(tmp_path / "base")
    adapter = filled(model)
    assert all(".self_attn." in name for name in adapter.names)
    save_adapter(tmp_path, adapter.factors(), model.base_model, "base")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert torch.allclose(logits(peft), logits(model), atol=1e-5)
    with pytest.raises(UserError, match="no such linear"):
        LoRA(model.base_model, targets="gate_proj")


def test_a_trunk_within_a_larger_model_is_cut_too(tmp_path):
    """Gemma 3 with its vision tower: the text blocks are found, cut, and adapted by names that match nothing in the tower."""
    torch.manual_seed(0)
    text = {**SIZES, "head_dim": 8, "sliding_window": 16}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=14),
                                  mm_tokens_per_image=4, image_token_index=7, boi_token_index=8, eoi_token_index=9)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = M.load_model(str(tmp_path / "base"), torch.float32, "cpu")
    trunk = M.load_model(str(tmp_path / "base"), torch.float32, "cpu", blocks=2)
    assert len(M.find_blocks(trunk)[1]) == 2 and M.find_blocks(model.base_model)[0] == M.find_blocks(trunk)[0] == "language_model.layers"
    ids, attention = torch.arange(10, 22)[None], torch.ones(1, 12, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(M.hidden_states(model.base_model, [1], ids)[0], M.hidden_states(trunk, [1], ids)[0])
    adapter = filled(model, blocks=2)
    save_adapter(tmp_path, adapter.factors(), trunk, "base")
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert sum(isinstance(m, LoraLayer) for m in peft.modules()) == len(adapter.names) == 14
    with torch.no_grad():
        assert torch.allclose(peft(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


def test_loss_scaling_keeps_small_fp16_gradients():
    """A loss whose gradient is below fp16's smallest number moves B only where it is scaled; and every stage passes its flags on."""
    moved = {}
    for enabled in (False, True):
        model = make_model("llama").half()
        adapter = LoRA(model.base_model)
        optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
        loss = 1e-7 * model(input_ids=torch.arange(20)[None]).logits.float().square().mean()
        descend([loss], adapter, optimizer, torch.amp.GradScaler("cpu", enabled=enabled, init_scale=2.0**20))
        moved[enabled] = sum((B != 0).float().mean().item() for B in adapter.B) / len(adapter.B)
    assert moved[True] > 0.9 > 0.5 > moved[False]


@pytest.mark.parametrize("stage", ["scit", "dual", "align"])
def test_stages_pass_checkpointing_and_loss_scaling_on(stage, tiny, tmp_path, monkeypatch):
    seen, source = [], ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path, "--steps", "1", "--dtype", "float16"]
    if stage == "align":
        go(dual, *source, *CPU)
        go(collect, "--out", tmp_path, "--limit", "8", *CPU)
        source = ["--out", tmp_path, "--steps", "1"]
    own = M.checkpoint
    monkeypatch.setattr(M, "checkpoint", lambda *args, **kwargs: seen.append("block") or own(*args, **kwargs))
    scaled = torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: seen.append("scaled" if self.is_enabled() else "plain") or scaled(self, loss))
    go({"scit": scit, "dual": dual, "align": align}[stage], *source, "--gradient-checkpointing", "True", *CPU)
    assert {"block", "scaled"} == set(seen)


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
