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
from functools import lru_cache
from typing import Any, ClassVar, Literal, get_args

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.worlds.closed_form import GaussianMixture, Noise, QuadraticReward, linear_reward, mixture, peaked_reward

Prediction = Literal["epsilon", "v_prediction", "sample", "flow", "edm"]
"""What a denoiser predicts: ε, v or x_0 on Stable Diffusion's schedule, the velocity ε - x_0 of flow matching, or the
output of an EDM-preconditioned network (Karras et al. 2022, equation 7)."""

SIGMA_DATA = 0.5
"""EDM's assumed standard deviation of the data, as in diffusers' EDM schedulers."""


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
        """A pipeline around the reference (or the model aligned at `tilts`) that samples with `scheduler`.

        Raises `ValueError` for a scheduler whose noise schedule is not the denoiser's, Stable Diffusion's (`SCHEDULE`).
        """
        if prediction_of(scheduler) not in ("flow", "edm"):
            mine = 1 / (1 + _ratios() ** 2)
            theirs = scheduler.alphas_cumprod.double()
            if mine.shape != theirs.shape or not torch.allclose(mine, theirs, rtol=1e-3):
                raise ValueError(
                    f"{type(scheduler).__name__} has another noise schedule than the world's denoisers: make it with "
                    "**gaussian_mixture.SCHEDULE, Stable Diffusion's, and without rescale_betas_zero_snr"
                )
        shifts = {name: self._shifts(name) for name in ("", *self.prompts)}
        return MixturePipeline(self.denoiser(tilts or {}, prediction_of(scheduler)), scheduler).with_prompts(shifts)

    def _shifts(self, prompt: str) -> Float[Tensor, " component"]:
        if prompt and prompt not in self.prompts:
            raise ValueError(f"the world {self.name!r} knows no prompt {prompt!r}, only {list(self.prompts)} and ''")
        plain = [0.0] * len(self.reference.means)
        return torch.tensor(self.prompts.get(prompt, plain), dtype=torch.float64)


def prediction_of(scheduler: Any) -> Prediction:
    """What `scheduler` expects a denoiser to predict; `ValueError` for EDM with another preconditioning."""
    name = type(scheduler).__name__
    if name.startswith("FlowMatch") or scheduler.config.get("prediction_type") == "flow_prediction":
        return "flow"
    predicted = scheduler.config.prediction_type
    if not name.startswith("EDM"):
        return predicted
    if predicted != "epsilon":
        raise ValueError(f"a world drives {name} with prediction_type='epsilon' alone, got {predicted!r}")
    return "edm"


class MixtureDenoiser(ModelMixin, ConfigMixin):
    """The exact denoiser of a mixture, called like a diffusers UNet on latents of shape `[batch, dim]`.

    `encoder_hidden_states`, of shape `[batch, component]`, shifts the components' log weights: that is what a prompt
    is. The noise level follows from the timestep, on Stable Diffusion's schedule, as `t/1000` for flow matching, or as
    EDM's `¼ log σ`; between two timesteps σ is interpolated linearly, as diffusers' Euler family does (with Karras
    sigmas it interpolates log σ, and the two differ a little).
    """

    batch_axes: ClassVar = {"sample": 0, "timestep": 0, "encoder_hidden_states": 0}

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
        if isinstance(timestep, Tensor) and bool((timestep != timestep.flatten()[0]).any()):
            raise ValueError("all rows of a batch have the same timestep here")
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
        means, own_variances, log_weights = self.means.double(), self.variances.double(), self.log_weights.double()
        precisions = 1 / (alpha**2 * own_variances + sigma**2)
        standing_means = alpha * means * precisions
        # Squares written out, so that all of it is products of matrices: faster than with an axis of components.
        constant = log_weights - (alpha * means * standing_means - precisions.log()).sum(1) / 2
        log_joint = torch.addmm(constant, x, standing_means.T) - x.square() @ precisions.T / 2
        if shifts is not None:
            log_joint = log_joint + shifts.double()
        modes = torch.softmax(log_joint.T, 0).T  # torch is slow along a short last axis
        standing = x * (modes @ precisions) - modes @ standing_means
        gained = x * (modes @ (own_variances * precisions)) - modes @ (own_variances * standing_means)
        return modes @ means + alpha * gained, sigma * standing


def variance_preserving(timestep: float | int) -> Noise:
    """`alpha = √ᾱ`, `sigma = √(1 - ᾱ)` of Stable Diffusion's schedule; σ/α is linear between whole timesteps."""
    ratios = _ratios()
    low = min(max(int(timestep), 0), len(ratios) - 2)
    ratio = torch.lerp(ratios[low], ratios[low + 1], torch.tensor(timestep - low, dtype=torch.float64))
    alpha = 1 / (1 + ratio**2).sqrt()
    return Noise(alpha, ratio * alpha)


@lru_cache(maxsize=1)
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
        return_dict: bool = True,
    ) -> Any:
        """Samples of shape `[batch, dim]` as `images`; arguments as in diffusers' text-to-image pipelines."""
        names = [prompt] if isinstance(prompt, str) else prompt
        if unknown := [name for name in names if name not in self._shifts]:
            raise ValueError(f"this world knows no prompt {unknown[0]!r}, only {list(self._shifts)}")
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
