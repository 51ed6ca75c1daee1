"""Samples of any pipeline, each of which depends on its own seed alone."""

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

from ..denoisers import Denoiser, euler, heun
from ..errors import InputError
from ..precision import widest_float
from ..schedulers import PIDScheduler

BUILT_IN = {name: Path(__file__).parent.parent / "assets" / name for name in ("digits-student", "digits-teacher")}
SOLVERS = {"euler": euler, "heun": heun}


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
        """Sample 0 alone, uint8 `(1, C, H, W)`, and how many times the network was called for it."""
        calls = []
        hook = self.network.register_forward_hook(lambda *_: calls.append(1))
        try:
            return self._images([0]), len(calls)
        finally:
            hook.remove()

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
            if self.solve is not None:
                images = self.solve(indices, generators)
            else:
                images = self.pipeline(**self._arguments(indices), generator=generators, output_type="np").images
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"batch_size is {self.batch_size}, for which the memory is too small; pass a lower one."
            ) from error
        except (ValueError, RuntimeError) as error:
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
        return torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)

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
        self.pipeline.scheduler = cls.from_config(self.pipeline.scheduler.config)

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
