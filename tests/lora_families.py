"""Tiny pipelines of the families that people train LoRAs for, and how the published code of each names its layers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from tiny import seeded
from tiny_families import built

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


def hunyuan_video() -> Any:
    """A pipeline of the first HunyuanVideo, of which nothing but its denoiser is asked."""
    with seeded(0):
        denoiser = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            attention_head_dim=12,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 4, 4),
        ).eval()
    parts = dict.fromkeys(HunyuanVideoPipeline._get_signature_types())
    return HunyuanVideoPipeline(**parts | {"transformer": denoiser, "scheduler": FlowMatchEulerDiscreteScheduler()})


def tiny_of(kind: str) -> Callable[[], Any]:
    """A pipeline of `tiny` or `tiny_families`."""
    return lambda: built(kind)[0]


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
        tiny_of("flux2"),
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
        tiny_of("chroma"),
        FLUX,
        FLUX_NORMS,
    ),
    "Qwen-Image": Family(
        tiny_of("qwen_image"),
        norms={"transformer_blocks.0.attn.norm_q": "transformer_blocks.0.attn.norm_q"},
        own=(f"{DOUBLE}.attn.to_q", f"{DOUBLE}.attn.to_out.0", f"{DOUBLE}.img_mlp.net.0.proj", f"{DOUBLE}.img_mod.1"),
    ),
    "Z-Image": Family(
        tiny_of("z_image"),
        {
            "layers.0.attention.qkv": three("layers.0.attention"),
            "layers.0.attention.out": ["layers.0.attention.to_out.0"],
            "layers.0.feed_forward.w1": ["layers.0.feed_forward.w1"],
        },
        {"layers.0.attention.q_norm": "layers.0.attention.norm_q"},
    ),
    "Lumina2": Family(
        tiny_of("lumina2"),
        {
            "layers.0.attention.qkv": three("layers.0.attn"),
            "layers.0.attention.out": ["layers.0.attn.to_out.0"],
            "layers.0.feed_forward.w1": ["layers.0.feed_forward.linear_1"],
            "layers.0.adaLN_modulation.1": ["layers.0.norm1.linear"],
        },
        {"layers.0.attention.q_norm": "layers.0.attn.norm_q"},
    ),
    "Sana": Family(
        tiny_of("sana"),
        {
            "blocks.0.attn.qkv": three(f"{DOUBLE}.attn1"),
            "blocks.0.attn.proj": [f"{DOUBLE}.attn1.to_out.0"],
            "blocks.0.cross_attn.q_linear": [f"{DOUBLE}.attn2.to_q"],
            "blocks.0.cross_attn.kv_linear": [f"{DOUBLE}.attn2.to_k", f"{DOUBLE}.attn2.to_v"],
        },
    ),
    "HiDream": Family(
        tiny_of("hidream"),
        own=("double_stream_blocks.0.block.attn1.to_q", "single_stream_blocks.0.block.attn1.to_out"),
    ),
    "Wan": Family(
        tiny_of("wan"),
        WAN,
        {"blocks.0.norm3": "blocks.0.norm2", "blocks.0.self_attn.norm_q": "blocks.0.attn1.norm_q"},
    ),
    "LTX-2": Family(
        tiny_of("ltx2"),
        {
            "transformer_blocks.0.attn1.to_q": [f"{DOUBLE}.attn1.to_q"],
            "transformer_blocks.0.audio_attn2.to_k": [f"{DOUBLE}.audio_attn2.to_k"],
            "patchify_proj": ["proj_in"],
            "adaln_single.linear": ["time_embed.linear"],
        },
        {"transformer_blocks.0.attn1.q_norm": f"{DOUBLE}.attn1.norm_q"},
    ),
    "HunyuanVideo": Family(
        hunyuan_video,
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
        tiny_of("hunyuan15"),
        {
            "double_blocks.0.img_attn_q": [f"{DOUBLE}.attn.to_q"],
            "double_blocks.0.img_attn_proj": [f"{DOUBLE}.attn.to_out.0"],
            "double_blocks.0.txt_mlp.fc2": [f"{DOUBLE}.ff_context.net.2"],
        },
    ),
    "CogVideoX": Family(
        tiny_of("cogvideox"),
        own=("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"),
    ),
    "AudioLDM2": Family(
        tiny_of("audioldm2"),
        own=("mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"),
    ),
    "Stable Audio": Family(
        tiny_of("stable_audio"),
        own=("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"),
    ),
}
