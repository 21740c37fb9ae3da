"""Runs that are cut off: signals, and checkpoints from which a training goes on as if it had never stopped."""
import io
import json
import signal
import threading
import time
from pathlib import Path

import torch

from files import Stopped, UserError, relevant, written_whole


class Signals:
    """Within the context, SIGINT and SIGTERM are noted, and check() raises Stopped when the work is at a place to stop. A second one does not wait."""
    came, before = None, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.came:
            raise KeyboardInterrupt
        self.came = number

    def check(self):
        if self.came:
            raise Stopped(self.came)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Checkpoint(Signals):
    """All that changes in a training run, written now and then, and at SIGINT or SIGTERM; the run that goes on ends as one never stopped.

    settings: what the run depends on, to be the same when it goes on; parts: {name: object with a state_dict}, all that a step
    changes. `restart` forgets an earlier run's. remove() when what it was for is written.
    """

    def __init__(self, path, settings, config, **parts):
        self.path, self.parts, self.every, self.last, self.step = Path(path), parts, 60 * config.checkpoint_minutes, time.monotonic(), 0
        self.settings = relevant(settings)
        if config.restart:
            self.remove()
        if not self.path.exists():
            return
        try:
            saved = torch.load(self.path, weights_only=True, map_location="cpu")          # tensors and plain values only
            before, now = json.loads(saved["settings"]), json.loads(self.settings)
            differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if not differing:
                for name, part in parts.items():
                    part.load_state_dict(saved[name])
                torch.set_rng_state(saved["random"])
                if saved["cuda"] and len(saved["cuda"]) == torch.cuda.device_count():
                    torch.cuda.set_rng_state_all(saved["cuda"])
        except Exception as error:            # whatever a damaged file leads to
            raise UserError(f"{self.path} cannot be read ({(str(error).strip() or type(error).__name__).splitlines()[0][:80]}): --restart True begins anew") from None
        if differing:
            raise UserError(f"{self.path} is of a run with {differing[0]} {str(before.get(differing[0]))[:60]}, not {str(now.get(differing[0]))[:60]}: "
                            "give the same to go on, or --restart True to begin anew")
        self.step = saved["step"]
        print(f"goes on after step {self.step}, from {self.path}")

    def after(self, step):
        """To be called after each step: saves when it is time, and saves and stops when a signal has come."""
        if self.came or time.monotonic() - self.last >= self.every:
            self.save(step)
        self.check()

    def save(self, step):
        self.path.parent.mkdir(parents=True, exist_ok=True)
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        torch.save({"settings": self.settings, "step": step, "random": torch.get_rng_state(), "cuda": cuda,
                    **{name: part.state_dict() for name, part in self.parts.items()}}, whole := io.BytesIO())
        with written_whole(self.path) as aside:
            aside.write_bytes(whole.getbuffer())          # torch.save itself hides a full disk behind other errors
        self.last = time.monotonic()

    def remove(self):
        self.path.unlink(missing_ok=True)
