import numpy as np
import pytest
import torch

from pid_diffusers import EmpiricalDenoiser, PIDScheduler
from pid_diffusers.denoisers import euler, heun


@pytest.mark.parametrize("solver, order", [(euler, 1), (heun, 2)])
def test_order_of_convergence_to_the_closed_form_solution(gaussian_teacher, noise, solver, order):
    teacher, z = gaussian_teacher(0.5), 80 * noise(1, 1, 4, 4, dtype=torch.float64)
    exact = teacher.solution(z, 80.0, 0.002)
    steps = [64, 128, 256, 512]
    errors = [(solver(teacher, z, PIDScheduler().grid(n + 1))[-1] - exact).norm().item() for n in steps]
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert slope == pytest.approx(-order, abs=0.1)


@pytest.mark.parametrize("solver", [euler, heun])
def test_states_begin_with_the_start_and_follow_the_grid(gaussian_teacher, noise, solver):
    teacher, z = gaussian_teacher(0.5), 80 * noise(1, 1, 4, 4, dtype=torch.float64)
    grid = PIDScheduler().grid(1001)
    states = solver(teacher, z, grid)
    assert len(states) == 1001
    assert states[0] is z
    for i in (1, 100, 500, 1000):
        exact = teacher.solution(z, 80.0, grid[i].item())
        assert (states[i] - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("solver", [euler, heun])
def test_the_ode_of_one_image_is_solved_exactly_in_one_step(noise, solver):
    """The trajectories of a single image y are straight: x(σ) = y + (σ/T)(z − y)."""
    image, z = noise(1, 1, 4, 4, dtype=torch.float64), 80 * noise(1, 1, 4, 4, seed=1, dtype=torch.float64)
    x = solver(EmpiricalDenoiser(image), z, [80.0, 4.0])[-1]
    torch.testing.assert_close(x, image + (z - image) / 20, rtol=1e-12, atol=1e-12)


def test_a_step_of_euler_is_the_formula(gaussian_teacher, noise):
    teacher, x = gaussian_teacher(0.5), noise(2, 1, 4, 4, dtype=torch.float64)
    expected = x + (1.0 - 2.0) * (x - teacher(x, 2.0)) / 2.0
    torch.testing.assert_close(euler(teacher, x, [2.0, 1.0])[-1], expected, rtol=1e-14, atol=1e-14)


def test_a_step_of_heun_averages_the_slopes_at_both_ends(gaussian_teacher, noise):
    teacher, x = gaussian_teacher(0.5), noise(2, 1, 4, 4, dtype=torch.float64)
    slope = (x - teacher(x, 2.0)) / 2.0
    ahead = x - slope
    expected = x - (slope + (ahead - teacher(ahead, 1.0)) / 1.0) / 2
    torch.testing.assert_close(heun(teacher, x, [2.0, 1.0])[-1], expected, rtol=1e-14, atol=1e-14)


def test_heuns_last_step_to_0_is_eulers(gaussian_teacher, noise):
    teacher, x = gaussian_teacher(0.5), noise(2, 1, 4, 4, dtype=torch.float64)
    states = heun(teacher, x, [2.0, 1.0, 0.0])
    assert torch.equal(states[-1], euler(teacher, states[-2], [1.0, 0.0])[-1])
    torch.testing.assert_close(states[-1], teacher(states[-2], 1.0), rtol=1e-14, atol=1e-14)


def test_conditions_reach_the_denoiser(noise):
    images = noise(2, 1, 4, 4, dtype=torch.float64)
    teacher, z = EmpiricalDenoiser(images, torch.tensor([0, 1])), 80 * noise(2, 1, 4, 4, seed=1, dtype=torch.float64)
    for solver in (euler, heun):
        x = solver(teacher, z, [80.0, 1.0, 0.0], class_labels=torch.tensor([1, 0]))[-1]
        torch.testing.assert_close(x, images.flip(0), rtol=1e-12, atol=1e-12)
