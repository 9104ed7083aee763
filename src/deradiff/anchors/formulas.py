"""What the factors in an adapter's file make of a layer's weights, in the formulas of the programs that write them.

LoRA and its middle factor, LoHa and LoKr are sums `W + ΔW`; DoRA then gives every row or column of the sum a length of
its own, and orthogonal fine-tuning rotates the rows of `W`. The names of factors are those of LyCORIS.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

Factors = Mapping[str, Tensor]

# Other names of the same factors: PEFT's, those of older diffusers, and of wrappers.
_SYNONYMS = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_B.bias": "diff_b",
    "lora_up.bias": "diff_b",
    "lora.down.weight": "lora_down.weight",
    "lora.up.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_magnitude_vector.weight": "dora_scale",
    "w_norm": "diff",
    "b_norm": "diff_b",
}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_GROUPS = ({"lora_down.weight", "lora_up.weight"}, set(_LOHA), {"hada_t1", "hada_t2"})
FACTORS = {
    "lora_down.weight",
    "lora_up.weight",
    "lora_mid.weight",
    *_LOHA,
    "hada_t1",
    "hada_t2",
    "lokr_w1",
    "lokr_w1_a",
    "lokr_w1_b",
    "lokr_w2",
    "lokr_w2_a",
    "lokr_w2_b",
    "lokr_t2",
    "dora_scale",
    "oft_blocks",
    "rescale",
    "diff",
    "diff_b",
    "set_weight",
    "alpha",
}
"""The names of factors, by which `changed` and `changed_bias` know them."""


class UnknownFactors(ValueError):
    """Factors that together are no known change, or not of the size of the layer; the message says why."""


def without_partners(names: Collection[str]) -> list[str]:
    """Those of these factors of one layer that are nothing without others which are missing."""
    whole = [group for group in _GROUPS if 0 < len(group & set(names)) < len(group)]
    return [name for name in names if any(name in group for group in whole)]


def factor_name(end: str) -> str | None:
    """The name in `FACTORS` of what a file calls `end`; None for what is no factor."""
    plain = end.replace(".default.", ".")
    known = _SYNONYMS.get(plain, plain)
    return known if known in FACTORS else None


def changed(weight: Tensor, factors: Factors) -> Tensor:
    """A layer's weights after its `factors`, in float32 and of the same shape.

    Raises `UnknownFactors` for ones without their partners, or of sizes that do not fit.
    """
    weight, left = weight.float(), {name: tensor.float() for name, tensor in factors.items() if name != "diff_b"}
    try:
        new = _changed(weight, left)
    except (RuntimeError, IndexError) as error:  # torch's words for sizes that do not fit
        raise UnknownFactors(
            f"{', '.join(f'{name} {list(tensor.shape)}' for name, tensor in factors.items())} for weights of "
            f"{list(weight.shape)}"
        ) from error
    left.pop("alpha", None)
    if left:
        raise UnknownFactors(f"{', '.join(left)} without the factors that belong to them")
    if new.shape != weight.shape:
        raise UnknownFactors(f"changes of {list(new.shape)} for weights of {list(weight.shape)}")
    return new


def _changed(weight: Tensor, left: dict[str, Tensor]) -> Tensor:
    """The new weights; takes the factors that it has a use for out of `left`."""
    alpha = left.get("alpha")
    if alpha is not None and (alpha.numel() != 1 or not torch.isfinite(alpha).all()):
        raise UnknownFactors(f"alpha is no scale, but {alpha.flatten()[:3].tolist()}")
    if "oft_blocks" in left:
        return _rotated(weight, left.pop("oft_blocks"), alpha, left.pop("rescale", None))
    new = left.pop("set_weight", weight)
    for change in (_low_rank, _hadamard, _kronecker, _difference):
        delta = change(weight, left, alpha)
        if delta is not None:
            if delta.numel() != weight.numel():
                raise UnknownFactors(f"changes of {list(delta.shape)} for weights of {list(weight.shape)}")
            new = new + delta.reshape(weight.shape)
    return _of_length(new, left.pop("dora_scale")) if "dora_scale" in left and new is not weight else new


def changed_bias(bias: Tensor, factors: Factors) -> Tensor:
    """A layer's biases after its `factors`, in float32."""
    delta = factors.get("diff_b")
    if delta is None:
        return bias
    if delta.shape != bias.shape:
        raise UnknownFactors(f"changes of biases {list(delta.shape)} for biases {list(bias.shape)}")
    return bias.float() + delta.float()


def _take(left: dict[str, Tensor], *names: str) -> list[Tensor] | None:
    """These factors where they are all there, out of `left`."""
    return [left.pop(name) for name in names] if all(name in left for name in names) else None


def _scale(alpha: Tensor | None, rank: int) -> float:
    return 1.0 if alpha is None else float(alpha) / rank


def _low_rank(weight: Tensor, left: dict[str, Tensor], alpha: Tensor | None) -> Tensor | None:
    """LoRA: `up @ down`, in convolutions with a middle factor `Σᵢⱼ upᵢ midᵢⱼ downⱼ`."""
    if (pair := _take(left, "lora_up.weight", "lora_down.weight")) is None:
        return None
    up, down = pair
    scale = _scale(alpha, down.shape[0])
    if (middle := left.pop("lora_mid.weight", None)) is not None:
        return scale * _tucker(middle, up.flatten(1).T, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1))


def _hadamard(weight: Tensor, left: dict[str, Tensor], alpha: Tensor | None) -> Tensor | None:
    """LoHa: the product, entry by entry, of two matrices of low rank (Hyeon-Woo et al. 2022, FedPara)."""
    if (four := _take(left, *_LOHA)) is None:
        return None
    a1, b1, a2, b2 = four
    scale = _scale(alpha, b1.shape[0])
    if (cores := _take(left, "hada_t1", "hada_t2")) is not None:
        return scale * _tucker(cores[0], a1, b1) * _tucker(cores[1], a2, b2)
    return scale * (a1 @ b1) * (a2 @ b2)


def _kronecker(weight: Tensor, left: dict[str, Tensor], alpha: Tensor | None) -> Tensor | None:
    """LoKr: a Kronecker product, of which either side may be of low rank. Two whole sides have no scale."""
    ranks = [left[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in left]
    sides: list[Tensor] = []
    for side in ("lokr_w1", "lokr_w2"):
        if (whole := _take(left, side)) is not None:
            sides += whole
        elif (pair := _take(left, f"{side}_a", f"{side}_b")) is not None:
            a, b = pair
            core = left.pop("lokr_t2", None) if side == "lokr_w2" else None
            sides.append((a @ b.flatten(1)).reshape(-1, *b.shape[1:]) if core is None else _tucker(core, a, b))
    if len(sides) < 2:
        if sides:
            raise UnknownFactors("one side of a Kronecker product (lokr_w1, lokr_w2) without the other")
        return None
    one, other = sides
    if weight.ndim > 2 and other.ndim == 2:  # a convolution's, in two dimensions
        other = other.reshape(other.shape[0], -1, *weight.shape[2:])
    one = one.reshape(*one.shape, *[1] * (other.ndim - one.ndim))
    return _scale(alpha if ranks else None, ranks[0] if ranks else 1) * torch.kron(one, other.contiguous())


def _difference(weight: Tensor, left: dict[str, Tensor], alpha: Tensor | None) -> Tensor | None:
    """The whole change of a layer's weights, or of a norm's."""
    delta = left.pop("diff", None)
    if delta is not None and delta.shape != weight.shape:
        raise UnknownFactors(f"changes of {list(delta.shape)} for weights of {list(weight.shape)}")
    return delta


def _of_length(weight: Tensor, lengths: Tensor) -> Tensor:
    """DoRA: rows, or columns, of these lengths (Liu et al. 2024). `lengths` is [out, 1] or [out], or [1, in]."""
    by_row = lengths.shape[0] == weight.shape[0] and lengths.numel() == weight.shape[0]
    if not by_row and lengths.numel() != weight.shape[1]:
        raise UnknownFactors(f"dora_scale {list(lengths.shape)} for weights of {list(weight.shape)}")
    over = [axis for axis in range(weight.ndim) if axis != (0 if by_row else 1)]
    norm = torch.linalg.vector_norm(weight, dim=over, keepdim=True) + torch.finfo(weight.dtype).eps
    return weight * (lengths.reshape(norm.shape) / norm)


def _rotated(weight: Tensor, blocks: Tensor, alpha: Tensor | None, rescale: Tensor | None) -> Tensor:
    """OFT in blocks of rows: `R = (1 + Q)(1 - Q)⁻¹`, `Q` antisymmetric, not longer than `alpha · out` (COFT)."""
    if blocks.ndim != 3 or blocks.shape[0] * blocks.shape[1] != weight.shape[0]:
        raise UnknownFactors(f"oft_blocks {list(blocks.shape)} for weights of {list(weight.shape)}")
    skew = blocks - blocks.transpose(1, 2)
    longest = 0.0 if alpha is None else float(alpha) * weight.shape[0]
    length = float(skew.norm())
    if 0 < longest < length:
        skew = skew * (longest / length)
    identity: Any = torch.eye(blocks.shape[1], device=blocks.device)
    rotation = (identity + skew) @ torch.linalg.inv(identity - skew)
    rows = weight.reshape(*blocks.shape[:2], -1)
    new = torch.einsum("knm,kni->kmi", rotation, rows).reshape(weight.shape)
    return new if rescale is None else new * rescale.reshape(-1, *[1] * (weight.ndim - 1))


def _tucker(core: Tensor, out: Tensor, into: Tensor) -> Tensor:
    """A convolution from a core [ranks, ranks, ...] and factors [rank, out] and [rank, in]."""
    return torch.einsum("ij...,ip,jr->pr...", core, out, into)
