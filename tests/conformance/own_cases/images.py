"""Transformers that draw pictures: siblings of those that diffusers tests, and families that it does not test."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLQwenImage21,
    BriaFibo2Transformer2DModel,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Transformer2DModel,
    LongCatImageTransformer2DModel,
    QwenImage21Transformer2DModel,
    ZImageControlNetModel,
)

import stand_in_models
import stand_in_tokenizers as tokenizers

from .case import OwnCase, Sibling
from .parts import again, call, mask, picture

CHROMA_IMG2IMG = Sibling("chroma.test_pipeline_chroma_img2img", "ChromaImg2ImgPipelineFastTests")
COGVIEW4 = Sibling("cogview4.test_cogview4", "CogView4PipelineFastTests")
HUNYUAN_IMAGE = Sibling("hunyuan_image_21.test_hunyuanimage", "HunyuanImagePipelineFastTests")
QWEN_CONTROLNET = Sibling("qwenimage.test_qwenimage_controlnet", "QwenImageControlNetPipelineTesterConfig")
QWEN_EDIT = Sibling("qwenimage.test_qwenimage_edit", "QwenImageEditPipelineTesterConfig")
Z_IMAGE = Sibling("z_image.test_z_image", "ZImagePipelineFastTests")


def _qwen_3_vl(layers: int, made: Any = transformers.Qwen3VLForConditionalGeneration) -> Any:
    """A tiny Qwen3-VL; some pipelines read its states at layers that they name by number, up to the 36th."""
    return stand_in_models.qwen3_vl(made, layers).eval()


def _flux_2_vae(latent_channels: int) -> Any:
    return AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def _fibo_2() -> dict[str, Any]:
    transformer = BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=48,
        injection_layer_ids=(1, 2, 3, 4, 5),
        perceiver_num_layers=1,
        min_num_gist_tokens=8,
        max_num_gist_tokens=16,
        gist_step=4,
        gist_min_text_len=8,
        gist_max_text_len=64,
        axes_dims=(4, 6, 6),
        axes_lens=(512, 32, 32),
    )
    return {
        "transformer": transformer,
        "vae": _flux_2_vae(4),
        "text_encoder": _qwen_3_vl(36),
        "processor": tokenizers.QwenProcessor(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _ernie() -> dict[str, Any]:
    """Its text encoder is a Mistral 3 of which the hidden states alone are read, as of this Llama."""
    return {
        "transformer": ErnieImageTransformer2DModel(
            hidden_size=32,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=64,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        "vae": _flux_2_vae(1),
        "text_encoder": stand_in_models.llama(transformers.LlamaForCausalLM).eval(),
        "tokenizer": tokenizers.llama(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def _ideogram() -> dict[str, Any]:
    def transformer() -> Any:
        return Ideogram4Transformer2DModel(
            in_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=32,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(4, 2, 2),
        )

    return {
        "transformer": transformer(),
        "unconditional_transformer": transformer(),
        "vae": _flux_2_vae(1),
        "text_encoder": _qwen_3_vl(36, transformers.Qwen3VLModel),
        "tokenizer": tokenizers.qwen(),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
    }


def _longcat() -> dict[str, Any]:
    return {
        "transformer": LongCatImageTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 6, 6],
        ),
        "vae": AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
            latent_channels=16,
            norm_num_groups=2,
            shift_factor=0.1,
        ),
        "text_processor": tokenizers.QwenProcessor(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _qwen_2_1() -> dict[str, Any]:
    channels = 4
    return {
        "transformer": QwenImage21Transformer2DModel(
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=channels,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * channels,
            latents_std=[1.0] * channels,
        ),
        "text_encoder": _qwen_3_vl(2),
        "processor": tokenizers.QwenProcessor(),
        "scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }


def _layered() -> dict[str, Any]:
    """An autoencoder of RGBA: the pipeline takes images of as many channels as latents for latents, so of eight."""
    theirs, channels = QWEN_EDIT.components(), 8
    transformer = again(
        theirs["transformer"], in_channels=32, out_channels=8, use_additional_t_cond=True, use_layer3d_rope=True
    )
    statistics = {"latents_mean": [0.0] * channels, "latents_std": [1.0] * channels}
    return {"transformer": transformer, "vae": again(theirs["vae"], input_channels=4, z_dim=channels, **statistics)}


def _inpainting_controlnet() -> dict[str, Any]:
    return {"controlnet": again(QWEN_CONTROLNET.components()["controlnet"], extra_condition_channels=4)}


def _refiner() -> dict[str, Any]:
    vae = AutoencoderKLHunyuanImageRefiner(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 8),
        layers_per_block=1,
    )
    settings = {
        "in_channels": 16,
        "out_channels": 8,
        "patch_size": (1, 1, 1),
        "rope_axes_dim": (4, 2, 2),
        "text_embed_2_dim": None,
    }
    return {"transformer": again(HUNYUAN_IMAGE.components()["transformer"], **settings), "vae": vae}


def _chroma() -> dict[str, Any]:
    """ChromaInpaintPipeline reads a setting that its transformer does not have."""
    transformer = CHROMA_IMG2IMG.components()["transformer"]
    transformer.register_to_config(guidance_embeds=False)
    return {"transformer": transformer}


def _cogview_4_control() -> dict[str, Any]:
    return {"transformer": again(COGVIEW4.components()["transformer"], in_channels=8, out_channels=4)}


def _filled(model: Any) -> Any:
    """Z-Image leaves what its padding tokens are to memory."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("pad_token"):
                weight.fill_(1.0)
    return model


def _z_image_controlnet(channels: int) -> Any:
    def parts() -> dict[str, Any]:
        controlnet = ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=channels,
            dim=32,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
        )
        return {"controlnet": controlnet}

    return parts


def _z_image_omni() -> dict[str, Any]:
    """Its images are encoded in bfloat16, whatever its autoencoder is in."""
    theirs = Z_IMAGE.components()
    transformer = again(theirs["transformer"], siglip_feat_dim=32)
    return {
        "vae": theirs["vae"].bfloat16(),
        "transformer": _filled(transformer),
        "siglip": transformers.Siglip2VisionModel(
            transformers.Siglip2VisionConfig(
                hidden_size=32,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_patches=256,
                patch_size=4,
            )
        ).eval(),
        "siglip_processor": transformers.Siglip2ImageProcessorPil(patch_size=4, max_num_patches=16),
    }


IMAGES = (
    OwnCase("BriaFibo2Pipeline", components=_fibo_2, inputs=lambda: call(height=16, width=16, guidance_scale=4.0)),
    OwnCase("ErnieImagePipeline", components=_ernie, inputs=lambda: call(height=16, width=16)),
    OwnCase(
        "Ideogram4Pipeline",
        components=_ideogram,
        inputs=lambda: call(height=16, width=16, guidance_schedule=None, guidance_scale=4.0, max_sequence_length=64),
    ),
    OwnCase(
        "LongCatImagePipeline",
        QWEN_EDIT,
        _longcat,
        lambda: call(height=16, width=16, enable_prompt_rewrite=False),
    ),
    OwnCase("LongCatImageEditPipeline", QWEN_EDIT, _longcat),
    OwnCase(
        "QwenImage21Pipeline",
        components=_qwen_2_1,
        inputs=lambda: call(height=64, width=64, negative_prompt="bad", true_cfg_scale=3.0),
    ),
    OwnCase(
        "QwenImageEditInpaintPipeline",
        QWEN_EDIT,
        inputs=lambda: {"mask_image": mask(), "image": picture(), "strength": 1.0, "true_cfg_scale": 2.0},
    ),
    OwnCase(
        "QwenImageControlNetInpaintPipeline",
        QWEN_CONTROLNET,
        _inpainting_controlnet,
        lambda: {"control_image": picture(), "control_mask": mask()},
    ),
    OwnCase("QwenImageLayeredPipeline", QWEN_EDIT, _layered, lambda: {"image": picture().convert("RGBA"), "layers": 2}),
    OwnCase("HunyuanImageRefinerPipeline", HUNYUAN_IMAGE, _refiner, lambda: {"image": picture(64)}),
    OwnCase("ChromaInpaintPipeline", CHROMA_IMG2IMG, _chroma, inputs=lambda: {"mask_image": mask()}),
    OwnCase("CogView4ControlPipeline", COGVIEW4, _cogview_4_control, lambda: {"control_image": picture(16)}),
    OwnCase("ZImageControlNetPipeline", Z_IMAGE, _z_image_controlnet(16), lambda: {"control_image": picture()}),
    OwnCase(
        "ZImageControlNetInpaintPipeline",
        Z_IMAGE,
        _z_image_controlnet(33),
        lambda: {"image": picture(seed=1), "mask_image": mask(), "control_image": picture()},
    ),
    OwnCase("ZImageOmniPipeline", Z_IMAGE, _z_image_omni, lambda: {"image": picture(64), "max_sequence_length": 256}),
)
