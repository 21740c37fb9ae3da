"""Bytes that a recorded token takes on disk, measured on written files.

    python -m studies.disk --data pairs.jsonl            writes studies/results/disk.json

Five target layers of width 4,096 in bf16, in each form that collect.py can store. The model is
random and narrow inside: only its width counts. Inputs over 300 tokens are left out.
"""

import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import collect
import dual
from common import toy
from common.config import run, setting
from common.stages import read_stage
from studies.shared import quietly, write_result

LAYERS = 5
FORMS = {
    "full": {},
    "diff": {"store": "diff"},
    "full, no base": {"store_base": False},
    "diff, no base": {"store": "diff", "store_base": False},
}


@dataclass
class Config:
    width: int = setting(4096, "hidden size", minimum=32)
    data: str = setting(
        "", "preference pairs; empty takes pairs of the embedded default", group="data"
    )
    limit: int = setting(40, "training pairs", minimum=1, group="data")


def write_inputs(folder, config):
    """A random model and pairs in a folder. Returns the paths of both."""
    requests = toy.split_requests(list(toy.ASK), 0)
    docs = toy.documents(requests, 2000, random.Random(0))
    tokenizer = toy.train_tokenizer([prompt + reply for prompt, reply in docs])
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    if config.data:
        return folder / "model", Path(config.data)
    rows = toy.preference_rows(requests, config.limit, random.Random(0))
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "model", pairs


def main(config):
    figures = {}
    with tempfile.TemporaryDirectory() as out:
        model, pairs = write_inputs(Path(out), config)
        shared = {"out": out, "device": "cpu", "limit": config.limit}
        source = {"model": str(model), "data": [str(pairs)], "dtype": "bfloat16"}
        quietly(dual, **shared, **source, max_length=300, steps=1, batch_size=2)
        for name, form in FORMS.items():
            quietly(collect, **shared, layers=["all"], **form)
            folder = Path(out) / "dual" / "collect"
            manifest = read_stage(folder, "collect", "python collect.py")
            shards = [*manifest["shards"], *manifest["validation_shards"]]
            size = sum((folder / shard).stat().st_size for shard in shards)
            per_token = round(size / manifest["tokens"], 1)
            figures[name] = {"bytes a token": per_token, "counted": manifest["token_bytes"]}
            print(f"{name:>14}: {per_token:>10,} bytes a token on disk", flush=True)
    result = {
        "data": pairs.name,
        "layers": LAYERS,
        "width": config.width,
        "dtype": "bfloat16",
        "tokens": manifest["tokens"],
        "forms": figures,
    }
    write_result("disk", result)


if __name__ == "__main__":
    run(main, Config)
