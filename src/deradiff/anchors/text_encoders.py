"""The parts of a LoRA for text encoders: inactive adapters in the pipeline's own, beside the one in its denoiser.

A tensor's name says which encoder it is for and, with dots or underscores, which layer of it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from deradiff.anchors import adapters
from deradiff.anchors.checks import Pipeline, require_numbers
from deradiff.anchors.errors import IncompatibleAnchor
from deradiff.anchors.lora_files import FACTOR, scaled
from deradiff.anchors.sources import Files, some

_NUMBERED = re.compile(r"(?:(?:lora_(?:prior_)?)?te(\d?)_|text_encoder(?:_(\d))?\.)")
_NAMED = re.compile(r"(?:text_encoders[._])?(clip_l|clip_g|t5xxl)[._](?:transformer[._])?")
_BARE = re.compile(r"(?=text_model\.)")
"""How names begin: with the encoder's number, with what it is, or with nothing for the only one."""


@dataclass(frozen=True)
class TextParts:
    """The tensors of a file for text encoders."""

    layers: Mapping[str, Mapping[str, str]]
    """By component, and by PEFT's name there: the name in the file."""
    names: frozenset[str]
    """The names in the file, scales among them."""


def text_encoders_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by component."""
    components = {name: part for name, part in pipe.components.items() if name.startswith("text_encoder")}
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def text_parts_of(tensors: Mapping[str, Tensor], label: str, pipe: Pipeline) -> TextParts:
    """Which tensors of a LoRA are for which layer of the pipeline's text encoders.

    Raises `IncompatibleAnchor` for those of a text encoder that have no place there, or are no factors of a LoRA.
    """
    encoders = text_encoders_of(pipe)
    places = {component: _places(encoder) for component, encoder in encoders.items()}
    layers: dict[str, dict[str, str]] = {}
    named, strange = [], []
    for name in tensors:
        component, rest = _addressed(name, encoders)
        if component is None:
            continue
        named.append(name)
        if rest.endswith(".alpha"):
            continue
        factor = FACTOR.fullmatch(rest)
        layer = places.get(component, {}).get(factor["layer"]) if factor else None
        if factor is None or layer is None:
            strange.append(name)
            continue
        key = f"{layer}.{'lora_B' if factor['up'] else 'lora_A'}.{factor['kind']}"
        layers.setdefault(component, {})[key] = name
    if strange:
        has = " and ".join(f"{name} ({type(encoder).__name__})" for name, encoder in encoders.items()) or "none"
        raise IncompatibleAnchor(
            f"{label}: {len(strange)} of its tensors for text encoders have no place in those of this pipeline, {has}: "
            f'{some(strange)}. With text_encoder="both" a LoRA\'s factors of their layers can be used; leave it out to '
            "have the reference's text encoders serve both models."
        )
    return TextParts(layers, frozenset(named))


def load_text_adapters(
    parts: TextParts, tensors: Mapping[str, Tensor], files: Files, pipe: Pipeline, name: str
) -> dict[str, str]:
    """Load a LoRA's `parts` into the text encoders of `pipe` as inactive adapters; their names, by component.

    Raises `AnchorError` for what would be applied in part only; the text encoders are then as they were.
    """
    loaded: dict[str, str] = {}
    try:
        for component, layers in parts.layers.items():
            encoder: Any = text_encoders_of(pipe)[component]
            adapters.require_ready(encoder, files.label)
            adapter = adapters.free_name(name, encoder)
            stated = adapters.stated_settings(
                files.weights, [n for n in tensors if n in parts.names], files.label, component
            )
            values = scaled({n: tensors[n].float() for n in parts.names}, files.label)
            weights = {key: values[own].clone() for key, own in layers.items()}
            require_numbers(weights, files.label)
            config = _config(weights, stated, component)
            with adapters.unobtrusive(encoder, adapter, weights, files.label):
                adapters.inject(config, weights, encoder, adapter, files.label)
            loaded[component] = adapter
    except BaseException:
        remove_text_adapters(loaded, pipe)
        raise
    return loaded


def remove_text_adapters(loaded: Mapping[str, str], pipe: Pipeline) -> None:
    """Delete these adapters from the text encoders of `pipe`."""
    for component, adapter in loaded.items():
        adapters.remove_adapter(getattr(pipe, component), adapter)


def _config(weights: Mapping[str, Tensor], stated: Mapping[str, Any] | None, component: str) -> LoraConfig:
    """The settings of a LoRA of these factors: those that the file states, or such that its scale is 1."""
    layers = {key.removesuffix(".lora_A.weight"): len(down) for key, down in weights.items() if "lora_A" in key}
    if stated is not None:
        return LoraConfig(**{key.removeprefix(f"{component}."): value for key, value in stated.items()})
    rank = next(iter(layers.values()))
    biased = any(key.endswith("lora_B.bias") for key in weights)
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(layers),
        rank_pattern=layers,
        alpha_pattern=layers,
        lora_bias=biased,
        inference_mode=True,
    )


def _addressed(name: str, encoders: Mapping[str, Any]) -> tuple[str | None, str]:
    """The component that a tensor's name is for, as None where that is no text encoder; and the rest of the name."""
    if match := _NUMBERED.match(name):
        number = match[1] or match[2] or "1"
        return "text_encoder" if number == "1" else f"text_encoder_{number}", name[match.end() :]
    if match := _NAMED.match(name):
        if match[1] == "t5xxl":
            t5 = (component for component, encoder in encoders.items() if "T5" in type(encoder).__name__)
            return next(t5, "text_encoder_3"), name[match.end() :]
        return {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}[match[1]], name[match.end() :]
    return ("text_encoder", name) if _BARE.match(name) else (None, name)


def _places(encoder: nn.Module) -> dict[str, str]:
    """The layers of an encoder by the names they go by: with dots or underscores, and with CLIP's `text_model` or not.

    transformers has had that level in the names of all CLIP encoders and now has it in some.
    """
    places = {}
    for path, _ in encoder.named_modules():
        layer = path.replace(".base_layer", "")
        bare = layer.removeprefix("text_model.")
        for alias in (layer, bare, f"text_model.{bare}"):
            places[alias] = places[alias.replace(".", "_")] = layer
    return places
