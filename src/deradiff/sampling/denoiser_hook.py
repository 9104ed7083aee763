"""The denoiser that asks a dial: attributes of its instance, in front of its class's own, while it is realigned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deradiff.anchors.full_weights import DIAL
from deradiff.sampling import blocked_methods


def hook_denoiser(
    reference: Any,
    dial: Any,
    call: Callable[..., Any],
    apply: Callable[..., Any],
    load_style: Callable[..., Any] | None,
) -> Callable[[], None]:
    """From now on `call` answers for `reference`, and `apply` moves and casts it; returns what undoes this.

    `load_style` stands in for `load_lora_adapter` beside LoRA anchors, which some further methods would spoil; None
    where no anchor is one.
    """
    compiled_call = reference._compiled_call_impl
    call = torch.compiler.disable(call, recursive=False)
    own = {DIAL: dial, "_call_impl": call, "_apply": apply, "fuse_lora": blocked_methods.fusing}
    if load_style is not None:
        own["load_lora_adapter"] = load_style
        own["save_pretrained"] = blocked_methods.saving
        own["fuse_qkv_projections"] = blocked_methods.fusing_projections
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
