"""The text-to-image teacher "digits in words": the script that makes it, and the one that comes with the package."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextModel, CLIPTokenizer

import pid_diffusers
from pid_diffusers.evaluation.digits import DigitClassifier, digit_of
from pid_diffusers.hub.card import render_card

ROOT = Path(__file__).parent.parent
PROMPTS = ROOT / "examples" / "words" / "prompts.txt"
HELD_OUT_PROMPTS = ROOT / "examples" / "words" / "held-out-prompts.txt"
SHIPPED = Path(pid_diffusers.__file__).parent / "assets" / "words-teacher"
SHORT = ["--vae_steps", "2", "--max_train_steps", "2", "--train_batch_size", "4", "--num_eval_samples", "10"]


@pytest.fixture(scope="module")
def script():
    """The script's module, as if it were run with other arguments: `script.main()` reads `sys.argv`."""
    path = ROOT / "examples" / "train_words_teacher.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def train(script):
    def run(*flags) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *map(str, flags)])
            return script.main()

    return run


@pytest.fixture(scope="module")
def trained(train, tmp_path_factory):
    folder = tmp_path_factory.mktemp("words") / "teacher"
    assert train("--output_dir", folder, *SHORT) == 0
    return folder


def lines(path):
    return path.read_text(encoding="utf-8").splitlines()


def test_the_script_writes_a_stable_diffusion_pipeline(trained):
    pipeline = DiffusionPipeline.from_pretrained(trained)
    assert type(pipeline) is StableDiffusionPipeline
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "scheduler": DDIMScheduler}
    parts |= {"text_encoder": CLIPTextModel, "tokenizer": CLIPTokenizer}
    assert {name: type(getattr(pipeline, name)) for name in parts} == parts
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    assert pipeline.scheduler.config.prediction_type == "epsilon" and not pipeline.scheduler.config.clip_sample
    assert pipeline.unet.config.dropout == 0
    sigma = (1 / pipeline.scheduler.alphas_cumprod[-1] - 1).sqrt()
    assert sigma.item() == pytest.approx(14.6146, abs=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a handwritten seven", num_inference_steps=2).images[0].size == (16, 16)
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    assert results["num_eval_samples"] == 10 and 0 <= results["digits_read_as_asked"] <= 1
    assert (trained / "samples.png").exists()


def test_what_the_script_writes_has_a_card_with_its_figures_and_time(trained):
    results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
    card = render_card(trained)
    assert f"prompts not seen in training, w = 3 | {100 * results['digits_read_as_asked']:.1f} % |" in card
    assert "CPU core hours.\n" in card and "2 steps of 4 images" in card and "is of 10 samples" in card


@pytest.mark.slow
def test_the_same_seed_gives_the_same_pipeline(train, trained, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    assert train("--output_dir", again, *SHORT) == 0
    assert train("--output_dir", other, *SHORT, "--seed", "1") == 0
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second, third = (load_file(folder / name) for folder in (trained, again, other))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


@pytest.mark.parametrize("folder", ["trained", "shipped"])
def test_any_text_becomes_tokens_and_is_told_apart(folder, trained, tmp_path):
    tokenizer = CLIPTokenizer.from_pretrained((trained if folder == "trained" else SHIPPED) / "tokenizer")
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a handwritten seven", "the digit 7", "Übergröße 日本, $5!", "🦊"]
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == again(text).input_ids and len(ids) <= tokenizer.model_max_length == again.model_max_length
        assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in ids[1:-1]  # which stands for what is unknown, too
        assert tokenizer.decode(ids[1:-1]).replace(" ", "") == text.lower().replace(" ", "")
    assert tokenizer.tokenize("a handwritten seven") == ["a</w>", "handwritten</w>", "seven</w>"]
    for prompt in lines(PROMPTS) + lines(HELD_OUT_PROMPTS):
        assert len(tokenizer(prompt).input_ids) <= tokenizer.model_max_length, prompt


def test_every_phrasing_asks_for_every_digit_and_those_held_out_are_others():
    prompts, held_out = lines(PROMPTS), lines(HELD_OUT_PROMPTS)
    for each in (prompts, held_out):
        assert len(each) == len(set(each))
        assert [digit_of(prompt) for prompt in each] == list(range(10)) * (len(each) // 10)
    assert len(prompts) >= 120

    def phrasings(each):
        return {" ".join("#" if digit_of(word) is not None else word for word in p.lower().split()) for p in each}

    assert not phrasings(prompts) & phrasings(held_out)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--output_dir", "full"], "--output_dir full holds something already; choose another."),
        (
            ["--output_dir", "empty.txt"],
            "--output_dir empty.txt cannot be made: File exists; choose another.",
        ),
        (["--max_train_steps", "0"], "--max_train_steps must be greater than 0, not 0."),
        (["--learning_rate", "nan"], "--learning_rate must be greater than 0, not nan."),
        (["--prompts", "missing.txt"], "The file of prompts missing.txt cannot be read as UTF-8 text"),
        (["--held_out_prompts", "empty.txt"], "The file of prompts empty.txt is empty: it needs one prompt a line."),
        (["--prompts", "seven.txt"], "The training prompts must name all digits, but none names 0."),
        (["--prompts", "both.txt"], "must name one digit, as a word or a numeral, not 'a one or a two'."),
    ],
)
def test_what_cannot_work_is_one_sentence(flags, message, train, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "seven.txt").write_text("a handwritten seven\n")
    (tmp_path / "both.txt").write_text("a one or a two\n")
    assert train(*flags) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "words-teacher").exists()


def test_the_shipped_teacher_is_small_and_in_safetensors():
    files = [path for path in SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md", ".yaml", ".png"}


def test_the_shipped_teacher_draws_what_unseen_phrasings_ask_for():
    pipeline = DiffusionPipeline.from_pretrained(SHIPPED)
    pipeline.set_progress_bar_config(disable=True)
    prompts = lines(HELD_OUT_PROMPTS)
    asked = torch.tensor([digit_of(prompt) for prompt in prompts])
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        prompts, num_inference_steps=35, guidance_scale=3.0, generator=generator, output_type="pt"
    ).images
    classifier = DigitClassifier()
    results = json.loads((SHIPPED / "results.json").read_text(encoding="utf-8"))
    assert results["guidance_scale"] == 3.0 and results["num_held_out_prompts"] == len(prompts)
    assert classifier.accuracy(2 * images - 1, asked) >= results["digits_read_as_asked"] - 0.03
    assert classifier.accuracy(2 * images - 1, (asked + 1) % 10) <= 0.05
