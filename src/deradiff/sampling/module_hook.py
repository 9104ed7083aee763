"""A module that asks a dial: attributes of its instance, in front of its class's own, while it is realigned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from deradiff.anchors.full_weights import DIAL


def hook_module(
    reference: Any, dial: Any, call: Callable[..., Any], methods: Mapping[str, Callable[..., Any]]
) -> Callable[[], None]:
    """From now on `call` answers for `reference`, and `methods` stand in for its own; returns what undoes this."""
    compiled_call = reference._compiled_call_impl
    call = torch.compiler.disable(call, recursive=False)
    own = {DIAL: dial, "_call_impl": call, **methods}
    reference.__dict__.update(own)
    if compiled_call is not None:
        reference._compiled_call_impl = call
    hooked = (*own, "_compiled_call_impl")

    def unhook() -> None:
        for name in hooked:
            reference.__dict__.pop(name, None)
        if compiled_call is not None:
            reference._compiled_call_impl = compiled_call

    return unhook
