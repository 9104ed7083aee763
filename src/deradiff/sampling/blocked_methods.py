"""What cannot be done to a denoiser while it is realigned: each of these stands in for a method of its."""

from __future__ import annotations

from typing import Any, NoReturn


class DialError(RuntimeError):
    """A realigned pipeline, or its dial, is used in a way that cannot be served; the message says what to do."""


class UnmirroredState(RuntimeError):
    """The reference is in a state that its anchor cannot be given, or the anchor in one that is its own."""


def saving(*_: Any, **__: Any) -> NoReturn:
    """`save_pretrained` beside a LoRA anchor."""
    raise DialError("this denoiser carries a LoRA anchor, which would be saved with it: call dial.remove() first")


def fusing(*_: Any, **__: Any) -> NoReturn:
    """`fuse_lora`."""
    raise DialError(
        "a LoRA cannot be fused into a realigned denoiser, for the anchors would go without it: keep it loaded "
        "instead, it then acts on every model. Fused before realign(), it is part of the reference alone"
    )


def fusing_projections(*_: Any, **__: Any) -> NoReturn:
    """`fuse_qkv_projections` beside a LoRA anchor."""
    raise DialError(
        "fused projections would pass the LoRA anchor of this denoiser by: leave them as they are, or call "
        "dial.remove() first"
    )
