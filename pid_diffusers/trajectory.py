"""The student: a network and a PIDScheduler make the trajectory function x_θ(z, t)."""

import torch
from torch import nn

from .conditioning import network_arguments
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
        F_θ of the head at c_in(T) z and c_noise(σ), in z's dtype.

        Args:
            z (`torch.Tensor` of shape `(B, C, H, W)`): starts of standard deviation T.
            sigma (`float` or `torch.Tensor` of shape `(B,)`): noise levels in (0, T].
            **condition: what the network is conditioned on, such as `class_labels` of shape `(B,)`, with the names and
                shapes of [`network_arguments`].
        """
        sigma = self.scheduler.sigma_tensor(sigma, z)
        timestep = self.scheduler.sigma_to_timestep(sigma).expand(z.shape[0])
        sample = self.scheduler.scale_model_input(z, timestep).to(next(self.unet.parameters()).dtype)
        arguments = network_arguments(self.unet, condition)
        output = self.unet(sample, timestep, **arguments, return_dict=False)[0]
        return self.scheduler.network_output(output.to(z.dtype), z, sigma)

    def forward(self, z: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        """x_θ(z, σ) of shape `(B, C, H, W)`; arguments as in [`~TrajectoryModel.network_output`]."""
        return self.scheduler.trajectory(self.network_output(z, sigma, **condition), z, sigma)[0]
