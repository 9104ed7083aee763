"""Sequential Monte Carlo: weighted particles that are resampled, whatever it is that moves and weighs them.

What moves and weighs them is a Feynman-Kac model: a first distribution, transitions, and a potential after each (Del
Moral 2004; the split of Chopin and Papaspiliopoulos 2020, chapter 10). `sampling.particles` has the one of a realigned
pipeline, `alignment.reward_particles` the one of a reward. The algorithm is the same for both, and it is here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deradiff.algorithm.estimates import Estimate, effective_sample_size


@dataclass(frozen=True, kw_only=True)
class WeightedParticles:
    """What a run of sequential Monte Carlo knows of its particles: image `p K + k` is particle k of prompt p.

    Attributes:
        log_weights: normalised, so that every prompt's weights sum to one.
        ancestors: the starting noise that each particle descends from, 0 to K-1 of its prompt.
        lineage: `(step, parents)` of every resampling, `parents` being `[prompt, particle]`; steps count from 0.
        evenness: the share of effective particles after every step, before it was resampled.
        log_normalizer: the estimate of `log E[W]` for every prompt.
    """

    log_weights: Float[Tensor, "prompt particle"]
    ancestors: Int[Tensor, "prompt particle"]
    lineage: list[tuple[int, Int[Tensor, "prompt particle"]]]
    evenness: Float[Tensor, "step prompt"]
    log_normalizer: Float[Tensor, " prompt"]

    @property
    def effective(self) -> Float[Tensor, " prompt"]:
        """Effective particles of each prompt, 1 to K, at the end."""
        return effective_sample_size(self.log_weights)

    @property
    def families(self) -> Int[Tensor, " prompt"]:
        """How many different starting noises are left among a prompt's particles."""
        return torch.tensor([len(row.unique()) for row in self.ancestors])

    @property
    def collapsed(self) -> Bool[Tensor, " prompt"]:
        """Prompts of which fewer than two particles count, or whose particles all descend from one."""
        alone = (self.effective < 2) | (self.families < 2)
        return alone if self.log_weights.shape[1] > 1 else torch.ones_like(alone)

    def picks(self, generator: torch.Generator | None = None) -> Int[Tensor, " prompt"]:
        """One particle of every prompt, drawn by weight, as an index into the images."""
        chosen = torch.multinomial(self.log_weights.exp(), 1, generator=generator)[:, 0]
        return torch.arange(len(chosen)) * self.log_weights.shape[1] + chosen

    def mean(self, scores: Float[Tensor, " image"]) -> Estimate:
        """The weighted mean of a score of every image, averaged over prompts; standard error given the prompts.

        The error is that of sequential Monte Carlo (Lee and Whiteley 2018, Biometrika 105): particles of one ancestor
        count as one. It is NaN where all particles of a prompt descend from one.
        """
        f = scores.double().cpu().view(self.log_weights.shape)
        weights = self.log_weights.exp()
        means = (weights * f).sum(1)
        parts = weights * (f - means[:, None])
        by_ancestor = torch.zeros_like(parts).scatter_add_(1, self.ancestors, parts)
        variances = torch.where(self.families > 1, by_ancestor.square().sum(1), torch.nan)
        return Estimate(float(means.mean()), float(variances.sum().sqrt() / len(means)))


class Population:
    """The particles of a run in progress. Prompts do not compete: each is resampled by itself.

    A prompt whose share of effective particles falls below `threshold`, 0 (never) to 1 (always), is resampled
    systematically. `generator` decides it.
    """

    def __init__(self, prompts: int, count: int, threshold: float, generator: torch.Generator) -> None:
        self.threshold, self._generator = threshold, generator
        self.lineage: list[tuple[int, Tensor]] = []
        self._log_weights = torch.zeros(prompts, count, dtype=torch.float64)
        self._log_normalizer = torch.zeros(prompts, dtype=torch.float64)
        self._ancestors = torch.arange(count).repeat(prompts, 1)
        self._evenness: list[Tensor] = []

    def weigh(self, log_potentials: Float[Tensor, " image"]) -> None:
        """Multiply every particle's weight by a potential."""
        self._log_weights = self._log_weights + log_potentials.double().cpu().view(self._log_weights.shape)

    def resample(self) -> Int[Tensor, " image"] | None:
        """The step is weighed: the image that each place goes on as a copy of, or None where none is resampled."""
        prompts, count = self._log_weights.shape
        evenness = effective_sample_size(self._log_weights) / count
        self._evenness.append(evenness)
        uneven = evenness < self.threshold
        if count == 1 or not bool(uneven.any()):
            return None
        parents = torch.arange(count).repeat(prompts, 1)
        parents[uneven] = systematic(self._log_weights[uneven], self._generator)
        self.lineage.append((len(self._evenness) - 1, parents))
        self._log_normalizer += torch.where(uneven, _log_mean_exp(self._log_weights), 0)
        self._log_weights[uneven] = 0
        self._ancestors = self._ancestors.gather(1, parents)
        return (parents + count * torch.arange(prompts)[:, None]).flatten()

    def result(self) -> WeightedParticles:
        """The particles as they are now. Raises `FloatingPointError` where a prompt's weights are all zero or NaN."""
        if not bool(torch.isfinite(self._log_weights).any(1).all()):
            raise FloatingPointError("the weights of a prompt's particles are all zero or NaN")
        nothing = torch.empty(0, len(self._log_weights), dtype=torch.float64)
        return WeightedParticles(
            log_weights=torch.log_softmax(self._log_weights, 1),
            ancestors=self._ancestors,
            lineage=self.lineage,
            evenness=torch.stack(self._evenness) if self._evenness else nothing,
            log_normalizer=self._log_normalizer + _log_mean_exp(self._log_weights),
        )


def systematic(
    log_weights: Float[Tensor, "prompt particle"], generator: torch.Generator | None = None
) -> Int[Tensor, "prompt particle"]:
    """Systematic resampling: parents in proportion to the weights, from one uniform number per prompt.

    Particle k of normalised weight w_k has between `⌊K w_k⌋` and `⌈K w_k⌉` children, K w_k on average (Kitagawa 1996).
    """
    prompts, count = log_weights.shape
    cumulative = torch.softmax(log_weights.double(), 1).cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    start = torch.rand(prompts, 1, dtype=torch.float64, generator=generator)
    return torch.searchsorted(cumulative, (start + torch.arange(count)) / count).clamp(max=count - 1)


def _log_mean_exp(log_weights: Float[Tensor, "prompt particle"]) -> Float[Tensor, " prompt"]:
    return torch.logsumexp(log_weights, 1) - torch.tensor(log_weights.shape[1]).log()
