"""Score networks of the variance-exploding SDE as teachers."""

import itertools

import pytest
import torch
from diffusers import DDPMPipeline, ScoreSdeVeScheduler

from pid_diffusers import Denoiser, EmpiricalDenoiser, PIDLoss, PIDScheduler, TrajectoryModel, VEDenoiser


@pytest.fixture
def unet(tiny_unet):
    """As small as can be with the time embedding of NCSN++."""
    return tiny_unet(time_embedding_type="fourier", freq_shift=0)


@torch.no_grad()
def test_d_gives_the_mean_of_diffusers_own_step(unet, noise):
    scheduler = ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    scheduler.set_timesteps(20)
    scheduler.set_sigmas(20)
    teacher = VEDenoiser(unet, sigma_min=0.01, sigma_max=50.0)
    sigmas = scheduler.discrete_sigmas.tolist()
    for i, (following, sigma) in enumerate(itertools.pairwise(sigmas)):
        x = sigma * noise(2, 3, 8, 8, seed=i)
        score = unet(x, torch.full((2,), sigma), return_dict=False)[0]
        t = scheduler.timesteps[len(sigmas) - 2 - i]
        mean = scheduler.step_pred(score, t, x).prev_sample_mean
        through_d = x + (sigma**2 - following**2) * (teacher(x, sigma) - x) / sigma**2
        assert (mean - through_d).abs().max() <= 1e-4 * mean.abs().max().clamp(min=1)


class Score(torch.nn.Module):
    """∇ log p of finite data with noise, in closed form."""

    def __init__(self, data):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.denoiser = EmpiricalDenoiser(data)

    def forward(self, sample, timestep, return_dict=True):
        return ((self.denoiser(sample, timestep) - sample) / timestep.reshape(-1, 1, 1, 1) ** 2,)


def test_d_of_the_true_score_is_the_closed_form(noise):
    data = noise(5, 1, 4, 4, dtype=torch.float64)
    teacher = VEDenoiser(Score(data))
    for sigma in (0.01, 0.5, 1348.0):
        x, levels = data + sigma * noise(5, 1, 4, 4, dtype=torch.float64), torch.full((5,), sigma, dtype=torch.float64)
        assert torch.allclose(teacher(x, levels), EmpiricalDenoiser(data)(x, levels), atol=1e-8)


@torch.no_grad()
def test_a_saved_pipeline_is_the_same_denoiser(unet, noise, tmp_path):
    DDPMPipeline(unet, ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=99.0)).save_pretrained(tmp_path)
    teacher, x = Denoiser.from_pretrained(tmp_path), noise(2, 3, 8, 8)
    assert type(teacher) is VEDenoiser
    assert (teacher.trajectory_config["sigma_min"], teacher.trajectory_config["sigma_max"]) == (0.02, 99.0)
    assert torch.equal(teacher(x, 3.0), VEDenoiser(unet)(x, 3.0))


def test_its_student_sees_what_the_teacher_sees_at_the_start_and_begins_near_zero(unet, noise):
    teacher = VEDenoiser(unet, sigma_max=50.0)
    student = TrajectoryModel(unet, PIDScheduler(**teacher.trajectory_config))
    z = 50.0 * noise(2, 3, 8, 8)
    with torch.no_grad():
        score = unet(z, torch.full((2,), 50.0), return_dict=False)[0]
        assert torch.allclose(student.network_output(z, 50.0), 50.0 * score, rtol=1e-5)
        head = student.scheduler.trajectory(student.network_output(z, 50.0), z, 50.0)[1]
        assert torch.allclose(head, z / 50.0 + 50.0 * score, atol=1e-5)
        assert torch.equal(student(z, 50.0), z)
    loss = PIDLoss("midpoint")(student, teacher, z, torch.tensor([0, 249]))
    loss.mean().backward()
    assert loss.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in unet.parameters())


@torch.no_grad()
def test_its_data_lie_in_0_to_1_and_its_images_in_minus_1_to_1(unet, noise):
    teacher, x = VEDenoiser(unet, sigma_max=50.0), noise(2, 3, 8, 8)
    assert PIDScheduler(**teacher.trajectory_config).config.sample_min == 0
    assert torch.equal(teacher.decode(x), 2 * x - 1)
    assert torch.equal(EmpiricalDenoiser(x).decode(x), x)
