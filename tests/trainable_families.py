"""Tiny random pipelines that can be aligned: those of `tiny_families`, with text encoders, tokenizers and a VAE.

`trainable(family)` gives a pipeline and the side of its pictures in pixels. Tokens are letters or words, so that
nothing is downloaded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

from family_parts import WIDTH, flow
from tiny import KINDS, seeded
from tiny_image_families import chroma, flux2_parts, lumina2, qwen_image, sana, z_image
from tiny_parts import text_encoder, tokenizer, vae
from tiny_video_families import wan

SMALL: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
WORDS = ("a", "an", "the", "two", "red", "blue", "green", "fox", "owl", "owls", "cat", "dog", "in", "on", "snow")
LETTERS = [chr(code) for code in range(32, 127)]
BY_LETTER = pre_tokenizers.Split(pattern="", behavior="isolated")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def t5(config: type[Any] = transformers.T5Config, model: type[Any] = transformers.T5EncoderModel) -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return model(config(vocab_size=512, **sizes, pad_token_id=0, eos_token_id=1)).eval()


def gemma() -> nn.Module:
    return transformers.Gemma2Model(transformers.Gemma2Config(vocab_size=64, **SMALL, query_pre_attn_scalar=8)).eval()


def qwen3(**changes: Any) -> Any:
    return transformers.Qwen3Config(vocab_size=512, **(SMALL | changes), max_position_embeddings=1024)


def of_pieces(pieces: Sequence[str], split: Any, special: Sequence[str], form: str | None, **named: str) -> Any:
    """A tokenizer that knows these pieces of a text, and special tokens, the first of which it pads with."""
    vocabulary = {token: i for i, token in enumerate([*special, *pieces])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = split
    made.add_special_tokens(list(special))
    if form:
        used = [(token, vocabulary[token]) for token in form.split() if token in vocabulary]
        made.post_processor = processors.TemplateProcessing(single=form, special_tokens=used)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token=special[0], unk_token="<unk>", model_max_length=2048, **named
    )


def t5_tokenizer() -> Any:
    return of_pieces(LETTERS, BY_LETTER, ["<pad>", "</s>", "<unk>"], "$A </s>", eos_token="</s>")


def qwen_tokenizer() -> Any:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>"]
    made = of_pieces(LETTERS, BY_LETTER, special, None, eos_token="<|im_end|>")
    made.chat_template = CHAT
    return made


def gemma_tokenizer() -> Any:
    """Of words, few of which are known: Sana's instruction has thousands of letters."""
    return of_pieces(WORDS, pre_tokenizers.Whitespace(), ["<pad>", "<bos>", "<unk>"], "<bos> $A", bos_token="<bos>")


def qwen_vl() -> nn.Module:
    rope = {"rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"}, "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    text = {key: value for key, value in SMALL.items() if key != "head_dim"} | rope | {"vocab_size": 512}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


# -- families ---------------------------------------------------------------------------------------------------------


def eightfold() -> AutoencoderKL:
    """A VAE that makes an eighth of each side."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    config = dict(vae().config) | blocks | {"block_out_channels": (4, 4, 4, 4)}
    return AutoencoderKL.from_config(config).eval()


def with_parts(pipe: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """Another pipeline of the class, with these parts in place of those it has."""
    return type(pipe)(**({name: pipe.components[name] for name in pipe.components} | parts))


def sd3() -> tuple[DiffusionPipeline, int]:
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    encoders = {f"text_encoder{number}": text_encoder(projected=True) for number in ("", "_2")}
    encoders |= {f"tokenizer{number}": tokenizer() for number in ("", "_2")}
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=flow(),
        vae=vae(),
        text_encoder_3=None,
        tokenizer_3=None,
        **encoders,
    )
    return pipe, 16


def flux() -> tuple[DiffusionPipeline, int]:
    clip, known = text_encoder(), tokenizer()
    parts = {"text_encoder": clip, "tokenizer": known, "text_encoder_2": t5(), "tokenizer_2": t5_tokenizer()}
    return with_parts(KINDS["flux"]()[0], **parts), 16


def flux2_klein() -> tuple[DiffusionPipeline, int]:
    parts = flux2_parts(guidance=False)
    config = dict(parts["transformer"].config) | {"joint_attention_dim": 24}
    parts["transformer"] = Flux2Transformer2DModel.from_config(config)
    encoder = transformers.Qwen3ForCausalLM(qwen3(hidden_size=8, num_hidden_layers=27)).eval()
    return Flux2KleinPipeline(**(parts | {"text_encoder": encoder, "tokenizer": qwen_tokenizer()})), 64


def qwen() -> tuple[DiffusionPipeline, int]:
    coder = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )
    parts = {"vae": coder.eval(), "text_encoder": qwen_vl(), "tokenizer": qwen_tokenizer()}
    return with_parts(qwen_image()[0], **parts), 64


def z() -> tuple[DiffusionPipeline, int]:
    parts = {"vae": vae(), "text_encoder": transformers.Qwen3Model(qwen3()).eval(), "tokenizer": qwen_tokenizer()}
    pipe = z_image()[0]
    transformer = ZImageTransformer2DModel.from_config(dict(pipe.transformer.config) | {"axes_lens": [1024, 16, 16]})
    with torch.no_grad():
        transformer.x_pad_token.fill_(0.5), transformer.cap_pad_token.fill_(-0.5)  # made by torch.empty
    return with_parts(pipe, transformer=transformer, **parts), 16


def sana_dc() -> tuple[DiffusionPipeline, int]:
    coder = AutoencoderDC(
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    parts = {"vae": coder.eval(), "text_encoder": gemma(), "tokenizer": gemma_tokenizer()}
    return with_parts(sana()[0], **parts), 32


def lumina() -> tuple[DiffusionPipeline, int]:
    pipe = lumina2()[0]
    transformer = Lumina2Transformer2DModel.from_config(dict(pipe.transformer.config) | {"axes_lens": (512, 16, 16)})
    parts = {"text_encoder": gemma(), "tokenizer": gemma_tokenizer(), "vae": eightfold()}
    return with_parts(pipe, transformer=transformer, **parts), 32


def chroma1() -> tuple[DiffusionPipeline, int]:
    return with_parts(chroma()[0], vae=vae(), text_encoder=t5(), tokenizer=t5_tokenizer()), 16


def wan21() -> tuple[DiffusionPipeline, int]:
    coder = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    encoder = t5(transformers.UMT5Config, transformers.UMT5EncoderModel)
    return with_parts(wan()[0], vae=coder.eval(), text_encoder=encoder, tokenizer=t5_tokenizer()), 32


def pixart() -> tuple[DiffusionPipeline, int]:
    parts = dict(KINDS["pixart"]()[0].components) | {"text_encoder": t5(), "tokenizer": t5_tokenizer()}
    return PixArtSigmaPipeline(**parts), 16


TRAINABLE: dict[str, Callable[[], tuple[DiffusionPipeline, int]]] = {
    "sd3": sd3,
    "flux": flux,
    "flux2_klein": flux2_klein,
    "qwen_image": qwen,
    "z_image": z,
    "sana": sana_dc,
    "lumina2": lumina,
    "chroma": chroma1,
    "wan": wan21,
    "pixart": pixart,
}


def trainable(family: str) -> tuple[Any, int]:
    """A pipeline of the family, and the side of its pictures. Equal families have equal weights."""
    with seeded(0):
        pipe, side = TRAINABLE[family]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe, side
