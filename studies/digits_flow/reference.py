"""The unaligned half of the build: transformer and text encoders of the digits' flow, trained from nothing."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from jaxtyping import Float
from torch import Tensor, nn

from deradiff.alignment.noising import FlowNoising
from deradiff.alignment.objectives import squared_error
from deradiff.files.inventory import require_whole
from deradiff.files.locks import discard
from deradiff.files.writing import atomic_folder
from deradiff.sweep.jobs import Report
from deradiff.sweep.pipelines import load_pipeline
from deradiff.worlds import digits
from studies.digits.captioned import CaptionedPictures, train_reference_on
from studies.digits_flow import models
from studies.digits_flow.settings import FlowSettings


def load(path: Path) -> StableDiffusion3Pipeline:
    """The pipeline of a folder, in single precision and without progress bars."""
    pipe: Any = load_pipeline(str(path), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def train_reference(folder: Path, settings: FlowSettings, report: Report) -> None:
    """Transformer and text encoders together on the flow-matching loss; captions are dropped one time in ten.

    Times are spread by `settings.density` without a shift: these latents are small, and all noise levels count. The
    autoencoder is the digits' own.
    """
    path = folder / "reference"
    if path.exists():
        require_whole(path, None, "reference", "delete that folder, and it is trained again")
        return
    vae = AutoencoderKL.from_pretrained(digits.reference_path() / "vae").eval()
    pool = CaptionedPictures.rendered(vae, "train", settings.pictures, settings.seed + 3)
    unseen = CaptionedPictures.rendered(vae, "held-out", settings.held_out_pictures, settings.seed + 4)
    torch.manual_seed(settings.seed + 1)
    denoiser = models.transformer(settings.width, settings.layers)
    encoders = nn.ModuleList([models.text_encoder() for _ in range(2)])
    model, noising = nn.ModuleDict({"transformer": denoiser, "text": encoders}), FlowNoising(1000, 1, settings.density)
    pipelines_own = denoiser.attn_processors
    denoiser.set_attn_processor(models.EqualTokens())

    def error(of: CaptionedPictures, index: Tensor, generator: torch.Generator) -> Float[Tensor, " batch"]:
        clean = of.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.cat([noising.drawn(generator) for _ in index])
        tokens = of.tokens(index, generator, settings.caption_dropout)
        context, pooled = models.embedded(encoders, tokens)
        velocity = denoiser(
            hidden_states=noising.noised(clean, noise, timesteps),
            timestep=timesteps,
            encoder_hidden_states=context,
            pooled_projections=pooled,
        ).sample
        return squared_error(velocity, noising.target(clean, noise, timesteps))

    train_reference_on(
        pool,
        unseen,
        model,
        error,
        settings.reference,
        batch=settings.batch,
        seed=settings.seed,
        folder=folder,
        report=report,
    )
    denoiser.set_attn_processor(pipelines_own)
    save(models.pipeline(vae, encoders.eval(), denoiser.eval()), path)
    discard(folder / "reference-checkpoint")


def save(pipe: StableDiffusion3Pipeline, path: Path) -> None:
    """Transformer and text encoders in half precision, where anchors start; the digits' autoencoder as it is."""
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        part.half()
    with atomic_folder(path) as fresh:
        pipe.save_pretrained(fresh)
