import shutil
from pathlib import Path

import pytest
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from text_students import save_text_student
from tiny_text import tiny_sd

from pid_diffusers import OneStepPIDPipeline, PIDScheduler


@pytest.fixture(scope="session")
def folders(tiny_unet, tmp_path_factory) -> Path:
    """`student` and `teacher` of ten classes; `plain`, an unconditional student in gray whose teacher is unknown."""
    folder = tmp_path_factory.mktemp("demo")
    scheduler = PIDScheduler(prediction_type="edm")
    OneStepPIDPipeline(tiny_unet(seed=1, num_class_embeds=10), scheduler).save_pretrained(folder / "student")
    ConsistencyModelPipeline(tiny_unet(num_class_embeds=10), EDMEulerScheduler()).save_pretrained(folder / "teacher")
    (folder / "student" / "config.yaml").write_text(f"teacher: {folder / 'teacher'}\nseed: 0\n")
    OneStepPIDPipeline(tiny_unet(in_channels=1, out_channels=1), scheduler).save_pretrained(folder / "plain")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """A student that is told a text."""
    return save_text_student(tmp_path_factory.mktemp("demo-text") / "words", tiny_sd(), guidance_scale=3.0)


@pytest.fixture(scope="session")
def browser():
    """Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()
