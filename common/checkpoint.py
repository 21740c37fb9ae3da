"""Training that can be interrupted: signals, and checkpoints from which a run resumes as if it
had never stopped."""

import io
import json
import signal
import threading
import time
from pathlib import Path

import torch

from common.config import Interrupted, TrainingDiverged, UserError, first_line
from common.distributed import RANK, WORLD_SIZE, gather, is_first, largest
from common.log import LOG_INTERVAL
from common.stages import atomic_write, relevant_settings

# What a run depends on besides its settings, in words.
INPUT_LABELS = {
    "chosen_alpha": "α (--strength or --alpha)",
    "collected": "another collection, with digests",
    "pairs": "other pairs, with digest",
    "model_digest": "another model, with digest",
}


class Signals:
    """Within the context SIGINT and SIGTERM are only noted; check() then raises Interrupted
    where the work can stop. A second signal does not wait, unless torchrun has started this
    process: it sends its own after one that has reached us all."""

    def __init__(self):
        # the number of a signal, or 0
        self.received = 0
        self.previous_handlers = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous_handlers[number] = signal.signal(number, self.receive)
        return self

    def receive(self, number, frame):
        if self.received and WORLD_SIZE == 1:
            raise KeyboardInterrupt
        self.received = number

    def check(self):
        if self.received:
            raise Interrupted(self.received)

    def __exit__(self, kind, error, traceback):
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        if kind is ConnectionError:
            # the others have stopped at the same signal
            self.check()


class Checkpoint(Signals):
    """Everything that changes during a training run, saved from time to time and at a signal.

    path: the file, named ".checkpoint-NAME". config: the stage's settings, with steps,
    checkpoint_minutes and restart. inputs: what the run depends on besides its settings; a
    checkpoint of other settings or inputs is refused. state: {name: object with state_dict() and
    load_state_dict()}. The attribute `step` counts the steps already done. A run may resume with
    another number of processes, whose sums round differently.
    """

    def __init__(self, path, config, inputs, **state):
        super().__init__()
        self.path = Path(path)
        self.state = state
        self.settings = relevant_settings({**inputs, **vars(config)})
        self.steps = config.steps
        self.interval = 60 * config.checkpoint_minutes
        self.last_saved = time.monotonic()
        self.step = 0
        if config.restart and is_first():
            self.path.unlink(missing_ok=True)
        if not is_first():
            # other dropout masks than the first process has, for its other examples
            torch.manual_seed(config.seed + RANK)
        if self.path.exists() and not config.restart:
            self.resume()

    def resume(self):
        """Take the state of an interrupted run. UserError if it was one of other settings."""
        try:
            # weights_only: tensors and plain values, no code
            saved = torch.load(self.path, weights_only=True, map_location="cpu")
            previous, current = json.loads(saved["settings"]), json.loads(self.settings)
            names = {**previous, **current}
            differing = [name for name in names if previous.get(name) != current.get(name)]
            if not differing:
                self.load(saved)
        except Exception as error:
            # a damaged file can fail in any way
            raise UserError(
                f"{self.path} cannot be read ({first_line(error)[:80]}): --restart starts again"
            ) from None
        if differing:
            name = differing[0]
            label = INPUT_LABELS.get(name, name)
            raise UserError(
                f"{self.path} is of a run with {label} {str(previous.get(name))[:60]}, not "
                f"{str(current.get(name))[:60]}: give the same to resume, or --restart"
            )
        print(f"resuming after step {self.step}, from {self.path}")

    def load(self, saved):
        """Put the saved state into the objects of this run, and set the random generators."""
        for name, part in self.state.items():
            part.load_state_dict(saved[name])
        # those of another number of processes are of no use
        if len(saved["random states"]) == WORLD_SIZE:
            torch.set_rng_state(saved["random states"][RANK])
        if len(saved["cuda"]) == WORLD_SIZE and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(saved["cuda"][RANK])
        self.step = saved["step"]

    def after_step(self, step, loss):
        """To be called after each step, with its loss (a tensor): saves when it is time, at a
        signal and after the last step. Every tenth step, and before it saves, it raises
        TrainingDiverged if the loss is NaN or infinite (after the last step also if the adapter
        is); more often would make the host wait for the GPU. Interrupted at a signal.

        If it is time to save in one of several processes, or a signal has reached one, all of them
        save at this step. The loss is the sum over the processes, so that they diverge together."""
        last = step == self.steps
        due = last or time.monotonic() - self.last_saved >= self.interval
        # a signal that comes later than this counts at the next step
        due, received = largest(due, self.received)
        due = bool(due or received)
        if due or step % LOG_INTERVAL == 0:
            parameters = self.state["adapter"].parameters()
            if not loss.isfinite():
                self.raise_diverged(step, f"the loss is {loss.item()}")
            if last and not all(p.isfinite().all() for p in parameters):
                self.raise_diverged(step, "NaN or infinite numbers in the adapter")
        if due:
            self.save(step)
        if received:
            raise Interrupted(received)

    def raise_diverged(self, step, what):
        """Remove the checkpoint, from which no run should resume, and raise TrainingDiverged."""
        self.path.unlink(missing_ok=True)
        name = self.path.name.removeprefix(".checkpoint-")
        raise TrainingDiverged(f"{name}: {what} at step {step}: lower --lr")

    def save(self, step):
        """Write the state after a step, with the random states of all processes."""
        # asking a machine's GPUs for their state would start CUDA in a run on the CPU
        cuda = gather(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else []
        random = gather(torch.get_rng_state())
        self.last_saved = time.monotonic()
        if not is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        saved = {"settings": self.settings, "step": step, "random states": random, "cuda": cuda}
        for name, part in self.state.items():
            saved[name] = part.state_dict()
        # torch.save into the file itself would hide a full disk behind another error
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        with atomic_write(self.path) as tmp_path:
            tmp_path.write_bytes(buffer.getbuffer())


def remove_checkpoints(folder, stage):
    """Remove a stage's checkpoints: its output is written, or no run should resume from them."""
    for path in Path(folder).glob(f".checkpoint-{stage}*"):
        path.unlink()
