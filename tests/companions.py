"""What people attach to a pipeline, before it is realigned or after, and the check that both models have it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from deradiff import realign
from deradiff.sampling.blocked_methods import UnmirroredState
from messages import naming
from oracle import lock_step
from tiny import assert_close, denoiser, denoiser_name, sample, trio
from tiny_parts import noise

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


def lora_weights(pipe: DiffusionPipeline, seed: int = 0, strength: float = 0.3) -> dict[str, Tensor]:
    """A random LoRA of rank 2 on the attention layers, in diffusers' layout."""
    module, name, weights = denoiser(pipe), denoiser_name(pipe), {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and path.split(".")[-1] in ("to_q", "to_k", "to_v"):
            down, up = noise(2, layer.in_features, seed=seed), noise(layer.out_features, 2, seed=seed + 1)
            weights[f"{name}.{path}.lora_A.weight"] = strength * down
            weights[f"{name}.{path}.lora_B.weight"] = strength * up
            seed += 2
    return weights


def fused(pipe: DiffusionPipeline, weights: dict[str, Tensor], scale: float = 1.0) -> DiffusionPipeline:
    """The pipeline with that LoRA added to its weights by hand."""
    module, name = denoiser(pipe), denoiser_name(pipe)
    for key, down in weights.items():
        if key.endswith("lora_A.weight"):
            up = weights[key.replace("lora_A", "lora_B")]
            layer: Any = module.get_submodule(key.removeprefix(f"{name}.").removesuffix(".lora_A.weight"))
            layer.weight.data += scale * up @ down
    return pipe


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
