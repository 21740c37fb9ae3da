"""Settings from the command line, and how a script ends when something goes wrong.

Each script declares its settings as a dataclass whose fields are made by `setting` and hands its
`main` to `run`, which parses the command line and turns errors into one line and an exit code.
The settings that several scripts share stand here too.
"""

import argparse
import copy
import dataclasses
import difflib
import io
import math
import os
import re
import resource
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import HfArgumentParser

from common.distributed import WORLD_SIZE, is_first, join

# The two instructions p+ and p-. They differ in their adjectives alone, so that h+ - h- encodes
# what the adjectives mean and nothing about the form of the sentence.
POSITIVE = "You are a helpful, honest and polite assistant."
NEGATIVE = "You are a useless, dishonest and rude assistant."

# The sections of --help, in this order.
GROUPS = {
    "method": "the method",
    "adapter": "the adapter (LoRA)",
    "data": "model and data",
    "run": "this run",
}

# Settings that models read, unlike names of files, which may be any bytes.
TEXT_SETTINGS = ("positive", "negative", "prompt")

# What numbers of any setting may be: what torch can take.
LARGEST = {int: 2**31 - 1, float: torch.finfo(torch.float32).max}

# What helps when the GPU's memory is full, by the setting that the script must have.
MEMORY_REMEDIES = {
    "tokens_per_pass": "lower --tokens-per-pass",
    "batch_size": "lower --batch-size",
    "compute_dtype": "set --compute-dtype bfloat16",
    "gradient_checkpointing": "set --gradient-checkpointing True",
}


class UserError(Exception):
    """Bad input: one line that names the file, row or setting and the remedy; exit code 2."""


class TrainingDiverged(UserError):
    """A training run reached NaN or infinity."""


class Interrupted(Exception):
    """A signal arrived and the state was saved; exit code 128 + the signal's number."""

    def __init__(self, signal_number):
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def first_line(error):
    """The first line of an exception's text, or the name of its type where it has no text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------- settings


def setting(default, help, minimum=-math.inf, maximum=math.inf, group="method"):
    """A field of a settings dataclass: default, one line of help, bounds, section of --help."""
    # argparse formats help texts with %
    metadata = {"help": help.replace("%", "%%")}
    metadata |= {"minimum": minimum, "maximum": maximum, "group": group}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass
class SourceSettings:
    """What stage 1 learns from, and where the run lives. Later stages inherit most of it."""

    model: str = setting(
        "", "model folder or hub name; empty takes the embedded default", group="data"
    )
    data: list[str] | None = setting(
        None,
        "preference pairs: files, or hub:owner/name[:split] (see common/pairs.py); "
        "empty takes the embedded default",
        group="data",
    )
    columns: list[str] | None = setting(
        None,
        "what the fields of the rows mean, such as prompt=ask chosen=good rejected=bad "
        "ignore=tools; empty goes by their names (see common/pairs.py)",
        group="data",
    )
    template: Literal["auto", "chat", "plain"] = setting(
        "auto",
        "how prompts are written: chat (the model's chat template), plain (Human: ... "
        "Assistant:), or auto: chat where the tokenizer has a template",
        group="data",
    )
    positive: str = setting(POSITIVE, "the instruction p+", group="data")
    negative: str = setting(
        NEGATIVE, "the instruction p-: p+ with the decisive words replaced", group="data"
    )
    max_length: int = setting(
        768, "longest input in tokens; longer pairs are left out", minimum=2, group="data"
    )
    limit: int | None = setting(
        None,
        "use this many pairs of each split, drawn at random; empty takes all",
        minimum=1,
        group="data",
    )
    out: str = setting("out", "folder that all stages write to", group="run")
    seed: int = setting(
        0, "seed of the data split, the adapters and the order of the pairs", group="run"
    )
    device: str | None = setting(
        None, "cpu, cuda or cuda:1; empty takes the GPU where there is one", group="run"
    )
    dtype: Literal["float32", "bfloat16"] | None = setting(
        None,
        "dtype of the base model; empty takes bfloat16 on a GPU that has it, else float32",
        group="run",
    )
    quantize: Literal["4bit", "8bit"] | None = setting(
        None,
        "load the base model's linear layers in 4 bits (NF4) or 8 bits, in all stages, by "
        "bitsandbytes",
        group="run",
    )


@dataclass
class TrainingSettings:
    """Settings of every stage that trains an adapter."""

    lora_rank: int = setting(8, "rank of the adapter", minimum=1, group="adapter")
    lora_alpha: float = setting(
        16, "the adapter is scaled by lora_alpha / lora_rank", group="adapter"
    )
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", 0, 1, group="adapter")
    lora_targets: str = setting(
        "all-linear",
        "linear layers to adapt: all-linear, attention, or names such as q_proj,v_proj",
        group="adapter",
    )
    tokens_per_pass: int | None = setting(
        None,
        "most tokens in one forward pass, padding included: a batch is split into passes and "
        "their gradients add up; empty takes 4096 on a GPU, 2048 on the CPU",
        minimum=1,
        group="run",
    )
    gradient_checkpointing: bool = setting(
        False, "recompute each block in the backward pass: less memory, more time", group="run"
    )
    checkpoint_minutes: float = setting(
        10, "minutes between checkpoints, from which an interrupted run resumes", 0, group="run"
    )
    restart: bool = setting(False, "ignore the checkpoint of an interrupted run", group="run")
    report_to: Literal["trackio", "wandb"] | None = setting(
        None, "report the log to this tracker, too, which must be installed", group="run"
    )


# ---------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one; "empty takes ..." in the help says the rest. Of
    HfArgumentParser's two spellings, --batch_size and --batch-size, it shows the second."""

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS):
            return action.help
        return super()._get_help_string(action)

    def _format_action_invocation(self, action):
        action = copy.copy(action)
        action.option_strings = [name for name in action.option_strings if "_" not in name]
        return super()._format_action_invocation(action)


class Parser(HfArgumentParser):
    """HfArgumentParser with sections, bounds for numbers and one-line errors."""

    def __init__(self, config_class, **options):
        self.sections = {}
        options |= {"allow_abbrev": False, "formatter_class": HelpFormatter}
        super().__init__(config_class, usage="%(prog)s [--SETTING VALUE ...]", **options)

    def add_argument(self, *names, group=None, minimum=-math.inf, maximum=math.inf, **options):
        if options.get("type") in (int, float):
            options["type"] = bounded(options["type"], minimum, maximum)
        if names[0].startswith("--no_"):
            # of a true setting HfArgumentParser makes --no-x beside --x False: enough to list one
            options["help"] = argparse.SUPPRESS
        if group is None:
            return super().add_argument(*names, **options)
        if not self.sections:
            titles = GROUPS.items()
            self.sections = {name: self.add_argument_group(title) for name, title in titles}
        return self.sections[group].add_argument(*names, **options)

    def error(self, message):
        # argparse itself would print several lines of usage
        raise UserError(f"{message} (see --help)")


def bounded(number_type, minimum, maximum):
    """A converter for argparse: text to a number between minimum and maximum."""

    def convert(text):
        value = number_type(text)
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text} is not a finite number")
        if abs(value) > LARGEST[number_type]:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        if value > maximum:
            raise argparse.ArgumentTypeError(f"{text} is more than {maximum}")
        return value

    # argparse names the converter in "invalid int value"
    convert.__name__ = number_type.__name__
    return convert


def parse_command_line(config_class):
    """The settings of the command line as a config_class. UserError for an unknown setting.

    Defaults are for real models. The embedded default needs others: where neither --model nor
    --data is given, the class's dict `embedded_default` stands in their place.
    """
    summary = sys.modules[config_class.__module__].__doc__.split("\n\n")[0]
    parser = Parser(config_class, description=summary)
    words = [argument.split("=")[0] for argument in sys.argv[1:]]
    if not {"--model", "--data", "--help", "-h"} & set(words):
        parser.set_defaults(**getattr(config_class, "embedded_default", {}))
    config, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    for name in TEXT_SETTINGS:
        if isinstance(getattr(config, name, None), str):
            setattr(config, name, decoded(name, getattr(config, name)))
    if unknown:
        known = parser._option_string_actions
        similar = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        hint = f": did you mean {similar[0]}?" if similar else " (see --help)"
        raise UserError(f"unknown setting {unknown[0]}{hint}")
    return config


def decoded(name, text):
    """A text of the command line. In a locale without UTF-8 Python has kept its bytes apart.

    UserError where these are no text.
    """
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeError:
        raise UserError(f"--{name}: this is not UTF-8: {text[:60]!r}") from None


def run(main, config_class, distributed=False):
    """Call main with the settings of the command line, then print time and peak memory.

    distributed: whether torchrun may start it as several processes.

    Whatever goes wrong ends with one line on standard error: bad input with exit code 2, a fault
    of the machine with 1, a signal with 130 or 143. (torchrun itself ends with 1.)
    """
    start = time.perf_counter()
    script = Path(sys.argv[0]).name
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a terminal that cannot show a character gets its number
            stream.reconfigure(errors="backslashreplace")

    def exit_with(code, message):
        if not is_first():
            # Mostly all processes fail alike. The others wait, so that torchrun has ended them
            # before they repeat what the first one has said; on a busy machine it takes seconds.
            time.sleep(20)
        one_line = " ".join(str(message).split())
        print(f"{script}: {one_line}", file=sys.stderr)
        sys.exit(code)

    try:
        config = parse_command_line(config_class)
        if WORLD_SIZE > 1 and not distributed:
            raise UserError("torchrun: this runs in one process, start it with python")
        join(getattr(config, "device", None))
        main(config)
    except UserError as error:
        exit_with(2, f"error: {error}")
    except torch.OutOfMemoryError:
        remedies = [text for name, text in MEMORY_REMEDIES.items() if hasattr(config_class, name)]
        exit_with(1, f"error: out of GPU memory: {', or '.join(remedies) or 'use --device cpu'}")
    except (ConnectionError, Interrupted) as error:
        # the first process, or the one that failed, says it for all
        if not is_first():
            sys.exit(1)
        if isinstance(error, Interrupted):
            exit_with(error.exit_code, f"stopped; to resume: {resume_command()}")
        exit_with(1, f"error: {error}")
    except (OSError, SafetensorError) as error:
        # safetensors raises its own error when the disk is full
        exit_with(1, f"error: {error}")
    except KeyboardInterrupt:
        exit_with(130, "stopped")
    seconds = time.perf_counter() - start
    print(f"{script}: {seconds:.0f} s, peak memory {peak_memory() / 1e9:.2f} GB")


def resume_command():
    """The command line of this process without --restart."""
    module = sys.modules["__main__"].__spec__
    script = ["-m", module.name] if module else [sys.argv[0]]
    launcher = ["python"]
    if WORLD_SIZE > 1:
        launcher = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]]
    command = shlex.join([*launcher, *script, *sys.argv[1:]])
    return re.sub(r" --restart( (?!-)\S+|=\S+)?(?= |$)", "", command)


def peak_memory():
    """Peak bytes: of the GPU's memory where this process used one, else resident memory."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    # Linux counts in kilobytes, macOS in bytes
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
