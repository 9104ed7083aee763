"""Rendered digits as latents, with captions drawn anew each time: what the reference of a digits world learns from."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from jaxtyping import Float, Int
from torch import Tensor, nn

from deradiff.alignment.loop import train
from deradiff.alignment.training import BatchPart, TrainingPlan, TrainingRun
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import Report
from deradiff.worlds.digits import captions, data
from studies.digits import models


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Float[Tensor, "batch 3 32 32"]) -> Float[Tensor, "batch 4 8 8"]:
    """Pictures in [0, 1] to latents."""
    return torch.cat([vae.encode(2 * b - 1).latent_dist.mode() for b in images.split(256)])


def caption_table() -> Int[Tensor, "digit ink paper wording token"]:
    """Token ids of every caption; the last ink and the last paper stand for an open colour."""
    inks, papers = [*data.INKS, None], [*data.PAPERS, None]
    texts = [
        captions.caption(captions.Parts(digit, ink, paper), wording)
        for digit in range(10)
        for ink in inks
        for paper in papers
        for wording in range(3)
    ]
    return models.token_ids(texts).view(10, len(inks), len(papers), 3, -1)


@dataclass(frozen=True)
class CaptionedPictures:
    """Pictures with their latents, and the tokens of all captions; `empty` are those of no caption."""

    pictures: data.RenderedDigits
    latents: Float[Tensor, "picture 4 8 8"]
    table: Int[Tensor, "digit ink paper wording token"]
    empty: Int[Tensor, " token"]

    @classmethod
    def rendered(cls, vae: AutoencoderKL, split: str, count: int, seed: int) -> "CaptionedPictures":
        """So many pictures of a split of the digits (see `data.render`)."""
        pictures = data.render(split, count, seed)
        return cls(pictures, encode(vae, pictures.images), caption_table(), models.token_ids([""])[0])

    def tokens(
        self, index: Int[Tensor, " batch"], generator: torch.Generator, dropout: float
    ) -> Int[Tensor, "batch token"]:
        """A caption for each of some pictures, as `captions.describe` words it; a share `dropout` of them is empty."""
        named = torch.rand(len(index), 2, generator=generator) < 2 / 3
        inks = torch.where(named[:, 0], self.pictures.inks[index], len(data.INKS))
        papers = torch.where(named[:, 1], self.pictures.papers[index], len(data.PAPERS))
        wordings = torch.randint(3, (len(index),), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < dropout
        return torch.where(
            dropped[:, None], self.empty, self.table[self.pictures.digits[index], inks, papers, wordings]
        )


Errors = Callable[[CaptionedPictures, Tensor, torch.Generator], Float[Tensor, " batch"]]
"""How far a model's predictions are off for some pictures, by their numbers, at noise that the generator draws."""


def train_reference_on(
    pool: CaptionedPictures,
    unseen: CaptionedPictures,
    model: nn.Module,
    errors: Errors,
    plan: TrainingPlan,
    *,
    batch: int,
    seed: int,
    folder: Path,
    report: Report,
) -> None:
    """Train `model` on `errors` of `pool`; leave its curve and its checkpoint in `folder`."""

    def loss(_: nn.Module, generator: torch.Generator, __: BatchPart) -> Tensor:
        index = torch.randint(len(pool.latents), (batch,), generator=generator)
        return errors(pool, index, generator).mean()

    def held_out_loss(_: nn.Module) -> float:
        generator = torch.Generator().manual_seed(seed)
        chunks = torch.arange(len(unseen.latents)).split(batch)
        return torch.cat([errors(unseen, index, generator) for index in chunks]).mean().item()

    run = TrainingRun(seed + 2, folder / "reference-checkpoint", partial(report, "reference"))
    curve = train(model, loss, held_out_loss, plan, run=run)
    write_json(folder / "reference-curve.json", asdict(curve))
