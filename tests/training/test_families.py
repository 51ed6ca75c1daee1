"""A saved teacher of every family is distilled from end to end, whole and into a smaller student."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    ScoreSdeVeScheduler,
)

from pid_diffusers import EDMUNet2DModel, OneStepPIDPipeline
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.training import Trainer, TrainingConfig

SONG = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}


def song(**config) -> EDMUNet2DModel:
    torch.manual_seed(0)
    return EDMUNet2DModel(sample_size=8, in_channels=3, out_channels=3, **SONG, **config)


# the family, its network (given tiny_unet), its scheduler, what the run says of it, and the head that it chooses
FAMILIES = {
    "EDM": (lambda unet: unet(), EDMEulerScheduler(), "EDMDenoiser that predicts EDM's mixture", "edm"),
    "EDM, v": (lambda unet: unet(), EDMEulerScheduler(prediction_type="v_prediction"), "v_pred", "v_prediction"),
    "consistency": (lambda unet: unet(num_class_embeds=3), CMStochasticIterativeScheduler(), "EDMDenoiser", "edm"),
    "DDPM++": (lambda unet: song(num_class_embeds=3), EDMEulerScheduler(), "EDMUNet2DModel", "edm"),
    "NCSN++": (
        lambda unet: song(embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1)),
        EDMEulerScheduler(),
        "EDMUNet2DModel",
        "edm",
    ),
    "DDPM": (lambda unet: unet(), DDPMScheduler(), "VPDenoiser that predicts epsilon, noise levels 157", "residual"),
    "DDIM, v": (lambda unet: unet(), DDIMScheduler(prediction_type="v_prediction"), "v_pred", "v_prediction"),
    "Heun, sample": (lambda unet: unet(), HeunDiscreteScheduler(prediction_type="sample"), "sample", "sample"),
    "Euler, scaled linear": (
        lambda unet: unet(num_class_embeds=3),
        EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        "noise levels 14.6146",
        "residual",
    ),
    "learned variance": (
        lambda unet: unet(out_channels=6),
        DDPMScheduler(variance_type="learned_range"),
        "VPDenoiser",
        "residual",
    ),
    "score": (
        lambda unet: unet(time_embedding_type="fourier", freq_shift=0),
        ScoreSdeVeScheduler(sigma_max=50.0),
        "VEDenoiser that predicts the score",
        "score",
    ),
}


@dataclass
class Run:
    folder: Path
    teacher: Path
    student: Path
    said: str
    head: str


def distil(teacher: Path, output_dir: Path, report: bool = False, **settings) -> Trainer:
    AcceleratorState._reset_state(True)
    settings = {"teacher": str(teacher), "output_dir": str(output_dir), "report_to": "none", **settings}
    settings |= {"max_train_steps": 3, "train_batch_size": 2, "num_validation_images": 2, "num_eval_samples": 4}
    settings |= {"eval_batch_size": 4}
    config = TrainingConfig(**settings, optimizer="adamw", scheme="midpoint", max_grad_norm=1.0).validate()
    trainer = Trainer(config)
    result = trainer.train()
    if report:
        RunReport(config).finish(result)
    return trainer


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tiny_unet, tmp_path_factory) -> Run:
    """A teacher of a family, saved, and the output folder of its student."""
    network, scheduler, said, head = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    pipeline = ConsistencyModelPipeline if "EDM" in type(scheduler).__name__ else DDPMPipeline
    pipeline(network(tiny_unet), scheduler).save_pretrained(folder / "teacher")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        distil(folder / "teacher", folder / "student", report=True)
    assert said in printed.getvalue() and f"head {head}" in printed.getvalue()
    assert "Memory: about " in printed.getvalue()
    return Run(folder, folder / "teacher", folder / "student", printed.getvalue(), head)


def test_a_teacher_of_every_family_is_distilled_to_a_pipeline_that_makes_images(run):
    pipe = DiffusionPipeline.from_pretrained(run.student)
    assert type(pipe) is OneStepPIDPipeline
    assert pipe.scheduler.config.prediction_type == run.head
    images = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), output_type="latent").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    results = json.loads((run.student / "results.json").read_text())
    assert results["rms_distance_to_40_step_heun"] >= 0
    assert "# student" in (run.student / "README.md").read_text()


def test_the_trajectory_of_every_family_begins_at_z_and_half_precision_changes_little(run, noise):
    exact = OneStepPIDPipeline.from_pretrained(run.student)
    half = OneStepPIDPipeline.from_pretrained(run.student, dtype=torch.bfloat16)
    sigma_max, latents = exact.scheduler.config.sigma_max, noise(1, 3, 8, 8)
    settings = {"latents": latents, "sigmas": [sigma_max, exact.scheduler.config.sigma_min], "output_type": "latent"}
    if exact.unet.config.num_class_embeds:
        settings["class_labels"] = 1
    full, rounded = exact(**settings).images, half(**settings).images
    assert torch.equal(full[0], sigma_max * latents[0]) and torch.equal(rounded[0], full[0])
    assert (rounded[1] - full[1]).abs().max() < 0.1 * full[1].abs().max() + 0.1


def test_every_family_has_smaller_students(run, tmp_path):
    config = json.loads((run.teacher / "unet" / "config.json").read_text())
    if "model_channels" in config:
        config["model_channels"] //= 2
    else:
        config |= {"block_out_channels": [channels // 2 for channels in config["block_out_channels"]]}
        config |= {"norm_num_groups": 2, "attention_head_dim": 4}
    (tmp_path / "smaller.json").write_text(json.dumps(config))
    trainer = distil(run.teacher, tmp_path / "student", student_config=str(tmp_path / "smaller.json"))
    count = sum(parameter.numel() for parameter in trainer.unet.parameters())
    assert count < 0.5 * sum(parameter.numel() for parameter in trainer.teacher.unet.parameters())
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path / "student")
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == count
    assert pipe(output_type="pt").images.isfinite().all()
