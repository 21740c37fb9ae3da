"""kill -9 at random moments across all stages, and a soak; what came of it, as JSON.

    python tests/campaign.py --kills 50              writes tests/results/campaign.json
    python tests/campaign.py --kills 0 --soak 50000  the same file's soak: collect and align over so many short pairs
    python tests/campaign.py --kills 0 --checks True what digests, seals and checkpoints cost
"""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from files import file_digest, run, setting, versions, write_json

RESULT = ROOT / "tests" / "results" / "campaign.json"
WORLD = ["--kinds", "tool,misdeed", "--blocks", "4", "--lr", "6e-3", "--pairs", "300", "--steps", "150", "--documents", "4800"]
OFTEN = ["--checkpoint-minutes", "0.02"]


@dataclass
class Config:
    kills: int = setting(50, "how often a stage is killed", least=0)
    soak: int = setting(0, "pairs of the soak", least=0)
    checks: bool = setting(False, "measure what the checks cost, on the embedded default")
    seed: int = setting(0, "of the moments")
    work: str = setting("/tmp/rahf-campaign", "folder of the stages")


def commands(out, source):
    cpu = ["--device", "cpu", "--out", str(out)]
    return {"scit": ["scit.py", *source, *cpu, "--steps", "60", *OFTEN], "dual": ["dual.py", *source, *cpu, "--steps", "60", *OFTEN],
            "collect scit": ["collect.py", *cpu, "--method", "scit", "--shard-mb", "2"], "collect dual": ["collect.py", *cpu, "--method", "dual", "--shard-mb", "2", "--store", "lowrank"],
            "align scit": ["align.py", *cpu, "--method", "scit", "--steps", "60", *OFTEN],
            "sweep dual": ["align.py", *cpu, "--method", "dual", "--strength", "0.1", "0.2", "--steps", "40", "--max-new-tokens", "4", *OFTEN]}


def start(command):
    """A process whose words go to a file, .said: a pipe that nobody reads would stop it."""
    said = tempfile.NamedTemporaryFile("w+", suffix=".said")
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, text=True)
    process.said = lambda: open(said.name).read()
    process.file = said
    return process


def weights(out):
    return {str(path.relative_to(out)): file_digest(path) for path in sorted(Path(out).rglob("*.safetensors")) if "toy" not in path.parts}


def kill_campaign(config):
    """Yields what is known after each pipeline: a campaign that is itself cut off leaves its result."""
    work, rng, found = Path(config.work), random.Random(config.seed), []
    shutil.rmtree(work, ignore_errors=True)
    toy = start(["toy.py", "--out", str(work / "world"), *WORLD])
    assert toy.wait() == 0, toy.said()
    world = work / "world" / "toy" / "seed0"
    source, seconds = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl"), "--max-length", "200"], {}
    for name, command in commands(work / "want", source).items():
        begin = time.time()
        whole = start(command)
        assert whole.wait() == 0, whole.said()
        seconds[name] = time.time() - begin
    want, names = weights(work / "want"), list(seconds)
    while len(found) < config.kills:          # a whole pipeline each time, with kills wherever they fall
        out = work / "cut"
        shutil.rmtree(out, ignore_errors=True)
        for name, command in commands(out, source).items():
            went_on = False
            for attempt in range(3):
                process = start(command)
                moment = rng.uniform(0.2, 1.0) * seconds[name] if attempt < 2 and len(found) < config.kills and rng.random() < 0.8 else None
                try:
                    process.wait(timeout=moment)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    found.append({"stage": name, "after": round(moment, 2)})
                    later = {"scit": "collect scit", "dual": "collect dual", "collect scit": "align scit", "collect dual": "sweep dual"}.get(name)
                    done = {"scit": "scit/adapter", "dual": "dual/bad", "collect scit": "scit/collect", "collect dual": "dual/collect"}.get(name)
                    if later and rng.random() < 0.3 and not (out / done).exists():          # it must not take what is half there
                        following = start(commands(out, source)[later])
                        assert following.wait() == 2, following.said()
                        found[-1]["later stage refused"] = True
                    continue
                assert process.returncode == 0, process.said()
                went_on = "goes on" in process.said()
                break
            if found and found[-1]["stage"] == name:
                found[-1]["went on from a checkpoint"] = went_on
        same = weights(out) == want
        print(f"{len(found)} kills, all files as in the undisturbed run: {same}", flush=True)
        assert same, {name: want.get(name) == digest for name, digest in weights(out).items()}
        yield {"kills": len(found), "by stage": {name: sum(kill["stage"] == name for kill in found) for name in names},
               "reruns that went on from a checkpoint": sum(bool(kill.get("went on from a checkpoint")) for kill in found),
               "all files as undisturbed": True, "log": found}


def resident(pid):
    """(anonymous, file-backed) resident megabytes."""
    lines = dict(line.split(":", 1) for line in open(f"/proc/{pid}/status"))
    return [int(lines[name].split()[0]) / 1e3 for name in ("RssAnon", "RssFile")]


def soak(config):
    """Resident memory of collect and align while they go over many short pairs: its slope in the second half."""
    from conftest import make_model
    import toy
    work = Path(config.work) / "soak"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rng = random.Random(0)
    docs = [prompt + reply for prompt, reply in toy.documents(toy.split_requests(list(toy.ASK), 0), 2000, rng)]
    tokenizer, model = toy.train_tokenizer(docs + [toy.POSITIVE, toy.NEGATIVE]), make_model("llama")
    model.save_pretrained(work / "model"), tokenizer.save_pretrained(work / "model")
    with open(work / "pairs.jsonl", "w") as file:
        for i in range(config.soak):
            file.write(json.dumps({"prompt": f"Say {i}.", "chosen": f"Gladly {i % 97}.", "rejected": f"No {i % 89}.", "split": "train" if i % 500 else "valid"}) + "\n")
    cpu, found = ["--device", "cpu", "--out", str(work)], {}
    steps = 2 * config.soak // 64
    for name, command in {"dual": ["dual.py", "--model", str(work / "model"), "--data", str(work / "pairs.jsonl"), "--steps", "20", *cpu],
                          "collect": ["collect.py", *cpu, "--layers", "1", "--shard-mb", "20"], "align": ["align.py", *cpu, "--steps", str(steps), "--batch-size", "64"]}.items():
        process, samples, begin = start(command), [], time.time()
        while process.poll() is None:
            try:
                samples.append((time.time() - begin, *resident(process.pid)))
            except (OSError, KeyError):
                pass
            time.sleep(0.25)
        assert process.returncode == 0, process.said()
        half = samples[len(samples) // 2:-2]
        found[name] = {"seconds": round(samples[-1][0], 1), "anonymous MB at half time": round(half[0][1], 1), "anonymous MB at the end": round(half[-1][1], 1),
                       "file-backed MB at the end": round(half[-1][2], 1)}
        print(name, found[name], flush=True)
    return {"pairs": config.soak, **found}


def checks(config):
    """The share of each stage's time that digests, seals and checkpoints take, on the embedded default."""
    import align
    import checkpoint
    import collect
    import dual
    import files
    import toy
    from results import quietly
    out, spent = Path(config.work) / "checks", [0.0]

    def timed(function):
        def call(*args):
            begin = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[0] += time.perf_counter() - begin
        return call
    toy.ensure(toy.Config(out=str(out)))
    files.file_digest, files.seal, checkpoint.Checkpoint.save = timed(files.file_digest), timed(files.seal), timed(checkpoint.Checkpoint.save)
    found = {}
    for stage in (dual, collect, align):
        spent[0] = 0.0
        seconds = quietly(stage, out=str(out))
        found[stage.__name__] = {"seconds": round(seconds, 2), "of it checks and checkpoints": round(spent[0] / seconds, 4)}
        print(stage.__name__, found[stage.__name__], flush=True)
    return found


def main(config):
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result |= {"versions": versions(), "machine": f"{os.cpu_count()} CPUs"}
    for result["kills"] in kill_campaign(config) if config.kills else ():
        write_json(RESULT, result)
    if config.checks:
        result["checks"] = checks(config)
    if config.soak:
        result["soak"] = soak(config)
    write_json(RESULT, result)


if __name__ == "__main__":
    run(main, Config)
