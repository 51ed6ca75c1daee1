"""Which head and weighting suit which teacher: distils small teachers of the digits, and prints a table.

    python benchmarks/train_discrete_teacher.py --prediction_type epsilon --output_dir teachers/epsilon
    python benchmarks/train_discrete_teacher.py --prediction_type v_prediction --output_dir teachers/v_prediction
    python benchmarks/train_discrete_teacher.py --prediction_type sample --output_dir teachers/sample
    python benchmarks/train_discrete_teacher.py --prediction_type score --output_dir teachers/score
    python benchmarks/heads.py --teachers teachers --output_dir heads

The settings are those of the preset `digits`. A run takes two to three minutes on 2 CPU cores; what is there already
is not run again. `--only score` runs and prints those of one teacher.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

TRAIN = Path(__file__).parent.parent / "train_pid.py"
# teacher, whether its scheduler clamps D to [−1, 1] (None: it has no such setting), head, weighting
RUNS = [
    ("digits", None, "edm", "uniform"),
    ("digits", None, "edm", "inverse_variance"),
    ("digits", None, "sample", "uniform"),
    ("epsilon", False, "residual", "inverse_variance"),
    ("epsilon", False, "residual", "uniform"),
    ("epsilon", True, "residual", "inverse_variance"),
    ("epsilon", True, "residual", "uniform"),
    ("epsilon", False, "sample", "inverse_variance"),
    ("epsilon", True, "sample", "inverse_variance"),
    ("epsilon", True, "sample", "uniform"),
    ("epsilon", True, "epsilon", "inverse_variance"),
    ("epsilon", False, "epsilon", "inverse_variance"),
    ("v_prediction", True, "v_prediction", "uniform"),
    ("v_prediction", True, "v_prediction", "inverse_variance"),
    ("v_prediction", False, "v_prediction", "uniform"),
    ("v_prediction", True, "sample", "uniform"),
    ("sample", True, "sample", "uniform"),
    ("score", None, "score", "inverse_variance"),
    ("score", None, "score", "uniform"),
]


def with_clipping(teacher: Path, clip: bool, folder: Path) -> Path:
    """A copy of a teacher whose scheduler clamps D, or does not."""
    copy = folder / f"{teacher.name}-{'clamped' if clip else 'free'}"
    shutil.copytree(teacher, copy, dirs_exist_ok=True)
    path = copy / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clip_sample": clip}, indent=2) + "\n")
    return copy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", choices=sorted({run[0] for run in RUNS}))
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    print("| teacher | D clamped | head | weighting | distance | read as asked: student, teacher |")
    print("|---|---|---|---|---|---|")
    for teacher, clip, head, weighting in RUNS:
        if args.only not in (None, teacher):
            continue
        source = teacher if teacher == "digits" else str(args.teachers / teacher)
        if clip is not None:
            source = str(with_clipping(args.teachers / teacher, clip, args.output_dir))
        clamped = {None: "", True: "-clamped", False: "-free"}[clip]
        folder = args.output_dir / f"{teacher}{clamped}-{head}-{weighting}"
        if not (folder / "results.json").exists():
            command = [sys.executable, TRAIN, "--teacher", source, "--prediction_type", head, "--weighting", weighting]
            command += ["--output_dir", folder, "--report_to", "none", "--validation_steps", "0"]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
        results = json.loads((folder / "results.json").read_text())
        student, theirs = (100 * results[f"{who}_digits_read_as_asked"] for who in ("student", "teacher"))
        distance = results["rms_distance_to_40_step_heun"]
        yes = {None: "–", True: "yes", False: "no"}[clip]
        print(
            f"| {teacher} | {yes} | {head} | {weighting} | {distance:.3f} | {student:.1f} %, {theirs:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
