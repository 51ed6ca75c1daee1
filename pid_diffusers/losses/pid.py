"""The loss of Physics Informed Distillation (PID, eq. 9–11)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..denoisers import Denoiser
from ..precision import widest_float
from ..trajectory import TrajectoryModel
from .distances import get_distance

SCHEMES = ("upwind", "midpoint", "central")
WEIGHTINGS = ("uniform", "inverse_variance")


class PIDLoss(nn.Module):
    r"""
    How far the student's trajectory is from solving the teacher's ODE at grid points t = t_i:

        d( x_θ(z,t) − t · dx_θ/dt,  sg[D(x, σ)] )                                      (PID, eq. 11)

    The schemes differ in the derivative and in where the teacher is asked:

    - `"upwind"`: (x_θ(z,t) − x_θ(z,s)) / (t − s) with s = t_{i+1}; the teacher at (x_θ(z,t), t). First order: a loss
      of 0 means the Euler solution on the grid. At the last index s = t_{N−2}, as in the authors' code.
    - `"midpoint"`: the same two student calls and the same left-hand side; the teacher at ((x_θ(z,t) + x_θ(z,s))/2,
      (t + s)/2). Second order: a loss of 0 means the solution by the implicit midpoint rule. The last index repeats
      the interval of the one before.
    - `"central"`: the derivative at t of the parabola through the points at t and at its two neighbours on the
      (uneven) grid, at the ends through the nearest three points; the teacher at (x_θ(z,t), t). Second order, with
      three student calls.

    The left-hand side is computed without z, which cancels in it. With derivative weights w_k at the points t_k of the
    stencil, x_θ(z,t) − t Σ_k w_k x_θ(z,t_k) equals

        a z + b [ F(t) + Σ_{k≠0} β_k (F(t_k) − F(t)) ],   β_k = −t w_k (T − t_k)/T,

    for instance β_1 = t(T−s)/(T(t−s)) in `"upwind"`. The literal form subtracts numbers of size T to find one of size
    1; in float32 it is wrong by up to 3e-4 where this form is wrong by 1e-7.

    Gradients flow through all student calls, which are one call of a larger batch, and none through the teacher.

    Args:
        scheme (`str`, defaults to `"upwind"`): `"upwind"`, `"midpoint"` or `"central"`.
        distance (`str` or `Callable`, defaults to `"l2"`): `"l2"`, `"l1"`, `"pseudo_huber"`, `"lpips"`, or a function
            of (prediction, target), both `(B, C, H, W)`, that returns `(B,)`.
        split_batch (`bool`, defaults to `False`): one student call a point of the stencil, which halves the memory.
        weighting (`str`, defaults to `"uniform"`): what a sample's loss is multiplied by. `"uniform"`: 1, the paper's;
            `"inverse_variance"`: σ_d²/(σ²+σ_d²) of the noise level at which the teacher is asked, for teachers that
            predict noise, whose D multiplies the network's error by σ.

    Raises:
        ValueError: for an unknown scheme, distance or weighting.
    """

    def __init__(
        self,
        scheme: str = "upwind",
        distance: str | Callable = "l2",
        split_batch: bool = False,
        weighting: str = "uniform",
    ):
        super().__init__()
        if scheme not in SCHEMES:
            raise ValueError(f"scheme is {scheme!r}; choose one of {', '.join(SCHEMES)}.")
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting is {weighting!r}; choose one of {', '.join(WEIGHTINGS)}.")
        self.scheme = scheme
        self.weighting = weighting
        self.distance = get_distance(distance) if isinstance(distance, str) else distance
        self.split_batch = split_batch

    def forward(
        self, student: TrajectoryModel, teacher: Denoiser, z: torch.Tensor, indices: torch.Tensor, **condition
    ) -> torch.Tensor:
        """
        The loss of each sample, `(B,)`.

        Args:
            student (`TrajectoryModel`): x_θ; its scheduler gives the grid and the head.
            teacher (`Denoiser`): D.
            z (`torch.Tensor` of shape `(B, C, H, W)`): starts of standard deviation T.
            indices (`torch.Tensor` of shape `(B,)`): integers i in 0 … N−1, the grid points.
            **condition: passed to student and teacher, such as `class_labels` of shape `(B,)`.
        """
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        scheduler = student.scheduler
        sigmas, weights = self.stencil(scheduler.grid(), indices.cpu())
        sigmas = [sigma.to(z.device, z.dtype) for sigma in sigmas]
        outputs = self._network_outputs(student, z, sigmas, condition)
        prediction = self.composite(z, outputs, weights, scheduler.head)

        with torch.no_grad():
            x, sigma = scheduler.trajectory(outputs[0], z, sigmas[0])[0], sigmas[0]
            if self.scheme == "midpoint":
                x = (x + scheduler.trajectory(outputs[1], z, sigmas[1])[0]) / 2
                sigma = (sigma + sigmas[1]) / 2
            target = teacher(x, sigma, **condition)
        distance = self.distance(prediction, target)
        if self.weighting == "uniform":
            return distance
        variance = scheduler.config.sigma_data**2
        return distance * (variance / (sigma**2 + variance)).to(distance.dtype)

    def composite(
        self,
        z: torch.Tensor,
        outputs: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
        head: tuple[float, float],
    ) -> torch.Tensor:
        """
        a z + b [ F(t) + Σ_k β_k (F(t_k) − F(t)) ], the left-hand side of the loss, `(B, C, H, W)`.

        Args:
            z (`torch.Tensor` of shape `(B, C, H, W)`): starts of standard deviation T.
            outputs: F(t), F(t_1), …, each `(B, C, H, W)`.
            weights: β_1, …, each `(B,)` in float64, from [`~PIDLoss.stencil`].
            head: (a, b), from [`PIDScheduler.head`].
        """
        # β multiplies the rounding of F(t_k) − F(t), and has a rounding of its own
        dtype = widest_float(z.device)
        first = outputs[0].to(dtype)
        combined = first
        for output, weight in zip(outputs[1:], weights, strict=True):
            beta = weight.to(dtype).to(z.device).reshape(-1, *[1] * (z.ndim - 1))
            combined = combined + beta * (output.to(dtype) - first)
        return (head[0] * z.to(dtype) + head[1] * combined).to(z.dtype)

    def stencil(
        self, grid: torch.Tensor, indices: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """
        The noise levels (t, t_1, …) at which the student is asked and the weights (β_1, …), each `(B,)`.

        Computed in float64, since t/(t−s) reaches 183 at N = 1000 and multiplies every rounding error.

        Args:
            grid (`torch.Tensor` of shape `(N,)`): noise levels from T to ε.
            indices (`torch.Tensor` of shape `(B,)`): integers in 0 … N−1.

        Raises:
            ValueError: if an index is not in 0 … N−1, or N is too small for the scheme.
        """
        n, max_sigma = len(grid), grid[0]
        if bool(((indices < 0) | (indices >= n)).any()):
            raise ValueError(f"indices must lie in 0 … {n - 1}, the points of the grid.")
        t = grid[indices]
        if self.scheme != "central":
            s = grid[torch.where(indices < n - 1, indices + 1, n - 2)]
            return (t, s), (t * (max_sigma - s) / (max_sigma * (t - s)),)
        if n < 3:
            raise ValueError(f"num_train_timesteps is {n}; the central scheme needs a grid of at least 3 points.")
        middle = indices.clamp(1, n - 2)  # the middle of the three points nearest to i
        p = grid[torch.where(indices == middle, middle - 1, middle)]
        q = grid[torch.where(indices < middle, middle + 1, torch.where(indices == middle, middle + 1, middle - 1))]
        w_p, w_q = (t - q) / ((p - t) * (p - q)), (t - p) / ((q - t) * (q - p))
        beta_p, beta_q = (-t * w * (max_sigma - r) / max_sigma for w, r in ((w_p, p), (w_q, q)))
        return (t, p, q), (beta_p, beta_q)

    def _network_outputs(
        self, student: TrajectoryModel, z: torch.Tensor, sigmas: list[torch.Tensor], condition: dict
    ) -> list[torch.Tensor]:
        if self.split_batch:
            return [student.network_output(z, sigma, **condition) for sigma in sigmas]
        # One forward pass, because DistributedDataParallel and CUDA graphs do not take two before a backward pass.
        k = len(sigmas)
        repeated = {name: value.repeat(k, *[1] * (value.ndim - 1)) for name, value in condition.items()}
        outputs = student.network_output(z.repeat(k, 1, 1, 1), torch.cat(sigmas), **repeated)
        return list(outputs.chunk(k))
