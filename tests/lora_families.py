"""Tiny pipelines of the families that people train LoRAs for, and how the published code of each names its layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tiny import make, seeded

Names = dict[str, list[str]]
"""A layer by its published name, and the layers of diffusers that it is made of, in the order of its rows."""


@dataclass(frozen=True)
class Family:
    """One kind of model."""

    make: Callable[[], Any]
    """The pipeline, without text encoders where it can do without."""
    published: Names = field(default_factory=dict)
    """Empty where the published names are diffusers' own, or no trainer uses others."""
    norms: dict[str, str] = field(default_factory=dict)
    """Norms by their published names."""
    own: tuple[str, ...] = ()
    """Layers by diffusers' names, where there are no published ones; else those of `published`."""
    swapped: tuple[str, ...] = ()
    """Published layers whose halves diffusers swaps."""

    @property
    def layers(self) -> list[str]:
        """diffusers' names of what the LoRA of the tests changes."""
        return [path for paths in self.published.values() for path in paths] or list(self.own)


class NoVae(nn.Module):
    """What a pipeline asks of a VAE that is never used."""

    config = SimpleNamespace(latent_channels=4)
    temporal_compression_ratio, spatial_compression_ratio = 4, 16


def pipeline_of(
    name: str, model: str, component: str = "transformer", vae: Any = None, **config: Any
) -> Callable[[], Any]:
    """Makes a pipeline of that class around a denoiser of that class."""

    def made() -> Any:
        cls = getattr(diffusers, name)
        with seeded(0):
            denoiser: nn.Module = getattr(diffusers, model)(**config).eval()
        parts = dict.fromkeys(cls._get_signature_types())
        return cls(**parts | {component: denoiser, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler()})

    return made


def tiny_of(kind: str) -> Callable[[], Any]:
    """A pipeline of `tiny.make`."""
    return lambda: make(kind)[0]


def three(block: str, names: str = "to_q to_k to_v") -> list[str]:
    """Queries, keys and values."""
    return [f"{block}.{name}" for name in names.split()]


ADDED = "add_q_proj add_k_proj add_v_proj"
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
SGM_ATTENTION = "down_blocks.1.attentions.0.transformer_blocks.0"

FLUX: Names = {
    "double_blocks.0.img_attn.qkv": three(f"{DOUBLE}.attn"),
    "double_blocks.0.txt_attn.qkv": three(f"{DOUBLE}.attn", ADDED),
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.0.txt_mlp.2": [f"{DOUBLE}.ff_context.net.2"],
    "single_blocks.0.linear1": [*three(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"],
    "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
}
FLUX_NORMS = {
    "double_blocks.0.img_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_q",
    "single_blocks.0.norm.key_norm.scale": f"{SINGLE}.attn.norm_k",
}
WAN: Names = {
    "blocks.0.self_attn.q": ["blocks.0.attn1.to_q"],
    "blocks.0.self_attn.o": ["blocks.0.attn1.to_out.0"],
    "blocks.0.cross_attn.k": ["blocks.0.attn2.to_k"],
    "blocks.0.ffn.0": ["blocks.0.ffn.net.0.proj"],
    "blocks.0.ffn.2": ["blocks.0.ffn.net.2"],
}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}

FAMILIES: dict[str, Family] = {
    "SD": Family(
        tiny_of("sd"),
        {
            "input_blocks.1.1.transformer_blocks.0.attn1.to_q": [
                "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
            ],
            "middle_block.1.transformer_blocks.0.ff.net.0.proj": [
                "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"
            ],
            "input_blocks.1.0.in_layers.2": ["down_blocks.0.resnets.0.conv1"],
        },
        {"input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1"},
    ),
    "SDXL": Family(
        tiny_of("sdxl"),
        {
            "input_blocks.3.1.transformer_blocks.0.attn1.to_q": [f"{SGM_ATTENTION}.attn1.to_q"],
            "input_blocks.3.1.proj_in": ["down_blocks.1.attentions.0.proj_in"],
            "middle_block.1.transformer_blocks.0.ff.net.2": ["mid_block.attentions.0.transformer_blocks.0.ff.net.2"],
            "output_blocks.1.1.transformer_blocks.0.attn2.to_k": [
                "up_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k"
            ],
            "input_blocks.1.0.in_layers.2": ["down_blocks.0.resnets.0.conv1"],
            "input_blocks.2.0.op": ["down_blocks.0.downsamplers.0.conv"],
            "label_emb.0.0": ["add_embedding.linear_1"],
        },
        {"input_blocks.1.0.in_layers.0": "down_blocks.0.resnets.0.norm1"},
    ),
    "SD3": Family(
        tiny_of("sd3"),
        {
            "joint_blocks.0.x_block.attn.qkv": three(f"{DOUBLE}.attn"),
            "joint_blocks.0.context_block.attn.qkv": three(f"{DOUBLE}.attn", ADDED),
            "joint_blocks.0.x_block.attn.proj": [f"{DOUBLE}.attn.to_out.0"],
            "joint_blocks.0.x_block.mlp.fc1": [f"{DOUBLE}.ff.net.0.proj"],
            "joint_blocks.1.context_block.adaLN_modulation.1": ["transformer_blocks.1.norm1_context.linear"],
        },
        swapped=("joint_blocks.1.context_block.adaLN_modulation.1",),
    ),
    "Flux": Family(
        tiny_of("flux"),
        FLUX | {"final_layer.adaLN_modulation.1": ["norm_out.linear"], "img_in": ["x_embedder"]},
        FLUX_NORMS,
        swapped=("final_layer.adaLN_modulation.1",),
    ),
    "Flux.2": Family(
        pipeline_of(
            "Flux2KleinPipeline",
            "Flux2Transformer2DModel",
            in_channels=16,
            num_single_layers=1,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4, 4),
            **HEADS,
        ),
        {
            "double_blocks.0.img_attn.qkv": three(f"{DOUBLE}.attn"),
            "double_blocks.0.txt_attn.qkv": three(f"{DOUBLE}.attn", ADDED),
            "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
            "double_blocks.0.img_mlp.0": [f"{DOUBLE}.ff.linear_in"],
            "single_blocks.0.linear1": [f"{SINGLE}.attn.to_qkv_mlp_proj"],
            "single_blocks.0.linear2": [f"{SINGLE}.attn.to_out"],
        },
        {"double_blocks.0.img_attn.norm.query_norm.scale": f"{DOUBLE}.attn.norm_q"},
    ),
    "Chroma": Family(
        pipeline_of(
            "ChromaPipeline",
            "ChromaTransformer2DModel",
            in_channels=16,
            num_single_layers=1,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
            **HEADS,
        ),
        FLUX,
        FLUX_NORMS,
    ),
    "Qwen-Image": Family(
        pipeline_of(
            "QwenImagePipeline",
            "QwenImageTransformer2DModel",
            in_channels=16,
            out_channels=4,
            joint_attention_dim=16,
            axes_dims_rope=(4, 4, 4),
            **HEADS,
        ),
        norms={"transformer_blocks.0.attn.norm_q": "transformer_blocks.0.attn.norm_q"},
        own=(f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_out.0", f"{DOUBLE}.img_mlp.net.0.proj", f"{DOUBLE}.img_mod.1"),
    ),
    "Z-Image": Family(
        pipeline_of(
            "ZImagePipeline",
            "ZImageTransformer2DModel",
            in_channels=4,
            dim=24,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[4, 4, 4],
            axes_lens=[16, 16, 16],
        ),
        {
            "layers.0.attention.qkv": three("layers.0.attention"),
            "layers.0.attention.out": ["layers.0.attention.to_out.0"],
            "layers.0.feed_forward.w1": ["layers.0.feed_forward.w1"],
        },
        {"layers.0.attention.q_norm": "layers.0.attention.norm_q"},
    ),
    "Lumina2": Family(
        pipeline_of(
            "Lumina2Pipeline",
            "Lumina2Transformer2DModel",
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=4,
            num_kv_heads=2,
            multiple_of=8,
            axes_dim_rope=(2, 2, 2),
            axes_lens=(16, 16, 16),
            cap_feat_dim=16,
        ),
        {
            "layers.0.attention.qkv": three("layers.0.attn"),
            "layers.0.attention.out": ["layers.0.attn.to_out.0"],
            "layers.0.feed_forward.w1": ["layers.0.feed_forward.linear_1"],
            "layers.0.adaLN_modulation.1": ["layers.0.norm1.linear"],
        },
        {"layers.0.attention.q_norm": "layers.0.attn.norm_q"},
    ),
    "Sana": Family(
        pipeline_of(
            "SanaPipeline",
            "SanaTransformer2DModel",
            in_channels=4,
            out_channels=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            **HEADS,
        ),
        {
            "blocks.0.attn.qkv": three(f"{DOUBLE}.attn1"),
            "blocks.0.attn.proj": [f"{DOUBLE}.attn1.to_out.0"],
            "blocks.0.cross_attn.q_linear": [f"{DOUBLE}.attn2.to_q"],
            "blocks.0.cross_attn.kv_linear": [f"{DOUBLE}.attn2.to_k", f"{DOUBLE}.attn2.to_v"],
        },
    ),
    "HiDream": Family(
        pipeline_of(
            "HiDreamImagePipeline",
            "HiDreamImageTransformer2DModel",
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_single_layers=1,
            caption_channels=[16, 16],
            text_emb_dim=16,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0],
            **HEADS,
        ),
        own=("double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.0.block.attn1.to_out"),
    ),
    "Wan": Family(
        pipeline_of(
            "WanPipeline",
            "WanTransformer3DModel",
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=32,
            ffn_dim=32,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            **HEADS,
        ),
        WAN,
        {"blocks.0.norm3": "blocks.0.norm2", "blocks.0.self_attn.norm_q": "blocks.0.attn1.norm_q"},
    ),
    "LTX-2": Family(
        pipeline_of(
            "LTX2Pipeline",
            "LTX2VideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            cross_attention_dim=24,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=6,
            audio_cross_attention_dim=12,
            caption_channels=16,
            **HEADS,
        ),
        {
            "transformer_blocks.0.attn1.to_q": [f"{DOUBLE}.attn1.to_q"],
            "transformer_blocks.0.audio_attn2.to_k": [f"{DOUBLE}.audio_attn2.to_k"],
            "patchify_proj": ["proj_in"],
            "adaln_single.linear": ["time_embed.linear"],
        },
        {"transformer_blocks.0.attn1.q_norm": f"{DOUBLE}.attn1.norm_q"},
    ),
    "HunyuanVideo": Family(
        pipeline_of(
            "HunyuanVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            in_channels=4,
            out_channels=4,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 4),
            **HEADS,
        ),
        {
            "double_blocks.0.img_attn_qkv": three(f"{DOUBLE}.attn"),
            "double_blocks.0.txt_attn_proj": [f"{DOUBLE}.attn.to_add_out"],
            "double_blocks.0.img_mlp.fc1": [f"{DOUBLE}.ff.net.0.proj"],
            "single_blocks.0.linear1": [*three(f"{SINGLE}.attn"), f"{SINGLE}.proj_mlp"],
            "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
        },
        {"double_blocks.0.img_attn_q_norm": f"{DOUBLE}.attn.norm_q"},
    ),
    "HunyuanVideo 1.5": Family(
        pipeline_of(
            "HunyuanVideo15Pipeline",
            "HunyuanVideo15Transformer3DModel",
            in_channels=4,
            out_channels=4,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=16,
            image_embed_dim=16,
            rope_axes_dim=(4, 4, 4),
            vae=NoVae(),
            **HEADS,
        ),
        {
            "double_blocks.0.img_attn_q": [f"{DOUBLE}.attn.to_q"],
            "double_blocks.0.img_attn_proj": [f"{DOUBLE}.attn.to_out.0"],
            "double_blocks.0.txt_mlp.fc2": [f"{DOUBLE}.ff_context.net.2"],
        },
    ),
    "CogVideoX": Family(
        pipeline_of(
            "CogVideoXPipeline",
            "CogVideoXTransformer3DModel",
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=5,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
        ),
        own=("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"),
    ),
    "AudioLDM2": Family(
        pipeline_of(
            "AudioLDM2Pipeline",
            "AudioLDM2UNet2DConditionModel",
            "unet",
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=([None, 16], [None, 16]),
        ),
        own=("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"),
    ),
    "Stable Audio": Family(
        pipeline_of(
            "StableAudioPipeline",
            "StableAudioDiTModel",
            sample_size=8,
            in_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=16,
        ),
        own=("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"),
    ),
}
