"""Raising a reward without training: gradient ascent on the initial noise of a model that stays as it is.

These are inference-time baselines for realignment. They need no aligned model and pay for every image instead.

- One step of a one-step model: ReNO (Eyring et al. 2024, arXiv 2406.04312; Annealed Importance Guidance, equation 26).
- All steps of a sampler: the gradient of DOODL (Wallace et al. 2023, arXiv 2303.13703) and of direct noise optimisation
  (Tang et al. 2024, arXiv 2405.18881), with ReNO's regulariser and update. Checkpointing takes the place of DOODL's
  invertible sampler, which saves memory too. Direct noise optimisation also moves the noise that a stochastic sampler
  adds on the way; here that noise stays what the seed makes it.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.base import Base
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.sampling import SamplerSettings, decode, sample, told
from deradiff.alignment.scoring import scored
from deradiff.alignment.training import Report
from deradiff.rewards import Reward
from deradiff.sampling.pictures import upcast


@dataclass
class EvaluationCounts:
    """How often denoisers were evaluated, counted in samples: a guided step of one image is two evaluations."""

    forward: int = 0
    """Evaluations, those that checkpointing repeats included."""
    backward: int = 0
    """How many of them a gradient was propagated back through."""


@contextmanager
def counted(*denoisers: nn.Module) -> Iterator[EvaluationCounts]:
    """Count every evaluation of `denoisers` inside the block, by hooks, whoever calls them."""
    counts = EvaluationCounts()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # Before, not after: a repeated evaluation stops as soon as it has what the gradient needs.
        counts.forward += len(args[0] if args else kwargs["sample"])

    def after(_: nn.Module, __: Any, output: Any) -> None:
        predicted = output[0]
        if predicted.requires_grad:
            predicted.register_hook(propagated)

    def propagated(gradient: Tensor) -> None:
        counts.backward += len(gradient)

    hooks = [denoiser.register_forward_pre_hook(before, with_kwargs=True) for denoiser in denoisers]
    hooks += [denoiser.register_forward_hook(after) for denoiser in denoisers]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Cost:
    """What one image cost on average (see `EvaluationCounts`)."""

    forward: float
    backward: float
    seconds: float


@dataclass(frozen=True)
class Optimized:
    """The best image of every prompt, by score alone, as ReNO keeps it."""

    images: Float[Tensor, "prompt 3 height width"]
    """In [0, 1]."""
    noise: Float[Tensor, "prompt *latent"]
    """What `images` are sampled from."""
    scores: Float[Tensor, "evaluation prompt"]
    """The reward before the first iteration, which is that of plain sampling, and after each of them."""
    cost: Cost

    @property
    def gain(self) -> Float[Tensor, " prompt"]:
        """How much better the best image is than the one of plain sampling; 0 or more."""
        return self.scores.amax(0) - self.scores[0]


def log_density_of_norm(noise: Float[Tensor, "batch *latent"]) -> Float[Tensor, " batch"]:
    """`(d - 1) log ‖ε‖ - ½ ‖ε‖²`: the logarithm of the χ density with d degrees of freedom, but for a constant.

    The norm of standard normal noise with d elements has that density. Its maximum is at `‖ε‖ = √(d - 1)`, near which
    all noise of ordinary sampling lies; the Gaussian density itself is greatest at 0, where none does. This is ReNO's
    regulariser (Eyring et al. 2024), after Samuel et al. 2023 (arXiv 2306.08687).
    """
    squared = noise.flatten(1).square().sum(1)
    return 0.5 * ((noise[0].numel() - 1) * squared.log() - squared)


def clipped(gradient: Float[Tensor, "batch *latent"], max_norm: float | int) -> Float[Tensor, "batch *latent"]:
    """Each row scaled down to a norm of at most `max_norm`."""
    norms = gradient.flatten(1).norm(dim=1).view(-1, *[1] * (gradient.ndim - 1))
    return gradient * (max_norm / norms).clamp(max=1)


def initial_noise(base: Base, sampling: SamplerSettings, count: int, seed: int) -> Float[Tensor, "count *latent"]:
    """Standard normal noise, as a pipeline's `latents` take it; a row depends on `seed` and its position alone."""
    return sampling.noise(base, row_generators(seed, range(count), "initial noise"))


Render = Callable[[Tensor], Tensor]
"""Noise to images in [0, 1], differentiable."""


def scored_with_gradient(
    render: Render,
    reward: Reward,
    prompts: Sequence[str],
    noise: Float[Tensor, "batch *latent"],
    norm_weight: float | int,
) -> tuple[Float[Tensor, "batch 3 height width"], Float[Tensor, " batch"], Float[Tensor, "batch *latent"]]:
    """Images, their rewards, and the gradient of `r(render(ε), c) + norm_weight log p(‖ε‖)` at `noise`, row by row."""
    noise = noise.detach().requires_grad_(True)
    with torch.enable_grad():
        images = render(noise)
        scores = scored(reward, images, prompts)
        norm_log_density = log_density_of_norm(noise)
    # Apart, because a reward that hides the images from the gradient would leave that of the norm alone.
    raising = torch.autograd.grad(scores.sum(), noise, allow_unused=True)[0] if scores.requires_grad else None
    if raising is None:
        raise ValueError(
            f"the reward {reward.name!r} is not differentiable in the images: no noise can be optimised for it. Take a "
            "differentiable reward, and no torch.no_grad() inside it"
        )
    gradient = raising + norm_weight * torch.autograd.grad(norm_log_density.sum(), noise)[0]
    wrong = (~gradient.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"the gradient of {reward.name!r} is not finite for {prompts[wrong[0]]!r}: lower the learning rate; in "
            "half precision, try float32"
        )
    return images.detach(), scores.detach(), gradient


def optimize_noise(
    base: Base,
    prompts: Sequence[str],
    reward: Reward,
    sampling: SamplerSettings,
    *,
    iterations: int = 50,
    learning_rate: float | int = 5.0,
    norm_weight: float | int = 0.01,
    max_norm: float | int = 0.1,
    momentum: float | int = 0.9,
    seed: int = 0,
    noise: Float[Tensor, "prompt *latent"] | None = None,
    per_pass: int = 16,
    checkpointing: bool = True,
    report: Report = lambda *_: None,
) -> Optimized:
    """Ascend `r(x_0(ε), c) + norm_weight log p(‖ε‖)` in the initial noise ε of each prompt c, and keep the best image.

    `x_0(ε)` is `sampling` of `base`, decoded to an image in [0, 1], and p the χ density (see `log_density_of_norm`). An
    iteration is one step of gradient ascent with Nesterov momentum, the gradient of each image clipped to `max_norm`.
    The defaults are those of ReNO's published code, for latents of 4 x 64 x 64. As `‖ε‖ ≈ √d`, others want a learning
    rate in proportion to √d: the authors' own for 128 x 128 is 10. Their code counts evaluations: its 50 are the first
    and 49 iterations. `norm_weight` is in points of the reward, per nat.

    A sampler that adds noise on the way adds the same noise in every iteration, drawn from `seed`; it stays as it is.

    Args:
        base: the model. None of its weights is changed.
        prompts: one image is made for each.
        reward: what to raise; differentiable in the images.
        sampling: scheduler, steps, guidance. One step for a one-step model; else the gradient runs through all steps.
        noise: where to start, by default `initial_noise(base, sampling, len(prompts), seed)`.
        per_pass: how many prompts are optimised together. Images do not depend on one another.
        checkpointing: evaluate every step again for its gradient instead of keeping the activations of all steps.

    Raises:
        ValueError: no prompts; `iterations` or `per_pass` below 1; a rate, weight or norm out of its range; `noise`
            that is not one per prompt; a schedule that does not begin at noise; a reward that is not finite, or not
            differentiable; a gradient that is not finite.
    """
    if not prompts:
        raise ValueError("no prompts: there is nothing to optimise")
    _check(iterations, per_pass, learning_rate, norm_weight, max_norm, momentum)
    _require_noise_first(base, sampling)
    start = initial_noise(base, sampling, len(prompts), seed) if noise is None else noise
    if len(start) != len(prompts):
        raise ValueError(f"{len(start)} rows of noise for {len(prompts)} prompts: each prompt takes one")

    def ascend(rows: range) -> tuple[Tensor, Tensor, Tensor]:
        texts = [prompts[row] for row in rows]
        render = _renderer(base, texts, sampling, seed, rows, checkpointing)
        # In half precision small steps would be rounded away.
        at = start[rows.start : rows.stop].to(base.denoiser.device, torch.promote_types(start.dtype, torch.float32))
        velocity, best, trajectory = torch.zeros_like(at), None, []
        for iteration in range(iterations):
            images, scores, gradient = scored_with_gradient(render, reward, texts, at, norm_weight)
            best = better(best, images, at, scores)
            trajectory.append(scores)
            gradient = clipped(gradient, max_norm)
            velocity = momentum * velocity + gradient
            at = at + learning_rate * (gradient + momentum * velocity)
            which = f"prompts {rows.start + 1} to {rows.stop} of {len(prompts)}"
            report(iteration + 1, iterations, f"{which}: mean score {scores.mean():.4g}, best {best[2].mean():.4g}")
        with torch.no_grad():
            images = render(at)
            scores = scored(reward, images, texts)
        images, at, _ = better(best, images, at, scores)
        return images, at, torch.stack([*trajectory, scores])

    count, began = len(prompts), time.perf_counter()
    with counted(base.denoiser) as evaluations, frozen(base.denoiser, base.pipe.vae), upcast(base.pipe.vae):
        optimized = [ascend(rows) for rows in passes(count, per_pass)]
    images, noises, scores = zip(*optimized, strict=True)
    cost = Cost(evaluations.forward / count, evaluations.backward / count, (time.perf_counter() - began) / count)
    return Optimized(torch.cat(images), torch.cat(noises), torch.cat(scores, 1), cost)


def _renderer(
    base: Base, prompts: Sequence[str], sampling: SamplerSettings, seed: int, rows: range, checkpointing: bool
) -> Render:
    prompted, unprompted = told(base, prompts, sampling)
    # A scheduler of second order takes more steps than it is asked for.
    steps = len(sampling.prepared(base).timesteps)

    def render(noise: Tensor) -> Tensor:
        drawn = sample(
            base,
            base.denoiser,
            prompted,
            unprompted,
            noise.to(base.denoiser.dtype),
            sampling,
            keep=steps if torch.is_grad_enabled() else 0,
            checkpointing=checkpointing,
            generators=row_generators(seed, rows, "sampling noise"),
        )
        return decode(base, drawn.latents, checkpointing)

    return render


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """No gradients for the weights: what they would need is a good part of the memory."""
    trained = [parameter for module in modules for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


Scored = tuple[Tensor, Tensor, Tensor]
"""Images, noise and scores."""


def better(known: Scored | None, *candidate: Tensor) -> Scored:
    """Row by row, what has the higher score: `known` where they are equal."""
    images, noise, scores = candidate
    if known is None:
        return images, noise, scores
    wins = (scores > known[2]).view(-1, 1, 1, 1)
    return torch.where(wins, images, known[0]), torch.where(wins, noise, known[1]), torch.maximum(scores, known[2])


# -- what cannot be optimised -----------------------------------------------------------------------------------------


def _check(
    iterations: int, per_pass: int, learning_rate: float, norm_weight: float, max_norm: float, momentum: float
) -> None:
    for name, value, fits, need in (
        ("iterations", iterations, iterations >= 1, "at least 1"),
        ("per_pass", per_pass, per_pass >= 1, "at least 1"),
        ("learning_rate", learning_rate, 0 < learning_rate < float("inf"), "positive and finite"),
        ("norm_weight", norm_weight, 0 <= norm_weight < float("inf"), "0 or more, and finite"),
        ("max_norm", max_norm, max_norm > 0, "positive (infinite: no clipping)"),
        ("momentum", momentum, 0 <= momentum < 1, "at least 0 and below 1"),
    ):
        if not fits:
            raise ValueError(f"{name} = {value}: it must be {need}")


def _require_noise_first(base: Base, sampling: SamplerSettings) -> None:
    first = float(sampling.prepared(base).timesteps[0])
    if first < base.noising.timesteps / 2:
        raise ValueError(
            f"with {sampling.steps} step(s), {sampling.scheduler!r} begins at timestep {first:g} of "
            f"{base.noising.timesteps}, where latents are hardly noise. Give the pipeline a scheduler from "
            "from_config(pipe.scheduler.config, timestep_spacing='trailing'), whose configuration is taken over"
        )
