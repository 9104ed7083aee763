"""The models that are in memory: loaded once, shared by all pages, and let go where memory runs short."""

from __future__ import annotations

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil
import torch
from diffusers import DiffusionPipeline
from torch import nn

from deradiff.sampling.devices import device_called
from deradiff.sampling.dial import Dial
from deradiff.sampling.realignment import realign
from deradiff.studio.scenes import anchor_names
from deradiff.studio.sources import Sources
from deradiff.sweep.drawing import loaded, place
from deradiff.sweep.pipelines import SCHEDULERS, anchor_source, scheduler_like
from deradiff.sweep.settings import Settings

RESERVE = 0.1
"""The share of memory that is kept free: below it models that nobody draws with are let go."""

MOST_KEPT = 12
"""Anchors with weights of their own that are kept beside each reference, however much memory there is."""


@dataclass
class MachineSettings:
    """Where models are computed, and in which numbers, as fields of `Settings`; the command line decides it once."""

    device: str = "auto"
    dtype: str = "auto"
    offload: bool = False
    allow_pickle: bool = False

    def free(self) -> float:
        """The share of memory that is free where the models are."""
        device = device_called(self.device)
        if device.startswith("cuda"):
            free, total = torch.cuda.mem_get_info(device)
            return free / total
        memory = psutil.virtual_memory()
        return memory.available / memory.total


@dataclass
class _LoadedReference:
    """One reference, with whatever was loaded beside it."""

    pipe: DiffusionPipeline
    schedulers: dict[str | None, Any]
    dial: Dial | None = None
    anchors: tuple[str, ...] = ()
    modules: OrderedDict[str, nn.Module] = field(default_factory=OrderedDict)
    warned: tuple[str, ...] = ()
    """What putting these anchors beside the reference warned about."""


class LoadedModels:
    """The references and anchors in memory. Its methods are for whoever has the turn (`jobs.Turns`).

    A reference is loaded once, whatever anchors pages put beside it; so is an anchor with weights of its own. The one
    used longest ago goes first where memory runs short.
    """

    def __init__(self, sources: Sources, machine: MachineSettings, free: Callable[[], float] | None = None) -> None:
        self.sources, self.machine = sources, machine
        self._free = machine.free if free is None else free
        self._kept: OrderedDict[str, _LoadedReference] = OrderedDict()

    @property
    def references(self) -> list[str]:
        """The references in memory, that used last at the end."""
        return list(self._kept)

    def realigned(self, settings: Settings) -> tuple[DiffusionPipeline, Dial]:
        """The pipeline of `settings` with its scheduler, and the dial of its anchors, at λ = 1.

        What is not in memory is loaded. Raises what loading raises, and then everything is as it was; where memory is
        all that fails, everything else is let go and it is tried once more.
        """
        for source in (settings.reference, *settings.anchors.values()):
            self.sources.require(source)
        try:
            return self._realigned(settings)
        except (torch.OutOfMemoryError, MemoryError):
            self.let_go(but=settings.reference)
            return self._realigned(settings)

    def schedulers(self, reference: str) -> list[str]:
        """The names of the schedulers that fit a reference in memory."""
        usual = self._kept[reference].schedulers[None]
        return [name for name in SCHEDULERS if _fits(usual, name)]

    def warned(self, reference: str) -> tuple[str, ...]:
        """What the present anchors of a reference in memory warned about when they were put beside it."""
        return self._kept[reference].warned

    def usual(self, reference: str) -> str:
        """The class of the scheduler that a reference in memory comes with."""
        return type(self._kept[reference].schedulers[None]).__name__.removesuffix("Scheduler")

    def let_go(self, but: str | None = None) -> None:
        """Free all references but one, and every anchor that is not in use beside it."""
        for reference in [name for name in self._kept if name != but]:
            self._drop(reference)
        if (kept := self._kept.get(but or "")) is not None:
            kept.modules = OrderedDict((name, module) for name, module in kept.modules.items() if name in kept.anchors)
        _collect()

    def _realigned(self, settings: Settings) -> tuple[DiffusionPipeline, Dial]:
        kept = self._reference(settings)
        scheduler = self._scheduler(kept, settings.scheduler)
        self._turn_to(kept, tuple(settings.anchors.values()))
        assert kept.dial is not None
        if kept.pipe.scheduler is not scheduler:
            kept.pipe.scheduler = scheduler
        self._make_room(settings.reference)
        return kept.pipe, kept.dial

    def _reference(self, settings: Settings) -> _LoadedReference:
        reference = settings.reference
        if reference not in self._kept:
            own = Settings(**{**settings.model_dump(), **asdict(self.machine), "scheduler": None})
            self._make_room(None)
            pipe = loaded(own)
            place(pipe, own)
            self._kept[reference] = _LoadedReference(pipe, {None: pipe.scheduler})
        self._kept.move_to_end(reference)
        return self._kept[reference]

    def _scheduler(self, kept: _LoadedReference, name: str | None) -> Any:
        if name not in kept.schedulers:
            assert name is not None
            kept.schedulers[name] = scheduler_like(kept.schedulers[None], name)
        return kept.schedulers[name]

    def _turn_to(self, kept: _LoadedReference, anchors: tuple[str, ...]) -> None:
        """Have `kept` realigned with these anchors; where they cannot be, the ones before stay."""
        if kept.anchors == anchors and kept.dial is not None:
            return
        before = kept.anchors
        try:
            self._realign(kept, anchors)
        except BaseException:
            if before and kept.dial is None:
                self._realign(kept, before)
            raise

    def _realign(self, kept: _LoadedReference, anchors: tuple[str, ...]) -> None:
        if kept.dial is not None:
            kept.dial.remove()
            kept.dial, kept.anchors = None, ()
        names = anchor_names(anchors)
        given: Mapping[str, Any] = {
            name: kept.modules.get(source, anchor_source(source)) for name, source in zip(names, anchors, strict=True)
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            dial = realign(kept.pipe, given, dict.fromkeys(names, 1.0), allow_pickle=self.machine.allow_pickle)
        kept.dial, kept.anchors = dial, anchors
        kept.warned = tuple(str(warning.message) for warning in caught if "deradiff" in warning.filename)
        for name, source in zip(names, anchors, strict=True):
            if name in dial.modules:
                kept.modules[source] = dial.modules[name]
                kept.modules.move_to_end(source)
        while len(kept.modules) > MOST_KEPT:
            kept.modules.popitem(last=False)

    def _make_room(self, used: str | None) -> None:
        """Let go what was used longest ago, until enough memory is free; what is in use stays."""
        while self._free() < RESERVE:
            idle = [name for name in self._kept if name != used]
            if idle:
                self._drop(idle[0])
            elif used is not None and self._forget_anchor(self._kept[used]):
                pass
            else:
                return
            _collect()

    def _forget_anchor(self, kept: _LoadedReference) -> bool:
        idle = [source for source in kept.modules if source not in kept.anchors]
        if idle:
            del kept.modules[idle[0]]
        return bool(idle)

    def _drop(self, reference: str) -> None:
        kept = self._kept.pop(reference)
        if kept.dial is not None:
            kept.dial.remove()


def _fits(usual: Any, name: str) -> bool:
    try:
        scheduler_like(usual, name)
    except (ValueError, ImportError):
        return False
    return True


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
