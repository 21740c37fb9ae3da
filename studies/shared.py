"""What the studies share: stages without output, scores on the embedded default, result files."""

import contextlib
import io
import json
import random
import sys
import time
from pathlib import Path

import torch

from common import toy
from common.answers import GenerationSettings, attached
from common.data import prepare_pairs
from common.dial import scaled
from common.hf import load_model, load_tokenizer
from common.score import Scoring, load_judge, score_model
from common.stages import versions, write_json
from lora import load_adapter, stack

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "studies" / "results"


def configure(stage, **settings):
    """The Config of a stage or tool, which on the embedded default has settings of its own."""
    suited = {} if settings.get("model") else getattr(stage.Config, "embedded_default", {})
    return stage.Config(**{**suited, **settings})


def quietly(stage, **settings):
    """Run a stage or a tool in this process without its output. Returns the seconds it took."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        stage.main(configure(stage, **settings))
    return time.perf_counter() - start


class World:
    """The embedded default of one seed: its base model, some of its pairs, and its judge."""

    def __init__(self, out, seed, split="test"):
        """out: the folder of all stages. split: the pairs to score on."""
        self.out = Path(out)
        self.seed = seed
        source = toy.ensure_world(toy.Config(out=str(out), seed=seed))
        self.judge = load_judge(source["judge"])
        self.tokenizer = load_tokenizer(source["model"])
        self.model = load_model(source["model"], "float32", "cpu")
        with contextlib.redirect_stdout(io.StringIO()):
            prepared = prepare_pairs(source["data"], (split,), self.tokenizer, 256, seed)
        self.pairs = prepared[split]

    def score(self, folder=None, prompt="plain"):
        """The report of common.score.score_model for the adapter in OUT/folder; None: the base."""
        weights = load_adapter(self.out / folder, self.model.base_model) if folder else None
        generation = GenerationSettings(max_new_tokens=64, batch_size=64, seed=self.seed)
        scoring = Scoring({"judge": self.judge}, {}, generation)
        with attached(self.model, weights) as adapter:
            report, _ = score_model(
                self.model, adapter, self.tokenizer, self.pairs, prompt, scoring
            )
        return report


def swap_labels(rows, share, seed):
    """The rows with chosen and rejected exchanged in a random share of the training ones."""
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    swapped = list(rows)
    for i in random.Random(seed).sample(train, round(share * len(train))):
        row = rows[i]
        swapped[i] = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    return swapped


# ---------------------------------------------------------------- result files


def processor():
    """The name of the GPU, or of the CPU where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


def machine():
    """What a measurement ran on, in words."""
    if torch.cuda.is_available():
        return processor()
    return f"{torch.get_num_threads()} threads, {processor()}"


def command():
    """The command line of a study."""
    return " ".join(["python", "-m", f"studies.{Path(sys.argv[0]).stem}", *sys.argv[1:]])


def weight_difference(good, bad, strength):
    """AdapterWeights of base + λ (good - bad); strength: λ."""
    return stack(scaled(good, strength), scaled(bad, -strength))


def measured_before(name, settings, key):
    """What studies/results/NAME.json has under a key, {} where it was measured with other
    settings: nothing could be compared."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    return earlier[key] if earlier["settings"] == settings else {}


def write_result(name, result):
    """Write studies/results/NAME.json: a dict, after how it was made."""
    made = {"command": command(), "machine": machine(), "versions": versions()}
    path = RESULTS / f"{name}.json"
    write_json(path, {**made, **result})
    print(f"wrote {path}")
