import importlib.util
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from pid_diffusers import Denoiser, EmpiricalDenoiser, PIDScheduler
from pid_diffusers.denoisers import euler, heun
from pid_diffusers.evaluation.digits import load_digits
from pid_diffusers.evaluation.same_seed import solve
from pid_diffusers.training import parse_config

PATH = Path(__file__).parent.parent / "benchmarks" / "experiments.py"


@pytest.fixture(scope="module")
def experiments():
    spec = importlib.util.spec_from_file_location("experiments", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_variant_of_every_experiment_is_a_valid_run_of_its_own(experiments, tmp_path):
    for name in experiments.TRAINED:
        runs = experiments.variants(name, {})
        folders = {experiments.run_folder(tmp_path, settings, seed) for settings in runs.values() for seed in (0, 1)}
        assert len(folders) == 2 * len(runs)
        for settings in runs.values():
            flags = {**experiments.COMMON, **settings}
            config = parse_config([word for key, value in flags.items() for word in (f"--{key}", str(value))])
            assert config.preset == "digits"
            assert all(str(getattr(config, key)) == str(value) for key, value in settings.items())


def test_the_default_run_is_shared_by_the_experiments_that_have_it(experiments, tmp_path):
    names = {
        "schemes": "midpoint, N = 250",
        "distances": "l2",
        "students": "full, copy of the teacher",
        "heads": "edm",
    }
    folders = {
        experiments.run_folder(tmp_path, experiments.variants(name, {})[variant], 0) for name, variant in names.items()
    }
    assert folders == {tmp_path / "runs" / "seed=0"}


def test_settings_of_all_runs_reach_them_and_name_their_folders(experiments, tmp_path):
    changes = {"max_train_steps": 350, "learning_rate": 0.0005}
    (edm, sample) = experiments.variants("heads", changes).values()
    assert edm == changes and sample == {"prediction_type": "sample", **changes}
    places = {
        str(experiments.run_folder(tmp_path, {key: value}, 0))
        for key, value in (
            *(("learning_rate", rate) for rate in (0.0005, 0.0002, 0.002)),
            *(("teacher", name) for name in ("/a/teacher", "/b/teacher")),
            *(("student_config", name) for name in ("/a/config.json", "/b/config.json")),
        )
    }
    assert len(places) == 7
    assert experiments.variants("heads", {"max_train_steps": 250})["edm"] == {}  # which is what they have anyway


def test_dpm_solver_converges_to_the_teachers_ode(experiments):
    teacher = Denoiser.from_pretrained("digits").eval()
    z, labels = 80 * torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 5])
    with torch.no_grad():
        exact = solve(heun, teacher, z, PIDScheduler().grid(65), class_labels=labels)
        errors = [
            (experiments.dpm_solver(teacher, z, n, class_labels=labels) - exact).square().mean().sqrt().item()
            for n in (5, 10, 40)
        ]
    assert errors[0] > 2 * errors[1] > 0 and errors[2] < 0.01


def test_fid_is_0_of_the_digits_themselves_and_large_of_noise(experiments):
    real = load_digits()[0]
    assert experiments.fid(real) == pytest.approx(0, abs=1e-3)  # their 17 levels of gray become 8 bits
    assert experiments.fid(torch.rand_like(real) * 2 - 1) > 10


def test_ddim_is_eulers_method_between_its_noise_levels(experiments, noise):
    """Its own steps on the same time steps, the linear betas' 1,000, of which every 100th is taken."""
    denoiser = EmpiricalDenoiser(noise(5, 1, 4, 4).double())
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False)
    alphas = scheduler.alphas_cumprod.double()
    start = ((1 - alphas[900]) / alphas[900]).sqrt().item()
    sigmas = experiments.ddim_grid(start, 9)
    assert sigmas[0] == pytest.approx(start) and sigmas[-1] == 0
    z = start * noise(3, 1, 4, 4, seed=1).double()
    states = euler(denoiser, z, sigmas)

    scheduler.set_timesteps(10)  # 900, 800, …, 0
    x = z / math.sqrt(1 + start**2)
    for t, expected, s in zip(scheduler.timesteps[:9], states[1:9], sigmas[1:9], strict=False):
        sigma = ((1 - alphas[t]) / alphas[t]).sqrt()
        levels = x * (1 + sigma**2).sqrt()
        epsilon = (levels - denoiser(levels, sigma)) / sigma
        x = scheduler.step(epsilon, t, x).prev_sample
        torch.testing.assert_close(x * math.sqrt(1 + s**2), expected, atol=1e-6, rtol=1e-5)


def test_the_error_at_loss_0_falls_with_the_order_of_the_scheme(experiments):
    first = [experiments.discretization_error("upwind", n, num_starts=4) for n in (11, 21, 41)]
    second = experiments.discretization_error("midpoint", 21, num_starts=4)
    assert first[0] > first[1] > first[2] > 0
    assert second < first[1] / 2
    assert experiments.discretization_error("central", 21) is None
