"""Baking in few steps, and a baked model read back."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import deradiff
import tiny

FAST: dict[str, Any] = {"images": 0}


def played(kind: str, anchor: Any, lam: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What a dial with interpolated weights samples."""
    pipe, _, call = tiny.make(kind)
    pipe.to(dtype)
    with deradiff.realign(pipe, anchor, lam, method="interpolate"):
        return tiny.sample(pipe, call)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A baked folder as diffusers loads it by itself."""
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe
