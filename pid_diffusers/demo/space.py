"""Writes a Hugging Face Space: the page, the package and the model in one folder that needs nothing else of ours."""

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path

import yaml
from packaging.requirements import Requirement

import pid_diffusers
from pid_diffusers import pipelines

from ..denoisers.base import BUILT_IN
from ..errors import InputError
from .model import DemoModel, model_card, name_or_folder

# what loading a student and showing it needs of what the package requires
REQUIRED = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pyyaml",
)

APP = '''\
"""Shows a student of Physics Informed Distillation."""

from pathlib import Path

from pid_diffusers.demo import launch

HERE = Path(__file__).parent
MODEL = {model}
TEACHER = {teacher}

if __name__ == "__main__":
    launch(MODEL, teacher=TEACHER, host=None, title={title!r}, other_models=False)
'''

README = """\
---
{metadata}---

# {title}

A diffusion model distilled to one network call by Physics Informed Distillation: the page draws images, every other
point of the trajectory x(z, t), and what the teacher makes of the same noise.

It runs on a machine without a GPU, or `pip install -r requirements.txt && python app.py` on your own. The package
`pid_diffusers` is part of this folder.
"""


def write_space(
    model: str | Path, folder: str | Path, teacher: str | Path | None = None, title: str | None = None
) -> Path:
    """
    Writes a folder that is a whole Hugging Face Space. A local model and a local teacher are copied into it, those on
    the Hub are loaded from there when the Space starts.

    Args:
        model (`str` or `Path`): a student's folder or Hub id, or `"digits"` for the one that comes with this package.
        folder (`str` or `Path`): where to write; made if it is absent.
        teacher (`str` or `Path`, *optional*): to compare with; by default as
            [`~pid_diffusers.demo.DemoModel.load`] finds it.
        title (`str`, *optional*): of the Space and its page; by default the model's name.

    Returns:
        `Path`: the folder.

    Raises:
        InputError: before anything is written, if gradio is missing, the model or the teacher does not load, or
            `folder` is a file or not empty.
    """
    try:
        gradio_version = importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError as error:
        raise InputError("the demo needs gradio; pip install -e '.[demo]'") from error
    folder = Path(folder)
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"folder is {str(folder)!r}, which is a file or not empty; pass a new or an empty folder.")
    model = name_or_folder(model)
    loaded = DemoModel.load(model, teacher)
    title = title or loaded.name
    names = {"model": model, "teacher": loaded.teacher_name}

    folder.mkdir(parents=True, exist_ok=True)
    _copy_package(folder / "pid_diffusers", keep_assets=loaded.teacher_name in BUILT_IN)
    places = {}
    for role, name in names.items():
        local = name is not None and name not in BUILT_IN and Path(name).is_dir()
        places[role] = f'HERE / "{role}"' if local else repr(name)
        if local:
            _copy_pipeline(Path(name), folder / role)
    app = APP.format(**places, title=title)
    (folder / "app.py").write_text(app, encoding="utf-8")
    (folder / "requirements.txt").write_text(_requirements(loaded, gradio_version), encoding="utf-8")

    hub_ids = [name for role, name in names.items() if places[role] == repr(name) and name and name not in BUILT_IN]
    card = model_card(model)
    if not card.get("license") and loaded.teacher_name in BUILT_IN:
        card = {"license": "apache-2.0"}  # the package's own
    metadata = {
        "title": title,
        "emoji": "🎯",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": gradio_version,
        "python_version": f"{sys.version_info.major}.{sys.version_info.minor}",
        "app_file": "app.py",
        "pinned": False,
        **{key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)},
        **({"models": hub_ids} if hub_ids else {}),
        "short_description": "One network call makes an image",
    }
    text = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    (folder / "README.md").write_text(README.format(metadata=text, title=title), encoding="utf-8")
    return folder


def _copy_package(target: Path, keep_assets: bool):
    """The sources of this package, wherever its parts lie, without what only training reads."""
    left_out = ("__pycache__", "presets", "*-student" if keep_assets else "assets")
    ignore = shutil.ignore_patterns(*left_out)
    shutil.copytree(pid_diffusers.__path__[0], target, ignore=ignore)
    shutil.copytree(pipelines.__path__[0], target / "pipelines", ignore=ignore, dirs_exist_ok=True)


def _copy_pipeline(source: Path, target: Path):
    """What loading a pipeline reads: its index and the folders of its components, without where they came from."""
    target.mkdir()
    index = json.loads((source / "model_index.json").read_text(encoding="utf-8"))
    for path in [source / "model_index.json", *(source / name for name in index if not name.startswith("_"))]:
        if path.is_dir():
            shutil.copytree(path, target / path.name, ignore=shutil.ignore_patterns("__pycache__", "*.py"))
        elif path.is_file():
            shutil.copyfile(path, target / path.name)
    for path in target.rglob("*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)  # a path of the machine that it was trained on
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _requirements(loaded: DemoModel, gradio_version: str) -> str:
    libraries = {value[0] for value in loaded.pipe.config.values() if isinstance(value, (list, tuple))}
    wanted = {*REQUIRED, *(libraries & {"transformers"})}
    installed = map(Requirement, importlib.metadata.requires("pid_diffusers"))
    lines = [str(r) for r in installed if r.name.lower().replace("-", "_") in wanted and r.marker is None]
    return "\n".join([*lines, f"gradio=={gradio_version}"]) + "\n"
