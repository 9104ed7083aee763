"""Which run a call of the denoiser and a step of a scheduler belong to, also where several threads use one denoiser.

A run begins where a scheduler's timesteps are set, and belongs to the thread that sets them. Pipelines around one
denoiser that have schedulers of their own can run in as many threads as one likes; their evaluations take turns. A
scheduler counts its steps and a pipeline holds the settings of its call, so either has one run at a time: a second
thread is refused.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from diffusers import SchedulerMixin
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.lams import Lams
from deradiff.algorithm.path_weights import PathWeights
from deradiff.algorithm.step import StepRecord
from deradiff.anchors.checks import Pipeline
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.evaluation import StepEvaluation
from deradiff.sampling.reuse import PredictionEstimator, Reuse

_OWN_PIPELINE = (
    "give each thread a pipeline with a scheduler of its own, other = type(pipe)(**pipe.components) and "
    "other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config), and call dial.attach(other)"
)


@dataclass(eq=False)
class Run:
    """From setting a scheduler's timesteps to its last step."""

    scheduler: SchedulerMixin
    thread: int
    reuse: Reuse | None
    path_weights: PathWeights = field(default_factory=PathWeights)
    pending: StepEvaluation | None = None
    """What the denoiser was called for, until the scheduler takes the step."""
    estimator: PredictionEstimator | None = None
    fresh: bool = True
    """Whether no step was taken yet."""
    last: StepRecord | None = None
    lams: Lams | None = None
    """The λ that `mixture_weights` are for, which the dial may have left behind since."""
    mixture_weights: Float[Tensor, "model #image"] | None = None
    evaluated: set[tuple[tuple[int, ...], bool]] = field(default_factory=set)
    """Which models were evaluated together so far, and whether they alone."""
    over: bool = False
    copied: bool = False
    """Whether the pipeline copied the scheduler in the middle of a call: it may be elsewhere than the others are."""


class Runs:
    """The runs of a realigned denoiser, the present and the last of each scheduler.

    `lock` is held while a run begins, while the denoiser is evaluated and while a step is taken.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._latest: Run | None = None
        self._by_scheduler: dict[int, Run] = {}
        self._calls: list[tuple[int, Pipeline]] = []
        """The calls of pipelines that are in progress, and their threads."""
        self._own = threading.local()

    def begin(self, scheduler: SchedulerMixin, reuse: Reuse | None, *, own: bool = True, copied: bool = False) -> Run:
        """A new run of `scheduler`, this thread's if it is its `own`. `DialError` in the middle of another thread's.

        `copied` is said once of a scheduler, and is so of its later runs too.
        """
        me = threading.get_ident()
        before = self._by_scheduler.get(id(scheduler))
        if before is not None:
            self._require_free(before)
        for earlier in (before, getattr(self._own, "run", None)):
            if earlier is not None and earlier.estimator is not None:
                earlier.estimator.tell()
        copied = copied or (before is not None and before.copied)
        run = self._latest = self._by_scheduler[id(scheduler)] = Run(scheduler, me, reuse, copied=copied)
        if own:
            self._own.run, self._own.stepped = run, run
        return run

    def present(self) -> Run:
        """The run that a call of the denoiser in this thread belongs to.

        A thread that began none goes on with the latest, as where one thread sets the timesteps and another takes the
        steps. Raises `DialError` where that is in the middle of an image.
        """
        run: Run | None = getattr(self._own, "run", None)
        if run is not None and not run.over:
            self.require_present(run.scheduler)
            return run
        assert self._latest is not None
        if self._latest.thread != threading.get_ident() and self._is_busy(self._latest.thread):
            raise DialError(
                f"{_name(self._latest.thread)} is in the middle of an image, and this thread has begun none with a "
                "scheduler that the dial knows: call dial.attach(pipeline) for the pipeline used here, or set the "
                "timesteps of a scheduler of its own in this thread"
            )
        return self._latest

    def of(self, scheduler: SchedulerMixin) -> Run:
        """The run that a step of `scheduler` in this thread belongs to."""
        self.require_present(scheduler)
        run = self._by_scheduler[id(scheduler)]
        self._require_free(run)
        if run.copied:
            self._own.stepped = run
        return run

    def follow(self, schedulers: Sequence[SchedulerMixin]) -> None:
        """This thread's run goes on with a copy of its scheduler where that has taken the place among `schedulers`."""
        run: Run | None = getattr(self._own, "run", None)
        if run is None or run.over or any(run.scheduler is scheduler for scheduler in schedulers):
            return
        for scheduler in schedulers:
            other = self._by_scheduler.get(id(scheduler))
            if other is not None and other.copied and other.thread == run.thread:
                self._own.run = self._own.stepped = other

    def forget(self, scheduler: SchedulerMixin) -> None:
        """Let go of the runs of `scheduler`, which is used no more."""
        self._by_scheduler.pop(id(scheduler), None)

    def require_present(self, scheduler: SchedulerMixin) -> None:
        """Raise `DialError` where another thread has begun a run with `scheduler` since this one did."""
        run: Run | None = getattr(self._own, "run", None)
        latest = self._by_scheduler.get(id(scheduler))
        if run is None or run.over or run.scheduler is not scheduler or run is latest or latest is None:
            return
        raise DialError(
            f"{_name(latest.thread)} has begun another run with this thread's {type(scheduler).__name__}, so that this "
            f"one cannot be finished: {_OWN_PIPELINE}"
        )

    @contextmanager
    def call(self, pipe: Pipeline) -> Iterator[None]:
        """A call of `pipe` in this thread, however it ends. Raises `DialError` while another thread is in one."""
        me = threading.get_ident()
        with self.lock:
            for thread, other in self._calls:
                if other is pipe and thread != me:
                    raise DialError(
                        f"{_name(thread)} is in a call of this pipeline, which holds the settings of that call: wait "
                        f"until it is done, or {_OWN_PIPELINE}"
                    )
            self._calls.append((me, pipe))
        try:
            yield
        finally:
            with self.lock:
                self._calls.remove((me, pipe))
                run: Run | None = getattr(self._own, "run", None)
                if run is not None and not self._is_busy(me):
                    run.over, run.pending = True, None

    def is_called(self, pipe: Pipeline | None = None) -> bool:
        """Whether this thread is in a call of `pipe`, or of any pipeline."""
        me = threading.get_ident()
        return any(thread == me and pipe in (None, other) for thread, other in self._calls)

    def require_quiet(self) -> None:
        """Raise `DialError` while another thread is in the call of a pipeline."""
        for thread, pipe in self._calls:
            if thread != threading.get_ident():
                raise DialError(
                    f"{_name(thread)} is in the middle of an image of this {type(pipe).__name__}, whose rest would "
                    "come from the reference alone: wait until it is done"
                )

    @property
    def shown(self) -> Run:
        """The present or last run: this thread's, or else the latest of any; of those of copies, which stepped last."""
        run: Run | None = getattr(self._own, "run", None) or self._latest
        assert run is not None  # the dial begins one when it is made
        return self._own.stepped if run.copied and hasattr(self._own, "stepped") else run

    def detach(self) -> None:
        """Let go of the models: where gradients are taken, predictions hold on to the weights that they came from."""
        for run in self._by_scheduler.values():
            run.pending, run.over = None, True
            run.path_weights.detach()
            if run.last is not None:
                run.last = replace(run.last, predictions=run.last.predictions.detach(), sample=run.last.sample.detach())

    def _require_free(self, run: Run) -> None:
        """Raise `DialError` in the middle of another thread's call of a pipeline, of which this is the run."""
        if run.thread != threading.get_ident() and self._is_busy(run.thread) and not run.over:
            raise DialError(
                f"{_name(run.thread)} is in the middle of an image with this {type(run.scheduler).__name__}: wait "
                f"until it is done, or {_OWN_PIPELINE}"
            )

    def _is_busy(self, thread: int) -> bool:
        return any(caller == thread for caller, _ in self._calls)


def _name(thread: int) -> str:
    """How a message calls a thread."""
    names = {other.ident: other.name for other in threading.enumerate()}
    return f"another thread ({names.get(thread, 'ended since')})"
