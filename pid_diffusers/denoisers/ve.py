"""Variance-exploding score networks (NCSN++), as denoisers."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..schedulers import PIDScheduler
from .base import Denoiser, get_network


class VEDenoiser(Denoiser):
    r"""
    A network F that is the score of data with noise of level σ, ∇ log p(x; σ), and is told σ itself, as a denoiser:

        D(x, σ) = x + σ² F(x, σ)

    Its data lie in [0, 1], as those of diffusers' `ScoreSdeVePipeline`; `decode` gives images in [−1, 1]. The
    arithmetic is done in float32 or better, whatever type the network has; the result has x's type.

    Args:
        unet (`nn.Module`): called as `unet(sample, timestep, **condition, return_dict=False)[0]`, such as a
            `UNet2DModel` with `time_embedding_type="fourier"`.
        sigma_min (`float`, defaults to 0.01), sigma_max (`float`, defaults to 1348.0): the noise levels that it was
            trained for.

    Source: Song et al. 2021, Score-Based Generative Modeling through Stochastic Differential Equations.
    """

    scheduler_classes = ("ScoreSdeVeScheduler",)
    predicts = "the score"
    loss_weighting = "inverse_variance"  # D multiplies the error of σ F by σ

    def __init__(self, unet: nn.Module, sigma_min: float = 0.01, sigma_max: float = 1348.0):
        super().__init__()
        self.unet = unet
        self.trajectory_config = {
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "sigma_data": 0.5,
            "prediction_type": "score",
            "timestep_type": "sigma",
            "sample_min": 0.0,
        }

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        sigma = PIDScheduler.sigma_tensor(sigma, x).expand(x.shape[0])
        score = self.unet(x.to(next(self.unet.parameters()).dtype), sigma, **condition, return_dict=False)[0]
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        return (x.to(dtype) + sigma**2 * score.to(dtype)).to(x.dtype)

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> "VEDenoiser":
        config = pipeline.scheduler.config
        return cls(get_network(pipeline), config.sigma_min, config.sigma_max)
