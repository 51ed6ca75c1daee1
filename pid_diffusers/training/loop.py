"""The training loop: knows accelerate, knows no model family."""

import contextlib
import copy
import importlib
import json
import logging
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import accelerate
import diffusers
import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..adapters import fingerprint, fuse, lora_weights, save_peft_adapter
from ..denoisers import Denoiser, GuidedDenoiser
from ..denoisers.base import find_pipeline
from ..errors import InputError
from ..pipelines import OneStepPIDPipeline, OneStepPIDTextToImagePipeline
from ..precision import cast_frozen, keep_output_in_float32
from ..schedulers import PIDScheduler
from ..trajectory import TrajectoryModel
from . import checkpoints
from .build import check_fit, create_loss, create_scheduler, create_student, create_teacher, estimate_memory
from .config import TrainingConfig
from .noise import draw_batch

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"

OPTIMIZERS = {
    "radam": lambda: torch.optim.RAdam,
    "adamw": lambda: torch.optim.AdamW,
    "adamw_8bit": lambda: importlib.import_module("bitsandbytes").optim.AdamW8bit,
}

Validate = Callable[[TrajectoryModel, Denoiser, int], dict[str, float]]
OnCheckpoint = Callable[["TrainingResult"], None]


class TrainingStopped(RuntimeError):
    """Training cannot go on. The message says why, and where the last good checkpoint is."""


@dataclass
class TrainingResult:
    """What a finished or interrupted run leaves behind.

    Attributes:
        student (`TrajectoryModel`): with the moving average of the weights that is saved; not under DDP or autocast.
        teacher (`Denoiser`): in float32 and, like the student, on the CPU; before the end both are on the device, and
            the teacher in the type that training runs it in.
        steps (`int`): optimizer steps done, skipped ones counted in.
        skipped_steps (`int`): steps without an update, since loss or gradient were not finite.
        seconds (`float`): time in training, validation and checkpoints left out, earlier parts of the run counted in.
        device_seconds (`float`): the same, summed over the processes of each part.
        num_starts (`int`): starts z that were drawn, over all processes and parts.
        trained_steps (`int`): the steps of this part, 0 if there was nothing left to train.
        num_processes (`int`): how many processes trained.
        is_main_process (`bool`): whether this process writes.
        interrupted_by (`int`, *optional*): the signal that ended the run early.
    """

    student: TrajectoryModel
    teacher: Denoiser
    steps: int
    skipped_steps: int
    seconds: float
    device_seconds: float
    num_starts: int
    trained_steps: int
    num_processes: int
    is_main_process: bool
    interrupted_by: int | None = None


class Trainer:
    """
    Distils a teacher by minimising [`PIDLoss`] with the settings of a [`TrainingConfig`].

    Creating one checks the settings against the teacher, the folder and the checkpoint to resume from. What a step
    draws depends on (seed, rank, step, micro-step) alone, so that a resumed run ends with the weights of one that was
    not interrupted, bit for bit.

    Args:
        config (`TrainingConfig`): the settings, validated.
        teacher (`str`, *optional*): what to load for `config.teacher`, where that is not what diffusers can load.

    Raises:
        InputError: for a setting that cannot work, before anything is written.
    """

    def __init__(self, config: TrainingConfig, teacher: str | None = None):
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.source = teacher or config.teacher
        self.checkpoint = self._check_output_dir()
        self.accelerator = self._create_accelerator()
        self.teacher = create_teacher(config, self.source).eval()
        self.scheduler = create_scheduler(config, self.teacher)
        self.unet = create_student(config, self.teacher)
        if not config.use_lora:  # else the teacher's network is the student's, and frozen but for its adapters
            self.teacher.requires_grad_(False)
        # a checkpoint of adapters says nothing else of the weights that they are on
        self.base_weights = fingerprint(self.unet) if config.use_lora else None
        self.loss = create_loss(config, self.teacher)
        self.weighting = self.loss.weighting
        if config.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.unet.train()
        if sum(parameter.numel() for parameter in self.unet.parameters()) > 1e8:
            self.accelerator.print("Evaluating the loss once on the CPU, to see that all fits together …", flush=True)
        self.bytes_per_start = check_fit(config, TrajectoryModel(self.unet, self.scheduler), self.teacher, self.loss)
        self.state = self._check_checkpoint()
        self._create_output_dir()
        self.interrupted_by = None

    def train(self, validate: Validate | None = None, on_checkpoint: OnCheckpoint | None = None) -> TrainingResult:
        """
        Trains until `max_train_steps`, SIGINT or SIGTERM, and saves the pipeline unless interrupted.

        Args:
            validate (`Callable`, *optional*): called on the main process as (student, teacher, step) every
                `validation_steps`, with the moving average that will be saved; what it returns is logged.
            on_checkpoint (`Callable`, *optional*): called on the main process after every checkpoint but the last one,
                with what the run has come to; the pipeline is saved before that.

        Raises:
            TrainingStopped: after `max_skipped_steps` non-finite steps in a row, or if the pipeline cannot be saved.
        """
        config, accelerator = self.config, self.accelerator
        set_seed(config.seed)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            # not `warn_only`, for which attention on a GPU would choose a kernel that is not deterministic
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self._prepare()
        self._start_output()

        accelerator.print(self._describe())

        names = ("step", "skipped_steps", "skipped_in_a_row", "seconds", "device_seconds", "num_starts")
        counters = {name: self.state.get(name, 0) for name in names}
        step, skipped, skipped_in_a_row, seconds, device_seconds, num_starts = counters.values()
        batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        progress = tqdm(
            total=config.max_train_steps,
            initial=step,
            desc="Distilling",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        with progress, self._signals():
            start = time.perf_counter()
            while step < config.max_train_steps and not self._stop_requested():
                learning_rate = self.optimizer.param_groups[0]["lr"]
                loss, grad_norm, finite = self._step(step)
                step += 1
                skipped += not finite
                skipped_in_a_row = 0 if finite else skipped_in_a_row + 1
                if finite:
                    for ema in self.emas.values():
                        ema.step(self.parameters)
                self.lr_scheduler.step()
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}", lr=f"{learning_rate:.1e}", refresh=False)

                # only training is timed: what follows is not part of the cost of a step
                elapsed = time.perf_counter() - start
                seconds += elapsed
                device_seconds += elapsed * accelerator.num_processes
                num_starts += batch
                values = (step, skipped, skipped_in_a_row, seconds, device_seconds, num_starts)
                counters = dict(zip(names, values, strict=True))
                if skipped_in_a_row >= config.max_skipped_steps:
                    raise TrainingStopped(self._explain_divergence(step, skipped_in_a_row))
                if step % config.logging_steps == 0 or step == config.max_train_steps:
                    figures = {"loss": loss, "learning_rate": learning_rate, "grad_norm": grad_norm}
                    self._log({**counters, **figures})
                if step % config.checkpointing_steps == 0 or step == config.max_train_steps:
                    saved = self._save_checkpoint(counters)
                    if on_checkpoint and saved and step < config.max_train_steps:
                        if accelerator.is_main_process:
                            self._publish(on_checkpoint, counters)
                        accelerator.wait_for_everyone()
                if validate and config.validation_steps and step % config.validation_steps == 0:
                    if accelerator.is_main_process:
                        self._validate(validate, counters)
                    accelerator.wait_for_everyone()
                start = time.perf_counter()

            if self.interrupted_by is not None and step < config.max_train_steps:
                self._leave(counters if step > self.state.get("step", 0) else None)

        interrupted = self.interrupted_by if step < config.max_train_steps else None
        if skipped == step > 0:
            raise TrainingStopped(f"loss or gradient were not finite in any of the {step} steps; nothing was learnt.")
        student = self._ema_student()
        if interrupted is None:
            error = self._write((lambda: self._save_pipeline(student)) if accelerator.is_main_process else None)
            if error:
                raise TrainingStopped(
                    f"the pipeline could not be saved to {self.output_dir} ({error}); make room, then run again with"
                    " --resume_from_checkpoint latest to save it from the last checkpoint."
                )
        accelerator.end_training()
        self._free_memory()
        return self._result(counters, student, self._exact_teacher(), interrupted)

    def _free_memory(self):
        """Makes room on the device for measuring: what was trained is saved, and no longer needed there."""
        # the schedule holds the optimizer, whose state is twice as large as the weights
        self.optimizer, self.lr_scheduler, self.emas, self.student = None, None, {}, None
        self.parameters = []
        self.unet.zero_grad()
        self.unet.to("cpu")
        self.teacher.to("cpu")
        self.accelerator.free_memory()

    def _result(
        self, counters: dict, student: TrajectoryModel, teacher: Denoiser, interrupted_by: int | None = None
    ) -> TrainingResult:
        return TrainingResult(
            student=student,
            teacher=teacher,
            steps=counters["step"],
            skipped_steps=counters["skipped_steps"],
            seconds=counters["seconds"],
            device_seconds=counters["device_seconds"],
            num_starts=counters["num_starts"],
            trained_steps=counters["step"] - self.state.get("step", 0),
            num_processes=self.accelerator.num_processes,
            is_main_process=self.accelerator.is_main_process,
            interrupted_by=interrupted_by,
        )

    def _exact_teacher(self) -> Denoiser:
        """The teacher in float32, with weights of its own, on the CPU."""
        teacher = self.exact_teacher
        if teacher is None:
            teacher = Denoiser.from_pretrained(self.source).eval().requires_grad_(False)
            teacher = self.teacher.around(teacher) if isinstance(self.teacher, GuidedDenoiser) else teacher
        return teacher.to("cpu")

    def _describe(self) -> str:
        config, settings = self.config, self.scheduler.config
        then, now = self.state.get("settings", {}), self._settings()
        changed = [f"{name} ({then[name]} → {now[name]})" for name in now if name in then and then[name] != now[name]]
        millions = sum(p.numel() for p in self.parameters) / 1e6
        device = self.accelerator.device
        return (
            f"Preset {config.preset}, output in {config.output_dir}.\n"
            f"Teacher {config.teacher}: {self.teacher.describe()}.\n"
            f"Student: {millions:.2f} M parameters to train, head {settings.prediction_type}, noise levels"
            f" {settings.sigma_max:g} to {settings.sigma_min:g},"
            f" {self._describe_weights()}.\n"
            f"Loss: {config.scheme}, {config.distance}, weighting {self.weighting},"
            f" N = {settings.num_train_timesteps}.\n"
            f"Memory: {estimate_memory(config, self.unet, self.teacher, self.bytes_per_start)}. On {device}"
            + (f" with {torch.get_num_threads()} threads" if device.type == "cpu" else "")
            + f", {self.accelerator.num_processes} process(es), precision {self.accelerator.mixed_precision}."
            + (f"\nContinuing from {self.checkpoint}." if self.checkpoint else "")
            + (
                "\nThere is nothing left to train; raise --max_train_steps to go on."
                if self.state.get("step", 0) >= config.max_train_steps
                else ""
            )
            + (f"\nSettings that differ from the checkpoint's: {', '.join(changed)}." if changed else "")
            + (
                "\nNo checkpoint yet: starting at step 0."
                if config.resume_from_checkpoint and not self.checkpoint
                else ""
            )
        )

    def _describe_weights(self) -> str:
        if self.config.use_lora:
            return f"LoRA of rank {self.config.lora_rank} on the teacher's own weights"
        return "a copy of the teacher" if self.config.student_config is None else "random weights"

    # --- what is checked before training ---------------------------------------------------------------------------

    def _check_output_dir(self) -> Path | None:
        """The checkpoint to resume from, after making sure that the folder is free, or ours."""
        resume_from, folder = self.config.resume_from_checkpoint, self.output_dir
        checkpoint = checkpoints.find_checkpoint(resume_from, folder) if resume_from else None
        if os.path.isfile(folder):
            raise InputError(f"output_dir is {str(folder)!r}, which is a file; pass a folder.")
        taken = [name for name in (CONFIG_FILE, METRICS_FILE, "model_index.json") if os.path.exists(folder / name)]
        if taken and (not resume_from or checkpoint and checkpoint.resolve().parent != folder.resolve()):
            raise InputError(
                f"output_dir is {str(folder)!r}, which holds another run or model ({taken[0]}); pass another folder,"
                " or --resume_from_checkpoint latest to continue that run."
            )
        if checkpoint is None and "model_index.json" in taken:
            raise InputError(
                f"output_dir is {str(folder)!r}, which holds a finished model but no checkpoint to resume from; pass"
                " another folder."
            )
        return checkpoint

    def _create_output_dir(self):
        folder = self.output_dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"is there room?")
        except OSError as error:
            raise InputError(f"output_dir is {str(folder)!r}, which cannot be written ({error}).") from error

    def _check_checkpoint(self) -> dict:
        """The state in the checkpoint to resume from, after making sure that it belongs to this student."""
        if self.checkpoint is None:
            return {}
        state = json.loads((self.checkpoint / checkpoints.STATE_FILE).read_text())
        for name, mine in self._identity().items():
            theirs = state["identity"].get(name)
            if name == "trajectory function" and theirs:  # what was no setting then is as it is by default
                theirs = {**_public(PIDScheduler().config), **theirs}
            if mine != theirs:
                raise InputError(
                    f"resume_from_checkpoint is {str(self.checkpoint)!r}, a run with another {name}"
                    f" ({_first_difference(theirs, mine)}); pass the settings of that run, or start a new one in"
                    " another output_dir."
                )
        return state

    def _identity(self) -> dict:
        """What a checkpoint must share with a run that continues it."""
        config = self.config
        lora = {"rank": config.lora_rank, "alpha": config.lora_alpha, "target_modules": config.lora_target_modules}
        identity = {
            "network": {"class": type(self.unet).__name__, **_public(self.unet.config), "dropout": 0.0},
            "trajectory function": _public(self.scheduler.config),
            "LoRA": lora if config.use_lora else None,
            "base weights": self.base_weights,
            "list of ema_decays": self.config.ema_decays,
            "optimizer": self.config.optimizer,
            "mixed_precision": self.accelerator.mixed_precision,
        }
        return json.loads(json.dumps(identity))

    def _settings(self) -> dict:
        """The settings that a run which continues a checkpoint had better share, though it need not."""
        elsewhere = ("preset", "output_dir", "resume_from_checkpoint", "push_to_hub")
        settings = self.config.to_dict().items()
        return {name: value for name, value in settings if name not in elsewhere and not name.startswith("hub_")}

    def _create_accelerator(self) -> Accelerator:
        config = self.config
        trackers = ["all", "none", *(str(tracker) for tracker in get_available_trackers())]
        if config.report_to not in trackers:
            raise InputError(
                f"report_to is {config.report_to!r}, which is unknown or not installed; choose one of"
                f" {', '.join(dict.fromkeys(trackers))}."
            )
        try:
            accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                log_with=None if config.report_to == "none" else config.report_to,
                # processes wait for the one that encodes all prompts, or pushes
                kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
                project_config=ProjectConfiguration(
                    project_dir=config.output_dir, logging_dir=str(self.output_dir / config.logging_dir)
                ),
            )
        except ValueError as error:  # a precision that this machine has not
            raise InputError(f"mixed_precision is {config.mixed_precision!r}: {error}") from error
        if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
            raise InputError("mixed_precision is 'fp16', which needs a GPU; pass bf16 or no.")
        unsupported = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)
        if accelerator.distributed_type in unsupported:
            raise InputError(
                f"accelerate was configured for {accelerator.distributed_type.value}, which cannot be used here;"
                " choose multi-GPU in `accelerate config`."
            )
        # `_step` accumulates by itself, whatever the launcher's environment says
        accelerator.gradient_accumulation_steps = 1
        return accelerator

    # --- one step ---------------------------------------------------------------------------------------------------

    def _prepare(self):
        config, accelerator = self.config, self.accelerator
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        # The report measures against the teacher as it is, not as it is rounded here or shares its weights.
        self.exact_teacher = None if config.use_lora else self.teacher
        if dtype != torch.float32:
            keep_output_in_float32(self.unet)
            if config.use_lora:
                cast_frozen(self.unet, dtype)
            else:
                self.teacher = copy.deepcopy(self.teacher)  # the exact one waits on the CPU
                keep_output_in_float32(self.teacher.unet, body_dtype=dtype)
        self.teacher.to(accelerator.device)
        self.loss.to(accelerator.device)
        for name, module in self.unet.named_modules():
            if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
                module.p = 0.0  # the paper's table 6

        self.parameters = [parameter for parameter in self.unet.parameters() if parameter.requires_grad]
        self.parameter_names = [name for name, parameter in self.unet.named_parameters() if parameter.requires_grad]
        options = {
            "lr": config.learning_rate,
            "betas": (config.adam_beta1, config.adam_beta2),
            "eps": config.adam_epsilon,
            "weight_decay": config.adam_weight_decay,
        }
        optimizer = OPTIMIZERS[config.optimizer]()(self.parameters, **options)
        unet, self.optimizer = accelerator.prepare(self.unet, optimizer)
        if config.use_lora:
            accelerator.register_save_state_pre_hook(self._save_trained_weights)
            accelerator.register_load_state_pre_hook(self._load_trained_weights)
        if config.torch_compile:
            unet.compile()
            if not config.use_lora:
                self.teacher.unet.compile()
        self.student = TrajectoryModel(unet, self.scheduler)
        # Not prepared: accelerate would advance it once a process, and not at all in a skipped step.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler,
            self.optimizer.optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        # EMAModel begins with decays of its own choice below `min_decay`, and with 0 at `update_after_step` + 1.
        self.emas = {
            decay: EMAModel(self.parameters, decay=decay, min_decay=decay, update_after_step=-1, foreach=True)
            for decay in config.ema_decays
        }
        if self.checkpoint is not None:
            self._load_checkpoint()

    def _save_trained_weights(self, models: list[nn.Module], weights: list[dict], folder: str):
        """In place of what accelerate would save: the adapters without the weights that they are on."""
        weights.clear()
        if self.accelerator.is_main_process:
            trained = dict(zip(self.parameter_names, self.parameters, strict=True))
            save_file({name: weight.detach().contiguous() for name, weight in trained.items()}, _trained_file(folder))

    def _load_trained_weights(self, models: list[nn.Module], folder: str):
        models.clear()
        saved = load_file(_trained_file(folder))
        for name, parameter in zip(self.parameter_names, self.parameters, strict=True):
            parameter.data.copy_(saved[name])

    def _step(self, step: int) -> tuple[float, float, bool]:
        """One optimizer step: the mean loss over all processes, the gradient's norm, and whether it was taken."""
        config, accelerator = self.config, self.accelerator
        losses, micro_steps = [], config.gradient_accumulation_steps
        for micro_step in range(micro_steps):
            key = (config.seed, accelerator.process_index, step, micro_step)
            shape = (config.train_batch_size, *self.teacher.sample_shape)
            z, indices, generator = draw_batch(
                shape, self.scheduler.config.sigma_max, config.num_train_timesteps, key, accelerator.device
            )
            condition = self.teacher.draw_condition(config.train_batch_size, generator)
            if config.lora_dropout:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
            condition = {name: value.to(accelerator.device) for name, value in condition.items()}
            # gradients are averaged over the processes once, in the last backward pass
            last = micro_step == micro_steps - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self.student.unet):
                with self._explain_nondeterminism():
                    loss = self.loss(self.student, self.teacher, z, indices, **condition).mean()
                    accelerator.backward(loss / micro_steps)
                losses.append(loss.detach())
        max_norm = math.inf if config.max_grad_norm is None else config.max_grad_norm
        grad_norm = accelerator.clip_grad_norm_(self.parameters, max_norm)
        loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean").item()
        # The same decision everywhere: the gradient is already averaged over the processes.
        finite = math.isfinite(loss) and bool(torch.isfinite(grad_norm))
        if finite:
            self.optimizer.step()
        elif accelerator.scaler is not None:
            accelerator.scaler.update()  # lowers the scale if the gradient overflowed
        self.optimizer.zero_grad()
        return loss, grad_norm.item(), finite

    @contextlib.contextmanager
    def _explain_nondeterminism(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "deterministic" not in str(error):
                raise
            raise TrainingStopped(f"{str(error).split('.')[0]}; pass --deterministic false.") from error

    def _explain_divergence(self, step: int, skipped: int) -> str:
        found = checkpoints.list_checkpoints(self.output_dir)
        last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return (
            f"loss or gradient were not finite in {skipped} steps in a row, up to step {step}; {last}; try a lower"
            " --learning_rate, --max_grad_norm 1, or another --mixed_precision."
        )

    def _validate(self, validate: Validate, counters: dict):
        step = counters["step"]
        try:
            with self._ema_weights() as student:
                figures = validate(student, self.teacher, step)
            self.accelerator.log({f"validation/{name}": value for name, value in figures.items()}, step=step)
            with open(self.output_dir / VALIDATION_FILE, "a") as file:
                file.write(json.dumps({"step": step, "seconds": counters["seconds"], **figures}) + "\n")
        except OSError as error:
            logger.warning(f"the validation of step {step} could not be written: {error}")

    def _publish(self, on_checkpoint: OnCheckpoint, counters: dict):
        result = self._result(counters, self._ema_student().to(self.accelerator.device), self.teacher)
        try:
            self._save_pipeline(result.student)
            on_checkpoint(result)
        except Exception as error:  # nothing that is done with a checkpoint may end the run, or leave others waiting
            logger.warning(f"step {counters['step']} could not be handed out: {type(error).__name__}: {error}")

    # --- moving averages ---------------------------------------------------------------------------------------------

    @property
    def _saved_ema(self) -> EMAModel:
        decay = self.config.save_ema_decay
        return self.emas[self.config.ema_decays[-1] if decay is None else decay]

    @contextlib.contextmanager
    def _ema_weights(self) -> Iterator[TrajectoryModel]:
        """The student with the moving average that is saved; afterwards the trained weights are back."""
        ema = self._saved_ema
        ema.store(self.parameters)
        ema.copy_to(self.parameters)
        self.unet.eval()
        try:
            yield TrajectoryModel(self.unet, self.scheduler)
        finally:
            self.unet.train()
            ema.restore(self.parameters)

    def _ema_student(self) -> TrajectoryModel:
        """A student of its own with the moving average, on the CPU, without accelerate's wrappers."""
        averages = dict(zip(self.parameter_names, self._saved_ema.shadow_params, strict=True))
        if self.config.use_lora:  # on weights that are read anew, since those here may be in half precision
            unet = create_student(self.config, Denoiser.from_pretrained(self.source))
            if unet.load_state_dict(averages, strict=False).unexpected_keys:
                raise RuntimeError(f"the adapters of {self.source} have other names than those that were trained")
            self.adapter = lora_weights(unet)
            fuse(unet)
        else:
            # without the place where the teacher was loaded from, a folder of this machine
            unet = type(self.unet).from_config({k: v for k, v in self.unet.config.items() if k != "_name_or_path"})
            unet.load_state_dict(self.unet.state_dict())
            unet.load_state_dict(averages, strict=False)
        unet.eval().requires_grad_(False)
        return TrajectoryModel(unet, self.scheduler)

    # --- what is written ---------------------------------------------------------------------------------------------

    def _start_output(self):
        """Makes the folder ready: no leftovers, the configuration, what was logged cut back to the checkpoint."""
        step = self.state.get("step", 0)
        settings = self.config.to_public_dict()
        flat = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        try:
            if self.accelerator.is_main_process:
                checkpoints.remove_partial(self.output_dir)
                text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
                if step < self.config.max_train_steps:  # else nothing is trained with these settings
                    checkpoints.write_text(self.output_dir / CONFIG_FILE, f"# {_versions()}\n{text}")
                for metrics in (self.output_dir / METRICS_FILE, self.output_dir / VALIDATION_FILE):
                    if metrics.exists():
                        lines = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
                        checkpoints.write_text(metrics, "".join(line + "\n" for line in lines))
            self.accelerator.init_trackers("pid_diffusers", config=flat)
        except OSError as error:
            raise InputError(f"output_dir is {str(self.output_dir)!r}, which cannot be written ({error}).") from error
        self.accelerator.wait_for_everyone()

    def _log(self, figures: dict[str, float]):
        if not self.accelerator.is_main_process:
            return
        try:
            self.accelerator.log(figures, step=figures["step"])
            with open(self.output_dir / METRICS_FILE, "a") as file:
                file.write(json.dumps(figures) + "\n")
        except OSError as error:
            logger.warning(f"step {figures['step']} is missing in {METRICS_FILE}: {error}")

    def _save_checkpoint(self, counters: dict) -> Path | None:
        """Writes a checkpoint and returns its path, or warns, removes the attempt, and returns `None`.

        Every process comes past the same barriers, whether or not it could write.
        """
        accelerator, step = self.accelerator, counters["step"]
        final = checkpoints.checkpoint_path(self.output_dir, step)
        partial = checkpoints.partial_path(self.output_dir, step)

        def make_room():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

        def finish():
            averages = {}
            for decay, ema in self.emas.items():
                averages[str(decay)] = ema.optimization_step
                save_file(dict(zip(self.parameter_names, ema.shadow_params, strict=True)), partial / _ema_file(decay))
            state = {**counters, "ema_steps": averages, "identity": self._identity(), "settings": self._settings()}
            checkpoints.finish(partial, final, state)
            checkpoints.prune(self.output_dir, self.config.checkpoints_total_limit)

        main = accelerator.is_main_process
        error = (
            self._write(make_room if main else None)
            or self._write(lambda: accelerator.save_state(str(partial)))
            or self._write(finish if main else None)
        )
        if error and main:
            shutil.rmtree(partial, ignore_errors=True)
            logger.warning(f"the checkpoint of step {step} could not be written to {self.output_dir}: {error}")
        return None if error else final

    def _write(self, action: Callable[[], None] | None) -> str | None:
        """Does it, waits until all processes have, and returns what went wrong here or elsewhere, if anything did."""
        problem = None
        try:
            if action is not None:
                action()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _is_write_error(error):
                raise
            problem = str(error)
        failures = self.accelerator.reduce(torch.tensor(float(problem is not None), device=self.accelerator.device))
        return problem or ("another process could not write" if failures.item() > 0 else None)

    def _load_checkpoint(self):
        self.accelerator.load_state(str(self.checkpoint))
        # what the optimizer's state holds of the settings gives way to the settings
        step, config = self.state["step"], self.config
        self.lr_scheduler.last_epoch = step
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.lr_lambdas, strict=True):
            group.update(lr=config.learning_rate * rate(step), initial_lr=config.learning_rate)
            group.update(betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon)
            group.update(weight_decay=config.adam_weight_decay)
        for decay, ema in self.emas.items():
            shadow = load_file(self.checkpoint / _ema_file(decay))
            for name, parameter in zip(self.parameter_names, ema.shadow_params, strict=True):
                parameter.copy_(shadow[name])
            ema.optimization_step = self.state["ema_steps"][str(decay)]

    def _save_pipeline(self, student: TrajectoryModel):
        """Saves beside the place and moves in, `model_index.json` last: what was there stays whole until then."""
        partial = self.output_dir / ".pipeline.partial"
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(self.teacher, GuidedDenoiser):  # with the teacher's text encoders and safety checker, read anew
            parts = {"unet": student.unet, "scheduler": student.scheduler}
            pipeline = OneStepPIDTextToImagePipeline.from_pretrained(find_pipeline(self.source), **parts)
            if self.config.use_lora:
                weights, adapter = self.adapter
                pipeline.save_lora_weights(partial, unet_lora_layers=weights, unet_lora_adapter_metadata=adapter)
        else:
            pipeline = OneStepPIDPipeline(student.unet, student.scheduler, vae=self.teacher.vae)
            if self.config.use_lora:
                partial.mkdir()
                save_peft_adapter(*self.adapter, partial)
        pipeline.save_pretrained(partial)
        for path in sorted(partial.iterdir(), key=lambda path: path.name == "model_index.json"):
            checkpoints.replace(path, self.output_dir / path.name)
        partial.rmdir()

    # --- signals -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end training after the step under way; a second SIGINT ends it at once."""

        def request_stop(number, frame):
            # What ends the launcher as well arrives twice, then as the SIGTERM of its end: the first one counts.
            first, self.interrupted_by = self.interrupted_by is None, self.interrupted_by or number
            if number == signal.SIGINT:
                signal.signal(number, previous[number])
            if first and self.accelerator.is_main_process:
                again = "; press Ctrl-C again to quit without" if number == signal.SIGINT else ""
                name = signal.Signals(number).name
                os.write(2, f"\n{name}: finishing this step and writing a checkpoint{again}.\n".encode())

        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in previous:
            signal.signal(number, request_stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_requested(self) -> bool:
        if self.accelerator.num_processes > 1:  # all stop at the same step
            flag = torch.tensor(self.interrupted_by or 0, device=self.accelerator.device)
            self.interrupted_by = int(self.accelerator.gather(flag).max()) or None
        return self.interrupted_by is not None

    def _leave(self, counters: dict | None):
        name = signal.Signals(self.interrupted_by).name
        path = None
        if counters is not None:
            path = checkpoints.checkpoint_path(self.output_dir, counters["step"])
            if checkpoints.missing_files(path):
                path = self._save_checkpoint(counters)
        step = self.state.get("step", 0) if counters is None else counters["step"]
        if path is None:
            path = (checkpoints.list_checkpoints(self.output_dir) or [self.checkpoint])[-1]
        where = "there is no checkpoint" if path is None else f"checkpoint in {path}"
        how = f"; continue with --output_dir {self.output_dir} --resume_from_checkpoint latest" if path else ""
        if self.accelerator.is_main_process:
            tqdm.write(f"{name}: stopped after step {step}, {where}{how}.")


def _public(config: dict) -> dict:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def _trained_file(folder: str) -> str:
    return os.path.join(folder, "trained.safetensors")


def _ema_file(decay: float) -> str:
    return f"ema-{decay}.safetensors"


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the last line of a killed run may be cut short
        return math.inf


def _first_difference(theirs, mine) -> str:
    if not isinstance(theirs, dict) or not isinstance(mine, dict):
        return f"{theirs} there, {mine} here"
    key = next(key for key in [*mine, *theirs] if mine.get(key) != theirs.get(key) or key not in theirs)
    return f"{key} is {theirs.get(key)} there, {mine.get(key)} here"


def _versions() -> str:
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "accelerate": accelerate.__version__}
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _is_write_error(error: Exception) -> bool:
    """Whether it means a full disk or an unwritable folder, for which torch.save has no exception of its own."""
    return not isinstance(error, RuntimeError) or any(
        text in str(error)
        for text in ("PytorchStreamWriter", "inline_container", "unexpected pos", "cannot be opened")
    )
