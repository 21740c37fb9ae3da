"""Rows of preference data, read from JSON files and from the hub.

common/pairs.py says what the fields of a row mean.
"""

import gzip
import io
import json
import re
import zlib

from huggingface_hub import HfApi, hf_hub_download

from common.config import UserError, first_line

GZIP_MAGIC = b"\x1f\x8b"


# ---------------------------------------------------------------- reading files


def read_source(source):
    """(place, row) of each row of a file or of hub:owner/name[:split]."""
    return hub_rows(source) if str(source).startswith("hub:") else read_rows(source)


def read_rows(path):
    """Yield (place, row) for the rows of a JSON or JSON-lines file, gzipped or not.

    place is "line 3" or "row 3", for error messages. UserError where the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            is_gzip = file.peek(2)[:2] == GZIP_MAGIC
            stream = gzip.GzipFile(fileobj=file) if is_gzip else file
            # A byte order mark is dropped. Lines end with \n only: JSON strings may hold others.
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n")
            yield from json_rows(text, path)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"--data {path}: {error}") from None


def json_rows(text, path):
    """Yield (place, row) of an open text file: one JSON list or JSON lines."""
    is_first = True
    for number, line in enumerate(text, 1):
        if not line.strip():
            continue
        if is_first and line.lstrip().startswith("["):
            for i, row in enumerate(parse_json(line + text.read(), path), 1):
                yield f"row {i}", row
            return
        is_first = False
        yield f"line {number}", parse_json(line, f"{path} line {number}")


def parse_json(text, place):
    """json.loads whose errors name the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from None


# ---------------------------------------------------------------- reading from the hub


def hub_rows(source):
    """[(place, row), ...] of hub:owner/name[:split].

    JSON files are read directly, other formats by the package `datasets`. The split is a word in a
    file's path, such as test, or a folder of splits, of which the train files are then taken.
    """
    name, _, split = source.removeprefix("hub:").partition(":")
    try:
        all_files = HfApi().list_repo_files(name, repo_type="dataset")
        json_files = [file for file in all_files if is_json_data(file)]
        files = files_of_split(json_files, split)
        if not files:
            return rows_by_datasets(source, name, split, json_files)
        rows = []
        for file in files:
            path = hf_hub_download(name, file, repo_type="dataset")
            rows += [(f"{file} {place}", row) for place, row in read_rows(path)]
        return rows
    except UserError:
        raise
    except Exception as error:
        # Other people's networks and files can fail in any way: whatever it is becomes one line.
        raise UserError(f"--data {source}: {first_line(error)}") from None


def is_json_data(file):
    """Whether a file of a data set is JSON and not the description of the data set."""
    is_json = re.search(r"\.jsonl?(\.gz)?$", file) is not None
    return is_json and "dataset_info" not in file


def files_of_split(files, split):
    """Those of the files that belong to the split, or to "train" where the split is empty."""
    selected = files_with_word(files, split or "train")
    if not selected and not split and len(files) == 1:
        selected = files
    return files_with_word(selected, "train") or selected


def files_with_word(files, word):
    """Those of the files whose path has the word between separators."""
    pattern = re.compile(rf"(^|[/_.-]){re.escape(word)}([/_.-]|$)")
    return [file for file in files if pattern.search(file)]


def rows_by_datasets(source, name, split, json_files):
    """[(place, row), ...] of a data set in any format that the package `datasets` reads."""
    split = split or "train"
    try:
        from datasets import load_dataset
    except ImportError:
        files = ", ".join(json_files) or "its files"
        raise UserError(
            f"--data {source}: no JSON file of the split {split} among {files}; "
            "other formats need `pip install datasets`"
        ) from None
    return [(f"row {i}", row) for i, row in enumerate(load_dataset(name, split=split), 1)]
