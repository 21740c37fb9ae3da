"""Real pairs through all stages of both methods: what the stages report.

    python -m studies.real --model PATH --data PATH
    python -m studies.real --model PATH --data PATH --shape 1b --device cuda
                       random weights of that shape, with the tokenizer of --model

In the paper's form: one α for some middle layers. A shape says what a model of that size takes;
its scores mean nothing. Writes studies/results/real.json, or real_SHAPE.json.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.config import run, setting
from common.stages import read_stage
from studies.shared import write_result

ALPHA = {"scit": "0.5", "dual": "1"}
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 2000,
    },
}


@dataclass
class Config:
    model: str = field(metadata={"help": "model folder"})
    data: str = field(metadata={"help": "preference pairs"})
    shape: Literal["1b", "tiny"] | None = setting(None, "take random weights of this shape")
    scit_steps: int = setting(
        100, "steps of scit.py; the other stages have their defaults", minimum=1
    )
    device: str = setting("cpu", "cpu or cuda", group="run")
    work: str = setting("/tmp/rahf-real", "folder of the stages", group="run")


def make_random(config):
    """A folder with a random Llama of config.shape and the tokenizer of config.model."""
    folder = Path(config.work) / "model"
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    shape = SHAPES[config.shape]
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{**shape, "vocab_size": max(shape["vocab_size"], len(tokenizer))},
            max_position_embeddings=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    dtype = torch.bfloat16 if config.device == "cuda" else torch.float32
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run_stage(config, script, *arguments):
    """Run a stage in an interpreter of its own. Returns (seconds, peak GB)."""
    command = [sys.executable, f"{script}.py", "--out", config.work, "--device", config.device]
    start = time.time()
    done = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    peak = done.stdout.split("peak memory ")[1].split()[0]
    return round(time.time() - start, 1), float(peak)


def reports(out, method):
    """What collect and align reported."""
    collected = read_stage(out / method / "collect", "collect", "python collect.py")
    aligned = read_stage(out / method / "align", "align", "python align.py")
    distances = zip(aligned["distance_start"], aligned["distance_end"])
    return {
        "layers": collected["settings"]["layers"],
        "tokens": collected["tokens"],
        "|v|/|h|": [v / h for v, h in zip(collected["norm_v"], collected["norm_b"])],
        "alpha": aligned["settings"]["alpha"],
        "distance_end/start": [end / start for start, end in distances],
    }


def main(config):
    out = Path(config.work)
    model = make_random(config) if config.shape else config.model
    source = ["--model", model, "--data", config.data]
    commands = {
        "scit scit": ["scit", *source, "--steps", str(config.scit_steps)],
        "dual dual": ["dual", *source],
    }
    for method, alpha in ALPHA.items():
        chosen = ["--method", method]
        commands[f"{method} collect"] = ["collect", *chosen, "--layers", "middle"]
        commands[f"{method} align"] = ["align", *chosen, "--alpha", alpha]
    commands["evaluate"] = ["evaluate", "--limit", "60"]

    seconds, peak_gb = {}, {}
    for name, command in commands.items():
        seconds[name], peak_gb[name] = run_stage(config, *command)
    figures = {method: reports(out, method) for method in ALPHA}
    scit_manifest = read_stage(out / "scit" / "adapter", "scit", "python scit.py")
    figures["scit"]["validation"] = scit_manifest["validation"]
    figures["dual"]["validation"] = {}
    for name in ("good", "bad"):
        manifest = read_stage(out / "dual" / name, name, "python dual.py")
        figures["dual"]["validation"][name] = manifest["validation"]
    figures["evaluate"] = json.loads((out / "evaluate" / "report.json").read_text())["models"]

    names = {"model": Path(config.model).name, "data": Path(config.data).name}
    result = {"settings": {**vars(config), **names}, "seconds": seconds, "peak GB": peak_gb}
    name = f"real_{config.shape}" if config.shape else "real"
    write_result(name, {**result, **figures})


if __name__ == "__main__":
    run(main, Config)
