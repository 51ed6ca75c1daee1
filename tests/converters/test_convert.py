"""Converted checkpoints compute what their sources do, and what is written is a whole teacher or student."""

import json
import math
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pid_diffusers import Denoiser, EDMDenoiser, InputError, OneStepPIDPipeline
from pid_diffusers.cli import main
from pid_diffusers.converters import convert, open_teacher
from pid_diffusers.training import Trainer, TrainingConfig

NETWORKS = Path(__file__).parent.parent / "data" / "edm_networks"
NAMES = ["ddpmpp_cond", "ncsnpp_uncond", "adm_cond"]


def denoised(folder: Path, expected: dict) -> torch.Tensor:
    pipe = DiffusionPipeline.from_pretrained(folder)
    teacher = EDMDenoiser(pipe.unet.double(), sigma_data=pipe.scheduler.config.sigma_data)
    condition = {}
    if "class_labels_one_hot" in expected:
        condition = {"class_labels": expected["class_labels_one_hot"].argmax(dim=1)}
    with torch.no_grad():
        return teacher(expected["x"], expected["sigma"], **condition)


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).norm() / expected.norm()).item()


def save(path: Path, weights: dict, **kwargs) -> Path:
    torch.save(weights, path, **kwargs)
    return path


# EDM


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_edms_weights_becomes_the_same_denoiser(name, tmp_path):
    report = convert(NETWORKS / name, tmp_path / "out")
    expected = load_file(NETWORKS / name / "expected.safetensors")
    assert relative(denoised(tmp_path / "out", expected), expected["denoised"]) < 1e-6
    assert report.family == "EDM" and report.image_size == 16 and report.channels == 3
    assert report.classes == (None if "uncond" in name else 10)


@pytest.mark.parametrize("name", NAMES)
def test_edms_pickle_becomes_the_same_denoiser(name, tmp_path, write_edm_pickle):
    report = convert(write_edm_pickle(tmp_path / "edm.pkl", name), tmp_path / "out")
    expected = load_file(NETWORKS / name / "expected.safetensors")
    assert relative(denoised(tmp_path / "out", expected), expected["denoised"]) < 1e-6
    assert report.license == "cc-by-nc-sa-4.0"
    assert report.architecture.startswith(
        {"d": "SongUNet (DDPM++)", "n": "SongUNet (NCSN++)", "a": "Dhariwal"}[name[0]]
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_bare_state_dict_tells_the_arguments_of_its_network(name, prefix, legacy, tmp_path, edm_network):
    weights = {prefix + key: tensor for key, tensor in edm_network(name)[1].items()}
    source = save(tmp_path / "edm.ckpt", weights, _use_new_zipfile_serialization=not legacy)
    convert(source, tmp_path / "out")
    convert(NETWORKS / name, tmp_path / "expected")
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert config == json.loads((tmp_path / "expected" / "unet" / "config.json").read_text())
    expected = load_file(tmp_path / "expected" / "unet" / "diffusion_pytorch_model.safetensors")
    result = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_what_the_arguments_leave_out_has_edms_defaults(tmp_path, edm_network):
    folder = tmp_path / "source"
    shutil.copytree(NETWORKS / "ddpmpp_cond", folder)
    kwargs, _ = edm_network("ddpmpp_cond")
    for name in ("precond", "embedding_type", "encoder_type", "decoder_type", "channel_mult_noise", "resample_filter"):
        del kwargs[name]
    (folder / "init_kwargs.json").write_text(json.dumps(kwargs))
    convert(folder, tmp_path / "out")
    expected = load_file(NETWORKS / "ddpmpp_cond" / "expected.safetensors")
    assert relative(denoised(tmp_path / "out", expected), expected["denoised"]) < 1e-6


def test_sigma_data_of_the_source_is_kept(tmp_path, write_edm_pickle):
    convert(write_edm_pickle(tmp_path / "edm.pkl", sigma_data=0.25), tmp_path / "out")
    scheduler = DiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config
    assert (scheduler.sigma_data, scheduler.sigma_min, scheduler.sigma_max) == (0.25, 0.002, 80.0)


@pytest.mark.parametrize("precond", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_other_preconditionings_are_named_and_refused(precond, tmp_path, write_edm_pickle):
    with pytest.raises(InputError, match=f"{precond}, whose noise levels .* are not supported; .*baseline-"):
        convert(write_edm_pickle(tmp_path / "edm.pkl", precond=precond), tmp_path / "out")


# OpenAI


class ReferenceUNet:
    """What guided-diffusion's UNetModel computes, directly from its state dict (Dhariwal & Nichol 2021)."""

    def __init__(self, weights: dict[str, torch.Tensor], head_channels: int = 64):
        self.weights, self.head_channels = weights, head_channels

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.weights

    def layer(self, function, name: str, x: torch.Tensor, **kwargs) -> torch.Tensor:
        return function(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **kwargs)

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def resnet(self, name: str, x: torch.Tensor, emb: torch.Tensor, resize=lambda x: x) -> torch.Tensor:
        h = self.layer(F.conv2d, f"{name}.in_layers.2", resize(F.silu(self.norm(f"{name}.in_layers.0", x))), padding=1)
        shift = self.layer(F.linear, f"{name}.emb_layers.1", F.silu(emb))[:, :, None, None]
        if shift.shape[1] == 2 * h.shape[1]:
            scale, shift = shift.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + shift)
        x = resize(x)
        if self.has(f"{name}.skip_connection"):
            x = self.layer(F.conv2d, f"{name}.skip_connection", x)
        return x + self.layer(F.conv2d, f"{name}.out_layers.3", F.silu(h), padding=1)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        batch, channels, height, width = x.shape
        qkv = self.layer(F.conv2d, f"{name}.qkv", self.norm(f"{name}.norm", x))
        q, k, v = qkv.reshape(batch, 3, -1, self.head_channels, height * width).unbind(dim=1)
        weights = (q.transpose(2, 3) @ k / math.sqrt(self.head_channels)).softmax(dim=-1)
        h = (v @ weights.transpose(2, 3)).reshape(x.shape)
        return x + self.layer(F.conv2d, f"{name}.proj_out", h)

    def block(self, name: str, x: torch.Tensor, emb: torch.Tensor, resize) -> torch.Tensor:
        """One block; its last residual block resizes if it is given how, and is not the first."""
        i = 0
        while any(key.startswith(f"{name}.{i}.") for key in self.weights):
            if self.has(f"{name}.{i}.qkv"):
                x = self.attention(f"{name}.{i}", x)
            elif self.has(f"{name}.{i}.conv"):
                x = self.layer(F.conv2d, f"{name}.{i}.conv", F.interpolate(x, scale_factor=2), padding=1)
            elif self.has(f"{name}.{i}.op"):
                x = self.layer(F.conv2d, f"{name}.{i}.op", x, padding=1, stride=2)
            else:
                x = self.resnet(
                    f"{name}.{i}", x, emb, resize if resize and (i > 0 or "input" in name) else lambda x: x
                )
            i += 1
        return x

    def __call__(self, x, timesteps, labels, layers: int) -> torch.Tensor:
        half = self.weights["time_embed.0.weight"].shape[1] // 2
        phases = timesteps[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=x.dtype) / half)
        emb = self.layer(F.linear, "time_embed.0", torch.cat([phases.cos(), phases.sin()], dim=1))
        emb = self.layer(F.linear, "time_embed.2", F.silu(emb))
        if labels is not None:
            emb = emb + self.weights["label_emb.weight"][labels]
        h = self.layer(F.conv2d, "input_blocks.0.0", x, padding=1)
        skips = [h]
        for i in range(1, 1 + max(int(n.split(".")[1]) for n in self.weights if n.startswith("input_blocks"))):
            halve = (lambda x: F.avg_pool2d(x, 2)) if i % (layers + 1) == 0 else None
            h = self.block(f"input_blocks.{i}", h, emb, halve)
            skips.append(h)
        h = self.resnet("middle_block.0", h, emb)
        h = self.resnet("middle_block.2", self.attention("middle_block.1", h), emb)
        for i in range(len(skips)):
            h = torch.cat([h, skips.pop()], dim=1)
            h = self.block(f"output_blocks.{i}", h, emb, lambda x: F.interpolate(x, scale_factor=2))
        return self.layer(F.conv2d, "out.2", F.silu(self.norm("out.0", h)), padding=1)


def openai_state_dict(
    mults: list[int], attention: list[bool], layers: int, classes: int | None, scale_shift: bool, by_convolution: bool
) -> dict[str, torch.Tensor]:
    """A state dict with guided-diffusion's names, in its order of blocks, of random weights of one size each."""
    generator, unit, weights = torch.Generator().manual_seed(0), 64, {}

    def add(name: str, *shape: int, bias: bool = True):
        fan_in = math.prod(shape[1:])
        weights[f"{name}.weight"] = torch.randn(*shape, generator=generator) / math.sqrt(fan_in)
        if len(shape) == 1:
            weights[f"{name}.weight"] = 1 + weights[f"{name}.weight"] / 10
        if bias:
            weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) / 10

    def resnet(name: str, before: int, after: int):
        add(f"{name}.in_layers.0", before)
        add(f"{name}.in_layers.2", after, before, 3, 3)
        add(f"{name}.emb_layers.1", (2 if scale_shift else 1) * after, 4 * unit)
        add(f"{name}.out_layers.0", after)
        add(f"{name}.out_layers.3", after, after, 3, 3)
        if before != after:
            add(f"{name}.skip_connection", after, before, 1, 1)

    def attend(name: str, channels: int):
        add(f"{name}.norm", channels)
        add(f"{name}.qkv", 3 * channels, channels, 1, 1)
        add(f"{name}.proj_out", channels, channels, 1, 1)

    add("time_embed.0", 4 * unit, unit)
    add("time_embed.2", 4 * unit, 4 * unit)
    if classes is not None:
        add("label_emb", classes, 4 * unit, bias=False)
    add("input_blocks.0.0", unit, 3, 3, 3)
    channels, skips, block = unit, [unit], 1
    for level, mult in enumerate(mults):
        for _ in range(layers):
            resnet(f"input_blocks.{block}.0", channels, unit * mult)
            channels = unit * mult
            if attention[level]:
                attend(f"input_blocks.{block}.1", channels)
            skips.append(channels)
            block += 1
        if level < len(mults) - 1:
            if by_convolution:
                add(f"input_blocks.{block}.0.op", channels, channels, 3, 3)
            else:
                resnet(f"input_blocks.{block}.0", channels, channels)
            skips.append(channels)
            block += 1
    resnet("middle_block.0", channels, channels)
    attend("middle_block.1", channels)
    resnet("middle_block.2", channels, channels)
    block = 0
    for level, mult in reversed(list(enumerate(mults))):
        for layer in range(layers + 1):
            resnet(f"output_blocks.{block}.0", channels + skips.pop(), unit * mult)
            channels = unit * mult
            if attention[level]:
                attend(f"output_blocks.{block}.1", channels)
            if level > 0 and layer == layers:
                name = f"output_blocks.{block}.{2 if attention[level] else 1}"
                if by_convolution:
                    add(f"{name}.conv", channels, channels, 3, 3)
                else:
                    resnet(name, channels, channels)
            block += 1
    add("out.0", channels)
    add("out.2", 3, channels, 3, 3)
    return weights


OPENAI = {
    "edm_imagenet64_ema.pt": ([1, 2, 3], [False, True, True], 2, 10, True, False),
    "cd_bedroom256_l2.pt": ([1, 1, 2, 2, 4, 4], [False, False, False, True, True, True], 1, None, False, False),
    "ct_imagenet64.pt": ([1, 2], [True, False], 1, None, True, True),
}


@pytest.mark.parametrize("name", OPENAI)
def test_openais_networks_become_the_same_unet(name, tmp_path, noise):
    mults, attention, layers, classes, *_ = OPENAI[name]
    weights = openai_state_dict(*OPENAI[name])
    report = convert(save(tmp_path / name, weights), tmp_path / "out")
    unet = UNet2DModel.from_pretrained(tmp_path / "out" / "unet").double()
    x, timesteps = noise(2, 3, 32, 32, dtype=torch.float64), torch.tensor([-200.0, 900.0], dtype=torch.float64)
    labels = None if classes is None else torch.tensor([0, classes - 1])
    expected = ReferenceUNet({key: w.double() for key, w in weights.items()})(x, timesteps, labels, layers)
    with torch.no_grad():
        assert relative(unet(x, timesteps, class_labels=labels).sample, expected) < 1e-5
    assert report.image_size == 32 << attention.index(True)
    assert report.license == "mit" and report.classes == classes
    assert (report.note is None) == name.startswith("edm")


def test_openais_teacher_is_told_250_times_ln_sigma_and_clamped_as_openais_sampler_does(tmp_path, noise):
    weights = openai_state_dict([1, 2], [False, True], 1, 10, True, False)
    convert(save(tmp_path / "edm_imagenet64_ema.pt", weights), tmp_path / "out", image_size=16)
    teacher = Denoiser.from_pretrained(tmp_path / "out")
    x, sigma, labels = 3 * noise(2, 3, 16, 16), torch.tensor([0.1, 20.0]), torch.tensor([3, 9])
    s = sigma.reshape(2, 1, 1, 1)
    output = ReferenceUNet(weights)(x / (s**2 + 0.25).sqrt(), 250 * sigma.log(), labels, 1)
    expected = 0.25 / (s**2 + 0.25) * x + 0.5 * s / (s**2 + 0.25).sqrt() * output
    with torch.no_grad():
        assert relative(teacher(x, sigma, class_labels=labels), expected.clamp(-1, 1)) < 1e-5
    assert teacher.sample_shape == (3, 16, 16)


def test_half_precision_and_views_of_one_storage_are_read(tmp_path):
    weights = openai_state_dict([1, 2], [False, True], 1, None, False, False)
    flat = torch.cat([w.flatten() for w in weights.values()]).half()
    views, begin = {}, 0
    for name, w in weights.items():
        views[name] = flat[begin : begin + w.numel()].view(w.shape)
        begin += w.numel()
    convert(save(tmp_path / "edm.pt", views), tmp_path / "out")
    result = load_file(tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(result["conv_in.weight"], weights["input_blocks.0.0.weight"].half().float())


# Students of PID's authors


@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_cond"])
@pytest.mark.parametrize("file", ["ema_0.99995_800000.pt", "model400000.pt"])
def test_the_authors_students_become_one_step_pipelines(name, file, tmp_path, edm_network, noise):
    weights = {key: w for key, w in edm_network(name)[1].items() if "map_augment" not in key}
    report = convert(save(tmp_path / file, weights), tmp_path / "out")
    convert(NETWORKS / name, tmp_path / "teacher")
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path / "out")
    network = DiffusionPipeline.from_pretrained(tmp_path / "teacher").unet
    latents, labels = noise(2, 3, 16, 16), torch.tensor([1, 8])
    with torch.no_grad():
        output = network(80 * latents / math.hypot(80, 0.5), torch.tensor(0.002).log() / 4, labels).sample
    expected = 0.002 / 80 * 80 * latents + (1 - 0.002 / 80) * output
    result = pipe(class_labels=labels, latents=latents, output_type="latent").images
    assert relative(result, expected) < 1e-5
    assert report.family == "PID student" and report.license == "cc-by-nc-sa-4.0"


def test_whether_it_is_a_student_can_be_said(tmp_path, edm_network):
    source = save(tmp_path / "ema_0.999_10.pt", edm_network("ddpmpp_cond")[1])
    assert convert(source, tmp_path / "a", student=False).pipeline == "ConsistencyModelPipeline"
    unet = save(tmp_path / "ema_0.9999_20.pt", openai_state_dict([1, 2], [False, True], 1, None, False, False))
    assert convert(unet, tmp_path / "b").pipeline == "ConsistencyModelPipeline"
    report = convert(unet, tmp_path / "c", student=True)
    assert report.pipeline == "OneStepPIDPipeline" and report.license is None
    scheduler = OneStepPIDPipeline.from_pretrained(tmp_path / "c").scheduler.config
    assert (scheduler.prediction_type, scheduler.timestep_type) == ("sample", "edm")


# What is written


def test_the_command_says_what_it_found(tmp_path, capsys, write_edm_pickle):
    source = write_edm_pickle(tmp_path / "edm.pkl")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for text in ("EDM, SongUNet (DDPM++), 374,979 parameters", "16 × 16, 3 channels, 10 classes", "cc-by-nc-sa-4.0"):
        assert text in said
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("kind", ["edm", "openai", "consistency", "student"])
def test_the_card_names_source_and_license(kind, tmp_path, edm_network, write_edm_pickle):
    file = {"edm": "edm.pkl", "openai": "edm_a.pt", "consistency": "cd_a.pt", "student": "pid_cifar.pt"}[kind]
    if kind == "edm":
        write_edm_pickle(tmp_path / file)
    elif kind == "student":
        save(tmp_path / file, edm_network("ddpmpp_cond")[1])
    else:
        save(tmp_path / file, openai_state_dict([1, 2], [False, True], 1, 10, True, False))
    convert(tmp_path / file, tmp_path / "out")
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert card.data.license == {"openai": "mit", "consistency": "mit"}.get(kind, "cc-by-nc-sa-4.0")
    assert f"from `{file}`" in card.content and str(tmp_path) not in card.content
    for text in ("{{", "{%", "None", "\n\n\n"):
        assert text not in card.content.split("## Citation")[0]
    assert ("not the expected image" in card.content) == (kind == "consistency")


@pytest.mark.parametrize("kind", ["edm", "openai", "consistency"])
def test_the_cards_code_runs(kind, tmp_path, monkeypatch, write_edm_pickle):
    if kind == "edm":
        source = write_edm_pickle(tmp_path / "edm.pkl", "adm_cond")
    else:
        weights = openai_state_dict([1, 2], [True, True], 1, 10, True, False)
        source = save(tmp_path / {"openai": "edm_a.pt", "consistency": "ct_a.pt"}[kind], weights)
    convert(source, tmp_path / "out", image_size=8)
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace("=35", "=2").replace("grid(40)", "grid(2)"), names)
    assert len(names["images"]) == 3


def test_a_license_that_is_given_goes_before_the_usual_one(tmp_path, write_edm_pickle):
    report = convert(write_edm_pickle(tmp_path / "mine.pkl"), tmp_path / "out", license="apache-2.0")
    assert report.license == "apache-2.0"
    assert ModelCard((tmp_path / "out" / "README.md").read_text()).data.license == "apache-2.0"


def test_only_safetensors_are_written(tmp_path, write_edm_pickle):
    convert(write_edm_pickle(tmp_path / "edm.pkl"), tmp_path / "out")
    suffixes = {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".md", ".safetensors", ".py"} and ".safetensors" in suffixes


def test_nothing_is_overwritten(tmp_path, edm_network):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="output is .*there already; pass a folder"):
        convert(NETWORKS / "ddpmpp_cond", folder)
    with pytest.raises(InputError, match="output is .*there already; pass a folder"):
        convert(NETWORKS / "ddpmpp_cond", folder / "mine.txt")
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    convert(NETWORKS / "ddpmpp_cond", tmp_path / "empty")
    assert (tmp_path / "empty" / "model_index.json").is_file()


def test_a_disk_that_is_full_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(InputError, match="output is .* cannot be written .*File too large"):
            convert(NETWORKS / "ddpmpp_cond", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


# What does not fit


def refused(source: Path, output: Path, sentence: str):
    with pytest.raises(InputError, match=sentence) as error:
        convert(source, output)
    assert "\n" not in str(error.value) and not output.exists()


def test_missing_unexpected_and_unfitting_weights_are_named(tmp_path, edm_network):
    _, weights = edm_network("ddpmpp_cond")
    for change, sentence in [
        ({"dec.8x8_in1.norm0.bias": None}, "has no dec.8x8_in1.norm0.bias"),
        ({"enc.extra.weight": torch.zeros(3)}, "has enc.extra.weight, for which"),
        ({"enc.8x8_block0.conv1.weight": torch.zeros(32, 32, 1, 1)}, r"shape \(32, 32, 1, 1\) for .*\(32, 32, 3, 3\)"),
    ]:
        changed = {key: w for key, w in {**weights, **change}.items() if w is not None}
        refused(save(tmp_path / "edm.pt", changed), tmp_path / "out", sentence)
    weights = openai_state_dict([1, 2], [False, True], 1, None, False, False)
    for change, sentence in [
        ({"middle_block.1.norm.bias": None}, "has no parameter middle_block.1.norm.bias"),
        ({"extra.weight": torch.zeros(3)}, "has a parameter extra.weight, for which"),
        ({"out.0.bias": torch.zeros(3)}, r"shape \(3,\) for conv_norm_out.bias .*\(64,\)"),
        ({"out.2.weight": torch.zeros(6, 64, 3, 3)}, "6 output channels .* learned variances"),
        ({"output_blocks.0.2.in_layers.0.weight": torch.zeros(128)}, "differ in their number of blocks"),
        ({"time_embed.0.weight": torch.zeros(256, 32)}, "UNet2DModel cannot be"),
    ]:
        changed = {key: w for key, w in {**weights, **change}.items() if w is not None}
        refused(save(tmp_path / "cd.pt", changed), tmp_path / "out", sentence)


def test_arguments_that_no_network_has_are_named(tmp_path, edm_network):
    kwargs, weights = edm_network("ddpmpp_cond")
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    for change, sentence in [
        ({"model_type": "MyUNet"}, "network of type 'MyUNet'"),
        ({"precond": "VEPrecond"}, "VEPrecond"),
        ({"precond": 3}, "preconditioning 3"),
        ({"num_blocks": 10**9}, "argument num_blocks is 1000000000"),
        ({"channel_mult": [2] * 1000}, "argument channel_mult is a list"),
        ({"img_resolution": None}, "argument img_resolution is None"),
        ({"model_channels": 1000}, "cannot be"),
        ({"model_channels": 2**19}, "has weights of shape"),
        ({"embedding_type": ["fourier"]}, "argument embedding_type is a list"),
        ({"attn_resolutions": "8"}, "argument attn_resolutions is '8'"),
        ({"colour": "red"}, "init_kwargs has colour"),
    ]:
        (folder / "init_kwargs.json").write_text(json.dumps({**kwargs, **change}))
        refused(folder, tmp_path / "out", sentence)


def test_weights_that_are_not_finite_are_refused(tmp_path, edm_network):
    _, weights = edm_network("ddpmpp_cond")
    weights["map_layer0.bias"][0] = math.nan
    refused(save(tmp_path / "edm.pt", weights), tmp_path / "out", "map_layer0.bias that are not finite")


def test_folders_that_hold_no_network_are_refused(tmp_path, edm_network):
    kwargs, weights = edm_network("ddpmpp_cond")
    refused(tmp_path, tmp_path / "out", "is a folder without model.safetensors")
    save_file(weights, tmp_path / "model.safetensors")
    refused(tmp_path, tmp_path / "out", "is a folder without init_kwargs.json")
    (tmp_path / "init_kwargs.json").write_text("[" * 100_000)
    refused(tmp_path, tmp_path / "out", "no JSON")
    (tmp_path / "init_kwargs.json").write_text("[]")
    refused(tmp_path, tmp_path / "out", "no JSON object")
    (tmp_path / "init_kwargs.json").write_text(json.dumps(kwargs))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-1])
    refused(tmp_path, tmp_path / "out", "cut short or damaged")
    (tmp_path / "model_index.json").write_text("{}")
    refused(tmp_path, tmp_path / "out", "is a diffusers pipeline already; use it as it is")


def test_other_checkpoints_are_no_known_architecture(tmp_path):
    refused(
        save(tmp_path / "a.pt", {"conv1.weight": torch.ones(3)}), tmp_path / "out", "first parameter is conv1.weight"
    )
    refused(save(tmp_path / "b.pt", {"state": {}, "step": 3}), tmp_path / "out", "holds no network of EDM")
    refused(save(tmp_path / "c.pt", [torch.ones(3)]), tmp_path / "out", "holds no network of EDM")


def test_openais_file_is_distilled_as_it_is(tmp_path):
    path = save(tmp_path / "edm_tiny_ema.pt", openai_state_dict([1, 2], [True, False], 1, 10, True, False))
    settings = {"teacher": str(path), "output_dir": str(tmp_path / "student"), "report_to": "none"}
    config = TrainingConfig(**settings, max_train_steps=2, train_batch_size=1).validate()
    with open_teacher(config.teacher) as (folder, found):
        assert "OpenAI" in found
        Trainer(config, folder).train()
    pipe = OneStepPIDPipeline.from_pretrained(tmp_path / "student")
    assert pipe.scheduler.config.timestep_type == "edm_scaled"
    assert pipe(class_labels=[3], output_type="pt").images.shape == (1, 3, 32, 32)
