"""Feature extractors: the known ones from files in their real formats, and classes of one's own."""

import pickle
import sys

import pytest
import torch
import torchvision
from tiny_text import tiny_text_encoder, tiny_tokenizer
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2Config,
    Dinov2Model,
)

from pid_diffusers import InputError
from pid_diffusers.evaluation.digits import NUM_HELD_OUT, load_digits
from pid_diffusers.evaluation.extractors import extract, extractor_settings, load_extractor


@pytest.fixture(scope="module")
def images():
    return torch.randint(256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """The network of the published file, whose names torchvision's has, with random weights."""
    torch.manual_seed(0)
    network = torchvision.models.inception_v3(num_classes=1008, aux_logits=False, init_weights=False)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_reads_the_published_format_and_gives_what_torch_fidelity_gives(inception_file, images):
    found = extract(load_extractor("inception", inception_file), images)
    reference = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], inception_file)
    features, logits = reference(images)
    assert found["features"].shape == (2, 2048) and found["logits"].shape == (2, 1008)
    assert torch.equal(found["features"], features) and torch.equal(found["logits"], logits)


def test_a_file_of_another_network_or_of_code_is_refused_unrun(tmp_path):
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="another network"):
        load_extractor("inception", str(tmp_path / "other.pth"))

    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    (tmp_path / "code.pth").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match="no file of tensors"):
        load_extractor("inception", str(tmp_path / "code.pth"))
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(InputError, match="No such file"):
        load_extractor("inception", str(tmp_path / "missing.pth"))


def test_dinov2_gives_the_class_token_of_the_whole_image(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    image = torch.full((1, 3, 224, 224), 100, dtype=torch.uint8)
    image[..., :8, :] = 250  # what a crop to the center of 256 pixels would cut off
    found = extract(load_extractor("dinov2", str(tmp_path)), image)["features"]
    processor = BitImageProcessor.from_pretrained(tmp_path)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (processor.image_mean, processor.image_std))
    expected = network((image / 255 - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = tiny_text_encoder().config
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    size = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size).save_pretrained(folder)
    return str(folder)


def test_clip_gives_the_projected_features_of_images_and_prompts(clip_folder, images):
    extractor = load_extractor("clip", clip_folder)
    found = extract(extractor, images)["features"]
    network = CLIPModel.from_pretrained(clip_folder).eval()
    pixels = CLIPImageProcessor.from_pretrained(clip_folder)(list(images), return_tensors="pt").pixel_values
    tokens = tiny_tokenizer()(["a seven", "b"], padding=True, return_tensors="pt")
    output = network(pixel_values=pixels, **tokens)
    texts = extractor.text_features(["a seven", "b"])
    normal = nn.functional.normalize
    torch.testing.assert_close(normal(found, dim=-1), output.image_embeds, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(normal(texts, dim=-1), output.text_embeds, rtol=1e-5, atol=1e-6)
    assert extractor.text_features(["a prompt longer than the context of clip"]).shape == (1, 8)


def test_digit_features_read_held_out_digits_of_any_size():
    digits, labels = (x[-NUM_HELD_OUT:] for x in load_digits())
    pixels = ((digits / 2 + 0.5) * 255).round().byte()
    extractor = load_extractor("digits")
    found = extract(extractor, pixels)
    assert found["features"].shape == (360, 32)
    assert (found["logits"].argmax(dim=1) == labels).float().mean() == pytest.approx(0.992, abs=1e-3)
    large = pixels.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3).expand(-1, 3, -1, -1)
    torch.testing.assert_close(extract(extractor, large)["features"], found["features"], rtol=1e-4, atol=1e-4)


OWN = """
import functools
import torch

class Mean(torch.nn.Module):
    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return images.float().mean(dim=(2, 3))

class Flat(torch.nn.Module):
    def forward(self, images):
        return images.float().mean()

class Broken(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3)) * float("nan")

class Large(torch.nn.Linear):
    def __init__(self):
        super().__init__(100, 2)

class NoModule:
    pass

class Raises(torch.nn.Module):
    def __init__(self):
        raise KeyError("weights")

class Fails(Mean):
    error = KeyError("weights")
    def forward(self, images):
        raise self.error

class Asserts(Fails):
    error = AssertionError()

class Full(Fails):
    error = torch.OutOfMemoryError("full")

class Returns(Mean):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits
    def forward(self, images):
        return super().forward(images), *self.logits

OneTuple = functools.partial(Returns, ())
NumberAsLogits = functools.partial(Returns, (7,))
FlatLogits = functools.partial(Returns, (torch.zeros(2),))
FewLogits = functools.partial(Returns, (torch.zeros(1, 10),))
Triple = functools.partial(Returns, (torch.zeros(2, 10), None))
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "features_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "features_of_mine"
    sys.modules.pop("features_of_mine", None)


def test_a_class_of_ones_own_is_an_extractor(own_module, images):
    found = extract(load_extractor(f"{own_module}:Mean"), images[:, :1])
    assert list(found) == ["features"]
    torch.testing.assert_close(found["features"], images[:, :1].float().mean(dim=(2, 3)).expand(-1, 3))


def test_a_tuple_of_features_alone_is_as_good_as_features(own_module, images):
    found = extract(load_extractor(f"{own_module}:OneTuple"), images)
    assert list(found) == ["features"]
    assert torch.equal(found["features"], extract(load_extractor(f"{own_module}:Mean"), images)["features"])


def test_too_little_memory_for_an_extractor_is_not_its_mistake(own_module, images):
    with pytest.raises(torch.OutOfMemoryError):
        extract(load_extractor(f"{own_module}:Full"), images)


@pytest.mark.parametrize(
    "content, reason",
    [
        ("def f(:", "SyntaxError: "),
        ("Mean = nothing", "NameError: name 'nothing' is not defined"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("{}['weights']", "KeyError: 'weights'"),
        ("import sys\nsys.exit(1)", "SystemExit: 1"),
    ],
)
def test_a_module_that_fails_to_be_imported_gets_a_sentence(tmp_path, monkeypatch, content, reason):
    (tmp_path / "failing_module.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=rf"extractor is 'failing_module:A', which cannot be imported \({reason}"):
        load_extractor("failing_module:A")


def test_what_features_depend_on_has_the_source_of_a_class_of_ones_own(own_module, tmp_path):
    first = extractor_settings(load_extractor(f"{own_module}:Mean"), f"{own_module}:Mean")
    assert extractor_settings(load_extractor(f"{own_module}:Mean"), f"{own_module}:Mean") == first
    with (tmp_path / f"{own_module}.py").open("a") as file:
        file.write("Mean.forward = lambda self, images: images[:, :, 0, 0].float()\n")
    changed = extractor_settings(load_extractor(f"{own_module}:Mean"), f"{own_module}:Mean")
    assert changed["class"] == first["class"] and changed["source"] != first["source"]
    # of those of this package the name says it, in all its versions
    expected = {"class": "pid_diffusers.evaluation.extractors:DigitFeatures"}
    assert extractor_settings(load_extractor("digits"), "digits") == expected
    assert "source" in extractor_settings(load_extractor("torch.nn:Identity"), "torch.nn:Identity")


@pytest.mark.parametrize(
    "name, reason",
    [
        ("vgg", "choose one of inception, dinov2, clip, digits"),
        ("no_such_module:A", "cannot be imported"),
        ("features_of_mine:Missing", "cannot be imported"),
        ("features_of_mine:NoModule", "is no nn.Module"),
        ("features_of_mine:Raises", "cannot be made"),
        ("features_of_mine:Flat", "must return"),
        ("features_of_mine:Broken", "not finite"),
        ("features_of_mine:Large", "cannot take uint8 images of shape"),
        ("features_of_mine:Fails", r"cannot take uint8 images of shape .* \(KeyError: 'weights'\)"),
        ("features_of_mine:Asserts", r"cannot take uint8 images of shape .* \(AssertionError\)"),
        ("features_of_mine:NumberAsLogits", r"returns int as logits for 2 images; they must be \(B, K\)"),
        ("features_of_mine:FlatLogits", r"returns \(2,\) as logits"),
        ("features_of_mine:FewLogits", r"returns \(1, 10\) as logits"),
        ("features_of_mine:Triple", "returns tuple for 2 images"),
        (".features_of_mine:Mean", "cannot be imported"),
    ],
)
def test_what_is_no_extractor_gets_a_sentence(own_module, images, name, reason):
    with pytest.raises(InputError, match=reason):
        extract(load_extractor(name), images)


def test_weights_for_an_extractor_that_has_its_own_are_refused():
    with pytest.raises(InputError, match="extractor_weights"):
        load_extractor("digits", "file.pth")
    with pytest.raises(InputError, match="transformers cannot load"):
        load_extractor("dinov2", "/no/such/folder")
