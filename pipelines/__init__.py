from .pipeline_one_step_pid import OneStepPIDPipeline

__all__ = ["OneStepPIDPipeline"]
