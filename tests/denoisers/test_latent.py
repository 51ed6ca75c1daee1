"""Teachers that are a DiT, and teachers in latent space: the same numbers as diffusers', and students that decode."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderTiny,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    LDMPipeline,
)
from tiny_latent import tiny_dit, tiny_vae, tiny_vq

from pid_diffusers import Denoiser, EDMDenoiser, InputError, OneStepPIDPipeline, VPDenoiser
from pid_diffusers.denoisers import euler
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.precision import keep_output_in_float32
from pid_diffusers.training import Trainer, TrainingConfig

STEPS = 5


def ddim(**settings) -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing", **settings)


@pytest.fixture
def dit_folder(tmp_path):
    DiTPipeline(tiny_dit(), tiny_vae(), ddim()).save_pretrained(tmp_path / "dit")
    return tmp_path / "dit"


@pytest.fixture
def ldm_folder(tiny_unet, tmp_path):
    LDMPipeline(tiny_vq(), tiny_unet(), ddim()).save_pretrained(tmp_path / "ldm")
    return tmp_path / "ldm"


@pytest.fixture
def pixel_dit():
    return tiny_dit(in_channels=3, out_channels=None)


def assert_near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance * max(1.0, b.abs().max().item())


def set_up_steps() -> tuple[DDIMScheduler, list[float]]:
    scheduler = ddim()
    scheduler.set_timesteps(STEPS)
    alphas_cumprod = scheduler.alphas_cumprod.double()[scheduler.timesteps]
    return scheduler, [*((1 - alphas_cumprod) / alphas_cumprod).sqrt().tolist(), 0.0]


# 1. Steps through D are the pipelines' own


@torch.no_grad()
def test_euler_steps_are_ddims_steps_with_a_dit(dit_folder, noise):
    teacher, dit, labels = Denoiser.from_pretrained(dit_folder), tiny_dit(), torch.tensor([3, 7])
    assert type(teacher) is VPDenoiser
    scheduler, sigmas = set_up_steps()
    z = sigmas[0] * noise(2, 4, 8, 8)
    x = z / (1 + sigmas[0] ** 2) ** 0.5
    states = euler(teacher, z, sigmas, class_labels=labels)
    for t, sigma, state in zip(scheduler.timesteps, sigmas[1:], states[1:], strict=True):
        mean, _ = dit(x, t.expand(2), labels, return_dict=False)[0].chunk(2, dim=1)
        x = scheduler.step(mean, t, x, return_dict=False)[0]
        assert_near(state, x * (1 + sigma**2) ** 0.5)


@torch.no_grad()
def test_euler_steps_are_ddims_steps_with_a_unet_in_latent_space(ldm_folder, tiny_unet, noise):
    teacher, unet = Denoiser.from_pretrained(ldm_folder), tiny_unet()
    assert type(teacher) is VPDenoiser
    scheduler, sigmas = set_up_steps()
    z = sigmas[0] * noise(2, 3, 8, 8)
    x = z / (1 + sigmas[0] ** 2) ** 0.5
    for t, sigma, state in zip(scheduler.timesteps, sigmas[1:], euler(teacher, z, sigmas)[1:], strict=True):
        x = scheduler.step(unet(x, t, return_dict=False)[0], t, x, return_dict=False)[0]
        assert_near(state, x * (1 + sigma**2) ** 0.5)


@pytest.mark.parametrize("kind", ["dit", "ldm"])
@torch.no_grad()
def test_decoded_ends_are_the_images_of_the_whole_pipeline(request, kind):
    folder = request.getfixturevalue(f"{kind}_folder")
    teacher, pipe = Denoiser.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    _, sigmas = set_up_steps()
    settings = {"num_inference_steps": STEPS, "output_type": "np"}
    condition, latents = {}, torch.randn(2, *teacher.sample_shape, generator=torch.Generator().manual_seed(0))
    if kind == "dit":
        settings |= {"class_labels": [1, 2], "guidance_scale": 1.0}
        condition = {"class_labels": torch.tensor([1, 2])}
    else:
        settings |= {"batch_size": 2}
    expected = pipe(**settings, generator=torch.Generator().manual_seed(0)).images
    # these pipelines begin with x = n, which is √(1+σ²) n here
    end = euler(teacher, latents * (1 + sigmas[0] ** 2) ** 0.5, sigmas, **condition)[-1]
    images = (teacher.decode(end) / 2 + 0.5).clamp(0, 1)
    assert_near(images.permute(0, 2, 3, 1), torch.from_numpy(expected), 1e-3)


@torch.no_grad()
def test_a_dit_is_told_the_time_between_two_indices(dit_folder, noise):
    teacher, dit, labels = Denoiser.from_pretrained(dit_folder), tiny_dit(), torch.tensor([3, 7])
    x, sigmas = noise(2, 4, 8, 8), teacher.noise_levels.discrete_sigmas
    sigma = (sigmas[500] * sigmas[501]).sqrt().float()
    between = dit(x / (1 + sigma**2).sqrt(), torch.tensor([500.5, 500.5]), labels, return_dict=False)[0]
    assert_near(teacher(x, sigma, class_labels=labels), x - sigma * between[:, :4])


# 2. DiT in pixel space


@pytest.mark.parametrize("scheduler", [ddim(), EDMEulerScheduler()])
@torch.no_grad()
def test_a_dit_in_pixel_space_is_a_teacher(pixel_dit, noise, tmp_path, scheduler):
    edm = type(scheduler) is EDMEulerScheduler
    (ConsistencyModelPipeline if edm else DDPMPipeline)(pixel_dit, scheduler).save_pretrained(tmp_path)
    teacher, x, labels = Denoiser.from_pretrained(tmp_path), noise(2, 3, 8, 8), torch.tensor([1, 9])
    assert teacher.vae is None and teacher.sample_shape == (3, 8, 8) and teacher.num_classes == 10
    expected = EDMDenoiser(pixel_dit) if edm else VPDenoiser(pixel_dit, scheduler)
    assert torch.equal(teacher(x, 2.0, class_labels=labels), expected(x, 2.0, class_labels=labels))
    assert torch.equal(teacher.decode(x), x)


@torch.no_grad()
def test_a_dit_pipeline_may_have_no_vae(pixel_dit, noise, tmp_path):
    DiTPipeline(pixel_dit, None, ddim()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["vae"] == [None, None]
    teacher, x, labels = Denoiser.from_pretrained(tmp_path), noise(2, 3, 8, 8), torch.tensor([1, 9])
    assert teacher.vae is None
    assert_near(teacher(x, 2.0, class_labels=labels), VPDenoiser(pixel_dit, ddim())(x, 2.0, class_labels=labels), 1e-6)


# 3. What a teacher in latent space is


def test_a_dits_classes_are_the_real_ones_and_all_are_drawn(dit_folder):
    teacher = Denoiser.from_pretrained(dit_folder)
    assert teacher.num_classes == 10
    assert teacher.unet.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.num_embeddings == 11
    labels = teacher.draw_condition(1000, torch.Generator().manual_seed(0))["class_labels"]
    assert labels.unique().tolist() == list(range(10))


@torch.no_grad()
def test_in_training_mode_no_label_is_dropped(dit_folder, noise):
    x, timestep, labels = noise(64, 4, 8, 8), torch.full((64,), 5.0), torch.arange(64) % 10
    original = tiny_dit().train()
    assert not torch.equal(*(original(x, timestep, labels, return_dict=False)[0] for _ in range(2)))
    teacher = Denoiser.from_pretrained(dit_folder)
    in_evaluation = teacher(x, 1.0, class_labels=labels)
    assert torch.equal(teacher.train()(x, 1.0, class_labels=labels), in_evaluation)


def test_the_published_dits_folders_name_their_class_as_it_was(dit_folder):
    for file, old in (("model_index.json", ["diffusers", "Transformer2DModel"]), ("transformer/config.json", None)):
        content = json.loads((dit_folder / file).read_text())
        content |= {"transformer": old, "id2label": {"0": "tench"}} if old else {"_class_name": "Transformer2DModel"}
        (dit_folder / file).write_text(json.dumps(content))
    assert type(Denoiser.from_pretrained(dit_folder).unet) is DiTTransformer2DModel


def test_the_vae_is_frozen_shared_by_copies_and_no_part_of_the_teacher(dit_folder, noise):
    teacher = Denoiser.from_pretrained(dit_folder)
    assert not teacher.vae.training and not any(p.requires_grad for p in teacher.vae.parameters())
    assert {name.split(".")[0] for name, _ in teacher.named_parameters()} == {"unet"}
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"unet"}
    duplicate = copy.deepcopy(teacher)
    assert duplicate.vae is teacher.vae and duplicate.unet is not teacher.unet
    duplicate.half().train()
    assert teacher.vae.dtype == torch.float32 and not teacher.vae.training
    x, labels = noise(1, 4, 8, 8), torch.tensor([1])
    assert torch.equal(copy.deepcopy(teacher)(x, 1.0, class_labels=labels), teacher(x, 1.0, class_labels=labels))


def test_a_teacher_in_latent_space_says_so(dit_folder, ldm_folder):
    assert "latents of 4 × 8 × 8 for AutoencoderKL, 10 classes, DiT" in Denoiser.from_pretrained(dit_folder).describe()
    assert "latents of 3 × 8 × 8 for VQModel, unconditional, UNet" in Denoiser.from_pretrained(ldm_folder).describe()


def test_a_vae_of_another_kind_is_an_input_error(tmp_path):
    DiTPipeline(tiny_dit(), AutoencoderTiny(), ddim()).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="with a VAE of type AutoencoderTiny; pass .*AutoencoderKL or VQModel"):
        Denoiser.from_pretrained(tmp_path)


@torch.no_grad()
def test_the_last_layer_of_a_dit_computes_in_float32(noise):
    dit, x, labels = tiny_dit(), noise(2, 4, 8, 8), torch.tensor([1, 2])
    names, timestep = list(dit.state_dict()), torch.tensor([5.0, 6.0])
    exact = dit(x, timestep, labels, return_dict=False)[0]
    half = keep_output_in_float32(dit, body_dtype=torch.bfloat16)
    assert list(half.state_dict()) == names
    assert half.proj_out_2.weight.dtype == torch.float32 and half.proj_out_1.weight.dtype == torch.bfloat16
    output = half(x.bfloat16(), timestep, labels, return_dict=False)[0]
    assert output.dtype == torch.float32 and (output - exact).abs().max() < 0.1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = keep_output_in_float32(tiny_dit())(x, timestep, labels, return_dict=False)[0]
    assert output.dtype == torch.float32 and (output - exact).abs().max() < 0.1


# 4. Students, from end to end


def distil(teacher, output_dir, **settings) -> tuple[Trainer, str]:
    AcceleratorState._reset_state(True)
    settings = {"scheme": "midpoint", "max_train_steps": 2, "train_batch_size": 2, "num_eval_samples": 4, **settings}
    settings |= {"num_validation_images": 2, "validation_steps": 1, "report_to": "none", "optimizer": "adamw"}
    config = TrainingConfig(teacher=str(teacher), output_dir=str(output_dir), **settings).validate()
    trainer, report = Trainer(config), RunReport(config)
    return trainer, report.finish(trainer.train(validate=report.validate))


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_dits_student_is_distilled_saved_with_its_vae_and_makes_images(dit_folder, tmp_path, mixed_precision):
    trainer, said = distil(dit_folder, tmp_path / "student", mixed_precision=mixed_precision)
    assert "rms distance per latent value" in said
    for name in ("samples.png", "trajectory.png", "README.md", "validation/step-0000002.png"):
        assert (tmp_path / "student" / name).is_file()
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert type(pipe) is OneStepPIDPipeline and type(pipe.unet) is DiTTransformer2DModel
    original = tiny_vae().state_dict()
    assert all(torch.equal(value, original[name]) for name, value in pipe.vae.state_dict().items())
    latents = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="latent").images
    images = pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert latents.shape == (2, 4, 8, 8) and images.shape == (2, 3, 16, 16)
    assert_near(images, (trainer.teacher.decode(latents) / 2 + 0.5).clamp(0, 1), 1e-5)


@pytest.mark.slow
def test_a_unets_student_in_latent_space_is_distilled(ldm_folder, tmp_path):
    distil(ldm_folder, tmp_path / "student")
    images = DiffusionPipeline.from_pretrained(tmp_path / "student")(batch_size=2).images
    assert [image.size for image in images] == [(16, 16)] * 2


@pytest.mark.slow
def test_a_dits_student_sees_every_label_while_it_trains(dit_folder, tmp_path, noise):
    trainer, _ = distil(dit_folder, tmp_path / "student")
    x, timestep, labels = noise(64, 4, 8, 8), torch.full((64,), 5.0), torch.arange(64) % 10
    with torch.no_grad():
        in_training = trainer.unet.train()(x, timestep, labels, return_dict=False)[0]
        assert torch.equal(in_training, trainer.unet.eval()(x, timestep, labels, return_dict=False)[0])


@pytest.mark.slow
@pytest.mark.parametrize("out_channels", [8, None])
def test_a_dit_has_smaller_students(out_channels, tmp_path):
    DiTPipeline(tiny_dit(out_channels=out_channels), tiny_vae(), ddim()).save_pretrained(tmp_path / "teacher")
    config = {"num_attention_heads": 1, "attention_head_dim": 8, "num_layers": 1}
    (tmp_path / "small.json").write_text(json.dumps(config))
    trainer, _ = distil(tmp_path / "teacher", tmp_path / "student", student_config=str(tmp_path / "small.json"))
    assert trainer.unet.config.num_embeds_ada_norm == 10
    assert {block.norm1.emb.class_embedder.dropout_prob for block in trainer.unet.transformer_blocks} == {0.0}
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path / "student")
    assert pipe.unet.config.num_layers == 1 and pipe.vae is not None
    assert pipe(class_labels=1, output_type="pt").images.isfinite().all()


@pytest.mark.slow
def test_a_dits_student_may_be_a_unet(tiny_unet, dit_folder, tmp_path):
    config = dict(tiny_unet(in_channels=4, out_channels=8, num_class_embeds=10).config)
    (tmp_path / "unet.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config}))
    trainer, _ = distil(dit_folder, tmp_path / "student", student_config=str(tmp_path / "unet.json"))
    assert type(trainer.unet).__name__ == "UNet2DModel"
    (tmp_path / "unet.json").write_text(json.dumps({"_class_name": "UNet2DModel", **config, "num_class_embeds": 4}))
    with pytest.raises(InputError, match="student_config sets num_class_embeds to 4; the teacher's is 10"):
        distil(dit_folder, tmp_path / "other", student_config=str(tmp_path / "unet.json"))


def test_a_dit_whose_patches_do_not_fit_its_images_is_an_input_error(tmp_path):
    DDPMPipeline(tiny_dit(sample_size=7), ddim()).save_pretrained(tmp_path / "odd")
    with pytest.raises(InputError, match="odd', whose network cannot be evaluated on images of its own size"):
        distil(tmp_path / "odd", tmp_path / "student")
