"""The trajectory function of Physics Informed Distillation as a diffusers scheduler.

This file imports nothing but diffusers and torch, so that it can travel with a checkpoint.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

PREDICTION_TYPES = ("sample", "edm", "epsilon", "v_prediction", "residual", "score")
TIMESTEP_TYPES = ("edm", "edm_scaled", "discrete", "sigma")


@dataclass
class PIDSchedulerOutput(BaseOutput):
    """
    Output of [`PIDScheduler.step`].

    Args:
        prev_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            x_θ(z, σ), the student's point of the trajectory at the noise level asked for.
        pred_original_sample (`torch.Tensor` of shape `(batch_size, num_channels, height, width)`):
            X_θ(z, σ), the head's output: what the trajectory function mixes with z.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class PIDScheduler(SchedulerMixin, ConfigMixin):
    r"""
    Turns a raw network F_θ into the trajectory function of Physics Informed Distillation.

    With T = `sigma_max`, z ~ N(0, T² I) and noise levels t in the units of the data (EDM's σ):

        x_θ(z, t) = (t/T) z + ((T−t)/T) X_θ(z, t)                                   (PID, eq. 7)
        X_θ(z, t) = a z + b F_θ(c_in(T) z, c_noise(t)),   c_in(T) = 1/√(σ_data² + T²)

    x_θ(z, T) = z holds bit for bit in any floating-point type. Unlike in other diffusers schedulers the noise levels
    are independent of each other: `step` computes a point of the trajectory from the *start* z, never from the point
    before.

    The grid is EDM's (Karras et al. 2022, eq. 5) with N = `num_train_timesteps` points:

        t_i = (T^(1/ρ) + i/(N−1) · (ε^(1/ρ) − T^(1/ρ)))^ρ,   i = 0 … N−1,   t_0 = T,   t_{N−1} = ε = `sigma_min`

    Args:
        num_train_timesteps (`int`, defaults to 250): N, the number of grid points of the training loss; at least 2.
        sigma_min (`float`, defaults to 0.002): ε, the noise level of a finished sample.
        sigma_max (`float`, defaults to 80.0): T, the noise level of the start z.
        sigma_data (`float`, defaults to 0.5): standard deviation of the data; 1.0 for variance-preserving teachers.
        rho (`float`, defaults to 7.0): ρ, how strongly the grid is condensed at low noise.
        prediction_type (`str`, defaults to `"sample"`): the head (a, b). `"sample"`: (0, 1), the paper's. The others
            are a teacher's own coefficients at σ = T, so that a copy of the teacher begins with X_θ(z, T) = D(z, T).
            `"edm"`: (σ_d²/(σ_d²+T²), Tσ_d/√(σ_d²+T²)); `"epsilon"`: (1, −T);
            `"v_prediction"`: (σ_d²/(σ_d²+T²), −Tσ_d/√(σ_d²+T²)). `"residual"`: (c_in(T), −1), for networks that
            predict noise: it is near 0 at first, and their error is not multiplied by T as in `"epsilon"`. `"score"`:
            the same for networks that predict the score and see z as it is, X_θ = z/T + σ F_θ(z, c_noise(σ)).
        timestep_type (`str`, defaults to `"edm"`): c_noise. `"edm"`: ln(σ)/4; `"edm_scaled"`: 250 ln(σ);
            `"discrete"`: the real-valued index of σ among the noise levels √((1−ᾱ_k)/ᾱ_k) of a discrete diffusion
            model, interpolated linearly in ln(σ), and at the ends the first or last index; `"sigma"`: σ itself.
        beta_schedule (`str`, *optional*): β_k of that model, for `"discrete"`, by the names that diffusers gives to
            schedules (`"linear"`, `"scaled_linear"`, `"squaredcos_cap_v2"`, …).
        beta_start (`float`, defaults to 0.0001), beta_end (`float`, defaults to 0.02): its first and last β.
        num_beta_steps (`int`, defaults to 1000): how many there are.
        trained_betas (`list[float]`, *optional*): all of them, instead of a schedule.
        guidance_scale (`float`, *optional*): w of the ODE that is solved, where that is the teacher's with
            classifier-free guidance, D = D_uncond + w (D_cond − D_uncond).
        guidance_range (`list[float]`, *optional*): the lowest and highest w, where the network is told w as an
            embedding and solves the ODE of each.
        sample_min (`float`, defaults to -1.0): the lowest value of a pixel, -1 or 0; the highest is 1. It says how a
            sample is shown, and changes nothing that is computed here.

    Raises:
        ValueError: for an unknown head, timestep type or schedule, N < 2, σ_data ≤ 0, ρ ≤ 0, unless
            0 < σ_min < σ_max, for a w below 0, two of them in the wrong order, or both kinds, or for a lowest value
            that is neither -1 nor 0.

    Source: Tee et al., Physics Informed Distillation for Diffusion Models; Karras et al. 2022 (EDM).
    """

    # What `model_index.json` records as the library, wherever this file was loaded from: diffusers then takes the
    # class from that package if it is imported, else from the file `pid_diffusers.py` that `save_pretrained` writes.
    __module__ = "pid_diffusers"
    # Kept, and in the class: diffusers copies the code of every local folder to one place and runs it as one module.
    _source = __spec__.loader.get_source(__spec__.name)
    # Only names and ranges are shared: EDMEulerScheduler's "epsilon" is what is called "edm" here.
    _compatibles = ["EDMEulerScheduler"]
    order = 1

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 250,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        prediction_type: str = "sample",
        timestep_type: str = "edm",
        beta_schedule: str | None = None,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        num_beta_steps: int = 1000,
        trained_betas: list[float] | None = None,
        guidance_scale: float | None = None,
        guidance_range: list[float] | None = None,
        sample_min: float = -1.0,
    ):
        if prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; choose one of {', '.join(PREDICTION_TYPES)}.")
        if timestep_type not in TIMESTEP_TYPES:
            raise ValueError(f"timestep_type is {timestep_type!r}; choose one of {', '.join(TIMESTEP_TYPES)}.")
        if num_train_timesteps < 2 or num_train_timesteps != int(num_train_timesteps):
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; a grid needs 2 points or more.")
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(
                f"sigma_min is {sigma_min} and sigma_max is {sigma_max}; choose finite values with"
                " 0 < sigma_min < sigma_max."
            )
        if not 0 < sigma_data < math.inf or not 0 < rho < math.inf:
            raise ValueError(f"sigma_data is {sigma_data} and rho is {rho}; both must be positive and finite.")
        if (timestep_type == "discrete") != (beta_schedule is not None or trained_betas is not None):
            raise ValueError(
                f"timestep_type is {timestep_type!r}, beta_schedule {beta_schedule!r}; a discrete model needs"
                " beta_schedule or trained_betas, and no other has them."
            )
        if guidance_scale is not None and guidance_range is not None:
            raise ValueError("guidance_scale and guidance_range were both passed; pass one of them.")
        if guidance_scale is not None and not 0 <= guidance_scale < math.inf:
            raise ValueError(f"guidance_scale is {guidance_scale}; pass a finite number of at least 0.")
        if guidance_range is not None and (
            len(guidance_range) != 2 or not 0 <= guidance_range[0] < guidance_range[1] < math.inf
        ):
            raise ValueError(f"guidance_range is {guidance_range}; pass two numbers, 0 or more, the lower one first.")
        if sample_min not in (-1, 0):
            raise ValueError(f"sample_min is {sample_min!r}; choose -1 or 0, the lowest value of a pixel.")
        if timestep_type == "discrete":
            self._log_sigmas = self.discrete_sigmas.log()
        self.init_noise_sigma = sigma_max
        self.num_inference_steps = None
        self.sigmas = self.grid().to(torch.float32)
        self.timesteps = self.sigma_to_timestep(self.grid()).to(torch.float32)

    def grid(self, num_points: int | None = None) -> torch.Tensor:
        """EDM's grid from T down to ε with `num_points` (default: N) points, `(num_points,)` in float64 on the CPU.

        The ends are T and ε exactly, not the rounded result of the ρ-th power of a ρ-th root.
        """
        n = self.config.num_train_timesteps if num_points is None else num_points
        start, end = self.config.sigma_max ** (1 / self.config.rho), self.config.sigma_min ** (1 / self.config.rho)
        grid = (start + torch.arange(n, dtype=torch.float64) / (n - 1) * (end - start)) ** self.config.rho
        grid[0], grid[-1] = self.config.sigma_max, self.config.sigma_min
        return grid

    @property
    def discrete_sigmas(self) -> torch.Tensor:
        """σ_k = √((1−ᾱ_k)/ᾱ_k) of a discrete model, `(num_beta_steps,)` in float64 on the CPU."""
        try:
            schedule = DDPMScheduler(
                num_train_timesteps=self.config.num_beta_steps,
                beta_start=self.config.beta_start,
                beta_end=self.config.beta_end,
                beta_schedule=self.config.beta_schedule or "linear",
                trained_betas=self.config.trained_betas,
            )
        except NotImplementedError as error:
            raise ValueError(
                f"beta_schedule is {self.config.beta_schedule!r}; choose one that diffusers has."
            ) from error
        alphas_cumprod = schedule.alphas_cumprod.to(torch.float64)
        return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()

    @property
    def c_in(self) -> float:
        """c_in(T) = 1/√(σ_data² + T²): scales the start z to unit variance for the network, at every noise level.

        With the head `"score"` it is 1.
        """
        if self.config.prediction_type == "score":
            return 1.0
        return 1 / math.hypot(self.config.sigma_data, self.config.sigma_max)

    @property
    def head(self) -> tuple[float, float]:
        """(a, b) of X_θ = a z + b F_θ, with F_θ from [`~PIDScheduler.network_output`]."""
        if self.config.prediction_type == "sample":
            return 0.0, 1.0
        if self.config.prediction_type == "epsilon":
            return 1.0, -self.config.sigma_max
        if self.config.prediction_type == "residual":
            return self.c_in, -1.0
        if self.config.prediction_type == "score":
            return 1 / self.config.sigma_max, 1.0
        a = (self.config.sigma_data * self.c_in) ** 2
        b = self.config.sigma_max * self.config.sigma_data * self.c_in
        return (a, b) if self.config.prediction_type == "edm" else (a, -b)

    @staticmethod
    def sigma_tensor(sigma: float | torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """σ on z's device: a floating-point tensor as it is, anything else in float32, or in z's type if wider."""
        keep = torch.is_tensor(sigma) and sigma.is_floating_point()
        return torch.as_tensor(sigma, dtype=None if keep else torch.promote_types(z.dtype, torch.float32)).to(z.device)

    def sigma_to_timestep(self, sigma: torch.Tensor) -> torch.Tensor:
        """c_noise(σ), the number that the network is told: ln(σ)/4, 250 ln(σ), an index or σ (`timestep_type`)."""
        if self.config.timestep_type == "sigma":
            return sigma
        if self.config.timestep_type == "edm":
            return sigma.log() / 4
        if self.config.timestep_type == "edm_scaled":
            return sigma.log() * 250
        log_sigma, knots = sigma.log(), self._log_sigmas.to(sigma.device, sigma.dtype)
        k = torch.searchsorted(knots, log_sigma.contiguous()).clamp(1, len(knots) - 1) - 1
        return k + ((log_sigma - knots[k]) / (knots[k + 1] - knots[k])).clamp(0, 1)

    def timestep_to_sigma(self, timestep: float | torch.Tensor) -> torch.Tensor:
        """
        The noise level behind a scalar `timestep`: exactly that of the schedule if it is one of `self.timesteps`, else
        the inverse of c_noise.

        Raises:
            ValueError: if the noise level lies above T, as for an index of the schedule.
        """
        timestep = torch.as_tensor(timestep, dtype=torch.float32).to(self.timesteps.device)
        indices = (self.timesteps == timestep).nonzero()
        if len(indices) > 0:
            return self.sigmas[indices[0, 0]]
        if self.config.timestep_type == "discrete":
            knots = self._log_sigmas.to(timestep.device, timestep.dtype)
            k = timestep.floor().long().clamp(0, len(knots) - 2)
            sigma = torch.exp(knots[k] + (timestep - k) * (knots[k + 1] - knots[k]))
        elif self.config.timestep_type == "sigma":
            sigma = timestep
        else:
            sigma = torch.exp(timestep / 250 if self.config.timestep_type == "edm_scaled" else timestep * 4)
        if not sigma <= self.config.sigma_max * (1 + 1e-5):  # rounded
            raise ValueError(
                f"timestep {timestep.item():g} means a noise level of {sigma.item():g}, above sigma_max ="
                f" {self.config.sigma_max:g}; pass an element of scheduler.timesteps, not an index."
            )
        return sigma

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | torch.Tensor | None = None,
    ):
        """
        Chooses the noise levels at which the trajectory is evaluated.

        Args:
            num_inference_steps (`int`, *optional*): the n points after the start on a grid of n + 1; 1 (the default)
                gives ε alone, the one-step sample.
            device: where `timesteps` and `sigmas` are put.
            sigmas (`list[float]`, *optional*): these noise levels instead, in any order, each in [0, T]; 0 is
                extrapolated as ε, since ln(0) cannot be told to a network.

        Raises:
            ValueError: if both or an empty or out-of-range list are given, or `num_inference_steps` is below 1.
        """
        if sigmas is not None and num_inference_steps is not None:
            raise ValueError("num_inference_steps and sigmas were both passed; pass one of them.")
        if sigmas is not None:
            sigmas = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten()
            if len(sigmas) == 0:
                raise ValueError("sigmas is empty; pass at least one noise level.")
            # a float32 rounding of T lies just above a T such as 14.6146
            if not bool(((sigmas >= 0) & (sigmas <= self.config.sigma_max * (1 + 1e-6))).all()):
                raise ValueError(
                    f"sigmas is {sigmas.tolist()}; every noise level must lie between 0 and sigma_max ="
                    f" {self.config.sigma_max:g}."
                )
            sigmas = sigmas.clamp(self.config.sigma_min, self.config.sigma_max)
        else:
            num_inference_steps = 1 if num_inference_steps is None else num_inference_steps
            if num_inference_steps < 1:
                raise ValueError(f"num_inference_steps is {num_inference_steps}; pass at least 1.")
            sigmas = self.grid(num_inference_steps + 1)[1:]
        self.num_inference_steps = len(sigmas)
        self.sigmas = sigmas.to(device=device, dtype=torch.float32)
        self.timesteps = self.sigma_to_timestep(sigmas).to(device=device, dtype=torch.float32)

    def scale_model_input(self, sample: torch.Tensor, timestep: float | torch.Tensor | None = None) -> torch.Tensor:
        """c_in(T) z, whatever the `timestep`: the network always sees the start of the trajectory.

        Args:
            sample (`torch.Tensor`): z ~ N(0, T² I).
            timestep: unused; there because schedulers are interchangeable.
        """
        return sample * self.c_in

    @staticmethod
    def without_variance(model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The first half of the channels, where the network gives a learned variance in the other half."""
        return model_output[:, : sample.shape[1]] if model_output.shape[1] == 2 * sample.shape[1] else model_output

    @staticmethod
    def guidance_embedding(guidance_scale: torch.Tensor, embedding_dim: int) -> torch.Tensor:
        """
        What a network with `time_cond_proj_dim` = `embedding_dim` is told of w: the sines and cosines of 1000 (w − 1)
        that latent consistency models use, `(B,)` → `(B, embedding_dim)` in float32.
        """
        return get_timestep_embedding(1000 * (guidance_scale.float() - 1), embedding_dim)

    def network_output(self, model_output: torch.Tensor, z: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        """
        F_θ of the head, `(B, C, H, W)`, from what the network gives: without a learned variance, and for the head
        `"score"` times σ.

        Args:
            model_output (`torch.Tensor` of shape `(B, C, H, W)` or `(B, 2C, H, W)`): at c_in(T) z and c_noise(σ).
            z (`torch.Tensor` of shape `(B, C, H, W)`): the start.
            sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): the noise level.
        """
        output = self.without_variance(model_output, z)
        if self.config.prediction_type != "score":
            return output
        sigma = self.sigma_tensor(sigma, z)
        return output * (sigma.reshape(-1, *[1] * (z.ndim - 1)) if sigma.ndim else sigma)

    def trajectory(
        self, network_output: torch.Tensor, z: torch.Tensor, sigma: float | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        x_θ(z, σ) and X_θ(z, σ) from the network's output (eq. 7).

        Args:
            network_output (`torch.Tensor` of shape `(B, C, H, W)`): F_θ, from [`~PIDScheduler.network_output`].
            z (`torch.Tensor` of shape `(B, C, H, W)`): the start, of standard deviation T.
            sigma (`float` or `torch.Tensor` of shape `()` or `(B,)`): the noise level, in [0, T].

        Computed in float32, or float64 if z is, with σ/T in σ's own type. Both results have z's type.
        """
        dtype = torch.promote_types(z.dtype, torch.float32)
        sigma = self.sigma_tensor(sigma, z)
        sigma = sigma.reshape(-1, *[1] * (z.ndim - 1)) if sigma.ndim else sigma
        # A tensor, because CUDA divides by a Python number through its reciprocal, and T · (1/T) need not be 1.
        skip = sigma / torch.as_tensor(self.config.sigma_max, dtype=sigma.dtype, device=z.device)
        a, b = self.head
        start = z.to(dtype)
        head = a * start + b * network_output.to(dtype)
        x = skip * start + (1 - skip) * head
        return x.to(z.dtype), head.to(z.dtype)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> PIDSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """
        The point of the trajectory at `timestep`, from its start.

        Args:
            model_output (`torch.Tensor`): what the network gives at c_in(T) z and `timestep`.
            timestep (`float` or `torch.Tensor`): an element of `self.timesteps`.
            sample (`torch.Tensor`): z, the start of the trajectory (not the result of an earlier step).
            generator (`torch.Generator`, *optional*): unused, since nothing is random here.
            return_dict (`bool`, defaults to `True`): a [`PIDSchedulerOutput`] instead of a tuple.
        """
        sigma = self.timestep_to_sigma(timestep)
        x, head = self.trajectory(self.network_output(model_output, sample, sigma), sample, sigma)
        if not return_dict:
            return x, head
        return PIDSchedulerOutput(prev_sample=x, pred_original_sample=head)

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """x + σ n: clean samples `(B, …)` at the noise levels of `timesteps`, `(B,)` elements of `self.timesteps`."""
        sigma = torch.stack([self.timestep_to_sigma(t) for t in torch.as_tensor(timesteps).flatten()])
        sigma = sigma.to(device=original_samples.device, dtype=original_samples.dtype)
        return original_samples + sigma.reshape(-1, *[1] * (original_samples.ndim - 1)) * noise

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs):
        """
        Saves the configuration, and this file beside it as `pid_diffusers.py`, so that
        `DiffusionPipeline.from_pretrained(…, trust_remote_code=True)` needs nothing that is not in the folder.

        Args:
            save_directory (`str` or `os.PathLike`): a folder, made if it is absent.
            push_to_hub (`bool`, defaults to `False`), **kwargs: as for every scheduler.
        """
        library = PIDScheduler.__module__
        if type(self).__module__ == library:  # not a subclass from elsewhere
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{library}.py").write_text(self._source, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def __len__(self) -> int:
        return self.config.num_train_timesteps
