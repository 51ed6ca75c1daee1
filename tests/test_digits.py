"""The built-in teacher and student, and that students learn from that teacher."""

import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState

from pid_diffusers import Denoiser, OneStepPIDPipeline, PIDScheduler, TrajectoryModel
from pid_diffusers.denoisers import heun
from pid_diffusers.denoisers.base import BUILT_IN
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, load_digits
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.evaluation.same_seed import same_seed_samples
from pid_diffusers.training import Trainer, parse_config


@pytest.fixture(autouse=True)
def one_run_a_test():
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def teacher():
    return Denoiser.from_pretrained("digits").requires_grad_(False)


def test_the_teacher_is_small_and_in_safetensors():
    from pid_diffusers.denoisers.base import BUILT_IN

    files = [path for path in BUILT_IN["digits"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4e6
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md", ".yaml", ".png"}


def test_the_teacher_denoises_digits_that_it_never_saw(teacher):
    images, labels = load_digits()
    images, labels = images[-NUM_HELD_OUT:], labels[-NUM_HELD_OUT:]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for sigma in (0.1, 0.5, 2.0):
        error = (teacher(images + sigma * noise, sigma, class_labels=labels) - images).square().mean().sqrt()
        mean = torch.stack([images[labels == c].mean(0) for c in range(10)])[labels]
        assert error < min(0.75 * sigma, (mean - images).square().mean().sqrt())


def test_the_teacher_draws_the_digits_asked_for(teacher):
    classifier = DigitClassifier()
    images, labels = load_digits()
    assert classifier.accuracy(images[-NUM_HELD_OUT:], labels[-NUM_HELD_OUT:]) >= 0.98
    z = 80 * torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    asked = torch.arange(200) % 10
    samples = heun(teacher, z, PIDScheduler().grid(19), class_labels=asked)[-1]
    assert classifier.accuracy(samples, asked) >= 0.96
    assert classifier.accuracy(samples, (asked + 1) % 10) <= 0.05


def test_a_student_moves_towards_its_teacher(tmp_path):
    """From the untrained copy's distance, 0.8, to below 0.4 in 40 steps of 32 starts."""
    flags = ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "40", "--train_batch_size", "32"]
    trainer = Trainer(parse_config([*flags, "--report_to", "none", "--lr_warmup_steps", "5"]))
    result = trainer.train()
    samples = same_seed_samples(result.student, result.teacher, 128)
    assert samples.rms_distance < 0.4
    assert math.isfinite(samples.rms_distance)


@pytest.mark.slow
def test_the_default_run_reaches_its_teacher(tmp_path):
    config = parse_config(["--output_dir", str(tmp_path / "run")])
    report = RunReport(config)
    report.finish(Trainer(config).train(report.validate))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["rms_distance_to_40_step_heun"] <= 0.20
    assert results["teacher_digits_read_as_asked"] - results["student_digits_read_as_asked"] <= 0.03
    assert results["speedup_over_35_step_heun"] > 10


def test_the_shipped_student_is_what_its_card_says():
    folder = BUILT_IN["digits"].with_name("digits-student")
    results = json.loads((folder / "results.json").read_text())
    pipe = OneStepPIDPipeline.from_pretrained(folder)
    student = TrajectoryModel(pipe.unet, pipe.scheduler)
    samples = same_seed_samples(student, Denoiser.from_pretrained("digits").eval(), num_samples=64)
    assert samples.rms_distance == pytest.approx(results["rms_distance_to_40_step_heun"], rel=0.2)
    assert DigitClassifier().accuracy(samples.student, samples.condition["class_labels"]) > 0.95


def test_the_shipped_student_carries_the_code_of_this_version():
    folder = BUILT_IN["digits"].with_name("digits-student")
    assert (folder / "pipeline.py").read_text() == OneStepPIDPipeline._source
    assert (folder / "scheduler" / "pid_diffusers.py").read_text() == PIDScheduler._source
