import pytest
import torch
from diffusers import UNet2DModel

from pid_diffusers import Denoiser

# The networks here are too small for more, and threads that wait for each other get in the way of other processes.
torch.set_num_threads(1)


class GaussianDenoiser(Denoiser):
    """The teacher of N(0, sd² I), D(x, σ) = x sd²/(σ²+sd²), whose ODE has a solution in closed form."""

    def __init__(self, sd: float):
        super().__init__()
        self.sd = sd

    def forward(self, x, sigma):
        sigma = torch.as_tensor(sigma, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        return x * self.sd**2 / (sigma**2 + self.sd**2)

    def solution(self, x, sigma_max, sigma):
        """x(σ) = x(T) √((σ²+sd²)/(T²+sd²))"""
        return x * ((sigma**2 + self.sd**2) / (sigma_max**2 + self.sd**2)) ** 0.5


@pytest.fixture(scope="session")
def gaussian_teacher():
    return GaussianDenoiser


@pytest.fixture(scope="session")
def tiny_unet():
    """Creates small random UNets; the same arguments give the same weights."""

    def create(seed: int = 0, **config) -> UNet2DModel:
        defaults = {
            "sample_size": 8,
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "block_out_channels": (8, 16),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 4,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet2DModel(**{**defaults, **config}).eval()

    return create


@pytest.fixture(scope="session")
def noise():
    """Creates standard normal noise; the same arguments give the same noise."""

    def create(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return create
