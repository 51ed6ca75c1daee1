"""The best possible denoiser of a finite data set, in closed form."""

import torch

from .base import Denoiser


class EmpiricalDenoiser(Denoiser):
    r"""
    The denoiser that is optimal for the empirical distribution of a finite data set {y_k}:

        D(x, σ) = Σ_k w_k y_k,   w = softmax_k( −‖x − y_k‖² / (2σ²) )

    An exact teacher that needs no training. With labels, D(x, σ, class_labels=c) takes only the y_k of class c.

    Args:
        data (`torch.Tensor` of shape `(K, C, H, W)`): the data set; its type is the type of the arithmetic.
        labels (`torch.Tensor` of shape `(K,)`, *optional*): the class of each y_k.
        sigma_min, sigma_max (`float`): the noise levels between which a student shall follow.

    Raises:
        ValueError: if data is empty, or labels have another length.

    Source: Karras et al. 2022, appendix B.3.
    """

    def __init__(
        self,
        data: torch.Tensor,
        labels: torch.Tensor | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ):
        super().__init__()
        if len(data) == 0:
            raise ValueError("data is empty; pass at least one image.")
        if labels is not None and len(labels) != len(data):
            raise ValueError(f"labels has {len(labels)} entries for {len(data)} images; pass one label an image.")
        self.register_buffer("data", data)
        self.register_buffer("labels", labels)
        self.trajectory_config = {"sigma_min": sigma_min, "sigma_max": sigma_max}

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return tuple(self.data.shape[1:])

    @property
    def num_classes(self) -> int | None:
        return None if self.labels is None else int(self.labels.max()) + 1

    def forward(
        self, x: torch.Tensor, sigma: float | torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            x (`torch.Tensor` of shape `(B, C, H, W)`): noisy images.
            sigma (`float` or `torch.Tensor` of shape `(B,)`): noise levels.
            class_labels (`torch.Tensor` of shape `(B,)`, *optional*): every class must occur in the data.

        Raises:
            ValueError: if class_labels are passed without labels, or a class does not occur in the data.
        """
        data = self.data.flatten(1)
        sigma = torch.as_tensor(sigma, dtype=data.dtype, device=x.device).reshape(-1, 1)
        # Exact differences: the matrix product that cdist prefers loses everything at σ = 0.002.
        distances = torch.cdist(
            x.flatten(1).to(data.dtype), data, compute_mode="donot_use_mm_for_euclid_dist"
        )  # (B, K)
        logits = -(distances**2) / (2 * sigma**2)
        if class_labels is not None:
            if self.labels is None:
                raise ValueError("class_labels was passed, but the data has no labels; pass labels when creating it.")
            same = class_labels[:, None] == self.labels[None, :]
            if not bool(same.any(dim=1).all()):
                raise ValueError(f"class_labels is {class_labels.tolist()}; at least one class is not in the data.")
            logits = logits.masked_fill(~same, -torch.inf)
        return (logits.softmax(dim=1) @ data).reshape(x.shape).to(x.dtype)
