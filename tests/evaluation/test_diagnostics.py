"""The same-seed diagnostics tell the truth of students of which it is known, and say what they cannot measure."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDPMPipeline, DDPMScheduler
from PIL import Image
from text_students import save_text_student
from tiny_text import tiny_sd
from torch import nn

from pid_diffusers import (
    EmpiricalDenoiser,
    InputError,
    OneStepPIDPipeline,
    PIDScheduler,
    TrajectoryModel,
)
from pid_diffusers.cli import main
from pid_diffusers.denoisers import euler, heun
from pid_diffusers.evaluation.diagnostics import (
    NUM_STEPS,
    Worth,
    diagnose,
    nearest_images,
    open_data,
    open_run,
    pid_residuals,
    residual_bands,
    summarize,
    trajectory_errors,
    worth_in_steps,
)
from pid_diffusers.evaluation.digits import load_digits
from pid_diffusers.evaluation.generate import BUILT_IN
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.evaluation.same_seed import same_seed_samples
from pid_diffusers.training import TrainingConfig

T = 80.0
SETTINGS = {"num_samples": 6, "batch_size": 4, "seed": 3}


class KnownNetwork(nn.Module):
    """The X_θ of a student whose x_θ(z, σ) is a given function; its limit at T is D(z, T)."""

    def __init__(self, teacher, solution):
        super().__init__()
        self.teacher, self.solution = teacher, solution
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, sample, timestep, return_dict=False, **condition):
        z, sigmas = sample * math.hypot(0.5, T), (4 * timestep).exp()
        output = torch.empty_like(z)
        for sigma in sigmas.unique().tolist():
            rows = sigmas == sigma
            some = {name: value[rows] for name, value in condition.items()}
            if sigma > T * (1 - 1e-6):
                output[rows] = self.teacher(z[rows], T, **some)
            else:
                x = self.solution(z[rows], sigma, **some)
                output[rows] = (x - sigma / T * z[rows]) * T / (T - sigma)
        return (output,)


def known_student(teacher, solution, **settings) -> TrajectoryModel:
    return TrajectoryModel(KnownNetwork(teacher, solution), PIDScheduler(**settings))


def student_of(teacher, solver, num_steps) -> TrajectoryModel:
    """Its value at every σ is the teacher's solution in so many steps from T to there."""

    def solution(z, sigma, **condition):
        return solver(teacher, z, PIDScheduler(sigma_min=sigma).grid(num_steps + 1), **condition)[-1]

    return known_student(teacher, solution)


@pytest.fixture(scope="module")
def gaussian(gaussian_teacher):
    class Teacher(gaussian_teacher):
        sample_shape, num_classes = (2, 4, 4), None

    return Teacher(0.5)


@pytest.fixture(scope="module")
def empirical():
    """Three images in two classes."""
    data = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tanh()
    return EmpiricalDenoiser(data, torch.tensor([0, 1, 1]))


@pytest.fixture(scope="module")
def digits():
    with open_run("digits-student") as (student, teacher, config):
        yield student, teacher, config


@pytest.fixture(scope="module")
def of_digits(digits):
    return diagnose(
        *digits[:2], num_samples=6, batch_size=64, seed=3, scheme="midpoint", data=open_data("digits", digits[1])
    )


# students of which the truth is known


def test_an_exact_solution_is_as_far_away_as_the_reference_is_wrong(gaussian):
    exact = known_student(gaussian, lambda z, sigma: gaussian.solution(z, T, sigma))
    found = diagnose(exact, gaussian, **SETTINGS)
    samples = same_seed_samples(exact, gaussian, 6, seed=3)
    factor = (samples.teacher / samples.student).mean().item() - 1  # all starts shrink alike: 40 steps end 1 % off
    expected = abs(factor) * samples.student.square().mean().sqrt().item()
    assert found["distance"]["rms"] == pytest.approx(expected, rel=1e-3)
    assert expected < 5e-3
    for name in ("heun", "euler"):
        assert (found["worth"][name]["worth"], found["worth"][name]["relation"]) == (24, ">")
        assert found["worth"][name]["text"] == f"more than 24 {name.capitalize()} steps"
    assert max(found["trajectory"]["relative"]) < 5e-3


def test_the_error_along_the_trajectory_is_that_at_each_point_of_the_grid(gaussian, noise):
    z = T * noise(5, 2, 4, 4, dtype=torch.float64)
    twice = known_student(gaussian, lambda z, sigma: 2 * gaussian.solution(z, T, sigma))
    sigmas, errors = trajectory_errors(twice, gaussian, z, {}, batch_size=2, heun_steps=10)
    states = heun(gaussian, z, sigmas)
    assert (errors[0] == 0).all()
    for sigma, state, error in list(zip(sigmas, states, errors, strict=True))[1:]:
        expected = (2 * gaussian.solution(z, T, sigma) - state).square().flatten(1).mean(1).sqrt()
        torch.testing.assert_close(error, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("scheme", "order"), [("upwind", 1), ("midpoint", 2), ("central", 2)])
def test_the_residual_of_an_exact_solution_shrinks_with_the_order_of_the_scheme(gaussian, noise, scheme, order):
    z, residuals = T * noise(4, 2, 4, 4, dtype=torch.float64), []
    for n in (201, 401):
        student = known_student(gaussian, lambda z, sigma: gaussian.solution(z, T, sigma), num_train_timesteps=n)
        middle = pid_residuals(student, gaussian, z, {}, [(n - 1) // 2, 3 * (n - 1) // 4], scheme)
        residuals.append(middle.square().mean().sqrt().item())
    assert residuals[1] < 1e-2
    assert residuals[0] / residuals[1] == pytest.approx(2**order, rel=0.1)


def test_the_residual_of_a_wrong_solution_is_its_formula(gaussian, noise):
    # x_θ = D(z, T) everywhere but for the start: its derivative is 0, the residual x_θ − D(x_θ, t)
    z = T * noise(3, 2, 4, 4, dtype=torch.float64)
    student = known_student(gaussian, lambda z, sigma: gaussian(z, T))
    index, grid = [100, 200], student.scheduler.grid()
    x = gaussian(z, T)
    expected = torch.stack([(x - gaussian(x, grid[i])).square().flatten(1).mean(1).sqrt() for i in index])
    found = pid_residuals(student, gaussian, z, {}, index, batch_size=4)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["heun", "euler"])
@pytest.mark.parametrize("num_steps", [1, 2, 8, 24])
def test_a_student_that_is_the_solution_of_n_steps_is_worth_n(empirical, name, num_steps):
    solver = {"heun": heun, "euler": euler}[name]
    found = diagnose(student_of(empirical, solver, num_steps), empirical, num_samples=8, batch_size=8)["worth"][name]
    assert found["worth"] == pytest.approx(num_steps, rel=2e-3)
    assert dict(zip(NUM_STEPS, found["distances"], strict=True))[num_steps] > 0


def test_a_student_between_two_measured_numbers_of_steps_is_worth_about_its_own(gaussian):
    found = diagnose(student_of(gaussian, euler, 10), gaussian, **SETTINGS)
    assert found["worth"]["euler"]["worth"] == pytest.approx(10, rel=0.03)


def test_data_in_0_to_1_counts_as_images_in_minus_1_to_1(gaussian):
    def found(**settings):
        wrong = known_student(gaussian, lambda z, sigma: 0.9 * gaussian.solution(z, T, sigma), **settings)
        return diagnose(wrong, gaussian, **SETTINGS)

    once, twice = found(), found(sample_min=0.0)
    assert once["worth"]["heun"]["worth"] == pytest.approx(twice["worth"]["heun"]["worth"], rel=1e-4)
    once, twice = ([x[part]["rms"] for part in ("distance", "residual", "trajectory")] for x in (once, twice))
    for single, double in zip(once, twice, strict=True):
        np.testing.assert_allclose(double, 2 * np.array(single), rtol=1e-5)


# the parts


@pytest.mark.parametrize("steps", [1, 1.5, 5, 7.25, 23, 24])
def test_a_power_law_is_interpolated_exactly(steps):
    distances = [3 * n**-2.5 for n in NUM_STEPS]
    found = worth_in_steps(3 * steps**-2.5, NUM_STEPS, distances)
    assert found.steps == pytest.approx(steps, rel=1e-12)
    assert found.relation == "="


def test_beyond_the_ends_it_says_so():
    assert worth_in_steps(0.5, (1, 2, 4), (8.0, 4.0, 1.0)) == Worth(4, ">")
    assert worth_in_steps(9.0, (1, 2, 4), (8.0, 4.0, 1.0)) == Worth(1, "<")
    assert Worth(4, ">").describe("Heun") == "more than 4 Heun steps"
    assert Worth(1, "<").describe("Heun") == "less than 1 Heun step"


def test_a_solver_that_is_exact_needs_no_more_steps_than_the_last_ones_that_were_not():
    assert worth_in_steps(0.0, (1, 2, 4), (8.0, 0.0, 0.0)) == Worth(2)
    assert worth_in_steps(1.0, (1, 2, 4), (8.0, 0.0, 0.0)) == Worth(1)


def test_where_distances_rise_again_the_fewest_steps_count():
    assert worth_in_steps(2.0, (1, 2, 4, 8), (4.0, 1.0, 3.0, 0.5)).steps == pytest.approx(2**0.5)


def test_the_bands_are_thirds_of_the_grid():
    grid, indices = torch.linspace(9, 1, 9), [0, 2, 3, 8]
    residuals = torch.tensor([[3.0], [4.0], [2.0], [5.0]])
    bands = residual_bands(residuals, indices, grid)
    assert bands["high"] == {"sigma_max": 9, "sigma_min": 7, "rms": pytest.approx(12.5**0.5)}
    assert bands["middle"] == {"sigma_max": 6, "sigma_min": 4, "rms": 2}
    assert bands["low"] == {"sigma_max": 3, "sigma_min": 1, "rms": 5}
    assert list(residual_bands(residuals[:1], [0], grid)) == ["high"]


@pytest.mark.parametrize("chunk", [1, 7, 50])
def test_the_nearest_image_is_found_whatever_the_batches(noise, chunk):
    images, samples = noise(50, 1, 3, 3), noise(10, 1, 3, 3, seed=1)
    samples[4] = images[33]
    distances, indices = nearest_images(samples, images.split(chunk))
    every = (samples[:, None].double() - images[None].double()).square().flatten(2).mean(2).sqrt()
    torch.testing.assert_close(distances, every.min(dim=1).values, rtol=1e-6, atol=1e-7)
    assert torch.equal(indices, every.argmin(dim=1))
    assert indices[4] == 33


@pytest.mark.parametrize("chunk", [3, 50])
def test_an_image_is_not_its_own_neighbour(noise, chunk):
    images = noise(50, 1, 3, 3)
    distances, indices = nearest_images(images[:10], images.split(chunk), skip_own=True)
    assert (distances > 0.1).all()
    assert (indices != torch.arange(10)).all()


# all of them


def test_per_seed_results_do_not_depend_on_the_batch_size(digits, of_digits, gaussian):
    student, teacher, _ = digits
    samples = same_seed_samples(student, teacher, 6, batch_size=4, seed=3)
    np.testing.assert_allclose(samples.rms_distances, of_digits["distance"]["per_sample"], rtol=1e-4)
    students = student_of(gaussian, euler, 3)
    every = [diagnose(students, gaussian, num_samples=9, batch_size=b) for b in (1, 7, 64)]
    for part, key in (("distance", "per_sample"), ("residual", "rms"), ("trajectory", "rms")):
        for other in every[1:]:
            np.testing.assert_allclose(other[part][key], every[0][part][key], rtol=1e-5, atol=1e-9)


def test_the_figures_are_those_of_the_samples_themselves(digits, of_digits):
    student, teacher, _ = digits
    samples, distance = same_seed_samples(student, teacher, 6, seed=3), of_digits["distance"]
    each = (samples.student - samples.teacher).square().flatten(1).mean(dim=1).sqrt()
    np.testing.assert_allclose(distance["per_sample"], each, rtol=1e-4)
    assert distance["rms"] == pytest.approx(each.square().mean().sqrt().item(), rel=1e-4)
    assert distance["mean"] == pytest.approx(each.mean().item(), rel=1e-4)
    assert distance["quantiles"]["1"] == max(distance["per_sample"]) == distance["worst"][0]["distance"]
    worst = each.argmax().item()
    assert distance["worst"][0]["sample"] == distance["worst"][0]["class_label"] == worst
    assert of_digits["trajectory"]["rms"][-1] == pytest.approx(distance["rms"], rel=1e-4)
    assert of_digits["worth"]["distance"] == pytest.approx(distance["rms"], rel=1e-6)


def test_nearest_training_images_are_those_of_student_and_teacher(digits, of_digits):
    student, teacher, _ = digits
    samples, nearest = same_seed_samples(student, teacher, 6, seed=3), of_digits["nearest"]
    images = load_digits()[0][:-360].double()
    for i, x in enumerate(samples.student.clamp(-1, 1).double()):
        distances = (images - x).square().flatten(1).mean(dim=1).sqrt()
        assert nearest["per_sample"][i] == pytest.approx(distances.min().item(), rel=1e-4)
        assert nearest["image_per_sample"][i] == distances.argmin().item()
    assert nearest["minimum"] > 0.05  # no copies


def test_a_student_that_copies_training_images_is_seen(empirical):
    images = empirical.data
    copies = known_student(empirical, lambda z, sigma, class_labels: images[torch.zeros_like(class_labels)])
    found = diagnose(copies, empirical, **SETTINGS, data=lambda: iter([images]))["nearest"]
    assert found["minimum"] < 1e-6  # so are this teacher's own, of which half are of another class
    assert set(found["image_per_sample"]) == {0}
    assert found["num_nearer_to_an_image"] >= 3


def test_the_summary_says_it_in_a_few_lines(of_digits):
    text = summarize(of_digits)
    names = [line.split()[0] for line in text.splitlines()]
    assert names == ["distance", "worth", "residual", "trajectory", "copying", "time"]
    assert f"{of_digits['distance']['rms']:.4f} rms per pixel" in text
    for name in ("heun", "euler"):
        assert of_digits["worth"][name]["text"] in text


def test_a_run_of_the_command_writes_plain_json(tmp_path, capsys):
    output = tmp_path / "diagnostics.json"
    words = ["diagnose", "digits-student", "--num_samples", "2", "--output", str(output)]
    assert main(words) == 0
    results = json.loads(output.read_text(encoding="utf-8"))
    assert (results["model"], results["teacher"], results["seed"]) == ("digits-student", "digits", 0)
    assert results["residual"]["scheme"] == "midpoint"  # as the run's own config.yaml says
    assert results["nearest"] is None
    assert len(results["distance"]["per_sample"]) == 2
    printed = capsys.readouterr().out
    assert "digits-student, distilled from digits:" in printed
    assert f"Saved in {output}" in printed
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err


def test_validation_logs_distances_and_residuals(digits, tmp_path):
    student, teacher, _ = digits
    config = TrainingConfig(teacher="digits", output_dir=str(tmp_path), num_validation_images=3, scheme="midpoint")
    figures = RunReport(config, denoiser=teacher).validate(student, teacher, 7)
    distances = same_seed_samples(student, teacher, 3).rms_distances
    assert figures["median_distance"] == pytest.approx(distances.median().item(), rel=1e-4)
    assert distances.median() < figures["q90_distance"] <= distances.max() + 1e-6
    for band in ("high", "middle", "low"):
        assert 0 < figures[f"residual_{band}_noise"] < 0.3
    assert (tmp_path / "validation" / "step-0000007.png").exists()


@pytest.fixture(scope="module")
def text_runs(tmp_path_factory):
    """Text-to-image runs with one guidance scale (a LoRA) and with a range, their teacher's folder and prompts."""
    root = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PID_DIFFUSERS_CACHE", str(root / "cache"))
        tiny_sd().save_pretrained(root / "teacher")
        (root / "prompts.txt").write_text("one\ntwo\nthree\n")
        (root / "shown.txt").write_text("seven\neight\n")
        places = {"teacher": "teacher", "prompts": "prompts.txt", "eval_prompts": "shown.txt"}
        save_text_student(root / "scale", tiny_sd(), lora=True, guidance_scale=3.0)
        save_text_student(root / "range", tiny_sd(), guidance_range=[2.0, 9.0])
        for run in (root / "scale", root / "range"):
            settings = yaml.safe_load((run / "config.yaml").read_text())
            settings |= {name: str(root / place) for name, place in places.items()}
            (run / "config.yaml").write_text(yaml.safe_dump(settings))
        yield root


@pytest.mark.parametrize(("run", "guidance"), [("scale", 3.0), ("range", (2.0, 9.0))])
def test_a_text_to_image_run_is_measured_with_its_own_prompts_and_guidance(text_runs, run, guidance):
    with open_run(str(text_runs / run), num_samples=3) as (student, teacher, config):
        assert teacher.guidance_scale == guidance
        found = diagnose(student, teacher, num_samples=3, batch_size=64, scheme=config.scheme)
    assert {x["prompt"] for x in found["distance"]["worst"]} == {"seven", "eight"}
    assert found["value"] == "latent value"
    assert [found["worth"][name]["calls_per_step"] for name in ("heun", "euler")] == [4, 2]  # with and without text
    assert "prompt '" in summarize(found)


def test_other_prompts_are_taken_where_they_are_passed(text_runs):
    with open_run(str(text_runs / "scale"), prompts=str(text_runs / "prompts.txt"), num_samples=2) as (_, teacher, _):
        assert [teacher.shown_prompt(i) for i in range(3)] == ["one", "two", "one"]


def test_a_folder_holds_the_same_images_as_the_data_it_was_made_of(digits, tmp_path):
    images = load_digits()[0][:20]
    for i, image in enumerate(images):
        Image.fromarray(((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()).save(tmp_path / f"{i:02}.png")
    (chunk,) = open_data(str(tmp_path), digits[1])()
    assert (chunk - images).abs().max() < 1 / 127.5


# what cannot be measured


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_unet):
    """Models and images that do not fit."""
    root = tmp_path_factory.mktemp("folders")
    DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(root / "ddpm")
    OneStepPIDPipeline(tiny_unet(), PIDScheduler()).save_pretrained(root / "nameless")
    shutil.copytree(BUILT_IN["digits-student"], root / "broken")
    (root / "broken" / "config.yaml").write_text("teacher: digits\nno_setting: 3\n")
    (root / "empty").mkdir()
    (root / "large").mkdir()
    Image.new("L", (9, 9)).save(root / "large" / "0.png")
    (root / "truncated").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(
        root / "truncated" / "0.png"
    )
    picture = (root / "truncated" / "0.png").read_bytes()
    (root / "truncated" / "1.png").write_bytes(picture[: len(picture) - 40])
    (root / "no.json").write_text("")
    return root


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent/model/x"], "model is 'absent/model/x', which does not exist; pass a folder or a Hub id."),
        (["{}/empty"], "which holds no pipeline; pass a folder written by save_pretrained."),
        (["{}/ddpm"], "which is not a student of Physics Informed Distillation (its scheduler is a DDPMScheduler)"),
        (["{}/nameless"], "teacher is missing, and no config.yaml in"),
        (["{}/nameless", "--teacher", "digits"], "which has samples of (C, H, W) (1, 8, 8), but the student has (3,"),
        (["{}/broken"], "has the key 'no_setting', which is no setting"),
        (["digits-student", "--teacher", "./absent"], "teacher is './absent', which is not a folder"),
        (
            ["digits-student", "--prompts", "words"],
            "prompts is 'words', but the teacher is a ConsistencyModelPipeline",
        ),
        (["digits-student", "--num_samples", "0"], "num_samples is 0; pass 1 or more."),
        (["digits-student", "--batch_size", "0"], "batch_size is 0; pass 1 or more."),
        (["digits-student", "--seed", "-1"], "seed is -1; pass 0 or more."),
        (["digits-student", "--data", "./absent"], "data is './absent', which is not a folder; pass one with images"),
        (["digits-student", "--data", "{}/empty"], "in which there are no images; pass a folder with some."),
        (
            ["digits-student", "--data", "{}/large"],
            "whose images have the shape (1, 9, 9), but the teacher's have (1,",
        ),
        (["digits-student", "--data", "{}/truncated"], "of whose 2 images 1 cannot be read (1.png); repair or remove"),
        (["digits-student", "--output", "{}/no.json"], "which exists already; pass another, or remove it."),
        (["digits-student", "--output", "{}/no/no.json"], "whose folder does not exist; make it, or pass another."),
    ],
)
def test_bad_input_ends_with_one_sentence(folders, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["diagnose", *(word.format(folders) for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("pid-diffusers: error: ")
    assert message in error
    assert error.endswith((".", "?"))
    assert not (tmp_path / "diagnostics.json").exists()


def test_a_text_to_image_student_without_prompts_asks_for_them(text_runs, folders):
    shutil.copytree(text_runs / "scale", folders / "text", ignore=shutil.ignore_patterns("config.yaml"))
    with (
        pytest.raises(InputError, match="prompts is missing"),
        open_run(str(folders / "text"), str(text_runs / "teacher")),
    ):
        pass


@pytest.mark.parametrize(("broken", "name"), [("student", "model"), ("teacher", "teacher")])
def test_what_is_not_finite_is_named_and_not_measured(gaussian, broken, name):
    def solution(z, sigma):
        x = gaussian.solution(z, T, sigma)
        return x * float("nan") if broken == "student" else x

    teacher = type(gaussian)(float("nan")) if broken == "teacher" else gaussian
    with pytest.raises(InputError, match=f"^{name} gives values that are not finite in 6 of 6 samples"):
        diagnose(known_student(gaussian, solution), teacher, **SETTINGS)
