"""Other people's checkpoints as `--teacher`, without a folder that somebody has to make first."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from .convert import ARGUMENTS_FILE, convert


@contextlib.contextmanager
def open_teacher(teacher: str) -> Iterator[tuple[str, str | None]]:
    """
    What `Denoiser.from_pretrained` loads for a setting `teacher`, and what was found if it had to be converted.

    Args:
        teacher (`str`): a file, or a folder with a bare state dict and its arguments, is converted into a temporary
            folder, which is gone afterwards; anything else stays as it is.

    Raises:
        InputError: if the checkpoint is not safe to read, or none that is known.
    """
    path = Path(teacher)
    try:
        bare = (path / ARGUMENTS_FILE).is_file() and not (path / "model_index.json").exists()
        foreign = path.is_file() or bare
    except OSError:  # a name too long for a file
        foreign = False
    if not foreign:
        yield teacher, None
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = os.path.join(temporary, path.stem)
        try:
            found = convert(path, folder, student=False)
        except InputError as error:
            raise InputError(str(error).replace("source is", "teacher is", 1)) from error
        yield folder, str(found).rsplit("\n", 1)[0]  # without where it was written
