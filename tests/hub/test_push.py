"""Pushing, with the real client against a server on this machine that speaks the Hub's protocol."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from huggingface_hub import HfApi
from loading_cells import digest
from text_students import save_text_student, write_results
from tiny_text import tiny_sd, tiny_sdxl
from transformers import CLIPConfig, CLIPImageProcessor

from pid_diffusers import InputError, OneStepPIDPipeline, OneStepPIDTextToImagePipeline
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.hub.card import render_card, write_card
from pid_diffusers.hub.publish import Publisher
from pid_diffusers.hub.push import PushFailed, push, push_command, repository_files
from pid_diffusers.training import Trainer, TrainingConfig

ROOT = Path(__file__).parent.parent.parent
CELLS = Path(__file__).parent.parent / "support" / "loading_cells.py"

PIPELINE = {
    "model_index.json",
    "pipeline.py",
    "scheduler/pid_diffusers.py",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}
REPORT = {"README.md", "config.yaml", "metrics.jsonl", "results.json", "loss.png", "samples.png", "trajectory.png"}
# the requests of a push, in turn
REQUESTS = {
    "create": "POST /api/repos/create",
    "card": "POST /api/validate-yaml",
    "preupload": "POST /api/models/.*/preupload/",
    "batch": "POST /.*/info/lfs/objects/batch",
    "commit": "POST /api/models/.*/commit/",
}


@pytest.fixture(scope="module")
def teacher(tiny_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers") / "teacher"
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    ConsistencyModelPipeline(unet, EDMEulerScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(teacher, tmp_path_factory):
    """The output folder of a run, with its checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "my-student"
    settings = {"teacher": str(teacher), "output_dir": str(folder), "num_validation_images": 2, "num_eval_samples": 4}
    config = TrainingConfig(**settings, max_train_steps=2, train_batch_size=2, checkpointing_steps=1).validate()
    trainer = Trainer(config)
    RunReport(config).finish(trainer.train())
    return folder


@pytest.fixture
def api(hub):
    return HfApi(endpoint=hub.endpoint, token=hub.token)


@pytest.fixture
def hasty(monkeypatch):
    """Nobody waits between attempts, neither we nor the client."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def uploaded(hub, repo_id: str) -> set[str]:
    return set(hub.repos[repo_id].files) - {".gitattributes"}  # which the Hub itself makes


def environment(hub, folder: Path) -> dict[str, str]:
    return {**os.environ, **hub.environment(folder / "home"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


# 1. What is uploaded


def test_the_pipeline_its_card_pictures_figures_and_settings_are_uploaded_and_nothing_else(run, hub, api, tmp_path):
    folder = tmp_path / "my-student"
    shutil.copytree(run, folder)
    (folder / ".token").write_text("hf_secret")
    (folder / "notes.txt").write_text("not for others")
    (folder / "teacher").mkdir()
    (folder / "teacher" / "diffusion_pytorch_model.safetensors").write_bytes(b"weights")
    (folder / "passport.png").write_bytes(b"not for others")
    (folder / "unet" / ".config.json.partial").write_text("half")
    (folder / "unet" / "optimizer.bin").write_bytes(b"state")
    assert (folder / "checkpoint-2" / "optimizer.bin").exists() and (folder / "logs").exists()
    assert push(folder, api=api) == f"{hub.endpoint}/ada/my-student"
    assert uploaded(hub, "ada/my-student") == PIPELINE | REPORT


def test_what_is_uploaded_is_what_is_in_the_folder_but_for_the_name_in_the_card(run, hub, api):
    before = content(run)
    push(run, "ada/another-name", api=api)
    uploaded = hub.repos["ada/another-name"].files
    for name, path in repository_files(run).items():
        if name != "README.md":
            assert uploaded[name] == path.read_bytes(), name
    assert uploaded["README.md"].decode() == render_card(run, "ada/another-name")
    assert 'from_pretrained("ada/another-name"' in uploaded["README.md"].decode()
    assert content(run) == before


def test_an_edited_card_is_uploaded_as_it_is(run, hub, api, tmp_path):
    folder = tmp_path / "my-student"
    shutil.copytree(run, folder)
    card = (folder / "README.md").read_text().replace("my-student", "my student", 1)
    (folder / "README.md").write_text(card)
    push(folder, "ada/edited", api=api)
    assert hub.repos["ada/edited"].files["README.md"].decode() == card


def test_no_uploaded_file_tells_where_it_was_on_this_machine(run, hub, api, teacher, tmp_path):
    again = tmp_path / "again"
    OneStepPIDPipeline.from_pretrained(run).save_pretrained(again)
    assert str(run) in (again / "unet" / "config.json").read_text()  # diffusers writes it
    push(run, api=api)
    push(again, api=api)
    for repo in hub.repos.values():
        for name, data in repo.files.items():
            for secret in (str(run.parent), str(teacher.parent), str(tmp_path), hub.token, os.path.expanduser("~")):
                assert secret.encode() not in data, (name, secret)


def test_a_repo_is_private_if_asked_and_stays_as_it_is_when_pushed_again(run, hub, api):
    push(run, "ada/secret", private=True, api=api)
    push(run, "ada/open", api=api)
    push(run, "ada/secret", private=False, api=api)
    assert hub.repos["ada/secret"].private and not hub.repos["ada/open"].private


@pytest.mark.slow
def test_a_pushed_student_loads_and_makes_the_same_images(run, hub, api, python_without_package, tmp_path):
    push(run, "ada/my-student", api=api)
    expected = digest(OneStepPIDPipeline.from_pretrained(run))
    for package, python in (("imported", sys.executable), ("absent", python_without_package)):
        kwargs = {"trust_remote_code": True} if package == "absent" else {}
        cell = {"name": "pushed", "loader": "DiffusionPipeline", "model": "ada/my-student", "kwargs": kwargs}
        results = tmp_path / f"{package}.json"
        job = {"package": package, "cells": [cell], "results": str(results)}
        settings = {"env": environment(hub, tmp_path / package), "cwd": tmp_path, "input": json.dumps(job)}
        subprocess.run([python, str(CELLS)], **settings, text=True, check=True)
        assert json.loads(results.read_text())["pushed"].get("digest") == expected, results.read_text()


LORA = {"README.md", "pipeline.py", "config.yaml", "results.json", "pytorch_lora_weights.safetensors"}
LORA |= {"scheduler/pid_diffusers.py", "scheduler/scheduler_config.json"}


@pytest.fixture(scope="module", params=["fixed, SD", "range, SD", "fixed, SDXL"])
def lora_run(request, tmp_path_factory):
    """The folders of a LoRA, with what a run leaves there, and of its base model, which its files name ada/base."""
    guidance, kind = request.param.split(", ")
    guidance = {"guidance_scale": 3.0} if guidance == "fixed" else {"guidance_range": [2.0, 8.0]}
    create = tiny_sd if kind == "SD" else tiny_sdxl
    folder = tmp_path_factory.mktemp("lora-machine")
    create().save_pretrained(folder / "base")
    save_text_student(folder / "pid-lora", create(), lora=True, **guidance)
    write_results(folder / "pid-lora", teacher={"name": "ada/base", "source": "hub"})
    write_card(folder / "pid-lora")
    for name in ("checkpoint-3/model.safetensors", "checkpoint-3/optimizer.bin", "logs/events", "prompts.txt"):
        (folder / "pid-lora" / name).parent.mkdir(exist_ok=True)
        (folder / "pid-lora" / name).write_bytes(b"not for others")
    return folder / "pid-lora", folder / "base"


def of_text(pipe, latents, **settings):
    pipe.set_progress_bar_config(disable=True)
    return pipe("a red fox", latents=latents, output_type="latent", **settings).images


def test_of_a_lora_its_file_and_scheduler_are_uploaded_and_not_the_network(lora_run, hub, api):
    folder, _ = lora_run
    push(folder, api=api)
    assert uploaded(hub, "ada/pid-lora") == LORA
    card = hub.repos["ada/pid-lora"].files["README.md"].decode()
    assert "base_model: ada/base\n" in card and "base_model_relation: adapter\n" in card
    assert 'load_lora_weights("ada/pid-lora")' in card
    for name, data in hub.repos["ada/pid-lora"].files.items():
        assert str(folder.parent).encode() not in data, name


def test_a_pushed_lora_makes_the_images_of_the_folder(lora_run, hub, api, noise):
    folder, base = lora_run
    push(folder, api=api)
    api.create_repo("ada/base")
    api.upload_folder(repo_id="ada/base", folder_path=base)
    images = []
    for model, lora in (("ada/base", "ada/pid-lora"), (base, folder)):
        pipe = OneStepPIDTextToImagePipeline.from_pretrained(model)
        pipe.load_lora_weights(lora)
        images.append(of_text(pipe, noise(1, 4, 8, 8)))
    assert torch.equal(*images)
    fused = of_text(OneStepPIDTextToImagePipeline.from_pretrained(folder), noise(1, 4, 8, 8))
    assert (images[0] - fused).abs().max() < 1e-4 * fused.abs().max()


@pytest.mark.slow
def test_a_pushed_lora_makes_the_same_images_without_the_package(
    lora_run, hub, api, noise, python_without_package, tmp_path
):
    folder, base = lora_run
    push(folder, api=api)
    api.create_repo("ada/base")
    api.upload_folder(repo_id="ada/base", folder_path=base)
    card = hub.repos["ada/pid-lora"].files["README.md"].decode()
    code = next(c for c in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "get_class_from_dynamic_module" in c)
    pipe = OneStepPIDTextToImagePipeline.from_pretrained(base)
    pipe.load_lora_weights(folder)
    expected = of_text(pipe, noise(1, 4, 8, 8))
    torch.save(noise(1, 4, 8, 8), tmp_path / "noise.pt")
    plain = "guidance_scale=0" in code
    assert plain == (pipe.scheduler.config.guidance_range is None)
    settings = "num_inference_steps=1, guidance_scale=0" if plain else ""
    code += f"""
import torch
images = pipe("a red fox", latents=torch.load("noise.pt"), output_type="latent", {settings}).images
torch.save(images, "images.pt")
"""
    settings = {"env": environment(hub, tmp_path), "cwd": tmp_path, "capture_output": True, "text": True}
    result = subprocess.run([python_without_package, "-c", code], **settings)
    assert result.returncode == 0, result.stderr
    assert torch.equal(torch.load(tmp_path / "images.pt"), expected)


def test_of_a_whole_text_to_image_student_every_part_is_uploaded(hub, api, tmp_path):
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config={**vision, "image_size": 16, "patch_size": 8}, projection_dim=4)
    size = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    teacher = tiny_sd()
    teacher.register_modules(
        safety_checker=StableDiffusionSafetyChecker(config), feature_extractor=CLIPImageProcessor(**size)
    )
    folder = save_text_student(tmp_path / "whole", teacher, guidance_scale=3.0)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    (folder / "prompts.txt").write_text("not for others")
    (folder / "embeddings").mkdir()
    (folder / "embeddings" / "0.safetensors").write_bytes(b"not for others")
    write_card(folder)
    push(folder, api=api)
    assert uploaded(hub, "ada/whole") == files | {"README.md"}
    parts = {name.split("/")[0] for name in files if "/" in name}
    assert parts == {*("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")}
    pipe = OneStepPIDTextToImagePipeline.from_pretrained("ada/whole")
    assert pipe.safety_checker is not None and len(pipe("a red fox").nsfw_content_detected) == 1


def test_a_lora_in_the_format_of_peft_is_uploaded_with_its_configuration(run, tmp_path):
    folder = Path(shutil.copytree(run, tmp_path / "pid-lora"))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert PIPELINE <= repository_files(folder).keys()  # half of it is no LoRA
        (folder / name).write_text("{}")
    names = set(repository_files(folder))
    assert {"adapter_model.safetensors", "adapter_config.json", "scheduler/scheduler_config.json"} <= names
    assert not [name for name in names if name.startswith("unet/") or name == "model_index.json"]


# 2. What can go wrong


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("how", [401, 403, 409, 500, "cut"])
def test_a_push_that_fails_says_why_and_changes_nothing(run, hub, api, hasty, request_, how):
    if (request_, how) == ("create", 409):
        pytest.skip("this is how the Hub says that the repo exists")
    before = content(run)
    failure = hub.fail(REQUESTS[request_], how)
    with pytest.raises(PushFailed) as raised:
        push(run, delays=(1, 1), api=api)
    message = str(raised.value)
    assert f"the Hub answered {how}: " in message if how != "cut" else "httpx" in str(type(raised.value.__cause__))
    assert "\n" not in message and hub.token not in message
    assert failure.count >= (1 if how in (401, 403) else 3)
    assert content(run) == before


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("how", [409, 412, 429, 500, 503, "cut"])
def test_a_failure_that_passes_is_survived(run, hub, api, hasty, request_, how):
    if (request_, how) == ("create", 409):
        pytest.skip("this is how the Hub says that the repo exists")
    failure = hub.fail(REQUESTS[request_], how, times=1)
    push(run, "ada/survivor", delays=(1,), api=api)
    assert failure.count == 1
    assert uploaded(hub, "ada/survivor") == PIPELINE | REPORT


@pytest.mark.parametrize("how", [401, 403])
def test_a_refusal_is_not_tried_again(run, hub, api, hasty, how):
    failure = hub.fail(REQUESTS["create"], how)
    with pytest.raises(PushFailed, match=f"the Hub answered {how}: "):
        push(run, api=api)
    assert failure.count <= 2  # huggingface_hub itself asks whether the repo exists


def test_a_hub_that_cannot_be_reached_is_named(run, hasty):
    with pytest.raises(PushFailed, match="ConnectError"):
        push(run, api=HfApi(endpoint="http://127.0.0.1:9", token="hf_token"))


@pytest.mark.parametrize("name", ["a/b/c", "with space", "ada/what?", "-", "ada/" + "x" * 97])
def test_an_impossible_name_is_an_input_error(run, api, hub, name):
    with pytest.raises(InputError, match="hub_model_id, by default"):
        push(run, name, api=api)
    assert not hub.requests


def test_a_folder_without_a_pipeline_is_an_input_error(tmp_path, api):
    for folder, said in ((tmp_path, "holds no diffusers pipeline"), (tmp_path / "absent", "is no folder")):
        with pytest.raises(InputError, match=said):
            push(folder, api=api)


def test_the_command_that_pushes_later_is_quoted():
    command = push_command("my runs/student", "ada/student", private=True)
    assert shlex.split(command)[2:] == ["my runs/student", "--hub_model_id", "ada/student", "--hub_private_repo"]


def test_a_hub_that_never_answers_is_given_up(run, hub, api, hasty, monkeypatch):
    monkeypatch.setattr("pid_diffusers.hub.push.TIMEOUT", 0.3)
    failure = hub.fail(REQUESTS["commit"], "hang")
    with pytest.raises(PushFailed, match="Timeout"):
        push(run, delays=(1,), api=api)
    assert failure.count == 2


def test_a_private_push_to_a_public_repo_warns(run, hub, api, caplog):
    push(run, "ada/open", api=api)
    push(run, "ada/open", private=True, api=api)
    assert "ada/open was there already and is public" in caplog.text


def test_a_token_that_is_gone_by_the_end_costs_no_run(run, hub, monkeypatch):
    publisher = Publisher(TrainingConfig(teacher="digits", output_dir=str(run), push_to_hub=True).validate())
    monkeypatch.delenv("HF_TOKEN")
    publisher.checkpoint(1)
    said = publisher.finish()
    assert "there is no token for the Hub" in said and f"pid-diffusers push {run}" in said


def test_ctrl_c_during_the_last_push_says_how_to_push_later(run, hub, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    hub.fail(REQUESTS["create"], 503)
    monkeypatch.setattr("time.sleep", interrupted)
    publisher = Publisher(TrainingConfig(teacher="digits", output_dir=str(run), push_to_hub=True).validate())
    said = publisher.finish()
    assert "interrupted" in said and f"pid-diffusers push {run}" in said


@pytest.mark.parametrize(("how", "mend"), [(401, "run 'hf auth login'"), (403, "choose a --hub_model_id")])
def test_a_refusal_says_what_would_mend_it(run, hub, hasty, how, mend):
    hub.fail(REQUESTS["create"], how)
    publisher = Publisher(TrainingConfig(teacher="digits", output_dir=str(run), push_to_hub=True).validate())
    assert mend in publisher.finish()


def test_a_link_to_the_folder_is_pushed_by_its_own_name(run, hub, api, tmp_path):
    (tmp_path / "nice-name").symlink_to(run)
    push(tmp_path / "nice-name", api=api)
    assert 'from_pretrained("ada/nice-name"' in hub.repos["ada/nice-name"].files["README.md"].decode()


# 3. Whole runs


def train(hub, teacher: Path, folder: Path, *flags: str, token: str | None = None, endpoint: str | None = None):
    """Runs `train_pid.py --push_to_hub` in `folder`, with its output in `folder/student`."""
    settings = environment(hub, folder)
    settings["HF_TOKEN"] = hub.token if token is None else token
    settings["HF_ENDPOINT"] = hub.endpoint if endpoint is None else endpoint
    command = [sys.executable, str(ROOT / "train_pid.py"), "--teacher", str(teacher), "--output_dir", "student"]
    command += ["--max_train_steps", "6", "--checkpointing_steps", "1", "--checkpoints_total_limit", "2"]
    command += ["--train_batch_size", "2", "--num_validation_images", "2", "--num_eval_samples", "4"]
    command += ["--eval_classifier", "none", "--push_to_hub", *flags]
    return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)


@pytest.mark.slow
def test_a_run_whose_pushes_fail_in_five_ways_loses_nothing_and_says_how_to_push_later(hub, teacher, tmp_path):
    ways = [("create", 401), ("create", 403), ("card", 500), ("commit", 409), ("commit", "cut")]
    failures = [hub.fail(REQUESTS[request], how, times=1) for request, how in ways]
    failures.append(hub.fail(REQUESTS["commit"], 403))
    result = train(hub, teacher, tmp_path, "--hub_model_id", "ada/late", "--hub_strategy", "every_checkpoint")
    assert result.returncode == 0, result.stderr
    assert [failure.count for failure in failures] == [1] * 6
    assert "Traceback" not in result.stderr + result.stdout
    reasons = re.findall(r"WARNING: step \d could not be pushed \((.*)\); the run goes on", result.stderr)
    statuses = [f"the Hub answered {how}: " for _, how in ways[:4]]
    assert all(reason.startswith(status) for reason, status in zip(reasons, statuses, strict=False))
    assert len(reasons) == 5 and "Error: " in reasons[4]
    assert not uploaded(hub, "ada/late")
    folder = tmp_path / "student"
    assert PIPELINE | REPORT <= {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert (folder / "checkpoint-6").is_dir()

    failures[-1].times = 0
    command = shlex.split(re.search(r"^ +(pid-diffusers push .*)$", result.stdout, re.MULTILINE)[1])
    later = subprocess.run(
        [sys.executable, "-m", "pid_diffusers.cli", *command[1:]],
        cwd=tmp_path,
        env=environment(hub, tmp_path),
        capture_output=True,
        text=True,
    )
    assert later.returncode == 0, later.stderr
    assert later.stdout == f"Pushed to {hub.endpoint}/ada/late\n"
    assert uploaded(hub, "ada/late") == PIPELINE | REPORT
    said = [result.stdout, result.stderr, later.stdout, later.stderr]
    written = [path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file()]
    assert not [text for text in said + written if hub.token in text]


@pytest.mark.slow
def test_every_checkpoint_is_a_commit_of_a_whole_repo(hub, teacher, tmp_path):
    result = train(hub, teacher, tmp_path, "--hub_strategy", "every_checkpoint", "--hub_private_repo")
    assert result.returncode == 0, result.stderr
    repo = hub.repos["ada/student"]
    assert "Will be pushed to ada/student, logged in as ada" in result.stdout
    assert f"Pushed to {hub.endpoint}/ada/student" in result.stdout
    assert repo.private
    pushes = [commit for commit in repo.commits if "README.md" in commit.paths]
    assert len(pushes) == 6
    assert PIPELINE <= set(pushes[0].paths)
    assert uploaded(hub, "ada/student") == PIPELINE | REPORT


@pytest.mark.slow
@pytest.mark.parametrize("how", ["no network", 401, 403, 409, 500, "cut"])
def test_a_run_whose_only_push_fails_ends_well(hub, teacher, tmp_path, how):
    if how != "no network":
        hub.fail("/api/models/.*/commit/", how)
    result = train(hub, teacher, tmp_path, endpoint="http://127.0.0.1:9" if how == "no network" else None)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "The push to the Hub failed" in result.stdout and "pid-diffusers push student\n" in result.stdout
    assert PIPELINE | REPORT <= {
        p.relative_to(tmp_path / "student").as_posix() for p in (tmp_path / "student").rglob("*")
    }


def test_a_run_without_a_token_does_not_start(hub, teacher, tmp_path):
    result = train(hub, teacher, tmp_path, token="")
    assert result.returncode == 2
    assert "there is no token for the Hub; run 'hf auth login', or set HF_TOKEN." in result.stderr
    assert not (tmp_path / "student").exists() and not hub.requests


@pytest.mark.slow
def test_a_token_that_the_hub_refuses_is_told_before_the_run(hub, teacher, tmp_path):
    result = train(hub, teacher, tmp_path, token="hf_" + "x" * 34)
    assert result.returncode == 0
    assert "WARNING: nothing could be pushed to the Hub by now (the Hub answered 401" in result.stderr
    assert "The push to the Hub failed (the Hub answered 401" in result.stdout
