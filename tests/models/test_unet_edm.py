"""EDM's networks in diffusers' form, against the outputs of the networks whose weights they take."""

import copy
import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from pid_diffusers import ADMUNet2DModel, EDMDenoiser, EDMUNet2DModel, OneStepPIDPipeline, PIDScheduler
from pid_diffusers.models import unet_edm
from pid_diffusers.models.edm_weights import (
    adm_class,
    adm_config,
    convert_adm_state_dict,
    convert_song_state_dict,
    song_config,
)
from pid_diffusers.precision import keep_output_in_float32

REFERENCES = Path(__file__).parent.parent / "data" / "edm_networks"
SONG = ("ddpmpp_cond", "ncsnpp_uncond")
ALL = (*SONG, "adm_cond")
SMALL = {
    "sample_size": 8,
    "num_class_embeds": 3,
    "augment_dim": 2,
    "model_channels": 16,
    "channel_mult": (1, 2),
    "num_blocks": 1,
    "attn_resolutions": (4,),
}


def read(name: str) -> tuple[dict, dict, dict]:
    """The arguments, weights and outputs of a reference."""
    folder = REFERENCES / name
    arguments = json.loads((folder / "init_kwargs.json").read_text())
    return arguments, load_file(folder / "model.safetensors"), load_file(folder / "expected.safetensors")


def create(name: str):
    """A reference as a model."""
    arguments, weights, _ = read(name)
    if name == "adm_cond":
        config = adm_config(arguments)
        network, weights = adm_class(config)(**config), convert_adm_state_dict(weights, config)
    else:
        config = song_config(arguments)
        network, weights = EDMUNet2DModel(**config), convert_song_state_dict(weights, config)
    network.load_state_dict(weights)
    return network.eval()


def condition_of(expected: dict) -> dict:
    """Labels as integers, if there are any."""
    one_hot = expected.get("class_labels_one_hot")
    return {} if one_hot is None else {"class_labels": one_hot.argmax(dim=1)}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """What a reference network was called with: c_in(σ) x, c_noise(σ) and labels."""
    _, _, expected = read(name)
    x, sigma = expected["x"].to(dtype), expected["sigma"].to(dtype)
    return x / (sigma**2 + 0.25).sqrt()[:, None, None, None], sigma.log() / 4, condition_of(expected)


def shaken(network: torch.nn.Module, scale: float = 0.05) -> torch.nn.Module:
    """The network with weights that let everything through, which the initial ones do not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return network


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


# --- agreement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", ALL)
def test_a_network_and_its_denoiser_agree_with_the_reference(name, dtype, tolerance):
    _, _, expected = read(name)
    network = create(name).to(dtype)
    sample, timestep, condition = inputs(name, dtype)
    x, sigma = expected["x"].to(dtype), expected["sigma"].to(dtype)
    with torch.no_grad():
        output = network(sample, timestep, **condition).sample
        denoised = EDMDenoiser(network)(x, sigma, **condition)
    assert output.dtype == denoised.dtype == dtype
    assert distance(output, expected["network_output"]) < tolerance
    assert distance(denoised, expected["denoised"]) < tolerance


def test_an_adm_network_of_128_channels_is_a_plain_unet():
    arguments = {"img_resolution": 4, "img_channels": 3, "label_dim": 2, "model_channels": 128, "num_blocks": 1}
    config = adm_config({**arguments, "channel_mult": [1, 2], "attn_resolutions": [2]})
    assert adm_class(config) is UNet2DModel
    plain = shaken(UNet2DModel(**config)).eval()
    narrow = ADMUNet2DModel(**config).eval()
    narrow.load_state_dict(plain.state_dict())
    sample, timestep, labels = torch.randn(2, 3, 4, 4), torch.tensor([-1.5, 1.0]), torch.tensor([0, 1])
    with torch.no_grad():
        assert distance(narrow(sample, timestep, labels).sample, plain(sample, timestep, labels).sample) < 1e-5


def test_a_narrower_one_is_not():
    arguments, weights, expected = read("adm_cond")
    config = adm_config(arguments)
    plain = UNet2DModel(**config).eval()
    plain.load_state_dict(convert_adm_state_dict(weights, config))
    sample, timestep, condition = inputs("adm_cond")
    with torch.no_grad():
        assert distance(plain(sample, timestep, **condition).sample, expected["network_output"]) > 0.1
    assert adm_class(config) is ADMUNet2DModel


def test_the_rows_of_attention_are_sorted_by_head(noise):
    channels, heads = 128, 2
    shapes = {"qkv.weight": (3 * channels, channels, 1, 1), "qkv.bias": (3 * channels,)}
    shapes |= {"proj.weight": (channels, channels, 1, 1), "proj.bias": (channels,)}
    shapes |= {"norm2.weight": (channels,), "norm2.bias": (channels,)}
    arguments = {"img_resolution": 4, "img_channels": 3, "model_channels": 128, "num_blocks": 1}
    config = adm_config({**arguments, "channel_mult": [1], "attn_resolutions": [4]})
    block = "enc.4x4_block0"
    source = {f"{block}.{name}": noise(*shape, seed=i) / 8 for i, (name, shape) in enumerate(shapes.items())}
    network = UNet2DModel(**config).eval()
    names = source_names_of(network, config)
    converted = convert_adm_state_dict({**names, **source}, config)
    network.load_state_dict(converted)
    features = noise(2, channels, 4, 4)
    with torch.no_grad():
        result = network.down_blocks[0].attentions[0](features)
        weights = {name: source[f"{block}.{name}"] for name in shapes}
        normed = torch.group_norm(features, 32, weights["norm2.weight"], weights["norm2.bias"], 1e-5)
        mixed = torch.conv2d(normed, weights["qkv.weight"], weights["qkv.bias"])
        q, k, v = mixed.reshape(2 * heads, channels // heads, 3, 16).unbind(2)
        attention = torch.einsum("ncq,nck->nqk", q, k / math.sqrt(channels // heads)).softmax(2)
        mixed = torch.einsum("nqk,nck->ncq", attention, v).reshape(2, channels, 4, 4)
        expected = features + torch.conv2d(mixed, weights["proj.weight"], weights["proj.bias"])
    assert distance(result, expected) < 1e-5


def source_names_of(network: torch.nn.Module, config: dict) -> dict[str, torch.Tensor]:
    """Weights by ADM's names that convert to the shapes of a network of one resolution without classes."""
    width, wide = config["block_out_channels"][0], 2 * config["block_out_channels"][0]
    weights = {}

    def layer(name: str, *shape: int):
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.zeros(shape), torch.zeros(shape[0])

    def block(name: str, before: int, attention: bool):
        layer(f"{name}.norm0", before)
        layer(f"{name}.conv0", width, before, 3, 3)
        layer(f"{name}.affine", 2 * width, 4 * width)
        layer(f"{name}.norm1", width)
        layer(f"{name}.conv1", width, width, 3, 3)
        if before != width:
            layer(f"{name}.skip", width, before, 1, 1)
        if attention:
            layer(f"{name}.norm2", width)
            layer(f"{name}.qkv", 3 * width, width, 1, 1)
            layer(f"{name}.proj", width, width, 1, 1)

    layer("map_layer0", 4 * width, width)
    layer("map_layer1", 4 * width, 4 * width)
    layer("enc.4x4_conv", width, 3, 3, 3)
    block("enc.4x4_block0", width, True)
    block("dec.4x4_in0", width, True)
    block("dec.4x4_in1", width, False)
    block("dec.4x4_block0", wide, True)
    block("dec.4x4_block1", wide, True)
    layer("out_norm", width)
    layer("out_conv", 3, width, 3, 3)
    return weights


@pytest.mark.parametrize("name", ALL)
def test_weights_that_do_not_fit_are_named(name):
    arguments, weights, _ = read(name)
    convert = convert_adm_state_dict if name == "adm_cond" else convert_song_state_dict
    config = (adm_config if name == "adm_cond" else song_config)(arguments)
    with pytest.raises(ValueError, match="no dec.8x8_in0.qkv.weight;"):
        convert({k: v for k, v in weights.items() if k != "dec.8x8_in0.qkv.weight"}, config)
    with pytest.raises(ValueError, match="has enc.8x8_block7.norm0.bias, for which"):
        convert({**weights, "enc.8x8_block7.norm0.bias": torch.zeros(1)}, config)


@pytest.mark.parametrize("create_config", [song_config, adm_config])
def test_arguments_that_do_not_fit_are_named(create_config):
    arguments, _, _ = read("adm_cond")
    with pytest.raises(ValueError, match="has num_heads, which is no argument"):
        create_config({**arguments, "num_heads": 4})
    with pytest.raises(ValueError, match="has no img_resolution"):
        create_config({k: v for k, v in arguments.items() if k != "img_resolution"})


@pytest.mark.parametrize("change", [{"channel_mult": [2, 4]}, {"model_channels": 48}])
def test_an_adm_network_that_is_no_unet_of_diffusers_is_refused(change):
    arguments, _, _ = read("adm_cond")
    with pytest.raises(ValueError, match="UNet2DModel"):
        adm_config({**arguments, **change})


def test_what_is_left_out_of_the_arguments_has_the_default_of_the_source():
    config = song_config({"img_resolution": 32, "img_channels": 3})
    assert config["num_class_embeds"] is None
    assert config["channel_mult"] == [1, 2, 2, 2]
    defaults = dict(EDMUNet2DModel(sample_size=32, num_blocks=1, model_channels=32).config)
    same = {k: list(v) if isinstance(v, tuple) else v for k, v in defaults.items() if k in config}
    assert config == {**same, "num_blocks": 4, "model_channels": 128}


# --- conditions and arguments ----------------------------------------------------------------------------------------


def test_classes_as_integers_and_as_one_hot_vectors_agree():
    network = create("ddpmpp_cond")
    sample, timestep, condition = inputs("ddpmpp_cond")
    labels = condition["class_labels"]
    with torch.no_grad():
        output = network(sample, timestep, labels).sample
        one_hot = network(sample, timestep, torch.nn.functional.one_hot(labels, 10).float()).sample
        none = network(sample, timestep, torch.zeros(4, 10)).sample
    assert torch.equal(output, one_hot)
    assert distance(none, output) > 1e-3


def test_a_timestep_may_be_a_number_or_a_tensor_of_one_or_of_one_an_image():
    network = create("ncsnpp_uncond")
    sample, _, _ = inputs("ncsnpp_uncond")
    with torch.no_grad():
        output = network(sample, 0.25).sample
        for shape in ((), (1,), (4,)):
            assert torch.equal(network(sample, torch.full(shape, 0.25)).sample, output)
        timesteps = torch.tensor([0.25, -1.0, 0.5, 1.0])
        mixed = network(sample, timesteps, return_dict=False)[0]
    assert distance(mixed[:1], output[:1]) < 1e-6
    assert distance(mixed[1:2], output[1:2]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.long])
@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_cond"])
def test_the_type_of_a_timestep_does_not_matter(name, dtype):
    network = create(name)
    sample, _, condition = inputs(name)
    with torch.no_grad():
        output = network(sample, torch.tensor(1.0), **condition).sample
        again = network(sample, torch.tensor(1, dtype=dtype), **condition).sample
    assert distance(again, output) < 1e-5


def test_augmentation_labels_of_zero_mean_none():
    network = create("ddpmpp_cond")
    sample, timestep, condition = inputs("ddpmpp_cond")
    with torch.no_grad():
        output = network(sample, timestep, **condition).sample
        assert torch.equal(network(sample, timestep, **condition, augment_labels=torch.zeros(4, 9)).sample, output)
        other = network(sample, timestep, **condition, augment_labels=torch.ones(4, 9)).sample
    assert distance(other, output) > 1e-3


@pytest.mark.parametrize("withheld", [0.0, 0.5])
def test_classes_are_withheld_in_training_alone(withheld):
    torch.manual_seed(0)
    network = shaken(EDMUNet2DModel(**{**SMALL, "label_dropout": withheld, "dropout": 0.0}))
    sample, labels = torch.randn(1, 3, 8, 8).expand(64, -1, -1, -1), torch.ones(64, dtype=torch.long)
    with torch.no_grad():
        spread = [network.train(training)(sample, 0.3, labels).sample.std(dim=0).max() for training in (True, False)]
    assert spread[1] < 1e-5
    assert (spread[0] > 1e-3) == (withheld > 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"sample": torch.zeros(2, 3, 8, 16)}, r"sample has shape \(2, 3, 8, 16\); .* \(B, 3, 8, 8\)"),
        ({"sample": torch.zeros(2, 3, 16, 16)}, "takes images of"),
        ({"sample": torch.zeros(2, 1, 8, 8)}, "takes images of"),
        ({"sample": torch.zeros(3, 8, 8)}, "takes images of"),
        ({"sample": torch.tensor(0.0)}, "takes images of"),
        ({"timestep": torch.zeros(3)}, r"timestep has shape \(3,\); .* 2 images"),
        ({"timestep": torch.zeros(2, 1)}, "timestep has shape"),
        ({"class_labels": None}, "class_labels is missing; pass integers from 0 to 2"),
        ({"class_labels": torch.tensor([0, 3])}, r"class_labels is \[0, 3\]; .* classes 0 to 2"),
        ({"class_labels": torch.tensor([-1, 0])}, "knows the classes 0 to 2"),
        ({"class_labels": torch.tensor([0])}, "class_labels has shape"),
        ({"class_labels": torch.tensor([0.0, 1.0])}, "type torch.float32; pass integers"),
        ({"class_labels": torch.tensor([True, False])}, "pass integers"),
        ({"class_labels": torch.zeros(2, 4)}, r"one-hot vectors of shape \(2, 3\)"),
        ({"augment_labels": torch.zeros(2, 9)}, r"augment_labels has shape \(2, 9\); pass \(2, 2\)"),
    ],
)
def test_wrong_input_gets_a_sentence(arguments, message):
    network = EDMUNet2DModel(**SMALL)
    right = {"sample": torch.zeros(2, 3, 8, 8), "timestep": 0.0, "class_labels": torch.tensor([0, 2])}
    assert network(**right).sample.shape == (2, 3, 8, 8)
    with pytest.raises(ValueError, match=message):
        network(**{**right, **arguments})


def test_an_unconditional_network_takes_no_labels():
    network = EDMUNet2DModel(**{**SMALL, "num_class_embeds": None, "augment_dim": 0})
    sample = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match="this network is unconditional"):
        network(sample, 0.0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="this network knows none"):
        network(sample, 0.0, augment_labels=torch.zeros(2, 9))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 0}, "sample_size is 0"),
        ({"sample_size": (8, 8)}, "sample_size is"),
        ({"sample_size": 7}, "cannot be halved 1 times"),
        ({"num_class_embeds": 0}, "num_class_embeds is 0"),
        ({"augment_dim": -1}, "augment_dim is -1"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"channel_mult": ()}, r"channel_mult is \(\)"),
        ({"channel_mult": (1, 1.5)}, "channel_mult is"),
        ({"model_channels": 2}, "a layer of 2 channels"),
        ({"model_channels": 5}, "pass an even number"),
        ({"model_channels": 150}, "a layer of 150 channels"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"label_dropout": -0.1}, "label_dropout is -0.1"),
        ({"embedding_type": "learned"}, "embedding_type is 'learned'; choose one of positional, fourier"),
        ({"encoder_type": "none"}, "encoder_type is"),
        ({"decoder_type": "residual"}, "decoder_type is"),
        ({"resample_filter": (1, 2, 1)}, "even number of weights"),
        ({"resample_filter": (1, -1)}, "whose sum is not 0"),
    ],
)
def test_a_wrong_configuration_gets_a_sentence(config, message):
    with pytest.raises(ValueError, match=message):
        EDMUNet2DModel(**{**SMALL, **config})


# --- training and precision ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder_type", ["standard", "skip"])
@pytest.mark.parametrize("encoder_type", ["standard", "skip", "residual"])
def test_every_weight_takes_part_in_every_kind_of_network(encoder_type, decoder_type):
    kinds = {"encoder_type": encoder_type, "decoder_type": decoder_type, "resample_filter": (1, 3, 3, 1)}
    network = shaken(EDMUNet2DModel(**SMALL, **kinds, embedding_type="fourier", channel_mult_noise=2))
    network(torch.randn(2, 3, 8, 8), 0.3, torch.tensor([0, 2])).sample.square().mean().backward()
    # augmentation labels of zero leave a gradient of zero, which is not the same as none
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    zero = [name for name, parameter in network.named_parameters() if not parameter.grad.any()]
    assert missing == []
    assert zero == ["augment_embedding.weight"]


def test_a_new_network_begins_near_zero_and_passes_its_input_on():
    torch.manual_seed(0)
    network = EDMUNet2DModel(**SMALL).eval()
    with torch.no_grad():
        output = network(torch.randn(2, 3, 8, 8), 0.3, torch.tensor([0, 2])).sample
    assert 0 < output.abs().max() < 1e-3


@pytest.mark.parametrize("name", SONG)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    sample, timestep, condition = inputs(name)
    gradients, remembered = [], []
    for checkpointing in (False, True):
        network = create(name).train()
        for module in network.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            network.enable_gradient_checkpointing()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            loss = network(sample, timestep, **condition).sample.square().mean()
        loss.backward()
        remembered.append(sum(sizes))
        gradients.append({key: parameter.grad for key, parameter in network.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-5, atol=1e-8)
    assert remembered[1] < remembered[0] / 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_is_near(name, dtype, tolerance):
    _, _, expected = read(name)
    sample, timestep, condition = inputs(name)
    network = create(name).to(dtype)
    with torch.no_grad():
        output = network(sample.to(dtype), timestep, **condition).sample
    assert output.dtype == dtype
    assert distance(output, expected["network_output"]) < tolerance


@pytest.mark.parametrize("name", SONG)
def test_half_precision_stays_finite_for_large_input(name):
    network = create(name).half()
    sample, timestep, condition = inputs(name)
    with torch.no_grad():
        output = network((1000 * sample).half(), timestep, **condition).sample
    assert output.isfinite().all()


@pytest.mark.parametrize("name", SONG)
def test_the_body_may_be_half_and_the_output_float32(name):
    _, _, expected = read(name)
    sample, timestep, condition = inputs(name)
    network = keep_output_in_float32(create(name), body_dtype=torch.bfloat16)
    with torch.no_grad():
        output = network(sample.bfloat16(), timestep, **condition).sample
    assert (output.dtype, network.dtype) == (torch.float32, torch.bfloat16)
    assert distance(output, expected["network_output"]) < 0.06


def test_the_parts_of_the_output_are_float32_where_every_resolution_adds_one():
    network = shaken(EDMUNet2DModel(**SMALL, decoder_type="skip")).eval()
    sample, labels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 2])
    with torch.no_grad():
        exact = network(sample, 0.3, labels).sample
        half = keep_output_in_float32(copy.deepcopy(network), body_dtype=torch.bfloat16)
        parts = []
        for block in half.up_blocks[:-1]:
            block.image_conv.register_forward_hook(lambda module, inputs, output: parts.append(output.dtype))
        outputs = [half(sample.bfloat16(), 0.3, labels).sample]
        half = keep_output_in_float32(network)
        for block in half.up_blocks[:-1]:
            block.image_conv.register_forward_hook(lambda module, inputs, output: parts.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(half(sample, 0.3, labels).sample)
    assert parts == [torch.float32] * 2  # one resolution below the highest, in two calls
    for output in outputs:
        assert output.dtype == torch.float32 and not torch.equal(output, output.bfloat16().float())
        assert distance(output, exact) < 0.06


def test_fourier_frequencies_are_never_rounded_to_half_precision(tmp_path):
    network = create("ncsnpp_uncond")
    frequencies = read("ncsnpp_uncond")[1]["map_noise.freqs"]
    timesteps = torch.tensor([-1.5, 0.3])
    waves = network.time_proj(timesteps)
    phases = 2 * math.pi * timesteps[:, None] * frequencies
    torch.testing.assert_close(waves, torch.cat([phases.sin(), phases.cos()], dim=1), rtol=0, atol=1e-4)
    assert torch.equal(network.half().time_proj(timesteps), waves)
    network.save_pretrained(tmp_path, variant="fp16")
    for dtype in (torch.float16, torch.bfloat16):
        for low_cpu_mem_usage in (False, True):
            load = {"variant": "fp16", "torch_dtype": dtype, "low_cpu_mem_usage": low_cpu_mem_usage}
            loaded = EDMUNet2DModel.from_pretrained(tmp_path, **load)
            assert loaded.dtype == dtype
            assert torch.equal(loaded.time_proj(timesteps), waves)


class Calls(TorchFunctionMode):
    """Counts the calls of torch's attention."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.nn.functional.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ALL)
def test_attention_is_that_of_torch(name):
    network = create(name)
    sample, timestep, condition = inputs(name)
    with torch.no_grad(), Calls() as calls:
        network(sample, timestep, **condition)
    assert calls.count == sum(isinstance(module, Attention) for module in network.modules()) > 1


@pytest.mark.parametrize("encoder_type", ["standard", "residual"])
def test_it_compiles_without_graph_breaks(encoder_type):
    torch.compiler.reset()
    network = shaken(EDMUNet2DModel(**SMALL, encoder_type=encoder_type, decoder_type="skip")).eval()
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    sample, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        for timestep in (torch.tensor([-1.0, 0.5]), 0.25):
            output = compiled(sample, timestep, labels).sample
            assert distance(output, network(sample, timestep, labels).sample) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", SONG)
def test_it_compiles_without_graph_breaks_for_training(name, checkpointing):
    torch.compiler.reset()
    sample, timestep, condition = inputs(name)
    network = create(name)
    if checkpointing:
        network.enable_gradient_checkpointing()
    output = network(sample, timestep, **condition).sample
    output.square().mean().backward()
    gradient = network.conv_in.weight.grad.clone()
    network.zero_grad()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    again = compiled(sample, timestep, **condition).sample
    again.square().mean().backward()
    assert distance(again.detach(), output.detach()) < 1e-5
    assert distance(network.conv_in.weight.grad, gradient) < 1e-4


# --- saving and loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_what_is_saved_loads_again_bit_for_bit_and_carries_its_source(name, tmp_path):
    network = create(name)
    sample, timestep, condition = inputs(name)
    network.save_pretrained(tmp_path / "once")
    again = type(network).from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    for folder in ("once", "twice"):
        loaded = type(network).from_pretrained(tmp_path / folder)
        assert {k: v for k, v in loaded.config.items() if k[0] != "_"} == json.loads(
            json.dumps({k: v for k, v in network.config.items() if k[0] != "_"})
        )
        with torch.no_grad():
            output = loaded(sample, timestep, **condition).sample
            assert torch.equal(output, network(sample, timestep, **condition).sample)
        assert (tmp_path / folder / "pid_diffusers.py").read_text() == Path(unet_edm.__file__).read_text()


@pytest.mark.parametrize("name", ALL)
def test_a_variant_of_a_pipeline_is_saved_by_its_name(name, tmp_path):
    pipe = OneStepPIDPipeline(create(name).half(), PIDScheduler())
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").exists()
    loaded = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16


def test_a_subclass_is_saved_without_this_source(tmp_path):
    class MyUNet(EDMUNet2DModel):
        pass

    MyUNet(**SMALL).save_pretrained(tmp_path)
    assert not (tmp_path / "pid_diffusers.py").exists()


SCRIPT = """
import hashlib, importlib.util, json, sys, torch
from diffusers import DiffusionPipeline
torch.set_num_threads(1)
assert importlib.util.find_spec("pid_diffusers") is None
found = {}
for folder in sys.argv[1:]:
    try:
        DiffusionPipeline.from_pretrained(folder)
        found[folder] = "loaded without trust"
        continue
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.save_pretrained(folder + "-again")
    pipe = DiffusionPipeline.from_pretrained(folder + "-again", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipe(batch_size=2, generator=generator, output_type="np", **json.loads(sys.stdin.readline())).images
    found[folder] = hashlib.sha256(images.tobytes()).hexdigest()
print(json.dumps(found))
"""


def test_pipelines_load_by_the_package_and_without_it_by_their_own_files(tmp_path, python_without_package):
    digests, labels = {}, []
    for name in ALL:
        condition = {"class_labels": [1, 2]} if name != "ncsnpp_uncond" else {}
        for pipe in (
            OneStepPIDPipeline(create(name), PIDScheduler()),
            ConsistencyModelPipeline(create(name), EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5)),
        ):
            folder = str(tmp_path / f"{name}-{type(pipe).__name__}")
            pipe.save_pretrained(folder)
            index = json.loads((Path(folder) / "model_index.json").read_text())
            assert index["unet"] == ["pid_diffusers", type(pipe.unet).__name__]
            loaded = DiffusionPipeline.from_pretrained(folder)
            assert type(loaded.unet) is type(pipe.unet)
            loaded.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(0)
            images = loaded(batch_size=2, generator=generator, output_type="np", **condition).images
            digests[folder] = hashlib.sha256(images.tobytes()).hexdigest()
            labels.append(json.dumps(condition))
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [python_without_package, "-c", SCRIPT, *digests],
        input="\n".join(labels),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == digests


def test_the_file_that_travels_imports_only_torch_and_diffusers():
    lines = Path(unet_edm.__file__).read_text().splitlines()
    roots = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert roots - set(sys.stdlib_module_names) == {"torch", "diffusers"}
