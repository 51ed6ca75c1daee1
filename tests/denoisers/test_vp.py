"""Discrete variance-preserving teachers: the same numbers as diffusers' own schedulers from the same network."""

import itertools

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from pid_diffusers import Denoiser, EmpiricalDenoiser, InputError, PIDScheduler, VPDenoiser
from pid_diffusers.denoisers import euler, heun

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    "trained": {"trained_betas": np.linspace(0.001, 0.02, 500).tolist(), "num_train_timesteps": 500},
}
STEPS = 5


def sigmas_at(scheduler, timesteps) -> list[float]:
    """√((1−ᾱ)/ᾱ) at integer time steps, and 0 at the end."""
    alphas_cumprod = scheduler.alphas_cumprod.double()[torch.as_tensor(timesteps).long()]
    return [*((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist(), 0.0]


def sample_with(scheduler, unet, start, scaled: bool, **step_kwargs) -> torch.Tensor:
    """What diffusers' own loop makes of a start of standard deviation σ_T; `scaled` ones see x/√(1+σ²)."""
    x = start.clone()
    for t in scheduler.timesteps:
        output = unet(scheduler.scale_model_input(x, t), t, return_dict=False)[0]
        x = scheduler.step(output, t, x, return_dict=False, **step_kwargs)[0]
    return x


def assert_near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4):
    assert a.shape == b.shape
    error, scale = (a - b).abs().max().item(), max(1.0, b.abs().max().item())
    assert error <= tolerance * scale


@pytest.fixture(params=PREDICTION_TYPES)
def prediction_type(request):
    return request.param


@pytest.fixture(params=BETAS)
def settings(request, prediction_type):
    return {**BETAS[request.param], "prediction_type": prediction_type}


def tolerance_of(settings: dict, z: torch.Tensor) -> float:
    """1e-4; for the squared cosine what rounding diffusers' own float32 coefficients makes of a huge start."""
    return 5e-7 * z.abs().max().item() if settings.get("beta_schedule") == "squaredcos_cap_v2" else 1e-4


# 1. Steps through D are the steps of diffusers' schedulers

FIRST_ORDER = {
    "DDIM": lambda s: DDIMScheduler(**s, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"),
    "DPMSolverMultistep": lambda s: DPMSolverMultistepScheduler(**s, solver_order=1),
    "DPMSolverSinglestep": lambda s: DPMSolverSinglestepScheduler(**s, solver_order=1, final_sigmas_type="zero"),
    "DEISMultistep": lambda s: DEISMultistepScheduler(**s, solver_order=1),
    "UniPCMultistep": lambda s: UniPCMultistepScheduler(
        **s, solver_order=1, disable_corrector=list(range(STEPS)), final_sigmas_type="zero"
    ),
}


@pytest.mark.parametrize("name", FIRST_ORDER)
@torch.no_grad()
def test_euler_steps_are_the_first_order_solvers(tiny_unet, noise, settings, name):
    unet, scheduler = tiny_unet(), FIRST_ORDER[name](settings)
    teacher = VPDenoiser(unet, scheduler)
    scheduler.set_timesteps(STEPS)
    sigmas = sigmas_at(scheduler, scheduler.timesteps)
    if name == "DEISMultistep":  # it ends at the lowest noise level, not at 0
        sigmas = sigmas[:-1]
    z = sigmas[0] * noise(2, 3, 8, 8)
    expected = []
    x = z / (1 + sigmas[0] ** 2) ** 0.5
    for t, sigma in zip(scheduler.timesteps, sigmas[1:], strict=False):
        x = scheduler.step(unet(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        expected.append(x * (1 + sigma**2) ** 0.5)
    states = euler(teacher, z, sigmas)
    for state, own in zip(states[1:], expected, strict=False):
        assert_near(state, own, tolerance_of(settings, z))


SIGMA_SPACE = {"timestep_spacing": "trailing"}


@torch.no_grad()
def test_euler_steps_are_those_of_euler_discrete_and_of_lms_of_first_order(tiny_unet, noise, settings):
    unet = tiny_unet()
    for scheduler, options in ((EulerDiscreteScheduler, {}), (LMSDiscreteScheduler, {"order": 1})):
        scheduler = scheduler(**settings, **SIGMA_SPACE)
        scheduler.set_timesteps(STEPS)
        z = scheduler.sigmas[0] * noise(2, 3, 8, 8)
        expected = sample_with(scheduler, unet, z, scaled=False, **options)
        assert_near(euler(VPDenoiser(unet, scheduler), z, scheduler.sigmas.tolist())[-1], expected)


@torch.no_grad()
def test_time_between_the_indices_is_that_of_karras_noise_levels(tiny_unet, noise, settings):
    unet, scheduler = tiny_unet(), EulerDiscreteScheduler(**settings, use_karras_sigmas=True)
    scheduler.set_timesteps(STEPS)
    assert any(float(t) % 1 for t in scheduler.timesteps)
    z = scheduler.sigmas[0] * noise(2, 3, 8, 8)
    expected = sample_with(scheduler, unet, z, scaled=False)
    assert_near(euler(VPDenoiser(unet, scheduler), z, scheduler.sigmas.tolist())[-1], expected)


@torch.no_grad()
def test_heun_steps_are_those_of_heun_discrete(tiny_unet, noise, settings):
    unet, scheduler = tiny_unet(), HeunDiscreteScheduler(**settings, **SIGMA_SPACE)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas[[0, *range(1, len(scheduler.sigmas) - 1, 2), -1]]
    z = sigmas[0] * noise(2, 3, 8, 8)
    expected = sample_with(scheduler, unet, z, scaled=False)
    assert_near(
        heun(VPDenoiser(unet, scheduler), z, sigmas.unique_consecutive().tolist())[-1],
        expected,
        tolerance_of(settings, z),
    )


@torch.no_grad()
def test_midpoint_steps_are_those_of_kdpm2(tiny_unet, noise, settings):
    if settings["prediction_type"] == "sample":
        pytest.skip("this scheduler has no such networks")
    unet, scheduler = tiny_unet(), KDPM2DiscreteScheduler(**settings, **SIGMA_SPACE)
    teacher = VPDenoiser(unet, scheduler)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.unique_consecutive().tolist()
    z = sigmas[0] * noise(2, 3, 8, 8)
    x = z
    for sigma, following in itertools.pairwise(sigmas):
        slope = (x - teacher(x, sigma)) / sigma
        if following > 0:
            middle = (sigma * following) ** 0.5
            between = x + (middle - sigma) * slope
            slope = (between - teacher(between, middle)) / middle
        x = x + (following - sigma) * slope
    assert_near(x, sample_with(scheduler, unet, z, scaled=False))


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler, EulerAncestralDiscreteScheduler])
@torch.no_grad()
def test_the_predicted_sample_is_d_also_where_steps_are_random(tiny_unet, noise, settings, kind):
    if kind is EulerAncestralDiscreteScheduler and settings["prediction_type"] == "sample":
        pytest.skip("this scheduler has no such networks")
    unet = tiny_unet()
    scheduler = kind(**settings, **({} if kind is EulerAncestralDiscreteScheduler else {"clip_sample": True}))
    teacher = VPDenoiser(unet, scheduler)
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps[[0, 2, -1]]:
        alpha_cumprod = scheduler.alphas_cumprod.double()[int(t)].item() if float(t) % 1 == 0 else None
        if alpha_cumprod is None:
            continue
        sigma = ((1 - alpha_cumprod) / alpha_cumprod) ** 0.5
        x = noise(2, 3, 8, 8) * (1 + sigma**2) ** 0.5
        own = x if kind is EulerAncestralDiscreteScheduler else x / (1 + sigma**2) ** 0.5
        output = unet(x / (1 + sigma**2) ** 0.5, t, return_dict=False)[0]
        scheduler._step_index = None
        predicted = scheduler.step(output, t, own).pred_original_sample
        assert_near(teacher(x, sigma), predicted)


@torch.no_grad()
def test_the_first_step_of_pndm_is_an_euler_step(tiny_unet, noise):
    for prediction_type in ("epsilon", "v_prediction"):
        unet = tiny_unet()
        scheduler = PNDMScheduler(prediction_type=prediction_type, skip_prk_steps=True)
        scheduler.set_timesteps(10)
        t = scheduler.timesteps[0]
        high, low, _ = sigmas_at(scheduler, [t, t - 100])
        z = high * noise(2, 3, 8, 8)
        x = z / (1 + high**2) ** 0.5
        x = scheduler.step(unet(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        assert_near(euler(VPDenoiser(unet, scheduler), z, [high, low])[-1], x * (1 + low**2) ** 0.5)


@torch.no_grad()
def test_clipping_is_the_schedulers(tiny_unet, noise):
    unet, z = tiny_unet(), 157 * noise(2, 3, 8, 8)
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.7, timestep_spacing="trailing")
    teacher = VPDenoiser(unet, scheduler)
    assert teacher(z, 157.0).abs().max() == pytest.approx(0.7)
    scheduler.set_timesteps(STEPS)
    sigmas = sigmas_at(scheduler, scheduler.timesteps)
    z = sigmas[0] * noise(2, 3, 8, 8)
    x = z / (1 + sigmas[0] ** 2) ** 0.5
    for t in scheduler.timesteps:
        output = unet(x, t, return_dict=False)[0]
        x = scheduler.step(output, t, x, use_clipped_model_output=True, return_dict=False)[0]
    assert_near(euler(teacher, z, sigmas)[-1], x)


@torch.no_grad()
def test_of_a_learned_variance_the_mean_counts(tiny_unet, noise):
    unet = tiny_unet(out_channels=6)
    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False)
    t, x = 500, noise(2, 3, 8, 8)
    sigma = sigmas_at(scheduler, [t])[0]
    predicted = scheduler.step(unet(x, t, return_dict=False)[0], t, x).pred_original_sample
    assert_near(VPDenoiser(unet, scheduler)(x * (1 + sigma**2) ** 0.5, sigma), predicted)


# 2. D is what it should be


class Optimum(torch.nn.Module):
    """The network that a discrete model of finite data is trained to, in closed form."""

    def __init__(self, data, scheduler):
        super().__init__()
        self.register_parameter("unused", torch.nn.Parameter(torch.zeros(1, dtype=torch.float64)))
        self.denoiser = EmpiricalDenoiser(data)
        self.scheduler = scheduler
        alphas_cumprod = scheduler.alphas_cumprod.double()
        self.log_sigmas = (((1 - alphas_cumprod) / alphas_cumprod).log() / 2).numpy()

    def forward(self, sample, timestep, return_dict=True):
        log_sigma = np.interp(timestep.double().numpy(), np.arange(len(self.log_sigmas)), self.log_sigmas)
        sigma = torch.tensor(log_sigma).exp().reshape(-1, 1, 1, 1).to(sample.dtype)
        x = sample * (1 + sigma**2).sqrt()
        denoised = self.denoiser(x, sigma.flatten())
        epsilon = (x - denoised) / sigma
        v = (epsilon - sigma * denoised) / (1 + sigma**2).sqrt()
        return ({"epsilon": epsilon, "v_prediction": v, "sample": denoised}[self.scheduler.config.prediction_type],)


def test_d_of_a_perfectly_trained_network_is_the_closed_form(noise, settings):
    data = noise(5, 1, 4, 4, dtype=torch.float64)
    scheduler = DDPMScheduler(**settings, clip_sample=False)
    teacher = VPDenoiser(Optimum(data, scheduler), scheduler)
    config = teacher.noise_levels.config
    for sigma in (config.sigma_min, 0.3, 2.0, config.sigma_max):
        x = data[:3] + sigma * noise(3, 1, 4, 4, seed=1, dtype=torch.float64)
        levels = torch.full((3,), sigma, dtype=torch.float64)
        assert_near(teacher(x, levels), EmpiricalDenoiser(data)(x, levels), 1e-5)


@torch.no_grad()
def test_d_is_nearly_the_identity_at_the_lowest_noise(tiny_unet, noise, settings):
    if settings["prediction_type"] == "sample":
        pytest.skip("a random network that predicts the sample is no denoiser")
    teacher = VPDenoiser(tiny_unet(), DDPMScheduler(**settings, clip_sample=False))
    x, sigma = noise(2, 3, 8, 8), teacher.noise_levels.config.sigma_min
    assert (teacher(x, sigma) - x).abs().max() < 10 * sigma


@torch.no_grad()
def test_a_float_a_tensor_and_a_batch_of_noise_levels_agree(tiny_unet, noise):
    teacher, x = VPDenoiser(tiny_unet(), DDPMScheduler()), noise(3, 3, 8, 8)
    levels = torch.tensor([0.5, 3.0, 100.0])
    single = torch.cat([teacher(x[i : i + 1], float(levels[i])) for i in range(3)])
    assert_near(teacher(x, levels), single, 1e-3)


@torch.no_grad()
def test_half_precision_networks_denoise_nearly_the_same(tiny_unet, noise):
    x = 5 * noise(2, 3, 8, 8)
    exact = VPDenoiser(tiny_unet(), DDPMScheduler(clip_sample=False))(x, 5.0)
    half = VPDenoiser(tiny_unet().bfloat16(), DDPMScheduler(clip_sample=False))(x, 5.0)
    assert half.dtype == torch.float32
    assert (half - exact).abs().max() < 0.3


# 3. The student's clock


def test_students_are_told_the_index_of_their_noise_level(settings):
    scheduler = DDPMScheduler(**settings)
    levels = PIDScheduler(**VPDenoiser(torch.nn.Identity(), scheduler).trajectory_config)
    indices = torch.arange(len(scheduler.alphas_cumprod))
    sigmas = torch.tensor(sigmas_at(scheduler, indices)[:-1])
    assert torch.allclose(levels.sigma_to_timestep(sigmas.double()), indices.double(), atol=1e-4)
    for k in (0, 7, len(indices) - 1):
        assert levels.timestep_to_sigma(float(k)).item() == pytest.approx(sigmas[k].item(), rel=1e-4)
    beyond = torch.tensor([sigmas[0] / 2, sigmas[-1] * 2], dtype=torch.float64)
    assert levels.sigma_to_timestep(beyond).tolist() == [0, len(indices) - 1]


def test_a_student_that_copies_the_teacher_sees_what_the_teacher_sees_at_the_start(tiny_unet, noise):
    for prediction_type, head in (("epsilon", "epsilon"), ("v_prediction", "v_prediction"), ("sample", "sample")):
        unet, scheduler = tiny_unet(), DDPMScheduler(prediction_type=prediction_type, clip_sample=False)
        teacher = VPDenoiser(unet, scheduler)
        levels = PIDScheduler(**{**teacher.trajectory_config, "prediction_type": head})
        sigma_max = levels.config.sigma_max
        z = sigma_max * noise(2, 3, 8, 8)
        with torch.no_grad():
            timestep = levels.sigma_to_timestep(torch.tensor([sigma_max] * 2))
            output = unet(levels.scale_model_input(z), timestep, return_dict=False)[0]
            x = levels.trajectory(levels.network_output(output, z, sigma_max), z, sigma_max)[1]
            assert_near(x, teacher(z, sigma_max), 1e-3)


# 4. Loading, and what is refused


@pytest.mark.parametrize(
    "kind",
    [
        DDPMScheduler,
        DDIMScheduler,
        PNDMScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        DEISMultistepScheduler,
        UniPCMultistepScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
        KDPM2AncestralDiscreteScheduler,
        LMSDiscreteScheduler,
    ],
)
@torch.no_grad()
def test_a_saved_pipeline_of_every_scheduler_is_the_same_denoiser(tiny_unet, noise, tmp_path, kind):
    unet = tiny_unet(num_class_embeds=4)
    DDPMPipeline(unet, kind(beta_start=0.0002)).save_pretrained(tmp_path)
    teacher, x, labels = Denoiser.from_pretrained(tmp_path), noise(2, 3, 8, 8), torch.tensor([1, 3])
    assert type(teacher) is VPDenoiser
    expected = VPDenoiser(unet, kind(beta_start=0.0002))(x, 2.0, class_labels=labels)
    assert_near(teacher(x, 2.0, class_labels=labels), expected, 1e-6)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (DDIMScheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr, whose highest noise level is infinite"),
        (DDPMScheduler(thresholding=True), "thresholding"),
        (EulerDiscreteScheduler(prediction_type="sample"), None),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), "'flow_prediction'"),
    ],
)
def test_a_schedule_without_an_ode_to_distil_is_refused_with_the_reason(tiny_unet, scheduler, said):
    if said is None:
        assert VPDenoiser(tiny_unet(), scheduler).prediction_type == "sample"
        return
    with pytest.raises(InputError, match=said) as raised:
        VPDenoiser(tiny_unet(), scheduler)
    assert "\n" not in str(raised.value)


def test_a_network_that_is_told_the_logarithm_of_its_noise_level_is_refused(tiny_unet):
    scheduler = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(InputError, match="timestep_type 'continuous'"):
        VPDenoiser(tiny_unet(), scheduler)
