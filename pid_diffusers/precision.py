"""Where more precision is needed than the body of a network has."""

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import GaussianFourierProjection
from torch import nn

from .models.unet_edm import EDMUpBlock2D


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
    `proj_out_2`; and, where every resolution adds a part to the output, the layers that make these parts.

    Args:
        network (`nn.Module`): the network; returned, too.
        body_dtype (`torch.dtype`, *optional*): what to cast all other weights to.

    The loss multiplies F(t) − F(s) by up to t/(t−s), 46 at N = 250: rounding F to bfloat16 alone costs 3e-2. The
    frequencies of a Fourier time embedding are not cast either: multiplied by 2π ln(σ) they are phases of hundreds of
    radians, of which half precision keeps no fraction. The names of the weights stay as they are.
    """
    output = network.proj_out_2 if isinstance(network, DiTTransformer2DModel) else network.conv_out
    kept = [output]
    for layer in network.modules():
        if isinstance(layer, EDMUpBlock2D) and layer.image_conv is not None:
            kept.append(layer.image_conv)
    kept = [getattr(layer, "base_layer", layer) for layer in kept]  # of one with adapters
    for layer in kept:
        layer.__class__ = {nn.Conv2d: Float32Conv2d, nn.Linear: Float32Linear}.get(type(layer), type(layer))
    kept += [layer for layer in network.modules() if isinstance(layer, GaussianFourierProjection)]
    weights = [layer.state_dict() for layer in kept]
    for layer in network.children():
        layer.to(body_dtype)
    for layer, unrounded in zip(kept, weights, strict=True):
        layer.float().load_state_dict(unrounded)
    return network


def cast_frozen(network: nn.Module, dtype: torch.dtype):
    """Casts in place what is not trained to `dtype`, but for layers that compute in float32."""
    exact = (Float32Conv2d, Float32Linear, GaussianFourierProjection)
    kept = {id(p) for module in network.modules() if isinstance(module, exact) for p in module.parameters()}
    for parameter in network.parameters():
        if not parameter.requires_grad and id(parameter) not in kept:
            parameter.data = parameter.data.to(dtype)
