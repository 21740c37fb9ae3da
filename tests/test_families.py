"""Every family through every stage, and what it leaves behind: adapters that PEFT loads, a merged
model, refusals."""

import json

import pytest
import torch
from helpers import (
    FAMILIES,
    HERE,
    ROOT,
    SIZES,
    adapted_by_peft,
    go,
    listing,
    load_peft,
    logits_of,
    make_model,
    random_adapter,
    saved_bytes,
    some_batch,
    stage1_source,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import align
import collect
import dual
import evaluate
import scit
from common import hf
from common.config import UserError
from lora import LoRA, load_adapter, save_adapter, stack
from studies import families
from tools import export

BATCH = some_batch()

# Names of the linear layers in attention modules, as PEFT gets them.
LLAMA_ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
ATTENTION = {
    "phi": ["dense", "k_proj", "q_proj", "v_proj"],
    "phi3": ["o_proj", "qkv_proj"],
    "gpt_neox": ["dense", "query_key_value"],
    "gpt2": ["attn.c_attn", "attn.c_proj"],
    "opt": ["k_proj", "out_proj", "q_proj", "v_proj"],
    "falcon": ["dense", "query_key_value"],
    "bloom": ["dense", "query_key_value"],
}


def random_model(kind, **options):
    """A random model that is none of the FAMILIES."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **options}))


def peft_with(adapter, model, trunk, folder):
    """PEFT's model with a LoRA whose files are written to a folder."""
    model.save_pretrained(folder / "base")
    save_adapter(folder, adapter.weights(), trunk, "base")
    return load_peft(folder / "base", folder)


# ---------------------------------------------------------------- all stages


def test_all_stages_run_and_the_adapter_loads_everywhere(family, tiny, tokenizer, tmp_path):
    """Stages of both methods. On the original base PEFT gives our logits before and after its
    merge; so does the exported model."""
    make_model(family).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_bytes((tiny / "pairs.jsonl").read_bytes())
    source = stage1_source(tmp_path, tmp_path)
    options = ["--lr", "1e-2", *HERE]
    go(scit, *source, "--steps", "2", *options)
    go(dual, *source, "--steps", "2", *options)
    for method, targets in (("scit", "attention"), ("dual", "all-linear")):
        which = ["--out", tmp_path, "--method", method]
        go(collect, *which, "--layers", "1", "2", "--limit", "8", *HERE)
        more = ["--steps", "3", "--batch-size", "4", "--lora-targets", targets]
        go(align, *which, *more, *options)
    go(evaluate, "--out", tmp_path, "--limit", "3", "--max-new-tokens", "3", *HERE)
    report = json.loads((tmp_path / "evaluate" / "report.json").read_text())
    assert len(report["models"]) == 9

    base = hf.load_model(str(tmp_path / "model"), "float32", "cpu")
    base_logits = logits_of(base, BATCH)
    for method in ("scit", "dual"):
        folder = tmp_path / method / "align"
        adapter = LoRA(base.base_model, weights=load_adapter(folder, base.base_model)).eval()
        expected = logits_of(base, BATCH)
        adapter.remove()
        assert (expected - base_logits).abs().max() > 1e-3
        peft = load_peft(tmp_path / "model", folder)
        assert adapted_by_peft(peft, base.base_model) == set(adapter.names)
        assert torch.allclose(logits_of(peft, BATCH), expected, atol=1e-5)
        assert torch.allclose(logits_of(peft.merge_and_unload(), BATCH), expected, atol=1e-5)

    go(export, "--out", tmp_path, "--method", "dual", *HERE)
    merged_folder = tmp_path / "dual" / "merged"
    merged = AutoModelForCausalLM.from_pretrained(merged_folder, dtype=torch.float32)
    assert torch.allclose(logits_of(merged, BATCH), expected, atol=1e-5)
    vocabularies = []
    for folder in (merged_folder, tmp_path / "model"):
        vocabularies.append(AutoTokenizer.from_pretrained(folder).get_vocab())
    assert vocabularies[0] == vocabularies[1]
    assert not (tmp_path / "dual" / "align" / "model.safetensors").exists()


def test_bf16_with_gradient_checkpointing_trains(tiny, tmp_path):
    """Finite weights after all stages, and B has moved in every linear layer."""
    options = ["--steps", "8", "--gradient-checkpointing", "True", *HERE]
    source = [*stage1_source(tiny, tmp_path), "--dtype", "bfloat16"]
    go(scit, *source, *options)
    go(dual, *source, *options)
    go(collect, "--out", tmp_path, "--method", "dual", *HERE)
    go(align, "--out", tmp_path, "--method", "dual", *options)
    trunk = make_model("llama").base_model
    for folder in ("scit/adapter", "dual/good", "dual/bad", "dual/align"):
        for A, B in load_adapter(tmp_path / folder, trunk).tensors.values():
            assert A.isfinite().all() and B.isfinite().all(), folder
            assert B.abs().max() > 0, folder


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_blocks_train_the_same_adapter(family, dtype, tmp_path):
    """Gradients of A and B are those without checkpointing, with dropout too, and not zero; far
    less is kept for the backward."""
    make_model(family).save_pretrained(tmp_path)

    def gradients_and_kept(gradient_checkpointing):
        model = hf.load_model(str(tmp_path), dtype, "cpu", gradient_checkpointing)
        adapter = random_adapter(model, dropout=0.3).train()
        torch.manual_seed(1)
        with saved_bytes() as kept:
            logits = model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits
            loss = logits.float().square().mean()
        loss.backward()
        return [p.grad for p in adapter.parameters()], sum(kept)

    gradients, kept = gradients_and_kept(False)
    recomputed, kept_by_checkpoints = gradients_and_kept(True)
    for gradient, other in zip(gradients, recomputed):
        assert other.abs().max() > 0
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-7)
    assert kept_by_checkpoints < 0.5 * kept


@pytest.mark.parametrize("stage", [scit, dual, align])
def test_stages_pass_gradient_checkpointing_on(stage, tiny, done, tmp_path, monkeypatch):
    checkpoint_activations = hf.checkpoint_activations
    blocks = []

    def recording(function, *args, **options):
        blocks.append(type(function.__self__).__name__)
        return checkpoint_activations(function, *args, **options)

    monkeypatch.setattr(hf, "checkpoint_activations", recording)
    source = stage1_source(tiny, tmp_path)
    if stage is align:
        (tmp_path / "dual").mkdir()
        (tmp_path / "dual" / "collect").symlink_to(done / "dual" / "collect")
        source = ["--out", tmp_path]
    go(stage, *source, "--steps", "1", *HERE)
    assert not blocks
    go(stage, *source, "--steps", "1", "--gradient-checkpointing", "True", *HERE)
    assert set(blocks) == {"LlamaDecoderLayer"}


# ---------------------------------------------------------------- what PEFT gets


def test_attention_targets_and_the_names_that_peft_gets(family, tmp_path):
    """attention is what lies in attention modules; names are the shortest that match nothing
    else, as PEFT's own matching shows."""
    model = make_model(family)
    adapter = random_adapter(model, blocks=2, targets="attention")
    peft = peft_with(adapter, model, model.base_model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ATTENTION.get(family, LLAMA_ATTENTION)
    assert config["layers_to_transform"] == [0, 1]
    assert config["modules_to_save"] is None
    assert not {"rank_pattern", "alpha_pattern"} & set(config)
    assert adapted_by_peft(peft, model.base_model) == set(adapter.names)
    assert torch.allclose(logits_of(peft, BATCH), logits_of(model, BATCH), atol=1e-5)


def test_adapter_of_other_linears_in_other_blocks(tmp_path):
    """Attention in all blocks and everything in the first two, stacked, from a trunk cut after
    them: PEFT still adapts just these."""
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path / "base")
    first = random_adapter(model, 1, targets="attention")
    second = random_adapter(model, 2, blocks=2)
    stacked = stack(first.weights(), second.weights())
    trunk = hf.load_trunk(str(tmp_path / "base"), 2, "float32", "cpu")
    save_adapter(tmp_path, stacked, trunk, "base")
    peft = load_peft(tmp_path / "base", tmp_path)
    # two linear layers in each attention module, two more in each of the first two blocks
    assert len(stacked.tensors) == 4 * 2 + 2 * 2
    assert adapted_by_peft(peft, model.base_model) == set(stacked.tensors)
    assert torch.allclose(logits_of(peft, BATCH), logits_of(model, BATCH), atol=1e-5)


def test_of_a_mixture_of_experts_attention_is_adapted(tmp_path):
    """Where blocks hold shared experts of plain linear layers, PEFT would put LoRA elsewhere: both
    targets are attention, and PEFT agrees."""
    model = random_model(
        "deepseek_v3",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        head_dim=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ).eval()
    adapter = random_adapter(model)
    assert all(".self_attn." in name for name in adapter.names)
    peft = peft_with(adapter, model, model.base_model, tmp_path)
    assert torch.allclose(logits_of(peft, BATCH), logits_of(model, BATCH), atol=1e-5)
    with pytest.raises(UserError, match="no such linear"):
        LoRA(model.base_model, targets="gate_proj")


def test_blocks_may_differ(tmp_path):
    """A stack of Mamba and attention blocks: each block has its own linear layers, and PEFT finds
    all of them."""
    model = random_model(
        "jamba", num_experts=1, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False
    ).eval()
    adapter = random_adapter(model)
    kinds = {name.split(".")[2] for name in adapter.names}
    assert kinds == {"mamba", "self_attn", "feed_forward"}
    peft = peft_with(adapter, model, model.base_model, tmp_path)
    assert adapted_by_peft(peft, model.base_model) == set(adapter.names)
    assert torch.allclose(logits_of(peft, BATCH), logits_of(model, BATCH), atol=1e-4)
    # two attention blocks
    assert len(LoRA(model.base_model, targets="attention").names) == 2 * 4


def test_a_trunk_within_a_larger_model_is_cut_too(tmp_path):
    """Gemma 3 with its vision tower: the text blocks are found, cut, and adapted by names that
    match nothing in the tower."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model(
        "gemma3",
        text_config={**SIZES, "head_dim": 8, "sliding_window": 16},
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=7,
        boi_token_index=8,
        eoi_token_index=9,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = hf.load_model(str(tmp_path / "base"), "float32", "cpu")
    trunk = hf.load_trunk(str(tmp_path / "base"), 2, "float32", "cpu")
    path, blocks = hf.find_blocks(trunk)
    assert len(blocks) == 2
    assert hf.find_blocks(model.base_model)[0] == path == "language_model.layers"
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        [whole] = hf.hidden_states(model.base_model, [1], ids)
        [cut] = hf.hidden_states(trunk, [1], ids)
    assert torch.equal(whole, cut)

    adapter = random_adapter(model, blocks=2)
    save_adapter(tmp_path, adapter.weights(), trunk, "base")
    peft = load_peft(tmp_path / "base", tmp_path)
    assert adapted_by_peft(peft, model.base_model) == set(adapter.names)
    assert len(adapter.names) == 14
    with torch.no_grad():
        assert torch.allclose(peft(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5)


# ---------------------------------------------------------------- refusals


# In these the number of blocks, or the final norm, matters in the blocks too.
@pytest.mark.parametrize("kind", ["nanochat", "minicpm3"])
def test_families_in_which_a_cut_matters(kind):
    """Half of the model has the states of the whole, and PEFT gives the same logits."""
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind}")
    assert families.check_family(kind)["verdict"] == "works"


def test_a_trunk_with_other_states_is_refused(tmp_path, monkeypatch):
    """Granite scales what its blocks add. Were its trunk another, it would be noticed before
    anything is trained."""
    make_model("granite").save_pretrained(tmp_path)
    model = hf.load_model(str(tmp_path), "float32", torch.device("cpu"))
    hf.check_trunk(str(tmp_path), model)
    load_trunk = hf.load_trunk

    def other_trunk(*args):
        trunk = load_trunk(*args)
        for block in trunk.layers:
            block.residual_multiplier *= 0.9
        return trunk

    monkeypatch.setattr(hf, "load_trunk", other_trunk)
    with pytest.raises(UserError, match=r"the first 3 blocks of Granite.* have other states alone"):
        hf.check_trunk(str(tmp_path), model)


@pytest.mark.parametrize(
    "kind, options, words",
    [
        ("gemma3n_text", {}, "a block of Gemma3nForCausalLM returns (4, 2, 5, 32)"),
        ("openai-gpt", {}, "a block of OpenAIGPTLMHeadModel returns list"),
        ("bert", {"is_decoder": True}, "has more around its blocks than a decoder"),
        ("dory", {}, "have other states alone than in the whole model"),
        ("nemotron_h", {}, "no such linear in NemotronHModel"),
    ],
)
def test_stage_1_refuses_what_later_stages_cannot_do(
    kind, options, words, tiny, tmp_path, fails, monkeypatch
):
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this version of transformers has no {kind}")
    monkeypatch.setitem(families.EXTRA, kind, {**families.EXTRA.get(kind, {}), **options})
    families.tiny_model(kind).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    source = ["--model", tmp_path / "model", "--data", tiny / "pairs.jsonl"]
    code, lines = fails(dual, *source, "--out", tmp_path / "out", "--steps", "1", *HERE)
    assert code == 2
    assert words in lines[-1]
    assert not listing(tmp_path / "out")


def test_of_mamba_peft_gets_no_out_proj(tmp_path):
    """Its fast kernels read that weight past the layer."""
    assert families.check_family("mamba")["verdict"] == "works"


@pytest.mark.parametrize(
    "kind, words",
    [
        ("t5", ["T5Config"]),
        ("bert", ["looks ahead"]),
        ("bart", ["no plain stack of decoder blocks", "decoder.layers (12)"]),
        ("llama4_text", ["no trunk under the name 'language_model'"]),
    ],
)
def test_models_that_do_not_fit_are_refused_with_the_reason(kind, words, tmp_path):
    if kind == "t5":
        AutoConfig.for_model(kind, **SIZES).save_pretrained(tmp_path)
    else:
        model = random_model(kind)
        for p in model.parameters():
            # as in a trained model, tokens then matter to each other
            p.data.mul_(10)
        model.save_pretrained(tmp_path)
    with pytest.raises(UserError) as refusal:
        hf.load_model(str(tmp_path), "float32", "cpu")
    for text in words:
        assert text in str(refusal.value)


def test_the_families_are_as_many_as_the_readme_says():
    assert f"{len(FAMILIES)} families" in (ROOT / "README.md").read_text()
