"""Forward hooks of torch that a person has put on the layers of one model alone: they may look on, and no more.

What a hook does, only its calls show. One that returns something, or writes into what it is given, makes another model
of the one that it is on, and is refused then. One that looks on is left alone; where the anchor is evaluated without
the reference, it is shown the anchor's layer, which stands in for the one that it was put on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.layer_pairs import LayerPair, name_of, place

_ROW_ADAPTERS = "deradiff.sampling.lora_anchors"
"""Where the hook comes from that gives every row its adapter."""

_TABLES = ("_forward_pre_hooks", "_forward_hooks")


def hooked(pairs: Sequence[LayerPair]) -> list[LayerPair]:
    """Those of `pairs` in which either layer has forward hooks."""
    return [
        pair
        for pair in pairs
        if pair.original._forward_hooks
        or pair.original._forward_pre_hooks
        or pair.counterpart._forward_hooks
        or pair.counterpart._forward_pre_hooks
    ]


@contextmanager
def guarded(pairs: Sequence[LayerPair], side: int, owner: str, other: str) -> Iterator[None]:
    """While this lasts, hooks that are on one layer of a pair alone, its `side`-th entry's, may only look on.

    `owner` and `other` say whose that layer and its counterpart are. Raises `UnmirroredState` at the call that changes
    something.
    """
    guards = []
    for pair in pairs:
        layer, counterpart = pair[side], pair[3 - side]
        for table in _TABLES:
            for key, hook in _unmatched(layer, counterpart, table):
                guard = _guard(hook, pair.path, owner, other)
                getattr(layer, table)[key] = guard
                guards.append((getattr(layer, table), key, hook, guard))
    try:
        yield
    finally:
        for hooks, key, hook, guard in guards:
            if hooks.get(key) is guard:
                hooks[key] = hook


@contextmanager
def tried_on(pairs: Sequence[LayerPair], owner: str, other: str) -> Iterator[None]:
    """While this lasts, hooks that the reference's layers alone have are called for their counterparts, to look on."""
    handles = []
    for path, original, counterpart in pairs:
        for table in _TABLES:
            for key, hook in _unmatched(original, counterpart, table):
                register = counterpart.register_forward_hook
                options = {"with_kwargs": key in getattr(original, f"{table}_with_kwargs")}
                if table == "_forward_pre_hooks":
                    register = counterpart.register_forward_pre_hook
                else:
                    options["always_call"] = key in original._forward_hooks_always_called
                handles.append(register(_guard(hook, path, owner, other), **options))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def noting_changes(layers: Sequence[Any]) -> Iterator[list[str]]:
    """While this lasts, the list is told which forward hooks of torch on `layers` change what goes through.

    Such a hook may do so by the place of a row in its batch, which nobody sees from outside.
    """
    changed: list[str] = []
    replaced = []
    for layer in layers:
        for table in (getattr(layer, name) for name in _TABLES):
            for key, hook in list(table.items()):
                if getattr(hook, "__module__", None) != _ROW_ADAPTERS:
                    noted = _noted(hook, changed)
                    table[key] = noted
                    replaced.append((table, key, hook, noted))
    try:
        yield changed
    finally:
        for table, key, hook, noted in replaced:
            if table.get(key) is noted:
                table[key] = hook


def _noted(hook: Callable[..., Any], changed: list[str]) -> Callable[..., Any]:
    @torch.compiler.disable
    def noted(*given: Any) -> Any:
        before = _versions(given)
        result = hook(*given)
        returned = [] if result is None else [id(leaf) for leaf in pytree.tree_leaves(result)]
        if _versions(given) != before or not {*returned} <= {one for one, _ in before}:
            changed.append(name_of(hook))
        return result

    noted.__qualname__ = name_of(hook)  # what another one around it calls it
    return noted


def _unmatched(layer: Any, counterpart: Any, table: str) -> list[tuple[int, Callable[..., Any]]]:
    """The hooks of `layer` of which its counterpart has none of that name."""
    matched = Counter(map(name_of, getattr(counterpart, table).values()))
    unmatched = []
    for key, hook in getattr(layer, table).items():
        if matched[name_of(hook)]:
            matched[name_of(hook)] -= 1
        else:
            unmatched.append((key, hook))
    return unmatched


def _guard(hook: Callable[..., Any], path: str, owner: str, other: str) -> Callable[..., None]:
    @torch.compiler.disable
    def guard(*given: Any) -> None:
        before = _versions(given)
        if hook(*given) is not None or _versions(given) != before:
            raise UnmirroredState(
                f"the forward hook {name_of(hook)} on {place(path)} changes what goes through the {owner}, and the "
                f"{other} is without it: register it on both (dial.modules has the anchors), or remove it. One that "
                "only looks on may stay"
            )

    return guard


def _versions(given: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Which objects there are, and how often each tensor was written into, as far as torch counts that."""
    leaves = pytree.tree_leaves(given)
    counted = [leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0 for leaf in leaves]
    return [(id(leaf), version) for leaf, version in zip(leaves, counted, strict=True)]
