"""What the page shows, without the page: points of a student's trajectory, and its teacher from the same noise."""

import inspect
import itertools
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from ..denoisers import Denoiser, heun
from ..denoisers.base import BUILT_IN
from ..errors import InputError
from ..pipelines import OneStepPIDTextToImagePipeline
from ..precision import widest_float
from ..schedulers import PIDScheduler
from ..trajectory import TrajectoryModel

# by what the teacher that it was distilled from is called
BUILT_IN_STUDENTS = {"digits": BUILT_IN["digits"].with_name("digits-student")}
MAX_BATCH = 64


@dataclass(frozen=True)
class Sample:
    """What an image is made from: the noise of a seed and a condition. Equal samples are equal images."""

    seed: int = 0
    label: int | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Picture:
    """A point of a trajectory.

    Attributes:
        image (`PIL.Image.Image`): x/√(1 + t²), so that noise is as bright as an image; of the model's own size.
        t (`float`): its noise level.
    """

    image: Image.Image
    t: float


@dataclass(frozen=True)
class Comparison:
    """The teacher's solution from the noise of `sample`, and what both took on this machine.

    Attributes:
        model (`DemoModel`), sample (`Sample`): whose comparison it is.
        points (`list[tuple[float, Image]]`): noise levels from T to ε, and the teacher's picture at each.
        heun_steps (`int`): n; the teacher was called 2n times.
        student_seconds (`float`): one call of the student, the median of n.
        teacher_seconds (`float`): all calls of the teacher.
        rms_distance (`float`): between the two images at ε, √(mean over pixels of the squared difference), for images
            in [−1, 1].
    """

    model: "DemoModel"
    sample: Sample
    points: list[tuple[float, Image.Image]]
    heun_steps: int
    student_seconds: float
    teacher_seconds: float
    rms_distance: float

    @property
    def speedup(self) -> float:
        return self.teacher_seconds / self.student_seconds

    def nearest(self, t: float) -> tuple[float, Image.Image]:
        """The noise level of the teacher's grid that is nearest to `t` by its logarithm, and the picture there."""
        return min(self.points, key=lambda point: abs(math.log(point[0] / t)))


class DemoModel:
    """
    A student and, if there is one, its teacher. Every method is a function of its arguments alone, so that visitors of
    a page can share one model.

    Args:
        pipe (`DiffusionPipeline`): with a `PIDScheduler` and a `unet`.
        teacher (`Denoiser`, *optional*): to compare with.
        name (`str`): what the model is called on the page.
        teacher_name (`str`, *optional*): what `Denoiser.from_pretrained` loads the teacher by.
        no_teacher (`str`): if there is no teacher, one sentence that says why.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        teacher: Denoiser | None = None,
        name: str = "student",
        teacher_name: str | None = None,
        no_teacher: str = "",
    ):
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.pipe = pipe.to(self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.teacher = None if teacher is None else teacher.to(self.device).eval().requires_grad_(False)
        self.name = name
        self.teacher_name = teacher_name
        self.no_teacher = no_teacher
        # A call writes its noise levels into the pipeline's scheduler, and times are only true of one call at a time.
        self._lock = threading.Lock()

    @staticmethod
    def load(model: str | Path, teacher: str | Path | None = None) -> "DemoModel":
        """
        A student by its folder or Hub id. No code of a repository is run.

        Args:
            model (`str` or `Path`): a folder, a Hub id, or `"digits"` for the student that comes with this package.
            teacher (`str` or `Path`, *optional*): as `Denoiser.from_pretrained` takes it. By default the one that the
                run's `config.yaml` names, else the card's `base_model`; without either there is no teacher.

        Raises:
            InputError: if there is no such model, it is not a student of PID, or the `teacher` passed does not load
                or has another image size or other classes.
        """
        model = name_or_folder(model)
        folder = _find(model)
        pipe = _load_student(model, folder)
        name = folder.resolve().name if Path(model).is_dir() else model
        if isinstance(pipe, OneStepPIDTextToImagePipeline):
            reason = "A student that is told a text cannot be compared with its teacher here"
            if teacher is not None:
                raise InputError(f"teacher is {str(teacher)!r}. {reason}; leave it out.")
            return DemoModel(pipe, None, name, None, f"{reason}.")
        if teacher is not None:
            return DemoModel(pipe, _load_teacher(str(teacher), pipe), name, str(teacher))
        named = _named_teachers(model)
        for candidate in named:
            try:
                return DemoModel(pipe, _load_teacher(candidate, pipe), name, candidate)
            except InputError:
                continue  # a run's own path need not exist here
        reason = (
            f"The teacher of this student, {named[0]}, cannot be loaded here"
            if named
            else "Nothing here says which teacher this student had"
        )
        return DemoModel(pipe, None, name, None, f"{reason}; to compare, start the demo with --teacher FOLDER.")

    @property
    def num_classes(self) -> int | None:
        """How many classes the student knows; `None` if it is unconditional or told a text."""
        return getattr(self.pipe, "num_classes", None)

    @property
    def takes_prompt(self) -> bool:
        """Whether the pipeline is called with a text."""
        return "prompt" in inspect.signature(self.pipe.__call__).parameters

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return _sample_shape(self.pipe)

    @property
    def sigma_max(self) -> float:
        """T, the noise level of the start."""
        return self.pipe.scheduler.config.sigma_max

    @property
    def sigma_min(self) -> float:
        """ε, the noise level of a finished image."""
        return self.pipe.scheduler.config.sigma_min

    def noise_level(self, position: float) -> float:
        """T (ε/T)^`position`: from T at 0 to ε at 1, exactly at both ends."""
        if position <= 0 or position >= 1:
            return self.sigma_max if position <= 0 else self.sigma_min
        return self.sigma_max * (self.sigma_min / self.sigma_max) ** position

    def point(self, sample: Sample, t: float) -> Picture:
        """
        x_θ(z, t) for the noise z of `sample`: one network call.

        Raises:
            InputError: if the sample's seed, class or prompt, or `t`, is out of range.
        """
        return Picture(self._image(self._student([sample], t)[0], t), t)

    def generate(self, sample: Sample) -> Picture:
        """The image, x_θ(z, ε); as [`~DemoModel.point`]."""
        return self.point(sample, self.sigma_min)

    def grid(self, samples: Sequence[Sample]) -> list[Image.Image]:
        """The images of many samples, 64 to a network call; as [`~DemoModel.generate`]."""
        images = []
        for i in range(0, len(samples), MAX_BATCH):
            x = self._student(samples[i : i + MAX_BATCH], self.sigma_min)
            images.extend(self._image(one, self.sigma_min) for one in x)
        return images

    def samples(self, count: int, seed: int = 0, label: int | None = None, prompt: str | None = None) -> list[Sample]:
        """`count` samples of the seeds from `seed` on, of one class, or by default of all classes in turn."""
        _check_seed(seed)
        labels = itertools.repeat(label) if label is not None or self.num_classes is None else range(self.num_classes)
        return [Sample(seed + i, y, prompt) for i, y in zip(range(count), itertools.cycle(labels), strict=False)]

    @torch.no_grad()
    def compare(
        self, sample: Sample, heun_steps: int = 35, progress: Callable[[float], object] | None = None
    ) -> Comparison:
        """
        Solves the teacher's ODE from the student's noise, and measures both.

        Args:
            sample (`Sample`): the noise and the class.
            heun_steps (`int`, defaults to 35): n steps of Heun's method on the student's grid from T to ε.
            progress (`Callable`, *optional*): told the part that is done after each step.

        Raises:
            InputError: if there is no teacher, `heun_steps` is below 1, or the sample is out of range.
        """
        if self.teacher is None:
            raise InputError(self.no_teacher)
        if not isinstance(heun_steps, int) or heun_steps < 1:
            raise InputError(f"heun_steps is {heun_steps}; pass a whole number of at least 1.")
        z = (self.sigma_max * self._latents([sample])).to(self.device)
        condition = self._condition([sample])
        condition = {name: torch.tensor(value, device=self.device) for name, value in condition.items()}
        student = TrajectoryModel(self.pipe.unet, self.pipe.scheduler)
        x = z.to(widest_float(z.device))
        student(z, self.sigma_min, **condition), self.teacher(x, self.sigma_max, **condition)  # first calls allocate
        sigmas = self.pipe.scheduler.grid(heun_steps + 1).tolist()
        points, of_student, of_teacher = [(sigmas[0], self._image(x[0], sigmas[0]))], [], []
        for t, s in itertools.pairwise(sigmas):
            # In turn, since other work on the machine comes and goes; a step at a time, so that nobody waits for all.
            with self._lock:
                image, seconds = _timed(lambda: student(z, self.sigma_min, **condition))
                of_student.append(seconds)
                x, seconds = _timed(lambda x=x, t=t, s=s: heun(self.teacher, x, (t, s), **condition)[-1])
                of_teacher.append(seconds)
            points.append((s, self._image(x[0], s)))
            if progress is not None:
                progress(len(of_teacher) / heun_steps)
        distance = (image - x).square().mean().sqrt().item() * 2 / (1 - self.pipe.scheduler.config.sample_min)
        return Comparison(self, sample, points, heun_steps, statistics.median(of_student), sum(of_teacher), distance)

    def _student(self, samples: Sequence[Sample], t: float) -> torch.Tensor:
        """x_θ(z, t) of shape `(B, C, H, W)`."""
        if not self.sigma_min <= t <= self.sigma_max:
            raise InputError(f"t is {t:g}; choose a noise level from {self.sigma_min:g} to {self.sigma_max:g}.")
        latents, condition = self._latents(samples), self._condition(samples)
        with self._lock:
            return self.pipe(latents=latents, sigmas=[t], output_type="latent", **condition).images

    @torch.no_grad()
    def _image(self, x: torch.Tensor, t: float) -> Image.Image:
        """x/√(1 + t²) of shape (C, H, W) as a picture; of a student in latent space, decoded."""
        vae = self.pipe.vae
        if vae is None:
            return to_image(x, t, self.pipe.scheduler.config.sample_min)
        latents = (x[None].float() / math.sqrt(1 + t**2) / vae.config.scaling_factor).to(self.device, vae.dtype)
        with self._lock:
            return to_image(vae.decode(latents, return_dict=False)[0][0].cpu(), 0.0)

    def _latents(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Noise of unit variance, drawn on the CPU for each seed alone, so that it is the same everywhere."""
        for sample in samples:
            _check_seed(sample.seed)
        generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
        return torch.stack([torch.randn(self.sample_shape, generator=generator) for generator in generators])

    def _condition(self, samples: Sequence[Sample]) -> dict[str, list]:
        condition = {}
        if self.num_classes is not None:
            labels = [sample.label for sample in samples]
            for label in labels:
                if not isinstance(label, int) or not 0 <= label < self.num_classes:
                    raise InputError(f"label is {label}; this model knows the classes 0 to {self.num_classes - 1}.")
            condition["class_labels"] = labels
        if self.takes_prompt:
            condition["prompt"] = [sample.prompt or "" for sample in samples]
        return condition


def _check_seed(seed: int):
    if not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError(f"seed is {seed}; choose a whole number from 0 to 2^63 − 1.")


def _timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """A tensor, and the seconds until the device had it."""
    start = time.perf_counter()
    x = call()
    if x.device.type != "cpu":
        torch.accelerator.synchronize()
    return x, time.perf_counter() - start


def to_image(x: torch.Tensor, t: float, sample_min: float = -1.0) -> Image.Image:
    """x/√(1 + t²) of shape (C, H, W), as a picture: values in [`sample_min`, 1] from black to white, others clipped;
    gray if there are other than three channels, of which the first is shown."""
    x = x if x.shape[0] == 3 else x[:1]
    x = (x.float() / math.sqrt(1 + t**2) - sample_min) / (1 - sample_min)
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Images of one size in rows of `columns`, edge to edge, each pixel as it is; places left over are black."""
    width, height = images[0].size
    sheet = Image.new(images[0].mode, (width * columns, height * math.ceil(len(images) / columns)))
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def name_or_folder(model: str | Path) -> str:
    """The folder of a student that comes with this package, by its name; of others what was passed."""
    model = str(model).strip()
    return str(BUILT_IN_STUDENTS.get(model, model))


def _sample_shape(pipe: DiffusionPipeline) -> tuple[int, int, int]:
    size = pipe.unet.config.sample_size
    return pipe.unet.config.in_channels, *((size, size) if isinstance(size, int) else size)


def _find(model: str) -> Path:
    fix = "pass a folder that train_pid.py or save_pretrained wrote, or a Hub id"
    if not model:
        raise InputError(f"model is empty; {fix}.")
    folder = Path(model)
    try:
        if folder.is_dir():
            return folder
        elsewhere = folder.is_absolute() or model.startswith((".", "~")) or folder.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"model is {model!r}, which cannot be read ({error}); {fix}.") from error
    if elsewhere:
        raise InputError(f"model is {model!r}, which is not a folder; {fix}.")
    try:
        validate_repo_id(model)
        return Path(DiffusionPipeline.download(model))
    except HFValidationError as error:
        raise InputError(f"model is {model!r}, which is neither a folder nor a Hub id; {fix}.") from error
    except Exception as error:  # no network, no such repo, no permission, or code that would have to be trusted
        raise InputError(
            f"model is {model!r}, which is neither a folder nor a diffusers model on the Hub that can be read from"
            f" here ({type(error).__name__}); {fix}."
        ) from error


def _load_student(model: str, folder: Path) -> DiffusionPipeline:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"model is {model!r}, which holds no diffusers pipeline (model_index.json: {type(error).__name__}); pass a"
            " folder that train_pid.py or save_pretrained wrote."
        ) from error
    entry = index.get("scheduler") if isinstance(index, dict) else None
    scheduler = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    if scheduler != PIDScheduler.__name__:
        raise InputError(
            f"model is {model!r}, which is not a student of Physics Informed Distillation (its scheduler is"
            f" {scheduler}, not {PIDScheduler.__name__}); pass a folder that train_pid.py wrote."
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(folder)
        fits = isinstance(pipe.scheduler, PIDScheduler)
        _sample_shape(pipe)
    except Exception as error:
        raise InputError(
            f"model is {model!r}, which diffusers cannot load ({' '.join(str(error).split())}); pass a folder whose"
            " files are all there."
        ) from error
    if not fits:
        raise InputError(
            f"model is {model!r}, whose scheduler is a {scheduler} of another package; pass a folder that train_pid.py"
            " wrote."
        )
    return pipe


def _load_teacher(teacher: str, pipe: DiffusionPipeline) -> Denoiser:
    denoiser = Denoiser.from_pretrained(teacher)
    for what, of_teacher, of_student in (
        ("images of (C, H, W)", denoiser.sample_shape, _sample_shape(pipe)),
        ("a number of classes of", denoiser.num_classes, pipe.num_classes),
    ):
        if of_teacher != of_student:
            raise InputError(
                f"teacher is {teacher!r}, which has {what} {of_teacher}, but the student has {of_student}; pass the"
                " teacher that the student was distilled from."
            )
    return denoiser


def _named_teachers(model: str) -> list[str]:
    """The teacher in the run's config.yaml and the base models in its card, as far as they can be read."""
    local = Path(model).is_dir()
    names = []
    try:
        path = Path(model, "config.yaml") if local else hf_hub_download(model, "config.yaml")
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        names.append(settings.get("teacher") if isinstance(settings, dict) else None)
    except (OSError, ValueError, yaml.YAMLError):  # none there, none that can be reached, or not well-formed
        pass
    base = model_card(model).get("base_model")
    names.extend(base if isinstance(base, list) else [base])
    return [name for name in names if isinstance(name, str) and name]


def model_card(model: str) -> dict:
    """The metadata of a model's card; empty if there is none that can be read."""
    path = Path(model, "README.md")
    if Path(model).is_dir() and not path.is_file():
        return {}
    try:
        return ModelCard.load(path if path.is_file() else model).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):
        return {}
