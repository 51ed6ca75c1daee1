"""Memory and speed of training at the sizes of Stable Diffusion, with random weights: prints a table.

    python benchmarks/stable_diffusion.py --device cuda --options plain checkpointing compile checkpointing+compile
    python benchmarks/stable_diffusion.py --device cpu --scale 2 --sample_size 16 --precisions no bf16
    python benchmarks/stable_diffusion.py --device computed --model sdxl --students lora --options checkpointing

With `--device cuda` or `cpu` a pipeline of the model's published UNet configuration, the real text embeddings' shapes
and random weights is saved once, and each row is a run of the `Trainer` on it in a process of its own: peak memory and
seconds of the steps after the first two. "Allocated" is what tensors take; "reserved" is what PyTorch holds of a GPU,
or on a CPU the resident memory of the process beyond that after the imports. `--scale 2` halves all widths and the
rank of the adapters.

With `--device computed` nothing is allocated, so that any size can be looked at: weights, optimizer and moving average
are counted, and the tensors that student and teacher make in a forward and a backward pass are followed through
PyTorch's fake tensors, with the types that autocast gives them on a GPU. What libraries take for themselves is extra.

From two batch sizes or more follow a constant and a slope, and from these the batches that fit 90 % of 24, 40, 80 GB.
"""

import argparse
import dataclasses
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pid_diffusers.adapters import add_lora, without_adapters
from pid_diffusers.conditioning import network_arguments
from pid_diffusers.precision import cast_frozen, keep_output_in_float32
from pid_diffusers.training import Trainer, TrainingConfig
from pid_diffusers.training.build import estimate_memory

WARM_UP_STEPS = 2
RANK = 64
TEXT_LENGTH = 77
GPU_SIZES = (24, 40, 80)
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
PRECISIONS = {"no": "fp32", "bf16": "bf16"}
# what differs from the default values of UNet2DConditionModel in the models' published unet/config.json
MODELS = {
    "sd-1.5": {"sample_size": 64, "cross_attention_dim": 768},
    "sd-2.1": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
GUIDANCE = {"sd-1.5": 7.5, "sd-2.1": 7.5, "sdxl": 5.0}


@dataclasses.dataclass(frozen=True)
class Row:
    """What one run has that others have not."""

    student: str  # whole or lora
    precision: str
    optimizer: str
    checkpointing: bool
    compile: bool
    batch_size: int

    def names(self) -> list[str]:
        options = [name for name in ("checkpointing", "compile") if getattr(self, name)]
        return [self.student, PRECISIONS[self.precision], self.optimizer, " + ".join(options) or "–"]


class Enough(Exception):
    """Ends a run that has been measured."""


class LiveBytes(TorchDispatchMode):
    """Follows the tensors that are made within it, and `known` ones: their bytes `now`, and at the `peak`."""

    def __init__(self, known: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        for tensor in known:
            self._add(tensor.untyped_storage())

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage):
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += self.sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int):
        self.now -= self.sizes.pop(key)


class MeasuredTrainer(Trainer):
    """A trainer that keeps time and peak memory instead of writing metrics, and ends without saving anything."""

    def _log(self, figures: dict[str, float]):
        gpu = self.accelerator.device.type == "cuda"
        if figures["step"] == WARM_UP_STEPS:  # optimizer state and compiled code are there, what built them is gone
            self.started = figures["seconds"]
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is resident now
                everything = (thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor))
                self.live = LiveBytes(everything)
                self.live.__enter__()
        if figures["step"] == self.config.max_train_steps - 1:  # the last step would write a checkpoint
            seconds = (figures["seconds"] - self.started) / (figures["step"] - WARM_UP_STEPS)
            if gpu:
                allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            else:
                self.live.__exit__(None, None, None)
                status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                allocated, reserved = self.live.peak, int(status["VmHWM"].split()[0]) * 1024
            self.figures = {"seconds": seconds, "allocated": allocated, "reserved": reserved}
            raise Enough


def measure(row: Row, args: argparse.Namespace) -> dict[str, float]:
    """Trains for a few steps. Returns seconds a step, bytes, and what the trainer itself says of the memory."""
    libraries = 0 if torch.cuda.is_available() else psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory(dir=args.work_dir) as output_dir:
        config = TrainingConfig(
            preset="none",
            teacher=str(Path(args.work_dir) / "teacher"),
            prompts=str(Path(args.work_dir) / "prompts.txt"),
            guidance_scale=GUIDANCE[args.model],
            output_dir=output_dir,
            use_lora=row.student == "lora",
            lora_rank=RANK // args.scale if row.student == "lora" else RANK,
            scheme="midpoint",
            optimizer=row.optimizer,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            ema_decays=[0.999],
            train_batch_size=row.batch_size,
            max_train_steps=WARM_UP_STEPS + args.steps + 1,
            mixed_precision=row.precision,
            gradient_checkpointing=row.checkpointing,
            torch_compile=row.compile,
            logging_steps=1,
            report_to="none",
        ).validate()
        trainer = MeasuredTrainer(config)
        try:
            trainer.train()
        except Enough:
            figures = trainer.figures
        estimate = estimate_memory(config, trainer.unet, trainer.teacher, trainer.bytes_per_start)
        figures["reserved"] -= libraries
        return {**figures, "trained": sum(p.numel() for p in trainer.parameters), "trainer_says": estimate}


class Float32GroupNorm(nn.GroupNorm):
    """As autocast has it on a GPU, and not on a CPU: in float32, and so is the result."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        weights = self.weight.float(), self.bias.float()
        return nn.functional.group_norm(sample.float(), self.num_groups, *weights, self.eps)


class Float32LayerNorm(nn.LayerNorm):
    """The same of a layer norm."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        weights = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(sample.float(), self.normalized_shape, *weights, self.eps)


def compute(row: Row, args: argparse.Namespace) -> dict[str, float]:
    """Follows two micro-steps of a training step, so that gradients are there in the second. Returns bytes."""
    half = row.precision == "bf16"
    with torch.device("meta"):
        student, teacher = create_unet(args).train(), None
        if row.student == "lora":
            add_lora(student, RANK // args.scale)
        else:
            teacher = create_unet(args).requires_grad_(False)
    if row.checkpointing:
        student.enable_gradient_checkpointing()
    if half:
        keep_output_in_float32(student)
        if teacher is None:
            cast_frozen(student, torch.bfloat16)
        else:
            keep_output_in_float32(teacher, body_dtype=torch.bfloat16)
        for module in student.modules():
            replaced = {nn.GroupNorm: Float32GroupNorm, nn.LayerNorm: Float32LayerNorm}
            module.__class__ = replaced.get(type(module), type(module))

    with FakeTensorMode():
        for network in (student, teacher) if teacher is not None else (student,):
            for module in network.modules():
                for name, weight in module.named_parameters(recurse=False):
                    fake = torch.empty(weight.shape, dtype=weight.dtype)
                    setattr(module, name, nn.Parameter(fake, requires_grad=weight.requires_grad))
        parameters = [p for network in (student, teacher) if network is not None for p in network.parameters()]
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        moments = 2 if row.optimizer == "adamw_8bit" else 8
        weights = sum(p.numel() * p.element_size() for p in parameters)
        state = weights + trained * (moments + 4)  # and one moving average

        def call(network: nn.Module) -> torch.Tensor:
            batch = 2 * row.batch_size  # the student at two points of the grid; the teacher with and without the text
            settings = network.config
            sample = torch.randn(batch, settings.in_channels, settings.sample_size, settings.sample_size)
            condition = {"encoder_hidden_states": torch.randn(batch, TEXT_LENGTH, settings.cross_attention_dim)}
            if args.model == "sdxl":
                condition |= {"text_embeds": torch.randn(batch, 1280), "time_ids": torch.ones(batch, 6)}
            arguments = network_arguments(network, condition)
            sample = sample.to(next(network.parameters()).dtype)
            return network(sample, torch.rand(batch), **arguments, return_dict=False)[0].float()

        live = LiveBytes()
        with live:
            for _ in range(2):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    output = call(student)
                    with torch.no_grad(), without_adapters(student):
                        if teacher is None:
                            call(student)
                if teacher is not None:
                    with torch.no_grad():
                        call(teacher)
                output.square().mean().backward()
        # when the activations are gone, AdamW makes a number for each weight beside the gradients
        step = 4 * trained + (0 if row.optimizer == "adamw_8bit" else 4 * trained)
    figures = {"backward": state + live.peak, "allocated": state + max(live.peak, step)}
    return {**figures, "state": state + 4 * trained, "trained": trained}


def create_unet(args: argparse.Namespace) -> UNet2DConditionModel:
    settings = dict(MODELS[args.model])
    widths = settings.get("block_out_channels", (320, 640, 1280, 1280))
    settings["block_out_channels"] = tuple(width // args.scale for width in widths)
    settings["sample_size"] = args.sample_size or settings["sample_size"]
    return UNet2DConditionModel(**settings, norm_num_groups=32 // args.scale)


def save_pipeline(args: argparse.Namespace, folder: Path):
    """The model with random weights, its text encoders and VAE small, but with embeddings and latents as they are."""
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    xl = args.model == "sdxl"
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": TEXT_LENGTH}))
    tokenizer = CLIPTokenizer.from_pretrained(folder)

    def encoder(cls: type, width: int) -> nn.Module:
        tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        sizes = {"hidden_size": width, "intermediate_size": width, "projection_dim": width}
        sizes |= {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "num_attention_heads": 8}
        return cls(CLIPTextConfig(**sizes, **tokens))

    levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    parts = {
        "vae": AutoencoderKL(**levels, block_out_channels=[32] * 4, latent_channels=4),
        "text_encoder": encoder(CLIPTextModel, 768 if xl else MODELS[args.model]["cross_attention_dim"]),
        "tokenizer": tokenizer,
        "unet": create_unet(args),
    }
    if xl:
        parts |= {"text_encoder_2": encoder(CLIPTextModelWithProjection, 1280), "tokenizer_2": tokenizer}
        pipeline = StableDiffusionXLPipeline(**parts, scheduler=EulerDiscreteScheduler(**BETAS))
    else:
        v = args.model == "sd-2.1"
        kind = {"prediction_type": "v_prediction", "clip_sample": False} if v else {"skip_prk_steps": True}
        scheduler = (DDIMScheduler if v else PNDMScheduler)(**BETAS, **kind, set_alpha_to_one=False)
        checker = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = StableDiffusionPipeline(**parts, scheduler=scheduler, **checker)
    pipeline.save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("a red fox in the snow\na blue bird\n")


def run_row(row: Row, args: argparse.Namespace) -> dict:
    """A row in a process of its own; what went wrong, if anything did, is in it as `error`."""
    environment = {**os.environ, "PID_DIFFUSERS_CACHE": args.work_dir}
    if args.device != "cuda":
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # have what is freed leave the resident memory
    job = json.dumps({"row": dataclasses.asdict(row), "args": vars(args)})
    done = subprocess.run([sys.executable, __file__, "--job", job], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: list[tuple[Row, dict]]) -> str:
    names = ["student", "precision", "optimizer", "options", "batch", "trained", "GB allocated", "GB reserved"]
    names += ["of the whole fp32 student", "s a step", "starts/s", "the trainer says"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    whole = {
        row.batch_size: found["allocated"]
        for row, found in results
        if row.names() == ["whole", "fp32", "adamw", "–"] and "allocated" in found
    }
    for row, found in results:
        cells = [*row.names(), str(row.batch_size)]
        if "error" in found:
            lines.append("| " + " | ".join([*cells, found["error"].replace("|", "/")]) + " |" * 8)
            continue
        seconds, allocated = found.get("seconds"), found["allocated"]
        cells += [f"{found['trained'] / 1e6:.1f} M", f"{allocated / 1e9:.2f}"]
        cells += [f"{found['reserved'] / 1e9:.2f}" if "reserved" in found else ""]
        cells += [f"{allocated / whole[row.batch_size]:.0%}" if row.batch_size in whole else ""]
        cells += [f"{seconds:.3f}", f"{row.batch_size / seconds:.2f}"] if seconds else ["", ""]
        cells += [found.get("trainer_says", "").split(" a process")[0]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def batches(results: list[tuple[Row, dict]]) -> str:
    """The batch sizes that fit, by constant and slope between the smallest and the largest batch that were run."""
    sizes = " | ".join(f"{size} GB" for size in GPU_SIZES)
    lines = [f"| student | precision | optimizer | options | GB constant | GB a start | {sizes} |", "|---" * 9 + "|"]
    same = {}
    for row, found in results:
        if "allocated" in found:
            # computed, the pass through the networks is known by itself; measured, it may be hidden by the optimizer's
            point = row.batch_size, found.get("backward", found["allocated"]), found["allocated"]
            same.setdefault(tuple(row.names()), []).append(point)
    for names, points in same.items():
        (few, less, least), (many, more, _) = min(points), max(points)
        if more <= less:
            continue
        slope = (more - less) / (many - few)
        constant = less - few * slope
        cells = [*names, f"{constant / 1e9:.2f}", f"{slope / 1e9:.2f}"]
        for size in GPU_SIZES:
            room = 0.9e9 * size
            cells.append(str(int((room - constant) // slope)) if room >= max(least, constant + slope) else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd-1.5")
    parser.add_argument("--device", choices=["cuda", "cpu", "computed"], required="--job" not in sys.argv)
    parser.add_argument("--students", nargs="+", choices=["whole", "lora"], default=["whole", "lora"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16"])
    parser.add_argument("--optimizers", nargs="+", choices=["adamw", "adamw_8bit"], default=["adamw"])
    options = ["plain", "checkpointing", "compile", "checkpointing+compile"]
    parser.add_argument("--options", nargs="+", choices=options, default=["plain", "checkpointing"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help="measured steps a row")
    parser.add_argument("--scale", type=int, choices=[1, 2, 4, 8], default=1, help="divides all widths")
    parser.add_argument("--sample_size", type=int, help="side of the latents; default: the model's")
    parser.add_argument("--work_dir", help="for the random pipeline; default: a temporary folder")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        job = json.loads(args.job)
        row, args = Row(**job["row"]), argparse.Namespace(**job["args"])
        print(json.dumps(measure(row, args)))
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but there is no GPU; pass cpu or computed.")
    if "adamw_8bit" in args.optimizers and args.device != "computed" and find_spec("bitsandbytes") is None:
        parser.error("--optimizers has adamw_8bit, which needs a package: pip install bitsandbytes.")
    if "adamw_8bit" in args.optimizers and args.device == "cpu":
        parser.error("--optimizers has adamw_8bit, which needs a GPU; leave it out.")

    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    command = shlex.join(["python", "benchmarks/stable_diffusion.py", *sys.argv[1:]])
    about = {"command": command, "device": args.device if args.device == "computed" else device}
    about |= {name: version(name) for name in ("torch", "diffusers", "accelerate", "peft")}
    results = []
    with tempfile.TemporaryDirectory() as folder:
        args.work_dir = args.work_dir or folder
        if args.device != "computed":
            save_pipeline(args, Path(args.work_dir))
        for student in args.students:
            for precision in args.precisions:
                for optimizer in args.optimizers:
                    for names in args.options:
                        for batch_size in args.batch_sizes:
                            chosen = "checkpointing" in names, "compile" in names
                            row = Row(student, precision, optimizer, *chosen, batch_size)
                            found = compute(row, args) if args.device == "computed" else run_row(row, args)
                            results.append((row, found))
                            print(json.dumps({**dataclasses.asdict(row), **found, **about}), flush=True)
    print(f"\n{args.model} with widths / {args.scale}, {about['device']}\n\n{table(results)}\n\n{batches(results)}")


if __name__ == "__main__":
    main()
