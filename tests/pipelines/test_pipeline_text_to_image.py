"""Text to image in one call, of Stable Diffusion 1.x, 2.x and XL: what is computed, guidance, saving and loading."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from huggingface_hub import HfApi
from tiny_text import BETAS, tiny_conditional_unet, tiny_sd, tiny_sdxl
from transformers import CLIPConfig, CLIPImageProcessor

from pid_diffusers import OneStepPIDTextToImagePipeline, PIDScheduler, TrajectoryModel

PROMPTS = ["a red fox", "a dog"]
KINDS = {"1.x": ("residual", tiny_sd), "2.x": ("v_prediction", lambda: tiny_sd("v_prediction"))}
KINDS |= {"XL": ("residual", tiny_sdxl)}
T, EPS = 14.6, 0.029


def pid_scheduler(head: str = "residual", **config) -> PIDScheduler:
    levels = {"sigma_min": EPS, "sigma_max": T, "sigma_data": 1.0}
    return PIDScheduler(prediction_type=head, timestep_type="discrete", **levels, **BETAS, **config)


def student_of(teacher, head: str = "residual", unet=None, **config) -> OneStepPIDTextToImagePipeline:
    components = {k: v for k, v in teacher.components.items() if k != "image_encoder" and v is not None}
    components = {"safety_checker": None, "feature_extractor": None, **components}
    components |= {"scheduler": pid_scheduler(head, **config), **({"unet": unet} if unet else {})}
    pipe = OneStepPIDTextToImagePipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    """A teacher, and a pipeline of its UNet as a student."""
    head, create = KINDS[request.param]
    teacher = create()
    teacher.set_progress_bar_config(disable=True)
    return teacher, student_of(teacher, head)


@pytest.fixture
def pipe(models):
    return models[1]


@pytest.fixture(scope="module")
def simple():
    return student_of(tiny_sd(), guidance_scale=7.5)


@pytest.fixture(scope="module")
def told():
    """A student that is told w between 2 and 8."""
    return student_of(tiny_sd(), unet=tiny_conditional_unet(time_cond_proj_dim=16), guidance_range=[2.0, 8.0])


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def conditions(teacher, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What training gives the network, from the teacher's own prompt encoding."""
    with torch.no_grad():
        if isinstance(teacher, StableDiffusionXLPipeline):
            embeds, _, pooled, _ = teacher.encode_prompt(prompts, do_classifier_free_guidance=False)
            time_ids = torch.tensor([16.0, 16, 0, 0, 16, 16]).expand(len(prompts), 6)
            return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}
        return {"encoder_hidden_states": teacher.encode_prompt(prompts, "cpu", 1, False)[0]}


@torch.no_grad()
def trajectory(teacher, pipe, z: torch.Tensor, sigma: float, prompts: list[str] = PROMPTS, **more) -> torch.Tensor:
    """x_θ(z, σ) as training computes it."""
    return TrajectoryModel(pipe.unet, pipe.scheduler)(z, sigma, **conditions(teacher, prompts), **more)


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


# 1. What is computed


def test_the_latents_are_the_trajectory_at_eps_and_the_image_is_their_decoding(models, noise):
    teacher, pipe = models
    latents = noise(2, 4, 8, 8)
    x = pipe(PROMPTS, latents=latents, output_type="latent").images
    assert close(x, trajectory(teacher, pipe, T * latents, EPS))
    with torch.no_grad():
        expected = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    images = pipe(PROMPTS, latents=latents, output_type="pt").images
    assert images.shape == (2, 3, 16, 16) and torch.equal(images, (expected / 2 + 0.5).clamp(0, 1))
    assert [image.size for image in pipe(PROMPTS, latents=latents).images] == [(16, 16)] * 2


def test_the_formula_written_out_gives_the_image(simple, noise):
    latents, unet = noise(2, 4, 8, 8), simple.unet
    c_in = (1 + T**2) ** -0.5
    with torch.no_grad():
        embeds = simple.text_encoder(simple.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids)[0]
        timestep = simple.scheduler.sigma_to_timestep(torch.tensor(EPS))
        network = unet(c_in * T * latents, timestep, encoder_hidden_states=embeds).sample
    expected = EPS / T * T * latents + (1 - EPS / T) * (c_in * T * latents - network)
    assert close(simple(PROMPTS, latents=latents, output_type="latent").images, expected)


def test_the_pipeline_of_diffusers_makes_the_same_image_with_this_scheduler(models, noise):
    teacher, pipe = models
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "pt"}
    plain = type(teacher)(**{**teacher.components, "scheduler": pipe.scheduler})
    plain.set_progress_bar_config(disable=True)
    expected = plain(PROMPTS, num_inference_steps=1, guidance_scale=0, **settings).images
    assert torch.equal(pipe(PROMPTS, **settings).images, expected)


def test_an_image_is_one_network_call(pipe):
    calls = []
    handle = pipe.unet.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    pipe(PROMPTS, num_images_per_prompt=2, output_type="latent")
    assert calls == [(4, 4, 8, 8)]
    handle.remove()


def test_image_b_at_sigma_i_is_at_index_b_times_the_number_of_sigmas_plus_i(models, noise):
    teacher, pipe = models
    latents, sigmas = noise(2, 4, 8, 8), [T, 3.0, EPS]
    x = pipe(PROMPTS, latents=latents, sigmas=sigmas, output_type="latent").images
    for i, sigma in enumerate(sigmas):
        assert close(x[i::3], trajectory(teacher, pipe, T * latents, sigma))
    assert torch.equal(x[::3], T * latents)
    assert torch.equal(x[2::3], pipe(PROMPTS, latents=latents, output_type="latent").images)
    assert len(pipe(PROMPTS, latents=latents, sigmas=sigmas).images) == 6


def test_several_steps_end_in_the_same_image(simple, noise):
    settings = {"latents": noise(1, 4, 8, 8), "output_type": "latent"}
    assert torch.equal(simple("a fox", num_inference_steps=3, **settings).images, simple("a fox", **settings).images)


def test_a_prompt_has_its_images_beside_each_other(models, noise):
    teacher, pipe = models
    latents = noise(4, 4, 8, 8)
    x = pipe(PROMPTS, num_images_per_prompt=2, latents=latents, output_type="latent").images
    expected = trajectory(teacher, pipe, T * latents, EPS, [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2)
    assert close(x, expected)
    assert not torch.allclose(x, trajectory(teacher, pipe, T * latents, EPS, PROMPTS * 2), atol=1e-3)


def test_a_generator_a_list_of_them_or_latents_make_the_noise(simple):
    together = simple(PROMPTS, generator=seeded(1, 2), output_type="latent").images
    for i in range(2):
        alone = simple(PROMPTS[i], generator=seeded(i + 1), output_type="latent").images
        assert close(together[i : i + 1], alone)
    latents = torch.randn(2, 4, 8, 8, generator=seeded(5))
    expected = simple(PROMPTS, latents=latents, output_type="latent").images
    assert torch.equal(simple(PROMPTS, generator=seeded(5), output_type="latent").images, expected)


def test_embeddings_may_be_given_instead_of_prompts(pipe, noise):
    settings = {"latents": noise(4, 4, 8, 8), "output_type": "latent", "num_images_per_prompt": 2}
    with torch.no_grad():
        embeds, pooled = pipe.encode_prompt(PROMPTS)
    assert (pooled is None) == (pipe.text_encoder_2 is None)
    images = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **settings).images
    assert torch.equal(images, pipe(PROMPTS, **settings).images)


def test_leaving_out_layers_of_the_text_encoder_is_as_in_diffusers(models, noise):
    teacher, pipe = models
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "latent", "clip_skip": 1}
    if pipe.text_encoder_2 is None and not hasattr(pipe.text_encoder, "text_model"):
        with pytest.raises(ValueError, match="clip_skip is 1, but diffusers cannot leave out layers"):
            pipe(PROMPTS, **settings)
        return
    plain = type(teacher)(**{**teacher.components, "scheduler": pipe.scheduler})
    plain.set_progress_bar_config(disable=True)
    expected = plain(PROMPTS, num_inference_steps=1, guidance_scale=0, **settings).images
    images = pipe(PROMPTS, **settings).images
    assert torch.equal(images, expected)
    assert not torch.allclose(images, pipe(PROMPTS, **{**settings, "clip_skip": None}).images, atol=1e-3)


def test_half_precision_makes_nearly_the_same_image_with_a_vae_that_stays_in_float32(noise):
    pipe, latents = student_of(tiny_sdxl()), noise(2, 4, 8, 8)
    exact = pipe(PROMPTS, latents=latents, output_type="pt").images
    pipe.vae.register_to_config(force_upcast=True)
    pipe.to(torch.float16)
    seen = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].dtype))
    half = pipe(PROMPTS, latents=latents.half(), output_type="pt").images
    assert seen == [torch.float32] and pipe.vae.dtype == torch.float16
    assert (half - exact).abs().max() < 0.05
    pipe.to(torch.bfloat16)
    assert (pipe(PROMPTS, latents=latents, output_type="pt").images.float() - exact).abs().max() < 0.2


# 2. Guidance


def test_w_that_is_told_changes_the_image_as_in_training(told, noise):
    latents = noise(2, 4, 8, 8)
    for w in (2.0, 3.5, 8.0):
        x = told(PROMPTS, latents=latents, guidance_scale=w, output_type="latent").images
        expected = trajectory(tiny_sd(), told, T * latents, EPS, guidance_scale=torch.full((2,), w))
        assert close(x, expected) and told.guidance_scale == w
    middle = told(PROMPTS, latents=latents, output_type="latent").images
    assert told.guidance_scale == 5.0 and not torch.allclose(middle, x, atol=1e-3)
    assert torch.equal(middle, told(PROMPTS, latents=latents, guidance_scale=5, output_type="latent").images)


def test_w_that_is_baked_in_may_be_said_but_not_changed(simple, noise):
    latents = noise(1, 4, 8, 8)
    images = simple("a fox", latents=latents, guidance_scale=7.5, output_type="latent").images
    assert torch.equal(images, simple("a fox", latents=latents, output_type="latent").images)
    assert simple.guidance_scale == 7.5 and not simple.do_classifier_free_guidance
    with pytest.raises(ValueError, match="guidance_scale is 3.*trained with w = 7.5.*baked into its weights"):
        simple("a fox", guidance_scale=3)


@pytest.mark.parametrize("w", [1.9, 8.1, float("nan"), "3", [3.0, 4.0]])
def test_w_that_is_no_number_in_the_range_is_refused(told, w):
    with pytest.raises(ValueError, match="knows numbers between 2 and 8"):
        told("a fox", guidance_scale=w)


def test_a_negative_prompt_is_refused_with_the_reason(simple, told):
    for pipe in (simple, told):
        with pytest.raises(ValueError, match="always guided away from the unconditional embedding"):
            pipe("a fox", negative_prompt="blurry")


# 3. What is refused


def test_a_teacher_alone_says_what_is_missing(noise):
    teacher = tiny_sd()
    pipe = student_of(teacher)
    pipe.scheduler = teacher.scheduler
    with pytest.raises(ValueError, match=r"is a PNDMScheduler.*load_lora_weights.*scheduler=PIDScheduler\(…\)"):
        pipe("a fox")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"height": 32}, "height is 32, but this student was trained for images of 16 × 16"),
        ({"height": 16, "width": 8}, "width is 8, but"),
        ({"prompt": None}, "either prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 12, 16)}, "either prompt or prompt_embeds"),
        ({"prompt": 3}, "prompt is 3; pass a text"),
        ({"prompt": []}, r"prompt is \[\]; pass a text"),
        ({"prompt": ["a", None]}, "pass a text or a list of texts"),
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 12, 9)}, r"\(1, 12, 9\); this UNet needs"),
        ({"pooled_prompt_embeds": torch.zeros(1, 9)}, "Stable Diffusion XL alone reads it"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"generator": seeded(1, 2)}, "generator is a list of 2"),
        ({"latents": torch.zeros(1, 4, 4, 4)}, r"latents has shape \(1, 4, 4, 4\); these images need \(1, 4, 8, 8\)"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'; choose one of"),
        ({"sigmas": [1.0], "num_inference_steps": 2}, "both passed"),
        ({"sigmas": [20.0]}, "between 0 and sigma_max = 14.6"),
        ({"num_inference_steps": 0}, "pass at least 1"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "choose from"),
    ],
)
def test_what_means_nothing_gets_one_sentence(simple, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        simple(**{"prompt": "a fox", **settings})
    assert "\n" not in str(error.value)


def test_embeddings_of_xl_come_in_pairs():
    pipe = student_of(tiny_sdxl())
    with pytest.raises(ValueError, match="pooled_prompt_embeds is None"):
        pipe(prompt_embeds=torch.zeros(1, 12, 40))
    with pytest.raises(ValueError, match="pooled_prompt_embeds has 2 rows, prompt_embeds 1"):
        pipe(prompt_embeds=torch.zeros(1, 12, 40), pooled_prompt_embeds=torch.zeros(2, 24))


def test_a_pipeline_without_its_text_encoders_asks_for_embeddings(noise):
    pipe, latents = student_of(tiny_sdxl()), noise(1, 4, 8, 8)
    with torch.no_grad():
        embeds, pooled = pipe.encode_prompt("a fox")
    images = pipe("a fox", latents=latents, output_type="latent").images
    pipe.text_encoder = pipe.text_encoder_2 = None
    with pytest.raises(ValueError, match="no text_encoder and no text_encoder_2 to read a prompt; pass prompt_embeds"):
        pipe("a fox")
    settings = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "latents": latents}
    assert torch.equal(pipe(**settings, output_type="latent").images, images)


def test_the_size_of_a_student_need_not_be_a_square(noise):
    pipe = student_of(tiny_sd(), unet=tiny_conditional_unet(sample_size=(4, 8)))
    assert pipe("a fox", height=8, width=16).images[0].size == (16, 8)
    with pytest.raises(ValueError, match="height is 16, but this student was trained for images of 8 × 16"):
        pipe("a fox", height=16)


# 4. Callbacks, offload, the safety checker


def test_a_callback_sees_every_point_and_may_change_it(simple, noise):
    seen = []

    def callback(pipe, i, t, kwargs):
        seen.append((i, float(t), kwargs["latents"].shape, pipe.num_timesteps))
        return {"latents": torch.zeros_like(kwargs["latents"])}

    x = simple(PROMPTS, sigmas=[3.0, EPS], output_type="latent", callback_on_step_end=callback).images
    timesteps = [float(t) for t in simple.scheduler.timesteps]
    assert seen == [(i, timesteps[i], (2, 4, 8, 8), 2) for i in range(2)]
    assert torch.equal(x, torch.zeros(4, 4, 8, 8))


def test_a_tuple_holds_the_images_and_no_objections(simple):
    images, objections = simple("a fox", return_dict=False)
    assert len(images) == 1 and objections is None
    assert isinstance(simple("a fox"), StableDiffusionPipelineOutput)


def safe(teacher) -> StableDiffusionPipeline:
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=4)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    components = {**teacher.components, "feature_extractor": CLIPImageProcessor(**size)}
    return StableDiffusionPipeline(**{**components, "safety_checker": StableDiffusionSafetyChecker(config).eval()})


def test_the_teachers_safety_checker_is_carried_over(noise, tmp_path):
    teacher = safe(tiny_sd())
    teacher.save_pretrained(tmp_path / "teacher")
    pipe = OneStepPIDTextToImagePipeline.from_pretrained(tmp_path / "teacher", scheduler=pid_scheduler())
    pipe.save_pretrained(tmp_path / "student")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student")
    pipe.set_progress_bar_config(disable=True)
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "np"}
    for threshold, objects in ((2.0, False), (-2.0, True)):  # of a cosine
        pipe.safety_checker.concept_embeds_weights.data.fill_(threshold)
        pipe.safety_checker.special_care_embeds_weights.data.fill_(threshold)
        output = pipe(PROMPTS, **settings)
        assert output.nsfw_content_detected == [objects] * 2
        assert (output.images == 0).all() == objects  # blacked out
    with pytest.raises(ValueError, match="without a feature_extractor"):
        OneStepPIDTextToImagePipeline(**{**pipe.components, "feature_extractor": None})


# 5. Saving and loading


def test_a_teachers_folder_makes_a_student_with_another_scheduler_or_unet(models, noise, tmp_path):
    teacher, pipe = models
    teacher.save_pretrained(tmp_path)
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "latent"}
    passed = {"scheduler": pipe.scheduler, "unet": pipe.unet}
    for names in (["scheduler"], ["scheduler", "unet"]):
        made = OneStepPIDTextToImagePipeline.from_pretrained(tmp_path, **{name: passed[name] for name in names})
        made.set_progress_bar_config(disable=True)
        assert torch.equal(made(PROMPTS, **settings).images, pipe(PROMPTS, **settings).images)


def test_a_student_loads_by_every_name_and_is_saved_again_as_it_was(models, noise, tmp_path):
    pipe = models[1]
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "latent"}
    images = pipe(PROMPTS, **settings).images
    pipe.save_pretrained(tmp_path / "first")
    for load in (DiffusionPipeline, OneStepPIDTextToImagePipeline):
        again = load.from_pretrained(tmp_path / "first")
        again.set_progress_bar_config(disable=True)
        assert type(again) is OneStepPIDTextToImagePipeline
        assert torch.equal(again(PROMPTS, **settings).images, images)
    again.save_pretrained(tmp_path / "second")
    for file in ("model_index.json", "pipeline.py", "scheduler/pid_diffusers.py", "scheduler/scheduler_config.json"):
        assert (tmp_path / "second" / file).read_text() == (tmp_path / "first" / file).read_text()
    index = json.loads((tmp_path / "first" / "model_index.json").read_text())
    named = {name for name, value in index.items() if isinstance(value, list) and name != "_class_name"}
    assert named == {path.name for path in (tmp_path / "first").iterdir() if path.is_dir()}
    plain = type(models[0]).from_pretrained(tmp_path / "first")
    plain.set_progress_bar_config(disable=True)
    assert torch.equal(plain(PROMPTS, num_inference_steps=1, guidance_scale=0, **settings).images, images)


LOAD = """
import json, sys
import torch
from diffusers import DiffusionPipeline
results = {}
for model in sys.argv[1:]:
    for trusted in (False, True):
        try:
            pipe = DiffusionPipeline.from_pretrained(model, trust_remote_code=trusted)
            pipe.set_progress_bar_config(disable=True)
            latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
            result = pipe("a fox", latents=latents, output_type="latent").images.flatten().tolist()
        except Exception as error:
            result = str(error)
        results[f"{model} {trusted}"] = result
json.dump(results, sys.stdout)
"""


@pytest.mark.slow
def test_without_the_package_a_student_loads_by_the_files_of_its_folder_or_repository(
    hub, python_without_package, tmp_path
):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    expected, places = {}, []
    for name, create in (("sd", tiny_sd), ("sdxl", tiny_sdxl)):
        pipe, folder = student_of(create()), tmp_path / name
        pipe.save_pretrained(folder)
        api.create_repo(f"ada/{name}")
        api.upload_folder(repo_id=f"ada/{name}", folder_path=folder)
        latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
        images = pipe("a fox", latents=latents, output_type="latent").images.flatten()
        for place in (str(folder), f"ada/{name}"):
            expected[place] = images
            places.append(place)
            loaded = DiffusionPipeline.from_pretrained(place)  # the package is imported: no trust is needed
            loaded.set_progress_bar_config(disable=True)
            again = loaded("a fox", latents=latents, output_type="latent").images.flatten()
            assert type(loaded) is OneStepPIDTextToImagePipeline and close(again, images)
    shutil.rmtree(os.environ["HF_HUB_CACHE"])
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    command = [python_without_package, "-c", LOAD, *places]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    results = json.loads(ran.stdout)
    for place in places:
        assert "trust_remote_code=True" in results[f"{place} False"]
        assert torch.allclose(torch.tensor(results[f"{place} True"]), expected[place], atol=1e-5), results
    assert sys.executable != python_without_package
