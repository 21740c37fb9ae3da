"""One of several processes of a stage with what torchrun tells it, without torchrun.

They are forked off a process that has imported torch and transformers, so that a test waits for
these imports once. Nothing of this project is imported here, because common/distributed.py reads
the rank when it is imported.
"""

import multiprocessing
import os
import runpy
import socket
import sys
from contextlib import redirect_stderr, redirect_stdout

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "transformers.models.llama.modeling_llama"])


def run_rank(rank, processes, port, script, arguments, printed):
    """Run a script as one rank; what it prints goes to the file `printed`."""
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }
    sys.argv = [str(script), *arguments]
    with open(printed, "w", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        runpy.run_path(str(script), run_name="__main__")


def run_ranks(processes, script, arguments, folder, timeout=120):
    """Run a script in several processes. Returns what the first one printed; all must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"rank{rank}.txt" for rank in range(processes)]
    ranks = [
        CONTEXT.Process(target=run_rank, args=(rank, processes, port, script, arguments, file))
        for rank, file in enumerate(files)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        process.kill()
    for process, file in zip(ranks, files):
        assert process.exitcode == 0, file.read_text()
    return files[0].read_text()
