"""Trains a class-conditional teacher of scikit-learn's 8 × 8 digits, as small as the built-in EDM one: a DDPM, or a
score network.

    python benchmarks/train_discrete_teacher.py --prediction_type epsilon --output_dir digits-epsilon

3,000 steps, about seven minutes on 2 CPU cores. A DDPM has linear betas (T = 157) and data in [−1, 1]; with
`--prediction_type score` it is an NCSN++ in small (T = 50) with data in [0, 1], as those of the score SDE.
"""

import argparse
import math

import torch
from diffusers import DDPMPipeline, DDPMScheduler, ScoreSdeVePipeline, ScoreSdeVeScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from pid_diffusers import Denoiser, PIDScheduler
from pid_diffusers.denoisers import heun
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, load_digits


def discrete_loss(unet, scheduler, x, labels):
    """The mean squared error of what a DDPM predicts, at steps that are drawn uniformly."""
    noise, k = torch.randn_like(x), torch.randint(scheduler.config.num_train_timesteps, (len(x),))
    targets = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, k), "sample": x}
    output = unet(scheduler.add_noise(x, noise, k), k, class_labels=labels).sample
    return (output - targets[scheduler.config.prediction_type]).square().mean()


def score_loss(unet, scheduler, x, labels):
    """Denoising score matching, weighted by σ², with ln(σ) drawn uniformly and x mapped to [0, 1]."""
    low, high = math.log(scheduler.config.sigma_min), math.log(scheduler.config.sigma_max)
    noise, sigma = torch.randn_like(x), (low + (high - low) * torch.rand(len(x))).exp()
    levels = sigma[:, None, None, None]
    score = unet((x + 1) / 2 + levels * noise, sigma, class_labels=labels).sample
    return (levels * score + noise).square().mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "sample", "score"], default="epsilon")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    is_score = args.prediction_type == "score"
    torch.manual_seed(args.seed)
    images, labels = (tensor[:-NUM_HELD_OUT] for tensor in load_digits())
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
        **({"time_embedding_type": "fourier", "freq_shift": 0} if is_score else {}),
    )
    scheduler = DDPMScheduler(prediction_type=args.prediction_type)
    if is_score:
        scheduler = ScoreSdeVeScheduler(sigma_min=0.01, sigma_max=50.0)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.max_train_steps)
    ema = EMAModel(unet.parameters(), decay=0.995, foreach=True)
    for _ in (progress := tqdm(range(args.max_train_steps))):
        batch = torch.randint(len(images), (128,))
        loss = (score_loss if is_score else discrete_loss)(unet, scheduler, images[batch], labels[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    ema.copy_to(unet.parameters())
    unet.eval().register_to_config(dropout=0.0)
    (ScoreSdeVePipeline if is_score else DDPMPipeline)(unet, scheduler).save_pretrained(args.output_dir)

    teacher = Denoiser.from_pretrained(args.output_dir)
    levels = PIDScheduler(**teacher.trajectory_config)
    z, asked = levels.config.sigma_max * torch.randn(500, 1, 8, 8), torch.arange(500) % 10
    with torch.no_grad():
        samples = teacher.decode(heun(teacher, z, levels.grid(41), class_labels=asked)[-1])
    print(f"digits read as asked: {100 * DigitClassifier().accuracy(samples, asked):.1f} %")


if __name__ == "__main__":
    main()
