"""Bad input ends with one clear line on standard error and exit code 2, and changes no file."""

import dataclasses
import json
import re
import shutil
import sys

import pytest
import torch
from helpers import CPU, call, go, listing, make_model, name_of, without_logs

import align
import collect
import dual
import evaluate
import scit
from common import toy
from common.collection import principal_directions
from common.config import GROUPS, Parser, UserError, run
from common.hf import choose_device
from tools import export, profile, survey, sweep

QUICK = ["--steps", "2", "--batch-size", "2", *CPU]
SCIT = ["--method", "scit"]


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "stage", [scit, dual, collect, align, evaluate, toy, sweep, survey, profile, export]
)
def test_help_is_in_sections(stage):
    """The method's own settings first, then model and data, then those of the run."""
    text = Parser(stage.Config).format_help()
    # "options" (--help itself), title, settings, title, settings ...
    _, *parts = re.split(r"^(\S.*):$", text, flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2]))
    present = [title for title in GROUPS.values() if title in sections]
    assert list(sections) == ["options", *present]
    assert {GROUPS["method"], GROUPS["data"], GROUPS["run"]} <= set(sections)
    for field in dataclasses.fields(stage.Config):
        section = sections[GROUPS[field.metadata["group"]]]
        assert f"  --{field.name.replace('_', '-')}" in section
    assert "default: None" not in text


def test_help_as_a_user_sees_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run(sweep.main, sweep.Config)
    printed = capsys.readouterr()
    assert stop.value.code == 0
    assert printed.err == ""
    summary = sweep.__doc__.split("\n\n")[0]
    # line breaks may differ
    assert summary.split() == printed.out.partition("\n\n")[2].split()[: len(summary.split())]
    assert "--seed" in printed.out


def test_an_error_as_a_user_sees_it(tmp_path):
    """One case through a real interpreter: exit code 2, one line, no traceback."""
    result = call(sweep, "--out", tmp_path)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "give several values of --kl, of --strength or of --alpha" in result.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (["--stepz", "3"], ["--stepz", "did you mean --steps?"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "0"], ["--steps", "less than 1"]),
        (["--lr", "-1"], ["--lr"]),
        (["--lr", "1e300"], ["--lr", "too large"]),
        (["--seed", "123456789012345678901"], ["--seed", "too large"]),
        (["--lr", "nan"], ["nan is not a finite number"]),
        (["--anchor", "1.5"], ["--anchor", "more than 1"]),
        (["--lora-dropout", "2"], ["more than 1"]),
        (["--dtype", "int8"], ["--dtype"]),
        (["--dtype", "float16"], ["--dtype"]),
        (["--device", "tpu"], ["--device tpu"]),
        (["--device", "mps"], ["--device mps", "only cpu and cuda"]),
        (["--model", "somewhere"], ["--data go together"]),
        (["--model", "./nowhere", "--data", "x"], ["--model ./nowhere", "no such folder"]),
    ],
)
def test_settings(refused, tmp_path, args, words):
    refused(scit, "--out", tmp_path, *args, words=words)


@pytest.mark.parametrize(
    "stage, remedy",
    [
        (
            scit,
            "lower --tokens-per-pass, or lower --batch-size, or set --gradient-checkpointing True",
        ),
        (toy, "use --device cpu"),
        (collect, "lower --tokens-per-pass, or set --compute-dtype bfloat16"),
        (evaluate, "lower --tokens-per-pass, or lower --batch-size"),
    ],
)
def test_a_full_gpu_names_settings_that_the_stage_has(stage, remedy, tmp_path, monkeypatch, fails):
    def run_out_of_memory(config):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stage, "main", run_out_of_memory)
    code, lines = fails(stage, "--out", tmp_path)
    assert code == 1
    assert lines == [f"{name_of(stage)}: error: out of GPU memory: {remedy}"]


@pytest.mark.parametrize(
    "name, set_devices",
    [
        (None, []),
        ("cuda", []),
        ("cuda:1", [torch.device("cuda:1")]),
    ],
)
def test_a_gpu_is_chosen_by_its_number(name, set_devices, monkeypatch):
    empty = torch.empty
    calls = []

    def empty_on_cpu(size, device):
        return empty(size)

    monkeypatch.setattr(torch.cuda, "is_available", always)
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "empty", empty_on_cpu)
    assert choose_device(name) == torch.device(name or "cuda")
    assert calls == set_devices


def always():
    return True


# ---------------------------------------------------------------- pairs


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "No such file"),
        (b"\xff\xfe\x00", "utf-8"),
        (b"\x1f\x8bgarbage", "rows.jsonl"),
        (b"not json\n", ["line 1", "not JSON"]),
        (b'[{"chosen": ', "not JSON"),
        (b'{"chosen": "a"}\n', ["line 1", "'rejected' is missing"]),
        (
            b'{"prompt": "q", "chosen": "a", "rejected": 3}\n',
            ["line 1", "'rejected' holds '3'"],
        ),
        (b"", "no train pair is left"),
        (
            b'{"prompt": "q", "chosen": "a", "rejected": "a"}\n',
            ["no train pair is left", "1 identical"],
        ),
    ],
)
def test_rows(refused, tiny, tmp_path, content, words):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    source = ["--model", tiny / "model", "--data", path]
    for stage in (scit, dual):
        refused(stage, *source, "--out", tmp_path, words=words)


def test_a_rank_above_every_weights_is_refused(refused, tiny, tmp_path):
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path]
    words = ["--lora-rank 33", "rank 32 at most"]
    refused(scit, *source, "--lora-rank", "33", *CPU, words=words)


def test_nothing_left_after_max_length(refused, tiny, tmp_path):
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path]
    words = ["no train pair is left", "over 5 tokens", "--max-length"]
    refused(dual, *source, "--max-length", "5", words=words)


def test_worlds_that_cannot_be(refused, tmp_path):
    out = ["--out", tmp_path]
    refused(toy, *out, "--kinds", "tool,boat", words=["--kinds boat", "island,sum"])
    refused(toy, *out, "--width", "12", words=["--width 12", "multiple of 8"])


# ---------------------------------------------------------------- what an earlier stage wrote


def test_missing_earlier_stage_names_the_command(refused, tmp_path):
    out = ["--out", tmp_path]
    refused(collect, *out, "--method", "dual", words="run `python dual.py` first")
    refused(align, *out, words="run `python collect.py` first")
    refused(align, *out, *SCIT, words="run `python collect.py` first")
    refused(evaluate, *out, words="run `python scit.py` or `python dual.py` first")
    refused(survey, *out, words="run `python scit.py` or `python dual.py` first")
    refused(sweep, *out, "--alpha", "1", words="run `python collect.py` first")
    refused(profile, *out, words="run `python collect.py` first")
    refused(export, *out, words="run `python align.py` first")


def test_both_methods_need_a_choice(refused, done):
    words = ["--method scit", "--method dual"]
    for stage in (collect, align, survey, profile, export):
        refused(stage, "--out", done, words=words, folder=done)
    refused(sweep, "--out", done, "--alpha", "1", words=words, folder=done)


def test_layers_out_of_range_or_not_collected(refused, done):
    out = ["--out", done, *SCIT]
    refused(collect, *out, "--layers", "4", words=["--layers 4", "0 to 3"], folder=done)
    words = ["--layers lower", "upper, middle, last, all"]
    refused(collect, *out, "--layers", "lower", words=words, folder=done)
    words = ["--layers 0", "holds layers [1]"]
    refused(align, *out, "--layers", "0", words=words, folder=done)


def test_an_instruction_that_is_no_text_is_refused(refused, tiny, tmp_path):
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", tmp_path]
    refused(scit, *source, "--positive", "\udcff x", *CPU, words=["--positive", "not UTF-8"])


def test_scit_without_instructions_is_refused(refused, done):
    words = ["--stimulus plain", "SCIT"]
    refused(collect, "--out", done, *SCIT, "--stimulus", "plain", words=words, folder=done)


def test_strengths_and_ranks(refused, done):
    out = ["--out", done, *SCIT]
    both = ["--alpha", "1", "--strength", "0.2"]
    for stage in (align, sweep):
        refused(stage, *out, *both, words=["--alpha", "--strength"], folder=done)
    refused(align, *out, "--rank", "33", words=["--rank 33", "32 directions"], folder=done)
    refused(align, *out, "--strength", "inf", words=["--strength: inf", "finite"], folder=done)
    # before the first adapter is trained
    words = ["--strength: inf", "finite"]
    refused(sweep, *out, "--strength", "0.1", "inf", words=words, folder=done)
    words = ["--alpha 1 1", "once"]
    refused(sweep, *out, "--alpha", "1", "1", words=words, folder=done)


def test_unknown_linears(refused, done):
    words = ["q_porj", "blocks have q_proj, k_proj"]
    args = ["--out", done, *SCIT, "--lora-targets", "q_porj"]
    refused(align, *args, words=words, folder=done)
    refused(sweep, *args, "--alpha", "1", words=words, folder=done)


def test_strength_where_nothing_differs(refused, copy):
    path = copy / "scit" / "collect" / "stage.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "ratio": [0.0]}))
    words = ["--strength", "h+ and h- must differ"]
    refused(align, "--out", copy, *SCIT, "--strength", "0.2", words=words, folder=copy)


def test_unfinished_other_kind_other_version(refused, copy):
    path = copy / "scit" / "collect" / "stage.json"
    manifest = json.loads(path.read_text())
    for content, problem in [
        (json.dumps({**manifest, "version": 99}), "version 99"),
        (json.dumps({**manifest, "kind": "align"}), "is align"),
        ("{", "not a valid stage manifest"),
        (None, "unfinished"),
    ]:
        if content is None:
            path.unlink()
        else:
            path.write_text(content)
        words = [problem, "run `python collect.py` again"]
        refused(align, "--out", copy, *SCIT, words=words, folder=copy)


@pytest.mark.parametrize(
    "name, stage",
    [
        ("scit/adapter/adapter_model.safetensors", collect),
        ("scit/collect/shard-00000.safetensors", align),
        ("scit/collect/base_adapter/adapter_model.safetensors", align),
        ("scit/align/adapter_model.safetensors", evaluate),
        ("scit/align/adapter_model.safetensors", export),
    ],
)
def test_changed_files_are_noticed(refused, copy, name, stage):
    content = bytearray((copy / name).read_bytes())
    content[-1] ^= 1
    (copy / name).write_bytes(content)
    method = [] if stage is evaluate else SCIT
    words = name.rpartition("/")[2]
    refused(stage, "--out", copy, *method, words=words, folder=copy)


def test_another_model(refused, done, tmp_path, tokenizer):
    other = tmp_path / "other"
    make_model("llama", seed=1).save_pretrained(other)
    tokenizer.save_pretrained(other)
    args = ["--out", done, "--model", other]
    for stage in (collect, align, survey, export):
        refused(stage, *args, *SCIT, words="another model", folder=done)
    refused(sweep, *args, *SCIT, "--alpha", "1", words="another model", folder=done)
    refused(evaluate, *args, words="another model", folder=done)


def test_not_enough_disk(refused, done, monkeypatch):
    usage = shutil.disk_usage(done)

    def almost_full(path):
        return usage._replace(free=1000)

    monkeypatch.setattr(shutil, "disk_usage", almost_full)
    out = ["--out", done, "--method", "dual"]
    refused(collect, *out, words=["GB are free", "--limit", "--store diff"], folder=done)
    refused(collect, *out, "--max-gb", "1e-9", words=["--max-gb", "--limit"], folder=done)


def test_nan_in_v_is_named():
    v = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    with pytest.raises(UserError, match="NaN or infinite"):
        principal_directions([[v]], 1)


@pytest.mark.parametrize("judge", ["nonsense", "common.toy:nothing", "no_such_module:f"])
def test_judge(refused, done, judge):
    words = ["--judge", "module:function"]
    refused(evaluate, "--out", done, "--judge", judge, words=words, folder=done)
    sweep_args = ["--out", done, *SCIT, "--alpha", "1", "--judge", judge]
    refused(sweep, *sweep_args, words=words, folder=done)


# ---------------------------------------------------------------- a stage that fails


def test_a_failing_stage_keeps_the_earlier_output(copy, monkeypatch):
    """A crash while writing: the earlier folder is complete, nothing unfinished is beside it."""
    before = without_logs(listing(copy))

    def crash(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(align, "save_adapter", crash)
    with pytest.raises(ZeroDivisionError):
        go(align, "--out", copy, *SCIT, *QUICK)
    after = without_logs(listing(copy))
    # a run would resume from it
    after.pop("scit/.checkpoint-align")
    assert after == before


@pytest.mark.parametrize("stage", [scit, dual, align])
def test_a_loss_that_is_not_finite_ends_the_stage_and_saves_nothing(stage, copy, tiny, fails):
    before = without_logs(listing(copy))
    args = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl"]
    if stage is align:
        args = SCIT
    code, lines = fails(stage, "--out", copy, *args, "--lr", "1e30", "--steps", "12", *CPU)
    assert code == 2
    assert "lower --lr" in lines[-1]
    assert without_logs(listing(copy)) == before
