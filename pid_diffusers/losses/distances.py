"""Distances d(prediction, target) between images, one number a sample."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..errors import InputError


def l2(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of each sample: `(B, C, H, W)` twice → `(B,)`."""
    return (prediction - target).square().flatten(1).mean(dim=1)


def l1(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of each sample: `(B, C, H, W)` twice → `(B,)`."""
    return (prediction - target).abs().flatten(1).mean(dim=1)


class PseudoHuber:
    """√(‖p − q‖² + c²) − c of each sample: `(B, C, H, W)` twice → `(B,)`.

    Args:
        c (`float`, *optional*): where it turns from square to linear; by default 0.00054 √(C·H·W).

    Source: Song & Dhariwal 2023, Improved Techniques for Training Consistency Models, section 3.3.
    """

    def __init__(self, c: float | None = None):
        self.c = c

    def __call__(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        difference = (prediction - target).flatten(1)
        c = 0.00054 * math.sqrt(difference.shape[1]) if self.c is None else self.c
        return (difference.square().sum(dim=1) + c**2).sqrt() - c


class LPIPS(nn.Module):
    """
    Learned perceptual distance on VGG-16 features of images resized bilinearly to 224 × 224: `(B, C, H, W)` twice, in
    [−1, 1], C = 1 or 3 → `(B,)`.

    The linear weights are those of the `lpips` package (version 0.1). VGG's come from `vgg_weights`, or through
    torchvision, which downloads them once. Unlike `lpips.LPIPS`, the gradient is finite where features vanish.

    Args:
        vgg_weights (`str` or `Path`, *optional*): a local copy of torchvision's `vgg16-397923af.pth`, or the same
            state dict as `.safetensors`.

    Raises:
        InputError: if the weights cannot be had, or the file does not hold VGG-16's.

    Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric.
    """

    def __init__(self, vgg_weights: str | Path | None = None):
        super().__init__()
        weights = _vgg_weights(vgg_weights)
        import lpips  # with torchvision, which the rest of the library does without

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips calls torchvision by a deprecated argument
            self.model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        for block in self.model.net.children():  # slice1 … slice5, layers named as in torchvision's `features`
            for name, parameter in block.named_parameters():
                key = f"features.{name}"
                if getattr(weights.get(key), "shape", None) != parameter.shape:
                    raise InputError(
                        f"lpips_vgg_weights is {str(vgg_weights)!r}, which lacks {key} of shape"
                        f" {tuple(parameter.shape)}; pass torchvision's vgg16-397923af.pth."
                    )
                parameter.data.copy_(weights[key])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        return super().train(False)  # lpips applies dropout in training mode

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if prediction.shape[1] not in (1, 3):
            raise InputError(
                f"distance is 'lpips', which needs images of 1 or 3 channels, not {prediction.shape[1]}; use l2."
            )
        distance = 0.0
        layers = [self.model.lin0, self.model.lin1, self.model.lin2, self.model.lin3, self.model.lin4]
        for p, q, layer in zip(self._features(prediction), self._features(target), layers, strict=True):
            distance = distance + layer((p - q).square()).mean(dim=(1, 2, 3))
        return distance

    def _features(self, images: torch.Tensor) -> list[torch.Tensor]:
        images = F.interpolate(images.float().expand(-1, 3, -1, -1), size=224, mode="bilinear")
        features = self.model.net(self.model.scaling_layer(images))
        # lpips divides by a square root, whose gradient at 0 is infinite; `normalize` clamps instead.
        return [F.normalize(feature, dim=1, eps=1e-10) for feature in features]


class DigitLPIPS(nn.Module):
    """
    The perceptual distance for gray images of 8 × 8 pixels, which VGG-16 was not made for: `(B, 1, 8, 8)` twice, in
    [−1, 1] → `(B,)`.

    Σ over layers, mean over positions of ‖φ(p) − φ(q)‖², where φ are the features of a small classifier of
    scikit-learn's digits, normalised at every position; the layers count alike, without the linear weights of LPIPS.
    The classifier reads 99.4 % of the held-out digits; `examples/train_digit_lpips.py` trains it.

    Source: as [`LPIPS`].
    """

    def __init__(self):
        super().__init__()
        self.layers = digit_layers()
        self.layers.load_state_dict(load_file(Path(__file__).with_name("digit_lpips.safetensors")))
        self.requires_grad_(False).eval()

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if prediction.shape[1:] != (1, 8, 8):
            raise InputError(
                f"lpips_network is 'digits', which takes images of shape (1, 8, 8), not {tuple(prediction.shape[1:])};"
                " use vgg."
            )
        distance, p, q = 0.0, prediction.float(), target.float()
        for layer in self.layers:
            p, q = layer(p), layer(q)
            if isinstance(layer, nn.ReLU):
                difference = F.normalize(p, dim=1, eps=1e-10) - F.normalize(q, dim=1, eps=1e-10)
                distance = distance + difference.square().sum(dim=1).mean(dim=(1, 2))
        return distance


def digit_layers() -> nn.Sequential:
    """The layers of the classifier that [`DigitLPIPS`] compares the features of, with random weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()),
    )


class DecodedDistance(nn.Module):
    """
    A distance between images, of latents: both are decoded, some at a time, and decoded once more in the backward pass
    instead of keeping what the decoder computed. `(B, C, H, W)` twice → `(B,)`.

    Args:
        distance (`nn.Module`): between images in [−1, 1].
        vae (`AutoencoderKL`, `AutoencoderTiny` or `VQModel`): the decoder; frozen, and no submodule.
        batch_size (`int`, defaults to 4): how many latents are decoded at a time.
    """

    def __init__(self, distance: nn.Module, vae: AutoencoderKL | AutoencoderTiny | VQModel, batch_size: int = 4):
        super().__init__()
        self.distance = distance
        self.__dict__["vae"] = vae.eval().requires_grad_(False)
        self.batch_size = batch_size

    def forward(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.vae.to(prediction.device)
        pairs = zip(prediction.split(self.batch_size), target.split(self.batch_size), strict=True)
        return torch.cat([checkpoint(self._of_some, *pair, use_reentrant=False) for pair in pairs])

    def _of_some(self, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = self._decode(target)
        return self.distance(self._decode(prediction), target)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return self.vae.decode(scaled, return_dict=False)[0].float()


DISTANCES = {"l2": lambda: l2, "l1": lambda: l1, "pseudo_huber": PseudoHuber, "lpips": LPIPS}
LPIPS_NETWORKS = ("vgg", "digits")


def get_distance(name: str, **options) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The distance called `name`, created with `options`.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in DISTANCES:
        raise ValueError(f"distance is {name!r}; choose one of {', '.join(DISTANCES)}.")
    return DISTANCES[name](**options)


def _vgg_weights(path: str | Path | None) -> dict[str, torch.Tensor]:
    if path is None:
        from torchvision.models import VGG16_Weights

        try:
            return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False)
        except OSError as error:
            raise InputError(
                f"distance is 'lpips', but VGG-16's weights cannot be downloaded ({error}); pass a local copy of"
                f" {VGG16_Weights.IMAGENET1K_V1.url} with --lpips_vgg_weights, or use --distance l2."
            ) from error
    try:
        if Path(path).suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        return dict(weights)
    except Exception as error:
        raise InputError(
            f"lpips_vgg_weights is {str(path)!r}, which cannot be read as a state dict ({error.__class__.__name__});"
            " pass torchvision's vgg16-397923af.pth."
        ) from error
