"""Stage folders: how one stage hands its files to the next.

A stage writes a folder (dual.py two) under a temporary name, its `stage.json` (the manifest) last,
and renames the folder when it is complete, so that a folder with a `stage.json` is a complete one:

    {"kind": "scit", "version": 10, "made_by": {...}, "settings": {...}, "digests": {file: sha256},
     "inputs": {"model" | "tokenizer" | "chat template" | "pairs": sha256}}

A later stage reads the manifest, checks kind and version, and inherits the settings; it checks the
digest of each file that it takes, and that model, tokenizer and pairs are still the same.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from common.config import UserError
from common.distributed import barrier, is_first

# The version of the files: a stage refuses any other.
VERSION = 10
MANIFEST = "stage.json"
RESUME_KEY = "resume_key"

# Settings that do not change what a run computes, beyond rounding: it may resume with others. Of
# alpha and strength the resulting α counts, which align.py adds.
IRRELEVANT = (
    "out",
    "device",
    "alpha",
    "strength",
    "kl",
    "max_kl",
    "checkpoint_minutes",
    "restart",
    "judge",
    "reward_model",
    "max_new_tokens",
    "max_gb",
    "report_to",
    "plot",
    "tokens_per_pass",
    "gradient_checkpointing",
    "backend",
)


def versions():
    """The versions of Python and the libraries, to stand beside every file and figure."""
    names = ("torch", "transformers", "safetensors", "numpy")
    libraries = {name: importlib.metadata.version(name) for name in names}
    return {"python": sys.version.split()[0], **libraries}


def file_digest(path, part_size=2**23):
    """sha256 over the sha256 of each 8 MB of a file, so that all cores work on a large one."""

    def digest_part(start):
        with open(path, "rb") as file:
            file.seek(start)
            return hashlib.sha256(file.read(part_size)).digest()

    starts = range(0, os.path.getsize(path), part_size)
    with ThreadPoolExecutor() as threads:
        return hashlib.sha256(b"".join(threads.map(digest_part, starts))).hexdigest()


# ---------------------------------------------------------------- writing


@contextmanager
def claim(*folders, wait=False):
    """Within the context, no other run writes these stage folders.

    The lock ends with the process, however it ends; its file .NAME.lock stays. wait: wait for
    another run, which else is a UserError, as is a folder that is a symbolic link: it could not
    be replaced as a whole. Of the processes of a run the first one holds the lock for all.
    """
    if not is_first():
        yield
        return
    with ExitStack() as locks:
        for folder in map(Path, folders):
            if folder.is_symlink():
                raise UserError(
                    f"{folder} is a symbolic link, which no stage can replace: remove it, and "
                    "link the folder that --out names instead"
                )
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = locks.enter_context(open(folder.with_name(f".{folder.name}.lock"), "w"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    message = f"another run is writing {folder}: wait for it, or use another --out"
                    raise UserError(message) from None
                print(f"waiting for another run that is writing {folder}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; what was written there is flushed and renamed."""
    path = Path(path)
    tmp_path = path.with_name(f".{path.name}.partial")
    try:
        yield tmp_path
        complete_file(tmp_path)
        tmp_path.rename(path)
    finally:
        tmp_path.unlink(missing_ok=True)


def complete_file(path):
    """Wait until a file's bytes are on the disk, and give it the permissions of an ordinary new
    one: some libraries write private files."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def write_json(path, value):
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as tmp_path:
        tmp_path.write_text(json.dumps(value, indent=2), encoding="utf-8")


@contextmanager
def write_stage(folder, kind, manifest, depends_on=None, restart=False):
    """Write a stage folder: yield a temporary folder, renamed to `folder` when complete.

    The dict `manifest`, which the body may still extend, becomes stage.json. After an exception
    the previous folder is still there. depends_on: a dict of everything that the content depends
    on; an interrupted run then keeps its files, and one that depends on the same finds them,
    unless it is to restart. Of several processes, all write into a folder with depends_on, and the
    first one alone into others.
    """
    resumable = depends_on is not None
    partial = Path(folder).with_name(f".{Path(folder).name}.partial")
    if not is_first():
        # after a wait until the first process has made the folder
        if resumable:
            barrier()
        yield partial
        return
    folder = recover_folder(folder)
    if restart:
        shutil.rmtree(partial, ignore_errors=True)
    prepare_partial(partial, relevant_settings(depends_on) if resumable else None)
    if resumable:
        barrier()
    try:
        yield partial
        write_manifest(partial, kind, manifest)
    except BaseException:
        # a run that failed before its first file leaves nothing to resume from
        results = [path for path in partial.iterdir() if path.suffix != ".lock"]
        if not resumable or results == [partial / RESUME_KEY]:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    previous = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(previous)
    partial.rename(folder)
    (folder / RESUME_KEY).unlink(missing_ok=True)
    shutil.rmtree(previous, ignore_errors=True)


def prepare_partial(partial, key):
    """Make the temporary folder of a stage, or keep an interrupted run's with the same key."""
    key_path = partial / RESUME_KEY
    if key is not None and partial.exists():
        if key_path.is_file() and key_path.read_text(encoding="utf-8") == key:
            print(f"{partial}: resuming")
            return
        print(f"{partial}: made with other settings, deleted")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if key is not None:
        with atomic_write(key_path) as tmp_path:
            tmp_path.write_text(key, encoding="utf-8")


def write_manifest(folder, kind, manifest):
    """Flush all files of a folder, then write its stage.json with their digests.

    What a killed run was writing is removed.
    """
    for leftover in [*folder.rglob(".*.partial"), *folder.rglob(".*.lock")]:
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    paths = [path for path in folder.rglob("*") if path.is_file()]
    names = sorted(str(path.relative_to(folder)) for path in paths)
    names = [name for name in names if name not in (RESUME_KEY, MANIFEST)]
    for name in names:
        complete_file(folder / name)
    digests = {name: file_digest(folder / name) for name in names}
    header = {"kind": kind, "version": VERSION, "made_by": versions()}
    write_json(folder / MANIFEST, {**header, **manifest, "digests": digests})


def relevant_settings(settings):
    """The settings that a result depends on, as text to compare."""
    relevant = {name: value for name, value in settings.items() if name not in IRRELEVANT}
    return json.dumps({"version": VERSION, **relevant}, sort_keys=True, default=str)


def recover_folder(folder):
    """The path of a stage folder, renamed back where a run was killed between two renames.

    Such a run has left the previous folder as `.name.old` and none under `name`. To be called
    while no other run can be writing the folder.
    """
    folder = Path(folder)
    previous = folder.with_name(f".{folder.name}.old")
    if previous.exists() and folder.exists():
        shutil.rmtree(previous)
    elif previous.exists():
        previous.rename(folder)
    return folder


def find_folder(folder):
    """The path of a stage folder that is to be read, recovered unless a run is writing it."""
    folder = Path(folder)
    if folder.with_name(f".{folder.name}.old").exists() and is_first():
        with contextlib.suppress(UserError), claim(folder):
            recover_folder(folder)
    return folder


# ---------------------------------------------------------------- reading


class Manifest(dict):
    """What a stage.json holds. A key that it lacks is a UserError that names file and key."""

    def __init__(self, values, path):
        super().__init__(values)
        self.path = path

    def __missing__(self, key):
        raise UserError(f"{self.path} lacks {key!r}: run that stage again")


def read_stage(folder, kind, command):
    """The Manifest of a stage folder.

    UserError if the folder is missing, unfinished, or of another kind or version; command: what
    writes such a folder, for the message.
    """
    folder = find_folder(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"{folder} is missing: run `{command}` first")
    if not path.is_file():
        raise UserError(f"{folder} is unfinished (no {MANIFEST}): run `{command}` again")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        written_as = (manifest["kind"], manifest["version"])
        check_names(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        message = f"{path} is not a valid stage manifest: run `{command}` again"
        raise UserError(message) from None
    if written_as != (kind, VERSION):
        raise UserError(
            f"{folder} is {written_as[0]} version {written_as[1]}, not {kind} version {VERSION}: "
            f"run `{command}` again"
        )
    settings = Manifest(manifest["settings"], path)
    return Manifest({**manifest, "settings": settings}, path)


def check_names(manifest):
    """ValueError unless a manifest has settings and all its files lie inside its folder."""
    for name in ("settings", "digests"):
        if not isinstance(manifest[name], dict):
            raise ValueError(f"{name} is not an object")
    shards = manifest.get("shards", []) + manifest.get("validation_shards", [])
    for name in [*manifest["digests"], *shards]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{name} lies outside the folder")


def verified_path(folder, manifest, name=""):
    """The path of a file or folder inside a stage folder (or of all of it).

    UserError if a file's digest is not the one in the manifest.
    """
    digests = {
        file: digest for file, digest in manifest["digests"].items() if file.startswith(name)
    }
    # a file that the manifest does not know has no digest, and is refused
    for file, digest in (digests or {name: None}).items():
        path = Path(folder) / file
        if not path.is_file() or file_digest(path) != digest:
            raise UserError(
                f"{path} is missing or not the file that {MANIFEST} describes: run that stage again"
            )
    return Path(folder) / name


# ---------------------------------------------------------------- from one stage to the next


def inherit(config, settings, names, source):
    """Fill the settings that the user left empty (None) from an earlier stage's; print them."""
    inherited = [name for name in names if getattr(config, name) is None]
    for name in inherited:
        setattr(config, name, settings[name])
    if inherited:
        print(f"from {source}: " + ", ".join(f"{name} {settings[name]}" for name in inherited))


def fill(config, defaults, handed_on, source):
    """Fill the settings that the user left empty: from what an earlier stage hands on for this one,
    which is printed, else from the defaults."""
    inherit(config, handed_on, list(handed_on), source)
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)


def choose_method(out, method, required, commands):
    """The method ("scit" or "dual") that a stage works on: as asked, or the one that is there.

    required: {method: folder that must exist in OUT/method}; commands: what would write one.
    """
    if method is not None:
        return method
    present = [name for name in required if find_folder(Path(out) / name / required[name]).is_dir()]
    if len(present) > 1:
        options = " or ".join(f"--method {name}" for name in present)
        raise UserError(f"{out} holds both {' and '.join(present)}: choose with {options}")
    if not present:
        options = " or ".join(f"`{command}`" for command in commands)
        raise UserError(f"nothing in {out} to start from: run {options} first")
    return present[0]


def next_command(script, out, method=None):
    """The line that names the next command, such as `next: python align.py --out run`."""
    command = f"next: python {script}"
    if out != "out":
        command += f" --out {shlex.quote(str(out))}"
    if method:
        command += f" --method {method}"
    return command
