"""Checkpoints of others as --teacher."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pid_diffusers import Denoiser, InputError
from pid_diffusers.converters import open_teacher

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp_cond", "ncsnpp_uncond"])
def test_an_edm_pickle_is_distilled_from_the_command_line(write_edm_pickle, tmp_path, name):
    write_edm_pickle(tmp_path / "network-snapshot.pkl", name)
    command = [
        sys.executable,
        str(ROOT / "train_pid.py"),
        "--teacher",
        "network-snapshot.pkl",
        "--output_dir",
        "student",
    ]
    command += ["--max_train_steps", "2", "--train_batch_size", "2", "--num_validation_images", "2"]
    command += [
        "--num_eval_samples",
        "2",
        "--eval_batch_size",
        "2",
        "--eval_classifier",
        "none",
        "--report_to",
        "none",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Found:" in result.stdout and "SongUNet" in result.stdout
    assert "EDMDenoiser that predicts EDM's mixture" in result.stdout
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert results["teacher"]["name"] == "network-snapshot.pkl"
    card = (tmp_path / "student" / "README.md").read_text()
    assert "license: cc-by-nc-sa-4.0" in card and "--teacher network-snapshot.pkl" in card


def test_what_diffusers_can_load_stays_as_it_is(tmp_path):
    for teacher in ("digits", "ada/teacher", str(tmp_path)):
        with open_teacher(teacher) as opened:
            assert opened == (teacher, None)


def test_a_converted_teacher_is_gone_afterwards(write_edm_pickle, tmp_path):
    path = write_edm_pickle(tmp_path / "edm.pkl")
    with open_teacher(str(path)) as (folder, found):
        assert Denoiser.from_pretrained(folder).num_classes == 10
        assert "374,979 parameters" in found and folder not in found
    assert not Path(folder).exists()


def test_a_file_that_is_no_checkpoint_is_named_as_the_teacher(tmp_path):
    (tmp_path / "notes.pt").write_text("not a checkpoint")
    with pytest.raises(InputError, match="^teacher is .*notes.pt"), open_teacher(str(tmp_path / "notes.pt")):
        pass
