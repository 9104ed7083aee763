"""Sampling that gradients can go back through: for reward gradients, and for the gradient of the initial noise.

The loop is that of a diffusers pipeline, over the parts of a `Base`. What a row is drawn from does not depend on its
batch.
"""

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deradiff.alignment.base import Base, Conditions
from deradiff.alignment.noising import FlowNoising
from deradiff.alignment.pixels import decoded
from deradiff.sampling.pictures import require_decoded, upcast
from deradiff.schedulers import FlowMatchSDEScheduler
from deradiff.sweep import pipelines


@dataclass(frozen=True)
class SamplerSettings:
    """How to sample: a scheduler by its name in `pipelines.SCHEDULERS`, so many steps, classifier-free guidance.

    `resolution` is the side of the pictures in pixels, by default the model's own. `eta`, above 0 to 1, is the noise of
    `flow-sde` and of DDIM's chains (`path_kl.Chain`), 1 being memoryless. Raises `ValueError` for fewer than one step,
    a guidance scale below 1 and another eta.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    resolution: int | None = None
    eta: float | int = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"{self.steps} sampling steps: take 1 or more")
        if not 1 <= self.guidance_scale < float("inf"):
            raise ValueError(f"a guidance scale of {self.guidance_scale}: 1 is no guidance, less is not supported")
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta = {self.eta}: the noise of a sampler's steps lies above 0 and is 1 at most")

    def prepared(self, base: Base) -> Any:
        """A scheduler for `base` with its timesteps set."""
        scheduler = pipelines.scheduler_like(base.pipe.scheduler, self.scheduler)
        if isinstance(scheduler, FlowMatchSDEScheduler):
            scheduler.register_to_config(eta=self.eta)
        return base.call.prepared(scheduler, self.steps)

    def noise(self, base: Base, generators: Sequence[torch.Generator]) -> Float[Tensor, "batch *latent"]:
        """Standard normal noise in single precision at least, a generator for each row."""
        shape = base.call.latent_shape(self.resolution)
        rows = [torch.randn(*shape, generator=g) for g in generators]
        return torch.stack(rows).to(base.denoiser.device, torch.promote_types(base.denoiser.dtype, torch.float32))


@dataclass(frozen=True)
class DifferentiatedStep:
    """A step that gradients go through: what the denoiser saw, and the prediction that the step was taken with."""

    noisy: Float[Tensor, "batch *latent"]
    timestep: Shaped[Tensor, ""]
    prediction: Float[Tensor, "batch *latent"]


@dataclass(frozen=True)
class Sampled:
    """Clean latents, and the last steps, those that gradients go through, in their order."""

    latents: Float[Tensor, "batch *latent"]
    steps: list[DifferentiatedStep]


def conditions(
    base: Base, prompts: Sequence[str], resolution: int | None = None, guidance_scale: float | None = None
) -> Conditions:
    """What the denoiser is told of `prompts`, for pictures of that resolution (by default the model's), uncropped.

    One that is told the guidance scale is told this one, by default its pipeline's.
    """
    prompted = base.call.encode_prompts(prompts, guidance_scale)
    return base.call.with_sizes(prompted, _sizes(resolution, len(prompts)))


def unconditional(base: Base, count: int, resolution: int | None = None) -> Conditions:
    """What the denoiser is told without a prompt, `count` times: the pipeline's own choice, zeros for SDXL."""
    return base.call.with_sizes(base.call.unprompted(count), _sizes(resolution, count))


def told(base: Base, prompts: Sequence[str], sampling: SamplerSettings) -> tuple[Conditions, Conditions | None]:
    """What the denoiser is told of `prompts` by `sampling`, and without one, where that guides."""
    prompted = conditions(base, prompts, sampling.resolution, sampling.guidance_scale)
    guided = sampling.guidance_scale > 1 and not base.call.guidance_is_embedded
    return prompted, unconditional(base, len(prompts), sampling.resolution) if guided else None


def _sizes(resolution: int | None, count: int) -> Tensor | None:
    if resolution is None:
        return None
    return torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]]).expand(count, 6)


def sample(
    base: Base,
    denoiser: nn.Module,
    prompted: Conditions,
    unprompted: Conditions | None,
    noise: Float[Tensor, "batch *latent"],
    sampling: SamplerSettings,
    *,
    keep: int,
    until: int | None = None,
    checkpointing: bool = True,
    generators: Sequence[torch.Generator] | None = None,
) -> Sampled:
    """Latents from `noise`, with gradients through the last `keep` of the sampling steps.

    Args:
        base: of the denoiser.
        denoiser: the base's own, or another with its architecture.
        prompted: from `conditions`.
        unprompted: from `unconditional`; needed where there is guidance.
        noise: standard normal. With `keep` = all steps, gradients reach it.
        sampling: how to sample.
        keep: 0 to all steps; 0 keeps no graph at all. Under `torch.no_grad` there is no graph either.
        until: stop after so many steps, at what the last one takes the clean latents to be.
        checkpointing: compute the denoiser's activations anew in the backward pass: memory for one step in place of
            `keep`.
        generators: of the noise that a stochastic scheduler adds, one per row.

    Raises:
        ValueError: `keep` is not between 0 and the number of steps, guidance lacks `unprompted`, `until` is not between
            1 and all steps, or the scheduler does not say what it takes the clean latents to be.
    """
    scheduler = sampling.prepared(base)
    if until is not None and not 1 <= until <= len(scheduler.timesteps):
        raise ValueError(f"stopping after {until} of {len(scheduler.timesteps)} steps: name 1 or more, at most all")
    early = until is not None and until < len(scheduler.timesteps)
    timesteps = scheduler.timesteps[:until]
    if not 0 <= keep <= len(timesteps):
        raise ValueError(f"gradients through {keep} of {len(timesteps)} steps: name 0 to {len(timesteps)}")
    guides = sampling.guidance_scale > 1 and not base.call.guidance_is_embedded
    if guides and unprompted is None:
        raise ValueError(f"guidance {sampling.guidance_scale:g} needs what the denoiser is told without a prompt")
    known = together(unprompted if guides else None, prompted)

    def predict(noisy: Tensor, timestep: Tensor) -> Tensor:
        return guided(base, denoiser, noisy, timestep, known, sampling.guidance_scale)

    latents, differentiated = at_first(scheduler, noise), []
    draws = "generator" in inspect.signature(scheduler.step).parameters
    extra = {"generator": list(generators)} if draws and generators else {}
    for number, t in enumerate(timesteps):
        last = number >= len(timesteps) - keep
        with torch.set_grad_enabled(last and torch.is_grad_enabled()):
            noisy = shown(scheduler, latents, t)
            recomputed = checkpointing and torch.is_grad_enabled()
            prediction = checkpoint(predict, noisy, t, use_reentrant=False) if recomputed else predict(noisy, t)
            if last:
                differentiated.append(DifferentiatedStep(noisy, t, prediction))
            before, moved = latents, scheduler.step(prediction, t, latents, **extra)
            latents = moved.prev_sample
    if early:
        clean = getattr(moved, "pred_original_sample", None)
        if isinstance(base.noising, FlowNoising):
            clean = base.noising.clean(before, prediction, t)
        if clean is None:
            raise ValueError(f"{sampling.scheduler} does not say what it takes the clean latents to be: take ddim")
        latents = clean
    return Sampled(latents, differentiated)


def at_first(scheduler: Any, noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, "batch *latent"]:
    """Standard normal noise as the scheduler begins with it; those of flows begin with the noise itself."""
    return noise * getattr(scheduler, "init_noise_sigma", 1.0)


def shown(
    scheduler: Any, latents: Float[Tensor, "batch *latent"], timestep: Shaped[Tensor, ""]
) -> Float[Tensor, "batch *latent"]:
    """The scheduler's latents as the denoiser sees them; those of flows are scaled by nothing."""
    scaled = getattr(scheduler, "scale_model_input", None)
    return latents if scaled is None else scaled(latents, timestep)


def together(unprompted: Conditions | None, prompted: Conditions) -> Conditions:
    """What `guided` asks for: the rows of both in this order, or those of `prompted` alone."""
    return {name: torch.cat([unprompted[name], rows]) if unprompted else rows for name, rows in prompted.items()}


def guided(
    base: Base,
    denoiser: nn.Module,
    noisy: Float[Tensor, "batch *latent"],
    timestep: Shaped[Tensor, ""],
    known: Conditions,
    guidance_scale: float,
) -> Float[Tensor, "batch *latent"]:
    """`ε(x_t) + w (ε(x_t, c) - ε(x_t))` for guidance w > 1 (Ho and Salimans 2022), else `ε(x_t, c)`; ε, v or
    velocities.

    A denoiser that is told w predicts once. What a pipeline does beyond that formula, such as rescaling, is left out.

    `known` is `together` of what the denoiser is told. In single precision at least, whatever the denoiser's is: a
    scheduler's steps are small.
    """
    guides = guidance_scale > 1 and not base.call.guidance_is_embedded
    both = torch.cat([noisy, noisy]) if guides else noisy
    at = timestep.expand(len(both)).to(both.device)
    predicted = at_least_single(base.call.predict(denoiser, both.to(base.denoiser.dtype), at, known))
    if not guides:
        return predicted
    without_prompt, with_prompt = predicted.chunk(2)
    return torch.lerp(without_prompt, with_prompt, guidance_scale)


def decode(
    base: Base, latents: Float[Tensor, "batch *latent"], checkpointing: bool = True
) -> Float[Tensor, "batch 3 height width"]:
    """Pictures in [0, 1] of clean latents, with gradients; in the VAE's own precision, whatever the training's is.

    A VAE in float16 that asks to be upcast decodes in float32; with gradients, only while the caller holds
    `pictures.upcast`, since the backward pass needs it too. Raises `NotFinite` where the VAE overflows.
    """

    def pixels(inputs: Tensor) -> Tensor:
        return decoded(vae, inputs)

    differentiable = latents.requires_grad and torch.is_grad_enabled()
    with (
        nullcontext(base.pipe.vae) if differentiable else upcast(base.pipe.vae) as vae,
        torch.autocast(latents.device.type, enabled=False),
    ):
        exact = latents.to(torch.promote_types(latents.dtype, vae.dtype))
        given = base.packing.unpacked(exact).to(vae.dtype)
        graph = checkpointing and differentiable
        pictures = checkpoint(pixels, given, use_reentrant=False) if graph else pixels(given)
        require_decoded(pictures, latents, vae)
    return (at_least_single(pictures) / 2 + 0.5).clamp(0, 1)


def at_least_single(values: Tensor) -> Tensor:
    """Half precision as float32, all else as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
