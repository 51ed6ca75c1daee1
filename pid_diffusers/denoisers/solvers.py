"""Numerical solutions of a denoiser's probability-flow ODE, dx/dσ = (x − D(x, σ)) / σ (EDM, eq. 3; PID, eq. 6)."""

from collections.abc import Callable, Sequence

import torch


def euler(
    denoiser: Callable, x: torch.Tensor, sigmas: Sequence[float] | torch.Tensor, **condition
) -> list[torch.Tensor]:
    """
    Euler's method: one call of the denoiser a step, first order.

    Args:
        denoiser: D(x, σ, **condition).
        x (`torch.Tensor` of shape `(B, C, H, W)`): the state at `sigmas[0]`, often z = T · noise.
        sigmas: the grid, from high to low noise.

    Returns:
        `list[torch.Tensor]`: the state at every noise level of the grid, of which the first is `x` itself.
    """
    states = [x]
    for t, s in _intervals(sigmas):
        states.append(states[-1] + (s - t) * _slope(denoiser, states[-1], t, condition))
    return states


def heun(
    denoiser: Callable, x: torch.Tensor, sigmas: Sequence[float] | torch.Tensor, **condition
) -> list[torch.Tensor]:
    """Heun's method: two calls of the denoiser a step, second order; arguments and result as in [`euler`]. A step to
    σ = 0, where the slope is not defined, is Euler's."""
    states = [x]
    for t, s in _intervals(sigmas):
        x = states[-1]
        slope = _slope(denoiser, x, t, condition)
        if s > 0:
            slope = (slope + _slope(denoiser, x + (s - t) * slope, s, condition)) / 2
        states.append(x + (s - t) * slope)
    return states


def _slope(denoiser: Callable, x: torch.Tensor, t: float, condition: dict) -> torch.Tensor:
    return (x - denoiser(x, t, **condition)) / t


def _intervals(sigmas: Sequence[float] | torch.Tensor):
    sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").tolist()
    return zip(sigmas[:-1], sigmas[1:], strict=True)
