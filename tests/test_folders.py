"""Stage folders: two runs at once, what was replaced upstream, links, leftovers, and judges."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from helpers import CPU, ROOT, go, listing, stage1_source
from templates import CHATML
from transformers import AutoTokenizer

import align
import collect
import dual
import evaluate
import scit
from common import score, toy
from common.config import UserError
from common.score import load_judge
from common.stages import MANIFEST, claim, find_folder, read_stage, write_stage
from tools import export, sweep

QUICK = ["--steps", "2", "--batch-size", "2", *CPU]
DUAL = ["--method", "dual"]

# {stage: (its arguments besides --out, the folder that it writes)}
WRITERS = {
    scit: (QUICK, "scit/adapter"),
    dual: (QUICK, "dual/bad"),
    collect: ([*DUAL, "--layers", "1", *CPU], "dual/collect"),
    align: ([*DUAL, *QUICK], "dual/align"),
    sweep: ([*DUAL, "--alpha", "1", "2", *QUICK], "dual/sweep"),
    export: ([*DUAL, *CPU], "dual/merged"),
    evaluate: (["--limit", "2", "--max-new-tokens", "2", *CPU], "evaluate"),
}


def arguments_of(stage, out, tiny):
    """(arguments, the folder that is written) of a stage on a copy of the finished folder."""
    options, folder = WRITERS[stage]
    source = stage1_source(tiny, out) if stage in (scit, dual) else ["--out", out]
    return [*source, *options], out / folder


def edit_manifest(folder, edit):
    """Change a stage.json by a function of its content."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


# ---------------------------------------------------------------- two runs at once


@pytest.mark.parametrize("stage", WRITERS, ids=lambda stage: stage.__name__)
def test_the_second_of_two_runs_is_refused(stage, copy, tiny, refused):
    args, folder = arguments_of(stage, copy, tiny)
    with claim(folder):
        refused(stage, *args, words=["another run is writing", str(folder)])


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = (
        "import sys, time; from common.stages import claim\n"
        "with claim(sys.argv[1]): print('locked', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, tmp_path / "stage"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match="another run"), claim(tmp_path / "stage"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with claim(tmp_path / "stage"):
        pass


def test_a_reader_leaves_a_folder_alone_that_is_being_written(tmp_path):
    """Between a writer's two renames the previous folder lies aside: only without a writer it is
    put back."""
    aside = tmp_path / ".x.old"
    aside.mkdir()
    with claim(tmp_path / "x"):
        find_folder(tmp_path / "x")
        assert aside.exists()
    find_folder(tmp_path / "x")
    assert (tmp_path / "x").is_dir() and not aside.exists()


def test_a_linked_toy_world_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "write_world", lambda folder, config: None)
    config = toy.Config(out=str(tmp_path / "out"))
    toy.ensure_world(config)
    shutil.move(tmp_path / "out" / "toy" / "seed0", tmp_path / "elsewhere")
    (tmp_path / "out" / "toy" / "seed0").symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(toy, "write_world", None)
    toy.ensure_world(config)


def test_a_stage_waits_for_the_toy_world_of_another(tmp_path, capsys, monkeypatch):
    """... and then takes it: it is made once."""
    made = []

    def write_world(folder, config):
        made.append(folder)
        time.sleep(0.5)
        (folder / "pairs.jsonl").write_text("{}\n")

    monkeypatch.setattr(toy, "write_world", write_world)
    config = toy.Config(out=str(tmp_path))
    threads = [threading.Thread(target=toy.ensure_world, args=[config]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert "waiting for another run" in capsys.readouterr().out
    assert (tmp_path / "toy" / "seed0" / "pairs.jsonl").is_file()


# ---------------------------------------------------------------- what was replaced upstream


@pytest.mark.parametrize("method, stage1", [("scit", scit), ("dual", dual)])
def test_a_replaced_stage_1_is_noticed(method, stage1, copy, tiny, refused):
    """By align and evaluate. Where stage 1 has gone, align needs it no more."""
    go(stage1, *stage1_source(tiny, copy), "--seed", "0", "--lr", "1e-4", *QUICK)
    words = ["newer than the hidden states", "run `python collect.py`"]
    refused(align, "--out", copy, "--method", method, *QUICK, words=words)
    refused(evaluate, "--out", copy, *CPU, words=words)
    for folder in ("adapter", "good", "bad"):
        shutil.rmtree(copy / method / folder, ignore_errors=True)
    go(align, "--out", copy, "--method", method, *QUICK)


def test_changed_pairs_are_noticed(tiny, tmp_path, refused):
    """Where data are inherited, they are those that stage 1 was trained on. Another --data is
    taken as it is."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_bytes((tiny / "pairs.jsonl").read_bytes())
    out = tmp_path / "out"
    go(dual, "--model", tiny / "model", "--data", pairs, "--out", out, *QUICK)
    go(collect, "--out", out, "--layers", "1", *CPU)
    go(align, "--out", out, *QUICK)
    lines = pairs.read_text().splitlines(keepends=True)
    pairs.write_text("".join(lines[1:]))
    words = ["these are other pairs than", "--data"]
    short = ["--limit", "2", "--max-new-tokens", "2", *CPU]
    refused(collect, "--out", out, "--layers", "1", *CPU, words=words)
    refused(evaluate, "--out", out, *short, words=words)
    words = ["these are other pairs than", "collect.py"]
    refused(sweep, "--out", out, "--alpha", "1", "2", *QUICK, words=words)
    output = go(evaluate, "--out", out, "--data", pairs, *short)
    assert "whether a stage has trained on these pairs is not known" in output
    output = go(collect, "--out", out, "--layers", "1", "--data", pairs, *CPU)
    assert "need not be those that stage 1 was trained on" in output


def test_evaluate_notices_runs_on_different_pairs(copy, tiny, tmp_path, refused):
    lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]))
    shutil.rmtree(copy / "dual")
    source = ["--model", tiny / "model", "--data", tmp_path / "fewer.jsonl", "--out", copy]
    go(dual, *source, *QUICK)
    refused(evaluate, "--out", copy, *CPU, words=["these are other pairs than", "scit/adapter"])


def test_columns_are_inherited_with_the_data(tiny, tmp_path):
    rows = map(json.loads, (tiny / "pairs.jsonl").read_text().splitlines())
    renamed = [{"good": r["chosen"], "bad": r["rejected"], "split": r["split"]} for r in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in renamed))
    columns = ["--columns", "chosen=good", "rejected=bad"]
    out = tmp_path / "out"
    source = ["--model", tiny / "model", "--data", tmp_path / "pairs.jsonl", "--out", out]
    go(dual, *source, *columns, *QUICK)
    output = go(collect, "--out", out, "--layers", "1", *CPU)
    assert "columns ['chosen=good', 'rejected=bad']" in output
    go(align, "--out", out, *QUICK)
    go(sweep, "--out", out, "--alpha", "1", "2", "--max-new-tokens", "2", *QUICK)
    go(evaluate, "--out", out, "--limit", "2", "--max-new-tokens", "2", *CPU)
    # another file has columns of its own
    data = ["--data", tiny / "pairs.jsonl"]
    go(evaluate, "--out", out, *data, "--limit", "2", "--max-new-tokens", "2", *CPU)


@pytest.mark.parametrize("part", ["tokenizer", "chat template"])
def test_a_changed_tokenizer_is_named(part, tiny, tmp_path, refused):
    shutil.copytree(tiny / "model", tmp_path / "model")
    out = tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "model")
    source = ["--model", tmp_path / "model", "--data", tiny / "pairs.jsonl", "--out", out]
    go(dual, *source, *QUICK)
    go(collect, "--out", out, "--layers", "1", *CPU)
    go(align, "--out", out, *QUICK)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    if part == "tokenizer":
        tokenizer.add_tokens(["xylophone"])
    else:
        tokenizer.chat_template = CHATML.replace("assistant", "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = f"this is another {part} than"
    refused(collect, "--out", out, "--layers", "1", *CPU, words=words)
    refused(align, "--out", out, *QUICK, words=words)
    refused(evaluate, "--out", out, *CPU, words=words)
    refused(export, "--out", out, *CPU, words=words)


# ---------------------------------------------------------------- manifests and links


@pytest.mark.parametrize(
    "folder, key, stage",
    [
        ("collect", "ratio", align),
        ("collect", "hidden_size", align),
        ("good", "inputs", collect),
        ("align", "inputs", evaluate),
    ],
)
def test_a_manifest_without_a_key_is_refused(folder, key, stage, copy, tiny, refused):
    edit_manifest(copy / "dual" / folder, lambda manifest: manifest.pop(key))
    args, _ = arguments_of(stage, copy, tiny)
    refused(stage, *args, words=[str(copy / "dual" / folder / MANIFEST), f"lacks '{key}'"])


def test_settings_without_a_key_are_refused(copy, tiny, refused):
    edit_manifest(copy / "dual" / "good", lambda manifest: manifest["settings"].pop("template"))
    edit_manifest(copy / "dual" / "bad", lambda manifest: manifest["settings"].pop("template"))
    args, _ = arguments_of(collect, copy, tiny)
    refused(collect, *args, words="lacks 'template'")


def test_a_collection_without_responses_is_refused(copy, tiny, refused):
    edit_manifest(copy / "dual" / "collect", lambda manifest: manifest.update(shards=[]))
    args, _ = arguments_of(align, copy, tiny)
    refused(align, *args, words="has no responses")


@pytest.mark.parametrize("stage", WRITERS, ids=lambda stage: stage.__name__)
def test_a_linked_stage_folder_is_refused(stage, copy, tiny, tmp_path, refused):
    """Before anything is computed: it could not be replaced as a whole. It can be read."""
    args, folder = arguments_of(stage, copy, tiny)
    elsewhere = tmp_path / "elsewhere"
    if folder.exists():
        shutil.move(folder, elsewhere)
    else:
        elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    words = [f"{folder} is a symbolic link", "--out"]
    refused(stage, *args, words=words)
    if stage is collect:
        go(align, "--out", copy, *DUAL, *QUICK)


# ---------------------------------------------------------------- leftovers and permissions


def test_leftovers_are_not_part_of_a_folder(tmp_path):
    """Of a run that was killed while it wrote a file, and was then finished."""
    settings = {"a": 1}
    with pytest.raises(KeyboardInterrupt), write_stage(tmp_path / "x", "x", {}, settings) as new:
        (new / "whole").write_text("whole")
        (new / ".half.partial").write_text("half")
        raise KeyboardInterrupt
    with write_stage(tmp_path / "x", "x", {"settings": {}}, settings) as new:
        assert (new / ".half.partial").exists()
    assert list(read_stage(tmp_path / "x", "x", "x")["digests"]) == ["whole"]
    assert sorted(listing(tmp_path / "x")) == [MANIFEST, "whole"]


def test_a_full_disk_leaves_no_half_file(tmp_path, copy, fails, monkeypatch):
    def full(tensors, path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(collect, "save_file", full)
    code, lines = fails(collect, "--out", copy, *DUAL, "--layers", "2", *CPU)
    assert code == 1
    assert "No space left" in lines[-1]
    assert not list(copy.rglob("*.safetensors.partial"))


def test_files_have_ordinary_permissions(done):
    umask = os.umask(0)
    os.umask(umask)
    for name in ("dual/good", "dual/align", "dual/collect"):
        for path in (done / name).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


# ---------------------------------------------------------------- judges


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module in the working directory that leaves a trace when it is imported."""
    (tmp_path / "evil.py").write_text(
        "open('trace', 'w').close()\ndef judge(prompt, reply): return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "trace"


def test_no_judge_out_of_a_folder_is_imported(evil, copy, tiny):
    for folder in ("align", "collect"):
        edit_manifest(copy / "dual" / folder, lambda m: m["settings"].update(judge="evil:judge"))
    answers = ["--limit", "2", "--max-new-tokens", "2", *CPU]
    output = go(evaluate, "--out", copy, *answers)
    assert "the judge evil:judge of an earlier stage is not taken: give it as --judge" in output
    output = go(sweep, "--out", copy, *DUAL, "--alpha", "1", "2", "--max-new-tokens", "2", *QUICK)
    assert "the judge evil:judge of an earlier stage is not taken" in output
    assert not evil.exists()
    go(evaluate, "--out", copy, "--judge", "evil:judge", *answers)
    assert evil.exists()


def test_the_working_directory_comes_last(evil, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    load_judge("evil:judge")
    assert sys.path[-1] == os.getcwd()


def test_other_data_have_no_judge_of_the_toy(copy, tiny, tmp_path):
    """Also in a sweep, whose data are those of the collection."""
    for folder in ("good", "bad"):
        edit_manifest(copy / "dual" / folder, lambda m: m["settings"].update(judge=toy.JUDGE))
    lines = (tiny / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[1:]))
    collected = ["--out", copy, *DUAL, "--layers", "1", *CPU]
    go(collect, *collected)
    assert read_stage(copy / "dual" / "collect", "collect", "")["settings"]["judge"] == toy.JUDGE
    go(collect, *collected, "--data", tmp_path / "other.jsonl")
    assert read_stage(copy / "dual" / "collect", "collect", "")["settings"]["judge"] is None


@pytest.mark.parametrize(
    "result, words",
    [
        ("None", "returns None"),
        ("float('nan')", "returns nan"),
        ("'good'", "returns 'good'"),
        ("[1]", "returns [1]"),
        ("10**400", "returns 1000"),
        ("1 / 0", "fails on the answer"),
    ],
)
def test_a_judge_that_gives_no_number(result, words, tmp_path, monkeypatch, copy, fails):
    """One line that names the answer; the answers are kept."""
    name = f"judge_{abs(hash(result))}"
    (tmp_path / f"{name}.py").write_text(f"def judge(prompt, reply): return {result}\n")
    monkeypatch.chdir(tmp_path)
    options = ["--limit", "2", "--max-new-tokens", "2", *CPU]
    code, lines = fails(evaluate, "--out", copy, "--judge", f"{name}:judge", *options)
    assert code == 2
    assert len(lines) == 1
    assert f"--judge {name}:judge {words}" in lines[0]
    assert "on the answer '" in lines[0]
    kept = copy / "evaluate_answers.jsonl"
    assert f"the answers so far are in {kept}" in lines[0]
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [row["generator"] for row in rows] == ["base", "base"]
    assert not (copy / "evaluate").exists()


def test_numbers_of_other_types_are_scores():
    """What NumPy and torch return, and bool."""
    module = type(sys)("numbers_judge")
    exec("import torch\ndef judge(prompt, reply): return torch.tensor(0.5)", module.__dict__)
    sys.modules["numbers_judge"] = module
    assert score.load_judge("numbers_judge:judge")([(("user", "q"),)], ["r"]) == [0.5]


# ---------------------------------------------------------------- terminals


ONE_AFTER_THE_OTHER = """
import runpy, sys

rest, codes = sys.argv[1:], []
while rest:
    end = rest.index(";")
    sys.argv, rest = rest[:end], rest[end + 1 :]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        codes.append(0)
    except SystemExit as stop:
        codes.append(stop.code)
print("exit codes", codes)
"""


def test_a_terminal_without_utf8_costs_nothing(tiny, tmp_path):
    """Rows, and folders, with characters that the terminal and the locale lack."""
    rows = [json.loads(line) for line in (tiny / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        for name in ("chosen", "rejected"):
            row[name] = row[name].replace("\n\nHuman: ", "\n\nHuman: Ţļ→ ")
    folder = tmp_path / "naïve→"
    folder.mkdir()
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
    source = ["--model", tiny / "model", "--data", folder / "pairs.jsonl"]
    out = ["--out", folder / "out"]
    few = ["--limit", "2", "--max-new-tokens", "2"]
    commands = [
        ["dual.py", *source, *out, *QUICK],
        ["evaluate.py", *out, *few, *CPU],
        ["evaluate.py", *out, "--prompt", "Grüße?", *CPU],
        ["evaluate.py", "--out", tmp_path / "→"],
    ]
    # one interpreter for all of them: it takes seconds to start
    arguments = [argument for command in commands for argument in (*command, ";")]
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER, *arguments],
        cwd=ROOT,
        # an 8-bit locale, which Python does not replace by UTF-8
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
        check=False,
        capture_output=True,
    )
    assert b"Traceback" not in done.stderr, done.stderr
    assert done.stdout.splitlines()[-1] == b"exit codes [0, 0, 0, 2]", done.stderr
    samples = (folder / "out" / "evaluate" / "samples.jsonl").read_text(encoding="utf-8")
    assert "Ţļ→" in samples
