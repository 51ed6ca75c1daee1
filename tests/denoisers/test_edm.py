import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)

from pid_diffusers import Denoiser, EDMDenoiser, EmpiricalDenoiser
from pid_diffusers.denoisers import euler

SIGMAS = [0.002, 0.5, 7.0, 80.0]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_denoiser_equals_the_preconditioning_of_diffusers_edm_scheduler(tiny_unet, noise, sigma_data, prediction_type):
    unet = tiny_unet().double()
    scheduler = EDMEulerScheduler(sigma_data=sigma_data, prediction_type=prediction_type)
    teacher = EDMDenoiser(
        unet, sigma_data=sigma_data, prediction_type="edm" if prediction_type == "epsilon" else prediction_type
    )
    with torch.no_grad():
        for value in SIGMAS:
            sigma = torch.tensor(value, dtype=torch.float64)
            x = (value**2 + sigma_data**2) ** 0.5 * noise(2, 3, 8, 8, dtype=torch.float64)
            output = unet(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)).sample
            expected = scheduler.precondition_outputs(x, output, sigma)
            torch.testing.assert_close(teacher(x, sigma), expected, rtol=1e-12, atol=1e-12)


def test_scaled_timesteps_are_250_times_the_logarithm(tiny_unet, noise):
    """Both names of c_noise agree where ln(σ)/4 of one noise level is 250 ln(σ) of another."""
    unet, x = tiny_unet().double(), noise(2, 3, 8, 8, dtype=torch.float64)
    sigma = torch.tensor(1.01, dtype=torch.float64)
    variance = sigma**2 + 0.25
    with torch.no_grad():
        output = unet(x / variance.sqrt(), 250 * sigma.log()).sample
        denoised = EDMDenoiser(unet, timestep_type="edm_scaled")(x, sigma)
    torch.testing.assert_close(denoised, 0.25 / variance * x + 0.5 * sigma / variance.sqrt() * output)


def test_every_sample_has_its_own_noise_level_and_class(tiny_unet, noise):
    teacher = EDMDenoiser(tiny_unet(num_class_embeds=4).double())
    x, labels = noise(4, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 0, 1, 1])
    with torch.no_grad():
        together = teacher(x, torch.tensor(SIGMAS, dtype=torch.float64), class_labels=labels)
        for i, sigma in enumerate(SIGMAS):
            alone = teacher(x[i : i + 1], sigma, class_labels=labels[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)


def test_a_half_precision_network_is_combined_in_float32(tiny_unet, noise):
    unet, x, sigma = tiny_unet().bfloat16(), noise(2, 3, 8, 8), torch.tensor(0.3)
    variance = sigma**2 + 0.25
    with torch.no_grad():
        denoised = EDMDenoiser(unet)(x, 0.3)
        output = unet((x / variance.sqrt()).bfloat16(), sigma.log() / 4).sample
    assert output.dtype == torch.bfloat16
    assert denoised.dtype == torch.float32
    expected = 0.25 / variance * x + 0.5 * sigma / variance.sqrt() * output.float()
    torch.testing.assert_close(denoised, expected, rtol=1e-6, atol=1e-6)
    assert (denoised - denoised.bfloat16()).abs().max() > 1e-3  # such arithmetic is out of reach of bfloat16


def test_the_result_has_the_type_of_the_input(tiny_unet, noise):
    teacher = EDMDenoiser(tiny_unet())
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        with torch.no_grad():
            assert teacher(noise(1, 3, 8, 8, dtype=dtype), 1.0).dtype == dtype


def test_teacher_tells_its_shape_and_classes(tiny_unet):
    teacher = EDMDenoiser(tiny_unet(sample_size=(8, 16), num_class_embeds=4))
    assert teacher.sample_shape == (3, 8, 16)
    assert teacher.num_classes == 4
    assert EDMDenoiser(tiny_unet()).sample_shape == (3, 8, 8)
    assert EDMDenoiser(tiny_unet()).num_classes is None


def test_drawn_conditions_are_repeatable_and_cover_all_classes(tiny_unet):
    teacher = EDMDenoiser(tiny_unet(num_class_embeds=4))
    first, second = (teacher.draw_condition(100, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first["class_labels"], second["class_labels"])
    assert first["class_labels"].unique().tolist() == [0, 1, 2, 3]
    assert EDMDenoiser(tiny_unet()).draw_condition(100, torch.Generator()) == {}


@pytest.mark.parametrize("name", ["timestep_type", "prediction_type"])
def test_an_invalid_argument_is_named(tiny_unet, name):
    with pytest.raises(ValueError, match=f"{name} is 'epsilon'"):
        EDMDenoiser(tiny_unet(), **{name: "epsilon"})


@torch.no_grad()
def test_a_consistency_models_scheduler_is_read_as_edm_told_250_ln_sigma(tiny_unet, noise, tmp_path):
    unet = tiny_unet(num_class_embeds=4)
    scheduler = CMStochasticIterativeScheduler(sigma_data=0.6)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path)
    teacher, labels = Denoiser.from_pretrained(tmp_path).double(), torch.tensor([1, 3])
    unet = unet.double()
    scheduler.set_timesteps(4)
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        scheduler._step_index = None  # only `step` moves it on
        sigma = sigma.double()
        x = sigma * noise(2, 3, 8, 8, dtype=torch.float64)
        output = unet(scheduler.scale_model_input(x, t), t, class_labels=labels, return_dict=False)[0]
        c_skip, c_out = scheduler.get_scalings(sigma)
        assert torch.allclose(teacher(x, sigma, class_labels=labels), c_skip * x + c_out * output, atol=1e-4)


@pytest.mark.parametrize("clip", [True, False])
@torch.no_grad()
def test_d_is_clamped_where_a_consistency_models_scheduler_clamps(tiny_unet, noise, tmp_path, clip):
    scheduler = CMStochasticIterativeScheduler(clip_denoised=clip)
    ConsistencyModelPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path)
    teacher, x = Denoiser.from_pretrained(tmp_path), 2 * noise(2, 3, 8, 8)
    free = EDMDenoiser(tiny_unet(), timestep_type="edm_scaled")(x, 0.05)
    assert free.abs().max() > 1
    assert torch.equal(teacher(x, 0.05), free.clamp(-1, 1) if clip else free)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_euler_steps_through_d_are_those_of_diffusers_edm_schedulers(tiny_unet, noise, prediction_type):
    unet = tiny_unet()
    for scheduler in (
        EDMEulerScheduler(prediction_type=prediction_type),
        EDMDPMSolverMultistepScheduler(prediction_type=prediction_type, solver_order=1),
    ):
        scheduler.set_timesteps(6)
        x = z = scheduler.init_noise_sigma * noise(2, 3, 8, 8)
        for t in scheduler.timesteps:
            output = unet(scheduler.scale_model_input(x, t), t, return_dict=False)[0]
            x = scheduler.step(output, t, x, return_dict=False)[0]
        head = "edm" if prediction_type == "epsilon" else prediction_type
        teacher = EDMDenoiser(unet, prediction_type=head)
        sigmas = [scheduler.init_noise_sigma, *scheduler.sigmas[1:].tolist()]
        solved = euler(teacher, z, sigmas)[-1]
        assert (solved - x).abs().max() <= 1e-4 * x.abs().max().clamp(min=1)


class EDMOptimum(torch.nn.Module):
    """The network that EDM's preconditioning of finite data is trained to, in closed form."""

    def __init__(self, data, sign):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.denoiser, self.sign = EmpiricalDenoiser(data), sign

    def forward(self, sample, timestep, return_dict=True):
        sigma = (4 * timestep).exp().reshape(-1, 1, 1, 1)
        variance = sigma**2 + 0.25
        x = sample * variance.sqrt()
        denoised = self.denoiser(x, sigma.flatten())
        return ((denoised - 0.25 / variance * x) * variance.sqrt() / (self.sign * sigma * 0.5),)


@pytest.mark.parametrize("prediction_type", ["edm", "v_prediction"])
def test_d_of_a_perfectly_trained_network_is_the_closed_form_and_at_the_lowest_noise_the_identity(
    noise, prediction_type
):
    data = noise(5, 1, 4, 4, dtype=torch.float64)
    network = EDMOptimum(data, -1 if prediction_type == "v_prediction" else 1)
    teacher = EDMDenoiser(network, prediction_type=prediction_type)
    for sigma in (0.002, 0.5, 80.0):
        x = data[:3] + sigma * noise(3, 1, 4, 4, seed=1, dtype=torch.float64)
        levels = torch.full((3,), sigma, dtype=torch.float64)
        assert torch.allclose(teacher(x, levels), EmpiricalDenoiser(data)(x, levels), atol=1e-9)
    x = data + 0.002 * noise(5, 1, 4, 4, seed=2, dtype=torch.float64)
    assert (teacher(x, 0.002) - x).abs().max() < 0.01
