"""Bytes that a collected token takes on disk in each store form, at 5 target layers of width 4,096: measured on written files.

    python tests/disk.py --data pairs.jsonl             writes tests/results/disk.json

The model is random and narrow inside: its width and its bf16 states count, not what it says. Inputs over 300 tokens are left out.
"""
import json
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import collect
import dual
import toy
from files import read_stage, run, setting, versions, write_json

FORMS = {"full": {}, "diff": {"store": "diff"}, "full, no base": {"store_base": False}, "diff, no base": {"store": "diff", "store_base": False},
         "lowrank": {"store": "lowrank"}, "lowrank, no base": {"store": "lowrank", "store_base": False}}


@dataclass
class Config:
    data: str = setting("", "preference pairs; empty takes pairs of the embedded default")
    limit: int = setting(40, "training pairs", least=1)
    width: int = setting(4096, "hidden size", least=32)


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        requests = toy.split_requests(list(toy.ASK), 0)
        docs = list(toy.documents(requests, 2000, random.Random(0)))
        tokenizer = toy.train_tokenizer([prompt + reply for prompt, reply in docs])
        tokenizer.save_pretrained(out / "model")
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=config.width, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
                                     num_key_value_heads=1, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None, eos_token_id=0, pad_token_id=1)).to(torch.bfloat16).save_pretrained(out / "model")
        pairs = Path(config.data) if config.data else out / "pairs.jsonl"
        if not config.data:
            pairs.write_text("".join(json.dumps(row) + "\n" for row in toy.preference_rows(requests, config.limit, random.Random(0))))
        dual.main(dual.Config(model=str(out / "model"), data=[str(pairs)], out=folder, device="cpu", dtype="bfloat16", limit=config.limit, max_length=300, steps=1, batch_size=2))
        found = {}
        for name, settings in FORMS.items():
            collect.main(collect.Config(out=folder, device="cpu", layers=["all"], limit=config.limit, **settings))
            record, stage = read_stage(out / "dual" / "collect", "collect", ""), out / "dual" / "collect"
            size = sum((stage / shard).stat().st_size for shard in [*record["shards"], *record["held_out"]])
            found[name] = {"bytes a token": round(size / record["tokens"], 1), "counted": record["token_bytes"], "directions": (
                stage / "directions.safetensors").stat().st_size if settings.get("store") == "lowrank" else 0}
        for name, row in found.items():
            print(f"{name:>18}: {row['bytes a token']:>10,} bytes a token on disk", flush=True)
        write_json(Path(__file__).parent / "results" / "disk.json", {
            "data": Path(config.data).name, "versions": versions(), "layers": 5, "width": config.width, "dtype": "bfloat16", "tokens": record["tokens"], "forms": found})


if __name__ == "__main__":
    run(main, Config)
