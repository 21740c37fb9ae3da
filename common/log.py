"""What a training run reports while it runs: a file of JSON lines, and a tracker on request."""

import importlib
import json
import time
from contextlib import contextmanager

from common.config import UserError, first_line
from common.distributed import is_first
from common.stages import versions
from common.training import speed_summary

# A line of the log is written, and the loss checked, every so many steps.
LOG_INTERVAL = 10


@contextmanager
def open_log(folder, name, config):
    """Yield a function that writes a dict of numbers as a line of JSON to FOLDER/NAME.log, and
    reports it to the tracker of --report-to.

    The first line of a log is the versions. A run that resumes from a checkpoint appends to its
    log, and one that is refused leaves it as it is. Of several processes the first one alone writes
    and reports.
    """
    if not is_first():
        yield lambda line: None
        return
    folder.mkdir(parents=True, exist_ok=True)
    resumes = not config.restart and any(folder.glob(f".checkpoint-{name}*"))
    with (
        tracker(config.report_to, f"{folder}/{name}", vars(config)) as report,
        open(folder / f"{name}.log", "a" if resumes else "w", 1, encoding="utf-8") as file,
    ):
        # with the first line, which a run that is refused never writes
        header = json.dumps(versions()) + "\n"

        def write_line(line):
            nonlocal header
            file.write(f"{header}{json.dumps(line)}\n")
            header = ""
            report(line)

        yield write_line


def check_tracker(package):
    """UserError where the package that --report-to names is not installed; None is fine."""
    try:
        if package:
            importlib.import_module(package)
    except ImportError:
        raise UserError(f"--report-to {package}: run `pip install {package}` first") from None


@contextmanager
def tracker(package, run_name, settings):
    """Yield a function that reports a line of the log to trackio or wandb, which answer to the same
    three calls; package None: one that does nothing.

    UserError where the package is missing or does not begin. If it fails later, the run goes on
    without it.
    """
    if package is None:
        yield lambda line: None
        return
    check_tracker(package)
    module = importlib.import_module(package)
    try:
        module.init(project="rahf", name=run_name, config=settings)
    except Exception as error:
        raise UserError(f"--report-to {package}: cannot begin: {first_line(error)}") from None
    failed = False

    def report(line):
        nonlocal failed
        if failed:
            return
        try:
            module.log(line, step=line["step"])
        except Exception as error:
            failed = True
            print(f"WARNING: no longer reported to {package}: {first_line(error)}")

    try:
        yield report
    finally:
        # the run has ended, and its log is written: whatever happens here must not cost its result
        try:
            module.finish()
        except (Exception, KeyboardInterrupt) as error:
            print(f"WARNING: {package} has not finished: {first_line(error)}")


class TrainingLog:
    """The log of a training run: a line of JSON every LOG_INTERVAL steps, and how fast the run is.

    write_line: see open_log. bar: see progress_bar; it shows the loss. flops_per_token: see
    speed_summary.
    """

    def __init__(self, write_line, bar, flops_per_token):
        self.write_line = write_line
        self.bar = bar
        self.flops_per_token = flops_per_token
        self.tokens = self.logged_tokens = 0
        self.start = self.logged_at = time.perf_counter()

    def after_step(self, step, tokens, loss, **values):
        """To be called after each step. tokens: of its inputs, without padding; loss, values:
        numbers or scalar tensors, which are looked at for a line of the log only. In a run that
        resumes num_tokens and seconds begin at 0 again."""
        self.tokens += tokens
        if step % LOG_INTERVAL and step != self.bar.total:
            return
        # on a GPU this waits for the step to end
        line = {name: float(value) for name, value in {"loss": loss, **values}.items()}
        now = time.perf_counter()
        rate = (self.tokens - self.logged_tokens) / (now - self.logged_at)
        self.bar.set_postfix(loss=f"{line['loss']:.3f}")
        line = {"step": step, **line, "num_tokens": self.tokens}
        line |= {"tokens_per_second": round(rate, 1), "seconds": round(now - self.start, 2)}
        self.write_line(line)
        self.logged_tokens, self.logged_at = self.tokens, now

    def summary(self, device):
        """How fast the run was, in words."""
        return speed_summary(self.tokens, self.logged_at - self.start, self.flops_per_token, device)
