import dataclasses

import pytest
import yaml

from pid_diffusers import InputError
from pid_diffusers.training import TrainingConfig, parse_config
from pid_diffusers.training.config import PRESETS


def test_without_arguments_the_digits_are_distilled():
    config = parse_config([])
    assert (config.preset, config.teacher, config.output_dir) == ("digits", "digits", "pid-digits")


def test_flags_override_the_preset_which_overrides_the_defaults(tmp_path):
    preset = tmp_path / "mine.yaml"
    preset.write_text("teacher: digits\nlearning_rate: 3e-4\nmax_train_steps: 7\nema_decays: [0.5, 0.25]\nrho: null\n")
    config = parse_config(["--preset", str(preset), "--max_train_steps", "8"])
    assert config.learning_rate == 3e-4  # YAML itself reads 3e-4 as a string
    assert config.max_train_steps == 8
    assert config.ema_decays == [0.5, 0.25]
    assert config.train_batch_size == TrainingConfig().train_batch_size
    assert config.rho == TrainingConfig().rho


def test_none_unsets_what_is_optional():
    config = parse_config(["--max_grad_norm", "none", "--eval_classifier", "None", "--report_to", "none"])
    assert (config.max_grad_norm, config.eval_classifier, config.report_to) == (None, None, "none")
    with pytest.raises(InputError, match="invalid float value: 'none'"):
        parse_config(["--learning_rate", "none"])


def test_a_yaml_no_is_the_precision_of_that_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("teacher: digits\nmixed_precision: no\n")
    assert parse_config(["--preset", str(tmp_path / "mine.yaml")]).mixed_precision == "no"


def test_booleans_are_flags_and_can_be_turned_off():
    assert parse_config(["--gradient_checkpointing"]).gradient_checkpointing is True
    assert parse_config(["--deterministic", "false"]).deterministic is False


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_valid(path):
    settings = yaml.safe_load(path.read_text())
    config = parse_config(["--preset", path.stem, "--teacher", "digits", "--prompts", "prompts.txt"])
    for name, value in settings.items():
        if name not in ("teacher", "prompts"):
            assert getattr(config, name) == value


def test_the_paper_presets_carry_table_6():
    cifar10, imagenet64 = (parse_config(["--preset", name, "--teacher", "x"]) for name in ("cifar10", "imagenet64"))
    for config in (cifar10, imagenet64):
        assert (config.optimizer, config.adam_weight_decay, config.lr_scheduler) == ("radam", 0.0, "constant")
        assert (config.num_train_timesteps, config.prediction_type) == (250, "sample")
        assert (config.scheme, config.distance, config.lr_warmup_steps) == ("upwind", "lpips", 0)
        assert config.ema_decays == [0.999, 0.9999, 0.99995]
        assert config.save_ema_decay == 0.99995
    assert (cifar10.learning_rate, imagenet64.learning_rate) == (2e-4, 1e-4)
    assert (cifar10.max_train_steps, imagenet64.max_train_steps) == (800_000, 400_000)
    assert cifar10.train_batch_size * cifar10.gradient_accumulation_steps * 8 == 512
    assert imagenet64.train_batch_size * imagenet64.gradient_accumulation_steps * 32 == 2048
    assert (cifar10.mixed_precision, imagenet64.mixed_precision) == ("no", "fp16")
    assert cifar10.max_grad_norm is None
    assert imagenet64.max_grad_norm is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "digit"], "preset is 'digit', which is no file; .*cifar10, digits, imagenet64"),
        (["--preset", "cifar10"], "teacher is None; pass --teacher"),
        (["--learning_rat", "1"], "--learning_rat is no flag; did you mean '--learning_rate'"),
        (["--learning_rat=1"], "--learning_rat is no flag; did you mean '--learning_rate'"),
        (["--train_batch_size", "many"], "--train_batch_size.*: invalid int value: 'many'"),
        (["--train_batch_size", "-1"], "train_batch_size is -1; pass at least 1"),
        (["--lr_scheduler", "piecewise_constant"], "lr_scheduler is 'piecewise_constant'"),
        (["--ema_decays", "0.9", "1.0"], r"ema_decays is \[0.9, 1.0\]"),
        (["--save_ema_decay", "0.7"], r"save_ema_decay is 0.7; it must be one of ema_decays"),
        (["--seed", "-1"], "seed is -1"),
        (["--scheme", "central", "--num_train_timesteps", "2"], "num_train_timesteps is 2; the central scheme"),
        (["--learning_rate", "nan"], "learning_rate is nan"),
        (["--guidance_scale", "3"], "guidance_scale is 3.0; it needs --prompts, too"),
        (["--guidance_range", "2", "9"], r"guidance_range is \[2.0, 9.0\]; it needs --prompts, too"),
        (["--caption_column", "caption"], "caption_column is 'caption'; it needs --prompts, too"),
        (["--validation_prompts", *"0123456789"], "validation_prompts is .*; it needs --prompts, too"),
        (["--negative_prompt", "grey"], "negative_prompt is 'grey'; it needs --prompts, too"),
        (["--eval_prompts", "e.txt"], "eval_prompts is 'e.txt'; it needs --prompts, too"),
        (
            ["--prompts", "p", "--guidance_scale", "3", "--guidance_range", "2", "9"],
            "pass it or guidance_scale, not both",
        ),
        (["--prompts", "p", "--guidance_scale", "-1"], "guidance_scale is -1.0; pass 0 or more"),
        (["--prompts", "p", "--guidance_scale", "inf"], "guidance_scale is inf; pass 0 or more"),
        (["--prompts", "p", "--guidance_range", "9", "2"], "pass two numbers, 0 or more, the lower one first"),
        (["--prompts", "p", "--guidance_range", "2"], "pass two numbers, 0 or more, the lower one first"),
        (["--prompts", "p", "--guidance_rescale", "1.5"], r"guidance_rescale is 1.5; pass a number in \[0, 1\]"),
        (["--prompts", "p", "--streaming"], "streaming is True; pass --max_prompts, too"),
        (["--prompts", "p", "--max_prompts", "0"], "max_prompts is 0; pass at least 1"),
        (
            ["--prompts", "p", "--num_validation_images", "2", "--validation_prompts", "a"],
            "validation_prompts is .*; pass one for each of the",
        ),
        (["--lora_rank", "8"], "lora_rank is 8; it needs --use_lora, too"),
        (["--lora_alpha", "8"], "lora_alpha is 8.0; it needs --use_lora, too"),
        (["--lora_dropout", "0.1"], "lora_dropout is 0.1; it needs --use_lora, too"),
        (["--lora_target_modules", "to_q"], r"lora_target_modules is \['to_q'\]; it needs --use_lora, too"),
        (["--use_lora", "--lora_rank", "0"], "lora_rank is 0; pass at least 1"),
        (["--use_lora", "--lora_alpha", "0"], "lora_alpha is 0.0; pass a positive number"),
        (["--use_lora", "--lora_dropout", "1"], r"lora_dropout is 1.0; pass a number in \[0, 1\)"),
        (["--use_lora", "--student_config", "c.json"], "student_config is 'c.json'; leave it out with --use_lora"),
        (["--lpips_decoder", "taesd"], "lpips_decoder is 'taesd'; it needs --distance lpips, too"),
        (["--distance", "lpips", "--lpips_batch_size", "0"], "lpips_batch_size is 0; pass at least 1"),
        (["--lpips_network", "digits"], "lpips_network is 'digits'; it needs --distance lpips, too"),
        (["--distance", "lpips", "--lpips_network", "alex"], "lpips_network is 'alex'; choose one of vgg, digits"),
        (
            ["--distance", "lpips", "--lpips_network", "digits", "--lpips_vgg_weights", "v.pth"],
            "lpips_vgg_weights is 'v.pth'; leave it out with --lpips_network digits",
        ),
        (["--num_validation_samples", "0"], "num_validation_samples is 0; pass at least 1"),
    ],
)
def test_bad_flags_are_answered_in_one_sentence(args, message):
    with pytest.raises(InputError, match=message) as caught:
        parse_config(args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rte: 1", "has the key 'learning_rte', which is no setting; did you mean 'learning_rate'"),
        ("- 1", "holds a list"),
        ("a: [", "is not YAML"),
        ("train_batch_size: [1, 2]", "sets train_batch_size to .1, 2.; it takes a single value"),
        ("ema_decays: 0.9", "sets ema_decays to 0.9; it takes a list"),
        ("max_train_steps: soon", "preset .*invalid int value: 'soon'"),
    ],
)
def test_bad_presets_are_answered_in_one_sentence(tmp_path, text, message):
    preset = tmp_path / "bad.yaml"
    preset.write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        parse_config(["--preset", str(preset)])
    assert "\n" not in str(caught.value)


def test_every_setting_has_a_help_text():
    assert all(field.metadata["help"] for field in dataclasses.fields(TrainingConfig))


def test_the_default_preset_leaves_head_and_weighting_to_the_teachers_family():
    config = parse_config(["--teacher", "somebody/ddpm"])
    assert config.prediction_type is None and config.weighting is None


def test_of_two_ways_to_say_w_the_flags_counts_and_not_the_presets(tmp_path):
    (tmp_path / "fixed.yaml").write_text("teacher: x\nprompts: p\nguidance_scale: 7.5\n")
    (tmp_path / "range.yaml").write_text("teacher: x\nprompts: p\nguidance_range: [2, 9]\n")
    one = parse_config(["--preset", str(tmp_path / "fixed.yaml"), "--guidance_range", "3", "5"])
    assert (one.guidance_scale, one.guidance_range) == (None, [3.0, 5.0])
    other = parse_config(["--preset", str(tmp_path / "range.yaml"), "--guidance_scale", "4"])
    assert (other.guidance_scale, other.guidance_range) == (4.0, None)


def test_a_run_of_another_teacher_is_named_after_it():
    assert parse_config(["--teacher", "somebody/ddpm"]).output_dir == "pid-ddpm"
    assert parse_config(["--teacher", "edm-cifar10.pkl"]).output_dir == "pid-edm-cifar10"
    assert parse_config([]).output_dir == parse_config(["--teacher", "digits"]).output_dir == "pid-digits"
    assert parse_config(["--teacher", "somebody/ddpm", "--output_dir", "mine"]).output_dir == "mine"


@pytest.mark.parametrize(
    ("flags", "preset"),
    [
        (["--teacher", "words"], "words"),
        (["--teacher", "words", "--use_lora"], "words-lora"),
        (["--teacher", "stable-diffusion-v1-5/stable-diffusion-v1-5", "--use_lora"], "stable-diffusion-v1-5-lora"),
        (["--teacher", "me/my-sdxl", "--use_lora"], "sdxl-lora"),
        (["--teacher", "me/my-model"], "stable-diffusion-v1-5"),
        (["--teacher", "words", "--preset", "digits"], "digits"),
    ],
)
def test_a_text_to_image_teacher_has_the_preset_of_its_kind(flags, preset):
    config = parse_config([*flags, "--prompts", "prompts.txt"])
    assert config.preset == preset and config.use_lora == ("--use_lora" in flags)
