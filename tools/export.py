"""Write a whole model with an aligned adapter in its weights, for plain from_pretrained.

    python -m tools.export                               after align.py

The adapter in OUT/METHOD/align is merged into the base model: W + s B A. Writes OUT/METHOD/merged.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer

from common.config import run, setting
from common.hf import check_same_model, choose_device, load_model, load_tokenizer
from common.stages import choose_method, claim, inherit, read_stage, verified_path, write_stage
from lora import LoRA, load_adapter


@dataclass
class Config:
    method: Literal["scit", "dual"] | None = setting(
        None, "whose adapter to export; empty takes the one that is there"
    )
    model: str | None = setting(
        None, "the base model, if it has moved; empty takes align's", group="data"
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None, "dtype of the written model; empty takes align's", group="run"
    )


def main(config):
    required = {"scit": "align", "dual": "align"}
    method = choose_method(config.out, config.method, required, ["python align.py"])
    folder = Path(config.out) / method / "align"
    manifest = read_stage(folder, "align", "python align.py")
    inherit(config, manifest["settings"], ("model", "dtype"), folder)
    target = folder.with_name("merged")
    with claim(target):
        tokenizer = load_tokenizer(config.model)
        model = load_model(config.model, config.dtype, choose_device(config.device))
        check_same_model(config.model, tokenizer, manifest, folder)
        weights = load_adapter(verified_path(folder, manifest), model.base_model)
        LoRA(model.base_model, weights=weights).merge()
        with write_stage(target, "merged", {"settings": manifest["settings"]}) as new:
            model.save_pretrained(new)
            # the model's own, without our padding token
            own_tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
            own_tokenizer.save_pretrained(new)
    print(f"wrote {target}: the whole model with {folder} in its weights")


if __name__ == "__main__":
    run(main, Config)
