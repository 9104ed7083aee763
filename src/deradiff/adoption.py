"""Schedulers that ask a dial at every step: a subclass of a scheduler's own class, given to that one instance.

It bears the name of the own class, which is saved in configurations, and makes no instances of itself: constructing,
`from_config`, copies and pickles give schedulers of the own class, which know of no dial.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers import SchedulerMixin

DIAL = "_deradiff_dial"
"""The attribute that names the dial, of a realigned denoiser and of an adopted scheduler's class."""


def scheduler_owner(scheduler: SchedulerMixin) -> Any:
    """The dial that a scheduler asks at every step, None for one that nobody realigned."""
    return getattr(type(scheduler), DIAL, None)


def adopt(scheduler: SchedulerMixin, dial: Any) -> None:
    """From now on `scheduler` tells `dial` when a run begins, and has it take every step."""
    scheduler.__class__ = _adopted_class(type(scheduler), dial)


def release(scheduler: SchedulerMixin) -> None:
    """Undo `adopt`."""
    scheduler.__class__ = type(scheduler).__mro__[1]


def _adopted_class(own_class: Any, dial: Any) -> Any:
    signature = inspect.signature(own_class.step)

    @functools.wraps(own_class.step)
    def step(self: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(self, *args, **kwargs).arguments
        arguments.pop("self")
        extra = arguments.pop("kwargs", {})  # of schedulers that take **kwargs
        return dial._step(self, functools.partial(own_class.step, self, **extra), dict(arguments))

    @functools.wraps(own_class.set_timesteps)
    def set_timesteps(self: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
        dial._begin(self)
        return own_class.set_timesteps(self, *args, **kwargs)

    def new(_: type, *args: Any, **kwargs: Any) -> SchedulerMixin:
        return own_class(*args, **kwargs)

    def reduce(self: SchedulerMixin, _: object) -> tuple[Any, ...]:
        return object.__new__, (own_class,), self.__dict__

    members = {"step": step, "set_timesteps": set_timesteps, "__new__": new, "__reduce_ex__": reduce}
    return type(own_class.__name__, (own_class,), members | {"__module__": own_class.__module__, DIAL: dial})
