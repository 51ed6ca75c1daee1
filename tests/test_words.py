"""Students of the built-in text-to-image teacher draw the digit that a text asks for, in one step."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline

from pid_diffusers import OneStepPIDTextToImagePipeline
from pid_diffusers.denoisers.base import BUILT_IN
from pid_diffusers.evaluation.digits import DigitClassifier, digit_of
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.text import load_prompts
from pid_diffusers.training import Trainer, parse_config


@pytest.fixture(autouse=True)
def one_run_a_test(monkeypatch, tmp_path):
    monkeypatch.setenv("PID_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "points"), [([], 0.05), (["--use_lora"], 0.10)], ids=["whole", "LoRA"])
def test_a_student_draws_what_phrasings_that_training_never_saw_ask_for(tmp_path, flags, points):
    flags = [*flags, "--output_dir", str(tmp_path / "run"), "--max_train_steps", "100", "--num_eval_samples", "120"]
    flags += ["--eval_batch_size", "24"]
    config = parse_config(["--teacher", "words", "--validation_steps", "0", "--report_to", "none", *flags])
    assert not set(load_prompts(config.prompts)) & set(load_prompts(config.eval_prompts))
    trainer = Trainer(config)
    RunReport(config, None, trainer.teacher).finish(trainer.train())
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["teacher_digits_read_as_asked"] >= 0.97
    assert results["student_digits_read_as_asked"] >= results["teacher_digits_read_as_asked"] - points

    prompts = load_prompts("words-held-out")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run")
    if config.use_lora:  # the file by itself, on the teacher's own pipeline
        pipe = OneStepPIDTextToImagePipeline.from_pretrained(BUILT_IN["words"])
        pipe.load_lora_weights(str(tmp_path / "run"))
    images = pipe(prompts, generator=torch.Generator().manual_seed(7), output_type="pt").images
    asked = torch.tensor([digit_of(prompt) for prompt in prompts])
    assert DigitClassifier().accuracy(2 * images - 1, asked) >= 0.97 - points
