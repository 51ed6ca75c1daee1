"""LoRA adapters on a network that is teacher without them and student with them: one set of base weights for both."""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from .errors import InputError

ADAPTER = "default"
# the parts of diffusers' UNets that are adapted by default: attention, feed-forward, convolutions, time projections
UNET_TARGETS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "downsamplers.0.conv",
    "upsamplers.0.conv",
    "time_emb_proj",
)
GUIDANCE_TARGET = "time_embedding.cond_proj"
EMBEDDING_DIM = 256  # of w, as latent consistency models have it


def add_guidance_embedding(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """
    Has a UNet take an embedding of the guidance scale, `timestep_cond`, in place; with zeros for weights, so that what
    it computes stays the same at first, and without the embedding for ever.
    """
    if unet.config.time_cond_proj_dim is None:
        first = unet.time_embedding.linear_1
        projection = nn.Linear(EMBEDDING_DIM, first.in_features, bias=False, dtype=first.weight.dtype)
        nn.init.zeros_(projection.weight)
        unet.time_embedding.cond_proj = projection
        # what is listed as a default value is left out by `from_config`
        defaults = [name for name in unet.config.get("_use_default_values", []) if name != "time_cond_proj_dim"]
        unet.register_to_config(time_cond_proj_dim=EMBEDDING_DIM, _use_default_values=defaults)
    return unet


def add_lora(
    network: nn.Module,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | None = None,
) -> nn.Module:
    """
    Freezes a network and adds trainable LoRA weights in float32 to it, in place: W + (alpha/rank) B A, with B = 0 at
    first.

    Args:
        network (`nn.Module`): of any class.
        rank (`int`): of A and B.
        alpha (`float`, *optional*): default: `rank`, a factor of 1.
        dropout (`float`, defaults to 0.0): of what goes into A, in training mode.
        target_modules (`list[str]`, *optional*): the ends of the names of the linear layers and convolutions that are
            adapted. By default those of `UNET_TARGETS` that there are, or if there is none, all but the first and
            last; and the projection of the guidance scale's embedding.

    Raises:
        InputError: if a name is that of no layer, or of one that cannot be adapted.
    """
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    every = [name for name, _ in network.named_modules()]
    if target_modules is None:
        targets = [target for target in (*UNET_TARGETS, GUIDANCE_TARGET) if _ending_in(target, layers)]
        if not any(target in UNET_TARGETS for target in targets):
            targets = layers[1:-1]
    else:
        targets = target_modules
        for target in targets:
            if not _ending_in(target, layers):
                what = "no linear layer or convolution" if _ending_in(target, every) else "no layer"
                raise InputError(
                    f"lora_target_modules has {target!r}, which is {what} of the {type(network).__name__}; pass ends"
                    f" of names such as {layers[len(layers) // 2]}."
                )
    network.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=sorted(targets),
        init_lora_weights=True,
    )
    if hasattr(network, "add_adapter"):
        network.add_adapter(config, ADAPTER)
    else:
        inject_adapter_in_model(config, network, ADAPTER)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return network


def adapter_layers(network: nn.Module) -> dict[str, BaseTunerLayer]:
    """The layers of a network that have adapters, by name; empty if there are none."""
    return {name: module for name, module in network.named_modules() if isinstance(module, BaseTunerLayer)}


@contextlib.contextmanager
def without_adapters(network: nn.Module | None) -> Iterator[None]:
    """Within it a network computes with its base weights alone. Afterwards all can be trained that could before."""
    layers = adapter_layers(network).values() if hasattr(network, "peft_config") else ()
    layers = [layer for layer in layers if not layer.disable_adapters]  # already, where one such block is in another
    trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
            layer.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def fuse(network: nn.Module) -> nn.Module:
    """Adds the adapters to the base weights and removes them, in place: a network of the class's own layers."""
    for name, layer in adapter_layers(network).items():
        layer.merge()
        network.set_submodule(name, layer.get_base_layer())
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        network.__dict__.pop(attribute, None)
    return network.requires_grad_(True)


def fingerprint(network: nn.Module) -> str:
    """A hex digest of the weights that are not trained: of their names and shapes, and some numbers of each."""
    digest = hashlib.sha256()
    for name, weight in network.named_parameters():
        if not weight.requires_grad:
            values = weight.detach().flatten()
            some = values[:: max(1, len(values) // 64)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


def lora_weights(network: nn.Module) -> tuple[dict[str, torch.Tensor], dict]:
    """The adapter's weights by peft's names, and its `LoraConfig` as a dictionary."""
    config = next(iter(network.peft_config.values())).to_dict()
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    return get_peft_model_state_dict(network, adapter_name=ADAPTER), config


def save_peft_adapter(weights: dict[str, torch.Tensor], config: dict, folder: Path):
    """
    Writes what [`lora_weights`] gives as `adapter_model.safetensors` and `adapter_config.json`, peft's own format, for
    networks whose class has no adapters in diffusers, such as `UNet2DModel`: `PeftModel.from_pretrained(unet, folder)`
    attaches it.
    """
    weights = {f"base_model.model.{name}": weight.contiguous().cpu() for name, weight in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {name: value for name, value in config.items() if _is_json(value)}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _ending_in(target: str, names: list[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _is_json(value) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | dict)
