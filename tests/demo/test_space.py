import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import gradio
import httpx
import pytest
import yaml
from hub_server import HubServer
from huggingface_hub import HfApi

import pid_diffusers
from pid_diffusers import InputError
from pid_diffusers.demo import write_space


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run's output folder, with what a Space has no use for, and a teacher that lies elsewhere."""
    run = tmp_path_factory.mktemp("run") / "my-student"
    shutil.copytree(folders / "student", run)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.bin").write_bytes(b"0" * 100)
    (run / "logs").mkdir()
    (run / "README.md").write_text("---\nlicense: mit\n---\n")
    config = run / "unet" / "config.json"
    config.write_text(config.read_text().replace("{", f'{{"_name_or_path": "{folders}/teacher/unet",', 1))
    return run


@pytest.fixture(scope="module")
def space(run, tmp_path_factory):
    return write_space(run, tmp_path_factory.mktemp("space") / "new" / "space")


@pytest.fixture(scope="module")
def served(space, python_without_package, tmp_path_factory):
    """The Space's address, served from its own folder by an interpreter that does not have this package."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": "", "GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    log = tmp_path_factory.mktemp("log") / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [python_without_package, "app.py"], cwd=space, env=environment, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 60
        while not _answers(f"http://127.0.0.1:{port}/"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait()


def _answers(address):
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def front_matter(space):
    return yaml.safe_load((space / "README.md").read_text().split("---")[1])


@pytest.mark.slow
def test_a_space_serves_its_page_without_the_package_installed(served, browser):
    page = browser.new_page()
    page.goto(served)
    page.wait_for_selector('#pid-pictures img[alt^="Student, class 0, seed 0"]')
    assert page.inner_text("h1") == "my-student"
    page.click("#pid-compare-button")
    page.wait_for_selector('#pid-pictures img[alt^="Teacher, class 0, seed 0"]')
    assert page.locator("#pid-other").count() == 0  # nobody can open other folders of the machine
    page.close()


def test_a_space_names_no_path_of_this_machine(space, run, folders):
    paths = [str(p) for p in (run.parent, folders, Path(pid_diffusers.__file__).parents[1], Path.home(), space)]
    for path in (p for p in space.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert not [p for p in paths if len(p) > 1 and p.encode() in content], path


def test_a_space_holds_what_it_needs_and_nothing_else(space):
    assert {p.name for p in space.iterdir()} == {
        *("app.py", "requirements.txt", "README.md", "pid_diffusers", "model", "teacher")
    }
    assert {p.name for p in (space / "model").iterdir()} == {"model_index.json", "unet", "scheduler"}
    assert not (space / "pid_diffusers" / "assets").exists()
    assert (space / "pid_diffusers" / "pipelines" / "pipeline_one_step_pid.py").is_file()
    assert not [p for p in space.rglob("*") if "__pycache__" in p.parts and "pid_diffusers" not in p.parts]


def test_the_readme_has_the_metadata_of_a_space(space):
    metadata = front_matter(space)
    assert metadata["sdk"] == "gradio" and metadata["sdk_version"] == gradio.__version__
    assert (space / metadata["app_file"]).is_file()
    assert metadata["title"] == "my-student" and metadata["license"] == "mit" and metadata["pinned"] is False
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {metadata["colorFrom"], metadata["colorTo"]} <= colors and len(metadata["short_description"]) <= 60
    assert re.fullmatch(r"3\.\d+", metadata["python_version"]) and "models" not in metadata


def test_the_requirements_are_those_of_the_page(space):
    lines = (space / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[\w-]+", line)[0] for line in lines}
    libraries = {"torch", "diffusers", "transformers", "accelerate", "huggingface_hub", "peft", "safetensors"}
    assert names == {*libraries, "numpy", "pyyaml", "gradio"}
    assert "diffusers<0.43,>=0.42" in lines or "diffusers>=0.42,<0.43" in lines


def test_the_built_in_teacher_comes_with_the_package(tiny_unet, tmp_path):
    from pid_diffusers import OneStepPIDPipeline, PIDScheduler

    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    OneStepPIDPipeline(unet, PIDScheduler()).save_pretrained(tmp_path / "digits")
    (tmp_path / "digits" / "config.yaml").write_text("teacher: digits\n")
    space = write_space(tmp_path / "digits", tmp_path / "space", title='A "title": it\'s mine')
    assert (space / "pid_diffusers" / "assets" / "digits-teacher" / "model_index.json").is_file()
    app = (space / "app.py").read_text()
    assert "TEACHER = 'digits'" in app and not (space / "teacher").exists()
    compile(app, "app.py", "exec")
    assert front_matter(space)["title"] == 'A "title": it\'s mine'
    assert front_matter(space)["license"] == "apache-2.0"


def test_a_folder_in_use_or_a_wrong_model_is_named_and_nothing_is_written(run, space, tmp_path):
    with pytest.raises(InputError, match="not empty; pass a new or an empty folder"):
        write_space(run, space)
    with pytest.raises(InputError, match="is a file or not empty"):
        write_space(run, space / "app.py")
    with pytest.raises(InputError, match="model is '/no/such'"):
        write_space("/no/such", tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_a_model_and_a_teacher_on_the_hub_are_loaded_from_there(folders, tmp_path):
    with HubServer() as hub:
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        for name in ("student", "teacher"):
            api.create_repo(f"ada/{name}")
            api.upload_folder(repo_id=f"ada/{name}", folder_path=folders / name, ignore_patterns=["config.yaml"])
        card = b"---\nlicense: mit\nbase_model: ada/teacher\n---\n"
        api.upload_file(repo_id="ada/student", path_or_fileobj=card, path_in_repo="README.md")
        run_as_visitor = {
            "env": {**os.environ, **hub.environment(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
            "capture_output": True,
            "text": True,
        }
        code = (
            "from pid_diffusers import InputError; from pid_diffusers.demo import DemoModel, Sample, write_space;"
            "model = DemoModel.load('ada/student'); print(model.name, model.teacher_name);"
            "model.compare(Sample(label=0), 2); write_space('ada/student', 'space')\n"
            "try: DemoModel.load('ada/nothing')\n"
            "except InputError as error: print(error)"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, **run_as_visitor)
    assert result.returncode == 0, result.stderr
    named, refused = result.stdout.splitlines()
    assert named == "ada/student ada/teacher" and refused.startswith("model is 'ada/nothing', which is neither")
    space = tmp_path / "space"
    assert "MODEL = 'ada/student'\nTEACHER = 'ada/teacher'\n" in (space / "app.py").read_text()
    assert not (space / "model").exists() and not (space / "teacher").exists()
    assert front_matter(space)["models"] == ["ada/student", "ada/teacher"]
    assert front_matter(space)["license"] == "mit"
