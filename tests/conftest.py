"""Tiny models of several families, a smaller world for whole runs, and a way to call the scripts."""
import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")
ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"               # real pairs and a real tiny model, where they are at hand
sys.path.insert(0, str(ROOT))

import pytest
import torch

if not torch.cuda.is_available():             # read when the kernels are imported: without a GPU they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import AutoConfig, AutoModelForCausalLM

import files
import toy

SIZES = dict(vocab_size=800, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64,
             num_key_value_heads=2, max_position_embeddings=128, pad_token_id=1, bos_token_id=None, eos_token_id=0)
FAMILIES = {
    "llama": {}, "mistral": {}, "qwen2": {}, "qwen3": {"head_dim": 8}, "gemma2": {"head_dim": 8, "sliding_window": 16}, "phi": {},
    "gpt_neox": {}, "gpt2": {"n_positions": 128}, "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {}, "bloom": {}, "phi3": {}, "olmo2": {}, "starcoder2": {"sliding_window": None}, "granite": {}, "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
}
SMALL_WORLD = ["--kinds", "tool,misdeed", "--blocks", "4", "--lr", "6e-3", "--pairs", "300", "--steps", "400", "--documents", "12800"]


def make_model(family, seed=0):
    """A random causal language model, in evaluation mode, its initial weights widened so that blocks matter."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def go(stage, *args):
    """A stage's command line in this process (a fresh interpreter for each would take minutes); what it printed."""
    before, sys.argv, said = sys.argv, [f"{stage.__name__}.py", *map(str, args)], io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            files.run(stage.main, stage.Config)
    finally:
        sys.argv = before
    return said.getvalue()


def call(script, *args, cwd=ROOT, **env):
    """Run a script of the project as a user would."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, **env})


def succeed(script, *args, **kwargs):
    """call() that fails the test with the script's own words where the script fails."""
    done = call(script, *args, **kwargs)
    assert done.returncode == 0, f"{script} {args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


@pytest.fixture(scope="session")
def tokenizer():
    docs = toy.documents(toy.split_requests(list(toy.ASK), 0), 2000, random.Random(0))
    return toy.train_tokenizer([prompt + reply for prompt, reply in docs] + [toy.POSITIVE, toy.NEGATIVE])


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """A folder with a random Llama of 4 blocks and a tokenizer, and a file of 60 pairs: for what needs no skill."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = toy.preference_rows(toy.split_requests(["tool", "greeting"], 0), 60, random.Random(0))
    rows = [row for row in rows if row["split"] == "train"] + [row for row in rows if row["split"] == "valid"][:20] + [row for row in rows if row["split"] == "test"][:20]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A smaller world with a base that has learned it: (model folder, pairs file)."""
    out = tmp_path_factory.mktemp("world")
    succeed("toy.py", "--out", out, *SMALL_WORLD)
    return out / "toy" / "seed0" / "model", out / "toy" / "seed0" / "pairs.jsonl"
