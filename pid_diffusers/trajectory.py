"""The student: a network and a PIDScheduler make the trajectory function x_θ(z, t)."""

import torch
from torch import nn

from .schedulers import PIDScheduler


class TrajectoryModel(nn.Module):
    """
    The trajectory function x_θ(z, σ) = (σ/T) z + ((T−σ)/T) X_θ(z, σ) of a network (PID, eq. 7).

    Args:
        unet (`nn.Module`): F_θ, called as `unet(sample, timestep, **condition, return_dict=False)[0]`, such as a
            `UNet2DModel`.
        scheduler (`PIDScheduler`): the grid, the head, c_in(T) and c_noise.
    """

    def __init__(self, unet: nn.Module, scheduler: PIDScheduler):
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler

    def network_output(self, z: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        """
        F_θ(c_in(T) z, c_noise(σ)), in z's dtype.

        Args:
            z (`torch.Tensor` of shape `(B, C, H, W)`): starts of standard deviation T.
            sigma (`float` or `torch.Tensor` of shape `(B,)`): noise levels in (0, T].
            **condition: what the network is conditioned on, such as `class_labels` of shape `(B,)`.
        """
        sigma = self.scheduler.sigma_tensor(sigma, z)
        timestep = self.scheduler.sigma_to_timestep(sigma).expand(z.shape[0])
        sample = self.scheduler.scale_model_input(z, timestep).to(next(self.unet.parameters()).dtype)
        return self.unet(sample, timestep, **condition, return_dict=False)[0].to(z.dtype)

    def forward(self, z: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        """x_θ(z, σ) of shape `(B, C, H, W)`; arguments as in [`~TrajectoryModel.network_output`]."""
        return self.scheduler.trajectory(self.network_output(z, sigma, **condition), z, sigma)[0]


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast and for half-precision input."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample.float())


def keep_output_in_float32(network: nn.Module, body_dtype: torch.dtype | None = None) -> nn.Module:
    """
    Has the last layer of a network (`conv_out`, as in every UNet of diffusers) compute in float32, in place.

    Args:
        network (`nn.Module`): the network; returned, too.
        body_dtype (`torch.dtype`, *optional*): what to cast all other weights to.

    The loss multiplies F(t) − F(s) by up to t/(t−s), 46 at N = 250: rounding F to bfloat16 alone costs 3e-2. The
    names of the weights stay as they are.
    """
    output = network.conv_out
    if type(output) is nn.Conv2d:
        output.__class__ = Float32Conv2d
    for layer in network.children():
        layer.to(torch.float32 if layer is output else body_dtype)
    return network
