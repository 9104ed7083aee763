"""LoRA anchors in the reference's own layers: which adapters are active, at which scale, in which row of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from deradiff.anchors import Anchor
from deradiff.anchors.adapters import adapter_layers, same_objects
from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.call_arguments import ATTENTION_KWARGS, without_scale


class LoraAnchors:
    """The adapters of `anchors` in the layers of `reference`; between evaluations none of them is active."""

    def __init__(self, reference: Any, anchors: Sequence[Anchor]):
        self.reference, self.names = reference, tuple(anchor.adapter for anchor in anchors if anchor.adapter)
        self._all = len(self.names) == len(anchors)
        self._row_adapters: list[str] | None = None
        self._row_scales: dict[str, Tensor] = {}
        self._unscaled: dict[int, dict[str, float]] = {}
        self._configs: list[Any] = []
        self._layers: list[Any] = []
        self._handles = [
            layer.register_forward_pre_hook(self._name_row_adapters, with_kwargs=True)
            for _, layer in adapter_layers(reference)
            if self._mixes_batches(layer)
        ]

    def undo(self) -> None:
        """Let go of the layers."""
        for handle in self._handles:
            handle.remove()
        self.names, self._all, self._handles, self._configs, self._layers = (), False, [], [], []

    def find(self) -> bool:
        """Look for layers with adapters anew where a LoRA came or went; tells whether one did.

        No anchor's adapter is active then: PEFT activates one when `delete_adapters` deletes the last active style.
        """
        configs = list(getattr(self.reference, "peft_config", {}).values())
        changed = not same_objects(configs, self._configs)
        if changed:
            self._configs, self._layers = configs, [layer for _, layer in adapter_layers(self.reference)]
        for layer in self._layers if self.names else ():
            if not set(self.names).isdisjoint(layer.active_adapters):
                layer.set_adapter([name for name in layer.active_adapters if name not in self.names])
        return changed

    def load_style(self, *args: Any, **kwargs: Any) -> None:
        """`load_lora_adapter` of the reference, beside LoRA anchors.

        PEFT activates a denoiser's first LoRA and leaves later ones to `set_adapters`. The anchors' adapters, inactive
        between steps, must not count as first: a person's own first LoRA is active as on a denoiser without anchors.
        """
        before = set(self.reference.peft_config)
        type(self.reference).load_lora_adapter(self.reference, *args, **kwargs)
        if before <= {*self.names}:
            styles = [name for name in self.reference.peft_config if name not in before]
            for _, layer in adapter_layers(self.reference):
                layer._active_adapter = [name for name in styles if name in layer.scaling]

    @contextmanager
    def active(self, scales: Mapping[str | None, Any], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Activate anchors' adapters, scaled, beside whatever style adapters are active; yields the call's `kwargs`.

        A scale is a number, or a tensor of one for each row, which every layer brings into the shape of its input.

        The LoRA scale that a pipeline hands over is for the styles. diffusers would scale all active adapters by it,
        and an anchor at another scale is another model: it is taken out of `kwargs` and given to the styles here.
        """
        if not scales:
            yield kwargs
            return
        if lost := [name for name in scales if name not in getattr(self.reference, "peft_config", {})]:
            raise UnmirroredState(
                f"the anchor's LoRA {lost[0]!r} is gone from the denoiser: unload_lora_weights() removes every LoRA, "
                'the anchor too. Use pipe.delete_adapters("name") for a style LoRA, or dial.remove() and realign anew'
            )
        kwargs, style_scale = without_scale(kwargs)
        before = [(layer._active_adapter, layer._disable_adapters, dict(layer.scaling)) for layer in self._layers]
        try:
            for layer in self._layers:
                styles = [] if layer._disable_adapters else layer.active_adapters
                layer._active_adapter, layer._disable_adapters = [*styles, *scales], False
                for name, scale in (*((style, style_scale) for style in styles), *scales.items()):
                    if name in layer.scaling and not isinstance(scale, Tensor):
                        layer.scaling[name] *= scale
            self._row_scales = {name: scale for name, scale in scales.items() if name and isinstance(scale, Tensor)}
            self._unscaled = {id(layer): scaling for layer, (_, _, scaling) in zip(self._layers, before, strict=True)}
            yield kwargs
        finally:
            self._row_scales = {}
            for layer, (active, disabled, scaling) in zip(self._layers, before, strict=True):
                layer._active_adapter, layer._disable_adapters = active, disabled
                layer.scaling.update(scaling)

    @contextmanager
    def by_row(self, adapters: list[str], kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Have each row of a batch go through its own adapter, "__base__" for none (PEFT's mixed batches)."""
        with self.active({name: 1.0 for name in self.names if name in adapters}, kwargs) as kwargs:
            self._row_adapters = adapters
            try:
                yield kwargs
            finally:
                self._row_adapters = None

    @torch.compiler.disable
    def can_batch(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether PEFT can evaluate a batch whose rows have adapters of their own, in the present state."""
        if any(set(kwargs.get(key) or {}) - {"scale"} for key in ATTENTION_KWARGS):
            return False  # e.g. masks of an IP-Adapter, whose axes only their processor knows
        return all(
            self._mixes_batches(layer) and not layer.active_adapters and not layer.merged for layer in self._layers
        )

    @property
    def scale_rows(self) -> bool:
        """Whether every row of a batch can have scales of its own: all anchors are LoRAs that PEFT mixes in a batch."""
        return self._all and all(self._mixes_batches(layer) for _, layer in adapter_layers(self.reference))

    def _mixes_batches(self, layer: Any) -> bool:
        return isinstance(layer, LoraLayer) and not any(layer.use_dora.get(name, False) for name in self.names)

    def _name_row_adapters(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        for name, scale in self._row_scales.items():
            if name in layer.scaling:
                (x,) = args[:1]
                if len(x) != len(scale):
                    raise UnmirroredState(
                        f"a layer of this model sees {len(x)} rows of a batch of {len(scale)}: it has no LoRA scale "
                        "for each image. Give all images one λ, or take another carrier than the interpolated weights"
                    )
                rows = scale.to(x.device, torch.float32).view(-1, *[1] * (x.ndim - 1))
                layer.scaling[name] = self._unscaled[id(layer)][name] * rows
        return None if self._row_adapters is None else (args, {**kwargs, "adapter_names": self._row_adapters})
