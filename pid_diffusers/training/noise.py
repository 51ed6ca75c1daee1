"""What a training step draws, as a function of (seed, rank, step, micro-step) alone.

No state has to be saved: a run that is resumed draws what it would have drawn.
"""

import numpy as np
import torch


def generator_for(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator whose stream depends on nothing but the non-negative integers of `key`."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> 1))


def draw_batch(
    shape: tuple[int, ...], sigma_max: float, num_train_timesteps: int, key: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """
    Starts and grid points of a micro-step.

    Args:
        shape (`tuple[int, ...]`): (B, C, H, W).
        sigma_max (`float`): T.
        num_train_timesteps (`int`): N.
        key (`tuple[int, ...]`): (seed, rank, step, micro-step).
        device (`torch.device`): where z is drawn; the rest is drawn on the CPU.

    Returns:
        z ~ N(0, T² I) of that shape, i ~ U{0 … N−1} of shape `(B,)`, and a generator for the condition.
    """
    z = sigma_max * torch.randn(shape, generator=generator_for(*key, 0, device=device), device=device)
    generator = generator_for(*key, 1)
    return z, torch.randint(num_train_timesteps, shape[:1], generator=generator), generator
