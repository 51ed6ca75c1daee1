"""Images from one network call, and any other point of the trajectory, with a distilled network.

This file imports nothing but diffusers and torch, so that it can travel with a checkpoint.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, ModelMixin, UNet2DModel, VQModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import GaussianFourierProjection
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

logger = logging.get_logger(__name__)
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class OneStepPIDPipeline(DiffusionPipeline):
    r"""
    Images, unconditional or class-conditional, from a student of Physics Informed Distillation.

    From noise z = T · `latents` one network call gives x_θ(z, ε), the image, or x_θ(z, σ) at any other noise level.
    With a `vae` these are latents, which it decodes to images.

    A `UNet2DModel` with a Fourier time embedding, such as NCSN++, is told the noise level by phases of hundreds of
    radians. To run one in half precision, load it in float32 and call [`~OneStepPIDPipeline.to`], which leaves the
    embedding's frequencies as they are; loaded with `dtype=torch.bfloat16` they are rounded, which is warned of.

    Args:
        unet ([`UNet2DModel`], [`DiTTransformer2DModel`] or another network that is called as these): the distilled
            network F_θ.
        scheduler ([`PIDScheduler`]): makes the trajectory function x_θ(z, σ) of it.
        vae ([`AutoencoderKL`] or [`VQModel`], *optional*): the teacher's, of a student in latent space.

    Example:

        >>> import pid_diffusers
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("pid-digits")
        >>> images = pipe(class_labels=[3, 1, 4]).images
    """

    # Kept, and in the class: diffusers copies the code of every local folder to one place and runs it as one module.
    _source = __spec__.loader.get_source(__spec__.name)
    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: UNet2DModel | ModelMixin,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | VQModel | None = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)
        for frequencies in self._fourier_frequencies():
            if frequencies.dtype in (torch.float16, torch.bfloat16):
                logger.warning(
                    "The frequencies of this network's time embedding are in %s, by whose rounding the network takes"
                    " one noise level for another. Load the pipeline in float32 and call pipe.to(%s), which keeps"
                    " them in float32.",
                    frequencies.dtype,
                    frequencies.dtype,
                )

    def _fourier_frequencies(self) -> list[torch.nn.Parameter]:
        return [module.weight for module in self.unet.modules() if isinstance(module, GaussianFourierProjection)]

    def to(self, *args, **kwargs) -> DiffusionPipeline:
        """As for every pipeline, but the frequencies of a Fourier time embedding are not cast."""
        kept = [(frequencies, frequencies.data) for frequencies in self._fourier_frequencies()]
        super().to(*args, **kwargs)
        for frequencies, unrounded in kept:
            frequencies.data = unrounded.to(frequencies.device)
        return self

    def check_inputs(
        self,
        batch_size: int | None,
        class_labels: torch.Tensor | list[int] | int | None,
        num_inference_steps: int | None,
        sigmas: list[float] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> tuple[int, torch.Tensor | None]:
        """The batch size, and the class labels as a tensor of that length or `None`.

        Raises:
            ValueError: if an argument is out of range, or the lengths do not fit together.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {sorted(unknown)}; choose from"
                f" {self._callback_tensor_inputs}."
            )
        if sigmas is not None and num_inference_steps not in (None, 1):
            raise ValueError("num_inference_steps and sigmas were both passed; pass one of them.")

        num_classes = self.num_classes
        if class_labels is not None:
            if num_classes is None:
                raise ValueError("class_labels was passed, but this model is unconditional; leave it out.")
            given = class_labels
            try:
                class_labels = torch.as_tensor(given)
                fits = class_labels.ndim <= 1 and class_labels.numel() > 0
                fits = fits and not class_labels.is_floating_point() and class_labels.dtype != torch.bool
            except (TypeError, ValueError, RuntimeError):
                fits = False
            if not fits:
                raise ValueError(f"class_labels is {given!r}; pass an integer or a list of integers.")
            class_labels = class_labels.long()
            if bool(((class_labels < 0) | (class_labels >= num_classes)).any()):
                raise ValueError(
                    f"class_labels is {class_labels.tolist()}; this model knows the classes 0 to {num_classes - 1}."
                )
        lengths = {
            "batch_size": batch_size,
            "class_labels": len(class_labels) if class_labels is not None and class_labels.ndim == 1 else None,
            "latents": None if latents is None or latents.ndim == 0 else len(latents),
            "generator": len(generator) if isinstance(generator, list) else None,
        }
        lengths = {name: length for name, length in lengths.items() if length is not None}
        if len(set(lengths.values())) > 1:
            raise ValueError(
                "every image needs one of each, but "
                + ", ".join(f"{name} means {length}" for name, length in lengths.items())
                + " images; pass arguments of the same length."
            )
        batch_size = next(iter(lengths.values()), 1)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}; pass an integer of at least 1.")
        if latents is not None and tuple(latents.shape) != self._latents_shape(batch_size):
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; this model needs {self._latents_shape(batch_size)}."
            )
        return batch_size, None if class_labels is None else class_labels.expand(batch_size)

    def _latents_shape(self, batch_size: int) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.unet.config.in_channels, height, width

    @property
    def num_classes(self) -> int | None:
        """How many classes the model knows; `None` if it is unconditional."""
        config = self.unet.config
        return config.get("num_class_embeds", config.get("num_embeds_ada_norm"))  # of a UNet, of a DiT

    @property
    def num_timesteps(self) -> int:
        """How many noise levels the call under way visits, as callbacks of diffusers read it."""
        return self._num_timesteps

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int | None = None,
        class_labels: torch.Tensor | list[int] | int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in diffusers
    ) -> ImagePipelineOutput | tuple:
        r"""
        Args:
            batch_size (`int`, *optional*): how many images; by default as many as there are labels, latents or
                generators, else 1.
            class_labels (`torch.Tensor`, `list[int]` or `int`, *optional*): the class of each image, or one for all.
                A class-conditional model that is told none draws them from `generator`, after the noise.
            num_inference_steps (`int`, *optional*, defaults to 1): 1 is all that an image needs. A larger n visits n
                points of the trajectory, for callbacks; the image is that of the last, the same as with 1.
            sigmas (`list[float]`, *optional*): the trajectory: x_θ(z, σ) for each of these noise levels in [0, T],
                from the same z. Then `images` holds image b at `sigmas[i]` at index `b * len(sigmas) + i`. A `vae`
                decodes noisy latents as they are; what it makes of much noise is no image.
            generator (`torch.Generator` or a list of one an image, *optional*): makes the result repeatable.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): noise of unit variance, instead of drawn.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W) in [0, 1],
                black to white whatever the scheduler's `sample_min`, or
                `"latent"`: x_θ as it is, not decoded, a tensor in the units of what the network was trained on.
            return_dict (`bool`, defaults to `True`): an [`ImagePipelineOutput`] instead of a tuple.
            callback_on_step_end (`Callable`, *optional*): called as `(pipe, step, timestep, callback_kwargs)` after
                every network call; may return a changed `latents`, the point of the trajectory just computed.
            callback_on_step_end_tensor_inputs (`list[str]`): what it is given: `"latents"`.

        Returns:
            [`ImagePipelineOutput`] or `tuple`: the images, first element of the tuple.

        Raises:
            ValueError: if an argument is out of range, or the lengths do not fit together.
        """
        # 1. Check inputs
        batch_size, class_labels = self.check_inputs(
            batch_size,
            class_labels,
            num_inference_steps,
            sigmas,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device

        # 2. Noise: z = T · latents, in float32 whatever the network runs in
        if latents is None:
            shape = self._latents_shape(batch_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        start = latents.to(device=device, dtype=torch.promote_types(latents.dtype, torch.float32))
        start = start * self.scheduler.init_noise_sigma

        # 3. Condition
        condition = {}
        if self.num_classes is not None:
            if class_labels is None:
                class_labels = self._draw_class_labels(batch_size, generator)
            condition["class_labels"] = class_labels.to(device)

        # 4. Noise levels
        if sigmas is not None:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)

        # 5. One network call a noise level, each from the start
        points = []
        sample = self.scheduler.scale_model_input(start).to(self.unet.dtype)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                # a DiT needs one time an image
                model_output = self.unet(sample, t.expand(batch_size), **condition, return_dict=False)[0]
                latents = self.scheduler.step(model_output, t, start, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = outputs.pop("latents", latents)
                points.append(latents)
                progress_bar.update()

        # 6. Images
        if sigmas is not None:
            latents = torch.stack(points, dim=1).flatten(0, 1)
        if self.vae is None and output_type != "latent" and self.scheduler.config.get("sample_min") == 0:
            latents = 2 * latents - 1  # from the range of the data to that of all other images
        if self.vae is not None and output_type != "latent":
            latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
            latents = self.vae.decode(latents, return_dict=False)[0]
        images = self.image_processor.postprocess(latents, output_type=output_type)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images,)
        return ImagePipelineOutput(images=images)

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Saves as every pipeline does, and this file beside it as `pipeline.py`, so that
        `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` needs nothing that is not in the folder.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if it is absent.
            *args, **kwargs: as for every pipeline.
        """
        if self._is_of_this_file:
            os.makedirs(save_directory, exist_ok=True)
            (Path(save_directory) / "pipeline.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def to_json_string(self) -> str:
        """The content of `model_index.json`, which names the class and the file `pipeline.py` that holds it."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # where this one was loaded from says nothing about where it is saved
        if self.vae is None:
            index.pop("vae", None)  # every component that is named has a folder
        if self._is_of_this_file:
            index["_class_name"] = ["pipeline", type(self).__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def _is_of_this_file(self) -> bool:
        """False for a subclass from elsewhere, which is saved like any other pipeline, by its name."""
        return type(self).__module__ == __name__

    def _draw_class_labels(
        self, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> torch.Tensor:
        if not isinstance(generator, list):
            device = None if generator is None else generator.device
            return torch.randint(self.num_classes, (batch_size,), generator=generator, device=device)
        return torch.cat([self._draw_class_labels(1, g).cpu() for g in generator])
