import math

import pytest
import torch

from pid_diffusers import EDMDenoiser, PIDScheduler, TrajectoryModel
from pid_diffusers.schedulers import PIDSchedulerOutput

HEADS = ["sample", "edm", "epsilon", "v_prediction"]
SIGMA_MAX = [80.0, 14.6146, 157.4]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_train_timesteps": 2},
        {"num_train_timesteps": 1000, "rho": 5.0},
        {"sigma_min": 0.0292, "sigma_max": 14.6146},
        {"sigma_min": 0.01, "sigma_max": 157.4, "rho": 1.0, "num_train_timesteps": 40},
    ],
)
def test_grid_obeys_the_formula_and_ends_exactly_at_T_and_eps(config):
    scheduler = PIDScheduler(**config)
    n, rho = scheduler.config.num_train_timesteps, scheduler.config.rho
    start, end = scheduler.config.sigma_max, scheduler.config.sigma_min
    grid = scheduler.grid()
    assert grid.dtype == torch.float64
    assert len(grid) == len(scheduler) == n
    assert grid[0].item() == start
    assert grid[-1].item() == end
    assert bool((grid.diff() < 0).all())
    for i, sigma in enumerate(grid.tolist()):
        assert sigma == pytest.approx(
            (start ** (1 / rho) + i / (n - 1) * (end ** (1 / rho) - start ** (1 / rho))) ** rho, rel=1e-12
        )


def test_grid_of_another_length_has_the_same_ends():
    grid = PIDScheduler().grid(5)
    assert len(grid) == 5
    assert (grid[0].item(), grid[-1].item()) == (80.0, 0.002)


def test_c_in_scales_the_start_of_data_and_noise_to_unit_variance():
    assert PIDScheduler(sigma_max=3.0, sigma_data=4.0).c_in == pytest.approx(1 / 5, rel=1e-15)
    scheduler = PIDScheduler(sigma_max=14.6146, sigma_data=1.0)
    assert scheduler.c_in**2 * (14.6146**2 + 1) == pytest.approx(1, rel=1e-14)


def test_scale_model_input_is_c_in_of_T_at_every_timestep(noise):
    scheduler = PIDScheduler()
    z = 80 * noise(2, 3, 8, 8)
    expected = z / math.sqrt(0.25 + 6400)
    for timestep in (None, 0.0, scheduler.timesteps[-1]):
        torch.testing.assert_close(scheduler.scale_model_input(z, timestep), expected)


@pytest.mark.parametrize("sigma_max", SIGMA_MAX)
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_heads_are_the_closed_forms(sigma_data, sigma_max):
    variance = sigma_data**2 + sigma_max**2
    a, b = sigma_data**2 / variance, sigma_max * sigma_data / math.sqrt(variance)
    expected = {"sample": (0, 1), "edm": (a, b), "epsilon": (1, -sigma_max), "v_prediction": (a, -b)}
    for name, coefficients in expected.items():
        scheduler = PIDScheduler(sigma_max=sigma_max, sigma_data=sigma_data, prediction_type=name)
        assert scheduler.head == pytest.approx(coefficients, rel=1e-14)


@pytest.mark.parametrize("timestep_type", ["edm", "edm_scaled"])
@pytest.mark.parametrize("prediction_type, sigma_data", [("edm", 0.5), ("v_prediction", 1.0)])
def test_a_copy_of_an_edm_teacher_begins_with_its_denoised_start(
    tiny_unet, noise, prediction_type, sigma_data, timestep_type
):
    unet = tiny_unet().double()
    teacher = EDMDenoiser(
        unet, sigma_data=sigma_data, timestep_type=timestep_type, prediction_type=prediction_type, sigma_max=14.6146
    )
    scheduler = PIDScheduler(**teacher.trajectory_config)
    z = 14.6146 * noise(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        output = TrajectoryModel(unet, scheduler).network_output(z, 14.6146)
        head = scheduler.trajectory(output, z, 14.6146)[1]
        torch.testing.assert_close(head, teacher(z, 14.6146), rtol=1e-12, atol=1e-12)


def test_a_copy_of_an_epsilon_teacher_begins_with_its_denoised_start(tiny_unet, noise):
    unet, sigma_max = tiny_unet().double(), 157.4
    scheduler = PIDScheduler(sigma_max=sigma_max, sigma_data=1.0, prediction_type="epsilon")
    z = sigma_max * noise(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        timestep = torch.tensor(sigma_max, dtype=torch.float64).log() / 4
        epsilon = unet(z / math.sqrt(1 + sigma_max**2), timestep).sample
        output = TrajectoryModel(unet, scheduler).network_output(z, sigma_max)
    torch.testing.assert_close(scheduler.trajectory(output, z, sigma_max)[1], z - sigma_max * epsilon)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sigma_max", SIGMA_MAX)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectory_starts_at_z_bit_for_bit(noise, dtype, sigma_max, head):
    scheduler = PIDScheduler(sigma_max=sigma_max, prediction_type=head)
    z = (sigma_max * noise(2, 3, 8, 8)).to(dtype)
    output = noise(2, 3, 8, 8, seed=1).to(dtype)
    for sigma in (
        sigma_max,
        torch.tensor(sigma_max),
        torch.full((2,), sigma_max),
        torch.full((2,), sigma_max, dtype=torch.float64),
        scheduler.grid()[0],
    ):
        x, _ = scheduler.trajectory(output, z, sigma)
        assert x.dtype == dtype
        assert torch.equal(x, z)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sigma_max", SIGMA_MAX)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_at_T_returns_z_bit_for_bit(noise, dtype, sigma_max, head):
    scheduler = PIDScheduler(sigma_max=sigma_max, prediction_type=head)
    z = (sigma_max * noise(2, 3, 8, 8)).to(dtype)
    output = noise(2, 3, 8, 8, seed=1).to(dtype)
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], z).prev_sample, z)
    scheduler.set_timesteps(sigmas=[sigma_max, 1.0])
    assert torch.equal(scheduler.step(output, scheduler.timesteps[0], z).prev_sample, z)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sigma_max", SIGMA_MAX)
@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectory_model_starts_at_z_bit_for_bit(tiny_unet, noise, dtype, sigma_max, head):
    unet = tiny_unet(sample_size=4).to(torch.float64 if dtype == torch.float64 else torch.float32)
    student = TrajectoryModel(unet, PIDScheduler(sigma_max=sigma_max, prediction_type=head))
    z = (sigma_max * noise(2, 3, 4, 4)).to(dtype)
    with torch.no_grad():
        for sigma in (sigma_max, torch.full((2,), sigma_max, dtype=torch.promote_types(dtype, torch.float32))):
            x = student(z, sigma)
            assert x.dtype == dtype
            assert torch.equal(x, z)


@pytest.mark.parametrize("head", HEADS)
def test_trajectory_is_equation_7(noise, head):
    scheduler = PIDScheduler(sigma_max=10.0, sigma_data=1.0, prediction_type=head)
    a, b = scheduler.head
    z, output = (noise(2, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in (0, 1))
    sigma = torch.tensor([2.0, 7.5], dtype=torch.float64)
    x, clean = scheduler.trajectory(output, z, sigma)
    torch.testing.assert_close(clean, a * z + b * output, rtol=1e-14, atol=1e-14)
    for i, t in enumerate((2.0, 7.5)):
        expected = t / 10 * z[i] + (10 - t) / 10 * clean[i]
        torch.testing.assert_close(x[i], expected, rtol=1e-14, atol=1e-13)
        torch.testing.assert_close(scheduler.trajectory(output, z, t)[0][i], expected, rtol=1e-14, atol=1e-13)


def test_half_precision_tensors_are_combined_in_float32(noise):
    scheduler = PIDScheduler()
    z, output = (80 * noise(1, 3, 8, 8)).bfloat16(), noise(1, 3, 8, 8, seed=1).bfloat16()
    x, _ = scheduler.trajectory(output, z, 3.0)
    assert torch.equal(x, scheduler.trajectory(output.float(), z.float(), 3.0)[0].bfloat16())


CONFIG = {
    "num_train_timesteps": 40,
    "sigma_min": 0.03,
    "sigma_max": 14.6146,
    "sigma_data": 1.0,
    "rho": 5.0,
    "prediction_type": "v_prediction",
    "timestep_type": "edm_scaled",
}


def test_configuration_survives_saving_loading_and_from_config(tmp_path):
    scheduler = PIDScheduler(**CONFIG)
    scheduler.save_pretrained(tmp_path)
    for copy in (PIDScheduler.from_pretrained(tmp_path), PIDScheduler.from_config(scheduler.config)):
        assert {name: copy.config[name] for name in CONFIG} == CONFIG
        assert torch.equal(copy.grid(), scheduler.grid())
        assert torch.equal(copy.timesteps, scheduler.timesteps)
        assert copy.init_noise_sigma == 14.6146


def test_from_config_takes_changes():
    scheduler = PIDScheduler.from_config(PIDScheduler(**CONFIG).config, sigma_max=20.0)
    assert scheduler.config.sigma_max == 20.0
    assert scheduler.config.sigma_min == 0.03


@pytest.mark.parametrize("timestep_type, scale", [("edm", 0.25), ("edm_scaled", 250.0)])
def test_timesteps_are_c_noise_of_the_noise_levels(timestep_type, scale):
    scheduler = PIDScheduler(timestep_type=timestep_type)
    expected = scale * scheduler.grid().log()
    torch.testing.assert_close(scheduler.timesteps.double(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(scheduler.sigmas, scheduler.grid().float())
    sigma = torch.tensor([80.0, 1.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(scheduler.sigma_to_timestep(sigma), scale * sigma.log(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("num_inference_steps", [None, 1])
def test_one_step_is_eps_alone(num_inference_steps):
    scheduler = PIDScheduler()
    scheduler.set_timesteps(num_inference_steps)
    assert torch.equal(scheduler.sigmas, torch.tensor([0.002]))
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([math.log(0.002) / 4]))
    assert scheduler.num_inference_steps == 1


def test_n_steps_are_the_points_after_the_start_of_a_grid_of_n_plus_1():
    scheduler = PIDScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.num_inference_steps == 4
    assert torch.equal(scheduler.sigmas, scheduler.grid(5)[1:].float())
    assert scheduler.sigmas[-1] == torch.tensor(0.002)


def test_given_sigmas_keep_their_order():
    scheduler = PIDScheduler()
    for sigmas in ([1.0, 80.0, 0.5], torch.tensor([1.0, 80.0, 0.5])):
        scheduler.set_timesteps(sigmas=sigmas)
        assert torch.equal(scheduler.sigmas, torch.tensor([1.0, 80.0, 0.5]))
        assert scheduler.num_inference_steps == 3


def test_sigma_0_means_eps():
    scheduler = PIDScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0])
    assert torch.equal(scheduler.sigmas, torch.tensor([1.0, 0.002]))


def test_the_float32_rounding_of_T_is_a_valid_sigma():
    scheduler = PIDScheduler(sigma_max=14.6146)
    scheduler.set_timesteps(sigmas=torch.tensor([14.6146]))
    assert torch.equal(scheduler.sigmas, torch.tensor([14.6146]))


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "num_inference_steps and sigmas"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"sigmas": []}, "sigmas is empty"),
        ({"sigmas": [1.0, 80.1]}, "sigmas is .*80.1"),
        ({"sigmas": [-1.0]}, "sigmas is .*-1.0"),
        ({"sigmas": [float("nan")]}, "sigmas is .*nan"),
    ],
)
def test_set_timesteps_names_the_argument_that_is_wrong(arguments, named):
    with pytest.raises(ValueError, match=named):
        PIDScheduler().set_timesteps(**arguments)


def test_step_returns_the_trajectory_and_the_head_as_an_object_or_a_tuple(noise):
    scheduler = PIDScheduler(prediction_type="edm")
    scheduler.set_timesteps(sigmas=[3.0])
    z, output = 80 * noise(2, 3, 8, 8), noise(2, 3, 8, 8, seed=1)
    x, head = scheduler.trajectory(output, z, 3.0)
    result = scheduler.step(output, scheduler.timesteps[0], z)
    assert isinstance(result, PIDSchedulerOutput)
    torch.testing.assert_close(result.prev_sample, x, rtol=1e-6, atol=1e-6)
    assert torch.equal(result.pred_original_sample, head)
    result = scheduler.step(output, scheduler.timesteps[0], z, return_dict=False)
    assert isinstance(result, tuple)
    torch.testing.assert_close(result[0], x, rtol=1e-6, atol=1e-6)
    assert torch.equal(result[1], head)


def test_step_does_not_depend_on_the_order_of_calls(noise):
    scheduler = PIDScheduler()
    scheduler.set_timesteps(5)
    z, output = 80 * noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    forwards = [scheduler.step(output, t, z).prev_sample for t in scheduler.timesteps]
    backwards = [scheduler.step(output, t, z).prev_sample for t in scheduler.timesteps.flip(0)]
    for x, same in zip(forwards, reversed(backwards), strict=True):
        assert torch.equal(x, same)


@pytest.mark.parametrize("timestep_type, scale", [("edm", 0.25), ("edm_scaled", 250.0)])
def test_a_timestep_outside_the_schedule_is_turned_back_into_its_noise_level(noise, timestep_type, scale):
    scheduler = PIDScheduler(timestep_type=timestep_type)
    z, output = 80 * noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    for sigma in (0.0123, 0.9, 3.3, 79.0):
        timestep = scale * math.log(sigma)
        assert not bool((scheduler.timesteps == timestep).any())
        assert scheduler.timestep_to_sigma(timestep).item() == pytest.approx(sigma, rel=2e-6)
        x = scheduler.step(output, timestep, z).prev_sample
        torch.testing.assert_close(x, scheduler.trajectory(output, z, sigma)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("timestep", [2, 249, 249.0, torch.tensor(249), float("nan")])
def test_an_index_is_not_a_timestep(noise, timestep):
    z = noise(1, 3, 8, 8)
    with pytest.raises(ValueError, match="timestep"):
        PIDScheduler().step(z, timestep, z)


def test_add_noise_adds_each_timesteps_noise_level(noise):
    scheduler = PIDScheduler()
    images, n = noise(3, 1, 4, 4), noise(3, 1, 4, 4, seed=1)
    indices = torch.tensor([0, 100, 249])
    noisy = scheduler.add_noise(images, n, scheduler.timesteps[indices])
    expected = images + scheduler.grid()[indices].float().reshape(3, 1, 1, 1) * n
    torch.testing.assert_close(noisy, expected, rtol=1e-6, atol=1e-6)
    assert scheduler.add_noise(images.half(), n.half(), scheduler.timesteps[indices]).dtype == torch.float16


@pytest.mark.parametrize(
    "name, values",
    [
        ("num_train_timesteps", [1, 0, -5]),
        ("sigma_min", [0, -0.002, 80.0, 100.0, float("nan")]),
        ("sigma_max", [0.002, 0.001, -80.0, float("inf"), float("nan")]),
        ("sigma_data", [0, -0.5, float("inf"), float("nan")]),
        ("rho", [0, -7.0, float("inf"), float("nan")]),
        ("sample_min", [-0.5, 1, float("nan")]),
        ("prediction_type", ["x0", "", None]),
        ("timestep_type", ["linear", "", None]),
    ],
)
def test_an_invalid_argument_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} is {value!r}"):
            PIDScheduler(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": 3.0, "guidance_range": [2, 9]}, "both passed; pass one of them"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1.0; pass a finite number of at least 0"),
        ({"guidance_scale": math.nan}, "guidance_scale is nan"),
        ({"guidance_scale": math.inf}, "guidance_scale is inf"),
        ({"guidance_range": [9, 2]}, "the lower one first"),
        ({"guidance_range": [2, 2]}, "the lower one first"),
        ({"guidance_range": [2]}, "pass two numbers"),
        ({"guidance_range": [-1, 2]}, "0 or more"),
        ({"guidance_range": [2, math.inf]}, "pass two numbers"),
    ],
)
def test_a_guidance_that_cannot_be_is_a_value_error(settings, message):
    with pytest.raises(ValueError, match=message):
        PIDScheduler(**settings)


@pytest.mark.parametrize(
    "settings", [{"guidance_scale": 0.0}, {"guidance_scale": 7.5}, {"guidance_range": [2.0, 9.0]}]
)
def test_guidance_is_saved_and_changes_nothing_that_is_computed(settings, tmp_path, noise):
    PIDScheduler(**settings).save_pretrained(tmp_path)
    scheduler, plain = PIDScheduler.from_pretrained(tmp_path), PIDScheduler()
    assert {name: scheduler.config[name] for name in settings} == settings
    z, output = 80 * noise(2, 3, 4, 4), noise(2, 3, 4, 4, seed=1)
    assert torch.equal(scheduler.trajectory(output, z, 1.0)[0], plain.trajectory(output, z, 1.0)[0])


@pytest.mark.parametrize("dim", [32, 256])
def test_the_embedding_of_w_is_that_of_latent_consistency_models(dim):
    scale = torch.tensor([0.0, 1.0, 1.25, 7.5, 14.0])
    phases = 1000 * (scale.double() - 1)[:, None] * 10_000 ** -(torch.arange(dim // 2).double() / (dim // 2 - 1))
    embedding = PIDScheduler.guidance_embedding(scale, dim)
    assert embedding.shape == (5, dim) and embedding.dtype == torch.float32
    torch.testing.assert_close(embedding.double(), torch.cat([phases.sin(), phases.cos()], 1), rtol=0, atol=2e-3)
    assert torch.equal(PIDScheduler.guidance_embedding(scale.to(torch.float16), dim), embedding)
