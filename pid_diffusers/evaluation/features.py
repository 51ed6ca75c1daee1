"""Features of many images, written part by part, so that an interrupted evaluation continues."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from ..errors import InputError
from .extractors import extract

# images in a part, and in a call of the extractor, whatever the batch size is
PART = 64
_PARTIAL_PROTOCOL = "protocol.json.partial"


class Images(Protocol):
    """Images that are numbered from 0, of which any can be had at any time."""

    def __len__(self) -> int: ...

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """Those from `first` to before `last`, in order, some at a time: uint8, `(B, C, H, W)`, on the CPU."""


def write_features(
    images: Images,
    extractor: nn.Module,
    folder: Path,
    state: PartialState,
    device: torch.device,
    description: str,
    pictures: Path | None = None,
    score: Callable[[torch.Tensor, range], torch.Tensor] | None = None,
    first_number: int = 0,
):
    """
    Extracts the features of `images` into files of 64 images each, those that are not there yet. The processes share
    the work. A file has the same bits whoever writes it: the extractor always sees the same 64 images.

    Args:
        images (`Images`): where they come from.
        extractor (`nn.Module`): on `device`.
        folder (`Path`): where the files are written, complete or not at all.
        state (`PartialState`): the processes.
        description (`str`): of the progress bar.
        pictures (`Path`, *optional*): a folder to save the images to as PNGs, named by their numbers.
        score (`Callable`, *optional*): called with images on `device` and their numbers; what it returns, `(B,)`, is
            kept as `similarity`.
        first_number (`int`, defaults to 0): the name of the first picture.
    """
    missing = [None]
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [[part for part in range(-(-len(images) // PART)) if not _is_complete(folder, part)]]
    missing = broadcast_object_list(missing)[0]
    share = -(-len(missing) // state.num_processes)
    mine = missing[state.process_index * share : (state.process_index + 1) * share]
    total = sum(min(PART, len(images) - part * PART) for part in mine)
    with tqdm(total=total, desc=description, unit="image", disable=not state.is_main_process) as progress:
        for first, last in _runs(mine):
            for part, batch in enumerate(_parts(images, first * PART, min(last * PART, len(images))), first):
                numbers = range(part * PART, part * PART + len(batch))
                if pictures is not None:
                    _save_pictures(batch, pictures, [first_number + number for number in numbers])
                padding = batch[-1:].expand(PART - len(batch), -1, -1, -1)
                padded = torch.cat([batch, padding]).to(device)
                with torch.no_grad():
                    found = extract(extractor, padded)
                    if score is not None:
                        found["similarity"] = score(padded, range(numbers.start, numbers.start + PART))
                found = {name: value[: len(batch)].cpu().contiguous() for name, value in found.items()}
                partial = folder / f"{_name(part)}.partial"
                save_file(found, partial)
                partial.replace(folder / _name(part))
                progress.update(len(batch))
    state.wait_for_everyone()


def read_features(folder: Path) -> dict[str, torch.Tensor]:
    """What [`write_features`] has written, in the order of the images: `features` of shape `(N, D)`, and others."""
    parts = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def open_work_folder(folder: Path, protocol: dict, state: PartialState):
    """
    Makes a folder for an evaluation, or opens that of one that was interrupted.

    Raises:
        InputError: if it is that of another evaluation.
    """
    path = folder / "protocol.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"output has a work folder beside it, {folder.name}, whose {path.name} cannot be read; remove the"
                " folder, or pass another output."
            ) from error
        changed = sorted(name for name in protocol | before if protocol.get(name) != before.get(name))
        if changed:
            raise InputError(
                f"output has a work folder beside it, {folder.name}, of an evaluation with another"
                f" {', '.join(changed)}; remove it, or pass another output."
            )
    elif folder.exists() and any(file.name != _PARTIAL_PROTOCOL for file in folder.iterdir()):
        raise InputError(
            f"output needs a work folder beside it, but {folder.name} has other files; pass another output."
        )
    state.wait_for_everyone()  # all have looked before one writes
    if state.is_main_process and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / _PARTIAL_PROTOCOL
        partial.write_text(json.dumps(protocol, indent=2), encoding="utf-8")
        partial.replace(path)
    state.wait_for_everyone()


def _parts(images: Images, first: int, last: int) -> Iterator[torch.Tensor]:
    """Streams images in parts of 64, `(64, C, H, W)` but for the last."""
    waiting, count = [], 0
    for batch in images.stream(first, last):
        waiting.append(batch)
        count += len(batch)
        while count >= PART:
            ready = torch.cat(waiting)
            yield ready[:PART]
            waiting, count = [ready[PART:]], count - PART
    if count:
        yield torch.cat(waiting)


def _runs(parts: list[int]) -> list[tuple[int, int]]:
    """Ranges [first, last) of consecutive numbers."""
    runs = []
    for part in parts:
        if runs and runs[-1][1] == part:
            runs[-1] = (runs[-1][0], part + 1)
        else:
            runs.append((part, part + 1))
    return runs


def _save_pictures(images: torch.Tensor, folder: Path, numbers: list[int]):
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in zip(numbers, images, strict=True):
        pixels = image[0] if len(image) == 1 else image.permute(1, 2, 0)
        Image.fromarray(pixels.contiguous().numpy()).save(folder / f"{number:06d}.png")


def _name(part: int) -> str:
    return f"{part:06d}.safetensors"


def _is_complete(folder: Path, part: int) -> bool:
    try:
        with safe_open(folder / _name(part), "pt"):
            return True
    except (FileNotFoundError, SafetensorError):  # a part can be cut off when the power fails
        return False
