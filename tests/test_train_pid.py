"""The script itself, in processes of its own."""

import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def arguments(tiny_unet, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    unet = tiny_unet(in_channels=1, out_channels=1, num_class_embeds=10)
    ConsistencyModelPipeline(unet, EDMEulerScheduler()).save_pretrained(folder)
    return [
        *("--teacher", str(folder), "--max_train_steps", "60", "--train_batch_size", "4"),
        *("--checkpointing_steps", "3", "--checkpoints_total_limit", "2", "--validation_steps", "20"),
        *("--num_eval_samples", "8", "--eval_classifier", "digits", "--logging_steps", "1", "--report_to", "none"),
    ]


def command(launcher, arguments, output_dir, *more):
    return [*launcher, str(ROOT / "train_pid.py"), *arguments, "--output_dir", str(output_dir), *more]


PYTHON = [sys.executable]
ACCELERATE = [str(Path(sys.executable).with_name("accelerate")), "launch"]


def start(words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(words, env=environment, **options)


def weights(folder):
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert path.exists(), process.communicate()[0]


@pytest.fixture(scope="module")
def straight(arguments, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    process = start(command(PYTHON, arguments, folder))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    return folder, output


def test_a_run_prints_its_figures_and_writes_every_file(straight):
    folder, output = straight
    for text in ("loss=", "lr=", "step/s", "rms distance per pixel", "8 seeds never trained on", "reads as asked"):
        assert text in output
    assert "35 Heun steps" in output
    for name in ("samples.png", "trajectory.png", "loss.png", "results.json", "metrics.jsonl", "config.yaml"):
        assert (folder / name).stat().st_size > 0


def test_the_printed_lines_generate_ten_images(straight):
    folder, output = straight
    lines = [line.strip() for line in output.splitlines()[-3:]]
    script = "\n".join([*lines, "print(len(images), images[0].size)"])
    assert subprocess.check_output([sys.executable, "-c", script], text=True).split("\n")[-2] == "10 (8, 8)"


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_bits(arguments, straight, tmp_path):
    folder, moments = tmp_path / "killed", random.Random(0)
    for step in (6, 21, 45):
        process = start(command(PYTHON, arguments, folder, "--resume_from_checkpoint", "latest"))
        # the first checkpoint of which it is known that it is there, then anywhere in the steps after it
        wait_for(folder / f"checkpoint-{step}", process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        process.communicate()
    assert not (folder / "model_index.json").exists()
    process = start(command(PYTHON, arguments, folder, "--resume_from_checkpoint", "latest"))
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "Continuing from" in output
    expected, resumed = weights(straight[0]), weights(folder)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    assert (folder / "metrics.jsonl").read_text().count("\n") == 60


RARE = [pytest.param(f"SIGTERM to the {receiver}", marks=pytest.mark.slow) for receiver in ("launcher", "group")]


@pytest.mark.parametrize("how", ["Ctrl-C", *RARE])
def test_ending_the_launcher_leaves_a_checkpoint(arguments, tmp_path, how):
    folder = tmp_path / "ended"
    process = start(command(ACCELERATE, [*arguments, "--max_train_steps", "100000"], folder))
    wait_for(folder / "checkpoint-3", process)
    if how == "SIGTERM to the launcher":
        process.send_signal(signal.SIGTERM)
    else:  # as a terminal and a job scheduler do: launcher and script alike
        os.killpg(process.pid, signal.SIGINT if how == "Ctrl-C" else signal.SIGTERM)
    output = process.communicate(timeout=60)[0]  # until the script has closed its output, too
    name = "SIGINT" if how == "Ctrl-C" else "SIGTERM"
    assert f"{name}: stopped after step" in output
    path = folder / f"checkpoint-{output.split('stopped after step ')[1].split(',')[0]}"
    assert f"checkpoint in {path}" in output
    assert (path / "trainer_state.json").exists()


@pytest.mark.slow
def test_two_processes_train_and_resume_to_the_same_bits(arguments, tmp_path):
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", "2"]
    arguments = [*arguments, "--max_train_steps", "8", "--checkpointing_steps", "4"]
    straight, stopped, resumed = (tmp_path / name for name in ("straight", "stopped", "resumed"))
    runs = [
        command(torchrun, arguments, straight),
        command(torchrun, [*arguments, "--max_train_steps", "4"], stopped),
        command(torchrun, arguments, resumed, "--resume_from_checkpoint", str(stopped / "checkpoint-4")),
    ]
    for words in runs:
        process = start(words, ACCELERATE_USE_CPU="true")
        output = process.communicate()[0]
        assert process.returncode == 0, output
        assert "2 process(es)" in output
    expected, actual = weights(straight), weights(resumed)
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


@pytest.mark.slow
def test_two_processes_on_a_full_disk_come_to_an_end(arguments, tmp_path):
    # no file can grow beyond 20 blocks of 1024 bytes, less than a checkpoint needs
    words = ["torchrun", "--standalone", "--nproc_per_node", "2", str(ROOT / "train_pid.py"), *arguments]
    words += ["--max_train_steps", "6", "--output_dir", str(tmp_path / "run")]
    script = f"ulimit -f 20; PATH={Path(sys.executable).parent}:$PATH; {shlex.join(words)}"
    process = start(["bash", "-c", script], ACCELERATE_USE_CPU="true")
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "the checkpoint of step 3 could not be written" in output
    assert "the pipeline could not be saved" in output


def test_bad_input_ends_with_one_sentence(tmp_path):
    process = start(command(PYTHON, ["--scheme", "downwind"], tmp_path / "run"))
    output = process.communicate()[0]
    assert process.returncode == 2
    expected = "train_pid.py: error: scheme is 'downwind'; choose one of upwind, midpoint, central."
    assert output.strip().splitlines()[-1] == expected
    assert "Traceback" not in output
