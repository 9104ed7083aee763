"""Anchors with weights of their own: a denoiser folder, a bare state dict, a checkpoint in the original layout."""

import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor, nn

from deradiff.anchors.checks import (
    Pipeline,
    base_tensors,
    require_class,
    require_numbers,
    require_same_config,
    require_same_prediction,
    require_same_shapes,
    same_weights,
)
from deradiff.anchors.errors import AnchorError, IncompatibleAnchor
from deradiff.anchors.reading import read_json
from deradiff.anchors.sources import some

# Where checkpoints in the layout of Stable Diffusion's own code keep the denoiser.
_ORIGINAL_PREFIX = "model.diffusion_model."
# What wraps a model in training, and what files call a denoiser.
_WRAPPERS = {"module", "_orig_mod", "model", "diffusion_model", "unet", "transformer", "net"}
# How the names of a pipeline's other parts begin.
_OTHER_PARTS = ("text_encoder", "vae.", "first_stage_model.", "cond_stage_model.", "conditioner.", "image_encoder.")
# What an original checkpoint keeps of its noise schedule; names without a dot are such too.
_READ_BY_PIPELINES = ("clip_mean", "clip_std")
"""Parameters of the priors of unCLIP and Kandinsky that act outside the denoiser's own call."""

_SCHEDULE = ("denoiser.sigmas", "edm_")


DIAL = "_deradiff_dial"
"""The attribute that names the dial, of a realigned denoiser and of a hooked scheduler's or pipeline's class."""


def as_anchor(module: Any, reference: ModelMixin) -> tuple[ModelMixin, Callable[[], None]]:
    """Take a loaded denoiser as an anchor: checked, on the reference's device and dtype, in eval mode, frozen.

    It is changed in place, like a pipeline's component; the second value gives back its training mode and gradients.
    Raises `IncompatibleAnchor` for another architecture, `AnchorError` for the reference itself.
    """
    if module is reference:
        raise AnchorError(
            "the anchor is the reference itself, the pipeline's own denoiser: pass an aligned copy, loaded separately."
        )
    if DIAL in module.__dict__:
        raise AnchorError(
            "the anchor is the reference of another realigned pipeline and would answer for all of that one's models: "
            "call that pipeline's dial.remove() first, or load the model once more."
        )
    label = f"the given {type(module).__name__}"
    if not hasattr(module, "config") or not hasattr(reference, "config"):
        raise IncompatibleAnchor(f"{label} is not a diffusers model; the reference is a {type(reference).__name__}.")
    require_class(type(module).__name__, label, reference)
    require_same_config(module.config, label, reference)
    shapes = {name: tuple(tensor.shape) for name, tensor in base_tensors(module)}
    require_same_shapes(shapes, _shapes(empty_copy(reference)), label, extra_allowed=True)

    mode, gradients = module.training, [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def restore() -> None:
        module.train(mode)
        for parameter, required in gradients:
            parameter.requires_grad_(required)

    if module.dtype.itemsize > reference.dtype.itemsize:
        warnings.warn(
            f"{label} is in {module.dtype}; it is cast in place to the reference's {reference.dtype}.", stacklevel=4
        )
    return _conform(module, reference), restore


def load_denoiser(
    tensors: Mapping[str, Tensor], config_file: Path | None, label: str, pipe: Pipeline, reference: ModelMixin
) -> ModelMixin:
    """A new denoiser with these weights, which may be in diffusers' or in the original layout.

    Memory holds the new weights once: the module is built empty, and each tensor is read, cast and put into place.
    Raises `IncompatibleAnchor`, before any weight is read, where names or shapes do not fit the reference.
    """
    config = None
    if config_file is not None:
        config = read_json(config_file)
        require_same_config(config, label, reference)
    module = _empty_module(reference, config, label)
    own = _shapes(module)
    tensors = _without_prefix(tensors, own, label)
    # A few names are the same in every layout.
    if config is None and 2 * len(own.keys() & tensors.keys()) < len(tensors):
        return _from_original_layout(tensors, label, pipe, reference)
    # Buffers that are made, not stored.
    stored = set(module.state_dict())
    require_same_shapes(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        {name: shape for name, shape in own.items() if name in stored},
        label,
    )
    require_numbers({name: t for name, t in tensors.items() if name not in _integers(reference)}, label)
    dtypes = _dtypes(reference)
    weights = {name: t.to(_device(reference), dtypes.get(name, t.dtype), copy=True) for name, t in tensors.items()}
    module.load_state_dict(weights, assign=True)
    return _conform(module, reference)


def _without_prefix(tensors: Mapping[str, Tensor], own: Collection[str], label: str) -> Mapping[str, Tensor]:
    """The tensors under the names that the denoiser gives them, where all of these stand behind one prefix.

    Wrappers put it there (`module.`, `_orig_mod.`), and files that hold more than a denoiser (`unet.`); what stands
    behind another one is then left out if it is of another part of a pipeline, and unknown otherwise.
    """
    prefixes = Counter(
        name[:start]
        for name in tensors
        for start in (0, *(match.end() for match in re.finditer(r"\.", name)))
        if name[start:] in own
    )
    whole = [prefix for prefix, count in prefixes.items() if 2 * count > len(own)]
    if len(whole) > 1:
        raise IncompatibleAnchor(
            f"{label} holds several models of the reference's kind, behind {', '.join(map(repr, whole))}: save the one "
            "that you mean by itself."
        )
    if not whole or not whole[0]:
        return tensors
    return {
        name.removeprefix(whole[0]): tensor
        for name, tensor in tensors.items()
        if name.startswith(whole[0]) or not name.startswith(_OTHER_PARTS)
    }


def _integers(reference: ModelMixin) -> set[str]:
    """The tensors that are no weights, but counters and positions."""
    return {name for name, tensor in base_tensors(reference) if not tensor.is_floating_point()}


def warn_if_equal(module: nn.Module, label: str, reference: ModelMixin) -> None:
    """Warn about an anchor whose weights are the reference's: λ has no effect then."""
    if same_weights(module, reference):
        warnings.warn(f"{label} has the same weights as the reference: every λ gives the same images.", stacklevel=4)


def _from_original_layout(
    tensors: Mapping[str, Tensor], label: str, pipe: Pipeline, reference: ModelMixin
) -> ModelMixin:
    """Convert a checkpoint in the original layout to the reference's configuration: diffusers' `from_single_file`."""
    cls = type(reference)
    if not hasattr(cls, "from_single_file"):
        raise _unknown_form(tensors, label, reference)
    if "v_pred" in tensors:  # how SDXL checkpoints mark v-prediction
        require_same_prediction("v_prediction", label, pipe)
    denoiser = _original_names(tensors, label)
    first = denoiser.get(f"{_ORIGINAL_PREFIX}input_blocks.0.0.weight")
    if first is not None and first.ndim == 4:
        require_same_config({**reference.config, "in_channels": first.shape[1]}, label, reference)
    require_numbers(denoiser, label)
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(_config(reference), default=str), encoding="utf-8")
        try:
            module = cls.from_single_file(
                dict(denoiser), config=folder, torch_dtype=reference.dtype, local_files_only=True
            )
        except Exception as error:  # diffusers raises whatever the conversion stumbles over
            raise _unknown_form(tensors, label, reference) from error
    unset = [name for name, tensor in base_tensors(module) if tensor.is_meta]
    # The conversion drops what it does not know; it only splits and renames the rest.
    left_over = sum(t.numel() for t in denoiser.values()) - sum(t.numel() for t in module.state_dict().values())
    if unset or left_over:
        raise IncompatibleAnchor(
            f"{label} does not fit the reference: "
            + (f"it lacks {', '.join(unset[:5])}" if unset else f"{left_over:,} of its weights have no place there")
            + "."
        )
    return _conform(module, reference)


def _original_names(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """The denoiser's tensors of an original checkpoint, behind the prefix that they have in a whole one.

    Warns about what is neither the denoiser's nor of another part that is known, such as a moving average.
    """
    denoiser = {name: tensor for name, tensor in tensors.items() if name.startswith(_ORIGINAL_PREFIX)}
    if denoiser:
        known = (_ORIGINAL_PREFIX, *_OTHER_PARTS, *_SCHEDULE)
        others = [name for name, tensor in tensors.items() if tensor.numel() > 1 and "." in name]  # no counters
        if unknown := [name for name in others if not name.startswith(known)]:
            warnings.warn(
                f"{label} holds more than a denoiser, text encoders and a VAE: {len(unknown)} tensors called "
                f"{some(unknown)} are left out, and the anchor is without what they do.",
                stacklevel=5,
            )
        return denoiser
    names = {name: name for name in tensors}
    while len(heads := {name.partition(".")[0] for name in names.values()}) == 1 and heads <= _WRAPPERS:
        names = {name: rest.partition(".")[2] for name, rest in names.items()}
    return {f"{_ORIGINAL_PREFIX}{rest}": tensors[name] for name, rest in names.items()}


def _unknown_form(tensors: Mapping[str, Tensor], label: str, reference: ModelMixin) -> IncompatibleAnchor:
    kind = type(reference).__name__
    original = ", or those of the original checkpoints" if hasattr(type(reference), "from_single_file") else ""
    own = next((name for name, _ in base_tensors(reference)), "")
    return IncompatibleAnchor(
        f"{label} is no {kind} of the reference's configuration in a form that is known: its {len(tensors)} tensors "
        f"are called {some(tensors)}. Known are diffusers' own names for a {kind} ({own}), also behind a prefix"
        f"{original}, and LoRA (see anchors.load_anchor). Is it a model of another architecture, or of another part?"
    )


def _empty_module(reference: ModelMixin, config: Mapping[str, Any] | None, label: str) -> ModelMixin:
    try:
        return empty_copy(reference, config)
    except Exception as error:  # diffusers raises whatever it stumbles over in a configuration
        raise IncompatibleAnchor(
            f"the configuration of {label} makes no {type(reference).__name__}, though no setting differs from the "
            "reference's: save it once more with save_config()."
        ) from error


def empty_copy(reference: ModelMixin, config: Mapping[str, Any] | None = None) -> ModelMixin:
    """A denoiser of the reference's class without weights (parameters on the meta device)."""
    with torch.random.fork_rng(devices=[]), init_empty_weights():
        return type(reference).from_config(_config(reference) if config is None else dict(config)).eval()


def copy_of(reference: ModelMixin, label: str) -> ModelMixin:
    """A denoiser of its own with the reference's weights, without the adapters around its layers.

    Raises `AnchorError` naming `label`, what the copy is for, where the weights are out of reach or quantised.
    """
    module = empty_copy(reference)
    stored, dtypes = set(module.state_dict()), _dtypes(reference)
    weights = {name: tensor.detach() for name, tensor in base_tensors(reference) if name in stored}
    odd = [
        name
        for name, tensor in module.state_dict().items()
        if name not in weights or weights[name].is_meta or weights[name].shape != tensor.shape
    ]
    if odd:
        raise AnchorError(
            f"{label} has to be merged into a copy of the reference's weights, and those are quantised or out of reach "
            f"(sequential CPU offload): {some(odd)}. Load the reference in full precision."
        )
    module.load_state_dict({name: t.to(dtypes[name], copy=True) for name, t in weights.items()}, assign=True)
    return _conform(module, reference)


def _config(reference: ModelMixin) -> dict[str, Any]:
    return {key: value for key, value in reference.config.items() if key != "_use_default_values"}


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in base_tensors(module)}


def _dtypes(reference: ModelMixin) -> dict[str, torch.dtype]:
    """The reference's precision, tensor by tensor: some stay in float32 when the rest is cast.

    Where it is stored in 8 bits (layerwise casting), the precision it computes in. Of packed numbers (quantised) and
    other integers nothing is said: they cannot be cast.
    """
    stored = {name: tensor.dtype for name, tensor in base_tensors(reference) if tensor.is_floating_point()}
    return {name: reference.dtype if dtype.itemsize == 1 else dtype for name, dtype in stored.items()}


def _device(reference: ModelMixin) -> torch.device:
    """Where the reference's weights are; the CPU where sequential offload holds them out of sight."""
    device = next(reference.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _conform(module: nn.Module, reference: ModelMixin) -> ModelMixin:
    """Put `module` on the reference's device and dtypes, in eval mode, without gradients.

    Raises `IncompatibleAnchor` where it differs in what a pipeline reads from the reference for both models.
    """
    for name in _READ_BY_PIPELINES:
        own, other = getattr(reference, name, None), getattr(module, name, None)
        if isinstance(own, Tensor) and isinstance(other, Tensor) and not torch.equal(own.cpu(), other.cpu().to(own)):
            raise IncompatibleAnchor(
                f"the anchor's {name} differs from the reference's, with which the pipeline scales the embeddings of "
                "both models after the last step: give the anchor the reference's."
            )
    device, dtypes = _device(reference), _dtypes(reference)
    for name, tensor in base_tensors(module):
        tensor.data = tensor.data.to(device, dtypes.get(name, tensor.dtype))
    return module.eval().requires_grad_(False)
