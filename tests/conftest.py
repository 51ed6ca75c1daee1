import os
import site
import subprocess
import venv
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import UNet2DModel
from hub_server import HubServer

from pid_diffusers import Denoiser

# The networks here are too small for more threads, which take many times as long where they wait for each other beside
# other processes, and their number decides the last bits of sums. Here, and for what the tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever a test before did."""
    torch.set_num_threads(1)


# With hf_xet installed, uploads would leave the protocol that HubServer speaks. The environment variable is read
# when the client is imported, which was above.
huggingface_hub.constants.HF_HUB_DISABLE_XET = True


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


@pytest.fixture(scope="session")
def python_without_package(tmp_path_factory) -> str:
    """An interpreter that has every package of this one but pid_diffusers."""
    folder = tmp_path_factory.mktemp("without-package")
    venv.create(folder, symlinks=os.name != "nt")
    scripts, packages = ("Scripts", "Lib") if os.name == "nt" else ("bin", "lib")
    target = next((folder / packages).rglob("site-packages"))
    for source in map(Path, [*site.getsitepackages(), site.getusersitepackages()]):
        for path in source.glob("*"):
            if "pid_diffusers" not in path.name and path.suffix != ".pth" and not (target / path.name).exists():
                (target / path.name).symlink_to(path)
    python = str(folder / scripts / "python")
    found = "import importlib.util as u, torch; print(u.find_spec('pid_diffusers'))"
    settings = {"capture_output": True, "text": True, "cwd": folder, "env": {**os.environ, "PYTHONPATH": ""}}
    result = subprocess.run([python, "-c", found], **settings)
    assert result.stdout.strip() == "None", result.stderr
    return python


@pytest.fixture
def hub(monkeypatch, tmp_path_factory):
    """A Hugging Face Hub on this machine; the client of this process and of its children is logged in there.

    In this process `HfApi(endpoint=hub.endpoint)` is the Hub's user, and with `token=False` nobody.
    """
    with HubServer() as server:
        environment = server.environment(tmp_path_factory.mktemp("hf-home"))
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        # the client has read its environment already, when it was imported
        constants = {
            "ENDPOINT": server.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": environment["HF_HUB_CACHE"],
            "HF_HUB_OFFLINE": False,
        }
        for name, value in constants.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", server.endpoint)
        yield server
