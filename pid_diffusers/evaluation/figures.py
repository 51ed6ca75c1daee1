"""Pictures of a run."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


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
    _save(_image_rows([list(images) for images in rows.values()], list(rows), columns, title), path)


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
    rows, names = [], []
    for b in range(student[0].shape[0]):
        for name, states in (("student", student), ("teacher", teacher)):
            shown = [x[b] / (1 + float(t) ** 2) ** 0.5 for t, x in zip(sigmas, states, strict=True)]
            rows.append(list(decode(torch.stack(shown))))
            names.append(name)
    columns = [f"t = {float(t):.3g}" for t in sigmas]
    _save(_image_rows(rows, names, columns, title, pairs=True), path)


def save_loss_curve(path: str | Path, steps: Sequence[int], losses: Sequence[float]):
    """The training loss over optimizer steps, on a logarithmic axis, with its running median."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=1, label="loss")
    window = max(1, len(losses) // 20)
    running = [torch.tensor(losses[max(0, i - window) : i + window + 1]).median().item() for i in range(len(losses))]
    axes.plot(steps, running, color="C0", linewidth=2, label="running median")
    axes.set(xlabel="optimizer step", ylabel="PID loss", yscale="log")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _image_rows(
    rows: list[list[torch.Tensor]], names: list[str], columns: list[str] | None, title: str, pairs: bool = False
) -> Figure:
    """Rows of images of shape (C, H, W) in [−1, 1]; `pairs` leaves a gap after every second row."""
    width = max(len(row) for row in rows)
    heights = [1.0, *([1.0, 0.12, 1.0] * (len(rows) // 2))][: 3 * len(rows) // 2 - 1] if pairs else [1.0] * len(rows)
    figure = Figure(figsize=(0.8 * width + 1.2, 0.8 * sum(heights) + 0.5), layout="constrained")
    grid = figure.subplots(len(heights), width, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
    lines = [axes for axes, height in zip(grid, heights, strict=True) if height == 1.0]
    for r, (line, row) in enumerate(zip(lines, rows, strict=True)):
        for c, image in enumerate(row):
            image = image if image.shape[0] in (1, 3) else image[:1]
            pixels = ((image.float() + 1) / 2).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
            line[c].imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if columns and r == 0:
                line[c].set_title(columns[c], fontsize=7)
        line[0].text(-0.15, 0.5, names[r], transform=line[0].transAxes, ha="right", va="center", fontsize=8)
    if title:
        figure.suptitle(title, fontsize=9)
    return figure


def _save(figure: Figure, path: str | Path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(str(path)) if path.suffix == ".png" else figure.savefig(path)
