"""The command `pid-diffusers`: each of its verbs is a thin call of the library."""

import argparse
import dataclasses
import logging
import sys

from . import InputError, __version__
from .evaluation.config import METRICS, EvaluationConfig
from .training.launch import adapt_to_launcher, hide_loading_bars


def main(args: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    hide_loading_bars()
    parser = argparse.ArgumentParser(
        "pid-diffusers", description="Share and try students of Physics Informed Distillation."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    verb = verbs.add_parser("push", help="push the output folder of a run, or any saved pipeline, to the Hub")
    verb.add_argument("folder", help="an output folder of train_pid.py, or any folder written by save_pretrained")
    verb.add_argument("--hub_model_id", help="user/name of the repo; default: the folder's name, in your namespace")
    verb.add_argument("--hub_private_repo", action="store_true", help="a repo that is made for it is private")
    verb.set_defaults(run=_push)

    verb = verbs.add_parser(
        "convert", help="write a checkpoint of EDM, OpenAI or PID's authors as a diffusers pipeline"
    )
    verb.add_argument(
        "source", help="an EDM .pkl, a .pt of OpenAI or PID's authors, or a folder with a bare state dict"
    )
    verb.add_argument("output", help="a folder that is absent or empty")
    verb.add_argument(
        "--student",
        action=argparse.BooleanOptionalAction,
        help="whether it is a student of PID's authors; default: if its name is that of one",
    )
    verb.add_argument("--image_size", type=int, help="of OpenAI's networks; default: as attention tells")
    verb.add_argument("--license", help="of the weights, such as mit; default: that of those released")
    verb.set_defaults(run=_convert)

    verb = verbs.add_parser("demo", help="open a page that shows a student, or write it as a Space")
    verb.add_argument("model", help="a student: a folder, a Hub id, or digits for the built-in one")
    verb.add_argument(
        "--teacher", help="to compare with: a folder, a Hub id, or digits; default: as the model's run says"
    )
    verb.add_argument("--host", default="127.0.0.1", help="0.0.0.0 to be reached from other machines")
    verb.add_argument("--port", type=int, help="default: the first free one from 7860")
    verb.add_argument("--share", action="store_true", help="a public address, by gradio's tunnel")
    verb.add_argument("--space", metavar="FOLDER", help="write a Hugging Face Space there instead of opening the page")
    verb.set_defaults(run=_demo)

    verb = verbs.add_parser("evaluate", help="measure a pipeline's samples: FID, KID, precision, recall and others")
    verb.add_argument("model", help="any pipeline: a folder, a Hub id, digits-student, or digits-teacher")
    verb.add_argument(
        "--reference",
        required=True,
        help="digits, a folder of images, a data set, EDM's or ADM's .npz, or features that --save_reference wrote",
    )
    for setting in dataclasses.fields(EvaluationConfig):
        if "help" in setting.metadata:
            kind = next((kind for kind in (int, float) if kind.__name__ in str(setting.type)), str)
            default = "" if setting.default is None else f" (default: {setting.default})"
            help_text = setting.metadata["help"] + default
            verb.add_argument(f"--{setting.name}", type=kind, default=setting.default, help=help_text)
    verb.set_defaults(run=_evaluate)

    verb = verbs.add_parser("diagnose", help="measure how near a student is to its teacher's ODE, without data")
    verb.add_argument(
        "model", metavar="RUN", help="an output folder of train_pid.py, another student, a Hub id, or digits-student"
    )
    verb.add_argument("--teacher", help="as for train_pid.py; default: as the run's config.yaml says")
    verb.add_argument("--prompts", help="of a text-to-image student; default: those the run was evaluated with")
    verb.add_argument("--num_samples", type=int, default=512, help="how many starts (default: 512)")
    verb.add_argument("--seed", type=int, help="of the starts; default: the run's own, of which training draws others")
    verb.add_argument("--batch_size", type=int, default=128, help="starts in a call of a network (default: 128)")
    verb.add_argument("--data", help="digits, or a folder with the training images, to see whether they are copied")
    verb.add_argument("--output", default="diagnostics.json", help="the file to write (default: diagnostics.json)")
    verb.set_defaults(run=_diagnose)

    verb = verbs.add_parser("figures", help="draw runs and results: samples, training curves, quality against cost")
    verb.add_argument("runs", metavar="RUN", nargs="*", help="an output folder of train_pid.py, or digits-student")
    verb.add_argument("--labels", nargs="+", help="what each run is called; default: its folder's name")
    verb.add_argument("--results", metavar="FILE", nargs="+", default=[], help="files that evaluate wrote")
    verb.add_argument("--output", default="figures", help="the folder to write to (default: figures)")
    verb.add_argument("--num_images", type=int, default=10, help="in a row of samples (default: 10)")
    verb.add_argument(
        "--only",
        metavar="NAME",
        nargs="+",
        help="samples, trajectory, training_steps, training_time, residual, quality, distance_cost; default: all",
    )
    verb.add_argument("--teacher", help="as for train_pid.py; default: as each run's config.yaml says")
    verb.add_argument("--prompts", help="of text-to-image students; default: those the run was evaluated with")
    verb.set_defaults(run=_figures)

    options = parser.parse_args(args)
    try:
        return options.run(options)
    except InputError as error:
        print(f"pid-diffusers: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pid-diffusers: interrupted", file=sys.stderr)
        return 130


def _push(options: argparse.Namespace) -> int:
    from .hub.push import PushFailed, advice, push, push_command

    try:
        address = push(options.folder, options.hub_model_id, options.hub_private_repo)
    except PushFailed as error:
        command = push_command(options.folder, options.hub_model_id, options.hub_private_repo)
        mend = advice(str(error)) or f"; try again later with {command}"
        print(f"pid-diffusers: error: {error}{mend}.", file=sys.stderr)
        return 1
    print(f"Pushed to {address}")
    return 0


def _convert(options: argparse.Namespace) -> int:
    from .converters import convert

    print(convert(options.source, options.output, options.student, options.image_size, options.license))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import launch, write_space

    if options.space is not None:
        folder = write_space(options.model, options.space, teacher=options.teacher)
        print(f"Wrote {folder}: try it with 'python app.py' there, or share it with")
        print(f"    hf upload USER/{folder.resolve().name} {folder} . --repo-type space")
        return 0
    launch(options.model, options.teacher, host=options.host, port=options.port, share=options.share)
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from accelerate import PartialState

    from .evaluation.evaluate import evaluate

    adapt_to_launcher()
    names = [setting.name for setting in dataclasses.fields(EvaluationConfig)]
    config = EvaluationConfig(**{name: getattr(options, name) for name in names})
    results = evaluate(config)
    PartialState().destroy_process_group()
    if results is None:  # the first process reports
        return 0
    for name in METRICS:
        value = results[name]
        print(f"  {name:16}", results["reasons"][name] if value is None else f"{value:.6g}")
    print(f"Saved in {config.output}")
    return 0


def _diagnose(options: argparse.Namespace) -> int:
    from .evaluation.diagnostics import check_output, diagnose, open_data, open_run, save, summarize

    check_output(options.output)
    with open_run(options.model, options.teacher, options.prompts, options.num_samples) as (student, teacher, config):
        results = diagnose(
            student,
            teacher,
            options.num_samples,
            options.batch_size,
            config.seed if options.seed is None else options.seed,
            config.scheme,
            None if options.data is None else open_data(options.data, teacher),
            lambda part: print(f"Measuring: {part} …", file=sys.stderr, flush=True),
        )
        save(results, options.output, options.model, config.teacher)
    print(f"{options.model}, distilled from {config.teacher}:")
    print(summarize(results))
    print(f"Saved in {options.output}")
    return 0


def _figures(options: argparse.Namespace) -> int:
    from .evaluation.draw import draw_figures

    draw_figures(
        options.runs,
        options.labels,
        options.results,
        options.output,
        options.num_images,
        options.only,
        options.teacher,
        options.prompts,
        lambda line: print(line, flush=True),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
