"""A saved teacher of every family is distilled from end to end, whole by the script and into a smaller student."""

import contextlib
import importlib.util
import io
import json
import sys
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
from diffusers.utils.logging import enable_progress_bar

from pid_diffusers import EDMUNet2DModel, OneStepPIDPipeline
from pid_diffusers.training import Trainer, parse_config

SCRIPT = Path(__file__).parents[2] / "train_pid.py"
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
    head: str


def flags(teacher: Path, output_dir: Path) -> list[str]:
    """A run that is as short as can be, by the flags that a user has."""
    words = ["--teacher", str(teacher), "--output_dir", str(output_dir), "--report_to", "none"]
    words += ["--max_train_steps", "3", "--train_batch_size", "2", "--num_validation_images", "2"]
    return [*words, "--num_eval_samples", "4", "--eval_batch_size", "4", "--eval_classifier", "none"]


def train_pid(*words: str) -> str:
    """What `train_pid.py` prints when it is run with these flags: the script itself, in this process."""
    spec = importlib.util.spec_from_file_location("train_pid", SCRIPT)
    script, printed = importlib.util.module_from_spec(spec), io.StringIO()
    deterministic = torch.are_deterministic_algorithms_enabled()
    AcceleratorState._reset_state(True)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the script sets it
        patch.setattr(sys, "argv", [str(SCRIPT), *words])
        try:
            spec.loader.exec_module(script)
            assert script.main() == 0
        finally:
            enable_progress_bar()
            torch.use_deterministic_algorithms(deterministic)
            AcceleratorState._reset_state(True)
    return printed.getvalue()


@pytest.fixture(scope="module", params=FAMILIES)
def run(request, tiny_unet, tmp_path_factory) -> Run:
    """A teacher of a family, saved, and the output folder of its student."""
    network, scheduler, said, head = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp("family")
    pipeline = ConsistencyModelPipeline if "EDM" in type(scheduler).__name__ else DDPMPipeline
    pipeline(network(tiny_unet), scheduler).save_pretrained(folder / "teacher")
    printed = train_pid(*flags(folder / "teacher", folder / "student"))
    assert said in printed and f"head {head}" in printed
    assert "Memory: about " in printed
    return Run(folder, folder / "teacher", folder / "student", head)


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
    sigma_max, latents = exact.scheduler.config.sigma_max, noise(1, 3, 8, 8)
    settings = {"latents": latents, "sigmas": [sigma_max, exact.scheduler.config.sigma_min], "output_type": "latent"}
    if exact.unet.config.num_class_embeds:
        settings["class_labels"] = 1
    full = exact(**settings).images
    assert torch.equal(full[0], sigma_max * latents[0])
    for dtype, tolerance in ((torch.float16, 0.005), (torch.bfloat16, 0.03)):
        if exact.unet.config.get("time_embedding_type") == "fourier":  # whose frequencies loading would round
            half = OneStepPIDPipeline.from_pretrained(run.student).to(dtype)
        else:
            half = OneStepPIDPipeline.from_pretrained(run.student, dtype=dtype)
        rounded = half(**settings).images
        assert half.unet.dtype == dtype
        assert torch.equal(rounded[0], full[0])
        assert (rounded[1] - full[1]).norm() < tolerance * full[1].norm()


def test_every_family_has_smaller_students(run, tmp_path):
    config = json.loads((run.teacher / "unet" / "config.json").read_text())
    if "model_channels" in config:
        config["model_channels"] //= 2
    else:
        config |= {"block_out_channels": [channels // 2 for channels in config["block_out_channels"]]}
        config |= {"norm_num_groups": 2, "attention_head_dim": 4}
    (tmp_path / "smaller.json").write_text(json.dumps(config))
    words = [*flags(run.teacher, tmp_path / "student"), "--student_config", str(tmp_path / "smaller.json")]
    AcceleratorState._reset_state(True)
    trainer = Trainer(parse_config(words))
    trainer.train()
    count = sum(parameter.numel() for parameter in trainer.unet.parameters())
    assert count < 0.5 * sum(parameter.numel() for parameter in trainer.teacher.unet.parameters())
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path / "student")
    assert sum(parameter.numel() for parameter in pipe.unet.parameters()) == count
    assert pipe(output_type="pt").images.isfinite().all()
