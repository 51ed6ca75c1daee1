import inspect
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from tiny_latent import tiny_dit, tiny_vae

from pid_diffusers import (
    Denoiser,
    InputError,
    OneStepPIDPipeline,
    OneStepPIDTextToImagePipeline,
    PIDScheduler,
    VEDenoiser,
)
from pid_diffusers.demo import DemoModel, Sample
from pid_diffusers.demo.model import contact_sheet, to_image
from pid_diffusers.denoisers import heun
from pid_diffusers.hub.card import render_card


@pytest.fixture(scope="module")
def model(folders):
    return DemoModel.load(folders / "student")


@pytest.fixture(scope="module")
def plain(folders):
    return DemoModel.load(folders / "plain")


def pixels(image):
    return np.asarray(image).astype(int)


def noise_of(seed):
    return torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_generate_is_the_image_of_the_pipeline(model, folders):
    pipe = OneStepPIDPipeline.from_pretrained(folders / "student")
    expected = pipe(class_labels=7, generator=torch.Generator().manual_seed(3)).images[0]
    picture = model.generate(Sample(seed=3, label=7))
    assert picture.image.size == (8, 8) and picture.image.mode == "RGB"
    assert picture.t == model.sigma_min
    np.testing.assert_allclose(pixels(picture.image), pixels(expected), atol=1)


def test_the_point_at_the_highest_noise_level_is_the_noise_itself(model):
    z = model.sigma_max * noise_of(5)[0]
    shown = pixels(model.point(Sample(seed=5, label=0), model.sigma_max).image)
    np.testing.assert_array_equal(shown, pixels(to_image(z, model.sigma_max)))
    assert shown.std() > 50  # bright noise, not a gray field


def test_a_point_depends_on_seed_class_and_noise_level(model):
    points = [(0, 0, 0.002), (1, 0, 0.002), (0, 1, 0.002), (0, 0, 20.0)]
    shown = [model.point(Sample(seed, label), t).image.tobytes() for seed, label, t in points]
    assert len(set(shown)) == len(points)


def test_noise_levels_run_logarithmically_from_t_to_epsilon(model):
    assert [model.noise_level(p) for p in (-0.1, 0, 1, 1.1)] == [80.0, 80.0, 0.002, 0.002]
    assert model.noise_level(0.5) == pytest.approx((80 * 0.002) ** 0.5)


def test_the_comparison_solves_the_teachers_equation_from_the_same_noise(model, folders):
    teacher, sample = Denoiser.from_pretrained(folders / "teacher"), Sample(seed=2, label=4)
    done = []
    comparison = model.compare(sample, 6, done.append)
    sigmas = PIDScheduler().grid(7)
    with torch.no_grad():
        states = heun(teacher, 80 * noise_of(2).double(), sigmas, class_labels=torch.tensor([4]))
    assert [t for t, _ in comparison.points] == sigmas.tolist()
    for (_, image), t, x in zip(comparison.points, sigmas, states, strict=True):
        np.testing.assert_array_equal(pixels(image), pixels(to_image(x[0], t.item())))
    pipe = OneStepPIDPipeline.from_pretrained(folders / "student")
    student = pipe(class_labels=4, latents=noise_of(2), output_type="latent").images
    assert comparison.rms_distance == pytest.approx((student - states[-1]).square().mean().sqrt().item(), rel=1e-4)
    assert done == pytest.approx([i / 6 for i in range(1, 7)])


def test_data_in_0_to_1_are_shown_and_measured_as_all_other_images_are(tiny_unet, noise):
    unet = tiny_unet(time_embedding_type="fourier")
    teacher = VEDenoiser(unet, sigma_max=50.0)
    pipe = OneStepPIDPipeline(unet, PIDScheduler(**teacher.trajectory_config))
    model, sample = DemoModel(pipe, teacher), Sample(seed=2)
    x = pipe(latents=noise_of(2), output_type="latent").images[0]
    picture = model.generate(sample)
    np.testing.assert_allclose(pixels(picture.image), pixels(pipe(latents=noise_of(2)).images[0]), atol=1)
    np.testing.assert_array_equal(pixels(picture.image), pixels(to_image(teacher.decode(x[None])[0], 0.0)))
    comparison = model.compare(sample, 4)
    with torch.no_grad():
        solved = heun(teacher, 50 * noise_of(2).double(), PIDScheduler(**teacher.trajectory_config).grid(5))[-1][0]
    expected = (teacher.decode(x) - teacher.decode(solved)).square().mean().sqrt().item()
    assert comparison.rms_distance == pytest.approx(expected, rel=1e-3)


def test_the_teachers_time_is_that_of_all_its_calls(model):
    comparison = model.compare(Sample(label=0), 10)
    assert comparison.speedup > 1.5  # 20 calls of a network of the same size
    assert comparison.speedup == comparison.teacher_seconds / comparison.student_seconds


def test_the_teachers_picture_is_that_nearest_in_noise_level(model):
    comparison = model.compare(Sample(label=0), 4)
    levels = [t for t, _ in comparison.points]
    assert [comparison.nearest(t) for t in levels] == comparison.points
    assert comparison.nearest(levels[2] * 1.01)[0] == levels[2]


def test_images_of_a_grid_are_those_of_their_seeds_alone(model):
    samples = model.samples(12, seed=4)
    assert [(s.seed, s.label) for s in samples[:2] + samples[-2:]] == [(4, 0), (5, 1), (14, 0), (15, 1)]
    assert {s.label for s in model.samples(3, label=8)} == {8}
    for sample, image in zip(samples, model.grid(samples), strict=True):
        np.testing.assert_allclose(pixels(image), pixels(model.generate(sample).image), atol=1)


def test_an_unconditional_student_takes_no_class_and_is_shown_in_gray(plain):
    assert plain.num_classes is None and [s.label for s in plain.samples(2)] == [None, None]
    assert plain.generate(Sample()).image.mode == "L"


def test_a_sheet_holds_every_image_pixel_by_pixel(plain):
    images = plain.grid(plain.samples(5))
    sheet = contact_sheet(images, 3)
    assert sheet.size == (24, 16)
    np.testing.assert_array_equal(pixels(sheet)[8:, 8:16], pixels(images[4]))
    assert not pixels(sheet)[8:, 16:].any()


def test_visitors_at_once_get_their_own_points(model):
    wanted = [(Sample(seed, seed % 10), model.noise_level(seed / 20)) for seed in range(20)]
    alone = [model.point(*one).image.tobytes() for one in wanted]
    with ThreadPoolExecutor(4) as pool:
        comparison = pool.submit(model.compare, Sample(1, 1), 10)
        assert [p.image.tobytes() for p in pool.map(lambda one: model.point(*one), wanted)] == alone
    expected = [image.tobytes() for _, image in model.compare(Sample(1, 1), 10).points]
    assert [image.tobytes() for _, image in comparison.result().points] == expected


@pytest.mark.parametrize("kwargs", [{"seed": -1}, {"seed": 2**63}, {"seed": None}, {"label": 10}, {"label": None}])
def test_a_sample_out_of_range_is_named(model, kwargs):
    with pytest.raises(InputError, match=f"{next(iter(kwargs))} is "):
        model.generate(Sample(**{"label": 0, **kwargs}))


def test_a_noise_level_or_a_step_number_out_of_range_is_named(model):
    with pytest.raises(InputError, match="t is 81"):
        model.point(Sample(label=0), 81)
    with pytest.raises(InputError, match="heun_steps is 0"):
        model.compare(Sample(label=0), 0)


def test_a_pipeline_called_with_a_text_is_given_the_prompt(tiny_unet):
    class WithPrompt(OneStepPIDPipeline):
        def __call__(self, prompt=None, **kwargs):
            self.told = prompt
            return super().__call__(**kwargs)

    assert "prompt" in inspect.signature(WithPrompt.__call__).parameters
    model = DemoModel(WithPrompt(tiny_unet(), PIDScheduler()))
    assert model.takes_prompt
    model.generate(Sample(prompt="a seven"))
    assert model.pipe.told == ["a seven"]


def test_the_teacher_is_the_one_passed_else_of_the_run_else_of_the_card(folders, tmp_path):
    assert DemoModel.load(folders / "student").teacher_name == str(folders / "teacher")
    shutil.copytree(folders / "student", tmp_path / "carded")
    (tmp_path / "carded" / "config.yaml").unlink()
    (tmp_path / "carded" / "README.md").write_text(f"---\nbase_model: {folders / 'teacher'}\n---\n")
    assert DemoModel.load(tmp_path / "carded").teacher_name == str(folders / "teacher")
    assert DemoModel.load(tmp_path / "carded", folders / "teacher").name == "carded"


def test_without_a_teacher_one_sentence_says_how_to_pass_one(folders, plain, tmp_path):
    assert plain.teacher is None and plain.no_teacher.endswith("start the demo with --teacher FOLDER.")
    with pytest.raises(InputError, match="--teacher FOLDER"):
        plain.compare(Sample())
    shutil.copytree(folders / "student", tmp_path / "moved")
    (tmp_path / "moved" / "config.yaml").write_text("teacher: /no/longer/there\n")
    moved = DemoModel.load(tmp_path / "moved")
    assert moved.teacher is None and "/no/longer/there" in moved.no_teacher
    assert moved.generate(Sample(label=0)).image.size == (8, 8)


@pytest.mark.parametrize("text", ["teacher: [", "- teacher", "teacher: 3", "\x00"])
def test_a_config_that_cannot_be_read_costs_only_the_comparison(folders, tmp_path, text):
    shutil.copytree(folders / "student", tmp_path / "student")
    (tmp_path / "student" / "config.yaml").write_text(text)
    assert DemoModel.load(tmp_path / "student").teacher is None


def test_a_teacher_that_does_not_fit_is_named(folders):
    with pytest.raises(InputError, match=r"teacher is 'digits'.*\(1, 8, 8\), but the student has \(3, 8, 8\)"):
        DemoModel.load(folders / "student", "digits")
    with pytest.raises(InputError, match="number of classes"):
        DemoModel.load(folders / "plain", "digits")
    with pytest.raises(InputError, match="teacher is '/no/teacher'"):
        DemoModel.load(folders / "student", "/no/teacher")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model is empty"),
        ("/no/such", "which is not a folder"),
        ("../no/such", "which is not a folder"),
        ("no such model", "neither a folder nor a Hub id"),
        ("a\0b", "model is"),
        ("x" * 5000, "model is"),
    ],
)
def test_a_model_that_is_not_there_is_named(name, message):
    with pytest.raises(InputError, match=message):
        DemoModel.load(name)


def test_a_folder_that_is_no_student_is_named(folders, tmp_path):
    with pytest.raises(InputError, match="not a student of Physics Informed Distillation .*EDMEulerScheduler"):
        DemoModel.load(folders / "teacher")
    with pytest.raises(InputError, match="holds no diffusers pipeline"):
        DemoModel.load(tmp_path)
    shutil.copytree(folders / "plain", tmp_path / "torn")
    shutil.rmtree(tmp_path / "torn" / "unet")
    with pytest.raises(InputError, match="which diffusers cannot load"):
        DemoModel.load(tmp_path / "torn")


def test_code_of_a_model_is_not_run(folders, tmp_path):
    shutil.copytree(folders / "plain", tmp_path / "hostile")
    for path in ("pipeline.py", "scheduler/pid_diffusers.py"):
        (tmp_path / "hostile" / path).write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    DemoModel.load(tmp_path / "hostile")
    index = tmp_path / "hostile" / "model_index.json"
    index.write_text(index.read_text().replace('"pid_diffusers"', '"evil"'))
    (tmp_path / "hostile" / "scheduler" / "evil.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w').close()\n")
    with pytest.raises(InputError):
        DemoModel.load(tmp_path / "hostile")
    assert not (tmp_path / "run").exists()


def test_the_logic_imports_no_gradio():
    code = "import sys, pid_diffusers.demo; print('gradio' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_the_student_that_comes_with_the_package_is_opened_by_its_name_with_its_teacher():
    model = DemoModel.load("digits")
    assert (model.name, model.teacher_name) == ("digits-student", "digits")
    assert model.compare(Sample(seed=5, label=3), heun_steps=20).rms_distance < 0.3


def test_a_student_in_latent_space_is_shown_as_images(tmp_path):
    dit, vae = tiny_dit(), tiny_vae()
    DiTPipeline(dit, vae, DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "teacher")
    scheduler = PIDScheduler(**Denoiser.from_pretrained(tmp_path / "teacher").trajectory_config)
    OneStepPIDPipeline(dit, scheduler, vae).save_pretrained(tmp_path / "student")
    model = DemoModel.load(tmp_path / "student", tmp_path / "teacher")
    sample = Sample(seed=1, label=3)
    assert model.num_classes == 10
    assert model.generate(sample).image.size == model.grid([sample])[0].size == (16, 16)
    points = model.compare(sample, heun_steps=2).points
    assert len(points) == 3 and points[-1][1].size == (16, 16)
    card = render_card(tmp_path / "student")
    assert "16 × 16 colour images of 10 classes" in card


# Text to image


def test_a_student_that_is_told_a_text_draws_what_its_pipeline_does(text_folder):
    model = DemoModel.load(text_folder)
    assert model.takes_prompt and model.num_classes is None
    pipe = OneStepPIDTextToImagePipeline.from_pretrained(text_folder)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    expected = pipe("a red fox", latents=latents).images[0]
    image = model.generate(Sample(seed=3, prompt="a red fox")).image
    np.testing.assert_allclose(pixels(image), pixels(expected), atol=2)
    assert image.tobytes() != model.generate(Sample(seed=3, prompt="a dog")).image.tobytes()
    one, two = model.grid(model.samples(2, seed=3, prompt="a red fox"))
    np.testing.assert_allclose(pixels(one), pixels(image), atol=1)
    assert two.tobytes() != one.tobytes()


def test_a_student_that_is_told_a_text_is_not_compared_and_says_so(text_folder):
    model = DemoModel.load(text_folder)
    with pytest.raises(InputError, match="cannot be compared with its teacher here"):
        model.compare(Sample(prompt="a red fox"))
    with pytest.raises(InputError, match="teacher is 'digits'.*leave it out"):
        DemoModel.load(text_folder, teacher="digits")
