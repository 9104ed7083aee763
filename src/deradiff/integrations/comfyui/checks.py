"""What may not be mixed, and which ComfyUI these nodes know."""

from __future__ import annotations

import logging
from typing import Any

TESTED = ("0.3.64",)
"""The versions of ComfyUI that the tests ran with."""

NEEDED = {
    "comfy.patcher_extension": ("WrappersMP.OUTER_SAMPLE", "WrappersMP.PREDICT_NOISE", "add_wrapper_with_key"),
    "comfy.samplers": ("CFGGuider.outer_predict_noise", "CFGGuider.outer_sample"),
    "comfy.model_patcher": (
        "create_model_options_clone",
        "ModelPatcher.add_wrapper_with_key",
        "ModelPatcher.set_additional_models",
        "ModelPatcher.is_clone",
    ),
    "comfy.model_sampling": ("CONST",),
    "comfy.weight_adapter": ("LoRAAdapter",),
    "comfy.lora": ("load_lora", "calculate_weight", "model_lora_keys_unet"),
    "comfy.lora_convert": ("convert_lora",),
}
"""What is used of it."""


class HostError(ImportError):
    """The ComfyUI that loads the nodes lacks something that they need."""


def require_host() -> None:
    """Raise `HostError` where ComfyUI lacks what is needed; log where it is a version that was not tested."""
    from importlib import import_module

    missing = []
    for module, names in NEEDED.items():
        try:
            host = import_module(module)
        except ImportError as error:
            missing.append(f"{module} ({error})")
            continue
        missing += [f"{module}.{name}" for name in names if not _has(host, name)]
    version = host_version()
    tested = ", ".join(TESTED)
    if missing:
        raise HostError(
            f"deradiff's nodes were tested with ComfyUI {tested}. This one ({version}) lacks {', '.join(missing)}: "
            "it is too old, or too new, for this version of deradiff. Update whichever is older"
        )
    if version not in TESTED:
        logging.info("deradiff's nodes were tested with ComfyUI %s; this is %s", tested, version)


def host_version() -> str:
    """ComfyUI's version, or "of unknown version"."""
    try:
        from comfyui_version import __version__

        return str(__version__)
    except ImportError:
        return "of unknown version"


def require_compatible(reference: Any, aligned: Any) -> None:
    """Raise `ValueError` where two models of ComfyUI are of different architectures, with the names of both."""
    for model in (reference, aligned):
        if not hasattr(model, "model") or not hasattr(model, "add_wrapper_with_key"):
            raise ValueError(f"a model of ComfyUI's (ModelPatcher) is needed, got a {type(model).__name__}")
    kinds = [architecture(model.model) for model in (reference, aligned)]
    if kinds[0] != kinds[1]:
        differing = [name for name in kinds[0] if kinds[0][name] != kinds[1][name]]
        words = [", ".join(f"{name} {kind[name]}" for name in differing) for kind in kinds]
        raise ValueError(
            "two models of one architecture are needed, for their predictions are mixed: the reference has "
            f"{words[0]}, the aligned model {words[1]}"
        )


def architecture(model: Any) -> dict[str, Any]:
    """What must be the same for two models to be asked the same: classes, latents, the size of the conditioning."""
    config = getattr(model, "model_config", None)
    unet = getattr(config, "unet_config", None) or {}
    names = ("context_dim", "context_in_dim", "adm_in_channels", "text_dim")
    latent = getattr(model, "latent_format", None)
    return {
        "model": type(model).__name__,
        "network": type(model.diffusion_model).__name__,
        "latents": f"{type(latent).__name__} of {getattr(latent, 'latent_channels', None)} channels",
    } | {name: unet[name] for name in names if unet.get(name) is not None}


def require_latents(latents: Any, model: Any) -> None:
    """Raise `ValueError` for latents that have another number of channels than the model's."""
    channels = getattr(model.latent_format, "latent_channels", None)
    if channels is not None and latents.ndim >= 4 and latents.shape[1] != channels:
        raise ValueError(
            f"the latents have {latents.shape[1]} channels, and {type(model).__name__} takes {channels}: encode the "
            "image with this model's own VAE, or take the empty latent image that belongs to it"
        )


def _has(host: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(host, part):
            return False
        host = getattr(host, part)
    return True
