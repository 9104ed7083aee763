"""What one step asks the denoisers for: which models, in which mixture."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.schedules import Progress
from deradiff.algorithm.step import with_reference_weight
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.call_arguments import tensors_of
from deradiff.sampling.per_model import PerModel, foreign, remembered
from deradiff.sampling.reuse import INTERPOLATE, PredictionEstimator

_SERIAL = itertools.count()

BLEND = -1
"""The number of the weight-interpolated model among those that are evaluated."""


@dataclass(frozen=True)
class StepEvaluation:
    """A step's predictions, from the call of the denoiser to the step of the scheduler."""

    at: int
    """Which of the scheduler's timesteps this is."""
    progress: Progress
    models: tuple[int, ...]
    """Those that the step mixes: 0 is the reference, k the k-th anchor."""
    mixture_weights: Float[Tensor, "model #batch"]
    lams: Float[Tensor, "anchor #batch"]
    images: int | None
    """How many images the λ are for, None where every image has the same."""
    rows: int
    """How many rows the pipeline has asked for: as many as images, or more where it guides."""
    distilled: bool
    """Whether the model was told a guidance scale, as models are that guidance was distilled into."""
    carrier: int | None = None
    """The model that is evaluated for all of them; None where all are."""
    blend: Mapping[int, Any] | None = None
    """The weights of the weight-interpolated model where that is evaluated, besides the others or instead."""
    instead: bool = False
    estimator: PredictionEstimator | None = None
    """What estimates the predictions of models that are not evaluated."""
    calls: int = 1
    """How often the pipeline has called the denoiser within the step."""
    run: Any = None
    """The run that the denoiser was called in."""
    component: Any = None
    """The realigned component that was called, the first of them within the step."""
    returned: list[Mapping[int, Any]] = field(default_factory=list, compare=False)
    """What the models returned in each call of the denoiser within the step, before the pipeline guides."""
    serial: int = field(default_factory=_SERIAL.__next__, compare=False)
    """Later evaluations have higher numbers."""

    @property
    def owner(self) -> Any:
        """Stands for the dial whose models these are."""
        return self.component.owner

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The models that are evaluated, the weight-interpolated one apart."""
        if self.instead:
            return ()
        return self.models if self.carrier is None else (self.carrier,)

    def blended(self) -> StepEvaluation:
        """The weight-interpolated model instead of the mixture."""
        return replace(self, blend=self._by_row(), instead=True)

    def again(self, rows: int) -> StepEvaluation:
        """A further call of the denoiser within the step, as for Flux's negative prompt, of so many rows."""
        further = replace(self, rows=rows)
        blend = None if self.blend is None else further._by_row()
        return replace(self, rows=self.rows + rows, calls=self.calls + 1, blend=blend, serial=next(_SERIAL))

    def unguided(
        self, predictions: Float[Tensor, "model batch predicted *latent"]
    ) -> Float[Tensor, "model part batch predicted *latent"] | None:
        """The two predictions of each image that the pipeline made each of `predictions` of, by guidance.

        None where it was not two of their shape, as where one has the prompt's tokens in it and the other has none
        (Ideogram 4), or where a model was told a guidance scale itself.
        """
        batch, known = predictions.shape[1], all({*self.models} <= {*outputs} for outputs in self.returned)
        if self.distilled or not known or self.rows != 2 * batch:
            return None
        calls = [[tensors_of(outputs[model])[0] for outputs in self.returned] for model in self.models]
        if any(sum(map(len, parts)) != self.rows or parts[0].ndim < 2 for parts in calls):
            return None
        if any(part.shape[1:] != calls[0][0].shape[1:] for parts in calls for part in parts):
            return None
        rows = torch.stack([torch.cat(parts)[:, : predictions.shape[2]] for parts in calls])
        return rows.unflatten(1, (2, batch)) if rows.shape[2:] == predictions.shape[2:] else None

    def at_progress(self, progress: Progress) -> StepEvaluation:
        """The same predictions for a step at another progress: frames may each be stepped at their own (SkyReels)."""
        lams = self.run.lams
        if lams.is_constant or progress == self.progress:
            return replace(self, progress=progress)
        weights = with_reference_weight(lams.at(progress, lams.images or 1))
        return replace(self, progress=progress, mixture_weights=weights[list(self.models)], lams=weights[1:])

    def with_reuse(self, estimator: PredictionEstimator) -> StepEvaluation:
        """All models at this timestep, or the carrier alone where predictions are carried over."""
        weights = zip(self.models, self.mixture_weights, strict=True)
        weighty = [estimator.names[k] for k, weight in weights if weight.any()]
        if len(weighty) < 2 or estimator.carrier not in (INTERPOLATE, *weighty):
            return self  # a schedule left a single model, or the carrier without weight
        wanted = estimator.wants(self.at, (self.component, self.models, self.rows))
        carried = wanted == "carrier"
        if estimator.carrier == INTERPOLATE:
            blend = None if wanted == "models" else self._by_row()
            return replace(self, blend=blend, instead=carried, estimator=estimator)
        return replace(self, carrier=estimator.names.index(estimator.carrier) if carried else None, estimator=estimator)

    def for_batch(self, batch: int) -> StepEvaluation:
        """The same with weights for each of the `batch` samples that are stepped; `ValueError` for another number of λ.

        A pipeline may guide only afterwards, as Cosmos does, and step the samples of all its calls as one batch.
        """
        if self.images in (None, batch):
            return self
        if self.calls > 1 and batch == self.rows == self.images * self.calls:
            weights, lams = (weights.repeat(1, self.calls) for weights in (self.mixture_weights, self.lams))
            return replace(self, mixture_weights=weights, lams=lams)
        raise wrong_count(self.images, batch)

    def _by_row(self) -> dict[int, Any]:
        """Each model's weight in the interpolated one: a number, or one for each row where images differ.

        A pipeline that guides repeats its images along the batch as a whole.
        """
        if self.mixture_weights.shape[1] == 1:
            return {k: float(weight) for k, weight in zip(self.models, self.mixture_weights, strict=True)}
        if self.rows % self.mixture_weights.shape[1]:
            raise wrong_count(self.mixture_weights.shape[1], self.rows)
        repeated = self.mixture_weights.repeat(1, self.rows // self.mixture_weights.shape[1])
        return dict(zip(self.models, repeated, strict=True))


def brought(prediction: Tensor, pending: StepEvaluation | None, owner: Any) -> tuple[StepEvaluation | None, Tensor]:
    """What a scheduler is to step from: the evaluation that a prediction is of, and every model's, stacked.

    None, and the prediction as it is, where none of the `owner`'s models was evaluated. Raises `DialError` for a
    prediction of other models, of another step's, and for one that lost its models on the way.
    """
    if isinstance(prediction, PerModel):
        evaluation = prediction.origin
        if evaluation.owner is not owner or not isinstance(evaluation, StepEvaluation):
            raise foreign()
        # An earlier call of the same step is no earlier step: a guider may take one of two predictions alone.
        if pending is not None and (pending.run, pending.at) != (evaluation.run, evaluation.at):
            raise remembered()
        return evaluation, prediction.stacked()
    if pending is None:
        return None, prediction
    if pending.returned:
        raise DialError(
            "the denoiser gave predictions of several models, and the scheduler's step got a plain tensor: between "
            "them the pipeline leaves what torch does for each model (a kernel or an autograd function of its own), "
            "which cannot be realigned"
        )
    return pending, prediction[None]


def wrong_count(images: int, batch: int) -> ValueError:
    """λ for another number of images than there are."""
    return ValueError(
        f"λ is given for {images} images, but the batch holds {batch}: give one λ, or one per image (prompts x "
        "num_images_per_prompt of them, all images of the first prompt first)"
    )
