"""From the arguments and weights of EDM's networks (Karras et al. 2022) to those of the models in diffusers' form."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers import UNet2DModel

from .unet_edm import ADMUNet2DModel, num_norm_groups

# Arguments of what surrounds the network, which say nothing about its shape.
_OF_THE_PRECONDITIONING = {
    "precond", "model_type", "use_fp16", "sigma_min", "sigma_max", "sigma_data",
    "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2",
}  # fmt: skip
_SHAPE = {"img_resolution", "img_channels", "in_channels", "out_channels", "label_dim", "augment_dim"}
_SONG_DEFAULTS = {
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.1,
    "label_dropout": 0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "encoder_type": "standard",
    "decoder_type": "standard",
    "resample_filter": [1, 1],
}
_ADM_DEFAULTS = {
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.1,
    "label_dropout": 0,
}
_ADM_HEAD_DIM = 64


def song_config(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The configuration of the [`EDMUNet2DModel`] that a `SongUNet` of these arguments is.

    Args:
        init_kwargs (`Mapping`): the arguments of the preconditioned network (`img_resolution`, `img_channels`,
            `label_dim`, …), those of the network itself among them; what is left out has EDM's default.
            `in_channels` and `out_channels` go before `img_channels`.

    Raises:
        ValueError: for an unknown or a missing argument.
    """
    settings = _settings(init_kwargs, _SONG_DEFAULTS, "SongUNet")
    return {
        **_image_config(init_kwargs),
        "augment_dim": init_kwargs.get("augment_dim", 0),
        **{name: list(value) if isinstance(value, list | tuple) else value for name, value in settings.items()},
    }


def convert_song_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The weights of an [`EDMUNet2DModel`] from those of a `SongUNet`.

    Args:
        state_dict (`Mapping`): by the network's own names (`map_layer0.weight`, `enc.32x32_conv.weight`, …).
        config (`Mapping`): what [`song_config`] returned.

    Raises:
        ValueError: if a weight is missing, or one is there that the configuration has no place for.
    """
    return _Renaming(state_dict).apply(_song_names(config))


def adm_config(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The configuration of the `UNet2DModel` that a `DhariwalUNet` of these arguments is; [`adm_class`] tells which class
    it is meant for.

    Args:
        init_kwargs (`Mapping`): as in [`song_config`].

    Raises:
        ValueError: for an unknown or a missing argument, or a network that is no `UNet2DModel`: the first
            resolution must have `model_channels` channels, and where there is attention they must divide into heads
            of 64.
    """
    settings = _settings(init_kwargs, _ADM_DEFAULTS, "DhariwalUNet")
    image = _image_config(init_kwargs)
    unit, mults = settings["model_channels"], settings["channel_mult"]
    if mults[0] != 1:
        raise ValueError(f"channel_mult is {list(mults)}, which a UNet2DModel cannot be; it must begin with 1.")
    sizes = [image["sample_size"] >> i for i in range(len(mults))]
    attention = [size in settings["attn_resolutions"] for size in sizes]
    for mult, there in zip(mults, [*attention[:-1], True], strict=True):
        if there and (unit * mult) % _ADM_HEAD_DIM != 0:
            raise ValueError(
                f"model_channels is {unit}, which makes attention over {unit * mult} channels; a UNet2DModel needs a"
                f" multiple of {_ADM_HEAD_DIM} there."
            )
    groups = num_norm_groups(unit)
    return {
        **image,
        "time_embedding_type": "positional",
        "time_embedding_dim": unit * settings["channel_mult_emb"],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "block_out_channels": [unit * mult for mult in mults],
        "down_block_types": ["AttnDownBlock2D" if there else "ResnetDownsampleBlock2D" for there in attention],
        "up_block_types": ["AttnUpBlock2D" if there else "ResnetUpsampleBlock2D" for there in reversed(attention)],
        "layers_per_block": settings["num_blocks"],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "dropout": settings["dropout"],
        "attention_head_dim": _ADM_HEAD_DIM,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift",
    }


def adm_class(config: Mapping[str, Any]) -> type[UNet2DModel]:
    """
    The class that a configuration of [`adm_config`] is meant for.

    `UNet2DModel` if every norm has 32 groups, as in ImageNet-64's network; else [`ADMUNet2DModel`], since EDM gives
    layers of fewer than 128 channels fewer groups.
    """
    return UNet2DModel if config["block_out_channels"][0] >= 128 else ADMUNet2DModel


def convert_adm_state_dict(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    The weights of a `UNet2DModel` from those of a `DhariwalUNet`.

    Those of the augmentation labels, if any, are left out: they change nothing for images that are not augmented.

    Args:
        state_dict (`Mapping`): by the network's own names (`map_label.weight`, `enc.64x64_conv.weight`, …).
        config (`Mapping`): what [`adm_config`] returned.

    Raises:
        ValueError: if a weight is missing, or one is there that the configuration has no place for.
    """
    names = _Renaming({name: weight for name, weight in state_dict.items() if name != "map_augment.weight"})
    return names.apply(_adm_names(config))


def _settings(init_kwargs: Mapping[str, Any], defaults: dict[str, Any], name: str) -> dict[str, Any]:
    unknown = sorted(set(init_kwargs) - set(defaults) - _SHAPE - _OF_THE_PRECONDITIONING)
    if unknown:
        raise ValueError(f"init_kwargs has {unknown[0]}, which is no argument of a {name}; leave it out.")
    return {key: init_kwargs.get(key, value) for key, value in defaults.items()}


def _image_config(init_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    for key, other in (("img_resolution", ""), ("in_channels", "img_channels"), ("out_channels", "img_channels")):
        if key not in init_kwargs and other not in init_kwargs:
            raise ValueError(f"init_kwargs has no {other or key}; pass the arguments that made the network.")
    return {
        "sample_size": init_kwargs["img_resolution"],
        "in_channels": init_kwargs.get("in_channels", init_kwargs.get("img_channels")),
        "out_channels": init_kwargs.get("out_channels", init_kwargs.get("img_channels")),
        "num_class_embeds": init_kwargs.get("label_dim") or None,
    }


class _Renaming:
    """Takes the weights of a state dict by rules (kind, old name, new name), each once."""

    def __init__(self, state_dict: Mapping[str, torch.Tensor]):
        # the filters are part of the configuration
        self.weights = {k: v for k, v in state_dict.items() if not k.endswith("resample_filter")}

    def apply(self, rules: Iterator[tuple[str, str, str]]) -> dict[str, torch.Tensor]:
        converted = {}
        for kind, old, new in rules:
            getattr(self, kind)(old, new, converted)
        if self.weights:
            raise ValueError(f"state_dict has {next(iter(self.weights))}, for which the network has no place.")
        return converted

    def take(self, name: str) -> torch.Tensor:
        if name not in self.weights:
            raise ValueError(f"state_dict has no {name}; pass the weights that belong to these arguments.")
        return self.weights.pop(name)

    def as_it_is(self, old: str, new: str, converted: dict):
        converted[new] = self.take(old)

    def bits(self, old: str, new: str, converted: dict):
        """float32 numbers as integers, so that nothing casts them."""
        converted[new] = self.take(old).float().contiguous().view(torch.int32)

    def layer(self, old: str, new: str, converted: dict):
        for part in ("weight", "bias"):
            converted[f"{new}.{part}"] = self.take(f"{old}.{part}")

    def embedding(self, old: str, new: str, converted: dict):
        """A linear layer on one-hot vectors is a table of its columns."""
        converted[new] = self.take(old).T.contiguous()

    def resnet(self, old: str, new: str, converted: dict):
        names = {"norm0": "norm1", "conv0": "conv1", "affine": "time_emb_proj", "norm1": "norm2", "conv1": "conv2"}
        for before, after in names.items():
            self.layer(f"{old}.{before}", f"{new}.{after}", converted)
        if f"{old}.skip.weight" in self.weights:
            self.layer(f"{old}.skip", f"{new}.conv_shortcut", converted)

    def attention(self, old: str, new: str, converted: dict):
        """1 × 1 convolutions as linear layers; the source's rows are ordered (head, channel, q k v)."""
        self.layer(f"{old}.norm2", f"{new}.group_norm", converted)
        for part in ("weight", "bias"):
            rows, projection = self.take(f"{old}.qkv.{part}"), self.take(f"{old}.proj.{part}")
            if part == "weight":
                rows, projection = rows[:, :, 0, 0], projection[:, :, 0, 0]
            for i, letter in enumerate("qkv"):
                converted[f"{new}.to_{letter}.{part}"] = rows[i::3].contiguous()
            converted[f"{new}.to_out.0.{part}"] = projection


def _song_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    levels = len(config["channel_mult"])
    sizes = [f"{config['sample_size'] >> i}x{config['sample_size'] >> i}" for i in range(levels)]
    has_attention = [config["sample_size"] >> i in config["attn_resolutions"] for i in range(levels)]

    def layer(old: str, new: str, attention: bool = False) -> Iterator[tuple[str, str, str]]:
        yield "resnet", old, f"{new}.resnet"
        if attention:
            yield "attention", old, f"{new}.attention"

    if config["embedding_type"] == "fourier":
        yield "bits", "map_noise.freqs", "time_proj.frequency_bits"
    if config["num_class_embeds"] is not None:
        yield "layer", "map_label", "class_embedding"
    if config["augment_dim"] > 0:
        yield "as_it_is", "map_augment.weight", "augment_embedding.weight"
    yield "layer", "map_layer0", "time_embedding.linear_1"
    yield "layer", "map_layer1", "time_embedding.linear_2"
    yield "layer", f"enc.{sizes[0]}_conv", "conv_in"
    for i, size in enumerate(sizes):
        if i > 0:
            yield from layer(f"enc.{size}_down", f"down_blocks.{i}.downsampler")
            if config["encoder_type"] != "standard":
                kind = {"skip": "skip", "residual": "residual"}[config["encoder_type"]]
                yield "layer", f"enc.{size}_aux_{kind}", f"down_blocks.{i}.image_conv"
        for j in range(config["num_blocks"]):
            yield from layer(f"enc.{size}_block{j}", f"down_blocks.{i}.layers.{j}", has_attention[i])
    for j in range(2):
        yield from layer(f"dec.{sizes[-1]}_in{j}", f"mid_block.layers.{j}", j == 0)
    for k, (i, size) in enumerate(reversed(list(enumerate(sizes)))):
        if k > 0:
            yield from layer(f"dec.{size}_up", f"up_blocks.{k}.upsampler")
        for j in range(config["num_blocks"] + 1):
            is_last = j == config["num_blocks"]
            yield from layer(f"dec.{size}_block{j}", f"up_blocks.{k}.layers.{j}", is_last and has_attention[i])
        if config["decoder_type"] == "skip" and i > 0:
            yield "layer", f"dec.{size}_aux_norm", f"up_blocks.{k}.image_norm"
            yield "layer", f"dec.{size}_aux_conv", f"up_blocks.{k}.image_conv"
    yield "layer", f"dec.{sizes[0]}_aux_norm", "conv_norm_out"
    yield "layer", f"dec.{sizes[0]}_aux_conv", "conv_out"


def _adm_names(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    levels = len(config["block_out_channels"])
    sizes = [f"{config['sample_size'] >> i}x{config['sample_size'] >> i}" for i in range(levels)]
    has_attention = ["Attn" in name for name in config["down_block_types"]]

    def layer(old: str, new: str, j: int, attention: bool) -> Iterator[tuple[str, str, str]]:
        yield "resnet", old, f"{new}.resnets.{j}"
        if attention:
            yield "attention", old, f"{new}.attentions.{j}"

    if config["num_class_embeds"] is not None:
        yield "embedding", "map_label.weight", "class_embedding.weight"
    yield "layer", "map_layer0", "time_embedding.linear_1"
    yield "layer", "map_layer1", "time_embedding.linear_2"
    yield "layer", f"enc.{sizes[0]}_conv", "conv_in"
    for i, size in enumerate(sizes):
        if i > 0:
            yield "resnet", f"enc.{size}_down", f"down_blocks.{i - 1}.downsamplers.0"
        for j in range(config["layers_per_block"]):
            yield from layer(f"enc.{size}_block{j}", f"down_blocks.{i}", j, has_attention[i])
    for j in range(2):
        yield from layer(f"dec.{sizes[-1]}_in{j}", "mid_block", j, j == 0)
    for k, (i, size) in enumerate(reversed(list(enumerate(sizes)))):
        if k > 0:
            yield "resnet", f"dec.{size}_up", f"up_blocks.{k - 1}.upsamplers.0"
        for j in range(config["layers_per_block"] + 1):
            yield from layer(f"dec.{size}_block{j}", f"up_blocks.{k}", j, has_attention[i])
    yield "layer", "out_norm", "conv_norm_out"
    yield "layer", "out_conv", "conv_out"
