"""Students that are a LoRA of their teacher: attached, combined, fused, taken away, refused where they do not fit."""

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_text import BETAS, tiny_sd, tiny_sdxl

import pid_diffusers.pipelines
from pid_diffusers import OneStepPIDTextToImagePipeline, PIDScheduler

PROMPTS = ["a red fox", "a dog"]
FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CONVOLUTIONS = ["conv1", "time_emb_proj", "proj_in"]


def pid_scheduler(**config) -> PIDScheduler:
    levels = {"sigma_min": 0.029, "sigma_max": 14.6, "sigma_data": 1.0}
    return PIDScheduler(prediction_type="residual", timestep_type="discrete", **levels, **BETAS, **config)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, noise, **settings) -> torch.Tensor:
    return pipe(PROMPTS, latents=noise(2, 4, 8, 8), output_type="latent", **settings).images


def save_lora(unet, folder: Path, scheduler: PIDScheduler | None = None, seed: int = 0, **config) -> Path:
    """Gives a UNet an adapter with random A and B, and saves it as training does."""
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION + CONVOLUTIONS, "init_lora_weights": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(**{**settings, **config}), adapter_name="default")
    OneStepPIDTextToImagePipeline.save_lora_weights(
        folder,
        unet_lora_layers=get_peft_model_state_dict(unet, adapter_name="default"),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def models(request, tmp_path_factory):
    """The folders of a teacher, of its student as a LoRA, and of a LoRA for a style; a pipeline with the first."""
    folder = tmp_path_factory.mktemp(request.param)
    create = tiny_sd if request.param == "sd" else tiny_sdxl
    create().save_pretrained(folder / "teacher")
    unet = create().unet
    save_lora(unet, folder / "student", pid_scheduler(guidance_scale=7.5))
    trained = OneStepPIDTextToImagePipeline.from_pretrained(folder / "teacher", unet=unet, scheduler=pid_scheduler())
    save_lora(create().unet, folder / "style", seed=1, r=3, target_modules=["to_v", "ff.net.2"])
    loaded = OneStepPIDTextToImagePipeline.from_pretrained(folder / "teacher")
    return {"folder": folder, "trained": quiet(trained), "loaded": loaded}


@pytest.fixture
def folder(models) -> Path:
    return models["folder"]


@pytest.fixture
def create(models):
    """The teacher's folder in the class of students, with its own scheduler or another."""

    def create(**components) -> OneStepPIDTextToImagePipeline:
        loaded = models["loaded"]
        unet = copy.deepcopy(loaded.unet)
        return quiet(OneStepPIDTextToImagePipeline(**{**loaded.components, "unet": unet, **components}))

    return create


@pytest.fixture
def base(create):
    """The teacher's folder, as it is, in the class of students."""
    return create()


def test_a_loaded_lora_makes_the_images_of_the_network_it_was_saved_from(models, folder, base, noise):
    base.load_lora_weights(folder / "student")
    images = latents_of(base, noise)
    assert torch.equal(images, latents_of(models["trained"], noise))
    base.disable_lora()
    assert (latents_of(base, noise) - images).abs().max() > 0.1


def test_every_key_of_the_file_is_attached_with_its_values(folder, base):
    base.load_lora_weights(folder / "student", adapter_name="pid")
    file, parameters = load_file(folder / "student" / FILE), dict(base.unet.named_parameters())
    for key, tensor in file.items():
        name = key.removeprefix("unet.").replace(".weight", ".pid.weight")
        assert torch.equal(parameters[name], tensor), key
    assert len(file) == sum(".lora_" in name for name in parameters)


def test_a_lora_brings_its_scheduler(folder, base):
    base.load_lora_weights(folder / "student")
    assert type(base.scheduler) is PIDScheduler and base.scheduler.config.guidance_scale == 7.5
    assert base.config.scheduler == ("pid_diffusers", "PIDScheduler")


def test_unloading_gives_the_teacher_back_bit_for_bit(folder, base, noise):
    before, scheduler = {k: v.clone() for k, v in base.unet.state_dict().items()}, base.scheduler
    config = dict(base.unet.config)
    base.load_lora_weights(folder / "student", adapter_name="pid")
    base.load_lora_weights(folder / "style", adapter_name="style")
    base.set_adapters(["pid", "style"])
    latents_of(base, noise)
    base.unload_lora_weights()
    after = base.unet.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[key], before[key]) for key in before)
    assert base.scheduler is scheduler and dict(base.unet.config) == config
    with pytest.raises(ValueError, match="call load_lora_weights"):
        base("a fox")


def test_an_untrained_pipeline_makes_its_images_again_after_unloading(create, folder, noise):
    pipe = create(scheduler=pid_scheduler())
    before = latents_of(pipe, noise)
    pipe.load_lora_weights(folder / "student")
    assert not torch.equal(latents_of(pipe, noise), before)
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe, noise), before)


def test_a_fused_lora_makes_the_same_images_and_can_be_unfused(folder, base, noise):
    base.load_lora_weights(folder / "student")
    images = latents_of(base, noise)
    base.fuse_lora()
    assert (latents_of(base, noise) - images).abs().max() < 1e-5 * images.abs().max()
    base.unfuse_lora()
    assert (latents_of(base, noise) - images).abs().max() < 1e-5 * images.abs().max()


def test_a_fused_and_unloaded_lora_is_a_whole_student(folder, base, noise, tmp_path):
    base.load_lora_weights(folder / "student")
    images = latents_of(base, noise)
    base.fuse_lora()
    base.unload_lora_weights()
    assert (latents_of(base, noise) - images).abs().max() < 1e-5 * images.abs().max()
    base.save_pretrained(tmp_path)
    again = quiet(OneStepPIDTextToImagePipeline.from_pretrained(tmp_path))
    assert torch.equal(latents_of(again, noise), latents_of(base, noise))


def test_a_pipeline_with_a_lora_attached_is_not_saved_as_if_it_had_none(folder, base, tmp_path):
    base.load_lora_weights(folder / "student", adapter_name="pid")
    with pytest.raises(ValueError, match="the LoRA pid attached.*call fuse_lora and then unload_lora_weights"):
        base.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_the_scale_of_a_lora_can_be_set_for_a_call(create, folder, base, noise):
    pipe = create(scheduler=pid_scheduler())
    untrained = latents_of(pipe, noise)
    pipe.load_lora_weights(folder / "student")
    assert torch.allclose(latents_of(pipe, noise, cross_attention_kwargs={"scale": 0.0}), untrained, atol=1e-5)


def test_a_style_goes_with_the_student_by_weights(models, folder, base, noise):
    base.load_lora_weights(folder / "student", adapter_name="pid")
    scheduler = base.scheduler
    base.load_lora_weights(folder / "style", adapter_name="style")
    assert base.scheduler is scheduler
    base.set_adapters(["pid", "style"], adapter_weights=[1.0, 0.5])
    both = latents_of(base, noise)
    base.set_adapters(["pid", "style"], adapter_weights=[1.0, 0.0])
    alone = latents_of(base, noise)
    assert (alone - latents_of(models["trained"], noise)).abs().max() < 1e-5
    assert (both - alone).abs().max() > 1e-2

    # W + 1 · B A · α/r + 0.5 · B' A' · α'/r'
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v"
    weight = base.unet.get_submodule(name).base_layer.weight.detach().clone()
    for file, scale in (("student", 4 / 2), ("style", 0.5 * 4 / 3)):
        lora = load_file(folder / file / FILE)
        weight += scale * lora[f"unet.{name}.lora_B.weight"] @ lora[f"unet.{name}.lora_A.weight"]
    base.set_adapters(["pid", "style"], adapter_weights=[1.0, 0.5])
    base.fuse_lora()
    assert torch.allclose(base.unet.get_submodule(name).base_layer.weight, weight, atol=1e-6)


def test_a_student_that_another_lora_has_silenced_is_not_asked_for_images(folder, base):
    base.load_lora_weights(folder / "student", adapter_name="pid")
    base.load_lora_weights(folder / "style", adapter_name="style")
    with pytest.raises(ValueError, match=r"'pid', which is not active; call set_adapters\(\['pid', 'style'\]\)"):
        base("a fox")
    base.set_adapters("pid")
    assert base("a fox").images


def test_a_style_may_be_loaded_first(folder, base, noise):
    base.load_lora_weights(folder / "style")
    with pytest.raises(ValueError, match="call load_lora_weights"):
        base("a fox")
    base.load_lora_weights(folder / "student")
    assert sorted(base.get_list_adapters()["unet"]) == ["default_0", "default_1"]
    base.set_adapters(["default_0", "default_1"])
    first = latents_of(base, noise)
    base.unload_lora_weights()
    base.load_lora_weights(folder / "student")
    base.load_lora_weights(folder / "style")
    base.set_adapters(["default_0", "default_1"])
    assert torch.allclose(latents_of(base, noise), first, atol=1e-5)


def test_a_name_that_is_taken_is_refused_and_keeps_its_adapter(models, folder, base, noise):
    base.load_lora_weights(folder / "student", adapter_name="pid")
    with pytest.raises(ValueError, match="adapter_name is 'pid', which is taken"):
        base.load_lora_weights(folder / "style", adapter_name="pid")
    assert torch.equal(latents_of(base, noise), latents_of(models["trained"], noise))


def test_deleting_an_adapter_takes_what_came_with_it(folder, base):
    scheduler = base.scheduler
    base.load_lora_weights(folder / "student", adapter_name="pid")
    base.load_lora_weights(folder / "style", adapter_name="style")
    base.delete_adapters("style")
    assert type(base.scheduler) is PIDScheduler
    base.delete_adapters("pid")
    assert base.scheduler is scheduler
    base.load_lora_weights(folder / "student", adapter_name="pid")
    assert type(base.scheduler) is PIDScheduler


# Files and where they are


def test_a_file_a_dictionary_a_subfolder_or_a_weight_name_say_what_is_loaded(create, models, folder, noise, tmp_path):
    expected = latents_of(models["trained"], noise)
    shutil.copytree(folder / "student", tmp_path / "runs" / "first")
    (tmp_path / "runs" / "first" / FILE).rename(tmp_path / "runs" / "first" / "mine.safetensors")
    for source, settings in (
        (folder / "student" / FILE, {}),
        (str(folder / "student"), {"weight_name": FILE}),
        (tmp_path / "runs", {"subfolder": "first", "weight_name": "mine.safetensors"}),
        (tmp_path / "runs" / "first", {"local_files_only": True}),
    ):
        pipe = create()
        pipe.load_lora_weights(source, **settings)
        assert torch.equal(latents_of(pipe, noise), expected), source


def test_the_tensors_alone_need_a_scheduler_that_is_passed(create, folder, base, noise):
    tensors = load_file(folder / "student" / FILE)
    keys = list(tensors)
    base.load_lora_weights(tensors)
    assert list(tensors) == keys
    with pytest.raises(ValueError, match="pass scheduler=PIDScheduler"):
        base("a fox")
    pipe = create(scheduler=pid_scheduler())
    pipe.load_lora_weights(tensors)
    assert latents_of(pipe, noise).isfinite().all()


def test_a_lora_loads_from_the_hub_with_its_scheduler_and_a_style_without(models, folder, hub, noise):
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    for name in ("teacher", "student", "style"):
        api.create_repo(f"ada/{name}")
        api.upload_folder(repo_id=f"ada/{name}", folder_path=folder / name)
    pipe = quiet(OneStepPIDTextToImagePipeline.from_pretrained("ada/teacher"))
    pipe.load_lora_weights("ada/student", adapter_name="pid")
    assert torch.equal(latents_of(pipe, noise), latents_of(models["trained"], noise))
    scheduler = pipe.scheduler
    pipe.load_lora_weights("ada/style", adapter_name="style")
    assert pipe.scheduler is scheduler
    # what was downloaded once needs no Hub
    for name in ("student", "style"):
        pipe.load_lora_weights(f"ada/{name}", weight_name=FILE, local_files_only=True)
    assert len(pipe.get_list_adapters()["unet"]) == 4


def test_a_student_may_be_loaded_by_the_pipelines_of_diffusers(folder, base, noise):
    if base.text_encoder_2 is not None:
        pytest.skip("one kind is enough")
    base.load_lora_weights(folder / "student")
    pipe = StableDiffusionPipeline.from_pretrained(folder / "teacher", scheduler=pid_scheduler())
    quiet(pipe).load_lora_weights(folder / "student")
    settings = {"latents": noise(2, 4, 8, 8), "output_type": "latent", "num_inference_steps": 1, "guidance_scale": 0}
    assert torch.equal(pipe(PROMPTS, **settings).images, latents_of(base, noise))


LOAD = """
import sys
import torch
from diffusers import DiffusionPipeline
teacher, whole, student, file, result = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(teacher, custom_pipeline=file, trust_remote_code=True)
try:
    pipe.load_lora_weights(student)
except ValueError as error:
    print(error)
assert not pipe.get_list_adapters()
scheduler = DiffusionPipeline.from_pretrained(whole, trust_remote_code=True).scheduler
pipe.scheduler = scheduler
pipe.load_lora_weights(student)
assert pipe.scheduler is not scheduler and pipe.scheduler.config.guidance_scale == 7.5
latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
torch.save(pipe("a fox", latents=latents, output_type="latent").images, result)
"""


@pytest.mark.slow
def test_without_the_package_a_lora_needs_a_pipeline_that_has_a_scheduler(
    create, folder, base, python_without_package, tmp_path
):
    create(scheduler=pid_scheduler()).save_pretrained(tmp_path / "whole")
    file = Path(pid_diffusers.pipelines.__file__).parent / "pipeline_one_step_pid_text_to_image.py"
    places = [folder / "teacher", tmp_path / "whole", folder / "student", file, tmp_path / "images.pt"]
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home")}
    settings = {"capture_output": True, "text": True, "env": environment, "cwd": tmp_path}
    ran = subprocess.run([python_without_package, "-c", LOAD, *map(str, places)], **settings)
    assert ran.returncode == 0, ran.stderr
    assert "pid_diffusers is not installed; install it, or pass scheduler=PIDScheduler(…)" in ran.stdout
    base.load_lora_weights(folder / "student")
    latents = torch.linspace(-2, 2, 256).reshape(1, 4, 8, 8)
    expected = base("a fox", latents=latents, output_type="latent").images
    assert torch.allclose(torch.load(tmp_path / "images.pt"), expected, atol=1e-4)


# Guidance that is told


@pytest.fixture
def guided(create, folder, tmp_path):
    """A LoRA whose UNet is told w between 2 and 8, and the pipeline that it was saved from."""
    pipe = create(scheduler=pid_scheduler(guidance_range=[2.0, 8.0]))
    pipe._add_guidance_projection(16)
    modules = [*ATTENTION, "time_embedding.cond_proj"]
    save_lora(pipe.unet, tmp_path / "guided", pipe.scheduler, target_modules=modules)
    return quiet(pipe), tmp_path / "guided"


def test_a_network_that_is_told_w_is_extended_and_given_back(guided, base, noise):
    pipe, path = guided
    before, config, scheduler = list(base.unet.state_dict()), dict(base.unet.config), base.scheduler
    assert f"unet.{'time_embedding.cond_proj'}.lora_A.weight" in load_file(path / FILE)
    base.load_lora_weights(path)
    assert base.unet.config.time_cond_proj_dim == 16
    low, high = (latents_of(base, noise, guidance_scale=w) for w in (2, 8))
    assert torch.equal(low, latents_of(pipe, noise, guidance_scale=2)) and not torch.allclose(low, high)
    assert torch.equal(latents_of(base, noise), latents_of(base, noise, guidance_scale=5.0))
    base.unload_lora_weights()
    assert list(base.unet.state_dict()) == before and dict(base.unet.config) == config
    assert base.scheduler is scheduler and base.unet.time_embedding.cond_proj is None


def test_two_students_that_are_told_w_share_the_projection(guided, base, noise):
    pipe, path = guided
    base.load_lora_weights(path, adapter_name="first")
    base.load_lora_weights(path, adapter_name="second")
    base.delete_adapters("first")
    assert torch.equal(latents_of(base, noise, guidance_scale=3), latents_of(pipe, noise, guidance_scale=3))
    base.delete_adapters("second")
    assert base.unet.time_embedding.cond_proj is None and base.unet.config.time_cond_proj_dim is None


def test_extending_changes_nothing_until_a_lora_does(create, folder, noise):
    pipe = create(scheduler=pid_scheduler())
    before, state = latents_of(pipe, noise), torch.get_rng_state()
    pipe._add_guidance_projection(16)
    assert torch.equal(torch.get_rng_state(), state)
    pipe.scheduler = pid_scheduler(guidance_range=[2.0, 8.0])
    assert torch.equal(latents_of(pipe, noise, guidance_scale=8.0), before)


def test_a_fused_network_that_is_told_w_keeps_its_projection(guided, base, noise, tmp_path):
    pipe, path = guided
    base.load_lora_weights(path)
    base.fuse_lora()
    base.unload_lora_weights()
    base.save_pretrained(tmp_path / "whole")
    again = quiet(OneStepPIDTextToImagePipeline.from_pretrained(tmp_path / "whole"))
    for w in (2, 8):
        expected = latents_of(pipe, noise, guidance_scale=w)
        assert (latents_of(again, noise, guidance_scale=w) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_scheduler_that_tells_w_refuses_a_network_that_cannot_hear_it(create, folder):
    pipe = create(scheduler=pid_scheduler(guidance_range=[2.0, 8.0]))
    with pytest.raises(ValueError, match=r"guidance_range = \[2, 8\], but the UNet cannot be told w"):
        pipe("a fox")


# Files that do not fit


def without(key):
    return lambda tensors: tensors.pop(key)


def renamed(key, new):
    return lambda tensors: tensors.update({new: tensors.pop(key)})


def of_shape(key, *shape):
    return lambda tensors: tensors.update({key: torch.zeros(shape)})


def without_prefix(tensors):
    for key in list(tensors):
        tensors[key.removeprefix("unet.")] = tensors.pop(key)


def without_module(tensors):
    for letter in "AB":
        del tensors[f"{TO_Q}.lora_{letter}.weight"]


TO_Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "unet.down_blocks.0.resnets.0.conv1"
FAULTS = {
    "an A without its B": (without(f"{TO_Q}.lora_B.weight"), f"{TO_Q}.lora_A.weight", "is incomplete"),
    "a B without its A": (without(f"{TO_Q}.lora_A.weight"), f"{TO_Q}.lora_B.weight", "is incomplete"),
    "a module less than the metadata": (without_module, f"{TO_Q}.lora_A.weight", "its own metadata names"),
    "an unknown module": (
        of_shape(f"{TO_Q}x.lora_A.weight", 2, 8),
        f"{TO_Q}x.lora_A.weight",
        "no such module",
    ),
    "a key of another kind": (
        of_shape(f"{TO_Q}.lora_C.weight", 2, 8),
        f"{TO_Q}.lora_C.weight",
        "no LoRA weight",
    ),
    "a renamed key": (
        renamed(f"{TO_Q}.lora_A.weight", f"{TO_Q}x.lora_A.weight"),
        f"{TO_Q}.lora_B.weight",
        "not its counterpart",
    ),
    "no prefix": (without_prefix, "'down_blocks.", "begins with none of unet."),
    "a wrong A": (of_shape(f"{TO_Q}.lora_A.weight", 2, 9), f"{TO_Q}.lora_A.weight", r"\(2, 9\) where \(2, 8\)"),
    "a wrong B": (of_shape(f"{TO_Q}.lora_B.weight", 9, 2), f"{TO_Q}.lora_B.weight", r"\(9, 2\) where \(8, 2\)"),
    "another rank": (of_shape(f"{TO_Q}.lora_B.weight", 8, 3), f"{TO_Q}.lora_B.weight", r"\(8, 3\) where \(8, 2\)"),
    "a wrong convolution": (of_shape(f"{CONV}.lora_A.weight", 2, 8, 1, 1), f"{CONV}.lora_A.weight", r"\(2, 8, 3, 3\)"),
    "nothing": (dict.clear, "", "holds no weights"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_name_and_changes_nothing(folder, base, tmp_path, fault):
    change, key, reason = FAULTS[fault]
    shutil.copytree(folder / "student", tmp_path / "wrong")
    tensors = load_file(tmp_path / "wrong" / FILE)
    with open(folder / "student" / FILE, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    change(tensors)
    save_file(tensors, tmp_path / "wrong" / FILE, metadata=header["__metadata__"])
    before, scheduler, config = list(base.unet.named_modules()), base.scheduler, dict(base.unet.config)
    with pytest.raises(ValueError, match=reason) as error:
        base.load_lora_weights(tmp_path / "wrong")
    message = str(error.value)
    assert message.startswith(str(tmp_path / "wrong")) and key in message and "\n" not in message
    assert list(base.unet.named_modules()) == before and not base.get_list_adapters()
    assert base.scheduler is scheduler and dict(base.unet.config) == config


def test_a_lora_of_the_other_kind_is_refused_by_name(folder, base, tmp_path):
    other = tiny_sdxl() if base.text_encoder_2 is None else tiny_sd()
    path = save_lora(other.unet, tmp_path, pid_scheduler())
    with pytest.raises(ValueError, match="made for another network"):
        base.load_lora_weights(path)
    assert not base.get_list_adapters()


def test_a_damaged_file_is_refused_by_name(folder, base, tmp_path):
    shutil.copytree(folder / "student", tmp_path / "cut")
    content = (tmp_path / "cut" / FILE).read_bytes()
    (tmp_path / "cut" / FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(OSError, match=f"Unable to load weights from checkpoint file for '{tmp_path / 'cut' / FILE}'"):
        base.load_lora_weights(tmp_path / "cut")
    assert not base.get_list_adapters()


def test_a_lora_without_its_projection_is_refused(guided, base):
    _, path = guided
    tensors = load_file(path / FILE)
    for letter in "AB":
        del tensors[f"unet.time_embedding.cond_proj.lora_{letter}.weight"]
    save_file(tensors, path / FILE)
    with pytest.raises(ValueError, match="lacks the key 'unet.time_embedding.cond_proj.lora_A.weight'"):
        base.load_lora_weights(path)
