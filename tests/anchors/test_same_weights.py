"""Whether an anchor has the reference's weights, whatever their tensors can do."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.anchors.checks import same_weights


class Packed(Tensor):
    """Eight-bit numbers and their scale, which cannot be compared as they are: torchao's and quanto's tensors."""

    numbers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scale: Tensor) -> "Packed":
        packed: Packed = Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)
        packed.numbers, packed.scale = numbers, scale
        return packed

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "Packed":
        return Packed(parts["numbers"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return Packed(args[0].numbers, args[0].scale)
        raise NotImplementedError(f"{func} of {cls.__name__}")


def packed(layer: nn.Linear, change: int = 0) -> nn.Linear:
    weight, scale = layer.weight.detach(), torch.tensor(0.01)
    layer = copy.deepcopy(layer)
    layer.weight = nn.Parameter(Packed((weight / scale).round().to(torch.int8) + change, scale), requires_grad=False)
    return layer


def test_quantised_weights_are_compared_by_what_they_are_made_of():
    layer: Any = nn.Linear(3, 2)
    assert same_weights(packed(layer), packed(layer))
    assert not same_weights(packed(layer), packed(layer, change=1))
    assert not same_weights(packed(layer), layer)
    assert not same_weights(layer, packed(layer))
    assert same_weights(copy.deepcopy(layer), layer)
