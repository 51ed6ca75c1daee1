"""Students in latent space, and students that are a DiT."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from tiny_latent import tiny_dit, tiny_vae, tiny_vq

from pid_diffusers import OneStepPIDPipeline, PIDScheduler, TrajectoryModel


def create(unet, vae=None) -> OneStepPIDPipeline:
    pipe = OneStepPIDPipeline(unet, PIDScheduler(prediction_type="edm"), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["DiT and AutoencoderKL", "UNet and VQModel"])
def pipe(request, tiny_unet):
    return create(tiny_dit(), tiny_vae()) if "DiT" in request.param else create(tiny_unet(), tiny_vq())


def start(pipe, noise) -> dict:
    """Three starts, and their classes if there are any."""
    condition = {"class_labels": [1, 2, 3]} if pipe.num_classes else {}
    return {"latents": noise(3, pipe.unet.config.in_channels, 8, 8), **condition}


def test_images_are_the_vaes_of_the_scaled_latents(pipe, noise):
    settings = start(pipe, noise)
    latents = pipe(**settings, output_type="latent").images
    with torch.no_grad():
        expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    images = pipe(**settings, output_type="pt").images
    assert images.shape == (3, 3, 16, 16)
    assert torch.equal(images, (expected / 2 + 0.5).clamp(0, 1))
    assert [image.size for image in pipe(**settings).images] == [(16, 16)] * 3


def test_latents_are_the_trajectory(pipe, noise):
    settings = start(pipe, noise)
    student = TrajectoryModel(pipe.unet, pipe.scheduler)
    condition = {"class_labels": torch.tensor([1, 2, 3])} if pipe.num_classes else {}
    with torch.no_grad():
        x = student(80 * settings["latents"], 0.002, **condition)
    latents = pipe(**settings, output_type="latent").images
    assert (latents - x).abs().max() < 1e-4
    points = pipe(**settings, sigmas=[80.0, 0.002], output_type="latent").images
    assert torch.equal(points[::2], 80 * settings["latents"]) and (points[1::2] - x).abs().max() < 1e-4
    assert pipe(**settings, sigmas=[80.0, 0.002], output_type="np").images.shape == (6, 16, 16, 3)


def test_a_student_saves_and_loads_with_its_vae(pipe, noise, tmp_path):
    settings = start(pipe, noise)
    images = pipe(**settings, output_type="pt").images
    for folder in (tmp_path / "first", tmp_path / "second"):  # what was loaded is saved again
        pipe.save_pretrained(folder)
        assert json.loads((folder / "model_index.json").read_text())["vae"][1] == type(pipe.vae).__name__
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert type(pipe) is OneStepPIDPipeline
        assert torch.equal(pipe(**settings, output_type="pt").images, images)
    trusted = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert torch.equal(trusted(**settings, output_type="pt").images, images)


def test_a_student_without_a_vae_is_saved_as_it_always_was(tiny_unet, noise, tmp_path):
    pipe = create(tiny_unet())
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert {name for name in index if not name.startswith("_")} == {"unet", "scheduler"}
    again, latents = OneStepPIDPipeline.from_pretrained(tmp_path), noise(2, 3, 8, 8)
    assert again.vae is None
    assert torch.equal(again(latents=latents, output_type="pt").images, pipe(latents=latents, output_type="pt").images)


def test_a_loaded_student_can_be_given_a_vae(tiny_unet, tmp_path):
    create(tiny_unet()).save_pretrained(tmp_path)
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path, vae=tiny_vq())
    assert pipe(output_type="pt").images.shape == (1, 3, 16, 16)


def test_a_dits_classes_are_checked_and_drawn_as_a_unets_are(noise):
    pipe = create(tiny_dit())
    with pytest.raises(ValueError, match="knows the classes 0 to 9"):
        pipe(class_labels=10)
    latents = noise(20, 4, 8, 8)
    drawn, same, other = (
        pipe(latents=latents, generator=torch.Generator().manual_seed(s), output_type="latent").images
        for s in (0, 0, 1)
    )
    assert torch.equal(drawn, same) and not torch.equal(drawn, other)


def test_half_precision_decodes_nearly_the_same(pipe, noise):
    settings = start(pipe, noise)
    exact = pipe(**settings, output_type="latent").images
    pipe.to(torch.bfloat16)
    rounded = pipe(**settings, output_type="latent").images
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()
    images = pipe(**settings, output_type="np").images
    assert images.shape == (3, 16, 16, 3) and 0 <= images.min() and images.max() <= 1
