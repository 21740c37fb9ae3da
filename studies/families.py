"""Does half a model compute what the whole one does? Every family of transformers with a head for
causal language modelling, as far as it builds from a tiny configuration.

    python -m studies.families                           a few minutes on a CPU
    python -m studies.families --kinds gemma3n zamba2    some of them

Each family gets random weights and goes through what stage 1 checks. Where it passes, the states
of its first blocks alone are compared with those in the whole model, for every place of the cut;
and an adapter on the first half must give the same logits when PEFT loads it from its files. A
family that stage 1 lets pass and that differs is WRONG. Writes studies/results/families.json.
"""

import json
import signal
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common.config import UserError, first_line, run, setting
from common.hf import check_trunk, find_blocks, hidden_states, load_model, load_trunk
from common.stages import versions
from lora import LoRA, save_adapter

RESULTS = Path(__file__).parent / "results" / "families.json"

# Larger models are left out, and slower ones.
MAX_PARAMETERS = 30e6
MAX_SECONDS = 60

# Sizes under the names that the families' configurations give them.
SIZES = {
    32: "hidden_size n_embd d_model embedding_size word_embed_proj_dim attention_hidden_size "
    "lru_width mamba_d_ssm",
    64: "intermediate_size ffn_dim ffn_hidden_size n_inner decoder_ffn_dim",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_attention_heads n_head "
    "n_heads decoder_attention_heads num_local_experts num_experts n_routed_experts "
    "moe_num_experts linear_num_key_heads linear_num_value_heads",
    2: "num_key_value_heads num_experts_per_tok moe_topk moe_k",
    1: "n_group topk_group first_k_dense_replace pad_token_id n_shared_experts mamba_n_groups "
    "n_groups moe_num_shared_experts",
    8: "head_dim kv_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim "
    "mamba_n_heads hidden_size_per_layer_input state_size mamba_d_state mamba_d_head "
    "mamba_head_dim q_lora_rank linear_key_head_dim "
    "linear_value_head_dim index_head_dim",
    16: "moe_intermediate_size shared_expert_intermediate_size sliding_window attention_chunk_size "
    "shared_intermediate_size time_step_rank",
    0: "eos_token_id num_nextn_predict_layers",
    128: "max_position_embeddings n_positions",
    800: "vocab_size vocab_size_per_layer_input",
}
VALUES = {name: value for value, names in SIZES.items() for name in names.split()}

# What some families need besides.
EXTRA = {
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 8},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba": {"use_mamba_kernels": False},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}


@dataclass
class Config:
    kinds: list[str] | None = setting(None, "model types; empty takes all, and writes the results")


def tiny_model(kind, **changes):
    """A random model of a family, its weights widened so that every block matters. changes: other
    values of its configuration."""
    known = AutoConfig.for_model(kind).get_text_config().to_dict()
    options = {name: value for name, value in VALUES.items() if name in known}
    names = AutoConfig.for_model(kind).attribute_map
    options |= {name: VALUES[name] for name in names if name in VALUES}
    if "kv_lora_rank" in options:
        # latent attention has as many keys as queries
        options["num_key_value_heads"] = options["num_attention_heads"]
    options |= {"bos_token_id": 2, **EXTRA.get(kind, {}), **changes}
    if "text_config" in AutoConfig.for_model(kind).to_dict():
        options = {"text_config": options}
    config = AutoConfig.for_model(kind, **options)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    size = sum(p.numel() for p in empty.parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
        # a configuration that does not fit itself shows here
        model(input_ids=torch.arange(10, 22)[None], use_cache=False)
    return model


@torch.no_grad()
def largest_difference(folder, model):
    """How far the states of the first blocks alone are from those in the whole model, as a share of
    their length: the largest over all cuts and layers."""
    ids = torch.arange(10, 34).view(2, 12)
    n = len(find_blocks(model.base_model)[1])
    whole = hidden_states(model.base_model, range(n), ids)
    largest = 0.0
    for n_blocks in range(1, n + 1):
        trunk = load_trunk(folder, n_blocks, "float32", "cpu")
        cut = hidden_states(trunk, range(n_blocks), ids)
        for one, other in zip(cut, whole):
            largest = max(largest, ((one - other).norm() / other.norm()).item())
    return largest


@torch.no_grad()
def difference_to_peft(folder, model):
    """How far the logits with an adapter on the first half are from those that PEFT computes."""
    n_blocks = max(1, len(find_blocks(model.base_model)[1]) // 2)
    trunk = load_trunk(folder, n_blocks, "float32", "cpu")
    adapter = LoRA(trunk, rank=4, alpha=7)
    for B in adapter.B:
        B.normal_(std=0.05)
    adapter.remove()
    save_adapter(folder, adapter.weights(), trunk, folder)
    ids = torch.arange(10, 22)[None]
    before = model(input_ids=ids, use_cache=False).logits
    LoRA(model.base_model, weights=adapter.weights()).eval()
    ours = model(input_ids=ids, use_cache=False).logits
    Path(folder, "adapter_config.json").rename(Path(folder, "adapter", "adapter_config.json"))
    Path(folder, "adapter_model.safetensors").rename(
        Path(folder, "adapter", "adapter_model.safetensors")
    )
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = (
        PeftModel.from_pretrained(base, f"{folder}/adapter")
        .eval()(input_ids=ids, use_cache=False)
        .logits
    )
    return ((ours - theirs).norm() / (ours - before).norm()).item()


def check_family(kind):
    """{"verdict": ..., ...} of one family."""
    try:
        model = tiny_model(kind)
    except Exception as error:
        return {"verdict": "not built", "why": first_line(error)[:120]}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "adapter").mkdir()
        try:
            model.save_pretrained(folder)
        except Exception as error:
            return {"verdict": "not built", "why": first_line(error)[:120]}
        try:
            model = load_model(folder, "float32", torch.device("cpu"))
            check_trunk(folder, model)
            LoRA(model.base_model, rank=4).remove()
        except UserError as error:
            return {"verdict": "refused", "why": str(error).replace(folder, kind)[:200]}
        result = {"states": largest_difference(folder, model)}
        result["peft"] = difference_to_peft(folder, model)
    fits = result["states"] < 1e-5 and result["peft"] < 1e-3
    return {"verdict": "works" if fits else "WRONG", **result}


def give_up(signum, frame):
    raise TimeoutError(f"takes more than {MAX_SECONDS} seconds")


def main(config):
    signal.signal(signal.SIGALRM, give_up)
    results = {}
    for kind in config.kinds or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        signal.alarm(MAX_SECONDS)
        try:
            results[kind] = check_family(kind)
        except Exception as error:
            results[kind] = {
                "verdict": "WRONG",
                "why": f"{type(error).__name__}: {first_line(error)}",
            }
        signal.alarm(0)
        print(kind, results[kind], flush=True)
    counts = Counter(result["verdict"] for result in results.values())
    print(dict(counts))
    if not config.kinds:
        summary = {"versions": versions(), "counts": counts, "families": results}
        RESULTS.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {RESULTS}")


if __name__ == "__main__":
    run(main, Config)
