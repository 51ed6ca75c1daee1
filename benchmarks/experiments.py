"""The paper's experiments on scikit-learn's digits: trains what is missing, measures it, prints tables.

    python benchmarks/experiments.py grid_points --output_dir experiments
    python benchmarks/experiments.py all --output_dir experiments

    grid_points   Fig. 3: the number of grid points N
    schemes       Table 3: first and second order, also on coarse grids
    distances     Fig. 4: l2, l1, pseudo-Huber, LPIPS
    students      Table 5: full and small students
    heads         the heads edm and sample
    solvers       Table 1's frame: the teacher by Euler, Heun, DDIM and DPM-Solver at 1 to 250 calls, PID at 1
    speed         Table 4: seconds per 10 iterations

Those that train are the presets in benchmarks/experiments: settings over those of the preset `digits`, for the seeds 0
to 2, in 250 steps. What is in the output folder is not run again, and several experiments share runs. `--settings
max_train_steps=20000` changes all runs, for a machine that can do more. `--jobs` runs go on at a time, each with its
share of the cores.

Every run is a folder as train_pid.py writes it, with `measured.json`: the rms distance to the teacher's 40-step Heun
endpoints (512 seeds, images in [−1, 1]), the share of digits that are read as asked, and FID on the features of a
digit classifier (1,797 samples against scikit-learn's 1,797 images). All of it is gathered in `experiments.json`, and
drawn in the folder `figures`.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import yaml
from diffusers import DDIMScheduler, EDMDPMSolverMultistepScheduler

from pid_diffusers import Denoiser, OneStepPIDPipeline, TrajectoryModel
from pid_diffusers.denoisers import euler, heun
from pid_diffusers.evaluation.digits import DigitClassifier, load_digits
from pid_diffusers.evaluation.draw import draw_figures
from pid_diffusers.evaluation.extractors import extract, load_extractor
from pid_diffusers.evaluation.figures import save_quality
from pid_diffusers.evaluation.metrics import Gaussian, frechet_distance
from pid_diffusers.evaluation.provenance import describe_compute, versions
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.evaluation.same_seed import batches, draw_starts, same_seed_samples, solve
from pid_diffusers.training import Trainer, TrainingConfig, parse_config
from pid_diffusers.training.build import create_loss, create_scheduler, create_student, create_teacher
from pid_diffusers.training.config import load_preset
from pid_diffusers.training.launch import hide_loading_bars
from pid_diffusers.training.noise import draw_batch

ROOT = Path(__file__).parent.parent
PRESETS = ROOT / "benchmarks" / "experiments"
STUDENTS = {
    "full": ROOT / "pid_diffusers" / "assets" / "digits-teacher" / "unet" / "config.json",
    "small_digits_student": ROOT / "examples" / "small_digits_student.json",
}
TRAINED = ("grid_points", "schemes", "distances", "students", "heads")
SEEDS = (0, 1, 2)
# what all runs have instead of what the preset `digits` says: fewer steps, since there are 63 runs, more validations
COMMON = {
    "max_train_steps": 250,
    "resume_from_checkpoint": "latest",  # of a run that was interrupted
    "report_to": "none",
    "checkpointing_steps": 1000,
    "checkpoints_total_limit": 1,
    "validation_steps": 25,
    "num_validation_samples": 64,
}
FINE_STEPS = 200  # of Heun's method, where 40 steps' own error of 0.0025 counts
NUM_STARTS = 512
NUM_FID_SAMPLES = 1797
FID_SEED = 1  # of the starts, none of which training draws
MEASURED = "measured.json"
# network calls of the solvers; Heun's method needs an even number
CALLS = (1, 2, 4, 6, 8, 12, 18, 36, 80, 250)
SPEED_RUNS = {
    "upwind": {"scheme": "upwind"},
    "midpoint": {"scheme": "midpoint"},
    "central": {"scheme": "central"},
    "midpoint, --split_batch": {"scheme": "midpoint", "split_batch": True},
    "midpoint, half the channels": {
        "scheme": "midpoint",
        "student_config": str(STUDENTS["small_digits_student"]),
    },
    "midpoint, LPIPS (digits)": {"scheme": "midpoint", "distance": "lpips", "lpips_network": "digits"},
}
STUDENT = "PID student"
DISTILLATION_CALLS = "the network calls of consistency distillation"


# --- the runs --------------------------------------------------------------------------------------------------------


def variants(experiment: str, changes: dict) -> dict[str, dict]:
    """The settings of each variant of an experiment by its name, without those that all runs have."""
    content = yaml.safe_load((PRESETS / f"{experiment}.yaml").read_text(encoding="utf-8"))
    for settings in content["variants"].values():
        if "student_config" in settings:
            settings["student_config"] = str(ROOT / settings["student_config"])
    common = content.get("settings", {})
    return {name: _changed({**common, **settings, **changes}) for name, settings in content["variants"].items()}


def _changed(settings: dict) -> dict:
    """Those settings that differ from what all runs have; the head is that of the digits' teacher, unless one is
    named."""
    base = {"prediction_type": "edm", **load_preset("digits"), **COMMON}
    return {key: value for key, value in settings.items() if key not in base or base[key] != value}


def run_folder(output_dir: Path, settings: dict, seed: int) -> Path:
    """A folder that settings and seed name, so that experiments share their runs."""
    texts = {key: str(value).replace("/", "_") for key, value in sorted(settings.items())}
    for name, path in STUDENTS.items():
        if settings.get("student_config") == str(path):
            texts["student_config"] = name
    return output_dir / "runs" / ",".join([*(f"{key}={text}" for key, text in texts.items()), f"seed={seed}"])


def train(folder: Path, settings: dict, seed: int, threads: int):
    """One run, measured."""
    torch.set_num_threads(threads)
    hide_loading_bars()
    flags = {**COMMON, **settings, "seed": seed, "output_dir": str(folder)}
    config = parse_config([word for key, value in flags.items() for word in (f"--{key}", str(value))])
    trainer = Trainer(config)
    report = RunReport(config, denoiser=trainer.teacher)
    result = trainer.train(report.validate)
    if result.interrupted_by is not None:
        raise KeyboardInterrupt
    measured = measure(result.student, result.teacher) | {"train_seconds": round(result.seconds, 1)}
    (folder / MEASURED).write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


_endpoints = {}


@torch.no_grad()
def measure(student: TrajectoryModel, teacher: Denoiser) -> dict:
    """Distance, digits read as asked, and FID of the student's one-step samples."""
    device = _device()
    student.to(device)
    teacher.to(device)
    samples = same_seed_samples(student, teacher, NUM_STARTS, endpoints=_endpoints.get("teacher"))
    _endpoints["teacher"] = samples.teacher
    z, condition = draw_starts(student, teacher, NUM_FID_SAMPLES, FID_SEED)
    images = torch.cat(
        [
            student(some, student.scheduler.config.sigma_min, **c).cpu()
            for some, c in batches(z, condition, 128, device)
        ]
    )
    return {
        "rms_distance": samples.rms_distance,
        "read_as_asked": DigitClassifier().accuracy(samples.student, samples.condition["class_labels"]),
        "fid": fid(images),
        "num_parameters": sum(p.numel() for p in student.unet.parameters()),
    }


def fid(images: torch.Tensor) -> float:
    """Of images in [−1, 1], rounded to 8 bits, against all digits, on the features of `--extractor digits`."""
    extractor = load_extractor("digits")

    def features(some: torch.Tensor) -> Gaussian:
        pixels = ((some.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return Gaussian.of(extract(extractor, pixels)["features"])

    return frechet_distance(features(images), features(load_digits()[0]))


def _worker(job: tuple):
    folder = job[0]
    if not multiprocessing.parent_process().is_alive():  # it was killed, and nobody waits for the runs that remain
        os._exit(1)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / "log.txt", "w") as log, redirect_stdout(log), redirect_stderr(log):
            train(*job)
    except Exception as error:
        return f"{folder.name}: {type(error).__name__}: {error}"
    return f"{folder.name}: {json.loads((folder / MEASURED).read_text())}"


def run_all(jobs: list[tuple], processes: int):
    """Trains what is missing, `processes` runs at a time."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_worker, (*job, threads)) for job in jobs]
        for i, done in enumerate(as_completed(running), 1):
            print(f"[{i} of {len(jobs)}] {done.result()}", file=sys.stderr, flush=True)


# --- what perfect training would reach -------------------------------------------------------------------------------


_fine_endpoints = {}


@torch.no_grad()
def discretization_error(scheme: str, num_train_timesteps: int, num_starts: int = 128) -> float | None:
    """
    The distance of a student whose loss is 0 (theorem 1), rms per pixel to the teacher's endpoints by 200 Heun steps:
    of Euler's solution on the N points for `upwind`, of the implicit midpoint rule's for `midpoint`, whose equations
    are solved by iteration. None for `central`, which belongs to no solver.
    """
    if scheme == "central":
        return None
    config = TrainingConfig(teacher="digits", num_train_timesteps=num_train_timesteps)
    teacher = create_teacher(config).eval()
    scheduler = create_scheduler(config, teacher)
    z, condition = draw_starts(TrajectoryModel(teacher.unet, scheduler), teacher, num_starts, 0)
    x, sigmas = z.double(), scheduler.grid()
    if num_starts not in _fine_endpoints:
        _fine_endpoints[num_starts] = solve(heun, teacher, x, scheduler.grid(FINE_STEPS + 1), **condition)
    endpoint = _fine_endpoints[num_starts]
    if scheme == "upwind":
        x = solve(euler, teacher, x, sigmas, **condition)
        return (x - endpoint).square().mean().sqrt().item()
    for t, s in pairwise(sigmas.tolist()):
        middle = (t + s) / 2
        x = _fixed_point(
            lambda y, x=x, t=t, s=s, m=middle: x + (s - t) * ((x + y) / 2 - teacher((x + y) / 2, m, **condition)) / m,
            euler(teacher, x, [t, s], **condition)[-1],
        )
    return (x - endpoint).square().mean().sqrt().item()


def _fixed_point(function: Callable, x: torch.Tensor, tolerance: float = 1e-4, most: int = 30) -> torch.Tensor:
    for _ in range(most):
        x, before = function(x), x
        if (x - before).square().mean().sqrt() < tolerance:
            return x
    return x


# --- solvers of the teacher ------------------------------------------------------------------------------------------


def ddim_grid(sigma_max: float, num_steps: int) -> list[float]:
    """The noise levels of DDIM's equally spaced time steps with the linear betas of DDPM, from T to 0. Through a
    denoiser D, a step of DDIM is one of Euler's method between them."""
    alphas = DDIMScheduler(beta_schedule="linear").alphas_cumprod.double()
    log_sigmas = ((1 - alphas) / alphas).log() / 2
    last = int((log_sigmas < math.log(sigma_max)).sum())  # the first time step beyond T
    low, high = log_sigmas[last - 1 : last + 1].tolist()
    most = last - 1 + (math.log(sigma_max) - low) / (high - low)
    sigmas = []
    for i in range(num_steps):
        time = most * (1 - i / num_steps)
        k = min(int(time), len(log_sigmas) - 2)
        sigmas.append(math.exp(log_sigmas[k] + (time - k) * (log_sigmas[k + 1] - log_sigmas[k])))
    return [*sigmas, 0.0]


def dpm_solver(teacher: Denoiser, z: torch.Tensor, num_steps: int, **condition) -> torch.Tensor:
    """DPM-Solver++ (2M) as diffusers has it for EDM's models, `EDMDPMSolverMultistepScheduler`."""
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=teacher.sigma_data)
    scheduler.set_timesteps(num_steps)
    x = z
    for t in scheduler.timesteps:
        output = teacher.unet(scheduler.scale_model_input(x, t), t, **condition).sample
        x = scheduler.step(output, t, x).prev_sample
    return x


@torch.no_grad()
def solvers(student_folders: list[Path], calls: tuple[int, ...] = CALLS) -> dict[str, list[dict]]:
    """FID and the distance to the teacher's endpoint by 200 Heun steps, of its solvers and of students, from the same
    starts."""
    teacher = create_teacher(TrainingConfig(teacher="digits")).eval()
    pipelines = [OneStepPIDPipeline.from_pretrained(folder) for folder in student_folders]
    students = [TrajectoryModel(pipeline.unet.eval(), pipeline.scheduler) for pipeline in pipelines]
    scheduler = students[0].scheduler
    z, condition = draw_starts(students[0], teacher, NUM_FID_SAMPLES, FID_SEED)

    def sample(function: Callable) -> torch.Tensor:
        parts = zip(z.split(128), condition["class_labels"].split(128), strict=True)
        return torch.cat([function(some, class_labels=labels).float() for some, labels in parts])

    methods = {
        "Euler": (1, lambda n: lambda x, **c: solve(euler, teacher, x, scheduler.grid(n + 1), **c)),
        "Heun": (2, lambda n: lambda x, **c: solve(heun, teacher, x, scheduler.grid(n + 1), **c)),
        "DDIM": (1, lambda n: lambda x, **c: solve(euler, teacher, x, torch.tensor(ddim_grid(80.0, n)), **c)),
        "DPM-Solver++": (1, lambda n: lambda x, **c: dpm_solver(teacher, x, n, **c)),
    }
    endpoints = sample(methods["Heun"][1](FINE_STEPS))

    def of(num_calls: int, images: torch.Tensor) -> dict:
        distance = (images - endpoints).square().mean().sqrt().item()
        return {"calls": num_calls, "fid": fid(images), "rms_distance": distance}

    found = {STUDENT: [], "Heun, 200 steps": [of(2 * FINE_STEPS, endpoints)]}
    for student in students:
        found[STUDENT].append(of(1, sample(lambda x, s=student, **c: s(x, scheduler.config.sigma_min, **c))))
    for name, (calls_per_step, method) in methods.items():
        steps = [n // calls_per_step for n in calls if n % calls_per_step == 0]
        found[name] = [of(n * calls_per_step, sample(method(n))) for n in steps]
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


# --- seconds per 10 iterations ---------------------------------------------------------------------------------------


def speed(repeats: int = 5, iterations: int = 10) -> dict[str, float]:
    """
    Seconds per 10 iterations of batch 128, without validation and checkpoints: the fastest of `repeats`, taken in
    turn, since other work on the machine only adds time.

    Beside them stands what consistency distillation calls in an iteration: the student once with a gradient, a moving
    average of it once, and the teacher twice.
    """
    steps = {name: _iteration(settings) for name, settings in SPEED_RUNS.items()}
    steps[DISTILLATION_CALLS] = _iteration({}, of_consistency_distillation=True)
    times = {name: [] for name in steps}
    synchronize = torch.accelerator.synchronize if _device().type != "cpu" else lambda: None
    for repeat in range(repeats + 1):  # the first one allocates
        for name, step in steps.items():
            synchronize()
            start = time.perf_counter()
            for i in range(iterations):
                step(i)
            synchronize()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: min(found) * 10 / iterations for name, found in times.items()}


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _iteration(settings: dict, of_consistency_distillation: bool = False) -> Callable[[int], None]:
    config = TrainingConfig(teacher="digits", **settings)
    device = _device()
    teacher = create_teacher(config).eval()
    student = TrajectoryModel(create_student(config, teacher).train(), create_scheduler(config, teacher)).to(device)
    loss = create_loss(config, teacher).to(device)
    teacher.to(device).requires_grad_(False)  # after the student was copied from it
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step(i: int):
        z, indices, generator = draw_batch((128, 1, 8, 8), 80.0, 250, (0, 0, i, 0), device)
        labels = torch.randint(10, (128,), generator=generator).to(device)
        if of_consistency_distillation:
            sigma = student.scheduler.grid()[indices].float().to(device)
            output = student.network_output(z, sigma, class_labels=labels)
            with torch.no_grad():
                target = student.network_output(z, sigma, class_labels=labels)
                for _ in range(2):
                    teacher(z, sigma, class_labels=labels)
            (output - target).square().mean().backward()
        else:
            loss(student, teacher, z, indices, class_labels=labels).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


# --- tables ----------------------------------------------------------------------------------------------------------


def gather(experiment: str, output_dir: Path, changes: dict) -> dict:
    """What was measured of an experiment's runs, by variant and seed."""
    found = {}
    for name, settings in variants(experiment, changes).items():
        files = {seed: run_folder(output_dir, settings, seed) / MEASURED for seed in SEEDS}
        found[name] = {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}
    return found


def table(experiment: str, found: dict, errors: dict[str, float | None]) -> str:
    """In Markdown: the mean over the seeds, and the lowest and the highest."""

    def cell(runs: dict, key: str, form: str, factor: float = 1.0) -> str:
        values = [factor * run[key] for run in runs.values()]
        mean, low, high = (f"{value:{form}}" for value in (statistics.fmean(values), min(values), max(values)))
        return f"{mean} ({low} to {high})"

    def label(name: str, runs: dict) -> str:
        return name if len(runs) == len(SEEDS) else f"{name} ({len(runs)} of {len(SEEDS)} seeds)"

    with_errors = any(error is not None for error in errors.values())
    lines = [f"| {experiment} | distance | FID | read as asked, % |" + (" at loss 0 |" if with_errors else "")]
    lines.append("|---|---|---|---|" + ("---|" if with_errors else ""))
    for name, runs in found.items():
        if runs:
            row = [label(name, runs), cell(runs, "rms_distance", ".3f"), cell(runs, "fid", ".3f")]
            row.append(cell(runs, "read_as_asked", ".1f", 100))
            if with_errors:
                row.append("–" if errors[name] is None else f"{errors[name]:.3f}")
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def write_summary(output_dir: Path, name: str, found: dict):
    """Adds an experiment to `experiments.json`."""
    path = output_dir / "experiments.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    hardware = describe_compute(_device(), 1, 0.0)["hardware"]
    summary[name] = {**found, "hardware": hardware, "versions": versions()}
    path.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def draw(output_dir: Path, experiment: str, runs: dict[str, list[Path]]):
    """The training curves of an experiment, in `figures/EXPERIMENT`."""
    folder = output_dir / "figures" / experiment
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(exist_ok=True)
    labels = [name for name, folders in runs.items() for _ in folders]
    folders = [str(folder) for folders in runs.values() for folder in folders]
    draw_figures(folders, labels, output=str(folder), only=("training_steps", "training_time"))


def draw_solvers(output_dir: Path, found: dict[str, list[dict]]):
    """FID and same-seed distance against network calls, `figures/solvers_fid` and `figures/solvers_distance`."""
    texts = {"fid": "FID of 1,797 samples (digits features)"}
    texts["rms_distance"] = f"rms distance per pixel\nto the teacher's endpoint, {FINE_STEPS} Heun steps"
    for key, text in texts.items():
        points = {name: [(found["calls"], found[key]) for found in some] for name, some in found.items()}
        curves = {f"teacher, {name}": some for name, some in points.items() if name != STUDENT and len(some) > 1}
        name = "solvers_" + key.removeprefix("rms_")
        save_quality(output_dir / "figures" / name, curves, {STUDENT: points[STUDENT]}, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=[*TRAINED, "solvers", "speed", "all"], metavar="EXPERIMENT")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE", help="of all runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    args = parser.parse_args()
    hide_loading_bars()
    names = [*TRAINED, "solvers", "speed"] if "all" in args.experiments else args.experiments
    changes = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in args.settings)}
    students = [run_folder(args.output_dir, _changed(changes), seed) for seed in SEEDS]
    if "solvers" in names and not {"schemes", "distances", "students", "heads"} & set(names):  # which train them
        if not all((folder / MEASURED).exists() for folder in students):
            parser.error("solvers needs the students of heads, which are not there; run heads first, or with it.")
    args.output_dir.mkdir(parents=True, exist_ok=True)

    trained = {name: variants(name, changes) for name in names if name in TRAINED}
    jobs = {}  # every first seed before the second ones
    for seed in SEEDS:
        for settings in (settings for runs in trained.values() for settings in runs.values()):
            folder = run_folder(args.output_dir, settings, seed)
            if not (folder / MEASURED).exists():
                jobs[folder] = (folder, settings, seed)
    if jobs:
        run_all(list(jobs.values()), args.jobs)
    missing = [str(folder) for folder in jobs if not (folder / MEASURED).exists()]
    if missing:
        print(f"These runs failed; their log.txt says why: {', '.join(missing)}", file=sys.stderr)
    for name in trained:
        found = gather(name, args.output_dir, changes)
        errors = dict.fromkeys(found)
        if name in ("grid_points", "schemes"):
            for variant, settings in trained[name].items():
                config = {**load_preset("digits"), **settings}
                errors[variant] = discretization_error(config["scheme"], config["num_train_timesteps"])
        write_summary(args.output_dir, name, {"runs": found, "at_loss_0": errors})
        folders = {
            variant: [run_folder(args.output_dir, trained[name][variant], seed) for seed in runs]
            for variant, runs in found.items()
        }
        if any(folders.values()):
            draw(args.output_dir, name, folders)
        print(table(name, found, errors), end="\n\n", flush=True)
    if "solvers" in names:
        found = solvers(students)
        write_summary(args.output_dir, "solvers", found)
        draw_solvers(args.output_dir, found)
        print("| solver | calls | FID | distance |\n|---|---|---|---|")
        for solver, some in found.items():
            for values in some:
                print(f"| {solver} | {values['calls']} | {values['fid']:.3f} | {values['rms_distance']:.4f} |")
        print(flush=True)
    if "speed" in names:
        found = speed()
        write_summary(args.output_dir, "speed", found)
        print("| an iteration of batch 128 | seconds per 10 | relative |\n|---|---|---|")
        for name, seconds in found.items():
            print(f"| {name} | {seconds:.2f} | {seconds / found['midpoint']:.2f} |")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
