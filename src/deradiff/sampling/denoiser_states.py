"""Rare states of a denoiser, looked at before it is evaluated: a step cache, offload, attention that splits batches.

What else can be set on a denoiser, and acts on its anchors too, is in `shared_settings`.
"""

from typing import Any

from accelerate.hooks import CpuOffload

from deradiff.sampling.blocked_methods import UnmirroredState


def bring_in(reference: Any) -> None:
    """Have model offload bring the reference in, and with it the anchors, also where only an anchor will run.

    Raises `UnmirroredState` for what cannot serve two models: a step cache, sequential offload, a device_map.
    """
    if getattr(reference, "is_cache_enabled", False):
        raise UnmirroredState(
            "a step cache is enabled on the denoiser (enable_cache): it would hand one model what it remembers of "
            "another. Call pipe.transformer.disable_cache() to realign"
        )
    hook = getattr(reference, "_hf_hook", None)
    if hook is None:
        return
    if not isinstance(hook, CpuOffload):
        raise UnmirroredState(
            f"the reference is placed by accelerate's {type(hook).__name__} (sequential offload or a device_map), "
            "which cannot place an anchor beside it: use pipe.enable_model_cpu_offload() or "
            "pipe.enable_group_offload(...) instead"
        )
    hook.pre_forward(reference)


def splits_batches(reference: Any) -> bool:
    """Whether attention may take the batch apart by itself, as perturbed-attention guidance does.

    A processor from outside of diffusers' models may (that of StyleAligned has all images look at the first one).
    """
    kinds = {type(processor) for processor in getattr(reference, "attn_processors", {}).values()}
    return any("PAG" in kind.__name__ or not kind.__module__.startswith("diffusers.models.") for kind in kinds)
