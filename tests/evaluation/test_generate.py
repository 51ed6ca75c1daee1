import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny_text import tiny_sd

from pid_diffusers import InputError
from pid_diffusers.evaluation.generate import Samples, load_model


def tiny_ddpm():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
    )
    pipeline = DDPMPipeline(unet.eval(), DDPMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_a_network_that_overflows_is_refused_although_its_images_are_finite():
    student = load_model("digits-student")
    with torch.no_grad():
        student.unet.conv_out.bias.fill_(float("inf"))
    assert student(class_labels=[2], output_type="np").images.min() == 1  # clamped to white
    with pytest.raises(InputError, match=r"model gives infinite values for sample 0 \(seed 5\)"):
        Samples(student, 4, 4, seed=5).probe()


def test_the_sample_that_overflows_is_named():
    student = load_model("digits-student")
    student.unet.conv_out.register_forward_hook(lambda _, __, output: output.index_fill(0, torch.tensor(2), torch.inf))
    with pytest.raises(InputError, match=r"model gives infinite values for sample 2 \(seed 7\)"):
        list(Samples(student, 4, 4, seed=5).stream(0, 4))


@pytest.mark.parametrize(
    "sampler", ["DDIMScheduler", "CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler"]
)
def test_a_scheduler_that_reads_the_network_otherwise_is_refused(sampler):
    with pytest.raises(InputError, match=f"sampler is '{sampler}', which computes something else of what"):
        Samples(load_model("digits-teacher"), 4, 4, sampler=sampler)
    if sampler != "DDIMScheduler":
        with pytest.raises(InputError, match=f"sampler is '{sampler}', which computes something else of what"):
            Samples(tiny_ddpm(), 4, 4, sampler=sampler)


@pytest.mark.parametrize("sampler", ["EDMEulerScheduler", "ScoreSdeVeScheduler"])
def test_schedulers_of_another_family_are_refused_for_a_discrete_model(sampler):
    with pytest.raises(InputError, match="computes something else of what the network of a DDPMScheduler predicts"):
        Samples(tiny_ddpm(), 4, 4, sampler=sampler)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_discrete_model_takes_the_other_discrete_schedulers(sampler):
    drawn = Samples(tiny_ddpm(), 2, 2, sampler=sampler, num_inference_steps=3)
    assert drawn.probe()[1] == 3


def test_a_scheduler_that_the_pipeline_cannot_step_gets_a_sentence():
    with pytest.raises(InputError, match="a DDPMPipeline, which cannot make samples in this way .*'generator'"):
        Samples(tiny_ddpm(), 2, 2, sampler="UniPCMultistepScheduler", num_inference_steps=3).probe()


def test_a_call_with_guidance_counts_as_two():
    calls = {}
    for scale in (1.0, 3.0):
        pipeline = tiny_sd()
        pipeline.safety_checker = None
        pipeline.set_progress_bar_config(disable=True)
        drawn = Samples(
            pipeline, 2, 2, prompts=["a"], sampler="DDIMScheduler", num_inference_steps=3, guidance_scale=scale
        )
        calls[scale] = drawn.probe()[1]
    assert calls == {1.0: 3, 3.0: 6}


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(InputError, match="seed is 99999999999999999999, .* pass a lower one"):
        Samples(load_model("digits-student"), 4, 4, seed=99999999999999999999)
