"""Pipelines that draw videos."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from diffusers import (
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosScheduler,
    I2VGenXLUNet,
    Kandinsky6SRTransformer3DModel,
    Kandinsky6SRVAE,
    Kandinsky6Transformer3DModel,
    LTXEulerAncestralRFScheduler,
    MMAudioVAE,
    MMAudioVocoder,
    SanaWMTransformer3DModel,
    UNet3DConditionModel,
)
from diffusers.models.transformers.transformer_sana_wm_refiner import SanaWMLTX2RefinerTransformer3DModel

from .case import OwnCase, Sibling
from .parts import again, clip_image_processor, clip_vision, numbers, picture, vae, without_prompt
from .stable_diffusion import SD

EASY_ANIMATE = Sibling("easyanimate.test_easyanimate", "EasyAnimatePipelineFastTests")
HELIOS = Sibling("helios.test_helios", "HeliosPipelineFastTests")
HUNYUAN_VIDEO_15 = Sibling("hunyuan_video1_5.test_hunyuan_1_5", "HunyuanVideo15PipelineFastTests")
KANDINSKY_5_I2V = Sibling("kandinsky5.test_kandinsky5_i2v", "Kandinsky5I2VPipelineFastTests")
LTX = Sibling("ltx.test_ltx", "LTXPipelineFastTests")
LTX_2 = Sibling("ltx2.test_ltx2", "LTX2PipelineFastTests")
SDXL = Sibling("stable_diffusion_xl.test_stable_diffusion_xl", "StableDiffusionXLPipelineFastTests")
WAN_V2V = Sibling("wan.test_wan_video_to_video", "WanVideoToVideoPipelineTesterConfig")


def _unet_3d(**settings: Any) -> Any:
    return UNet3DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )


def _i2vgen() -> dict[str, Any]:
    unet = I2VGenXLUNet(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    return {
        "unet": unet,
        "image_encoder": clip_vision(8, 8),
        "feature_extractor": clip_image_processor(),
        "vae": vae(sample_size=16),
        "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
    }


def _hunyuan_i2v() -> dict[str, Any]:
    """Siglip's 729 tokens, of pictures of 27 by 27."""
    config = transformers.SiglipVisionConfig(
        hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=27, patch_size=1
    )
    return {
        "transformer": again(HUNYUAN_VIDEO_15.components()["transformer"], task_type="i2v"),
        "image_encoder": transformers.SiglipVisionModel(config).eval(),
        "feature_extractor": transformers.SiglipImageProcessorPil(size={"height": 27, "width": 27}),
    }


def _easy_animate(in_channels: int) -> Any:
    """The inpainting pipeline reads a setting that its autoencoder does not have."""

    def parts() -> dict[str, Any]:
        theirs = EASY_ANIMATE.components()
        theirs["vae"].register_to_config(cache_mag_vae=False)
        settings = {"in_channels": in_channels, "resize_inpaint_mask_directly": True}
        return {"transformer": again(theirs["transformer"], **settings), "vae": theirs["vae"]}

    return parts


def _keyframes() -> dict[str, Any]:
    return {"transformer": again(LTX_2.components()["transformer"], use_keyframes_abs_pos_embedding=True)}


def _refining() -> dict[str, Any]:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    upsampler = LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )
    return _keyframes() | {
        "scheduler": LTXEulerAncestralRFScheduler(eta=0.5),
        "temporal_latent_upsampler": upsampler,
    }


def _sana_wm() -> dict[str, Any]:
    """A transformer for latents of the sibling's autoencoder, which halves time."""
    transformer = SanaWMTransformer3DModel(
        in_channels=4,
        num_layers=2,
        hidden_size=48,
        num_attention_heads=2,
        softmax_every_n=2,
        linear_head_dim=24,
        chunk_plucker_channels=12,
        chunk_plucker_post_attn_blocks=2,
        caption_channels=32,
    )
    return {"transformer": transformer}


def _sana_wm_refiner() -> dict[str, Any]:
    settings = dict(LTX_2.components()["transformer"].config)
    settings.pop("_use_default_values", None)
    return {"transformer": SanaWMLTX2RefinerTransformer3DModel.from_config(settings), "text_max_sequence_length": 16}


def _kandinsky_6() -> dict[str, Any]:
    sound = {"hidden_channels": 32, "channel_multipliers": (1, 1, 1), "layers_per_block": 1, "mel_bins": 8}
    transformer = Kandinsky6Transformer3DModel(
        in_text_dim=32,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(1, 1, 2),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    return {
        "transformer": transformer,
        "audio_vae": MMAudioVAE(latent_channels=4, **sound),
        "vocoder": MMAudioVocoder(num_mels=8, upsample_initial_channel=64),
    }


def _kandinsky_6_upscaler() -> dict[str, Any]:
    return {
        "transformer": Kandinsky6SRTransformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=16,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            tile_sizes=((128, 128),),
        ),
        "vae": Kandinsky6SRVAE(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


VIDEOS = (
    OwnCase("TextToVideoSDPipeline", SD, lambda: {"unet": _unet_3d()}, lambda: {"num_frames": 3, "output_type": "np"}),
    OwnCase(
        "VideoToVideoSDPipeline",
        SD,
        lambda: {"unet": _unet_3d()},
        lambda: {"video": [picture(seed=seed) for seed in range(3)], "strength": 1.0, "output_type": "np"},
    ),
    OwnCase(
        "TextToVideoZeroPipeline",
        SD,
        lambda: {"scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)},
        lambda: {"video_length": 3, "t0": 1, "t1": 2, "num_inference_steps": 4},
    ),
    OwnCase(
        "TextToVideoZeroSDXLPipeline",
        SDXL,
        inputs=lambda: {"video_length": 3, "t0": 1, "t1": 2, "num_inference_steps": 4},
    ),
    OwnCase(
        "I2VGenXLPipeline",
        SD,
        _i2vgen,
        # Its default for clip_skip reads a part of the text encoder that transformers 5 has no more.
        lambda: {"image": picture(), "height": 32, "width": 32, "num_frames": 3, "target_fps": 8, "clip_skip": None},
    ),
    OwnCase("HunyuanVideo15ImageToVideoPipeline", HUNYUAN_VIDEO_15, _hunyuan_i2v, lambda: {"image": picture(16)}),
    OwnCase(
        "HeliosPyramidPipeline",
        HELIOS,
        # At its default γ = ⅓ the covariance of the noise of a block is singular.
        lambda: {"scheduler": HeliosScheduler(stages=2, stage_range=[0, 0.5, 1], gamma=0.3, use_dynamic_shifting=True)},
        lambda: {"pyramid_num_inference_steps_list": [2, 2], "height": 32, "width": 32, "guidance_scale": 3.0},
    ),
    OwnCase(
        "LucyEditPipeline", WAN_V2V, lambda: {"transformer": again(WAN_V2V.components()["transformer"], in_channels=32)}
    ),
    OwnCase(
        "EasyAnimateControlPipeline",
        EASY_ANIMATE,
        _easy_animate(12),
        lambda: {"control_video": numbers(1, 3, 5, 16, 16).clamp(-1, 1)},
    ),
    OwnCase(
        "EasyAnimateInpaintPipeline",
        EASY_ANIMATE,
        _easy_animate(9),
        lambda: {"video": numbers(1, 3, 5, 16, 16).sigmoid(), "mask_video": (numbers(1, 1, 5, 16, 16) > 0) * 255.0},
    ),
    OwnCase(
        "LTXI2VLongMultiPromptPipeline",
        LTX,
        inputs=lambda: {"cond_image": picture(), "num_frames": 17, "temporal_tile_size": 16, "temporal_overlap": 8},
    ),
    OwnCase("LTX2DFRPipeline", LTX_2, _keyframes, lambda: {"num_frames": 9, "sigmas": [1.0, 0.7, 0.4]}),
    OwnCase(
        "LTX2DFRTemporalRefinePipeline",
        LTX_2,
        _refining,
        lambda: {
            "num_frames": 9,
            "latents": numbers(1, 4, 5, 16, 16),
            "keyframes_latents": numbers(1, 4, 1, 16, 16, seed=1),
            "keyframe_positions": [8],
            "audio_latents": numbers(1, 2, 9, 2, seed=2),
            "sigmas": [0.9, 0.7, 0.4],
        },
    ),
    OwnCase(
        "SanaWMPipeline",
        LTX_2,
        _sana_wm,
        lambda: {
            "image": picture(32),
            "c2w": np.broadcast_to(np.eye(4, dtype=np.float32), (5, 4, 4)).copy(),
            "intrinsics": [30.0, 30.0, 16.0, 16.0],
            "guidance_scale": 3.0,
            "chi_prompt": ["Enhance:"],
            "output_type": "np",
        },
    ),
    OwnCase(
        "SanaWMLTX2Refiner",
        LTX_2,
        _sana_wm_refiner,
        lambda: {
            "sana_latent": numbers(1, 4, 5, 2, 2),
            "fps": 8.0,
            "block_size": 2,
            "kv_max_frames": 3,
            "sigmas": (0.9, 0.6, 0.3, 0.0),
            "output_type": "latent",
        },
    ),
    OwnCase("Kandinsky6TI2VAPipeline", KANDINSKY_5_I2V, _kandinsky_6, lambda: {"num_frames": 5, "frame_rate": 8.0}),
    OwnCase(
        "Kandinsky6SRPipeline",
        components=_kandinsky_6_upscaler,
        inputs=lambda: without_prompt(video=[picture(64, seed=seed) for seed in range(5)], resolution_scale=2),
    ),
)
