"""Distils a diffusion model to one step: accelerate launch train_pid.py [--preset NAME] [--teacher PIPELINE] …"""

import logging
import os
import sys

# OpenMP reads it when torch is imported. By default waiting threads spin, and beside another busy process on the same
# cores a step takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from pid_diffusers import InputError
from pid_diffusers.converters import open_teacher
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.hub.publish import Publisher
from pid_diffusers.training import Trainer, TrainingConfig, TrainingResult, TrainingStopped, parse_config
from pid_diffusers.training.launch import adapt_to_launcher, hide_loading_bars


def main() -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    hide_loading_bars()
    try:
        config = parse_config()
        publisher = Publisher(config)
        adapt_to_launcher()
        with open_teacher(config.teacher) as (teacher, found):
            return run(config, publisher, teacher, found)
    except (InputError, TrainingStopped) as error:
        print(f"train_pid.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def run(config: TrainingConfig, publisher: Publisher, teacher: str, found: str | None) -> int:
    trainer = Trainer(config, teacher)
    report = RunReport(config, teacher, trainer.teacher)
    if trainer.accelerator.is_main_process:
        if found:
            print(found, flush=True)
        publisher.announce()

    def on_checkpoint(result: TrainingResult):
        report.checkpoint(result)
        publisher.checkpoint(result.steps)

    every_checkpoint = config.push_to_hub and config.hub_strategy == "every_checkpoint"
    result = trainer.train(report.validate, on_checkpoint if every_checkpoint else None)
    if result.interrupted_by is not None:
        return 128 + result.interrupted_by
    if result.is_main_process:
        print("Measuring and drawing: the teacher takes many steps an image, the student one …", flush=True)
        try:
            print(report.finish(result), flush=True)
        except OSError as error:
            raise TrainingStopped(f"the pipeline is saved in {config.output_dir}, its report not: {error}.") from error
        if config.push_to_hub:
            print(publisher.finish())
    return 0


if __name__ == "__main__":
    sys.exit(main())
