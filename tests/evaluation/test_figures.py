"""The figures show the numbers that they are given, in files that are the same each time, and say what is missing."""

import json
import math
import shutil
from statistics import fmean
from xml.etree import ElementTree

import matplotlib
import pytest
import torch
from matplotlib.colors import to_hex
from PIL import Image
from text_students import save_text_student
from tiny_text import tiny_sd

from pid_diffusers import InputError
from pid_diffusers.cli import main
from pid_diffusers.evaluation.diagnostics import open_run
from pid_diffusers.evaluation.draw import draw_figures
from pid_diffusers.evaluation.figures import (
    COLORS,
    Curve,
    Panel,
    plot_quality,
    plot_residuals,
    plot_training_curves,
    read_log,
    save_grids,
    save_quality,
    save_training_curves,
)
from pid_diffusers.evaluation.generate import BUILT_IN
from pid_diffusers.evaluation.same_seed import same_seed_samples

STEPS = (10, 20, 30, 40)
SIGMAS = [80.0, 10.0, 1.0, 0.1, 0.002]


def run_lines(scale: float = 1.0, speed: float = 1.0, steps=STEPS) -> list[dict]:
    """What a run logs: the loss at all steps, and the distance at every second."""
    losses = [{"step": n, "seconds": speed * n, "loss": scale / n} for n in steps]
    return losses + [{"step": n, "seconds": speed * n, "rms_distance": 2 * scale / n} for n in steps[1::2]]


def diagnostics(scale: float = 1.0, teacher: str = "digits") -> dict:
    """What is drawn of a `diagnostics.json`."""
    solvers = {
        "heun": {"calls_per_step": 2, "num_steps": [1, 2, 4], "distances": [8.0, 2.0, 0.5]},
        "euler": {"calls_per_step": 1, "num_steps": [1, 2, 4], "distances": [1.0, 0.5, 0.25]},
    }
    return {
        "teacher": teacher,
        "value": "pixel",
        "residual": {"sigmas": SIGMAS, "rms": [scale * x for x in (0.02, 0.03, 0.07, 0.04, 0.01)]},
        "trajectory": {"sigmas": SIGMAS, "relative": [0.0, 0.01 * scale, 0.05 * scale, 0.1 * scale, 0.12 * scale]},
        "worth": {"distance": 0.2 * scale, **solvers},
    }


def results(model: str, calls: int, fid: float | None, sampler: str = "pipeline", **protocol) -> dict:
    """What is drawn of a file of `pid-diffusers evaluate`."""
    settings = {
        "model": model,
        "model_sha256": model,
        "pipeline": "OneStepPIDPipeline" if calls == 1 else "ConsistencyModelPipeline",
        "sampler": sampler,
        "scheduler": "EDMEulerScheduler",
        "guidance_scale": None,
        "dtype": "float32",
        "network_calls_per_sample": calls,
        "num_samples": 1797,
        "reference_digest": "a",
        "extractor": "digits",
        "extractor_sha256": "b",
        "prompts_sha256": None,
        **protocol,
    }
    reasons = {"fid": "100 samples are too few."} if fid is None else {}
    return {"fid": fid, "repeats": [{"fid": fid}], "reasons": reasons, "protocol": settings}


def save_run(folder, scale: float = 1.0, speed: float = 1.0, diagnosed: bool = True):
    """A folder with what a run logged and what it was diagnosed with, without a student."""
    folder.mkdir(parents=True)
    files = {"metrics.jsonl": run_lines(scale, speed)[:4], "validation.jsonl": run_lines(scale, speed)[4:]}
    for name, lines in files.items():
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if diagnosed:
        (folder / "diagnostics.json").write_text(json.dumps(diagnostics(scale)))
    return str(folder)


def texts(path) -> str:
    """All that an SVG says."""
    root = ElementTree.parse(path).getroot()
    return "\n".join("".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text"))


def lines_of(axes) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


# --- what the figures show -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("x", "places"), [("step", [20, 40]), ("seconds", [30.0, 60.0])])
def test_seeds_of_a_label_become_their_mean_over_steps_and_over_seconds_with_a_band(x, places):
    runs = {"A": [run_lines(1.0, speed=1.0), run_lines(3.0, speed=2.0)], "B": [run_lines(7.0)]}
    figure = plot_training_curves(runs, x)
    distance, loss = figure.axes
    assert lines_of(distance)["A"] == (places, [fmean([2 / 20, 6 / 20]), fmean([2 / 40, 6 / 40])])
    assert lines_of(distance)["B"][1] == [14 / 20, 14 / 40]
    assert len(lines_of(distance)) == len(lines_of(loss)) == 2
    (band,) = distance.collections  # B has one seed, and no band
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == 2 / 40 and heights.max() == 6 / 20
    assert distance.get_xlabel() == {"step": "optimizer steps", "seconds": "training time (s)"}[x]


def test_the_loss_is_a_running_median_of_finite_values():
    losses = [4.0, 1.0, 100.0, math.nan, 2.0, 3.0]
    lines = [{"step": n, "seconds": n, "loss": value} for n, value in enumerate(losses)]
    (axes,) = plot_training_curves({"A": [lines]}).axes
    # the lower one of two
    assert lines_of(axes)["A"] == ([0, 1, 2, 4, 5], [1.0, 4.0, 2.0, 3.0, 2.0])


def test_seeds_are_averaged_where_all_of_them_have_been():
    runs = {"A": [run_lines(1.0), run_lines(3.0, steps=(10, 20))]}
    distance, loss = plot_training_curves(runs).axes
    assert lines_of(distance)["A"] == ([20], [fmean([2 / 20, 6 / 20])])
    assert lines_of(loss)["A"][0] == [10, 20]
    not_validated = run_lines(3.0)[:4]
    distance, loss = plot_training_curves({"A": [run_lines(1.0), not_validated]}).axes
    assert lines_of(distance)["A"] == ([20, 40], [2 / 20, 2 / 40])
    assert lines_of(loss)["A"][0] == list(STEPS)


def test_a_panel_of_one_s_own_is_drawn_and_one_without_data_is_not():
    panels = (Panel("rms_distance", "distance"), Panel("fid", "FID"))
    (axes,) = plot_training_curves({"A": [run_lines()]}, panels=panels).axes
    assert axes.get_ylabel() == "distance"
    with pytest.raises(InputError, match="'fid'"):
        plot_training_curves({"A": [run_lines()]}, panels=panels[1:])


def test_labels_that_differ_in_a_number_are_ordered_by_it_from_dark_to_light():
    runs = {f"N = {n}": [run_lines(n)] for n in (1000, 35, 250)}
    figure = plot_training_curves(runs)
    colors = [sum(matplotlib.colors.to_rgb(line.get_color())) for line in figure.axes[0].lines]
    assert list(lines_of(figure.axes[0])) == ["N = 35", "N = 250", "N = 1000"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["N = 35", "N = 250", "N = 1000"]
    assert colors == sorted(colors)


def test_nine_curves_differ_in_color_or_style_and_all_in_their_markers():
    figure = plot_training_curves({name: [run_lines(k + 1)] for k, name in enumerate("abcdefghi")})
    lines = figure.axes[0].lines
    assert len({line.get_marker() for line in lines}) == 9
    assert len({(to_hex(line.get_color()), line.get_linestyle()) for line in lines}) == 9
    assert {to_hex(line.get_color()).upper() for line in lines} == {color.upper() for color in COLORS}


def test_residuals_are_read_from_the_highest_noise_level_to_the_lowest():
    figure = plot_residuals({"A": [diagnostics(1.0), diagnostics(2.0)], "B": [diagnostics(4.0)]})
    residual, trajectory = figure.axes
    x, y = lines_of(residual)["A"]
    assert x == sorted(SIGMAS) and y == pytest.approx([1.5 * value for value in (0.01, 0.04, 0.07, 0.03, 0.02)])
    assert lines_of(trajectory)["B"][1][-1] == 0.0
    for axes in figure.axes:
        assert axes.get_xlim()[0] > axes.get_xlim()[1] and axes.get_xscale() == "log"
    assert residual.get_yscale() == "log" and residual.get_ylabel() == "residual of the ODE, rms per pixel"


def test_quality_joins_the_calls_of_a_solver_and_sets_students_side_by_side_at_theirs():
    curves = {"teacher, heun": [(16, 0.1), (4, 1.0), (4, 3.0)]}
    figure = plot_quality(curves, {"A": [(1, 0.2), (1, 0.4)], "B": [(1, 0.3)]}, "FID")
    drawn = lines_of(figure.axes[0])
    assert drawn["teacher, heun"] == ([4, 16], [2.0, 0.1])
    (a,), (b,) = drawn["A"][0], drawn["B"][0]
    assert a < 1 < b and a * b == pytest.approx(1) and b / a < 1.2
    assert drawn["A"][1] == [pytest.approx(0.3)]
    _, star, other = figure.axes[0].lines
    assert star.get_linestyle() == "None" and star.get_marker() == "*" and other.get_marker() != "*"
    alone = plot_quality(curves, {"A": [(1, 0.2)]}, "FID")
    assert lines_of(alone.axes[0])["A"] == ([1.0], [0.2])


def test_numbers_on_logarithmic_axes_are_plain():
    points = {"student": [(1, 0.00002)]}
    figure = plot_quality({"teacher": [(n, 0.2 / n**2) for n in (1, 10, 100, 2000)]}, points, "FID")
    figure.draw_without_rendering()
    shown = {
        text.get_text() for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis) for text in axis.get_ticklabels()
    }
    assert {"1", "10", "1,000", "0.0001", "0.1"} <= shown
    assert not any("e" in text or "10^" in text for text in shown)


def test_an_axis_of_a_small_range_has_numbers_too():
    figure = plot_quality({"teacher": [(10, 0.130), (12, 0.137)]}, {}, "FID")
    figure.draw_without_rendering()
    low, high = figure.axes[0].get_ylim()
    shown = [text for text in figure.axes[0].yaxis.get_ticklabels() if low <= text.get_position()[1] <= high]
    assert len(shown) >= 3


def test_points_at_or_below_0_are_left_out_of_quality_and_labels_without_others_with_them():
    curves = {"Heun": [(2, 1.0), (4, 3.0), (4, 0.0), (8, 0.0), (0, 0.5)], "Euler": [(1, -0.1), (2, math.nan)]}
    (axes,) = plot_quality(curves, {"A": [(1, 0.2)], "B": [(1, None)]}, "FID").axes
    assert lines_of(axes) == {"Heun": ([2, 4], [1.0, 3.0]), "A": ([1.0], [0.2])}
    with pytest.raises(InputError, match="no value above 0"):
        plot_quality({"Heun": [(2, 0.0)]}, {}, "FID")


def test_values_that_are_no_numbers_are_left_out_of_training_curves():
    lines = run_lines()
    for line, value in ((lines[4], None), (lines[1], "nan")):
        line[{"rms_distance", "loss"}.intersection(line).pop()] = value
    distance, loss = plot_training_curves({"A": [lines]}).axes
    assert lines_of(distance)["A"] == ([40], [2 / 40])
    assert lines_of(loss)["A"][0] == [10, 30, 40]


def test_a_mean_without_enough_runs_is_left_out():
    assert Curve.of([(1, 1, 2.0), (1, 1, 4.0), (2, 2, 5.0)], least=2) == Curve([1], [3.0], [2.0], [4.0])
    assert Curve.of([(1, 1, math.nan)]) == Curve([], [], [], [])


# --- the files -------------------------------------------------------------------------------------------------------


def test_files_are_the_same_byte_for_byte_whatever_the_user_s_style(tmp_path):
    images = torch.linspace(-1, 1, 2 * 64).reshape(2, 1, 8, 8)
    for folder, style in (("a", {}), ("b", {"axes.facecolor": "black", "font.size": 20, "text.color": "red"})):
        with matplotlib.rc_context(style):
            save_training_curves(tmp_path / folder / "training", {"A": [run_lines()]})
            save_grids(tmp_path / folder / "grid", [{"teacher": images}, {"student": images}], [["p", "q"], None])
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["grid.png", "grid.svg", "training.png", "training.svg"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_picture_is_opaque_and_the_text_of_an_svg_is_text(tmp_path):
    save_quality(tmp_path / "q", {"teacher, $40": [(2, 1.0), (4, 0.5)]}, {"a_b^c": [(1, 0.7)]}, "FID $")
    image = Image.open(tmp_path / "q.png").convert("RGBA")
    assert image.getpixel((0, 0)) == (255, 255, 255, 255) and image.info["dpi"] == pytest.approx((200, 200), abs=0.1)
    said = texts(tmp_path / "q.svg")
    assert {"teacher, $40", "a_b^c", "FID $", "network calls per image"} <= set(said.splitlines())


def test_a_path_with_a_suffix_is_the_only_file(tmp_path):
    save_quality(tmp_path / "q.svg", {"teacher": [(2, 1.0)]}, {}, "FID")
    assert [path.name for path in tmp_path.iterdir()] == ["q.svg"]


def test_a_log_is_read_without_the_line_that_a_killed_run_has_cut_short(tmp_path):
    log, line = tmp_path / "metrics.jsonl", '{"step": 1, "seconds": 0.5, "loss": null}'
    assert read_log(log) == []
    for end in ("", "\n", '\n{"step": 2, "sec', "\n\0\0\0"):
        log.write_text(line + end)
        assert read_log(log) == [{"step": 1, "seconds": 0.5, "loss": None}]
    log.write_text('{"st')
    assert read_log(log) == []


@pytest.mark.parametrize("broken", ['{"step": 2, "sec', "", "3", '{"step": 2}', '{"step": 2, "seconds": null}'])
def test_a_broken_line_inside_a_log_is_named(broken, tmp_path):
    line = '{"step": 1, "seconds": 0.5}\n'
    (tmp_path / "metrics.jsonl").write_text(line + broken + "\n" + line)
    with pytest.raises(InputError, match=r"metrics.jsonl', whose line 2 is no JSON object") as raised:
        read_log(tmp_path / "metrics.jsonl")
    assert "remove" not in str(raised.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_draws_samples_of_the_built_in_student_and_says_what_it_leaves_out(tmp_path, capsys):
    assert main(["figures", "digits-student", "--num_images", "2", "--output", str(tmp_path / "f")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"Saved {tmp_path / 'f' / 'samples'}.png and .svg"
    assert "Left out residual: no run has a diagnostics.json" in printed[4]
    assert len(printed) == 7
    assert {path.name for path in (tmp_path / "f").iterdir()} == {
        f"{name}.{suffix}" for name in ("samples", "trajectory") for suffix in ("png", "svg")
    }
    assert set(texts(tmp_path / "f" / "samples.svg").splitlines()) == {
        "from the same seeds",
        "class 0",
        "class 1",
        "teacher, 80 calls",
        "digits-student, 1 call",
    }
    with open_run("digits-student", num_samples=2) as (student, teacher, config):
        samples = same_seed_samples(student, teacher, 2, seed=config.seed)
    rows = {"teacher, 80 calls": samples.teacher, "digits-student, 1 call": samples.student}
    save_grids(tmp_path / "same.png", [rows], [["class 0", "class 1"]], "from the same seeds")
    assert (tmp_path / "same.png").read_bytes() == (tmp_path / "f" / "samples.png").read_bytes()
    said = texts(tmp_path / "f" / "trajectory.svg").splitlines()
    assert said.count("digits-student") == said.count("teacher, 40 steps") == 2  # of two starts
    assert {"σ = 80", "σ = 0.002"} <= set(said)


def test_the_command_draws_all_curves_of_logs_and_results(tmp_path, capsys):
    runs = [save_run(tmp_path / f"{name}", scale) for name, scale in (("a0", 1.0), ("a1", 1.2), ("b", 2.0))]
    files = {
        "s": results("student", 1, 0.08),
        "h1": results("teacher", 2, 3.0, "heun"),
        "h2": results("teacher", 8, 0.3, "heun"),
        "p": results("teacher", 40, 0.1),
        "none": results("other", 4, None),
    }
    for name, found in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    given = ["--labels", "A", "A", "B", "--results", *(str(tmp_path / f"{name}.json") for name in files)]
    assert main(["figures", *runs, *given, "--output", str(tmp_path / "f")]) == 0
    printed = capsys.readouterr().out
    assert "Left out samples: model is" in printed and "Left out trajectory: model is" in printed
    assert "none.json (100 samples are too few)" in printed
    names = ("training_steps", "training_time", "residual", "quality", "distance_cost")
    assert {path.name for path in (tmp_path / "f").iterdir()} == {f"{n}.{s}" for n in names for s in ("png", "svg")}
    said = {name: texts(tmp_path / "f" / f"{name}.svg").splitlines() for name in names}
    for name in ("training_steps", "training_time", "residual", "distance_cost"):
        assert said[name].count("A") == said[name].count("B") == 1
    assert {"rms distance per pixel", "to the teacher's ODE endpoint", "optimizer steps"} <= set(
        said["training_steps"]
    )
    assert {"student", "teacher, heun", "teacher, EDMEuler", "FID of 1,797 samples (digits features)"} <= set(
        said["quality"]
    )
    assert {"teacher, Heun", "teacher, Euler", "to the teacher's 40-step Heun endpoint"} <= set(said["distance_cost"])


def test_prompts_stand_above_the_pictures_of_text_to_image_students(tmp_path, monkeypatch):
    monkeypatch.setenv("PID_DIFFUSERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tiny_sd().save_pretrained("teacher")
    (tmp_path / "prompts.txt").write_text("a red fox\na dog for $5 or $6\n")
    save_text_student(tmp_path / "student", tiny_sd(), lora=True, guidance_scale=3.0)
    draw_figures(["student", "digits-student"], ["LoRA", "digits"], num_images=2, only=["samples"])
    said = texts(tmp_path / "figures" / "samples.svg").splitlines()
    assert {"a red fox", "a dog for", "$5 or $6", "LoRA, 1 call", "class 0"} <= set(said)
    assert "teacher teacher, w = 3," in said and "teacher digits, 80 calls" in said  # each student has its own


def test_a_run_without_logs_or_diagnostics_is_named_and_left_out_of_the_curves(tmp_path):
    run, told = save_run(tmp_path / "a", diagnosed=False), []
    (tmp_path / "a" / "validation.jsonl").unlink()
    bare = shutil.copytree(BUILT_IN["digits-student"] / "scheduler", tmp_path / "bare")
    (bare / "config.yaml").write_text("teacher: digits\n")
    other = save_run(tmp_path / "c")
    draw_figures(
        [run, str(bare), other],
        output=str(tmp_path / "f"),
        only=["training_steps", "residual"],
        report=told.append,
    )
    assert f"{bare} (no metrics.jsonl), the distance of {run} (no validation.jsonl)" in told[0]
    assert f"{run} (no diagnostics.json), {bare} (no diagnostics.json)" in told[1]
    assert "bare" not in texts(tmp_path / "f" / "training_steps.svg")


def test_a_damaged_run_alone_is_left_out(tmp_path):
    for name, file, damage in (
        ("cut", "metrics.jsonl", lambda text: text + '{"step": 50, "sec'),
        ("inner", "validation.jsonl", lambda text: '{"step": 5\n' + text),
        ("keyless", "diagnostics.json", lambda text: text.replace('"value"', '"unit"')),
    ):
        save_run(tmp_path / name)
        (tmp_path / name / file).write_text(damage((tmp_path / name / file).read_text()))
    told, names = [], ["cut", "inner", "keyless"]
    draw_figures(
        [str(tmp_path / name) for name in names],
        output=str(tmp_path / "f"),
        only=["training_steps", "residual", "distance_cost"],
        report=told.append,
    )
    place = tmp_path / "inner"
    assert f", without {place} (path is {str(place / 'validation.jsonl')!r}, whose line 1 is no JSON" in told[0]
    for line in told[1:]:
        assert f", without {tmp_path / 'keyless'} (run is" in line and "is not one that 'pid-diffusers" in line
    shown = {
        name: set(names).intersection(texts(tmp_path / "f" / f"{name}.svg").splitlines())
        for name in ("training_steps", "residual", "distance_cost")
    }
    both = {"cut", "inner"}
    assert shown == {"training_steps": {"cut", "keyless"}, "residual": both, "distance_cost": both}


def draw_quality(folder, files: dict[str, dict]) -> list[str]:
    """The labels of `quality`, drawn of results in files of these names."""
    for name, found in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(found))
    draw_figures([], results=[str(folder / name) for name in files], output=str(folder / "f"), only=["quality"])
    return texts(folder / "f" / "quality.svg").splitlines()


def test_only_files_that_differ_in_calls_and_seed_alone_are_one_curve(tmp_path):
    said = draw_quality(
        tmp_path,
        {
            "one.json": results("student", 1, 0.2, seed=0),
            "two.json": results("student", 1, 0.3, seed=5000),
            "few.json": results("teacher", 2, 3.0, "heun", num_inference_steps=1),
            "many.json": results("teacher", 8, 0.3, "heun", num_inference_steps=4),
        },
    )
    assert said.count("student") == said.count("teacher, heun") == 1
    assert "mean, and range from" in said


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ({"guidance_scale": 3.0}, {"guidance_scale": 7.5}, {"m, w = 3", "m, w = 7.5"}),
        ({"guidance_scale": 3.0}, {"guidance_scale": None}, {"m, w = 3", "m"}),
        ({}, {"dtype": "float16"}, {"m, float32", "m, float16"}),
        ({}, {"model_sha256": "other"}, {"m, a.json", "m, b.json"}),
        ({"guidance_scale": 3.0}, {"guidance_scale": 3.0, "model_sha256": "other"}, {"m, a.json", "m, b.json"}),
    ],
)
def test_models_of_one_name_are_labeled_by_what_differs(first, second, labels, tmp_path):
    said = draw_quality(tmp_path, {"a.json": results("m", 1, 0.1, **first), "b.json": results("m", 1, 0.4, **second)})
    assert labels == {text for text in said if text.startswith("m") and not text.startswith("mean")}
    assert "mean, and range" not in "\n".join(said)  # of nothing


def test_models_in_files_of_one_name_are_labeled_by_their_folders_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = [results("m", 4, 0.1, "heun", model_sha256=key) for key in "pq"]
    found = {"p/r.json": others[0], "q/r.json": others[1], "r.json": results("m", 4, 0.1, "heun", dtype="float16")}
    for name, one in found.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(one))
    draw_figures([], results=list(found), only=["quality"])
    said = set(texts(tmp_path / "figures" / "quality.svg").splitlines())
    assert {"m, heun, float16", "m, heun, float32, p/r.json", "m, heun, float32, q/r.json"} <= said


@pytest.mark.parametrize("lacking", ["repeats", "reasons", "model_sha256", "prompts_sha256", "guidance_scale"])
def test_results_that_lack_something_get_one_sentence(lacking, tmp_path):
    found = results("m", 1, None)
    found.pop(lacking, None)
    found["protocol"].pop(lacking, None)
    (tmp_path / "r.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="r.json', which is no file that 'pid-diffusers evaluate' wrote"):
        draw_figures([], results=[str(tmp_path / "r.json")], output=str(tmp_path / "f"))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [(None, "teacher", None), ("residual", "rms", [0.1]), ("trajectory", "sigmas", None), ("worth", "distance", None)],
)
def test_diagnostics_that_lack_something_get_one_sentence(part, key, value, tmp_path):
    run, found = save_run(tmp_path / "a"), diagnostics()
    (found[part] if part else found)[key] = value
    (tmp_path / "a" / "diagnostics.json").write_text(json.dumps(found))
    with pytest.raises(InputError, match="whose diagnostics.json is not one that 'pid-diffusers diagnose' wrote"):
        draw_figures([run], output=str(tmp_path / "f"), only=["residual", "distance_cost"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": ["nowhere"]}, "run is 'nowhere', which is no output folder of train_pid.py"),
        ({"runs": ["empty"]}, "run is 'empty', which is no output folder"),
        ({"runs": []}, "runs is empty, and so is results"),
        ({"labels": ["A", "B"]}, "labels is of 2, but there are 1 runs"),
        ({"only": ["samples", "loss"]}, "only is 'loss'; choose from samples, trajectory"),
        ({"num_images": 0}, "num_images is 0; pass 1 or more"),
        ({"results": ["nowhere.json"]}, "results is 'nowhere.json', which is no file that"),
        ({"results": ["run/diagnostics.json"]}, "results is 'run/diagnostics.json', which is no file that"),
        ({"output": "no/folder"}, "output is 'no/folder', whose folder does not exist"),
        ({"output": "run/metrics.jsonl"}, "output is 'run/metrics.jsonl', which is a file"),
        ({"output": "taken"}, "output is 'taken', which holds residual.svg already"),
        ({"only": ["quality"]}, "nothing can be drawn; quality: there are no --results"),
        ({"runs": ["broken"], "only": ["residual"]}, "whose diagnostics.json is not one that"),
        (
            {"runs": ["broken"], "only": ["training_time"]},
            "metrics.jsonl', whose line 1 is no JSON object with numbers",
        ),
        (
            {"results": ["a.json", "b.json"], "only": ["quality"]},
            "'a.json' and 'b.json' differ in extractor_sha256, so that their FIDs cannot be compared",
        ),
        ({"results": ["b.json", "c.json"], "only": ["quality"]}, "'b.json' and 'c.json' differ in prompts_sha256"),
    ],
)
def test_what_cannot_be_drawn_gets_one_sentence(given, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "residual.svg").touch()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "diagnostics.json").write_text('{"model": "x"}')
    (tmp_path / "broken" / "metrics.jsonl").write_text('{"step": 1, "sec\n{"step": 2, "seconds": 1}\n')
    for name, protocol in (
        ("a", {}),
        ("b", {"extractor_sha256": "c"}),
        ("c", {"extractor_sha256": "c", "prompts_sha256": "d"}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(results("m", 1, 0.1, **protocol)))
    given = {"runs": ["run"], **given}
    arguments = ["figures", *given.pop("runs")]
    for name, value in given.items():
        arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.startswith("pid-diffusers: error: ")
    assert printed.err.count("\n") == 1 and printed.err.endswith(".\n")
    assert not (tmp_path / "figures").exists()
