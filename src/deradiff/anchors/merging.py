"""Adapters that no PEFT layer is made for, as anchors: their changes merged into a copy of the reference's weights.

So an anchor can be whatever an adapter's file says: changes of norms and biases (lightx2v's and CausVid's for Wan,
those that ComfyUI extracts), DoRA, LoHa, LoKr and OFT as kohya's and LyCORIS' trainers write them. It costs what a
full-weight anchor costs.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from diffusers import ModelMixin
from torch import Tensor

from deradiff.anchors import formulas
from deradiff.anchors.checks import base_tensors
from deradiff.anchors.errors import IncompatibleAnchor
from deradiff.anchors.full_weights import copy_of
from deradiff.anchors.layouts import Rows, locate
from deradiff.anchors.lora_files import LoraParts, in_part, scaled
from deradiff.anchors.sources import some

_OF_BIAS = {"diff_b", "alpha"}


@dataclass(frozen=True)
class MergedLayer:
    """What a file holds for one of its layers, and where that layer is."""

    names: tuple[str, ...]
    """The tensors' names in the file."""
    factors: Mapping[str, Tensor]
    """By their names in `formulas`."""
    weight: tuple[Rows, ...]
    bias: tuple[Rows, ...]


def layers_of(parts: LoraParts, denoiser: ModelMixin, label: str) -> dict[str, MergedLayer] | None:
    """The layers that a file changes, by its own names; None where none of them is the denoiser's.

    Raises `IncompatibleAnchor` naming tensors without a place, and a parameter that is changed twice.
    """
    names: dict[str, dict[str, str]] = {}
    lost = []
    for name in parts.own:
        layer, factor = _split(name)
        if factor is None or factor in names.setdefault(layer, {}):
            lost.append(name)
        else:
            names[layer][factor] = name
    places = locate(names, denoiser, {name: tuple(tensor.shape) for name, tensor in base_tensors(denoiser)})
    layers = {}
    for layer, factors in names.items():
        weight = places.get(f"{layer}.weight") or places.get(layer) or []
        bias = places.get(f"{layer}.bias") or []
        of_weight = factors.keys() - _OF_BIAS
        if (of_weight and not weight) or ("diff_b" in factors and not bias) or factors.keys() <= {"alpha"}:
            lost += factors.values()
        elif alone := formulas.without_partners(factors):
            lost += [factors[factor] for factor in alone]
        else:
            layers[layer] = MergedLayer(
                tuple(factors.values()),
                {factor: parts.own[name] for factor, name in factors.items()},
                tuple(weight if of_weight else ()),
                tuple(bias if "diff_b" in factors else ()),
            )
    if lost and layers:
        raise in_part(lost, label, denoiser)
    _require_once(layers, label)
    return layers or None


def _split(name: str) -> tuple[str, str | None]:
    """A layer's name and its factor's, of a tensor's name."""
    words = name.split(".")
    for k in range(1, len(words)):
        if (factor := formulas.factor_name(".".join(words[k:]))) is not None:
            return ".".join(words[:k]), factor
    return name, None


def _require_once(layers: Mapping[str, MergedLayer], label: str) -> None:
    """Raise `IncompatibleAnchor` for rows of a parameter that two layers change."""
    pieces = [(rows, layer.names[0]) for layer in layers.values() for rows in (*layer.weight, *layer.bias)]
    changed: dict[str, dict[Rows, str]] = {}
    for rows, name in sorted(pieces, key=lambda piece: piece[0].parts):  # whole parameters first
        before = changed.setdefault(rows.parameter, {})
        other = next((by for one, by in before.items() if one == rows or one.parts == 1), None)
        if other is not None:
            raise IncompatibleAnchor(f"{label} changes {rows.parameter} twice: by {other} and by {name}.")
        before[rows] = name


def as_lora(layers: Mapping[str, MergedLayer], label: str) -> dict[str, Tensor] | None:
    """The factors under PEFT's names, scales multiplied in (`lora_B @ lora_A`); None where not all are of a LoRA."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, dict[int, Tensor]] = {}
    for layer in layers.values():
        if layer.factors.keys() - {"alpha"} != {"lora_down.weight", "lora_up.weight"}:
            return None
        factors = scaled({f".{factor}": tensor for factor, tensor in layer.factors.items()}, label)
        down, up = factors[".lora_down.weight"], factors[".lora_up.weight"]
        lengths = [rows.length for rows in layer.weight]
        if (
            min(up.ndim, down.ndim) < 2
            or up.shape[0] != sum(lengths)
            or not all(rows.parameter.endswith(".weight") for rows in layer.weight)
        ):
            return None
        for rows, piece in zip(layer.weight, up.split(lengths), strict=True):
            path = rows.parameter.removesuffix(".weight")
            if downs.setdefault(path, down) is not down:
                return None
            ups.setdefault(path, {})[rows.part] = piece
    return {f"{path}.lora_A.weight": down.clone() for path, down in downs.items()} | {
        f"{path}.lora_B.weight": torch.cat([pieces[part] for part in sorted(pieces)]) for path, pieces in ups.items()
    }


@torch.no_grad()
def merged_copy(layers: Mapping[str, MergedLayer], denoiser: ModelMixin, label: str) -> ModelMixin:
    """A denoiser of its own: `denoiser` with every layer changed by its factors.

    A layer of several parameters (queries, keys and values in one) is changed as the one matrix that it was trained as.
    Raises `IncompatibleAnchor` for factors that do not fit their layer, naming their tensors.
    """
    copy = copy_of(denoiser, label)
    own = dict(base_tensors(copy))
    for layer in layers.values():
        try:
            for places, change in ((layer.weight, formulas.changed), (layer.bias, formulas.changed_bias)):
                if places:
                    views = [rows.of(own[rows.parameter]) for rows in places]
                    device = views[0].device
                    factors = {name: tensor.to(device) for name, tensor in layer.factors.items()}
                    new = change(torch.cat(views) if len(views) > 1 else views[0], factors)
                    pieces = new.split([rows.length for rows in places]) if len(views) > 1 else [new]
                    for view, piece in zip(views, pieces, strict=True):
                        view.copy_(piece)
        except formulas.UnknownFactors as error:
            raise IncompatibleAnchor(
                f"{label} does not fit the reference's {type(denoiser).__name__}: {error}, in {some(layer.names)}."
            ) from error
    return copy
