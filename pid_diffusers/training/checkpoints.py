"""Checkpoints that are either whole or not there."""

import json
import os
import re
import shutil
from pathlib import Path

from ..errors import InputError

STATE_FILE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def checkpoint_path(output_dir: Path, step: int) -> Path:
    return output_dir / f"checkpoint-{step}"


def partial_path(output_dir: Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete: beside its place, so that renaming moves no data."""
    return output_dir / f".checkpoint-{step}.partial"


def finish(partial: Path, final: Path, state: dict):
    """
    Completes a checkpoint: writes `state` with the size of every file, flushes all to the disk, renames into place.

    Args:
        partial (`Path`): the folder with the files written so far.
        final (`Path`): its place; a checkpoint that is there already is replaced.
        state (`dict`): what resuming needs beside the files.
    """
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(partial)): path.stat().st_size for path in files}
    (partial / STATE_FILE).write_text(json.dumps({**state, "files": sizes}, indent=2))
    for path in [*files, partial / STATE_FILE, partial]:
        flush(path)
    replace(partial, final)
    flush(final.parent)


def replace(source: Path, target: Path):
    """Moves a file or folder over another of the same kind; what was there goes only when the new one is in place."""
    if target.is_dir():
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
        os.rename(source, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(source, target)


def write_text(path: Path, text: str):
    """Writes a file beside its place and moves it in, so that a full disk leaves the one that was there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def flush(path: Path):
    """Has the operating system put a file or folder on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def missing_files(checkpoint: Path) -> list[str]:
    """What keeps a checkpoint from being complete; empty if nothing does."""
    try:
        files = json.loads((checkpoint / STATE_FILE).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return [STATE_FILE]
    return [name for name, size in files.items() if not _has_size(checkpoint / name, size)]


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    found.sort(key=lambda path: int(_NAME.fullmatch(path.name)[1]))
    return [path for path in found if not missing_files(path)]


def find_checkpoint(resume_from: str, output_dir: Path) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` means, `None` if it is `"latest"` and there is none yet.

    Raises:
        InputError: if the folder is absent or not a complete checkpoint.
    """
    if resume_from == "latest":
        found = list_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(resume_from)
    if not os.path.isdir(path) and os.path.isdir(output_dir / resume_from):
        path = output_dir / resume_from  # a bare name, as diffusers' scripts take it
    if not os.path.isdir(path):
        raise InputError(
            f"resume_from_checkpoint is {resume_from!r}, which is no folder; pass a checkpoint's folder or 'latest'."
        )
    missing = missing_files(path)
    if missing:
        raise InputError(
            f"resume_from_checkpoint is {resume_from!r}, which is not a complete checkpoint ({missing[0]} is missing"
            " or cut short); pass another one, or 'latest' for the newest that is complete."
        )
    newest = list_checkpoints(output_dir)[-1:]
    if newest and path.resolve().parent == output_dir.resolve() and path.resolve() != newest[0].resolve():
        raise InputError(
            f"resume_from_checkpoint is {resume_from!r}, but {newest[0].name} is newer and would be mixed up with what"
            " follows; move the newer ones away, or pass another --output_dir."
        )
    return path


def prune(output_dir: Path, limit: int | None):
    """Removes the oldest complete checkpoints until `limit` are left."""
    for path in list_checkpoints(output_dir)[: -limit if limit else 0]:
        leaving = path.with_name(f".{path.name}.partial")  # found by `remove_partial` should this be cut short
        os.rename(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)


def remove_partial(output_dir: Path):
    """Removes what a killed run left half-written, and puts a folder that it had moved aside back."""
    for path in output_dir.glob(".*.old"):
        target = path.with_name(path.name[1 : -len(".old")])
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    for path in output_dir.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
