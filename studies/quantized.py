"""DUAL on the real chat model as it is, in 4 and in 8 bits: what the stages report of each.

    python -m studies.quantized          (needs out/smollm2: python -m studies.smollm2)

Adapters are trained, states recorded and the KL measured on the model that --quantize has loaded.
Writes studies/results/quantized.json, form by form; a later call goes on with the missing ones.
"""

from dataclasses import dataclass
from pathlib import Path

import align
import collect
import dual
from common.config import run, setting
from common.hf import model_digest
from common.stages import read_stage
from studies.shared import measured_before, quietly, write_result

FORMS = {"not quantized": None, "4 bits": "4bit", "8 bits": "8bit"}


@dataclass
class Config:
    model: str = setting("out/smollm2", "the folder that studies.smollm2 wrote", group="data")
    data: str = setting("studies/pairs/sentiment-0.jsonl.gz", "preference pairs", group="data")
    dtype: str = setting(
        "float32",
        "of the arithmetic, and of the weights that are not quantized",
        group="data",
    )
    steps: int = setting(30, "steps of dual.py and of align.py", minimum=1)
    limit: int = setting(200, "pairs to train on and to collect", minimum=1)
    kl: float = setting(2.0, "the KL that align scales to, in nats", minimum=0.01)
    work: str = setting("/tmp/rahf-quantized", "folder of the stages", group="run")


def measure(config, name):
    """What the stages report of one form."""
    out = str(Path(config.work) / name.replace(" ", ""))
    shared = {"out": out, "device": "cpu", "limit": config.limit}
    source = {"model": config.model, "data": [config.data], "dtype": config.dtype}
    quietly(dual, **shared, **source, steps=config.steps, quantize=FORMS[name])
    quietly(collect, **shared)
    quietly(align, out=out, device="cpu", steps=config.steps, kl=config.kl)
    good = read_stage(f"{out}/dual/good", "good", "python dual.py")
    aligned = read_stage(f"{out}/dual/align", "align", "python align.py")
    validation = good["validation"]
    return {
        "held-out NLL of the good model, a token": [validation["nll_start"], validation["nll_end"]],
        "held-out pairs ranked right": validation["accuracy"],
        "distance to the target, before and after": [
            sum(aligned[f"distance_{when}"]) / len(aligned["distance_start"])
            for when in ("start", "end")
        ],
        "scale": aligned["scale"],
        "kl": dict(aligned["kl_at_scale"])[aligned["scale"]],
    }


def main(config):
    settings = {
        "data": Path(config.data).name,
        "dtype": config.dtype,
        "steps": config.steps,
        "limit": config.limit,
        "kl": config.kl,
    }
    settings["digest"] = model_digest(config.model)[:12]
    forms = measured_before("quantized", settings, "forms")
    for name in FORMS:
        if name not in forms:
            forms[name] = measure(config, name)
            print(name, forms[name], flush=True)
            write_result("quantized", {"settings": settings, "forms": forms})


if __name__ == "__main__":
    run(main, Config)
