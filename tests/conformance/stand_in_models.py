"""Tiny random models in the places of those that the tests would download, by the names of their classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

T5_SIZES: dict[str, Any] = {
    "vocab_size": 1103,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 37,
    "num_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
}
SMALL_TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def t5_config() -> Any:
    return transformers.T5Config(**T5_SIZES, dropout_rate=0.1, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)


def bert(make: Any) -> Any:
    return make(
        transformers.BertConfig(
            vocab_size=1124,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            max_position_embeddings=512,
        )
    )


def llama(make: Any) -> Any:
    return make(
        transformers.LlamaConfig(
            vocab_size=1000,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=32,
        )
    )


def siglip(make: Any) -> Any:
    return make(
        transformers.SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=30,
            patch_size=2,
        )
    )


def chatglm(make: Any) -> Any:
    """Kolors' text encoder, whose own initialisation leaves memory as it finds it."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    model = make(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=64,
            hidden_size=8,
            ffn_hidden_size=16,
            kv_channels=4,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=False,
            add_qkv_bias=True,
            rmsnorm=True,
            layernorm_epsilon=1e-5,
            original_rope=True,
            apply_residual_connection_post_layernorm=False,
            post_layer_norm=True,
            add_bias_linear=False,
            bias_dropout_fusion=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            apply_query_key_layer_scaling=True,
            attention_softmax_in_fp32=True,
            fp32_residual_connection=False,
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name and weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0, 0.2)
    return model


def gemma3(make: Any) -> Any:
    text = SMALL_TEXT | {"vocab_size": 1200, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text | {"pad_token_id": 0}, vision_config=vision, mm_tokens_per_image=4
    )
    return make(config).eval()


def qwen3_vl(make: Any, layers: int = 2) -> Any:
    rope = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}, "rope_theta": 1e6}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
        "deepstack_visual_indexes": [0],
        "patch_size": 14,
    }
    text = SMALL_TEXT | rope | {"vocab_size": 152064, "head_dim": 8, "pad_token_id": 0, "num_hidden_layers": layers}
    return make(transformers.Qwen3VLConfig(text_config=text, vision_config=vision))


def qwen2_vl(make: Any) -> Any:
    scaling = {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}
    text = SMALL_TEXT | {"vocab_size": 152064, "rope_scaling": scaling, "rope_theta": 1e6}
    vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 16}
    return make(transformers.Qwen2VLConfig(text_config=text, vision_config=vision))


def consistency_unet(make: Any, subfolder: str) -> Any:
    """The UNet of the tests of consistency models."""
    return make(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        num_class_embeds=10 if "cond" in subfolder else None,
    )


MODELS: dict[str, Callable[[Any], Any]] = {
    "T5EncoderModel": lambda make: make(t5_config()),
    "UMT5EncoderModel": lambda make: make(transformers.UMT5Config(**T5_SIZES)),
    "BertModel": bert,
    "LlamaForCausalLM": llama,
    "SiglipVisionModel": siglip,
    "ChatGLMModel": chatglm,
    "Gemma3ForConditionalGeneration": gemma3,
    "Qwen3VLForConditionalGeneration": qwen3_vl,
    "Qwen2VLForConditionalGeneration": qwen2_vl,
}
"""By the class's name, what is made with the class."""
