"""Teachers that are told a text, with classifier-free guidance."""

from typing import Self

import torch
from torch import nn

from ..text import PromptEmbeddings
from .base import Denoiser
from .vp import VPDenoiser


class GuidedDenoiser(Denoiser):
    r"""
    A teacher with classifier-free guidance, which is a part of the ODE that is distilled:

        D(x, σ, c) = D(x, σ, ∅) + w (D(x, σ, c) − D(x, σ, ∅)),

    both in one call of the network, or in one without ∅ if w = 1. Mixed is what the network predicts, F, of which D is
    a linear function; where D is clamped, that is done afterwards, as in diffusers' pipelines. With `guidance_rescale`
    = φ the mixture's standard deviation is brought near that of F(x, σ, c):

        F ← φ F std(F_c)/std(F) + (1 − φ) F

    Args:
        denoiser (`VPDenoiser`): D without guidance.
        prompts (`PromptEmbeddings`): what [`~GuidedDenoiser.draw_condition`] draws c from, uniformly.
        unconditional (`dict`): ∅, tensors of one row, with the names of c.
        guidance_scale (`float` or `tuple[float, float]`): w, or the range from which `draw_condition` draws it
            uniformly, as `guidance_scale` of the condition.
        guidance_rescale (`float`, defaults to 0.0): φ, in [0, 1].
        shown_prompts (`PromptEmbeddings`, *optional*): what samples are shown of; default: `prompts`.
        constant (`dict`, *optional*): what the condition of every sample has beside its prompt, tensors of one row,
            such as SDXL's `time_ids`.

    Source: Ho & Salimans 2022, Classifier-Free Diffusion Guidance; Lin et al. 2023, Common Diffusion Noise Schedules
    and Sample Steps are Flawed (φ); Meng et al. 2023, On Distillation of Guided Diffusion Models (a range of w).
    """

    def __init__(
        self,
        denoiser: VPDenoiser,
        prompts: PromptEmbeddings,
        unconditional: dict[str, torch.Tensor],
        guidance_scale: float | tuple[float, float],
        guidance_rescale: float = 0.0,
        shown_prompts: PromptEmbeddings | None = None,
        constant: dict[str, torch.Tensor] | None = None,
    ):
        super().__init__()
        self.denoiser = denoiser
        self.prompts, self.shown_prompts = prompts, shown_prompts or prompts
        self.guidance_scale, self.guidance_rescale = guidance_scale, guidance_rescale
        self.constant = constant or {}
        self.unconditional = {**unconditional, **self.constant}
        self.loss_weighting, self.predicts = denoiser.loss_weighting, denoiser.predicts
        self.__dict__["vae"] = denoiser.vae
        self.guidance_range = guidance_scale if isinstance(guidance_scale, tuple) else None
        self.network_calls = 1 if guidance_scale == 1 else 2
        guidance = {"guidance_range": list(self.guidance_range)} if self.guidance_range else {}
        self.trajectory_config = denoiser.trajectory_config | (guidance or {"guidance_scale": guidance_scale})

    def around(self, denoiser: VPDenoiser) -> "GuidedDenoiser":
        """The same guidance of another denoiser."""
        settings = (self.guidance_scale, self.guidance_rescale, self.shown_prompts, self.constant)
        return GuidedDenoiser(denoiser, self.prompts, self.unconditional, *settings)

    @property
    def unet(self) -> nn.Module:
        """The network, which is the denoiser's."""
        return self.denoiser.unet

    def forward(
        self,
        x: torch.Tensor,
        sigma: float | torch.Tensor,
        guidance_scale: torch.Tensor | None = None,
        **condition: torch.Tensor,
    ) -> torch.Tensor:
        """
        D(x, σ, c) with guidance, `(B, C, H, W)`.

        Args:
            x (`torch.Tensor` of shape `(B, C, H, W)`): the noisy samples.
            sigma (`float` or `torch.Tensor` of shape `(B,)`): their noise levels.
            guidance_scale (`torch.Tensor` of shape `(B,)`, *optional*): w, needed where it is a range.
            **condition: c, as [`network_arguments`] names it.
        """
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        if isinstance(scale, tuple):
            raise ValueError(f"guidance_scale is missing; pass a tensor of numbers from {scale[0]} to {scale[1]}.")
        if not torch.is_tensor(scale) and scale == 1:
            return self.denoiser(x, sigma, **condition)
        scale = torch.as_tensor(scale, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        both = {
            name: torch.cat([self.unconditional[name].to(value).expand_as(value), value])
            for name, value in condition.items()
        }
        sigma = torch.as_tensor(sigma, device=x.device).expand(x.shape[0])
        without, conditional = self.denoiser.predict(x.repeat(2, 1, 1, 1), sigma.repeat(2), **both).chunk(2)
        prediction = without + scale.to(without.dtype) * (conditional - without)
        if self.guidance_rescale:
            ratio = conditional.std(dim=(1, 2, 3), keepdim=True) / prediction.std(dim=(1, 2, 3), keepdim=True)
            prediction = prediction * (self.guidance_rescale * ratio + 1 - self.guidance_rescale)
        return self.denoiser.denoise(prediction, x, sigma)

    def draw_condition(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        indices = torch.randint(len(self.prompts), (batch_size,), generator=generator)
        condition = self._condition(self.prompts, indices)
        if self.guidance_range:
            low, high = self.guidance_range
            condition["guidance_scale"] = low + (high - low) * torch.rand(batch_size, generator=generator)
        return condition

    def shown_condition(self, num_samples: int, class_labels: list[int] | None = None) -> dict[str, torch.Tensor]:
        condition = self._condition(self.shown_prompts, torch.arange(num_samples) % len(self.shown_prompts))
        if self.guidance_range:
            condition["guidance_scale"] = torch.full((num_samples,), sum(self.guidance_range) / 2)
        return condition

    def _condition(self, prompts: PromptEmbeddings, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        constant = {name: value.expand(len(indices), *value.shape[1:]) for name, value in self.constant.items()}
        return {**prompts.batch(indices), **constant}

    def shown_prompt(self, index: int) -> str:
        """The prompt of sample `index` of [`~GuidedDenoiser.shown_condition`]."""
        return self.shown_prompts.prompts[index % len(self.shown_prompts)]

    def describe(self) -> str:
        scale = "{:g} to {:g}".format(*self.guidance_range) if self.guidance_range else f"{self.guidance_scale:g}"
        rescale = f", rescaled by {self.guidance_rescale:g}" if self.guidance_rescale else ""
        return f"{super().describe()}, guidance {scale}{rescale}, {len(self.prompts):,} prompts"

    def __deepcopy__(self, memo: dict) -> Self:
        memo |= {id(shared): shared for shared in (self.prompts, self.shown_prompts)}
        return super().__deepcopy__(memo)
