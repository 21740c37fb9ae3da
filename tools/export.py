"""Write an aligned adapter as others load it: a whole model, or the adapter with its card.

    python -m tools.export                               after align.py: OUT/METHOD/merged
    python -m tools.export --form adapter                OUT/METHOD/export

merged: the adapter in OUT/METHOD/align is merged into the base model, W + s B A, for plain
from_pretrained. adapter: its two files, for PEFT. Both come with a model card (README.md) of what
align.py and evaluate.py have recorded.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import ModelCard, ModelCardData
from transformers import AutoTokenizer, GenerationConfig

from common.config import UserError, run, setting
from common.hf import check_same_model, choose_device, load_model, load_tokenizer
from common.score import markdown_table
from common.stages import (
    choose_method,
    claim,
    inherit,
    read_stage,
    verified_path,
    write_json,
    write_stage,
)
from lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LoRA, load_adapter

# What a card tells of align's settings, which hold those of the earlier stages' too.
SETTINGS = (
    "base",
    "stimulus",
    "layers",
    "limit",
    "steps",
    "batch_size",
    "lr",
    "lora_rank",
    "rank",
    "strength",
    "kl",
    "dtype",
    "quantize",
    "seed",
)

CARD = """---
{{ card_data }}
---

# {{ base }}, aligned by RAHF-{{ method }}

{{ what }} It was trained by Representation Alignment from Human Feedback ({{ method }}; Liu et al.,
ACL 2024, [arXiv:2312.15997](https://arxiv.org/abs/2312.15997)): a LoRA that moves hidden states to
b + α (h⁺ − h⁻), α = {{ alpha }}. {{ scaled }}

## How to load it

```python
{{ loading }}
```

## What it was trained on and how

Preference pairs: {{ data }}.

| setting of the last stage | |
|---|---|
{{ settings }}

## Figures

{{ figures }}

## Licence

None is given here. Those of the base model and of the data apply: name yours in the header of this
file.
"""

LOADING = {
    "adapter": """from peft import PeftModel
from transformers import AutoModelForCausalLM{import_quantize}

model = AutoModelForCausalLM.from_pretrained({base!r}{quantize})
model = PeftModel.from_pretrained(model, "THIS FOLDER")""",
    "merged": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")""",
}


@dataclass
class Config:
    form: Literal["merged", "adapter"] = setting(
        "merged", "merged: a whole model; adapter: for PEFT"
    )
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
        None, "dtype of a merged model; empty takes align's", group="run"
    )


def is_hub_name(source):
    """Whether a model or data set is named as on the hub, and not like a local file or folder: one
    that is there, or was in a folder that is there."""
    name = re.fullmatch(r"(hub:)?[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", source)
    local = Path(source).exists() or ("/" in source and Path(source).parent.exists())
    return bool(name) and not local


def public_name(source):
    """How a card names a model or a data set: hub names as they are, of a path the last part
    alone."""
    return source if is_hub_name(source) else Path(source).name


def read_report(out, method, manifest):
    """The report of evaluate.py, where it is about this adapter, else None."""
    folder = Path(out) / "evaluate"
    if not (folder / "report.json").is_file():
        return None
    evaluated = read_stage(folder, "evaluate", "python evaluate.py")
    path = verified_path(folder, evaluated, "report.json")
    report = json.loads(path.read_text(encoding="utf-8"))
    measured = report.get("adapters", {}).get(f"{method}_aligned")
    return report if measured == manifest["digests"][ADAPTER_WEIGHTS] else None


def quantized_by(settings):
    """How the base model was quantized in training, as code: see quantizing_options."""
    if settings["quantize"] == "8bit":
        return "BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)"
    return (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
        f'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{settings["dtype"]}")'
    )


def model_card(form, method, manifest, report):
    """The ModelCard of an aligned adapter. manifest: align's; report: that of evaluate.py, or
    None."""
    settings = manifest["settings"]
    base = public_name(settings["model"])
    quantize = settings["quantize"]
    scaled = ""
    if manifest["kl_at_scale"]:
        kl = dict(manifest["kl_at_scale"])[manifest["scale"]]
        scaled = (
            f"It was then scaled by {manifest['scale']:.3g}, at which its answers "
            f"are {kl:.2g} nats from those of the base model (validation prompts)."
        )
    hub_data = [name.split(":")[1] for name in settings["data"] if name.startswith("hub:")]
    if report:
        models = {name: report["models"][name] for name in ("base", f"{method}_aligned")}
        measured = report["settings"]
        data = ", ".join(f"`{public_name(name)}`" for name in measured["data"])
        seen = "held out from all training"
        if measured["own_data"] or measured["split"] in ("train", "all"):
            seen = "which training may have seen"
        figures = (
            f"On {measured['pairs']} pairs of {data}, split `{measured['split']}`, {seen} "
            f"(kl_to_base: nats an answer at temperature 1):\n\n{markdown_table(models)}"
        )
    else:
        figures = "None: `python evaluate.py` has not been run on this adapter."
    what = {"adapter": "This is a PEFT adapter for", "merged": "This is a whole model, made from"}
    return ModelCard.from_template(
        ModelCardData(
            # the hub knows no local folder
            base_model=base if is_hub_name(settings["model"]) else None,
            datasets=hub_data or None,
            library_name={"adapter": "peft", "merged": "transformers"}[form],
            pipeline_tag="text-generation",
            tags=["rahf", "preference-alignment"],
        ),
        template_str=CARD,
        base=base,
        method=method.upper(),
        what=f"{what[form]} `{base}`.",
        alpha=f"{manifest['alpha']:.3g}",
        scaled=scaled,
        loading=LOADING[form].format(
            base=base,
            import_quantize=", BitsAndBytesConfig" if quantize else "",
            quantize=f",\n    quantization_config={quantized_by(settings)},\n" if quantize else "",
        ),
        data=", ".join(f"`{public_name(name)}`" for name in settings["data"]),
        settings="\n".join(f"| {name} | {settings.get(name)} |" for name in SETTINGS),
        figures=figures,
    )


def main(config):
    required = {"scit": "align", "dual": "align"}
    method = choose_method(config.out, config.method, required, ["python align.py"])
    folder = Path(config.out) / method / "align"
    manifest = read_stage(folder, "align", "python align.py")
    inherit(config, manifest["settings"], ("model", "dtype"), folder)
    if config.form == "merged" and manifest["settings"]["quantize"]:
        raise UserError(
            f"{folder} was trained on a base model in {manifest['settings']['quantize']}, into "
            "which nothing can be merged: take --form adapter"
        )
    target = folder.with_name({"merged": "merged", "adapter": "export"}[config.form])
    card = model_card(config.form, method, manifest, read_report(config.out, method, manifest))
    with claim(target):
        verified_path(folder, manifest)
        # this folder is to be published: no path of this machine in it
        public = {name: manifest["settings"].get(name) for name in SETTINGS}
        with write_stage(target, target.name, {"settings": public}) as new:
            if config.form == "adapter":
                shutil.copy(folder / ADAPTER_WEIGHTS, new / ADAPTER_WEIGHTS)
                adapter = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
                adapter["base_model_name_or_path"] = public_name(manifest["settings"]["model"])
                write_json(new / ADAPTER_CONFIG, adapter)
            else:
                write_merged(new, folder, manifest, config)
            card.save(new / "README.md")
    contents = {"merged": "the whole model with", "adapter": "the adapter of"}[config.form]
    print(f"wrote {target}: {contents} {folder}, and its card")


def write_merged(new, folder, manifest, config):
    """Write the base model with the adapter of a folder in its weights to the folder new."""
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.dtype, choose_device(config.device))
    check_same_model(config.model, tokenizer, manifest, folder)
    weights = load_adapter(folder, model.base_model)
    LoRA(model.base_model, weights=weights).merge()
    own_generation, model.generation_config = model.generation_config, GenerationConfig()
    model.save_pretrained(new)
    # As it is: save_pretrained refuses settings of sampling without do_sample, which many models
    # have, up to transformers 5.22.
    own_generation.to_json_file(new / "generation_config.json")
    # the model's own, without our padding token
    own_tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    own_tokenizer.save_pretrained(new)


if __name__ == "__main__":
    run(main, Config)
