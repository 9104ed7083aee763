"""Anchors: the aligned model, in whatever form it comes, made a counterpart of a pipeline's own denoiser.

A full-weight anchor is a second denoiser beside the reference; a LoRA anchor is an adapter inside it, left inactive.
What of an adapter PEFT has no layers for is merged into a copy of the reference, and so becomes a full-weight anchor.
"""

import os
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.anchors import adapters, checks, full_weights, reading, sources, text_encoders
from deradiff.anchors.checks import Pipeline, denoiser_of, denoisers_of
from deradiff.anchors.errors import (
    AnchorError,
    AnchorNotFound,
    CorruptAnchor,
    IncompatibleAnchor,
    PickledAnchor,
    PipelineWithoutDenoiser,
)
from deradiff.anchors.lora_files import is_adapter

__all__ = [
    "Anchor",
    "AnchorError",
    "AnchorNotFound",
    "CorruptAnchor",
    "IncompatibleAnchor",
    "PickledAnchor",
    "PipelineWithoutDenoiser",
    "denoiser_of",
    "denoisers_of",
    "load_anchor",
]

Source = str | os.PathLike[str] | nn.Module


@dataclass(frozen=True, eq=False)
class Anchor:
    """A loaded anchor: either `module` or `adapter` is set."""

    name: str
    source: str
    """Where it came from, for messages and records."""
    module: nn.Module | None = None
    """A denoiser with weights of its own: eval mode, no gradients, on the reference's device and dtype."""
    adapter: str | None = None
    """The inactive PEFT adapter, inside the reference's denoiser, that turns it into the anchor."""
    text_adapters: Mapping[str, str] = field(default_factory=dict)
    """Inactive PEFT adapters inside the pipeline's text encoders, by component: the anchor's own prompt embeddings."""
    device: torch.device | None = None
    """Where the module stays, wherever the reference goes; None goes along."""
    _restore: Callable[[], None] | None = field(default=None, repr=False)

    def unload(self, denoiser: nn.Module) -> None:
        """Undo the loading: `denoiser`, the reference, is without the adapter; a given module trains as it did."""
        if self.adapter is not None:
            adapters.remove_adapter(checks.unwrapped(denoiser), self.adapter)
        if self._restore is not None:
            self._restore()


def load_anchor(
    source: Source,
    pipe: Pipeline,
    *,
    name: str = "anchor",
    component: str | None = None,
    stages: Collection[str] = (),
    text: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    local_files_only: bool = False,
) -> Anchor:
    """Load an aligned model as a counterpart of `pipe`'s denoiser.

    The reference predicts the same afterwards, bit for bit; if loading fails, the pipeline is as it was.

    Args:
        source: one of
            a loaded denoiser (moved in place to the reference's device and dtype, and frozen until `Anchor.unload`);
            the folder of a denoiser, or of a whole pipeline, whose denoiser is taken;
            a LoRA or another adapter (DoRA, LoHa, LoKr, OFT, changes of norms and biases), as PEFT's folder or as the
            file of any trainer;
            one `.safetensors` file of a whole model, in diffusers' or in the original layout;
            the hub id of any of these, `owner/name`, or of one file, `owner/name/file.safetensors`.
        pipe: the pipeline with the reference.
        name: what the anchor is called in messages.
        component: which of several denoisers it is a counterpart of, as "transformer_2" of Wan 2.2.
        stages: the denoisers that `source` has to have parts for, each: as a pipeline's folders, or by the beginnings
            of its keys.
        text: load a LoRA's parts for text encoders too, as inactive adapters there; left out otherwise.
        subfolder: the folder inside `source` to look in.
        revision: the branch, tag or commit of a hub id.
        allow_pickle: also read pickled weights (`.bin`, `.ckpt`, `.pt`), of tensors only.
        local_files_only: take a hub id from the cache, without asking the hub.

    Raises:
        AnchorError: for anything that keeps the source from being an anchor: `AnchorNotFound`, `CorruptAnchor`,
            `PickledAnchor`, `IncompatibleAnchor` (architecture, channels, prediction type, keys without a place) or
            `PipelineWithoutDenoiser`.

    Warns about an anchor equal to the reference, text encoders that differ, and parts of a LoRA that are left out.
    """
    component, denoiser = denoiser_of(pipe) if component is None else (component, getattr(pipe, component))
    reference = checks.unwrapped(denoiser)
    if isinstance(source, nn.Module):
        if stages:
            raise _one_for_several(f"a loaded {type(source).__name__}", stages)
        if subfolder is not None or revision is not None:
            raise AnchorError(
                f"subfolder={subfolder!r} and revision={revision!r} say where weights are read, and the anchor "
                f"{name!r} is loaded already: leave them out"
            )
        module, restore = full_weights.as_anchor(checks.unwrapped(source), reference)
        full_weights.warn_if_equal(module, f"anchor {name!r}", reference)
        return Anchor(name, f"a loaded {type(module).__name__}", module=module, _restore=restore)
    if not isinstance(source, str | os.PathLike):
        hint = f", its .{component} for instance" if isinstance(source, Pipeline) else ""
        raise AnchorError(
            f"the anchor must be a denoiser, a path or a hub id, got a {type(source).__name__}: pass a denoiser{hint}"
        )
    repository = sources.locate(source, subfolder, revision, local_files_only)
    files = sources.select(repository, component, reference.dtype, allow_pickle)
    if files.pipeline is not None:
        _check_pipeline(files.pipeline, files.label, pipe)
    tensors: Mapping[str, Tensor] = reading.read_tensors(files.weights)
    if stages and files.pipeline is None:
        tensors = _of_stage(tensors, component, stages, files.label)
    if files.kind == "peft" or is_adapter(tensors):
        text_adapters, tensors = _with_text(tensors, files, pipe, name) if text else ({}, tensors)
        undo = partial(text_encoders.remove_text_adapters, text_adapters, pipe)
        try:
            adapter, module = _loaded_adapter(tensors, files, pipe, component, reference, name)
        except BaseException:
            undo()
            raise
        return Anchor(name, files.label, module, adapter, text_adapters, _restore=undo)
    module = full_weights.load_denoiser(tensors, files.config, files.label, pipe, reference)
    full_weights.warn_if_equal(module, files.label, reference)
    return Anchor(name, files.label, module=module)


def _loaded_adapter(
    tensors: Mapping[str, Tensor], files: sources.Files, pipe: Pipeline, component: str, reference: Any, name: str
) -> tuple[str | None, nn.Module | None]:
    """A LoRA or another adapter: by the name it has in the reference, or merged into a copy of that."""
    loaded = adapters.load_adapter(tensors, files, pipe, _kind(component), reference, name)
    if isinstance(loaded, str):
        adapters.warn_if_zero(reference, loaded, files.label)
        return loaded, None
    full_weights.warn_if_equal(loaded, files.label, reference)
    return None, loaded


def _with_text(
    tensors: Mapping[str, Tensor], files: sources.Files, pipe: Pipeline, name: str
) -> tuple[dict[str, str], Mapping[str, Tensor]]:
    """A LoRA's parts for text encoders, loaded, and the tensors that are left; all of them where nothing else is."""
    parts = text_encoders.text_parts_of(tensors, files.label, pipe)
    rest = {key: tensor for key, tensor in tensors.items() if key not in parts.names}
    if not rest or not parts.layers:
        return {}, tensors
    return text_encoders.load_text_adapters(parts, tensors, files, pipe, name), rest


def _of_stage(tensors: Mapping[str, Tensor], component: str, stages: Collection[str], label: str) -> dict[str, Tensor]:
    """The tensors of one denoiser, of a file whose keys begin with its name or that of another one."""
    if not all(any(key.startswith(f"{stage}.") for key in tensors) for stage in stages):
        raise _one_for_several(label, stages)
    own = {key.removeprefix(f"{component}."): tensors[key] for key in tensors if key.startswith(f"{component}.")}
    return {f"{_kind(component)}.{key}": tensor for key, tensor in own.items()}


def _one_for_several(label: str, stages: Collection[str]) -> AnchorError:
    return AnchorError(
        f"this pipeline has several denoisers, {' and '.join(stages)}, and {label} does not say which it is for: give "
        f"one for each, {{{', '.join(f'{stage!r}: ...' for stage in stages)}}}; what is left out stays the reference's."
    )


def _kind(component: str) -> str:
    """What LoRA files call a denoiser: Wan's second transformer is a transformer there."""
    return next((kind for kind in ("unet", "transformer") if kind in component), component)


def _check_pipeline(folder: Path, label: str, pipe: Pipeline) -> None:
    """What else a whole pipeline says about its denoiser: what it predicts, and the encoders it was trained with."""
    predicted = checks.scheduler_prediction(folder)
    if predicted is not None:
        checks.require_same_prediction(predicted, label, pipe)
    checks.warn_if_shifted(folder, label, pipe)
    differing = checks.differing_text_encoders(folder, pipe)
    if differing:
        warnings.warn(
            f"{label} has another {' and '.join(differing)} than the reference pipeline, whose own serves both models: "
            "only denoisers are mixed, so this anchor sees prompts in another code than it was trained on.",
            stacklevel=3,
        )
