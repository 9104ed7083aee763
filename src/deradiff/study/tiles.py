"""The images that participants are sent: small, under random names, without a word about how they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from secrets import token_hex

import numpy as np
from PIL import Image

from deradiff.experiments import store as experiments
from deradiff.files.images import read_rgb, rgb
from deradiff.files.writing import atomic_file
from deradiff.study.plan import NOISE, StudyImage, StudyPlan
from deradiff.study.votes import Votes, file_of

SMALLEST, LARGEST = 160, 384
"""Pixels of a tile's longer side: smaller images are enlarged by a whole factor, larger ones reduced."""

QUALITY = 92
"""Of JPEG, which only images that were reduced are kept as."""

TOGETHER = 64
"""Tiles that are entered at once."""


def prepare(votes: Votes, images: Mapping[StudyImage, experiments.Image], report: Callable[[int, int], None]) -> None:
    """Make the tile of every image that has none yet, and one of noise; a study that was interrupted goes on.

    `report(done, total)` is called along the way. Raises `Missing` for an image that was altered since it was drawn.
    """
    votes.folder.joinpath("images").mkdir(exist_ok=True)
    done = votes.entered()
    left = [place for place in images if place not in done]
    batch: dict[StudyImage, str] = {}
    for count, place in enumerate(left, len(images) - len(left)):
        report(count, len(images))
        batch[place] = kept(read_rgb(images[place].read(), str(images[place].path)), votes.folder)
        if len(batch) == TOGETHER:
            votes.enter(batch)
            batch = {}
    votes.enter(batch)
    if NOISE not in done:
        like = read_rgb(votes.folder / "images" / next(iter(votes.entered().values())))
        votes.enter({NOISE: kept(noise(like.size), votes.folder)})
    report(len(images), len(images))


def ready(folder: Path, plan: StudyPlan, beside: Path, report: Callable[[int, int], None]) -> Votes:
    """The study of `plan` in `folder` with all of its images: a new one, or one that was begun there.

    The experiments, whose paths count from the folder `beside`, are needed until every tile is made, and not after.
    Nothing is begun that cannot be shown. Raises as `sources.located`, `Votes` and `prepare` do.
    """
    images = None if file_of(folder).exists() else _located(plan, beside)
    votes = Votes(folder, plan)
    try:
        if not is_complete(votes):
            prepare(votes, _located(plan, beside) if images is None else images, report)
    except BaseException:
        votes.__exit__()
        raise
    return votes


def is_complete(votes: Votes) -> bool:
    """Whether every image has its tile: the experiments are not needed any more."""
    wanted = sum(
        len(configuration.methods) * len(configuration.prompts) * len(configuration.seeds)
        for configuration in votes.plan.configurations
    )
    return len(votes.entered()) == wanted + 1  # and noise


def kept(image: Image.Image, folder: Path) -> str:
    """Write the tile of `image` into `folder`; returns its file's name, which is random."""
    small = tile(image)
    form, suffix = ("PNG", "png") if max(image.size) <= LARGEST else ("JPEG", "jpg")
    name = f"{token_hex(16)}.{suffix}"
    with atomic_file(folder / "images" / name) as temporary:
        small.save(temporary, format=form, **({"quality": QUALITY} if form == "JPEG" else {"optimize": True}))
    return name


def tile(image: Image.Image) -> Image.Image:
    """The picture alone, in RGB, between `SMALLEST` and `LARGEST` pixels on its longer side."""
    longest = max(image.size)
    plain = rgb(image)
    if longest < SMALLEST:
        factor = -(-SMALLEST // longest)
        return plain.resize((plain.width * factor, plain.height * factor), Image.Resampling.NEAREST)
    if longest > LARGEST:
        plain.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return plain


def noise(size: tuple[int, int]) -> Image.Image:
    """Grey noise of `size` (width, height): what is plainly worse than any image."""
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0]), dtype=np.uint8)
    return rgb(Image.fromarray(levels))


def _located(plan: StudyPlan, beside: Path) -> dict[StudyImage, experiments.Image]:
    """`sources.located`, imported when it is needed: a study that goes on need not wait for diffusers to load."""
    from deradiff.study.sources import located

    return located(plan, beside)
