"""A world in closed form: mixtures of Gaussians, rewards that keep them so, and the exact models aligned at any β.

The model aligned at strength β to a reward r is `p ∝ p_0 exp(r/β)`. For a mixture of Gaussians `p_0` and a reward that
is linear or quadratic this is again a mixture of Gaussians, and so is its noised marginal at every noise level: the
exact prediction of the reference and of the model aligned at any strength is a formula, and so are expected reward,
mode weights, density and divergence. Nothing is trained, so nothing in such a world has to be believed.

A `World` makes ordinary diffusers pipelines (`World.pipeline`), which schedulers drive and `realign` takes. A "prompt"
reweights the components: conditional models, and with them classifier-free guidance, stay in closed form too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn

Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
"""What a denoiser predicts: ε, v or x_0 on Stable Diffusion's schedule, the velocity ε - x_0 of flow matching, or the
output of an EDM-preconditioned network (Karras et al. 2022, equation 7)."""

SIGMA_DATA = 0.5
"""EDM's assumed standard deviation of the data, as in diffusers' EDM schedulers."""


class Noise(NamedTuple):
    """A noise level: `x = alpha x_0 + sigma ε`."""

    alpha: Tensor | float
    sigma: Tensor | float


@dataclass(frozen=True)
class QuadraticReward:
    """`r(x) = linear·x - ½ Σ_d curvature_d x_d² + constant`: every reward that keeps a mixture of Gaussians one.

    Rewards add and scale: `r / beta` is the exponent of the aligned model, and a sum is several rewards at once.
    """

    linear: Float[Tensor, " dim"]
    curvature: Float[Tensor, " dim"]
    constant: float = 0.0

    def __call__(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """The reward of each row of `x`."""
        return x @ self.linear.to(x) - (x.square() @ self.curvature.to(x)) / 2 + self.constant

    def __add__(self, other: QuadraticReward) -> QuadraticReward:
        return QuadraticReward(
            self.linear + other.linear, self.curvature + other.curvature, self.constant + other.constant
        )

    def __mul__(self, factor: float | int) -> QuadraticReward:
        return QuadraticReward(factor * self.linear, factor * self.curvature, float(factor * self.constant))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float | int) -> QuadraticReward:
        return self * (1 / divisor)


def linear_reward(direction: Sequence[float] | Float[Tensor, " dim"]) -> QuadraticReward:
    """`r(x) = direction·x`. It moves every mode without bound as β falls and never narrows one."""
    a = torch.as_tensor(direction, dtype=torch.float64)
    return QuadraticReward(a, torch.zeros_like(a))


def peaked_reward(
    target: Sequence[float] | Float[Tensor, " dim"], curvature: float | int | Sequence[float] = 1.0
) -> QuadraticReward:
    """`r(x) = -½ Σ_d curvature_d (x_d - target_d)²`, greatest (zero) at `target`; curvature must be positive."""
    target = torch.as_tensor(target, dtype=torch.float64)
    q = torch.as_tensor(curvature, dtype=torch.float64).expand_as(target).clone()
    if not bool((q > 0).all()):
        raise ValueError(f"a reward with a peak has positive curvature, got {q.tolist()}")
    return QuadraticReward(q * target, q, float(-(q * target.square()).sum() / 2))


@dataclass(frozen=True)
class GaussianMixture:
    """`Σ_k exp(log_weights_k) N(means_k, diag(variances_k))` in double precision; the weights sum to one."""

    log_weights: Float[Tensor, " component"]
    means: Float[Tensor, "component dim"]
    variances: Float[Tensor, "component dim"]

    @property
    def dim(self) -> int:
        """How many dimensions a sample has."""
        return self.means.shape[1]

    @property
    def mode_weights(self) -> Float[Tensor, " component"]:
        """The probability of each component."""
        return self.log_weights.exp()

    def prompted(self, shifts: Float[Tensor, " component"]) -> GaussianMixture:
        """The conditional model under a prompt, which multiplies component k's weight by `exp(shifts_k)`."""
        return GaussianMixture(torch.log_softmax(self.log_weights + shifts, 0), self.means, self.variances)

    def noised(self, noise: Noise) -> GaussianMixture:
        """The marginal of `alpha x_0 + sigma ε`."""
        return GaussianMixture(
            self.log_weights, noise.alpha * self.means, noise.alpha**2 * self.variances + noise.sigma**2
        )

    def tilted(self, exponent: QuadraticReward) -> tuple[GaussianMixture, float]:
        """`p(x) exp(exponent(x)) / Z`, and `log Z` (complete the square in every component).

        Raises `ValueError` where the product has no finite integral, which a negative curvature can do.
        """
        precisions = 1 / self.variances + exponent.curvature
        if not bool((precisions > 0).all()):
            raise ValueError(
                f"p exp(r/β) is no distribution: a component of variance {float(self.variances.max()):g} cannot make "
                f"up for the reward's curvature {float(exponent.curvature.min()):g}"
            )
        variances = 1 / precisions
        means = variances * (self.means / self.variances + exponent.linear)
        squares = means.square() * precisions - self.means.square() / self.variances
        log_weights = self.log_weights + (squares + (variances / self.variances).log()).sum(1) / 2 + exponent.constant
        log_z = torch.logsumexp(log_weights, 0)
        return GaussianMixture(log_weights - log_z, means, variances), float(log_z)

    def log_joint(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch component"]:
        """`log p(x, component)`."""
        distance = (x[:, None] - self.means).square() / self.variances
        return self.log_weights - (distance + (2 * torch.pi * self.variances).log()).sum(2) / 2

    def log_density(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """`log p(x)`."""
        return torch.logsumexp(self.log_joint(x), 1)

    def modes_of(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch component"]:
        """The probability that each sample belongs to each component; their mean estimates `mode_weights`."""
        return torch.softmax(self.log_joint(x.to(self.means)), 1)

    def expected(self, reward: QuadraticReward) -> float:
        """The expectation of a reward."""
        second = self.means.square() + self.variances
        return float(self.mode_weights @ (self.means @ reward.linear - second @ reward.curvature / 2) + reward.constant)

    def sample(self, count: int, generator: torch.Generator | None = None) -> Float[Tensor, "batch dim"]:
        """`count` independent draws."""
        component = torch.multinomial(self.mode_weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.dim, dtype=self.means.dtype, generator=generator)
        return self.means[component] + self.variances[component].sqrt() * noise


def mixture(
    weights: Sequence[float], means: Sequence[Sequence[float]], variances: float | int | Sequence[Any]
) -> GaussianMixture:
    """A mixture from plain numbers. `variances`: one for all, one per component, or one per component and dimension.

    Raises `ValueError` for weights or variances that are not positive, and for shapes that do not fit.
    """
    w, m = torch.tensor(weights, dtype=torch.float64), torch.tensor(means, dtype=torch.float64)
    v = torch.as_tensor(variances, dtype=torch.float64)
    if m.ndim != 2 or w.shape != m.shape[:1] or v.shape not in ((), m.shape[:1], m.shape):
        raise ValueError(
            f"{len(weights)} weights, means of shape {list(m.shape)} and variances of shape {list(v.shape)} do not fit "
            "together: means are [component, dim], variances a number, [component] or [component, dim]"
        )
    if not bool((w > 0).all() & (v > 0).all()):
        raise ValueError("the weights and variances of a mixture must be positive")
    v = (v[:, None] if v.ndim == 1 else v).expand_as(m).clone()
    return GaussianMixture((w / w.sum()).log(), m, v)


@dataclass(frozen=True)
class World:
    """A reference, rewards, and what prompts do: everything about realignment that can be known exactly."""

    name: str
    reference: GaussianMixture
    rewards: Mapping[str, QuadraticReward]
    prompts: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Shifts of the components' log weights under each prompt, beside "", which is the reference itself."""

    def exponent(self, tilts: Mapping[str, float | int]) -> QuadraticReward:
        """`Σ_i tilts_i r_i`, where the tilt of reward i is `λ_i/β_i`. Raises `KeyError` for an unknown reward."""
        nothing = torch.zeros(self.reference.dim, dtype=torch.float64)
        return sum((self.rewards[name] * tilt for name, tilt in tilts.items()), QuadraticReward(nothing, nothing))

    def prompted(self, prompt: str = "") -> GaussianMixture:
        """The reference under a prompt."""
        return self.reference.prompted(self._shifts(prompt))

    def aligned(self, tilts: Mapping[str, float | int], prompt: str = "") -> GaussianMixture:
        """The model aligned to all rewards of `tilts` at once, `p_0 exp(Σ r_i λ_i/β_i)`, exactly."""
        return self.prompted(prompt).tilted(self.exponent(tilts))[0]

    def divergence(self, tilts: Mapping[str, float | int], prompt: str = "") -> float:
        """`KL(p || p_0)` of the model aligned at `tilts`, which is `E[Σ tilts_i r_i] - log Z`."""
        exponent = self.exponent(tilts)
        model, log_z = self.prompted(prompt).tilted(exponent)
        return model.expected(exponent) - log_z

    def denoiser(self, tilts: Mapping[str, float | int], prediction: Prediction = "epsilon") -> MixtureDenoiser:
        """The exact denoiser of the model aligned at `tilts`; no tilts are the reference."""
        return MixtureDenoiser.of(self.reference.tilted(self.exponent(tilts))[0], prediction)

    def pipeline(self, scheduler: Any, tilts: Mapping[str, float | int] | None = None) -> MixturePipeline:
        """A pipeline around the reference (or the model aligned at `tilts`) that samples with `scheduler`."""
        shifts = {name: self._shifts(name) for name in ("", *self.prompts)}
        return MixturePipeline(self.denoiser(tilts or {}, prediction_of(scheduler)), scheduler).with_prompts(shifts)

    def _shifts(self, prompt: str) -> Float[Tensor, " component"]:
        if prompt and prompt not in self.prompts:
            raise ValueError(f"the world {self.name!r} knows no prompt {prompt!r}, only {list(self.prompts)} and ''")
        plain = [0.0] * len(self.reference.means)
        return torch.tensor(self.prompts.get(prompt, plain), dtype=torch.float64)


def prediction_of(scheduler: Any) -> Prediction:
    """What `scheduler` expects a denoiser to predict."""
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow"
    return "edm" if name.startswith("EDM") else scheduler.config.prediction_type


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of a mixture, called like a diffusers UNet on latents of shape `[batch, dim]`.

    `encoder_hidden_states`, of shape `[batch, component]`, shifts the components' log weights: that is what a prompt
    is. The noise level follows from the timestep, on Stable Diffusion's schedule, as `t/1000` for flow matching, or as
    EDM's `¼ log σ`; between two timesteps σ is interpolated linearly, as diffusers' Euler family does.
    """

    @register_to_config
    def __init__(self, components: int, dim: int, prediction: Prediction = "epsilon") -> None:
        super().__init__()
        if prediction not in get_args(Prediction):
            raise ValueError(f"a denoiser predicts one of {', '.join(get_args(Prediction))}; got {prediction!r}")
        self.prediction = prediction
        self.log_weights = nn.Parameter(torch.zeros(components, dtype=torch.float64), requires_grad=False)
        self.means = nn.Parameter(torch.zeros(components, dim, dtype=torch.float64), requires_grad=False)
        self.variances = nn.Parameter(torch.ones(components, dim, dtype=torch.float64), requires_grad=False)

    @classmethod
    def of(cls, model: GaussianMixture, prediction: Prediction = "epsilon") -> MixtureDenoiser:
        """The denoiser of `model`."""
        denoiser = cls(components=len(model.means), dim=model.dim, prediction=prediction)
        for name in ("log_weights", "means", "variances"):
            getattr(denoiser, name).copy_(getattr(model, name))
        return denoiser

    def forward(
        self,
        sample: Float[Tensor, "batch dim"],
        timestep: Tensor | float | int,
        encoder_hidden_states: Float[Tensor, "batch component"] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """The prediction at `sample`, in double precision and returned in the sample's."""
        t = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        x = sample.double()
        if self.prediction == "edm":
            sigma = torch.exp(4 * torch.tensor(t, dtype=torch.float64))
            noise = Noise(1.0, sigma)
            x = x * (sigma**2 + SIGMA_DATA**2).sqrt()
        elif self.prediction == "flow":
            noise = Noise(1 - t / 1000, t / 1000)
        else:
            noise = variance_preserving(t)
        x_0, epsilon = self._parts(x, noise, encoder_hidden_states)
        match self.prediction:
            case "epsilon":
                prediction = epsilon
            case "sample":
                prediction = x_0
            case "flow":
                prediction = epsilon - x_0
            case "v_prediction":
                prediction = noise.alpha * epsilon - noise.sigma * x_0
            case "edm":
                total = noise.sigma**2 + SIGMA_DATA**2
                prediction = (x_0 - SIGMA_DATA**2 / total * x) * total**0.5 / (noise.sigma * SIGMA_DATA)
        prediction = prediction.to(sample.dtype)
        return UNet2DConditionOutput(sample=prediction) if return_dict else (prediction,)

    def _parts(self, x: Tensor, noise: Noise, shifts: Tensor | None) -> tuple[Tensor, Tensor]:
        """`E[x_0 | x]` and `E[ε | x]`, each without dividing by alpha or sigma."""
        alpha, sigma = noise
        variances = alpha**2 * self.variances + sigma**2
        residual = x[:, None] - alpha * self.means
        log_joint = self.log_weights - (residual.square() / variances + variances.log()).sum(2) / 2
        if shifts is not None:
            log_joint = log_joint + shifts.double()
        modes = torch.softmax(log_joint, 1)[:, :, None]
        standing = residual / variances
        x_0 = (modes * (self.means + alpha * self.variances * standing)).sum(1)
        return x_0, (modes * (sigma * standing)).sum(1)


def variance_preserving(timestep: float | int) -> Noise:
    """`alpha = √ᾱ`, `sigma = √(1 - ᾱ)` of Stable Diffusion's schedule; σ/α is linear between whole timesteps."""
    ratios = _ratios()
    low = min(max(int(timestep), 0), len(ratios) - 2)
    ratio = torch.lerp(ratios[low], ratios[low + 1], torch.tensor(timestep - low, dtype=torch.float64))
    alpha = 1 / (1 + ratio**2).sqrt()
    return Noise(alpha, ratio * alpha)


def _ratios() -> Float[Tensor, " timestep"]:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0).double()
    return ((1 - alpha_bar) / alpha_bar).sqrt()


SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
"""Stable Diffusion's noise schedule, for the schedulers of a world's pipelines."""


class MixturePipeline(DiffusionPipeline):
    """Sampling from a `MixtureDenoiser` with any diffusers scheduler, in the manner of diffusers' own pipelines."""

    unet: MixtureDenoiser
    scheduler: Any

    def __init__(self, unet: MixtureDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._shifts: dict[str, Tensor] = {"": torch.zeros_like(unet.log_weights)}

    def with_prompts(self, shifts: Mapping[str, Float[Tensor, " component"]]) -> MixturePipeline:
        """Know these prompts (see `World.prompts`)."""
        self._shifts = dict(shifts)
        return self

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = "",
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 100,
        guidance_scale: float | int = 1.0,
        eta: float | int = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Float[Tensor, "batch dim"] | None = None,
        output_type: str = "latent",
        return_dict: bool = True,
    ) -> Any:
        """Samples of shape `[batch, dim]` as `images`; arguments as in diffusers' text-to-image pipelines."""
        names = [prompt] if isinstance(prompt, str) else prompt
        shifts = torch.stack([self._shifts[name] for name in names]).repeat_interleave(num_images_per_prompt, 0)
        if latents is None:
            shape = (len(shifts), self.unet.config.dim)
            latents = randn_tensor(shape, generator=generator, device=self.device, dtype=self.unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        x = latents * self.scheduler.init_noise_sigma if hasattr(self.scheduler, "init_noise_sigma") else latents
        extra: dict[str, Any] = {"eta": eta} if "eta" in self._step_arguments() else {}
        if "generator" in self._step_arguments():
            extra["generator"] = generator
        guided = guidance_scale != 1
        for t in self.progress_bar(self.scheduler.timesteps):
            scale = getattr(self.scheduler, "scale_model_input", lambda sample, _: sample)
            rows = scale(torch.cat([x, x]) if guided else x, t)
            condition = torch.cat([torch.zeros_like(shifts), shifts]) if guided else shifts
            prediction = self.unet(rows, t, encoder_hidden_states=condition, return_dict=False)[0]
            if guided:
                plain, conditional = prediction.chunk(2)
                prediction = plain + guidance_scale * (conditional - plain)
            x = self.scheduler.step(prediction, t, x, **extra, return_dict=False)[0]
        return ImagePipelineOutput(images=x) if return_dict else (x,)

    def _step_arguments(self) -> Mapping[str, Any]:
        from inspect import signature

        return signature(self.scheduler.step).parameters


def random_world(
    seed: int, components: int, dim: int, rewards: int = 1, *, peaked: bool = False, spread: float | int = 2.0
) -> World:
    """A world drawn at random: means `spread` apart in scale, variances 0.05 to 0.5, rewards of unit slope.

    `peaked` rewards are quadratic around a random target. Two prompts, "first" and "second", favour the first and the
    second half of the components.
    """
    chance = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=chance)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=chance)

    reference = GaussianMixture(
        torch.log_softmax(0.5 * normal(components), 0),
        spread * normal(components, dim) / dim**0.5,
        0.05 + 0.45 * uniform(components, dim),
    )
    forms: dict[str, QuadraticReward] = {}
    for i in range(rewards):
        direction = normal(dim)
        direction = direction / direction.norm()
        forms[f"reward {i + 1}"] = peaked_reward(spread * direction, 0.5) if peaked else linear_reward(direction)
    half = [1.0 if k < components // 2 else -1.0 for k in range(components)]
    return World(f"random {seed}", reference, forms, {"first": half, "second": [-s for s in half]})


def crossing() -> World:
    """Four modes on a cross in the plane, the reward leaning to the right: the world of this project's own study.

    Means (±2, 0) and (0, ±2), variance 0.15, equal weights; rewards `x·(1, 0.6)` ("slope") and `x·(-0.3, 1)` ("lift").
    """
    reference = mixture([1, 1, 1, 1], [[2, 0], [-2, 0], [0, 2], [0, -2]], 0.15)
    return World(
        "crossing",
        reference,
        {"slope": linear_reward([1.0, 0.6]), "lift": linear_reward([-0.3, 1.0])},
        {"right": [1.0, -1.0, 0.0, 0.0], "left": [-1.0, 1.0, 0.0, 0.0]},
    )
