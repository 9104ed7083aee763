"""A strip: runs at several λ from one noise, seen as one run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Callback = Callable[..., Any]
"""ComfyUI's: of the step, the denoised latents, the latents, and how many steps there are."""


def callbacks(callback: Callback | None, runs: int) -> list[Callback | None]:
    """A callback for each of `runs`, that shows `callback` their steps in a row.

    It is shown the denoised latents of the run, and of all runs at the very end: the host keeps what it saw last.
    """
    if callback is None or runs == 1:
        return [callback] * runs
    rows: dict[int, Tensor] = {}

    def of(run: int, show: Callback) -> Callback:
        def seen(step: int, denoised: Tensor, x: Tensor, steps: int) -> None:
            rows[run] = denoised
            if step == steps - 1:
                denoised = torch.cat([rows[i] for i in range(run + 1)])
            show(run * steps + step, denoised, x, runs * steps)

        return seen

    return [of(run, callback) for run in range(runs)]
