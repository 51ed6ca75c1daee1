"""Small random text-to-image pipelines of the real classes; the same arguments give the same weights."""

import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tiny_latent import create, tiny_vae
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MAX_LENGTH = 12


def tiny_tokenizer(max_length: int = MAX_LENGTH) -> CLIPTokenizer:
    """Reads letter by letter; a text of more than `max_length` − 2 letters is too long."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (Path(folder) / "merges.txt").write_text("#version: 0.2\n")
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps({"model_max_length": max_length}))
        return CLIPTokenizer.from_pretrained(folder)


def tiny_text_encoder(cls=CLIPTextModel, width: int = 16, **config):
    tokenizer = tiny_tokenizer()
    settings = {"vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": MAX_LENGTH}
    settings |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    settings |= {"pad_token_id": tokenizer.pad_token_id, "projection_dim": width}
    with torch.random.fork_rng():
        torch.manual_seed(width)
        return cls(CLIPTextConfig(**{**settings, **config})).eval()


def tiny_conditional_unet(**config) -> UNet2DConditionModel:
    """4 × 8 × 8 latents, two levels, cross attention in both."""
    settings = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1}
    settings |= {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
    settings |= {"cross_attention_dim": 16, "transformer_layers_per_block": 1}
    settings |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    settings |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    return create(UNet2DConditionModel, **{**settings, **config})


def tiny_sd(prediction_type: str = "epsilon", **unet) -> StableDiffusionPipeline:
    """Stable Diffusion 1.x (epsilon, PNDM) or 2.x (v_prediction, DDIM): images of 3 × 16 × 16."""
    cls = PNDMScheduler if prediction_type == "epsilon" else DDIMScheduler
    more = {"skip_prk_steps": True} if cls is PNDMScheduler else {"clip_sample": False}
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_conditional_unet(**unet),
        scheduler=cls(prediction_type=prediction_type, set_alpha_to_one=False, steps_offset=1, **BETAS, **more),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl() -> StableDiffusionXLPipeline:
    """Two text encoders, pooled embeddings and time ids: images of 3 × 16 × 16."""
    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(),
        text_encoder_2=tiny_text_encoder(CLIPTextModelWithProjection, width=24),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_conditional_unet(
            cross_attention_dim=16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + 6 * 4,
            use_linear_projection=True,
        ),
        scheduler=EulerDiscreteScheduler(steps_offset=1, timestep_spacing="leading", **BETAS),
    )
