"""A second model that is the first one and a LoRA: weights in memory once, the LoRA's part switched at every call.

Two patched clones of a ComfyUI model are one set of weights, and whoever was loaded last wins: both would make the same
prediction. So the patches that the aligned clone has beyond the reference's are not merged. Those of plain LoRAs act
beside their layer, `W x + s B A x`; others (LoHa, LoKr, DoRA, whole differences) on the weight as it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Patch = tuple[Any, ...]
"""The host's: strength, what it adds, the model's own strength, the part of the weight, a function of what is added."""


def added_patches(reference: Any, aligned: Any) -> dict[str, list[Patch]]:
    """The weight patches of a clone that the other has not, by the parameter's name.

    Raises `ValueError` where the reference has patches that the aligned clone lacks: they would have to be undone.
    """
    added = {}
    missing = [name for name in reference.patches if name not in aligned.patches]
    for name, patches in aligned.patches.items():
        before = reference.patches.get(name, [])
        if len(before) > len(patches) or any(a is not b for a, b in zip(before, patches, strict=False)):
            missing.append(name)
        if more := patches[len(before) :]:
            added[name] = more
    if missing:
        raise ValueError(
            f"both inputs are clones of one {type(reference.model).__name__} with LoRAs of their own, so they share "
            f"one set of weights and the one loaded last would win ({len(missing)} layers, the first is {missing[0]}). "
            "Start both from the same model: connect it as reference, and the same with further LoRAs (or Realign "
            "LoRA) as aligned. Or load the checkpoint a second time, by a second loader node whose file is a copy"
        )
    return added


class SharedWeights:
    """The layers of a model that `patches` change, with a `strength` that may be set at every call: 0 is the reference.

    Attach it after the model was loaded, for loading sets layers anew; `detach` leaves them as they were.
    """

    def __init__(self, patches: Mapping[str, Sequence[Patch]]) -> None:
        self._patches = patches
        self._attached = False
        self.strength = 0.0
        self.called: set[str] = set()
        self._handles: list[Any] = []
        self._functions: list[tuple[list[Any], WeightFunction]] = []

    def attach(self, model: torch.nn.Module) -> None:
        """Make the layers of `model` listen, once. Raises `ValueError` for a patch that does not fit."""
        if self._attached:
            return
        self._attached = True
        try:
            for name, patches in self._patches.items():
                path, _, parameter = name.rpartition(".")
                layer = model.get_submodule(path)
                if parameter == "weight" and all(acts_beside(layer, patch) for patch in patches):
                    pairs = [LowRankPair(layer, patch, name) for patch in patches]
                    self._handles.append(layer.register_forward_hook(self._hook(name, pairs)))
                else:
                    self._add_function(name, layer, parameter, patches)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Leave the layers as they were."""
        for handle in self._handles:
            handle.remove()
        for functions, own in self._functions:
            if own in functions:
                functions.remove(own)
        self._handles, self._functions, self._attached = [], [], False

    @contextmanager
    def at(self, strength: float) -> Iterator[None]:
        """Evaluate with the patches at `strength`."""
        self.strength = strength
        try:
            yield
        finally:
            self.strength = 0.0

    @property
    def never_called(self) -> list[str]:
        """Layers that no evaluation with the LoRA went through: it had no effect there."""
        return sorted(set(self._patches) - self.called)

    def _hook(self, name: str, pairs: Sequence[LowRankPair]) -> Any:
        def add(layer: torch.nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            if not self.strength:
                return output
            self.called.add(name)
            for pair in pairs:
                output = pair.added_to(output, layer, arguments[0], self.strength)
            return output

        return add

    def _add_function(self, name: str, layer: Any, parameter: str, patches: Sequence[Patch]) -> None:
        functions = getattr(layer, f"{parameter}_function", None)
        if functions is None:
            raise ValueError(
                f"the LoRA changes {name}, a {type(layer).__name__} whose parameters cannot be switched between two "
                "evaluations. Merge it into a checkpoint of its own (ModelSave), and load that as the aligned model"
            )
        if not functions:  # the host's default is one list for all layers
            functions = []
            setattr(layer, f"{parameter}_function", functions)
        function = WeightFunction(self, name, patches)
        functions.append(function)
        self._functions.append((functions, function))


class WeightFunction:
    """A layer's weight with the patches, where they are switched on; the host calls it whenever the weight is used."""

    def __init__(self, shared: SharedWeights, name: str, patches: Sequence[Patch]) -> None:
        self._shared, self._name, self._patches = shared, name, patches

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight with the patches at the strength that is set."""
        strength = self._shared.strength
        if not strength:
            return weight
        from comfy.lora import calculate_weight

        self._shared.called.add(self._name)
        scaled = [(patch[0] * strength, *patch[1:]) for patch in self._patches]
        changed: Tensor = calculate_weight(scaled, weight.clone(), self._name, intermediate_dtype=weight.dtype)
        return changed


class LowRankPair:
    """`s B A x` of one plain LoRA on a linear or convolutional layer, or on a part of a linear one's outputs.

    Raises `ValueError` where the matrices are of another size than the layer.
    """

    def __init__(self, layer: Any, patch: Patch, name: str) -> None:
        strength, adapter, _, part, _ = patch
        up, down, alpha = adapter.weights[:3]
        rank = down.shape[0]
        size = list(layer.weight.shape)
        if part is not None:
            size[part[0]] = part[2]
        if up.flatten(1).shape != (size[0], rank) or down.flatten(1).shape[1] != torch.Size(size[1:]).numel():
            raise ValueError(
                f"the LoRA is made for another model: {name} is {' x '.join(map(str, size))}, and the LoRA has "
                f"{tuple(up.shape)} and {tuple(down.shape)} for it"
            )
        self._scale = strength * (alpha / rank if alpha is not None else 1.0)
        self._start = None if part is None else part[1]
        self._down = down.reshape(rank, *size[1:])
        self._up = up.reshape(size[0], rank, *[1] * (len(size) - 2))

    def added_to(self, output: Tensor, layer: Any, x: Tensor, strength: float) -> Tensor:
        """`output` of the layer at `x`, and what the LoRA adds to it."""
        if self._down.device != output.device or self._down.dtype != output.dtype:
            self._down, self._up = (matrix.to(output.device, output.dtype) for matrix in (self._down, self._up))
        x = x.to(output.dtype)
        scale = self._scale * strength
        if self._down.ndim == 2:
            change = functional.linear(functional.linear(x, self._down) * scale, self._up)
            if self._start is not None:
                output = output.clone()
                output.narrow(-1, self._start, change.shape[-1]).add_(change)
                return output
            return output + change
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[self._down.ndim - 3]
        down = convolve(x, self._down, None, layer.stride, layer.padding, layer.dilation)
        return output + convolve(down * scale, self._up)


def acts_beside(layer: Any, patch: Patch) -> bool:
    """Whether a patch is a plain LoRA of a layer whose output is linear in its weight."""
    from comfy.weight_adapter import LoRAAdapter

    _, adapter, model_strength, part, function = patch
    if not isinstance(adapter, LoRAAdapter) or model_strength != 1 or function is not None:
        return False
    if any(extra is not None for extra in adapter.weights[3:]):  # a middle matrix, DoRA's scale, another shape
        return False
    if isinstance(layer, torch.nn.Linear):
        return part is None or part[0] == 0
    convolution = isinstance(layer, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d)
    return convolution and part is None and layer.groups == 1 and layer.padding_mode == "zeros"
