"""What turns images into features: `inception`, `dinov2`, `clip`, `digits`, or any `nn.Module` by its import path."""

import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError
from .digits import to_digits

DINOV2 = "facebook/dinov2-large"
CLIP = "openai/clip-vit-large-patch14"


class InceptionFeatures(nn.Module):
    """
    The 2048 features of FID and the logits of the Inception Score, from the network that both were defined with.

    Args:
        weights (`str`, *optional*): `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, which downloads it
            if it is not given. It is read as data: nothing in it is run.

    Raises:
        InputError: if it cannot be read or downloaded.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        if weights is not None:
            _check_state_dict(weights)
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights
            )
        except OSError as error:
            raise InputError(
                f"extractor is 'inception', whose weights cannot be downloaded ({error}); pass"
                " weights-inception-2015-12-05-6726825d.pth as extractor_weights."
            ) from error
        except RuntimeError as error:  # of load_state_dict
            raise InputError(
                f"extractor_weights is {weights!r}, which holds another network than the Inception of FID; pass"
                " weights-inception-2015-12-05-6726825d.pth."
            ) from error

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(B, 2048)` and logits `(B, 1008)` of uint8 images `(B, 3, H, W)`."""
        return self.network(images)


class DINOv2Features(nn.Module):
    """
    The class token of DINOv2, whose Fréchet distance is FD-DINOv2. Images are resized to 224 × 224, all of them.

    Args:
        weights (`str`, *optional*, defaults to `facebook/dinov2-large`): a folder or a Hub id of transformers.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        size = {"height": 224, "width": 224}
        self.network = _from_pretrained(AutoModel, weights or DINOV2)
        self.processor = _from_pretrained(AutoImageProcessor, weights or DINOV2, size=size, do_center_crop=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(B, D)` of uint8 images `(B, 3, H, W)`."""
        pixels = self.processor(list(images), return_tensors="pt", input_data_format="channels_first").pixel_values
        return self.network(pixels.to(images.device)).pooler_output


class CLIPFeatures(nn.Module):
    """
    CLIP's projected features of images and of prompts.

    Args:
        weights (`str`, *optional*, defaults to `openai/clip-vit-large-patch14`): a folder or a Hub id of transformers.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        self.network = _from_pretrained(CLIPModel, weights or CLIP)
        self.processor = _from_pretrained(AutoImageProcessor, weights or CLIP)
        self.tokenizer = _from_pretrained(AutoTokenizer, weights or CLIP)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features `(B, D)` of uint8 images `(B, 3, H, W)`."""
        pixels = self.processor(list(images), return_tensors="pt", input_data_format="channels_first").pixel_values
        output = self.network.vision_model(pixels.to(images.device))
        return self.network.visual_projection(output.pooler_output)

    def text_features(self, prompts: list[str]) -> torch.Tensor:
        """Features `(B, D)` of prompts, of which what is longer than CLIP's context is cut off."""
        tokens = self.tokenizer(
            prompts,
            padding=True,
            truncation=True,
            max_length=self.network.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.network.device)
        return self.network.text_projection(self.network.text_model(**tokens).pooler_output)


class DigitFeatures(nn.Module):
    """
    32 features and 10 logits of a small classifier of scikit-learn's digits, whose weights come with this package.

    Images of any size are reduced to 8 × 8 gray pixels ([`to_digits`]). It reads 99.2 % of the held-out digits. It was
    fitted to the others, in [−1, 1], as scikit-learn's `MLPClassifier((64, 32), alpha=1, random_state=0,
    learning_rate_init=2e-3, max_iter=300)`; the file keeps figures comparable whatever version is installed.
    """

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.classifier = nn.Linear(32, 10)
        self.load_state_dict(load_file(Path(__file__).with_name("digit_features.safetensors")))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features `(B, 32)` and logits `(B, 10)` of uint8 images `(B, 3, H, W)`."""
        features = self.features(to_digits(images.float() / 127.5 - 1).flatten(1))
        return features, self.classifier(features)


EXTRACTORS = {
    "inception": InceptionFeatures,
    "dinov2": DINOv2Features,
    "clip": CLIPFeatures,
    "digits": DigitFeatures,
}


def load_extractor(name: str, weights: str | None = None) -> nn.Module:
    """
    A feature extractor: called with uint8 images `(B, 3, H, W)` it returns features `(B, D)`, or a tuple of features
    and, where it has them, a classifier's logits `(B, K)`. With a method `text_features(prompts)` it can give a CLIP
    score as well.

    Args:
        name (`str`): `inception`, `dinov2`, `clip`, `digits`, or `module:Class`, an `nn.Module` that is made without
            arguments; the current folder is searched for the module, too.
        weights (`str`, *optional*): a file or folder for those that read one; a class of one's own gets it as its only
            argument.

    Returns:
        `nn.Module`: frozen, in evaluation mode.

    Raises:
        InputError: if there is no such extractor, or it cannot be made.
    """
    if name in EXTRACTORS:
        cls = EXTRACTORS[name]
        if weights is not None and not inspect.signature(cls).parameters:
            raise InputError(f"extractor_weights is {weights!r}, but {name!r} comes with its own; leave it out.")
    else:
        cls = _import_class(name)
    try:
        extractor = cls() if weights is None else cls(weights)
    except InputError:
        raise
    except ModuleNotFoundError as error:
        raise InputError(
            f"extractor is {name!r}, which needs the package {error.name!r}; pip install 'pid_diffusers[evaluation]'."
        ) from error
    except Exception as error:
        raise InputError(
            f"extractor is {name!r}, which cannot be made ({_reason(error)}); correct it, or"
            f" choose one of {', '.join(EXTRACTORS)}."
        ) from error
    if not isinstance(extractor, nn.Module):
        raise InputError(f"extractor is {name!r}, which is no nn.Module; pass a class that is one.")
    return extractor.eval().requires_grad_(False)


def extract(extractor: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    `features` of shape `(B, D)`, and `logits` where the extractor offers them.

    Args:
        extractor (`nn.Module`): from [`load_extractor`].
        images (`torch.Tensor` of shape `(B, C, H, W)`): uint8, gray (C = 1) or RGB, on the extractor's device.

    Raises:
        InputError: if it cannot take the images, or returns something else, or what is not finite.
    """
    name = type(extractor).__name__
    try:
        output = extractor(images.expand(-1, 3, -1, -1))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a class of one's own raises
        raise InputError(
            f"extractor {name} cannot take uint8 images of shape {(len(images), 3, *images.shape[2:])}"
            f" ({_reason(error)}); pass one that can."
        ) from error
    features, logits = output, None
    if isinstance(output, tuple) and len(output) in (1, 2):
        features, logits = (*output, None)[:2]
    if not isinstance(features, torch.Tensor) or features.ndim != 2 or len(features) != len(images):
        what = tuple(features.shape) if isinstance(features, torch.Tensor) else type(features).__name__
        raise InputError(f"extractor {name} returns {what} for {len(images)} images; it must return (B, D) features.")
    if logits is not None and not (
        isinstance(logits, torch.Tensor) and logits.ndim == 2 and len(logits) == len(images)
    ):
        what = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise InputError(
            f"extractor {name} returns {what} as logits for {len(images)} images; they must be (B, K), or left out."
        )
    found = {"features": features} if logits is None else {"features": features, "logits": logits}
    for what, value in found.items():
        if not value.isfinite().all():
            raise InputError(f"extractor {name} returns {what} that are not finite; check its weights.")
    return {what: value.detach().float() for what, value in found.items()}


def extractor_settings(extractor: nn.Module, name: str) -> dict:
    """
    What features depend on beside the weights: the class and, of one's own, SHA-256 of the source of its module.

    Args:
        extractor (`nn.Module`), name (`str`): what [`load_extractor`] returned, and got.
    """
    settings = {"class": f"{type(extractor).__module__}:{type(extractor).__qualname__}"}
    if name in EXTRACTORS:
        return settings
    sources = []
    for module in sorted({name.partition(":")[0], type(extractor).__module__}):  # the first may be of a function
        try:
            sources.append(inspect.getsource(sys.modules.get(module)))
        except (OSError, TypeError):  # compiled and generated modules have none
            continue
    return settings | {"source": hashlib.sha256("\0".join(sources).encode()).hexdigest()}


def _import_class(name: str) -> type:
    module, colon, cls = name.partition(":")
    if not (colon and module and cls):
        raise InputError(
            f"extractor is {name!r}; choose one of {', '.join(EXTRACTORS)}, or pass module:Class, the import path of"
            " an nn.Module."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a command has its own folder there instead
    try:
        return getattr(importlib.import_module(module), cls)
    except (Exception, SystemExit) as error:  # whatever the module does, such as run a command at its end
        raise InputError(
            f"extractor is {name!r}, which cannot be imported ({_reason(error)}); pass"
            " module:Class, a module on the Python path and a class in it."
        ) from error


def _check_state_dict(path: str):
    """Raises unless the file holds tensors and nothing else, since the library that reads it would run it."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no file of tensors"
        raise InputError(
            f"extractor_weights is {path!r}, which cannot be read ({reason}); pass"
            " weights-inception-2015-12-05-6726825d.pth."
        ) from error


def _from_pretrained(cls: type, weights: str, **kwargs):
    try:
        return cls.from_pretrained(weights, **kwargs)
    except (OSError, ValueError) as error:
        raise InputError(
            f"extractor_weights is {weights!r}, which transformers cannot load ({_line(error)}); pass a folder or a"
            " Hub id with a model and its processor."
        ) from error


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {_line(error)}".removesuffix(": ")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".")[:300]
