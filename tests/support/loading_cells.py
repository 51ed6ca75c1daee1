"""Runs cells of the loading matrix in an interpreter of its own: python loading_cells.py < cells.json > results.json

Nothing here imports pid_diffusers unless a cell says so: some of these interpreters do not have it.
"""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import HfApi

SEED = 0
CLASS_LABELS = [1, 2]


def digest(pipe) -> str:
    """A number for the exact bits of the images that a pipeline makes from `SEED`."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(SEED)
    images = pipe(class_labels=CLASS_LABELS, generator=generator, output_type="latent").images
    return hashlib.sha256(images.float().numpy().tobytes()).hexdigest()


def load(cell: dict):
    """The pipeline that a cell loads."""
    kwargs = dict(cell.get("kwargs", {}))
    if "dtype" in kwargs:
        kwargs["dtype"] = getattr(torch, kwargs["dtype"])
    if cell["loader"] == "OneStepPIDPipeline":
        from pid_diffusers import OneStepPIDPipeline

        return OneStepPIDPipeline.from_pretrained(cell["model"], **kwargs)
    return DiffusionPipeline.from_pretrained(cell["model"], **kwargs)


def run(cell: dict) -> dict:
    """What came of a cell: the digest of its images and where its class came from, or the error."""
    try:
        pipe = load(cell)
        if "save_to" in cell:
            pipe.save_pretrained(cell["save_to"])
        if "push_to" in cell:
            api = HfApi()
            api.create_repo(cell["push_to"])
            api.upload_folder(repo_id=cell["push_to"], folder_path=cell["save_to"])
        return {"digest": digest(pipe), "module": type(pipe).__module__}
    except Exception as error:
        return {"error": str(error), "type": type(error).__name__}


def main():
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    job = json.load(sys.stdin)
    if job["package"] == "absent":
        assert importlib.util.find_spec("pid_diffusers") is None
    if job["package"] == "imported":
        import pid_diffusers  # noqa: F401
    else:
        assert "pid_diffusers" not in sys.modules
    results = {cell["name"]: run(cell) for cell in job["cells"]}
    Path(job["results"]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
