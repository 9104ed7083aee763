"""Algorithm 1 in predictions: what the guiders of several models returned, mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.guiders.guider_utils import GuiderOutput
from jaxtyping import Float
from torch import Tensor

from deradiff.algorithm.step import mixed


def mixture_of(guided: Sequence[Any], weights: Float[Tensor, "model #batch"], rescales: bool) -> GuiderOutput:
    """`Σ_k weights[k] guided[k]`, of guided predictions and of those with and without the prompt (line 12).

    Where the pipeline `rescales` what it is given, as Qwen-Image's, each model's prediction is rescaled as its own
    pipeline would have done, before it is mixed; the mixture is then `pred_cond` as well, at whose norm it is already.
    """
    if rescales:
        guided = [GuiderOutput(**{**output, "pred": rescaled(output.pred, output.pred_cond)}) for output in guided]
    mixture = {name: _mixed([getattr(output, name) for output in guided], weights) for name in _PARTS}
    return GuiderOutput(**{**mixture, "pred_cond": mixture["pred"]} if rescales else mixture)


_PARTS = ("pred", "pred_cond", "pred_uncond")


def _mixed(predictions: Sequence[Tensor | None], weights: Float[Tensor, "model #batch"]) -> Tensor | None:
    """The mixture of all models' predictions; None where a guider made none."""
    present = [prediction for prediction in predictions if prediction is not None]
    return mixed(torch.stack(present), weights) if len(present) == len(predictions) else None


def rescaled(
    pred: Float[Tensor, "batch token channel"], pred_cond: Float[Tensor, "batch token channel"]
) -> Float[Tensor, "batch token channel"]:
    """`pred` at the norm of `pred_cond`, token by token, in the order in which Qwen-Image's blocks compute it."""
    return pred * (torch.norm(pred_cond, dim=-1, keepdim=True) / torch.norm(pred, dim=-1, keepdim=True))
