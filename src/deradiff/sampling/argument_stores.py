"""Stores that a pipeline makes and hands to its denoiser, as Qwen-Image 2.1's cache of keys: each model has its own.

The denoiser keeps in them what later calls need. One of the models that are evaluated together has the pipeline's own
store, the others copies of what it was when it was first handed over. So a model has to have been there from the
beginning, and the pipeline must not put tensors into the store itself, for it has one alone. What else it sets there,
as whether to write or to read, is set in the copies, too.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.per_model import PLAIN, ModelsOwn, unseen

_NO_STORE = (Tensor, *PLAIN, ModelsOwn, nn.Module, torch.Generator, Enum, slice, type)


class ArgumentStores:
    """The stores among a denoiser's arguments, as long as the pipeline keeps them."""

    def __init__(self) -> None:
        self._known: dict[int, _Store] = {}

    def begin(self, arguments: Any, models: Sequence[int]) -> None:
        """`models` are about to be evaluated together. Raises `DialError` and `UnmirroredState` where one cannot be."""
        for store in _stores_in(arguments):
            known = self._known.get(id(store))
            if known is None:
                known = self._known[id(store)] = _Store(store, models, self._known)
            known.require(store, models)

    def end(self, arguments: Any) -> None:
        """They were evaluated. What the denoiser has kept nothing in is no store, and is looked at anew."""
        for key, store in {id(store): store for store in _stores_in(arguments)}.items():
            known, written = self._known[key], _written(store)
            if known.first and known.written == written:
                del self._known[key]
            known.written, known.first = written, False

    def of_model(self, value: Any, model: int) -> Any:
        """The arguments with this model's stores in the places of the pipeline's.

        What the models returned themselves is each model's own already, and unknown here.
        """
        if type(value) in (list, tuple):
            return type(value)([self.of_model(entry, model) for entry in value])
        if type(value) is dict:
            return {key: self.of_model(entry, model) for key, entry in value.items()}
        known = self._known.get(id(value)) if _is_store(value) else None
        return value if known is None else known.own.get(model, value)


class _Store:
    """One of them: the models that have been there from the beginning, and the copies of all but the first."""

    def __init__(self, store: Any, models: Sequence[int], known: dict[int, _Store]):
        key = id(store)
        self._gone = weakref.ref(store, lambda _: known.pop(key, None))
        self.models = tuple(models)
        self.own = {model: _copied(store) for model in models[1:]}
        self.written = _written(store)
        """The tensors in the pipeline's own after the last evaluation, and how often they were written to."""
        self.first = True
        """Whether it was never evaluated with."""

    def require(self, store: Any, models: Sequence[int]) -> None:
        if not {*models} <= {*self.models}:
            raise unseen()
        if self.own and self.written != _written(store):
            raise UnmirroredState(
                f"this pipeline puts tensors into the {type(store).__name__} that it hands its denoiser, which keeps "
                "its own there: every model of a mixture has one of its own, and the pipeline writes into one alone. "
                "λ = 0 and 1 alone are possible here"
            )
        for twin in self.own.values():
            _follow(store, twin)


def _copied(store: Any) -> Any:
    """A copy, with tensors of its own, also where a gradient is taken through these."""
    return copy.deepcopy(store, {id(tensor): tensor.clone() for tensor in _tensors_in(store)})


def _is_store(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, _NO_STORE) and not callable(value)


def _stores_in(value: Any) -> Iterator[Any]:
    """All stores in a call's arguments."""
    if type(value) in (list, tuple):
        for entry in value:
            yield from _stores_in(entry)
    elif type(value) is dict:
        yield from _stores_in(list(value.values()))
    elif _is_store(value):
        yield value


def _written(store: Any) -> list[tuple[int, int]]:
    """The tensors in a store: which they are, and how often they were written to."""
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in _tensors_in(store)]


def _tensors_in(store: Any) -> list[Tensor]:
    found = []
    waiting, seen = [store], set[int]()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif not isinstance(value, PLAIN) and id(value) not in seen:
            seen.add(id(value))
            waiting += _parts(value).values()
    return found


def _follow(store: Any, twin: Any) -> None:
    """Numbers and the like in `twin` become those in `store`."""
    waiting, seen = [(store, twin)], set[int]()
    while waiting:
        value, other = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        parts, others = _parts(value), _parts(other)
        for name in parts.keys() & others.keys():
            if not isinstance(parts[name], (Tensor, *PLAIN)):
                waiting.append((parts[name], others[name]))
            elif isinstance(parts[name], PLAIN) and not isinstance(other, tuple):
                (other if isinstance(other, (list, dict)) else vars(other))[name] = parts[name]


def _parts(value: Any) -> dict[Any, Any]:
    """What is in a list, a dictionary or an object."""
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else getattr(value, "__dict__", {})
