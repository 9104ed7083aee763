"""Pipelines that draw pictures or sounds without a prompt."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    IPNDMScheduler,
    KarrasVeScheduler,
    PNDMScheduler,
    RePaintScheduler,
    ScoreSdeVeScheduler,
    UNet1DModel,
)

from .case import OwnCase
from .parts import mask, numbers, picture, unconditional_unet, vae, vq_model, without_prompt


def _around(scheduler: Any, **unet: Any) -> Any:
    """Components of a UNet and a scheduler alone."""
    return lambda: {"unet": unconditional_unet(**unet), "scheduler": scheduler()}


def _latent_upscaler() -> dict[str, Any]:
    return {
        "unet": unconditional_unet(32, in_channels=6, out_channels=3),
        "vqvae": vq_model(),
        "scheduler": DDIMScheduler(),
    }


def _sound_unet() -> Any:
    return UNet1DModel(
        block_out_channels=(32, 32, 32),
        extra_in_channels=64,
        sample_size=64,
        sample_rate=64,
        in_channels=2,
        out_channels=2,
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D",
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )


class _Mel:
    """What AudioDiffusionPipeline asks of its Mel, whose own class needs librosa: sound out of a spectrogram."""

    config: ClassVar = {"_class_name": "Mel"}

    def get_sample_rate(self) -> int:
        return 16

    def image_to_audio(self, image: Any) -> Any:
        return np.asarray(image, dtype=np.float32).mean(axis=0)


def _spectrogram_parts() -> dict[str, Any]:
    return {
        "unet": unconditional_unet(8, in_channels=4, out_channels=4),
        "vqvae": vae(channels=1),
        "mel": _Mel(),
        "scheduler": DDIMScheduler(),
    }


UNCONDITIONAL = (
    OwnCase("DDPMPipeline", components=_around(DDPMScheduler), inputs=without_prompt),
    OwnCase(
        "PNDMPipeline",
        components=_around(PNDMScheduler),
        inputs=lambda: without_prompt(num_inference_steps=4),  # of Runge and Kutta's kind are the first four
    ),
    OwnCase("KarrasVePipeline", components=_around(KarrasVeScheduler), inputs=without_prompt),
    OwnCase("ScoreSdeVePipeline", components=_around(ScoreSdeVeScheduler), inputs=without_prompt),
    OwnCase(
        "RePaintPipeline",
        components=_around(RePaintScheduler, sample_size=32),
        inputs=lambda: without_prompt(
            image=picture(), mask_image=mask(), num_inference_steps=4, jump_length=2, jump_n_sample=2
        ),
    ),
    OwnCase(
        "LDMPipeline",
        components=lambda: {
            "unet": unconditional_unet(),
            "vqvae": vq_model(),
            "scheduler": DDIMScheduler(clip_sample=False),
        },
        inputs=without_prompt,
    ),
    OwnCase("LDMSuperResolutionPipeline", components=_latent_upscaler, inputs=lambda: without_prompt(image=picture())),
    OwnCase(
        "DanceDiffusionPipeline",
        components=lambda: {"unet": _sound_unet(), "scheduler": IPNDMScheduler()},
        inputs=lambda: {
            name: value for name, value in without_prompt(audio_length_in_s=1.0).items() if name != "output_type"
        },
    ),
    OwnCase(
        "AudioDiffusionPipeline",
        components=_spectrogram_parts,
        module="diffusers.pipelines.deprecated.audio_diffusion.pipeline_audio_diffusion",
        inputs=lambda: {
            "steps": 3,
            "noise": numbers(1, 4, 8, 8),
            "return_dict": False,
        },  # the pictures, then the sounds,
    ),
)
