"""The tiny pipelines as modular ones: blocks around the same components, from prompt embeddings to latents.

`modular(kind)` gives one with a guider, which is called, and answers, as the others are; `call_of(kind)` the arguments
of a call with two images or videos.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from diffusers import ClassifierFreeGuidance, DiffusionPipeline
from diffusers.guiders import BaseGuidance
from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxCoreDenoiseStep
from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import Flux2KleinBaseCoreDenoiseStep
from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageCoreDenoiseStep
from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
    StableDiffusion3T2ICoreDenoiseStep,
)
from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
    StableDiffusionXLAutoBlocks,
)
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep
from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageCoreDenoiseStep
from torch import nn

from family_parts import PROMPTS
from tiny_families import built

BLOCKS: dict[str, Callable[[], Any]] = {
    "sdxl": StableDiffusionXLAutoBlocks,
    "sd3": StableDiffusion3T2ICoreDenoiseStep,
    "flux": FluxCoreDenoiseStep,
    "flux2_klein_kv": Flux2KleinBaseCoreDenoiseStep,
    "qwen_image": QwenImageCoreDenoiseStep,
    "wan": WanCoreDenoiseStep,
    "wan22": Wan22CoreDenoiseStep,
    "z_image": ZImageCoreDenoiseStep,
}
GUIDED = [kind for kind in BLOCKS if kind not in ("flux", "wan22")]
"""Those with one denoiser and one guider."""

_OTHERWISE = ("guidance_scale", "true_cfg_scale", "output_type")
"""Arguments of the other pipelines that guiders and outputs stand for here."""


def call_of(kind: str) -> dict[str, Any]:
    """The arguments of a call: two images, or videos."""
    call = {name: value for name, value in built(kind)[1].items() if name not in _OTHERWISE}
    if kind == "sdxl":
        call["num_inference_steps"] = 2  # its UNet costs most
    if kind == "flux2_klein_kv":
        call = {name: value for name, value in call.items() if name != "image"} | PROMPTS
    if kind == "flux":
        call = {name: value for name, value in call.items() if "negative" not in name}
    return call


def modular(kind: str, module: nn.Module | None = None, guider: BaseGuidance | None = None) -> Any:
    """The tiny pipeline of that kind as a modular one, around another denoiser if one is given."""
    plain, _ = built(kind)
    blocks = BLOCKS[kind]()
    blocks.sub_blocks.pop("decode", None)
    pipe = blocks.init_pipeline()
    parts = {name: part for name, part in plain.components.items() if part is not None}
    if module is not None:
        parts["unet" if "unet" in parts else "transformer"] = module
    pipe.update_components(**{name: part for name, part in parts.items() if name in pipe.component_names})
    if kind != "flux":
        pipe.update_components(guider=guider or ClassifierFreeGuidance(guidance_scale=3.0))
    pipe.set_progress_bar_config(disable=True)
    own = type(pipe)

    def call(self: Any, **arguments: Any) -> Any:
        return SimpleNamespace(images=own.__call__(self, output="latents", **arguments))

    # `lock_step` and `sample` are annotated for `DiffusionPipeline`, which nobody checks.
    pipe.__class__ = type(own.__name__, (own, DiffusionPipeline), {"__call__": call, "__setattr__": object.__setattr__})
    return pipe
