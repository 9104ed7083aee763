"""Cases of our own for the pipeline classes of diffusers that its tests do not build."""

from __future__ import annotations

from .cascades import CASCADES
from .case import MODULE, OwnCase, Sibling
from .images import IMAGES
from .older import OLDER
from .sounds import SOUNDS
from .stable_diffusion import VARIANTS
from .unconditional import UNCONDITIONAL
from .videos import VIDEOS

OWN_CASES: tuple[OwnCase, ...] = (*UNCONDITIONAL, *VARIANTS, *IMAGES, *VIDEOS, *SOUNDS, *OLDER, *CASCADES)
"""All of them. At most one for each pipeline class."""

LEFT_OUT = {
    "DiffusionGemmaPipeline": "text, by a language model that fills tokens in: nothing denoises latents",
    "FluxPriorReduxPipeline": "makes embeddings of an image: nothing denoises",
    "LLaDA2Pipeline": "text, by a language model that fills tokens in: nothing denoises latents",
    "LTX2LatentUpsamplePipeline": "enlarges latents at once: nothing denoises",
    "LTX2VideoDiffusionDecodePipeline": "decodes latents: what denoises pixels there takes no scheduler's steps",
    "RFD4ProteinaPipeline": "proteins, from features that diffusers does not make",
    "VersatileDiffusionPipeline": "makes the three other pipelines of its family, and draws with these",
}
"""The pipeline classes that neither the tests of diffusers nor these cases build, and why."""

__all__ = ["LEFT_OUT", "MODULE", "OWN_CASES", "OwnCase", "Sibling"]
