"""What people attach to a pipeline, before it is realigned or after, and the check that both models have it."""

from typing import Any

import pytest
from diffusers import DiffusionPipeline

from deradiff import realign
from oracle import lock_step
from tiny import assert_close, sample

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
