"""Other people's checkpoints as diffusers pipelines."""

from .convert import ConversionReport, convert

__all__ = ["ConversionReport", "convert"]
