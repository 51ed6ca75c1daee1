"""What networks are conditioned on: a flat dictionary of tensors, one row a sample, whatever the network wants."""

import torch
from torch import nn

from .schedulers import PIDScheduler

# tensors of one row a sample: classes; embeddings of a prompt; SDXL's pooled ones and sizes; the guidance scale w
NAMES = ("class_labels", "encoder_hidden_states", "text_embeds", "time_ids", "guidance_scale")


def network_arguments(network: nn.Module, condition: dict[str, torch.Tensor]) -> dict:
    """
    A condition as a network of diffusers takes it.

    Args:
        network (`nn.Module`): whose `time_cond_proj_dim` says whether it is told w.
        condition (`dict`): any of

            - `class_labels` of shape `(B,)`, `encoder_hidden_states` of shape `(B, L, D)`: passed on;
            - `text_embeds` of shape `(B, P)`, `time_ids` of shape `(B, 6)`: SDXL's `added_cond_kwargs`;
            - `guidance_scale` of shape `(B,)`: embedded as `timestep_cond`, if the network is told w, else left out.

    Floating-point tensors get the type of the network's weights.
    """
    parameter = next(network.parameters())
    arguments = {
        name: value.to(parameter.dtype) if value.is_floating_point() and name != "guidance_scale" else value
        for name, value in condition.items()
    }
    scale = arguments.pop("guidance_scale", None)
    added = {name: arguments.pop(name) for name in ("text_embeds", "time_ids") if name in arguments}
    if added:
        arguments["added_cond_kwargs"] = added
    told = getattr(getattr(network, "module", network), "config", {}).get("time_cond_proj_dim")
    if scale is not None and told:
        arguments["timestep_cond"] = PIDScheduler.guidance_embedding(scale, told).to(parameter.dtype)
    return arguments
