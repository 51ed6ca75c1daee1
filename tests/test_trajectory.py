import math

import pytest
import torch
from torch import nn

from pid_diffusers import PIDScheduler, TrajectoryModel
from pid_diffusers.precision import Float32Conv2d, keep_output_in_float32


@pytest.mark.parametrize("timestep_type, scale", [("edm", 0.25), ("edm_scaled", 250.0)])
def test_trajectory_is_the_formula_written_by_hand(tiny_unet, noise, timestep_type, scale):
    unet, sigma = tiny_unet().double(), 3.0
    student = TrajectoryModel(unet, PIDScheduler(timestep_type=timestep_type, prediction_type="edm"))
    z = 80 * noise(2, 3, 8, 8, dtype=torch.float64)
    variance = 0.25 + 6400
    with torch.no_grad():
        output = unet(z / math.sqrt(variance), torch.tensor(scale * math.log(sigma), dtype=torch.float64)).sample
        clean = 0.25 / variance * z + 80 * 0.5 / math.sqrt(variance) * output
        x = student(z, sigma)
        torch.testing.assert_close(student.network_output(z, sigma), output, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x, sigma / 80 * z + (80 - sigma) / 80 * clean, rtol=1e-10, atol=1e-10)


def test_every_sample_has_its_own_noise_level_and_class(tiny_unet, noise):
    student = TrajectoryModel(tiny_unet(num_class_embeds=4).double(), PIDScheduler())
    z, labels = 80 * noise(3, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 0, 1])
    sigmas = torch.tensor([0.002, 1.0, 70.0], dtype=torch.float64)
    with torch.no_grad():
        together = student(z, sigmas, class_labels=labels)
        for i in range(3):
            alone = student(z[i : i + 1], sigmas[i], class_labels=labels[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-10, atol=1e-10)
        other = student(z, sigmas, class_labels=torch.tensor([2, 1, 3]))
    assert (together - other).abs().amax(dim=(1, 2, 3)).min() > 1e-6


def test_a_number_a_scalar_tensor_and_a_tensor_of_one_sigma_a_sample_agree(tiny_unet, noise):
    student, z = TrajectoryModel(tiny_unet(), PIDScheduler()), 80 * noise(2, 3, 8, 8)
    with torch.no_grad():
        x = student(z, 0.7)
        assert torch.equal(student(z, torch.tensor(0.7)), x)
        assert torch.equal(student(z, torch.full((2,), 0.7)), x)


def test_integer_noise_levels_are_not_rounded_against_T(tiny_unet, noise):
    student, z = TrajectoryModel(tiny_unet(), PIDScheduler(sigma_max=14.6146)), 14.6146 * noise(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(student(z, torch.tensor([3, 3])), student(z, 3.0))
        torch.testing.assert_close(student(z, 3), student(z, 3.0))


@pytest.mark.parametrize("network_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_results_have_the_type_of_z_whatever_the_network_has(tiny_unet, noise, dtype, network_dtype):
    student = TrajectoryModel(tiny_unet().to(network_dtype), PIDScheduler())
    z = (80 * noise(1, 3, 8, 8)).to(dtype)
    with torch.no_grad():
        assert student.network_output(z, 1.0).dtype == dtype
        assert student(z, 1.0).dtype == dtype


def test_weights_are_those_of_the_network_alone(tiny_unet):
    unet = tiny_unet()
    student = TrajectoryModel(unet, PIDScheduler())
    assert list(student.state_dict()) == [f"unet.{name}" for name in unet.state_dict()]


# A network's last layer in float32


class OneLayer(nn.Module):
    """All of this network is its last layer, so that any difference is that layer's."""

    def __init__(self):
        super().__init__()
        self.conv_out = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, sample):
        return self.conv_out(sample)


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_the_last_layer_loses_nothing_under_autocast(noise):
    network, sample = OneLayer(), noise(2, 4, 8, 8)
    exact = network(sample)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(sample)
        kept = keep_output_in_float32(network)(sample)
    assert rounded.dtype == torch.bfloat16
    assert difference(rounded, exact) > 1e-3
    assert kept.dtype == torch.float32
    assert torch.equal(kept, exact)


def test_a_unets_output_is_float32_under_autocast(tiny_unet, noise):
    sample, timestep = noise(2, 3, 8, 8), torch.tensor(0.5)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert tiny_unet()(sample, timestep).sample.dtype == torch.bfloat16
            output = keep_output_in_float32(tiny_unet())(sample, timestep).sample
        exact = tiny_unet()(sample, timestep).sample
    assert output.dtype == torch.float32
    assert not torch.equal(output, output.bfloat16().float())
    assert 0 < difference(output, exact) < 0.05  # the body does run in bfloat16


def test_autocast_is_as_it_was_after_the_last_layer(noise):
    network = keep_output_in_float32(OneLayer())
    with torch.autocast("cpu", torch.bfloat16):
        network(noise(1, 4, 8, 8))
        assert torch.is_autocast_enabled("cpu")


def test_names_and_values_of_the_weights_stay(tiny_unet):
    before = tiny_unet().state_dict()
    network = tiny_unet()
    assert keep_output_in_float32(network) is network
    assert isinstance(network.conv_out, Float32Conv2d)
    assert list(network.state_dict()) == list(before)
    assert all(torch.equal(weight, before[name]) for name, weight in network.state_dict().items())
    assert len(list(network.parameters())) == len(list(tiny_unet().parameters()))


def test_a_body_in_bfloat16_keeps_the_last_layers_weights_unrounded(tiny_unet, noise):
    before = tiny_unet().state_dict()
    network = keep_output_in_float32(tiny_unet(), torch.bfloat16)
    for name, weight in network.state_dict().items():
        if name.startswith("conv_out."):
            assert torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, before[name].bfloat16())
    student, z = TrajectoryModel(network, PIDScheduler()), 80 * noise(2, 3, 8, 8)
    with torch.no_grad():
        output = student.network_output(z, 0.5)
    assert output.dtype == torch.float32
    assert not torch.equal(output, output.bfloat16().float())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.003), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("embedding", ["positional", "fourier"])
def test_a_half_precision_body_is_told_the_noise_level_exactly(tiny_unet, noise, embedding, dtype, tolerance):
    network, sample = tiny_unet(time_embedding_type=embedding), noise(8, 3, 8, 8)
    half = keep_output_in_float32(tiny_unet(time_embedding_type=embedding), dtype)
    assert half.conv_in.weight.dtype == dtype
    with torch.no_grad():
        for sigma in (0.01, 0.5, 1300.0):
            output = half(sample.to(dtype), torch.tensor(sigma)).sample
            assert difference(output, network(sample, torch.tensor(sigma)).sample) < tolerance
        if embedding == "fourier":  # rounded frequencies cost several times as much
            output = network.to(dtype)(sample.to(dtype), torch.tensor(1300.0)).sample
            exact = tiny_unet(time_embedding_type=embedding)(sample, torch.tensor(1300.0)).sample
            assert difference(output, exact) > 2 * tolerance


def test_doing_it_twice_changes_nothing_more(tiny_unet):
    network = keep_output_in_float32(keep_output_in_float32(tiny_unet(), torch.bfloat16), torch.bfloat16)
    assert torch.equal(network.conv_out.weight, tiny_unet().conv_out.weight)
    assert network.conv_in.weight.dtype == torch.bfloat16


def test_gradients_reach_the_float32_layer_and_the_body(tiny_unet, noise):
    network = keep_output_in_float32(tiny_unet())
    with torch.autocast("cpu", torch.bfloat16):
        network(noise(1, 3, 8, 8), torch.tensor(0.5)).sample.square().mean().backward()
    for layer in (network.conv_in, network.conv_out):
        assert layer.weight.grad.dtype == torch.float32
        assert layer.weight.grad.abs().max() > 0
