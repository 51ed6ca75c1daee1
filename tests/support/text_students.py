"""Folders of small text-to-image students, whole and as a LoRA, as a run leaves them, without the run."""

import json
from pathlib import Path

import torch
import yaml
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny_text import BETAS

from pid_diffusers import OneStepPIDTextToImagePipeline, PIDScheduler
from pid_diffusers.adapters import add_guidance_embedding, add_lora, fuse, lora_weights
from pid_diffusers.evaluation.provenance import versions
from pid_diffusers.training import TrainingConfig


def save_text_student(
    folder: Path, teacher: StableDiffusionPipeline | StableDiffusionXLPipeline, lora: bool = False, **guidance
) -> Path:
    """
    A student of `teacher`, by its files a folder of the name "teacher"; its weights are not the teacher's.

    Args:
        guidance: the scheduler's `guidance_scale` or `guidance_range`.
    """
    unet = teacher.unet
    if "guidance_range" in guidance:
        add_guidance_embedding(unet)
    add_lora(unet, rank=2, alpha=4.0)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    weights, metadata = lora_weights(unet)
    fuse(unet)
    if lora:
        OneStepPIDTextToImagePipeline.save_lora_weights(
            folder, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata
        )
    levels = {"sigma_min": 0.029, "sigma_max": 14.6, "sigma_data": 1.0}
    scheduler = PIDScheduler(prediction_type="residual", timestep_type="discrete", **levels, **BETAS, **guidance)
    names = (
        "vae",
        "text_encoder",
        "tokenizer",
        "text_encoder_2",
        "tokenizer_2",
        "safety_checker",
        "feature_extractor",
    )
    parts = {name: teacher.components.get(name) for name in names}
    OneStepPIDTextToImagePipeline(unet=unet, scheduler=scheduler, **parts).save_pretrained(folder)
    config = TrainingConfig(teacher="teacher", prompts="prompts.txt", use_lora=lora, max_train_steps=3, **guidance)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.to_public_dict(), sort_keys=False))
    write_results(folder)
    return folder


def write_results(folder: Path, **changes):
    """A `results.json` with the least that a run writes before its end."""
    results = {"steps": 3, "num_prompts": 2, "shown_prompts": ["a red fox", "a dog"]}
    results |= {"teacher": {"name": "teacher", "source": "folder"}, "versions": versions()}
    (folder / "results.json").write_text(json.dumps({**results, **changes}))
