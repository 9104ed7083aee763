"""Realigned sampling: two (or more) models behind one pipeline, and the dial that turns λ.

DeRaDiff's Algorithm 1 needs, at every step, the guided prediction of each model at the same `x_t`. A pipeline computes
one. So its denoiser is made to answer for all models at once, with a tensor that holds each model's prediction and on
which the pipeline's own guidance acts model by model (`per_model`). The scheduler's `step` then holds exactly lines 7
to 14: the guided predictions, `x_t` and the noise level. Everything else of the pipeline is untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, SupportsFloat, get_args

import torch
from torch import nn

from deradiff.algorithm.schedules import finite
from deradiff.algorithm.step import space_of
from deradiff.anchors import Anchor, denoisers_of, load_anchor
from deradiff.anchors.checks import Pipeline, unwrapped
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.devices import device_called
from deradiff.sampling.dial import Dial, Lam
from deradiff.sampling.realigned_components import lams_by_component, require_free
from deradiff.sampling.realigned_steps import Method, Where
from deradiff.sampling.reuse import RESERVED, Reuse, require_affine
from deradiff.sampling.scheduler_hook import owner_of, require_step, schedulers_of
from deradiff.sampling.text_encoders import RealignedTextEncoder

TextEncoder = Literal["reference", "both"]
Source = str | Path | nn.Module
Sources = Source | Mapping[str, Source] | Mapping[str, Mapping[str, Source]]


def realign(
    pipe: Pipeline,
    anchor: Sources,
    lam: Lam | Mapping[str, Lam] | Mapping[str, Mapping[str, Lam]] = 1.0,
    *,
    method: Method = "mixture",
    path: Where = "auto",
    text_encoder: TextEncoder = "reference",
    batched: bool = True,
    anchor_device: str | torch.device | None = None,
    reuse: Reuse | int | None = None,
    tolerance: float | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    local_files_only: bool = False,
) -> Dial:
    """Make `pipe` sample from the geometric mixture of its own model and aligned ones (DeRaDiff, Algorithm 1).

    The pipeline is changed in place and used as before; the handle turns λ and undoes everything.

    Args:
        pipe: a diffusers pipeline with a `unet` or `transformer`, the reference; or with several denoisers. Tested are
            270 of the 293 pipeline classes of diffusers 0.42.1 that its tests or ours build (docs/tasks/pipelines.md).
        anchor: the aligned model: a loaded denoiser, a folder, a hub id, a LoRA or single-file checkpoint; or several,
            named, `{"aesthetic": ..., "text": ...}` (see `anchors.load_anchor`). For a pipeline with several denoisers,
            as Wan 2.2's, either of these for each of them, `{"transformer": ..., "transformer_2": ...}`, of which what
            is left out stays the reference's; or one source that has them all, a pipeline or a LoRA file whose keys
            begin with their names.
        lam: λ, how much of the anchor: 0 is the reference, 1 the anchor, above 1 extrapolates, below 0 moves away from
            the anchor. Of an anchor aligned at β it stands for the strength β/λ. A number or a `Schedule`, a list of
            these with one per image of the batch, or, with several anchors, a dictionary of any of those
            (`lams.parse_lam`). With several denoisers it is the same for all, or a dictionary of any of these for each.
        method: "mixture" mixes predictions, one evaluation per model and step. "interpolate" runs one model with
            interpolated weights (a LoRA at scale λ): half the cost, a first-order approximation of the mixture.
        path: where the mixture is taken. "auto": mixed predictions wherever the scheduler's step is affine in them
            (there both are the same), the explicit Gaussian posteriors of Theorem 1 where it is not. "prediction" and
            "posterior" insist on one.
        text_encoder: "reference": its text encoders serve all models, and a LoRA's parts for them are left out with a
            warning. "both": each model has its own prompt embeddings, an anchor by the same text encoders with its
            LoRA's parts; models are then evaluated one after the other.
        batched: evaluate LoRA anchors and the reference in one forward pass where PEFT can; else one pass per model.
        anchor_device: a second device for the anchors' weights, where they stay and are evaluated while the reference
            is on its own; None puts them beside the reference. A LoRA has no weights to be put elsewhere.
        reuse: carry predictions over between steps: a `Reuse`, or every how many all are evaluated; None is exact.
        tolerance: short for `Reuse(tolerance=...)`: the error that may be made, relative to λ's own effect.
        subfolder: where in the anchor's folder or repository the denoiser lies, if not in the usual places.
        revision: the hub revision of the anchor.
        allow_pickle: permit `.bin` and `.ckpt` weights, which can run code when they are read.
        local_files_only: take hub ids from the cache alone.

    Raises:
        ValueError: λ that is not finite, or not one for every anchor; an unknown `method`, `path` or `text_encoder`;
            each model's own prompt embeddings with interpolated weights or several denoisers; `path="posterior"` with a
            scheduler that has no per-step posterior; a tolerance outside (0, 1), a carrier that does not exist,
            or reuse where posteriors are mixed; `anchors.AnchorError` for an anchor that cannot be used, a pipeline
            without a denoiser, and one anchor for several.
        DialError: `pipe` is already realigned, its scheduler is, or takes no step from predictions (a `RuntimeError`).
    """
    _require_known(method, path, text_encoder)
    _require_free(pipe)
    elsewhere = None if anchor_device is None else torch.device(device_called(str(anchor_device)))
    reused = Reuse.parse(reuse, tolerance)
    for scheduler in schedulers_of(pipe):
        space_of(scheduler, path)
        if reused is not None:
            require_affine(scheduler, path)
    sources, shared = sources_by_component(anchor, pipe)
    lams = lams_by_component(lam, {component: tuple(named) for component, named in sources.items()})
    where: dict[str, Any] = {"subfolder": subfolder, "revision": revision, "local_files_only": local_files_only}
    where |= {"allow_pickle": allow_pickle, "stages": tuple(sources) if shared else (), "text": text_encoder == "both"}
    references = {component: unwrapped(getattr(pipe, component)) for component in sources}
    anchors: dict[str, list[Anchor]] = {component: [] for component in sources}
    try:
        _load(anchors, sources, pipe, elsewhere, where)
        denoisers = {one: Denoisers(reference, anchors[one], batched) for one, reference in references.items()}
        return Dial(pipe, denoisers, lams, method, path, reused, _text_encoders(pipe, denoisers, text_encoder))
    except BaseException:
        _unload(anchors, references)
        raise


def _unload(anchors: Mapping[str, list[Anchor]], references: Mapping[str, nn.Module]) -> None:
    """Undo `_load`, and empty its lists, for whoever keeps the error keeps what is in reach of it."""
    for component, loaded in anchors.items():
        while loaded:
            loaded.pop().unload(references[component])


def _load(
    anchors: dict[str, list[Anchor]],
    sources: Mapping[str, Mapping[str, Source]],
    pipe: Pipeline,
    elsewhere: torch.device | None,
    where: Mapping[str, Any],
) -> None:
    """Load the anchors of every component into `anchors`, where what is loaded can be found if another one fails."""
    for component, named in sources.items():
        for name, source in named.items():
            anchors[component].append(load_anchor(source, pipe, name=name, component=component, **where))
        if elsewhere is not None:
            anchors[component] = [_placed(anchor, elsewhere) for anchor in anchors[component]]


def _text_encoders(
    pipe: Pipeline, denoisers: Mapping[str, Denoisers], text_encoder: TextEncoder
) -> list[RealignedTextEncoder]:
    """The text encoders for which anchors have parts of their own."""
    if not any(own.own_embeddings for own in denoisers.values()):
        if text_encoder == "both":
            warnings.warn('text_encoder="both" changes nothing: no anchor has parts for text encoders', stacklevel=3)
        return []
    if len(denoisers) > 1:
        raise ValueError(
            f"each model's own prompt embeddings are for one denoiser, and here are {' and '.join(denoisers)}: leave "
            "text_encoder out"
        )
    (anchors,) = (own.anchors for own in denoisers.values())
    components = dict.fromkeys(component for anchor in anchors for component in anchor.text_adapters)
    return [RealignedTextEncoder(component, getattr(pipe, component), anchors) for component in components]


def _require_known(method: str, path: str, text_encoder: str) -> None:
    chosen = {"method": (method, Method), "path": (path, Where), "text_encoder": (text_encoder, TextEncoder)}
    for name, (value, known) in chosen.items():
        if value not in get_args(known):
            raise ValueError(f"{name} must be one of {', '.join(map(repr, get_args(known)))}; got {value!r}")
    if method == "interpolate" and path != "auto":
        raise ValueError(f"interpolated weights are one model, with nothing to mix: leave path={path!r} out")


def _require_free(pipe: Pipeline) -> None:
    """Raise `DialError` where the pipeline's denoiser or scheduler is realigned already, or a scheduler cannot be."""
    for denoiser in denoisers_of(pipe).values():
        require_free(unwrapped(denoiser))
    if any(owner_of(scheduler) is not None for scheduler in schedulers_of(pipe)):
        raise DialError(
            "the pipeline's scheduler belongs to another realigned pipeline: give this one its own, "
            "pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)"
        )
    for scheduler in schedulers_of(pipe):
        require_step(scheduler)


def sources_by_component(anchor: Any, pipe: Pipeline) -> tuple[dict[str, dict[str, Source]], bool]:
    """The anchors' sources by component and name, and whether each of them is to serve all components."""
    components = [*denoisers_of(pipe)]
    if len(components) == 1:
        return {components[0]: named_sources(anchor)}, False
    if not isinstance(anchor, Mapping) or not {*anchor} & {*components}:
        return {component: named_sources(anchor) for component in components}, True
    if unknown := {*anchor} - {*components}:
        raise ValueError(f"anchors by component are for some of {components}; got {unknown.pop()!r} as well")
    if left := [component for component in components if component not in anchor]:
        warnings.warn(f"{' and '.join(left)} of this pipeline has no anchor and stays the reference's", stacklevel=3)
    return {component: named_sources(anchor[component]) for component in components if component in anchor}, False


def named_sources(anchor: Source | Mapping[str, Source]) -> dict[str, Source]:
    """The anchors' sources by name. Raises `ValueError` for names that mean something else, and for no anchor."""
    sources = dict(anchor) if isinstance(anchor, Mapping) else {"anchor": anchor}
    if reserved := {*sources} & {*RESERVED}:
        raise ValueError(
            f"an anchor cannot be called {reserved.pop()!r}, which means something else: name it otherwise"
        )
    if not sources:
        raise ValueError("realign() needs at least one anchor, got an empty dictionary")
    return sources


def _placed(anchor: Anchor, device: torch.device) -> Anchor:
    """The anchor with its weights on a device of its own."""
    if anchor.module is None:
        raise ValueError(
            f"the anchor {anchor.name!r} is a LoRA, which lives in the reference's weights: leave anchor_device out"
        )
    anchor.module.to(device)
    return replace(anchor, device=device)


def lam_for_beta(anchor_beta: SupportsFloat, target_beta: SupportsFloat) -> float:
    """The λ at which an anchor aligned at `anchor_beta` stands for strength `target_beta`: their quotient.

    Realignment at λ samples strength β/λ (DeRaDiff, §4.1). Both must be positive and finite, else `ValueError`.
    """
    anchor_beta, target_beta = finite(anchor_beta, "anchor_beta"), finite(target_beta, "target_beta")
    for name, beta in (("anchor_beta", anchor_beta), ("target_beta", target_beta)):
        if beta <= 0:
            raise ValueError(f"{name} is a KL strength, positive and finite; got {beta!r}")
    return finite(anchor_beta / target_beta, "λ = anchor_beta / target_beta")
