"""Tiny random pipelines of video and audio families: see `tiny_families`."""

from typing import Any

import torch
from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLTemporalDecoder,
    AutoencoderOobleck,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Transformer3DModel,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2ProjectionModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig, T5Config, T5EncoderModel

from family_parts import LATENT, MASKS, PROMPTS, TEXT, WIDTH, Built, absent, attention, flow, size
from tiny_parts import feature_extractor, image_encoder, noise, vae


def wan_transformer(model: type[nn.Module] = WanTransformer3DModel) -> nn.Module:
    return model(
        patch_size=(1, 2, 2),
        **attention(2, 12),
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    ).eval()


VIDEO = {"num_frames": 5, "guidance_scale": 3.0}


def wan_scheduler() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def wan() -> Built:
    parts = absent("transformer_2", "vae", *TEXT)
    pipe = WanPipeline(transformer=wan_transformer(), scheduler=wan_scheduler(), **parts)
    return pipe, LATENT | PROMPTS | VIDEO | size(32)


def wan22() -> Built:
    """Two denoisers, for high and for low noise."""
    both = {name: wan_transformer() for name in ("transformer", "transformer_2")}
    pipe = WanPipeline(**both, scheduler=wan_scheduler(), boundary_ratio=0.8, **absent("vae", *TEXT))
    return pipe, LATENT | PROMPTS | VIDEO | size(32) | {"num_inference_steps": 4}


def skyreels() -> Built:
    """Diffusion forcing: every latent frame is stepped by a copy of the scheduler."""
    transformer = wan_transformer(SkyReelsV2Transformer3DModel)
    parts = {"transformer": transformer, "scheduler": wan_scheduler()} | absent("vae", *TEXT)
    call = LATENT | PROMPTS | VIDEO | size(32) | {"prompt": None}
    return SkyReelsV2DiffusionForcingPipeline(**parts), call


def skyreels_in_turn() -> Built:
    """Every latent frame begins a step after the one before, so that they are at different times."""
    pipe, call = skyreels()
    return pipe, call | {"ar_step": 1, "causal_block_size": 1}


def hunyuan15() -> Built:
    """Guided by diffusers' own guider."""
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        **attention(),
        num_layers=1,
        num_refiner_layers=1,
        mlp_ratio=2.0,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=WIDTH,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(2, 2, 4),
        target_size=16,
    )
    coder = AutoencoderKLHunyuanVideo15(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    pipe = HunyuanVideo15Pipeline(
        transformer=transformer,
        vae=coder.eval(),
        scheduler=flow(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
        **absent("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    pipe.vision_num_semantic_tokens = 3
    glyphs = {f"{side}prompt_embeds_2": noise(2, 4, 8, seed=3 + k) for k, side in enumerate(("", "negative_"))}
    masks = {f"{side}prompt_embeds_mask": torch.ones(2, 5) for side in ("", "negative_")}
    masks |= {f"{side}prompt_embeds_mask_2": torch.ones(2, 4) for side in ("", "negative_")}
    return pipe, LATENT | PROMPTS | glyphs | masks | size(16) | {"num_frames": 3}


def cogvideox_transformer(**config: Any) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        out_channels=4,
        time_embed_dim=2,
        text_embed_dim=WIDTH,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
        **config,
    )


def cogvideox() -> Built:
    pipe = CogVideoXPipeline(
        transformer=cogvideox_transformer(in_channels=4, **attention()),
        scheduler=CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        **absent("vae", *TEXT),
    )
    return pipe, LATENT | PROMPTS | VIDEO | size(32)


def cogvideox_image() -> Built:
    rope = {"use_rotary_positional_embeddings": True, "use_learned_positional_embeddings": True}
    coder = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipe = CogVideoXImageToVideoPipeline(
        transformer=cogvideox_transformer(in_channels=8, **attention(1, 16), **rope),
        scheduler=CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        vae=coder.eval(),
        **absent(*TEXT),
    )
    return pipe, LATENT | PROMPTS | VIDEO | size(32) | {"image": noise(2, 3, 32, 32, seed=5).sigmoid()}


def cosmos() -> Built:
    """Takes two steps of its scheduler for one: to what is predicted with and without a prompt, then what is guided."""
    transformer = CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **attention(1, 16),
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,  # needs torchvision
        extra_pos_embed_type="learnable",
    )
    unchecked: Any = nn.Identity()
    unchecked.device, unchecked.dtype = torch.device("cpu"), torch.float32
    scheduler = EDMEulerScheduler(sigma_max=80, final_sigmas_type="sigma_min")
    parts = {"transformer": transformer, "scheduler": scheduler, "safety_checker": unchecked}
    pipe = CosmosTextToWorldPipeline(**parts, **absent("vae", *TEXT))
    return pipe, LATENT | PROMPTS | size(32) | {"num_frames": 9, "guidance_scale": 3.0}


def stable_video_diffusion() -> Built:
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=8,
        num_attention_heads=2,
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=12,
    )
    scheduler = EulerDiscreteScheduler(
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    coder = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1
    )
    parts = {"image_encoder": image_encoder(), "feature_extractor": feature_extractor()}
    pipe = StableVideoDiffusionPipeline(unet=unet, vae=coder.eval(), scheduler=scheduler, **parts)
    return pipe, LATENT | size(16) | {"image": noise(2, 3, 16, 16, seed=5).sigmoid(), "num_frames": 2}


# --- sound ------------------------------------------------------------------------------------------------------------


def ltx2() -> Built:
    """Video and audio, each with a copy of the scheduler; guided in three ways."""
    transformer = LTX2VideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        **attention(),
        cross_attention_dim=16,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=1,
        caption_channels=WIDTH,
        rope_double_precision=False,
        rope_type="split",
    )
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in connector.items()},
        connector_rope_base_seq_len=8,
        rope_double_precision=False,
        rope_type="split",
    )
    coder = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=4,
    )
    audio_coder = AutoencoderKLLTX2Audio(
        base_channels=4,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mid_block_add_attention=False,
        mel_bins=8,
    )
    pipe = LTX2Pipeline(
        transformer=transformer,
        connectors=connectors.eval(),
        vae=coder.eval(),
        audio_vae=audio_coder.eval(),
        scheduler=flow(),
        **absent("vocoder", *TEXT),
    )
    guidance = {"guidance_scale": 3.0, "audio_guidance_scale": 2.0, "spatio_temporal_guidance_blocks": [0]}
    return pipe, LATENT | PROMPTS | MASKS | size(32) | guidance | {"num_frames": 3, "frame_rate": 8.0}


def audioldm2() -> Built:
    unet = AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 8, WIDTH),) * 2,
        attention_head_dim=2,
    )
    t5 = T5EncoderModel(T5Config(vocab_size=8, d_model=WIDTH, d_ff=8, d_kv=8, num_heads=1, num_layers=1))
    language = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=8, bos_token_id=0, eos_token_id=1))
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8, upsample_initial_channel=4, upsample_rates=[2], upsample_kernel_sizes=[4]
    )
    pipe = AudioLDM2Pipeline(
        unet=unet,
        vae=vae(),
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        text_encoder_2=t5.eval(),
        language_model=language.eval(),
        projection_model=AudioLDM2ProjectionModel(8, 8, 8),
        vocoder=SpeechT5HifiGan(vocoder).eval(),
        **absent("text_encoder", "tokenizer", "tokenizer_2", "feature_extractor"),
    )
    embeddings = {}
    for k, side in enumerate(("", "negative_")):
        embeddings[f"{side}generated_prompt_embeds"] = noise(2, 3, 8, seed=3 + k)
        embeddings[f"{side}attention_mask"] = torch.ones(2, 5, dtype=torch.long)
    return pipe, LATENT | PROMPTS | embeddings | {"audio_length_in_s": 0.002, "guidance_scale": 3.0}


def stable_audio() -> Built:
    transformer = StableAudioDiTModel(
        sample_size=8,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        out_channels=4,
        cross_attention_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
        cross_attention_input_dim=8,
    )
    coder = AutoencoderOobleck(
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    pipe = StableAudioPipeline(
        transformer=transformer,
        vae=coder.eval(),
        scheduler=EDMDPMSolverMultistepScheduler(sigma_data=1.0, prediction_type="v_prediction"),
        projection_model=StableAudioProjectionModel(WIDTH, 8, 0, 32),
        **absent(*TEXT),
    )
    return pipe, LATENT | PROMPTS | {"audio_end_in_s": 4.0, "guidance_scale": 3.0}
