"""The layers of a reference, and of an anchor beside it, compared: kind, precision, and whose `forward` they run."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from deradiff.sampling.blocked_methods import UnmirroredState

_NEUTRAL = {"training", "upcast_attention", "upcast_softmax", "dropout", "sample_size", "gradient_checkpointing"}
"""Settings of layers that do not enter the function computed, or act in training only; see `anchors.checks`."""

_OTHER = object()
"""Stands for what is no plain value, or absent."""


class LayerPair(NamedTuple):
    """A layer of the reference and its counterpart in an anchor; `path` leads to both."""

    path: str
    original: Any
    counterpart: Any


def layer_pairs(reference: nn.Module, anchor: nn.Module) -> list[LayerPair]:
    """Every layer that both models have at one place and do not share, the models themselves first.

    Compiled layers and those with a LoRA are taken as what they are without.
    """
    pairs = []
    waiting: list[tuple[str, Any, Any]] = [("", reference, anchor)]
    while waiting:
        path, original, counterpart = waiting.pop()
        original, counterpart = _bare(original), _bare(counterpart)
        if original is counterpart:
            continue
        pairs.append(LayerPair(path, original, counterpart))
        others = counterpart._modules
        for name, child in reversed(original._modules.items()):
            if child is not None and others.get(name) is not None:
                waiting.append((f"{path}.{name}" if path else name, child, others[name]))
    return pairs


def _bare(layer: Any) -> Any:
    while True:
        if isinstance(layer, BaseTunerLayer):
            layer = layer.get_base_layer()
        elif "_orig_mod" in layer._modules:
            layer = layer._modules["_orig_mod"]
        else:
            return layer


def place(path: str) -> str:
    """How a message calls the place of a layer."""
    return path or "the denoiser itself"


def hooks_of(module: Any) -> dict[str, Any]:
    """The hooks that diffusers keeps on a layer, by name."""
    registry = module.__dict__.get("_diffusers_hook")
    return {} if registry is None else registry.hooks


def require_same_kind(pair: LayerPair, anchor: str) -> None:
    """Raise `UnmirroredState` where a layer is of another class, as quantised ones and patched ones are."""
    if type(pair.original) is type(pair.counterpart):
        return
    original, counterpart = (_class_of(layer) for layer in (pair.original, pair.counterpart))
    if original != counterpart and pair.path:  # the models' own classes were compared when the anchor was loaded
        raise UnmirroredState(
            f"{place(pair.path)} is a {original[1]} in the reference and a {counterpart[1]} in the anchor {anchor!r}: "
            "quantise or patch both models or neither, the anchor as a loaded module that is passed to realign()"
        )


def require_same_settings(pair: LayerPair, anchor: str) -> None:
    """Raise `UnmirroredState` where a layer has another setting than its counterpart, or layers that it has not.

    Settings are plain attributes, such as the `padding_mode` of convolutions that makes pictures tile. What only one
    of the two has, and its class does not know, nobody reads.
    """
    original, counterpart = pair.original, pair.counterpart
    for name in original._modules.keys() | counterpart._modules.keys():
        has, other_has = (layer._modules.get(name) is not None for layer in (original, counterpart))
        if has != other_has and "_orig_mod" not in (name, *original._modules, *counterpart._modules):
            side, other = ("reference", f"anchor {anchor!r}") if has else (f"anchor {anchor!r}", "reference")
            raise UnmirroredState(
                f"{place(pair.path)} has a layer {name!r} in the {side} and none in the {other}: put it into both "
                "(dial.modules has the anchors), or take it out"
            )
    own, others = original.__dict__, counterpart.__dict__
    for name in own.keys() | others.keys():
        if name[0] == "_" or name in _NEUTRAL or (name == "p" and isinstance(original, _DropoutNd)):
            continue
        value, other_value = (
            _plain(layer.__dict__.get(name, getattr(type(layer), name, _OTHER))) for layer in (original, counterpart)
        )
        if _OTHER not in (value, other_value) and value != other_value:
            raise UnmirroredState(
                f"{name} of {place(pair.path)} is {value!r} in the reference and {other_value!r} in the anchor "
                f"{anchor!r}: set it on both (dial.modules has the anchors)"
            )


def _plain(value: Any) -> Any:
    """A value that can be compared, lists as tuples (which is what a configuration read from a file has)."""
    if isinstance(value, (tuple, list)):
        entries = tuple(map(_plain, value))
        return _OTHER if _OTHER in entries else entries
    return value if value is None or isinstance(value, (bool, int, float, str, torch.dtype)) else _OTHER


def require_same_tensors(pair: LayerPair, anchor: str) -> None:
    """Raise `UnmirroredState` where a layer's tensors are of another class or precision.

    Another order in memory says nothing about the values: the anchor's is made the reference's.
    """
    original, counterpart = pair.original, pair.counterpart
    for tensors, others in (
        (original._parameters, counterpart._parameters),
        (original._buffers, counterpart._buffers),
    ):
        for name, tensor in tensors.items():
            other = others.get(name)
            if tensor is None or other is None or tensor is other:
                continue
            if type(tensor) is not type(other) or (tensor.dtype != other.dtype and not _both_cast(pair)):
                raise UnmirroredState(
                    f"{name} of {place(pair.path)} is a {type(tensor).__name__} in {tensor.dtype} in the reference and "
                    f"a {type(other).__name__} in {other.dtype} in the anchor {anchor!r}: bring both models to one "
                    "precision, the whole pipeline with pipe.to(dtype), single layers or quantised ones on both"
                )
            if tensor.ndim == 4 and tensor.stride() != other.stride():
                _lay_out_like(tensor, other)
    if (
        isinstance(pair.original, _DropoutNd)
        and pair.original.p
        and pair.original.training != pair.counterpart.training
    ):
        raise UnmirroredState(
            f"{place(pair.path)} drops values at random in one of the reference and the anchor {anchor!r} alone, which "
            "is in training mode: call .eval() on both"
        )


def _both_cast(pair: LayerPair) -> bool:
    """Whether both layers are cast layer by layer: each is then stored in either precision, if it has run or not."""
    return all(any(isinstance(hook, LayerwiseCastingHook) for hook in hooks_of(layer).values()) for layer in pair[1:])


def _lay_out_like(tensor: Tensor, other: Tensor) -> None:
    """The memory format (channels last, or not) of `tensor` for `other`."""
    if tensor.shape == other.shape:
        for form in (torch.channels_last, torch.contiguous_format):
            if tensor.is_contiguous(memory_format=form) and not other.is_meta:
                other.data = torch.empty_like(other, memory_format=form).copy_(other.data)
                return


def require_same_forward(pair: LayerPair, anchor: str) -> None:
    """Raise `UnmirroredState` where one layer's `forward` was replaced and the other's was not."""
    original, counterpart = (replaced_forward(layer) for layer in (pair.original, pair.counterpart))
    if original != counterpart:
        side, other = ("reference", f"anchor {anchor!r}") if original else (f"anchor {anchor!r}", "reference")
        raise UnmirroredState(
            f"forward of {place(pair.path)} was replaced, by {original or counterpart}, in the {side} and not in the "
            f"{other}: do it to both (dial.modules has the anchors), or undo it"
        )


def _class_of(layer: Any) -> tuple[str, str]:
    return type(layer).__module__, type(layer).__qualname__


def name_of(function: Any) -> str:
    """What a function was called where it was written; of a partial or callable object, what it is made of."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", type(function).__qualname__)


def replaced_forward(layer: Any) -> str | None:
    """What runs instead of its class's `forward` below the hooks of diffusers and accelerate; None where that runs."""
    own = layer.__dict__
    forward = own.get("forward")
    registry = own.get("_diffusers_hook")
    for _ in range(2):
        if registry is not None and registry._fn_refs and name_of(forward).startswith("HookRegistry.register_hook"):
            first = registry._fn_refs[0]
            forward = first.original_forward or first.forward
        elif "_old_forward" in own and name_of(forward).startswith("add_hook_to_module"):
            forward = own["_old_forward"]
        else:
            break
    if forward is None or getattr(forward, "__func__", None) is type(layer).forward:
        return None
    return name_of(forward)
