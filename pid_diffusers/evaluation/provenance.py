"""What figures were measured of and on: the teacher, the hardware, the versions. None of it names a path."""

import os
import platform
from pathlib import Path

import accelerate
import diffusers
import torch
from huggingface_hub import ModelCard

from .. import __version__
from ..denoisers import Denoiser
from ..denoisers.base import BUILT_IN

CARD_FIELDS = ("license", "license_name", "license_link", "datasets")


def teacher_card(teacher: str) -> dict:
    """
    What a student inherits from its teacher's model card: license, license_name, license_link, datasets.

    Args:
        teacher (`str`): a folder, a Hub id, or the name of a built-in teacher, whose license is this package's.

    Returns:
        `dict`: without the fields that the card does not have; empty if there is no card that can be read.
    """
    if teacher in BUILT_IN:
        return {"license": "apache-2.0"}
    local = os.path.isdir(teacher)
    try:
        data = ModelCard.load(Path(teacher) / "README.md" if local else teacher).data
        card = {name: data.get(name) for name in CARD_FIELDS}
    except Exception:  # none there, none that can be reached, or none that is well-formed; a run needs none of it
        return {}
    card = {name: value for name, value in card.items() if value and _is_text(value)}
    if isinstance(card.get("license"), str):
        card["license"] = card["license"].lower()
    link = card.get("license_link")
    if link and not str(link).startswith(("http://", "https://")):  # a file beside the teacher's card
        if local:
            del card["license_link"]
        else:
            card["license_link"] = f"https://huggingface.co/{teacher}/blob/main/{link}"
    return card


def describe_teacher(name: str, teacher: Denoiser, card: dict) -> dict:
    """
    All that a model card says of the teacher, so that it can be written without the teacher.

    Args:
        name (`str`): the setting `teacher`. Of a folder only the last part of its path is kept.
        teacher (`Denoiser`): the teacher itself.
        card (`dict`): from [`teacher_card`].
    """
    source = "built-in" if name in BUILT_IN else "folder" if os.path.exists(name) else "hub"
    return {
        "name": os.path.basename(os.path.abspath(name)) if source == "folder" else name,
        "source": source,
        "family": type(teacher).__name__,
        "num_parameters": sum(parameter.numel() for parameter in teacher.parameters()),
        "sample_shape": list(teacher.sample_shape),
        "num_classes": teacher.num_classes,
        **card,
    }


def describe_compute(device: torch.device, num_processes: int, device_seconds: float) -> dict:
    """The hardware of a run, and its GPU hours or CPU core hours, of `device_seconds` summed over the processes."""
    hardware = {"device": device.type, "name": _device_name(device), "num_processes": num_processes}
    hours = device_seconds / 3600
    if device.type == "cpu":
        hardware["num_threads"] = torch.get_num_threads()
        return {"hardware": hardware, "cpu_core_hours": round(hours * hardware["num_threads"], 4)}
    return {"hardware": hardware, "gpu_hours": round(hours, 4)}


def versions() -> dict[str, str]:
    """Those of Python and of the libraries that figures depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "accelerate": accelerate.__version__,
        "pid_diffusers": __version__,
    }


def _is_text(value) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(item, str) for item in value)


def _device_name(device: torch.device) -> str:
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
