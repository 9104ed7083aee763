"""Tiny random pipelines of the families that people use beside Stable Diffusion, of the real diffusers classes.

A family is a function without arguments that makes a pipeline and the arguments of a full call: two images (or videos,
or pieces of audio), guidance where the family has it, latents returned. One layer, few channels, prompt embeddings
instead of text encoders, no download; equal calls of `built` give equal weights. `tiny` has the image pipelines that
most tests are about.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
)
from torch import Tensor, nn

from family_parts import Built
from tiny import KINDS, seeded, tensors_in
from tiny_image_families import (
    bria,
    cascade_decoder,
    cascade_prior,
    chroma,
    flux2,
    flux2_klein_kv,
    hidream,
    lumina2,
    qwen_image,
    sana,
    sana_sprint,
    z_image,
)
from tiny_parts import perturbed
from tiny_video_families import (
    audioldm2,
    cogvideox,
    cogvideox_image,
    cosmos,
    hunyuan15,
    ltx2,
    skyreels,
    skyreels_in_turn,
    stable_audio,
    stable_video_diffusion,
    wan,
    wan22,
)

FAMILIES: dict[str, Callable[[], Built]] = {
    **{family: KINDS[family] for family in ("sd", "sdxl", "sd3", "flux")},
    "flux2": flux2,
    "flux2_klein_kv": flux2_klein_kv,
    "qwen_image": qwen_image,
    "z_image": z_image,
    "sana": sana,
    "sana_sprint": sana_sprint,
    "lumina2": lumina2,
    "chroma": chroma,
    "hidream": hidream,
    "bria": bria,
    "cascade_prior": cascade_prior,
    "cascade_decoder": cascade_decoder,
    "wan": wan,
    "wan22": wan22,
    "skyreels": skyreels,
    "skyreels_in_turn": skyreels_in_turn,
    "hunyuan15": hunyuan15,
    "cogvideox": cogvideox,
    "cogvideox_image": cogvideox_image,
    "cosmos": cosmos,
    "stable_video_diffusion": stable_video_diffusion,
    "ltx2": ltx2,
    "audioldm2": audioldm2,
    "stable_audio": stable_audio,
}


def built(family: str) -> Built:
    """A pipeline of the family and the arguments of a call. Equal families have equal weights."""
    with seeded(0):
        pipe, call = FAMILIES[family]()
    pipe.set_progress_bar_config(disable=True)
    for module in denoisers(pipe).values():
        module.eval()
    return pipe, dict(call)


def denoisers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """What the pipeline denoises with, by the names of its components."""
    names = ("unet", "transformer", "transformer_2", "prior", "decoder")
    return {name: module for name in names if (module := getattr(pipe, name, None)) is not None}


def anchors_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Another denoiser for each of the pipeline's, of the same architecture and clearly different."""
    return {name: perturbed(module, seed) for seed, (name, module) in enumerate(denoisers(pipe).items(), 1)}


def around(family: str, modules: Mapping[str, nn.Module]) -> DiffusionPipeline:
    """A pristine pipeline of the family around other denoisers."""
    pipe, _ = built(family)
    for name, module in modules.items():
        setattr(pipe, name, module)
    return pipe


def drawn(pipe: DiffusionPipeline, call: Mapping[str, Any], seed: int = 11) -> tuple[Tensor, ...]:
    """All tensors that one call with a fresh generator returns: latents of images, of video and of audio."""
    with seeded(seed):
        return tensors_in(pipe(generator=torch.Generator().manual_seed(seed), **call))
