"""Every setting of a run: one dataclass, whose fields are the flags of `train_pid.py` and the keys of a preset."""

import argparse
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from diffusers.optimization import SchedulerType
from transformers import HfArgumentParser

from ..errors import InputError
from ..losses.distances import DISTANCES, LPIPS_NETWORKS
from ..losses.pid import SCHEMES, WEIGHTINGS
from ..schedulers.scheduling_pid import PREDICTION_TYPES

PRESETS = Path(__file__).parent.parent / "presets"
OPTIMIZERS = ("radam", "adamw", "adamw_8bit")
HUB_STRATEGIES = ("end", "every_checkpoint")
# piecewise_constant needs step rules, which no flag gives
LR_SCHEDULERS = tuple(s.value for s in SchedulerType if s != SchedulerType.PIECEWISE_CONSTANT)


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """The settings of a run. Flags override the preset, which overrides these defaults."""

    preset: str = option(
        "digits",
        "a YAML file of settings, or the name of one that comes with the package; default: as suits the teacher",
    )

    # what is distilled into what
    teacher: str | None = option(
        None, "a diffusers pipeline (folder or Hub id), an EDM .pkl, an OpenAI .pt, or 'digits' for the built-in one"
    )
    student_config: str | None = option(
        None, "a UNet's config.json: a student of that shape with random weights, instead of a copy of the teacher"
    )
    output_dir: str = option("pid-model", "folder for the pipeline, pictures, figures and checkpoints")
    seed: int = option(0, "seed of the noise, the noise levels and the classes")

    # text-to-image teachers
    prompts: str | None = option(
        None, "prompts to train on: a text file, one a line, or a dataset (Hub id, or local parquet, csv or json)"
    )
    caption_column: str = option("text", "column of that dataset")
    dataset_split: str = option("train", "split of that dataset")
    max_prompts: int | None = option(None, "read so many prompts at most; default: all")
    streaming: bool = option(False, "read a dataset only as far as max_prompts")
    guidance_scale: float | None = option(None, "w of classifier-free guidance, a part of what is distilled")
    guidance_range: list[float] | None = field(
        default=None,
        metadata={"help": "lowest and highest w, instead of one: the student is told w and leaves it open"},
    )
    guidance_rescale: float = option(0.0, "φ of guidance rescaling, 0 for none")
    negative_prompt: str = option("", "what guidance leads away from")
    validation_prompts: list[str] | None = field(
        default=None, metadata={"help": "prompts of the pictures, one an image; default: the first of eval_prompts"}
    )
    eval_prompts: str | None = option(
        None, "prompts of the figures at the end of the run, as for prompts; default: those that it was trained on"
    )

    # LoRA
    use_lora: bool = option(False, "train LoRA adapters on the teacher's own weights instead of a copy of them")
    lora_rank: int = option(64, "rank of the adapters")
    lora_alpha: float | None = option(None, "adapters count by lora_alpha / lora_rank; default: lora_rank")
    lora_dropout: float = option(0.0, "dropout before the adapters")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "ends of the names of the layers that are adapted; default: all that matter"}
    )

    # the trajectory function and the loss
    num_train_timesteps: int = option(250, "N, the number of grid points")
    sigma_min: float | None = option(None, "ε, the lowest noise level; default: the teacher's")
    sigma_max: float | None = option(None, "T, the highest noise level; default: the teacher's")
    sigma_data: float | None = option(None, "standard deviation of the data; default: the teacher's")
    rho: float = option(7.0, "ρ of the grid: how strongly it is condensed at low noise")
    prediction_type: str | None = option(
        None, f"head of the student: {', '.join(PREDICTION_TYPES)}; default: the one that suits the teacher"
    )
    scheme: str = option("upwind", f"numerical derivative: {', '.join(SCHEMES)}")
    distance: str = option("l2", f"distance of the residual: {', '.join(DISTANCES)}")
    huber_c: float | None = option(None, "c of pseudo_huber; default: 0.00054 √(number of pixels × channels)")
    lpips_network: str = option(
        "vgg", "whose features lpips compares: vgg, or digits, for gray images of 8 × 8 pixels"
    )
    lpips_vgg_weights: str | None = option(None, "local copy of torchvision's vgg16-397923af.pth, for lpips")
    lpips_decoder: str | None = option(
        None, "an AutoencoderTiny (folder or Hub id) that decodes latents for lpips; default: the teacher's VAE"
    )
    lpips_batch_size: int = option(4, "images that are decoded at a time for lpips in latent space")
    weighting: str | None = option(
        None,
        f"what the loss at a noise level counts: {', '.join(WEIGHTINGS)}; default: the one that suits the teacher",
    )
    split_batch: bool = option(False, "one student call a time instead of one of doubled batch: slower, less memory")

    # optimisation
    train_batch_size: int = option(64, "starts z per process and micro-step")
    gradient_accumulation_steps: int = option(1, "micro-steps per optimizer step")
    max_train_steps: int = option(100000, "optimizer steps")
    optimizer: str = option("radam", f"one of {', '.join(OPTIMIZERS)}")
    learning_rate: float = option(2e-4, "highest learning rate")
    lr_scheduler: str = option("constant", f"one of {', '.join(LR_SCHEDULERS)}")
    lr_warmup_steps: int = option(0, "optimizer steps over which the learning rate rises")
    adam_beta1: float = option(0.9, "decay of the first moment")
    adam_beta2: float = option(0.999, "decay of the second moment")
    adam_weight_decay: float = option(0.0, "weight decay")
    adam_epsilon: float = option(1e-8, "ε of the optimizer")
    max_grad_norm: float | None = option(None, "clip the gradient to this norm; default: no clipping")
    ema_decays: list[float] = field(
        default_factory=lambda: [0.999, 0.9999, 0.99995],
        metadata={"help": "decays of the moving averages of the weights that are kept"},
    )
    save_ema_decay: float | None = option(None, "the decay whose average is saved and validated; default: the last")
    max_skipped_steps: int = option(50, "stop after so many non-finite steps in a row")

    # how it is computed
    mixed_precision: str | None = option(None, "no, fp16 or bf16; default: what `accelerate launch` was told")
    gradient_checkpointing: bool = option(False, "trade time for memory")
    torch_compile: bool = option(False, "compile teacher and student with torch.compile")
    allow_tf32: bool = option(False, "TensorFloat-32 matrix products on Ampere GPUs and later")
    deterministic: bool = option(True, "deterministic kernels, which bit-exact resuming on a GPU needs")

    # what is written, and when
    report_to: str = option("tensorboard", "a tracker that accelerate offers, all, or none")
    logging_dir: str = option("logs", "folder of the trackers, inside output_dir")
    logging_steps: int = option(10, "steps between lines of metrics.jsonl")
    checkpointing_steps: int = option(500, "steps between checkpoints")
    checkpoints_total_limit: int | None = option(None, "how many checkpoints to keep; default: all")
    resume_from_checkpoint: str | None = option(None, "'latest', or the folder of a checkpoint")
    validation_steps: int = option(1000, "steps between validation pictures; 0 for none")
    num_validation_images: int = option(10, "images in each picture")
    num_validation_samples: int | None = option(
        None, "seeds of the figures that a validation logs; default: those of its picture"
    )
    validation_class_labels: list[int] | None = field(
        default=None, metadata={"help": "classes in the pictures, one an image; default: 0, 1, 2, …"}
    )
    num_eval_samples: int = option(512, "seeds for the figures at the end of the run; 0 for none")
    eval_classifier: str | None = option(
        None, "reads whether images show the class asked for: digits (for 8 × 8 digits); default: not measured"
    )
    eval_batch_size: int = option(128, "images per call for pictures and figures")

    # the Hub
    push_to_hub: bool = option(False, "push the pipeline, its card, pictures and figures to the Hub")
    hub_model_id: str | None = option(None, "user/name of the repo; default: output_dir's name, in your namespace")
    hub_private_repo: bool = option(False, "a repo that is made for it is private")
    hub_strategy: str = option("end", f"when to push: {', '.join(HUB_STRATEGIES)}")

    def validate(self) -> "TrainingConfig":
        """
        Checks what can be known without the teacher.

        Raises:
            InputError: naming the setting, its value and the fix.
        """

        def require(ok: bool, name: str, fix: str):
            if not ok:
                raise InputError(f"{name} is {getattr(self, name)!r}; {fix}.")

        def choice(name: str, choices: typing.Iterable[str]):
            require(getattr(self, name) in choices, name, f"choose one of {', '.join(choices)}")

        require(self.teacher is not None, "teacher", "pass --teacher with a folder, a Hub id, or digits")
        choice("scheme", SCHEMES)
        choice("distance", tuple(DISTANCES))
        choice("optimizer", OPTIMIZERS)
        choice("lr_scheduler", LR_SCHEDULERS)
        choice("hub_strategy", HUB_STRATEGIES)
        for name in ("hub_model_id", "hub_private_repo"):
            require(self.push_to_hub or not getattr(self, name), name, "it needs --push_to_hub, too")
        require(self.push_to_hub or self.hub_strategy == "end", "hub_strategy", "it needs --push_to_hub, too")
        require(self.max_prompts is None or self.max_prompts >= 1, "max_prompts", "pass at least 1")
        require(
            not self.streaming or self.max_prompts is not None,
            "streaming",
            "pass --max_prompts, too: the embeddings of all prompts are computed before training",
        )
        scale, span = self.guidance_scale, self.guidance_range
        require(scale is None or 0 <= scale < math.inf, "guidance_scale", "pass 0 or more; 1 is no guidance")
        require(scale is None or span is None, "guidance_range", "pass it or guidance_scale, not both")
        require(
            span is None or len(span) == 2 and 0 <= span[0] < span[1] < math.inf,
            "guidance_range",
            "pass two numbers, 0 or more, the lower one first",
        )
        require(0 <= self.guidance_rescale <= 1, "guidance_rescale", "pass a number in [0, 1]")
        for name in (
            "caption_column",
            "dataset_split",
            "max_prompts",
            "streaming",
            "guidance_scale",
            "guidance_range",
        ):
            self._needs("prompts", name)
        for name in ("guidance_rescale", "negative_prompt", "validation_prompts", "eval_prompts"):
            self._needs("prompts", name)
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_target_modules"):
            self._needs("use_lora", name)
        require(
            not self.use_lora or self.student_config is None,
            "student_config",
            "leave it out with --use_lora, where student and teacher share their weights",
        )
        require(self.lora_rank >= 1, "lora_rank", "pass at least 1")
        require(self.lora_alpha is None or 0 < self.lora_alpha < math.inf, "lora_alpha", "pass a positive number")
        require(0 <= self.lora_dropout < 1, "lora_dropout", "pass a number in [0, 1)")
        require(
            self.lora_target_modules is None or len(self.lora_target_modules) > 0,
            "lora_target_modules",
            "pass a name such as to_q, or leave it out",
        )
        for name in ("lpips_network", "lpips_decoder"):
            self._needs("lpips", name, self.distance == "lpips")
        choice("lpips_network", LPIPS_NETWORKS)
        require(
            self.lpips_network == "vgg" or self.lpips_vgg_weights is None,
            "lpips_vgg_weights",
            "leave it out with --lpips_network digits, which comes with its own",
        )
        require(self.lpips_batch_size >= 1, "lpips_batch_size", "pass at least 1")
        require(
            self.validation_prompts is None or len(self.validation_prompts) == self.num_validation_images,
            "validation_prompts",
            f"pass one for each of the {self.num_validation_images} images of num_validation_images",
        )
        if self.optimizer == "adamw_8bit":
            require(
                importlib.util.find_spec("bitsandbytes") is not None,
                "optimizer",
                "it needs a package that is not installed: pip install bitsandbytes",
            )
        if self.prediction_type is not None:
            choice("prediction_type", PREDICTION_TYPES)
        if self.weighting is not None:
            choice("weighting", WEIGHTINGS)
        if self.mixed_precision is not None:
            choice("mixed_precision", ("no", "fp16", "bf16"))
        if self.eval_classifier is not None:
            choice("eval_classifier", ("digits",))
        for name in ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "logging_steps"):
            require(getattr(self, name) >= 1, name, "pass at least 1")
        for name in ("checkpointing_steps", "eval_batch_size", "num_validation_images", "max_skipped_steps"):
            require(getattr(self, name) >= 1, name, "pass at least 1")
        require(
            self.num_validation_samples is None or self.num_validation_samples >= 1,
            "num_validation_samples",
            "pass at least 1",
        )
        for name in ("validation_steps", "lr_warmup_steps", "num_eval_samples"):
            require(getattr(self, name) >= 0, name, "pass 0 or more")
        require(0 <= self.seed < 2**32, "seed", "pass 0 or more, below 2³²")
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, name, "pass a number in [0, 1)")
        require(0 <= self.adam_weight_decay < math.inf, "adam_weight_decay", "pass 0 or more")
        require(self.num_train_timesteps >= 2, "num_train_timesteps", "a grid needs at least 2 points")
        if self.scheme == "central":
            require(self.num_train_timesteps >= 3, "num_train_timesteps", "the central scheme needs at least 3 points")
        positive = ("sigma_min", "sigma_max", "sigma_data", "rho", "learning_rate", "max_grad_norm", "huber_c")
        for name in (*positive, "adam_epsilon"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "pass a positive number")
        if self.sigma_min is not None and self.sigma_max is not None:
            require(self.sigma_min < self.sigma_max, "sigma_min", f"it must lie below sigma_max, {self.sigma_max}")
        require(
            self.checkpoints_total_limit is None or self.checkpoints_total_limit >= 1,
            "checkpoints_total_limit",
            "keep at least 1, or leave it out to keep all",
        )
        require(
            len(self.ema_decays) > 0 and all(0 <= decay < 1 for decay in self.ema_decays),
            "ema_decays",
            "pass at least one number in [0, 1)",
        )
        require(
            self.save_ema_decay is None or self.save_ema_decay in self.ema_decays,
            "save_ema_decay",
            f"it must be one of ema_decays, {self.ema_decays}",
        )
        require(
            self.validation_class_labels is None or len(self.validation_class_labels) == self.num_validation_images,
            "validation_class_labels",
            f"pass one class for each of the {self.num_validation_images} images of num_validation_images",
        )
        return self

    def _needs(self, other: str, name: str, given: bool | None = None):
        """Refuses a setting that means something beside another one only."""
        default = next(f for f in dataclasses.fields(self) if f.name == name).default
        if getattr(self, name) != default and not (getattr(self, other) if given is None else given):
            fix = "--distance lpips" if other == "lpips" else f"--{other}"
            raise InputError(f"{name} is {getattr(self, name)!r}; it needs {fix}, too.")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    def to_public_dict(self) -> dict:
        """The settings as they may be shown to others: of an absolute path the last part alone."""
        return {
            name: Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
            for name, value in self.to_dict().items()
        }


def parse_config(args: list[str] | None = None) -> TrainingConfig:
    """
    The configuration from command-line flags over the preset that they name.

    Raises:
        InputError: for an unknown flag, key or preset, or a value that cannot be read; from `validate`, too.
    """
    args = sys.argv[1:] if args is None else args
    parser = _Parser(
        TrainingConfig,
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,  # without the defaults, which the preset overrides
        description="Distils a diffusion model to one step with PID. What no flag says, the preset does.",
    )
    given = parser.parse_args(args)
    named = any(arg.split("=")[0] == "--preset" for arg in args)
    preset = given.preset if named else choose_preset(given.teacher, given.use_lora, given.prompts is not None)
    settings = load_preset(preset)
    if not named and given.teacher not in (None, settings.get("teacher")):
        # which are of the preset's own teacher
        settings.pop("eval_classifier", None)
        settings["output_dir"] = f"pid-{Path(os.path.abspath(given.teacher)).name.removesuffix('.pkl')}"
    for name, other in (("guidance_range", "guidance_scale"), ("guidance_scale", "guidance_range")):
        if getattr(given, name) is not None and getattr(given, other) is None:
            settings.pop(other, None)  # of the two ways to say it, the flag's counts
    from_preset = []
    for name, value in settings.items():
        if value is not None:
            from_preset += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    try:
        parser.parse_args(from_preset)
    except InputError as error:
        raise InputError(f"preset {preset!r}: {error}") from error
    values = vars(parser.parse_args([*from_preset, *args]))
    if values["validation_prompts"] and not any(arg.split("=")[0] == "--num_validation_images" for arg in args):
        values["num_validation_images"] = len(values["validation_prompts"])
    return TrainingConfig(**{**values, "preset": preset}).validate()


def choose_preset(teacher: str | None, use_lora: bool, has_prompts: bool) -> str:
    """
    The preset that comes with the package and suits a teacher: one that was made for it, or for its kind of pipeline,
    as its folder or name tells; else `"digits"`.

    Args:
        teacher (`str`, *optional*), use_lora (`bool`): as in [`TrainingConfig`].
        has_prompts (`bool`): whether it is a text-to-image run.
    """
    for path in sorted(PRESETS.glob("*.yaml")):
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if teacher is not None and settings.get("teacher") == teacher and settings.get("use_lora", False) == use_lora:
            return path.stem
    if teacher is None or not has_prompts:
        return "digits"
    try:
        kind = json.loads((Path(teacher) / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
        scheduler = json.loads((Path(teacher) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        is_xl, is_v = "XL" in str(kind), scheduler.get("prediction_type") == "v_prediction"
    except (OSError, ValueError, KeyError, TypeError):  # a Hub id, or no pipeline, which is found out later
        is_xl, is_v = "xl" in teacher.lower(), "stable-diffusion-2" in teacher.lower()
    if use_lora:
        name = "sdxl-lora" if is_xl else "stable-diffusion-v1-5-lora"
    else:
        name = "stable-diffusion-2-1" if is_v else "stable-diffusion-v1-5"
    return name if (PRESETS / f"{name}.yaml").is_file() else "digits"


def load_preset(name: str) -> dict:
    """
    The settings in a preset.

    Args:
        name (`str`): one that comes with the package, or the path of a YAML file.

    Raises:
        InputError: if there is none, it is no mapping, or it has a key that is no setting.
    """
    path = PRESETS / f"{name}.yaml" if os.path.isfile(PRESETS / f"{name}.yaml") else Path(name)
    if not os.path.isfile(path):
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise InputError(f"preset is {name!r}, which is no file; pass a YAML file or one of {known}.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"preset is {name!r}, which cannot be read ({error.strerror}).") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"preset is {name!r}, which is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise InputError(f"preset is {name!r}, which holds a {type(settings).__name__}; write 'name: value' lines.")
    settings.pop("preset", None)  # in a run's config.yaml, which holds all settings: the preset adds nothing to them
    fields = {f.name: f for f in dataclasses.fields(TrainingConfig) if f.name != "preset"}
    for key, value in settings.items():
        if key not in fields:
            raise InputError(f"preset {name!r} has the key {key!r}, which is no setting{_nearest(str(key), fields)}")
        if isinstance(value, dict) or isinstance(value, list) != _is_list(fields[key].type) and value is not None:
            kind = "a list" if _is_list(fields[key].type) else "a single value"
            raise InputError(f"preset {name!r} sets {key} to {value!r}; it takes {kind}.")
    if settings.get("mixed_precision") is False:
        settings["mixed_precision"] = "no"  # which YAML reads as false
    return settings


def _is_list(annotation) -> bool:
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else [annotation]
    return any(typing.get_origin(member) is list for member in members)


def _nearest(name: str, names: typing.Iterable[str], cutoff: float = 0.0) -> str:
    nearest = difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {nearest[0]!r}?" if nearest else "."


class _Parser(HfArgumentParser):
    """Takes "none" for what is optional, and reports what is wrong in one sentence instead of two pages of usage."""

    def add_argument(self, *args, **kwargs):
        action = super().add_argument(*args, **kwargs)
        annotation = typing.get_type_hints(TrainingConfig).get(action.dest)
        if type(None) in typing.get_args(annotation) and action.nargs is None:
            convert = action.type

            def convert_optional(text: str):
                return None if text.lower() == "none" else convert(text)

            convert_optional.__name__ = convert.__name__  # named in argparse's messages
            action.type = convert_optional
        return action

    def error(self, message: str):
        prefix, _, unknown = message.partition("unrecognized arguments: ")
        if not prefix and unknown.startswith("--"):
            flag = unknown.split()[0].split("=")[0]
            names = [f.name for f in dataclasses.fields(TrainingConfig)]
            nearest = _nearest(flag[2:], names, cutoff=0.7).replace("did you mean '", "did you mean '--")
            raise InputError(f"{flag} is no flag{nearest if len(nearest) > 1 else '; --help lists them.'}")
        raise InputError(f"{message}; --help lists the flags.")
