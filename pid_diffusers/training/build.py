"""What a run is made of, from its settings and its teacher."""

import copy
import json
import os
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ..denoisers import Denoiser
from ..denoisers.base import without_label_dropout
from ..errors import InputError
from ..losses import PIDLoss
from ..losses.distances import get_distance
from ..schedulers import PIDScheduler
from ..trajectory import TrajectoryModel
from .config import TrainingConfig
from .noise import draw_batch


def create_scheduler(config: TrainingConfig, teacher: Denoiser) -> PIDScheduler:
    """The teacher's own range, head and time conditioning, unless the settings say otherwise."""
    levels = teacher.trajectory_config
    if levels.get("timestep_type") == "discrete":  # beyond its steps such a network cannot be told where it is
        for name in ("sigma_min", "sigma_max"):
            value = getattr(config, name)
            if value is not None and not levels["sigma_min"] <= value <= levels["sigma_max"]:
                raise InputError(
                    f"{name} is {value}; the teacher's steps have the noise levels {levels['sigma_min']:g} to"
                    f" {levels['sigma_max']:g}, so choose one of these or leave it out."
                )
    settings = {"num_train_timesteps": config.num_train_timesteps, "rho": config.rho, **teacher.trajectory_config}
    for name in ("sigma_min", "sigma_max", "sigma_data", "prediction_type"):
        if getattr(config, name) is not None:
            settings[name] = getattr(config, name)
    try:
        return PIDScheduler(**settings)
    except ValueError as error:
        raise InputError(str(error)) from error
    except OverflowError as error:
        raise InputError(
            f"rho is {config.rho}, for which the grid cannot be computed; pass a number near 7."
        ) from error


def create_student(config: TrainingConfig, teacher: Denoiser) -> nn.Module:
    """A copy of the teacher's network in float32, or a network of `student_config` with random weights."""
    if config.student_config is None:
        return copy.deepcopy(teacher.unet).float()
    path = Path(config.student_config)
    path = path / "config.json" if os.path.isdir(path) else path
    try:
        settings = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"student_config is {config.student_config!r}, which cannot be read as JSON ({error.__class__.__name__});"
            " pass a UNet's config.json."
        ) from error
    name = settings.get("_class_name", type(teacher.unet).__name__)
    cls = type(teacher.unet) if name == type(teacher.unet).__name__ else getattr(diffusers, str(name), None)
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise InputError(f"student_config is {config.student_config!r}, whose _class_name, {name}, is no model class.")
    # What goes in and out is the teacher's: a student answers to the same images and conditions.
    shared = {name: teacher.unet.config[name] for name in ("sample_size", "in_channels", "out_channels")}
    classes = "num_embeds_ada_norm" if issubclass(cls, DiTTransformer2DModel) else "num_class_embeds"
    shared[classes] = teacher.num_classes
    if settings.get("out_channels") is None:  # a DiT's way to say "as many as go in"
        settings.pop("out_channels", None)
    shared["out_channels"] = shared["out_channels"] or shared["in_channels"]
    for key, value in shared.items():
        if settings.setdefault(key, value) != value:
            raise InputError(f"student_config sets {key} to {settings[key]!r}; the teacher's is {value!r}, use that.")
    torch.manual_seed(config.seed)
    try:
        return without_label_dropout(cls.from_config(settings))
    except Exception as error:
        raise InputError(
            f"student_config is {config.student_config!r}, from which no {name} can be built"
            f" ({' '.join(str(error).split())}); pass a UNet's config.json."
        ) from error


def create_loss(config: TrainingConfig, teacher: Denoiser) -> PIDLoss:
    """The loss with its scheme and distance, weighted as it suits the teacher unless the settings say otherwise."""
    options = {"pseudo_huber": {"c": config.huber_c}, "lpips": {"vgg_weights": config.lpips_vgg_weights}}
    distance = get_distance(config.distance, **options.get(config.distance, {}))
    weighting = teacher.loss_weighting if config.weighting is None else config.weighting
    return PIDLoss(config.scheme, distance, config.split_batch, weighting)


def check_fit(config: TrainingConfig, student: TrajectoryModel, teacher: Denoiser, loss: PIDLoss) -> int:
    """
    Evaluates the loss once, so that what does not fit together is found before anything is written.

    Returns:
        `int`: the bytes that one start of a batch keeps for the backward pass, in float32.

    Raises:
        InputError: if a network cannot be evaluated, or the validation's classes or classifier are not the teacher's.
    """
    labels, known = config.validation_class_labels, teacher.num_classes
    if labels is not None and (known is None or not all(0 <= label < known for label in labels)):
        fix = "the teacher is unconditional, leave it out" if known is None else f"use 0 to {known - 1}"
        raise InputError(f"validation_class_labels is {labels}; {fix}.")
    try:
        shape = (1, *teacher.sample_shape)
        sigma_max = student.scheduler.config.sigma_max
        z, indices, generator = draw_batch(shape, sigma_max, config.num_train_timesteps, (0, 0, 0, 0), "cpu")
        of_batch = (student, teacher, loss)
        weights = {p.untyped_storage().data_ptr() for module in of_batch for p in module.parameters()}
        kept = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss(student, teacher, z, indices, **teacher.draw_condition(1, generator))
    except InputError:
        raise
    except Exception as error:
        what = "teacher" if config.student_config is None else "student_config"
        raise InputError(
            f"{what} is {getattr(config, what)!r}, whose network cannot be evaluated on images of its own size"
            f" ({error.__class__.__name__}: {' '.join(str(error).split())}); pass another one."
        ) from error
    if config.eval_classifier == "digits" and (shape[1:], known) != ((1, 8, 8), 10):
        raise InputError(
            "eval_classifier is 'digits', which reads images of shape (1, 8, 8) in 10 classes; the teacher's have"
            f" shape {shape[1:]} in {known or 'no'} classes, so pass --eval_classifier none."
        )
    return sum(size for pointer, size in kept.items() if pointer not in weights)


def estimate_memory(config: TrainingConfig, student: nn.Module, teacher: nn.Module, bytes_per_start: int) -> str:
    """What training will keep in a process's memory, roughly; libraries and buffers of their own come on top.

    Args:
        student, teacher (`nn.Module`): the networks.
        bytes_per_start (`int`): from [`check_fit`].
    """
    weights, of_teacher = (sum(p.numel() for p in network.parameters()) for network in (student, teacher))
    half = config.mixed_precision in ("fp16", "bf16")
    # float32 weights, gradients, two moments, and the moving averages
    state = 4 * weights * (4 + len(config.ema_decays)) + of_teacher * (2 if half else 4)
    activations = bytes_per_start * config.train_batch_size // (2 if half else 1)
    return (
        f"about {_bytes(state + activations)} a process: {_bytes(state)} for weights, optimizer and averages,"
        f" {_bytes(activations)} for a batch of {config.train_batch_size}"
    )


def _bytes(number: int) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000 or unit == "GB":
            return f"{number:.3g} {unit}" if unit != "bytes" else f"{number} bytes"
        number /= 1000
