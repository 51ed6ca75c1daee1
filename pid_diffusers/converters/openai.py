"""OpenAI's consistency-models networks, guided-diffusion's UNetModel, as diffusers' UNet2DModel."""

import re
from collections.abc import Mapping

from .safe_pickle import UnreadableFile, shorten

# Neither is told by names and shapes. Every checkpoint that OpenAI released has these.
HEAD_CHANNELS = 64
ATTENTION_RESOLUTION = 32

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}


def is_openai_state_dict(names) -> bool:
    """Whether these are the parameters of guided-diffusion's UNetModel."""
    return {"time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"} <= set(names)


def openai_config(tensors: Mapping, image_size: int | None = None) -> dict:
    """
    The arguments of the `UNet2DModel` that computes what a UNetModel does.

    Args:
        tensors (`Mapping`): its state dict; shapes are all that is looked at.
        image_size (`int`, *optional*): the size of the images, which a convolutional network does not tell; by default
            that for which attention begins at 32 × 32, as in every network that OpenAI released.

    Raises:
        UnreadableFile: if names and shapes tell no network that `UNet2DModel` can be.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # A level of the decoder ends with the block that also resamples: behind the residual block and its attention.
    ends, count = [], 0
    while f"output_blocks.{count}.0.in_layers.0.weight" in shapes:
        if _resampler(shapes, f"output_blocks.{count}") is not None:
            ends.append(count)
        count += 1
    layers = ends[0] if ends else count - 1
    levels = len(ends) + 1
    if layers < 1 or count != levels * (layers + 1) or ends != [(i + 1) * (layers + 1) - 1 for i in range(levels - 1)]:
        raise UnreadableFile("has a UNetModel whose levels differ in their number of blocks, which is not supported")
    try:
        first = [1 + level * (layers + 1) for level in range(levels)]  # of each level in the encoder
        widths = [shapes[f"input_blocks.{i}.0.out_layers.3.weight"][0] for i in first]
        attention = [f"input_blocks.{i}.1.qkv.weight" in shapes for i in first]
        model_channels = shapes["time_embed.0.weight"][1]
        in_channels, out_channels = shapes["input_blocks.0.0.weight"][1], shapes["out.2.weight"][0]
        time_channels, width = shapes["input_blocks.1.0.emb_layers.1.weight"][::-1]
        classes = shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None
        by_convolution = f"input_blocks.{1 + layers}.0.op.weight" in shapes
    except (KeyError, IndexError, ValueError) as error:
        raise UnreadableFile("has parameters named as guided-diffusion's, but not all that tell its shape") from error
    if model_channels != widths[0] or time_channels != 4 * model_channels:
        raise UnreadableFile(
            f"has a UNetModel with {model_channels} channels whose first level has {widths[0]} and whose time"
            f" embedding has {time_channels}, which diffusers' UNet2DModel cannot be"
        )
    if width not in (widths[0], 2 * widths[0]) or any(n % 32 for n in widths):
        raise UnreadableFile(f"has a UNetModel of {widths} channels, which cannot be normalised in 32 groups")
    if out_channels != in_channels:
        raise UnreadableFile(
            f"has a network with {out_channels} output channels for {in_channels} of its images: one that learned"
            " variances, which is no EDM network"
        )
    odd = [n for n, has in zip(widths, [*attention[:-1], True], strict=True) if has and n % HEAD_CHANNELS]
    if odd:
        raise UnreadableFile(
            f"has attention over {odd[0]} channels, which are no heads of {HEAD_CHANNELS} channels each"
        )
    if image_size is None:
        image_size = ATTENTION_RESOLUTION << (attention.index(True) if True in attention else levels)
    resampling = "conv" if by_convolution else "resnet"
    down, up = ("DownBlock2D", "UpBlock2D") if by_convolution else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return {
        "sample_size": image_size,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": ["AttnDownBlock2D" if has else down for has in attention],
        "up_block_types": ["AttnUpBlock2D" if has else up for has in reversed(attention)],
        "attention_head_dim": HEAD_CHANNELS,
        "attn_norm_num_groups": 32,
        "resnet_time_scale_shift": "scale_shift" if width == 2 * widths[0] else "default",
        "downsample_type": resampling,
        "upsample_type": resampling,
        "num_class_embeds": classes,
    }


def convert_openai_state_dict(tensors: Mapping, config: dict) -> dict:
    """
    The parameters by the names of `UNet2DModel`.

    Raises:
        UnreadableFile: if one is missing, or one is left over.
    """
    result, used = {}, set()

    def take(name: str):
        if name not in tensors:
            raise UnreadableFile(f"has no parameter {name}, which its architecture needs")
        used.add(name)
        return tensors[name]

    def copy(old: str, new: str):
        for kind in ("weight", "bias"):
            result[f"{new}.{kind}"] = take(f"{old}.{kind}")

    def resnet(old: str, new: str):
        for name, target in _RESNET.items():
            copy(f"{old}.{name}", f"{new}.{target}")
        if f"{old}.skip_connection.weight" in tensors:
            copy(f"{old}.skip_connection", f"{new}.conv_shortcut")

    def attention(old: str, new: str):
        copy(f"{old}.norm", f"{new}.group_norm")
        for kind in ("weight", "bias"):
            parts = take(f"{old}.qkv.{kind}").squeeze().chunk(3)  # (3C, C, 1, 1): queries, keys, values
            for name, part in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                result[f"{new}.{name}.{kind}"] = part
        result[f"{new}.to_out.0.weight"] = take(f"{old}.proj_out.weight").squeeze()
        result[f"{new}.to_out.0.bias"] = take(f"{old}.proj_out.bias")

    def resample(old: str, new: str, convolution: str):
        if config["downsample_type"] == "conv":
            copy(f"{old}.{convolution}", f"{new}.conv")
        else:
            resnet(old, new)

    for old, new in _ENDS.items():
        copy(old, new)
    if config["num_class_embeds"] is not None:
        result["class_embedding.weight"] = take("label_emb.weight")

    layers, levels = config["layers_per_block"], len(config["block_out_channels"])
    block = 1
    for level, kind in enumerate(config["down_block_types"]):
        new = f"down_blocks.{level}"
        for layer in range(layers):
            resnet(f"input_blocks.{block}.0", f"{new}.resnets.{layer}")
            if kind.startswith("Attn"):
                attention(f"input_blocks.{block}.1", f"{new}.attentions.{layer}")
            block += 1
        if level < levels - 1:
            resample(f"input_blocks.{block}.0", f"{new}.downsamplers.0", "op")
            block += 1
    resnet("middle_block.0", "mid_block.resnets.0")
    attention("middle_block.1", "mid_block.attentions.0")
    resnet("middle_block.2", "mid_block.resnets.1")
    block = 0
    for level, kind in enumerate(config["up_block_types"]):
        new = f"up_blocks.{level}"
        for layer in range(layers + 1):
            old = f"output_blocks.{block}"
            resnet(f"{old}.0", f"{new}.resnets.{layer}")
            if kind.startswith("Attn"):
                attention(f"{old}.1", f"{new}.attentions.{layer}")
            if layer == layers and level < levels - 1:
                resample(f"{old}.{2 if kind.startswith('Attn') else 1}", f"{new}.upsamplers.0", "conv")
            block += 1
    unused = sorted(set(tensors) - used)
    if unused:
        raise UnreadableFile(f"has a parameter {shorten(unused[0])}, for which its architecture has no place")
    return result


def _resampler(shapes: Mapping, block: str) -> int | None:
    """The index of the upsampling layer in a block of the decoder, a residual block or a convolution."""
    for index in (1, 2):
        if any(f"{block}.{index}.{name}" in shapes for name in ("in_layers.0.weight", "conv.weight")):
            return index
    return None


def name_tells(file_name: str) -> tuple[str, int]:
    """
    What a file was trained as, by OpenAI's names, and the number of noise levels of its training.

    Returns:
        `tuple[str, int]`: `"EDM"`, `"consistency distillation"` or `"consistency training"`, and a number that matters
        to [`CMStochasticIterativeScheduler`]'s own sampling alone.
    """
    if re.match(r"cd[_-]", file_name):
        return "consistency distillation", 40
    if re.match(r"ct[_-]", file_name):
        return "consistency training", 201 if "64" in file_name else 151
    return "EDM", 40
