import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from sklearn.datasets import load_digits

from pid_diffusers import Denoiser, EDMDenoiser, InputError


@pytest.fixture(scope="module")
def digits():
    images = torch.tensor(load_digits().images[:100], dtype=torch.float32)
    return images[:, None] / 8 - 1, torch.tensor(load_digits().target[:100])


def test_the_built_in_teacher_denoises_digits(digits, noise):
    teacher = Denoiser.from_pretrained("digits")
    images, labels = digits
    assert isinstance(teacher, EDMDenoiser)
    assert teacher.sample_shape == (1, 8, 8)
    assert teacher.num_classes == 10
    with torch.no_grad():
        for sigma in (0.1, 0.5, 2.0):
            noisy = images + sigma * noise(100, 1, 8, 8)
            errors = [
                (teacher(noisy, sigma, class_labels=y) - images).square().mean() for y in (labels, (labels + 5) % 10)
            ]
            assert errors[0] < (noisy - images).square().mean()
            assert errors[0] < errors[1]  # told the wrong digit, it denoises worse


@pytest.mark.parametrize("as_type", [str, Path])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_saved_edm_pipeline_is_the_same_denoiser(tiny_unet, noise, tmp_path, prediction_type, as_type):
    unet = tiny_unet(num_class_embeds=4)
    settings = {"sigma_min": 0.01, "sigma_max": 50.0, "sigma_data": 0.7}
    scheduler = EDMEulerScheduler(**settings, prediction_type=prediction_type)
    ConsistencyModelPipeline(unet, scheduler).save_pretrained(tmp_path)
    teacher = Denoiser.from_pretrained(as_type(tmp_path))
    head = "edm" if prediction_type == "epsilon" else "v_prediction"
    assert teacher.trajectory_config == {**settings, "prediction_type": head, "timestep_type": "edm"}
    x, labels = noise(2, 3, 8, 8), torch.tensor([1, 3])
    with torch.no_grad():
        expected = EDMDenoiser(unet, **settings, prediction_type=head)(x, 2.0, class_labels=labels)
        assert torch.equal(teacher(x, 2.0, class_labels=labels), expected)


def assert_names_the_teacher(teacher, *words):
    with pytest.raises(InputError, match=re.escape(f"teacher is {str(teacher)!r}")) as error:
        Denoiser.from_pretrained(teacher)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


@pytest.mark.parametrize("teacher", ["/nonexistent", "./nope", "../nope", Path("/nonexistent"), "three/part/name"])
def test_a_missing_folder_is_an_input_error_that_says_what_to_pass(teacher):
    message = assert_names_the_teacher(teacher, "pass a folder", "digits")
    assert message.endswith(".")


def test_a_file_is_not_a_teacher(tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    assert_names_the_teacher(file, "pass a folder")


def test_a_folder_without_model_index_is_an_input_error(tmp_path):
    message = assert_names_the_teacher(tmp_path, "model_index.json", "save_pretrained")
    assert message.endswith(".")


@pytest.mark.parametrize("content", ["", "{", '{"scheduler": ["diffusers", "EDMEul', "\xff\xfe"])
def test_a_broken_model_index_is_an_input_error(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content, encoding="latin-1")
    message = assert_names_the_teacher(tmp_path, "model_index.json", "save_pretrained")
    assert message.endswith(".")


@pytest.mark.parametrize("content", [[], "pipeline", {"scheduler": "EDMEulerScheduler"}, {"scheduler": ["diffusers"]}])
def test_a_model_index_of_another_form_is_an_input_error(tmp_path, content):
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    assert_names_the_teacher(tmp_path, "model_index.json")


def test_a_scheduler_that_does_not_tell_the_parametrisation_is_an_input_error(tiny_unet, tmp_path):
    DDPMPipeline(tiny_unet(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path)
    message = assert_names_the_teacher(tmp_path, "FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler")
    assert message.endswith(".")


def test_a_pipeline_without_a_scheduler_is_an_input_error(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "ConsistencyModelPipeline"}))
    assert_names_the_teacher(tmp_path, "EDMEulerScheduler")


def test_a_pipeline_whose_weights_are_missing_is_an_input_error(tiny_unet, tmp_path):
    ConsistencyModelPipeline(tiny_unet(), EDMEulerScheduler()).save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert_names_the_teacher(tmp_path, "cannot load")


def test_a_teacher_of_which_there_is_a_variant_alone_is_refused_with_what_to_do(tiny_unet, tmp_path):
    pipeline = ConsistencyModelPipeline(tiny_unet(), EDMEulerScheduler())
    pipeline.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(InputError, match='its weights are a variant: load it with variant="fp16"') as raised:
        Denoiser.from_pretrained(tmp_path)
    assert "\n" not in str(raised.value)
