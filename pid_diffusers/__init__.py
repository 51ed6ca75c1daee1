"""Physics Informed Distillation for diffusers: one-step students of diffusion models, with their whole trajectory."""

import sys

import diffusers

from .denoisers import Denoiser, EDMDenoiser, EmpiricalDenoiser
from .errors import InputError
from .losses import PIDLoss
from .pipelines import OneStepPIDPipeline
from .schedulers import PIDScheduler
from .trajectory import TrajectoryModel

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "EmpiricalDenoiser",
    "InputError",
    "OneStepPIDPipeline",
    "PIDLoss",
    "PIDScheduler",
    "TrajectoryModel",
]

# DiffusionPipeline.from_pretrained looks a pipeline's class up in `diffusers`, and a component's library among the
# modules of `diffusers.pipelines`. The scheduler's public module is what `model_index.json` records as its library.
PIDScheduler.__module__ = __name__
diffusers.OneStepPIDPipeline = OneStepPIDPipeline
diffusers.pipelines.pid_diffusers = sys.modules[__name__]
