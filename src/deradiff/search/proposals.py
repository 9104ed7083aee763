"""Where to look next: the candidate at which most improvement over the best so far is expected, noise and all.

`log noisy expected improvement` (Letham et al. 2019; Ament et al. 2023) integrates over what the scores of the points
seen so far may really be, where Algorithm 2's expected improvement takes the best noisy one for true. Conditions weigh
it by the chance that they hold. Of several objectives it is the hypervolume under their front that improves (Daulton et
al. 2021).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from botorch.acquisition.logei import qLogNoisyExpectedImprovement
from botorch.acquisition.multi_objective.monte_carlo import qNoisyExpectedHypervolumeImprovement
from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
from botorch.acquisition.objective import GenericMCObjective
from botorch.exceptions.warnings import BotorchWarning
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.utils.multi_objective.hypervolume import infer_reference_point
from jaxtyping import Float
from linear_operator.utils.warnings import NumericalWarning
from torch import Tensor

from deradiff.measures.fronts import non_dominated
from deradiff.search.goals import Goal, Tables
from deradiff.search.spaces import Point, SearchSpace
from deradiff.search.surrogate import AT_ONCE, Observed, Surrogate, several

DRAWS = 64
"""Draws that an acquisition function averages over, for each hyperparameter."""


class Surrogates(NamedTuple):
    """A surrogate for each objective's gain over the reference, and for each condition's margin."""

    gains: list[Surrogate]
    margins: list[Surrogate]

    @classmethod
    def of(cls, space: SearchSpace, goal: Goal, points: Sequence[Point], tables: Tables, seed: int) -> Surrogates:
        """Those of what was observed at `points`, and estimated near them."""
        at = space.unit([*points, *tables.near])
        tables = tables.extended()
        gains = [objective.table(tables) - objective.at_reference(tables) for objective in goal.objectives]
        margins = [condition.table(tables) for condition in goal.constraints]
        made = [Surrogate(at, Observed.of(table), seed) for table in (*gains, *margins)]
        return cls(made[: len(gains)], made[len(gains) :])


@dataclass(frozen=True)
class Proposal:
    """The next point, what it is expected to gain, and the acquisition function that says so."""

    point: Point | None
    """None where every candidate is known already."""
    gain: float | None
    """Expected improvement of the best score, in its own unit; of several objectives, of the hypervolume under their
    front, each in standard deviations. None of a search for a knee, which improves nothing."""
    candidates: list[Point]
    values: Float[Tensor, " candidate"]
    """The expected improvement at each; of a search for a knee, what makes it worth a look (`knees.towards_knee`)."""


def propose(
    space: SearchSpace, models: Surrogates, known: Sequence[Point], candidates: list[Point], seed: int
) -> Proposal:
    """The candidate of the largest expected improvement that is not `known` yet."""
    at, seen = space.unit(candidates), space.unit(known)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", NumericalWarning)
        warnings.simplefilter("ignore", BotorchWarning)
        if len(models.gains) == 1:
            values = models.gains[0].scale * _evaluated(_improvement(models, seen, seed), at).exp()
        else:
            values = _evaluated(_hypervolume(models, seen, seed), at)
    open_to = torch.tensor([point not in {*known} for point in candidates])
    if not bool(open_to.any()):
        return Proposal(None, 0.0, candidates, values)
    best = int(torch.where(open_to, values, -torch.inf).argmax())
    return Proposal(candidates[best], float(values[best]), candidates, values)


def _evaluated(acquisition: Any, at: Float[Tensor, "candidate coordinate"]) -> Float[Tensor, " candidate"]:
    return torch.cat([acquisition(part[:, None, :]) for part in at.split(AT_ONCE)])


def _improvement(models: Surrogates, seen: Float[Tensor, "point coordinate"], seed: int) -> Any:
    """Log noisy expected improvement, weighted by the chance that all conditions hold."""
    sampler = SobolQMCNormalSampler(torch.Size([DRAWS]), seed=seed)
    if not models.margins:
        return qLogNoisyExpectedImprovement(models.gains[0].model, seen, sampler, prune_baseline=False)
    return qLogNoisyExpectedImprovement(
        several([*models.gains, *models.margins]),
        seen,
        sampler,
        GenericMCObjective(_first),
        constraints=_conditions(models),
        prune_baseline=False,
    )


def _first(samples: Tensor, X: Tensor | None = None) -> Tensor:
    """The objective, which comes before the conditions."""
    return samples[..., 0]


def _hypervolume(models: Surrogates, seen: Float[Tensor, "point coordinate"], seed: int) -> Any:
    """Noisy expected hypervolume improvement.

    Not its logarithm, of which BoTorch compiles a C++ part at first use: that helps to follow gradients, and here the
    best of given candidates is taken.
    """
    count = len(models.gains)
    means = torch.stack([(gain.mean(seen) - gain.centre) / gain.scale for gain in models.gains], 1)
    front = means[non_dominated(means, [True] * count)]
    return qNoisyExpectedHypervolumeImprovement(
        several([*models.gains, *models.margins]),
        infer_reference_point(front, scale=0.1),
        seen,
        SobolQMCNormalSampler(torch.Size([DRAWS]), seed=seed),
        IdentityMCMultiOutputObjective(list(range(count))),
        _conditions(models) or None,
        prune_baseline=False,
        cache_root=False,
    )


def _conditions(models: Surrogates) -> list[Callable[[Tensor], Tensor]]:
    """As BoTorch wants them: below zero where they hold."""

    def below(place: int, margin: Surrogate) -> Callable[[Tensor], Tensor]:
        return lambda samples: -(samples[..., place] + margin.centre / margin.scale)

    return [below(place, margin) for place, margin in enumerate(models.margins, len(models.gains))]
