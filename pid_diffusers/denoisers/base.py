"""A teacher, whatever its family, is one function: D(x, σ, **condition)."""

import copy
import json
from pathlib import Path
from typing import Self

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.models.embeddings import LabelEmbedding
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import nn

from ..adapters import without_adapters
from ..errors import InputError
from ..models import EDMUNet2DModel

TEXT_TO_IMAGE = (StableDiffusionPipeline, StableDiffusionXLPipeline)
BUILT_IN = {name: Path(__file__).parent.parent / "assets" / f"{name}-teacher" for name in ("digits", "words")}


class Denoiser(nn.Module):
    """
    D(x, σ, **condition): the expected clean image behind x = image + σ n, n ~ N(0, I).

    With a `vae`, "image" stands for latents everywhere, and `decode` makes images of them.

    A family is a subclass in a file of its own. It implements `forward` and, to be found by
    [`~Denoiser.from_pretrained`], `from_pipeline` and `scheduler_classes`.

    Attributes:
        unet (`nn.Module`): the network, where there is one.
        scheduler_classes (`tuple[str]`): the diffusers schedulers whose configuration describes this family.
        trajectory_config (`dict`): the arguments of the `PIDScheduler` that suits a student of this teacher.
        loss_weighting (`str`): the `weighting` of the `PIDLoss` that suits it.
        predicts (`str`): what the network's output stands for.
        network_calls (`int`): how many times D(x, σ) evaluates the network for a sample.
        vae (`AutoencoderKL` or `VQModel`, *optional*): decodes what a teacher in latent space denoises. Frozen, and no
            submodule: neither its parameters nor its device and type are the denoiser's, and copies share it.
    """

    scheduler_classes: tuple[str, ...] = ()
    trajectory_config: dict
    loss_weighting: str = "uniform"
    predicts: str = "the sample"
    network_calls: int = 1
    vae: AutoencoderKL | VQModel | None = None

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        # adapters belong to a student that shares the teacher's weights
        with without_adapters(getattr(self, "unet", None)):
            return super().__call__(*args, **kwargs)

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor, **condition) -> torch.Tensor:
        """D(x, σ) of shape `(B, C, H, W)` for `x` of that shape and `sigma` a number or of shape `(B,)`."""
        raise NotImplementedError

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the teacher denoises."""
        size = self.unet.config.sample_size
        return self.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)

    def draw_condition(self, batch_size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """What to condition a training batch on, drawn on the CPU: uniform classes, or nothing."""
        if self.num_classes is None:
            return {}
        return {"class_labels": torch.randint(self.num_classes, (batch_size,), generator=generator)}

    def shown_condition(self, num_samples: int, class_labels: list[int] | None = None) -> dict[str, torch.Tensor]:
        """What samples that are shown and measured are conditioned on, one row each: the teacher's classes in turn, or
        `class_labels`; or nothing."""
        if self.num_classes is None:
            return {}
        labels = torch.arange(num_samples) % self.num_classes if class_labels is None else torch.tensor(class_labels)
        return {"class_labels": labels}

    @property
    def num_classes(self) -> int | None:
        """How many classes the teacher knows; `None` if it is unconditional.

        A DiT's null class, with which it can be guided, is not counted: the teacher is the conditional model without
        guidance.
        """
        config = self.unet.config
        return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Images `(B, C, H, W)` in about [−1, 1] from what the teacher denoises, on the latter's device; without a
        `vae` that is what they are, or twice that less 1 if the data's `sample_min` is 0."""
        if self.vae is None:
            return 2 * latents - 1 if self.trajectory_config.get("sample_min") == 0 else latents
        self.vae.to(next(self.unet.parameters()).device)
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.device, self.vae.dtype)
        # one at a time: a decoder needs far more memory for an image than the network
        images = [self.vae.decode(x, return_dict=False)[0] for x in scaled.split(1)]
        return torch.cat(images).to(latents.device, latents.dtype)

    def __deepcopy__(self, memo: dict) -> Self:
        memo[id(self.vae)] = self.vae
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def describe(self) -> str:
        """The family, what its network predicts, its noise levels, images, classes and size, in a line."""
        channels, height, width = self.sample_shape
        levels = self.trajectory_config
        shape = f"{channels} × {height} × {width}"
        images = f"images of {shape}" if self.vae is None else f"latents of {shape} for {type(self.vae).__name__}"
        return (
            f"{type(self).__name__} that predicts {self.predicts}, noise levels {levels['sigma_max']:g} to"
            f" {levels['sigma_min']:g}, {images},"
            f" {self._conditioning},"
            f" {type(self.unet).__name__} with {self._num_parameters() / 1e6:.2f} M parameters"
        )

    def _num_parameters(self) -> int:
        """Those of the network, without adapters, which are a student's."""
        return sum(weight.numel() for name, weight in self.unet.named_parameters() if ".lora_" not in name)

    @property
    def _conditioning(self) -> str:
        if self.num_classes:
            return f"{self.num_classes} classes"
        return "text" if isinstance(self.unet, UNet2DConditionModel) else "unconditional"

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline) -> "Denoiser":
        """The denoiser in a pipeline whose scheduler is one of `scheduler_classes`."""
        raise NotImplementedError

    @staticmethod
    def from_pretrained(teacher: str | Path) -> "Denoiser":
        """
        The teacher in a diffusers pipeline, read from its scheduler's configuration, with its VAE if it has one.

        Args:
            teacher (`str` or `Path`): a folder, a Hub id, or `"digits"` for the teacher that comes with this package.

        Raises:
            InputError: if there is no such folder or Hub repo, it holds no pipeline, or its scheduler does not say how
                the network was parametrised.
        """
        return Denoiser.of(load_pipeline(teacher))

    @staticmethod
    def of(pipeline: DiffusionPipeline) -> "Denoiser":
        """The denoiser in a pipeline of any family, with its VAE if it has one; from [`load_pipeline`]."""
        denoiser, vae = _family(type(pipeline.scheduler).__name__).from_pipeline(pipeline), get_vae(pipeline)
        if vae is not None:
            denoiser.__dict__["vae"] = vae.eval().requires_grad_(False)  # past nn.Module, which would adopt it
        return denoiser


def load_pipeline(teacher: str | Path) -> DiffusionPipeline:
    """
    A teacher's pipeline, without its safety checker.

    Args:
        teacher (`str` or `Path`): as for [`Denoiser.from_pretrained`].

    Raises:
        InputError: as there.
    """
    folder = find_pipeline(teacher)
    try:
        index = json.loads((folder / "model_index.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"teacher is {str(teacher)!r}, which holds no diffusers pipeline (model_index.json:"
            f" {error.__class__.__name__}); pass a folder written by save_pretrained."
        ) from error
    entry = index.get("scheduler") if isinstance(index, dict) else None
    name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if _family(name) is None:
        known = ", ".join(n for family in Denoiser.__subclasses__() for n in family.scheduler_classes)
        raise InputError(
            f"teacher is {str(teacher)!r}, whose scheduler ({name}) does not tell how its network was"
            f" parametrised; its model_index.json must name one of: {known}."
        )
    # a DiT in pixel space has no VAE, which diffusers wants to hear
    without = {"vae": None} if index.get("vae") == [None, None] else {}
    if "safety_checker" in index:
        for part in ("safety_checker", "feature_extractor"):  # the student's pipeline gets them when it is saved
            if (index.get(part) or [None])[0] is not None and not (folder / part).is_dir():
                raise InputError(
                    f"teacher is {str(teacher)!r}, whose {part} is missing; put that folder there, or write"
                    f' "{part}": [null, null] into its model_index.json.'
                )
        without |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        return DiffusionPipeline.from_pretrained(folder, **without)
    except Exception as error:
        fix = "pass a folder whose files are all there"
        if any(folder.glob("*/*.fp16.*")):
            fix = 'its weights are a variant: load it with variant="fp16", save it without, and pass that folder'
        reason = " ".join(str(error).split())
        raise InputError(f"teacher is {str(teacher)!r}, which diffusers cannot load ({reason}); {fix}.") from error


def _family(scheduler_class: str | None) -> type[Denoiser] | None:
    return next((f for f in Denoiser.__subclasses__() if scheduler_class in f.scheduler_classes), None)


def get_network(pipeline: DiffusionPipeline) -> nn.Module:
    """
    The network of a pipeline, its `unet` or `transformer`, which drops no labels.

    Raises:
        InputError: if the pipeline has another one.
    """
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if isinstance(pipeline, TEXT_TO_IMAGE):
        if network.config.in_channels != network.config.out_channels:
            raise InputError(
                f"teacher is a {type(pipeline).__name__} whose UNet takes {network.config.in_channels} channels and"
                f" gives {network.config.out_channels}, as for inpainting or editing; pass a text-to-image one."
            )
        return network
    if not isinstance(network, UNet2DModel | EDMUNet2DModel | DiTTransformer2DModel):
        raise InputError(
            f"teacher is a {type(pipeline).__name__} with a network of type {type(network).__name__}; pass a"
            " StableDiffusionPipeline, a StableDiffusionXLPipeline, or a pipeline whose `unet` or `transformer` is a"
            " UNet2DModel, EDMUNet2DModel or DiTTransformer2DModel."
        )
    return without_label_dropout(network)


def get_vae(pipeline: DiffusionPipeline) -> AutoencoderKL | VQModel | None:
    """
    The VAE of a pipeline in latent space, its `vae` or `vqvae`; `None` for one in pixel space.

    Raises:
        InputError: if it is of another kind, whose latents are scaled in another way.
    """
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if not isinstance(vae, AutoencoderKL | VQModel | None):
        raise InputError(
            f"teacher is a {type(pipeline).__name__} with a VAE of type {type(vae).__name__}; pass a pipeline whose"
            " VAE is an AutoencoderKL or VQModel."
        )
    return vae


def without_label_dropout(network: nn.Module) -> nn.Module:
    """Has a DiT see the labels that it is given, in place: in training mode it drops one in ten at random."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return network


def find_pipeline(teacher: str | Path) -> Path:
    """The folder of a teacher's pipeline: its own, that of a built-in one, or that to which it is downloaded."""
    if str(teacher) in BUILT_IN:
        return BUILT_IN[str(teacher)]
    folder = Path(teacher)
    try:
        if folder.is_dir():
            return folder
    except OSError as error:
        raise InputError(f"teacher is {str(teacher)!r}, which cannot be read ({error.strerror}).") from error
    missing = f"teacher is {str(teacher)!r}, which is neither a folder nor a repo on the Hub"
    fix = f"pass a folder, a Hub id, or one of the built-in teachers: {', '.join(BUILT_IN)}."
    if folder.is_absolute() or str(teacher).startswith(".") or folder.exists():
        raise InputError(f"teacher is {str(teacher)!r}, which is not a folder; {fix}")
    try:
        validate_repo_id(str(teacher))
        return Path(DiffusionPipeline.download(str(teacher)))
    except HFValidationError as error:
        raise InputError(f"{missing}; {fix}") from error
    except Exception as error:  # no network, no such repo, no permission
        raise InputError(f"{missing} that can be read from here ({type(error).__name__}); {fix}") from error
