"""Tiny random pipelines of image families beside Stable Diffusion: see `tiny_families`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    DDPMWuerstchenScheduler,
    Flux2KleinKVPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaSprintPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image

from family_parts import LATENT, MASKS, PROMPT, PROMPTS, STEPS, TEXT, WIDTH, Built, absent, attention, flow, size
from tiny_parts import noise, text_encoder, vae


def flux2_parts(guidance: bool) -> dict[str, Any]:
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **attention(),
        joint_attention_dim=WIDTH,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
        guidance_embeds=guidance,
    )
    coder = AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return {"transformer": transformer, "vae": coder.eval(), "scheduler": flow()} | absent(*TEXT)


def flux2() -> Built:
    return Flux2Pipeline(**flux2_parts(guidance=True)), LATENT | PROMPT | size(64) | {"guidance_scale": 3.0}


def flux2_klein_kv() -> Built:
    """Remembers a reference image's keys from the first step for the others."""
    image = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    return Flux2KleinKVPipeline(**flux2_parts(guidance=False)), LATENT | PROMPT | size(64) | {"image": image}


def qwen_image() -> Built:
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        **attention(),
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    pipe = QwenImagePipeline(transformer=transformer, scheduler=flow(), **absent("vae", *TEXT))
    masks = {f"{side}prompt_embeds_mask": torch.ones(2, 5, dtype=torch.long) for side in ("", "negative_")}
    return pipe, LATENT | PROMPTS | masks | size(64) | {"true_cfg_scale": 3.0}


def z_image() -> Built:
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 2, 2],
        axes_lens=[64, 16, 16],
    )
    with torch.no_grad():
        transformer.x_pad_token.fill_(0.5), transformer.cap_pad_token.fill_(-0.5)  # made by torch.empty
    pipe = ZImagePipeline(transformer=transformer, scheduler=flow(), **absent("vae", *TEXT))
    return pipe, LATENT | {name: [*rows] for name, rows in PROMPTS.items()} | size(64) | {"guidance_scale": 3.0}


def sana_parts(**config: Any) -> dict[str, Any]:
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        **attention(2, 4),
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=8,
        **config,
    )
    return {"transformer": transformer} | absent("vae", *TEXT)


def sana() -> Built:
    pipe = SanaPipeline(**sana_parts(), scheduler=flow())
    call = LATENT | PROMPTS | MASKS | size(128)
    return pipe, call | {"negative_prompt": None, "use_resolution_binning": False}


def sana_sprint() -> Built:
    """Two steps of a consistency model: its scheduler's timesteps are angles."""
    pipe = SanaSprintPipeline(
        **sana_parts(qk_norm="rms_norm_across_heads", guidance_embeds=True), scheduler=SCMScheduler()
    )
    mask = {"prompt_attention_mask": torch.ones(2, 5), "use_resolution_binning": False}
    return pipe, LATENT | PROMPT | mask | size(128) | {"num_inference_steps": 2}


def lumina2() -> Built:
    """Its denoiser is told 1 - t/T."""
    transformer = Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(32, 16, 16),
        cap_feat_dim=WIDTH,
    )
    pipe = Lumina2Pipeline(transformer=transformer, scheduler=flow(), **absent("vae", *TEXT))
    return pipe, LATENT | PROMPTS | MASKS | size(64) | {"guidance_scale": 3.0}


def chroma() -> Built:
    transformer = ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **attention(),
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    pipe = ChromaPipeline(transformer=transformer, scheduler=flow(), **absent("vae", *TEXT))
    return pipe, LATENT | PROMPTS | MASKS | size(64) | {"guidance_scale": 3.0}


def hidream() -> Built:
    """One of its prompt embeddings has the layers of the text model in front of the batch."""
    transformer = HiDreamImageTransformer2DModel(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        **attention(),
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(8, 8),
        llama_layers=(0, 1),
    )
    encoders = [f"{name}{number}" for name in TEXT for number in ("", "_2", "_3", "_4")]
    pipe = HiDreamImagePipeline(transformer=transformer, scheduler=flow(), **absent("vae", *encoders))
    pipe.default_sample_size = 8  # every size asked for is brought to this area
    embeddings = {}
    for k, side in enumerate(("", "negative_")):
        embeddings[f"{side}prompt_embeds_t5"] = noise(2, 5, WIDTH, seed=1 + k)
        embeddings[f"{side}prompt_embeds_llama3"] = noise(2, 2, 5, WIDTH, seed=3 + k)
        embeddings[f"{side}pooled_prompt_embeds"] = noise(2, WIDTH, seed=5 + k)
    return pipe, LATENT | embeddings | size(64) | {"guidance_scale": 3.0}


def bria() -> Built:
    transformer = BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        **attention(),
        joint_attention_dim=WIDTH,
        pooled_projection_dim=None,
        axes_dims_rope=[4, 2, 2],
    )
    pipe = BriaPipeline(transformer=transformer, scheduler=flow(), vae=vae(), **absent(*TEXT))
    return pipe, LATENT | PROMPTS | size(16) | {"guidance_scale": 3.0}


def cascade_prior() -> Built:
    prior = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        switch_level=(False,),
        clip_text_in_channels=WIDTH,
        clip_text_pooled_in_channels=WIDTH,
        clip_image_in_channels=8,
        clip_seq=1,
    )
    parts = {"text_encoder": text_encoder()} | absent("tokenizer", "image_encoder", "feature_extractor")
    pipe = StableCascadePriorPipeline(prior=prior, scheduler=DDPMWuerstchenScheduler(), **parts)
    pooled = {f"{side}prompt_embeds_pooled": noise(2, 1, WIDTH, seed=3 + k) for k, side in enumerate(("", "negative_"))}
    return pipe, PROMPTS | pooled | size(256) | {"guidance_scale": 3.0, "num_inference_steps": STEPS}


def cascade_decoder() -> Built:
    decoder = StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        timestep_ratio_embedding_dim=8,
        conditioning_dim=16,
        block_out_channels=(8, 16),
        num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        switch_level=None,
        clip_text_pooled_in_channels=WIDTH,
        clip_seq=1,
        effnet_in_channels=4,
        dropout=(0.0, 0.0),
    )
    parts = absent("vqgan", *TEXT)
    pipe = StableCascadeDecoderPipeline(
        decoder=decoder, scheduler=DDPMWuerstchenScheduler(), latent_dim_scale=4.0, **parts
    )
    pooled = {f"{side}prompt_embeds_pooled": noise(2, 1, WIDTH, seed=3 + k) for k, side in enumerate(("", "negative_"))}
    image = {"image_embeddings": noise(2, 4, 4, 4, seed=9), "guidance_scale": 3.0}
    return pipe, LATENT | PROMPTS | pooled | image
