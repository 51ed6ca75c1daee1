"""Pictures of a run, and figures that compare several."""

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from ..errors import InputError

SUFFIXES = (".png", ".svg")
DPI = 200
# Okabe and Ito's colours that color-blind people tell apart, without the yellow, which is too light on white
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
POINT_MARKERS = ("*", "P", "X", "D", "^", "s", "v", "<", ">")
MEANS = "mean of the runs, band from lowest to highest"
# where a logarithmic axis of less than so many decades has numbers in each; none: as on a linear one
_LOG_TICKS = ((0.3, ()), (1.0, (1, 1.5, 2, 3, 4, 5, 7)), (2.6, (1, 2, 5)))
# whatever the user's own matplotlibrc says; "$" in a label is a dollar
_STYLE = {
    "axes.grid": True,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 8,
    "grid.color": "0.9",
    "legend.fontsize": 8,
    "legend.handlelength": 3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "text.parse_math": False,
}
# the same figure gives the same file, whose text can be searched and edited
_FILES = {"svg.fonttype": "none", "svg.hashsalt": "pid_diffusers"}


@dataclass(frozen=True)
class Panel:
    """What one panel of [`save_training_curves`] shows.

    Attributes:
        key (`str`): of the lines.
        label (`str`): of the axis.
        running_median (`bool`, defaults to `False`): of every run, over a tenth of its lines.
    """

    key: str
    label: str
    running_median: bool = False


TRAINING_PANELS = (
    Panel("rms_distance", "rms distance per pixel\nto the teacher's ODE endpoint"),
    Panel("loss", "training loss (running median)", running_median=True),
)


@dataclass(frozen=True)
class Curve:
    """The mean of some runs at each point, and the lowest and the highest of them."""

    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]

    @classmethod
    def of(cls, points: Iterable[tuple[float, float, float]], least: int = 1) -> "Curve":
        """
        Averages what belongs together. A point whose y is no finite number is left out.

        Args:
            points: triples of what tells the points of one run apart, such as the step; x; and y.
            least (`int`, defaults to 1): a point that fewer runs have is left out.
        """
        groups = {}
        for key, x, y in points:
            if is_finite(y):
                groups.setdefault(key, []).append((x, y))
        columns = [list(zip(*group, strict=True)) for group in groups.values() if len(group) >= least]
        rows = sorted((fmean(x), fmean(y), min(y), max(y)) for x, y in columns)
        return cls(*map(list, zip(*rows, strict=True))) if rows else cls([], [], [], [])


def is_finite(value) -> bool:
    """Whether it is a number, and neither infinite nor NaN."""
    return isinstance(value, int | float) and math.isfinite(value)


def read_log(path: str | Path) -> list[dict]:
    """
    The lines of a run's `metrics.jsonl` or `validation.jsonl`, without a last one that was cut short when the run was
    killed.

    Args:
        path: of the file. If there is none, there are no lines.

    Raises:
        InputError: if another line is no JSON object with the numbers `step` and `seconds`.
    """
    path, read = Path(path), []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(lines):
                break
            line = None
        if not isinstance(line, dict) or not is_finite(line.get("step")) or not is_finite(line.get("seconds")):
            raise InputError(
                f"path is {str(path)!r}, whose line {number} is no JSON object with numbers for step and seconds;"
                " correct that line."
            )
        read.append(line)
    return read


def save_same_seed(
    path: str | Path,
    teacher: torch.Tensor,
    student: torch.Tensor,
    heun_steps: int,
    title: str = "",
    columns: Sequence[str] | None = None,
):
    """Images of the teacher above those of the student from the same starts, `(B, C, H, W)` each, in [−1, 1]; above
    them what each column shows, such as the prompts."""
    save_rows(path, {f"teacher, {2 * heun_steps} calls": teacher, "student, 1 call": student}, title, columns)


def save_rows(
    path: str | Path, rows: Mapping[str, torch.Tensor], title: str = "", columns: Sequence[str] | None = None
):
    """Rows of images, `(B, C, H, W)` each, in [−1, 1], with their names, and those of the columns."""
    save_figure(_image_grids([rows], [columns], title), path)


def save_grids(
    path: str | Path,
    grids: Sequence[Mapping[str, Sequence[torch.Tensor]]],
    columns: Sequence[Sequence[str] | None],
    title: str = "",
):
    """
    Several [`save_rows`] above each other, in a size for print.

    Args:
        path: where to; without a suffix both a PNG and an SVG, as for [`save_figure`].
        grids: of each the rows by their names, images of shape (C, H, W) in [−1, 1].
        columns: of each grid the names of its columns, or `None`.
        title (`str`, *optional*): of the whole.
    """
    with style.context(["default", _STYLE]):
        save_figure(_image_grids(grids, columns, title, dpi=DPI, fontsize=8), path)


def save_trajectory(
    path: str | Path,
    sigmas: Sequence[float],
    teacher: Sequence[torch.Tensor],
    student: Sequence[torch.Tensor],
    title: str = "",
    decode: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
):
    """
    The student's x_θ(z, t) at falling noise levels above the teacher's ODE solution, for each of B starts.

    Args:
        sigmas: the noise levels t.
        teacher, student: the states at each of them, `(B, C, H, W)`; shown as x/√(1 + t²), so that noise is as bright
            as an image.
        decode (`Callable`, *optional*): makes images of what is shown, `(n, C, H, W)`, if these are latents.
    """
    grids = []
    for b in range(student[0].shape[0]):
        grids.append({})
        for name, states in (("student", student), ("teacher", teacher)):
            shown = [x[b] / (1 + float(t) ** 2) ** 0.5 for t, x in zip(sigmas, states, strict=True)]
            grids[-1][name] = decode(torch.stack(shown))
    columns = [f"t = {float(t):.3g}" for t in sigmas]
    save_figure(_image_grids(grids, [columns] + [None] * (len(grids) - 1), title), path)


def save_loss_curve(path: str | Path, steps: Sequence[int], losses: Sequence[float]):
    """The training loss over optimizer steps, on a logarithmic axis, with its running median."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="loss")
    axes.plot(steps, _running_median(losses), color="C0", linewidth=2, label="running median")
    axes.set(xlabel="optimizer step", ylabel="PID loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def save_training_curves(
    path: str | Path,
    runs: Mapping[str, Sequence[Sequence[Mapping]]],
    x: str = "step",
    panels: Sequence[Panel] = TRAINING_PANELS,
):
    """Saves [`plot_training_curves`] as [`save_figure`] does."""
    save_figure(plot_training_curves(runs, x, panels), path)


@style.context(["default", _STYLE])
def plot_training_curves(
    runs: Mapping[str, Sequence[Sequence[Mapping]]], x: str = "step", panels: Sequence[Panel] = TRAINING_PANELS
) -> Figure:
    """
    How runs went, a panel for each figure that was logged, on a logarithmic axis.

    Args:
        runs: for every label its runs, such as those of several seeds, which become one curve: their mean at the steps
            that all of them have, if they have any, with a band from the lowest to the highest. A run is its lines, as
            [`read_log`] reads them: mappings with `step`, `seconds`, and any of the panels' keys. A value that is no
            finite number is left out.
        x (`str`, defaults to `"step"`): or `"seconds"`.
        panels: what to show of them. One whose key is in no line is left out.

    Raises:
        InputError: if no line has the key of a panel.
    """
    names = {"step": "optimizer steps", "seconds": "training time (s)"}
    looks, seeds = _looks(runs), any(len(some) > 1 for some in runs.values())
    curves = {panel: {label: _training_curve(some, x, panel) for label, some in runs.items()} for panel in panels}
    curves = {panel: some for panel, some in curves.items() if any(curve.x for curve in some.values())}
    if not curves:
        keys = " or ".join(repr(panel.key) for panel in panels)
        raise InputError(f"runs is of {len(runs)} without {keys} at the same steps; pass others.")
    figure, all_axes = _figure(len(curves), sharex=True)
    for axes, (panel, some) in zip(all_axes, curves.items(), strict=True):
        _draw_curves(axes, some, looks)
        axes.set(xlabel=names[x], ylabel=panel.label)
        _plain_axis(axes.xaxis)
        _log_axis(axes, "y")
    _legend(figure, looks, MEANS if seeds else None)
    return figure


def _training_curve(runs: Sequence[Sequence[Mapping]], x: str, panel: Panel) -> Curve:
    points, least = [], 0
    for lines in runs:
        lines = [line for line in lines if is_finite(line.get(panel.key))]
        values = [line[panel.key] for line in lines]
        values = _running_median(values) if panel.running_median else values
        points += [(line["step"], line[x], value) for line, value in zip(lines, values, strict=True)]
        least += bool(lines)
    return Curve.of(points, least)


def save_residuals(path: str | Path, runs: Mapping[str, Sequence[Mapping]]):
    """Saves [`plot_residuals`] as [`save_figure`] does."""
    save_figure(plot_residuals(runs), path)


@style.context(["default", _STYLE])
def plot_residuals(runs: Mapping[str, Sequence[Mapping]]) -> Figure:
    """
    Where students err: the residual of the ODE at every noise level, and the error along the trajectory, from T on the
    left to ε.

    Args:
        runs: for every label what [`diagnose`] found of its runs, which become one curve, as for
            [`plot_training_curves`].
    """
    looks, seeds = _looks(runs), any(len(some) > 1 for some in runs.values())
    figure, all_axes = _figure(2)
    values = " or ".join(sorted({found["value"] for some in runs.values() for found in some}))
    for axes, part, key, label in (
        (all_axes[0], "residual", "rms", f"residual of the ODE, rms per {values}"),
        (all_axes[1], "trajectory", "relative", f"error along the trajectory,\nrms per {values}, over √(1 + σ²)"),
    ):
        curves = {}
        for name, some in runs.items():
            pairs = [zip(found[part]["sigmas"], found[part][key], strict=True) for found in some]
            curves[name] = Curve.of([(sigma, sigma, y) for pair in pairs for sigma, y in pair], least=len(some))
        _draw_curves(axes, curves, looks)
        axes.set(xlabel="noise level σ", ylabel=label)
        _log_axis(axes, "x")
        axes.invert_xaxis()
    _log_axis(all_axes[0], "y")
    _plain_axis(all_axes[1].yaxis)
    _legend(figure, looks, MEANS if seeds else None)
    return figure


Points = Mapping[str, Sequence[tuple[float, float]]]


def save_quality(path: str | Path, curves: Points, points: Points, ylabel: str):
    """Saves [`plot_quality`] as [`save_figure`] does."""
    save_figure(plot_quality(curves, points, ylabel), path)


@style.context(["default", _STYLE])
def plot_quality(curves: Points, points: Points, ylabel: str) -> Figure:
    """
    Quality against cost, on logarithmic axes. Points whose calls or value are not above 0 have no place there: they
    are left out, and so is a label without any other.

    Args:
        curves: for every label pairs of calls of the network and a value; those with the same calls become their mean
            with a band from the lowest to the highest.
        points: the same, drawn as markers alone, with a line from the lowest to the highest; side by side, since
            students have the same calls.
        ylabel (`str`): what the value is.

    Raises:
        InputError: if no point is left.
    """
    curves, points = _positive(curves), _positive(points)
    if not curves and not points:
        raise InputError("curves and points have no value above 0, as a logarithmic axis needs; pass others.")
    figure, (axes,) = _figure(1)
    looks = _looks(curves) | _looks(points, first=len(curves), points=True)
    merged = {name: Curve.of((calls, calls, y) for calls, y in some) for name, some in {**curves, **points}.items()}
    for place, name in enumerate(name for name in looks if name in points):
        merged[name].x[:] = [calls * 1.1 ** (place - (len(points) - 1) / 2) for calls in merged[name].x]
    _draw_curves(axes, merged, looks)
    axes.set(xlabel="network calls per image", ylabel=ylabel)
    for which in "xy":
        _log_axis(axes, which)
    several = any(curve.low != curve.high for curve in merged.values())
    _legend(figure, looks, "mean, and range from lowest to highest" if several else None)
    return figure


def _positive(some: Points) -> dict[str, list[tuple[float, float]]]:
    kept = {
        label: [(calls, y) for calls, y in pairs if calls > 0 and is_finite(y) and y > 0]
        for label, pairs in some.items()
    }
    return {label: pairs for label, pairs in kept.items() if pairs}


def save_figure(figure: Figure, path: str | Path):
    """Writes a figure to `path`, or, if that has no suffix of a picture, to both `path`.png and `path`.svg. The same
    figure gives the same bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.suffix[1:] in figure.canvas.get_supported_filetypes()
    for file in [path] if known else [Path(f"{path}{suffix}") for suffix in SUFFIXES]:
        with style.context(["default", _FILES]):
            figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


# --- what they are made of -------------------------------------------------------------------------------------------


def _image_grids(
    grids: Sequence[Mapping[str, Sequence[torch.Tensor]]],
    columns: Sequence[Sequence[str] | None],
    title: str,
    dpi: int = 100,
    fontsize: int = 7,
) -> Figure:
    """Rows of images of shape (C, H, W) in [−1, 1], with a gap between the grids."""
    width = max(len(row) for grid in grids for row in grid.values())
    heights = [height for grid in grids for height in [0.12, *[1.0] * len(grid)]][1:]
    figure = Figure(figsize=(0.8 * width + 1.2, 0.8 * sum(heights) + 0.5), dpi=dpi, layout="constrained")
    subplots = figure.subplots(len(heights), width, squeeze=False, height_ratios=heights)
    for axes in subplots.flat:
        axes.set_axis_off()
    lines = iter(axes for axes, height in zip(subplots, heights, strict=True) if height == 1.0)
    for grid, names in zip(grids, columns, strict=True):
        for r, (name, row) in enumerate(grid.items()):
            line = next(lines)
            for c, image in enumerate(row):
                image = image if image.shape[0] in (1, 3) else image[:1]
                pixels = ((image.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
                line[c].imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                if names and r == 0:
                    line[c].set_title(names[c], fontsize=fontsize)
            line[0].text(-0.15, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def _figure(num_panels: int, sharex: bool = False) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(max(7.5, 3.75 * num_panels), 3.6), dpi=DPI, layout="constrained")
    return figure, figure.subplots(1, num_panels, squeeze=False, sharex=sharex)[0]


def _looks(labels: Iterable[str], first: int = 0, points: bool = False) -> dict[str, dict]:
    """Color, line style and marker of every label; if they differ in a number alone, in its order and by a sequence of
    colors from dark to light."""
    labels, numbers = list(labels), {}
    found = [re.fullmatch(r"(\D*?)(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?)(\D*)", label) for label in labels]
    if len(labels) > 2 and all(found) and len({(m[1], m[3]) for m in found}) == 1:
        numbers = {m[0]: float(m[2]) for m in found}
        labels.sort(key=numbers.get)
    looks = {}
    for i, label in enumerate(labels):
        color = COLORS[(first + i) % len(COLORS)]
        if numbers:
            color = colormaps["viridis"](0.8 * i / (len(labels) - 1))
        if points:
            marker = POINT_MARKERS[i % len(POINT_MARKERS)]
            edge = {"markersize": 11 if marker == "*" else 7, "markeredgecolor": "black", "markeredgewidth": 0.6}
            looks[label] = {"linestyle": "none", "marker": marker, **edge}
        else:
            line = LINE_STYLES[(first + i) % len(LINE_STYLES)]
            looks[label] = {"linestyle": line, "marker": MARKERS[(first + i) % len(MARKERS)]}
        looks[label]["color"] = color
    return looks


def _draw_curves(axes: Axes, curves: Mapping[str, Curve], looks: Mapping[str, dict]):
    for i, (label, look) in enumerate(looks.items()):
        curve = curves[label]
        every = max(1, len(curve.x) // 8)  # the markers tell long curves apart, and do not hide them
        lone = look["linestyle"] == "none"
        if curve.low != curve.high:
            if lone:
                axes.vlines(curve.x, curve.low, curve.high, color=look["color"], linewidth=1.5)
            else:
                axes.fill_between(curve.x, curve.low, curve.high, color=look["color"], alpha=0.2, linewidth=0)
        mark = (i * every // len(looks), every)
        axes.plot(curve.x, curve.y, **look, label=label, markevery=mark, zorder=3 if lone else 2)


def _log_axis(axes: Axes, which: str):
    """A logarithmic axis with numbers as they are written, at as many places as there is room for."""
    axes.set(**{f"{which}scale": "log"})
    axes.autoscale_view()
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    places = next((some for most, some in _LOG_TICKS if decades < most), (1,))
    axis.set_major_locator(LogLocator(subs=places) if places else MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _plain_axis(axis: Axis):
    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axis.set_major_formatter(FuncFormatter(_plain))


def _plain(value: float, _=None) -> str:
    """A number without an exponent."""
    return f"{value:,.10f}".rstrip("0").rstrip(".")


def _legend(figure: Figure, looks: Mapping[str, dict], title: str | None):
    """Where it covers nothing: above several panels, beside a single one."""
    aside = len(figure.axes) == 1
    width = 26 if aside else 40  # in letters
    labels = [textwrap.fill(label, width) for label in looks]
    room = figure.get_figwidth() * 72 / (50 + 4.5 * min(width, max(map(len, looks))))  # labels that fit in a row
    rows = len(looks) if aside else math.ceil(len(looks) / max(1, int(room)))
    figure.legend(
        [Line2D([], [], **look) for look in looks.values()],
        labels,
        loc="outside right upper" if aside else "outside upper center",
        ncols=math.ceil(len(looks) / rows),
        title=textwrap.fill(title, width) if title and aside else title,
        title_fontsize=8,
    )


def _running_median(values: Sequence[float]) -> list[float]:
    window = max(1, len(values) // 20)
    return [torch.tensor(values[max(0, i - window) : i + window + 1]).median().item() for i in range(len(values))]
