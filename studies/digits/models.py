"""The architecture of the digits world: every part is a real diffusers or transformers class, only small."""

from collections import Counter
from itertools import pairwise

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from deradiff.worlds.digits import MAX_LENGTH
from deradiff.worlds.digits.captions import words

WIDTH = 64
"""Size of the text embeddings."""


def byte_pairs(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Merges that make each word of `vocabulary` one token: byte-pair encoding (Sennrich et al. 2016) run to its end.

    The most frequent pair is merged first, ties in alphabetical order, until nothing is left to merge.
    """
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in vocabulary]
    merges = []
    while pairs := Counter(pair for word in spelled for pair in pairwise(word)):
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for word in spelled:
            for i in range(len(word) - 2, -1, -1):
                if word[i : i + 2] == [first, second]:
                    word[i : i + 2] = [first + second]
    return merges


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer to which each word of a caption is one token; other words are spelled out in letters."""
    merges = byte_pairs(words())
    letters = [letter + end for end in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(first + second for first, second in merges)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def autoencoder() -> AutoencoderKL:
    """3x32x32 pictures to 4x8x8 latents."""
    channels = (32, 32, 64)
    return AutoencoderKL(
        sample_size=32,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )


def text_config(width: int, layers: int) -> CLIPTextConfig:
    """A CLIP text encoder for `tokenizer`."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer()),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def text_encoder() -> CLIPTextModel:
    """Two transformer layers."""
    return CLIPTextModel(text_config(WIDTH, 2))


def unet() -> UNet2DConditionModel:
    """8x8 and 4x4 resolutions; the 4x4 ones attend to the caption."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=16,
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )


def scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline(vae: AutoencoderKL, text: CLIPTextModel, denoiser: UNet2DConditionModel) -> StableDiffusionPipeline:
    """The parts as a pipeline without safety checker."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer(),
        unet=denoiser,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def token_ids(prompts: list[str]) -> torch.Tensor:
    """Captions as the pipeline tokenizes them, padded to `MAX_LENGTH`."""
    return tokenizer()(
        prompts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
