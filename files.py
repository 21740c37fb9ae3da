"""Stage folders, settings and user errors: how the stages hand off, and how they refuse.

Every stage writes one folder. It is written aside as `.name.partial`, its `stage.json` goes in
last, and the whole is renamed when complete, so a folder with a `stage.json` is a whole one:

    {"kind": "scit", "version": 2, "made_by": {...versions}, "settings": {...}, "digests": {file: sha256}, ...}

A later stage reads that record, checks kind, version and digests, and inherits the settings.
"""
import argparse
import dataclasses
import difflib
import hashlib
import importlib.metadata
import json
import math
import os
import resource
import shutil
import struct
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import HfArgumentParser

VERSION = 2                                   # of the files: a stage refuses another one
RECORD = "stage.json"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int32: "I32", torch.float64: "F64"}    # safetensors' names
SAMPLE = 4096                                 # responses, at most, of which the directions of v are found


class UserError(Exception):
    """Bad input. Printed as one line that names the file, row or setting and the remedy; exit code 2."""


def setting(default, help, least=None):
    """A field of a stage's Config: its default, its one line of help, the least value allowed."""
    return dataclasses.field(default=default, metadata={"help": help, "least": least})


class Parser(HfArgumentParser):
    """HfArgumentParser with one-line errors and a least value for numbers."""

    def add_argument(self, *names, least=None, **kwargs):
        if least is not None:
            number = kwargs["type"]
            def at_least(text):
                value = number(text)
                if not value >= least:
                    raise argparse.ArgumentTypeError(f"{text} is less than {least}")
                return value
            at_least.__name__ = number.__name__
            kwargs["type"] = at_least
        return super().add_argument(*names, **kwargs)

    def error(self, message):                 # argparse would print several lines of usage
        raise UserError(f"{message} (see --help)")


def run(main, config_class):
    """Parse the command line into `config_class`, call main(config), tell time and memory; user errors end with exit code 2."""
    start = time.perf_counter()
    try:
        parser = Parser(config_class, allow_abbrev=False, description=sys.modules["__main__"].__doc__.split("\n\n")[0])
        config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
            raise UserError(f"unknown setting {unknown[0]}" + (f": did you mean {near[0]}?" if near else " (see --help)"))
        main(config)
        print(f"{Path(sys.argv[0]).name}: {time.perf_counter() - start:.0f} s, peak memory {peak_memory() / 1e9:.2f} GB")
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def peak_memory():
    """The most bytes this process has held: of the GPU's memory where it has used one, else of the machine's."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- stage folders

def versions():
    """The versions that made a file or a figure."""
    names = ("torch", "transformers", "safetensors", "numpy")
    return {"python": sys.version.split()[0], **{name: importlib.metadata.version(name) for name in names}}


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_stage(folder, kind, record):
    """Write a stage folder: yields the folder to write into, renamed to `folder` when whole.

    `record` (a dict; the body may still add to it) becomes stage.json. An exception leaves what was there.
    """
    folder = Path(folder)
    partial, old = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        whole = {"kind": kind, "version": VERSION, "made_by": versions(), **record,
                 "digests": {name: sha256(partial / name) for name in names}}
        write_json(partial / RECORD, whole)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def open_log(out, name):
    """A log of JSON lines, OUT/NAME.log: yields a function that writes its keywords as a line, and raises UserError at a loss that is
    NaN or infinite. The first line tells versions."""
    Path(out).mkdir(parents=True, exist_ok=True)
    with open(Path(out) / f"{name}.log", "w", buffering=1) as file:
        def log(**fields):
            file.write(json.dumps(fields) + "\n")
            if not math.isfinite(fields.get("loss", 0)):
                raise UserError(f"the loss is {fields['loss']} at step {fields['step']}: lower --lr")
        log(**versions())
        yield log


def write_json(path, value):
    """Write JSON aside, flush it to the disk and rename it."""
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    with open(aside, "w") as file:
        json.dump(value, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def write_tensors(path, shapes, parts):
    """A safetensors file written piece by piece, so that only one piece is in memory.

    shapes: {name: (dtype, shape)} of the whole; parts: dicts of tensors, to be laid end to end along their first dimension.
    """
    header, ends = {}, {}
    for name, (dtype, shape) in shapes.items():
        begin = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, begin + size]}
        ends[name] = begin
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            for name, tensor in part.items():
                file.seek(8 + len(text) + ends[name])
                ends[name] += file.write(tensor.contiguous().cpu().view(torch.uint8).numpy())      # bf16 has no type in numpy
        file.flush()
        os.fsync(file.fileno())
    if any(ends[name] != entry["data_offsets"][1] for name, entry in header.items()):
        raise ValueError(f"{path}: the parts do not fill the shapes")


def read_stage(folder, kind, command):
    """The record of a stage folder; UserError if it is missing, unfinished, or of another kind or version."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run `{command}` first")
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} is unfinished (no {RECORD}): run `{command}` again")
    try:
        record = json.loads((folder / RECORD).read_text())
        found = record["kind"], record["version"]
        record["settings"], record["digests"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / RECORD} is not a stage record: run `{command}` again") from None
    if found != (kind, VERSION):
        raise UserError(f"{folder} is {found[0]} version {found[1]}, not {kind} version {VERSION}: run `{command}` again")
    return record


def checked(folder, record, name=""):
    """Path of a file or folder in a stage folder (or of all of it), the digests compared with the record."""
    digests = {file: digest for file, digest in record["digests"].items() if file.startswith(name)}
    for file, digest in digests.items() or {name: None}.items():
        path = Path(folder) / file
        if not path.is_file() or sha256(path) != digest:
            raise UserError(f"{path} is missing or not the file that {RECORD} describes: run that stage again")
    return Path(folder) / name


class Collection:
    """What collect.py wrote: token ids and, per target layer, packed states, mapped from the shards as they are read."""

    def __init__(self, paths, layers, store):
        self.layers, self.directions = layers, None        # a list of U [k, D] here turns v into coefficients on them
        self.names = {"full": ("plus", "minus"), "diff": ("v",), "lowrank": ("c",)}[store]
        self.items, self.lengths = [], []                  # (tensors of its shard, ids from:to, states from:to, prompt ids)
        for path in paths:
            with safe_open(path, "pt") as file:            # its tensors are views of the mapped file
                tensors = {key: file.get_tensor(key) for key in file.keys()}
            lengths, starts = tensors["lengths"].tolist(), tensors["starts"].tolist()
            at_id = at_state = 0
            for length, start in zip(lengths, starts):
                end_state = at_state + length - start
                self.items.append((tensors, slice(at_id, at_id + length), slice(at_state, end_state), start))
                at_id, at_state = at_id + length, end_state
            self.lengths += lengths

    def examples(self, indices):
        """(ids, number of prompt ids) of responses, for data.collate: its response mask then marks the recorded positions."""
        return [(tensors["ids"][at].tolist(), start) for tensors, at, _, start in (self.items[i] for i in indices)]

    def recorded(self, i):
        """Number of recorded positions of a response."""
        return self.items[i][2].stop - self.items[i][2].start

    def states(self, indices, device):
        """base, plus, minus of responses as representation_loss takes them: lists of L tensors [T, D]. base is None where it was
        not stored; minus is None where plus holds v, or, with directions, coefficients [T, k] on them."""
        items = [self.items[i] for i in indices]

        def packed(name):
            if f"{name}.{self.layers[0]}" in items[0][0]:
                states = [torch.cat([tensors[f"{name}.{layer}"][at] for tensors, _, at, _ in items]) for layer in self.layers]
                return [x.pin_memory().to(device, non_blocking=True) for x in states] if device.type == "cuda" else states
        base, plus, minus = packed("base"), packed(self.names[0]), packed("minus")
        if self.names == ("c",):                           # of more directions than are asked for, the first
            plus = [c[:, :len(U)] for c, U in zip(plus, self.directions)]
        elif self.directions:
            plus, minus = [v @ U.T.float() for v, U in zip(differences(plus, minus), self.directions)], None       # c = v U^T
        return base, plus, minus

    def differences(self, device, size=64):
        """v of the first responses (their order is random), batch by batch: lists of L tensors [T, D]."""
        for group in torch.arange(min(SAMPLE, len(self.items))).split(size):
            yield differences(*self.states(group, device)[1:])


def differences(plus, minus):
    """v = h+ - h- in fp32 per layer; minus None: plus is v."""
    return [p.float() for p in plus] if minus is None else [p.float() - m.float() for p, m in zip(plus, minus)]


def inherit(config, settings, names, source):
    """Fill the settings that the user left empty (None) from those of an earlier stage, and say which."""
    taken = [name for name in names if getattr(config, name) is None]
    for name in taken:
        setattr(config, name, settings[name])
    print(f"from {source}: " + ", ".join(f"{name} {settings[name]}" for name in taken))


def choose_method(out, method, needed, commands):
    """The method ("scit" or "dual") that a stage works on: the one whose folder is there, or the one asked for.

    needed: {method: folder under `out`/method that must exist}; commands: what would make one.
    """
    found = [name for name in needed if (Path(out) / name / needed[name]).is_dir()]
    if method is None and len(found) > 1:
        raise UserError(f"{out} holds both {' and '.join(found)}: say which with --method {' or --method '.join(found)}")
    if method is None and not found:
        raise UserError(f"nothing in {out} to start from: run {' or '.join(f'`{command}`' for command in commands)} first")
    return method or found[0]


def next_command(script, out, method=None):
    """The line that tells what to run next."""
    return f"next: python {script}" + (f" --out {out}" if out != "out" else "") + (f" --method {method}" if method else "")
