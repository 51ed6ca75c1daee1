"""How close a student is to its teacher, measured from the same seeds; no data needed."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..denoisers import Denoiser, heun
from ..precision import widest_float
from ..training.noise import generator_for
from ..trajectory import TrajectoryModel

# a part of every key that training never draws from
EVALUATION_STREAM = 0xE7A1


@dataclass
class SameSeedSamples:
    """Samples of teacher and student from the same starts, at the student's lowest noise level ε.

    Attributes:
        student (`torch.Tensor` of shape `(B, C, H, W)`): x_θ(z, ε), one network call.
        teacher (`torch.Tensor` of shape `(B, C, H, W)`): the endpoint of the teacher's ODE.
        condition (`dict`): what both were conditioned on.
        unit (`float`, defaults to 1.0): what a difference of 1 is of images in [−1, 1]: 2 for data in [0, 1].
    """

    student: torch.Tensor
    teacher: torch.Tensor
    condition: dict[str, torch.Tensor]
    unit: float = 1.0

    @property
    def rms_distance(self) -> float:
        """√(mean over images and pixels of (student − teacher)²), for images in [−1, 1], or latents as they are."""
        return self.unit * (self.student - self.teacher).square().mean().sqrt().item()

    @property
    def rms_distances(self) -> torch.Tensor:
        """The same of every sample by itself, `(B,)` in float64."""
        return self.unit * (self.student.double() - self.teacher.double()).square().flatten(1).mean(dim=1).sqrt()


def draw_starts(
    student: TrajectoryModel, teacher: Denoiser, num_samples: int, seed: int, class_labels: list[int] | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    Starts z that training with `seed` never draws, `(B, C, H, W)` on the CPU, and what each is conditioned on: classes
    or prompts in turn ([`Denoiser.shown_condition`]).

    Args:
        class_labels (`list[int]`, *optional*): one a sample, instead of the teacher's classes in turn.
    """
    generator = generator_for(seed, EVALUATION_STREAM)
    z = student.scheduler.config.sigma_max * torch.randn(num_samples, *teacher.sample_shape, generator=generator)
    return z, teacher.shown_condition(num_samples, class_labels)


def batches(
    z: torch.Tensor, condition: dict[str, torch.Tensor], batch_size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Starts and conditions, `batch_size` rows at a time, on a device."""
    for i in range(0, len(z), batch_size):
        yield z[i : i + batch_size].to(device), {k: v[i : i + batch_size].to(device) for k, v in condition.items()}


def value_unit(student: TrajectoryModel) -> float:
    """What a difference of 1 is of images in [−1, 1]: 2 for data in [0, 1]."""
    return 2 / (1 - student.scheduler.config.get("sample_min", -1.0))


@torch.no_grad()
def solve(solver: Callable, teacher: Denoiser, z: torch.Tensor, sigmas: torch.Tensor, **condition) -> torch.Tensor:
    """The endpoint of a solver, such as [`heun`], on the grid `sigmas`, in the widest type; no state is kept."""
    x = z.to(widest_float(z.device))
    for interval in itertools.pairwise(sigmas.tolist()):
        x = solver(teacher, x, interval, **condition)[-1]
    return x


@torch.no_grad()
def teacher_trajectory(
    student: TrajectoryModel, teacher: Denoiser, z: torch.Tensor, condition: dict, heun_steps: int = 40
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The grid of `heun_steps` + 1 noise levels from T to ε, and the teacher's ODE solution at each."""
    sigmas = student.scheduler.grid(heun_steps + 1)
    return sigmas, heun(teacher, z.to(widest_float(z.device)), sigmas, **condition)


@torch.no_grad()
def same_seed_samples(
    student: TrajectoryModel,
    teacher: Denoiser,
    num_samples: int,
    batch_size: int = 128,
    seed: int = 0,
    heun_steps: int = 40,
    class_labels: list[int] | None = None,
    endpoints: torch.Tensor | None = None,
) -> SameSeedSamples:
    """
    One-step samples of the student beside the teacher's ODE endpoints, from starts that training never draws.

    Args:
        student (`TrajectoryModel`), teacher (`Denoiser`): on the same device.
        num_samples (`int`): how many starts.
        batch_size (`int`, defaults to 128): how many at a time.
        seed (`int`, defaults to 0): of the starts.
        heun_steps (`int`, defaults to 40): steps of Heun's method on the grid from T to ε, two teacher calls each.
        class_labels (`list[int]`, *optional*): one a sample, instead of the teacher's classes in turn.
        endpoints (`torch.Tensor`, *optional*): the teacher's, if they were computed before.
    """
    device = next(student.parameters()).device
    z, condition = draw_starts(student, teacher, num_samples, seed, class_labels)
    sigmas = student.scheduler.grid(heun_steps + 1)
    students, teachers = [], []
    for batch, some in batches(z, condition, batch_size, device):
        students.append(student(batch, student.scheduler.config.sigma_min, **some).cpu())
        if endpoints is None:
            teachers.append(solve(heun, teacher, batch, sigmas, **some).float().cpu())
    endpoints = torch.cat(teachers) if endpoints is None else endpoints
    return SameSeedSamples(torch.cat(students), endpoints, condition, value_unit(student))


@torch.no_grad()
def measure_speedup(
    student: TrajectoryModel, teacher: Denoiser, batch_size: int = 64, heun_steps: int = 35, repeats: int = 3
) -> float:
    """How many times as fast one step of the student is as the teacher's Heun sampler, for the same batch.

    The fastest of `repeats` runs of each, taken in turn, since other work on the machine only adds time.
    """
    device = next(student.parameters()).device
    z, condition = draw_starts(student, teacher, batch_size, seed=0)
    z, condition = z.to(device), {name: value.to(device) for name, value in condition.items()}

    def one_step():
        student(z, student.scheduler.config.sigma_min, **condition)

    def solve():
        heun(teacher, z, student.scheduler.grid(heun_steps + 1), **condition)

    one_step()  # the first call allocates
    times = [(_seconds(one_step, device), _seconds(solve, device)) for _ in range(repeats)]
    return min(slow for _, slow in times) / min(fast for fast, _ in times)


def _seconds(function, device: torch.device) -> float:
    synchronize = (lambda: None) if device.type == "cpu" else torch.accelerator.synchronize
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start
