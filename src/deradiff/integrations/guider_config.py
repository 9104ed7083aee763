"""A realigning guider's settings as plain data, and back: λ, the guider inside, the anchors' names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import diffusers.guiders
from diffusers.guiders import BaseGuidance, LTX2Guidance
from torch import nn

from deradiff.algorithm.schedules import Schedule
from deradiff.sampling.realignment import Source, named_sources


def plain_lam(lam: Any) -> Any:
    """λ as `parse_lam` keeps it, as data for JSON."""
    if isinstance(lam, Schedule):
        return lam.to_dict()
    if isinstance(lam, Mapping):
        return {name: plain_lam(value) for name, value in lam.items()}
    return [plain_lam(value) for value in lam] if isinstance(lam, tuple) else lam


def read_lam(lam: Any) -> Any:
    """λ with a schedule for every dictionary that `plain_lam` made of one; other forms as they are."""
    if isinstance(lam, Mapping):
        if isinstance(lam.get("schedule"), str):
            return Schedule.from_dict(lam)
        return {name: read_lam(value) for name, value in lam.items()}
    return [read_lam(value) for value in lam] if isinstance(lam, list | tuple) else lam


def plain_guider(guider: BaseGuidance) -> dict[str, Any]:
    """The class and configuration of a guider, as it saves them."""
    return json.loads(guider.to_json_string())


def read_guider(guider: Any) -> BaseGuidance:
    """A guider, or the one that `plain_guider` described.

    Raises `ValueError` for anything else, for a class that diffusers does not have (nothing is imported that a file
    names), and for guiders that cannot be the inner one.
    """
    if isinstance(guider, Mapping):
        name = guider.get("_class_name")
        family = getattr(diffusers.guiders, name, None) if isinstance(name, str) else None
        if not (isinstance(family, type) and issubclass(family, BaseGuidance)):
            raise ValueError(
                f"the saved guider is a {name!r}, which diffusers has no guider of: pass it, loaded, as guider="
            )
        guider = family.from_config(dict(guider))  # type: ignore[attr-defined]
    if not isinstance(guider, BaseGuidance):
        raise ValueError(f"guider must be a guider of diffusers, got a {type(guider).__name__}")
    if isinstance(guider, LTX2Guidance):
        raise ValueError(
            "LTX2Guidance shares its evaluations with the guider of another modality, and cannot guide each model by "
            "itself: realign that pipeline with deradiff.realign(pipe, anchor, lam)"
        )
    return guider


def plain_anchors(sources: Mapping[str, Any]) -> Any:
    """The anchors as they were given, None for a loaded one, which no file can name."""
    plain = {name: None if isinstance(source, nn.Module) else str(source) for name, source in sources.items()}
    return plain["anchor"] if [*plain] == ["anchor"] else plain


def read_anchors(anchor: Any) -> dict[str, Source]:
    """The anchors' sources by name. Raises `ValueError` for those that a saved configuration left out."""
    sources = named_sources(anchor)
    if missing := [name for name, source in sources.items() if source is None]:
        raise ValueError(
            f"no anchor {' and '.join(map(repr, missing))}: a saved guider names none where it had a loaded model. "
            "Pass it, RealignGuider.from_pretrained(folder, anchor=model)"
        )
    return sources


def remembers(guider: BaseGuidance) -> bool:
    """Whether what a guider makes of a step may depend on earlier steps.

    Of diffusers' own those with momentum do; of a guider from elsewhere it is not known.
    """
    own = type(guider).__module__.startswith("diffusers.guiders.")
    return not own or getattr(guider, "adaptive_projected_guidance_momentum", None) is not None
