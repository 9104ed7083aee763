"""Cascades: pipelines of several models, each of which draws what the next begins with."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DDPMWuerstchenScheduler,
    PriorTransformer,
    UnCLIPScheduler,
    UNet2DConditionModel,
)

from .case import OwnCase
from .parts import (
    PROMPT,
    call,
    clip_image_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    generator,
    numbers,
    picture,
    unconditional_unet,
)

WIDTH = 8


def _unclip_decoder() -> dict[str, Any]:
    """The stages that both UnCLIP pipelines have: a decoder of 16 by 16 and two that make it 32 by 32."""
    from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel

    def enlarging() -> Any:
        blocks = {
            "down_block_types": ("ResnetDownsampleBlock2D",) * 2,
            "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
        }
        return unconditional_unet(32, in_channels=6, out_channels=3, norm_num_groups=2, **blocks)

    return {
        "decoder": UNet2DConditionModel(
            sample_size=16,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            layers_per_block=1,
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            norm_num_groups=2,
            class_embed_type="identity",
            resnet_time_scale_shift="scale_shift",
        ),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=WIDTH, time_embed_dim=32, cross_attention_dim=WIDTH),
        "super_res_first": enlarging(),
        "super_res_last": enlarging(),
        "text_encoder": clip_text(WIDTH, projected=True),
        "tokenizer": clip_tokenizer(),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", prediction_type="epsilon"),
        "super_res_scheduler": UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
    }


def _unclip() -> dict[str, Any]:
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=4, embedding_dim=WIDTH, num_layers=1)
    scheduler = UnCLIPScheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0)
    return _unclip_decoder() | {"prior": prior, "prior_scheduler": scheduler}


def _unclip_variation() -> dict[str, Any]:
    encoders = {"image_encoder": clip_vision(WIDTH, WIDTH), "feature_extractor": clip_image_processor()}
    return _unclip_decoder() | encoders


def _wuerstchen_prior() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior

    return {
        "prior": WuerstchenPrior(c_in=2, c=8, c_cond=WIDTH, c_r=4, depth=2, nhead=2),
        "text_encoder": clip_text(WIDTH),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def _wuerstchen_decoder() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
    from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt

    return {
        "decoder": WuerstchenDiffNeXt(
            c_cond=WIDTH,
            c_hidden=[8, 8, 8, 8],
            nhead=[-1, 2, 2, 2],
            blocks=[1, 1, 1, 1],
            c_r=4,
            level_config=["C", "CT", "CTA", "CTA"],
            inject_effnet=[False, True, True, True],
            effnet_embd=2,
            clip_embd=WIDTH,
        ),
        "vqgan": PaellaVQModel(levels=1, bottleneck_blocks=1, num_vq_embeddings=16, embed_dim=8),
        "text_encoder": clip_text(WIDTH),
        "tokenizer": clip_tokenizer(),
        "scheduler": DDPMWuerstchenScheduler(),
    }


def _wuerstchen_combined() -> dict[str, Any]:
    return _wuerstchen_decoder() | {f"prior_{name}": part for name, part in _wuerstchen_prior().items()}


_SHORT = {"decoder_num_inference_steps": 3, "super_res_num_inference_steps": 2}

CASCADES = (
    OwnCase(
        "UnCLIPPipeline",
        components=_unclip,
        inputs=lambda: {
            "prompt": PROMPT,
            "generator": generator(),
            "output_type": "np",
            "prior_num_inference_steps": 3,
            **_SHORT,
        },
    ),
    OwnCase(
        "UnCLIPImageVariationPipeline",
        components=_unclip_variation,
        inputs=lambda: {"image": picture(), "generator": generator(), "output_type": "np", **_SHORT},
    ),
    OwnCase(
        "WuerstchenPriorPipeline",
        components=_wuerstchen_prior,
        inputs=lambda: call(height=128, width=128, guidance_scale=4.0),
    ),
    OwnCase(
        "WuerstchenDecoderPipeline",
        components=_wuerstchen_decoder,
        inputs=lambda: call(image_embeddings=numbers(1, 2, 3, 3), guidance_scale=1.5),
    ),
    OwnCase(
        "WuerstchenCombinedPipeline",
        components=_wuerstchen_combined,
        inputs=lambda: call(height=128, width=128, prior_num_inference_steps=3),
    ),
)
