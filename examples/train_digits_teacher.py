"""Trains the teacher that comes with pid_diffusers: a class-conditional EDM on scikit-learn's 8 × 8 digits.

    python examples/train_digits_teacher.py --output_dir digits-teacher

takes about seven minutes on 2 CPU cores and writes a diffusers pipeline of 2.8 MB.
"""

import argparse
import json
import math
import os
import time

import torch
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from pid_diffusers import EDMDenoiser, PIDScheduler
from pid_diffusers.denoisers import heun
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, load_digits


def edm_loss(denoiser, images, class_labels, generator):
    """EDM's training loss (Karras et al. 2022, eq. 2) with its noise distribution, ln σ ~ N(−1.2, 1.2²)."""
    sigma = (torch.randn(len(images), generator=generator) * 1.2 - 1.2).exp()
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    noise = torch.randn(images.shape, generator=generator) * sigma.view(-1, 1, 1, 1)
    error = denoiser(images + noise, sigma, class_labels=class_labels) - images
    return (weight * error.square().mean(dim=(1, 2, 3))).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="digits-teacher")
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)

    images, labels = load_digits()
    train, held_out = images[:-NUM_HELD_OUT], images[-NUM_HELD_OUT:]
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        num_class_embeds=10,
        dropout=0.1,
    )
    denoiser = EDMDenoiser(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.max_train_steps)
    ema = EMAModel(unet.parameters(), decay=0.995, foreach=True)

    start = time.time()
    for _ in (progress := tqdm(range(args.max_train_steps))):
        batch = torch.randint(len(train), (args.train_batch_size,), generator=generator)
        loss = edm_loss(denoiser, train[batch], labels[batch], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    minutes = (time.time() - start) / 60

    ema.copy_to(unet.parameters())
    unet.eval()
    with torch.no_grad():
        losses = [
            edm_loss(denoiser, held_out, labels[-NUM_HELD_OUT:], torch.Generator().manual_seed(s)).item()
            for s in range(16)
        ]
        z = 80 * torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        asked = torch.arange(1000) % 10
        samples = heun(denoiser, z, PIDScheduler().grid(36), class_labels=asked)[-1]
    classifier = DigitClassifier()
    figures = {
        "minutes": round(minutes, 1),
        "held_out_edm_loss": round(math.fsum(losses) / len(losses), 4),
        "digits_read_as_asked": classifier.accuracy(samples, asked),
        "held_out_real_digits_read": classifier.accuracy(held_out, labels[-NUM_HELD_OUT:]),
    }
    print(json.dumps(figures, indent=2))

    unet.register_to_config(dropout=0.0)  # there is nothing to regularise after training
    pipeline = ConsistencyModelPipeline(unet, EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))
    pipeline.save_pretrained(args.output_dir)
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(args.output_dir) for f in files)
    print(f"Saved to {args.output_dir} ({size / 1e6:.1f} MB).")


if __name__ == "__main__":
    main()
