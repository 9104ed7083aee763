"""What a person sets on the reference acts on a full-weight anchor too.

A pipeline knows one denoiser. Attention processors, an IP-Adapter, FreeU, a style LoRA or group offload therefore reach
the reference alone, and two models that differ in more than their alignment must not be mixed. `Mirror` brings one
anchor in line before it is evaluated. It compares by identity and does nothing in the usual case, so that it can run at
every step, and whatever was set before or after `realign` is treated alike. (Device and dtype follow on another way:
`realignment.Dial` passes every `.to(...)` of the reference on. What is no setting that has a name, hooks and the like,
`unshared_state` finds.)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.hooks import HookRegistry, apply_group_offloading
from diffusers.hooks.layerwise_casting import PeftInputAutocastDisableHook
from diffusers.models.attention import GatedSelfAttentionDense
from diffusers.models.embeddings import MultiIPAdapterImageProjection
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from deradiff.anchors.adapters import adapter_layers, same_objects
from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.layer_pairs import hooks_of
from deradiff.sampling.unshared_state import Counterparts

_FREEU = ("s1", "s2", "b1", "b2")
_IMAGE_PROMPT = (
    "encoder_hid_proj",
    "image_proj",
)  # where UNets and Flux, and where SD3 keep an IP-Adapter's projection
_GROUP_OFFLOAD = (
    "onload_device",
    "offload_device",
    "offload_type",
    "num_blocks_per_group",
    "non_blocking",
    "record_stream",
    "low_cpu_mem_usage",
    "block_modules",
    "exclude_kwargs",
)


class Mirror:
    """Keeps `anchor` in the state of `reference`, weights apart.

    `sync` raises `UnmirroredState` where that is impossible: a LoRA fused into the reference's weights, a style LoRA
    beside an anchor that carries LoRA layers of its own, or what `unshared_state` finds. `layers` compares them.
    """

    def __init__(self, reference: ModelMixin, anchor: ModelMixin, name: str):
        self.reference: Any = reference
        self.anchor: Any = anchor
        self.name = name
        self.layers = Counterparts(reference, anchor, name)
        modules = dict(anchor.named_modules())
        self._attention: list[tuple[Any, Any]] = [
            (module, modules[path])
            for path, module in reference.named_modules()
            if hasattr(module, "set_processor") and path in modules
        ]
        self._gates = [
            (module, modules[path])
            for path, module in reference.named_modules()
            if isinstance(module, GatedSelfAttentionDense) and path in modules
        ]
        self._up_blocks = list(zip(getattr(reference, "up_blocks", ()), getattr(anchor, "up_blocks", ()), strict=True))
        self._own_processors = [(counterpart, counterpart.processor) for _, counterpart in self._attention]
        self._own_gates = [counterpart.enabled for _, counterpart in self._gates]
        self._own_projection = {part: getattr(anchor, part, None) for part in _IMAGE_PROMPT}
        self._own_projection_type = getattr(anchor.config, "encoder_hid_dim_type", None)
        self._modules = tuple(self.reference.modules())  # walking the tree anew at every step would show in the time
        self._adapters: list[Any] = []
        self._borrowed: list[tuple[Any, Any]] = []
        self._offloaded = self._asked_for_offload = False

    def begin(self) -> None:
        """A run begins. Group offload may have been set up since the last one; looking for it at every step shows."""
        self._asked_for_offload = self._offloaded
        self.layers.begin()

    @torch.compiler.disable
    def sync(self) -> None:
        """Bring the anchor in line; called before every evaluation of models that it is among."""
        self._sync_image_prompt()
        self._sync_attention()
        self._sync_freeu()
        self._sync_gates()
        self.sync_adapters()
        self.layers.compare()  # before the offload: layers that are cast for storage have to be so when it is set up
        self._sync_offload()

    def undo(self) -> None:
        """Give the anchor back what it had of its own (its weights were never touched)."""
        self._return_layers()
        for part, own in self._own_projection.items():
            self._set_image_prompt(part, own, self._own_projection_type)
        for module, processor in self._own_processors:
            if module.processor is not processor:
                module.set_processor(processor)
        for (_, counterpart), enabled in zip(self._gates, self._own_gates, strict=True):
            counterpart.enabled = enabled
        for _, counterpart in self._up_blocks:
            for factor in _FREEU:
                if getattr(counterpart, factor, None) is not None:
                    setattr(counterpart, factor, None)

    def _sync_image_prompt(self) -> None:
        for part, own in self._own_projection.items():
            original = getattr(self.reference, part, None)
            if part == "image_proj" or isinstance(original, MultiIPAdapterImageProjection):
                self._set_image_prompt(part, original, getattr(self.reference.config, "encoder_hid_dim_type", None))
            else:
                self._set_image_prompt(part, own, self._own_projection_type)

    def _set_image_prompt(self, part: str, projection: nn.Module | None, kind: str | None) -> None:
        if getattr(self.anchor, part, None) is not projection:
            setattr(self.anchor, part, projection)
            self.anchor.config.encoder_hid_dim_type = kind

    def _sync_attention(self) -> None:
        for original, counterpart in self._attention:
            if getattr(original, "fused_projections", False) != getattr(counterpart, "fused_projections", False):
                counterpart.fuse_projections() if original.fused_projections else counterpart.unfuse_projections()
            if counterpart.processor is not original.processor:
                counterpart.set_processor(original.processor)

    def _sync_freeu(self) -> None:
        for original, counterpart in self._up_blocks:
            for factor in _FREEU:
                wanted = getattr(original, factor, None)
                if getattr(counterpart, factor, None) != wanted:
                    setattr(counterpart, factor, wanted)

    def _sync_gates(self) -> None:
        """GLIGEN grounds a picture in its first steps, and then switches the layers that do it off."""
        for original, counterpart in self._gates:
            counterpart.enabled = original.enabled

    def sync_adapters(self) -> None:
        """The reference's LoRAs, those that are active now; called again where an evaluation activates some."""
        adapters = list(getattr(self.reference, "peft_config", {}).values())
        if not same_objects(adapters, self._adapters):
            self._return_layers()
            self._borrow_layers()
            self._adapters, self._modules = adapters, tuple(self.reference.modules())
        for original, counterpart in self._borrowed:
            if original.merged:
                raise UnmirroredState(
                    f"a LoRA ({', '.join(original.merged_adapters)}) was fused into the reference's weights, which the "
                    f"anchor {self.name!r} does not share: call pipe.unfuse_lora() and keep the LoRA loaded instead; "
                    "it then acts on both models"
                )
            active, disabled = original._active_adapter, original._disable_adapters
            if (counterpart._active_adapter, counterpart._disable_adapters) != (active, disabled):
                counterpart._active_adapter, counterpart._disable_adapters = active, disabled

    def _borrow_layers(self) -> None:
        """Wrap the anchor's layers in the reference's LoRA layers.

        Each wrapper is a shallow copy: it shares the LoRA's matrices and scales (so that `set_adapters` reaches both
        models and nothing is stored twice) and differs in the layer underneath.
        """
        for path, original in list(adapter_layers(self.reference)):
            parent, child = _parent(self.anchor, path)
            base = parent._modules[child]
            if isinstance(base, BaseTunerLayer):
                raise UnmirroredState(
                    f"the anchor {self.name!r} already carries LoRA layers (at {path}), so a style LoRA on the "
                    "reference cannot be set on it too: pass the LoRA file itself as the anchor, or fuse it first"
                )
            counterpart = copy.copy(original)
            counterpart._modules = {**original._modules, "base_layer": base}
            # Hooks of diffusers set a `forward` that is bound to the original, and would run the reference's weights.
            for own in ("forward", "_diffusers_hook"):
                counterpart.__dict__.pop(own, None)
            for name, hook in hooks_of(original).items():
                if isinstance(hook, PeftInputAutocastDisableHook):
                    HookRegistry.check_if_exists_or_initialize(counterpart).register_hook(type(hook)(), name)
            parent._modules[child] = counterpart
            self._borrowed.append((original, counterpart))

    def _return_layers(self) -> None:
        borrowed = {id(counterpart) for _, counterpart in self._borrowed}
        for path, layer in list(adapter_layers(self.anchor)):
            if id(layer) in borrowed:
                parent, child = _parent(self.anchor, path)
                parent._modules[child] = layer.base_layer
        self._borrowed, self._adapters = [], []

    def _sync_offload(self) -> None:
        if self._asked_for_offload:
            return
        self._asked_for_offload = True
        if (config := _group_offload(self._modules)) is None:
            return
        settings = {key: getattr(config, key) for key in _GROUP_OFFLOAD}
        if config.offload_to_disk_path:
            settings["offload_to_disk_path"] = str(Path(config.offload_to_disk_path) / self.name)
        apply_group_offloading(self.anchor, use_stream=config.stream is not None, **settings)
        self._offloaded = True


def _parent(denoiser: nn.Module, path: str) -> tuple[Any, str]:
    parent, _, child = path.rpartition(".")
    return denoiser.get_submodule(parent), child


def _group_offload(modules: Iterable[nn.Module]) -> Any | None:
    """Settings of the group offload on one of `modules`, None without one."""
    for module in modules:
        registry = module.__dict__.get("_diffusers_hook")
        if registry is not None and (hook := registry.get_hook("group_offloading")) is not None:
            return hook.config
    return None
