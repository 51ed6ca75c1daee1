"""Classifier-free guidance as a part of the teacher, against two calls without it and diffusers' own pipelines."""

import copy
import functools
import gc
import json
import shutil

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EDMEulerScheduler
from tiny_text import tiny_sd, tiny_sdxl
from transformers import PreTrainedModel

from pid_diffusers import InputError
from pid_diffusers.denoisers import GuidedDenoiser
from pid_diffusers.training import parse_config
from pid_diffusers.training.build import create_student, create_teacher

PROMPTS = ["a red fox", "a blue bird", "seven", "four"]
PIPELINES = {"SD 1": tiny_sd, "SD 2": lambda: tiny_sd("v_prediction"), "SDXL": tiny_sdxl}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PID_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every pipeline, saved."""
    root = tmp_path_factory.mktemp("teachers")
    for name, create in PIPELINES.items():
        create().save_pretrained(root / name)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


@pytest.fixture(params=PIPELINES)
def name(request):
    return request.param


@functools.cache
def create(folders, name, *flags) -> GuidedDenoiser:
    words = ["--teacher", str(folders / name), "--prompts", str(folders / "prompts.txt"), "--eval_classifier", "none"]
    return create_teacher(parse_config([*words, *flags])).eval().requires_grad_(False)


def unconditional_of(teacher: GuidedDenoiser, condition: dict) -> dict:
    return {key: teacher.unconditional[key].expand_as(value) for key, value in condition.items()}


def batches_seen_by(network, function) -> list[int]:
    """The batch size of every call of the network."""
    seen = []
    handle = network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True
    )
    try:
        function()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("scale", [0.0, 3.0, 7.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-4), (torch.float64, 1e-12)])
def test_it_is_the_mixture_of_two_denoisers(folders, name, scale, dtype, tolerance, noise):
    teacher = copy.deepcopy(create(folders, name, "--guidance_scale", str(scale))).to(dtype)
    x, sigma = 3 * noise(3, 4, 8, 8, dtype=dtype), torch.tensor([14.0, 1.0, 0.03], dtype=dtype)
    condition = teacher.shown_condition(3)
    with torch.no_grad():
        conditional = teacher.denoiser(x, sigma, **condition)
        without = teacher.denoiser(x, sigma, **unconditional_of(teacher, condition))
        result = teacher(x, sigma, **condition)
    assert (conditional - without).abs().max() > 1e-3
    assert result.dtype == dtype
    torch.testing.assert_close(result, without + scale * (conditional - without), rtol=0, atol=tolerance)


def test_every_sample_may_have_a_w_of_its_own(folders, name, noise):
    teacher = create(folders, name, "--guidance_range", "1", "9")
    x, scales = 3 * noise(3, 4, 8, 8), torch.tensor([1.0, 2.5, 8.0])
    condition = {**teacher.shown_condition(3), "guidance_scale": scales}
    with torch.no_grad():
        result = teacher(x, 2.0, **condition)
        for i, scale in enumerate(scales.tolist()):
            alone = create(folders, name, "--guidance_scale", str(scale))
            own = {key: value[i : i + 1] for key, value in condition.items() if key != "guidance_scale"}
            torch.testing.assert_close(result[i : i + 1], alone(x[i : i + 1], 2.0, **own), rtol=1e-5, atol=2e-5)
    with pytest.raises(ValueError, match="guidance_scale is missing; pass a tensor of numbers from 1.0 to 9.0"):
        teacher(x, 2.0, **teacher.shown_condition(3) | {"guidance_scale": None})


def test_one_call_of_the_network_has_both_and_w_of_1_needs_no_more_than_one(folders, noise):
    x = noise(3, 4, 8, 8)
    for flags, batch in (((), 6), (("--guidance_scale", "1"), 3), (("--guidance_range", "1", "2"), 6)):
        teacher = create(folders, "SD 1", *flags)
        condition = teacher.draw_condition(3, torch.Generator().manual_seed(0))
        assert batches_seen_by(teacher.unet, lambda t=teacher, c=condition: t(x, 1.0, **c)) == [batch]
    plain = create(folders, "SD 1", "--guidance_scale", "1")
    condition = plain.shown_condition(3)
    with torch.no_grad():
        assert torch.equal(plain(x, 1.0, **condition), plain.denoiser(x, 1.0, **condition))


def test_without_w_it_is_that_of_stable_diffusion(folders):
    assert create(folders, "SD 1").trajectory_config["guidance_scale"] == 7.5


# --- against the pipelines of diffusers ------------------------------------------------------------------------------


def euler(teacher, x, sigmas, **condition):
    """Euler's method for dx/dσ = (x − D)/σ; in these coordinates DDIM with η = 0 is the same."""
    for start, end in zip(sigmas, sigmas[1:], strict=False):
        x = x + (end - start) * (x - teacher(x, start, **condition)) / start
    return x


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_ddim_steps_through_it_are_what_stable_diffusion_samples(folders, name, rescale, noise):
    if name == "SDXL":
        pytest.skip("has Euler's method")
    pipe = DiffusionPipeline.from_pretrained(folders / name)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    latents, prompts = noise(2, 4, 8, 8), PROMPTS[:2]
    settings = {"guidance_scale": 5.0, "guidance_rescale": rescale, "num_inference_steps": 6, "output_type": "latent"}
    expected = pipe(prompts, latents=latents.clone(), height=16, width=16, **settings).images

    teacher = create(folders, name, "--guidance_scale", "5", "--guidance_rescale", str(rescale))
    alphas = pipe.scheduler.alphas_cumprod.double()
    alphas = [*alphas[pipe.scheduler.timesteps].tolist(), pipe.scheduler.final_alpha_cumprod.item()]
    sigmas = [((1 - alpha) / alpha) ** 0.5 for alpha in alphas]
    with torch.no_grad():
        x = euler(teacher, latents / alphas[0] ** 0.5, sigmas, **teacher.shown_condition(2))
    torch.testing.assert_close(x * alphas[-1] ** 0.5, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("negative_prompt", ["", "blue"])
def test_euler_steps_through_it_are_what_stable_diffusion_xl_samples(folders, rescale, negative_prompt, noise):
    pipe = DiffusionPipeline.from_pretrained(folders / "SDXL")
    pipe.set_progress_bar_config(disable=True)
    latents = noise(2, 4, 8, 8)
    settings = {"guidance_scale": 5.0, "guidance_rescale": rescale, "num_inference_steps": 6, "output_type": "latent"}
    settings |= {"negative_prompt": [negative_prompt] * 2} if negative_prompt else {}
    expected = pipe(PROMPTS[:2], latents=latents.clone(), height=16, width=16, **settings).images

    words = ("--guidance_scale", "5", "--guidance_rescale", str(rescale), "--negative_prompt", negative_prompt)
    teacher = create(folders, "SDXL", *words)
    start, sigmas = latents * pipe.scheduler.init_noise_sigma, pipe.scheduler.sigmas.tolist()
    with torch.no_grad():
        x = euler(teacher, start, sigmas, **teacher.shown_condition(2))
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-4)


# --- what it is conditioned on ---------------------------------------------------------------------------------------


def test_conditions_are_drawn_by_their_generator_alone(folders, name):
    teacher = create(folders, name, "--guidance_range", "2", "9")
    first, again, other = (teacher.draw_condition(400, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert set(first) >= {"encoder_hidden_states", "guidance_scale"}
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["guidance_scale"], other["guidance_scale"])
    scales = first["guidance_scale"]
    assert scales.shape == (400,) and 2 <= scales.min() < 2.5 and 8.5 < scales.max() <= 9
    rows = teacher.prompts.batch(range(len(PROMPTS)))["encoder_hidden_states"]
    which = [int((rows - row).abs().flatten(1).sum(1).argmin()) for row in first["encoder_hidden_states"]]
    assert all(torch.equal(rows[i], row) for i, row in zip(which, first["encoder_hidden_states"], strict=True))
    assert all(70 < which.count(i) < 130 for i in range(len(PROMPTS)))


def test_the_embeddings_are_those_of_the_pipeline(folders, name):
    pipe = DiffusionPipeline.from_pretrained(folders / name)
    teacher = create(
        folders, name, "--negative_prompt", "grey", "--validation_prompts", "nine", "--num_validation_images", "1"
    )
    settings = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    embeddings = pipe.encode_prompt("nine", negative_prompt="grey", **settings)
    condition, without = teacher.shown_condition(1), teacher.unconditional
    assert teacher.shown_prompt(0) == "nine" and teacher.shown_prompt(1) == PROMPTS[0]
    torch.testing.assert_close(condition["encoder_hidden_states"], embeddings[0])
    torch.testing.assert_close(without["encoder_hidden_states"], embeddings[1])
    if name == "SDXL":
        torch.testing.assert_close(condition["text_embeds"], embeddings[2])
        torch.testing.assert_close(without["text_embeds"], embeddings[3])
        # original size, corner of the crop, target size
        for part in (condition, without):
            assert part["time_ids"].tolist() == [[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]
    else:
        assert set(condition) == set(without) == {"encoder_hidden_states"}


def test_copies_share_prompts_and_vae_but_no_weights(folders, name):
    teacher = create(folders, name)
    duplicate = copy.deepcopy(teacher)
    assert duplicate.prompts is teacher.prompts and duplicate.shown_prompts is teacher.shown_prompts
    assert duplicate.vae is teacher.vae is teacher.denoiser.vae is duplicate.denoiser.vae
    assert duplicate.unet is not teacher.unet
    assert not {p.data_ptr() for p in duplicate.parameters()} & {p.data_ptr() for p in teacher.parameters()}
    other = teacher.around(duplicate.denoiser)
    assert other.unet is duplicate.unet and other.prompts is teacher.prompts
    assert other.trajectory_config == teacher.trajectory_config and other.vae is teacher.vae


def test_it_says_what_it_is(folders):
    said = create(folders, "SD 2", "--guidance_range", "2", "9", "--guidance_rescale", "0.7").describe()
    assert "v_prediction" in said and "text" in said and "guidance 2 to 9, rescaled by 0.7, 4 prompts" in said
    assert "guidance 7.5" in create(folders, "SD 1").describe()


def test_the_text_encoders_leave_memory_at_once(folders, name):
    """Not when the collector of cycles happens to run, until when a GPU's memory would be full."""
    gc.collect()
    gc.disable()
    try:
        before = {id(thing) for thing in gc.get_objects() if isinstance(thing, PreTrainedModel)}
        teacher = create.__wrapped__(folders, name)
        left = [thing for thing in gc.get_objects() if isinstance(thing, PreTrainedModel) and id(thing) not in before]
        assert teacher.unet is not None
        assert [type(thing).__name__ for thing in left] == []
    finally:
        gc.enable()


# --- what cannot be guided -------------------------------------------------------------------------------------------


def test_a_text_teacher_of_another_family_is_an_input_error(folders, tmp_path):
    pipe = tiny_sdxl()
    pipe.scheduler = EDMEulerScheduler()
    pipe.save_pretrained(tmp_path / "edm")
    words = [
        "--teacher",
        str(tmp_path / "edm"),
        "--prompts",
        str(folders / "prompts.txt"),
        "--eval_classifier",
        "none",
    ]
    with pytest.raises(InputError, match="StableDiffusionXLPipeline.*EDMEulerScheduler") as caught:
        create_teacher(parse_config(words))
    assert "\n" not in str(caught.value)


def test_an_inpainting_unet_is_an_input_error(folders, tmp_path):
    tiny_sd(in_channels=9).save_pretrained(tmp_path / "inpaint")
    words = ["--teacher", str(tmp_path / "inpaint"), "--prompts", str(folders / "prompts.txt")]
    with pytest.raises(InputError, match="takes 9 channels and gives 4, as for inpainting") as caught:
        create_teacher(parse_config([*words, "--eval_classifier", "none"]))
    assert "\n" not in str(caught.value)


def test_a_safety_checker_that_is_missing_is_named_before_training(folders, tmp_path):
    shutil.copytree(folders / "SD 1", tmp_path / "teacher")
    path = tmp_path / "teacher" / "model_index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps({**index, "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}))
    words = ["--teacher", str(tmp_path / "teacher"), "--prompts", str(folders / "prompts.txt")]
    with pytest.raises(InputError, match="whose safety_checker is missing") as caught:
        create_teacher(parse_config([*words, "--eval_classifier", "none"]))
    assert "\n" not in str(caught.value)
    path.write_text(json.dumps(index))  # [null, null], as the sentence has it
    create_teacher(parse_config([*words, "--eval_classifier", "none"]))


def test_the_student_of_a_range_is_told_w_and_the_teacher_is_not(folders, noise):
    words = [
        "--teacher",
        str(folders / "SD 1"),
        "--prompts",
        str(folders / "prompts.txt"),
        "--eval_classifier",
        "none",
    ]
    config = parse_config([*words, "--guidance_range", "2", "9"])
    teacher = create_teacher(config)
    student = create_student(config, teacher)
    assert student.config.time_cond_proj_dim == 256 and teacher.unet.config.time_cond_proj_dim is None
    assert student.dtype == torch.float32 and student is not teacher.unet
