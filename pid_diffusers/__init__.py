"""Physics Informed Distillation for diffusers: one-step students of diffusion models, with their whole trajectory."""

import sys

from .denoisers import Denoiser, EDMDenoiser, EmpiricalDenoiser
from .errors import InputError
from .loading import register
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

register(sys.modules[__name__], [OneStepPIDPipeline])
