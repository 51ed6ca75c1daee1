"""The real images, or what is known of them, that generated ones are measured against."""

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from .digits import load_digits
from .metrics import Gaussian

# what Pillow calls 8-bit images of one and of three channels
_CHANNELS = {"1": 1, "L": 1, "RGB": 3, "P": 3, "CMYK": 3, "YCbCr": 3}
_BUILDERS = {".parquet": "parquet", ".arrow": "arrow"}
_FILES = (".npz", ".safetensors", ".zip", ".tar", *_BUILDERS)
_NUM_NAMED = 5
# what Pillow raises of a broken file
_UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class DigitImages:
    """scikit-learn's digits, all of them, as uint8: what `reference` calls `digits`."""

    def __init__(self):
        self.pixels = ((load_digits()[0] + 1) * 127.5).round().to(torch.uint8)
        self.shape = tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def digest(self) -> str:
        """SHA-256 of the pixels."""
        return hashlib.sha256(self.pixels.numpy()).hexdigest()

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """The images from `first` to before `last`: uint8, `(B, 1, 8, 8)`."""
        yield self.pixels[first:last]


class ImageFolder:
    """
    The images below a folder, at any depth, in the order of their paths; files of other kinds are left out.

    Gray images among RGB ones count as RGB, as `shape` says; all have the same size.

    Raises:
        InputError: if there are none, or if some cannot be read, have another size, more than 8 bits or transparency.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        endings = Image.registered_extensions()
        self.paths = sorted(
            path for path in self.folder.rglob("*") if path.suffix.lower() in endings and path.is_file()
        )
        if not self.paths:
            raise InputError(f"reference is {str(folder)!r}, in which there are no images; pass a folder with some.")
        sizes, modes = {}, {}
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    sizes.setdefault(image.size, path)
                    modes.setdefault(image.mode, path)
            except _UNREADABLE:
                self._refuse_unreadable()
        self.shape = _shape(sizes, modes, str(folder), lambda path: str(path.relative_to(self.folder)))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def digest(self) -> str:
        """SHA-256 of the names of the files in the folder and of their bytes: that of any copy of the folder."""
        content = hashlib.sha256()
        for path in self.paths:
            with path.open("rb") as file:
                content.update(hashlib.file_digest(file, "sha256").digest())
            content.update(os.fsencode(path.relative_to(self.folder).as_posix()) + b"\0")
        return content.hexdigest()

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """The images from `first` to before `last`, one at a time: uint8, `(1, C, H, W)`."""
        for path in self.paths[first:last]:
            try:
                with Image.open(path) as image:
                    yield _to_tensor(image, self.shape[0])
            except _UNREADABLE:
                self._refuse_unreadable()

    def _refuse_unreadable(self):
        broken = []
        for path in self.paths:
            try:
                with Image.open(path) as image:
                    image.load()
            except _UNREADABLE:
                broken.append(str(path.relative_to(self.folder)))
        raise _unreadable(str(self.folder), len(self), broken)


class ImageArray:
    """Images in memory, uint8 `(N, H, W, C)`, such as `arr_0` of ADM's files."""

    def __init__(self, images: np.ndarray, name: str):
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) == 0:
            raise InputError(
                f"reference is {name!r}, whose arr_0 has shape {images.shape} and type {images.dtype}; it must be"
                " uint8 images (N, H, W, 3)."
            )
        self.images = np.ascontiguousarray(images)
        self.shape = (images.shape[3], *images.shape[1:3])

    def __len__(self) -> int:
        return len(self.images)

    @property
    def digest(self) -> str:
        """Changes if the images do."""
        return hashlib.sha256(self.images).hexdigest()

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """The images from `first` to before `last`, one at a time: uint8, `(1, C, H, W)`."""
        for image in self.images[first:last]:
            yield torch.from_numpy(image.transpose(2, 0, 1)[None].copy())


class DatasetImages:
    """
    The images of a data set of the `datasets` library, by its Hub id, or in a local file or folder.

    Args:
        name (`str`): a Hub id, a .parquet or .arrow file, or a folder that `datasets.load_dataset` takes.
        split (`str`, defaults to `"train"`), column (`str`, *optional*): default: the first one with images.

    Raises:
        InputError: if it cannot be loaded, has no such column, rows without an image or with one that cannot be read,
            or images of several sizes.
    """

    def __init__(self, name: str, split: str = "train", column: str | None = None):
        import datasets  # here, because it takes a second

        builder = _BUILDERS.get(Path(name).suffix.lower()) if os.path.isfile(name) else None
        try:
            if builder:
                self.dataset = datasets.load_dataset(
                    builder, data_files=glob.escape(os.path.abspath(name)), split=split
                )
            else:
                place = os.path.abspath(name) if os.path.exists(name) else name
                self.dataset = datasets.load_dataset(place, split=split)
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error.__cause__ or error).split()).rstrip(".")[:300]
            raise InputError(
                f"reference is {name!r}, which cannot be loaded ({reason}); pass a folder of images, a data set, or a"
                " statistics file (.npz)."
            ) from error
        with_images = [key for key, value in self.dataset.features.items() if isinstance(value, datasets.Image)]
        if not with_images or column not in (None, *with_images):
            raise InputError(
                f"reference_column is {column!r}, but {name!r} has images in {', '.join(with_images) or 'no column'};"
                " name one that has."
            )
        self.name, self.column = name, column or with_images[0]
        self.dataset = self.dataset.select_columns(self.column)
        if len(self.dataset) == 0:
            raise InputError(f"reference is {name!r}, whose split {split!r} is empty; pass one with images.")
        sizes, modes, broken = {}, {}, []
        for number in range(len(self)):
            image = self._image(number)
            if image is None:
                broken.append(f"row {number}")
                continue
            sizes.setdefault(image.size, number)
            modes.setdefault(image.mode, number)
        if broken:
            self._refuse_unreadable(broken)
        self.shape = _shape(sizes, modes, name, lambda number: f"row {number}")

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def digest(self) -> str:
        """Changes if the data set does."""
        return hashlib.sha256(f"{self.dataset._fingerprint} {len(self)} {self.column}".encode()).hexdigest()

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """The images from `first` to before `last`, one at a time: uint8, `(1, C, H, W)`."""
        for number in range(first, last):
            image = self._image(number)
            if image is None:  # files that a data set refers to can change
                self._refuse_unreadable([f"row {number}"])
            yield _to_tensor(image, self.shape[0])

    def _image(self, number: int) -> Image.Image | None:
        """That of a row; `None` if it has none, or one that cannot be read."""
        try:
            return self.dataset[number][self.column]
        except _UNREADABLE:
            return None

    def _refuse_unreadable(self, broken: list[str]):
        raise _unreadable(self.name, len(self), broken, note="; the first is row 0")


@dataclass
class Reference:
    """
    What samples are measured against; of images, features are extracted later.

    Attributes:
        name (`str`): as it was given.
        kind (`str`): `folder`, `dataset`, `statistics` or `features`.
        images (*optional*): an [`ImageFolder`], [`DatasetImages`] or [`ImageArray`].
        gaussian (`Gaussian`, *optional*): mean and covariance, from a file.
        features (`torch.Tensor` of shape `(M, D)`, *optional*): from a file.
        shape (`tuple[int, int, int]`, *optional*): (C, H, W) of the images, where it is known.
        extractor (`str`, *optional*): a digest of the extractor that made `features`.
        images_digest (`str`, *optional*): the digest of the images that they were made of.
    """

    name: str
    kind: str
    images: ImageFolder | DatasetImages | ImageArray | DigitImages | None = None
    gaussian: Gaussian | None = None
    features: torch.Tensor | None = None
    shape: tuple[int, int, int] | None = None
    extractor: str | None = None
    images_digest: str | None = None

    @property
    def digest(self) -> str:
        """That of the images, also where only their features are here; of statistics, SHA-256 of their numbers."""
        if self.images is not None:
            return self.images.digest
        if self.images_digest is not None:
            return self.images_digest
        content = hashlib.sha256(self.gaussian.mu.numpy())
        content.update(self.gaussian.sigma.numpy())
        return content.hexdigest()

    def check(self, shape: tuple[int, int, int], width: int, extractor: str):
        """
        Raises an `InputError` unless samples can be compared to this.

        Args:
            shape (`tuple[int, int, int]`): (C, H, W) of the samples.
            width (`int`): D, the number of features.
            extractor (`str`): a digest of the extractor.
        """
        if self.shape is not None and tuple(self.shape) != tuple(shape):
            raise InputError(
                f"reference is {self.name!r}, whose images are {_size(self.shape)}, but the model's are"
                f" {_size(shape)}; pass a reference of the model's resolution and channels."
            )
        if self.extractor not in (None, extractor):
            raise InputError(
                f"reference is {self.name!r}, whose features were made by another extractor; make them again with"
                " save_reference."
            )
        if self.features is not None and self.features.shape[1] != width:
            raise InputError(
                f"reference is {self.name!r}, which has {self.features.shape[1]} features an image, but the extractor"
                f" gives {width}; use the extractor that it was made with."
            )
        if self.gaussian is not None and len(self.gaussian.mu) != width:
            if self.images is None:
                raise InputError(
                    f"reference is {self.name!r}, whose mu has {len(self.gaussian.mu)} numbers, but the extractor"
                    f" gives {width} features; use the extractor that it was made with."
                )
            self.gaussian = None  # of another extractor, but there are images


def load_reference(reference: str, split: str = "train", column: str | None = None) -> Reference:
    """
    Opens a reference.

    Args:
        reference (`str`): `digits`, scikit-learn's 1,797 images; a folder of images; a data set of the `datasets`
            library (a Hub id, a .parquet or .arrow file, a folder); EDM's or ADM's statistics (`.npz`: mu, sigma and,
            of ADM, images as arr_0); or features that [`save_features`] wrote (`.safetensors`).
        split (`str`, defaults to `"train"`), column (`str`, *optional*): of a data set.

    Raises:
        InputError: if it is none of these, or cannot be read, or holds no numbers.
    """
    path = Path(reference)
    there = bool(reference) and path.exists()  # Path("") is the current folder
    if path.is_file() and path.suffix == ".npz":
        return _statistics(reference)
    if path.is_file() and path.suffix == ".safetensors":
        return _features(reference)
    if there and path.is_dir() and not _is_dataset(path):
        images = ImageFolder(path)
        return Reference(reference, "folder", images, shape=images.shape)
    if not there and reference == "digits":
        images = DigitImages()
        return Reference(reference, "built-in", images, shape=images.shape)
    if not there and (path.is_absolute() or path.suffix in _FILES or reference[:1] in (".", "")):
        raise InputError(
            f"reference is {reference!r}, which does not exist; pass a folder of images, a data set, or a statistics"
            " file (.npz)."
        )
    images = DatasetImages(reference, split, column)
    return Reference(reference, "dataset", images, shape=images.shape)


def save_features(
    path: str | Path, features: torch.Tensor, shape: tuple[int, int, int], extractor: str, images_digest: str
):
    """
    Writes features as a reference, all of the file or nothing.

    Args:
        path (`str` or `Path`): the file.
        features (`torch.Tensor` of shape `(M, D)`): of all images.
        shape (`tuple[int, int, int]`): (C, H, W) of an image.
        extractor (`str`), images_digest (`str`): digests of what made the features, and of what they were made of.
    """
    from safetensors.torch import save_file

    metadata = {"extractor": extractor, "images_digest": images_digest, "shape": " ".join(map(str, shape))}
    partial = Path(f"{path}.partial")
    save_file({"features": features.cpu()}, partial, metadata=metadata)
    partial.replace(path)


def holds_features(path: str | Path, extractor: str, images_digest: str) -> bool:
    """Whether a file is what [`save_features`] writes with these digests."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return False
    return (metadata.get("extractor"), metadata.get("images_digest")) == (extractor, images_digest)


def _statistics(name: str) -> Reference:
    try:
        with np.load(name, allow_pickle=False) as file:
            found = {key: file[key] for key in ("mu", "sigma", "arr_0") if key in file}
    except Exception as error:  # whatever numpy and zipfile raise of a file that is none of theirs
        raise InputError(f"reference is {name!r}, which is no .npz file that can be read; pass another.") from error
    images = ImageArray(found["arr_0"], name) if "arr_0" in found else None
    gaussian = None
    if "mu" in found and "sigma" in found:
        gaussian = _gaussian(found["mu"], found["sigma"], name)
    if images is None and gaussian is None:
        raise InputError(f"reference is {name!r}, which has neither mu and sigma nor arr_0; pass EDM's or ADM's file.")
    return Reference(name, "statistics", images, gaussian, shape=images.shape if images else None)


def _gaussian(mu: np.ndarray, sigma: np.ndarray, name: str) -> Gaussian:
    numbers = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu"
    if not numbers or mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise InputError(
            f"reference is {name!r}, whose mu has shape {mu.shape} and type {mu.dtype} and whose sigma has shape"
            f" {sigma.shape} and type {sigma.dtype}; they must be real numbers (D,) and (D, D), D above 0."
        )
    mu, sigma = (np.ascontiguousarray(value, dtype=np.float64) for value in (mu, sigma))
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"reference is {name!r}, whose mu or sigma has NaN or infinity; make it again.")
    if np.abs(sigma - sigma.T).max() > 1e-6 * np.abs(sigma).max():
        raise InputError(f"reference is {name!r}, whose sigma is not symmetric, so no covariance; make it again.")
    variances = np.linalg.eigvalsh(sigma)  # in ascending order
    if variances[0] < -1e-6 * variances[-1]:
        raise InputError(
            f"reference is {name!r}, whose sigma has the eigenvalue {variances[0]:.3g}, so is no covariance; make it"
            " again."
        )
    return Gaussian(torch.from_numpy(mu), torch.from_numpy(sigma))


def _features(name: str) -> Reference:
    try:
        with safe_open(name, "pt") as file:
            metadata, features = file.metadata() or {}, file.get_tensor("features")
        shape = tuple(int(size) for size in metadata["shape"].split())
        extractor, images_digest = metadata["extractor"], metadata["images_digest"]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise InputError(
            f"reference is {name!r}, which is no file of reference features; pass one that save_reference wrote."
        ) from error
    if features.ndim != 2 or len(features) == 0 or not features.isfinite().all():
        raise InputError(f"reference is {name!r}, whose features are no finite (M, D) numbers; make it again.")
    return Reference(
        name, "features", features=features, shape=shape, extractor=extractor, images_digest=images_digest
    )


def _is_dataset(folder: Path) -> bool:
    """Whether a folder has tables, rather than images alone."""
    return any(next(folder.rglob(f"*{ending}"), None) for ending in _BUILDERS)


def _unreadable(name: str, count: int, broken: list[str], note: str = "") -> InputError:
    more = f" and {len(broken) - _NUM_NAMED} more" if len(broken) > _NUM_NAMED else ""
    return InputError(
        f"reference is {name!r}, of whose {count} images {len(broken)} cannot be read"
        f" ({', '.join(broken[:_NUM_NAMED])}{more}{note}); repair or remove them."
    )


def _to_tensor(image: Image.Image, channels: int) -> torch.Tensor:
    array = np.array(image.convert("L" if channels == 1 else "RGB"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1)[None]


def _shape(sizes: dict, modes: dict, name: str, where) -> tuple[int, int, int]:
    """(C, H, W) of images with these sizes and modes, of each of which one example is known."""
    for mode, example in modes.items():
        if mode not in _CHANNELS:
            raise InputError(
                f"reference is {name!r}, in which {where(example)} is of Pillow's mode {mode}; convert its images to"
                " gray or RGB of 8 bits without transparency."
            )
    if len(sizes) > 1:
        (size, example), (other, another) = list(sizes.items())[:2]
        raise InputError(
            f"reference is {name!r}, whose images have {len(sizes)} different sizes, such as {size[0]} × {size[1]}"
            f" ({where(example)}) and {other[0]} × {other[1]} ({where(another)}); resize them to the model's."
        )
    (width, height), channels = next(iter(sizes)), max(_CHANNELS[mode] for mode in modes)
    return channels, height, width


def _size(shape: tuple[int, int, int]) -> str:
    kind = {1: "gray", 3: "RGB"}.get(shape[0], f"of {shape[0]} channels")
    return f"{shape[2]} × {shape[1]} and {kind}"
