"""What people attach to a pipeline, before it is realigned or after, and the check that both models have it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from deradiff import realign
from deradiff.sampling.blocked_methods import UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import assert_close, denoiser, sample, trio

SIDES = pytest.mark.parametrize("side", ["reference", "anchor"])
BEFORE_AND_AFTER = pytest.mark.parametrize("order", ["before", "after"])


def apply(change: Any, order: str, pipe: DiffusionPipeline, anchor: Any, own: list[DiffusionPipeline], lam: Any) -> Any:
    """The change on both pristine pipelines, and on the realigned one before or after it is realigned."""
    for each in own:
        change(each)
    if order == "before":
        change(pipe)
    dial = realign(pipe, anchor, lam)
    if order == "after":
        change(pipe)
    return dial


def agrees(
    pipe: DiffusionPipeline, dial: Any, own: list[DiffusionPipeline], call: dict[str, Any], tolerance: float = 1e-5
) -> None:
    """λ at both ends, and between them Algorithm 1."""
    for lam in (0.0, 1.0, 0.37):
        dial.lam = lam
        expected = lock_step(own, call, lam) if lam == 0.37 else sample(own[int(lam)], call)
        assert_close(sample(pipe, call), expected, tolerance)


def refused(change: Callable[[Any], Any], kind: str, order: str, side: str, *values: object) -> None:
    """What is changed on one model alone is refused with these values named, and λ of the reference alone goes on."""
    pipe, anchor, call, own = trio(kind)
    module = denoiser(pipe) if side == "reference" else anchor
    if order == "before":
        change(module)
    dial = realign(pipe, anchor, 0.37)
    if order == "after":
        change(module)
    for lam in (0.37, 1.0):
        dial.lam = lam
        with pytest.raises(UnmirroredState, match=naming(*values)):
            sample(pipe, call)
    if side == "reference":
        change(denoiser(own[0]))
    dial.lam = 0.0
    assert torch.equal(sample(pipe, call), sample(own[0], call))
