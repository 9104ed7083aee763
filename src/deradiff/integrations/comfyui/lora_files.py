"""A LoRA file of ComfyUI's, on a clone of a model."""

from __future__ import annotations

import logging
from typing import Any


def with_lora(model: Any, name: str, strength: float) -> Any:
    """A clone of `model` with the LoRA of this name in ComfyUI's `loras` folder, but not the part for text encoders.

    Raises `ValueError` for a file that is not safetensors, and for one none of whose keys fit.
    """
    import comfy.utils
    import folder_paths

    if not name.endswith(".safetensors"):
        raise ValueError(f"{name} is no .safetensors file, and other formats may run programs when they are read")
    weights = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", name), safe_load=True)
    return with_lora_weights(model, weights, strength, name)


def with_lora_weights(model: Any, weights: dict[str, Any], strength: float, name: str) -> Any:
    """As `with_lora`, of weights that were read."""
    from comfy.lora import load_lora, model_lora_keys_unet
    from comfy.lora_convert import convert_lora

    patches = load_lora(convert_lora(weights), model_lora_keys_unet(model.model, {}), log_missing=False)
    clone = model.clone()
    fitting = clone.add_patches(patches, strength)
    if not fitting:
        raise ValueError(
            f"{name} does not fit {type(model.model).__name__}: none of its {len(weights)} keys, such as "
            f"{min(weights, default='(none)')}, is of a layer of this model. Is it made for another one?"
        )
    if len(fitting) < len(patches):
        logging.warning("deradiff: %d of %d layers of %s fit", len(fitting), len(patches), name)
    return clone
