"""Pipelines around Stable Diffusion's UNet, most of them out of the parts of StableDiffusionPipeline's test."""

from __future__ import annotations

from typing import Any

from diffusers import (
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMInverseScheduler,
    DDIMParallelScheduler,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DConditionModel,
)

from .case import OwnCase, Sibling
from .parts import (
    clip_image_processor,
    clip_vision,
    clip_vision_config,
    mask,
    numbers,
    picture,
    vae,
)

SD = Sibling("stable_diffusion.test_stable_diffusion", "StableDiffusionPipelineTesterConfig")
SD_IMG2IMG = Sibling("stable_diffusion.test_stable_diffusion_img2img", "StableDiffusionImg2ImgPipelineTesterConfig")
CONTROLNET_XL = Sibling("controlnet.test_controlnet_sdxl", "StableDiffusionXLControlNetPipelineFastTests")
CONTROLNET_XL_IMG2IMG = Sibling("controlnet.test_controlnet_sdxl_img2img", "ControlNetPipelineSDXLImg2ImgFastTests")
CONTROLNET_XL_INPAINT = Sibling("controlnet.test_controlnet_inpaint_sdxl", "ControlNetPipelineSDXLFastTests")
ANIMATEDIFF = Sibling("animatediff.test_animatediff", "AnimateDiffPipelineFastTests")

BOX = (0.1, 0.1, 0.6, 0.7)


def sd_unet(sample_size: int = 16, **settings: Any) -> Any:
    """A UNet as those of Stable Diffusion, for prompts of width 8."""
    shape: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 8,
        "attention_head_dim": 2,
        "norm_num_groups": 2,
    }
    return UNet2DConditionModel(sample_size=sample_size, **{**shape, **settings})


def _parallel_scheduler() -> Any:
    return DDIMParallelScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def _inverse_parts() -> dict[str, Any]:
    return {"inverse_scheduler": DDIMInverseScheduler(beta_start=0.00085, beta_end=0.012)}


def _captioned_parts() -> dict[str, Any]:
    return _inverse_parts() | {"caption_generator": None, "caption_processor": None}


def _gligen_images_parts() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

    return {
        "unet": sd_unet(attention_type="gated-text-image"),
        "processor": clip_image_processor(),
        "image_encoder": clip_vision(8, 8),
        "image_project": CLIPImageProjection(hidden_size=8),
    }


def _paint_by_example_parts() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    return {
        "unet": sd_unet(in_channels=9),
        "image_encoder": PaintByExampleImageEncoder(clip_vision_config(8, 8), proj_size=8).eval(),
        "feature_extractor": clip_image_processor(),
    }


def _upscaler_parts() -> dict[str, Any]:
    return {
        "unet": sd_unet(in_channels=7, num_class_embeds=1000),
        "low_res_scheduler": DDPMScheduler(),
        "scheduler": DDIMScheduler(prediction_type="v_prediction"),
    }


def _control_union() -> dict[str, Any]:
    """A union of six ControlNets as wide as the UNet of diffusers' tests of Stable Diffusion XL."""
    return {
        "controlnet": ControlNetUnionModel(
            block_out_channels=(32, 64),
            layers_per_block=2,
            in_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            conditioning_embedding_out_channels=(16, 32),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            num_trans_channel=32,
            num_trans_head=2,
            num_proj_channel=32,
        )
    }


def _animated_unet() -> Any:
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2}
    return sd_unet(8, in_channels=9, block_out_channels=(8, 8), **blocks)


def _controlnet_xs() -> dict[str, Any]:
    unet = sd_unet(block_out_channels=(4, 8), norm_num_groups=4, layers_per_block=2)
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=1, learn_time_embedding=True, conditioning_embedding_out_channels=(2, 2)
    )
    return {"unet": unet, "controlnet": adapter}


def _controlnet_xs_xl() -> dict[str, Any]:
    unet = CONTROLNET_XL.components()["unet"]
    adapter = ControlNetXSAdapter.from_unet(
        unet, size_ratio=1, learn_time_embedding=True, conditioning_embedding_out_channels=(2, 2)
    )
    return {"unet": unet, "controlnet": adapter}


VARIANTS = (
    OwnCase("StableDiffusionSAGPipeline", SD, inputs=lambda: {"sag_scale": 0.75}),
    OwnCase("StableDiffusionPanoramaPipeline", SD, inputs=lambda: {"height": 16, "width": 576}),  # two views
    OwnCase("StableDiffusionModelEditingPipeline", SD),
    OwnCase("StableDiffusionParadigmsPipeline", SD, lambda: {"scheduler": _parallel_scheduler()}),
    OwnCase("StableDiffusionPipelineSafe", SD, inputs=lambda: {"sld_warmup_steps": 1}),
    OwnCase(
        "SemanticStableDiffusionPipeline",
        SD,
        inputs=lambda: {"editing_prompt": ["snow"], "edit_warmup_steps": 1, "edit_threshold": 0.5},
    ),
    OwnCase(
        "StableDiffusionAttendAndExcitePipeline",
        SD,
        lambda: {"unet": sd_unet(32)},
        lambda: {"token_indices": [2, 5], "max_iter_to_alter": 2, "thresholds": {0: 0.5}, "attn_res": (16, 16)},
    ),
    OwnCase("StableDiffusionLDM3DPipeline", SD, lambda: {"vae": vae(channels=6)}, lambda: {"output_type": "np"}),
    OwnCase("StableDiffusionInpaintPipelineLegacy", SD_IMG2IMG, inputs=lambda: {"mask_image": mask()}),
    OwnCase(
        "CycleDiffusionPipeline",
        SD_IMG2IMG,
        lambda: {"scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)},
        lambda: {"source_prompt": "A fox", "eta": 0.1, "source_guidance_scale": 2.0},
    ),
    OwnCase(
        "StableDiffusionDiffEditPipeline",
        SD,
        _inverse_parts,
        lambda: {
            "mask_image": (numbers(1, 16, 16) > 0).float(),
            "image_latents": numbers(1, 3, 4, 16, 16),
            "inpaint_strength": 1.0,
            "num_inference_steps": 3,
        },
    ),
    OwnCase(
        "StableDiffusionPix2PixZeroPipeline",
        SD,
        _captioned_parts,
        lambda: {"source_embeds": numbers(2, 77, 8), "target_embeds": numbers(2, 77, 8, seed=1)},
    ),
    OwnCase(
        "StableDiffusionGLIGENPipeline",
        SD,
        lambda: {"unet": sd_unet(attention_type="gated")},
        lambda: {"gligen_phrases": ["a fox"], "gligen_boxes": [BOX], "gligen_scheduled_sampling_beta": 0.4},
    ),
    OwnCase(
        "StableDiffusionGLIGENTextImagePipeline",
        SD,
        _gligen_images_parts,
        lambda: {
            "gligen_phrases": ["a fox", "snow"],
            "gligen_images": [picture(), picture(seed=1)],
            "gligen_boxes": [BOX, (0.2, 0.3, 0.9, 0.8)],
        },
    ),
    OwnCase(
        "PaintByExamplePipeline",
        SD,
        _paint_by_example_parts,
        lambda: {"image": picture(), "mask_image": mask(), "example_image": picture(seed=1)},
    ),
    OwnCase("StableDiffusionUpscalePipeline", SD, _upscaler_parts, lambda: {"image": picture(16)}),
    OwnCase("StableDiffusionControlNetXSPipeline", SD, _controlnet_xs, lambda: {"image": numbers(1, 3, 32, 32)}),
    OwnCase("StableDiffusionXLControlNetXSPipeline", CONTROLNET_XL, _controlnet_xs_xl),
    OwnCase(
        "StableDiffusionXLControlNetUnionPipeline",
        CONTROLNET_XL,
        _control_union,
        lambda: {"control_image": picture(64), "control_mode": 0},
    ),
    OwnCase(
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        CONTROLNET_XL_IMG2IMG,
        _control_union,
        lambda: {"control_image": picture(64), "control_mode": 0},
    ),
    OwnCase(
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        CONTROLNET_XL_INPAINT,
        _control_union,
        lambda: {"control_image": picture(64), "control_mode": 0},
    ),
    OwnCase(
        "PIAPipeline", ANIMATEDIFF, lambda: {"unet": _animated_unet()}, lambda: {"image": picture(16), "num_frames": 4}
    ),
)
