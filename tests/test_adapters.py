"""One set of base weights is the teacher without the adapters and the student with them."""

import copy
import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from safetensors.torch import load_file
from tiny_latent import tiny_dit
from tiny_text import tiny_conditional_unet, tiny_sdxl
from torch import nn

from pid_diffusers import EDMUNet2DModel, InputError
from pid_diffusers.adapters import (
    GUIDANCE_TARGET,
    UNET_TARGETS,
    adapter_layers,
    add_guidance_embedding,
    add_lora,
    fuse,
    lora_weights,
    save_peft_adapter,
    without_adapters,
)
from pid_diffusers.precision import Float32Conv2d, cast_frozen, keep_output_in_float32


def song(**config) -> EDMUNet2DModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = {"model_channels": 8, "channel_mult": (1, 2), "num_blocks": 1, "attn_resolutions": (4,)}
        return EDMUNet2DModel(sample_size=8, in_channels=3, out_channels=3, **shape, **config).eval()


def smld() -> EDMUNet2DModel:
    return song(embedding_type="fourier", encoder_type="residual", resample_filter=(1, 3, 3, 1))


def grow(network: nn.Module) -> nn.Module:
    """Adapters as after training: with a B that is not 0."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return network


NETWORKS = ["UNet2DConditionModel", "SDXL", "UNet2DModel", "EDMUNet2DModel", "EDMUNet2DModel of NCSN++", "DiT"]


@pytest.fixture(params=NETWORKS)
def case(request, tiny_unet, noise):
    """A network, and what it is called with."""
    text = {"encoder_hidden_states": noise(2, 5, 16)}
    added = {"text_embeds": noise(2, 24), "time_ids": torch.full((2, 6), 16.0)}
    sdxl = {"encoder_hidden_states": noise(2, 5, 40), "added_cond_kwargs": added}
    network, channels, arguments = {
        "UNet2DConditionModel": (tiny_conditional_unet, 4, text),
        "SDXL": (lambda: tiny_sdxl().unet, 4, sdxl),
        "UNet2DModel": (tiny_unet, 3, {}),
        "EDMUNet2DModel": (lambda: song(num_class_embeds=3), 3, {"class_labels": torch.tensor([0, 2])}),
        "EDMUNet2DModel of NCSN++": (smld, 3, {}),
        "DiT": (tiny_dit, 4, {"class_labels": torch.tensor([0, 2])}),
    }[request.param]
    x, t = noise(2, channels, 8, 8), torch.tensor([3.0, 7.5])
    # frozen, as a teacher is: torch rounds layers whose weights are trained in another way
    return network().eval().requires_grad_(False), lambda network: network(x, t, **arguments, return_dict=False)[0]


def test_without_training_the_student_is_the_teacher_bit_for_bit(case):
    network, call = case
    with torch.no_grad():
        before = call(network)
        assert add_lora(network, rank=4) is network
        assert torch.equal(call(network), before)


def test_adapters_are_float32_and_alone_are_trained(case):
    network, _ = case
    add_lora(network.to(torch.bfloat16), rank=4)
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (".lora_" in name)
        assert parameter.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)


def test_every_adapter_gets_a_gradient(case):
    """DistributedDataParallel ends with an error if one does not."""
    network, call = case
    call(grow(add_lora(network, rank=4))).square().mean().backward()
    missing = [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_without_adapters_it_is_the_teacher_bit_for_bit_and_afterwards_the_student(case):
    network, call = case
    with torch.no_grad():
        before = call(network)
        grow(add_lora(network, rank=4))
        student = call(network)
        assert (student - before).norm() > 1e-3 * before.norm()
        with without_adapters(network):
            assert torch.equal(call(network), before)
        assert torch.equal(call(network), student)


def test_what_is_trained_is_the_same_after_the_adapters_were_off(case):
    network, call = case
    grow(add_lora(network, rank=4))
    frozen = next(p for name, p in network.named_parameters() if "lora_A" in name).requires_grad_(False)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    with torch.no_grad():
        student = call(network)
    with pytest.raises(ZeroDivisionError), without_adapters(network):
        raise ZeroDivisionError
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trained
    assert not frozen.requires_grad
    with torch.no_grad():
        assert torch.equal(call(network), student)


def test_a_block_without_adapters_may_be_in_another(case):
    network, call = case
    with torch.no_grad():
        before = call(network)
        grow(add_lora(network, rank=4))
        trained = {name for name, p in network.named_parameters() if p.requires_grad}
        with without_adapters(network):
            with without_adapters(network):
                assert torch.equal(call(network), before)
            assert torch.equal(call(network), before)
    assert {name for name, p in network.named_parameters() if p.requires_grad} == trained


def test_without_adapters_there_is_nothing_to_turn_off(tiny_unet):
    unet = tiny_unet().requires_grad_(False)
    with without_adapters(unet), without_adapters(None):
        pass
    assert not adapter_layers(unet) and not any(p.requires_grad for p in unet.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_is_the_same_if_the_adapters_were_off_between_forward_and_backward(checkpointing, noise):
    """As in training, where the teacher is asked in between; with checkpointing the forward pass comes once more."""
    unet = grow(add_lora(tiny_conditional_unet(), rank=4, alpha=8)).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    gradients = []
    for between in (False, True):
        unet.zero_grad()
        output = unet(noise(2, 4, 8, 8), torch.tensor([3.0, 7.0]), noise(2, 5, 16)).sample
        if between:
            with torch.no_grad(), without_adapters(unet):
                unet(noise(2, 4, 8, 8), torch.tensor([3.0, 7.0]), noise(2, 5, 16))
        output.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in unet.named_parameters() if p.requires_grad})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[1].values())


def test_fused_it_is_the_student_in_the_layers_of_its_class(case):
    network, call = case
    keys, base = set(network.state_dict()), copy.deepcopy(network)
    with torch.no_grad():
        grow(add_lora(network, rank=4, alpha=2.0))
        student = call(network)
        assert fuse(network) is network
        torch.testing.assert_close(call(network), student, rtol=1e-5, atol=1e-6)
    assert set(network.state_dict()) == keys
    assert not adapter_layers(network) and not hasattr(network, "peft_config")
    assert [type(m) for m in network.modules()] == [type(m) for m in base.modules()]
    assert all(p.requires_grad for p in network.parameters())


def test_alpha_over_rank_is_the_adapters_factor():
    plain, scaled = (tiny_conditional_unet() for _ in range(2))
    grow(add_lora(plain, rank=4, target_modules=["to_q"]))
    grow(add_lora(scaled, rank=4, alpha=12.0, target_modules=["to_q"]))
    scaled.load_state_dict(plain.state_dict())
    base = tiny_conditional_unet().state_dict()
    first, second = fuse(plain).state_dict(), fuse(scaled).state_dict()
    for name, weight in base.items():
        changed = name.endswith("to_q.weight")
        torch.testing.assert_close(second[name] - weight, 3 * (first[name] - weight), rtol=1e-5, atol=1e-6)
        assert torch.equal(first[name], weight) != changed


def test_dropout_is_of_the_adapters_in_training_mode_alone(noise):
    unet = grow(add_lora(tiny_conditional_unet(), rank=4, dropout=0.5)).eval()
    arguments = noise(2, 4, 8, 8), 3.0, noise(2, 5, 16)
    with torch.no_grad():
        assert torch.equal(unet(*arguments).sample, unet(*arguments).sample)
        unet.train()
        assert not torch.equal(unet(*arguments).sample, unet(*arguments).sample)
        with without_adapters(unet):
            assert torch.equal(unet(*arguments).sample, unet(*arguments).sample)


# --- which layers ----------------------------------------------------------------------------------------------------


def test_by_default_the_layers_that_matter_are_adapted(case):
    network, _ = case
    layers = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    adapted = set(adapter_layers(add_lora(network, rank=4)))
    assert adapted and layers[0] not in adapted and layers[-1] not in adapted
    known = {name for name in layers if any(name.endswith(f".{target}") for target in UNET_TARGETS)}
    assert adapted == (known or set(layers[1:-1]))
    assert len(adapted) > len(layers) / 2


def test_of_a_conditional_unet_all_but_the_ends_and_the_embeddings_are_adapted():
    unet = add_guidance_embedding(tiny_conditional_unet())
    layers = {name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    left = layers - set(adapter_layers(add_lora(unet, rank=4)))
    assert left == {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["to_q", "to_w"],
            r"lora_target_modules has 'to_w', which is no layer of the UNet2DConditionModel; pass ends",
        ),
        (["o_q"], "has 'o_q', which is no layer of"),
        (["conv_norm_out"], "has 'conv_norm_out', which is no linear layer or convolution of"),
        (["attn1"], "has 'attn1', which is no linear layer or convolution of"),
    ],
)
def test_names_of_no_suitable_layer_are_answered_in_one_sentence(names, message):
    unet = tiny_conditional_unet()
    with pytest.raises(InputError, match=message) as caught:
        add_lora(unet, rank=4, target_modules=names)
    assert "\n" not in str(caught.value)
    assert all(p.requires_grad for p in unet.parameters())  # nothing was changed


def test_a_name_that_ends_like_both_a_layer_and_something_else_is_that_of_the_layer():
    unet = add_lora(tiny_conditional_unet(), rank=4, target_modules=["proj"])  # the feed-forward's; also no other's
    assert all(name.endswith(".proj") for name in adapter_layers(unet)) and adapter_layers(unet)


# --- the embedding of w ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create", [tiny_conditional_unet, lambda: tiny_sdxl().unet])
def test_the_embedding_of_w_changes_nothing_at_first(create, noise):
    unet = create()
    arguments = {"encoder_hidden_states": noise(2, 5, unet.config.cross_attention_dim)}
    if unet.config.addition_embed_type:
        arguments["added_cond_kwargs"] = {"text_embeds": noise(2, 24), "time_ids": torch.full((2, 6), 16.0)}
    x, t = noise(2, 4, 8, 8), torch.tensor([3.0, 7.0])
    with torch.no_grad():
        before = unet(x, t, **arguments).sample
        assert add_guidance_embedding(unet) is unet
        assert torch.equal(unet(x, t, **arguments).sample, before)
        assert torch.equal(unet(x, t, timestep_cond=noise(2, 256), **arguments).sample, before)
        assert unet.config.time_cond_proj_dim == 256
        again = UNet2DConditionModel.from_config(unet.config)
        again.load_state_dict(unet.state_dict())
        assert torch.equal(again(x, t, timestep_cond=noise(2, 256), **arguments).sample, before)


def test_the_embedding_of_w_is_saved_with_the_network(tmp_path):
    unet = add_guidance_embedding(tiny_conditional_unet())
    nn.init.normal_(unet.time_embedding.cond_proj.weight)
    unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert again.config.time_cond_proj_dim == 256
    assert torch.equal(again.time_embedding.cond_proj.weight, unet.time_embedding.cond_proj.weight)


def test_one_that_is_there_stays():
    unet = tiny_conditional_unet(time_cond_proj_dim=32)
    before = copy.deepcopy(unet.state_dict())
    add_guidance_embedding(unet)
    assert unet.config.time_cond_proj_dim == 32
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())


def test_with_lora_the_embedding_of_w_is_trained_and_gets_a_gradient(noise):
    unet = add_lora(add_guidance_embedding(tiny_conditional_unet()), rank=4)
    assert GUIDANCE_TARGET in adapter_layers(unet)
    weights, _ = lora_weights(unet)
    assert f"{GUIDANCE_TARGET}.lora_A.weight" in weights and f"{GUIDANCE_TARGET}.lora_B.weight" in weights
    unet(noise(2, 4, 8, 8), 3.0, noise(2, 5, 16), timestep_cond=noise(2, 256)).sample.square().mean().backward()
    assert unet.time_embedding.cond_proj.lora_B["default"].weight.grad.abs().sum() > 0


# --- saving ----------------------------------------------------------------------------------------------------------


def test_peft_attaches_a_saved_adapter_to_a_fresh_network(case, tmp_path):
    network, call = case
    fresh = copy.deepcopy(network)
    grow(add_lora(network, rank=4, alpha=6.0, dropout=0.1)).eval()
    with torch.no_grad():
        student, teacher = call(network), call(fresh)
        save_peft_adapter(*lora_weights(network), tmp_path)
        attached = PeftModel.from_pretrained(fresh, tmp_path).eval()
        torch.testing.assert_close(call(attached), student, rtol=1e-4, atol=1e-6 * student.abs().max().item())
        assert (student - teacher).norm() > 1e-3 * teacher.norm()
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == 2 * len(adapter_layers(network))
    assert set(saved) == {name.replace(".default", "") for name in attached.state_dict() if "lora_" in name}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["peft_type"]) == (4, 6.0, 0.1, "LORA")


# --- precision -------------------------------------------------------------------------------------------------------


def test_in_half_precision_adapters_and_output_layer_stay_float32(case):
    network, _ = case
    add_lora(network, rank=4)
    before = copy.deepcopy(network.state_dict())
    cast_frozen(keep_output_in_float32(network), torch.bfloat16)
    exact = {id(p) for m in network.modules() if isinstance(m, Float32Conv2d) for p in m.parameters()}
    assert any(parameter.dtype == torch.bfloat16 for parameter in network.parameters())
    for name, parameter in network.named_parameters():
        if parameter.requires_grad or id(parameter) in exact:
            assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


def test_an_adapted_output_layer_is_computed_in_float32_too():
    network = add_lora(tiny_conditional_unet(), rank=4, target_modules=["conv_out"])
    cast_frozen(keep_output_in_float32(network), torch.bfloat16)
    layer = network.conv_out.base_layer
    assert isinstance(layer, Float32Conv2d) and layer.weight.dtype == torch.float32
