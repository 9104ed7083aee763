"""Pipelines that make sounds."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from diffusers import UNet2DConditionModel

from .case import OwnCase, Sibling
from .parts import again, numbers

AUDIO_LDM_2 = Sibling("audioldm2.test_audioldm2", "AudioLDM2PipelineFastTests")
STABLE_AUDIO_3 = Sibling("stable_audio_3.test_stable_audio_3", "StableAudio3PipelineFastTests")


def _unet_told_by_class() -> Any:
    """A UNet that is told of the text by the embedding of its time step."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=16,
        class_embeddings_concat=True,
        norm_num_groups=2,
    )


def _vocoder() -> Any:
    """The sibling's with larger weights: at its own, all spectrograms sound alike."""
    vocoder = AUDIO_LDM_2.components()["vocoder"]
    with torch.no_grad():
        for weight in vocoder.parameters():
            weight.mul_(10)
    return vocoder


def _audio_ldm() -> dict[str, Any]:
    """CLAP's text encoder out of the whole CLAP of AudioLDM 2."""
    config = AUDIO_LDM_2.components()["text_encoder"].config.text_config
    return {
        "unet": _unet_told_by_class(),
        "text_encoder": transformers.ClapTextModelWithProjection(config).eval(),
        "vocoder": _vocoder(),
    }


SOUNDS = (
    OwnCase("AudioLDMPipeline", AUDIO_LDM_2, _audio_ldm),
    OwnCase(
        "MusicLDMPipeline",
        AUDIO_LDM_2,
        lambda: {"unet": _unet_told_by_class(), "vocoder": _vocoder()},
        # It reads what CLAP makes of a text as transformers 4 returned it.
        lambda: {"prompt_embeds": numbers(1, 16), "negative_prompt_embeds": numbers(1, 16, seed=1)},
        without=("prompt", "negative_prompt"),
    ),
    OwnCase(
        "StableAudio3AudioToAudioPipeline",
        STABLE_AUDIO_3,
        inputs=lambda: {"audio": numbers(1, 2, 16).clamp(-1, 1), "init_noise_level": 0.8},
    ),
    OwnCase(
        "StableAudio3InpaintPipeline",
        STABLE_AUDIO_3,
        lambda: {"transformer": again(STABLE_AUDIO_3.components()["transformer"], local_add_cond_dim=9)},
        lambda: {
            "audio": numbers(1, 2, 16).clamp(-1, 1),
            "mask_start_seconds": 0.25,
            "mask_end_seconds": 0.75,
        },
    ),
)
