"""LoRA anchors: an adapter in the reference's own denoiser, beside whatever is there, and inactive.

The reference predicts bit for bit what it did before; the one copy of its weights serves both models.
"""

import inspect
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft import PeftConfig, PeftType, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.anchors.errors import AnchorError, CorruptAnchor, IncompatibleAnchor
from deradiff.anchors.reading import read_json

_MARK = re.compile(r"(?:^|[._])(?:lora|lokr|hada|dora)[._]")
_PEFT_PREFIX = "base_model.model."
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
# Initialisations that subtract from the base weights; the file then holds less than the whole change.
_REBASING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA (or LoKr, LoHa, DoRA) rather than a model."""
    return any(_MARK.search(name) for name in names)


def load_adapter(
    tensors: Mapping[str, Tensor],
    file: Path,
    config_file: Path | None,
    label: str,
    pipe: DiffusionPipeline,
    component: str,
    denoiser: ModelMixin,
    name: str,
) -> str:
    """Load a LoRA into `denoiser` as an inactive adapter, in diffusers', kohya's or (with `config_file`) PEFT's form.

    Returns the adapter's name there, made from `name`. Raises `AnchorError` for a form that diffusers or PEFT would
    apply in part only, `IncompatibleAnchor` for tensors without a place; the denoiser is then as it was.
    """
    _require_ready(denoiser, label)
    adapter = _free_name(name, denoiser)
    if config_file is not None:
        config = _peft_config(config_file, label)
        weights = {key.removeprefix(_PEFT_PREFIX): tensor for key, tensor in tensors.items()}
        _require_modules(weights, label, component, denoiser)
        with _unobtrusive(denoiser, adapter, label):
            inject_adapter_in_model(config, denoiser, adapter, low_cpu_mem_usage=True)
            set_peft_model_state_dict(denoiser, weights, adapter, low_cpu_mem_usage=True)
            if hasattr(type(denoiser), "_hf_peft_config_loaded"):
                denoiser._hf_peft_config_loaded = True
            _require_complete(weights, denoiser, adapter, label)
        return adapter

    weights, options = _diffusers_form(tensors, file, label, pipe, component, denoiser)
    _require_modules(weights, label, component, denoiser)
    with _unobtrusive(denoiser, adapter, label):
        denoiser.load_lora_adapter(
            {f"{component}.{key}": tensor for key, tensor in weights.items()},
            prefix=component,
            adapter_name=adapter,
            low_cpu_mem_usage=True,
            **options,
        )
        _require_complete(weights, denoiser, adapter, label)
    return adapter


def remove_adapter(denoiser: ModelMixin, adapter: str) -> None:
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


def adapter_layers(denoiser: ModelMixin) -> Iterator[tuple[str, Any]]:
    """The layers with adapters around them, by path."""
    return ((path, layer) for path, layer in denoiser.named_modules() if isinstance(layer, BaseTunerLayer))


def adapters_of(layer: Any) -> set[str]:
    """The names of the adapters that have weights in `layer`."""
    return {name for attribute in layer.adapter_layer_names for name in getattr(layer, attribute, {})}


def same_objects(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether both hold the same objects: configurations of LoRAs, say, of which equal ones may be two."""
    return len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def warn_if_zero(denoiser: ModelMixin, adapter: str, label: str) -> None:
    """Warn about a LoRA that changes nothing: its second factors are all zero, as before training."""
    state = get_peft_model_state_dict(denoiser, adapter_name=adapter)
    factors = [tensor for key, tensor in state.items() if "lora_A" not in key]  # a DoRA's magnitudes count, too
    if not any(factor.any() for factor in factors):
        warnings.warn(f"{label} changes nothing (its B matrices are zero): it equals the reference.", stacklevel=4)


def _require_ready(denoiser: ModelMixin, label: str) -> None:
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


def _free_name(name: str, denoiser: ModelMixin) -> str:
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
    if kind not in (PeftType.LORA, PeftType.LOHA, PeftType.LOKR):
        raise AnchorError(
            f"{label} is a PEFT adapter of type {kind or 'unknown'!r}; LORA (with DoRA), LOHA and LOKR can be anchors. "
            "Merge it into its base model and save that as the anchor."
        )
    initialised = str(stated.get("init_lora_weights", "")).lower()
    trouble = [
        *([f"bias={stated['bias']!r}"] if stated.get("bias", "none") != "none" else []),
        *([f"init_lora_weights={initialised!r}"] if initialised.startswith(_REBASING) else []),
        *(key for key in ("modules_to_save", "layer_replication", "trainable_token_indices") if stated.get(key)),
    ]
    if trouble:
        raise AnchorError(
            f"{label} changes more of its base model than it adds to it ({', '.join(trouble)} in {path.name}), so it "
            "cannot share the reference's weights. Merge it into its base model and save that as the anchor."
        )
    try:
        config = PeftConfig.from_pretrained(str(path.parent))
    except (TypeError, ValueError, KeyError) as error:
        raise CorruptAnchor(f"{path} is no configuration that the installed PEFT reads: {error}") from error
    config.inference_mode = True
    for dropout in ("lora_dropout", "rank_dropout", "module_dropout"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    return config


def _diffusers_form(
    tensors: Mapping[str, Tensor], file: Path, label: str, pipe: DiffusionPipeline, component: str, denoiser: ModelMixin
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The denoiser's tensors under PEFT's names, and the alphas and metadata that `load_lora_adapter` wants beside."""
    _require_convertible(tensors, label)
    # Some pipelines (T2I-Adapter's) load no LoRA themselves; their UNet is Stable Diffusion's all the same.
    reader = type(pipe) if hasattr(pipe, "lora_state_dict") else StableDiffusionLoraLoaderMixin
    if not hasattr(denoiser, "load_lora_adapter") or (reader is not type(pipe) and component != "unet"):
        raise AnchorError(
            f"{label} is a LoRA in a form that diffusers cannot load into {type(denoiser).__name__}: save it in PEFT's "
            "form (adapter_config.json with adapter_model.safetensors)."
        )
    accepted = inspect.signature(reader.lora_state_dict).parameters
    try:
        state, *rest = reader.lora_state_dict(
            str(file) if file.suffix == ".safetensors" else dict(tensors),
            unet_config=denoiser.config,
            use_safetensors=True,
            return_lora_metadata=True,
            **({"return_alphas": True} if "return_alphas" in accepted else {}),
        )
    except Exception as error:  # diffusers raises whatever the conversion stumbles over
        raise IncompatibleAnchor(
            f"{label} cannot be converted to a LoRA for {type(denoiser).__name__}: {type(error).__name__}: "
            f"{str(error)[:300]}"
        ) from error
    alphas, metadata = (rest[0] if len(rest) == 2 else None), rest[-1]

    parts = {key: _part(key) for key in state}
    if set(parts.values()) == {None}:  # saved by the denoiser itself, without a prefix
        state = {f"{component}.{key}": tensor for key, tensor in state.items()}
        parts = dict.fromkeys(state, component)
        metadata = {f"{component}.{key}": value for key, value in metadata.items()} if metadata else metadata
    left_out = sorted({part for part in parts.values() if part and part != component})
    ours = {key.removeprefix(f"{component}."): state[key] for key, part in parts.items() if part == component}
    strange = [key for key, part in parts.items() if part is None]
    if not ours or strange:
        raise _no_place(strange or list(tensors), not ours, label, component, denoiser)
    if left_out:
        warnings.warn(
            f"{label} also changes {', '.join(left_out)}, which is left out: a text encoder serves both models, only "
            "denoisers are mixed. Load that part on the pipeline if both should have it.",
            stacklevel=5,
        )
    if metadata:
        metadata = {key: 0.0 if key.endswith("dropout") else value for key, value in metadata.items()}
    weights = convert_unet_state_dict_to_peft(ours)
    return weights, {"network_alphas": _alphas(alphas or {}, weights, component), "metadata": metadata or None}


def _alphas(stated: Mapping[str, Any], weights: Mapping[str, Tensor], component: str) -> dict[str, float] | None:
    """The alpha of every layer, under a name that fits this layer alone; None where the file states none.

    diffusers names those of attention layers so that PEFT overlooks them wherever they vary, and gives a layer without
    one the commonest of the others; kohya's own rule is then alpha = rank.
    """
    if not stated:
        return None
    renamed = convert_unet_state_dict_to_peft(
        {key.removeprefix(f"{component}.").removesuffix(".alpha"): float(value) for key, value in stated.items()}
    )
    by_layer = {_MARK.split(key)[0]: value for key, value in renamed.items()}
    ranks = {_MARK.split(key)[0]: tensor.shape[0] for key, tensor in weights.items() if "lora_A" in key}
    return {f"{component}.^{layer}.alpha": float(by_layer.get(layer, rank)) for layer, rank in ranks.items()}


def _part(key: str) -> str | None:
    head = key.partition(".")[0]
    return head if head in _PARTS else None


def _require_convertible(tensors: Mapping[str, Tensor], label: str) -> None:
    """Refuse what diffusers would drop, or stumble over, without a word that helps."""
    if any("dora_scale" in key for key in tensors):
        raise AnchorError(
            f"{label} is a DoRA in kohya's form, of which diffusers drops the magnitudes (dora_scale), leaving another "
            "model: save it in PEFT's form (adapter_config.json with adapter_model.safetensors)."
        )
    if any(".hada_" in key for key in tensors):
        raise AnchorError(
            f"{label} is a LoHa in LyCORIS' form (hada_ keys), which diffusers does not read: save it in PEFT's form "
            "(adapter_config.json with adapter_model.safetensors)."
        )
    if any(key.startswith(_PEFT_PREFIX) for key in tensors):
        raise AnchorError(
            f"{label} is a PEFT adapter without its adapter_config.json, which holds its scale: put that file beside "
            "it, under PEFT's names (adapter_config.json, adapter_model.safetensors)."
        )


def _require_modules(weights: Mapping[str, Tensor], label: str, component: str, denoiser: ModelMixin) -> None:
    """Raise `IncompatibleAnchor` for tensors that belong to no module of the denoiser."""
    modules = {path.replace(".base_layer", "") for path, _ in denoiser.named_modules()}
    strange = [key for key in weights if _MARK.split(key)[0] not in modules]
    if strange:
        raise _no_place(strange, len(strange) == len(weights), label, component, denoiser)


def _require_complete(weights: Mapping[str, Tensor], denoiser: ModelMixin, adapter: str, label: str) -> None:
    """Raise `IncompatibleAnchor` unless the adapter consists of just these tensors: a partial LoRA is another model."""
    loaded = set(get_peft_model_state_dict(denoiser, adapter_name=adapter, save_embedding_layers=False))
    unused, unset = sorted(set(weights) - loaded), sorted(loaded - set(weights))
    if unused or unset:
        raise IncompatibleAnchor(
            f"{label} would be loaded only in part: "
            + "; ".join(
                f"{len(keys)} {what} ({', '.join(keys[:3])})"
                for what, keys in (("tensors without a place", unused), ("layers without tensors", unset))
                if keys
            )
            + "."
        )


def _no_place(
    strange: list[str], none_fits: bool, label: str, component: str, denoiser: ModelMixin
) -> IncompatibleAnchor:
    example = next((path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)), "")
    own = f"{component}.{example.replace('.base_layer', '')}.lora_A.weight"
    how_many = "none of its keys fits" if none_fits else f"{len(strange)} of its keys have no place in"
    return IncompatibleAnchor(
        f"{label}: {how_many} the reference's {type(denoiser).__name__}: {', '.join(strange[:3])}. "
        f"Expected are that model's own layers, such as {own}: is this LoRA made for another model?"
    )


@contextmanager
def _unobtrusive(denoiser: ModelMixin, adapter: str, label: str) -> Iterator[None]:
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
            f"{label} does not fit the reference: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
        ) from error
    finally:
        if not succeeded:
            remove_adapter(denoiser, adapter)
            for layer, names in before.items():
                layer.set_adapter(names)
        for parameter, required in gradients:
            parameter.requires_grad_(required)
    _maybe_remove_and_reapply_group_offloading(denoiser)
