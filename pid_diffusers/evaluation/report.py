"""What a run shows of itself: pictures while it trains; pictures, figures and the model card at its end."""

import json
import logging
import textwrap
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from ..denoisers import Denoiser, GuidedDenoiser
from ..errors import InputError
from ..hub.card import write_card
from ..training import TrainingConfig, TrainingResult
from ..training.checkpoints import write_text
from ..training.loop import METRICS_FILE
from ..trajectory import TrajectoryModel
from .diagnostics import validation_figures
from .digits import DigitClassifier, digit_of
from .figures import read_log, save_loss_curve, save_same_seed, save_trajectory
from .provenance import describe_compute, describe_teacher, teacher_card, versions
from .same_seed import SameSeedSamples, draw_starts, measure_speedup, same_seed_samples, teacher_trajectory

logger = logging.getLogger(__name__)

HEUN_STEPS = 40
HEUN_STEPS_FOR_SPEED = 35
TRAJECTORY_STARTS = 3


class RunReport:
    """
    Pictures, figures and the model card of a run. Used on the main process, after the run's `Trainer` was made.

    Args:
        config (`TrainingConfig`): where they go, how many images they show, and what is measured.
        teacher (`str`, *optional*): what was loaded for `config.teacher`, where that is another folder.
        denoiser (`Denoiser`, *optional*): the teacher itself, to check that what is asked for can be measured.

    Raises:
        InputError: if the classifier can read nothing of what the prompts ask for.
    """

    def __init__(self, config: TrainingConfig, teacher: str | None = None, denoiser: Denoiser | None = None):
        self.config = config
        self.folder = Path(config.output_dir)
        if config.eval_classifier == "digits" and isinstance(denoiser, GuidedDenoiser):
            if not any(digit_of(prompt) is not None for prompt in denoiser.shown_prompts.prompts):
                raise InputError(
                    "eval_classifier is 'digits', but no prompt asks for one digit, such as 'a handwritten seven';"
                    " pass other --eval_prompts, or --eval_classifier none."
                )
        self.endpoints = {}
        self.teacher_card = teacher_card(teacher or config.teacher)  # read now, not after days without a network

    def validate(self, student: TrajectoryModel, teacher: Denoiser, step: int) -> dict[str, float]:
        """Saves `validation/step-….png` and returns the rms distance on `num_validation_samples` seeds, or those it
        shows, its distribution over them and the residual of the ODE there ([`validation_figures`])."""
        config, shown = self.config, self._shown(student, teacher)
        samples, n, labels = shown, config.num_validation_images, config.validation_class_labels
        if config.num_validation_samples is not None:
            n, labels = config.num_validation_samples, None
            samples = self._same_seed(student, teacher, n, labels)
        title = f"step {step}: rms distance {samples.rms_distance:.3f}"
        path = self.folder / "validation" / f"step-{step:07d}.png"
        pictures = teacher.decode(shown.teacher), teacher.decode(shown.student)
        save_same_seed(path, *pictures, HEUN_STEPS, title, self._columns(teacher))
        z, _ = draw_starts(student, teacher, n, config.seed, labels)
        figures = validation_figures(student, teacher, samples, z, config.scheme, config.eval_batch_size)
        return {"num_samples": n, "rms_distance": samples.rms_distance, **figures}

    def checkpoint(self, result: TrainingResult):
        """Saves the pictures, a `results.json` without figures and the model card of a run that goes on.

        The pipeline in the folder must be that of `result`.
        """
        self._save_pictures(result, f"step {result.steps}: teacher and student from the same seeds")
        self._save_results(self._describe_run(result))

    def finish(self, result: TrainingResult) -> str:
        """Saves the pictures, `results.json` and the model card, and returns what to print. Without the pictures and
        figures where student and teacher do not fit on the device in float32."""
        try:
            return self._finish(result)
        except torch.OutOfMemoryError:
            self._save_results(self._describe_run(result))
            return (
                f"Distilled {self.config.teacher} to one step in {result.steps} steps, {result.seconds:.0f} s. The"
                " pictures and figures are missing, since student and teacher do not fit on the device in float32."
                f"\nSaved in {self.folder}: the pipeline, results.json, README.md."
            )

    def _finish(self, result: TrainingResult) -> str:
        device = AcceleratorState().device
        result.student.to(device)
        result.teacher.to(device)
        config, student, teacher = self.config, result.student, result.teacher
        self._save_pictures(result, "teacher and student from the same seeds")
        results = self._describe_run(result)
        lines = [f"Distilled {config.teacher} to one step in {result.steps} steps, {result.seconds:.0f} s."]
        if result.skipped_steps:
            lines.append(f"  {result.skipped_steps} steps were skipped, since loss or gradient were not finite.")
        if config.num_eval_samples:
            samples = same_seed_samples(
                student, teacher, config.num_eval_samples, config.eval_batch_size, config.seed, HEUN_STEPS
            )
            results["num_eval_samples"] = config.num_eval_samples
            results["seed"] = config.seed
            results[f"rms_distance_to_{HEUN_STEPS}_step_heun"] = samples.rms_distance
            lines.append(
                f"  rms distance per {'pixel' if teacher.vae is None else 'latent value'} to the teacher's"
                f" {HEUN_STEPS}-step Heun endpoints:"
                f" {samples.rms_distance:.4f} ({config.num_eval_samples} seeds never trained on)"
            )
            if config.eval_classifier == "digits":
                classifier, labels = DigitClassifier(), self._digits_asked_for(samples, teacher)
                asked = labels >= 0
                for name, latents in (("teacher", samples.teacher), ("student", samples.student)):
                    images = teacher.decode(latents[asked])
                    results[f"{name}_digits_read_as_asked"] = classifier.accuracy(images, labels[asked])
                lines.append(
                    "  digits that a classifier reads as asked: teacher"
                    f" {100 * results['teacher_digits_read_as_asked']:.1f} %, student"
                    f" {100 * results['student_digits_read_as_asked']:.1f} %"
                )
            speedup = measure_speedup(student, teacher, config.eval_batch_size, HEUN_STEPS_FOR_SPEED)
            results[f"speedup_over_{HEUN_STEPS_FOR_SPEED}_step_heun"] = round(speedup, 1)
            lines.append(f"  one step takes 1/{speedup:.0f} of the time of {HEUN_STEPS_FOR_SPEED} Heun steps")
        self._save_results(results)

        call = f"class_labels={list(range(min(10, teacher.num_classes)))}" if teacher.num_classes else "batch_size=4"
        if isinstance(teacher, GuidedDenoiser):
            call = json.dumps(teacher.shown_prompt(0), ensure_ascii=False)
        return "\n".join(
            [
                *lines,
                f"Saved in {self.folder}: the pipeline, samples.png, trajectory.png, loss.png, results.json,"
                " README.md.",
                "Generate with:",
                "",
                "    import pid_diffusers",
                "    from diffusers import DiffusionPipeline",
                f"    images = DiffusionPipeline.from_pretrained({str(self.folder)!r})({call}).images",
            ]
        )

    def _digits_asked_for(self, samples: SameSeedSamples, teacher: Denoiser) -> torch.Tensor:
        """The digit that each sample should show, −1 for none."""
        if not isinstance(teacher, GuidedDenoiser):
            return samples.condition["class_labels"]
        digits = [digit_of(teacher.shown_prompt(i)) for i in range(len(samples.student))]
        return torch.tensor([-1 if digit is None else digit for digit in digits])

    def _describe_run(self, result: TrainingResult) -> dict:
        """What `results.json` holds beside the measured figures: all that the card says and `config.yaml` does not."""
        config, device = self.config, AcceleratorState().device
        batch = config.train_batch_size * config.gradient_accumulation_steps * result.num_processes
        before = self.folder / "results.json"
        if result.trained_steps == 0 and before.exists():  # a finished run once more: it was trained as it was
            return json.loads(before.read_text(encoding="utf-8"))
        return {
            "steps": result.steps,
            "skipped_steps": result.skipped_steps,
            "seconds": round(result.seconds, 1),
            **describe_compute(device, result.num_processes, result.device_seconds),
            "num_parameters": sum(p.numel() for p in result.student.unet.parameters()),
            **self._describe_text(result.teacher),
            "effective_batch_size": batch,
            "num_starts_seen": result.num_starts,
            "ema_decay": config.ema_decays[-1] if config.save_ema_decay is None else config.save_ema_decay,
            "mixed_precision": AcceleratorState().mixed_precision,
            "weighting": result.teacher.loss_weighting if config.weighting is None else config.weighting,
            "teacher": describe_teacher(config.teacher, result.teacher, self.teacher_card),
            "versions": versions(),
        }

    def _describe_text(self, teacher: Denoiser) -> dict:
        if not isinstance(teacher, GuidedDenoiser):
            return {}
        shown = [teacher.shown_prompt(i) for i in range(self.config.num_validation_images)]
        return {"num_prompts": len(teacher.prompts), "shown_prompts": shown}

    def _save_results(self, results: dict):
        write_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
        write_card(self.folder)

    def _save_pictures(self, result: TrainingResult, title: str):
        student, teacher = result.student, result.teacher
        shown = self._shown(student, teacher)
        pictures = teacher.decode(shown.teacher), teacher.decode(shown.student)
        save_same_seed(self.folder / "samples.png", *pictures, HEUN_STEPS, title, self._columns(teacher))
        self._save_trajectory(student, teacher)
        lines = self._metrics()
        if lines:
            save_loss_curve(self.folder / "loss.png", [x["step"] for x in lines], [x["loss"] for x in lines])

    def _shown(self, student: TrajectoryModel, teacher: Denoiser) -> SameSeedSamples:
        """What the pictures show: `num_validation_images` seeds with `validation_class_labels`."""
        return self._same_seed(
            student, teacher, self.config.num_validation_images, self.config.validation_class_labels
        )

    def _same_seed(
        self, student: TrajectoryModel, teacher: Denoiser, n: int, labels: list[int] | None
    ) -> SameSeedSamples:
        """Samples of student and teacher, whose endpoints are computed once for all validations."""
        config, key = self.config, (teacher, n, *(labels or ()))
        samples = same_seed_samples(
            student, teacher, n, config.eval_batch_size, config.seed, HEUN_STEPS, labels, self.endpoints.get(key)
        )
        self.endpoints[key] = samples.teacher
        return samples

    def _columns(self, teacher: Denoiser) -> list[str] | None:
        """The prompts above the pictures, as long as there is room for them."""
        if not isinstance(teacher, GuidedDenoiser):
            return None
        prompts = [teacher.shown_prompt(i) for i in range(self.config.num_validation_images)]
        return [textwrap.fill(textwrap.shorten(prompt, 40, placeholder=" …"), 11) for prompt in prompts]

    def _save_trajectory(self, student: TrajectoryModel, teacher: Denoiser):
        device = next(student.parameters()).device
        labels = self.config.validation_class_labels
        n = min(TRAJECTORY_STARTS, self.config.num_validation_images)
        z, condition = draw_starts(student, teacher, n, self.config.seed, labels[:n] if labels else None)
        z, condition = z.to(device), {name: value.to(device) for name, value in condition.items()}
        sigmas, states = teacher_trajectory(student, teacher, z, condition, HEUN_STEPS)
        every = HEUN_STEPS // 8
        sigmas, states = sigmas[::every].tolist(), states[::every]
        points = [student(z, sigma, **condition) for sigma in sigmas]
        title = "x(z, t) at falling noise levels, shown as x/√(1 + t²)"
        save_trajectory(self.folder / "trajectory.png", sigmas, states, points, title, teacher.decode)

    def _metrics(self) -> list[dict]:
        try:
            return read_log(self.folder / METRICS_FILE)
        except InputError as error:  # a full disk may have left half a line
            logger.warning("loss.png is not drawn: %s", error)
            return []
