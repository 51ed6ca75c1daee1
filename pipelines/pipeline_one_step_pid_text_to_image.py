"""Images from a text and one network call, with a distilled Stable Diffusion, whole or as a LoRA of its teacher.

This file imports nothing but diffusers, torch and what these need, so that it can travel with a checkpoint.
"""

import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import (
    StableDiffusionLoraLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    TextualInversionLoaderMixin,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
    get_adapter_name,
    logging,
)
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
COND_PROJ = "time_embedding.cond_proj"
# what a LoRA file calls its tensors: module, kind (A, B, …)
LORA_KEY = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector(?:\.weight)?|lokr_\w+)")


class OneStepPIDTextToImagePipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    StableDiffusionLoraLoaderMixin,
):
    r"""
    Text to image with a student of Stable Diffusion 1.x, 2.x or XL by Physics Informed Distillation.

    From noise z = T · `latents` one network call gives the latents x_θ(z, ε), which the VAE decodes, or x_θ(z, σ) at
    any other noise level. Guidance belongs to the ODE that the student solves, so that it costs no second call: w is
    baked in, or the UNet is told w (`scheduler.config.guidance_range`).

    `from_pretrained` takes a student's folder, or that of a [`StableDiffusionPipeline`] or
    [`StableDiffusionXLPipeline`], to which [`~OneStepPIDTextToImagePipeline.load_lora_weights`] then adds a student
    that is a LoRA.

    Args:
        vae ([`AutoencoderKL`]): the teacher's.
        text_encoder ([`~transformers.CLIPTextModel`]), tokenizer ([`~transformers.CLIPTokenizer`]): the teacher's.
        unet ([`UNet2DConditionModel`]): the distilled network F_θ, or the teacher's, for a LoRA.
        scheduler ([`PIDScheduler`]): makes the trajectory function x_θ(z, σ) of the UNet. A teacher's own scheduler
            is replaced by `load_lora_weights`.
        safety_checker ([`StableDiffusionSafetyChecker`] or `None`), feature_extractor
            ([`~transformers.CLIPImageProcessor`] or `None`): the teacher's, where it has them.
        text_encoder_2 ([`~transformers.CLIPTextModelWithProjection`], *optional*), tokenizer_2
            ([`~transformers.CLIPTokenizer`], *optional*): Stable Diffusion XL's.
        requires_safety_checker (`bool`, defaults to `True`), force_zeros_for_empty_prompt (`bool`, defaults to
            `True`): the teacher's, kept for the pipelines of diffusers that load the same folder.

    Example:

        >>> import pid_diffusers
        >>> from diffusers import DiffusionPipeline
        >>> pipe = DiffusionPipeline.from_pretrained("pid-stable-diffusion")
        >>> image = pipe("a red fox in the snow").images[0]
    """

    # Kept, and in the class: diffusers copies the code of every local folder to one place and runs it as one module.
    _source = __spec__.loader.get_source(__spec__.name)
    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = ["safety_checker", "feature_extractor", "text_encoder_2", "tokenizer_2"]
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: SchedulerMixin,
        safety_checker: StableDiffusionSafetyChecker | None,  # no default: diffusers would take it for no component
        feature_extractor: CLIPImageProcessor | None,
        text_encoder_2: CLIPTextModelWithProjection | None = None,
        tokenizer_2: CLIPTokenizer | None = None,
        requires_safety_checker: bool = True,
        force_zeros_for_empty_prompt: bool = True,
    ):
        super().__init__()
        if safety_checker is not None and feature_extractor is None:
            raise ValueError("a safety_checker was passed without a feature_extractor; pass both, or neither.")
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
        )
        self.register_to_config(
            requires_safety_checker=requires_safety_checker, force_zeros_for_empty_prompt=force_zeros_for_empty_prompt
        )
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        # of every LoRA that came with a scheduler, by the adapter's name; that from before is under None
        self._lora_schedulers = {}
        self._guidance_projection_of = None  # the adapter for which the UNet was extended
        self._trainable = None  # the UNet's parameters that require gradients, before any LoRA

    run_safety_checker = StableDiffusionPipeline.run_safety_checker

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        What the UNet is told of each image's prompt, by the code of diffusers' pipeline for the same kind of teacher.

        Args:
            prompt (`str` or `list[str]`, *optional*): n prompts; `None` if embeddings are given.
            device (`torch.device`, *optional*): where the embeddings are put.
            num_images_per_prompt (`int`, defaults to 1): how often each is repeated.
            prompt_embeds (`torch.Tensor` of shape `(n, L, D)`, *optional*), pooled_prompt_embeds (`torch.Tensor` of
                shape `(n, P)`, *optional*): instead of a prompt.
            lora_scale (`float`, *optional*): scales the LoRA of the text encoders.
            clip_skip (`int`, *optional*): how many of the last layers of the text encoders are left out.

        Returns:
            `prompt_embeds` of shape `(n · num_images_per_prompt, L, D)` and, of Stable Diffusion XL,
            `pooled_prompt_embeds` of shape `(n · num_images_per_prompt, P)`.
        """
        settings = {"prompt_embeds": prompt_embeds, "lora_scale": lora_scale, "clip_skip": clip_skip}
        settings |= {"num_images_per_prompt": num_images_per_prompt, "do_classifier_free_guidance": False}
        device = self._execution_device if device is None else device
        if self.text_encoder_2 is not None or pooled_prompt_embeds is not None:
            prompt_embeds, _, pooled_prompt_embeds, _ = StableDiffusionXLPipeline.encode_prompt(
                self, prompt, device=device, pooled_prompt_embeds=pooled_prompt_embeds, **settings
            )
        else:
            prompt_embeds, _ = StableDiffusionPipeline.encode_prompt(self, prompt, device, **settings)
        return prompt_embeds, pooled_prompt_embeds

    def check_inputs(
        self,
        prompt: str | list[str] | None,
        height: int | None,
        width: int | None,
        num_inference_steps: int | None,
        sigmas: list[float] | None,
        guidance_scale: float | None,
        negative_prompt: str | list[str] | None,
        num_images_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        prompt_embeds: torch.Tensor | None,
        pooled_prompt_embeds: torch.Tensor | None,
        output_type: str,
        clip_skip: int | None,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> int:
        """The batch size, `num_images_per_prompt` for every prompt.

        Raises:
            ValueError: if an argument is out of range, has no meaning for this student, or does not fit another one.
        """
        if not self._has_pid_scheduler:
            raise ValueError(
                f"the scheduler is a {type(self.scheduler).__name__}, which makes no one-step student of the UNet;"
                " call load_lora_weights with a result of distillation, or pass scheduler=PIDScheduler(…) and"
                " its UNet to from_pretrained."
            )
        student = next(reversed(self._lora_schedulers), None)
        if student is not None and student not in {*self.get_active_adapters(), *self._fused_in_unet}:
            active = ", ".join(map(repr, [student, *self.get_active_adapters()]))
            raise ValueError(
                f"the scheduler belongs to the LoRA {student!r}, which is not active; call set_adapters([{active}])."
            )
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
        self._check_guidance(guidance_scale, negative_prompt)
        for name, given, trained in zip(("height", "width"), (height, width), self._image_size, strict=True):
            if given not in (None, trained):
                raise ValueError(
                    f"{name} is {given}, but this student was trained for images of {self._image_size[0]} ×"
                    f" {self._image_size[1]}; leave it out."
                )

        # the prompts
        if (prompt is None) == (prompt_embeds is None):
            raise ValueError("pass either prompt or prompt_embeds.")
        if prompt is not None:
            prompts = [prompt] if isinstance(prompt, str) else prompt
            if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) for p in prompts):
                raise ValueError(f"prompt is {prompt!r}; pass a text or a list of texts.")
            needed = ["text_encoder", "tokenizer", *(["text_encoder_2", "tokenizer_2"] if self._is_xl else [])]
            absent = [name for name in needed if getattr(self, name) is None]
            if absent:
                raise ValueError(
                    f"the pipeline has no {' and no '.join(absent)} to read a prompt; pass prompt_embeds."
                )
            number = len(prompts)
        else:
            dim = self.unet.config.cross_attention_dim
            if prompt_embeds.ndim != 3 or prompt_embeds.shape[2] != dim:
                raise ValueError(
                    f"prompt_embeds has shape {tuple(prompt_embeds.shape)}; this UNet needs (prompts, tokens, {dim})."
                )
            number = len(prompt_embeds)
        if (pooled_prompt_embeds is not None) != (prompt_embeds is not None and self._is_xl):
            raise ValueError(
                "pooled_prompt_embeds is None; prompt_embeds of Stable Diffusion XL need them beside it."
                if pooled_prompt_embeds is None
                else "pooled_prompt_embeds was passed, but Stable Diffusion XL alone reads it; leave it out."
            )
        if pooled_prompt_embeds is not None and len(pooled_prompt_embeds) != number:
            raise ValueError(
                f"pooled_prompt_embeds has {len(pooled_prompt_embeds)} rows, prompt_embeds {number}; pass one each."
            )
        if clip_skip is not None and prompt is not None and not self._is_xl:
            if not hasattr(self.text_encoder, "text_model"):
                raise ValueError(
                    f"clip_skip is {clip_skip}, but diffusers cannot leave out layers of the CLIPTextModel of this"
                    " version of transformers; leave clip_skip out, or pass prompt_embeds."
                )
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(f"num_images_per_prompt is {num_images_per_prompt!r}; pass an integer of at least 1.")

        batch_size = number * num_images_per_prompt
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"generator is a list of {len(generator)}; pass one a picture, which makes {batch_size}.")
        if latents is not None and tuple(latents.shape) != self._latents_shape(batch_size):
            raise ValueError(
                f"latents has shape {tuple(latents.shape)}; these images need {self._latents_shape(batch_size)}."
            )
        return batch_size

    def _check_guidance(self, guidance_scale: float | None, negative_prompt: str | list[str] | None):
        config, told = self.scheduler.config, self.unet.config.time_cond_proj_dim is not None
        if negative_prompt is not None:
            raise ValueError(
                "negative_prompt was passed, but guidance is part of what this student has learnt, and it was always"
                " guided away from the unconditional embedding; leave negative_prompt out."
            )
        if config.guidance_range is None:
            baked_in = 1.0 if config.guidance_scale is None else config.guidance_scale
            if guidance_scale not in (None, baked_in):
                raise ValueError(
                    f"guidance_scale is {guidance_scale}, but this student was trained with w = {baked_in:g}, which is"
                    " baked into its weights; leave guidance_scale out."
                )
            return
        low, high = config.guidance_range
        if not told:
            raise ValueError(
                f"the scheduler has guidance_range = [{low:g}, {high:g}], but the UNet cannot be told w (its"
                " time_cond_proj_dim is None); load the UNet or LoRA that belongs to the scheduler."
            )
        number = isinstance(guidance_scale, int | float)
        if guidance_scale is not None and not (number and low <= guidance_scale <= high):
            raise ValueError(
                f"guidance_scale is {guidance_scale!r}; this student knows numbers between {low:g} and {high:g}."
            )

    @property
    def _has_pid_scheduler(self) -> bool:
        # by name: this file does not import it, and without the package it comes from the repository's file
        return any(cls.__name__ == "PIDScheduler" for cls in type(self.scheduler).__mro__)

    @property
    def _is_xl(self) -> bool:
        return self.unet.config.addition_embed_type == "text_time"

    @property
    def _image_size(self) -> tuple[int, int]:
        _, _, height, width = self._latents_shape(1)
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _latents_shape(self, batch_size: int) -> tuple[int, ...]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return batch_size, self.unet.config.in_channels, height, width

    @property
    def num_timesteps(self) -> int:
        """How many noise levels the call under way visits, as callbacks of diffusers read it."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """w of the call under way: baked in, or what the network is told."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """False: there is no second network call, whatever w is."""
        return False

    @property
    def cross_attention_kwargs(self) -> dict | None:
        """Those of the call under way."""
        return self._cross_attention_kwargs

    @property
    def clip_skip(self) -> int | None:
        """That of the call under way."""
        return self._clip_skip

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[DiffusionPipeline, int, torch.Tensor, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 - as in diffusers
    ) -> StableDiffusionPipelineOutput | tuple:
        r"""
        Args:
            prompt (`str` or `list[str]`, *optional*): what the images show; or pass `prompt_embeds`.
            height (`int`, *optional*), width (`int`, *optional*): the size that the student was trained for, and no
                other.
            num_inference_steps (`int`, *optional*, defaults to 1): 1 is all that an image needs. A larger n visits n
                points of the trajectory, for callbacks; the image is that of the last, the same as with 1.
            sigmas (`list[float]`, *optional*): the trajectory: x_θ(z, σ) for each of these noise levels in [0, T],
                from the same z. Then `images` holds image b at `sigmas[i]` at index `b * len(sigmas) + i`. The VAE
                decodes noisy latents as they are; what it makes of much noise is no image.
            guidance_scale (`float`, *optional*): w, for a student that is told it, in
                `scheduler.config.guidance_range`; its middle by default. Where w is baked in, that value or nothing.
            negative_prompt: always refused, because a student is guided away from the unconditional embedding that it
                was trained with; there for callers that pass `None`.
            num_images_per_prompt (`int`, defaults to 1): prompt p's images are those from p · n to (p + 1) · n − 1.
            generator (`torch.Generator` or a list of one an image, *optional*): makes the result repeatable.
            latents (`torch.Tensor` of shape `(B, C, H, W)`, *optional*): noise of unit variance, instead of drawn; B
                is the number of prompts times `num_images_per_prompt`.
            prompt_embeds (`torch.Tensor` of shape `(n, L, D)`, *optional*), pooled_prompt_embeds (`torch.Tensor` of
                shape `(n, P)`, *optional*, Stable Diffusion XL's): from
                [`~OneStepPIDTextToImagePipeline.encode_prompt`], instead of `prompt`.
            output_type (`str`, defaults to `"pil"`): `"pil"`, `"np"` (B, H, W, C) or `"pt"` (B, C, H, W) in [0, 1], or
                `"latent"`: x_θ as it is, not decoded.
            return_dict (`bool`, defaults to `True`): a [`StableDiffusionPipelineOutput`] instead of a tuple.
            cross_attention_kwargs (`dict`, *optional*): for the UNet's attention; `{"scale": s}` scales its LoRA.
            clip_skip (`int`, *optional*): how many of the last layers of the text encoders are left out.
            callback_on_step_end (`Callable`, *optional*): called as `(pipe, step, timestep, callback_kwargs)` after
                every network call; may return changed `latents`, the point of the trajectory just computed.
            callback_on_step_end_tensor_inputs (`list[str]`): what it is given: `"latents"`, `"prompt_embeds"`.

        Returns:
            [`StableDiffusionPipelineOutput`] or `tuple`: the images, and for each whether the safety checker objects
            to it (`None` without one).

        Raises:
            ValueError: if an argument is out of range, has no meaning for this student, or does not fit another one.
        """
        # 1. Check inputs
        batch_size = self.check_inputs(
            prompt,
            height,
            width,
            num_inference_steps,
            sigmas,
            guidance_scale,
            negative_prompt,
            num_images_per_prompt,
            generator,
            latents,
            prompt_embeds,
            pooled_prompt_embeds,
            output_type,
            clip_skip,
            callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        self._cross_attention_kwargs = cross_attention_kwargs
        self._clip_skip = clip_skip

        # 2. The prompt's embeddings
        prompt_embeds, pooled_prompt_embeds = self.encode_prompt(
            prompt,
            device,
            num_images_per_prompt,
            prompt_embeds,
            pooled_prompt_embeds,
            lora_scale=None if cross_attention_kwargs is None else cross_attention_kwargs.get("scale"),
            clip_skip=clip_skip,
        )

        # 3. Noise: z = T · latents, in float32 whatever the network runs in
        if latents is None:
            shape = self._latents_shape(batch_size)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        start = latents.to(device=device, dtype=torch.promote_types(latents.dtype, torch.float32))
        start = start * self.scheduler.init_noise_sigma

        # 4. The other conditions: sizes and pooled embeddings of Stable Diffusion XL, w where it is told
        condition = {}
        if self._is_xl:
            time_ids = torch.tensor([*self._image_size, 0, 0, *self._image_size], dtype=prompt_embeds.dtype)
            condition["added_cond_kwargs"] = {
                "text_embeds": pooled_prompt_embeds.to(device),
                "time_ids": time_ids.to(device).expand(batch_size, 6),
            }
        config = self.scheduler.config
        if config.guidance_range is None:
            self._guidance_scale = 1.0 if config.guidance_scale is None else config.guidance_scale
        else:
            self._guidance_scale = sum(config.guidance_range) / 2 if guidance_scale is None else guidance_scale
            w = torch.tensor([float(self._guidance_scale)], device=device).expand(batch_size)
            embedding = self.scheduler.guidance_embedding(w, self.unet.config.time_cond_proj_dim)
            condition["timestep_cond"] = embedding.to(self.unet.dtype)

        # 5. Noise levels
        if sigmas is not None:
            self.scheduler.set_timesteps(sigmas=sigmas, device=device)
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        self._num_timesteps = len(self.scheduler.timesteps)

        # 6. One network call a noise level, each from the start
        points = []
        sample = self.scheduler.scale_model_input(start).to(self.unet.dtype)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_output = self.unet(
                    sample,
                    t,
                    encoder_hidden_states=prompt_embeds,
                    cross_attention_kwargs=cross_attention_kwargs,
                    return_dict=False,
                    **condition,
                )[0]
                latents = self.scheduler.step(model_output, t, start, return_dict=False)[0]
                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    outputs = callback_on_step_end(self, i, t, callback_kwargs)
                    latents = outputs.pop("latents", latents)
                    prompt_embeds = outputs.pop("prompt_embeds", prompt_embeds)
                points.append(latents)
                progress_bar.update()

        # 7. Images
        if sigmas is not None:
            latents = torch.stack(points, dim=1).flatten(0, 1)
        nsfw_content_detected = None
        if output_type == "latent":
            images = latents
        else:
            images = self._decode(latents)
            images, nsfw_content_detected = self.run_safety_checker(images, device, prompt_embeds.dtype)
            denormalize = [not found for found in nsfw_content_detected or [False] * len(images)]
            images = self.image_processor.postprocess(images, output_type=output_type, do_denormalize=denormalize)

        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nsfw_content_detected)
        return StableDiffusionPipelineOutput(images=images, nsfw_content_detected=nsfw_content_detected)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        config = self.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
            latents = latents * std / config.scaling_factor + mean
        else:
            latents = latents / config.scaling_factor
        dtype = self.vae.dtype
        if dtype != torch.float16 or not config.force_upcast:
            return self.vae.decode(latents.to(dtype), return_dict=False)[0]
        # such a VAE overflows in float16
        self.vae.to(dtype=torch.float32)
        try:
            return self.vae.decode(latents.float(), return_dict=False)[0]
        finally:
            self.vae.to(dtype=dtype)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike | dict[str, torch.Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **kwargs,
    ):
        """
        Adds a LoRA to the UNet and the text encoders, as in diffusers, whose arguments it has.

        The file is checked first, and nothing is changed if it does not fit. With a `scheduler/scheduler_config.json`
        of a [`PIDScheduler`] beside it, it is a one-step student: the pipeline takes that scheduler, and a UNet that
        cannot be told w is extended by `time_embedding.cond_proj` if the file needs it. Any other LoRA, such as one
        for a style, is just added. As in diffusers the LoRA loaded last is the active one; `set_adapters` combines.

        Args:
            pretrained_model_name_or_path_or_dict (`str`, `os.PathLike` or `dict`): a folder, a file, a repository on
                the Hub, or the tensors.
            adapter_name (`str`, *optional*): what it is called in `set_adapters` and elsewhere.
            hotswap (`bool`, defaults to `False`): replace the adapter of that name in place.
            **kwargs: `weight_name`, `subfolder`, `revision`, `token`, `cache_dir`, `force_download`,
                `local_files_only`, `use_safetensors`, `low_cpu_mem_usage`.

        Raises:
            ValueError: if the file is incomplete or of another network, or the adapter's name is taken.
            OSError: if the file is not there or damaged.
        """
        source = pretrained_model_name_or_path_or_dict
        low_cpu_mem_usage = kwargs.pop("low_cpu_mem_usage", True)
        file = "the state dict" if isinstance(source, dict) else str(Path(source, kwargs.get("weight_name") or ""))
        state_dict, network_alphas, metadata = self.lora_state_dict(
            dict(source) if isinstance(source, dict) else source,
            unet_config=self.unet.config if self._is_xl else None,
            return_lora_metadata=True,
            **kwargs,
        )
        scheduler = None if isinstance(source, dict) else self._scheduler_beside(source, **kwargs)
        keys = self._check_lora(file, state_dict, metadata or {}, scheduler)

        adapters = self.get_list_adapters()
        if not hotswap and any(adapter_name in adapters.get(name, ()) for name in keys):
            raise ValueError(f"adapter_name is {adapter_name!r}, which is taken; pass another, or hotswap=True.")
        if adapter_name is None:
            # diffusers' name; it counts on one module alone, which other adapters need not have
            names = {name for names in adapters.values() for name in names}
            free = (f"default_{i}" for i in range(len(names) + 1) if f"default_{i}" not in names)
            adapter_name = get_adapter_name(self.unet)
            adapter_name = next(free) if adapter_name in names else adapter_name
        settings = {"adapter_name": adapter_name, "metadata": metadata, "low_cpu_mem_usage": low_cpu_mem_usage}
        settings |= {"network_alphas": network_alphas, "hotswap": hotswap, "_pipeline": self}
        if not adapters.get("unet"):
            self._trainable = {name for name, parameter in self.unet.named_parameters() if parameter.requires_grad}
        down = state_dict.get(f"unet.{COND_PROJ}.lora_A.weight")
        if down is not None and self.unet.time_embedding.cond_proj is None:
            self._add_guidance_projection(down.shape[1])
            self._guidance_projection_of = adapter_name
        try:
            if "unet" in keys:
                self.load_lora_into_unet(state_dict, unet=self.unet, **settings)
            for name in sorted(keys.keys() - {"unet"}):
                self.load_lora_into_text_encoder(
                    state_dict, text_encoder=getattr(self, name), prefix=name, lora_scale=self.lora_scale, **settings
                )
            self._check_attached(file, keys, adapter_name)
        except Exception:
            if not hotswap:
                self.delete_adapters(adapter_name)
            raise
        if scheduler is not None:
            self._lora_schedulers.setdefault(None, self.scheduler)
            self._lora_schedulers[adapter_name] = self.scheduler = scheduler

    def unload_lora_weights(self):
        """
        Takes every LoRA away, and gives back the UNet and the scheduler from before. What was fused stays, with its
        scheduler.
        """
        fused = self._fused_in_unet
        super().unload_lora_weights()
        if self._trainable is not None:
            # PEFT freezes the network, and PyTorch rounds a product of matrices otherwise where one needs gradients
            for name, parameter in self.unet.named_parameters():
                parameter.requires_grad_(name in self._trainable)
        self._forget_adapters([*self._lora_schedulers, self._guidance_projection_of], fused)

    def delete_adapters(self, adapter_names: list[str] | str):
        """
        Takes some LoRAs away, and what came with them.

        Args:
            adapter_names (`str` or `list[str]`): their names.
        """
        fused = self._fused_in_unet
        super().delete_adapters(adapter_names)
        self._forget_adapters([adapter_names] if isinstance(adapter_names, str) else adapter_names, fused)

    @property
    def _fused_in_unet(self) -> set[str]:
        return {name for module in self.unet.modules() for name in getattr(module, "merged_adapters", ())}

    def _forget_adapters(self, names: list[str | None], fused: set[str]):
        """Undoes what `load_lora_weights` did beside adding adapters, unless they are part of the weights now."""
        if self._guidance_projection_of is not None and self._guidance_projection_of in names:
            users = list(getattr(self.unet.time_embedding.cond_proj, "lora_A", ()))  # other adapters
            if not users and self._guidance_projection_of not in fused:
                self.unet.time_embedding.cond_proj = None
                self.unet.register_to_config(time_cond_proj_dim=None)
            self._guidance_projection_of = users[0] if users else None
        gone = [name for name in self._lora_schedulers if name is not None and name in names]
        if gone:
            left = {name: scheduler for name, scheduler in self._lora_schedulers.items() if name not in gone}
            left[None] = next((self._lora_schedulers[name] for name in reversed(gone) if name in fused), left[None])
            self.scheduler = next(reversed(left.values()))
            self._lora_schedulers = left if len(left) > 1 else {}

    def _add_guidance_projection(self, dim: int):
        """What a UNet2DConditionModel with `time_cond_proj_dim` = `dim` has, in zeros: the UNet computes the same."""
        first = self.unet.time_embedding.linear_1
        device = "cpu" if first.weight.device.type == "meta" else first.weight.device  # offloaded: hooks come later
        shape = {"in_features": dim, "out_features": first.in_features, "bias": False}
        projection = torch.nn.utils.skip_init(torch.nn.Linear, **shape, device=device, dtype=self.unet.dtype)
        projection.weight.requires_grad_(False).zero_()
        self.unet.time_embedding.cond_proj = projection
        self.unet.register_to_config(time_cond_proj_dim=dim)

    def _scheduler_beside(
        self,
        source: str | os.PathLike,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        **kwargs,
    ) -> SchedulerMixin | None:
        """The PIDScheduler whose configuration lies beside a LoRA's file; `None` if there is none."""
        if os.path.exists(source):
            folder = Path(source).parent if os.path.isfile(source) else Path(source, subfolder or "")
            path = folder / "scheduler" / "scheduler_config.json"
            if not path.is_file():
                return None
        else:
            try:
                path = hf_hub_download(
                    str(source),
                    "scheduler_config.json",
                    subfolder=f"{subfolder}/scheduler" if subfolder else "scheduler",
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=bool(local_files_only),
                )
            except LocalEntryNotFoundError:
                if not local_files_only and not constants.HF_HUB_OFFLINE:
                    raise  # the Hub did not answer
                return None
            except EntryNotFoundError:
                return None
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if config.get("_class_name") != "PIDScheduler":
            return None
        if self._has_pid_scheduler:
            return type(self.scheduler).from_config(config)
        try:
            return importlib.import_module("pid_diffusers").PIDScheduler.from_config(config)
        except ImportError as error:
            raise ValueError(
                f"{source} needs a PIDScheduler, but the package pid_diffusers is not installed; install it, or pass"
                " scheduler=PIDScheduler(…) to from_pretrained."
            ) from error

    def _check_lora(
        self, file: str, state_dict: dict[str, torch.Tensor], metadata: dict, scheduler: SchedulerMixin | None
    ) -> dict[str, set[str]]:
        """
        The names of a LoRA's tensors in PEFT's format, by component.

        Raises:
            ValueError: unless every tensor fits a module, has its counterpart, and every module that the file's own
                metadata names has its tensors.
        """
        if not state_dict:
            raise ValueError(f"{file} holds no weights; pass a LoRA of this pipeline's UNet or text encoders.")
        parts = {}
        for key, tensor in state_dict.items():
            name, _, rest = key.partition(".")
            if name not in self._lora_loadable_modules or getattr(self, name) is None or not rest:
                present = [f"{name}." for name in self._lora_loadable_modules if getattr(self, name) is not None]
                raise ValueError(
                    f"{file} has the key {key!r}, which begins with none of {', '.join(present)}; it is no LoRA of"
                    " this pipeline."
                )
            parts.setdefault(name, {})[rest] = tensor
        for name, part in parts.items():
            parts[name] = part = self._in_peft_format(name, part)
            modules = dict(getattr(self, name).named_modules())
            for key in part:
                fault = self._lora_fault(name, key, part, modules)
                if fault:
                    raise ValueError(f"{file} has the key {f'{name}.{key}'!r}, {fault}.")
            missing = self._missing_lora_module(name, part, metadata)
            if missing:
                raise ValueError(
                    f"{file} lacks the key '{name}.{missing}.lora_A.weight', a module that its own metadata names; it"
                    " is incomplete."
                )
        projected = f"{COND_PROJ}.lora_A.weight" in parts.get("unet", {})
        if scheduler is not None and scheduler.config.guidance_range is not None:
            if not projected and self.unet.time_embedding.cond_proj is None:
                raise ValueError(
                    f"{file} lacks the key 'unet.{COND_PROJ}.lora_A.weight', but its scheduler has guidance_range ="
                    f" {list(scheduler.config.guidance_range)}; it is incomplete."
                )
        return {name: set(part) for name, part in parts.items()}

    def _in_peft_format(self, name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """As diffusers converts the formats that it knows before it attaches them."""
        if any(".lokr_" in key for key in state_dict):
            return state_dict
        if name == "unet":
            is_peft = "lora_A" in next(iter(state_dict))
            return state_dict if is_peft else convert_unet_state_dict_to_peft(state_dict)
        state_dict = convert_state_dict_to_peft(convert_state_dict_to_diffusers(state_dict))
        if hasattr(getattr(self, name), "text_model"):
            return state_dict
        return {key.removeprefix("text_model."): tensor for key, tensor in state_dict.items()}

    def _lora_fault(
        self, name: str, key: str, state_dict: dict[str, torch.Tensor], modules: dict[str, torch.nn.Module]
    ) -> str | None:
        """What is wrong with one tensor of a LoRA, as the end of a sentence; `None` if nothing is."""
        match = LORA_KEY.fullmatch(key)
        if match is None:
            return "which is no LoRA weight; it is of another format or damaged"
        path, kind = match.groups()
        if name == "unet" and path == COND_PROJ and path not in modules:
            # made when the LoRA is loaded, of the size that it has, see `_add_guidance_projection`
            dim = state_dict[key].shape[-1]
            shape = (modules["time_embedding.linear_1"].in_features, dim)
        else:
            module = modules.get(path)
            weight = getattr(getattr(module, "base_layer", module), "weight", None)
            if weight is None:
                return f"but the {name} has no such module; it was made for another network"
            shape = tuple(weight.shape)
        if kind not in ("lora_A.weight", "lora_B.weight"):
            return None
        is_down = kind == "lora_A.weight"
        other = f"{path}.{'lora_B' if is_down else 'lora_A'}.weight"
        if other not in state_dict:
            return f"but not its counterpart {f'{name}.{other}'!r}; it is incomplete"
        rank = state_dict[f"{path}.lora_A.weight"].shape[0]
        fitting = (rank, *shape[1:]) if is_down else (shape[0], rank, *[1] * (len(shape) - 2))
        if tuple(state_dict[key].shape) != fitting:
            return (
                f"whose shape is {tuple(state_dict[key].shape)} where {fitting} fits; it was made for another network"
            )
        return None

    def _missing_lora_module(self, name: str, state_dict: dict[str, torch.Tensor], metadata: dict) -> str | None:
        """A module that a LoRA was trained on by its metadata, which is its configuration, but has no key for."""
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        fields = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
        config = LoraConfig(**{field: metadata.get(f"{name}.{field}") for field in fields})
        if config.target_modules is None:
            return None
        present = {LORA_KEY.fullmatch(key).group(1) for key in state_dict}
        for path, module in getattr(self, name).named_modules():
            is_layer = hasattr(getattr(module, "base_layer", module), "weight") and not re.search(
                r"\.(base_layer|lora_\w+)(\.|$)", path
            )
            if is_layer and check_target_module_exists(config, path) and path not in present:
                return path
        return None

    def _check_attached(self, file: str, keys: dict[str, set[str]], adapter_name: str):
        """Sees that every A and B of a LoRA has become a parameter: diffusers logs what it could not attach."""
        for name, part in keys.items():
            parameters = {parameter for parameter, _ in getattr(self, name).named_parameters()}
            for key in part:
                path, kind = LORA_KEY.fullmatch(key).groups()
                if kind in ("lora_A.weight", "lora_B.weight"):
                    attached = f"{path}.{kind.removesuffix('.weight')}.{adapter_name}.weight"
                    if attached not in parameters:
                        raise ValueError(f"{file} has the key {f'{name}.{key}'!r}, which could not be attached.")

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs):
        """
        Saves as every pipeline does, and this file beside it as `pipeline.py`, so that
        `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` needs nothing that is not in the folder.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if it is absent.
            *args, **kwargs: as for every pipeline.

        Raises:
            ValueError: if the UNet has a LoRA attached, which would be saved under names that nothing reads.
        """
        adapters = self.get_list_adapters().get("unet")
        if adapters:
            raise ValueError(
                f"the UNet has the LoRA {', '.join(adapters)} attached, and no pipeline can load it saved like that;"
                " call fuse_lora and then unload_lora_weights to save the sum, or save_lora_weights for the LoRA."
            )
        if self._is_of_this_file:
            os.makedirs(save_directory, exist_ok=True)
            (Path(save_directory) / "pipeline.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def to_json_string(self) -> str:
        """The content of `model_index.json`, which names the class and the file `pipeline.py` that holds it."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # where this one was loaded from says nothing about where it is saved
        for name in self._optional_components:
            if getattr(self, name) is None:
                index.pop(name, None)  # every component that is named has a folder
        if self._is_of_this_file:
            index["_class_name"] = ["pipeline", type(self).__name__]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    @property
    def _is_of_this_file(self) -> bool:
        """False for a subclass from elsewhere, which is saved like any other pipeline, by its name."""
        return type(self).__module__ == __name__
