"""Weights divided between processes by FSDP2, as Accelerate's configuration asks, and made whole again.

While it trains, every process holds a part of every weight, its gradient, its optimizer state and its averages. Before
and after, and in a checkpoint, weights are whole: so nothing else has to know, and a run that was begun on two devices
can end on one.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.integrations import is_fsdp_enabled


def require_supported(accelerator: Accelerator, optimizer: str) -> None:
    """Raise `ValueError` where weights are divided in a way that cannot be trained here, or not by `optimizer`."""
    instead = "run `accelerate config` anew and choose FSDP, version 2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError(
            f"DeepSpeed brings its own optimizer and step, which would not be those that are set here: {instead}, "
            "which divides weights, gradients and optimizer as well"
        )
    if accelerator.distributed_type != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise ValueError(
            "FSDP of version 1 joins weights to flat vectors, in which those of a LoRA and those that stay frozen are "
            f"no longer apart: {instead} (`fsdp_version: 2`)"
        )
    plugin: Any = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        raise ValueError(
            "FSDP's own activation checkpointing would compute the activations of a LoRA's reference anew with the "
            "adapter on: turn off `fsdp_activation_checkpointing`, and take --gradient-checkpointing"
        )
    if is_fsdp_enabled():
        raise ValueError(
            "what transformers loads may have its weights in the first process alone: text encoders, rewards. Turn off "
            "`fsdp_cpu_ram_efficient_loading` before they are loaded (`deradiff align` does)"
        )
    if optimizer != "adamw":
        raise ValueError(
            f"{optimizer} knows nothing of divided weights: take --optimizer adamw, whose states are divided as well"
        )


@contextmanager
def divided(model: nn.Module, accelerator: Accelerator) -> Iterator[nn.Module]:
    """The weights of `model` in another module, for `accelerator` to divide; `model` gets what became of them.

    FSDP changes a module for good, and `model` is to be an ordinary one again. Its own weights wait in host memory, a
    copy for every process: where the block raises, `model` has them back. Until the block ends it has none, so that a
    device holds the whole model only before it is divided and at the end. All processes must leave the block, since
    each brings its part of the trained weights.

    Weights are exchanged as they are: mixed precision is autocast's alone, as it is without FSDP. With FSDP's own, a
    model at the start of its training would differ from its reference by the rounding of its norms' weights.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    # The same memory in other parameters: FSDP frees it while it takes its parts.
    shared = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    ours = copy.deepcopy(model, memo=dict(shared))
    del shared
    waiting = [(p, p.device, p.detach().cpu()) for p in model.parameters()]
    try:
        for parameter, _, _ in waiting:
            parameter.data = parameter.new_empty(0)
        yield ours
    finally:
        for parameter, device, held in waiting:
            parameter.data = held.to(device)
    with torch.no_grad():
        for parameter, trained in zip(model.parameters(), ours.parameters(), strict=True):
            if parameter.requires_grad:
                parameter.copy_(trained.full_tensor() if isinstance(trained, DTensor) else trained)


def free(model: nn.Module) -> None:
    """Let go of the whole weights that `model` may hold since its last evaluation.

    FSDP keeps those of the outermost module for a backward pass; where none follows, they would outlive what is then
    written into the parts.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether this process's parts are all numbers."""
    return all(bool((p.to_local() if isinstance(p, DTensor) else p).isfinite().all()) for p in parameters)


def gathered(state: Any, keep: bool) -> Any:
    """`state` with whole tensors in host memory where it has divided ones, or with nothing there unless `keep`.

    All processes must call it with the same structure.
    """
    if isinstance(state, DTensor):
        tensor = state.full_tensor().detach()
        return tensor.cpu() if keep else None
    if isinstance(state, dict):
        return {key: gathered(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(gathered(value, keep) for value in state)
    return state


def parts(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Whole tensors on the device of `parameters`, divided where and as those are. Every process has all of them."""
    return [_part(value, parameter) for value, parameter in zip(values, parameters, strict=True)]


def _part(value: Tensor, parameter: Tensor) -> Tensor:
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(value, mesh, placements, src_data_rank=None).to(parameter.device)
    # Laid out as the parameter is: AdamW's kernel goes through both in the order of their memory.
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def optimizer_parts(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The `state_dict` of an optimizer of `parameters`, with what is shaped as they are divided as they are."""
    return {
        **state,
        "state": {
            index: {
                name: _part(value, parameters[index])
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for name, value in moments.items()
            }
            for index, moments in state["state"].items()
        },
    }
