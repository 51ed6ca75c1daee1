"""Samples of any pipeline, each of which depends on its own seed alone."""

import contextlib
import hashlib
import inspect
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from ..denoisers import Denoiser, VPDenoiser, euler, heun
from ..errors import InputError
from ..precision import widest_float
from ..schedulers import PIDScheduler

BUILT_IN = {name: Path(__file__).parent.parent / "assets" / name for name in ("digits-student", "digits-teacher")}
SOLVERS = {"euler": euler, "heun": heun}
EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
MAX_SEED = 2**63


def load_model(model: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """
    Any pipeline of diffusers or of this package, without a safety checker, which would blacken samples.

    Args:
        model (`str`): a folder, a Hub id, or `digits-student` or `digits-teacher`, which come with this package.
        dtype (`torch.dtype`): what the networks compute in.

    Raises:
        InputError: if there is none, or diffusers cannot load it.
    """
    place = BUILT_IN.get(model, Path(model))
    if not place.exists() and (place.is_absolute() or model[:1] in (".", "") or model.count("/") > 1):
        raise InputError(f"model is {model!r}, which does not exist; pass a folder or a Hub id.")
    if place.is_dir() and not (place / "model_index.json").exists():
        raise InputError(f"model is {model!r}, which holds no pipeline; pass a folder written by save_pretrained.")
    try:
        pipeline = DiffusionPipeline.from_pretrained(place if place.exists() else model)
    except Exception as error:  # whatever diffusers and the Hub raise of what is missing or broken
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise InputError(
            f"model is {model!r}, which diffusers cannot load ({reason}); pass a folder or a Hub id of a pipeline"
            " whose files are all there."
        ) from error
    if getattr(pipeline, "safety_checker", None) is not None:
        pipeline.safety_checker = None
    for component in pipeline.components.values():
        if isinstance(component, nn.Module):
            component.eval()
    if dtype != torch.float32:  # in which they are
        pipeline.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def digest(*modules: nn.Module, settings: dict | None = None) -> str:
    """SHA-256 of the weights of `modules` and of `settings`."""
    content = hashlib.sha256(json.dumps(settings or {}, sort_keys=True, default=str).encode())
    for module in modules:
        for name, value in module.state_dict().items():
            content.update(f"{name} {value.dtype} {tuple(value.shape)}\0".encode())
            content.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


def model_digest(pipeline: DiffusionPipeline) -> str:
    """SHA-256 of the weights of all networks of a pipeline and of its scheduler's settings."""
    networks = [part for _, part in sorted(pipeline.components.items()) if isinstance(part, nn.Module)]
    # what begins with an underscore says where the scheduler is from, in an order that changes from run to run
    scheduler = {name: value for name, value in pipeline.scheduler.config.items() if not name.startswith("_")}
    return digest(*networks, settings=scheduler)


def _is_alternative(cls: type[SchedulerMixin], scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler reads the network's output as another one does. `compatibles` of diffusers alone does not
    tell: of DDPM's schedulers it names EDM's, and of EDM's none but itself."""
    if type(scheduler).__name__ in EDM_SCHEDULERS:
        return cls.__name__ in EDM_SCHEDULERS
    both_discrete = all(name in VPDenoiser.scheduler_classes for name in (cls.__name__, type(scheduler).__name__))
    return cls.__name__ not in EDM_SCHEDULERS and (both_discrete or cls in scheduler.compatibles)


class Samples:
    """
    The samples 0 … `num_samples` − 1 of a pipeline.

    Sample i is drawn with a generator of its own, on the CPU, seeded by `seed` + i, has the i-th class or prompt in
    turn, and is rounded to 8 bits as in a PNG. The pipeline is always called with `batch_size` samples, i in
    [k · batch_size, (k + 1) · batch_size), the last ones past the end being thrown away: which samples are asked for
    changes no bit of them, and so neither do interruptions or the number of processes. Another batch size, like
    another machine, changes the last bits of what a network computes in float32, and with them about one in 10⁵ of the
    rounded pixels by one; in float64 it changes none.

    Args:
        pipeline (`DiffusionPipeline`): any that takes a `generator` and can return arrays.
        num_samples (`int`), batch_size (`int`), seed (`int`): as above.
        prompts (`list[str]`, *optional*): for pipelines that take a `prompt`.
        sampler (`str`, defaults to `"pipeline"`): the pipeline as it is; or with another scheduler, by the name of its
            class in diffusers; or `heun` or `euler`, the teacher's ODE solved on EDM's grid in float64.
        num_inference_steps (`int`, *optional*), guidance_scale (`float`, *optional*): default: the pipeline's own.

    Raises:
        InputError: if the pipeline cannot be asked for this.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        num_samples: int,
        batch_size: int,
        seed: int = 0,
        prompts: list[str] | None = None,
        sampler: str = "pipeline",
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ):
        self.pipeline, self.num_samples, self.batch_size, self.seed = pipeline, num_samples, batch_size, seed
        self.prompts, self.sampler = prompts, sampler
        self.parameters = inspect.signature(pipeline.__call__).parameters
        self.name = type(pipeline).__name__
        if seed + num_samples > MAX_SEED:
            raise InputError(
                f"seed is {seed}, and sample {num_samples - 1} would have one above 2⁶³; pass a lower one."
            )
        if "generator" not in self.parameters or "output_type" not in self.parameters:
            raise InputError(
                f"model is a {self.name}, which takes no generator; pass one that makes images from seeds."
            )
        if self.network is None:
            raise InputError(f"model is a {self.name}, which has neither a unet nor a transformer; pass another.")
        if "prompt" in self.parameters and prompts is None:
            raise InputError(f"prompts is None, but the model is a {self.name}; pass a file of prompts.")
        if "prompt" not in self.parameters and prompts is not None:
            raise InputError(f"prompts is set, but the model is a {self.name}, which takes none; leave it out.")
        self.settings = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        self.settings = {name: value for name, value in self.settings.items() if value is not None}
        self.solve = None
        if sampler in SOLVERS:
            self._prepare_solver()
        elif sampler != "pipeline":
            self._replace_scheduler()
        if self.solve is None:
            for name, value in self.settings.items():
                if name not in self.parameters:
                    raise InputError(
                        f"{name} is {value}, but the model is a {self.name}, which takes none; leave it out."
                    )

    def __len__(self) -> int:
        return self.num_samples

    @property
    def network(self) -> nn.Module | None:
        """What is called at every step."""
        return getattr(self.pipeline, "unet", None) or getattr(self.pipeline, "transformer", None)

    @property
    def num_classes(self) -> int | None:
        """How many classes there are; `None` if the pipeline takes none."""
        if "class_labels" not in self.parameters:
            return None
        config = self.network.config
        return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))

    def describe(self) -> dict:
        """The settings that samples depend on, those that were not given as the pipeline has them."""
        described = {"sampler": self.sampler, "scheduler": type(self.pipeline.scheduler).__name__}
        for name in ("num_inference_steps", "guidance_scale"):
            default = self.parameters[name].default if name in self.parameters else None
            described[name] = self.settings.get(name, default)
        return described | {"num_classes": self.num_classes}

    def probe(self) -> tuple[torch.Tensor, int]:
        """Sample 0 alone, uint8 `(1, C, H, W)`, and how many times the network was called for it; a call with
        guidance, of two rows a sample, counts twice."""
        with self._watched() as outputs:
            return self._images([0]), sum(len(rows) for rows in outputs)

    def stream(self, first: int, last: int) -> Iterator[torch.Tensor]:
        """The samples from `first` to before `last`, a batch or less at a time: uint8, `(B, C, H, W)`, on the CPU."""
        for start in range(first - first % self.batch_size, last, self.batch_size):
            images = self._images(range(start, start + self.batch_size))
            yield images[max(first - start, 0) : last - start]

    def prompts_of(self, indices: range) -> list[str]:
        """The prompts of these samples."""
        return [self.prompts[i % len(self.prompts)] for i in indices]

    def _images(self, indices: range | list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(self.seed + i) for i in indices]
        try:
            with self._watched() as outputs:
                if self.solve is not None:
                    images = self.solve(indices, generators)
                else:
                    images = self.pipeline(**self._arguments(indices), generator=generators, output_type="np").images
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"batch_size is {self.batch_size}, for which the memory is too small; pass a lower one."
            ) from error
        except (ValueError, RuntimeError, TypeError) as error:  # the last of a scheduler that lacks an argument
            reason = " ".join(str(error).split()).rstrip(".")[:300]
            raise InputError(
                f"model is a {self.name}, which cannot make samples in this way ({reason}); change the settings, or"
                " pass another model."
            ) from error
        if np.isnan(images).any():
            i = indices[int(np.isnan(images).any(axis=(1, 2, 3)).argmax())]
            raise InputError(
                f"model gives NaN for sample {i} (seed {self.seed + i}); check its weights, or pass another dtype."
            )
        # a pipeline clamps what is infinite to black and white, so that the images do not tell
        infinite = torch.stack([~rows.reshape(-1, len(indices)).all(dim=0) for rows in outputs]).any(dim=0)
        if infinite.any():
            i = indices[int(infinite.int().argmax())]
            raise InputError(
                f"model gives infinite values for sample {i} (seed {self.seed + i}); check its weights, or pass"
                " another dtype."
            )
        return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[torch.Tensor]]:
        """Collects of every call of the network which rows of its output are finite."""
        outputs = []

        def note(network: nn.Module, arguments: tuple, output):
            outputs.append(output[0].isfinite().flatten(1).all(dim=1))

        hook = self.network.register_forward_hook(note)
        try:
            yield outputs
        finally:
            hook.remove()

    def _arguments(self, indices: range | list[int]) -> dict:
        arguments = dict(self.settings)
        if self.prompts is not None:
            arguments["prompt"] = self.prompts_of(indices)
        elif self.num_classes:
            arguments["class_labels"] = self._class_labels(indices)
        if "batch_size" in self.parameters:
            arguments["batch_size"] = len(indices)
        return arguments

    def _class_labels(self, indices: range | list[int]) -> list[int]:
        return [i % self.num_classes for i in indices]

    def _replace_scheduler(self):
        cls = getattr(diffusers, self.sampler, None)
        if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
            raise InputError(
                f"sampler is {self.sampler!r}; choose pipeline, {', '.join(SOLVERS)}, or the name of a scheduler of"
                " diffusers."
            )
        if type(self.pipeline).__name__.startswith("OneStepPID"):
            raise InputError(
                f"sampler is {self.sampler!r}, but the model is a student, which has one step; leave it out."
            )
        scheduler = self.pipeline.scheduler
        if not _is_alternative(cls, scheduler):
            raise InputError(
                f"sampler is {self.sampler!r}, which computes something else of what the network of a"
                f" {type(scheduler).__name__} predicts; choose pipeline, or a scheduler of that kind."
            )
        self.pipeline.scheduler = cls.from_config(scheduler.config)

    def _prepare_solver(self):
        scheduler = type(self.pipeline.scheduler).__name__
        known = any(scheduler in family.scheduler_classes for family in Denoiser.__subclasses__())
        if not known or self.prompts is not None:
            raise InputError(
                f"sampler is {self.sampler!r}, but the model is a {self.name} with a {scheduler}, whose ODE is not"
                " known here; leave it out, or name a scheduler of diffusers."
            )
        if "guidance_scale" in self.settings:
            raise InputError(
                f"guidance_scale is set, but sampler {self.sampler!r} solves the ODE without; leave it out."
            )
        denoiser = Denoiser.of(self.pipeline)
        steps = self.settings.setdefault("num_inference_steps", 40)
        sigmas = PIDScheduler(**denoiser.trajectory_config).grid(steps + 1).tolist()

        @torch.no_grad()
        def solve(indices: range | list[int], generators: list[torch.Generator]) -> np.ndarray:
            device = self.pipeline.device
            noise = torch.stack([torch.randn(denoiser.sample_shape, generator=generator) for generator in generators])
            x = sigmas[0] * noise.to(device, widest_float(device))
            labels = self._class_labels(indices) if self.num_classes else None
            condition = {} if labels is None else {"class_labels": torch.tensor(labels, device=device)}
            for interval in pairwise(sigmas):
                x = SOLVERS[self.sampler](denoiser, x, interval, **condition)[-1]
            images = (denoiser.decode(x.float()) / 2 + 0.5).clamp(0, 1)
            return images.permute(0, 2, 3, 1).float().cpu().numpy()

        self.solve = solve
