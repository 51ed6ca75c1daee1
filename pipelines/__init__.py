from .pipeline_one_step_pid import OneStepPIDPipeline
from .pipeline_one_step_pid_text_to_image import OneStepPIDTextToImagePipeline

__all__ = ["OneStepPIDPipeline", "OneStepPIDTextToImagePipeline"]
