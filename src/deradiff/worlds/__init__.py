"""Models small enough to be sure with: closed forms, and trained ones that ship with the package, by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

SHIPPED: Mapping[str, str] = {"digits": "deradiff.worlds.digits", "digits-flow": "deradiff.worlds.digits_flow"}
"""Each trained world's name, and the module whose `WORLD` describes it."""


@dataclass(frozen=True)
class ShippedAnchor:
    """An aligned model that ships; `code` is its path in Python."""

    path: Path
    beta: float | None
    """That it was aligned at; None for one whose alignment had no KL term."""
    code: str
    method: str | None = None
    """How it was aligned (`alignment.methods`), and with which reward."""
    reward: str | None = None


@dataclass(frozen=True)
class ShippedWorld:
    """A trained model that ships, and what its users need to know of it."""

    name: str
    """What stands for its reference, and with a colon before the names of its anchors: `digits`, `digits:lora`."""
    title: str
    """What messages call it, in the plural."""
    reference: Path
    anchors: Mapping[str, ShippedAnchor]
    load: Callable[..., Any]
    """The reference as a pipeline, on the CPU; takes `torch_dtype`."""
    sample_prompts: Callable[[int, int], list[str]]
    """So many prompts, drawn with a seed."""
    example: tuple[str, str]
    """An anchor and a prompt to begin with."""
    guidance_scale: float
    """At which it is measured, far from a pipeline's default."""
    rewards: tuple[str, ...]
    """What it is scored by where no reward is named."""
    resolution: int
    """Of its pictures, in pixels."""
    tokens: int
    """Of a prompt, its start and end included."""

    @property
    def module(self) -> str:
        """What programs import from `deradiff.worlds`."""
        return SHIPPED[self.name].rpartition(".")[2]


def find(source: str | None) -> ShippedWorld | None:
    """The world whose reference `source` names; None for a model that does not ship."""
    if source is None or source not in SHIPPED:
        return None
    world: ShippedWorld = import_module(SHIPPED[source]).WORLD
    return world


def find_anchor(source: str) -> ShippedAnchor | None:
    """The anchor that `source` names, as `WORLD:ANCHOR`; None for a model that does not ship.

    Raises `ValueError` for an anchor that the world does not have.
    """
    name, colon, anchor = source.partition(":")
    world = find(name) if colon else None
    if world is None:
        return None
    if anchor not in world.anchors:
        raise ValueError(f"{source!r} is unknown; {world.title} have the anchors {', '.join(world.anchors)}.")
    return world.anchors[anchor]
