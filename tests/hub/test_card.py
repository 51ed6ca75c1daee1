"""Model cards: complete, valid, true to the files beside them, and their code runs."""

import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from text_students import save_text_student, write_results
from tiny_text import tiny_sd, tiny_sdxl

from pid_diffusers import Denoiser, InputError, OneStepPIDPipeline, OneStepPIDTextToImagePipeline, PIDScheduler
from pid_diffusers.adapters import add_lora, fuse, lora_weights, save_peft_adapter
from pid_diffusers.evaluation.digits import DigitClassifier
from pid_diffusers.evaluation.provenance import describe_compute, teacher_card
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.hub.card import NOT_REPEATED, is_generated, render_card, repeat_command, write_card
from pid_diffusers.training import Trainer, parse_config

ROOT = Path(__file__).parent.parent.parent
ASSETS = ROOT / "pid_diffusers" / "assets"
HUB_TEACHER = {"name": "someone/teacher", "source": "hub", "license": "mit", "datasets": ["cifar10"]}


@pytest.fixture(scope="module")
def run(tiny_unet, tmp_path_factory):
    """The folder of a tiny run, and `mid-run`, the same folder before its last step."""
    folder = tmp_path_factory.mktemp("machine")
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    ConsistencyModelPipeline(unet, EDMEulerScheduler()).save_pretrained(folder / "secret" / "tiny-teacher")
    (folder / "secret" / "tiny-teacher" / "README.md").write_text("---\nlicense: mit\n---\n# A teacher\n")
    flags = ["--teacher", str(folder / "secret" / "tiny-teacher"), "--output_dir", str(folder / "runs" / "pid-tiny")]
    flags += [
        "--max_train_steps",
        "3",
        "--train_batch_size",
        "4",
        "--num_eval_samples",
        "20",
        "--lr_warmup_steps",
        "0",
    ]
    flags += ["--logging_steps", "1", "--eval_batch_size", "10", "--report_to", "none", "--max_grad_norm", "none"]
    flags += ["--eval_classifier", "digits"]
    AcceleratorState._reset_state(True)
    config = parse_config(flags)
    trainer = Trainer(config)
    report = RunReport(config)
    result = trainer.train()
    report.checkpoint(dataclasses.replace(result, steps=2))
    shutil.copytree(folder / "runs" / "pid-tiny", folder / "runs" / "mid-run")
    report.finish(result)
    AcceleratorState._reset_state(True)
    return folder / "runs" / "pid-tiny"


@pytest.fixture(scope="module")
def unconditional(run, tiny_unet):
    """An unconditional student of a teacher from the Hub, in RGB; 64 × 64 pixels are still a small picture."""
    folder = run.parent / "pid-rgb"
    unet = tiny_unet(sample_size=(64, 32), num_class_embeds=None)
    OneStepPIDPipeline(unet, PIDScheduler(num_train_timesteps=50, sigma_max=10.0)).save_pretrained(folder)
    for name in ("config.yaml", "results.json", "samples.png"):
        shutil.copy(run / name, folder / name)
    change(folder, teacher=HUB_TEACHER)
    return folder


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """The folder of a tiny run that trains a LoRA of a text-to-image model, beside its teacher."""
    folder = tmp_path_factory.mktemp("text-machine")
    tiny_sd().save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red fox\na dog\n" * 5)
    (folder / "held-out.txt").write_text("seven\na fox\n4\n")
    flags = ["--teacher", str(folder / "teacher"), "--prompts", str(folder / "prompts.txt"), "--use_lora"]
    flags += ["--eval_prompts", str(folder / "held-out.txt"), "--guidance_scale", "3", "--guidance_rescale", "0.7"]
    flags += ["--negative_prompt", "ugly, 'bad'", "--lora_rank", "2", "--lora_alpha", "1"]
    flags += ["--preset", "digits", "--output_dir", str(folder / "pid-lora"), "--max_train_steps", "2"]
    flags += ["--train_batch_size", "2", "--num_validation_images", "2", "--num_eval_samples", "4"]
    AcceleratorState._reset_state(True)
    config = parse_config([*flags, "--eval_batch_size", "4", "--report_to", "none"])
    trainer = Trainer(config)
    report = RunReport(config, denoiser=trainer.teacher)
    report.finish(trainer.train())
    AcceleratorState._reset_state(True)
    return folder / "pid-lora"


@pytest.fixture(scope="module")
def text_folders(lora_run):
    """`pid-lora` and, beside it, students of every other kind with the teachers that their cards name."""
    folder = lora_run.parent
    save_text_student(folder / "guided-lora", tiny_sd(), lora=True, guidance_range=[2.0, 8.0])
    save_text_student(folder / "whole", tiny_sd("v_prediction"), guidance_scale=7.5)
    save_text_student(folder / "guided-xl", tiny_sdxl(), guidance_range=[1.0, 9.0])
    save_text_student(folder / "xl-lora", tiny_sdxl(), lora=True, guidance_scale=5.0)
    write_results(folder / "xl-lora", teacher={"name": "teacher-xl", "source": "folder"})
    tiny_sdxl().save_pretrained(folder / "teacher-xl")
    # the LoRA of somebody else, of layers that both kinds have
    style = add_lora(tiny_sd().unet, rank=2, target_modules=["attn1.to_q"])
    OneStepPIDTextToImagePipeline.save_lora_weights(folder / "a-style", unet_lora_layers=lora_weights(style)[0])
    return folder


@pytest.fixture(scope="module")
def pixel_lora(tmp_path_factory):
    """A LoRA of the built-in teacher, and the pipeline that it was fused into."""
    folder = tmp_path_factory.mktemp("pixels") / "digits-lora"
    unet = add_lora(Denoiser.from_pretrained("digits").unet, rank=2)
    torch.manual_seed(0)
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapter = lora_weights(unet)
    pipe = OneStepPIDPipeline(fuse(unet), PIDScheduler(prediction_type="edm"))
    pipe.save_pretrained(folder)
    save_peft_adapter(*adapter, folder)
    (folder / "results.json").write_text(json.dumps({"teacher": {"name": "digits", "source": "built-in"}}))
    return folder, pipe


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "pid-tiny"))


def change(folder: Path, **results):
    path = folder / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **results}))


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def words(command: str) -> list[str]:
    """As a shell splits it; a backslash at the end of a line continues it."""
    return shlex.split(command.replace("\\\n", " "))


def settings(flags: list[str]) -> dict:
    repeated = parse_config(flags).to_public_dict().items()
    return {name: value for name, value in repeated if name not in NOT_REPEATED and not name.startswith("hub_")}


def test_a_run_writes_the_card_of_its_folder(run):
    card = (run / "README.md").read_text()
    assert card == render_card(run)
    assert is_generated(card)
    assert "# pid-tiny\n" in card and "8 × 8 grayscale images of 10 classes" in card


@pytest.mark.parametrize("which", ["run", "unconditional"])
def test_nothing_is_left_to_fill_in(request, which):
    card = render_card(request.getfixturevalue(which))
    for text in ("More Information", "TODO", "{{", "}}\n", "{%", "None", "undefined", "placeholder", "\n\n\n"):
        assert text not in card.split("## Citation")[0]


def test_no_folder_of_the_machine_is_named(run):
    for name in ("README.md", "results.json", "config.yaml"):
        text = (run / name).read_text()
        assert "secret" not in text and str(run.parent) not in text
        assert "tiny-teacher" in text


def test_a_reader_is_told_recipe_hardware_time_and_versions(run):
    card, results = (run / "README.md").read_text(), json.loads((run / "results.json").read_text())
    expected = ["scheme `midpoint`", "AdamW", "0.001, cosine", "N = 250 from T = 80 to ε = 0.002", "12 starts", "0.98"]
    expected += ["CPU core hours", results["hardware"]["name"], f"torch {torch.__version__}"]
    for text in expected:
        assert text in card
    assert results["num_starts_seen"] == 3 * results["effective_batch_size"] == 12
    seconds = results["seconds"] * results["hardware"]["num_threads"]
    assert results["cpu_core_hours"] == pytest.approx(seconds / 3600, abs=1e-4)


def test_gpu_hours_count_every_process():
    meta = describe_compute(torch.device("meta"), 8, 8 * 1800.0)
    assert meta["gpu_hours"] == 4.0 and meta["hardware"]["num_processes"] == 8


def test_the_figures_of_the_metadata_are_those_of_the_results(run):
    results = json.loads((run / "results.json").read_text())
    metadata = yaml.safe_load((run / "README.md").read_text().split("---\n")[1])
    name, figures = model_index_to_eval_results(metadata["model-index"])
    assert name == "pid-tiny"
    assert {figure.metric_type: figure.metric_value for figure in figures} == {
        "rms_distance": results["rms_distance_to_40_step_heun"],
        "accuracy": results["student_digits_read_as_asked"],
    }
    assert figures[0].dataset_args == {"num_samples": 20, "seed": 0}


def test_pictures_are_shown_where_there_are_any(copied):
    assert [image["output"]["url"] for image in ModelCard(render_card(copied)).data.widget] == [
        "samples.png",
        "trajectory.png",
    ]
    (copied / "samples.png").unlink()
    (copied / "trajectory.png").unlink()
    card = render_card(copied)
    assert ".png)" not in card and ModelCard(card).data.get("widget") is None


def test_a_run_that_goes_on_says_how_far_it_is_and_no_figures(run):
    card = (run.parent / "mid-run" / "README.md").read_text()
    assert card == render_card(run.parent / "mid-run", "pid-tiny")
    assert "step 2 of 3" in card and "## Figures" not in card
    assert ModelCard(card).data.eval_results is None


def test_a_folder_without_results_has_a_card(copied):
    (copied / "results.json").unlink()
    card = render_card(copied)
    assert "Not finished" in card and "license was not known" in card
    (copied / "config.yaml").unlink()
    card = render_card(copied)
    assert "Not finished" not in card and "## Training" not in card
    assert len(blocks(card, "python")) == 3


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--max_grad_norm", "none", "--eval_classifier", "none", "--ema_decays", "0.9", "0.99", "0.98"],
        ["--preset", "cifar10", "--teacher", "someone/teacher", "--deterministic", "false", "--adam_epsilon", "1e-9"],
        ["--preset", "imagenet64", "--teacher", "a teacher", "--split_batch", "--mixed_precision", "none"],
        ["--prompts", "a file.txt", "--negative_prompt=-ugly, 'bad'", "--guidance_range", "2", "8", "--use_lora"],
        ["--prompts", "ada/prompts", "--negative_prompt", "/slash", "--max_prompts", "5", "--lora_rank", "8"]
        + ["--use_lora", "--lora_alpha", "2", "--lora_target_modules", "to_q", "to_out.0", "--guidance_scale", "3"]
        + ["--num_validation_images", "2", "--validation_prompts", './a "fox"', "it's snowing, a dog"],
        ["--output_dir", "runs/a run", "--validation_class_labels", *map(str, range(10)), "--save_ema_decay", "none"],
    ],
)
def test_the_command_repeats_every_setting(flags):
    config = parse_config(flags).to_public_dict()
    command = words(repeat_command(config, num_processes=8))
    assert command[:5] == ["accelerate", "launch", "--num_processes", "8", "train_pid.py"]
    assert settings(command[5:]) == settings(flags)
    # a preset that nobody else has, or of which nothing is known, is spelled out
    for preset in ({"preset": "mine.yaml"}, {}):
        rest = {name: value for name, value in config.items() if name != "preset"}
        assert settings(words(repeat_command({**rest, **preset}))[3:]) == settings(flags)


def test_the_card_of_a_run_holds_the_command_that_repeats_it(run):
    command = words(blocks((run / "README.md").read_text(), "bash")[-1])
    recorded = yaml.safe_load((run / "config.yaml").read_text())
    repeated = settings(command[3:])
    assert repeated == {name: recorded[name] for name in repeated}


def test_a_teacher_on_the_hub_is_the_base_model(unconditional):
    card = ModelCard(render_card(unconditional, "me/pid-rgb"))
    assert card.data.base_model == "someone/teacher"
    assert card.data.base_model_relation == "finetune"
    assert (card.data.license, card.data.datasets) == ("mit", ["cifar10"])
    assert "(https://huggingface.co/someone/teacher)" in card.text
    assert 'from_pretrained("me/pid-rgb"' in card.text and "# pid-rgb\n" in card.text
    assert "class_labels" not in card.text and "64 × 32 colour images" in card.text


def test_a_teacher_in_a_folder_gives_its_license_and_is_no_base_model(run):
    card = ModelCard((run / "README.md").read_text())
    assert card.data.license == "mit" and card.data.base_model is None
    assert "mit, that of the teacher" in card.text


def test_a_license_of_its_own_is_named_and_linked(copied):
    license = {"license": "other", "license_name": "openrail", "license_link": "https://example.org/license"}
    change(copied, teacher={**HUB_TEACHER, **license})
    card = ModelCard(render_card(copied))
    assert (card.data.license, card.data.license_name, card.data.license_link) == tuple(license.values())
    assert "[openrail](https://example.org/license)" in card.text


def test_an_unknown_license_is_left_out_and_said(copied):
    change(copied, teacher={"name": "someone/teacher", "source": "hub"})
    card = ModelCard(render_card(copied))
    assert card.data.license is None
    assert "The teacher's license was not known" in card.text


@pytest.mark.parametrize("text", ["# No metadata\n", "---\nlicense: [\n---\n", "---\n- a list\n---\n", b"\xff"])
def test_a_teachers_card_that_cannot_be_read_says_nothing(tmp_path, text):
    (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert teacher_card(str(tmp_path)) == {}


def test_the_card_of_a_teacher_on_the_hub_is_read(hub):
    api = HfApi(endpoint=hub.endpoint)
    repo_id = api.create_repo("teacher").repo_id
    assert teacher_card(repo_id) == {}
    text = "---\nlicense: other\nlicense_name: openrail\ndatasets: [cifar10]\nlanguage: en\n---\n# A teacher\n"
    api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo_id)
    assert teacher_card(repo_id) == {"license": "other", "license_name": "openrail", "datasets": ["cifar10"]}
    assert teacher_card("nobody/nothing") == {}


def test_an_edited_card_survives(copied):
    path = copied / "README.md"
    change(copied, steps=7)
    assert write_card(copied) and is_generated(path.read_text())  # as it was generated: written anew
    edited = path.read_text().replace("## Limits", "## What I found\n\nIt draws sevens best.\n\n## Limits")
    path.write_text(edited)
    assert not is_generated(edited)
    assert not write_card(copied)
    assert path.read_text() == edited
    path.write_text("# A card by hand\n")
    assert not write_card(copied)


def test_a_folder_without_a_model_is_refused(tmp_path, copied):
    with pytest.raises(InputError, match="holds no pipeline"):
        render_card(tmp_path)
    (copied / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json cannot be read"):
        render_card(copied)


GENERATED = [
    path.parent.name
    for path in sorted((ROOT / "model_cards").glob("*/README.md"))
    if "<!-- generated by" in path.read_text()
]


@pytest.mark.parametrize("name", GENERATED)
def test_a_shipped_card_is_what_its_files_give(name, tmp_path):
    folder = Path(shutil.copytree(ASSETS / name, tmp_path / name))
    shutil.copytree(ROOT / "model_cards" / name, folder, dirs_exist_ok=True)
    assert (folder / "README.md").read_text() == render_card(folder, f"pid_diffusers/assets/{name}")


def test_the_shipped_text_to_image_teacher_is_described_as_one():
    card = ModelCard.load(ROOT / "model_cards" / "words-teacher" / "README.md")
    results = json.loads((ASSETS / "words-teacher" / "results.json").read_text())
    assert (card.data.pipeline_tag, card.data.license) == ("text-to-image", "apache-2.0")
    assert {"text-to-image", "stable-diffusion"} <= set(card.data.tags)
    figure = card.data.eval_results[0]
    assert (figure.task_type, figure.metric_value) == ("text-to-image", results["digits_read_as_asked"])
    assert figure.dataset_args == {"num_samples": 600, "seed": 1} and "not seen in training" in figure.metric_name
    names = ("digits_read_as_asked_unguided", "held_out_real_digits_read", "autoencoder_digits_read_held_out")
    assert all(f"| {100 * results[name]:.1f} % |" in card.text for name in names)
    expected = ["16 × 16 colour images", "120 that training", "800 steps of 64", "3,500 steps of 64", results["data"]]
    assert all(text in card.text for text in [*expected, results["command"], results["limits"]])
    assert "**Time**" not in card.text
    for text in ("More Information", "TODO", "{{", "}}", "{%", "None", "undefined", "class_labels", "\n\n\n"):
        assert text not in card.text.split("## Citation")[0], text
    recipe = words(blocks(card.text, "bash")[0])[3:]
    assert recipe[:4] == ["--preset", "words", "--teacher", "pid_diffusers/assets/words-teacher"]
    assert parse_config(recipe).guidance_scale == results["guidance_scale"]


def test_the_code_in_the_card_of_the_text_to_image_teacher_draws_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = shipped_code("words-teacher")
    found = {}
    torch.manual_seed(0)
    exec(code, found)
    assert (tmp_path / "image.png").is_file()
    image = torch.tensor(np.array(found["images"][0])).permute(2, 0, 1)[None] / 127.5 - 1
    assert 'pipe("a handwritten seven"' in code
    assert DigitClassifier().accuracy(image, torch.tensor([7])) == 1


@pytest.mark.parametrize("kept", [{}, {"digits_read_as_asked": 0.9, "seconds": 3.0}])
def test_a_text_to_image_model_without_such_figures_is_refused(tmp_path, kept):
    tiny_sd().save_pretrained(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="neither a student nor a teacher in EDM form .*by hand"):
        render_card(tmp_path)


def test_the_teachers_example_writes_a_card_with_its_figures(tiny_unet, tmp_path):
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "train_digits_teacher.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.NUM_SAMPLES, example.HEUN_STEPS = 20, 3
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    ConsistencyModelPipeline(unet, EDMEulerScheduler()).save_pretrained(tmp_path)
    settings = {"max_train_steps": 3, "train_batch_size": 4, "learning_rate": 0.01, "seed": 5, "output_dir": "t"}
    compute = {"seconds": 3.0, **describe_compute(torch.device("cpu"), 1, 3.0)}
    example.write_report(example.EDMDenoiser(unet), tmp_path, {**settings, **example.ALWAYS}, compute)
    card, results = ModelCard.load(tmp_path / "README.md"), json.loads((tmp_path / "results.json").read_text())
    assert card.data.eval_results[0].metric_value == results["digits_read_as_asked"]
    assert "--learning_rate 0.01 --seed 5 --output_dir t" in blocks(card.text, "bash")[1]
    assert "by 3 Heun steps (6 network calls)" in card.text
    assert (tmp_path / "samples.png").is_file()


# Text-to-image students, and LoRA

TEXT_MODELS = ("pid-lora", "guided-lora", "xl-lora", "whole", "guided-xl")


def test_a_lora_run_writes_the_card_of_its_folder(lora_run):
    card = (lora_run / "README.md").read_text()
    assert card == render_card(lora_run)
    data = ModelCard(card).data
    assert data.pipeline_tag == "text-to-image"
    assert {"text-to-image", "stable-diffusion", "lora"} <= set(data.tags)
    assert [image["text"] for image in data.widget] == ["seven, a fox"] * 2
    assert data.base_model is None and str(lora_run.parent) not in card


def test_the_card_of_a_lora_tells_its_recipe(lora_run):
    card = (lora_run / "README.md").read_text()
    expected = ["rank 2, α = 1", "`to_q`", "| prompts | 10 of `prompts.txt` |", "w = 3, away from `ugly, 'bad'`"]
    expected += ["rescaled by φ = 0.7", "Negative prompts have no effect here", "first 12 tokens"]
    expected += ["16 × 16 colour images from a text", "16 × 16 pixels and no other size"]
    for text in expected:
        assert text in card, text
    command = words(blocks(card, "bash")[-1])
    recorded = yaml.safe_load((lora_run / "config.yaml").read_text())
    repeated = settings(command[3:])
    assert repeated == {name: recorded[name] for name in repeated}


def test_digits_are_read_from_prompts_that_training_does_not_see_and_both_sides_are_named(lora_run):
    results, card = json.loads((lora_run / "results.json").read_text()), (lora_run / "README.md").read_text()
    theirs, ours = (100 * results[f"{side}_digits_read_as_asked"] for side in ("teacher", "student"))
    assert f"reads as the prompt asks | {ours:.1f} % (the teacher's: {theirs:.1f} %)" in card
    assert "(seed 0, the prompts of `held-out.txt` in turn)" in card and "leave out 360" in card
    figures = ModelCard(card).data.eval_results
    assert {figure.task_type for figure in figures} == {"text-to-image"}
    assert [figure.metric_value for figure in figures if figure.metric_type == "accuracy"] == [ours / 100]


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_a_base_model_on_the_hub_is_finetuned_or_adapted(text_folders, name, tmp_path):
    folder = Path(shutil.copytree(text_folders / name, tmp_path / name))
    change(folder, teacher=HUB_TEACHER)
    card = ModelCard(render_card(folder, f"ada/{name}"))
    lora = "lora" in name
    assert card.data.base_model == "someone/teacher"
    assert card.data.base_model_relation == ("adapter" if lora else "finetune")
    assert ("lora" in card.data.tags) == lora
    assert ("stable-diffusion-xl" in card.data.tags) == ("xl" in name) != ("stable-diffusion" in card.data.tags)
    assert ('from_pretrained("someone/teacher"' in card.text) == lora
    assert (f'load_lora_weights("ada/{name}"' in card.text) == lora


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_nothing_is_left_to_fill_in_of_a_text_to_image_card(text_folders, name):
    card = render_card(text_folders / name)
    for text in ("More Information", "TODO", "{{", "}}", "{%", "None", "none,", "undefined", "class_labels", "\n\n\n"):
        assert text not in card.split("## Citation")[0], text


def test_guidance_is_fixed_or_a_range_to_choose_from(text_folders):
    fixed, chosen = (render_card(text_folders / name) for name in ("whole", "guided-xl"))
    assert "Classifier-free guidance of strength w = 7.5 is part of what it has learnt" in fixed
    assert 'pipe("a red fox", guidance_scale=9)` chooses' in chosen and "from 1 to 9; left out it is\n5." in chosen
    assert "w drawn from 1 to 9 for each start" in chosen and "the guidance that it has learnt" not in chosen


def test_a_student_that_is_told_a_text_has_a_card_without_a_run(text_folders, tmp_path):
    folder = Path(shutil.copytree(text_folders / "whole", tmp_path / "whole"))
    (folder / "config.yaml").unlink()
    (folder / "results.json").unlink()
    card = render_card(folder)
    assert "## Training" not in card and 'pipe("a red fox in the snow")' in card


def test_a_lora_of_nobody_knows_what_has_no_card(text_folders, tmp_path):
    folder = Path(shutil.copytree(text_folders / "xl-lora", tmp_path / "xl-lora"))
    (folder / "config.yaml").unlink()
    (folder / "results.json").unlink()
    with pytest.raises(InputError, match="says of which model"):
        render_card(folder)


def test_a_lora_that_cannot_be_read_is_named(text_folders, tmp_path):
    folder = Path(shutil.copytree(text_folders / "xl-lora", tmp_path / "xl-lora"))
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match="pytorch_lora_weights.safetensors cannot be read"):
        render_card(folder)


@pytest.mark.slow
def test_the_code_in_a_text_to_image_card_runs(text_folders):
    snippets = [code for name in TEXT_MODELS for code in blocks(render_card(text_folders / name), "python")]
    assert len(snippets) == 3 * 4 + 2 * 3
    execute(sys.executable, [code for code in snippets if uses_package(code)], text_folders)


@pytest.mark.slow
def test_the_code_in_a_text_to_image_card_that_is_without_the_package_runs_without_it(
    text_folders, python_without_package
):
    snippets = [code for name in TEXT_MODELS for code in blocks(render_card(text_folders / name), "python")]
    snippets = [code for code in snippets if not uses_package(code)]
    assert len(snippets) == 5 and all("trust_remote_code" in code for code in snippets)
    execute(python_without_package, snippets, text_folders)


def test_a_lora_for_pixels_loads_as_its_card_says(pixel_lora, noise, monkeypatch):
    folder, pipe = pixel_lora
    monkeypatch.chdir(folder.parent)
    card = ModelCard(render_card(folder))
    assert "lora" in card.data.tags and "`digits` teacher" in card.text
    codes = blocks(card.text, "python")
    assert len(codes) == 2
    for code in codes:
        found = {}
        exec(code, found)
        settings = {"class_labels": [3, 4], "latents": noise(2, 1, 8, 8), "output_type": "pt"}
        assert torch.allclose(found["pipe"](**settings).images, pipe(**settings).images, atol=1e-5)


@pytest.mark.parametrize("which", ["run", "unconditional", "mid-run", *GENERATED, *TEXT_MODELS])
def test_the_hub_accepts_the_metadata(hub, request, run, which):
    if which in GENERATED:
        card = (ROOT / "model_cards" / which / "README.md").read_text()
    elif which in TEXT_MODELS:
        card = render_card(request.getfixturevalue("text_folders") / which)
    else:
        card = render_card(run.parent / which if which == "mid-run" else request.getfixturevalue(which))
    # what ModelCard.validate sends; the client's own endpoint is fixed when it is imported
    body = json.dumps({"repoType": "model", "content": card}).encode()
    query = urllib.request.Request(f"{hub.endpoint}/api/validate-yaml", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(query) as response:
        assert json.load(response) == {"errors": [], "warnings": []}


def shipped_code(name: str) -> str:
    """The first code of a shipped card, which runs outside a clone, too."""
    card = (ROOT / "model_cards" / name / "README.md").read_text()
    return blocks(card, "python")[0].replace("pid_diffusers/assets", str(ASSETS))


def uses_package(code: str) -> bool:
    return re.search(r"^(import|from) pid_diffusers", code, re.MULTILINE) is not None


def execute(python: str, snippets: list[str], folder: Path):
    """Runs each snippet as a script of its own, in one process, since importing torch takes the longest."""
    script = f"for code in {snippets!r}:\n    exec(code, {{'__name__': '__main__'}})"
    result = subprocess.run([python, "-c", script], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0 and "deprecated" not in result.stderr, result.stderr


def test_the_code_in_a_card_runs(run, unconditional):
    snippets = [code for folder in (run, unconditional) for code in blocks(render_card(folder), "python")]
    assert len(snippets) == 6
    assert sum("import pid_diffusers" in code for code in snippets) == 2
    execute(sys.executable, [code for code in snippets if "pid_diffusers" in code], run.parent)


@pytest.mark.slow
def test_the_code_without_the_package_runs_without_it(run, unconditional, python_without_package):
    snippets = [code for folder in (run, unconditional) for code in blocks(render_card(folder), "python")]
    snippets = [code for code in snippets if "pid_diffusers" not in code]
    assert len(snippets) == 2 and all("trust_remote_code" in code for code in snippets)
    teachers = [shipped_code(name) for name in ("digits-teacher", "words-teacher")]
    execute(python_without_package, [*snippets, *teachers], run.parent)
