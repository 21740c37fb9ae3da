"""The adapter against the identity, PEFT, merging, stacking."""
import json
import math

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from conftest import make_model
from lora import LoRA, cosine, descend, load_adapter, only, save_adapter, stack
from test_model import filled, some_batch

BATCH = some_batch()


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH.ids, attention_mask=BATCH.attention.long()).logits[BATCH.attention]


def test_identity_at_the_start_and_bit_for_bit_base_when_off(model):
    base = logits(model)
    adapter = LoRA(model.base_model)
    assert torch.equal(logits(model), base)
    with torch.no_grad():
        for B in adapter.B:
            B.normal_()
    assert not torch.allclose(logits(model), base, atol=1e-3)
    with only([adapter]):
        assert torch.equal(logits(model), base)
    adapter.remove()
    assert torch.equal(logits(model), base)


def test_merged_equals_applied(model):
    adapter = filled(model)
    applied = logits(model)
    adapter.merge()
    assert torch.allclose(logits(model), applied, atol=1e-5)


def test_peft_gives_the_same_logits_before_and_after_its_merge(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    adapter = filled(model, rank=4, alpha=6, blocks=3)
    save_adapter(tmp_path, adapter.factors(), model.base_model, str(tmp_path / "base"))
    ours = logits(model)
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path).eval()
    assert torch.allclose(logits(peft), ours, atol=1e-5)
    assert torch.allclose(logits(peft.merge_and_unload()), ours, atol=1e-5)


def test_save_and_load_round_trip(model, tmp_path):
    adapter = filled(model, rank=4, alpha=6, blocks=3, dropout=0.1)
    ours = logits(model)
    save_adapter(tmp_path, adapter.factors(), model.base_model, "base")
    adapter.remove()
    LoRA(model.base_model, factors=load_adapter(tmp_path, model.base_model)).eval()
    assert torch.equal(logits(model), ours)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (4, 6, [0, 1, 2])


def test_stacked_equals_both_applied(model):
    """Different ranks and scales; the second touches fewer blocks and linears."""
    first = filled(model, 1, rank=3, alpha=5)
    names = [name.rsplit(".", 1)[1] for name in first.names]
    second = filled(model, 2, rank=2, alpha=7, blocks=2, targets=names[0])
    both = logits(model)
    one = stack(first.factors(), second.factors())
    assert one.rank == 5 and {len(A) for A, _ in one.weights.values()} == {5} and set(one.weights) == set(first.names)
    first.remove(), second.remove()
    LoRA(model.base_model, factors=one).eval()
    assert torch.allclose(logits(model), both, atol=1e-5)


def test_training_leaves_the_base_untouched_and_moves_the_adapter(model):
    adapter = LoRA(model.requires_grad_(False).base_model, blocks=2)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        model(input_ids=BATCH.ids, attention_mask=BATCH.attention.long()).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(B.abs().max() > 0 for B in adapter.B)
    assert all(p.grad is None for p in model.parameters())


def test_warm_up_cosine_and_clipping_by_hand():
    factor = cosine(20)                       # 2 steps of warm-up
    assert factor(0) == 0.5 and factor(1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 20))) and factor(10) == pytest.approx(0.5) and factor(20) == 0
    for size, moved in ((1e4, 1.0), (1e-2, 1e-2)):               # a step of length 1 at most; a smaller gradient as it is
        adapter, scaler = torch.nn.Linear(1, 1, bias=False), torch.amp.GradScaler("cpu", enabled=False)
        before = adapter.weight.item()
        total = descend([size / 2 * adapter.weight.sum(), size / 2 * adapter.weight.sum()], adapter, torch.optim.SGD(adapter.parameters(), lr=1.0), scaler)
        assert before - adapter.weight.item() == pytest.approx(moved, rel=1e-4) and total.item() == pytest.approx(size * before, rel=1e-5)
        assert adapter.weight.grad is None


def test_bf16_base_trains_in_fp32():
    model = make_model("llama").to(torch.bfloat16)
    adapter = filled(model)
    assert logits(model).dtype == torch.bfloat16 and {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_dropout_only_while_training():
    model = make_model("llama")
    adapter = filled(model, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    adapter.train()
    assert not torch.equal(logits(model), logits(model))
