"""What llama.cpp makes of an adapter: its logits beside PEFT's, both in float32.

    pip install llama-cpp-python gguf sentencepiece
    python -m studies.serving --llama-cpp PATH --adapter out/real/dual/align

PATH is the folder of llama.cpp's source, which has the converters (in the source package of
llama-cpp-python it is vendor/llama.cpp). Base model and adapter are converted to GGUF. Then the
families of the tests follow, with random weights and the same tokenizer. Writes
studies/results/serving.json.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from llama_cpp import GGML_TYPE_F32, Llama
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import UserError, first_line, run, setting
from common.hf import load_trunk
from lora import LoRA, save_adapter
from studies.families import tiny_model
from studies.shared import write_result
from studies.tasks import make_prompts

# As in tests/helpers.py.
KINDS = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "phi",
    "gpt_neox",
    "gpt2",
    "opt",
    "falcon",
    "bloom",
    "phi3",
    "olmo2",
    "starcoder2",
    "granite",
    "gemma3_text",
    "mixtral",
]
PROMPTS = 8
ANSWER_TOKENS = 40


@dataclass
class Config:
    llama_cpp: str = field(metadata={"help": "folder of llama.cpp's source"})
    adapter: str = field(metadata={"help": "adapter folder, such as out/real/dual/align"})
    model: str = setting("out/smollm2", "folder of its base model", group="data")


@contextmanager
def converted(llama_cpp, model, adapter):
    """Within the context, the GGUF files of a model and of its adapter. UserError with the last
    line of llama.cpp's converter where it fails."""
    with tempfile.TemporaryDirectory() as work:
        files = Path(work, "base.gguf"), Path(work, "adapter.gguf")
        lora = ["convert_lora_to_gguf.py", adapter, "--base", model, "--outfile", files[1]]
        base = ["convert_hf_to_gguf.py", model, "--outfile", files[0]]
        for script, *args in (lora, base):
            command = [sys.executable, Path(llama_cpp) / script, *map(str, args)]
            command += ["--outtype", "f32"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise UserError(f"{script}: {done.stderr.strip().splitlines()[-1]}")
        yield files


def load_llama_cpp(base, adapter, **options):
    """llama.cpp's model, with keys and values in float32, too. adapter: None for the base alone."""
    if adapter:
        options["lora_path"] = str(adapter)
    float32 = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32}
    return Llama(str(base), n_ctx=128, verbose=False, **float32, **options)


def logits_of_llama_cpp(base, adapter, sequences):
    """The logits [S, V] of each sequence of ids, by llama.cpp. base, adapter: GGUF files; adapter
    may be None."""
    llm = load_llama_cpp(base, adapter, logits_all=True)
    logits = []
    for ids in sequences:
        llm.reset()
        llm.eval(ids)
        logits.append(np.array(llm.scores[: len(ids)]))
    return logits


@torch.no_grad()
def logits_of(model, sequences):
    """The logits [S, V] of each sequence of ids, by transformers."""
    return [model(input_ids=torch.tensor([ids])).logits[0].float().numpy() for ids in sequences]


def compare(files, model, adapter, sequences):
    """How far llama.cpp's logits are from PEFT's, as a share of what the adapter changes, and how
    often the likeliest token is the same. files: the two GGUF files of model and adapter, which
    are folders."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    before = logits_of(base, sequences)
    ours = logits_of(PeftModel.from_pretrained(base, adapter).eval(), sequences)
    base_file, adapter_file = files
    without = logits_of_llama_cpp(base_file, None, sequences)
    theirs = logits_of_llama_cpp(base_file, adapter_file, sequences)
    before, ours, without, theirs = map(np.concatenate, (before, ours, without, theirs))
    changed = np.linalg.norm(ours - before)
    return {
        "base, off by": float(np.linalg.norm(without - before) / np.linalg.norm(before)),
        "adapted, off by, of what the adapter changes": float(
            np.linalg.norm(theirs - ours) / changed
        ),
        "largest difference of a logit": float(np.abs(theirs - ours).max()),
        "adapter changes a logit by": float(np.abs(ours - before).mean()),
        "same likeliest token": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "tokens": len(ours),
    }


def compare_family(llama_cpp, kind, tokenizer):
    """compare() of a random model of a family, with a random adapter on its first two blocks."""
    model = tiny_model(kind, vocab_size=len(tokenizer))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        trunk = load_trunk(str(folder / "model"), 2, "float32", torch.device("cpu"))
        adapter = LoRA(trunk, rank=4, alpha=7)
        with torch.no_grad():
            for B in adapter.B:
                B.normal_(std=0.05)
        (folder / "adapter").mkdir()
        save_adapter(folder / "adapter", adapter.weights(), trunk, str(folder / "model"))
        ids = torch.randint(10, 800, (2, 12), generator=torch.Generator().manual_seed(0)).tolist()
        model, adapter = folder / "model", folder / "adapter"
        with converted(llama_cpp, model, adapter) as files:
            return compare(files, model, adapter, ids)


def count_same_answers(files, config, tokenizer, prompts):
    """In how many of the prompts the greedy answers are the same, token for token."""
    base = AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(base, config.adapter).eval()
    llm = load_llama_cpp(*files)
    same = 0
    for ids in prompts:
        inputs = torch.tensor([ids])
        generated = model.generate(inputs, do_sample=False, max_new_tokens=ANSWER_TOKENS)
        ours = generated[0, len(ids) :].tolist()
        llm.reset()
        theirs = []
        for token in llm.generate(ids, temp=0.0, repeat_penalty=1.0):
            theirs.append(token)
            if len(theirs) == len(ours) or token == tokenizer.eos_token_id:
                break
        same += ours == theirs
    return same


def main(config):
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in make_prompts()["test"][:PROMPTS]
    ]
    result = {name: importlib.metadata.version(name) for name in ("llama-cpp-python", "peft")}
    with converted(config.llama_cpp, config.model, config.adapter) as files:
        result["model"] = compare(files, config.model, config.adapter, prompts)
        same = count_same_answers(files, config, tokenizer, prompts)
    result["model"]["same greedy answers"] = [same, PROMPTS]
    print(result["model"], flush=True)
    result["families"] = {}
    for kind in KINDS:
        try:
            figures = compare_family(config.llama_cpp, kind, tokenizer)
        except (UserError, ValueError) as error:
            # with a tokenizer that is not the family's own llama.cpp does not take every model
            figures = {"not compared": first_line(error).replace(tempfile.gettempdir(), "")}
        result["families"][kind] = figures
        print(kind, figures, flush=True)
    write_result("serving", result)


if __name__ == "__main__":
    run(main, Config)
