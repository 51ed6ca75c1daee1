"""What a run is made of, from its settings and its teacher."""

import copy
import functools
import json
import os
from pathlib import Path

import diffusers
import torch
from accelerate import PartialState
from diffusers import AutoencoderTiny, DiTTransformer2DModel, UNet2DConditionModel
from torch import nn

from ..adapters import add_guidance_embedding, add_lora
from ..denoisers import Denoiser, GuidedDenoiser, VPDenoiser
from ..denoisers.base import TEXT_TO_IMAGE, load_pipeline, without_label_dropout
from ..errors import InputError
from ..losses import PIDLoss
from ..losses.distances import DecodedDistance, DigitLPIPS, get_distance
from ..schedulers import PIDScheduler
from ..text import PromptEmbeddings, PromptEncoder, load_prompts
from ..trajectory import TrajectoryModel
from .config import TrainingConfig
from .noise import draw_batch

# w of Stable Diffusion's own pipelines
DEFAULT_GUIDANCE_SCALE = 7.5
# of a UNet2DConditionModel: what it is told beside the time
TEXT_SETTINGS = (
    "cross_attention_dim",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
)


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


def create_teacher(config: TrainingConfig, source: str | None = None) -> Denoiser:
    """
    The teacher; a text-to-image one with its guidance and with the embeddings of all prompts, which its text encoders
    compute now, for the last time.

    Args:
        config (`TrainingConfig`): the settings.
        source (`str`, *optional*): what to load for `config.teacher`, where that is not what diffusers can load.

    Raises:
        InputError: if there is no such teacher, it is told no text but prompts are given, or the other way round, or
            there are no prompts where they should be.
    """
    pipeline = load_pipeline(source or config.teacher)
    denoiser = Denoiser.of(pipeline)
    if not isinstance(pipeline, TEXT_TO_IMAGE):
        if config.prompts is not None:
            raise InputError(
                f"prompts is {config.prompts!r}, but the teacher is a {type(pipeline).__name__}, which is told no"
                " text; leave it out."
            )
        return denoiser
    if not isinstance(denoiser, VPDenoiser):
        raise InputError(
            f"teacher is a {type(pipeline).__name__} with an {type(pipeline.scheduler).__name__}, whose guidance is"
            f" not known here; its scheduler must be one of {', '.join(VPDenoiser.scheduler_classes)}."
        )
    if config.prompts is None:
        raise InputError(
            f"prompts is missing; the teacher is a {type(pipeline).__name__}: pass --prompts with a text file, one"
            " prompt a line, or a dataset."
        )
    column, split = config.caption_column, config.dataset_split
    prompts = shown = load_prompts(config.prompts, column, config.max_prompts, config.streaming, split)
    enough = max(config.num_eval_samples, config.num_validation_images)
    if config.eval_prompts is not None:
        shown = load_prompts(config.eval_prompts, column, enough, config.streaming, split)
    shown = [*(config.validation_prompts or []), *shown[:enough]]
    encoder = PromptEncoder(pipeline)
    state = PartialState()
    with state.main_process_first():  # the others read what it has written
        compute = functools.partial(PromptEmbeddings.compute, encoder, device=state.device)
        embeddings, shown_embeddings = compute(prompts), compute(shown)
        with encoder.on(state.device):
            unconditional = encoder.encode_unconditional(config.negative_prompt)
    too_long = encoder.count_over_long(prompts)
    if too_long and state.is_main_process:
        print(f"{too_long} of {len(prompts)} prompts are longer than the tokenizer takes and were cut there.")
    scale = DEFAULT_GUIDANCE_SCALE if config.guidance_scale is None else config.guidance_scale
    scale = scale if config.guidance_range is None else tuple(config.guidance_range)
    constant = {}
    if encoder.is_xl:  # original size, corner of the crop, target size
        height, width = (pipeline.vae_scale_factor * side for side in denoiser.sample_shape[1:])
        constant["time_ids"] = torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)
    settings = (scale, config.guidance_rescale, shown_embeddings, constant)
    return GuidedDenoiser(denoiser, embeddings, unconditional, *settings)


def create_student(config: TrainingConfig, teacher: Denoiser) -> nn.Module:
    """A copy of the teacher's network in float32, a network of `student_config` with random weights, or with LoRA the
    teacher's network itself, with adapters; where w is left open, one that is told w."""
    if config.use_lora:
        network = teacher.unet
    elif config.student_config is None:
        network = copy.deepcopy(teacher.unet).float()
    else:
        network = _create_network(config, teacher)
    if config.guidance_range is not None:
        add_guidance_embedding(network)
    if config.use_lora:
        torch.manual_seed(config.seed)
        options = (config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
        add_lora(network, *options)
    return network


def _create_network(config: TrainingConfig, teacher: Denoiser) -> nn.Module:
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
    if issubclass(cls, UNet2DConditionModel):
        shared |= {name: teacher.unet.config[name] for name in TEXT_SETTINGS}
    else:
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
    if config.distance == "lpips" and config.lpips_network == "digits":
        distance = DigitLPIPS()
    else:
        distance = get_distance(config.distance, **options.get(config.distance, {}))
    if config.distance == "lpips" and teacher.vae is not None:
        vae = teacher.vae if config.lpips_decoder is None else _load_tiny_decoder(config.lpips_decoder, teacher)
        distance = DecodedDistance(distance, vae, config.lpips_batch_size)
    elif config.lpips_decoder is not None:
        raise InputError(
            f"lpips_decoder is {config.lpips_decoder!r}, but the teacher is not in latent space; leave it out."
        )
    weighting = teacher.loss_weighting if config.weighting is None else config.weighting
    return PIDLoss(config.scheme, distance, config.split_batch, weighting)


def _load_tiny_decoder(source: str, teacher: Denoiser) -> AutoencoderTiny:
    try:
        decoder, loading = AutoencoderTiny.from_pretrained(source, output_loading_info=True)
        if loading["missing_keys"]:  # diffusers would leave these weights random, with a warning
            raise ValueError(f"it lacks {loading['missing_keys'][0]}")
    except Exception as error:
        raise InputError(
            f"lpips_decoder is {source!r}, which cannot be loaded as an AutoencoderTiny"
            f" ({' '.join(str(error).split())}); pass a folder or Hub id such as madebyollin/taesd."
        ) from error
    channels = teacher.sample_shape[0]
    if decoder.config.latent_channels != channels:
        raise InputError(
            f"lpips_decoder is {source!r}, which decodes latents of {decoder.config.latent_channels} channels; the"
            f" teacher's have {channels}, pass one that was made for them."
        )
    return decoder


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
    digits = isinstance(teacher, GuidedDenoiser) or (shape[1:], known) == ((1, 8, 8), 10)  # prompts may ask for digits
    if config.eval_classifier == "digits" and not digits:
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
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    frozen = {p.data_ptr(): p.numel() for net in (student, teacher) for p in net.parameters() if not p.requires_grad}
    half = config.mixed_precision in ("fp16", "bf16")
    moments = 2 if config.optimizer == "adamw_8bit" else 8
    # float32 weights, gradients and moving averages
    state = trained * (4 + 4 + moments + 4 * len(config.ema_decays)) + sum(frozen.values()) * (2 if half else 4)
    if teacher.vae is not None:
        state += sum(p.numel() * p.element_size() for p in teacher.vae.parameters())
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
