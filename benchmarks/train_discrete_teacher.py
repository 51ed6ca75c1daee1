"""Trains a class-conditional DDPM of scikit-learn's 8 × 8 digits: a discrete teacher as small as the built-in EDM one.

    python benchmarks/train_discrete_teacher.py --prediction_type epsilon --output_dir digits-epsilon

Linear betas (T = 157), 3,000 steps, about seven minutes on 2 CPU cores.
"""

import argparse

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from pid_diffusers import VPDenoiser
from pid_diffusers.denoisers import heun
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, load_digits


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prediction_type", choices=["epsilon", "v_prediction", "sample"], default="epsilon")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
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
    )
    scheduler = DDPMScheduler(prediction_type=args.prediction_type)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=100, num_training_steps=args.max_train_steps)
    ema = EMAModel(unet.parameters(), decay=0.995, foreach=True)
    for _ in (progress := tqdm(range(args.max_train_steps))):
        batch = torch.randint(len(images), (128,))
        x, noise, k = images[batch], torch.randn(128, 1, 8, 8), torch.randint(1000, (128,))
        targets = {"epsilon": noise, "v_prediction": scheduler.get_velocity(x, noise, k), "sample": x}
        output = unet(scheduler.add_noise(x, noise, k), k, class_labels=labels[batch]).sample
        loss = (output - targets[args.prediction_type]).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    ema.copy_to(unet.parameters())
    unet.eval().register_to_config(dropout=0.0)
    DDPMPipeline(unet, scheduler).save_pretrained(args.output_dir)

    teacher = VPDenoiser(unet, scheduler)
    z = teacher.noise_levels.config.sigma_max * torch.randn(500, 1, 8, 8)
    asked = torch.arange(500) % 10
    with torch.no_grad():
        samples = heun(teacher, z, teacher.noise_levels.grid(41), class_labels=asked)[-1]
    print(f"digits read as asked: {100 * DigitClassifier().accuracy(samples, asked):.1f} %")


if __name__ == "__main__":
    main()
