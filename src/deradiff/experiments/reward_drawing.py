"""Images that a reward guides while they are drawn, by the kind of guidance; for `worker`, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from deradiff.alignment.base import Base
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.doodl import doodl
from deradiff.alignment.manifold_guidance import manifold_guided
from deradiff.alignment.noise_optimization import (
    EvaluationCounts,
    Optimized,
    counted,
    frozen,
    initial_noise,
    optimize_noise,
)
from deradiff.alignment.reward_particles import RewardTilt, sample_tilted
from deradiff.alignment.rewarded_model import rewarded
from deradiff.alignment.sampling import SamplerSettings, decode
from deradiff.rewards import Reward
from deradiff.sampling.pictures import upcast
from deradiff.sweep.description import (
    Drawing,
    ManifoldGuidance,
    NoiseOptimization,
    ReversibleNoise,
    RewardGuidance,
    RewardParticles,
)

Drawn = Iterator[tuple[Tensor, dict[str, Any]]]
"""A picture in [0, 1] for each drawing, and what is known about it: `forward` and `backward` evaluations at least."""


def draw(
    base: Base, drawings: Sequence[Drawing], reward: Reward, guidance_scale: float | int, per_pass: int
) -> list[tuple[Tensor, dict[str, Any]]]:
    """Draw a batch that is guided alike. Networks see `per_pass` particles at a time."""
    guidance, chosen = drawings[0].reward_guidance, drawings[0].sampling
    assert guidance is not None
    steps = guidance.steps or chosen.steps
    sampling = SamplerSettings(chosen.scheduler or "ddim", steps, guidance_scale, chosen.height)
    return list(KINDS[type(guidance)](base, drawings, reward, sampling, guidance, per_pass))


def _by_noise(
    base: Base,
    drawings: Sequence[Drawing],
    reward: Reward,
    sampling: SamplerSettings,
    noise: NoiseOptimization,
    _: int,
) -> Drawn:
    optimized = optimize_noise(
        base,
        [drawing.prompt for drawing in drawings],
        reward,
        sampling,
        iterations=noise.iterations,
        learning_rate=noise.learning_rate,
        norm_weight=noise.norm_weight,
        seed=drawings[0].seed,
        noise=_noise(base, drawings, sampling),
        per_pass=len(drawings),
    )
    yield from _optimized(optimized)


def _by_reversible_noise(
    base: Base, drawings: Sequence[Drawing], reward: Reward, sampling: SamplerSettings, noise: ReversibleNoise, _: int
) -> Drawn:
    optimized = doodl(
        base,
        [drawing.prompt for drawing in drawings],
        reward,
        steps=sampling.steps,
        guidance_scale=sampling.guidance_scale,
        resolution=sampling.resolution,
        iterations=noise.iterations,
        learning_rate=noise.learning_rate,
        clip=noise.clip,
        seed=drawings[0].seed,
        noise=_noise(base, drawings, sampling),
    )
    yield from _optimized(optimized)


def _by_particles(
    base: Base,
    drawings: Sequence[Drawing],
    reward: Reward,
    sampling: SamplerSettings,
    guidance: RewardParticles,
    per_pass: int,
) -> Drawn:
    """One image after the other, each from particles of its own."""
    for drawing in drawings:
        seed, count = drawing.seed, guidance.particles
        model = rewarded(base, [drawing.prompt], reward, sampling)
        tilt = RewardTilt(model, guidance.beta, guidance.gradient, guidance.tempered, per_pass)
        noise = initial_noise(base, sampling, count, seed)
        with _counting(base) as evaluations:
            particles = sample_tilted(tilt, noise, row_generators(seed, range(count), "sampling noise"), seed=seed)
            chosen = particles.picks(torch.Generator().manual_seed(seed))
            image = decode(base, particles.latents[chosen])[0]
        yield (
            image,
            _evaluations(evaluations, 1)
            | {
                "effective": float(particles.effective),
                "families": int(particles.families),
                "collapsed": bool(particles.collapsed.any()),
            },
        )


def _by_manifold(
    base: Base,
    drawings: Sequence[Drawing],
    reward: Reward,
    sampling: SamplerSettings,
    guidance: ManifoldGuidance,
    _: int,
) -> Drawn:
    model = rewarded(base, [drawing.prompt for drawing in drawings], reward, sampling)
    generators = [row_generators(drawing.seed, range(1), "sampling noise")[0] for drawing in drawings]
    with _counting(base) as evaluations, torch.no_grad():
        images = decode(base, manifold_guided(model, _noise(base, drawings, sampling), guidance.beta, generators))
    known = _evaluations(evaluations, len(drawings))
    yield from ((image, known) for image in images)


KINDS: Mapping[type[RewardGuidance], Callable[..., Drawn]] = {
    NoiseOptimization: _by_noise,
    ReversibleNoise: _by_reversible_noise,
    RewardParticles: _by_particles,
    ManifoldGuidance: _by_manifold,
}


def _noise(base: Base, drawings: Sequence[Drawing], sampling: SamplerSettings) -> Tensor:
    """Each image from the noise of its seed."""
    return torch.cat([initial_noise(base, sampling, 1, drawing.seed) for drawing in drawings])


@contextmanager
def _counting(base: Base) -> Iterator[EvaluationCounts]:
    with counted(base.denoiser) as evaluations, frozen(base.denoiser, base.pipe.vae), upcast(base.pipe.vae):
        yield evaluations


def _evaluations(counts: EvaluationCounts, images: int) -> dict[str, Any]:
    return {"forward": counts.forward / images, "backward": counts.backward / images}


def _optimized(optimized: Optimized) -> Drawn:
    known = {"forward": optimized.cost.forward, "backward": optimized.cost.backward}
    for image, plain in zip(optimized.images, optimized.scores[0].tolist(), strict=True):
        yield image, known | {"plain": plain}
