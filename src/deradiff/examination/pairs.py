"""The terms of Diffusion-DPO's loss on preference pairs, of reference and anchor, by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from deradiff.algorithm.pair_terms import BLOCKS, PairTerms, terms
from deradiff.alignment.base import Base
from deradiff.alignment.data_order import Unreadable, passes, row_generators
from deradiff.alignment.dpo import noise_pairs
from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.latent_cache import CachedBatch
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.alignment.pairs import open_pairs
from deradiff.anchors import load_anchor
from deradiff.anchors.checks import denoiser_of
from deradiff.examination.drawing import ExaminedImages
from deradiff.files.folders import FolderSettings
from deradiff.files.reading import read
from deradiff.sampling.denoisers import Denoisers
from deradiff.sweep.pipelines import anchor_source
from deradiff.sweep.settings import Settings
from deradiff.worlds import find

PAIRS = 500
"""Of given data, so many pairs are taken."""

DRAWS = 16
"""Draws of noise and timestep for every pair."""

PAIRS_TOGETHER = 32


def given(source: str | Path, reference: str, count: int) -> list[PreferencePair]:
    """The first usable pairs of `source`, `count` at most.

    Raises `ValueError` for pairs that another model drew, as their folder tells, and what `open_pairs` raises.
    """
    settings = Path(source) / "settings.json"
    if settings.is_file():  # drawn by `deradiff align`
        base = read(FolderSettings, settings, "settings of drawn pairs", "").settings.get("base")
        if base is not None and base != reference:
            raise ValueError(f"the pairs of {source} were drawn by {base}, and the reference is {reference}")
    pairs: Any = open_pairs(source)  # a folder or a stream, whose rows are of two kinds
    found: list[PreferencePair] = []
    for step in pairs.in_order(None):
        try:
            found.append(pairs.open(step.row))
        except Unreadable:
            continue
        if len(found) == count:
            break
    if len(found) < BLOCKS:
        raise ValueError(f"{source} has {len(found)} usable pairs: {BLOCKS} at least are needed, better some hundreds")
    return found


def compared(drawn: ExaminedImages, settings: Settings) -> list[PreferencePair]:
    """The reference's own images, paired prompt by prompt: the better half by the reward with the worse half.

    No pairs at all where they would be too few for the test.
    """
    pairs = []
    for prompt, (text, images) in enumerate(zip(settings.prompts, drawn.of_reference, strict=True)):
        order = drawn.scores[0, prompt].argsort(descending=True).tolist()
        half = len(order) // 2
        pairs += [PreferencePair(text, images[order[k]], images[order[half + k]]) for k in range(half)]
    # Neighbours are of different prompts, so that each part that is left out for standard errors has all of them.
    half = len(pairs) // len(settings.prompts)
    return [pair for k in range(half) for pair in pairs[k::half]] if len(pairs) >= BLOCKS else []


@torch.no_grad()
def terms_of(
    pipe: Any, settings: Settings, pairs: Sequence[PreferencePair], seed: int, report: Callable[[int, int], None]
) -> PairTerms | None:
    """The terms of all pairs at `DRAWS` draws of noise; None for a pipeline that pairs are not for, or no pairs.

    `pipe` is the reference's, realigned no more.
    """
    if not pairs:
        return None
    try:
        base = Base(pipe, side := _side(pipe, settings))
    except ValueError:
        return None
    (source,) = settings.anchors.values()
    anchor = load_anchor(
        anchor_source(source), pipe, revision=settings.anchor_revision, allow_pickle=settings.allow_pickle
    )
    try:
        return _terms(base, Denoisers(base.denoiser, [anchor]), pairs, side, seed, report)
    finally:
        anchor.unload(base.denoiser)


def _side(pipe: Any, settings: Settings) -> int:
    """Of the pictures, in pixels: as they are drawn, or as the model was made for; `ValueError` where nobody knows."""
    if settings.height:
        return settings.height
    if world := find(settings.reference):
        return world.resolution
    size = getattr(denoiser_of(pipe)[1].config, "sample_size", None)
    if not isinstance(size, int):
        raise ValueError("the size of the pictures is not known: name their height and width")
    return int(size * pipe.vae_scale_factor)


def _terms(
    base: Base,
    denoisers: Denoisers,
    pairs: Sequence[PreferencePair],
    side: int,
    seed: int,
    report: Callable[[int, int], None],
) -> PairTerms:
    empty = base.call.encode_prompts([""])
    linear, square = torch.zeros(2, DRAWS, len(pairs), dtype=torch.float64)
    chunks = list(passes(len(pairs), PAIRS_TOGETHER))
    for number, rows in enumerate(chunks):
        chosen = pairs[rows.start : rows.stop]
        views = [pair_pixels(pair, side) for pair in chosen]
        latents = base.encode_images(torch.cat([view.pixels for view in views])).unflatten(0, (-1, 2))
        texts = [pair.prompt for pair in chosen]
        batch = CachedBatch(
            latents, torch.stack([view.time_ids for view in views]), base.call.encode_prompts(texts), texts
        )
        for draw in range(DRAWS):
            noised = noise_pairs(base, batch, empty, 0.0, row_generators(seed, rows, f"examined {draw}"))
            noisy = noised.noisy.to(base.denoiser.dtype)
            reference, anchor = (
                base.call.predict(_OneOf(denoisers, model), noisy, noised.timesteps, noised.conditions).float()
                for model in (0, 1)
            )
            found = terms(noised.target.float(), reference, anchor).double().cpu()
            linear[draw, rows.start : rows.stop], square[draw, rows.start : rows.stop] = found
        report(number + 1, len(chunks))
    return PairTerms(linear, square)


class _OneOf(torch.nn.Module):
    """Reference or anchor, by number, in the place of a denoiser."""

    def __init__(self, denoisers: Denoisers, model: int) -> None:
        super().__init__()
        self._denoisers = [denoisers]  # in a list: not a part of this module
        self._model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._denoisers[0].predict([self._model], args, kwargs)[self._model]
