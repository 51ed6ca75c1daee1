"""Draws students of one text-to-image teacher beside it, all from the same seeds and prompts.

accelerate launch train_pid.py --teacher words
accelerate launch train_pid.py --teacher words --use_lora
python examples/compare_students.py pid-words pid-words-lora --output docs/words.png
"""

import argparse
from pathlib import Path

from diffusers import DiffusionPipeline

from pid_diffusers import TrajectoryModel
from pid_diffusers.evaluation.figures import save_rows
from pid_diffusers.evaluation.report import HEUN_STEPS
from pid_diffusers.evaluation.same_seed import same_seed_samples
from pid_diffusers.training import parse_config
from pid_diffusers.training.build import create_teacher


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_pid.py, of the same teacher")
    parser.add_argument("--output", type=Path, required=True, help="the picture, .png or .svg")
    parser.add_argument("--num_images", type=int, default=10)
    args = parser.parse_args()
    rows = {}
    for run in args.runs:
        config = parse_config(["--preset", str(run / "config.yaml")])
        teacher = create_teacher(config).eval()
        pipe = DiffusionPipeline.from_pretrained(run)
        samples = same_seed_samples(TrajectoryModel(pipe.unet, pipe.scheduler), teacher, args.num_images)
        rows.setdefault(f"teacher, {2 * HEUN_STEPS} calls", teacher.decode(samples.teacher))
        name = f"LoRA of rank {config.lora_rank}" if config.use_lora else "whole student"
        rows[f"{name}, 1 call"] = teacher.decode(samples.student)
    prompts = [teacher.shown_prompt(i).replace(" ", "\n", 2) for i in range(args.num_images)]
    save_rows(args.output, rows, "the same seeds and prompts, which training never saw", prompts)


if __name__ == "__main__":
    main()
