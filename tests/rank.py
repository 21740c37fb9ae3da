"""Several processes of a stage with what torchrun tells them, without torchrun.

They are forked off a server that has imported torch and transformers, so that the tests wait for
these imports once. Nothing of this project is imported here, because common/distributed.py reads
the rank when it is imported. The processes have the environment that the server began with.
"""

import multiprocessing
import os
import runpy
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])


def run_rank(rank, processes, port, script, arguments, stdout, stderr):
    """Run a script as one rank; what it prints goes to two files."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
        # the parent has the store, as torchrun has
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    # a line at a time, so that a killed process leaves its lines
    with (
        stdout.open("w", 1) as out,
        stderr.open("w", 1) as err,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Exception:
            traceback.print_exc()
            sys.exit(1)


def run_ranks(processes, script, arguments, folder, timeout=120):
    """Run a script in several processes, which must all end well in time (seconds). Returns what
    each printed on standard output; files of it stay in the folder."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stdouts = [folder / f"stdout{rank}" for rank in range(processes)]
    stderrs = [folder / f"stderr{rank}" for rank in range(processes)]
    ranks = []
    for rank, (stdout, stderr) in enumerate(zip(stdouts, stderrs)):
        told = (rank, processes, store.port, script, arguments, stdout, stderr)
        ranks.append(CONTEXT.Process(target=run_rank, args=told, daemon=True))
    end = time.monotonic() + timeout
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(max(0, end - time.monotonic()))
    finally:
        for process in ranks:
            if process.pid:
                process.kill()
                process.join()
    errors = "\n".join(path.read_text() for path in stderrs if path.exists())
    assert all(process.exitcode == 0 for process in ranks), errors
    return [path.read_text() for path in stdouts]
