"""Schedulers and pipelines that ask a dial: a subclass of an object's own class, given to that one instance.

It bears the name of the own class, which is saved in configurations, and makes no instances of itself: constructing,
`from_config`, copies and pickles give objects of the own class, which know of no dial.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import DiffusionPipeline, SchedulerMixin

from deradiff.anchors.full_weights import DIAL


def owner_of(hooked: SchedulerMixin | DiffusionPipeline) -> Any:
    """The dial that a scheduler or a pipeline asks, None for one that nobody realigned."""
    return getattr(type(hooked), DIAL, None)


def hook_scheduler(scheduler: SchedulerMixin, dial: Any) -> None:
    """From now on `scheduler` tells `dial` when a run begins, and has it take every step."""
    own_class: Any = type(scheduler)
    signature = inspect.signature(own_class.step)

    @functools.wraps(own_class.step)
    def step(self: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        extra = arguments.pop("kwargs", {})  # of schedulers that take **kwargs
        return dial._step(self, functools.partial(own_class.step, self, **extra), dict(arguments))

    @functools.wraps(own_class.set_timesteps)
    def set_timesteps(self: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
        with dial._begin(self):
            return own_class.set_timesteps(self, *args, **kwargs)

    def guarded(name: str) -> Any:
        @functools.wraps(getattr(own_class, name))
        def method(self: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
            dial._require_present(self)
            return getattr(own_class, name)(self, *args, **kwargs)

        return method

    # What else moves a scheduler's place in its timesteps.
    others = {name: guarded(name) for name in ("scale_model_input", "set_begin_index") if hasattr(own_class, name)}
    scheduler.__class__ = _subclass(own_class, dial, {"step": step, "set_timesteps": set_timesteps, **others})


def hook_pipeline(pipe: DiffusionPipeline, dial: Any) -> None:
    """From now on `pipe` tells `dial` when a call of it begins and ends."""
    own_class: Any = type(pipe)

    @functools.wraps(own_class.__call__)
    def call(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        with dial._calling(self):
            return own_class.__call__(self, *args, **kwargs)

    pipe.__class__ = _subclass(own_class, dial, {"__call__": call})


def unhook(hooked: SchedulerMixin | DiffusionPipeline) -> None:
    """Undo `hook_scheduler` or `hook_pipeline`."""
    hooked.__class__ = type(hooked).__mro__[1]


def _subclass(own_class: Any, dial: Any, members: dict[str, Any]) -> Any:
    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return own_class(*args, **kwargs)

    def reduce(self: Any, _: object) -> tuple[Any, ...]:
        return object.__new__, (own_class,), self.__dict__

    members |= {"__new__": new, "__reduce_ex__": reduce, "__module__": own_class.__module__, DIAL: dial}
    return type(own_class.__name__, (own_class,), members)
