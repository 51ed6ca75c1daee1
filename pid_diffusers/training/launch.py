"""Being a good child of `accelerate launch`."""

import ctypes
import os
import signal
import sys
from pathlib import Path

import diffusers
import psutil
import torch
import transformers


def hide_loading_bars():
    """Has diffusers and transformers load without progress bars; what takes long has one of its own."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def adapt_to_launcher():
    """
    Gives a lone process its cores back, and lets it end in order when its launcher is ended.

    `accelerate launch` sets OMP_NUM_THREADS to 1 unless it is told a number, and does not pass SIGTERM on to the one
    process that it starts. Beside a GPU the cores count, too: a loss is evaluated on them before training. A number of
    threads that the user gave is respected.
    """
    try:
        launcher = psutil.Process().parent()
        arguments, environment = launcher.cmdline(), launcher.environ()
    except (psutil.Error, AttributeError):
        return
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    # `accelerate launch` or `python -m accelerate.commands.launch`, perhaps behind an interpreter
    if not alone or not any(Path(argument).name.split(".")[0] == "accelerate" for argument in arguments[:3]):
        return
    told = "OMP_NUM_THREADS" in environment or any(
        argument.replace("-", "_").startswith("__num_cpu_threads_per_process") for argument in arguments
    )
    if not told:
        torch.set_num_threads(_usable_cores())
    if sys.platform == "linux":
        pr_set_pdeathsig = 1  # have the kernel send a signal when the parent ends
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return psutil.cpu_count(logical=False) or 1
