"""Distils a diffusion model to one step: accelerate launch train_pid.py [--preset NAME] [--teacher PIPELINE] …"""

import logging
import os
import sys

# OpenMP reads it when torch is imported. By default waiting threads spin, and beside another busy process on the same
# cores a step takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from diffusers.utils.logging import disable_progress_bar

from pid_diffusers import InputError
from pid_diffusers.evaluation.report import RunReport
from pid_diffusers.training import Trainer, TrainingStopped, parse_config
from pid_diffusers.training.launch import adapt_to_launcher


def main() -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    disable_progress_bar()  # diffusers' own, for loading; training has one
    try:
        config = parse_config()
        adapt_to_launcher()
        trainer = Trainer(config)
        report = RunReport(config)
        result = trainer.train(validate=report.validate)
        if result.interrupted_by is not None:
            return 128 + result.interrupted_by
        if result.is_main_process:
            print("Measuring and drawing: the teacher takes many steps an image, the student one …", flush=True)
            try:
                print(report.finish(result))
            except OSError as error:
                raise TrainingStopped(
                    f"the pipeline is saved in {config.output_dir}, its report not: {error}."
                ) from error
    except (InputError, TrainingStopped) as error:
        print(f"train_pid.py: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
