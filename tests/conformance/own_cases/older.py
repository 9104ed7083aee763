"""Older families, each with parts of its own: Amused, UniDiffuser, Versatile Diffusion, BLIP-Diffusion, and others."""

from __future__ import annotations

from typing import Any

import transformers
from diffusers import (
    AmusedScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    PNDMScheduler,
    T5FilmDecoder,
    Transformer2DModel,
    UniDiffuserModel,
    UniDiffuserTextDecoder,
    UVit2DModel,
    VQDiffusionScheduler,
)

import stand_in_tokenizers as tokenizers

from .case import OwnCase
from .parts import (
    call,
    clip_image_processor,
    clip_text,
    clip_tokenizer,
    clip_vision,
    generator,
    mask,
    picture,
    vae,
    vq_model,
)
from .stable_diffusion import SD, SD_IMG2IMG, sd_unet

WIDTH = 8


def _amused() -> dict[str, Any]:
    vocabulary = 32
    return {
        "transformer": UVit2DModel(
            hidden_size=WIDTH,
            cond_embed_dim=WIDTH,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=WIDTH,
            vocab_size=vocabulary,
            codebook_size=vocabulary - 8,
            in_channels=WIDTH,
            block_out_channels=WIDTH,
            num_res_blocks=1,
            downsample=True,
            upsample=True,
            block_num_heads=1,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=16,
            sample_size=16,
        ),
        "vqvae": vq_model(latent_channels=8, num_vq_embeddings=vocabulary - 8, lookup_from_codebook=True),
        "text_encoder": clip_text(WIDTH, projected=True),
        "tokenizer": clip_tokenizer(),
        "scheduler": AmusedScheduler(mask_token_id=vocabulary - 1),
    }


def _vq_diffusion() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
        LearnedClassifierFreeSamplingEmbeddings,
    )

    classes = 12
    return {
        "transformer": Transformer2DModel(
            attention_bias=True,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            num_attention_heads=2,
            num_vector_embeds=classes + 1,
            num_embeds_ada_norm=100,
            norm_num_groups=2,
            sample_size=8,
            activation_fn="geglu-approximate",
        ),
        "vqvae": vq_model(latent_channels=4, num_vq_embeddings=classes, vq_embed_dim=4),
        "text_encoder": clip_text(WIDTH),
        "tokenizer": clip_tokenizer(),
        "scheduler": VQDiffusionScheduler(num_vec_classes=classes + 1),
        "learned_classifier_free_sampling_embeddings": LearnedClassifierFreeSamplingEmbeddings(learnable=False),
    }


def _unidiffuser() -> dict[str, Any]:
    return {
        "unet": UniDiffuserModel(
            text_dim=WIDTH,
            clip_img_dim=WIDTH,
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            norm_num_groups=2,
            sample_size=16,
            patch_size=2,
            activation_fn="gelu",
            num_embeds_ada_norm=1000,
            norm_type="layer_norm",
            use_patch_pos_embed=True,
            ff_final_dropout=True,
        ),
        "vae": vae(),
        "text_encoder": clip_text(WIDTH),
        "image_encoder": clip_vision(WIDTH, WIDTH),
        "clip_image_processor": clip_image_processor(),
        "clip_tokenizer": clip_tokenizer(),
        "text_decoder": UniDiffuserTextDecoder(
            prefix_length=77,
            prefix_inner_dim=WIDTH,
            vocab_size=1000,
            n_positions=128,
            n_embd=WIDTH,
            n_layer=1,
            n_head=2,
        ),
        "text_tokenizer": clip_tokenizer(),
        "scheduler": DPMSolverMultistepScheduler(),
    }


def _versatile(text: bool = True, image: bool = True) -> Any:
    """The parts of Versatile Diffusion, as far as a pipeline has them."""

    def parts() -> dict[str, Any]:
        from diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet import UNetFlatConditionModel

        made: dict[str, Any] = {"image_unet": sd_unet(block_out_channels=(8, 16)), "vae": vae()}
        made["scheduler"] = DDIMScheduler(clip_sample=False)
        if text:
            made["text_unet"] = UNetFlatConditionModel(
                sample_size=16,
                in_channels=4,
                out_channels=4,
                block_out_channels=(8, 16),
                layers_per_block=1,
                down_block_types=("DownBlockFlat", "CrossAttnDownBlockFlat"),
                up_block_types=("CrossAttnUpBlockFlat", "UpBlockFlat"),
                cross_attention_dim=WIDTH,
                attention_head_dim=2,
                norm_num_groups=2,
            )
            made |= {"text_encoder": clip_text(WIDTH, projected=True), "tokenizer": clip_tokenizer()}
        if image:
            encoder = clip_vision(WIDTH, WIDTH)
            made |= {"image_encoder": encoder, "image_feature_extractor": clip_image_processor()}
        return made

    return parts


def _alt() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
        RobertaSeriesConfig,
        RobertaSeriesModelWithTransformation,
    )

    config = RobertaSeriesConfig(
        hidden_size=16,
        project_dim=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=1000,
        max_position_embeddings=128,
    )
    encoder = RobertaSeriesModelWithTransformation(config).eval()
    return {"text_encoder": encoder, "tokenizer": tokenizers.roberta()}


def _blip(control: bool = False) -> Any:
    def parts() -> dict[str, Any]:
        from diffusers import ControlNetModel
        from diffusers.pipelines.deprecated.blip_diffusion.blip_image_processing import BlipImageProcessor
        from diffusers.pipelines.deprecated.blip_diffusion.modeling_blip2 import Blip2QFormerModel
        from diffusers.pipelines.deprecated.blip_diffusion.modeling_ctx_clip import ContextCLIPTextModel

        text = transformers.CLIPTextConfig(
            hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=1000
        )
        vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        former = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
        config = transformers.Blip2Config(
            vision_config={**vision, "image_size": 32, "patch_size": 8},
            qformer_config={**former, "vocab_size": 1000, "encoder_hidden_size": 8},
            num_query_tokens=16,
        )
        made = {
            "unet": sd_unet(),
            "vae": vae(),
            "text_encoder": ContextCLIPTextModel(text).eval(),
            "tokenizer": clip_tokenizer(),
            "qformer": Blip2QFormerModel(config).eval(),
            "image_processor": BlipImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3),
            "scheduler": PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=False),
        }
        if control:
            made["controlnet"] = ControlNetModel.from_unet(made["unet"])
        return made

    return parts


def _spectrograms() -> dict[str, Any]:
    from diffusers.pipelines.deprecated.spectrogram_diffusion.continuous_encoder import SpectrogramContEncoder
    from diffusers.pipelines.deprecated.spectrogram_diffusion.notes_encoder import SpectrogramNotesEncoder

    shape = {"dropout_rate": 0.0, "num_layers": 1, "num_heads": 2, "d_kv": 4, "d_ff": 8, "d_model": 8}
    encoder = {**shape, "feed_forward_proj": "gated-gelu"}
    return {
        "notes_encoder": SpectrogramNotesEncoder(max_length=32, vocab_size=64, **encoder),
        "continuous_encoder": SpectrogramContEncoder(input_dims=128, targets_context_length=256, **encoder),
        "decoder": T5FilmDecoder(input_dims=128, targets_length=256, max_decoder_noise_time=2e4, **shape),
        "scheduler": DDPMScheduler(),
        "melgan": None,
    }


def _subjects(**more: Any) -> dict[str, Any]:
    inputs = call(
        reference_image=picture(),
        source_subject_category="fox",
        target_subject_category="fox",
        height=32,
        width=32,
        **more,
    )
    return inputs


OLDER = (
    OwnCase("AmusedPipeline", components=_amused, inputs=lambda: call(height=32, width=32)),
    OwnCase("AmusedImg2ImgPipeline", components=_amused, inputs=lambda: call(image=picture(), strength=0.9)),
    OwnCase("AmusedInpaintPipeline", components=_amused, inputs=lambda: call(image=picture(), mask_image=mask())),
    OwnCase("VQDiffusionPipeline", components=_vq_diffusion, inputs=call),
    OwnCase("UniDiffuserPipeline", components=_unidiffuser, inputs=call),
    OwnCase("VersatileDiffusionTextToImagePipeline", components=_versatile(image=False), inputs=call),
    OwnCase(
        "VersatileDiffusionImageVariationPipeline",
        components=_versatile(text=False),
        inputs=lambda: call(image=picture()),
    ),
    OwnCase("VersatileDiffusionDualGuidedPipeline", components=_versatile(), inputs=lambda: call(image=picture())),
    OwnCase("AltDiffusionPipeline", SD, _alt),
    OwnCase("AltDiffusionImg2ImgPipeline", SD_IMG2IMG, lambda: _alt() | {"unet": sd_unet()}),
    OwnCase("BlipDiffusionPipeline", components=_blip(), inputs=_subjects),
    OwnCase(
        "BlipDiffusionControlNetPipeline",
        components=_blip(control=True),
        inputs=lambda: _subjects(condtioning_image=picture()),
        module="diffusers.pipelines.controlnet",
    ),
    OwnCase(
        "SpectrogramDiffusionPipeline",
        components=_spectrograms,
        inputs=lambda: {
            "input_tokens": [[*range(1, 33)]],
            "generator": generator(),
            "num_inference_steps": 3,
            "output_type": "mel",
        },
        module="diffusers.pipelines.deprecated.spectrogram_diffusion.pipeline_spectrogram_diffusion",
    ),
)
