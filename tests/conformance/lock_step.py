"""Oracle: two untouched pipelines, one per model, in lock-step.

Each runs in a thread of its own, one at a time, until both have come to their k-th step of a scheduler. There their
guided predictions are mixed, and each takes its own step from the mixture: exact whatever the guidance does, and the
two latents stay the same. Steps meet at the scheduler's class, so also those of copies that a pipeline makes of its
scheduler in the middle of a call.
"""

from __future__ import annotations

import functools
import inspect
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arrays import Arrays, difference
from mixing import mixed

OwnStep = Any
"""A scheduler class's function `step`."""
Combined = Callable[[OwnStep, Any, dict[str, Any], tuple[Any, Any]], Any]
"""What a scheduler's step gives at a meeting: from its own step, itself, the arguments, and both predictions."""


LARGE = 1e6
"""Noise from which a step's deviation is read: large, or a small deviation would be lost beside the mean."""


class OracleFailed(RuntimeError):
    """The oracle cannot be had for this pipeline. The message says why."""


def of_predictions(weight: float) -> Combined:
    """The scheduler's own step from the mixed prediction."""

    def combined(own: OwnStep, scheduler: Any, arguments: dict[str, Any], predictions: tuple[Any, Any]) -> Any:
        return own(scheduler, **{**arguments, "model_output": mixed(*predictions, weight)})

    return combined


def of_posteriors(weight: float) -> Combined:
    """A draw from the geometric mixture of both models' steps, whose means and deviations are read off the steps."""

    def combined(own: OwnStep, scheduler: Any, arguments: dict[str, Any], predictions: tuple[Any, Any]) -> Any:
        before = dict(vars(scheduler))
        steps = []
        for prediction in predictions:
            for noise in (LARGE, 0.0):
                vars(scheduler).clear()
                vars(scheduler).update(before)
                steps.append(_with_noise(own, scheduler, {**arguments, "model_output": prediction}, noise))
        noisy, outputs = steps[::2], steps[1::2]
        means = [output[0].double() for output in outputs]
        stds = [(one[0].double() - mean) / LARGE for one, mean in zip(noisy, means, strict=True)]
        previous = _drawn(own, arguments, means, stds, weight).to(arguments["sample"].dtype)
        first = outputs[0]
        return (previous, *first[1:]) if isinstance(first, tuple) else type(first)(prev_sample=previous)

    return combined


def _drawn(
    own: OwnStep, arguments: dict[str, Any], means: Sequence[Tensor], stds: Sequence[Tensor], weight: float
) -> Tensor:
    """A draw from the mixture, by noise as the scheduler draws it."""
    if float(stds[0].abs().max()) == 0:
        return (1 - weight) * means[0] + weight * means[1]
    precisions = (1 - weight) / stds[0] ** 2, weight / stds[1] ** 2
    variance = 1 / (precisions[0] + precisions[1])
    sample, generator = arguments["sample"], arguments.get("generator")
    noise = own.__globals__["randn_tensor"](sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
    mean = variance * (precisions[0] * means[0] + precisions[1] * means[1])
    return mean + variance.sqrt() * noise


def _with_noise(own: OwnStep, scheduler: Any, arguments: dict[str, Any], value: float) -> Any:
    """The scheduler's step where all its noise is `value`."""
    names = own.__globals__
    if "randn_tensor" not in names:
        raise OracleFailed(f"{type(scheduler).__name__} does not draw its noise by randn_tensor")
    real = names["randn_tensor"]
    names["randn_tensor"] = lambda shape, *_, dtype=None, **__: torch.full(tuple(shape), value, dtype=dtype)
    try:
        return own(scheduler, **arguments)
    finally:
        names["randn_tensor"] = real


def in_lock_step(
    draws: Sequence[Callable[[], Arrays]], classes: set[type], combined: Combined
) -> tuple[Arrays, list[str]]:
    """What both `draws`, which meet at every step of a scheduler of these classes, come to; and whose steps these were.

    Raises `OracleFailed` where they do not see the same, and whatever either raises.
    """
    meeting = _Meeting(combined)
    with ExitStack() as stack:
        for scheduler_class in classes:
            stack.enter_context(_met_at(scheduler_class, meeting))
        outputs = meeting.held(draws)
    if not meeting.steps:
        raise OracleFailed("no scheduler took a step")
    if difference(*outputs) > 1e-5:
        raise OracleFailed(f"the two pipelines ended apart, by {difference(*outputs):g}")
    return outputs[0], meeting.steps


@contextmanager
def _met_at(scheduler_class: Any, meeting: _Meeting) -> Iterator[None]:
    """Within, steps of this class meet: the class's, for copies of an instance know nothing of what it was given."""
    own = scheduler_class.step
    signature = inspect.signature(own)
    inherited = "step" not in vars(scheduler_class)

    @functools.wraps(own)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(scheduler, *args, **kwargs).arguments
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        return meeting.step(own, scheduler, arguments)

    scheduler_class.step = step
    try:
        yield
    finally:
        if inherited:
            del scheduler_class.step
        else:
            scheduler_class.step = own


class _Meeting:
    """Two threads that take turns; each hands over where it arrives at a step, and where it ends."""

    def __init__(self, combined: Combined) -> None:
        self.steps: list[str] = []
        self._combined = combined
        self._turns = (threading.Semaphore(0), threading.Semaphore(0))
        self._numbers: dict[int, int] = {}
        self._arrived: list[dict[str, Any]] = [{}, {}]
        self._counts = [0, 0]
        self._ended = [False, False]
        self._inside = False
        self._pair: tuple[Any, Any] = (None, None)
        self._outputs: list[Arrays] = [[], []]
        self._error: BaseException | None = None

    def held(self, draws: Sequence[Callable[[], Arrays]]) -> list[Arrays]:
        """Let both draw, and return what they drew. Raises the first error of either."""
        threads = [threading.Thread(target=self._draw, args=(k, draw), daemon=True) for k, draw in enumerate(draws)]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return self._outputs

    def _draw(self, number: int, draw: Callable[[], Arrays]) -> None:
        self._turns[number].acquire()
        self._numbers[threading.get_ident()] = number
        try:
            if self._error is None:
                self._outputs[number] = draw()
        except BaseException as error:
            self._error = self._error or error
        self._ended[number] = True
        self._turns[1 - number].release()

    def step(self, own: OwnStep, scheduler: Any, arguments: dict[str, Any]) -> Any:
        """A step of either thread: the mixture's; of anybody else, or within such a step, the scheduler's own."""
        number = self._numbers.get(threading.get_ident())
        if number is None or self._inside:
            return own(scheduler, **arguments)
        self._arrive(number, scheduler, arguments)
        self._inside = True
        try:
            return self._combined(own, scheduler, arguments, self._pair)
        finally:
            self._inside = False

    def _arrive(self, number: int, scheduler: Any, arguments: dict[str, Any]) -> None:
        """Wait for the other to come to the same step."""
        self._arrived[number] = arguments
        self._counts[number] += 1
        if number == 1:
            self._require_same()
            self._pair = (self._arrived[0]["model_output"], self._arrived[1]["model_output"])
            self.steps.append(type(scheduler).__name__)
        elif self._ended[1]:
            raise OracleFailed("the pipeline with the anchor took fewer steps")
        state = torch.get_rng_state(), np.random.get_state(), random.getstate()
        self._turns[1 - number].release()
        self._turns[number].acquire()
        if self._error is not None:
            raise OracleFailed("the other pipeline failed")
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        random.setstate(state[2])

    def _require_same(self) -> None:
        if self._counts[0] != self._counts[1]:
            raise OracleFailed("the reference's pipeline took fewer steps")
        one, other = (arguments["sample"] for arguments in self._arrived)
        if one.shape != other.shape or not torch.equal(one, other):
            raise OracleFailed("the models do not see the same latents")
