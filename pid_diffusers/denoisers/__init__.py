from .base import Denoiser
from .edm import EDMDenoiser
from .empirical import EmpiricalDenoiser
from .guided import GuidedDenoiser
from .solvers import euler, heun
from .ve import VEDenoiser
from .vp import VPDenoiser

__all__ = [
    "Denoiser",
    "EDMDenoiser",
    "EmpiricalDenoiser",
    "GuidedDenoiser",
    "VEDenoiser",
    "VPDenoiser",
    "euler",
    "heun",
]
