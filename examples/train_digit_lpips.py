"""Trains the network whose features `--distance lpips --lpips_network digits` compares, a small classifier of
scikit-learn's digits, and writes its weights: under a minute on one CPU core.

    python examples/train_digit_lpips.py --output pid_diffusers/losses/digit_lpips.safetensors

Another machine or version of torch trains other weights of the same quality; the file in the package keeps runs
comparable.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pid_diffusers.evaluation.digits import NUM_HELD_OUT, load_digits
from pid_diffusers.losses.distances import digit_layers

EPOCHS = 60
BATCH_SIZE = 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load_digits()
    real, real_labels = images[:-NUM_HELD_OUT], labels[:-NUM_HELD_OUT]
    layers = digit_layers()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.LazyLinear(10))
    model(real[:2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for some in torch.randperm(len(real)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(real[some]), real_labels[some])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    model.eval()
    read = (model(images[-NUM_HELD_OUT:]).argmax(dim=1) == labels[-NUM_HELD_OUT:]).float().mean().item()
    save_file({name: value.contiguous() for name, value in layers.state_dict().items()}, args.output)
    print(f"Reads {100 * read:.1f} % of the held-out digits. Saved in {args.output}")


if __name__ == "__main__":
    main()
