"""Real weights and real pairs through all stages of both methods; what the stages reported, as JSON.

    python tests/real.py --model PATH --data PATH         writes tests/results/real.json
"""
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import read_stage, run, setting, versions, write_json

ROOT = Path(__file__).resolve().parent.parent
ALPHA = {"scit": "0.5", "dual": "1"}           # the paper's form: one α for the middle layers


@dataclass
class Config:
    model: str = setting("../shared/models/stories260K", "model folder")
    data: str = setting("../shared/data/hh_harmless_test.jsonl.gz", "preference pairs")
    work: str = setting("/tmp/rahf-real", "folder of the stages")
    scit_steps: int = setting(100, "steps of scit.py; the other stages have their defaults", least=1)


def main(config):
    found, out = {"settings": {**vars(config), "model": Path(config.model).name, "data": Path(config.data).name}, "versions": versions(), "seconds": {}}, Path(config.work)
    source = ["--model", config.model, "--data", config.data]
    for method, more in (("scit", [*source, "--steps", str(config.scit_steps)]), ("dual", source)):
        for script, args in ((method, more), ("collect", ["--method", method, "--layers", "middle"]), ("align", ["--method", method, "--alpha", ALPHA[method]])):
            start = time.time()
            subprocess.run([sys.executable, str(ROOT / f"{script}.py"), "--out", config.work, "--device", "cpu", *args], check=True)
            found["seconds"][f"{method} {script}"] = round(time.time() - start, 1)
        collected, aligned = read_stage(out / method / "collect", "collect", ""), read_stage(out / method / "align", "align", "")
        found[method] = {"layers": collected["settings"]["layers"], "tokens": collected["tokens"],
                         "|v|/|h|": [v / h for v, h in zip(collected["norm_v"], collected["norm_h"])],
                         "alpha": aligned["settings"]["alpha"], "distance_end/start": [e / s for s, e in zip(aligned["distance_start"], aligned["distance_end"])]}
    found["scit"]["held_out"] = read_stage(out / "scit" / "adapter", "scit", "")["held_out"]
    found["dual"]["held_out"] = {name: read_stage(out / "dual" / name, name, "")["held_out"] for name in ("good", "bad")}
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--out", config.work, "--device", "cpu", "--limit", "60"], check=True)
    found["evaluate"] = json.loads((out / "evaluate" / "report.json").read_text())["models"]
    write_json(ROOT / "tests" / "results" / "real.json", found)


if __name__ == "__main__":
    run(main, Config)
