"""The networks of EDM (Karras et al. 2022) as diffusers models: DDPM++, NCSN++, and narrow ADM.

This file needs nothing but diffusers and torch, so that it can travel with a checkpoint.
"""

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import ModelMixin, UNet2DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional as F

CHOICES = {
    "embedding_type": ("positional", "fourier"),
    "encoder_type": ("standard", "skip", "residual"),
    "decoder_type": ("standard", "skip"),
}
LIBRARY = "pid_diffusers"


def num_norm_groups(num_channels: int) -> int:
    """
    How many groups a group norm of EDM's networks has: 32, but none of fewer than four channels.

    Raises:
        ValueError: if the channels do not divide into them.
    """
    groups = max(1, min(32, num_channels // 4))
    if num_channels < 4 or num_channels % groups != 0:
        raise ValueError(
            f"model_channels and channel_mult make a layer of {num_channels} channels, which do not divide into"
            f" {groups} groups of four or more; choose multiples of 32 for model_channels."
        )
    return groups


class TravelsWithSource:
    """
    A model whose `save_pretrained` also writes this file beside the weights, as `pid_diffusers.py`, so that
    `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` needs nothing that is not in the folder.
    """

    # Kept, and in the class: diffusers copies the code of every local folder to one place and runs it as one module.
    _source = __spec__.loader.get_source(__spec__.name)

    # By its signature diffusers finds out what can be passed on, such as `variant`.
    @functools.wraps(ModelMixin.save_pretrained)
    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, *args, **kwargs):
        if is_main_process and type(self).__module__ == LIBRARY:  # not a subclass from elsewhere
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{LIBRARY}.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


class PositionalTimesteps(nn.Module):
    r"""
    Sines and cosines of a timestep c at the frequencies f_k = 10000^(−k/(n−shift)), k = 0 … n−1, n = `num_channels`/2.

    Args:
        num_channels (`int`): of the embedding; even.
        flip_sin_to_cos (`bool`): cosines first.
        freq_shift (`int`): 1 makes the last frequency 1/10000.

    The frequencies are rounded to float32 whatever the type of c, as in the networks that were trained with them.
    """

    def __init__(self, num_channels: int, flip_sin_to_cos: bool, freq_shift: int):
        super().__init__()
        self.num_frequencies = num_channels // 2
        self.flip_sin_to_cos = flip_sin_to_cos
        self.freq_shift = freq_shift

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`(B,)` to `(B, num_channels)`, in the type of the timesteps, float32 or float64."""
        exponents = torch.arange(self.num_frequencies, dtype=torch.float32, device=timesteps.device)
        frequencies = (1 / 10000) ** (exponents / (self.num_frequencies - self.freq_shift))
        timesteps = timesteps.to(torch.promote_types(timesteps.dtype, torch.float32))
        phases = timesteps[:, None] * frequencies.to(timesteps.dtype)
        waves = [phases.cos(), phases.sin()] if self.flip_sin_to_cos else [phases.sin(), phases.cos()]
        return torch.cat(waves, dim=1)


class FourierTimesteps(nn.Module):
    """Sines and cosines of a timestep c at fixed random frequencies 2π f_k, f_k ~ N(0, 16²), k < `num_channels`/2."""

    def __init__(self, num_channels: int):
        super().__init__()
        # As integers, which nothing casts: in half precision the phases would be wrong by tenths of a radian.
        frequencies = 16 * torch.randn(num_channels // 2, dtype=torch.float32)
        self.register_buffer("frequency_bits", frequencies.view(torch.int32))

    def forward(self, timesteps: torch.Tensor) -> torch.Tensor:
        """`(B,)` to `(B, num_channels)`, in the type of the timesteps, float32 or float64."""
        frequencies = self.frequency_bits.view(torch.float32).to(timesteps.dtype)
        phases = timesteps[:, None] * (2 * math.pi * frequencies)
        return torch.cat([phases.sin(), phases.cos()], dim=1)


class EDMAttnProcessor:
    """
    Self-attention of images, with its norm and its residual connection.

    In float64, in which networks are compared, the attention's weights are rounded to float32, as EDM's own code does.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`hidden_states` is `(B, C, H, W)`, and so is the result; nothing else is looked at."""
        features = attn.group_norm(hidden_states).flatten(2).transpose(1, 2)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        query, key, value = (p(features).unflatten(2, (attn.heads, -1)).transpose(1, 2) for p in projections)
        if query.dtype == torch.float64:
            key = key / math.sqrt(key.shape[-1])
            weights = (query.float() @ key.float().transpose(2, 3)).softmax(dim=3)
            features = weights.double() @ value
        else:
            features = F.scaled_dot_product_attention(query, key, value)
        features = attn.to_out[0](features.transpose(1, 2).flatten(2))
        features = features.transpose(1, 2).unflatten(2, hidden_states.shape[2:])
        return (features + hidden_states) / attn.rescale_output_factor


class Resample2D(nn.Module):
    """
    Doubles or halves height and width with a separable filter, channel by channel.

    Args:
        resample_filter (`Sequence[float]`): the filter in one dimension, of even length; its sum is divided out.
        up (`bool`, defaults to `False`): doubles instead of halving.
        pad (`bool`, defaults to `True`): surrounds the image by zeros, so that the size is exactly half.
    """

    def __init__(self, resample_filter: Sequence[float], up: bool = False, pad: bool = True):
        super().__init__()
        line = torch.tensor(resample_filter, dtype=torch.float64)
        line = line / line.sum() * (2 if up else 1)
        self.register_buffer("kernel", torch.outer(line, line).to(torch.float32)[None, None], persistent=False)
        self.conv = F.conv_transpose2d if up else F.conv2d
        self.padding = len(resample_filter) // 2 - 1 if pad else 0

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """`(B, C, H, W)` to `(B, C, 2 H, 2 W)` or `(B, C, H/2, W/2)`."""
        channels = sample.shape[1]
        kernel = self.kernel.to(sample.dtype).expand(channels, -1, -1, -1)
        return self.conv(sample, kernel, stride=2, padding=self.padding, groups=channels)


def add_to_image(part: torch.Tensor, image: torch.Tensor, upsampler: Resample2D) -> torch.Tensor:
    """What one resolution adds to the output image, `(B, C, H, W)`, plus the sum `(B, C, H/2, W/2)` of those below.

    The sum is the network's output: it is computed in float32 or better, under autocast, too.
    """
    dtype = torch.promote_types(part.dtype, torch.float32)
    with torch.autocast(part.device.type, enabled=False):
        return part.to(dtype) + upsampler(image.to(dtype))


class EDMLayer2D(nn.Module):
    """
    A residual block and, if asked for, self-attention with one head, each divided by √2 after its sum.

    Args:
        in_channels, out_channels, temb_channels (`int`): of the image features and the embedding of the noise level.
        dropout (`float`): before the second convolution.
        attention (`bool`, defaults to `False`): whether attention follows.
        upsample, downsample (`Resample2D`, *optional*): what resizes both the residual and the shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_channels: int,
        dropout: float,
        attention: bool = False,
        upsample: Resample2D | None = None,
        downsample: Resample2D | None = None,
    ):
        super().__init__()
        self.resnet = ResnetBlock2D(
            in_channels=in_channels,
            out_channels=out_channels,
            temb_channels=temb_channels,
            dropout=dropout,
            groups=num_norm_groups(in_channels),
            groups_out=num_norm_groups(out_channels),
            eps=1e-6,
            skip_time_act=True,
            output_scale_factor=math.sqrt(2),
            use_in_shortcut=in_channels != out_channels or upsample is not None or downsample is not None,
        )
        self.resnet.upsample = upsample
        self.resnet.downsample = downsample
        self.attention = None
        if attention:
            self.attention = Attention(
                out_channels,
                heads=1,
                dim_head=out_channels,
                norm_num_groups=num_norm_groups(out_channels),
                eps=1e-6,
                bias=True,
                rescale_output_factor=math.sqrt(2),
                processor=EDMAttnProcessor(),
            )

    def forward(self, sample: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """`(B, in_channels, H, W)` to `(B, out_channels, …)`, of the size that the resampling gives."""
        sample = self.resnet(sample, temb)
        return sample if self.attention is None else self.attention(sample)


class EDMLevel2D(nn.Module):
    """What the two kinds of levels share: layers that can be computed twice instead of being remembered."""

    def __init__(self):
        super().__init__()
        self.gradient_checkpointing = False

    def run(self, layer: EDMLayer2D, sample: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """A layer's output, with checkpointing where it is enabled and gradients are wanted."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(layer, sample, temb)
        return layer(sample, temb)


class EDMDownBlock2D(EDMLevel2D):
    """
    One resolution of the encoder: first, but not at the highest, it halves the size.

    Args:
        widths (`Sequence[int]`): channels of its input and of each layer's output.
        attention (`bool`): whether every layer has attention.
        resample_filter (`Sequence[float]`, *optional*): halves the size; `None` at the highest resolution.
        encoder_type (`str`): how the image itself enters at lower resolutions. `"standard"`: not at all; `"skip"`:
            resized, through a 1 × 1 convolution; `"residual"`: through a chain of downsampling convolutions.
        image_channels (`int`): channels of the image that enters.
        layer (`dict`): what all layers share: `temb_channels` and `dropout`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        attention: bool,
        resample_filter: Sequence[float] | None,
        encoder_type: str,
        image_channels: int,
        layer: dict,
    ):
        super().__init__()
        self.downsampler = self.image_downsampler = self.image_conv = None
        self.encoder_type = encoder_type
        if resample_filter is not None:
            self.downsampler = EDMLayer2D(widths[0], widths[0], downsample=Resample2D(resample_filter), **layer)
            if encoder_type == "skip":
                self.image_downsampler = Resample2D(resample_filter)
                self.image_conv = nn.Conv2d(image_channels, widths[0], kernel_size=1)
            elif encoder_type == "residual":
                # The convolution is also computed where the filter needs it, outside the image.
                self.image_conv = nn.Conv2d(image_channels, widths[0], 3, padding=len(resample_filter) // 2)
                self.image_downsampler = Resample2D(resample_filter, pad=False)
        self.layers = nn.ModuleList(
            EDMLayer2D(before, after, attention=attention, **layer)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(
        self, sample: torch.Tensor, temb: torch.Tensor, image: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The features, the image for the next resolution, and what the decoder takes up again."""
        skips = []
        if self.downsampler is not None:
            sample = self.run(self.downsampler, sample, temb)
            if self.encoder_type == "skip":
                image = self.image_downsampler(image)
                sample = sample + self.image_conv(image)
            elif self.encoder_type == "residual":
                sample = image = (sample + self.image_downsampler(self.image_conv(image))) / math.sqrt(2)
            skips.append(sample)
        for layer in self.layers:
            sample = self.run(layer, sample, temb)
            skips.append(sample)
        return sample, image, skips


class EDMUpBlock2D(EDMLevel2D):
    """
    One resolution of the decoder: first, but not at the lowest, it doubles the size.

    Args:
        width_in (`int`): channels that come from below.
        width (`int`): channels of every layer's output.
        skip_widths (`Sequence[int]`): channels of what comes from the encoder, in the order in which it is used.
        attention (`bool`): whether the last layer has attention.
        resample_filter (`Sequence[float]`): doubles the size.
        is_lowest (`bool`): nothing is doubled.
        image_channels (`int`, *optional*): adds a part of the output image at this resolution; `None` for none.
        layer (`dict`): what all layers share: `temb_channels` and `dropout`.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        skip_widths: Sequence[int],
        attention: bool,
        resample_filter: Sequence[float],
        is_lowest: bool,
        image_channels: int | None,
        layer: dict,
    ):
        super().__init__()
        self.upsampler = self.image_upsampler = self.image_norm = self.image_conv = None
        if not is_lowest:
            self.upsampler = EDMLayer2D(width_in, width_in, upsample=Resample2D(resample_filter, up=True), **layer)
        before = [width_in] + [width] * (len(skip_widths) - 1)
        self.layers = nn.ModuleList(
            EDMLayer2D(w + skip, width, attention=attention and i == len(skip_widths) - 1, **layer)
            for i, (w, skip) in enumerate(zip(before, skip_widths, strict=True))
        )
        if image_channels is not None:
            self.image_upsampler = None if is_lowest else Resample2D(resample_filter, up=True)
            self.image_norm = nn.GroupNorm(num_norm_groups(width), width, eps=1e-6)
            self.image_conv = nn.Conv2d(width, image_channels, kernel_size=3, padding=1)

    def forward(
        self, sample: torch.Tensor, temb: torch.Tensor, skips: list[torch.Tensor], image: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The features and the output image so far; takes the last elements of `skips` away."""
        if self.upsampler is not None:
            sample = self.run(self.upsampler, sample, temb)
        for layer in self.layers:
            sample = self.run(layer, torch.cat([sample, skips.pop()], dim=1), temb)
        if self.image_conv is not None:
            part = self.image_conv(F.silu(self.image_norm(sample)))
            image = part if self.image_upsampler is None else add_to_image(part, image, self.image_upsampler)
        return sample, image


class EDMMidBlock2D(EDMLevel2D):
    """The lowest resolution between encoder and decoder: a layer with attention and one without."""

    def __init__(self, width: int, layer: dict):
        super().__init__()
        self.layers = nn.ModuleList(EDMLayer2D(width, width, attention=i == 0, **layer) for i in range(2))

    def forward(self, sample: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Features of the same shape."""
        for layer in self.layers:
            sample = self.run(layer, sample, temb)
        return sample


class EDMUNet2DModel(TravelsWithSource, ModelMixin, ConfigMixin):
    r"""
    The raw network F_θ of EDM's CIFAR-10, FFHQ and AFHQ models: DDPM++ and NCSN++ (Song et al. 2021).

    | | DDPM++ (VP) | NCSN++ (VE) |
    |---|---|---|
    | `embedding_type` | `"positional"` | `"fourier"` |
    | `channel_mult_noise` | 1 | 2 |
    | `encoder_type` | `"standard"` | `"residual"` |
    | `resample_filter` | (1, 1) | (1, 3, 3, 1) |

    Args:
        sample_size (`int`): height and width of the images, which are square; a multiple of 2^(resolutions − 1).
        in_channels, out_channels (`int`, defaults to 3): of the images.
        num_class_embeds (`int`, *optional*): how many classes it is conditioned on; `None` for none.
        augment_dim (`int`, defaults to 0): length of the augmentation labels of its training; 0 for none.
        model_channels (`int`, defaults to 128): the unit of all widths.
        channel_mult (`tuple[int]`, defaults to `(1, 2, 2, 2)`): width at each resolution, from the highest.
        channel_mult_emb (`int`, defaults to 4): width of the embedding of noise level and class.
        num_blocks (`int`, defaults to 4): layers a resolution in the encoder; the decoder has one more.
        attn_resolutions (`tuple[int]`, defaults to `(16,)`): heights at which there is self-attention; the middle
            has it anyway.
        dropout (`float`, defaults to 0.1): in every layer.
        label_dropout (`float`, defaults to 0.0): in training, the probability that a class is withheld.
        embedding_type (`str`, defaults to `"positional"`): of the noise level; `"positional"` or `"fourier"`.
        channel_mult_noise (`int`, defaults to 1): width of that embedding's sines and cosines.
        encoder_type (`str`, defaults to `"standard"`): `"standard"`, `"skip"` or `"residual"`.
        decoder_type (`str`, defaults to `"standard"`): `"standard"`, or `"skip"`: a part of the output image from
            every resolution.
        resample_filter (`tuple[float]`, defaults to `(1, 1)`): of even length.

    Raises:
        ValueError: if an argument is out of range, or a width does not divide into the groups of the norms (32, or
            fewer so that each has four channels).

    Source: Karras et al. 2022, appendix F.4 and table 7; Song et al. 2021, appendix H.
    """

    # What `model_index.json` records as the library, wherever this file was loaded from: diffusers then takes the
    # class from that package if it is imported, else from the file `pid_diffusers.py` that `save_pretrained` writes.
    __module__ = LIBRARY
    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int,
        in_channels: int = 3,
        out_channels: int = 3,
        num_class_embeds: int | None = None,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: tuple[int, ...] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: tuple[int, ...] = (16,),
        dropout: float = 0.1,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: tuple[float, ...] = (1, 1),
    ):
        super().__init__()
        self._check_config(locals())
        self.sample_shape = (in_channels, sample_size, sample_size)
        self.num_classes = num_class_embeds
        self.augment_dim = augment_dim
        self.label_dropout = label_dropout
        noise_channels = model_channels * channel_mult_noise
        temb_channels = model_channels * channel_mult_emb
        layer = {"temb_channels": temb_channels, "dropout": dropout}

        # 1. input
        self.conv_in = nn.Conv2d(in_channels, model_channels, kernel_size=3, padding=1)

        # 2. noise level, class and augmentation
        if embedding_type == "positional":
            self.time_proj = PositionalTimesteps(noise_channels, flip_sin_to_cos=False, freq_shift=1)
        else:
            self.time_proj = FourierTimesteps(noise_channels)
        self.class_embedding = self.augment_embedding = None
        if num_class_embeds is not None:
            self.class_embedding = nn.Linear(num_class_embeds, noise_channels)
        if augment_dim > 0:
            self.augment_embedding = nn.Linear(augment_dim, noise_channels, bias=False)
        self.time_embedding = TimestepEmbedding(noise_channels, temb_channels, post_act_fn="silu")

        # 3. encoder
        self.down_blocks = nn.ModuleList()
        width, skip_widths = model_channels, [model_channels]
        image_channels = in_channels
        for i, mult in enumerate(channel_mult):
            widths = [width] + [model_channels * mult] * num_blocks
            attention = sample_size >> i in attn_resolutions
            down_filter = resample_filter if i > 0 else None
            block = EDMDownBlock2D(widths, attention, down_filter, encoder_type, image_channels, layer)
            self.down_blocks.append(block)
            skip_widths += widths[0 if i > 0 else 1 :]
            if i > 0 and encoder_type == "residual":
                image_channels = widths[0]
            width = widths[-1]

        # 4. middle
        self.mid_block = EDMMidBlock2D(width, layer)

        # 5. decoder
        self.up_blocks = nn.ModuleList()
        for i, mult in reversed(list(enumerate(channel_mult))):
            block = EDMUpBlock2D(
                width,
                model_channels * mult,
                [skip_widths.pop() for _ in range(num_blocks + 1)],
                attention=sample_size >> i in attn_resolutions,
                resample_filter=resample_filter,
                is_lowest=i == len(channel_mult) - 1,
                image_channels=out_channels if decoder_type == "skip" and i > 0 else None,
                layer=layer,
            )
            self.up_blocks.append(block)
            width = model_channels * mult

        # 6. output
        self.image_upsampler = None
        if decoder_type == "skip" and len(channel_mult) > 1:
            self.image_upsampler = Resample2D(resample_filter, up=True)
        self.conv_norm_out = nn.GroupNorm(num_norm_groups(width), width, eps=1e-6)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(width, out_channels, kernel_size=3, padding=1)

        self._initialize()

    @staticmethod
    def _check_config(config: dict):
        for name, choices in CHOICES.items():
            if config[name] not in choices:
                raise ValueError(f"{name} is {config[name]!r}; choose one of {', '.join(choices)}.")
        counts = ["sample_size", "in_channels", "out_channels", "model_channels", "channel_mult_emb", "num_blocks"]
        counts += ["channel_mult_noise"] + ["num_class_embeds"] * (config["num_class_embeds"] is not None)
        for name in counts:
            if not isinstance(config[name], int) or config[name] < 1:
                raise ValueError(f"{name} is {config[name]!r}; pass an integer of at least 1.")
        if not isinstance(config["augment_dim"], int) or config["augment_dim"] < 0:
            raise ValueError(f"augment_dim is {config['augment_dim']!r}; pass an integer of at least 0.")
        for name in ("dropout", "label_dropout"):
            if not 0 <= config[name] < 1:
                raise ValueError(f"{name} is {config[name]!r}; pass a probability below 1.")
        mults, size, unit = config["channel_mult"], config["sample_size"], config["model_channels"]
        if len(mults) == 0 or not all(isinstance(mult, int) and mult >= 1 for mult in mults):
            raise ValueError(f"channel_mult is {mults!r}; pass an integer of at least 1 for every resolution.")
        if size % 2 ** (len(mults) - 1) != 0:
            raise ValueError(
                f"sample_size is {size}, which cannot be halved {len(mults) - 1} times, as channel_mult = {mults!r}"
                f" asks; pass a multiple of {2 ** (len(mults) - 1)}."
            )
        taps = config["resample_filter"]
        if len(taps) == 0 or len(taps) % 2 != 0 or sum(taps) == 0:
            raise ValueError(f"resample_filter is {taps!r}; pass an even number of weights whose sum is not 0.")
        if (unit * config["channel_mult_noise"]) % 2 != 0:
            raise ValueError(f"model_channels is {unit}; pass an even number.")

    def _initialize(self):
        """Every layer begins nearly as a copy of its input, and the output near zero."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                gain = 1.0
                if name.endswith(("conv2", "to_out.0", "conv_out")) or name.startswith("up") and "image_conv" in name:
                    gain = 1e-5
                elif name.endswith(("to_q", "to_k", "to_v")):
                    gain = math.sqrt(0.1)
                nn.init.xavier_uniform_(module.weight, gain=gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """
        F_θ(sample, timestep, class).

        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, sample_size, sample_size)`): c_in(σ) x.
            timestep (`float` or `torch.Tensor` of shape `()`, `(1,)` or `(B,)`): c_noise = ln(σ)/4.
            class_labels (`torch.Tensor`, *optional*): integers of shape `(B,)`, or one-hot vectors of shape
                `(B, num_class_embeds)`, of which zeros mean no class; needed if the network is class-conditional.
            augment_labels (`torch.Tensor` of shape `(B, augment_dim)`, *optional*): how the images were augmented;
                by default not at all.
            return_dict (`bool`, defaults to `True`): a [`UNet2DOutput`] instead of a tuple.

        Raises:
            ValueError: if a shape, a type or a class is not what the network knows. (In a compiled network, the
                integers of `class_labels` are not looked at.)
        """
        if tuple(sample.shape[1:]) != self.sample_shape:
            shape = ", ".join(map(str, self.sample_shape))
            raise ValueError(f"sample has shape {tuple(sample.shape)}; this network takes images of (B, {shape}).")
        batch_size = sample.shape[0]

        # 1. noise level, class and augmentation
        dtype = torch.promote_types(sample.dtype, torch.float32)
        timestep = torch.as_tensor(timestep, dtype=dtype, device=sample.device)
        if tuple(timestep.shape) not in ((), (1,), (batch_size,)):
            raise ValueError(
                f"timestep has shape {tuple(timestep.shape)}; pass a number or one for each of {batch_size} images."
            )
        temb = self.time_proj(timestep.expand(batch_size))
        temb = temb.to(self.conv_in.weight.dtype)
        class_labels = self._one_hot_labels(class_labels, batch_size)
        if class_labels is not None:
            temb = temb + self.class_embedding(class_labels.to(temb) * math.sqrt(self.num_classes))
        if augment_labels is not None and tuple(augment_labels.shape) != (batch_size, self.augment_dim):
            raise ValueError(
                f"augment_labels has shape {tuple(augment_labels.shape)}; "
                + (f"pass {(batch_size, self.augment_dim)}." if self.augment_dim else "this network knows none.")
            )
        if self.augment_embedding is not None:
            if augment_labels is None:  # the weights are used anyway: processes that train together rely on that
                augment_labels = temb.new_zeros(batch_size, self.augment_dim)
            temb = temb + self.augment_embedding(augment_labels.to(temb))
        temb = self.time_embedding(temb)

        # 2. encoder
        image = sample
        sample = self.conv_in(sample)
        skips = [sample]
        for block in self.down_blocks:
            sample, image, block_skips = block(sample, temb, image)
            skips += block_skips

        # 3. middle
        sample = self.mid_block(sample, temb)

        # 4. decoder
        image = None
        for block in self.up_blocks:
            sample, image = block(sample, temb, skips, image)

        # 5. output
        sample = self.conv_out(self.conv_act(self.conv_norm_out(sample)))
        if self.image_upsampler is not None:
            sample = add_to_image(sample, image, self.image_upsampler).to(sample.dtype)
        return UNet2DOutput(sample=sample) if return_dict else (sample,)

    def _one_hot_labels(self, class_labels: torch.Tensor | None, batch_size: int) -> torch.Tensor | None:
        """The classes as one-hot vectors `(B, num_class_embeds)`, some of them zero where training withholds them."""
        if self.num_classes is None:
            if class_labels is not None:
                raise ValueError("class_labels was passed, but this network is unconditional; leave it out.")
            return None
        if class_labels is None:
            raise ValueError(
                f"class_labels is missing; pass integers from 0 to {self.num_classes - 1}, or zeros of shape"
                f" ({batch_size}, {self.num_classes}) for no class."
            )
        integers = not class_labels.is_floating_point() and class_labels.dtype != torch.bool
        shape = tuple(class_labels.shape)
        if shape != (batch_size, self.num_classes) and not (shape == (batch_size,) and integers):
            raise ValueError(
                f"class_labels has shape {shape} and type {class_labels.dtype}; pass integers of shape"
                f" ({batch_size},) or one-hot vectors of shape ({batch_size}, {self.num_classes})."
            )
        if class_labels.ndim == 1:
            # looking at values would break a compiled graph
            if not torch.compiler.is_compiling() and bool(
                ((class_labels < 0) | (class_labels >= self.num_classes)).any()
            ):
                raise ValueError(
                    f"class_labels is {class_labels.tolist()}; this network knows the classes 0 to"
                    f" {self.num_classes - 1}."
                )
            class_labels = F.one_hot(class_labels.long(), self.num_classes)
        if self.training and self.label_dropout > 0:
            kept = torch.rand(batch_size, 1, device=class_labels.device) >= self.label_dropout
            class_labels = class_labels * kept
        return class_labels


class ADMUNet2DModel(TravelsWithSource, UNet2DModel):
    """
    A `UNet2DModel` with EDM's group norms: 32 groups, but none of fewer than four channels.

    EDM's ADM networks of 128 channels or more everywhere, such as ImageNet-64's, are plain `UNet2DModel`s: their norms
    all have 32 groups. A narrower one has norms of different numbers of groups, which a `UNet2DModel` has not.

    Args: those of `UNet2DModel`; `norm_num_groups` and `attn_norm_num_groups` must divide all widths and change
        nothing else. The embedding of the timestep is positional, and computed in the timestep's own type, and
        attention as in [`EDMAttnProcessor`].
    """

    __module__ = LIBRARY

    @functools.wraps(UNet2DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.config.time_embedding_type != "positional":
            raise ValueError(f"time_embedding_type is {self.config.time_embedding_type!r}; only positional fits.")
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = num_norm_groups(module.num_channels)
            elif isinstance(module, Attention):
                module.set_processor(EDMAttnProcessor())
        channels = self.config.block_out_channels[0]
        self.time_proj = PositionalTimesteps(channels, self.config.flip_sin_to_cos, self.config.freq_shift)
