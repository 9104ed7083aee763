"""Is this model a counterpart of the reference? Configuration, tensors, prediction type, text encoders, weights."""

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline, ModelMixin, ModularPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from deradiff.anchors.errors import AnchorError, CorruptAnchor, IncompatibleAnchor, PipelineWithoutDenoiser
from deradiff.anchors.reading import read_json, read_tensors
from deradiff.anchors.sources import choose_checkpoint, some

# Settings that do not enter the function computed: a numerical safeguard, and one that acts in training only.
_NEUTRAL = {"upcast_attention", "dropout"}
_SHOWN = 5


Pipeline: TypeAlias = DiffusionPipeline | ModularPipeline
"""What denoises by components: diffusers' pipelines, and modular ones, whose blocks share theirs."""

DENOISERS = ("unet", "transformer", "transformer_2", "unconditional_transformer")
"""What pipelines call what they denoise images with: one, or two that share the steps (Wan 2.2) or the guidance
(Ideogram 4)."""

STAGES = ("prior", "prior_prior", "decoder")
"""What cascades call theirs, where they have none of `DENOISERS`: Stable Cascade, Würstchen, unCLIP, Kandinsky's
prior."""

_TIMES = {"timestep", "timesteps", "timestep_ratio", "t", "r"}


def denoisers_of(pipe: Pipeline) -> dict[str, nn.Module]:
    """The modules that `pipe` denoises with, by the names of its components.

    Raises `PipelineWithoutDenoiser`, naming the pipeline's class and components.
    """
    for names in (DENOISERS, STAGES):
        modules = {name: module for name in names if isinstance(module := getattr(pipe, name, None), nn.Module)}
        modules = {name: module for name, module in modules.items() if names is DENOISERS or _denoises(module)}
        if modules:
            return modules
    raise PipelineWithoutDenoiser(
        f"{type(pipe).__name__} has no {', '.join(f'`{name}`' for name in (*DENOISERS, *STAGES))} that denoises; its "
        f"components are {', '.join(sorted(getattr(pipe, 'components', {}))) or 'none'}."
    )


def denoiser_of(pipe: Pipeline) -> tuple[str, nn.Module]:
    """The name and module of the one that `pipe` denoises with.

    Raises `PipelineWithoutDenoiser`, and `AnchorError` for a pipeline with several, such as Wan 2.2's.
    """
    modules = denoisers_of(pipe)
    if len(modules) > 1:
        several = " and ".join(modules)
        raise AnchorError(
            f"{type(pipe).__name__} has several denoisers, {several}: say which is meant, as in "
            f"{{{', '.join(f'{name!r}: ...' for name in modules)}}}."
        )
    return next(iter(modules.items()))


def _denoises(module: nn.Module) -> bool:
    """Whether a module is told the time, as no decoder of latents is."""
    return not _TIMES.isdisjoint(inspect.signature(type(unwrapped(module)).forward).parameters)


def unwrapped(module: nn.Module) -> Any:
    """The module itself where `torch.compile` has put another around it."""
    return getattr(module, "_orig_mod", module)


def base_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers under the names they have without adapters around their layers."""
    for named in (module.named_parameters(), module.named_buffers()):
        for name, tensor in named:
            yield name.replace(".base_layer.", "."), tensor


def require_class(name: str, label: str, reference: ModelMixin) -> None:
    """Raise `IncompatibleAnchor` unless `name` is the class of the reference."""
    own = type(reference).__name__
    # The first PixArt and DiT models call themselves by the class that theirs was later split from.
    if name != own and not (name == "Transformer2DModel" and own.endswith("Transformer2DModel")):
        raise IncompatibleAnchor(f"{label} is a {name}, the reference a {own}: another architecture.")


def require_same_config(config: Mapping[str, Any], label: str, reference: ModelMixin) -> None:
    """Raise `IncompatibleAnchor` naming the first settings in which an anchor's configuration differs.

    Settings left out have the class's defaults; those that do not enter the function computed may differ.
    """
    require_class(config.get("_class_name", type(reference).__name__), label, reference)
    defaults = {
        name: parameter.default
        for name, parameter in list(inspect.signature(type(reference).__init__).parameters.items())[1:]
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    ours = dict(reference.config)
    # The default image size, except where a positional embedding is made from it.
    neutral = _NEUTRAL if hasattr(reference, "pos_embed") else _NEUTRAL | {"sample_size"}
    differing = [
        f"{name} is {given!r}, the reference's {own!r}{_meaning(name, given, own)}"
        for name, default in defaults.items()
        if name not in neutral and not _same(given := config.get(name, default), own := ours.get(name, default))
    ]
    if differing:
        more = f"; and {len(differing) - _SHOWN} more settings" if len(differing) > _SHOWN else ""
        raise IncompatibleAnchor(f"{label} is another architecture: {'; '.join(differing[:_SHOWN])}{more}.")


def _same(left: Any, right: Any) -> bool:
    """Equal as JSON, and a value for all blocks equal to a list of it."""
    left, right = json.loads(json.dumps(left, default=str)), json.loads(json.dumps(right, default=str))
    if isinstance(left, list) != isinstance(right, list):
        several, single = (left, right) if isinstance(left, list) else (right, left)
        return all(value == single for value in several)
    return left == right


def _meaning(name: str, given: Any, own: Any) -> str:
    if name == "in_channels" and 9 in (given, own):
        return f" (9 channels are an inpainting model: {'the anchor' if given == 9 else 'the reference'} is one)"
    if name in ("guidance_embeds", "time_cond_proj_dim"):
        return f" (guidance-distilled: {'the anchor' if given else 'the reference'} is)"
    return ""


def require_same_shapes(
    given: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]], label: str, extra_allowed: bool = False
) -> None:
    """Raise `IncompatibleAnchor` naming the first tensors that are of another shape, missing, or one too many."""
    reshaped = [
        f"{name} is {list(given[name])}, the reference's {list(shape)}"
        for name, shape in own.items()
        if name in given and tuple(given[name]) != tuple(shape)
    ]
    missing = [name for name in own if name not in given]
    extra = [] if extra_allowed else [name for name in given if name not in own]
    problems = [
        f"{what}: {'; '.join(wrong[:_SHOWN])}{f' and {len(wrong) - _SHOWN} more' if len(wrong) > _SHOWN else ''}"
        for what, wrong in (("other shapes", reshaped), ("missing tensors", missing), ("unknown tensors", extra))
        if wrong
    ]
    if problems:
        raise IncompatibleAnchor(f"the weights of {label} do not fit the reference. {'. '.join(problems)}.")


def require_numbers(tensors: Mapping[str, Tensor], label: str) -> None:
    """Raise `CorruptAnchor` for tensors that are no weights: empty, not of floating point, or with NaN or infinity."""
    trouble = [f"{name} {problem}" for name, tensor in tensors.items() if (problem := _no_numbers(tensor))]
    if trouble:
        raise CorruptAnchor(f"{label} holds what cannot be weights: {some(trouble)}.")


def _no_numbers(tensor: Tensor) -> str | None:
    if tensor.layout is not torch.strided or not tensor.is_floating_point():
        return f"is of {tensor.dtype}" + ("" if tensor.layout is torch.strided else f", {tensor.layout}")
    if not tensor.numel():
        return f"is empty, {list(tensor.shape)}"
    if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
        return "has NaN or infinity in it"
    return None


def require_same_prediction(given: str, label: str, pipe: Pipeline) -> None:
    """Raise `IncompatibleAnchor` if an anchor predicts something else than the pipeline expects."""
    own = prediction_type(type(pipe.scheduler).__name__, pipe.scheduler.config)
    if given != own:
        raise IncompatibleAnchor(
            f"{label} predicts {given!r}, the reference's scheduler ({type(pipe.scheduler).__name__}) expects {own!r}: "
            "predictions of different kinds cannot be mixed."
        )


def prediction_type(scheduler: str, config: Mapping[str, Any]) -> str:
    """What a denoiser driven by a scheduler of this class and configuration predicts."""
    stated = str(config.get("prediction_type", "epsilon"))
    return "flow" if "FlowMatch" in scheduler or stated == "flow_prediction" else stated


def scheduler_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of the scheduler in a pipeline's folder; None where it has none."""
    path = folder / "scheduler" / "scheduler_config.json"
    return read_json(path) if path.is_file() else None


def scheduler_prediction(folder: Path) -> str | None:
    """The prediction type of the scheduler in a pipeline's folder; None where it has none."""
    config = scheduler_config(folder)
    return None if config is None else prediction_type(str(config.get("_class_name", "")), config)


def shift_of(config: Mapping[str, Any]) -> float | None:
    """The constant shift of a flow scheduler's times; None where it depends on the resolution, or there is none."""
    if config.get("use_dynamic_shifting"):
        return None
    shift = config.get("shift", config.get("flow_shift"))
    return None if shift is None else float(shift)


def warn_if_shifted(folder: Path, label: str, pipe: Pipeline) -> None:
    """Warn where the scheduler in a pipeline's folder shifts the times of its flow otherwise than `pipe`'s."""
    given, own = shift_of(scheduler_config(folder) or {}), shift_of(getattr(pipe.scheduler, "config", {}))
    if scheduler_prediction(folder) == "flow" and given is not None and own is not None and given != own:
        warnings.warn(
            f"the scheduler of {label} shifts its times by {given:g}, the reference's by {own:g}: the anchor samples "
            f"at the reference's. For its own, give the pipeline a scheduler with a shift of {given:g}",
            stacklevel=2,
        )


def differing_text_encoders(folder: Path, pipe: Pipeline) -> list[str]:
    """Names of the pipeline's text encoders that a pipeline folder holds with other weights.

    Reads tensor by tensor and stops at the first difference; an encoder the folder does not hold counts as the same.
    """
    differing = []
    for name, encoder in pipe.components.items():
        if not name.startswith("text_encoder") or not isinstance(encoder, nn.Module):
            continue
        files = [path.name for path in sorted(folder.glob(f"{name}/*.safetensors"))]
        if files:
            chosen = choose_checkpoint(files, ("model",), next(encoder.parameters()).dtype, False, str(folder / name))
            if _encoders_differ([folder / name / file for file in chosen], encoder):
                differing.append(name)
    return differing


def _encoders_differ(files: list[Path], encoder: nn.Module) -> bool:
    own = {name.removeprefix("text_model."): tensor for name, tensor in base_tensors(encoder)}
    stored = {name.removeprefix("text_model."): tensor for name, tensor in read_tensors(files).items()}
    shared = [name for name in stored if name in own and stored[name].is_floating_point() and not own[name].is_meta]
    return any(not _equal(stored[name], own[name]) for name in shared) or not shared


def _equal(left: Tensor, right: Tensor) -> bool:
    """Equal, up to the rounding of the coarser of two different precisions."""
    if left.shape != right.shape or left.dtype == right.dtype:
        return torch.equal(left.to(right.device), right)
    coarse = max(torch.finfo(left.dtype).eps, torch.finfo(right.dtype).eps)
    return torch.allclose(left.to(right.device).float(), right.float(), rtol=coarse, atol=1e-7)


def same_weights(module: nn.Module, reference: nn.Module) -> bool:
    """Whether every tensor of `module` equals the reference's; stops at the first that does not."""
    own = dict(base_tensors(reference))
    return all(
        name in own
        and own[name].dtype == tensor.dtype
        and own[name].device == tensor.device
        and _same_numbers(tensor, own[name])
        for name, tensor in base_tensors(module)
    )


def _same_numbers(left: Any, right: Any) -> bool:
    """Whether two tensors are equal; those of quantised layers by what they are made of."""
    if not is_traceable_wrapper_subclass(left):
        return not is_traceable_wrapper_subclass(right) and torch.equal(left, right)
    parts = left.__tensor_flatten__()[0]
    return type(left) is type(right) and all(_same_numbers(getattr(left, p), getattr(right, p)) for p in parts)
