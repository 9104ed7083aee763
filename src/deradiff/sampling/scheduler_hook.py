"""Schedulers and pipelines that ask a dial.

A scheduler by attributes of its instance in front of its class's own methods, so that it keeps its class, which some
pipelines ask. Copies and pickles are made without them: a scheduler of the own class that knows of no dial, unless the
copy is made by a realigned pipeline in the middle of a call, for a second modality or for every frame.

A pipeline by a subclass of its own class, for Python looks for `__call__` there. It bears the name of the own class,
which is saved in configurations, and makes no instances of itself.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from diffusers import SchedulerMixin

from deradiff.anchors.checks import Pipeline
from deradiff.anchors.full_weights import DIAL
from deradiff.sampling.blocked_methods import DialError


def owner_of(hooked: SchedulerMixin | Pipeline) -> Any:
    """The dial that a scheduler or a pipeline asks, None for one that nobody realigned."""
    dial_of_scheduler = vars(hooked).get(DIAL)
    return dial_of_scheduler() if dial_of_scheduler else getattr(type(hooked), DIAL, None)


def require_step(scheduler: SchedulerMixin) -> None:
    """Raise `DialError` for a scheduler whose `step` is not from a prediction, at a timestep, of a sample."""
    step = getattr(scheduler, "step", None)
    if step is None or not {"model_output", "timestep", "sample"} <= inspect.signature(step).parameters.keys():
        raise DialError(
            f"{type(scheduler).__name__} has no step(model_output, timestep, sample), where the models' predictions "
            "are mixed, and its pipelines take their steps in another way: they cannot be realigned"
        )


def schedulers_of(pipe: Pipeline) -> list[SchedulerMixin]:
    """All schedulers of a pipeline, the one called `scheduler` last."""
    # Copied first: the pipeline may be drawing in another thread, and its calls set attributes.
    own = {name: part for name, part in [*vars(pipe).items()] if isinstance(part, SchedulerMixin)}
    return [own[name] for name in sorted(own, key=lambda name: name == "scheduler")]


def hook_scheduler(scheduler: Any, dial: Any) -> Callable[[], None]:
    """From now on `scheduler` tells `dial` when a run begins, and has it take every step; returns what undoes this.

    Raises what `require_step` raises.
    """
    require_step(scheduler)
    own_step, own_set_timesteps = scheduler.step, scheduler.set_timesteps
    signature = inspect.signature(own_step)

    @functools.wraps(own_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        extra = arguments.pop("kwargs", {})  # of schedulers that take **kwargs
        return dial._step(scheduler, functools.partial(own_step, **extra), dict(arguments))

    @functools.wraps(own_set_timesteps)
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        with dial._begin(scheduler):
            return own_set_timesteps(*args, **kwargs)

    def guarded(own: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(own)
        def method(*args: Any, **kwargs: Any) -> Any:
            dial._runs.require_present(scheduler)
            return own(*args, **kwargs)

        return method

    def getstate() -> dict[str, Any]:
        """What copies and pickles are made of: the scheduler without its hooks."""
        return {name: value for name, value in vars(scheduler).items() if name not in hooks} | hidden

    def deepcopy(memo: dict[int, Any]) -> Any:
        twin = memo[id(scheduler)] = object.__new__(type(scheduler))
        vars(twin).update(copy.deepcopy(getstate(), memo))
        dial._copied(twin)
        return twin

    def unhook() -> None:
        state = getstate()
        vars(scheduler).clear()
        vars(scheduler).update(state)

    # What else moves a scheduler's place in its timesteps.
    moving = [name for name in ("scale_model_input", "set_begin_index") if hasattr(scheduler, name)]
    hooks = {"step": step, "set_timesteps": set_timesteps, "__getstate__": getstate, "__deepcopy__": deepcopy}
    # A function, for some pipelines copy all that a scheduler has, and give it the copy back (Panorama): that of a
    # function is the function.
    hooks |= {DIAL: lambda: dial} | {name: guarded(getattr(scheduler, name)) for name in moving}
    hidden = {name: value for name, value in vars(scheduler).items() if name in hooks}
    vars(scheduler).update(hooks)
    return unhook


def hook_pipeline(pipe: Pipeline, dial: Any) -> Callable[[], None]:
    """From now on `pipe` tells `dial` when a call of it begins and ends; returns what undoes this."""
    own_class: Any = type(pipe)

    @functools.wraps(own_class.__call__)
    def call(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        with dial._calling(self):
            return own_class.__call__(self, *args, **kwargs)

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return own_class(*args, **kwargs)

    def reduce(self: Any, _: object) -> tuple[Any, ...]:
        return object.__new__, (own_class,), self.__dict__

    members = {"__call__": call, "__new__": new, "__reduce_ex__": reduce, "__module__": own_class.__module__}
    pipe.__class__ = type(own_class.__name__, (own_class,), {**members, DIAL: dial})

    hooked = weakref.ref(pipe)

    def unhook() -> None:
        if (pipe := hooked()) is not None:
            pipe.__class__ = own_class

    return unhook
