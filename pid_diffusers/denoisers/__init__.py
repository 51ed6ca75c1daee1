from .base import Denoiser
from .edm import EDMDenoiser
from .empirical import EmpiricalDenoiser
from .solvers import euler, heun

__all__ = ["Denoiser", "EDMDenoiser", "EmpiricalDenoiser", "euler", "heun"]
