"""Variance-preserving diffusion models with discrete steps, such as DDPM, as denoisers."""

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from ..conditioning import network_arguments
from ..errors import InputError
from ..schedulers import PIDScheduler
from .base import Denoiser, get_network

# the student's head for each kind of output
HEADS = {"epsilon": "residual", "v_prediction": "v_prediction", "sample": "sample"}


class VPDenoiser(Denoiser):
    r"""
    A network trained on √ᾱ_k x₀ + √(1−ᾱ_k) n, k = 0 … K−1, as a denoiser. With σ = √((1−ᾱ)/ᾱ) it sees x/√(1+σ²) and
    the real-valued index of σ, interpolated linearly in ln σ. By what its output F predicts,

        `"epsilon"`: D(x, σ) = x − σ F;   `"v_prediction"`: D = x/(1+σ²) − σ/√(1+σ²) F;   `"sample"`: D = F,

    clamped if the scheduler clamps. The arithmetic is done in float32 or better, whatever type the network has; the
    result has x's type. Of an output with a learned variance the first half of the channels counts.

    Args:
        unet (`nn.Module`): called as `unet(sample, timestep, **condition, return_dict=False)[0]`.
        scheduler (`SchedulerMixin`): one of `scheduler_classes`, whose configuration says what the network is: its β,
            `prediction_type`, and `clip_sample` with `clip_sample_range` where it has them. How it would step does not
            matter.

    Raises:
        InputError: if the configuration is none of a network with an ODE that can be distilled.

    Source: Ho et al. 2020 (DDPM); Salimans & Ho 2022 (v); Karras et al. 2022, table 1 (the change of variables).
    """

    scheduler_classes = (
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "DPMSolverSDEScheduler",
        "DEISMultistepScheduler",
        "UniPCMultistepScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
    )

    def __init__(self, unet: nn.Module, scheduler: SchedulerMixin):
        super().__init__()
        config, name = scheduler.config, type(scheduler).__name__
        if config.get("rescale_betas_zero_snr"):
            raise InputError(
                f"teacher has a {name} with rescale_betas_zero_snr, whose highest noise level is infinite: there is no"
                " start z of a finite size; pass a teacher without it."
            )
        if config.prediction_type not in HEADS or config.get("use_flow_sigmas"):
            raise InputError(
                f"teacher has a {name} with prediction_type {config.prediction_type!r}"
                f"{' and use_flow_sigmas' if config.get('use_flow_sigmas') else ''}, which is not of a"
                f" variance-preserving diffusion; it must be one of {', '.join(HEADS)}."
            )
        if config.get("timestep_type", "discrete") != "discrete":
            raise InputError(
                f"teacher has a {name} with timestep_type {config.timestep_type!r}, whose network is told ln(σ)/4, no"
                " step; give it an EDMEulerScheduler, if it has EDM's preconditioning."
            )
        if config.get("thresholding"):
            raise InputError(
                f"teacher has a {name} with thresholding, by which D would depend on quantiles of each sample; set"
                " thresholding to false in its scheduler_config.json."
            )
        betas = config.get("trained_betas")
        alphas_cumprod = scheduler.alphas_cumprod.double().cpu()
        sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
        self.unet = unet
        # D multiplies the error of a network that predicts noise by σ
        self.loss_weighting = "inverse_variance" if config.prediction_type == "epsilon" else "uniform"
        self.prediction_type = self.predicts = config.prediction_type
        self.clip_sample_range = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
        self.trajectory_config = {
            "sigma_min": sigmas[0].item(),
            "sigma_max": sigmas[-1].item(),
            "sigma_data": 1.0,
            "prediction_type": HEADS[config.prediction_type],
            "timestep_type": "discrete",
            "beta_schedule": config.beta_schedule if betas is None else None,
            "beta_start": config.beta_start,
            "beta_end": config.beta_end,
            "num_beta_steps": len(sigmas),
            "trained_betas": None if betas is None else [float(beta) for beta in betas],
        }
        try:
            self.noise_levels = PIDScheduler(**self.trajectory_config)
            same = torch.allclose(self.noise_levels.discrete_sigmas, sigmas, rtol=1e-5)
        except ValueError as error:
            raise InputError(f"teacher has a {name} of which no student can be told the time: {error}") from error
        if not same:
            raise InputError(
                f"teacher has a {name} whose noise levels are not those of its beta_schedule,"
                f" {config.beta_schedule!r}; pass a teacher with a schedule that diffusers has, or trained_betas."
            )

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        return self.denoise(self.predict(x, sigma, **condition), x, sigma)

    def predict(self, x: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        """F, what the network predicts at √ᾱ x and the index of σ, of x's shape in float32 or better."""
        sigma = PIDScheduler.sigma_tensor(sigma, x).expand(x.shape[0])
        timestep = self.noise_levels.sigma_to_timestep(sigma)
        sample = (self._c_in(x, sigma) * x).to(next(self.unet.parameters()).dtype)
        output = self.unet(sample, timestep, **network_arguments(self.unet, condition), return_dict=False)[0]
        return PIDScheduler.without_variance(output, x).to(torch.promote_types(x.dtype, torch.float32))

    def denoise(self, prediction: torch.Tensor, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """D(x, σ) from F, from [`~VPDenoiser.predict`] or a mixture of such."""
        sigma = PIDScheduler.sigma_tensor(sigma, x).expand(x.shape[0])
        c_in = self._c_in(x, sigma)
        sigma = sigma.reshape(c_in.shape)
        if self.prediction_type == "epsilon":
            denoised = x - sigma * prediction
        elif self.prediction_type == "v_prediction":
            denoised = c_in**2 * x - sigma * c_in * prediction
        else:
            denoised = prediction
        if self.clip_sample_range is not None:
            denoised = denoised.clamp(-self.clip_sample_range, self.clip_sample_range)
        return denoised.to(x.dtype)

    @staticmethod
    def _c_in(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + sigma.reshape(-1, *[1] * (x.ndim - 1)) ** 2).sqrt()

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> "VPDenoiser":
        return cls(get_network(pipeline), pipeline.scheduler)
