"""Figures of runs and of measured results, by one call."""

import itertools
import json
import os
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..denoisers import Denoiser, GuidedDenoiser
from ..errors import InputError
from ..training.config import TrainingConfig
from ..training.loop import CONFIG_FILE, METRICS_FILE, VALIDATION_FILE
from ..trajectory import TrajectoryModel
from .diagnostics import HEUN_STEPS, SOLVERS, open_run
from .figures import (
    SUFFIXES,
    TRAINING_PANELS,
    Panel,
    is_finite,
    read_log,
    save_grids,
    save_quality,
    save_residuals,
    save_training_curves,
)
from .generate import BUILT_IN
from .same_seed import batches, draw_starts, teacher_trajectory

FIGURES = ("samples", "trajectory", "training_steps", "training_time", "residual", "quality", "distance_cost")
DIAGNOSTICS_FILE = "diagnostics.json"
# what must be the same of results that stand in one figure
_PROTOCOL = ("reference_digest", "extractor_sha256", "num_samples", "prompts_sha256")
# what must be the same of those that are one curve
_CURVE = ("model", "model_sha256", "pipeline", "sampler", "scheduler", "guidance_scale", "dtype")


@dataclass
class Run:
    """An output folder of `train_pid.py`, and what it is called in the figures."""

    label: str
    place: str

    @property
    def folder(self) -> Path:
        return BUILT_IN.get(self.place, Path(self.place))

    @property
    def value(self) -> str:
        """What distances are measured per."""
        return "latent value" if (self.folder / "vae").is_dir() else "pixel"

    def diagnostics(self) -> dict | None:
        """What `pid-diffusers diagnose` found; `None` if that was not asked."""
        path = self.folder / DIAGNOSTICS_FILE
        if not path.is_file():
            return None
        found = _read_json(path)
        if not _is_diagnostics(found):
            raise InputError(
                f"run is {self.place!r}, whose {DIAGNOSTICS_FILE} is not one that 'pid-diffusers diagnose' wrote;"
                " let it write another."
            )
        return found


def draw_figures(
    runs: Sequence[str],
    labels: Sequence[str] | None = None,
    results: Sequence[str] = (),
    output: str = "figures",
    num_images: int = 10,
    only: Sequence[str] | None = None,
    teacher: str | None = None,
    prompts: str | None = None,
    report: Callable[[str], object] = lambda line: None,
) -> list[str]:
    """
    Draws what can be drawn of what is given, each figure as a PNG and an SVG.

    Args:
        runs: output folders of `train_pid.py`, or `digits-student`.
        labels (*optional*): what each is called; default: its folder's name. Runs of the same label, such as the seeds
            of one setting, become one curve, and the first of them is shown.
        results: files that `pid-diffusers evaluate` wrote.
        output (`str`): the folder of the figures.
        num_images (`int`): in a row of `samples`.
        only (*optional*): of [`FIGURES`], instead of all.
        teacher (`str`, *optional*), prompts (`str`, *optional*): as for [`open_run`].
        report (`Callable`): told of every figure where it is, or why it was left out.

    Returns:
        `list[str]`: the names of the figures that were drawn.

    Raises:
        InputError: if a run or a file is no such thing, something is in the way, or nothing can be drawn.
    """
    only = FIGURES if only is None else only
    for name in only:
        if name not in FIGURES:
            raise InputError(f"only is {name!r}; choose from {', '.join(FIGURES)}.")
    if num_images < 1:
        raise InputError(f"num_images is {num_images}; pass 1 or more.")
    opened, measured = _find_runs(runs, labels), {place: _read_results(place) for place in results}
    if not opened and not measured:
        raise InputError("runs is empty, and so is results; pass a run's folder, or --results.")
    folder = _check_folder(output, only)
    pictures = _Pictures(opened, num_images, only, teacher, prompts)
    draw = {
        "samples": lambda path: pictures.save_samples(path),
        "trajectory": lambda path: pictures.save_trajectories(path),
        "training_steps": lambda path: _draw_training(path, opened, "step"),
        "training_time": lambda path: _draw_training(path, opened, "seconds"),
        "residual": lambda path: _draw_residuals(path, opened),
        "quality": lambda path: _draw_quality(path, measured),
        "distance_cost": lambda path: _draw_distances(path, opened),
    }
    drawn, reasons = [], []
    for name in (name for name in FIGURES if name in only):
        try:
            without = draw[name](folder / name)
        except InputError as error:
            reasons.append(f"{name}: {str(error).rstrip('.')}")
            report(f"Left out {reasons[-1]}.")
        else:
            drawn.append(name)
            report(f"Saved {folder / name}{' and '.join(SUFFIXES)}{without}")
    if not drawn:
        raise InputError(f"nothing can be drawn; {'; '.join(reasons)}.")
    return drawn


# --- what is given ---------------------------------------------------------------------------------------------------


def _find_runs(places: Sequence[str], labels: Sequence[str] | None) -> list[Run]:
    if labels is not None and len(labels) != len(places):
        raise InputError(f"labels is of {len(labels)}, but there are {len(places)} runs; pass one for each.")
    names = labels or [os.path.basename(os.path.abspath(place)) for place in places]
    runs = [Run(label, place) for label, place in zip(names, places, strict=True)]
    files = (CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, DIAGNOSTICS_FILE, "model_index.json")
    for run in runs:
        if not any((run.folder / name).is_file() for name in files):
            raise InputError(
                f"run is {run.place!r}, which is no output folder of train_pid.py; pass one, or digits-student."
            )
    return runs


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_results(place: str) -> dict:
    found = _read_json(Path(place))
    if not _is_results(found):
        raise InputError(
            f"results is {place!r}, which is no file that 'pid-diffusers evaluate' wrote; pass its --output."
        )
    return found


def _is_results(found) -> bool:
    """Whether all is there that is drawn of a file of results."""
    try:
        protocol = found["protocol"]
        texts = ("model", "model_sha256", "pipeline", "sampler", "scheduler", "dtype", "extractor")
        numbers = ("network_calls_per_sample", "num_samples")
        scale, fids = protocol["guidance_scale"], [found["fid"], *(repeat["fid"] for repeat in found["repeats"])]
        return (
            all(isinstance(protocol[key], str) for key in texts)
            and all(is_finite(protocol[key]) for key in numbers)
            and (scale is None or is_finite(scale))
            and all(isinstance(fid, int | float) for fid in fids if found["fid"] is not None)
            and (found["fid"] is not None or isinstance(found["reasons"]["fid"], str))
            and all(key in protocol for key in _PROTOCOL)
        )
    except (KeyError, TypeError):
        return False


def _is_diagnostics(found) -> bool:
    """Whether all is there that is drawn of a `diagnostics.json`."""
    try:
        worth = found["worth"]
        solved = [worth[name] for name in SOLVERS]
        pairs = [(part["num_steps"], part["distances"]) for part in solved]
        pairs += [
            (found[part]["sigmas"], found[part][key])
            for part, key in (("residual", "rms"), ("trajectory", "relative"))
        ]
        numbers = [
            worth["distance"],
            *(part["calls_per_step"] for part in solved),
            *itertools.chain(*itertools.chain(*pairs)),
        ]
        return (
            all(isinstance(found[key], str) for key in ("teacher", "value"))
            and all(len(x) == len(y) for x, y in pairs)
            and all(isinstance(number, int | float) for number in numbers)
        )
    except (KeyError, TypeError):
        return False


def _check_folder(output: str, names: Iterable[str]) -> Path:
    """Raises an `InputError` unless the figures can be written to a folder `output` without overwriting any."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output is {output!r}, which is a file; pass a folder.")
    if not folder.absolute().parent.is_dir():
        raise InputError(f"output is {output!r}, whose folder does not exist; make it, or pass another.")
    taken = [f"{name}{suffix}" for name in names for suffix in SUFFIXES if (folder / f"{name}{suffix}").exists()]
    if taken:
        raise InputError(f"output is {output!r}, which holds {taken[0]} already; pass another, or remove it.")
    return folder


def _by_label(runs: Iterable[Run]) -> dict[str, list[Run]]:
    grouped = {}
    for run in runs:
        grouped.setdefault(run.label, []).append(run)
    return grouped


def _unit(values: Iterable[str]) -> str:
    values = set(values)
    return values.pop() if len(values) == 1 else "value"


def _without(missing: Mapping[str, str]) -> str:
    return f", without {', '.join(f'{what} ({reason})' for what, reason in missing.items())}" if missing else ""


# --- curves ----------------------------------------------------------------------------------------------------------


def _draw_training(path: Path, runs: list[Run], x: str) -> str:
    lines, units, broken, missing, distances = {}, [], {}, {}, {}
    for run in runs:
        try:
            metrics, validations = (read_log(run.folder / name) for name in (METRICS_FILE, VALIDATION_FILE))
        except InputError as error:
            broken[run.place] = str(error).rstrip(".")
            continue
        if metrics or validations:
            lines.setdefault(run.label, []).append(validations + metrics)
            units.append(run.value)
            if not validations:
                distances[f"the distance of {run.place}"] = f"no {VALIDATION_FILE}"
        else:
            missing[run.place] = f"no {METRICS_FILE}"
    if not lines:
        raise InputError(f"no run has a {METRICS_FILE} or {VALIDATION_FILE} with lines in it{_without(broken)}")
    distance, loss = TRAINING_PANELS
    save_training_curves(path, lines, x, (Panel(distance.key, distance.label.replace("pixel", _unit(units))), loss))
    return _without(broken | missing | distances)


def _diagnosed(runs: list[Run]) -> tuple[dict[str, list[dict]], str]:
    """What was found of the runs of each label, and which runs are missing."""
    found, broken, missing = {}, {}, {}
    for run in runs:
        try:
            diagnostics = run.diagnostics()
        except InputError as error:
            broken[run.place] = str(error).rstrip(".")
            continue
        if diagnostics is None:
            missing[run.place] = f"no {DIAGNOSTICS_FILE}"
        else:
            found.setdefault(run.label, []).append(diagnostics)
    if not found:
        raise InputError(
            f"no run has a {DIAGNOSTICS_FILE}{_without(broken)}; write one with 'pid-diffusers diagnose RUN --output"
            f" RUN/{DIAGNOSTICS_FILE}'"
        )
    return found, _without(broken | missing)


def _draw_residuals(path: Path, runs: list[Run]) -> str:
    found, missing = _diagnosed(runs)
    save_residuals(path, found)
    return missing


def _draw_distances(path: Path, runs: list[Run]) -> str:
    found, missing = _diagnosed(runs)
    every = [one for some in found.values() for one in some]
    several = len({one["teacher"] for one in every}) > 1
    curves = {}
    for one in every:
        for name in SOLVERS:
            solved = one["worth"][name]
            label = f"{one['teacher'] if several else 'teacher'}, {name.capitalize()}"
            calls = [n * solved["calls_per_step"] for n in solved["num_steps"]]
            curves.setdefault(label, []).extend(zip(calls, solved["distances"], strict=True))
    points = {label: [(1, one["worth"]["distance"]) for one in some] for label, some in found.items()}
    unit = _unit(one["value"] for one in every)
    save_quality(path, curves, points, f"rms distance per {unit}\nto the teacher's {HEUN_STEPS}-step Heun endpoint")
    return missing


def _draw_quality(path: Path, results: Mapping[str, dict]) -> str:
    if not results:
        raise InputError("there are no --results of 'pid-diffusers evaluate'")
    missing = {place: found["reasons"]["fid"] for place, found in results.items() if found["fid"] is None}
    known = {place: found for place, found in results.items() if place not in missing}
    if not known:
        raise InputError(f"no file of results has a FID: {next(iter(missing.values()))}")
    (first, of_first), *others = ((place, found["protocol"]) for place, found in known.items())
    for place, protocol in others:
        for key in _PROTOCOL:
            if protocol[key] != of_first[key]:
                raise InputError(f"{first!r} and {place!r} differ in {key}, so that their FIDs cannot be compared")
    alike = {}
    for place, found in known.items():
        alike.setdefault(tuple(found["protocol"][key] for key in _CURVE), {})[place] = found
    curves, points = {}, {}
    firsts = {next(iter(some)): next(iter(some.values()))["protocol"] for some in alike.values()}
    for label, some, protocol in zip(_quality_labels(firsts), alike.values(), firsts.values(), strict=True):
        (points if _is_student(protocol) else curves)[label] = [
            (found["protocol"]["network_calls_per_sample"], repeat["fid"])
            for found in some.values()
            for repeat in found["repeats"]
        ]
    save_quality(
        path, curves, points, f"FID of {of_first['num_samples']:,} samples ({of_first['extractor']} features)"
    )
    return _without({place: reason.rstrip(".") for place, reason in missing.items()})


def _is_student(protocol: Mapping) -> bool:
    return protocol["pipeline"].startswith("OneStepPID")


def _quality_labels(protocols: Mapping[str, Mapping]) -> list[str]:
    """What each curve is called, by the first of its files and the protocol in it: model and sampler, and, if another
    has these as well, in what they differ."""
    labels = []
    for protocol in protocols.values():
        sampler = protocol["scheduler"] if protocol["sampler"] == "pipeline" else protocol["sampler"]
        solver = "" if _is_student(protocol) else f", {sampler.removesuffix('Scheduler')}"
        labels.append(f"{protocol['model']}{solver}")
    scales = [protocol["guidance_scale"] for protocol in protocols.values()]
    files = [os.path.basename(place) for place in protocols]
    differences = (
        ["" if scale is None else f", w = {scale:g}" for scale in scales],
        [f", {protocol['dtype']}" for protocol in protocols.values()],
        [f", {name}" for name in (files if len(set(files)) == len(files) else protocols)],
    )
    for difference in differences:
        for label in {label for label in labels if labels.count(label) > 1}:
            those = [i for i, other in enumerate(labels) if other == label]
            if len({difference[i] for i in those}) > 1:
                for i in those:
                    labels[i] += difference[i]
    return labels


# --- pictures --------------------------------------------------------------------------------------------------------


@dataclass
class _OfTeacher:
    """Pictures of one teacher's ODE, and of the students of it from the same starts, as they are shown."""

    name: str
    class_labels: list[int] | None  # as they were asked for
    columns: list[str] | None
    sigmas: list[float]
    samples: torch.Tensor
    trajectories: list[torch.Tensor]  # of each start
    students: dict[str, torch.Tensor] = field(default_factory=dict)
    student_trajectories: dict[str, list[torch.Tensor]] = field(default_factory=dict)


class _Pictures:
    """What the first run of every label makes of the same starts; each run is opened once, when it is needed."""

    def __init__(
        self, runs: list[Run], num_images: int, only: Sequence[str], teacher: str | None, prompts: str | None
    ):
        self.runs = {label: some[0] for label, some in _by_label(runs).items()}
        self.num_images, self.teacher, self.prompts = num_images, teacher, prompts
        # one start is enough to compare many
        self.num_starts = min(num_images, max(1, 4 - len(self.runs))) if "trajectory" in only else 0
        self.teachers: dict[tuple, _OfTeacher] = {}
        self.missing: dict[str, str] = {}
        self.seed: int | None = None  # the first run's
        self.is_made = False

    def save_samples(self, path: Path) -> str:
        self._make()
        grids = []
        for shown in self.teachers.values():
            rows = {f"{self._teacher_name(shown)}, {2 * HEUN_STEPS} calls": shown.samples}
            grids.append(rows | {f"{label}, 1 call": images for label, images in shown.students.items()})
        columns = [shown.columns for shown in self.teachers.values()]
        save_grids(path, _wrapped(grids), columns, "from the same seeds")
        return _without(self.missing)

    def save_trajectories(self, path: Path) -> str:
        self._make()
        grids, columns = [], []
        for shown in self.teachers.values():
            for b, of_teacher in enumerate(shown.trajectories):
                rows = {label: some[b] for label, some in shown.student_trajectories.items()}
                grids.append(rows | {f"{self._teacher_name(shown)}, {HEUN_STEPS} steps": of_teacher})
                columns.append([f"σ = {sigma:.3g}" for sigma in shown.sigmas] if b == 0 else None)
        save_grids(path, _wrapped(grids), columns, "x(z, σ) at falling noise levels σ, shown as x/√(1 + σ²)")
        return _without(self.missing)

    def _teacher_name(self, shown: _OfTeacher) -> str:
        return "teacher" if len(self.teachers) == 1 else f"teacher {shown.name}"

    @torch.no_grad()
    def _make(self):
        if not self.runs:
            raise InputError("there are no runs")
        if not self.is_made:
            self.is_made = True
            for label, run in self.runs.items():
                try:
                    with open_run(run.place, self.teacher, self.prompts, self.num_images) as opened:
                        self._add(label, *opened)
                except InputError as error:
                    self.missing[label] = str(error).rstrip(".")
        if not self.teachers:
            raise InputError(next(iter(self.missing.values())))

    def _add(self, label: str, student: TrajectoryModel, teacher: Denoiser, config: TrainingConfig):
        """Adds what a student shows, and its teacher if it is another one."""
        self.seed = config.seed if self.seed is None else self.seed
        device = next(student.parameters()).device
        every = HEUN_STEPS // 8
        sigmas = student.scheduler.grid(HEUN_STEPS + 1).tolist()
        guidance = (str(config.guidance_scale), str(config.guidance_range), config.guidance_rescale)
        prompts = self._prompts(teacher)
        key = (config.teacher, *sigmas, *guidance, config.negative_prompt, *(prompts or ()))
        labels = config.validation_class_labels or None
        if labels is not None:
            labels = [labels[i % len(labels)] for i in range(self.num_images)]
        labels = self.teachers[key].class_labels if key in self.teachers else labels
        z, condition = draw_starts(student, teacher, self.num_images, self.seed, labels)
        some = list(batches(z, condition, config.eval_batch_size, device))
        if key not in self.teachers:
            solved = [teacher_trajectory(student, teacher, x, c, HEUN_STEPS)[1][::every] for x, c in some]
            states = [torch.cat(parts) for parts in zip(*solved, strict=True)]
            of_starts = self._shown_trajectories(teacher, states, sigmas[::every])
            images = teacher.decode(states[-1].float()).cpu()
            columns = prompts
            if "class_labels" in condition:
                columns = [f"class {label}" for label in condition["class_labels"].tolist()]
            name = os.path.basename(config.teacher.rstrip("/"))
            if config.guidance_scale is not None:
                name += f", w = {config.guidance_scale:g}"
            self.teachers[key] = _OfTeacher(name, labels, columns, sigmas[::every], images, of_starts)
        shown = self.teachers[key]
        ends = torch.cat([student(x, student.scheduler.config.sigma_min, **c) for x, c in some])
        shown.students[label] = teacher.decode(ends).cpu()
        if self.num_starts:
            first = {name: value[: self.num_starts].to(device) for name, value in condition.items()}
            points = [student(z[: self.num_starts].to(device), sigma, **first) for sigma in shown.sigmas]
            shown.student_trajectories[label] = self._shown_trajectories(teacher, points, shown.sigmas)

    def _shown_trajectories(self, teacher: Denoiser, states: list[torch.Tensor], sigmas: list[float]) -> list:
        """Pictures of the states of each start, `(n, C, H, W)`."""
        scaled = [x.float() / (1 + sigma**2) ** 0.5 for x, sigma in zip(states, sigmas, strict=True)]
        return [teacher.decode(torch.stack([x[b] for x in scaled])).cpu() for b in range(self.num_starts)]

    def _prompts(self, teacher: Denoiser) -> list[str] | None:
        """What the pictures are asked to show, as long as there is room for it."""
        if not isinstance(teacher, GuidedDenoiser):
            return None
        prompts = [teacher.shown_prompt(i) for i in range(self.num_images)]
        return [textwrap.fill(textwrap.shorten(prompt, 40, placeholder=" …"), 11) for prompt in prompts]


def _wrapped(grids: list[dict]) -> list[dict]:
    return [{textwrap.fill(name, 24): images for name, images in rows.items()} for rows in grids]
