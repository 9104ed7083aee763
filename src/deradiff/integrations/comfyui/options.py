"""What was added to a model's options since: patches and functions for guidance, in dictionaries and lists."""

from __future__ import annotations

from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

RUN = frozenset({"wrappers", "callbacks", "registered_hooks", "to_load_options", "sample_sigmas"})
"""What the host puts there for a run: each model has its own."""


def additions(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> dict[Any, Any]:
    """What `now` has and `before` has not: other values, and what lists have grown by."""
    more: dict[Any, Any] = {}
    for key, value in now.items():
        if key in RUN:
            continue
        old = before.get(key)
        if isinstance(value, dict):
            if nested := additions(value, old if isinstance(old, dict) else {}):
                more[key] = nested
        elif isinstance(value, list):
            if added := value[len(old) if isinstance(old, list) else 0 :]:
                more[key] = added
        elif not _same(value, old):
            more[key] = value
    return more


def with_additions(options: Mapping[Any, Any], more: Mapping[Any, Any]) -> dict[Any, Any]:
    """`options` with what `additions` had; neither is changed."""
    merged = dict(options)
    for key, value in more.items():
        old = options.get(key)
        if isinstance(value, dict):
            merged[key] = with_additions(old if isinstance(old, dict) else {}, value)
        elif isinstance(value, list):
            merged[key] = [*(old if isinstance(old, list) else []), *value]
        else:
            merged[key] = value
    return merged


def _same(value: Any, old: Any) -> bool:
    """Cloning a model copies its options deeply, objects that patch among them: two of one kind are the same one."""
    if value is old:
        return True
    if isinstance(value, bool | int | float | str | FunctionType | BuiltinFunctionType | MethodType):
        return bool(value == old)
    return type(value) is type(old)
