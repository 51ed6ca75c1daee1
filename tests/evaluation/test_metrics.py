"""Every metric against its definition, and against the libraries that others use."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from pid_diffusers.evaluation import metrics
from pid_diffusers.evaluation.metrics import (
    Gaussian,
    clip_similarity,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_metrics,
    neighbour_radii,
)


class Identity(torch.nn.Module):
    """An extractor for torchmetrics, of images that are features already."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


@pytest.fixture(scope="module")
def features():
    """Of 500 generated and 400 real images: 24 features, correlated, as a network's in float32 and above 0."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator)
    generated = torch.randn(500, 24, generator=generator) @ mixing
    real = 0.3 + torch.randn(400, 24, generator=generator) @ (mixing + 0.2 * torch.randn(24, 24, generator=generator))
    return generated.relu(), real.relu()


def exactly(mu, sigma, count=300):
    """Features whose sample mean and covariance are `mu` and `sigma`."""
    x = torch.randn(count, len(mu), generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(x.T @ x / (count - 1)), x.T, upper=False).T
    return mu + white @ torch.linalg.cholesky(sigma).T


def test_fid_is_that_of_torchmetrics_and_of_torch_fidelity(features):
    generated, real = features
    ours = frechet_distance(Gaussian.of(generated), Gaussian.of(real))
    other = FrechetInceptionDistance(feature=Identity(24), input_img_size=(24,)).set_dtype(torch.float64)
    other.update(real.double(), real=True)
    other.update(generated.double(), real=False)
    assert ours == pytest.approx(other.compute().item(), rel=1e-6)
    statistics = [fid_features_to_statistics(x.double()) for x in (generated, real)]
    theirs = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_fid_of_gaussian_features_is_the_closed_form():
    mu = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    variances = torch.tensor([[4.0, 1.0, 0.25], [1.0, 9.0, 0.04]], dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    a, b = (rotation @ torch.diag(v) @ rotation.T for v in variances)
    expected = mu.square().sum() + (variances[0].sqrt() - variances[1].sqrt()).square().sum()
    ours = frechet_distance(Gaussian.of(exactly(mu, a)), Gaussian.of(exactly(0 * mu, b, 400)))
    assert ours == pytest.approx(expected.item(), rel=1e-9)


def test_fid_of_gaussians_whose_covariances_do_not_commute_is_the_closed_form():
    # of 2 × 2 matrices tr √M = √(tr M + 2 √det M)
    a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.9], [-0.9, 3.0]], dtype=torch.float64)
    product = a @ b
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    zero = torch.zeros(2, dtype=torch.float64)
    ours = frechet_distance(Gaussian(zero, a), Gaussian(zero, b))
    assert ours == pytest.approx((a.trace() + b.trace() - 2 * root).item(), rel=1e-12)


def test_fid_of_features_of_no_full_rank_to_themselves_is_zero(features):
    flat = features[0][:, [0, 1, 2, 0, 1]]
    assert frechet_distance(Gaussian.of(flat), Gaussian.of(flat)) == pytest.approx(0, abs=1e-6)


def test_mean_and_covariance_are_those_of_numpy(features):
    gaussian = Gaussian.of(features[0])
    numbers = features[0].double().numpy()
    np.testing.assert_allclose(gaussian.mu, numbers.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(gaussian.sigma, np.cov(numbers, rowvar=False), rtol=1e-10)


def test_kid_is_that_of_torchmetrics_and_of_its_definition(features):
    generated, real = (x[:300].double() for x in features)  # as many as in a subset: every subset is the same
    ours = kernel_distance(generated, real, subsets=2, subset_size=300)
    other = KernelInceptionDistance(feature=Identity(24), subsets=2, subset_size=300).set_dtype(torch.float64)
    other.update(real, real=True)
    other.update(generated, real=False)
    assert ours == pytest.approx(other.compute()[0].item(), rel=1e-6)

    def kernel(a, b):
        return (a @ b.T / 24 + 1) ** 3

    others = ~torch.eye(300, dtype=torch.bool)
    defined = kernel(generated, generated)[others].mean() + kernel(real, real)[others].mean()
    defined -= 2 * kernel(generated, real).mean()
    assert ours == pytest.approx(defined.item(), rel=1e-9)


def test_inception_score_is_that_of_torchmetrics_and_of_its_definition(features):
    logits = features[0]
    ours = inception_score(logits, splits=1)
    other = InceptionScore(feature=Identity(24), splits=1).set_dtype(torch.float64)
    other.update(logits.double())
    assert ours == pytest.approx(other.compute()[0].item(), rel=1e-6)
    p = logits.double().softmax(dim=1)
    defined = (p * (p / p.mean(dim=0)).log()).sum(dim=1).mean().exp()
    assert ours == pytest.approx(defined.item(), rel=1e-9)
    assert inception_score(torch.eye(10).repeat(100, 1) * 1000) == pytest.approx(10, abs=0.6)


def test_precision_and_recall_are_those_of_torch_fidelity(features):
    ours = neighbour_metrics(*features)
    precision, recall = calculate_precision_recall_full(*(x.double() for x in features), neighborhood=3)
    assert (ours["precision"], ours["recall"]) == pytest.approx((precision, recall), rel=1e-6)
    assert 0.05 < precision < 0.99 and 0.05 < recall < 0.99


def test_density_and_coverage_are_those_of_their_definition(features):
    generated, real = (x.double().numpy() for x in features)
    ours = neighbour_metrics(*features)
    radii = [np.sort(np.linalg.norm(real - x, axis=1))[5] for x in real]
    inside = np.stack([np.linalg.norm(real - x, axis=1) < radii for x in generated])
    assert ours["density"] == pytest.approx(inside.sum() / (5 * len(generated)), rel=1e-12)
    assert ours["coverage"] == pytest.approx(inside.any(axis=0).mean(), rel=1e-12)


def test_distances_in_parts_give_the_same_metrics(features, monkeypatch):
    whole = neighbour_metrics(*features)
    monkeypatch.setattr(metrics, "_MAX_DISTANCES", 7 * 400)
    assert neighbour_metrics(*features) == whole
    radii = neighbour_radii(features[1], (3, 5))
    assert neighbour_metrics(*features, radii) == whole


def test_samples_far_from_the_reference_have_no_precision_and_those_of_it_have_all(features):
    real = features[1]
    assert set(neighbour_metrics(real + 1e3, real).values()) == {0.0}
    same = neighbour_metrics(real, real)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert same["density"] > 0.99


def test_clip_similarity_is_100_for_one_direction_and_never_negative():
    images = torch.tensor([[1.0, 2.0], [1.0, 0.0], [0.0, -1.0]])
    texts = torch.tensor([[2.0, 4.0], [0.0, 3.0], [0.0, 1.0]])
    torch.testing.assert_close(clip_similarity(images, texts), torch.tensor([100.0, 0.0, 0.0], dtype=torch.float64))
