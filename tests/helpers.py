"""What the tests share: tiny models, inputs, and ways to call the scripts."""

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM

from common import config, toy
from common.data import collate
from common.hf import find_blocks
from common.pairs import parse_columns, read_pairs
from lora import AdapterWeights, LoRA

ROOT = Path(__file__).resolve().parent.parent

# real pairs and a real tiny model, where they are at hand
SHARED = ROOT.parent / "shared"

# What compares bytes, or counts what the host does, runs on the CPU; the rest on the machine's own
# device, in float32 there, too.
CPU = ["--device", "cpu"]
HERE = ["--device", "cuda" if torch.cuda.is_available() else "cpu"]

SIZES = {
    "vocab_size": 800,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": 0,
}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16},
    "phi": {},
    "gpt_neox": {},
    "gpt2": {"n_positions": 128},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "falcon": {},
    "bloom": {},
    "phi3": {},
    "olmo2": {},
    "starcoder2": {"sliding_window": None},
    "granite": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "mixtral": {"num_local_experts": 4},
}

# A world that a small base model learns in seconds: arguments of `python -m common.toy`.
SMALL_WORLD = {
    "kinds": "tool,misdeed",
    "blocks": 4,
    "lr": 6e-3,
    "pairs": 300,
    "steps": 400,
    "documents": 12800,
}


def make_model(family, seed=0):
    """A random causal language model in evaluation mode, its initial weights widened so that
    every block matters."""
    torch.manual_seed(seed)
    model_config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = AutoModelForCausalLM.from_config(model_config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def some_batch(seed=0):
    """A padded batch of random ids: prompts of 2 tokens, 12, 9 and 6 tokens in all."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(2, 800, (length,), generator=generator) for length in (12, 9, 6)]
    return collate([(ids.tolist(), 2) for ids in sequences], pad_id=1)


def random_adapter(model, seed=0, blocks=None, **options):
    """A LoRA whose B is not zero, in evaluation mode. blocks: only on that many first blocks."""
    torch.manual_seed(seed)
    adapter = LoRA(model.base_model, **options).eval()
    with torch.no_grad():
        for B in adapter.B:
            B.normal_(std=0.05)
    if blocks is None:
        return adapter
    adapter.remove()
    weights = adapter.weights()
    path, _ = find_blocks(model.base_model)
    kept = tuple(f"{path}.{i}." for i in range(blocks))
    tensors = {name: pair for name, pair in weights.tensors.items() if name.startswith(kept)}
    weights = AdapterWeights(tensors, weights.rank, weights.alpha)
    return LoRA(model.base_model, dropout=adapter.dropout, weights=weights).eval()


def logits_of(model, batch):
    """Logits [N, V] of a model at the N tokens of a batch."""
    with torch.no_grad():
        output = model(input_ids=batch.ids, attention_mask=batch.attention.long())
    return output.logits[batch.attention]


@contextlib.contextmanager
def saved_bytes():
    """Yields a list of the sizes in bytes of the tensors that autograd keeps for the backward
    within the context."""
    byte_counts = []

    def pack(tensor):
        byte_counts.append(tensor.nbytes)
        return tensor

    def unpack(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield byte_counts


def load_pairs(path, seed, specials=(), columns=None):
    """(pairs, {reason: count} of the rows left out, the rows' form) of a file."""
    file = read_pairs(path, seed, specials, parse_columns(columns))
    return file.pairs, file.skipped, file.form


def load_peft(base_folder, adapter_folder):
    """A model folder with an adapter as PEFT loads it, in evaluation mode."""
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    return PeftModel.from_pretrained(base, adapter_folder).eval()


def adapted_by_peft(peft_model, trunk):
    """The paths in the trunk of the modules that PEFT has put LoRA on."""
    prefix = f"base_model.model.{trunk.base_model_prefix}."
    layers = [name for name, m in peft_model.named_modules() if isinstance(m, LoraLayer)]
    return {name.removeprefix(prefix) for name in layers}


def stage1_source(world, out):
    """Arguments of stage 1 on the model and the pairs of a folder such as `tiny`."""
    source = ["--model", world / "model", "--data", world / "pairs.jsonl", "--out", out]
    return [*source, "--dtype", "float32"]


def arguments(settings):
    """{"steps": 3} as ["--steps", "3"]."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def script_of(stage):
    """How a user starts a stage or tool: ["scit.py"] or ["-m", "tools.sweep"]."""
    return ["-m", stage.__name__] if "." in stage.__name__ else [f"{stage.__name__}.py"]


def name_of(stage):
    """What the messages of a stage or tool begin with."""
    return f"{stage.__name__.rpartition('.')[2]}.py"


def suited(stage):
    """The settings of a stage that suit the embedded default, for runs on a smaller world."""
    name = stage.__name__
    return arguments({"dual": toy.DUAL, "scit": toy.SCIT, **toy.LATER}[name])


def command_line(stage, args):
    """The arguments of a stage. Most adapters of the tests are too weak for any --kl."""
    args = list(map(str, args))
    if stage.__name__ == "align" and not {"--kl", "--strength", "--alpha"} & set(args):
        args += ["--strength", "0.25"]
    return args


def go(stage, *args):
    """A stage's command line in this process (a fresh interpreter for each would take minutes).
    Returns what it printed."""
    argv, output = sys.argv, io.StringIO()
    sys.argv = [name_of(stage), *command_line(stage, args)]
    try:
        with contextlib.redirect_stdout(output):
            config.run(stage.main, stage.Config)
    finally:
        sys.argv = argv
    return output.getvalue()


def call(stage, *args, cwd=ROOT, **env):
    """Run a stage or tool of the project as a user would, in an interpreter of its own."""
    command = [sys.executable, *script_of(stage), *command_line(stage, args)]
    env = {**os.environ, **env}
    return subprocess.run(command, cwd=cwd, env=env, check=False, capture_output=True, text=True)


def succeed(stage, *args, **options):
    """call() that fails the test with the script's output where the script fails."""
    done = call(stage, *args, **options)
    assert done.returncode == 0, f"{stage.__name__} {args}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def listing(folder):
    """{relative path: bytes} of all files in a folder but locks, which every run leaves."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def without_logs(files):
    """A listing without its log files, which every run writes."""
    return {name: content for name, content in files.items() if not name.endswith(".log")}
