"""Cases of our own for the pipeline classes of diffusers that its tests do not build."""

from __future__ import annotations

from .case import MODULE, OwnCase, Sibling
from .images import IMAGES
from .older import OLDER
from .sounds import SOUNDS
from .stable_diffusion import VARIANTS
from .unconditional import UNCONDITIONAL
from .videos import VIDEOS

OWN_CASES: tuple[OwnCase, ...] = (*UNCONDITIONAL, *VARIANTS, *IMAGES, *VIDEOS, *SOUNDS, *OLDER)
"""All of them. At most one for each pipeline class."""

__all__ = ["MODULE", "OWN_CASES", "OwnCase", "Sibling"]
