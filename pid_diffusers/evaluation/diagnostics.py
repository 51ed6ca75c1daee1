"""Whether a run is on course, measured from the same seeds as the teacher's ODE; no data and no classifier needed."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import hf_hub_download

from ..converters import open_teacher
from ..denoisers import Denoiser, GuidedDenoiser, euler, heun
from ..errors import InputError
from ..losses import PIDLoss
from ..precision import widest_float
from ..schedulers import PIDScheduler
from ..training.build import create_teacher
from ..training.config import TrainingConfig, load_preset
from ..trajectory import TrajectoryModel
from .digits import NUM_HELD_OUT, load_digits
from .generate import BUILT_IN, load_model
from .provenance import describe_compute, versions
from .references import load_reference
from .same_seed import SameSeedSamples, batches, draw_starts, same_seed_samples, solve, value_unit

HEUN_STEPS = 40
NUM_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
SOLVERS = {"heun": (heun, 2), "euler": (euler, 1)}  # with how often a step asks for D
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)
BANDS = ("high", "middle", "low")  # thirds of the grid by the index, from T to ε
NUM_RESIDUAL_POINTS = 25
NUM_WORST = 5
# the first starts, by which is measured what needs many network calls a start
NUM_FOLLOWED = 128
DATA_CHUNK = 1024
_CONDITIONS = {"class_label": "class", "prompt": "prompt"}


# --- the parts -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pid_residuals(
    student: TrajectoryModel,
    teacher: Denoiser,
    z: torch.Tensor,
    condition: dict[str, torch.Tensor],
    indices: Sequence[int],
    scheme: str = "upwind",
    batch_size: int = 128,
) -> torch.Tensor:
    """
    ‖x_θ − t dx_θ/dt − D(x_θ, t)‖, rms per value, with the stencil of [`PIDLoss`]: `(P, B)`, a row for each grid point.

    Args:
        student (`TrajectoryModel`), teacher (`Denoiser`): on the same device.
        z (`torch.Tensor` of shape `(B, C, H, W)`), condition (`dict`): starts, and what they are conditioned on.
        indices: P integers in 0 … N−1, points of the student's grid.
        scheme (`str`, defaults to `"upwind"`): of the derivative, as for [`PIDLoss`].
        batch_size (`int`, defaults to 128): pairs of start and point at a time.
    """
    device, loss = next(student.parameters()).device, PIDLoss(scheme, split_batch=True)
    squares = []
    for rows in torch.arange(len(indices) * len(z)).split(batch_size):
        starts, points = rows % len(z), torch.tensor(indices)[rows // len(z)]
        some = {name: value[starts].to(device) for name, value in condition.items()}
        squares.append(loss(student, teacher, z[starts].to(device), points, **some).cpu())
    return value_unit(student) * torch.cat(squares).double().sqrt().reshape(len(indices), len(z))


def residual_bands(residuals: torch.Tensor, indices: Sequence[int], grid: torch.Tensor) -> dict[str, dict[str, float]]:
    """The root mean square of `residuals` (P, B) at `indices` of a grid, over each third of it: `high`, `middle` and
    `low` noise, each with `sigma_max`, `sigma_min` and `rms`. A third without any of `indices` is left out."""
    bands, band_of = {}, torch.arange(len(grid)) * len(BANDS) // len(grid)
    for b, name in enumerate(BANDS):
        sigmas, measured = grid[band_of == b], residuals[band_of[list(indices)] == b]
        if len(measured):
            bands[name] = {"sigma_max": sigmas[0].item(), "sigma_min": sigmas[-1].item(), "rms": _rms(measured)}
    return bands


def validation_figures(
    student: TrajectoryModel,
    teacher: Denoiser,
    samples: SameSeedSamples,
    z: torch.Tensor,
    scheme: str,
    batch_size: int,
) -> dict[str, float]:
    """
    What a training run logs: the median and the 90 % quantile of the samples' distances, and the residual in each band
    of noise levels.

    The residual is taken at two points of each band, 12 to 18 calls of the student and 6 of the teacher a sample.

    Args:
        student (`TrajectoryModel`), teacher (`Denoiser`): on the same device.
        samples (`SameSeedSamples`), z (`torch.Tensor` of shape `(B, C, H, W)`): what is shown, and its starts.
        scheme (`str`), batch_size (`int`): as for [`pid_residuals`].
    """
    distances, grid = samples.rms_distances, student.scheduler.grid()
    indices = sorted({int((k + 0.5) * len(grid) / 6) for k in range(6)})
    # no more at a time than the samples were drawn with: the rest of the memory is the training's
    residuals = pid_residuals(student, teacher, z, samples.condition, indices, scheme, min(batch_size, len(z)))
    return {
        "median_distance": distances.quantile(0.5).item(),
        "q90_distance": distances.quantile(0.9).item(),
        **{f"residual_{name}_noise": b["rms"] for name, b in residual_bands(residuals, indices, grid).items()},
    }


@torch.no_grad()
def trajectory_errors(
    student: TrajectoryModel,
    teacher: Denoiser,
    z: torch.Tensor,
    condition: dict[str, torch.Tensor],
    batch_size: int = 128,
    heun_steps: int = HEUN_STEPS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    How far x_θ(z, t) is from the teacher's solution at every point of the solver's grid.

    Returns:
        the grid of n = `heun_steps` + 1 noise levels from T to ε, and the rms distances per value, `(n, B)`.
    """
    device, sigmas = next(student.parameters()).device, student.scheduler.grid(heun_steps + 1)
    squares = []
    for batch, some in batches(z, condition, batch_size, device):
        x = batch.to(widest_float(device))
        at_points = [torch.zeros(len(batch), dtype=torch.float64)]  # x_θ(z, T) = z, whatever the network
        for interval in itertools.pairwise(sigmas.tolist()):
            x = heun(teacher, x, interval, **some)[-1]
            point = student(batch, interval[1], **some)
            at_points.append((point - x).square().flatten(1).mean(dim=1).cpu().double())
        squares.append(torch.stack(at_points))
    return sigmas, value_unit(student) * torch.cat(squares, dim=1).sqrt()


def solver_distances(
    student: TrajectoryModel,
    teacher: Denoiser,
    z: torch.Tensor,
    condition: dict[str, torch.Tensor],
    endpoints: torch.Tensor,
    solver: Callable,
    num_steps: Sequence[int] = NUM_STEPS,
    batch_size: int = 128,
) -> list[float]:
    """How far the teacher's endpoint of n steps is from `endpoints` (B, C, H, W), rms per value, for each n of
    `num_steps`, on the student's grid of n + 1 noise levels."""
    device = next(student.parameters()).device
    distances = []
    for n in num_steps:
        sigmas = student.scheduler.grid(n + 1)
        ends = [
            solve(solver, teacher, x, sigmas, **some).cpu() for x, some in batches(z, condition, batch_size, device)
        ]
        distances.append(SameSeedSamples(torch.cat(ends), endpoints, condition, value_unit(student)).rms_distance)
    return distances


@dataclass(frozen=True)
class Worth:
    """How many of a solver's steps come as near to its limit as a student does.

    Attributes:
        steps (`float`): n, a real number.
        relation (`str`): `"="`; `">"` if the student is nearer than by the most steps that were tried, and `"<"` if it
            is farther than by the fewest, which `steps` is then.
    """

    steps: float
    relation: str = "="

    def describe(self, solver: str) -> str:
        """Such as "9.3 Heun steps" or "more than 24 Euler steps"."""
        amount = {"=": "", ">": "more than ", "<": "less than "}[self.relation]
        return f"{amount}{self.steps:.3g} {solver} step{'' if self.steps == 1 else 's'}"


def worth_in_steps(distance: float, num_steps: Sequence[int], distances: Sequence[float]) -> Worth:
    """
    The number of steps n at which a solver's distance would be `distance`: where it is first reached, interpolated
    linearly in log n and log distance.

    Args:
        distance (`float`): the student's.
        num_steps, distances: numbers of steps, rising, and the solver's distance with each.
    """
    first = next((k for k, reached in enumerate(distances) if reached <= distance), None)
    if first is None:
        return Worth(float(num_steps[-1]), ">")
    if distances[first] == distance:
        return Worth(float(num_steps[first]))
    if first == 0:
        return Worth(float(num_steps[0]), "<")
    n, m = num_steps[first - 1], num_steps[first]
    # a distance of 0 is infinitely far away by its logarithm
    whole = math.log(distances[first - 1] / distances[first]) if distances[first] > 0 else math.inf
    return Worth(n * (m / n) ** (math.log(distances[first - 1] / distance) / whole))


@torch.no_grad()
def nearest_images(
    samples: torch.Tensor, images: Iterable[torch.Tensor], skip_own: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The image nearest to each sample, by rms distance per value.

    Args:
        samples (`torch.Tensor` of shape `(B, C, H, W)`), images (`Iterable` of `(k, C, H, W)`): in [−1, 1].
        skip_own (`bool`): the samples are the first B images, and none is compared to itself.

    Returns:
        distances `(B,)` in float64 and indices `(B,)`, counted over all of `images`.
    """
    flat = samples.flatten(1).double()
    distances, indices = torch.full((len(flat),), math.inf, dtype=torch.float64), torch.zeros(len(flat)).long()
    first = 0
    for some in images:
        found = torch.cdist(flat, some.flatten(1).double()) / math.sqrt(flat.shape[1])
        if skip_own:
            own = torch.arange(len(flat))[first : first + len(some)]
            found[own, own - first] = math.inf
        distance, index = found.min(dim=1)
        nearer = distance < distances
        distances, indices = torch.where(nearer, distance, distances), torch.where(nearer, first + index, indices)
        first += len(some)
    return distances, indices


# --- all of them -----------------------------------------------------------------------------------------------------


def diagnose(
    student: TrajectoryModel,
    teacher: Denoiser,
    num_samples: int = 512,
    batch_size: int = 128,
    seed: int = 0,
    scheme: str = "upwind",
    data: Callable[[], Iterable[torch.Tensor]] | None = None,
    progress: Callable[[str], object] = lambda part: None,
) -> dict:
    """
    All that can be told of a student from the same seeds as its teacher's ODE.

    `distance` is measured on `num_samples` starts that training with `seed` never draws; `residual`, `trajectory` and
    `worth`, which need many network calls a start, on the first 128 of them.

    Args:
        student (`TrajectoryModel`), teacher (`Denoiser`): on the same device.
        num_samples (`int`), batch_size (`int`), seed (`int`): how many starts, how many at a time, and their seed.
        scheme (`str`, defaults to `"upwind"`): of the residual's derivative, as for [`PIDLoss`].
        data (`Callable`, *optional*): starts anew with the training images, batches of `(k, C, H, W)` in [−1, 1].
        progress (`Callable`): told each part before it starts.

    Returns:
        `dict`: numbers, lists and texts alone, as `diagnostics.json` has them. Distances and residuals are rms per
        value, for images in [−1, 1], or latents as they are.

    Raises:
        InputError: if a number is out of range, or student or teacher compute something that is not finite.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        if value < least:
            raise InputError(f"{name} is {value}; pass {least} or more.")
    seconds, start = {}, time.perf_counter()

    @contextlib.contextmanager
    def part(name: str) -> Iterator[None]:
        progress(name)
        begin = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begin, 2)

    with part("distance"):
        samples = same_seed_samples(student, teacher, num_samples, batch_size, seed, HEUN_STEPS)
        _check_finite(samples)
        distances = samples.rms_distances
    z, condition = draw_starts(student, teacher, num_samples, seed)
    z, condition = z[:NUM_FOLLOWED], {name: value[:NUM_FOLLOWED] for name, value in condition.items()}
    followed = (student, teacher, z, condition)
    with part("residual"):
        grid = student.scheduler.grid()
        indices = torch.linspace(0, len(grid) - 1, NUM_RESIDUAL_POINTS).round().int().unique().tolist()
        residuals = pid_residuals(*followed, indices, scheme, batch_size)
    with part("trajectory"):
        sigmas, errors = trajectory_errors(*followed, batch_size)
    with part("worth"):
        endpoints = samples.teacher[:NUM_FOLLOWED]
        distance = SameSeedSamples(samples.student[:NUM_FOLLOWED], endpoints, condition, samples.unit).rms_distance
        worth = {"num_samples": len(z), "distance": distance}
        for name, (solver, calls) in SOLVERS.items():
            reached = solver_distances(*followed, endpoints, solver, NUM_STEPS, batch_size)
            found = worth_in_steps(distance, NUM_STEPS, reached)
            worth[name] = {
                "worth": found.steps,
                "relation": found.relation,
                "text": found.describe(name.capitalize()),
                "calls_per_step": calls * teacher.network_calls,
                "num_steps": list(NUM_STEPS),
                "distances": reached,
            }
    nearest = None
    if data is not None:
        with part("nearest"):
            nearest = _nearest(samples, teacher, data)

    of_points = residuals.square().mean(dim=1).sqrt()
    along = errors.square().mean(dim=1).sqrt()
    total = time.perf_counter() - start
    worst = distances.argsort(descending=True)[:NUM_WORST].tolist()
    return {
        "num_samples": num_samples,
        "seed": seed,
        "heun_steps": HEUN_STEPS,
        "value": "pixel" if teacher.vae is None else "latent value",
        "distance": {
            "rms": samples.rms_distance,
            "mean": distances.mean().item(),
            "quantiles": {f"{q:g}": distances.quantile(q).item() for q in QUANTILES},
            "worst": [{"sample": i, "distance": distances[i].item(), **_shown(samples, teacher, i)} for i in worst],
            "per_sample": distances.tolist(),
        },
        "residual": {
            "num_samples": len(z),
            "scheme": scheme,
            "indices": indices,
            "sigmas": grid[indices].tolist(),
            "rms": of_points.tolist(),
            "bands": residual_bands(residuals, indices, grid),
        },
        "trajectory": {
            "num_samples": len(z),
            "sigmas": sigmas.tolist(),
            "rms": along.tolist(),
            "relative": (along / (1 + sigmas**2).sqrt()).tolist(),  # to √(1 + t²)
        },
        "worth": worth,
        "nearest": nearest,
        "seconds": {**seconds, "total": round(total, 2)},
        **describe_compute(next(student.parameters()).device, 1, total),
        "versions": versions(),
    }


def summarize(diagnostics: dict) -> str:
    """What [`diagnose`] found, in a few lines."""
    distance, residual, path = (diagnostics[name] for name in ("distance", "residual", "trajectory"))
    worth, nearest, worst = diagnostics["worth"], diagnostics["nearest"], diagnostics["distance"]["worst"][0]
    shown = "".join(f", {name} {worst[key]!r}" for key, name in _CONDITIONS.items() if key in worst)
    bands = [f"{b['rms']:.3g} at σ {b['sigma_max']:.2g} to {b['sigma_min']:.2g}" for b in residual["bands"].values()]
    k = max(range(len(path["sigmas"])), key=lambda k: path["relative"][k])
    lines = {
        "distance": f"{distance['rms']:.4f} rms per {diagnostics['value']} to the teacher's {HEUN_STEPS}-step Heun"
        f" endpoint, {diagnostics['num_samples']} seeds: half below {distance['quantiles']['0.5']:.3f}, 90 % below"
        f" {distance['quantiles']['0.9']:.3f}, worst {worst['distance']:.3f} (seed {worst['sample']}{shown})",
        "worth": " or ".join(_with_calls(worth[name]) for name in SOLVERS) + f", by {worth['num_samples']} seeds",
        "residual": ", ".join(bands),
        "trajectory": f"farthest from the teacher's at t = {path['sigmas'][k]:.2g}: {path['rms'][k]:.3g}, which is"
        f" {path['relative'][k]:.3g} of √(1 + t²)",
    }
    if nearest is not None:
        lines["copying"] = (
            f"{nearest['num_nearer_to_an_image']} of {diagnostics['num_samples']} samples are nearer to a training"
            f" image than to their teacher's; the nearest image is {nearest['median']:.3f} away (the teacher's:"
            f" {nearest['teacher_median']:.3f}, an image's own: {nearest['images_median']:.3f}, medians)"
        )
    lines["time"] = f"{diagnostics['seconds']['total']:.0f} s"
    return "\n".join(f"  {name:10} {text}" for name, text in lines.items())


def _with_calls(worth: dict) -> str:
    return f"{worth['text']} ({worth['worth'] * worth['calls_per_step']:.3g} calls of the teacher)"


def _nearest(samples: SameSeedSamples, teacher: Denoiser, data: Callable[[], Iterable[torch.Tensor]]) -> dict:
    images, theirs = (teacher.decode(x).float().clamp(-1, 1) for x in (samples.student, samples.teacher))
    chunks = iter(data())
    first = next(chunks)
    of_student, index = nearest_images(images, itertools.chain([first], chunks))
    of_teacher, _ = nearest_images(theirs, data())
    of_images, _ = nearest_images(first[: len(images)], data(), skip_own=True)
    to_teacher = (images.double() - theirs.double()).square().flatten(1).mean(dim=1).sqrt()
    return {
        "median": of_student.median().item(),
        "minimum": of_student.min().item(),
        "to_teacher_median": to_teacher.median().item(),
        "teacher_median": of_teacher.median().item(),
        "teacher_minimum": of_teacher.min().item(),
        "images_median": of_images.median().item(),
        "num_nearer_to_an_image": int((of_student < to_teacher).sum()),
        "closest": [
            {"sample": i, "image": index[i].item(), "distance": of_student[i].item()}
            for i in of_student.argsort()[:NUM_WORST].tolist()
        ],
        "per_sample": of_student.tolist(),
        "image_per_sample": index.tolist(),
        "to_teacher_per_sample": to_teacher.tolist(),
    }


def _shown(samples: SameSeedSamples, teacher: Denoiser, i: int) -> dict:
    if isinstance(teacher, GuidedDenoiser):
        return {"prompt": teacher.shown_prompt(i)}
    labels = samples.condition.get("class_labels")
    return {} if labels is None else {"class_label": labels[i].item()}


def _check_finite(samples: SameSeedSamples):
    fixes = {"model": "load one from before its training diverged.", "teacher": "load one whose weights are sound."}
    for name, fix in fixes.items():
        x = samples.student if name == "model" else samples.teacher
        broken = int((~x.isfinite().flatten(1).all(dim=1)).sum())
        if broken:
            raise InputError(f"{name} gives values that are not finite in {broken} of {len(x)} samples; {fix}")


def _rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


# --- what is measured ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_run(
    model: str, teacher: str | None = None, prompts: str | None = None, num_samples: int = 512
) -> Iterator[tuple[TrajectoryModel, Denoiser, TrainingConfig]]:
    """
    A student, its teacher and the settings of the run, with both on the accelerator if there is one.

    Args:
        model (`str`): an output folder of `train_pid.py`, another student's folder or Hub id, or `digits-student`.
        teacher (`str`, *optional*): as for `train_pid.py`; default: the one that the run's `config.yaml` names.
        prompts (`str`, *optional*): of a text-to-image student; default: those that the run was evaluated with.
        num_samples (`int`, defaults to 512): of so many prompts embeddings are computed at most.

    Raises:
        InputError: if there is no such student or teacher, or they do not fit together.
    """
    pipeline = load_model(model)
    if not isinstance(pipeline.scheduler, PIDScheduler) or getattr(pipeline, "unet", None) is None:
        raise InputError(
            f"model is {model!r}, which is not a student of Physics Informed Distillation (its scheduler is a"
            f" {type(pipeline.scheduler).__name__}); pass a folder that train_pid.py wrote."
        )
    config = _run_settings(model)
    name = teacher or config.teacher
    if name is None:
        raise InputError(
            f"teacher is missing, and no config.yaml in {model!r} names it; pass --teacher with the one that the"
            " student was distilled from."
        )
    shown, levels = prompts or config.eval_prompts or config.prompts, pipeline.scheduler.config
    trained_on = shown == config.prompts and config.max_prompts is not None
    config = dataclasses.replace(
        config,
        teacher=name,
        prompts=shown,  # no other embeddings are needed
        eval_prompts=None,
        validation_prompts=None if prompts else config.validation_prompts,
        max_prompts=min(num_samples, config.max_prompts) if trained_on else num_samples,
        num_eval_samples=num_samples,
        guidance_scale=levels.get("guidance_scale"),
        guidance_range=levels.get("guidance_range"),
    )
    with open_teacher(name) as (source, _):
        denoiser = create_teacher(config, source).eval().requires_grad_(False)
        _check_fit(pipeline, denoiser, name)
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        yield TrajectoryModel(pipeline.unet, pipeline.scheduler).to(device), denoiser.to(device), config


def _run_settings(model: str) -> TrainingConfig:
    """Those in a run's `config.yaml`; the defaults if there is none."""
    path = BUILT_IN.get(model, Path(model)) / "config.yaml"
    if not path.parent.is_dir():
        try:
            path = Path(hf_hub_download(model, "config.yaml"))
        except (OSError, ValueError):  # none there, or none that can be reached
            pass
    return TrainingConfig(**load_preset(str(path))) if path.is_file() else TrainingConfig()


def _check_fit(pipeline: DiffusionPipeline, teacher: Denoiser, name: str):
    config = pipeline.unet.config
    size = config.sample_size
    shape = config.in_channels, *((size, size) if isinstance(size, int) else size)
    classes = config.get("num_class_embeds", config.get("num_embeds_ada_norm"))
    text = isinstance(pipeline.unet, UNet2DConditionModel)
    for what, theirs, mine in (
        ("samples of (C, H, W)", teacher.sample_shape, shape),
        ("a number of classes of", teacher.num_classes, classes),
        ("a text as its condition:", isinstance(teacher, GuidedDenoiser), text),
    ):
        if theirs != mine:
            raise InputError(
                f"teacher is {name!r}, which has {what} {theirs}, but the student has {mine}; pass the teacher that"
                " the student was distilled from."
            )


def open_data(data: str, teacher: Denoiser) -> Callable[[], Iterator[torch.Tensor]]:
    """
    Training images, for [`diagnose`].

    Args:
        data (`str`): `"digits"` for those that the built-in teacher was trained on, or a folder of images.
        teacher (`Denoiser`): whose images they are.

    Raises:
        InputError: if there are none, some cannot be read, or they have another size than the teacher's.
    """
    if data == "digits":
        images = load_digits()[0][:-NUM_HELD_OUT]
        shape, chunks = tuple(images.shape[1:]), lambda: iter(images.split(DATA_CHUNK))
    else:
        if not os.path.isdir(data):
            raise InputError(f"data is {data!r}, which is not a folder; pass one with images, or digits.")
        with _named_data():
            folder = load_reference(data).images
        shape = tuple(folder.shape)

        def chunks() -> Iterator[torch.Tensor]:
            for first in range(0, len(folder), DATA_CHUNK):
                with _named_data():
                    some = torch.cat(list(folder.stream(first, min(first + DATA_CHUNK, len(folder)))))
                yield some.float() / 127.5 - 1

    expected = _image_shape(teacher)
    if shape != expected:
        raise InputError(
            f"data is {data!r}, whose images have the shape {shape}, but the teacher's have {expected}; pass those"
            " that the teacher was trained on."
        )
    for _ in chunks():  # what cannot be read is found now, not after the measuring
        pass
    return chunks


@contextlib.contextmanager
def _named_data() -> Iterator[None]:
    """Has an error of a reference speak of `data`."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace("reference is", "data is", 1)) from error


def _image_shape(teacher: Denoiser) -> tuple[int, ...]:
    device = next(teacher.parameters()).device
    return tuple(teacher.decode(torch.zeros(1, *teacher.sample_shape, device=device)).shape[1:])


def check_output(output: str):
    """Raises an `InputError` unless a new file can be written at `output`."""
    path = Path(output)
    if path.exists():
        raise InputError(f"output is {output!r}, which exists already; pass another, or remove it.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"output is {output!r}, whose folder does not exist; make it, or pass another.")


def save(diagnostics: dict, output: str, model: str, teacher: str):
    """Writes what [`diagnose`] found as JSON, with the names of both; of a path only the last part."""
    names = {
        role: os.path.basename(os.path.abspath(name)) if os.path.exists(name) else name
        for role, name in (("model", model), ("teacher", teacher))
    }
    diagnostics = {**names, **diagnostics}
    Path(output).write_text(json.dumps(diagnostics, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
