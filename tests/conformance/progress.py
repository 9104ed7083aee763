"""Where in its run the dial says each step is, and where the scheduler's own timesteps say it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from diffusers import SchedulerMixin

from cases import Case, scheduler_classes


class Step(NamedTuple):
    """A step's progress, 0 at noise: `dial.last`'s, where there is one, and that of its timestep in the scheduler's."""

    told: float | None
    expected: float


def told_progress(case: Case, pipe: Any, dial: Any) -> list[list[Step]]:
    """The steps of one call of the realigned `pipe`, by scheduler: its own, and the copies that it makes in the call.

    Copies are seen at the scheduler's class, for they know nothing of what their original was given.
    """
    runs: dict[int, list[tuple[float | None, float, list[float]]]] = {}
    kept = []  # for an id is one object's only as long as it lives

    def seen(own: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        timestep = inspect.signature(own).bind(*args, **kwargs).arguments["timestep"]
        now, all_of_run = float(torch.as_tensor(timestep).flatten()[0]), scheduler.timesteps.tolist()
        output = own(*args, **kwargs)
        kept.append(scheduler)
        told = None if dial.last is None else round(dial.last.progress.steps, 4)
        runs.setdefault(id(scheduler), []).append((told, now, all_of_run))
        return output

    with ExitStack() as stack:
        for scheduler_class in scheduler_classes(pipe):
            stack.callback(_watched(scheduler_class, seen))
        for scheduler in _main_schedulers(pipe):
            scheduler.step = _seen_step(scheduler, seen)
        case.run(pipe)
    steps = [
        [
            Step(told, round(progress_of(now, all_of_run, {time for _, time, _ in run}), 4))
            for told, now, all_of_run in run
        ]
        for run in runs.values()
    ]
    # The steps of a model that is not realigned, as those that unCLIP enlarges with, are told nothing.
    return [run for run in steps if any(step.told is not None for step in run)] or steps


def _main_schedulers(pipe: Any) -> list[Any]:
    """The one called `scheduler`; all, where none is."""
    if hasattr(pipe, "scheduler"):
        return [pipe.scheduler]
    return [part for part in vars(pipe).values() if isinstance(part, SchedulerMixin)]


def _seen_step(scheduler: Any, seen: Any) -> Any:
    """The scheduler's step, seen. A function, for the copy of a partial has a copy of the scheduler (Panorama's)."""
    own = scheduler.step

    @functools.wraps(own)
    def step(*args: Any, **kwargs: Any) -> Any:
        return seen(own, scheduler, *args, **kwargs)

    return step


def _watched(scheduler_class: Any, seen: Any) -> Any:
    """Let the class's steps be seen; returns what undoes this."""
    own, inherited = scheduler_class.step, "step" not in vars(scheduler_class)

    @functools.wraps(own)
    def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        return seen(own.__get__(scheduler), scheduler, *args, **kwargs)

    def undo() -> None:
        if inherited:
            del scheduler_class.step
        else:
            scheduler_class.step = own

    scheduler_class.step = step
    return undo


def progress_of(now: float, timesteps: Sequence[float], stepped: Collection[float]) -> float:
    """The share of a scheduler's distinct timesteps that come before `now`.

    A last one of 0 from which no step is taken is the end of the run (SCM's and Würstchen's) and none of its steps.
    """
    distinct = list(dict.fromkeys(timesteps))
    if distinct[-1] == 0 and 0 not in stepped:
        distinct.pop()
    nearest = min(range(len(distinct)), key=lambda i: abs(distinct[i] - now))
    return nearest / len(distinct)
