"""Small parts and inputs that several cases need."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DModel, VQModel

import stand_in_tokenizers as tokenizers

PROMPT = "A red fox in the snow"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(shape, generator=generator(seed))


def picture(size: int = 32, seed: int = 0) -> PIL.Image.Image:
    """A square picture of noise."""
    return PIL.Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size: int = 32) -> PIL.Image.Image:
    """A mask whose left half is to be drawn anew."""
    marked = np.zeros((size, size), dtype=np.uint8)
    marked[:, : size // 2] = 255
    return PIL.Image.fromarray(marked)


def call(**settings: Any) -> dict[str, Any]:
    """Inputs that almost every pipeline takes, and others."""
    return {"prompt": PROMPT, "generator": generator(), "num_inference_steps": 3, "output_type": "np", **settings}


def without_prompt(**settings: Any) -> dict[str, Any]:
    """The same for a pipeline that takes no prompt."""
    inputs = call(**settings)
    del inputs["prompt"]
    return inputs


def clip_tokenizer() -> Any:
    return tokenizers.clip()


def clip_text(width: int, *, projected: bool = False, **settings: Any) -> Any:
    """A CLIP text encoder of this width, with its projection or without."""
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        intermediate_size=16,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=514,
        eos_token_id=515,
        pad_token_id=1,
        vocab_size=1000,
        **settings,
    )
    made = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return made(config).eval()


def clip_vision_config(width: int, projection: int) -> Any:
    return transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=16,
        projection_dim=projection,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )


def clip_vision(width: int, projection: int) -> Any:
    """A CLIP image encoder with its projection."""
    return transformers.CLIPVisionModelWithProjection(clip_vision_config(width, projection)).eval()


def clip_image_processor() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def vae(channels: int = 3, **settings: Any) -> Any:
    """An autoencoder that halves height and width."""
    return AutoencoderKL(
        block_out_channels=(4, 8),
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        norm_num_groups=2,
        **settings,
    ).eval()


def vq_model(channels: int = 3, latent_channels: int = 3, **settings: Any) -> Any:
    """A quantizing autoencoder that halves height and width."""
    return VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=latent_channels,
        **settings,
    ).eval()


def again(model: Any, **changes: Any) -> Any:
    """A model of the same settings but for these, its weights made anew."""
    settings = {**model.config, **changes}
    settings.pop("_use_default_values", None)  # diffusers would set these to their defaults again
    return type(model).from_config(settings)


def unconditional_unet(sample_size: int = 8, in_channels: int = 3, out_channels: int = 3, **settings: Any) -> Any:
    """A UNet that takes no prompt."""
    shape: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(
        sample_size=sample_size, in_channels=in_channels, out_channels=out_channels, **{**shape, **settings}
    )
