"""Tiny random pipelines of the real diffusers classes, the same on every run: no download, a call takes milliseconds.

`make(kind)` gives a pipeline, a second denoiser of the same architecture that plays the anchor, and the arguments of a
full call with guidance and two images. Latents are 4x8x8, the VAE halves the resolution, weights are random.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    T2IAdapter,
)
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from tiny_parts import (
    CHANNELS,
    controlnet,
    image_encoder,
    load_ip_adapter,
    noise,
    perturbed,
    sd_components,
    sdxl_components,
    vae,
)

diffusers_logging.disable_progress_bar()

PROMPTS = ["a red fox", "two blue owls"]
NEGATIVE = ["blurry", "dull grey"]

Made = tuple[DiffusionPipeline, nn.Module, dict[str, Any]]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator at `seed`, put back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def anchor_of(pipe: DiffusionPipeline, seed: int = 1) -> nn.Module:
    """Another denoiser of the same architecture, clearly different from the pipeline's own."""
    return perturbed(denoiser(pipe), seed)


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """The attribute of the pipeline that holds its denoiser."""
    return "unet" if "unet" in pipe.components else "transformer"


def denoiser(pipe: DiffusionPipeline) -> Any:
    """The pipeline's UNet or transformer."""
    return getattr(pipe, denoiser_name(pipe))


# --- pipelines --------------------------------------------------------------------------------------------------------


TEXT_CALL: dict[str, Any] = {
    "prompt": PROMPTS,
    "negative_prompt": NEGATIVE,
    "guidance_scale": 3.0,
    "num_inference_steps": 4,
    "output_type": "latent",
}
SIZE = {"height": 16, "width": 16}


def picture(batch: int = 2, channels: int = 3, seed: int = 5) -> Tensor:
    """Random pictures in [0, 1]."""
    return noise(batch, channels, 16, 16, seed=seed).sigmoid()


def mask() -> Tensor:
    """The left half of the picture."""
    left = torch.zeros(2, 1, 16, 16)
    left[..., :8] = 1
    return left


def sd(out_channels: int = 4) -> tuple[DiffusionPipeline, dict[str, Any]]:
    return StableDiffusionPipeline(**sd_components(out_channels=out_channels)), TEXT_CALL | SIZE


def sd_img2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return StableDiffusionImg2ImgPipeline(**sd_components()), TEXT_CALL | {"image": picture(), "strength": 0.75}


def sd_inpaint(in_channels: int = 4) -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionInpaintPipeline(**sd_components(in_channels))
    return pipe, TEXT_CALL | SIZE | {"image": picture(), "mask_image": mask(), "strength": 1.0}


def sdxl() -> tuple[DiffusionPipeline, dict[str, Any]]:
    return StableDiffusionXLPipeline(**sdxl_components(), add_watermarker=False), TEXT_CALL | SIZE


def sdxl_img2img() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionXLImg2ImgPipeline(**sdxl_components(), add_watermarker=False)
    return pipe, TEXT_CALL | {"image": picture(), "strength": 0.75}


def sdxl_inpaint(in_channels: int = 4) -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionXLInpaintPipeline(**sdxl_components(in_channels), add_watermarker=False)
    return pipe, TEXT_CALL | SIZE | {"image": picture(), "mask_image": mask(), "strength": 0.99}


def sd_controlnet() -> tuple[DiffusionPipeline, dict[str, Any]]:
    parts = sd_components()
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]))
    return pipe, TEXT_CALL | SIZE | {"image": picture()}


def sdxl_controlnet() -> tuple[DiffusionPipeline, dict[str, Any]]:
    parts = sdxl_components()
    pipe = StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet(parts["unet"]), add_watermarker=False)
    return pipe, TEXT_CALL | SIZE | {"image": picture()}


def sd_adapter() -> tuple[DiffusionPipeline, dict[str, Any]]:
    adapter = T2IAdapter(channels=list(CHANNELS), num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter")
    pipe = StableDiffusionAdapterPipeline(**sd_components(), adapter=adapter.eval())
    return pipe, TEXT_CALL | SIZE | {"image": picture()}


def sd_ip_adapter() -> tuple[DiffusionPipeline, dict[str, Any]]:
    pipe = StableDiffusionPipeline(**sd_components(), image_encoder=image_encoder())
    load_ip_adapter(pipe)
    one_prompt = {"prompt": PROMPTS[0], "negative_prompt": NEGATIVE[0], "num_images_per_prompt": 2}
    return pipe, TEXT_CALL | SIZE | one_prompt | {"ip_adapter_image": noise(1, 3, 16, 16, seed=6)}


def embeddings(tokens: int, pooled: bool) -> dict[str, Tensor]:
    """Prompt and negative prompt as embeddings, for pipelines whose text encoders are left out."""
    call = {"prompt_embeds": noise(2, tokens, 16, seed=7), "negative_prompt_embeds": noise(2, tokens, 16, seed=8)}
    if pooled:
        call |= {"pooled_prompt_embeds": noise(2, 16, seed=9), "negative_pooled_prompt_embeds": noise(2, 16, seed=10)}
    return call


EMBEDDED_CALL = {"num_inference_steps": 4, "output_type": "latent"} | SIZE


def sd3() -> tuple[DiffusionPipeline, dict[str, Any]]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
    )
    absent = dict.fromkeys(
        ("text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae(), **absent)
    return pipe, EMBEDDED_CALL | embeddings(5, pooled=True) | {"guidance_scale": 4.0}


def flux() -> tuple[DiffusionPipeline, dict[str, Any]]:
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = FluxPipeline(transformer=transformer, scheduler=scheduler, vae=vae(), **absent)
    return pipe, EMBEDDED_CALL | embeddings(5, pooled=True) | {"guidance_scale": 3.5, "true_cfg_scale": 2.0}


def pixart() -> tuple[DiffusionPipeline, dict[str, Any]]:
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=16,
        use_additional_conditions=False,
    )
    scheduler = DPMSolverMultistepScheduler()
    pipe = PixArtAlphaPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae(), text_encoder=None, tokenizer=None
    )
    masks = {"prompt_attention_mask": torch.ones(2, 5), "negative_prompt_attention_mask": torch.ones(2, 5)}
    call = EMBEDDED_CALL | embeddings(5, pooled=False) | masks
    return pipe, call | {"guidance_scale": 4.0, "negative_prompt": None, "use_resolution_binning": False}


KINDS: dict[str, Callable[[], tuple[DiffusionPipeline, dict[str, Any]]]] = {
    "sd": sd,
    "sd_img2img": sd_img2img,
    "sd_inpaint": sd_inpaint,
    "sd_inpaint_9_channels": lambda: sd_inpaint(9),
    "sd_controlnet": sd_controlnet,
    "sd_adapter": sd_adapter,
    "sd_ip_adapter": sd_ip_adapter,
    "sdxl": sdxl,
    "sdxl_img2img": sdxl_img2img,
    "sdxl_inpaint": sdxl_inpaint,
    "sdxl_inpaint_9_channels": lambda: sdxl_inpaint(9),
    "sdxl_controlnet": sdxl_controlnet,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
}


def make(kind: str, seed: int = 0) -> Made:
    """A pipeline of that kind, an anchor for it, and the arguments of a call. Equal seeds give equal weights."""
    with seeded(seed):
        pipe, call = KINDS[kind]() if kind in KINDS else sd(out_channels=8)
    pipe.set_progress_bar_config(disable=True)
    denoiser(pipe).eval()
    return pipe, anchor_of(pipe), dict(call)


def sample(pipe: DiffusionPipeline, call: dict[str, Any], seed: int = 11, **changes: Any) -> Tensor:
    """Latents of one call with a fresh generator."""
    with seeded(seed):
        return pipe(generator=torch.Generator().manual_seed(seed), **(call | changes)).images


def tensors_in(output: Any) -> tuple[Tensor, ...]:
    """All tensors that a pipeline returned, in its order."""
    return tuple(value for value in output.to_tuple() if isinstance(value, Tensor))


def trio(kind: str = "sd") -> tuple[DiffusionPipeline, nn.Module, dict[str, Any], list[DiffusionPipeline]]:
    """`make(kind)`, and beside it the reference's and the anchor's own pipelines, which share nothing with it."""
    return *make(kind), [make(kind)[0], with_denoiser(kind, make(kind)[1])]


def with_denoiser(kind: str, module: nn.Module) -> DiffusionPipeline:
    """A pristine pipeline of that kind around another denoiser."""
    pipe, _, _ = make(kind)
    setattr(pipe, denoiser_name(pipe), module)
    return pipe


# --- looking at runs --------------------------------------------------------------------------------------------------


class Counter:
    """Within, counts a denoiser's evaluations: passes through its first weighted layer, whoever calls it and how."""

    def __init__(self, module: nn.Module) -> None:
        self.number = 0
        self.layer = next(layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Linear)))

    def __enter__(self) -> "Counter":
        self.hook = self.layer.register_forward_pre_hook(self.count)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def count(self, module: nn.Module, *_: object) -> None:
        self.number += module is self.layer


def distance(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((one.double() - other.double()).abs().max() / other.abs().max())


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to float32 rounding carried through a few steps."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert torch.isfinite(actual).all()
    assert distance(actual, expected) < tolerance, f"relative distance {distance(actual, expected):.2g}"
