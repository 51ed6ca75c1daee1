import lpips
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from tiny_latent import create, tiny_vae, tiny_vq
from torchvision.models import vgg

from pid_diffusers import InputError
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, load_digits
from pid_diffusers.losses import LPIPS, PseudoHuber, l1, l2
from pid_diffusers.losses.distances import DecodedDistance, DigitLPIPS, get_distance


def test_l2_is_the_mean_square_of_each_sample(noise):
    p, q = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    expected = torch.stack([((a - b) ** 2).mean() for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(l2(p, q), expected)
    assert l2(torch.full((1, 2, 4, 4), 3.0), torch.ones(1, 2, 4, 4)).tolist() == [4.0]


def test_l1_is_the_mean_absolute_difference_of_each_sample(noise):
    p, q = noise(3, 2, 4, 4), noise(3, 2, 4, 4, seed=1)
    expected = torch.stack([(a - b).abs().mean() for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(l1(p, q), expected)
    assert l1(torch.full((1, 2, 4, 4), -2.0), torch.ones(1, 2, 4, 4)).tolist() == [3.0]


def test_pseudo_huber_is_the_closed_form(noise):
    p, q = noise(3, 2, 4, 4, dtype=torch.float64), noise(3, 2, 4, 4, seed=1, dtype=torch.float64)
    norm = (p - q).flatten(1).norm(dim=1)
    for c in (0.01, 1.0):
        torch.testing.assert_close(PseudoHuber(c)(p, q), (norm**2 + c**2).sqrt() - c)
    c = 0.00054 * 32**0.5
    torch.testing.assert_close(PseudoHuber()(p, q), (norm**2 + c**2).sqrt() - c)


def test_pseudo_huber_is_square_below_c_and_linear_above():
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for small in (1e-3, 2e-3):
        assert PseudoHuber(1.0)(zero + small, zero).item() == pytest.approx(small**2 / 2, rel=1e-5)
    for large in (1e4, 2e4):
        assert PseudoHuber(1.0)(zero + large, zero).item() == pytest.approx(large - 1, rel=1e-6)


@pytest.mark.parametrize("distance", [l2, PseudoHuber()])
def test_identical_images_have_distance_and_gradient_0(noise, distance):
    image = noise(2, 3, 4, 4).requires_grad_()
    value = distance(image, image.detach())
    value.sum().backward()
    assert value.tolist() == [0.0, 0.0]
    assert torch.equal(image.grad, torch.zeros_like(image))


def test_distances_are_found_by_name():
    assert get_distance("l2") is l2
    assert get_distance("l1") is l1
    assert get_distance("pseudo_huber", c=0.1).c == 0.1


def test_an_unknown_distance_is_named():
    with pytest.raises(ValueError, match="distance is 'ssim'.*l2, l1, pseudo_huber, lpips"):
        get_distance("ssim")


# LPIPS, with random weights in torchvision's format in place of the real ones, which are a download


@pytest.fixture(scope="session")
def vgg_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        features = vgg.make_layers(vgg.cfgs["D"])
        for parameter in features.parameters():
            if parameter.ndim == 4:
                torch.nn.init.kaiming_normal_(parameter, mode="fan_in")
            else:
                torch.nn.init.normal_(parameter, std=0.1)
    return {f"features.{name}": weight for name, weight in features.state_dict().items()}


@pytest.fixture(scope="session")
def vgg_file(vgg_weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(vgg_weights, file)
    return file


@pytest.fixture(scope="session")
def distance(vgg_file):
    return LPIPS(vgg_file)


def original_lpips(weights):
    """The `lpips` package's own distance with these VGG-16 weights."""
    model = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for block in model.net.children():
        block.load_state_dict({name: weights[f"features.{name}"] for name in block.state_dict()})
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="session")
def original(vgg_weights):
    return original_lpips(vgg_weights)


def images(noise, *shape, seed=0):
    return noise(*shape, seed=seed).tanh()


def test_lpips_is_the_lpips_package_on_resized_images(distance, original, noise):
    p, q = images(noise, 2, 3, 16, 16), images(noise, 2, 3, 16, 16, seed=1)
    with torch.no_grad():
        resized = [F.interpolate(image, size=(224, 224), mode="bilinear", align_corners=False) for image in (p, q)]
        expected = original(*resized).flatten()
        value = distance(p, q)
    assert value.shape == (2,)
    assert value.min() > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_lpips_reads_safetensors_and_strings(distance, vgg_weights, tmp_path, noise):
    file = tmp_path / "vgg16.safetensors"
    save_file({**vgg_weights, "classifier.0.bias": torch.zeros(3)}, file)  # torchvision's file has more than features
    p, q = images(noise, 1, 3, 8, 8), images(noise, 1, 3, 8, 8, seed=1)
    with torch.no_grad():
        assert torch.equal(LPIPS(str(file))(p, q), distance(p, q))


def test_lpips_of_grey_images_is_that_of_their_three_equal_channels(distance, noise):
    p, q = images(noise, 1, 1, 8, 8), images(noise, 1, 1, 8, 8, seed=1)
    with torch.no_grad():
        assert torch.equal(distance(p, q), distance(p.repeat(1, 3, 1, 1), q.repeat(1, 3, 1, 1)))


def test_lpips_of_identical_images_is_0_with_a_finite_gradient(distance, noise):
    image = images(noise, 1, 3, 8, 8).requires_grad_()
    value = distance(image, image.detach())
    value.sum().backward()
    assert value.item() == 0
    assert image.grad.isfinite().all()


def test_lpips_has_a_finite_gradient_where_features_vanish(vgg_weights, tmp_path):
    """The `lpips` package has none: the sum of squares of such features is 0, and it takes the square root."""
    tiny = {name: torch.full_like(weight, 1e-25 if weight.ndim == 1 else 0) for name, weight in vgg_weights.items()}
    torch.save(tiny, tmp_path / "tiny.pth")
    gradients = []
    for model, size in ((LPIPS(tmp_path / "tiny.pth"), 8), (original_lpips(tiny), 224)):
        image = torch.zeros(1, 3, size, size, requires_grad=True)
        model(image, image.detach()).sum().backward()
        gradients.append(image.grad)
    assert gradients[0].isfinite().all()
    assert gradients[1].isnan().any()


def test_lpips_never_trains(distance, noise):
    p, q = images(noise, 1, 3, 8, 8), images(noise, 1, 3, 8, 8, seed=1)
    with torch.no_grad():
        value = distance(p, q)
        distance.train()
        assert torch.equal(distance(p, q), value)
    assert not any(module.training for module in distance.modules())
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_lpips_of_latents_is_an_input_error(distance, noise):
    with pytest.raises(InputError, match="1 or 3 channels, not 4"):
        distance(noise(1, 4, 8, 8), noise(1, 4, 8, 8))


# the perceptual distance of the digits


def test_digit_lpips_is_the_sum_over_layers_of_the_distance_of_unit_features(noise):
    distance, p, q = DigitLPIPS(), images(noise, 3, 1, 8, 8), images(noise, 3, 1, 8, 8, seed=1)
    expected, (x, y) = torch.zeros(3), (p, q)
    for convolution in distance.layers[::2]:
        x, y = convolution(x).relu(), convolution(y).relu()
        cosine = torch.cosine_similarity(x, y, dim=1, eps=1e-20)
        present = x.norm(dim=1).gt(0).float() + y.norm(dim=1).gt(0).float()  # ‖u‖² + ‖v‖² of unit vectors, or 0
        expected += (present - 2 * cosine).mean(dim=(1, 2))
    torch.testing.assert_close(distance(p, q), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(distance(p, p), torch.zeros(3))


def test_digit_lpips_has_a_finite_gradient_everywhere_and_no_weights_to_train(noise):
    distance = DigitLPIPS()
    for p in (images(noise, 2, 1, 8, 8), torch.zeros(2, 1, 8, 8), -torch.ones(2, 1, 8, 8)):
        p = p.requires_grad_()
        distance(p, images(noise, 2, 1, 8, 8, seed=1)).sum().backward()
        assert p.grad.isfinite().all() and p.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_digit_lpips_tells_digits_apart_better_than_styles():
    """The features are those of a classifier that reads held-out digits."""
    real, labels = (some[-NUM_HELD_OUT:] for some in load_digits())
    first, second = torch.triu_indices(len(real), len(real), offset=1)
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[:4000]
    p, q, same = real[first[chosen]], real[second[chosen]], labels[first[chosen]] == labels[second[chosen]]
    margin = {}
    for name, distance in (("lpips", DigitLPIPS()), ("l2", l2)):
        d = distance(p, q)
        margin[name] = ((d[~same].mean() - d[same].mean()) / d.std()).item()
    assert margin["lpips"] > margin["l2"] > 0


def test_digit_lpips_of_other_images_is_an_input_error(noise):
    for shape in ((1, 3, 8, 8), (1, 1, 16, 16)):
        with pytest.raises(InputError, match="lpips_network is 'digits', which takes images of shape"):
            DigitLPIPS()(noise(*shape), noise(*shape))


def text_file(folder, weights):
    (folder / "notes.pth").write_text("not a state dict")
    return folder / "notes.pth"


def text_as_safetensors(folder, weights):
    (folder / "notes.safetensors").write_text("not a state dict")
    return folder / "notes.safetensors"


def missing_path(folder, weights):
    return folder / "nowhere.pth"


def the_folder_itself(folder, weights):
    return folder


def missing_key(folder, weights):
    save_file({name: w for name, w in weights.items() if name != "features.28.bias"}, folder / "vgg.safetensors")
    return folder / "vgg.safetensors"


def wrong_shape(folder, weights):
    save_file({**weights, "features.0.weight": torch.zeros(64, 1, 3, 3)}, folder / "vgg.safetensors")
    return folder / "vgg.safetensors"


def another_state_dict(folder, weights):
    torch.save({"conv_in.weight": torch.zeros(1)}, folder / "unet.pth")
    return folder / "unet.pth"


def bare_tensor(folder, weights):
    torch.save(torch.zeros(3), folder / "tensor.pth")
    return folder / "tensor.pth"


def state_dict_of_numbers(folder, weights):
    torch.save(dict.fromkeys(weights, 0.0), folder / "numbers.pth")
    return folder / "numbers.pth"


@pytest.mark.parametrize(
    "create",
    [
        text_file,
        text_as_safetensors,
        missing_path,
        the_folder_itself,
        missing_key,
        wrong_shape,
        another_state_dict,
        bare_tensor,
        state_dict_of_numbers,
    ],
)
def test_a_file_without_vgg16_is_an_input_error_that_names_it(vgg_weights, tmp_path, create):
    file = create(tmp_path, vgg_weights)
    with pytest.raises(InputError) as error:
        LPIPS(file)
    assert f"lpips_vgg_weights is {str(file)!r}" in str(error.value)
    assert str(error.value).endswith("pass torchvision's vgg16-397923af.pth.")


def test_without_weights_and_network_the_message_says_what_to_pass(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="--lpips_vgg_weights.*--distance l2"):
        LPIPS()


# distances between decoded latents


class Perceptual(torch.nn.Module):
    """A distance with weights of its own, between images of 3 channels."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.features = torch.nn.Conv2d(3, 8, 3)
        self.requires_grad_(False)

    def forward(self, prediction, target):
        return l2(self.features(prediction).tanh(), self.features(target).tanh())


def tiny_decoder():
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return create(AutoencoderTiny, **shape, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


@pytest.mark.parametrize(("vae", "channels"), [(tiny_vae, 4), (tiny_vq, 3), (tiny_decoder, 4)])
def test_a_decoded_distance_and_its_gradient_are_those_of_decoded_images(vae, channels, noise):
    vae, distance = vae().requires_grad_(False), Perceptual()
    p, q = noise(5, channels, 8, 8).requires_grad_(), noise(5, channels, 8, 8, seed=1).requires_grad_()

    def decode(latents):
        return vae.decode(latents / vae.config.scaling_factor).sample

    expected = distance(decode(p), decode(q.detach()))
    weights = torch.arange(1.0, 6.0)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), p)
    for batch_size in (1, 2, 5, 8):
        decoded = DecodedDistance(distance, vae, batch_size)
        value = decoded(p, q)
        assert value.shape == (5,)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        p.grad = None
        (weights * value).sum().backward()
        torch.testing.assert_close(p.grad, gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())
        assert q.grad is None
    with torch.no_grad():
        torch.testing.assert_close(decoded(p, q), expected, rtol=1e-5, atol=1e-7)


def test_a_decoder_is_used_some_latents_at_a_time_and_once_more_in_the_backward_pass(noise):
    vae, sizes = tiny_vae(), []
    vae.decoder.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    value = DecodedDistance(Perceptual(), vae, 2)(noise(5, 4, 8, 8).requires_grad_(), noise(5, 4, 8, 8, seed=1))
    assert sizes == [2, 2, 2, 2, 1, 1]  # target and prediction
    value.sum().backward()
    assert sorted(sizes[6:]) == [1, 1, 2, 2, 2, 2]


def test_a_decoder_is_frozen_and_no_part_of_the_loss():
    vae = tiny_vae().train()
    decoded = DecodedDistance(Perceptual(), vae)
    assert not vae.training and not any(p.requires_grad for p in vae.parameters())
    assert {id(p) for p in vae.parameters()}.isdisjoint({id(p) for p in decoded.parameters()})


def test_a_decoder_in_half_precision_gives_a_float32_distance(noise):
    vae = tiny_vae().to(torch.bfloat16)
    p = noise(2, 4, 8, 8).requires_grad_()
    value = DecodedDistance(Perceptual(), vae)(p, noise(2, 4, 8, 8, seed=1))
    value.sum().backward()
    assert value.dtype == p.grad.dtype == torch.float32 and p.grad.isfinite().all()
