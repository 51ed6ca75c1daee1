"""Physics Informed Distillation for diffusers: one-step students of diffusion models, with their whole trajectory."""

import sys

from .denoisers import Denoiser, EDMDenoiser, EmpiricalDenoiser, VEDenoiser, VPDenoiser
from .errors import InputError
from .loading import register
from .losses import PIDLoss
from .models import ADMUNet2DModel, EDMUNet2DModel
from .pipelines import OneStepPIDPipeline, OneStepPIDTextToImagePipeline
from .schedulers import PIDScheduler
from .trajectory import TrajectoryModel

__version__ = "0.1.0"

__all__ = [
    "ADMUNet2DModel",
    "Denoiser",
    "EDMDenoiser",
    "EDMUNet2DModel",
    "EmpiricalDenoiser",
    "InputError",
    "OneStepPIDPipeline",
    "OneStepPIDTextToImagePipeline",
    "PIDLoss",
    "PIDScheduler",
    "TrajectoryModel",
    "VEDenoiser",
    "VPDenoiser",
]

register(sys.modules[__name__], [OneStepPIDPipeline, OneStepPIDTextToImagePipeline])
