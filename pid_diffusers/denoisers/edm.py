"""EDM preconditioning (Karras et al. 2022, table 1)."""

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..errors import InputError
from ..schedulers import PIDScheduler
from .base import Denoiser, get_network


class EDMDenoiser(Denoiser):
    r"""
    A network with EDM preconditioning as a denoiser:

        D(x, σ) = c_skip(σ) x + c_out(σ) F(c_in(σ) x, c_noise(σ))
        c_skip = σ_d²/(σ²+σ_d²),  c_out = ±σσ_d/√(σ²+σ_d²),  c_in = 1/√(σ²+σ_d²),  c_noise = ln(σ)/4 or 250 ln(σ)

    The arithmetic is done in float32 or better, whatever type the network has, that of the coefficients in σ's type;
    the result has x's type.

    Args:
        unet (`nn.Module`): F, called as `unet(sample, timestep, **condition, return_dict=False)[0]`.
        sigma_data (`float`, defaults to 0.5): σ_d.
        timestep_type (`str`, defaults to `"edm"`): `"edm"` for c_noise = ln(σ)/4, `"edm_scaled"` for 250 ln(σ).
        sigma_min, sigma_max (`float`): the range of noise levels that the network was trained for.
        prediction_type (`str`, defaults to `"edm"`): `"v_prediction"` turns the sign of c_out.
        clip_denoised (`bool`, defaults to `False`): clamps D to [−1, 1]. EDM's own sampler does not; OpenAI's does,
            for every network of the consistency models, and so does the scheduler that describes them.

    Source: Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models.
    """

    scheduler_classes = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler")

    def __init__(
        self,
        unet: nn.Module,
        sigma_data: float = 0.5,
        timestep_type: str = "edm",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        prediction_type: str = "edm",
        clip_denoised: bool = False,
    ):
        super().__init__()
        if timestep_type not in ("edm", "edm_scaled"):
            raise ValueError(f"timestep_type is {timestep_type!r}; choose edm or edm_scaled.")
        if prediction_type not in ("edm", "v_prediction"):
            raise ValueError(f"prediction_type is {prediction_type!r}; choose edm or v_prediction.")
        self.unet = unet
        self.trajectory_config = {
            "sigma_min": sigma_min,
            "sigma_max": sigma_max,
            "sigma_data": sigma_data,
            "prediction_type": prediction_type,
            "timestep_type": timestep_type,
        }
        self.predicts = "v_prediction" if prediction_type == "v_prediction" else "EDM's mixture"
        self.sigma_data = sigma_data
        self.clip_denoised = clip_denoised
        self.sign = -1.0 if prediction_type == "v_prediction" else 1.0
        self.noise_levels = PIDScheduler(**self.trajectory_config)

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        sigma = PIDScheduler.sigma_tensor(sigma, x).expand(x.shape[0])
        timestep = self.noise_levels.sigma_to_timestep(sigma)
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        variance = sigma**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / variance
        c_out = self.sign * sigma * self.sigma_data / variance.sqrt()
        c_in = 1 / variance.sqrt()
        sample = (c_in * x).to(next(self.unet.parameters()).dtype)
        output = self.unet(sample, timestep, **condition, return_dict=False)[0]
        denoised = c_skip * x.to(dtype) + c_out * output.to(dtype)
        return (denoised.clamp(-1, 1) if self.clip_denoised else denoised).to(x.dtype)

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> "EDMDenoiser":
        config = pipeline.scheduler.config
        levels = {name: config[name] for name in ("sigma_data", "sigma_min", "sigma_max")}
        if "prediction_type" not in config:  # the consistency models', whose networks have EDM's form
            clip = config.clip_denoised
            return cls(get_network(pipeline), timestep_type="edm_scaled", clip_denoised=clip, **levels)
        # diffusers' EDM schedulers call EDM's own output "epsilon"
        kinds = {"epsilon": "edm", "v_prediction": "v_prediction"}
        if config.prediction_type not in kinds:
            raise InputError(
                f"teacher has a scheduler with prediction_type {config.prediction_type!r}, which no EDM network"
                " has; it must be epsilon (EDM's own) or v_prediction."
            )
        return cls(get_network(pipeline), prediction_type=kinds[config.prediction_type], **levels)
