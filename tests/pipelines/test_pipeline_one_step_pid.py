import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils import logging as diffusers_logging

from pid_diffusers import EDMUNet2DModel, OneStepPIDPipeline, PIDScheduler, TrajectoryModel


@pytest.fixture
def pipe(tiny_unet):
    """Unconditional, RGB."""
    return create(tiny_unet())


@pytest.fixture
def conditional(tiny_unet):
    """Ten classes, grey."""
    return create(tiny_unet(num_class_embeds=10, in_channels=1, out_channels=1))


def create(unet, **config):
    pipe = OneStepPIDPipeline(unet, PIDScheduler(prediction_type="edm", **config))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds):
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators if len(seeds) > 1 else generators[0]


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


# 1. What is computed


def test_an_image_is_one_network_call(pipe):
    calls = []
    pipe.unet.register_forward_hook(lambda module, inputs, output: calls.append(inputs[0].shape))
    pipe(batch_size=5)
    assert calls == [(5, 3, 8, 8)]
    calls.clear()
    pipe(sigmas=[80.0, 1.0, 0.002])
    assert calls == [(1, 3, 8, 8)] * 3


@pytest.mark.parametrize("head", ["sample", "edm", "epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep_type", ["edm", "edm_scaled"])
def test_the_sample_is_the_trajectory_at_eps_from_T_times_the_latents(tiny_unet, noise, timestep_type, head):
    scheduler = PIDScheduler(sigma_max=14.6146, sigma_min=0.03, prediction_type=head, timestep_type=timestep_type)
    pipe, latents = OneStepPIDPipeline(tiny_unet(), scheduler), noise(2, 3, 8, 8)
    x = pipe(latents=latents, output_type="latent").images
    with torch.no_grad():
        assert close(x, TrajectoryModel(pipe.unet, scheduler)(14.6146 * latents, 0.03), 1e-4)


def test_ten_labels_make_ten_images(conditional):
    images = conditional(class_labels=list(range(10))).images
    assert len(images) == 10
    assert {image.size for image in images} == {(8, 8)}


def test_each_image_has_its_own_class(conditional, noise):
    latents, labels = noise(3, 1, 8, 8), [7, 0, 7]
    x = conditional(class_labels=labels, latents=latents, output_type="latent").images
    student = TrajectoryModel(conditional.unet, conditional.scheduler)
    with torch.no_grad():
        assert close(x, student(80 * latents, 0.002, class_labels=torch.tensor(labels)))
        assert not close(x, student(80 * latents, 0.002, class_labels=torch.tensor([1, 2, 3])), 1e-3)


def test_labels_may_be_an_integer_a_list_or_a_tensor(conditional, noise):
    latents = noise(2, 1, 8, 8)
    x = conditional(class_labels=[4, 4], latents=latents, output_type="latent").images
    for labels in (4, torch.tensor(4), torch.tensor([4, 4]), np.array([4, 4])):
        assert torch.equal(conditional(class_labels=labels, latents=latents, output_type="latent").images, x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_be_integers_of_any_size(conditional, noise, dtype):
    latents = noise(2, 1, 8, 8)
    x = conditional(class_labels=torch.tensor([3, 9], dtype=dtype), latents=latents, output_type="pt").images
    assert torch.equal(x, conditional(class_labels=[3, 9], latents=latents, output_type="pt").images)


def test_classes_that_are_not_given_are_drawn_from_the_generator(conditional, noise):
    latents = noise(30, 1, 8, 8)
    first, same, other = (
        conditional(latents=latents, generator=seeded(seed), output_type="latent").images for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not close(first, other, 1e-3)
    candidates = torch.stack(
        [conditional(class_labels=y, latents=latents, output_type="latent").images for y in range(10)]
    )
    nearest = (candidates - first).abs().amax(dim=(2, 3, 4)).min(dim=0)
    assert nearest.values.max() < 1e-5
    assert len(nearest.indices.unique()) > 5


def test_drawing_classes_does_not_change_the_noise(conditional):
    start = conditional(batch_size=2, generator=seeded(0), sigmas=[80.0], output_type="latent").images
    same = conditional(class_labels=[1, 2], generator=seeded(0), sigmas=[80.0], output_type="latent").images
    assert torch.equal(start, same)


def test_several_steps_end_in_the_same_image(pipe, noise):
    latents = noise(2, 3, 8, 8)
    one, three = (pipe(latents=latents, num_inference_steps=n, output_type="latent").images for n in (1, 3))
    assert torch.equal(one, three)


# 2. The trajectory


def test_image_b_at_sigma_i_is_at_index_b_times_the_number_of_sigmas_plus_i(conditional, noise):
    sigmas, latents, labels = [80.0, 3.0, 0.002], noise(2, 1, 8, 8), [1, 5]
    x = conditional(class_labels=labels, latents=latents, sigmas=sigmas, output_type="latent").images
    student = TrajectoryModel(conditional.unet, conditional.scheduler)
    assert x.shape == (6, 1, 8, 8)
    with torch.no_grad():
        for i, sigma in enumerate(sigmas):
            expected = student(80 * latents, sigma, class_labels=torch.tensor(labels))
            for b in range(2):
                assert close(x[b * 3 + i], expected[b])


@pytest.mark.parametrize("sigma_max", [80.0, 14.6146, 157.4])
def test_the_trajectory_at_T_is_z(tiny_unet, noise, sigma_max):
    pipe, latents = create(tiny_unet(), sigma_max=sigma_max), noise(2, 3, 8, 8)
    x = pipe(latents=latents, sigmas=[sigma_max], output_type="latent").images
    assert torch.equal(x, sigma_max * latents)


def test_the_trajectory_at_eps_or_0_is_the_image(pipe, noise):
    latents = noise(2, 3, 8, 8)
    image = pipe(latents=latents, output_type="latent").images
    for sigma in (0.002, 0):
        assert torch.equal(pipe(latents=latents, sigmas=[sigma], output_type="latent").images, image)


# 3. Randomness


def test_a_seed_repeats_the_image(pipe):
    first, same, other = (pipe(generator=seeded(seed), output_type="pt").images for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_an_image_depends_on_its_own_generator_alone(conditional):
    together = conditional(generator=seeded(3, 4, 5), output_type="latent").images
    assert len(together) == 3
    for i, seed in enumerate((3, 4, 5)):
        alone = conditional(generator=seeded(seed), output_type="latent").images
        assert close(together[i : i + 1], alone)
        listed = conditional(generator=[seeded(seed)], output_type="latent").images
        assert torch.equal(listed, alone)


def test_drawn_noise_has_unit_variance_before_it_is_scaled_by_T(pipe):
    z = pipe(batch_size=200, generator=seeded(0), sigmas=[80.0], output_type="latent").images
    assert z.std().item() == pytest.approx(80, rel=0.02)


def test_given_latents_are_not_changed(pipe, noise):
    latents = noise(2, 3, 8, 8)
    pipe(latents=latents)
    assert torch.equal(latents, noise(2, 3, 8, 8))


# 4. Results


def test_pil_images_have_the_mode_of_the_channels(pipe, conditional):
    assert [image.mode for image in pipe(batch_size=2).images] == ["RGB", "RGB"]
    assert [image.mode for image in conditional(batch_size=2).images] == ["L", "L"]


def test_output_types_are_the_same_images_in_different_form(pipe, noise):
    latents = noise(2, 3, 8, 8)
    x, pt, array, pil = (
        pipe(latents=latents, output_type=output_type).images for output_type in ("latent", "pt", "np", "pil")
    )
    assert pt.shape == (2, 3, 8, 8)
    assert array.shape == (2, 8, 8, 3)
    assert 0 <= array.min() and array.max() <= 1
    assert close(pt, (x / 2 + 0.5).clamp(0, 1))
    assert np.allclose(array, pt.permute(0, 2, 3, 1).numpy())
    assert np.abs(np.stack([np.asarray(image) for image in pil]) / 255 - array).max() <= 0.51 / 255


def test_return_dict_false_gives_a_tuple(pipe, noise):
    latents = noise(2, 3, 8, 8)
    output = pipe(latents=latents, output_type="pt")
    assert isinstance(output, ImagePipelineOutput)
    result = pipe(latents=latents, output_type="pt", return_dict=False)
    assert isinstance(result, tuple)
    assert len(result) == 1
    assert torch.equal(result[0], output.images)


def test_the_number_of_images_is_that_of_labels_latents_or_generators(conditional, noise):
    assert len(conditional().images) == 1
    assert len(conditional(class_labels=3).images) == 1
    assert len(conditional(batch_size=2, class_labels=3).images) == 2
    assert len(conditional(class_labels=[3, 1, 4]).images) == 3
    assert len(conditional(latents=noise(4, 1, 8, 8)).images) == 4
    assert len(conditional(generator=seeded(0, 1)).images) == 2


def test_rectangular_images(tiny_unet):
    images = create(tiny_unet(sample_size=(8, 16)))(output_type="pt").images
    assert images.shape == (1, 3, 8, 16)


# 5. Callbacks


def test_a_callback_sees_every_point(pipe, noise):
    latents, seen = noise(1, 3, 8, 8), []

    def callback(pipeline, step, timestep, callback_kwargs):
        assert pipeline is pipe
        seen.append((step, timestep.item(), callback_kwargs["latents"]))
        return callback_kwargs

    sigmas = [80.0, 1.0, 0.002]
    x = pipe(latents=latents, sigmas=sigmas, output_type="latent", callback_on_step_end=callback).images
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert [timestep for _, timestep, _ in seen] == pytest.approx((np.log(sigmas) / 4).tolist(), rel=1e-6)
    assert torch.equal(torch.cat([point for _, _, point in seen]), x)


def test_a_callback_can_change_a_point_and_no_other(pipe, noise):
    def callback(pipeline, step, timestep, callback_kwargs):
        return {"latents": torch.zeros_like(callback_kwargs["latents"])} if step == 1 else {}

    settings = {"latents": noise(1, 3, 8, 8), "sigmas": [80.0, 1.0, 0.002], "output_type": "latent"}
    plain, changed = pipe(**settings).images, pipe(**settings, callback_on_step_end=callback).images
    assert torch.equal(changed[1], torch.zeros(3, 8, 8))
    assert torch.equal(changed[[0, 2]], plain[[0, 2]])


def test_a_callback_can_change_the_image(pipe):
    def callback(pipeline, step, timestep, callback_kwargs):
        return {"latents": torch.ones_like(callback_kwargs["latents"])}

    assert np.array_equal(pipe(callback_on_step_end=callback, output_type="np").images, np.ones((1, 8, 8, 3)))


# 6. Types, saving, components


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks_make_nearly_the_same_images(tiny_unet, noise, dtype):
    latents = noise(2, 3, 8, 8)
    expected = create(tiny_unet())(latents=latents, output_type="np").images
    pipe = create(tiny_unet().to(dtype))
    assert np.abs(pipe(latents=latents, output_type="np").images - expected).mean() < 0.02
    assert pipe(batch_size=2).images[0].size == (8, 8)


def test_the_start_is_float32_whatever_the_network_has(tiny_unet, noise):
    pipe, latents = create(tiny_unet().bfloat16()), noise(2, 3, 8, 8)
    assert torch.equal(pipe(latents=latents, sigmas=[80.0], output_type="latent").images, 80 * latents)
    latents = latents.bfloat16()
    assert torch.equal(pipe(latents=latents, sigmas=[80.0], output_type="latent").images, 80 * latents.float())


def test_the_pipeline_can_be_cast(pipe, noise):
    image = pipe.to(torch.bfloat16)(latents=noise(1, 3, 8, 8), output_type="pt").images
    assert pipe.unet.dtype == torch.bfloat16
    assert image.isfinite().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("embedding", ["positional", "fourier", "edm positional", "edm fourier"])
def test_a_pipeline_cast_to_half_precision_is_told_the_noise_level_exactly(
    tiny_unet, noise, tmp_path, embedding, dtype, tolerance
):
    if embedding.startswith("edm"):
        torch.manual_seed(0)
        config = {"embedding_type": embedding.split()[1], "decoder_type": "skip", "resample_filter": (1, 3, 3, 1)}
        network = EDMUNet2DModel(8, model_channels=16, channel_mult=(1, 2), num_blocks=1, **config).eval()
        for parameter in network.parameters():  # the output's are near 0 at first
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    else:
        network = tiny_unet(time_embedding_type=embedding)
    config = {"sigma_max": 1348.0} | ({"timestep_type": "sigma"} if embedding == "fourier" else {})
    settings = {"latents": noise(4, 3, 8, 8), "sigmas": [100.0, 1.0, 0.01], "output_type": "latent"}
    pipe = create(network, **config)
    pipe.save_pretrained(tmp_path)
    expected = pipe(**settings).images
    loaded = OneStepPIDPipeline.from_pretrained(tmp_path).to(dtype)
    assert loaded.unet.dtype == dtype
    assert (loaded(**settings).images - expected).norm() < tolerance * expected.norm()


def test_frequencies_that_loading_has_rounded_are_warned_of(tiny_unet, tmp_path, caplog):
    create(tiny_unet(time_embedding_type="fourier"), timestep_type="sigma").save_pretrained(tmp_path)
    create(tiny_unet()).save_pretrained(tmp_path / "positional")
    diffusers_logging.enable_propagation()
    try:
        OneStepPIDPipeline.from_pretrained(tmp_path).to(torch.bfloat16)
        OneStepPIDPipeline.from_pretrained(tmp_path / "positional", dtype=torch.bfloat16)
        assert "frequencies" not in caplog.text
        OneStepPIDPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert "load the pipeline in float32 and call pipe.to(torch.bfloat16)" in caplog.text.lower()
    finally:
        diffusers_logging.disable_propagation()


def test_a_student_of_data_in_0_to_1_is_shown_in_its_own_range(tiny_unet, noise):
    settings = {"latents": noise(2, 3, 8, 8), "sigmas": [80.0, 1.0, 0.002]}
    pipe = create(tiny_unet(), sample_min=0.0)
    x = pipe(**settings, output_type="latent").images
    assert x.min() < 0 and x.max() > 1
    assert close(pipe(**settings, output_type="pt").images, x.clamp(0, 1))
    assert np.allclose(pipe(**settings, output_type="np").images, x.clamp(0, 1).permute(0, 2, 3, 1), atol=1e-6)
    image = np.asarray(pipe(**settings).images[2])
    assert np.abs(image - 255 * x[2].clamp(0, 1).permute(1, 2, 0).numpy()).max() <= 0.51
    assert torch.equal(x, create(tiny_unet())(**settings, output_type="latent").images)  # how it is shown, no more


def test_a_scheduler_that_knows_no_range_has_that_of_all_other_images(tiny_unet, noise, tmp_path):
    pipe, settings = create(tiny_unet()), {"latents": noise(1, 3, 8, 8), "output_type": "pt"}
    pipe.save_pretrained(tmp_path)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    assert config.pop("sample_min") == -1
    path.write_text(json.dumps(config))
    assert close(OneStepPIDPipeline.from_pretrained(tmp_path)(**settings).images, pipe(**settings).images)


@pytest.mark.parametrize("loader", [DiffusionPipeline, OneStepPIDPipeline])
def test_saved_and_loaded_twice_it_makes_the_same_images(conditional, noise, tmp_path, loader):
    settings = {"class_labels": [1, 2], "latents": noise(2, 1, 8, 8), "output_type": "pt"}
    expected, pipe = conditional(**settings).images, conditional
    for folder in (tmp_path / "first", tmp_path / "second"):
        pipe.save_pretrained(folder)
        pipe = loader.from_pretrained(folder)
        assert type(pipe) is OneStepPIDPipeline
        assert type(pipe.scheduler) is PIDScheduler
        assert pipe.scheduler.config.prediction_type == "edm"
        pipe.set_progress_bar_config(disable=True)
        assert close(pipe(**settings).images, expected, 1e-6)
    index = json.loads((tmp_path / "second" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "OneStepPIDPipeline"]
    assert index["scheduler"] == ["pid_diffusers", "PIDScheduler"]


def test_a_call_changes_no_component(conditional, noise):
    weights = {name: weight.clone() for name, weight in conditional.unet.state_dict().items()}
    scheduler, unet = dict(conditional.scheduler.config), dict(conditional.unet.config)
    grid, latents = conditional.scheduler.grid(), noise(1, 1, 8, 8)
    before = conditional(class_labels=3, latents=latents, output_type="pt").images
    conditional(class_labels=3, sigmas=[80.0, 1.0])
    conditional(class_labels=3, num_inference_steps=4)
    assert dict(conditional.scheduler.config) == scheduler
    assert dict(conditional.unet.config) == unet
    assert torch.equal(conditional.scheduler.grid(), grid)
    assert all(torch.equal(weight, weights[name]) for name, weight in conditional.unet.state_dict().items())
    assert torch.equal(conditional(class_labels=3, latents=latents, output_type="pt").images, before)


def test_no_gradients_are_recorded(pipe):
    assert not pipe(output_type="latent").images.requires_grad


def test_the_progress_bar_can_be_configured(pipe, capsys):
    pipe(num_inference_steps=3)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="points")
    pipe(num_inference_steps=3)
    assert "points: 100%" in (shown := capsys.readouterr().err)
    assert "3/3" in shown


# 7. Errors


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": -2}, "batch_size is -2"),
        ({"class_labels": 10}, "class_labels is 10"),
        ({"class_labels": [0, -1]}, "class_labels is .*-1"),
        ({"class_labels": []}, "class_labels is .*; pass an integer"),
        ({"class_labels": [[1, 2]]}, "class_labels is .*; pass an integer"),
        ({"class_labels": 1.5}, "class_labels is 1.5; pass an integer"),
        ({"class_labels": torch.tensor([1.0])}, "class_labels is .*; pass an integer"),
        ({"class_labels": "three"}, "class_labels is 'three'; pass an integer"),
        ({"class_labels": torch.tensor([True])}, "class_labels is .*; pass an integer"),
        ({"batch_size": 3, "class_labels": [1, 2]}, "batch_size means 3, class_labels means 2"),
        ({"batch_size": 3, "latents": torch.zeros(2, 1, 8, 8)}, "batch_size means 3, latents means 2"),
        ({"class_labels": [1, 2], "latents": torch.zeros(1, 1, 8, 8)}, "class_labels means 2, latents means 1"),
        ({"batch_size": 3, "generator": seeded(0, 1)}, "batch_size means 3, generator means 2"),
        ({"generator": []}, "generator|batch_size"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "latents has shape"),
        ({"latents": torch.zeros(1, 1, 8, 16)}, "latents has shape"),
        ({"latents": torch.zeros(8, 8)}, "latents has shape"),
        ({"latents": torch.zeros(())}, "latents has shape"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": 2, "sigmas": [1.0]}, "num_inference_steps and sigmas"),
        ({"sigmas": []}, "sigmas is empty"),
        ({"sigmas": [81.0]}, "sigmas is .*81"),
        ({"sigmas": [-1.0]}, "sigmas is .*-1"),
        ({"output_type": "jpeg"}, "output_type is 'jpeg'"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs has .*noise"),
    ],
)
def test_a_bad_argument_is_named(conditional, arguments, named):
    with pytest.raises(ValueError, match=named):
        conditional(**arguments)


def test_labels_for_an_unconditional_model_are_an_error(pipe):
    with pytest.raises(ValueError, match="class_labels was passed"):
        pipe(class_labels=[1])
