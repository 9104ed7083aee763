"""Reward-weighted denoising: the reference's own samples, weighted by `exp(r/β)`, and the plain denoising loss.

The minimiser is the reference tilted by `exp(r/β)` itself, the exact target of alignment regularised by a KL divergence
of strength β (Peng et al. 2019, advantage-weighted regression; Lee et al. 2023, for text to image). No other method
here says so exactly where it leads, and none needs samples of the reference that score so well already.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from deradiff.algorithm.estimates import Estimate
from deradiff.alignment.base import Base, EncodedPrompts, Policy
from deradiff.alignment.data_order import passes, row_generators
from deradiff.alignment.loop import train
from deradiff.alignment.objectives import squared_error
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun


@dataclass(frozen=True)
class ReferenceSamples:
    """Clean latents that the reference drew, and the prompt of each."""

    latents: Float[Tensor, "sample *latent"]
    prompts: Sequence[str]


class Denoising:
    """The denoising loss (Ho et al. 2020) of samples of `base`; prompts are encoded once, `per_pass` at a time."""

    def __init__(self, base: Base, samples: ReferenceSamples, per_pass: int = 128) -> None:
        self._base, self._latents = base, samples.latents
        places = {text: place for place, text in enumerate(dict.fromkeys(samples.prompts))}
        self._numbers = torch.tensor([places[text] for text in samples.prompts])
        self._told = EncodedPrompts.of(
            base.call.encode_prompts, list(places), lambda: base.call.encode_prompts([""]), per_pass
        )

    def errors(
        self, model: nn.Module, rows: Sequence[int], dropout: float | int, generators: Sequence[torch.Generator]
    ) -> Float[Tensor, " batch"]:
        """The error of `model` on some samples, each noised by its generator; a share of the prompts is dropped."""
        base, device = self._base, self._base.denoiser.device
        chosen = torch.tensor(rows)
        clean = self._latents[chosen].to(device, torch.float32)
        noise, timesteps, dropped = base.noise_of(generators, clean.shape[1:], dropout)
        noise, timesteps = noise.to(device), timesteps.to(device)
        conditions = self._told.rows(self._numbers[chosen], dropped, device)
        prediction = base.call.predict(model, base.noising.noised(clean, noise, timesteps), timesteps, conditions)
        return squared_error(prediction.float(), base.noising.target(clean, noise, timesteps))


# -- weights ----------------------------------------------------------------------------------------------------------


def tilted_weights(scores: Float[Tensor, " sample"], conditions: Int[Tensor, " sample"]) -> Float[Tensor, " sample"]:
    """`exp(score)`, normalised within its condition: 1 is the reference's own weight.

    The normaliser is the mean over the *other* samples of the condition (a sample alone has weight 1). Were the sample
    part of its own normaliser, a high score would partly cancel: with n samples of which a share f is effective, the
    tilted mean would fall short by about 1/(n f) of its shift. Weight and normaliser being independent, a condition's
    samples are weighted against each other exactly as the tilt demands; what fluctuates is only the total of the
    condition, whose expectation is a little above its number of samples.

    `scores` are in nats, `r/β`. Raises `ValueError` where those of one condition differ by more than float64 can add.
    """
    counts = conditions.bincount()
    highest = torch.full((len(counts),), -torch.inf, dtype=torch.float64)
    masses = (scores.double() - highest.scatter_reduce(0, conditions, scores.double(), "amax")[conditions]).exp()
    totals = torch.zeros(len(counts), dtype=torch.float64).index_add(0, conditions, masses)
    others = counts[conditions] - 1
    weights = torch.where(others > 0, masses * others / (totals[conditions] - masses), 1.0)
    if not weights.isfinite().all():
        raise ValueError(
            "one sample outweighs all others of its condition by more than float64 can hold: raise β, or draw more "
            "samples of every prompt"
        )
    return weights


def weighted_mean(values: Float[Tensor, " sample"], weights: Float[Tensor, " sample"]) -> Estimate:
    """`Σ w v / Σ w` with the standard error of a ratio of means."""
    shares = weights.double() / weights.double().sum()
    centre = (shares * values).sum()
    return Estimate(centre.item(), (shares * (values - centre)).norm().item())


def pick(weights: Float[Tensor, " sample"], generators: Sequence[torch.Generator]) -> list[int]:
    """A row for each generator, drawn with a probability proportional to its weight."""
    bounds = weights.double().cumsum(0)
    points = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in generators]) * bounds[-1]
    return torch.searchsorted(bounds, points, right=True).clamp(max=len(weights) - 1).tolist()


# -- training ---------------------------------------------------------------------------------------------------------


def train_rwr(
    base: Base,
    policy: Policy,
    samples: ReferenceSamples,
    weights: Float[Tensor, " sample"],
    plan: TrainingPlan,
    *,
    held_out: int,
    batch: int,
    dropout: float | int,
    per_pass: int = 128,
    run: TrainingRun,
) -> LossCurve:
    """Train `policy` on the denoising loss over `samples` drawn by their `weights`, `batch` a step.

    The last `held_out` samples are not trained on; their weighted loss tells when it is done. A share `dropout` of the
    prompts is dropped in training. Raises `ValueError` where samples, prompts and weights do not match, where nothing
    is held out or nothing is left, and for weights that are negative or not finite.
    """
    count = len(samples.latents)
    if not count == len(samples.prompts) == len(weights):
        raise ValueError(f"{count} latents, {len(samples.prompts)} prompts and {len(weights)} weights must be as many")
    if not 0 < held_out < count:
        raise ValueError(f"{held_out} of {count} samples cannot be held out: hold out 1 or more, and leave some")
    if not bool(((weights >= 0) & weights.isfinite()).all()) or not weights[:-held_out].sum() > 0:
        raise ValueError("weights must be finite and not negative, and not all of them zero")
    denoising, trained_on = Denoising(base, samples, per_pass), count - held_out

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        generators = row_generators(run.seed, part.positions(batch))
        return denoising.errors(model, pick(weights[:trained_on], generators), dropout, generators).mean()

    def held_out_loss(model: nn.Module) -> float:
        chunks = (range(trained_on, count)[rows.start : rows.stop] for rows in passes(held_out, per_pass))
        errors = [denoising.errors(model, rows, 0, row_generators(run.seed, rows, "held out")) for rows in chunks]
        return weighted_mean(torch.cat(errors).double().cpu(), weights[trained_on:]).value

    return train(policy.model, loss, held_out_loss, plan, run=run)
