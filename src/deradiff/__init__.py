"""One dial for how aligned a diffusion model is: realigned sampling for any diffusers pipeline, without training."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.algorithm import schedules as schedules
    from deradiff.anchors import load_anchor as load_anchor
    from deradiff.baking import bake as bake
    from deradiff.examination import examine as examine
    from deradiff.sampling.dial import Dial as Dial
    from deradiff.sampling.particles import sample_particles as sample_particles
    from deradiff.sampling.realignment import lam_for_beta as lam_for_beta
    from deradiff.sampling.realignment import realign as realign
    from deradiff.sampling.reuse import Reuse as Reuse
    from deradiff.sweep.characters import load_character as load_character

__version__ = "0.2.0"

# torch and diffusers take seconds to import: a name is fetched from its module when somebody asks for it.
_HOME = {
    "Reuse": "deradiff.sampling.reuse",
    "Dial": "deradiff.sampling.dial",
    "bake": "deradiff.baking",
    "examine": "deradiff.examination",
    "load_character": "deradiff.sweep.characters",
    "lam_for_beta": "deradiff.sampling.realignment",
    "load_anchor": "deradiff.anchors",
    "realign": "deradiff.sampling.realignment",
    "sample_particles": "deradiff.sampling.particles",
}
__all__ = [
    "Dial",
    "Reuse",
    "bake",
    "examine",
    "lam_for_beta",
    "load_anchor",
    "load_character",
    "realign",
    "sample_particles",
    "schedules",
]


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return import_module("deradiff.algorithm.schedules")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deradiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
