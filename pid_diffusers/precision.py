"""Where more precision is needed than the body of a network has."""

import torch
from diffusers import DiTTransformer2DModel
from torch import nn


def widest_float(device: torch.device | str) -> torch.dtype:
    """float64, or float32 on a device that has nothing wider (Apple's)."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


class Float32Conv2d(nn.Conv2d):
    """A convolution that computes in float32 under autocast and for half-precision input."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample.float())


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 under autocast and for half-precision input."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        with torch.autocast(sample.device.type, enabled=False):
            return super().forward(sample.float())


def keep_output_in_float32(network: nn.Module, body_dtype: torch.dtype | None = None) -> nn.Module:
    """
    Has the last layer of a network compute in float32, in place: `conv_out`, as in every UNet of diffusers, or a DiT's
    `proj_out_2`.

    Args:
        network (`nn.Module`): the network; returned, too.
        body_dtype (`torch.dtype`, *optional*): what to cast all other weights to.

    The loss multiplies F(t) − F(s) by up to t/(t−s), 46 at N = 250: rounding F to bfloat16 alone costs 3e-2. The
    names of the weights stay as they are.
    """
    output = network.proj_out_2 if isinstance(network, DiTTransformer2DModel) else network.conv_out
    output.__class__ = {nn.Conv2d: Float32Conv2d, nn.Linear: Float32Linear}.get(type(output), type(output))
    for layer in network.children():
        layer.to(torch.float32 if layer is output else body_dtype)
    return network
