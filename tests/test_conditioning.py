"""What a network is told: conditions in the arguments that the networks of diffusers take."""

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline
from tiny_text import tiny_conditional_unet, tiny_sdxl
from torch import nn

from pid_diffusers import PIDScheduler, TrajectoryModel
from pid_diffusers.adapters import add_guidance_embedding
from pid_diffusers.conditioning import network_arguments


class Wrapper(nn.Module):
    """What DistributedDataParallel is to a network: it has its weights, but neither its configuration nor its type."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.fixture
def unet():
    return tiny_conditional_unet()


def test_classes_and_embeddings_are_passed_on(unet, noise):
    labels, embeddings = torch.tensor([3, 1]), noise(2, 5, 16)
    arguments = network_arguments(unet, {"class_labels": labels, "encoder_hidden_states": embeddings})
    assert set(arguments) == {"class_labels", "encoder_hidden_states"}
    assert arguments["class_labels"] is labels and torch.equal(arguments["encoder_hidden_states"], embeddings)
    assert network_arguments(unet, {}) == {}


def test_what_only_sdxl_has_is_an_added_condition(noise):
    unet = tiny_sdxl().unet
    condition = {"encoder_hidden_states": noise(2, 5, 40), "text_embeds": noise(2, 24), "time_ids": torch.ones(2, 6)}
    arguments = network_arguments(unet, condition)
    assert set(arguments) == {"encoder_hidden_states", "added_cond_kwargs"}
    assert set(arguments["added_cond_kwargs"]) == {"text_embeds", "time_ids"}
    assert unet(noise(2, 4, 8, 8), 3, **arguments).sample.isfinite().all()
    assert set(condition) == {"encoder_hidden_states", "text_embeds", "time_ids"}  # the caller's own is as it was


def test_w_is_embedded_as_latent_consistency_models_do(unet):
    scale = torch.tensor([1.0, 1.5, 7.5, 14.0])
    add_guidance_embedding(unet)
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale - 1, embedding_dim=256)
    embedding = network_arguments(unet, {"guidance_scale": scale})["timestep_cond"]
    assert embedding.shape == (4, 256) and embedding.dtype == torch.float32
    # phases of up to 13,000, of which float32 keeps 1e-3
    torch.testing.assert_close(embedding, expected, rtol=0, atol=2e-3)
    exact = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, scale.double() - 1, 256, torch.float64)
    torch.testing.assert_close(embedding.double(), exact, rtol=0, atol=2e-3)
    assert PIDScheduler.guidance_embedding(scale, 32).shape == (4, 32)


def test_a_network_that_is_not_told_w_gets_none(unet):
    assert network_arguments(unet, {"guidance_scale": torch.ones(2)}) == {}
    assert network_arguments(nn.Linear(1, 1), {"guidance_scale": torch.ones(2)}) == {}


def test_a_wrapped_network_is_told_the_same(unet, noise):
    add_guidance_embedding(unet)
    condition = {"encoder_hidden_states": noise(2, 5, 16), "guidance_scale": torch.tensor([2.0, 3.0])}
    plain, wrapped = network_arguments(unet, condition), network_arguments(Wrapper(unet), condition)
    assert set(plain) == set(wrapped) == {"encoder_hidden_states", "timestep_cond"}
    assert all(torch.equal(plain[name], wrapped[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_conditions_get_the_networks_type_and_w_is_embedded_before(unet, noise, dtype):
    add_guidance_embedding(unet).to(dtype)
    scale = torch.tensor([7.3, 2.1])
    condition = {
        "class_labels": torch.tensor([1, 2]),
        "encoder_hidden_states": noise(2, 5, 16),
        "guidance_scale": scale,
    }
    arguments = network_arguments(unet, condition)
    assert arguments["class_labels"].dtype == torch.int64
    assert arguments["encoder_hidden_states"].dtype == arguments["timestep_cond"].dtype == dtype
    assert torch.equal(arguments["timestep_cond"], PIDScheduler.guidance_embedding(scale, 256).to(dtype))


def test_a_student_that_is_told_w_answers_to_it(unet, noise):
    add_guidance_embedding(unet)
    nn.init.normal_(unet.time_embedding.cond_proj.weight)
    student = TrajectoryModel(unet, PIDScheduler(timestep_type="discrete", beta_schedule="linear", sigma_max=14.0))
    z, text = 14 * noise(2, 4, 8, 8), noise(2, 5, 16)
    with torch.no_grad():
        both = student(z, 1.0, encoder_hidden_states=text, guidance_scale=torch.tensor([2.0, 8.0]))
        same = student(z, 1.0, encoder_hidden_states=text, guidance_scale=torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(both[0], same[0])
    assert (both[1] - same[1]).abs().max() > 1e-3
