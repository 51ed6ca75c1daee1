"""An evaluation gives the same figures however it is cut into batches, processes and attempts."""

import dataclasses
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from PIL import Image
from safetensors.torch import load_file
from tiny_text import tiny_conditional_unet, tiny_sd
from tqdm import tqdm

from pid_diffusers import InputError, OneStepPIDPipeline, OneStepPIDTextToImagePipeline, PIDScheduler
from pid_diffusers.cli import main
from pid_diffusers.evaluation.config import METRICS, EvaluationConfig
from pid_diffusers.evaluation.digits import load_digits
from pid_diffusers.evaluation.evaluate import evaluate
from pid_diffusers.evaluation.generate import Samples, load_model, model_digest
from pid_diffusers.evaluation.metrics import Gaussian, frechet_distance

OWN = """
import os
import torch

class Pixels(torch.nn.Module):
    '''Four areas of the first channel; a fifth gives the sixth, so that there are logits.'''
    def forward(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images[:, :1].float() / 255, 2).flatten(1)
        return x, 9 * x

class Stops(Pixels):
    '''Interrupts an evaluation of 80 reference images after the first 64 samples, while there is a file "stop".'''
    def __init__(self):
        super().__init__()
        self.calls = 0
    def forward(self, images):
        self.calls += 1
        if self.calls == 5 and os.path.exists("stop"):
            raise RuntimeError("stopped")
        return super().forward(images)

class Words(torch.nn.Module):
    '''Colours, and the same of the number of letters in a prompt.'''
    def forward(self, images):
        return images.float().mean(dim=(2, 3)) / 255
    def text_features(self, prompts):
        return torch.tensor([[len(prompt), 1.0, 1.0] for prompt in prompts])
"""


@pytest.fixture(autouse=True)
def own_extractors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mine.py").write_text(OWN)
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def student(tiny_unet):
    """A student with random weights: 3 × 8 × 8, ten classes."""
    pipeline = OneStepPIDPipeline(tiny_unet(num_class_embeds=10), PIDScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def settings():
    """80 noisy RGB images as the reference, and an evaluation of 100 samples."""
    Path("real").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(80, 8, 8, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(f"real/{number}.png")

    def create(**changes):
        values = {"model": "tiny", "reference": "real", "num_samples": 100, "extractor": "mine:Pixels"}
        return EvaluationConfig(**{**values, "output": "results.json", **changes})

    return create


def figures(results):
    return {name: results[name] for name in METRICS}


def test_results_have_every_metric_beside_the_protocol(student, settings):
    results = evaluate(settings(repeats=3, seed=5), student)
    assert json.loads(Path("results.json").read_text()) == results
    assert [name for name in METRICS if results[name] is None] == ["clip_score"] == list(results["reasons"])
    assert [repeat["seeds"] for repeat in results["repeats"]] == [[5, 104], [105, 204], [205, 304]]
    for name, best in (("fid", min), ("kid", min), ("precision", max), ("inception_score", max)):
        values = [repeat[name] for repeat in results["repeats"]]
        assert len(set(values)) > 1 or name == "precision"
        assert results[name] == best(values)
        assert results["mean"][name] == pytest.approx(np.mean(values), rel=1e-12)
    protocol = results["protocol"]
    expected = {"num_samples": 100, "seed": 5, "repeats": 3, "network_calls_per_sample": 1, "num_classes": 10}
    expected |= {"num_features": 4, "num_reference_images": 80, "quantisation": "8 bits", "extractor": "mine:Pixels"}
    assert expected.items() <= protocol.items()
    assert not Path("results.work").exists()


def test_fid_is_that_of_the_saved_images(student, settings):
    results = evaluate(settings(save_images="samples"), student)
    assert sorted(path.name for path in Path("samples").iterdir()) == [f"{i:06d}.png" for i in range(100)]
    gaussians = []
    for folder in ("samples", "real"):
        images = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).iterdir())])
        areas = images[..., 0].reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4) / 255
        gaussians.append(Gaussian.of(torch.from_numpy(areas)))
    assert results["fid"] == pytest.approx(frechet_distance(*gaussians), rel=1e-4)  # features are float32


def test_a_sample_is_that_of_its_seed_and_class_in_turn(student):
    drawn = Samples(student, 30, batch_size=8, seed=100)
    found = torch.cat(list(drawn.stream(0, 30)))
    latents = [torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(100 + i)) for i in range(30)]
    labels = [i % 10 for i in range(30)]
    expected = student(latents=torch.cat(latents), class_labels=labels, output_type="pil").images
    expected = torch.from_numpy(np.stack([np.asarray(image) for image in expected])).permute(0, 3, 1, 2)
    assert (found.int() - expected.int()).abs().max() <= 1
    assert (found != expected).float().mean() < 1e-3


def test_any_part_of_the_samples_has_the_same_bits(student):
    drawn = Samples(student, 100, batch_size=7)
    whole = torch.cat(list(drawn.stream(0, 100)))
    for first, last in ((0, 1), (13, 14), (6, 8), (64, 100), (99, 100)):
        assert torch.equal(torch.cat(list(drawn.stream(first, last))), whole[first:last])


def test_figures_are_identical_for_batch_sizes_1_7_and_64(student, settings):
    # in float64 no rounded pixel depends on the last bits of a sum, whose order is the batch size's
    student.to(torch.float64)
    found = []
    for batch_size in (1, 7, 64):
        config = settings(batch_size=batch_size, output=f"{batch_size}.json", save_images=f"images-{batch_size}")
        found.append(figures(evaluate(config, student)))
        for i in range(100):
            image = Path(f"images-{batch_size}/{i:06d}.png").read_bytes()
            assert image == Path(f"images-1/{i:06d}.png").read_bytes()
    assert found[0] == found[1] == found[2]


def test_in_float32_another_batch_size_changes_hardly_a_pixel_and_none_by_more_than_one(student):
    images = [torch.cat(list(Samples(student, 100, size).stream(0, 100))) for size in (1, 7, 64)]
    for other in images[1:]:
        assert (other.int() - images[0].int()).abs().max() <= 1
        assert (other != images[0]).float().mean() < 1e-3


def evaluate_and_drop(config, pipeline):
    tqdm.set_lock(
        threading.RLock()
    )  # that of the parent would stay locked if this process is killed while it holds it
    evaluate(config, pipeline)


def test_two_processes_give_the_same_figures_as_one(student, settings, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else accelerate chooses, and sums have another order
    one = evaluate(settings(num_samples=200, batch_size=7, save_images="one"), student)
    PartialState._reset_state()
    config = settings(num_samples=200, batch_size=7, output="two.json", save_images="two")
    debug_launcher(evaluate_and_drop, (config, student), num_processes=2)
    two = json.loads(Path("two.json").read_text())
    assert two["protocol"]["num_processes"] == 2
    assert figures(two) == figures(one)
    for i in range(200):
        assert Path(f"one/{i:06d}.png").read_bytes() == Path(f"two/{i:06d}.png").read_bytes()


def test_the_digest_of_a_model_is_the_same_in_every_process_until_weights_or_settings_change(student, tiny_unet):
    before = model_digest(student)
    config = {**student.scheduler.config, "_use_default_values": ["rho", "sigma_data"]}  # in any order, from a set
    same = OneStepPIDPipeline(tiny_unet(num_class_embeds=10), PIDScheduler.from_config(config))
    assert model_digest(same) == before
    other = OneStepPIDPipeline(student.unet, PIDScheduler(sigma_max=79))
    assert model_digest(other) != before
    with torch.no_grad():
        student.unet.conv_out.bias[0] += 1e-6
    assert model_digest(student) != before


def kill_when(process, condition, timeout=60):
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end and process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def parts(name):
    return {path.name: path.stat().st_mtime_ns for path in Path(name).glob("samples-*/*.safetensors")}


def test_an_evaluation_that_is_killed_continues_to_the_same_figures(student, settings):
    changes = {"num_samples": 64 * 30, "batch_size": 50}
    whole = evaluate(settings(output="whole.json", **changes), student)
    config = settings(save_images="samples", **changes)
    process = multiprocessing.get_context("fork").Process(target=evaluate_and_drop, args=(config, student))
    process.start()
    kill_when(process, lambda: len(parts("results.work")) >= 4)
    before = parts("results.work")
    assert 4 <= len(before) < 30 and not Path("results.json").exists()
    part = load_file("results.work/samples-0/000000.safetensors")  # features alone, no images
    assert {name: tuple(value.shape) for name, value in part.items()} == {"features": (64, 4), "logits": (64, 4)}

    with pytest.raises(InputError, match="of an evaluation with another seed; remove it"):
        evaluate(dataclasses.replace(config, seed=1), student)
    process = multiprocessing.get_context("fork").Process(target=evaluate_and_drop, args=(config, student))
    process.start()
    kill_when(process, lambda: len(parts("results.work")) >= len(before) + 3)
    assert before.items() <= parts("results.work").items()  # none was computed again
    assert figures(evaluate(config, student)) == figures(whole)
    assert len(list(Path("samples").iterdir())) == 64 * 30 and not Path("results.work").exists()


def interrupt(config, pipeline):
    Path("stop").touch()
    with pytest.raises(InputError, match="stopped"):
        evaluate(config, pipeline)
    Path("stop").unlink()
    assert sorted(parts("results.work")) == ["000000.safetensors"]


def test_an_evaluation_does_not_continue_with_another_batch_size(student, settings):
    config = settings(extractor="mine:Stops")
    interrupt(config, student)
    with pytest.raises(InputError, match="of an evaluation with another batch_size; remove it"):
        evaluate(dataclasses.replace(config, batch_size=7), student)
    evaluate(config, student)


def test_an_evaluation_continues_with_a_copy_of_the_reference_but_not_with_another_one(student, settings):
    whole = evaluate(settings(output="whole.json", extractor="mine:Stops"), student)
    config = settings(extractor="mine:Stops")
    interrupt(config, student)
    shutil.copytree("real", "copy", copy_function=shutil.copy)
    shutil.rmtree("real")
    Path("copy").rename("real")
    Path("real/3.png").rename("3.png")
    shutil.copy("real/4.png", "real/3.png")
    with pytest.raises(InputError, match="of an evaluation with another reference_digest; remove it"):
        evaluate(config, student)
    Path("3.png").rename("real/3.png")
    assert figures(evaluate(config, student)) == figures(whole)


def test_an_evaluation_does_not_continue_with_an_extractor_whose_code_has_changed(student, settings):
    config = settings(extractor="mine:Stops")
    interrupt(config, student)
    Path("mine.py").write_text(OWN.replace("9 * x", "10 * x"))
    sys.modules.pop("mine")
    with pytest.raises(InputError, match="of an evaluation with another extractor_sha256; remove it"):
        evaluate(config, student)
    Path("mine.py").write_text(OWN)
    sys.modules.pop("mine")
    evaluate(config, student)


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_files_of_features_that_are_cut_off_are_made_again(student, settings, size):
    whole = evaluate(settings(output="whole.json", extractor="mine:Stops"), student)
    config = settings(extractor="mine:Stops")
    interrupt(config, student)
    for folder in ("reference", "samples-0"):
        part = Path(f"results.work/{folder}/000000.safetensors")
        part.write_bytes(part.read_bytes()[:size])
    assert figures(evaluate(config, student)) == figures(whole)


def test_a_work_folder_whose_settings_are_cut_off_gets_a_sentence(student, settings):
    config = settings(extractor="mine:Stops")
    interrupt(config, student)
    Path("results.work/protocol.json").write_bytes(b"")
    with pytest.raises(InputError, match=r"results.work, whose protocol.json cannot be read; remove the folder"):
        evaluate(config, student)


def test_an_evaluation_that_ends_between_the_saved_reference_and_the_output_continues(student, settings):
    config = settings(save_reference="real.safetensors")
    Path("results.json.partial").mkdir()  # so that the output cannot be written
    with pytest.raises(IsADirectoryError):
        evaluate(config, student)
    Path("results.json.partial").rmdir()
    saved = Path("real.safetensors").read_bytes()
    results = evaluate(config, student)
    assert Path("real.safetensors").read_bytes() == saved and not Path("results.work").exists()
    again = evaluate(settings(output="again.json", reference="real.safetensors"), student)
    assert figures(again) == figures(results)
    assert again["protocol"]["reference_digest"] == results["protocol"]["reference_digest"]


def test_a_file_in_the_place_of_the_saved_reference_is_not_overwritten(student, settings):
    Path("real.safetensors").write_bytes(b"something else")
    config = settings(extractor="mine:Stops", save_reference="real.safetensors")
    with pytest.raises(InputError, match="save_reference is 'real.safetensors', which exists already"):
        evaluate(config, student)
    Path("real.safetensors").rename("else")
    interrupt(config, student)
    evaluate(settings(output="other.json", save_reference="real.safetensors"), student)  # of another extractor
    other = Path("real.safetensors").read_bytes()
    for content in (other, b"something else"):
        Path("real.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="save_reference is 'real.safetensors', which exists already"):
            evaluate(config, student)
        assert Path("real.safetensors").read_bytes() == content


def test_the_progress_bars_count_the_images_that_there_are(student, settings, capfd):
    evaluate(settings(), student)
    bars = capfd.readouterr().err
    assert "80/80" in bars and "100/100" in bars and "/128" not in bars


def test_without_torch_fidelity_nothing_is_drawn(student, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # as if it were not installed
    with pytest.raises(InputError, match=r"'torch_fidelity', .* pip install 'pid_diffusers\[evaluation\]'"):
        evaluate(settings(), student)
    assert not Path("results.work").exists()


@pytest.mark.parametrize("pipeline, scheduler", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_a_pipeline_of_diffusers_that_draws_noise_at_every_step_does_not_depend_on_the_batch(
    tiny_unet, pipeline, scheduler
):
    teacher = pipeline(tiny_unet(), scheduler()).to(torch.float64)
    teacher.set_progress_bar_config(disable=True)
    one, seven = (Samples(teacher, 9, size, num_inference_steps=3) for size in (1, 7))
    assert torch.equal(torch.cat(list(one.stream(0, 9))), torch.cat(list(seven.stream(0, 9))))
    assert one.probe()[1] == 3
    assert one.describe()["num_inference_steps"] == 3


def test_a_teacher_is_sampled_by_its_pipeline_another_scheduler_or_a_solver():
    teacher = load_model("digits-teacher")
    images = {}
    for sampler, steps, calls in (
        ("pipeline", 12, 12),
        ("EDMDPMSolverMultistepScheduler", 12, 12),
        ("heun", 12, 24),
        ("euler", 12, 12),
    ):
        drawn = Samples(load_model("digits-teacher"), 8, 8, sampler=sampler, num_inference_steps=steps)
        assert drawn.probe()[1] == calls
        images[sampler] = torch.cat(list(drawn.stream(0, 8))).float() / 127.5 - 1
    exact = Samples(teacher, 8, 8, sampler="heun", num_inference_steps=40)
    exact = torch.cat(list(exact.stream(0, 8))).float() / 127.5 - 1
    student = torch.cat(list(Samples(load_model("digits-student"), 8, 8).stream(0, 8))).float() / 127.5 - 1
    errors = {name: (image - exact).square().mean().sqrt().item() for name, image in images.items()}
    assert errors["heun"] < 0.05 and errors["heun"] < errors["euler"] < 0.3
    assert errors["EDMDPMSolverMultistepScheduler"] < errors["pipeline"] < 0.3
    assert (student - exact).square().mean().sqrt() < 0.25  # all start from the same noise


def test_prompts_are_taken_in_turn_and_scored(settings):
    Path("prompts.txt").write_text("a seven\na\nan eight of ink\n")
    Path("real").rename("unused")
    Path("real").mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(20, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(f"real/{number}.png")
    pipeline = tiny_sd()
    pipeline.set_progress_bar_config(disable=True)
    config = settings(
        prompts="prompts.txt", extractor="mine:Words", num_samples=10, batch_size=4, num_inference_steps=2
    )
    results = evaluate(dataclasses.replace(config, guidance_scale=3.0, save_images="samples"), pipeline)
    assert 0 < results["clip_score"] <= 100
    scores = []
    for i in range(10):
        colours = np.asarray(Image.open(f"samples/{i:06d}.png")).mean(axis=(0, 1)) / 255
        text = np.array([len(["a seven", "a", "an eight of ink"][i % 3]), 1, 1])
        scores.append(100 * colours @ text / np.linalg.norm(colours) / np.linalg.norm(text))
    assert results["clip_score"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert results["protocol"]["guidance_scale"] == 3.0 and results["protocol"]["num_prompts"] == 3
    with pytest.raises(InputError, match="prompts is None"):
        evaluate(settings(output="other.json"), pipeline)


def test_a_text_to_image_student_is_told_the_prompts_and_scale_and_called_once():
    teacher = tiny_sd()
    parts = {**teacher.components, "scheduler": PIDScheduler(prediction_type="residual", guidance_range=[1.0, 8.0])}
    parts |= {"unet": tiny_conditional_unet(time_cond_proj_dim=16)}
    names = inspect.signature(OneStepPIDTextToImagePipeline).parameters
    student = OneStepPIDTextToImagePipeline(**{name: part for name, part in parts.items() if name in names})
    student.set_progress_bar_config(disable=True)
    drawn = Samples(student, 4, 3, prompts=["a", "b"], guidance_scale=5.0)
    assert drawn.probe()[1] == 1
    images = torch.cat(list(drawn.stream(0, 4)))
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    expected = student(["a", "b", "a", "b"], generator=generators, guidance_scale=5.0, output_type="pil").images
    expected = torch.from_numpy(np.stack([np.asarray(image) for image in expected])).permute(0, 3, 1, 2)
    assert (images.int() - expected.int()).abs().max() <= 1


def test_statistics_give_fid_alone_and_say_so(student, settings):
    images = np.stack([np.asarray(Image.open(f"real/{number}.png")) for number in range(80)])
    areas = images[..., 0].reshape(-1, 2, 4, 2, 4).mean(axis=(2, 4)).reshape(-1, 4) / 255
    np.savez("edm.npz", mu=areas.mean(axis=0), sigma=np.cov(areas, rowvar=False))
    np.savez("adm.npz", mu=areas.mean(axis=0), sigma=np.cov(areas, rowvar=False), arr_0=images[:60])
    full = evaluate(settings(output="full.json", save_reference="real.safetensors"), student)
    edm = evaluate(settings(reference="edm.npz", output="edm.json"), student)
    assert edm["fid"] == pytest.approx(full["fid"], rel=1e-4)
    nulls = ["kid", "precision", "recall", "density", "coverage"]
    assert [
        name for name in nulls if edm[name] is None and "mean and covariance alone" in edm["reasons"][name]
    ] == nulls
    adm = evaluate(settings(reference="adm.npz", output="adm.json"), student)
    assert adm["fid"] == edm["fid"] and adm["recall"] is not None
    assert adm["protocol"]["reference_statistics"] == "from the file"
    saved = evaluate(settings(reference="real.safetensors", output="saved.json"), student)
    assert figures(saved) == figures(full)


def test_too_few_samples_give_no_number(student, settings):
    few = evaluate(settings(num_samples=4, extractor="mine:Pixels"), student)
    assert [few[name] for name in METRICS] == [None, few["kid"], *[None] * 6]
    assert few["reasons"]["fid"] == "4 samples are too few for the covariance of 4 features; draw 5 or more."
    for number in range(4, 80):
        Path(f"real/{number}.png").unlink()
    little = evaluate(settings(output="other.json"), student)
    assert little["fid"] is None and "reference's 4 images are too few" in little["reasons"]["fid"]


def test_a_model_that_gives_nan_is_refused_before_the_reference_is_read(student, settings):
    with torch.no_grad():
        student.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(InputError, match=r"model gives NaN for sample 0 \(seed 3\)"):
        evaluate(settings(seed=3), student)
    assert not Path("results.work").exists()


def test_a_sample_that_becomes_nan_later_is_named_and_there_are_no_figures(student, settings):
    with torch.no_grad():
        student.unet.class_embedding.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"model gives NaN for sample 3 \(seed 3\)"):
        evaluate(settings(), student)
    assert not Path("results.json").exists()


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"num_samples": 1}, "num_samples is 1; pass 2 or more"),
        ({"batch_size": 0}, "batch_size is 0; pass 1 or more"),
        ({"seed": -1}, "seed is -1; pass 0 or more"),
        ({"repeats": 0}, "repeats is 0"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of float32"),
        ({"device": "tpu9"}, "device is 'tpu9', which is not there"),
        ({"output": "missing/results.json"}, "whose folder does not exist"),
        ({"save_reference": "features.bin"}, "ends in .safetensors"),
        ({"save_reference": "a.safetensors", "reference": "edm.npz"}, "has no images to extract features of"),
        ({"reference": "edm.npz"}, "whose mu has 3 numbers, but the extractor gives 4 features"),
        ({"save_images": "real"}, "save_images is 'real', which exists and is not empty"),
        ({"save_images": "mine.py"}, "save_images is 'mine.py', but mine.py is a file"),
        ({"save_images": "mine.py/images/large"}, "save_images is 'mine.py/images/large', but mine.py is a file"),
        ({"save_images": "results.work/images"}, "which is removed at the end with results.work"),
        ({"output": "mine.work"}, "output is 'mine.work', which is also the name of its work folder"),
        ({"output": "file.json"}, "which needs a folder file.work beside it, but that is a file"),
        ({"reference": "gray"}, "8 × 8 and gray, but the model's are 8 × 8 and RGB"),
        ({"reference": "large"}, "9 × 9 and RGB, but the model's are 8 × 8 and RGB"),
        ({"extractor": "nothing"}, "choose one of inception"),
        ({"prompts": "mine.py"}, "which takes none; leave it out"),
        ({"clip_model": "a"}, "there are no prompts"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, but the model is a OneStepPIDPipeline"),
        ({"sampler": "heun"}, "whose ODE is not known here"),
        ({"sampler": "HeunDiscreteScheduler"}, "the model is a student"),
        ({"sampler": "UNet2DModel"}, "or the name of a scheduler of diffusers"),
    ],
)
def test_settings_that_cannot_work_get_a_sentence_before_the_work(student, settings, changes, reason):
    for name, size, mode in (("gray", 8, "L"), ("large", 9, "RGB")):
        Path(name).mkdir()
        Image.new(mode, (size, size)).save(f"{name}/0.png")
    np.savez("edm.npz", mu=np.zeros(3), sigma=np.eye(3))
    Path("file.work").touch()
    with pytest.raises(InputError, match=reason):
        evaluate(settings(**changes), student)
    assert not Path("results.json").exists() and not Path("results.work").exists()


def test_an_output_that_exists_and_models_that_are_none_are_refused(settings):
    Path("results.json").write_text("{}")
    with pytest.raises(InputError, match="output is 'results.json', which exists already"):
        evaluate(settings())
    for model, reason in (("./nothing", "does not exist"), ("real", "holds no pipeline")):
        with pytest.raises(InputError, match=reason):
            evaluate(settings(model=model, output="other.json"))


def save_digits(folder, count):
    folder.mkdir()
    for number, image in enumerate(load_digits()[0][:count]):
        Image.fromarray(((image[0] / 2 + 0.5) * 255).round().byte().numpy()).save(folder / f"{number}.png")


def test_the_command_measures_the_built_in_student_on_real_digits(capsys):
    save_digits(Path("digits"), 300)
    command = ["evaluate", "digits-student", "--reference", "digits", "--num_samples", "200", "--device", "cpu"]
    assert main([*command, "--extractor", "digits", "--output", "digits.json"]) == 0
    printed = capsys.readouterr().out
    results = json.loads(Path("digits.json").read_text())
    assert f"{results['fid']:.6g}" in printed and "there are no prompts" in printed
    assert results["fid"] < 2 and results["inception_score"] > 6 and results["precision"] > 0.6
    assert main([*command, "--extractor", "digits", "--output", "digits.json"]) == 2
    assert "which exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_killed_and_continued_by_two_processes_gives_the_figures_of_one():
    save_digits(Path("digits"), 300)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = ["pid_diffusers.cli", "evaluate", "digits-student", "--reference", "digits", "--num_samples", "1280"]
    command += ["--batch_size", "7", "--extractor", "mine:Pixels", "--device", "cpu", "--output"]
    subprocess.run([sys.executable, "-m", *command, "one.json"], env=environment, check=True)

    process = subprocess.Popen([sys.executable, "-m", *command, "two.json"], env=environment)
    while len(parts("two.work")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    # as `accelerate launch` starts several GPUs' processes; of CPU processes it starts one alone
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    subprocess.run([*launch, *command, "two.json"], env=environment, check=True)
    one, two = (json.loads(Path(name).read_text()) for name in ("one.json", "two.json"))
    assert two["protocol"]["num_processes"] == 2
    assert figures(two) == figures(one)
