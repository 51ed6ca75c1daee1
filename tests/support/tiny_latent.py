"""Small random networks of the classes that latent-space pipelines have; the same arguments give the same weights."""

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, VQModel

BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


def create(cls, **config) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls(**config).eval()


def tiny_dit(**config) -> DiTTransformer2DModel:
    """Ten classes, a learned variance, 4 × 8 × 8."""
    settings = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    settings |= {"in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 10}
    return create(DiTTransformer2DModel, **{**settings, **config})


def tiny_vae(**config) -> AutoencoderKL:
    """From latents of 4 × 8 × 8 to images of 3 × 16 × 16."""
    return create(AutoencoderKL, **{**BLOCKS, "latent_channels": 4, "scaling_factor": 0.3, **config})


def tiny_vq(**config) -> VQModel:
    """From latents of 3 × 8 × 8, of which it takes the nearest of 16 codes, to images of 3 × 16 × 16."""
    settings = {**BLOCKS, "latent_channels": 3, "num_vq_embeddings": 16, "scaling_factor": 0.7}
    return create(VQModel, **{**settings, **config})
