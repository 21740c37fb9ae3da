"""Stage folders, settings and user errors: how the stages hand off, and how they refuse.

Every stage writes one folder. It is written aside as `.name.partial`, its `stage.json` goes in
last, and the whole is renamed when complete, so a folder with a `stage.json` is a whole one:

    {"kind": "scit", "version": 5, "made_by": {...versions}, "settings": {...}, "digests": {file: digest}, "seal": sha256, ...}

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
import re
import resource
import shlex
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import HfArgumentParser

VERSION = 5                                   # of the files: a stage refuses another one
RECORD = "stage.json"
IRRELEVANT = ("out", "device", "alpha", "strength", "checkpoint_minutes", "restart", "merge", "judge", "reward_model", "max_new_tokens",
              "profile", "tokens_per_pass", "gradient_checkpointing")        # to what training gives, beyond rounding

REMEDIES = {"tokens_per_pass": "lower --tokens-per-pass", "batch_size": "lower --batch-size",
            "gradient_checkpointing": "set --gradient-checkpointing True"}       # where a GPU's memory is full


class UserError(Exception):
    """Bad input. Printed as one line that names the file, row or setting and the remedy; exit code 2."""


class Diverged(UserError):
    """A training that has come to NaN or infinity."""


class Stopped(Exception):
    """A signal has come and what was done is saved; exit code 128 + its number."""


def setting(default, help, least=-math.inf, most=math.inf):
    """A field of a stage's Config: its default, its one line of help, the least and the most that are allowed."""
    return dataclasses.field(default=default, metadata={"help": help.replace("%", "%%"), "least": least, "most": most})


class Parser(HfArgumentParser):
    """HfArgumentParser with one-line errors and bounds for numbers."""

    def add_argument(self, *names, least=-math.inf, most=math.inf, **kwargs):
        if (number := kwargs.get("type")) in (int, float):
            def within_bounds(text):
                value = number(text)
                if not least <= value <= most:
                    raise argparse.ArgumentTypeError(f"{text} is " + (f"less than {least}" if value < least else f"more than {most}" if value > most else "no number"))
                return value
            within_bounds.__name__ = number.__name__
            kwargs["type"] = within_bounds
        return super().add_argument(*names, **kwargs)

    def error(self, message):                 # argparse would print several lines of usage
        raise UserError(f"{message} (see --help)")


def run(main, config_class):
    """Parse the command line into `config_class`, call main(config), tell time and memory. What goes wrong is one line: bad input with
    exit code 2, a fault of the machine with 1, a signal with 130 or 143."""
    start, script = time.perf_counter(), Path(sys.argv[0]).name

    def end(code, *words):
        print(f"{script}: " + " ".join(" ".join(map(str, words)).split()), file=sys.stderr)
        sys.exit(code)
    try:
        parser = Parser(config_class, allow_abbrev=False, description=sys.modules["__main__"].__doc__.split("\n\n")[0])
        config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
            raise UserError(f"unknown setting {unknown[0]}" + (f": did you mean {near[0]}?" if near else " (see --help)"))
        main(config)
        print(f"{script}: {time.perf_counter() - start:.0f} s, peak memory {peak_memory() / 1e9:.2f} GB")
    except UserError as error:
        end(2, "error:", error)
    except torch.OutOfMemoryError:
        remedies = [words for name, words in REMEDIES.items() if hasattr(config_class, name)]
        end(1, f"error: out of GPU memory: {', or '.join(remedies) or 'take --device cpu'}")
    except (OSError, SafetensorError) as error:          # safetensors says so of a full disk
        end(1, "error:", error)
    except KeyboardInterrupt:
        end(130, "stopped")
    except Stopped as stop:
        again = re.sub(r" --restart( (?!-)\S+|=\S+)?(?= |$)", "", shlex.join(["python", *sys.argv]))
        end(128 + stop.args[0], "stopped; to go on:", again)


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


def file_digest(path, size=2**23):
    """sha256 over the sha256 of each 8 MB of a file: all cores work on a large one."""
    def part(begin):
        with open(path, "rb") as file:
            file.seek(begin)
            return hashlib.sha256(file.read(size)).digest()
    with ThreadPoolExecutor() as threads:
        return hashlib.sha256(b"".join(threads.map(part, range(0, os.path.getsize(path), size)))).hexdigest()


@contextmanager
def new_stage(folder, kind, record, depends_on=None):
    """Write a stage folder: yields the folder to write into, renamed to `folder` when whole.

    `record` (a dict; the body may still add to it) becomes stage.json. An exception leaves what was there. depends_on: a dict of what
    the content depends on; then a run that is cut off leaves its files, and one that depends on the same finds them again.
    """
    folder = restore(folder)
    partial, old, key = folder.with_name(f".{folder.name}.partial"), folder.with_name(f".{folder.name}.old"), relevant(depends_on or {})
    same = depends_on is not None and (partial / "resume_key").is_file() and (partial / "resume_key").read_text() == key
    if depends_on is not None and partial.exists():
        print(f"{partial}: " + ("goes on" if same else "is of a run with other settings, and deleted"))
    if not same:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if depends_on is not None:
            with written_whole(partial / "resume_key") as aside:
                aside.write_text(key)
    try:
        yield partial
        names = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
        names = [name for name in names if name not in ("resume_key", RECORD) and not name.endswith(".partial")]
        for name in names:                    # on the disk before the record says that they are
            with open(partial / name, "rb") as file:
                os.fsync(file.fileno())
        whole = json.loads(json.dumps({"kind": kind, "version": VERSION, "made_by": versions(), **record,
                                       "digests": {name: file_digest(partial / name) for name in names}}))
        write_json(partial / RECORD, {**whole, "seal": seal(whole)})
    except BaseException:
        if depends_on is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    (folder / "resume_key").unlink(missing_ok=True)
    shutil.rmtree(old, ignore_errors=True)


def relevant(settings):
    """The settings that a result depends on, as text."""
    return json.dumps({"version": VERSION, **{name: value for name, value in settings.items() if name not in IRRELEVANT}}, sort_keys=True, default=str)


def seal(record):
    """A digest of a record less its seal: later stages rely on what is in it."""
    return hashlib.sha256(json.dumps({k: v for k, v in record.items() if k != "seal"}, sort_keys=True).encode()).hexdigest()


def restore(folder):
    """A run killed between the two renames at its end has left the earlier folder as `.name.old`: name it `name` again. Returns its path."""
    folder, old = Path(folder), Path(folder).with_name(f".{Path(folder).name}.old")
    if old.exists() and folder.exists():
        shutil.rmtree(old)
    elif old.exists():
        old.rename(folder)
    return folder


@contextmanager
def open_log(folder, name):
    """A log of JSON lines, FOLDER/NAME.log: yields a function that writes its keywords as a line. A run's first line tells versions; a
    run that goes on from a checkpoint of its name writes after what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.log", "a" if any(folder.glob(f".checkpoint-{name}*")) else "w", buffering=1) as file:
        def log(**fields):
            file.write(json.dumps(fields) + "\n")
        log(**versions())
        yield log


@contextmanager
def written_whole(path):
    """Yields the path, beside the one given, to write a file to; flushed to the disk and renamed when whole."""
    aside = Path(path).with_name(f".{Path(path).name}.partial")
    yield aside
    with open(aside, "rb") as file:
        os.fsync(file.fileno())
    aside.rename(path)


def write_json(path, value):
    with written_whole(path) as aside:
        aside.write_text(json.dumps(value, indent=2))


def read_stage(folder, kind, command):
    """The record of a stage folder; UserError if it is missing, unfinished, or of another kind or version."""
    folder = restore(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run `{command}` first")
    if not (folder / RECORD).is_file():
        raise UserError(f"{folder} is unfinished (no {RECORD}): run `{command}` again")
    try:
        record = json.loads((folder / RECORD).read_text())
        found = record["kind"], record["version"]
        record["settings"], record["digests"]
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in [*record["digests"], *record.get("shards", []), *record.get("held_out", [])]):
            raise ValueError("a name that leads out of the folder")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / RECORD} is not a stage record: run `{command}` again") from None
    if found != (kind, VERSION):
        raise UserError(f"{folder} is {found[0]} version {found[1]}, not {kind} version {VERSION}: run `{command}` again")
    if record.get("seal") != seal(record):
        raise UserError(f"{folder / RECORD} has been changed since it was written: run `{command}` again")
    return record


def checked(folder, record, name=""):
    """Path of a file or folder in a stage folder (or of all of it), the digests compared with the record."""
    digests = {file: digest for file, digest in record["digests"].items() if file.startswith(name)}
    for file, digest in digests.items() or {name: None}.items():
        path = Path(folder) / file
        if not path.is_file() or file_digest(path) != digest:
            raise UserError(f"{path} is missing or not the file that {RECORD} describes: run that stage again")
    return Path(folder) / name


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
    found = [name for name in needed if restore(Path(out) / name / needed[name]).is_dir()]
    if method is None and len(found) > 1:
        raise UserError(f"{out} holds both {' and '.join(found)}: say which with --method {' or --method '.join(found)}")
    if method is None and not found:
        raise UserError(f"nothing in {out} to start from: run {' or '.join(f'`{command}`' for command in commands)} first")
    return method or found[0]


def next_command(script, out, method=None):
    """The line that tells what to run next."""
    return f"next: python {script}" + (f" --out {shlex.quote(str(out))}" if out != "out" else "") + (f" --method {method}" if method else "")
