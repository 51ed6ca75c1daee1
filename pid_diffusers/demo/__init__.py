"""A page that shows what a distilled student can do, and a Hugging Face Space made from it."""

from .model import Comparison, DemoModel, Picture, Sample
from .serve import launch
from .space import write_space

__all__ = ["Comparison", "DemoModel", "Picture", "Sample", "launch", "write_space"]
