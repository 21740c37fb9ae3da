"""Fixtures: tiny models of several families, tokenizers, a smaller world, finished runs."""

import json
import os
import random
import re
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch

if not torch.cuda.is_available():
    # read when the kernel is imported: without a GPU they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import (
    FAMILIES,
    HERE,
    SMALL_WORLD,
    arguments,
    go,
    listing,
    make_model,
    name_of,
    succeed,
)

import align
import collect
import dual
import scit
from common import toy
from common.config import NEGATIVE, POSITIVE


def pytest_configure(config):
    # pytest-xdist begins with the files of most tests. Ours of few tests take as long: at the end
    # one would run alone.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return make_model(family)


@pytest.fixture(scope="session")
def tokenizer():
    requests = toy.split_requests(list(toy.ASK), 0)
    docs = toy.documents(requests, 2000, random.Random(0))
    texts = [prompt + reply for prompt, reply in docs]
    return toy.train_tokenizer([*texts, POSITIVE, NEGATIVE])


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory):
    """A folder with a random Llama of 4 blocks, a tokenizer and 60 training, 20 validation and 20
    test pairs: for what needs no skill."""
    folder = tmp_path_factory.mktemp("tiny")
    make_model("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    requests = toy.split_requests(["tool", "greeting"], 0)
    rows = toy.preference_rows(requests, 60, random.Random(0))
    kept = []
    for split, count in (("train", 60), ("valid", 20), ("test", 20)):
        kept += [row for row in rows if row["split"] == split][:count]
    lines = [json.dumps(row) + "\n" for row in kept]
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A smaller world with a base model that has learned it: (model folder, pairs file).

    The processes of a test run share it: the first one makes it, the others wait.
    """
    out = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        out = out.parent
    out = out / "world"
    succeed(toy, "--out", out, *arguments(SMALL_WORLD))
    return out / "toy" / "seed0" / "model", out / "toy" / "seed0" / "pairs.jsonl"


@pytest.fixture(scope="session")
def done(tiny, tmp_path_factory):
    """A folder in which all stages of both methods have run, two steps each. Not to be changed."""
    out = tmp_path_factory.mktemp("done")
    quick = ["--steps", "2", "--batch-size", "2", *HERE]
    source = ["--model", tiny / "model", "--data", tiny / "pairs.jsonl", "--out", out]
    for stage in (scit, dual):
        go(stage, *source, *quick)
    for method in ("scit", "dual"):
        base = ["--base", "stage1" if method == "scit" else "original"]
        go(collect, "--out", out, "--method", method, "--layers", "1", *base, *HERE)
        go(align, "--out", out, "--method", method, *quick)
    return out


@pytest.fixture
def fails(capfd):
    """A function that runs a stage that must stop: (exit code, lines on standard error without
    progress bars)."""

    def run(stage, *args):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            go(stage, *args)
        lines = capfd.readouterr().err.splitlines()
        return stop.value.code, [line for line in lines if line.strip() and not is_bar(line)]

    def is_bar(line):
        return bool(re.search(r"\d+%\|", line))

    return run


@pytest.fixture
def refused(fails, tmp_path):
    """A function that calls a stage which must refuse its input: one line on standard error that
    holds all the words, and every file in the folder as it was."""

    def check(stage, *args, words, folder=tmp_path):
        before = listing(folder)
        code, lines = fails(stage, *args)
        assert code == 2
        assert len(lines) == 1, lines
        assert lines[0].startswith(f"{name_of(stage)}: error: ")
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[0]
        assert listing(folder) == before

    return check


@pytest.fixture
def copy(done, tmp_path):
    """A copy of the finished folder that a test may spoil."""
    shutil.copytree(done, tmp_path / "out")
    return tmp_path / "out"
