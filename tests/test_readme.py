"""The README's commands are run as they stand, and its numbers come from the committed results."""
import json
import os
import re
import shlex
import subprocess
import sys

import align
import bench_pipeline
import collect
import dual
import evaluate
import few_tokens
import files
import found
import scit
import study_wrong_labels
import toy
from conftest import ROOT, SMALL_WORLD
from kernels.bench_forms import forms

README = (ROOT / "README.md").read_text()


def test_quick_start_block_runs(tmp_path):
    """The first block, less the installation and in a smaller world, whose settings stand in for the defaults."""
    block = re.search(r"```bash\n(.*?)```", README, re.S)[1]
    commands = [c.strip() for line in block.splitlines() for c in line.split("#")[0].split("&&") if c.strip() and not c.strip().startswith("pip ")]
    assert commands[:3] == ["python scit.py", "python collect.py", "python align.py"]
    subprocess.run([sys.executable, str(ROOT / "toy.py"), "--out", str(tmp_path), *SMALL_WORLD, "--steps", "30", "--documents", "960", "--pairs", "40"], check=True)
    world = tmp_path / "toy" / "seed0"
    for command in commands:
        script, *args = shlex.split(command)[1:]
        more = ["--model", str(world / "model"), "--data", str(world / "pairs.jsonl"), "--steps", "5"] if script in ("scit.py", "dual.py") else []
        done = subprocess.run([sys.executable, str(ROOT / script), *args, *more], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        assert done.returncode == 0, command + done.stderr
    assert (tmp_path / "out" / "scit" / "align" / "adapter_model.safetensors").is_file()


def test_result_table_is_the_committed_one():
    seeds = json.loads((ROOT / "tests" / "results" / "embedded.json").read_text())["seeds"].values()
    rows = dict(re.findall(r"^\| `([\w.-]+)` \|(.*)\|$", README, re.M))
    assert len(rows) >= 20
    for name, cells in rows.items():
        for figure, cell in zip(("judge_greedy", "judge_sampled", "preference_accuracy"), cells.split("|")):
            assert [float(x) for x in re.findall(r"[\d.]+", cell)] == [round(seed["figures"][name][figure], 2) for seed in seeds], (name, figure)


def test_tables_of_the_study_and_of_the_disk_are_the_committed_ones():
    table = json.loads((ROOT / "tests" / "results" / "wrong_labels.json").read_text())["summary"]
    assert study_wrong_labels.markdown(table, "sampled") in README and study_wrong_labels.markdown(table, "greedy") in README
    assert study_wrong_labels.clean_markdown(table) in README
    seeds = json.loads((ROOT / "tests" / "results" / "found.json").read_text())["seeds"]
    assert found.markdown(seeds) in README
    aucs = [block["auc"] for seed in seeds.values() for method in ("scit", "dual") for block in seed[method]["blocks"]]
    assert f"({min(aucs):.2f} to {max(aucs):.2f} over all blocks" in README
    assert min(seed[method][test]["judge_greedy"] for seed in seeds.values() for method in ("scit", "dual") for test in ("test", "test_without_judge")) >= 0.975
    disk = json.loads((ROOT / "tests" / "results" / "disk.json").read_text())["forms"]
    rows = re.findall(r"^\|.*\| ([\d,]+) \|$", README.partition("| stored |")[2].partition("\n\n")[0], re.M)
    assert [int(row.replace(",", "")) for row in rows] == [round(form["bytes a token"]) for form in disk.values()]


def test_tables_of_cost_are_the_committed_ones():
    results = ROOT / "tests" / "results"
    assert bench_pipeline.markdown(json.loads((results / "bench_pipeline_cpu.json").read_text())["found"]) in README
    assert bench_pipeline.growth(json.loads((results / "scaling.json").read_text())["found"]) in README
    assert few_tokens.markdown(json.loads((results / "few_tokens.json").read_text())["seeds"]) in README


def test_figures_of_the_default_and_of_the_checks_are_the_committed_ones():
    seeds = json.loads((ROOT / "tests" / "results" / "embedded_default.json").read_text())["seeds"].values()
    for method in ("scit", "dual"):
        assert f"{method.upper()} " + " / ".join(f"{seed['figures'][f'{method}_aligned']['judge_greedy']:.2f}" for seed in seeds) in README
    campaign = json.loads((ROOT / "tests" / "results" / "campaign.json").read_text())
    checks, kills, text = campaign["checks"], campaign["kills"], " ".join(README.split())
    half, end = ([f"{campaign['soak'][stage][f'anonymous MB at {when}']:.0f}" for stage in ("collect", "align")] for when in ("half time", "the end"))
    assert f"collect holds {half[0]} MB of memory of its own at half time and {end[0]} MB at the end, align {half[1]} and {end[1]} MB" in text
    assert f"killed {kills['kills']} times" in text and kills["all files as undisturbed"] and f"{kills['reruns that went on from a checkpoint']} of the reruns" in text
    shares = [100 * checks[stage]["of it checks and checkpoints"] for stage in ("dual", "collect", "align")]
    assert [abs(float(x) - share) <= 0.051 for x, share in zip(re.search(r"take ([\d.]+)% of dual's, ([\d.]+)% of collect's and ([\d.]+)% of align's", README).groups(), shares)] == [True] * 3


def test_bytes_table_is_what_the_benchmark_counts():
    rows = re.findall(r"^\|[^|]+\| \**(\d+)\** \| \**(\d+)\** \|$", README, re.M)
    counted = [form.own_bytes for name, form in forms().items() if name not in ("torch backend", "fused, incoming 0.37")]
    assert [(float(one), float(half)) for one, half in rows] == [(count(1.0), count(0.5)) for count in counted]


def test_files_and_functions_that_it_names_exist():
    for path in set(re.findall(r"`((?:[\w]+/)*\w+\.(?:py|json|txt))`", README)) - {"report.json", "stage.json"}:
        assert (ROOT / path).is_file(), path
    for path, function in re.findall(r"`(\w+(?:/\w+)*\.py):(\w+)`", README):
        assert re.search(rf"^(def|class) {function}\b", (ROOT / path).read_text(), re.M), (path, function)


def test_every_setting_is_one_of_the_script_it_stands_with():
    stages = {stage.__name__: stage for stage in (scit, dual, collect, align, evaluate, toy)}
    named = re.findall(r"\b(scit|dual|collect|align|evaluate|toy)\.py((?: (?!&|#)[^\s`]+)*)", README)
    assert sum("--" in args for _, args in named) >= 15
    for name, args in named:
        known = files.Parser(stages[name].Config, allow_abbrev=False)._option_string_actions
        assert set(re.findall(r"--[a-z][a-z-]*", args)) <= set(known), (name, args)


def test_every_setting_it_names_exists():
    helps = ""
    for script in ("data", "lora", "scit", "dual", "collect", "align", "evaluate", "toy"):
        helps += (ROOT / f"{script}.py").read_text()
    for script in ("tests/study_wrong_labels.py", "tests/disk.py", "tests/results.py", "tests/real.py", "tests/found.py", "tests/campaign.py", "tests/bench_pipeline.py", "kernels/bench.py"):
        helps += (ROOT / script).read_text()
    for name in set(re.findall(r"`--([a-z-]+)", README)) - {"help"}:
        assert re.search(rf"^    {name.replace('-', '_')}: ", helps, re.M), name
