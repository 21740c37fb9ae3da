"""README.md and RESULTS.md: commands run as they stand, figures are those of the result files."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL_WORLD, arguments, succeed

import align
import collect
import dual
import evaluate
import scit
from common import toy
from common.config import Parser
from common.score import signs_of_collapse
from kernel import bench
from kernel.bench_forms import forms
from studies import (
    bench_pipeline,
    campaign,
    defaults,
    disk,
    dpo,
    embedded,
    few_tokens,
    found,
    frontier,
    frontier_report,
    hh,
    signal,
    smollm2,
    start,
    strengths,
    tasks,
    toy_base,
    wrong_labels,
)
from tools import export, profile, survey, sweep

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
DOCS = README + RESULTS

# every script that the documents name, as they name it
SCRIPTS = {f"{stage.__name__}.py": stage for stage in (scit, dual, collect, align, evaluate)}
MODULES = (toy, bench, bench_pipeline, campaign, disk, embedded, few_tokens, found)
MODULES += (strengths, wrong_labels, export, profile, survey, sweep)
MODULES += (defaults, dpo, frontier, frontier_report, hh, signal, smollm2, start, tasks)
SCRIPTS |= {f"-m {module.__name__}": module for module in MODULES}


def result(name):
    """The content of a committed result file."""
    return json.loads((ROOT / "studies" / "results" / f"{name}.json").read_text())


def settings_of(script):
    """The options of a script, such as {"--steps", ...}."""
    return set(Parser(script.Config)._option_string_actions)


def numbers(text):
    return [float(number) for number in re.findall(r"[\d.]+", text)]


# ---------------------------------------------------------------- commands


def quick_start_commands():
    """The commands of the README's first bash block, less the installation."""
    block = re.search(r"```bash\n(.*?)```", README, re.S)[1]
    commands = [command.strip() for command in re.split(r"\n|&&", block)]
    return [command for command in commands if command and not command.startswith("pip ")]


def test_quick_start_runs(tmp_path):
    """In a smaller world, whose settings stand in for the defaults."""
    commands = quick_start_commands()
    assert commands[:3] == ["python scit.py", "python collect.py", "python align.py"]
    small = {**SMALL_WORLD, "steps": 30, "documents": 960, "pairs": 40}
    succeed(toy, "--out", tmp_path, *arguments(small))
    world = tmp_path / "toy" / "seed0"
    source = ["--model", world / "model", "--data", world / "pairs.jsonl", "--steps", "5"]
    # as the embedded default would tell align, in fewer steps
    more_of = {
        "scit.py": source,
        "align.py": arguments({**toy.LATER["align"], "steps": 5}),
        "evaluate.py": ["--limit", "4", "--max-new-tokens", "8"],
    }
    for command in commands:
        script, *args = shlex.split(command)[1:]
        more = map(str, more_of.get(script, []))
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *args, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert done.returncode == 0, command + done.stderr
    assert (tmp_path / "out" / "scit" / "align" / "adapter_model.safetensors").is_file()


def test_settings_in_commands_are_those_of_their_script():
    names = "|".join(re.escape(name) for name in SCRIPTS)
    commands = re.findall(rf"({names})((?: (?!&|#)[^\s`]+)*)", DOCS)
    assert sum("--" in options for _, options in commands) >= 15
    for name, options in commands:
        used = set(re.findall(r"--[a-z][a-z-]*", options))
        assert used <= settings_of(SCRIPTS[name]), (name, options)


def test_settings_in_the_text_exist():
    known = {"--help"}
    for script in SCRIPTS.values():
        known |= settings_of(script)
    named = set(re.findall(r"`(--[a-z][a-z-]+)", DOCS))
    assert len(named) > 15 and named <= known


def test_files_and_functions_exist():
    paths = set(re.findall(r"`((?:[\w]+/)*\w+\.(?:py|json|txt))`", DOCS))
    for path in paths - {"report.json", "stage.json"}:
        assert (ROOT / path).is_file(), path
    functions = re.findall(r"`(\w+(?:/\w+)*\.py):(\w+)`", DOCS)
    assert len(functions) >= 5
    for path, function in functions:
        source = (ROOT / path).read_text()
        assert re.search(rf"^(def|class) {function}\b", source, re.M), (path, function)


def test_readme_is_short():
    assert len(README.split()) <= 2200


# ---------------------------------------------------------------- figures


def test_templates_and_families():
    text = " ".join(README.split())
    templates = result("templates")
    assert templates["outcomes"].keys() == {"works", "refused"}
    works, refused = templates["outcomes"]["works"], templates["outcomes"]["refused"]
    sentence = (
        f"Of {templates['templates']} templates in use {works} work and {refused} are refused"
    )
    assert sentence in text
    counts = result("families")["counts"]
    assert "WRONG" not in counts
    assert f"{counts['works']} work and {counts['refused']} are refused" in text


def test_the_frontier_on_a_real_model():
    wrong = "sentiment, 30% wrong labels"
    for task in ("sentiment", "plain", wrong):
        assert frontier_report.markdown(result("frontier")[task]) in RESULTS
    text = " ".join(RESULTS.split())
    stated = {("sentiment", "DUAL"): ("1", "2", "5", "10"), ("sentiment", "SCIT"): ("1", "2")}
    stated |= {("plain", "DUAL"): ("1", "2", "5", "10"), ("plain", "weights"): ("5",)}
    stated["sentiment", "logits"] = ("1", "2", "5", "10")
    stated |= {(task, "DUAL, rank 8"): ("1", "2", "5") for task in ("sentiment", "plain")}
    stated |= {(wrong, "DUAL"): ("2",), (wrong, "DUAL, rank 8"): ("1", "2")}
    for (task, method), budgets in stated.items():
        for budget in budgets:
            ahead = result("frontier")[task]["ahead of the best DPO"][method][budget]
            figures = ahead["difference"]
            mean, low, high = (f"{value:+.2f}".replace("-", "−") for value in figures)
            assert f"{mean} [{low}, {high}]" in text, (task, method, budget)
    rewards = result("frontier")[wrong]["at budgets"]
    projected, whole = (rewards[name]["5"]["reward"][0] for name in ("DUAL, rank 8", "DUAL"))
    assert f"it has {projected:.3f}, and {whole:.3f} without the projection" in text
    ahead = result("frontier")["plain"]["ahead of the best DPO"]["DUAL"].values()
    leads = [f"{compared['difference'][0]:.2f}" for compared in ahead]
    assert f"{min(leads)} to {max(leads)} above it" in " ".join(README.split())
    seconds = frontier.read_lines()["sentiment", 1, "SCIT", 1.0]["seconds of stages"]["."]
    stages = "{scit:,.0f}, {scit collect:.0f} and {scit align:.0f} s".format_map(seconds)
    assert f"its three stages took {stages}" in text
    stages = "{dual:,.0f}, {dual collect:.0f} and {dual align:.0f}".format_map(seconds)
    assert f"DUAL's {stages}, DPO {seconds['dpo 0.0005']:.0f} (float32)" in text


def test_serving():
    measured, text = result("serving"), " ".join(RESULTS.split())
    model = measured["model"]
    same, prompts = model["same greedy answers"]
    off = model["adapted, off by, of what the adapter changes"]
    assert f"over {model['tokens']} tokens of {prompts} prompts" in text
    assert f"differ by {off:.0e} of what the adapter changes" in text
    assert model["same likeliest token"] == 1
    assert f"{same} of {prompts} greedy answers are the same" in text
    names = {"gemma2": "Gemma 2", "gemma3_text": "Gemma 3", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX"}
    names |= {"olmo2": "OLMo 2", "opt": "OPT", "phi3": "Phi-3"}
    rows = re.findall(r"^\| (.*) \| yes \| (.*) \| (?:yes|no) \|$", RESULTS, re.M)
    verdicts = {name: verdict for families, verdict in rows for name in families.split(", ")}
    assert len(verdicts) == len(measured["families"])
    for kind, figures in measured["families"].items():
        works = figures.get("adapted, off by, of what the adapter changes", 1) < 2e-3
        verdict = verdicts[names.get(kind, kind.capitalize())]
        assert works == (verdict == "yes, same logits"), kind
        assert ("convert_lora" in figures.get("not compared", "")) == verdict.startswith("no"), kind


def test_quantized_base():
    settings, forms = result("quantized")["settings"], result("quantized")["forms"]
    command = f"studies.quantized --steps {settings['steps']} --limit {settings['limit']}`"
    assert command in " ".join(RESULTS.split())
    for name, form in forms.items():
        nll = "{:.3f} → {:.3f}".format(*form["held-out NLL of the good model, a token"])
        distance = "{:.1f} → {:.1f}".format(*form["distance to the target, before and after"])
        row = f"| {name} | {nll} | {form['held-out pairs ranked right']:.2f} | {distance} "
        assert f"{row}| {form['scale']:.2f} | {form['kl']:.2f} |" in RESULTS
    before = [form["held-out NLL of the good model, a token"][0] for form in forms.values()]
    assert f"worse by {before[1] - before[0]:.2f} nats" in RESULTS


def test_what_the_defaults_give_on_a_real_model():
    measured = result("defaults")["tasks"]
    assert defaults.table(measured) in RESULTS
    took = "{dual:.0f}, {collect:.0f}, {align:.0f} and {evaluate:.0f}"
    results = " ".join(RESULTS.split())
    for task in measured.values():
        base, aligned = task["models"]["base"], task["models"]["dual_aligned"]
        assert aligned["judge_sampled"] > base["judge_sampled"] + 0.2
        # "within 4%", "standard errors of 3%"
        assert aligned["kl_to_base"] == pytest.approx(align.KL, rel=0.04)
        assert round(aligned["kl_error"] / align.KL, 2) == 0.03
        assert took.format(**task["seconds"]) in results
        assert not signs_of_collapse(aligned, base)
    seconds, models = measured["sentiment"]["seconds"], measured["sentiment"]["models"]
    text = " ".join(README.split())
    assert f"took {took.format(**seconds)} seconds on two cores" in text
    held_out = (measured[task]["pairs"] for task in ("sentiment", "plain"))
    assert "prompts of {} and {} held-out pairs".format(*held_out) in results
    repeated = measured["plain"]["models"]
    repeated = [repeated[name]["repeated_ngrams"] for name in ("dual_aligned", "base")]
    assert "{:.0%} of the 4-grams against {:.0%}".format(*repeated) in results
    before, after = (models[name]["judge_sampled"] for name in ("base", "dual_aligned"))
    kl = models["dual_aligned"]["kl_to_base"]
    assert f"score at temperature 1 rose from {before:.2f} to {after:.2f} for {kl:.1f} nats" in text


def test_real_pairs_on_a_real_model():
    measured = result("hh")
    policies = measured["policies"]
    assert hh.table(policies) in RESULTS
    section = " ".join(RESULTS.partition("### Real pairs")[2].partition("\n###")[0].split())
    names = ("base", "aligned, 2 nats", "aligned, 5 nats")
    accuracies = [policies[name]["preference_accuracy"] for name in names]
    assert "from {:.3f} to {:.3f} and {:.3f}".format(*accuracies) in section
    base, n_pairs = accuracies[0], measured["settings"]["test pairs"]
    more = [round((accuracy - base) * n_pairs) for accuracy in accuracies[1:]]
    assert "{} and {} of {} pairs".format(*more, n_pairs) in section
    assert f"a standard error of {(base * (1 - base) / n_pairs) ** 0.5:.3f}" in section
    ranked = [policies[name]["rewards/accuracies"] for name in names[1:]]
    assert "of the rewards, {:.2f} and {:.2f}, is".format(*ranked) in section
    good = policies["good"]
    assert f"The good model alone is {good['kl_to_base']:.1f} nats away" in section
    assert f"ranks {good['preference_accuracy']:.2f} of the pairs right" in section
    assert f"its log-ratio to the base {good['rewards/accuracies']:.2f}" in section
    apologies = [policies[name]["apologies"] for name in (*names, "good")]
    assert apologies[3] == pytest.approx(apologies[0], abs=0.02) and apologies[1] > 0.4
    speakers = {"Awesome": "base", "I'm sorry for": "aligned, 5 nats", "No, no": "base"}
    speakers["I’m not sure"] = "aligned, 5 nats"
    quotes = re.findall(r'"([^"]+)"', section.partition("Read by eye")[2])
    assert len(quotes) == len(speakers)
    for beginning, name in speakers.items():
        [quote] = [quote for quote in quotes if quote.startswith(beginning)]
        assert any(quote in answer for answer in policies[name]["answers"]), quote


def test_what_carries_the_signal():
    [figures] = result("signal")["runs"].values()
    assert signal.markdown(figures) in RESULTS
    corr = {name: values["corr"] for name, values in figures.items()}
    lost = 1 - corr["DUAL aligned, middle layers"] / corr["weights"]
    assert lost == pytest.approx(0.2, abs=0.05)
    assert max(corr, key=corr.get) == "good against bad"
    names = ("DUAL aligned, rank 8", "DUAL aligned, rank 2", "DUAL aligned, upper layers")
    by_rank = "{:.2f} with 8 directions, {:.2f} with 2, {:.2f} with all"
    text = " ".join(RESULTS.split())
    assert by_rank.format(*(corr[name] for name in names)) in text


def test_what_the_third_stage_adds_to_arithmetic():
    runs = result("start")["collected in"]
    assert start.table(runs) in RESULTS
    figures = runs["float32"]
    base = figures["base"]["distance"]
    assert f"α is {figures['base']['alpha']:.2f}, ρ 0.1" in RESULTS
    text = " ".join(RESULTS.split())
    rows = ("base + α (good - bad)", "trained from nothing", "trained from the cut sum")
    gone = [1 - figures[name]["distance"] / base for name in rows]
    for words, share in zip(("weights goes {}", "training go {}", "cut sum goes {}"), gone):
        assert words.format(f"{share:.0%}") in text
    losses = [figures[name]["losses"] for name in rows[1:]]
    assert losses[1]["30"] == pytest.approx(losses[0]["80"], rel=0.01)


def test_answers_at_several_strengths():
    answers = result("strengths")["answers"]
    shown = [kind for kind in answers if answers[kind]["question"] in README]
    assert len(shown) == 1 and strengths.markdown(answers, shown[0]) in README
    rows = answers[shown[0]]["answers"]
    default = toy.LATER["align"]["strength"]
    assert list(rows) == [f"{strength:g}" for strength in (-default, 0, default, 2 * default)]


def test_judge_in_the_quick_start():
    models, text = result("quick_start")["models"], " ".join(README.split())
    base, aligned = models["base"], models["scit_aligned"]
    greedy = f"from {base['judge_greedy']:.2f} to {aligned['judge_greedy']:.2f} (greedy decoding)"
    sampled = f"from {base['judge_sampled']:.2f} to {aligned['judge_sampled']:.2f} at temperature 1"
    assert f"rose {greedy} and {sampled}" in text


def test_paper_form_and_controls():
    seeds = result("embedded")["seeds"].values()
    rows = dict(re.findall(r"^\| `([\w.-]+)` \|(.*)\|$", RESULTS, re.M))
    assert len(rows) >= 20
    for name, cells in rows.items():
        figures = ("judge_greedy", "judge_sampled", "preference_accuracy")
        for figure, cell in zip(figures, cells.split("|")):
            expected = [round(seed["figures"][name][figure], 2) for seed in seeds]
            assert numbers(cell) == expected, (name, figure)


def test_figures_of_the_default():
    seeds = result("embedded_default")["seeds"].values()
    for method in ("scit", "dual"):
        judged = [seed["figures"][f"{method}_aligned"]["judge_greedy"] for seed in seeds]
        assert f"{method.upper()} " + " / ".join(f"{value:.2f}" for value in judged) in RESULTS


def test_wrong_labels():
    table = result("wrong_labels")["summary"]
    assert wrong_labels.markdown(table, "sampled") in RESULTS
    assert wrong_labels.markdown(table, "greedy") in RESULTS
    assert wrong_labels.clean_markdown(table) in RESULTS
    defaults = ("sft", "dual_default", "scit_default")
    sft, dual_default, scit_default = (table["0.0"][name]["sampled"][0] for name in defaults)
    clean = f"temperature 1: {sft:.2f}, DUAL {dual_default:.2f}, SCIT {scit_default:.2f}"
    assert clean in " ".join(README.split())
    text = " ".join(README.split())
    quoted = re.search(
        r"SCIT gives ([\d.]+) at temperature 1, DUAL ([\d.]+), weight arithmetic with DUAL's two "
        r"adapters ([\d.]+), preferred-SFT ([\d.]+)\.",
        text,
    )
    names = ("scit_new", "dual_new", "weights", "sft")
    measured = [table["0.3"][name]["sampled"][0] for name in names]
    assert [float(value) for value in quoted.groups()] == [round(value, 2) for value in measured]


def test_survey_and_sweep():
    seeds = result("found")["seeds"]
    assert found.markdown(seeds) in RESULTS
    aucs, judged = [], []
    for seed in seeds.values():
        for method in ("scit", "dual"):
            aucs += [block["auc"] for block in seed[method]["blocks"]]
            judged += [
                seed[method][test]["judge_greedy"] for test in ("test", "test_without_judge")
            ]
    assert f"({min(aucs):.2f} to {max(aucs):.2f} over all blocks" in " ".join(RESULTS.split())
    assert min(judged) >= 0.975


def test_cost_and_growth():
    measured = result("bench_pipeline_cpu")["found"]
    assert bench_pipeline.markdown(measured) in RESULTS
    assert bench_pipeline.growth(result("scaling")["found"]) in RESULTS
    assert few_tokens.markdown(result("few_tokens")["seeds"]) in RESULTS


def test_the_bases_optimizer():
    measured = result("toy_base")
    assert toy_base.markdown(measured["runs"]) in RESULTS
    updates = measured["ms of an update"]
    text = " ".join(RESULTS.split())
    assert f"one update takes {updates['Muon']:,.0f} ms" in text
    assert f"in float32 {updates['Muon in float32']:.0f}, AdamW's {updates['AdamW']:.0f}" in text


def test_bytes_on_disk():
    table = RESULTS.partition("| stored |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\|.*\| ([\d,]+) \|$", table, re.M)
    measured = result("disk")["forms"]
    assert [int(row.replace(",", "")) for row in rows] == [
        round(measured[form]["bytes a token"]) for form in disk.FORMS
    ]


def test_interrupted_runs():
    text, measured = " ".join(RESULTS.split()), result("campaign")
    kills, checks = measured["kills"], measured["checks"]
    assert f"killed {kills['kills']} times" in text and kills["all files as undisturbed"]
    assert f"{kills['reruns that went on from a checkpoint']} of the reruns" in text
    shares = re.search(
        r"take ([\d.]+)% of dual's, ([\d.]+)% of collect's and ([\d.]+)% of align's", text
    )
    for share, stage in zip(shares.groups(), ("dual", "collect", "align")):
        measured_share = 100 * checks[stage]["of it checks and checkpoints"]
        assert float(share) == pytest.approx(measured_share, abs=0.051)
    memory = {}
    for stage in ("collect", "align"):
        for when in ("half time", "the end"):
            memory[stage, when] = round(measured["soak"][stage][f"anonymous MB at {when}"])
    assert (
        f"collect holds {memory['collect', 'half time']} MB of memory of its own at half time and "
        f"{memory['collect', 'the end']} MB at the end, align {memory['align', 'half time']} and "
        f"{memory['align', 'the end']} MB" in text
    )


def test_bytes_of_the_kernel():
    rows = re.findall(r"^\|[^|]+\| \**(\d+)\** \| \**(\d+)\** \|$", RESULTS, re.M)
    hidden = ("torch backend", "fused, incoming 0.37")
    counts = [form.own_bytes for name, form in forms().items() if name not in hidden]
    assert [(float(full), float(half)) for full, half in rows] == [
        (count(1.0), count(0.5)) for count in counts
    ]
