"""Other people's checkpoints as diffusers pipelines."""

from .convert import ConversionReport, convert
from .teacher import open_teacher

__all__ = ["ConversionReport", "convert", "open_teacher"]
