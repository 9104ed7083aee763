"""What happens at one step of a realigned run: which models are evaluated, and the step that is taken from them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.lams import Lams
from deradiff.algorithm.noise_levels import impacts, index_of, log_snr_at, progress_at, strengths
from deradiff.algorithm.step import StepRecord, mixed_step, space_of, with_reference_weight
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.evaluation import StepEvaluation
from deradiff.sampling.reuse import PredictionEstimator, Reuse, require_affine
from deradiff.sampling.runs import Run

Method = Literal["mixture", "interpolate"]
Where = Literal["auto", "prediction", "posterior"]


class RealignedSteps:
    """The steps of a dial's runs, by its `method` and `path` (see `realignment.realign`)."""

    def __init__(self, denoisers: Denoisers, method: Method, path: Where) -> None:
        self._denoisers, self.method, self._path = denoisers, method, path

    @torch.compiler.disable
    def evaluation(
        self, run: Run, component: Any, timestep: Any, *, rows: int, distilled: bool, watching: bool
    ) -> StepEvaluation:
        """Which models this step needs, and their weights. Held until the step is taken, whatever the dial does."""
        at = index_of(run.scheduler, timestep)
        progress = progress_at(run.scheduler, at)
        if run.pending is not None and run.pending.progress == progress:
            first = run.pending.component
            if first is not component and first.lams.raw != component.lams.raw:
                raise DialError(
                    f"{first.name} and {component.name} make one prediction together, which has one λ: got "
                    f"{first.lams.raw!r} and {component.lams.raw!r}"
                )
            return run.pending.again(rows)  # a further call within the step, as for Flux's negative prompt
        lams: Lams = component.lams
        if run.lams is not lams:
            run.lams, run.mixture_weights = lams, None
            if run.estimator is not None:
                run.estimator.renew(strengths(lams, run.scheduler))
        if run.mixture_weights is None or not lams.is_constant:
            # How many images the batch holds, only `step` knows.
            run.mixture_weights = with_reference_weight(lams.at(progress, lams.images or 1))
        weights = run.mixture_weights
        elsewhere = run.copied and not lams.is_constant  # steps of other copies are at another λ, and need their models
        models = tuple(k for k in range(len(weights)) if watching or elsewhere or weights[k].any())
        step = StepEvaluation(
            at=at,
            progress=progress,
            models=models,
            mixture_weights=weights[list(models)],
            lams=weights[1:],
            images=lams.images,
            rows=rows,
            distilled=distilled,
            run=run,
            component=component,
        )
        if len(models) == 1:
            return step
        if self.method == "interpolate":
            return step.blended()
        if run.reuse is None:
            return step
        return step.with_reuse(self._estimator_of(run, run.reuse, step))

    def _estimator_of(self, run: Run, reuse: Reuse, step: StepEvaluation) -> PredictionEstimator:
        """What carries predictions over in a run, made at the first step that mixes."""
        if run.estimator is None:
            require_affine(run.scheduler, self._path)
            names = [self._denoisers.names[k] for k in step.models]
            carrier = reuse.resolved(names, step.mixture_weights, self._denoisers.blends_rows)
            assert run.lams is not None
            along = strengths(run.lams, run.scheduler)
            run.estimator = PredictionEstimator(reuse, carrier, self._denoisers.names, impacts(run.scheduler), along)
        return run.estimator

    def _own_estimator(self, run: Run, evaluation: StepEvaluation) -> PredictionEstimator:
        """What carries over what this run's scheduler steps, of an evaluation for several schedulers (video and audio).

        That of the run which the evaluation is of decides for all when every model is evaluated.
        """
        estimator = evaluation.estimator
        assert estimator is not None
        if run is evaluation.run:
            return estimator
        if run.estimator is None:
            settings = (estimator.reuse, estimator.carrier, estimator.names, estimator.impacts, estimator.strengths)
            run.estimator = PredictionEstimator(*settings)
        elif run.estimator.strengths is not estimator.strengths:
            run.estimator.renew(estimator.strengths)
        run.estimator.wants(evaluation.at, estimator.kind)
        return run.estimator

    def take(
        self,
        run: Run,
        evaluation: StepEvaluation,
        predictions: Float[Tensor, "evaluated batch predicted *latent"],
        own_step: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Any:
        """Algorithm 1, lines 9 to 14, from the guided `predictions` of the models that were evaluated.

        `arguments` are the scheduler's. Raises `DialError` and `ValueError` for a batch that does not fit.
        """
        sample, timestep = arguments["sample"], arguments["timestep"]
        if predictions.shape[1] != len(sample):
            raise DialError(
                f"the scheduler got predictions for {predictions.shape[1]} images and {len(sample)} latents: this "
                "pipeline rearranges its batch in a way that realignment cannot follow"
            )
        at = evaluation.at
        if run.copied or run is not evaluation.run:
            at = index_of(run.scheduler, timestep)
            evaluation = evaluation.at_progress(progress_at(run.scheduler, at))
        evaluation = evaluation.for_batch(len(sample))
        estimated = evaluation.evaluated != evaluation.models
        if evaluation.estimator is not None:
            predictions = self._own_estimator(run, evaluation).complete(
                evaluation.at, predictions, evaluation.models, evaluation.evaluated, evaluation.mixture_weights
            )
        run.last = StepRecord(
            models=tuple(self._denoisers.names[k] for k in evaluation.models),
            predictions=predictions,
            mixture_weights=evaluation.mixture_weights,
            sample=sample,
            timestep=timestep,
            at=at,
            log_snr=log_snr_at(run.scheduler, at, timestep),
            progress=evaluation.progress,
            settings={key: arguments[key] for key in ("eta", "use_clipped_model_output") if key in arguments},
        )
        if run.estimator is not None:
            run.estimator.tell(evaluation.at)
        guided = evaluation.distilled or evaluation.rows != len(sample)
        unguided = evaluation.unguided(predictions) if guided and not estimated else None
        observe = partial(
            run.path_weights.before_step, run.scheduler, run.last, evaluation.lams, guided, unguided, estimated
        )
        if len(evaluation.models) == 1:
            observe(None)
            return own_step(**arguments)
        space, _ = space_of(run.scheduler, self._path)
        return mixed_step(run.scheduler, own_step, arguments, run.last, space, observe)
