"""Trains the teacher that comes with pid_diffusers: a class-conditional EDM on scikit-learn's 8 × 8 digits.

    python examples/train_digits_teacher.py --output_dir digits-teacher

takes about seven minutes on 2 CPU cores and writes a diffusers pipeline of 2.8 MB with its figures and model card.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import yaml
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from pid_diffusers import EDMDenoiser, PIDScheduler
from pid_diffusers.denoisers import heun
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, DigitClassifier, load_digits
from pid_diffusers.evaluation.figures import save_rows
from pid_diffusers.evaluation.provenance import describe_compute, versions
from pid_diffusers.hub.card import write_card

ALWAYS = {"lr_warmup_steps": 100, "max_grad_norm": 1.0, "dropout": 0.1, "ema_decay": 0.995}
NUM_NOISE_DRAWS = 16
NUM_SAMPLES = 1000
SAMPLE_SEED = 1
HEUN_STEPS = 35


def edm_loss(denoiser, images, class_labels, generator):
    """EDM's training loss (Karras et al. 2022, eq. 2) with its noise distribution, ln σ ~ N(−1.2, 1.2²)."""
    sigma = (torch.randn(len(images), generator=generator) * 1.2 - 1.2).exp()
    weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
    noise = torch.randn(images.shape, generator=generator) * sigma.view(-1, 1, 1, 1)
    error = denoiser(images + noise, sigma, class_labels=class_labels) - images
    return (weight * error.square().mean(dim=(1, 2, 3))).mean()


@torch.no_grad()
def write_report(denoiser: EDMDenoiser, folder: Path, settings: dict, compute: dict):
    """Measures a teacher of the digits, draws `samples.png`, and writes `config.yaml`, `results.json` and the card.

    Args:
        denoiser (`EDMDenoiser`): the teacher, whose pipeline is in the folder.
        folder (`Path`): where all goes.
        settings (`dict`): those it was trained with.
        compute (`dict`): seconds, hardware and hours of the training.
    """
    images, labels = load_digits()
    real, real_labels = images[-NUM_HELD_OUT:], labels[-NUM_HELD_OUT:]
    losses = [
        edm_loss(denoiser, real, real_labels, torch.Generator().manual_seed(seed)).item()
        for seed in range(NUM_NOISE_DRAWS)
    ]
    z = 80 * torch.randn(NUM_SAMPLES, 1, 8, 8, generator=torch.Generator().manual_seed(SAMPLE_SEED))
    asked = torch.arange(NUM_SAMPLES) % 10
    samples = heun(denoiser, z, PIDScheduler().grid(HEUN_STEPS + 1), class_labels=asked)[-1]
    classifier = DigitClassifier()

    first_real = [int((real_labels == digit).nonzero()[0]) for digit in range(10)]
    rows = {"real, held out": real[first_real], f"model, {2 * HEUN_STEPS} calls": samples[:10]}
    save_rows(folder / "samples.png", rows, "the first of each class")
    flags = {name: value for name, value in settings.items() if name not in ALWAYS}
    flags = " ".join(f"--{name} {value}" for name, value in flags.items())
    results = {
        "steps": settings["max_train_steps"],
        **compute,
        "num_parameters": sum(parameter.numel() for parameter in denoiser.unet.parameters()),
        "held_out_edm_loss": round(math.fsum(losses) / len(losses), 4),
        "held_out_noise_draws": NUM_NOISE_DRAWS,
        "num_eval_samples": NUM_SAMPLES,
        "seed": SAMPLE_SEED,
        "heun_steps": HEUN_STEPS,
        "digits_read_as_asked": classifier.accuracy(samples, asked),
        "held_out_real_digits_read": classifier.accuracy(real, real_labels),
        "license": "apache-2.0",
        "data": f"{len(images) - NUM_HELD_OUT:,} of the {len(images):,} images of scikit-learn's `load_digits` (the"
        " test part of UCI's *Optical Recognition of Handwritten Digits*), scaled to [−1, 1];"
        f" {NUM_HELD_OUT} are held out.",
        "limits": "Digits of 8 × 8 pixels by 13 writers, and nothing else.",
        "command": f"python examples/train_digits_teacher.py \\\n    {flags}",
        "versions": versions(),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    write_card(folder)


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
    train = images[:-NUM_HELD_OUT]
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
        dropout=ALWAYS["dropout"],
    )
    denoiser = EDMDenoiser(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.learning_rate)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=ALWAYS["lr_warmup_steps"], num_training_steps=args.max_train_steps
    )
    ema = EMAModel(unet.parameters(), decay=ALWAYS["ema_decay"], foreach=True)

    start = time.time()
    for _ in (progress := tqdm(range(args.max_train_steps))):
        batch = torch.randint(len(train), (args.train_batch_size,), generator=generator)
        loss = edm_loss(denoiser, train[batch], labels[batch], generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), ALWAYS["max_grad_norm"])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        progress.set_postfix(loss=f"{loss.item():.3f}")
    seconds = round(time.time() - start, 1)

    ema.copy_to(unet.parameters())
    unet.eval()
    unet.register_to_config(dropout=0.0)  # there is nothing to regularise after training
    pipeline = ConsistencyModelPipeline(unet, EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5))
    pipeline.save_pretrained(args.output_dir)
    folder = Path(args.output_dir)
    settings = {**vars(args), **ALWAYS, "output_dir": folder.resolve().name}
    compute = {"seconds": seconds, **describe_compute(torch.device("cpu"), 1, seconds)}
    write_report(denoiser, folder, settings, compute)
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    for name in ("seconds", "held_out_edm_loss", "digits_read_as_asked", "held_out_real_digits_read"):
        print(f"{name}: {results[name]}")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Saved to {folder} ({size / 1e6:.1f} MB), with samples.png, results.json and README.md.")


if __name__ == "__main__":
    main()
