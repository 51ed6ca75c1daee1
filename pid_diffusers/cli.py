"""The command `pid-diffusers`: each of its verbs is a thin call of the library."""

import argparse
import logging
import sys

from . import InputError, __version__


def main(args: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
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


if __name__ == "__main__":
    sys.exit(main())
