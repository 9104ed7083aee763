"""The unaligned half of the digits build: the autoencoder, then text encoder and UNet."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from deradiff.alignment.loop import train
from deradiff.alignment.objectives import squared_error
from deradiff.alignment.training import BatchPart, TrainingRun
from deradiff.files.inventory import require_whole
from deradiff.files.locks import discard
from deradiff.files.writing import atomic_folder, write_json
from deradiff.sweep.jobs import Report
from deradiff.worlds.digits import data
from studies.digits import models
from studies.digits.captioned import CaptionedPictures, train_reference_on
from studies.digits.settings import Settings


def train_autoencoder(folder: Path, settings: Settings, report: Report) -> AutoencoderKL:
    """Pictures to 4x8x8 latents of zero mean and unit variance, and back; squared error plus a little KL."""
    path = folder / "vae"
    if path.exists():
        require_whole(path, None, "autoencoder", "delete that folder, and it is trained again")
        return AutoencoderKL.from_pretrained(path).eval()
    torch.manual_seed(settings.seed)
    vae = models.autoencoder()
    pictures = 2 * data.render("train", settings.vae_pictures, settings.seed + 1).images - 1
    unseen = 2 * data.render("held-out", settings.held_out_pictures // 2, settings.seed + 2).images - 1

    def loss(_: nn.Module, generator: torch.Generator, __: BatchPart) -> Tensor:
        batch = pictures[torch.randint(len(pictures), (settings.vae_batch,), generator=generator)]
        # bfloat16 halves the time of these wide convolutions; the weights and everything after training are float32.
        with torch.autocast("cpu", torch.bfloat16):
            distribution = vae.encode(batch).latent_dist
            latents = distribution.sample(generator=generator)
            decoded = vae.decode(latents.to(batch.dtype)).sample
        kl = distribution.kl().float().mean() / latents[0].numel()
        return F.mse_loss(decoded.float(), batch) + settings.vae_kl_weight * kl

    def held_out_loss(_: nn.Module) -> float:
        errors = [F.mse_loss(vae.decode(vae.encode(b).latent_dist.mode()).sample, b) for b in unseen.split(128)]
        return torch.stack(errors).mean().item()

    curve = train(
        vae,
        loss,
        held_out_loss,
        settings.vae,
        run=TrainingRun(
            seed=settings.seed + 1,
            checkpoint=folder / "vae-checkpoint",
            report=partial(report, "autoencoder"),
        ),
    )
    standardise(vae.eval(), pictures[:2048])
    write_json(folder / "vae-curve.json", asdict(curve))
    with atomic_folder(path) as fresh:
        vae.save_pretrained(fresh)
    discard(folder / "vae-checkpoint")
    return vae


@torch.no_grad()
def standardise(vae: AutoencoderKL, pictures: Float[Tensor, "batch 3 32 32"]) -> None:
    """Fold a shift and a scale per channel into the 1x1 convolutions around the latents: zero mean, unit variance.

    Stable Diffusion's pipelines know one scale and no shift, and its noise schedule never quite reaches pure noise: a
    mean that is not zero would be missing from the noise that sampling starts from.
    """
    latents = torch.cat([vae.encode(b).latent_dist.mode() for b in pictures.split(256)])
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()  # the log variances
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Float[Tensor, "batch 4 8 8"]) -> Float[Tensor, "batch 3 32 32"]:
    """Latents to pictures in [0, 1]."""
    return torch.cat([(vae.decode(b).sample / 2 + 0.5).clamp(0, 1) for b in latents.split(256)])


def train_reference(folder: Path, settings: Settings, vae: AutoencoderKL, report: Report) -> StableDiffusionPipeline:
    """UNet and text encoder together on the plain denoising loss (Ho et al. 2020), captions dropped one time in ten."""
    path = folder / "reference"
    if path.exists():
        require_whole(path, None, "reference", "delete that folder, and it is trained again")
        return _quiet(StableDiffusionPipeline.from_pretrained(path))
    pool = CaptionedPictures.rendered(vae, "train", settings.pictures, settings.seed + 3)
    unseen = CaptionedPictures.rendered(vae, "held-out", settings.held_out_pictures, settings.seed + 4)
    torch.manual_seed(settings.seed + 1)
    text = models.text_encoder()
    model = nn.ModuleDict({"unet": models.unet(), "text": text})
    scheduler = models.scheduler()

    def denoising(of: CaptionedPictures, index: Tensor, generator: torch.Generator) -> Float[Tensor, " batch"]:
        clean = of.latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(1000, (len(index),), generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        embedded = model["text"](of.tokens(index, generator, settings.caption_dropout)).last_hidden_state
        return squared_error(model["unet"](noisy, timesteps, embedded).sample, noise)

    train_reference_on(
        pool,
        unseen,
        model,
        denoising,
        settings.reference,
        batch=settings.batch,
        seed=settings.seed,
        folder=folder,
        report=report,
    )
    pipe = models.pipeline(vae, text.eval(), model["unet"].eval())
    with atomic_folder(path) as fresh:
        pipe.save_pretrained(fresh)
    discard(folder / "reference-checkpoint")
    return _quiet(pipe)


def _quiet(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    pipe.set_progress_bar_config(disable=True)
    return pipe
