"""Checkpoints of others as diffusers pipelines: teachers of EDM and OpenAI, and students of PID's authors."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    EDMEulerScheduler,
    UNet2DModel,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..errors import InputError
from ..hub.card import write_card
from ..models.edm_weights import adm_class, adm_config, convert_adm_state_dict, convert_song_state_dict, song_config
from ..models.unet_edm import EDMUNet2DModel
from ..pipelines import OneStepPIDPipeline
from ..schedulers import PIDScheduler
from .edm import EDMNetwork, check_preconditioning, complete, from_pickle, from_state_dict, is_edm_state_dict
from .openai import convert_openai_state_dict, is_openai_state_dict, name_tells, openai_config
from .safe_pickle import TensorRecord, UnreadableFile, read_checkpoint, shorten, tensors

WEIGHTS_FILE, ARGUMENTS_FILE = "model.safetensors", "init_kwargs.json"
EDM_URL = "https://github.com/NVlabs/edm"
OPENAI_URL = "https://github.com/openai/consistency_models"
PID_URL = "https://github.com/pantheon5100/pid_diffusion"
# of the weights that NVIDIA and OpenAI released, as their repositories say
EDM_LICENSE, OPENAI_LICENSE = "cc-by-nc-sa-4.0", "mit"
# as PID's code names what it saves (and its CIFAR-10 student)
_STUDENT_NAME = re.compile(r"(ema_[\d.]+_\d+|model\d+|pid_\w+)\.pt")


@dataclass(frozen=True)
class ConversionReport:
    """
    What was found in a checkpoint, and where its pipeline was written.

    Attributes:
        source (`str`): the file's or folder's name.
        family (`str`): whose network it is.
        architecture (`str`): the network, by its own name.
        preconditioning (`str`): what it is scaled by and how it is told the noise level.
        image_size, channels (`int`), classes (`int`, *optional*): of its images; `None` if it is unconditional.
        parameters (`int`): how many numbers were learned.
        license (`str`, *optional*): an identifier of the Hub; `None` if it is not known.
        pipeline (`str`): what was written.
        output (`str`): the folder.
        note (`str`, *optional*): what to keep in mind of it.
    """

    source: str
    family: str
    architecture: str
    preconditioning: str
    image_size: int
    channels: int
    classes: int | None
    parameters: int
    license: str | None
    pipeline: str
    output: str
    note: str | None = None

    def __str__(self) -> str:
        lines = {
            "Found": f"{self.family}, {self.architecture}, {self.parameters:,} parameters",
            "Images": f"{self.image_size} × {self.image_size}, {self.channels} channels, "
            + (f"{self.classes} classes" if self.classes else "unconditional"),
            "Network": self.preconditioning,
            "License": self.license or "not known",
            "Note": self.note,
            "Wrote": f"{self.output} ({self.pipeline})",
        }
        return "\n".join(f"{name + ':':<9}{text}" for name, text in lines.items() if text)


@dataclass
class _Conversion:
    """A network that is ready to be written, and what is said of it."""

    network: nn.Module
    pipeline: DiffusionPipeline
    family: str
    architecture: str
    preconditioning: str
    url: str
    license: str | None
    kind: str = "diffusion model"
    note: str | None = None


def convert(
    source: str | Path,
    output: str | Path,
    student: bool | None = None,
    image_size: int | None = None,
    license: str | None = None,
) -> ConversionReport:
    """
    Writes someone else's checkpoint as a diffusers pipeline with a model card.

    Nothing in the checkpoint is run: a pickle is read as data ([`read_checkpoint`]).

    Args:
        source (`str` or `Path`): one of: EDM's pickle with a network in EDMPrecond; a folder with the parameters of
            such a network, `model.safetensors`, and the arguments of its EDMPrecond, `init_kwargs.json`; a state dict
            of EDM's code by torch.save; OpenAI's `edm_*.pt`, `cd_*.pt` and `ct_*.pt`; a student of PID's authors,
            `model*.pt` or `ema_*.pt`.
        output (`str` or `Path`): a folder that is absent or empty.
        student (`bool`, *optional*): whether it is a student of PID's authors; by default as the file is named.
        image_size (`int`, *optional*): of OpenAI's networks, which do not tell it; by default that for which attention
            begins at 32 × 32, as in all that were released.
        license (`str`, *optional*): the weights' license, as an identifier of the Hub; by default that of the weights
            that NVIDIA or OpenAI released.

    Returns:
        [`ConversionReport`]

    Raises:
        InputError: if the source is no such checkpoint or is not safe to read, or the output cannot be written.
    """
    source, output = Path(source), Path(output)
    _check_output(output)
    if image_size is not None and image_size < 1:
        raise InputError(f"image_size is {image_size}; pass the height of the images in pixels.")
    try:
        conversion = _read(source, student, image_size)
    except UnreadableFile as error:
        raise InputError(f"source is {str(source)!r}, which {error}; {error.fix}.") from error
    except OSError as error:
        raise InputError(f"source is {str(source)!r}, which cannot be read ({error.strerror}).") from error
    license = conversion.license if license is None else license
    config = conversion.network.config
    report = ConversionReport(
        source=source.resolve().name,
        family=conversion.family,
        architecture=conversion.architecture,
        preconditioning=conversion.preconditioning,
        image_size=config.sample_size,
        channels=config.in_channels,
        classes=config.num_class_embeds,
        parameters=sum(parameter.numel() for parameter in conversion.network.parameters()),
        license=license,
        pipeline=type(conversion.pipeline).__name__,
        output=str(output),
        note=conversion.note,
    )
    try:
        _write(output, conversion, report)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"output is {str(output)!r}, which cannot be written ({_sentence(error)}); pass a folder where there is"
            " room."
        ) from error
    return report


def _check_output(output: Path):
    try:
        free = not output.exists() or output.is_dir() and not any(output.iterdir())
    except OSError as error:
        raise InputError(f"output is {str(output)!r}, which cannot be written ({error.strerror}).") from error
    if not free or output.is_symlink():
        raise InputError(f"output is {str(output)!r}, which is there already; pass a folder that is absent or empty.")


def _read(source: Path, student: bool | None, image_size: int | None) -> _Conversion:
    if not source.exists():
        raise UnreadableFile("does not exist", "pass a file or a folder")
    if source.is_dir():
        return _convert_edm(_read_folder(source), bool(student))
    if not source.is_file():
        raise UnreadableFile("is neither a file nor a folder")
    content, size = read_checkpoint(source), source.stat().st_size
    records = content if isinstance(content, dict) else {}
    if records and all(isinstance(name, str) and isinstance(r, TensorRecord) for name, r in records.items()):
        if is_edm_state_dict(records):
            student = _STUDENT_NAME.fullmatch(source.name) is not None if student is None else student
            network = from_state_dict(records)
            network.state_dict = tensors(network.state_dict, size)
            return _convert_edm(network, student)
        if is_openai_state_dict(records):
            config = openai_config(records, image_size)
            return _convert_openai(config, tensors(records, size), bool(student), source.name)
        raise UnreadableFile(
            "holds a state dict of an architecture that is not known (its first parameter is"
            f" {shorten(next(iter(records)))})"
        )
    network = from_pickle(content)
    network.state_dict = tensors(network.state_dict, size)
    return _convert_edm(network, bool(student))


def _read_folder(folder: Path) -> EDMNetwork:
    if (folder / "model_index.json").is_file():
        raise UnreadableFile("is a diffusers pipeline already", "use it as it is")
    for name in (WEIGHTS_FILE, ARGUMENTS_FILE):
        if not (folder / name).is_file():
            raise UnreadableFile(f"is a folder without {name}")
    try:
        kwargs = json.loads((folder / ARGUMENTS_FILE).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(f"has an {ARGUMENTS_FILE} that is no JSON") from error
    if not isinstance(kwargs, dict):
        raise UnreadableFile(f"has an {ARGUMENTS_FILE} that is no JSON object")
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, ValueError) as error:
        raise UnreadableFile(f"has a {WEIGHTS_FILE} that is cut short or damaged") from error
    for name, tensor in weights.items():
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UnreadableFile(f"has values in {shorten(name)} that are no finite floating-point numbers")
    check_preconditioning(kwargs.pop("precond", "EDMPrecond"))
    return EDMNetwork(complete(kwargs), {name: tensor.to(torch.float32) for name, tensor in weights.items()})


def _convert_edm(source: EDMNetwork, student: bool) -> _Conversion:
    kwargs = source.init_kwargs
    # The file's dropout was its training's. Neither a teacher nor a student has any (PID, table 6).
    arguments = {**kwargs, "dropout": 0.0, "label_dropout": 0}
    try:
        if kwargs["model_type"] == "SongUNet":
            config = song_config(arguments)
            kind, weights = EDMUNet2DModel, convert_song_state_dict(source.state_dict, config)
        else:
            config = adm_config(arguments)
            kind, weights = adm_class(config), convert_adm_state_dict(source.state_dict, config)
    except (ValueError, IndexError, RuntimeError) as error:  # the latter two: a weight of too few dimensions
        raise UnreadableFile(f"has a network that cannot be converted ({_sentence(error)})") from error
    network = _build(kind, config, weights)
    if student:
        return _Conversion(
            network,
            OneStepPIDPipeline(network, _student_scheduler(kwargs["sigma_data"])),
            family="PID student",
            architecture=source.architecture,
            preconditioning=_STUDENT_PRECONDITIONING,
            url=PID_URL,
            license=EDM_LICENSE,
            note="its training began with EDM's weights, whose license it therefore has",
        )
    sigma_data = kwargs["sigma_data"]
    return _Conversion(
        network,
        ConsistencyModelPipeline(network, EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=sigma_data)),
        family="EDM",
        architecture=source.architecture,
        preconditioning=f"EDMPrecond, σ_data = {sigma_data:g}, told ln(σ)/4",
        url=EDM_URL,
        license=EDM_LICENSE,
    )


def _convert_openai(config: dict, weights: dict, student: bool, file_name: str) -> _Conversion:
    network = _build(UNet2DModel, config, convert_openai_state_dict(weights, config))
    architecture = "guided-diffusion UNetModel"
    if student:
        return _Conversion(
            network,
            OneStepPIDPipeline(network, _student_scheduler(0.5)),
            family="PID student",
            architecture=architecture,
            preconditioning=_STUDENT_PRECONDITIONING,
            url=PID_URL,
            license=None,
        )
    kind, num_train_timesteps = name_tells(file_name)
    note = None
    if kind != "EDM":
        note = (
            "a consistency model estimates the end of the trajectory, not the expected image: as a teacher it"
            " describes a different flow than the diffusion model that it was made from"
        )
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=num_train_timesteps, sigma_min=0.002, sigma_max=80.0
    )
    return _Conversion(
        network,
        ConsistencyModelPipeline(network, scheduler),
        family="OpenAI consistency models",
        architecture=architecture,
        preconditioning="EDM's, σ_data = 0.5, told 250 ln(σ)",
        url=OPENAI_URL,
        license=OPENAI_LICENSE,
        kind="diffusion model" if kind == "EDM" else f"consistency model ({kind})",
        note=note,
    )


_STUDENT_PRECONDITIONING = "x_θ = (σ/T) z + (1−σ/T) F_θ, T = 80, told ln(σ)/4"


def _student_scheduler(sigma_data: float) -> PIDScheduler:
    # OneShotDenoiser of PID's code: the network sees z/√(σ_data² + 80²), and its output is X_θ.
    return PIDScheduler(
        num_train_timesteps=250,
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=sigma_data,
        prediction_type="sample",
        timestep_type="edm",
    )


def _build(kind: type, config: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """
    The network with these weights, made only after they are known to fit: what a file says of a network's size costs
    nothing before.
    """
    try:
        with torch.device("meta"):
            expected = kind(**config).state_dict()
    except (ValueError, RuntimeError, TypeError) as error:
        raise UnreadableFile(f"has a network that cannot be built ({_sentence(error)})") from error
    for name, tensor in expected.items():
        if name not in weights:
            raise UnreadableFile(f"has no weights for {name} of its {kind.__name__}")
        if weights[name].shape != tensor.shape:
            raise UnreadableFile(
                f"has weights of shape {tuple(weights[name].shape)} for {name} of its {kind.__name__}, which is"
                f" {tuple(tensor.shape)}"
            )
    unused = sorted(set(weights) - set(expected))
    if unused:
        raise UnreadableFile(f"has weights for {shorten(unused[0])}, which its {kind.__name__} has not")
    network = kind(**config)
    network.load_state_dict(weights)
    return network.eval()


def _write(output: Path, conversion: _Conversion, report: ConversionReport):
    """All of it beside its place, renamed into it when complete."""
    partial = output.with_name(f".{output.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        conversion.pipeline.save_pretrained(partial)
        (partial / "results.json").write_text(json.dumps(_results(conversion, report), indent=2) + "\n")
        write_card(partial, output.resolve().name)
        if output.is_dir():
            output.rmdir()
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _results(conversion: _Conversion, report: ConversionReport) -> dict:
    """What the card says of it."""
    results = {
        "num_parameters": report.parameters,
        "converted_from": {
            "file": report.source,
            "family": report.family,
            "kind": conversion.kind,
            "architecture": report.architecture,
            "url": conversion.url,
        },
    }
    if isinstance(conversion.pipeline, OneStepPIDPipeline):
        teacher = "EDM" if conversion.license else "not named in its file"
        return {**results, "teacher": {"name": teacher, "source": "conversion", "license": report.license}}
    results["license"] = report.license
    if report.note:
        results["limits"] = f"Those of the data that it was trained on. And: {report.note}."
    return results


def _sentence(error: Exception) -> str:
    return shorten(" ".join(str(error).split()).rstrip("."), 300)
