"""Makes the cards of the models that come with pid_diffusers, in model_cards/ of a clone of the repository.

    python examples/make_shipped_cards.py teacher
    python examples/make_shipped_cards.py student pid-digits
    python examples/make_shipped_cards.py words-teacher

The first measures the built-in teacher anew. The second takes the figures and pictures of a finished run, the third
those that come with the text-to-image teacher.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from train_digits_teacher import ALWAYS, write_report

from pid_diffusers import Denoiser
from pid_diffusers.denoisers.base import BUILT_IN
from pid_diffusers.hub.card import render_card

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("samples.png", "trajectory.png", "results.json", "config.yaml")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["teacher", "student", "words-teacher"])
    parser.add_argument("run", nargs="?", type=Path, help="the output folder of the student's run")
    args = parser.parse_args()
    if args.which == "student" and args.run is None:
        parser.error("run is missing; pass the output folder of the student's run.")

    name = args.which if args.which == "words-teacher" else f"digits-{args.which}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        if args.which == "student":
            shutil.copytree(args.run, folder, ignore=shutil.ignore_patterns("checkpoint-*", "logs", "validation"))
        elif args.which == "words-teacher":
            shutil.copytree(BUILT_IN["words"], folder)
        else:
            shutil.copytree(BUILT_IN["digits"], folder)
            settings = {"output_dir": name, "max_train_steps": 3000, "train_batch_size": 128, "learning_rate": 1e-3}
            # the time and the machine as they were noted when it was trained
            compute = {
                "seconds": 420.0,
                "hardware": {"device": "cpu", "num_processes": 1, "num_threads": 2},
                "cpu_core_hours": 0.2333,
            }
            teacher = Denoiser.from_pretrained("digits").eval()
            write_report(teacher, folder, {**settings, "seed": 0, **ALWAYS}, compute)
        card = render_card(folder, f"pid_diffusers/assets/{name}")
        target = ROOT / "model_cards" / name
        target.mkdir(parents=True, exist_ok=True)
        for kept in KEPT:
            if (folder / kept).exists():
                shutil.copy(folder / kept, target / kept)
        (target / "README.md").write_text(card, encoding="utf-8")
    print(f"Wrote {target}.")


if __name__ == "__main__":
    main()
