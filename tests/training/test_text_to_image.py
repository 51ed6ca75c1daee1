"""Saved text-to-image teachers are distilled from end to end, whole and through LoRA, by the flags that a user has."""

import contextlib
import importlib.util
import io
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import (
    AutoencoderTiny,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    UNet2DConditionModel,
)
from diffusers.utils.logging import enable_progress_bar
from peft import PeftModel
from safetensors.torch import load_file
from tiny_text import tiny_sd, tiny_sdxl
from torchvision.models import vgg

from pid_diffusers import OneStepPIDPipeline, OneStepPIDTextToImagePipeline
from pid_diffusers.training import Trainer, parse_config

SCRIPT = Path(__file__).parents[2] / "train_pid.py"
PROMPTS = ["a red fox", "a blue bird", "seven", "four"]
TEACHERS = {"SD 1": tiny_sd, "SD 2": lambda: tiny_sd("v_prediction"), "SDXL": tiny_sdxl}
HEADS = {"SD 1": "residual", "SD 2": "v_prediction", "SDXL": "residual"}
GUIDANCE = {"fixed": ["--guidance_scale", "5"], "embedded": ["--guidance_range", "2", "9"]}
KINDS = {"whole": [], "LoRA": ["--use_lora", "--lora_rank", "4"]}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PID_DIFFUSERS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> Path:
    """A folder with every teacher and with prompts."""
    root = tmp_path_factory.mktemp("teachers")
    for name, create in TEACHERS.items():
        create().save_pretrained(root / name)
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


def train_pid(*words: str) -> tuple[int, str, str]:
    """What `train_pid.py` returns and prints when it is run with these flags: the script itself, in this process."""
    spec = importlib.util.spec_from_file_location("train_pid", SCRIPT)
    script, printed, errors = importlib.util.module_from_spec(spec), io.StringIO(), io.StringIO()
    deterministic = torch.are_deterministic_algorithms_enabled()
    AcceleratorState._reset_state(True)
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # as the script sets it
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        try:
            spec.loader.exec_module(script)
            status = script.main()
        finally:
            enable_progress_bar()
            torch.use_deterministic_algorithms(deterministic)
            AcceleratorState._reset_state(True)
    return status, printed.getvalue(), errors.getvalue()


def short(output_dir: Path, steps: int = 3) -> list:
    """A run that is as short as can be."""
    words = ["--output_dir", output_dir, "--report_to", "none", "--max_train_steps", steps, "--train_batch_size", 2]
    words += ["--num_validation_images", 2, "--validation_steps", 0, "--num_eval_samples", 4, "--eval_batch_size", 4]
    words += ["--preset", "digits", "--lr_warmup_steps", 0, "--ema_decays", 0.5, "--save_ema_decay", 0.5]
    return [*words, "--eval_classifier", "none"]


def flags(teachers: Path, name: str, output_dir: Path, steps: int = 3) -> list:
    return ["--teacher", teachers / name, "--prompts", teachers / "prompts.txt", *short(output_dir, steps)]


@dataclass
class Run:
    name: str
    guidance: str
    kind: str
    teacher: Path
    folder: Path
    printed: str

    @property
    def call(self) -> dict:
        settings = {"prompt": "a red fox", "output_type": "latent"}
        settings["generator"] = torch.Generator().manual_seed(0)
        return settings | ({"guidance_scale": 4.0} if self.guidance == "embedded" else {})


# the others take ten seconds each
BY_DEFAULT = {("SD 1", "fixed", "LoRA")}
RUNS = [
    pytest.param(
        (name, guidance, kind),
        id=f"{name}, {guidance}, {kind}",
        marks=[] if (name, guidance, kind) in BY_DEFAULT else pytest.mark.slow,
    )
    for name in TEACHERS
    for guidance in GUIDANCE
    for kind in KINDS
]


@pytest.fixture(scope="module", params=RUNS)
def run(request, teachers, tmp_path_factory) -> Run:
    name, guidance, kind = request.param
    folder = tmp_path_factory.mktemp("run") / "student"
    before = load_file(teachers / name / "unet" / "diffusion_pytorch_model.safetensors")
    words = [*flags(teachers, name, folder), *GUIDANCE[guidance], *KINDS[kind], "--learning_rate", 0.05]
    status, printed, errors = train_pid(*words)
    assert status == 0, errors
    after = load_file(teachers / name / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    return Run(name, guidance, kind, teachers / name, folder, printed)


def test_every_teacher_becomes_a_pipeline_that_makes_an_image_of_a_text(run):
    pipe = DiffusionPipeline.from_pretrained(run.folder)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is OneStepPIDTextToImagePipeline
    config = pipe.scheduler.config
    assert config.prediction_type == HEADS[run.name] and config.timestep_type == "discrete"
    assert (round(config.sigma_max, 2), round(config.sigma_min, 3)) == (14.61, 0.029)
    embedded = run.guidance == "embedded"
    assert (config.guidance_scale, config.guidance_range) == ((None, [2.0, 9.0]) if embedded else (5.0, None))
    assert pipe.unet.config.time_cond_proj_dim == (256 if embedded else None)
    assert pipe.unet.dtype == torch.float32 and not hasattr(pipe.unet, "peft_config")
    image = pipe("a red fox", generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (16, 16)
    assert pipe(**run.call).images.isfinite().all()
    results = json.loads((run.folder / "results.json").read_text())
    assert 0 < results["rms_distance_to_40_step_heun"] < 100
    assert "guidance 2 to 9" in run.printed or "guidance 5" in run.printed


def test_the_student_is_no_longer_the_teacher(run):
    trained = load_file(run.folder / "unet" / "diffusion_pytorch_model.safetensors")
    before = load_file(run.teacher / "unet" / "diffusion_pytorch_model.safetensors")
    added = {"time_embedding.cond_proj.weight"} if run.guidance == "embedded" else set()
    assert set(trained) - set(before) == added and set(before) <= set(trained)
    changed = {name for name in before if not torch.equal(trained[name], before[name])}
    assert changed
    if run.kind == "LoRA":
        assert {"conv_in.weight", "conv_out.weight"}.isdisjoint(changed)
    if added:
        assert trained["time_embedding.cond_proj.weight"].abs().max() > 0


def test_the_lora_on_the_teacher_makes_the_images_of_the_saved_pipeline(run):
    if run.kind != "LoRA":
        assert not (run.folder / "pytorch_lora_weights.safetensors").exists()
        return
    expected = DiffusionPipeline.from_pretrained(run.folder)
    pipe = OneStepPIDTextToImagePipeline.from_pretrained(run.teacher)
    pipe.load_lora_weights(run.folder)
    for each in (expected, pipe):
        each.set_progress_bar_config(disable=True)
    with torch.no_grad():
        torch.testing.assert_close(pipe(**run.call).images, expected(**run.call).images, rtol=0, atol=1e-5)
        plain = UNet2DConditionModel.from_pretrained(run.teacher / "unet")
        bare = OneStepPIDTextToImagePipeline.from_pretrained(run.teacher, scheduler=pipe.scheduler)
        assert plain.dtype == torch.float32
        if run.guidance == "fixed":
            bare.set_progress_bar_config(disable=True)
            assert (bare(**run.call).images - expected(**run.call).images).abs().max() > 1e-3


def test_a_lora_run_keeps_the_adapter_alone(run):
    sizes = {path.name: path.stat().st_size for path in (run.folder / "checkpoint-3").rglob("*")}
    base = (run.folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    if run.kind == "whole":
        assert sizes["model.safetensors"] > 0.9 * base and "trained.safetensors" not in sizes
        return
    assert "model.safetensors" not in sizes and sizes["trained.safetensors"] < base
    checkpoint = load_file(run.folder / "checkpoint-3" / "trained.safetensors")
    assert checkpoint and all(".lora_A." in name or ".lora_B." in name for name in checkpoint)
    assert set(load_file(run.folder / "checkpoint-3" / "ema-0.5.safetensors")) == set(checkpoint)
    saved = load_file(run.folder / "pytorch_lora_weights.safetensors")
    assert {f"unet.{name.replace('.default', '')}" for name in checkpoint} == set(saved)
    if run.guidance == "embedded":
        assert "unet.time_embedding.cond_proj.lora_A.weight" in saved


# --- resuming --------------------------------------------------------------------------------------------------------

RESUMED = {
    "LoRA": [*KINDS["LoRA"], *GUIDANCE["fixed"]],
    "LoRA with dropout": [*KINDS["LoRA"], *GUIDANCE["embedded"], "--lora_dropout", 0.3],
    "whole": GUIDANCE["embedded"],
}


def weights_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds of the student, trained weights and averages."""
    found = {}
    for path in sorted((folder / f"checkpoint-{step}").glob("*.safetensors")):
        found |= {f"{path.name}: {name}": weight for name, weight in load_file(path).items()}
    return found


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[] if case == "LoRA" else pytest.mark.slow) for case in RESUMED]
)
def test_a_run_that_was_ended_and_resumed_is_one_that_was_not_bit_for_bit(case, teachers, tmp_path):
    words = [*RESUMED[case], "--learning_rate", 1e-2, "--checkpointing_steps", 2, "--num_eval_samples", 0]
    assert train_pid(*flags(teachers, "SD 1", tmp_path / "at once", 4), *words)[0] == 0
    shutil.copytree(tmp_path / "at once" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    torch.rand(7)  # what else the process draws is of no matter
    resume = [*words, "--resume_from_checkpoint", "latest"]
    status, printed, errors = train_pid(*flags(teachers, "SD 1", tmp_path / "resumed", 4), *resume)
    assert status == 0 and "Continuing from" in printed, errors
    expected, found = (weights_of(tmp_path / folder, 4) for folder in ("at once", "resumed"))
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    early = weights_of(tmp_path / "at once", 2)
    assert any(not torch.equal(early[name], expected[name]) for name in expected)
    for name in ("unet/diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"):
        if (tmp_path / "at once" / name).exists():
            first, second = (load_file(tmp_path / folder / name) for folder in ("at once", "resumed"))
            assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
def test_handing_out_checkpoints_changes_nothing_of_what_is_trained(teachers, tmp_path):
    """With dropout, whose draws must not depend on what was done between two steps."""
    words = [*RESUMED["LoRA with dropout"], "--learning_rate", 1e-2, "--checkpointing_steps", 2]
    results = []
    for name, on_checkpoint in (("plain", None), ("handed out", lambda result: torch.rand(3))):
        AcceleratorState._reset_state(True)
        trainer = Trainer(parse_config([*map(str, [*flags(teachers, "SD 1", tmp_path / name, 4), *words])]))
        trainer.train(on_checkpoint=on_checkpoint)
        results.append(weights_of(tmp_path / name, 4))
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(True)
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.slow
def test_a_checkpoint_from_before_guidance_can_be_resumed(tmp_path):
    words = ["--teacher", "digits", *short(tmp_path, 2), "--num_eval_samples", 0]
    assert train_pid(*words)[0] == 0
    path = tmp_path / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    for name in ("guidance_scale", "guidance_range", "sample_min"):
        del state["identity"]["trajectory function"][name]
    del state["identity"]["LoRA"]
    path.write_text(json.dumps(state))
    more = ["--teacher", "digits", *short(tmp_path, 3), "--num_eval_samples", 0, "--resume_from_checkpoint", "latest"]
    status, printed, errors = train_pid(*more)
    assert status == 0 and "Continuing from" in printed, errors
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.slow
def test_a_checkpoint_of_another_guidance_or_kind_is_not_resumed(teachers, tmp_path):
    words = [*flags(teachers, "SD 1", tmp_path / "run", 2), "--num_eval_samples", 0]
    assert train_pid(*words, "--guidance_scale", 5, *KINDS["LoRA"])[0] == 0
    others = {
        "trajectory function": ["--guidance_scale", 6, *KINDS["LoRA"]],
        "network": ["--guidance_range", 5, 6, *KINDS["LoRA"]],
        "LoRA": ["--guidance_scale", 5, "--use_lora", "--lora_rank", 2],
    }
    for name, other in others.items():
        status, _, errors = train_pid(*words, *other, "--resume_from_checkpoint", "latest")
        assert status == 2 and f"a run with another {name}" in errors
    status, _, errors = train_pid(*words, "--guidance_scale", 5, "--resume_from_checkpoint", "latest")
    assert status == 2 and "a run with another LoRA" in errors


# --- teacher, student, precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", [pytest.param("no", marks=pytest.mark.slow), "bf16"])
def test_training_adapters_leaves_the_teachers_weights_as_they_are(precision, teachers, tmp_path):
    words = [*flags(teachers, "SD 1", tmp_path / "run"), *GUIDANCE["embedded"], *KINDS["LoRA"], "--learning_rate", 0.1]
    words += ["--mixed_precision", precision, "--gradient_checkpointing"]
    AcceleratorState._reset_state(True)
    trainer = Trainer(parse_config(list(map(str, words))))
    base = {name: weight.clone() for name, weight in trainer.unet.state_dict().items() if ".lora_" not in name}
    result = trainer.train()
    torch.use_deterministic_algorithms(False)
    AcceleratorState._reset_state(True)
    assert trainer.teacher.unet is trainer.unet
    for name, weight in trainer.unet.state_dict().items():
        if ".lora_" in name:
            assert weight.dtype == torch.float32
        else:
            assert torch.equal(weight, base[name].to(weight.dtype)), name
    saved = load_file(teachers / "SD 1" / "unet" / "diffusion_pytorch_model.safetensors")
    exact = result.teacher.unet.state_dict()
    assert set(saved) == set(exact) and all(torch.equal(saved[name], exact[name]) for name in saved)

    # what is saved is the adapter on the unrounded weights
    student = load_file(tmp_path / "run" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(weight.dtype == torch.float32 for weight in student.values())
    assert torch.equal(student["conv_in.weight"], saved["conv_in.weight"])
    lora = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    name = next(name for name in student if name.endswith("to_q.weight"))
    a, b = (lora[f"unet.{name.removesuffix('.weight')}.lora_{kind}.weight"] for kind in "AB")
    torch.testing.assert_close(student[name], saved[name] + b @ a, rtol=0, atol=1e-6)
    assert (b @ a).abs().max() > 1e-3


@pytest.mark.slow
def test_a_pixel_space_teacher_is_distilled_through_lora_and_resumed(tiny_unet, tmp_path):
    ConsistencyModelPipeline(tiny_unet(num_class_embeds=3), EDMEulerScheduler()).save_pretrained(tmp_path / "teacher")
    words = ["--teacher", tmp_path / "teacher", *KINDS["LoRA"], "--learning_rate", 0.1, "--checkpointing_steps", 2]
    status, printed, errors = train_pid(*words, *short(tmp_path / "at once", 4))
    assert status == 0 and "LoRA of rank 4 on the teacher's own weights" in printed, errors
    shutil.copytree(tmp_path / "at once" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    status, _, errors = train_pid(*words, *short(tmp_path / "resumed", 4), "--resume_from_checkpoint", "latest")
    assert status == 0, errors
    expected, found = (weights_of(tmp_path / folder, 4) for folder in ("at once", "resumed"))
    assert expected and all(torch.equal(expected[name], found[name]) for name in expected)

    pipe = DiffusionPipeline.from_pretrained(tmp_path / "resumed")
    assert type(pipe) is OneStepPIDPipeline
    call = {"batch_size": 2, "class_labels": [0, 2], "output_type": "latent"}
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    pipe.unet = (
        PeftModel.from_pretrained(tiny_unet(num_class_embeds=3), tmp_path / "resumed").merge_and_unload().eval()
    )
    again = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(again, images, rtol=1e-4, atol=1e-5)
    pipe.unet = tiny_unet(num_class_embeds=3)
    assert (pipe(**call, generator=torch.Generator().manual_seed(0)).images - images).abs().max() > 1e-3


# --- losses on decoded images ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory) -> dict[str, Path]:
    """Random weights for LPIPS, whose real ones are a download, and two small decoders."""
    folder = tmp_path_factory.mktemp("perceptual")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = vgg.make_layers(vgg.cfgs["D"])
        torch.save({f"features.{name}": weight for name, weight in features.state_dict().items()}, folder / "vgg.pth")
        for name, channels in (("tiny", 4), ("other", 3)):
            shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
            shape |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
            AutoencoderTiny(latent_channels=channels, **shape).save_pretrained(folder / name)
    return {"vgg": folder / "vgg.pth", "tiny": folder / "tiny", "other": folder / "other"}


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [None, "tiny"])
def test_lpips_is_of_decoded_images(decoder, perceptual, teachers, tmp_path):
    words = [*flags(teachers, "SD 1", tmp_path / "run", 1), "--distance", "lpips", "--num_eval_samples", 0]
    words += ["--lpips_vgg_weights", perceptual["vgg"], *KINDS["LoRA"]]
    status, _, errors = train_pid(*words, *(["--lpips_decoder", perceptual[decoder]] if decoder else []))
    assert status == 0, errors
    metrics = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < metrics["loss"] < 10 and metrics["grad_norm"] > 0


# --- what cannot work is answered before anything is trained ---------------------------------------------------------


def refused(*words) -> str:
    status, printed, errors = train_pid(*words)
    lines = [line for line in errors.splitlines() if "train_pid.py: error: " in line]
    assert status == 2 and len(lines) == 1 and errors.rstrip().endswith(lines[0]), errors
    assert "Traceback" not in errors and "Distilling" not in errors
    return lines[0]


def test_settings_that_do_not_fit_the_teacher_are_answered_in_one_sentence(teachers, perceptual, tiny_unet, tmp_path):
    out = short(tmp_path / "run")
    text, prompts = ["--teacher", teachers / "SD 1", *out], ["--prompts", teachers / "prompts.txt"]
    assert "prompts is missing; the teacher is a StableDiffusionPipeline: pass --prompts" in refused(*text)
    said = refused("--teacher", "digits", *out, *prompts)
    assert "prompts is" in said and "told no text; leave it out" in said
    tiny_sd(in_channels=9).save_pretrained(tmp_path / "inpaint")
    assert "takes 9 channels and gives 4" in refused("--teacher", tmp_path / "inpaint", *out, *prompts)
    said = refused(*text, *prompts, "--use_lora", "--lora_target_modules", "to_q", "to_w")
    assert "lora_target_modules has 'to_w', which is no layer" in said
    said = refused(*text, *prompts, "--validation_class_labels", 0, 1)
    assert "validation_class_labels is [0, 1]; the teacher is unconditional, leave it out" in said
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "empty.txt', which is empty" in refused(*text, "--prompts", tmp_path / "empty.txt")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_wrong_decoders_are_answered_in_one_sentence(teachers, perceptual, tiny_unet, tmp_path):
    words = [*flags(teachers, "SD 1", tmp_path / "run"), "--distance", "lpips"]
    words += ["--lpips_vgg_weights", perceptual["vgg"], "--lpips_decoder"]
    said = refused(*words, tmp_path / "nowhere")
    assert "lpips_decoder is" in said and "cannot be loaded as an AutoencoderTiny" in said
    assert "cannot be loaded as an AutoencoderTiny" in refused(*words, teachers / "SD 1" / "vae")
    assert "decodes latents of 3 channels; the teacher's have 4" in refused(*words, perceptual["other"])
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path / "pixels")
    pixels = ["--teacher", tmp_path / "pixels", *short(tmp_path / "run"), "--distance", "lpips"]
    pixels += ["--lpips_vgg_weights", perceptual["vgg"], "--lpips_decoder", perceptual["tiny"]]
    assert "the teacher is not in latent space; leave it out" in refused(*pixels)


@pytest.mark.slow
def test_digits_can_be_read_if_the_prompts_ask_for_them(teachers, tmp_path):
    words = [*flags(teachers, "SD 1", tmp_path / "run", 1), "--eval_classifier", "digits"]
    status, printed, errors = train_pid(*words)
    assert status == 0 and "digits that a classifier reads as asked" in printed, errors
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert 0 <= results["student_digits_read_as_asked"] <= 1
    (tmp_path / "no digits.txt").write_text("a red fox\na blue bird\n")
    words = ["--teacher", teachers / "SD 1", "--prompts", tmp_path / "no digits.txt", *short(tmp_path / "other")]
    assert "no prompt asks for one digit" in refused(*words, "--eval_classifier", "digits")


@pytest.mark.slow
def test_over_long_prompts_are_counted_once(teachers, tmp_path):
    (tmp_path / "long.txt").write_text("a very long prompt about a red fox\nfour\n")
    words = ["--teacher", teachers / "SD 1", "--prompts", tmp_path / "long.txt", *short(tmp_path / "run", 1)]
    status, printed, _ = train_pid(*words, "--num_eval_samples", 0)
    assert status == 0
    assert printed.count("1 of 2 prompts are longer than the tokenizer takes and were cut there.") == 1
