"""Trains a text-to-image teacher, "digits in words": a small Stable Diffusion pipeline on scikit-learn's digits.

    python examples/train_words_teacher.py --output_dir words-teacher

takes about fifteen minutes of CPU time, which 2 cores share, and writes a `StableDiffusionPipeline` with its figures.
A byte-level CLIP tokenizer is made of the prompts; an `AutoencoderKL` is trained on the digits (16 × 16 pixels, its
latents 4 × 4 × 4); then a `UNet2DConditionModel` with Stable Diffusion's noise levels and a `CLIPTextModel`
are trained together.
"""

import argparse
import json
import random
import string
import sys
import time
from pathlib import Path

import torch
import transformers
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pid_diffusers import InputError
from pid_diffusers.evaluation.digits import DIGIT_WORDS, NUM_HELD_OUT, DigitClassifier, digit_of, load_digits
from pid_diffusers.evaluation.figures import save_rows
from pid_diffusers.evaluation.provenance import describe_compute, versions

PROMPTS = Path(__file__).with_name("words")
ALWAYS = {
    "image_size": 16,
    "vae_learning_rate": 2e-3,
    "kl_weight": 2e-4,
    "caption_dropout": 0.15,
    "dropout": 0.1,
    "lr_warmup_steps": 100,
    "max_grad_norm": 1.0,
    "ema_decay": 0.998,
}
MAX_LENGTH = 32
TEXT_SIZE = 64
SAMPLING_STEPS = 35
SAMPLE_SEED = 1


def read_prompts(path: str) -> list[str]:
    """The lines of a file, each of which must name one digit."""
    try:
        prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The file of prompts {path} cannot be read as UTF-8 text: {error}.") from error
    if not prompts:
        raise InputError(f"The file of prompts {path} is empty: it needs one prompt a line.")
    for prompt in prompts:
        if digit_of(prompt) is None:
            raise InputError(f"Each prompt in {path} must name one digit, as a word or a numeral, not {prompt!r}.")
    return prompts


def make_tokenizer(prompts: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary of all bytes and of the prompts' words, whose files go to the folder.

    The two files are all that a tokenizer of transformers 4 reads; the pipeline adds what version 5 reads.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    learner.train_from_iterator(prompts, trainers.BpeTrainer(min_frequency=10, end_of_word_suffix="</w>"))
    merges = json.loads(learner.to_str())["model"]["merges"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_LENGTH)


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Token ids `(B, 32)`, padded as the pipeline pads."""
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


class Captions:
    """Captions of digits: one of the prompts, or its digit anywhere among other words.

    Half of the captions are such jumbles, of words of the prompts and of made-up ones, so that only the digit tells
    what is in the image, and phrasings that training never saw work as well.
    """

    def __init__(self, prompts: list[str], seed: int):
        self.random = random.Random(seed)
        self.prompts = [[prompt for prompt in prompts if digit_of(prompt) == digit] for digit in range(10)]
        for digit in range(10):
            if not self.prompts[digit]:
                raise InputError(f"The training prompts must name all digits, but none names {digit}.")
        self.words = sorted({word for prompt in prompts for word in prompt.split() if digit_of(word) is None})

    def other_word(self) -> str:
        if self.random.random() < 0.5:
            return self.random.choice(self.words)
        return "".join(self.random.choices(string.ascii_lowercase, k=self.random.randint(2, 5)))

    def __call__(self, digit: int) -> str:
        chance = self.random.random()
        if chance < ALWAYS["caption_dropout"]:
            return ""
        if chance < (1 + ALWAYS["caption_dropout"]) / 2:
            return self.random.choice(self.prompts[digit])
        words = [self.other_word() for _ in range(self.random.randint(0, 5))]
        words.insert(self.random.randint(0, len(words)), self.random.choice((DIGIT_WORDS[digit], str(digit))))
        return " ".join(words)


class AdamW:
    """AdamW with warm-up, cosine decay and clipping: `optimizer(loss)` is one of its `steps`."""

    def __init__(self, parameters: list[torch.nn.Parameter], steps: int, learning_rate: float):
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate)
        warmup = min(ALWAYS["lr_warmup_steps"], steps // 10)
        self.schedule = get_scheduler("cosine", self.optimizer, num_warmup_steps=warmup, num_training_steps=steps)

    def __call__(self, loss: torch.Tensor):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, ALWAYS["max_grad_norm"])
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()


def train_vae(images: torch.Tensor, steps: int, batch_size: int) -> AutoencoderKL:
    """An autoencoder of RGB images `(B, 3, 16, 16)`, with the scaling factor that gives latents of unit variance."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=images.shape[-1],
    )
    optimizer = AdamW(list(vae.parameters()), steps, ALWAYS["vae_learning_rate"])
    for _ in (progress := tqdm(range(steps), "autoencoder", mininterval=5)):
        batch = images[torch.randint(len(images), (batch_size,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer(error + ALWAYS["kl_weight"] * divergence)
        progress.set_postfix(error=f"{error.item():.4f}", refresh=False)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.sample()
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return vae


def train_teacher(
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    captions: Captions,
    images: torch.Tensor,
    labels: torch.Tensor,
    args: argparse.Namespace,
) -> StableDiffusionPipeline:
    """The pipeline with a network and a text encoder, trained together to predict noise in latents."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_SIZE,
            intermediate_size=4 * TEXT_SIZE,
            projection_dim=TEXT_SIZE,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=images.shape[-1] // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(64, 64),
        layers_per_block=1,
        cross_attention_dim=TEXT_SIZE,
        attention_head_dim=4,
        norm_num_groups=16,
        dropout=ALWAYS["dropout"],
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = AdamW(parameters, args.max_train_steps, args.learning_rate)
    ema = EMAModel(parameters, decay=ALWAYS["ema_decay"], foreach=True)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
    for module in (unet, text_encoder):
        module.train()
    for _ in (progress := tqdm(range(args.max_train_steps), "teacher", mininterval=5)):
        batch = torch.randint(len(images), (args.train_batch_size,))
        x = posterior.mean[batch] + posterior.std[batch] * torch.randn_like(posterior.mean[batch])
        x = x * vae.config.scaling_factor
        noise, k = torch.randn_like(x), torch.randint(scheduler.config.num_train_timesteps, (len(x),))
        prompts = tokenize(tokenizer, [captions(int(label)) for label in labels[batch]])
        embeddings = text_encoder(prompts).last_hidden_state
        output = unet(scheduler.add_noise(x, noise, k), k, encoder_hidden_states=embeddings).sample
        loss = (output - noise).square().mean()
        optimizer(loss)
        ema.step(parameters)
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    ema.copy_to(parameters)
    unet.eval().register_to_config(dropout=0.0)  # there is nothing to regularise after training
    return StableDiffusionPipeline(
        vae, text_encoder.eval(), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def sample(
    pipeline: StableDiffusionPipeline, prompts: list[str], number: int, guidance_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `(number, 3, 16, 16)` in [−1, 1] of the prompts, taken in turn, and the digits asked for, `(number,)`."""
    prompts = [prompts[i % len(prompts)] for i in range(number)]
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    settings = {"num_inference_steps": SAMPLING_STEPS, "guidance_scale": guidance_scale, "output_type": "pt"}
    images = pipeline(prompts, generator=generator, **settings).images
    return 2 * images - 1, torch.tensor([digit_of(prompt) for prompt in prompts])


@torch.no_grad()
def measure(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    prompts: list[str],
    held_out: list[str],
    args: argparse.Namespace,
) -> dict:
    """What a classifier reads from the autoencoder's and the teacher's images; draws `samples.png`.

    Args:
        pipeline (`StableDiffusionPipeline`): the teacher.
        images, labels (`torch.Tensor`): digits, the last of which were held out.
        prompts, held_out (`list[str]`): those of the training, and others.
        args (`argparse.Namespace`): the settings.
    """
    classifier = DigitClassifier()
    vae = pipeline.vae
    decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample
    seen, unseen = slice(None, -NUM_HELD_OUT), slice(-NUM_HELD_OUT, None)

    pipeline.set_progress_bar_config(disable=True)
    number, w = args.num_eval_samples, args.guidance_scale
    samples, asked = sample(pipeline, held_out, number, w)
    of_training_prompts, unguided = sample(pipeline, prompts, number, w), sample(pipeline, held_out, number, 1.0)
    ddim = pipeline.scheduler
    pipeline.scheduler = EulerDiscreteScheduler.from_config(ddim.config, timestep_spacing="linspace")
    euler = sample(pipeline, held_out, number, w)
    pipeline.scheduler = ddim

    first_real = [int((labels[unseen] == digit).nonzero()[0]) for digit in range(10)]
    first, last = ([int((asked == digit).nonzero()[i]) for digit in asked.unique()] for i in (0, -1))
    rows = {
        "real, held out": images[unseen][first_real],
        "encoded and decoded": decoded[unseen][first_real],
        f"teacher, w = {w:g}": samples[first],
        "of other prompts": samples[last],
    }
    save_rows(
        Path(args.output_dir) / "samples.png", rows, f"{SAMPLING_STEPS} DDIM steps; prompts not seen in training"
    )
    return {
        "num_parameters": sum(parameter.numel() for parameter in pipeline.unet.parameters()),
        "num_parameters_vae": sum(parameter.numel() for parameter in vae.parameters()),
        "num_parameters_text_encoder": sum(parameter.numel() for parameter in pipeline.text_encoder.parameters()),
        "scaling_factor": vae.config.scaling_factor,
        "autoencoder_rms_error_held_out": round((decoded - images)[unseen].square().mean().sqrt().item(), 4),
        "autoencoder_digits_read": classifier.accuracy(decoded[seen], labels[seen]),
        "autoencoder_digits_read_held_out": classifier.accuracy(decoded[unseen], labels[unseen]),
        "held_out_real_digits_read": classifier.accuracy(images[unseen], labels[unseen]),
        "num_eval_samples": number,
        "num_held_out_prompts": len(held_out),
        "seed": SAMPLE_SEED,
        "ddim_steps": SAMPLING_STEPS,
        "guidance_scale": w,
        "digits_read_as_asked": classifier.accuracy(samples, asked),
        "digits_read_as_asked_euler": classifier.accuracy(*euler),
        "digits_read_as_asked_unguided": classifier.accuracy(*unguided),
        "digits_read_as_asked_training_prompts": classifier.accuracy(*of_training_prompts),
    }


def write_report(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    labels: torch.Tensor,
    prompts: list[str],
    held_out: list[str],
    args: argparse.Namespace,
    compute: dict,
) -> dict:
    """Measures and draws as [`measure`] does; writes `config.yaml` and `results.json`, and returns the latter."""
    # of paths only the names, and of those that come with the script none in the command
    settings = {name: Path(value).name if isinstance(value, str) else value for name, value in vars(args).items()}
    flags = {name: value for name, value in settings.items() if value not in ("prompts.txt", "held-out-prompts.txt")}
    flags = " ".join(f"--{name} {value}" for name, value in flags.items())
    folder = Path(args.output_dir)
    (folder / "config.yaml").write_text(yaml.safe_dump({**settings, **ALWAYS}, sort_keys=False), encoding="utf-8")
    results = {
        "vae_steps": args.vae_steps,
        "steps": args.max_train_steps,
        **compute,
        **measure(pipeline, images, labels, prompts, held_out, args),
        "license": "apache-2.0",
        "data": f"{len(images) - NUM_HELD_OUT:,} of the {len(images):,} images of scikit-learn's `load_digits` (the"
        " test part of UCI's *Optical Recognition of Handwritten Digits*), enlarged to 16 × 16 with bicubic"
        f" interpolation, as RGB in [−1, 1]; {NUM_HELD_OUT} are held out. Captions: {len(prompts)} prompts, and digits"
        " by name among random words.",
        "limits": "One digit of 16 × 16 pixels, by 13 writers, and nothing else; prompts in English.",
        "command": f"python examples/train_words_teacher.py \\\n    {flags}",
        "versions": {**versions(), "transformers": transformers.__version__},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return results


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="words-teacher")
    parser.add_argument("--prompts", default=str(PROMPTS / "prompts.txt"), help="training prompts, one a line")
    parser.add_argument("--held_out_prompts", default=str(PROMPTS / "held-out-prompts.txt"), help="those to measure")
    parser.add_argument("--vae_steps", type=int, default=800)
    parser.add_argument("--max_train_steps", type=int, default=3500)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="w of the samples that are measured")
    parser.add_argument("--num_eval_samples", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = ("vae_steps", "max_train_steps", "train_batch_size", "num_eval_samples")
    for name in (*counts, "learning_rate", "guidance_scale"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name} must be greater than 0, not {getattr(args, name)}.")
    return args


def make_folder(path: str) -> Path:
    """The folder of results, which must be new or empty."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        full = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"--output_dir {path} cannot be made: {error.strerror}; choose another.") from error
    if full:
        raise InputError(f"--output_dir {path} holds something already; choose another.")
    return folder


def train(args: argparse.Namespace):
    prompts, held_out = read_prompts(args.prompts), read_prompts(args.held_out_prompts)
    captions = Captions(prompts, args.seed)
    folder = make_folder(args.output_dir)
    torch.manual_seed(args.seed)
    images, labels = load_digits()
    images = torch.nn.functional.interpolate(images, ALWAYS["image_size"], mode="bicubic").clamp(-1, 1)
    images = images.repeat(1, 3, 1, 1)
    seen_images, seen_labels = images[:-NUM_HELD_OUT], labels[:-NUM_HELD_OUT]

    start = time.time()
    tokenizer = make_tokenizer(prompts, folder / "tokenizer")
    vae = train_vae(seen_images, args.vae_steps, args.train_batch_size)
    vae_seconds = round(time.time() - start, 1)
    pipeline = train_teacher(vae, tokenizer, captions, seen_images, seen_labels, args)
    seconds = round(time.time() - start, 1)
    pipeline.save_pretrained(folder)
    compute = {"vae_seconds": vae_seconds, "seconds": seconds, **describe_compute(torch.device("cpu"), 1, seconds)}
    compute["cpu_core_hours"] = round(time.process_time() / 3600, 4)  # of shared cores, those that were used
    results = write_report(pipeline, images, labels, prompts, held_out, args, compute)
    for name in ("autoencoder_digits_read", "autoencoder_digits_read_held_out", "digits_read_as_asked"):
        print(f"{name}: {100 * results[name]:.1f} %")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"Saved to {folder} ({size / 1e6:.1f} MB) after {seconds} s of training, with samples.png and results.json.")


def main() -> int:
    try:
        train(parse_args())
    except InputError as error:
        print(f"train_words_teacher.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
