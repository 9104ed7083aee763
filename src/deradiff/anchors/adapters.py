"""LoRA anchors: an adapter in the reference's own denoiser, beside whatever is there, and inactive.

The reference predicts bit for bit what it did before; the one copy of its weights serves both models.
"""

import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from peft import PeftConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import PreTrainedModel

from deradiff.anchors.checks import Pipeline, require_numbers
from deradiff.anchors.errors import AnchorError, CorruptAnchor, IncompatibleAnchor
from deradiff.anchors.full_weights import copy_of
from deradiff.anchors.lora_files import (
    MARK,
    PEFT_PREFIX,
    parts_of,
    read_lora,
    require_places,
    warn_left_out,
    with_scale,
)
from deradiff.anchors.merging import as_lora, layers_of, merged_copy
from deradiff.anchors.reading import read_json, read_lora_metadata
from deradiff.anchors.sources import Files, some

# Initialisations that subtract from the base weights; the file then holds less than the whole change.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What multiplies the base weights instead of adding to them.
_ROTATIONS = (PeftType.OFT.value, PeftType.BOFT.value, PeftType.HRA.value)
Model: TypeAlias = ModelMixin | PreTrainedModel
"""What can have adapters in it: a denoiser, or a text encoder."""

_DROPOUTS = ("lora_dropout", "rank_dropout", "module_dropout")


def load_adapter(
    tensors: Mapping[str, Tensor],
    files: Files,
    pipe: Pipeline,
    component: str,
    denoiser: ModelMixin,
    name: str,
) -> str | ModelMixin:
    """Load a LoRA into `denoiser` as an inactive adapter: in PEFT's form (of `files.config`), or in any other.

    Returns the adapter's name there, made from `name`; or, for what PEFT has no layers for, a copy of the denoiser with
    the changes merged. Raises `AnchorError` for what would be applied in part only, for tensors without a place or of
    other sizes; the denoiser is then as it was.
    """
    label = files.label
    require_ready(denoiser, label)
    adapter = free_name(name, denoiser)
    if files.kind == "peft" and files.config is not None:
        if _in_peft_names(tensors, denoiser):
            return _load_peft(tensors, files.config, label, component, denoiser, adapter)
        tensors = with_scale(tensors, _scale_beside(files.config, label))
    metadata = stated_settings(files.weights, tensors, label, component)
    try:
        weights = read_lora(tensors, label, pipe, component, denoiser)
    except IncompatibleAnchor:
        parts = parts_of(tensors, label, denoiser)
        layers = None if metadata else layers_of(parts, denoiser, label)
        if layers is None:
            raise
        placed = as_lora(layers, label) if hasattr(denoiser, "load_lora_adapter") else None
        if placed is None:
            module = merged_copy(layers, denoiser, label)
            warn_left_out(parts, label)
            return module
        weights = placed
        warn_left_out(parts, label)
    _insert(weights, metadata, label, component, denoiser, adapter)
    return adapter


def _in_peft_names(tensors: Mapping[str, Tensor], denoiser: ModelMixin) -> bool:
    """Whether a file is named as PEFT does; diffusion-pipe writes ComfyUI's names beside PEFT's configuration."""
    modules = {path.replace(".base_layer", "") for path, _ in denoiser.named_modules()}
    return any(name.startswith(PEFT_PREFIX) or MARK.split(name)[0] in modules for name in tensors)


def _scale_beside(path: Path, label: str) -> float:
    """What a LoRA's product is multiplied by, of PEFT's configuration beside a file in other names."""
    stated = read_json(path)
    _require_addition(stated, label, path.name)
    kind, rank, alpha = str(stated.get("peft_type")), stated.get("r"), stated.get("lora_alpha")
    varied = [key for key in ("rank_pattern", "alpha_pattern") if stated.get(key)]
    if kind != PeftType.LORA or varied or not isinstance(rank, int) or not isinstance(alpha, int | float) or rank < 1:
        raise AnchorError(
            f"{label} is in other names than PEFT's, with a scale that they cannot be given: {path.name} has "
            f"peft_type={kind!r}, r={rank!r}, lora_alpha={alpha!r}{''.join(f', {key}' for key in varied)}."
        )
    return alpha / (math.sqrt(rank) if stated.get("use_rslora") else rank)


def _load_peft(
    tensors: Mapping[str, Tensor], path: Path, label: str, component: str, denoiser: ModelMixin, adapter: str
) -> str | ModelMixin:
    """Load an adapter in PEFT's form: into `denoiser`, or merged into a copy of it where it rotates the weights."""
    config = _peft_config(path, label)
    weights = _without_prefix(tensors, label)
    require_numbers(weights, label)
    require_places(weights, label, component, denoiser)
    if config.peft_type in _ROTATIONS:
        module = copy_of(denoiser, label)
        with unobtrusive(module, adapter, weights, label):
            inject(config, weights, module, adapter, label)
            for _, layer in adapter_layers(module):
                layer.merge(adapter_names=[adapter])
        for layer_path, layer in list(adapter_layers(module)):
            parent, _, child = layer_path.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.base_layer)
        module.__dict__.pop("peft_config", None)
        return module
    with unobtrusive(denoiser, adapter, weights, label):
        inject(config, weights, denoiser, adapter, label)
        if hasattr(type(denoiser), "_hf_peft_config_loaded"):
            denoiser._hf_peft_config_loaded = True
    return adapter


def inject(config: PeftConfig, weights: Mapping[str, Tensor], denoiser: Model, adapter: str, label: str) -> None:
    """Put a PEFT adapter with these weights into `denoiser`, whole or not at all (`IncompatibleAnchor`)."""
    inject_adapter_in_model(config, denoiser, adapter, low_cpu_mem_usage=True)
    set_peft_model_state_dict(denoiser, dict(weights), adapter, low_cpu_mem_usage=True)
    _require_complete(weights, denoiser, adapter, label)


def _insert(
    weights: dict[str, Tensor],
    metadata: dict[str, Any] | None,
    label: str,
    component: str,
    denoiser: ModelMixin,
    adapter: str,
) -> None:
    """Load a LoRA under PEFT's names, as `read_lora` gives it."""
    if any(key.endswith(".lora_B.bias") for key in weights):  # PEFT then gives every layer one
        for key in [key for key in weights if key.endswith(".lora_B.weight")]:
            bias = key.removesuffix("weight") + "bias"
            weights.setdefault(bias, weights[key].new_zeros(weights[key].shape[:1]))
    with unobtrusive(denoiser, adapter, weights, label):
        denoiser.load_lora_adapter(
            {f"{component}.{key}": tensor for key, tensor in weights.items()},
            prefix=component,
            adapter_name=adapter,
            low_cpu_mem_usage=True,
            metadata=metadata,
        )
        _require_complete(weights, denoiser, adapter, label)


def remove_adapter(denoiser: Model, adapter: str) -> None:
    """Delete an adapter; a layer left without any, and a denoiser left without any, is what it was before the first."""
    gradients = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    for path, layer in list(adapter_layers(denoiser)):
        if adapter in adapters_of(layer):
            layer.set_adapter([active for active in layer.active_adapters if active != adapter])
            layer.delete_adapter(adapter)
        if not adapters_of(layer):
            parent, _, child = path.rpartition(".")
            setattr(denoiser.get_submodule(parent), child, layer.base_layer)
    for parameter, required in gradients:
        parameter.requires_grad_(required)
    configs = getattr(denoiser, "peft_config", {})
    configs.pop(adapter, None)
    if not configs:
        denoiser.__dict__.pop("peft_config", None)
        denoiser.__dict__.pop("_hf_peft_config_loaded", None)
    _maybe_remove_and_reapply_group_offloading(denoiser)


def adapter_layers(denoiser: Model) -> Iterator[tuple[str, Any]]:
    """The layers with adapters around them, by path."""
    return ((path, layer) for path, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer))


def adapters_of(layer: Any) -> set[str]:
    """The names of the adapters that have weights in `layer`."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute, {})}


def same_objects(objects: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether both hold the same objects: configurations of LoRAs, say, of which equal ones may be two."""
    return len(objects) == len(others) and all(a is b for a, b in zip(objects, others, strict=True))


def warn_if_zero(denoiser: ModelMixin, adapter: str, label: str) -> None:
    """Warn about a LoRA that changes nothing: its second factors are all zero, as before training."""
    state = _state(denoiser, adapter)
    factors = [tensor for key, tensor in state.items() if "lora_A" not in key]  # a DoRA's magnitudes count, too
    if not any(factor.any() for factor in factors):
        warnings.warn(f"{label} changes nothing (its B matrices are zero): it equals the reference.", stacklevel=4)


def _state(denoiser: Model, adapter: str) -> dict[str, Tensor]:
    """The tensors of an adapter, by PEFT's names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*have invalid shape")  # of biases, which are no matrices
        return get_peft_model_state_dict(denoiser, adapter_name=adapter, save_embedding_layers=False)


def require_ready(denoiser: Model, label: str) -> None:
    """Raise `AnchorError` where a model's present state leaves no room for an adapter."""
    if any(layer.merged for _, layer in adapter_layers(denoiser)):
        raise AnchorError(
            f"{label} cannot be loaded while another LoRA is fused into the denoiser, for PEFT would unfuse it: call "
            "pipe.unfuse_lora() and keep it loaded, or pipe.unload_lora_weights() to keep it fused for good."
        )
    if any(getattr(module, "fused_projections", False) for module in denoiser.modules()):
        raise AnchorError(
            f"{label} cannot be loaded into a denoiser with fused projections, whose attention would pass it by: call "
            "pipe.unfuse_qkv_projections() first."
        )
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise AnchorError(
            f"{label} cannot be loaded into a denoiser whose weights are out of reach (sequential CPU offload): "
            "use pipe.enable_model_cpu_offload() or pipe.enable_group_offload() instead."
        )


def free_name(name: str, denoiser: Model) -> str:
    """A name for the adapter that PEFT allows (no dots) and the denoiser has not given away."""
    wanted = f"deradiff_{re.sub(r'[^0-9A-Za-z_]', '_', name)}"
    taken = getattr(denoiser, "peft_config", {})
    number = 1
    while (free := wanted if number == 1 else f"{wanted}_{number}") in taken:
        number += 1
    return free


def _peft_config(path: Path, label: str) -> PeftConfig:
    """The configuration of a PEFT adapter, for use and not for training."""
    stated = read_json(path)
    kind = str(stated.get("peft_type", "")).upper()
    if kind not in (PeftType.LORA, PeftType.LOHA, PeftType.LOKR, *_ROTATIONS):
        raise AnchorError(
            f"{label} is a PEFT adapter of type {kind or 'unknown'!r}; LORA (with DoRA), LOHA, LOKR, "
            f"{' and '.join(_ROTATIONS)} can be anchors. "
            "Merge it into its base model and save that as the anchor."
        )
    _require_addition(stated, label, path.name)
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:  # PEFT raises whatever it stumbles over
        settings = some(f"{key}={value!r:.40}" for key, value in stated.items())
        raise CorruptAnchor(f"{path} is no configuration that the installed PEFT reads: {settings}") from error
    config.inference_mode = True
    for dropout in _DROPOUTS:
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def _require_addition(stated: Mapping[str, Any], label: str, where: str) -> None:
    """Raise `AnchorError` for an adapter that changes more of its base model than it adds to it."""
    initialised = str(stated.get("init_lora_weights", "")).lower()
    trouble = [
        *([f"bias={stated['bias']!r}"] if stated.get("bias", "none") != "none" else []),
        *([f"init_lora_weights={initialised!r}"] if initialised.startswith(_REBASING) else []),
        *(key for key in ("modules_to_save", "layer_replication", "trainable_token_indices") if stated.get(key)),
    ]
    if trouble:
        raise AnchorError(
            f"{label} changes more of its base model than it adds to it ({', '.join(trouble)} in {where}), so it "
            "cannot share the reference's weights. Merge it into its base model and save that as the anchor."
        )


def stated_settings(
    paths: Sequence[Path], tensors: Collection[str], label: str, component: str
) -> dict[str, Any] | None:
    """The settings that diffusers writes into a LoRA's file, for use and not for training; None without any."""
    metadata = read_lora_metadata(paths)
    if any(key.startswith(f"{component}.") for key in metadata):
        metadata = {
            key.removeprefix(f"{component}."): v for key, v in metadata.items() if key.startswith(f"{component}.")
        }
    elif any("." in key for key in metadata):  # of a text encoder alone
        metadata = {}
    if not metadata:
        return None
    if alphas := [name for name in tensors if name.endswith(".alpha")]:
        raise IncompatibleAnchor(
            f"{label} states its scale twice, in its metadata (lora_alpha={metadata.get('lora_alpha')!r}) and in "
            f"{some(alphas)}: remove one of them."
        )
    _require_addition(metadata, label, "its metadata")
    metadata = {key: 0.0 if key in _DROPOUTS else value for key, value in metadata.items()}
    return {f"{component}.{key}": value for key, value in metadata.items()}


def _without_prefix(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """The tensors of a PEFT adapter under the denoiser's own names, read from the file."""
    names: dict[str, str] = {}
    for name in tensors:
        if (key := name.removeprefix(PEFT_PREFIX)) in names:
            raise IncompatibleAnchor(f"{label} holds one tensor twice: as {names[key]} and as {name}.")
        names[key] = name
    return {key: tensors[name].clone() for key, name in names.items()}


def _require_complete(weights: Mapping[str, Tensor], denoiser: Model, adapter: str, label: str) -> None:
    """Raise `IncompatibleAnchor` unless the adapter consists of just these tensors: a partial LoRA is another model."""
    loaded = set(_state(denoiser, adapter))
    unused, unset = sorted(set(weights) - loaded), sorted(loaded - set(weights))
    if unused or unset:
        raise IncompatibleAnchor(
            f"{label} would be loaded only in part: "
            + "; ".join(
                f"{len(keys)} {what} ({some(keys)})"
                for what, keys in (("tensors without a place", unused), ("layers without tensors", unset))
                if keys
            )
            + "."
        )


def _misfits(weights: Mapping[str, Tensor], denoiser: Model) -> list[str]:
    """Which factors of a LoRA are not of the size of their layer, or of one another, in words."""
    layers = {path.replace(".base_layer", ""): layer for path, layer in denoiser.named_modules()}
    misfits = []
    for key, down in weights.items():
        layer, _, factor = key.partition(".lora_A")
        own, up = getattr(layers.get(layer), "weight", None), weights.get(f"{layer}.lora_B{factor}")
        if factor != ".weight" or own is None or up is None:
            continue
        if [*up.shape[:1], *down.shape[1:]] != [*own.shape] or up.shape[1:2] != down.shape[:1]:
            misfits.append(f"{layer}: factors {list(down.shape)} and {list(up.shape)} for weights {list(own.shape)}")
    return misfits


@contextmanager
def unobtrusive(denoiser: Model, adapter: str, weights: Mapping[str, Tensor], label: str) -> Iterator[None]:
    """Inject an adapter so that nothing else changes; if that fails, nothing at all.

    PEFT activates what it injects and freezes the base weights.
    """
    before = {layer: list(layer.active_adapters) for _, layer in adapter_layers(denoiser)}
    active = list(dict.fromkeys(name for names in before.values() for name in names))
    gradients = [(parameter, parameter.requires_grad) for parameter in denoiser.parameters()]
    succeeded = False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            warnings.filterwarnings("ignore", message=f"Adapter {adapter} was active which is now deleted")
            yield
        for _, layer in adapter_layers(denoiser):
            # A style LoRA counts as active on the denoiser's new layers too, where it has no weights.
            layer.set_adapter(before.get(layer, active))
            if layer not in before:
                layer.training = False  # LoKr and LoHa layers in training mode draw random numbers at each call
        succeeded = True
    except AnchorError:
        raise
    except Exception as error:
        raise IncompatibleAnchor(
            f"{label} does not fit the reference: {some(_misfits(weights, denoiser)) or 'PEFT does not accept it'}. "
            "Its layers and settings must be those of an adapter of this model."
        ) from error
    finally:
        if not succeeded:
            remove_adapter(denoiser, adapter)
            for layer, names in before.items():
                layer.set_adapter(names)
        for parameter, required in gradients:
            parameter.requires_grad_(required)
    _maybe_remove_and_reapply_group_offloading(denoiser)
