"""Real pairs through all stages of both methods, with real or random weights; what the stages reported, as JSON.

    python tests/real.py --model PATH --data PATH                       writes tests/results/real.json
    python tests/real.py --model PATH --data PATH --shape 1b            a random model of that shape instead, with the tokenizer of --model

Shapes say what a real model of that size takes; their scores mean nothing.
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from files import read_stage, run, setting, versions, write_json

ROOT = Path(__file__).resolve().parent.parent
ALPHA = {"scit": "0.5", "dual": "1"}           # the paper's form: one α for the middle layers
SHAPES = {"1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000),
          "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=2000)}


@dataclass
class Config:
    model: str = field(metadata={"help": "model folder"})
    data: str = field(metadata={"help": "preference pairs"})
    shape: str = setting("", "take random weights of this shape: " + ", ".join(SHAPES))
    device: str = setting("cpu", "cpu or cuda")
    work: str = setting("/tmp/rahf-real", "folder of the stages")
    scit_steps: int = setting(100, "steps of scit.py; the other stages have their defaults", least=1)


def make_random(config, dtype):
    """A folder with a random Llama of config.shape and the tokenizer of config.model."""
    folder, tokenizer = Path(config.work) / "model", AutoTokenizer.from_pretrained(config.model)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**SHAPES[config.shape], "vocab_size": max(SHAPES[config.shape]["vocab_size"], len(tokenizer))}, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
                                 eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def main(config):
    found, out = {"settings": {**vars(config), "model": Path(config.model).name, "data": Path(config.data).name}, "versions": versions(), "seconds": {}, "peak GB": {}}, Path(config.work)
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    found["settings"] |= {"dtype": str(dtype).removeprefix("torch."), "machine": torch.cuda.get_device_name() if config.device == "cuda" else f"{torch.get_num_threads()} threads"}
    source = ["--model", make_random(config, dtype) if config.shape else config.model, "--data", config.data]

    def stage(key, script, *args):
        start = time.time()
        said = subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--out", config.work, "--device", config.device, *args], check=True, stdout=subprocess.PIPE, text=True).stdout
        print(said)
        found["seconds"][key], found["peak GB"][key] = round(time.time() - start, 1), float(said.split("peak memory ")[1].split()[0])
    for method, more in (("scit", [*source, "--steps", str(config.scit_steps)]), ("dual", source)):
        stage(method, method, *more)
        stage(f"{method} collect", "collect", "--method", method, "--layers", "middle")
        stage(f"{method} align", "align", "--method", method, "--alpha", ALPHA[method])
        collected, aligned = read_stage(out / method / "collect", "collect", ""), read_stage(out / method / "align", "align", "")
        found[method] = {"layers": collected["settings"]["layers"], "tokens": collected["tokens"],
                         "|v|/|h|": [v / h for v, h in zip(collected["norm_v"], collected["norm_h"])],
                         "alpha": aligned["settings"]["alpha"], "distance_end/start": [e / s for s, e in zip(aligned["distance_start"], aligned["distance_end"])]}
    found["scit"]["held_out"] = read_stage(out / "scit" / "adapter", "scit", "")["held_out"]
    found["dual"]["held_out"] = {name: read_stage(out / "dual" / name, name, "")["held_out"] for name in ("good", "bad")}
    stage("evaluate", "evaluate", "--limit", "60")
    found["evaluate"] = json.loads((out / "evaluate" / "report.json").read_text())["models"]
    write_json(ROOT / "tests" / "results" / (f"real_{config.shape}.json" if config.shape else "real.json"), found)


if __name__ == "__main__":
    run(main, Config)
