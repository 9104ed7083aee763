"""The guider of a modular pipeline, which may change layers of the denoiser for one of its calls.

Skip-layer, perturbed-attention, smoothed-energy and auto guidance switch layers off in the model that the pipeline
calls, just before the call. An anchor with layers of its own would go without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import nn

from deradiff.anchors.checks import unwrapped


@contextmanager
def guiding_all(pipe: Any, anchors: Mapping[nn.Module, Sequence[nn.Module]]) -> Iterator[None]:
    """Within, what the guider of `pipe` does to a denoiser it does to that denoiser's `anchors` as well."""
    guider: Any = getattr(pipe, "guider", None)
    if not isinstance(guider, BaseGuidance):
        yield
        return

    def for_all(own: Callable[[nn.Module], None]) -> Callable[[nn.Module], None]:
        def method(denoiser: nn.Module) -> None:
            counted = guider._count_prepared  # by which it tells its calls apart
            for anchor in anchors.get(unwrapped(denoiser), ()):
                own(anchor)
                guider._count_prepared = counted
            own(denoiser)

        return method

    hooks = {name: for_all(getattr(guider, name)) for name in ("prepare_models", "cleanup_models")}
    vars(guider).update(hooks)
    try:
        yield
    finally:
        for name in hooks:
            vars(guider).pop(name, None)
