import math

import pytest
import torch

from pid_diffusers import EmpiricalDenoiser


@pytest.fixture
def data(noise):
    return noise(5, 2, 3, 3, dtype=torch.float64)


LABELS = torch.tensor([0, 0, 1, 1, 1])


def naive(data, x, sigma):
    """One sample, one data point at a time, with Python's own numbers."""
    exponents = [
        -sum((a - b) ** 2 for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)) for y in data
    ]
    weights = [math.exp((e - max(exponents)) / (2 * sigma**2)) for e in exponents]
    return sum(w / sum(weights) * y for w, y in zip(weights, data, strict=True))


@pytest.mark.parametrize("sigma", [0.3, 1.0, 5.0, 80.0])
def test_denoiser_equals_a_loop_over_the_data(data, noise, sigma):
    x = data[:4] + sigma * noise(4, 2, 3, 3, seed=1, dtype=torch.float64)
    expected = torch.stack([naive(data, image, sigma) for image in x])
    torch.testing.assert_close(EmpiricalDenoiser(data)(x, sigma), expected, rtol=1e-10, atol=1e-10)


def test_every_sample_has_its_own_noise_level(data, noise):
    x = noise(3, 2, 3, 3, seed=1, dtype=torch.float64)
    sigmas = [0.4, 2.0, 30.0]
    denoised = EmpiricalDenoiser(data)(x, torch.tensor(sigmas))
    for i, sigma in enumerate(sigmas):
        torch.testing.assert_close(denoised[i], naive(data, x[i], float(torch.tensor(sigma))), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_little_noise_leaves_the_nearest_image(data, noise, dtype):
    x = data + 0.002 * noise(5, 2, 3, 3, seed=1, dtype=torch.float64)
    denoised = EmpiricalDenoiser(data.to(dtype))(x.to(dtype), 0.002)
    assert torch.equal(denoised, data.to(dtype))


def test_float32_tells_close_images_apart(noise):
    """Distances from the expansion of the square, ‖x‖² − 2xy + ‖y‖², would not."""
    image = 1 + 0.1 * noise(1, 3, 8, 8, dtype=torch.float64)
    data = torch.cat([image, image + 0.0005 * noise(1, 3, 8, 8, seed=1, dtype=torch.float64)]).float()
    x = data + 0.0002
    expected = EmpiricalDenoiser(data.double())(x.double(), 0.005)
    assert (expected[0] - expected[1]).norm() > 0.1 * (data[0] - data[1]).norm()
    assert (EmpiricalDenoiser(data)(x, 0.005) - expected).norm() < 1e-3 * (data[0] - data[1]).norm()


def test_much_noise_leaves_the_mean(data, noise):
    denoised = EmpiricalDenoiser(data)(noise(2, 2, 3, 3, seed=1, dtype=torch.float64), 1e6)
    torch.testing.assert_close(denoised, data.mean(dim=0).expand(2, -1, -1, -1), rtol=1e-9, atol=1e-9)


def test_labels_restrict_the_data(data, noise):
    teacher, x = EmpiricalDenoiser(data, LABELS), noise(3, 2, 3, 3, seed=1, dtype=torch.float64)
    conditional = teacher(x, 1.5, class_labels=torch.tensor([1, 0, 1]))
    for i, images in enumerate((data[2:], data[:2], data[2:])):
        torch.testing.assert_close(conditional[i], naive(images, x[i], 1.5), rtol=1e-10, atol=1e-10)


def test_without_a_class_all_the_data_count(data, noise):
    x = noise(3, 2, 3, 3, seed=1, dtype=torch.float64)
    assert torch.equal(EmpiricalDenoiser(data, LABELS)(x, 1.5), EmpiricalDenoiser(data)(x, 1.5))


def test_the_result_has_the_type_of_the_input_and_the_precision_of_the_data(data, noise):
    x = noise(3, 2, 3, 3, seed=1)
    denoised = EmpiricalDenoiser(data)(x, 1.5)
    assert denoised.dtype == torch.float32
    assert torch.equal(denoised, EmpiricalDenoiser(data)(x.double(), 1.5).float())


def test_empty_data_are_an_error():
    with pytest.raises(ValueError, match="data is empty"):
        EmpiricalDenoiser(torch.zeros(0, 1, 2, 2))


def test_labels_of_another_length_are_an_error(data):
    with pytest.raises(ValueError, match="labels has 3 entries for 5 images"):
        EmpiricalDenoiser(data, torch.tensor([0, 1, 2]))


def test_classes_without_labels_are_an_error(data):
    with pytest.raises(ValueError, match="class_labels"):
        EmpiricalDenoiser(data)(data, 1.0, class_labels=LABELS)


def test_a_class_that_does_not_occur_is_an_error(data):
    with pytest.raises(ValueError, match="class_labels is .*2"):
        EmpiricalDenoiser(data, LABELS)(data, 1.0, class_labels=torch.tensor([0, 0, 0, 1, 2]))
