"""The loading matrix: who can load what is saved, from where, and what the others are told."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler
from hub_server import HubServer
from huggingface_hub import HfApi
from loading_cells import digest

import pid_diffusers.pipelines
from pid_diffusers import OneStepPIDPipeline, PIDScheduler
from pid_diffusers.training import Trainer, TrainingConfig

CELLS = Path(__file__).parent.parent / "support" / "loading_cells.py"
PIPELINE_FILE = str(Path(pid_diffusers.pipelines.__file__).parent / "pipeline_one_step_pid.py")

PACKAGES = ("imported", "installed", "absent")
SOURCES = ("trained", "saved", "resaved")
PLACES = ("folder", "Hub")
# how it is loaded: the class, what is passed as custom_pipeline, whether code is trusted
LOADERS = {
    "DiffusionPipeline": ("DiffusionPipeline", None, False),
    "DiffusionPipeline, trusted": ("DiffusionPipeline", None, True),
    "custom_pipeline=repo": ("DiffusionPipeline", "repo", False),
    "custom_pipeline=repo, trusted": ("DiffusionPipeline", "repo", True),
    "custom_pipeline=file": ("DiffusionPipeline", "file", False),
    "custom_pipeline=file, trusted": ("DiffusionPipeline", "file", True),
    # last, since it imports the package where that is only installed
    "OneStepPIDPipeline": ("OneStepPIDPipeline", None, False),
}
FORMATS = {
    "variant": {"variant": "fp16", "dtype": "float16"},
    "dtype": {"dtype": "bfloat16"},
    "safetensors": {"use_safetensors": True},
}


def expected_error(package: str, loader: str) -> str | None:
    """What a cell says instead of loading; `None` if it loads."""
    name, custom_pipeline, trusted = LOADERS[loader]
    if name == "OneStepPIDPipeline":
        return "No module named 'pid_diffusers'" if package == "absent" else None
    if trusted or package == "imported" and custom_pipeline is None:
        return None
    return "Pass `trust_remote_code=True`"


def kwargs_of(loader: str, model: str) -> dict:
    _, custom_pipeline, trusted = LOADERS[loader]
    kwargs = {"trust_remote_code": True} if trusted else {}
    if custom_pipeline is not None:
        kwargs["custom_pipeline"] = model if custom_pipeline == "repo" else PIPELINE_FILE
    return kwargs


@pytest.fixture(scope="module")
def models(tiny_unet, tmp_path_factory):
    """Folders `trained`, `saved` (also as a variant) and `hostile`, the same on a Hub, and the images they make."""
    folder = tmp_path_factory.mktemp("models")
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    ConsistencyModelPipeline(unet, EDMEulerScheduler()).save_pretrained(folder / "teacher")
    settings = {"teacher": str(folder / "teacher"), "output_dir": str(folder / "trained"), "report_to": "none"}
    trainer = Trainer(TrainingConfig(**settings, max_train_steps=2, train_batch_size=2, seed=3).validate())
    student = trainer.train().student
    pipe = OneStepPIDPipeline(student.unet, student.scheduler)
    pipe.save_pretrained(folder / "saved")
    digests = {None: digest(pipe)}
    for dtype, variant in (("float16", "fp16"), ("bfloat16", None)):
        half = OneStepPIDPipeline.from_pretrained(folder / "saved").to(getattr(torch, dtype))
        digests[dtype] = digest(half)
        if variant:
            half.save_pretrained(folder / "saved", variant=variant)
    # repositories whose code leaves a mark when it is run
    for name in ("hostile", "trusted"):
        shutil.copytree(folder / "saved", folder / name)
        for file in ("pipeline.py", "scheduler/pid_diffusers.py"):
            path = folder / name / file
            path.write_text(f"open({str(folder / name)!r} + ' was run', 'w').close()\n{path.read_text()}")
    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for name in ("trained", "saved", "hostile", "trusted"):
            api.create_repo(f"ada/{name}")
            api.upload_folder(repo_id=f"ada/{name}", folder_path=folder / name, ignore_patterns=["checkpoint-*"])
        yield {"folder": folder, "hub": hub, "digests": digests}


def locate(models: dict, source: str, place: str, package: str) -> str:
    name = f"resaved-{package}" if source == "resaved" else source
    return str(models["folder"] / name) if place == "folder" else f"ada/{name}"


def list_cells(models: dict, package: str) -> list[dict]:
    trusted = {"trust_remote_code": True} if package != "imported" else {}
    once, twice = models["folder"] / f"resaved-once-{package}", models["folder"] / f"resaved-{package}"
    again = {"loader": "DiffusionPipeline", "kwargs": trusted}
    cells = [
        {**again, "name": "resave", "model": str(models["folder"] / "trained"), "save_to": str(once)},
        {**again, "name": "resave again", "model": str(once), "save_to": str(twice), "push_to": f"ada/{twice.name}"},
    ]
    for loader, (loader_class, _, _) in LOADERS.items():
        for place in PLACES:
            for source in (*SOURCES, "hostile"):
                model = locate(models, source, place, package)
                cell = {"name": f"{source}, {place}, {loader}", "model": model, "loader": loader_class}
                if source != "hostile" or "trusted" not in loader:
                    cells.append({**cell, "kwargs": kwargs_of(loader, model)})
            model = locate(models, "saved", place, package)
            for name, kwargs in FORMATS.items():
                cell = {"name": f"{name}, {place}, {loader}", "model": model, "loader": loader_class}
                cells.append({**cell, "kwargs": {**kwargs_of(loader, model), **kwargs}})
    cells.insert(0, {**again, "name": "trusted", "model": str(models["folder"] / "trusted")})
    return cells


@pytest.fixture(scope="module")
def results(models, python_without_package):
    """What came of every cell, by package and name; the interpreters run beside each other."""
    running = {}
    for package in PACKAGES:
        path = models["folder"] / f"{package}.json"
        job = {"package": package, "cells": list_cells(models, package), "results": str(path)}
        environment = {**os.environ, **models["hub"].environment(models["folder"] / f"home-{package}")}
        running[package] = (
            path,
            subprocess.Popen(
                [python_without_package if package == "absent" else sys.executable, str(CELLS)],
                env={**environment, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"},
                cwd=models["folder"],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ),
        )
        running[package][1].stdin.write(json.dumps(job))
        running[package][1].stdin.close()
    found = {}
    for package, (path, process) in running.items():
        errors = process.stderr.read()
        assert process.wait() == 0, errors
        found[package] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("source", SOURCES)
def test_a_cell_makes_the_same_images_or_says_what_is_missing(models, results, source, place, package, loader):
    result = results[package][f"{source}, {place}, {loader}"]
    error = expected_error(package, loader)
    if error is None:
        assert result.get("digest") == models["digests"][None], result
    else:
        assert error in result["error"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("place", PLACES)
def test_variants_types_and_safetensors_load_in_every_cell_that_loads(models, results, place, package, name):
    for loader in LOADERS:
        result, error = results[package][f"{name}, {place}, {loader}"], expected_error(package, loader)
        if error is None:
            assert result.get("digest") == models["digests"][FORMATS[name].get("dtype")], (loader, result)
        else:
            assert error in result["error"], loader


def test_code_of_a_repository_is_not_run_unless_it_is_trusted(models, results):
    untrusted = [name for name in LOADERS if "trusted" not in name]
    for package in PACKAGES:
        assert "digest" in results[package]["trusted"]
        ran = [f"hostile, {place}, {loader}" for place in PLACES for loader in untrusted]
        assert set(ran) <= set(results[package])
    assert (models["folder"] / "trusted was run").exists()
    assert not (models["folder"] / "hostile was run").exists()


def test_trusted_code_is_run_only_where_the_package_is_not_imported(results):
    modules = {package: results[package]["saved, Hub, DiffusionPipeline, trusted"]["module"] for package in PACKAGES}
    assert modules["imported"].startswith("pid_diffusers.")
    assert modules["installed"].startswith("diffusers_modules.")
    assert modules["absent"].startswith("diffusers_modules.")


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_saved_again_holds_the_same_files_and_no_path(models, results, package):
    again, saved = models["folder"] / f"resaved-{package}", models["folder"] / "trained"
    files = ["model_index.json", "pipeline.py", "scheduler/pid_diffusers.py", "scheduler/scheduler_config.json"]
    for file in files:
        assert (again / file).read_text() == (saved / file).read_text()
    assert sorted(p.name for p in (again / "unet").iterdir()) == sorted(p.name for p in (saved / "unet").iterdir())
    assert str(models["folder"]) not in (again / "model_index.json").read_text()


def test_the_repository_holds_no_pickle(models):
    files = [path for name in ("trained", "saved") for path in (models["folder"] / name).rglob("*")]
    assert not [
        path for path in files if path.suffix in (".bin", ".pt", ".pth", ".pkl") and "checkpoint" not in str(path)
    ]


def test_a_pipeline_keeps_its_own_source_when_another_folder_is_loaded(models, tmp_path):
    load = {"trust_remote_code": True, "custom_pipeline": str(models["folder"] / "saved")}
    pipe = DiffusionPipeline.from_pretrained(models["folder"] / "saved", **load)
    other = tmp_path / "other"
    shutil.copytree(models["folder"] / "saved", other)
    (other / "pipeline.py").write_text((other / "pipeline.py").read_text() + "\n# another one\n")
    DiffusionPipeline.from_pretrained(other, trust_remote_code=True, custom_pipeline=str(other))
    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline.py").read_text() == (models["folder"] / "saved" / "pipeline.py").read_text()


def test_a_subclass_is_saved_by_its_own_name(tiny_unet, tmp_path):
    class MyPipeline(OneStepPIDPipeline):
        pass

    MyPipeline(tiny_unet(), PIDScheduler()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "MyPipeline"
    assert not (tmp_path / "pipeline.py").exists()


def test_a_folder_of_an_earlier_version_still_loads(models, tmp_path):
    shutil.copytree(models["folder"] / "saved", tmp_path / "old")
    index = json.loads((tmp_path / "old" / "model_index.json").read_text())
    index["_class_name"] = "OneStepPIDPipeline"
    (tmp_path / "old" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "old" / "pipeline.py").unlink()
    (tmp_path / "old" / "scheduler" / "pid_diffusers.py").unlink()
    assert digest(DiffusionPipeline.from_pretrained(tmp_path / "old")) == models["digests"][None]
