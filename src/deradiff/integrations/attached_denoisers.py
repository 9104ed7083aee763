"""The denoisers that a guider mixes: which of the models behind one answers the pipeline's next call of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from diffusers import SchedulerMixin
from diffusers.guiders import BaseGuidance
from torch import nn

from deradiff.algorithm.noise_levels import Timestep, first
from deradiff.algorithm.step import space_of
from deradiff.anchors.checks import Pipeline, denoisers_of, unwrapped
from deradiff.anchors.full_weights import DIAL
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.realigned_components import hook_denoisers


class AttachedDenoiser:
    """One denoiser of a pipeline, the reference, with its anchors beside it or in it.

    Until `give_turn` and after `end_turn` a call is answered by the reference alone, as if nothing were attached; in
    between, in the same thread, by the model whose turn it is. Adapters are active only while such a call runs. A call
    that fails ends the turn, for a pipeline that an exception ends does not clean up.
    """

    called = "guider"
    """What messages call the handle with which it is removed."""

    def __init__(self, denoisers: Denoisers):
        self.denoisers = denoisers
        self._turn: tuple[int, int, Callable[[], None]] | None = None
        self._unhook: Callable[[], None] = hook_denoisers(denoisers, self, self._answer)

    def __repr__(self) -> str:
        anchors = {anchor.name: anchor.source for anchor in self.denoisers.anchors}
        return f"a RealignGuider for {type(self.denoisers.reference).__name__} with the anchors {anchors}"

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise TypeError(
            "a denoiser that a guider realigns cannot be copied or pickled, the copy would still run the original's "
            "models: call guider.remove() first"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__deepcopy__({})

    def give_turn(self, model: int, failed: Callable[[], None]) -> None:
        """From now on this thread's calls are answered by `model`; `failed` is called when one of them fails."""
        self._turn = model, threading.get_ident(), failed

    def end_turn(self) -> None:
        """The reference answers for itself again."""
        self._turn = None

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        turn = self._turn
        if turn is None or turn[1] != threading.get_ident():
            return self.denoisers.reference_call(*args, **kwargs)
        model, _, failed = turn
        try:
            return self.denoisers.predict([model], args, kwargs)[model]
        except BaseException:
            failed()
            raise

    def undo(self) -> None:
        """Leave the reference and the anchors as they were found."""
        self.end_turn()
        self._unhook()
        self.denoisers.undo()


class Attached:
    """What a guider is attached to: denoisers with their anchors, and the pipelines around them."""

    def __init__(self) -> None:
        self.attached: list[AttachedDenoiser] = []
        self._pipes: list[weakref.ref[Pipeline]] = []

    def of(self, denoiser: nn.Module) -> AttachedDenoiser | None:
        """What is attached to this denoiser."""
        owner = unwrapped(denoiser).__dict__.get(DIAL)
        return next((own for own in self.attached if own is owner), None)

    def add(self, denoisers: Denoisers) -> None:
        """Attach a denoiser's models."""
        self.attached.append(AttachedDenoiser(denoisers))

    def add_pipeline(self, pipe: Pipeline) -> None:
        """Another pipeline whose scheduler tells where in its run a step is."""
        if all(own is not pipe for own in self.pipelines()):
            self._pipes.append(weakref.ref(pipe))

    def pipelines(self) -> list[Pipeline]:
        """Those that are still there."""
        return [pipe for ref in self._pipes if (pipe := ref()) is not None]

    def begin(self) -> None:
        """A run begins: weights may have been loaded since the last one."""
        for own in self.attached:
            own.denoisers.begin()

    def scheduler(self, timestep: Timestep) -> SchedulerMixin:
        """The scheduler of the pipeline that is running, whose timesteps this one is of.

        Raises `DialError` where no pipeline is attached, or several that cannot be told apart.
        """
        pipes = self.pipelines()
        if not pipes or not self.attached:
            raise DialError(
                "this guider is attached to no pipeline, and its anchors are not loaded: call guider.attach(pipe) "
                "before the run"
            )
        schedulers = list({id(pipe.scheduler): pipe.scheduler for pipe in pipes}.values())
        if len(schedulers) > 1:
            schedulers = _whose(timestep, schedulers)
        if len(schedulers) != 1:
            raise DialError(
                f"this guider is attached to {len(pipes)} pipelines, and it cannot be told whose timestep "
                f"{first(timestep):g} is: give each pipeline a guider of its own"
            )
        return schedulers[0]

    def undo(self) -> None:
        """Leave all denoisers as they were found, the last attached first."""
        while self.attached:
            self.attached.pop().undo()
        self._pipes.clear()


def _whose(timestep: Timestep, schedulers: list[SchedulerMixin]) -> list[SchedulerMixin]:
    """Those whose list of timesteps this one is an entry of: by its place in memory, else by its value."""
    known = [own for own in schedulers if isinstance(getattr(own, "timesteps", None), torch.Tensor)]
    if isinstance(timestep, torch.Tensor):
        memory = timestep.untyped_storage().data_ptr()
        if same := [own for own in known if own.timesteps.untyped_storage().data_ptr() == memory]:
            return same
    return [own for own in known if bool((own.timesteps == timestep).any())]


def require_affine(scheduler: SchedulerMixin) -> None:
    """Raise `ValueError` for a scheduler with which mixed predictions are not the mixture of Algorithm 1."""
    space, why = space_of(scheduler, "auto")
    if space == "posterior":
        raise ValueError(
            f"a guider can only mix predictions: Algorithm 1 where a scheduler's step is affine in them. {why} "
            "Switch that off, or realign the pipeline with deradiff.realign(pipe, anchor, lam), which mixes posteriors"
        )


def only_denoiser(pipe: Pipeline) -> str:
    """The name of the pipeline's denoiser. Raises `ValueError` where it has several."""
    components = [*denoisers_of(pipe)]
    if len(components) > 1:
        raise ValueError(
            f"this pipeline has several denoisers, {' and '.join(components)}, each with a guider of its own: say with "
            "component= which of them this one is for"
        )
    return components[0]


def guider_of(pipe: Pipeline | None, component: str | None) -> BaseGuidance:
    """The guider that the pipeline has for a denoiser. Raises `ValueError` where it has none."""
    if pipe is None:
        raise ValueError("no guider to put inside: pass one, as guider=ClassifierFreeGuidance(7.5), or the pipeline")
    number = (component or only_denoiser(pipe)).rpartition("_")[2]
    name = f"guider_{number}" if number.isdigit() else "guider"
    guider = getattr(pipe, name, None)
    if not isinstance(guider, BaseGuidance):
        raise ValueError(
            f"{type(pipe).__name__} has no {name!r}: its blocks guide in another way, or their model is distilled and "
            "needs none. Realign it with deradiff.realign(pipe, anchor, lam)"
        )
    return guider
