"""Being a good child of `accelerate launch`."""

import ctypes
import os
import signal
from pathlib import Path

import torch


def adapt_to_launcher():
    """
    Gives a lone CPU process its cores back, and lets it end in order when its launcher is ended.

    `accelerate launch` sets OMP_NUM_THREADS to 1 on a machine without a GPU unless it is told a number, and does not
    pass SIGTERM on to the one process that it starts.
    """
    launcher = _launcher()
    if launcher is None:
        return
    arguments, environment = launcher
    told = "OMP_NUM_THREADS" in environment or any("num_cpu_threads_per_process" in a for a in arguments)
    told = told or any("num-cpu-threads-per-process" in a for a in arguments)
    if not told and not torch.cuda.is_available():
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    except (OSError, AttributeError):
        pass


def _launcher() -> tuple[list[str], set[str]] | None:
    """Arguments and names of environment variables of the parent process, if it is `accelerate launch` on Linux."""
    process = Path(f"/proc/{os.getppid()}")
    try:
        arguments = process.joinpath("cmdline").read_text(errors="replace").split("\0")
        environment = process.joinpath("environ").read_text(errors="replace").split("\0")
    except OSError:
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or not any("accelerate" in Path(a).name for a in arguments[:2]):
        return None
    return arguments, {variable.partition("=")[0] for variable in environment}
