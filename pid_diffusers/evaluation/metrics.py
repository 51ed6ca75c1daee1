"""How close generated images are to real ones, from the features of both. All arithmetic is in float64."""

from dataclasses import dataclass

import torch

PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
INCEPTION_SCORE_SPLITS = 10
# of distances that are in memory at once: half a gibibyte in float64
_MAX_DISTANCES = 2**26


@dataclass
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mu (`torch.Tensor` of shape `(D,)`): the mean, float64.
        sigma (`torch.Tensor` of shape `(D, D)`): the covariance, float64.
    """

    mu: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor) -> "Gaussian":
        """That of `features`, `(N, D)` with N > 1; the covariance is the unbiased one, divided by N − 1."""
        count, width = features.shape
        mu = features.mean(dim=0, dtype=torch.float64)
        sigma = torch.zeros(width, width, dtype=torch.float64, device=features.device)
        for some in features.split(4096):  # a copy of all of them in float64 may not fit
            centered = some.double() - mu
            sigma.addmm_(centered.T, centered)
        return cls(mu, sigma / (count - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """
    The squared 2-Wasserstein distance of two Gaussians: FID on Inception features, FD-DINOv2 on DINOv2's.

        |μ_a − μ_b|² + tr(Σ_a + Σ_b − 2 (Σ_a Σ_b)^½)

    The trace of the root is that of (Σ_a^½ Σ_b Σ_a^½)^½, whose matrix is symmetric: its eigenvalues are real, and the
    rounding errors of those around 0 stay small.
    """
    values, vectors = torch.linalg.eigh(a.sigma)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.sigma @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((a.mu - b.mu).square().sum() + a.sigma.trace() + b.sigma.trace() - 2 * trace)


def kernel_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    seed: int = 0,
) -> float:
    """
    KID: the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³, a mean over random subsets.

    Args:
        features (`torch.Tensor` of shape `(N, D)`), reference (`torch.Tensor` of shape `(M, D)`).
        subsets (`int`, defaults to 100), subset_size (`int`, defaults to 1000): at most N and M.
        seed (`int`, defaults to 0): of the subsets.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    result = kid_features_to_metric(
        features.double().cpu(),
        reference.double().cpu(),
        kid_subsets=subsets,
        kid_subset_size=subset_size,
        rng_seed=seed,
        verbose=False,
    )
    return result["kernel_inception_distance_mean"]


def inception_score(logits: torch.Tensor, splits: int = INCEPTION_SCORE_SPLITS, seed: int = 0) -> float:
    """
    exp(E KL(p(y|x) ‖ p(y))), a mean over `splits` parts of the samples in random order.

    Args:
        logits (`torch.Tensor` of shape `(N, classes)`): what the classifier says of each sample.
        splits (`int`, defaults to 10), seed (`int`, defaults to 0): of the order.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric

    return isc_features_to_metric(logits.cpu(), splits, shuffle=True, rng_seed=seed)["inception_score_mean"]


def neighbour_radii(features: torch.Tensor, neighbours: tuple[int, ...]) -> torch.Tensor:
    """The distance of every one of `features`, `(N, D)`, to its k-th nearest other one, for each k of `neighbours`:
    `(len(neighbours), N)`."""
    features = features.double()
    most = max(neighbours)
    radii = []
    for rows in features.split(_rows_at_once(len(features))):
        nearest = torch.cdist(rows, features).topk(most + 1, dim=1, largest=False).values  # the nearest is itself
        radii.append(nearest[:, list(neighbours)])
    return torch.cat(radii).T.contiguous()


def neighbour_metrics(
    features: torch.Tensor, reference: torch.Tensor, reference_radii: torch.Tensor | None = None
) -> dict[str, float]:
    """
    `precision` and `recall` (Kynkäänniemi et al., k = 3), `density` and `coverage` (Naeem et al., k = 5).

    Around every reference feature is a ball that reaches to its k-th nearest neighbour. Precision is the share of
    samples in any ball, density how many balls a sample is in, divided by k, coverage the share of balls with a
    sample. Recall is precision with the roles exchanged. Distances are computed in parts, never all at once.

    Args:
        features (`torch.Tensor` of shape `(N, D)`), reference (`torch.Tensor` of shape `(M, D)`): N and M above 5.
        reference_radii (`torch.Tensor`, *optional*): `neighbour_radii(reference, (3, 5))`, if they are known.
    """
    features, reference = features.double(), reference.double()
    if reference_radii is None:
        reference_radii = neighbour_radii(reference, (PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS))
    radii = neighbour_radii(features, (PRECISION_NEIGHBOURS,))[0]
    precise = in_balls = 0
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=features.device)
    covered = torch.zeros_like(recalled)
    size = _rows_at_once(len(reference))
    for rows, row_radii in zip(features.split(size), radii.split(size), strict=True):
        distances = torch.cdist(rows, reference)
        precise += int((distances <= reference_radii[0]).any(dim=1).sum())
        recalled |= (distances <= row_radii[:, None]).any(dim=0)
        inside = distances < reference_radii[1]
        in_balls += int(inside.sum())
        covered |= inside.any(dim=0)
    return {
        "precision": precise / len(features),
        "recall": int(recalled.sum()) / len(reference),
        "density": in_balls / (DENSITY_NEIGHBOURS * len(features)),
        "coverage": int(covered.sum()) / len(reference),
    }


def clip_similarity(image_features: torch.Tensor, text_features: torch.Tensor) -> torch.Tensor:
    """max(100 cos(image, text), 0) of every image and its prompt, `(B,)`; the CLIP score is its mean."""
    cosine = torch.nn.functional.cosine_similarity(image_features.double(), text_features.double(), dim=-1)
    return (100 * cosine).clamp(min=0)


def _rows_at_once(columns: int) -> int:
    return max(1, _MAX_DISTANCES // columns)
