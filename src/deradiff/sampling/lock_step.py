"""The mixture by hand, to hold a realigned pipeline against: plain pipelines side by side that meet at every step.

Each model has a plain pipeline with a scheduler of its own. They run in threads, one at a time, until all of them are
at their next scheduler's step; there what they bring is mixed, and each goes on with the mixture. Nothing of this knows
the dial: no denoiser answers for another, and no scheduler is asked for a posterior.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

import torch
from diffusers import ConfigMixin, SchedulerMixin
from torch import Tensor, nn

from deradiff.algorithm.step import Space
from deradiff.anchors.checks import Pipeline

Draw = Callable[[Any], Tensor]
"""Draws with a pipeline, with the same seed every time."""


class NoLockStep(RuntimeError):
    """These pipelines cannot be run side by side; the message says why."""


def plain_pipeline(pipe: Pipeline, denoisers: Mapping[str, nn.Module]) -> Any:
    """A pipeline as `pipe` around other `denoisers`, by component; schedulers and guiders are its own."""
    twin = copy.copy(pipe)
    for name, part in vars(pipe).items():
        if isinstance(part, ConfigMixin) and not isinstance(part, (nn.Module, Pipeline)):
            vars(twin)[name] = copy.deepcopy(part)
    for name, module in denoisers.items():
        setattr(twin, name, module)
    return twin


def in_lock_step(pipes: Sequence[Any], draw: Draw, weights: Sequence[float], space: Space) -> Tensor:
    """What `draw` returns of `pipes`, each a plain pipeline, when they meet at every step of their schedulers.

    In the space of predictions the guided ones are mixed before the step. In that of posteriors every scheduler steps
    from its own model's prediction, with the same noise, and what comes out is mixed: with equal variances these are
    draws from the mixture of the posteriors, the same noise around the mixed means.

    Raises `NoLockStep` where they do not take the same steps from the same latents, and what `draw` raises.
    """
    runs = [_PausedRun(pipe, draw, space) for pipe in pipes]
    try:
        with torch.random.fork_rng():
            mixture: Tensor | None = None
            while True:
                brought = [run.until_step(mixture) for run in runs]
                if all(run.result is not None for run in runs):
                    break
                if any(run.result is not None for run in runs):
                    raise NoLockStep("the models' own pipelines take different numbers of steps")
                mixture = _mixed(brought, weights)
    finally:
        for run in runs:
            run.stop()
    results = [run.result for run in runs if run.result is not None]
    if mixture is None:
        raise NoLockStep("the pipeline takes no step of a scheduler that it holds")
    if not all(torch.equal(result, results[0]) for result in results):
        raise NoLockStep("the models' own pipelines do not stay together although they take the same steps")
    return results[0]


def _mixed(brought: Sequence[Any], weights: Sequence[float]) -> Tensor:
    """The weighted sum of what the runs bring, in double precision where the device has it."""
    tensors, samples = zip(*brought, strict=True)
    if not all(torch.equal(sample, samples[0]) for sample in samples):
        raise NoLockStep("the models' own pipelines come to a step with different latents")
    first = tensors[0]
    wide = torch.float32 if first.device.type == "mps" else torch.float64
    total = sum(weight * tensor.to(wide) for weight, tensor in zip(weights, tensors, strict=True))
    assert isinstance(total, Tensor)
    return total.to(first.dtype)


class _Stopped(BaseException):
    """Ends the thread of a run that nobody waits for any more."""


class _PausedRun:
    """One pipeline's call in a thread of its own, which goes on from step to step when it is told to."""

    def __init__(self, pipe: Any, draw: Draw, space: Space):
        self.result: Tensor | None = None
        self._pipe, self._space = pipe, space
        self._told: SimpleQueue[Tensor | _Stopped | None] = SimpleQueue()
        self._brought: SimpleQueue[Any] = SimpleQueue()
        self._random: Any = None
        self._thread = threading.Thread(target=self._run, args=(draw,), daemon=True)
        self._thread.start()

    def until_step(self, mixture: Tensor | None) -> Any:
        """Go on, with the mixture of the last step, to the next one: what is mixed there, and the sample before it.

        None at the end, and `result` is set. Raises what the call raises.
        """
        if self._random is not None:
            _set_random_state(self._random)
        self._told.put(mixture)
        brought = self._brought.get()
        self._random = _random_state()
        if isinstance(brought, BaseException):
            raise brought
        return brought

    def stop(self) -> None:
        """End the thread, wherever it is."""
        self._told.put(_Stopped())
        self._thread.join()

    def _run(self, draw: Draw) -> None:
        try:
            self._wait()
            with self._stepping():
                self.result = draw(self._pipe)
            self._brought.put(None)
        except _Stopped:
            pass
        except BaseException as error:
            self._brought.put(error)

    def _wait(self) -> Tensor | None:
        told = self._told.get()
        if isinstance(told, _Stopped):
            raise told
        return told

    def _meet(self, tensor: Tensor, sample: Tensor) -> Tensor:
        self._brought.put((tensor, sample))
        mixture = self._wait()
        assert mixture is not None
        return mixture

    @contextmanager
    def _stepping(self) -> Iterator[None]:
        """Within, the pipeline's schedulers step from the mixture."""
        schedulers = [part for part in vars(self._pipe).values() if isinstance(part, SchedulerMixin)]
        for scheduler in schedulers:
            vars(scheduler)["step"] = self._meeting(scheduler.step)
        try:
            yield
        finally:
            for scheduler in schedulers:
                del vars(scheduler)["step"]

    def _meeting(self, own: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(own)

        @functools.wraps(own)  # pipelines read its signature: who takes `eta`, who a `generator`
        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            if self._space == "prediction":
                given["model_output"] = self._meet(given["model_output"], given["sample"])
                return own(*bound.args, **bound.kwargs)
            output = own(*bound.args, **bound.kwargs)
            mixture = self._meet(output[0], given["sample"])
            if isinstance(output, tuple):
                return mixture, *output[1:]
            return type(output)(**{**output, "prev_sample": mixture})

        return step


def _random_state() -> Any:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
