"""The prompts to train on, from a text file or from whatever the `datasets` library loads."""

import difflib
import glob
import itertools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..errors import InputError

# lists that come with this package
BUILT_IN = Path(__file__).parent.parent / "assets" / "prompts"
# what `datasets` reads a file as; any other file is text with a prompt a line
BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
# what it says of tables without rows
_EMPTY = ("corresponds to no data", "BatchSize must be greater than 0")


def load_prompts(
    prompts: str,
    caption_column: str = "text",
    max_prompts: int | None = None,
    streaming: bool = False,
    split: str = "train",
) -> list[str]:
    """
    The prompts in a file or a data set, in their order, without the white space around them and without blank ones.

    Those that occur more than once stay: how often a prompt is drawn in training depends on it. Their embeddings are
    computed once all the same (`PromptEmbeddings`).

    Args:
        prompts (`str`):
            a text file (UTF-8, a prompt a line); a parquet, csv, json or jsonl file; a folder with such files, or with
            anything else that `datasets.load_dataset` takes; the id of a data set on the Hub; or one of the lists that
            come with this package, `"words"` and `"words-held-out"`.
        caption_column (`str`, defaults to `"text"`):
            where a data set has its captions: strings, or lists of strings, of which each counts as one.
        max_prompts (`int`, *optional*): only so many, the first ones.
        streaming (`bool`, defaults to `False`):
            read no more of a data set than `max_prompts` takes, which must be set then. A text file is always read so.
        split (`str`, defaults to `"train"`): of a data set. A single file has `"train"` only.

    Raises:
        InputError: if there is no such file, data set, column or split, if it cannot be read, or has no prompts, if a
            caption is not text, or if `max_prompts` is below 1 or missing.
    """
    if max_prompts is not None and max_prompts < 1:
        raise InputError(f"max_prompts is {max_prompts}; pass 1 or more, or leave it out for all.")
    if streaming and max_prompts is None:
        raise InputError(
            "streaming is on and max_prompts is None; set max_prompts, since embeddings are computed before training,"
            " once, of a list that has an end."
        )
    if (BUILT_IN / f"{prompts}.txt").is_file() and not os.path.exists(prompts):
        prompts = str(BUILT_IN / f"{prompts}.txt")
    suffix = Path(prompts).suffix.lower()
    if os.path.isfile(prompts) and os.path.getsize(prompts) == 0:
        found = iter(())  # some of the builders would raise StopIteration
    elif os.path.isfile(prompts) and suffix not in BUILDERS:
        found = _lines(prompts)
    elif os.path.exists(prompts) or _is_hub_id(prompts):
        found = _captions(prompts, caption_column, streaming, split)
    else:
        raise InputError(
            f"prompts is {prompts!r}, which is no file or folder; pass a text file, a parquet, csv, json or jsonl"
            " file, a folder with such files, or the id of a data set on the Hub."
        )
    found = list(itertools.islice((text for prompt in found if (text := prompt.strip())), max_prompts))
    if not found:
        raise InputError(f"prompts is {prompts!r}, which is empty; pass one with a prompt at least.")
    return found


def _is_hub_id(prompts: str) -> bool:
    """Whether something that is not on this disk may be on the Hub; `prompts.txt` could be, but is a mistyped file."""
    if Path(prompts).suffix.lower() in (".txt", *BUILDERS):
        return False
    try:
        validate_repo_id(prompts)
    except HFValidationError:
        return False
    return True


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig") as file:  # with or without the mark that Windows begins files with
            yield from file
    except UnicodeDecodeError as error:
        raise InputError(
            f"prompts is {path!r}, which is not UTF-8 text ({error.reason}); save it as UTF-8, a prompt a line."
        ) from error
    except OSError as error:
        raise InputError(f"prompts is {path!r}, which cannot be read ({error.strerror}); pass another.") from error


def _captions(prompts: str, column: str, streaming: bool, split: str) -> Iterator[str]:
    import datasets  # here, because it takes a second

    builder = BUILDERS.get(Path(prompts).suffix.lower()) if os.path.isfile(prompts) else None
    with _errors_in_a_sentence(prompts, split):
        if builder is not None:
            file = glob.escape(os.path.abspath(prompts))  # data_files are patterns
            dataset = datasets.load_dataset(builder, data_files=file, split=split, streaming=streaming)
        else:
            place = os.path.abspath(prompts) if os.path.exists(prompts) else prompts
            dataset = datasets.load_dataset(place, split=split, streaming=streaming)
        columns = dataset.column_names or list(next(iter(dataset), {}))  # a stream may not know before its first row
        if columns and column not in columns:
            near = difflib.get_close_matches(column, columns, n=1)
            fix = f"did you mean {near[0]!r}?" if near else "name the one with the captions."
            raise InputError(
                f"caption_column is {column!r}, but the columns of {prompts!r} are {', '.join(columns)}; {fix}"
            )
        if columns:
            dataset = dataset.select_columns(column)  # of a data set with images none is decoded
        for number, row in enumerate(dataset):
            value = row[column]
            for caption in value if isinstance(value, list) else [value]:
                if not isinstance(caption, str):
                    what = "missing" if caption is None else f"of type {type(caption).__name__}, not text"
                    raise InputError(
                        f"caption_column is {column!r}, in whose row {number} (the first is 0) a caption is {what};"
                        " name another column, or correct that row."
                    )
                yield caption


@contextmanager
def _errors_in_a_sentence(prompts: str, split: str):
    """Lets `datasets` log nothing, and makes an `InputError` of what it raises about the user's data."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # an error of generating the data set says nothing but its cause does
        is_wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ is not None
        reason = " ".join(str(error.__cause__ if is_wrapped else error).split()).rstrip(".")
        if any(text in reason for text in _EMPTY):
            raise InputError(f"prompts is {prompts!r}, which is empty; pass one with a prompt at least.") from error
        if re.match("Unknown split|Bad split|Split name", reason):
            raise InputError(
                f"dataset_split is {split!r}, which {prompts!r} does not have ({reason}); pass one that it has."
            ) from error
        if os.path.exists(prompts):
            raise InputError(
                f"prompts is {prompts!r}, which cannot be loaded ({reason}); pass a text file with a prompt a line, or"
                " a file or folder that datasets.load_dataset takes."
            ) from error
        raise InputError(
            f"prompts is {prompts!r}, which is no file or folder here and cannot be loaded from the Hub ({reason});"
            " check its name, or pass a file."
        ) from error
    finally:
        datasets.logging.set_verbosity(verbosity)
