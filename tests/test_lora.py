"""The adapter against the identity, PEFT, merging, stacking; and how it is trained."""

import json
import math
import shutil

import pytest
import torch
from helpers import (
    CPU,
    go,
    load_peft,
    logits_of,
    make_model,
    random_adapter,
    some_batch,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import align
import dual
import scit
from common.stages import read_stage
from common.training import cosine_with_warmup
from lora import LoRA, enable_only, load_adapter, save_adapter, stack

BATCH = some_batch()


def test_identity_at_the_start_and_bit_for_bit_base_when_off(model):
    base = logits_of(model, BATCH)
    adapter = LoRA(model.base_model)
    assert torch.equal(logits_of(model, BATCH), base)
    with torch.no_grad():
        for B in adapter.B:
            B.normal_()
    assert not torch.allclose(logits_of(model, BATCH), base, atol=1e-3)
    with enable_only([], among=[adapter]):
        assert torch.equal(logits_of(model, BATCH), base)
    adapter.remove()
    assert torch.equal(logits_of(model, BATCH), base)


def test_merged_equals_applied(model):
    adapter = random_adapter(model)
    applied = logits_of(model, BATCH)
    adapter.merge()
    assert torch.allclose(logits_of(model, BATCH), applied, atol=1e-5)


def test_peft_gives_the_same_logits_before_and_after_its_merge(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    adapter = random_adapter(model, blocks=3, rank=4, alpha=6)
    save_adapter(tmp_path, adapter.weights(), model.base_model, str(tmp_path / "base"))
    expected = logits_of(model, BATCH)
    peft = load_peft(tmp_path / "base", tmp_path)
    assert torch.allclose(logits_of(peft, BATCH), expected, atol=1e-5)
    assert torch.allclose(logits_of(peft.merge_and_unload(), BATCH), expected, atol=1e-5)


def test_save_and_load_round_trip(model, tmp_path):
    adapter = random_adapter(model, blocks=3, rank=4, alpha=6, dropout=0.1)
    expected = logits_of(model, BATCH)
    save_adapter(tmp_path, adapter.weights(), model.base_model, "base")
    adapter.remove()
    LoRA(model.base_model, weights=load_adapter(tmp_path, model.base_model)).eval()
    assert torch.equal(logits_of(model, BATCH), expected)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert config["lora_alpha"] == 6
    assert config["layers_to_transform"] == [0, 1, 2]


def test_stacked_equals_both_applied(model):
    """Different ranks and scales; the second touches fewer blocks and linear layers."""
    first = random_adapter(model, 1, rank=3, alpha=5)
    name = first.names[0].rpartition(".")[2]
    second = random_adapter(model, 2, blocks=2, rank=2, alpha=7, targets=name)
    both = logits_of(model, BATCH)
    stacked = stack(first.weights(), second.weights())
    assert stacked.rank == 5
    assert set(stacked.tensors) == set(first.names)
    for A, _ in stacked.tensors.values():
        assert len(A) == 5
    first.remove()
    second.remove()
    LoRA(model.base_model, weights=stacked).eval()
    assert torch.allclose(logits_of(model, BATCH), both, atol=1e-5)


# ---------------------------------------------------------------- training


def test_training_leaves_the_base_untouched_and_moves_the_adapter(model):
    adapter = LoRA(model.requires_grad_(False).base_model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-2)
    for _ in range(2):
        output = model(input_ids=BATCH.ids, attention_mask=BATCH.attention.long())
        output.logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
        assert p.grad is None
    for B in adapter.B:
        assert B.abs().max() > 0


def test_warm_up_and_cosine_by_hand():
    """20 steps, 2 of them warm-up."""
    lr_lambda = cosine_with_warmup(20)
    assert lr_lambda(0) == 0.5
    assert lr_lambda(1) == pytest.approx(0.5 * (1 + math.cos(math.pi / 20)))
    assert lr_lambda(10) == pytest.approx(0.5)
    assert lr_lambda(20) == 0


def gradient_norm(parameters):
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))


@pytest.mark.parametrize("lora_alpha, large", [(64000, True), (0.016, False)])
def test_each_stage_clips_large_gradients_alone(lora_alpha, large, done, tmp_path, monkeypatch):
    """An adapter's gradient grows with its scale. Where its norm is over 1, the optimizer gets it
    with norm 1; a smaller one arrives as it is."""
    computed, stepped = [], []
    clip_grad_norm = torch.nn.utils.clip_grad_norm_

    def clip(parameters, max_norm):
        parameters = list(parameters)
        computed.append(gradient_norm(parameters))
        return clip_grad_norm(parameters, max_norm)

    def before_step(optimizer, args, kwargs):
        parameters = optimizer.param_groups[0]["params"]
        # dual trains two adapters at once, each of which is clipped
        n_adapters = len(computed) - len(stepped)
        size = len(parameters) // n_adapters
        for i in range(n_adapters):
            stepped.append(gradient_norm(parameters[i * size : (i + 1) * size]))

    for stage in (scit, dual, align):
        monkeypatch.setattr(stage, "clip_grad_norm_", clip)
    shutil.copytree(done / "dual" / "collect", tmp_path / "collected" / "dual" / "collect")
    settings = read_stage(done / "dual" / "collect", "collect", "")["settings"]
    source = ["--model", settings["model"], "--data", *settings["data"], "--out", tmp_path]
    options = ["--steps", "1", "--batch-size", "4", "--lora-alpha", lora_alpha, *CPU]
    hook = register_optimizer_step_pre_hook(before_step)
    try:
        go(scit, *source, *options)
        go(dual, *source, *options)
        go(align, "--out", tmp_path / "collected", *options)
    finally:
        hook.remove()
    assert len(stepped) == len(computed) == 4
    for norm, norm_at_step in zip(computed, stepped):
        assert (norm > 1) == large
        assert norm_at_step == pytest.approx(min(1, norm), rel=1e-4)


def test_the_adapter_of_a_bf16_model_is_in_fp32():
    model = make_model("llama").to(torch.bfloat16)
    adapter = random_adapter(model)
    assert logits_of(model, BATCH).dtype == torch.bfloat16
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_dropout_acts_only_in_training():
    model = make_model("llama")
    adapter = random_adapter(model, dropout=0.5)
    assert torch.equal(logits_of(model, BATCH), logits_of(model, BATCH))
    adapter.train()
    assert not torch.equal(logits_of(model, BATCH), logits_of(model, BATCH))
