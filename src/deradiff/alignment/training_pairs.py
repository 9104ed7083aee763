"""Preference pairs as Diffusion-DPO asks for them, batch by batch: from a cache of latents, or encoded on the way."""

from collections.abc import Sequence
from typing import Any

import torch

from deradiff.alignment.base import Base, Conditions
from deradiff.alignment.data_order import DataOrder, order, row_generators
from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.latent_cache import CachedBatch, LatentCache
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.alignment.pair_streams import PairStream
from deradiff.alignment.pairs import PairFolder
from deradiff.alignment.training import BatchPart


class CachedPairs:
    """Pairs of a cache in the order that `seed` decides; there is no state to save."""

    def __init__(self, cache: LatentCache, seed: int) -> None:
        self._cache, self._seed = cache, seed
        self.training: int | None = len(cache.training)
        self.held_out = len(cache.held_out)

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        """This part of the step's `size` pairs."""
        places = order(len(self._cache.training), self._seed, part.positions(size))
        return self._cache.take([self._cache.training[place] for place in places])

    def held_out_batch(self, places: range) -> CachedBatch:
        """Some of the held-out pairs."""
        return self._cache.take([self._cache.held_out[place] for place in places])

    def empty_prompt(self) -> Conditions:
        """What the denoiser is told of a prompt that is dropped."""
        return self._cache.empty_prompt()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the order is a function of the step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class EncodedPairs:
    """Pairs decoded and encoded as they are needed, of a folder or a stream: for data that no disk holds as latents.

    Held-out pairs are encoded once, at the start; with `flip` the others are mirrored by chance, anew in every step
    (see `image_transforms.pair_pixels`). `processes` share every batch (see `data_order.DataOrder`).
    """

    def __init__(
        self,
        base: Base,
        source: PairFolder | PairStream,
        resolution: int,
        seed: int,
        processes: int = 1,
        flip: bool = False,
    ) -> None:
        self._base, self._resolution, self._processes, self._seed, self._flip = base, resolution, processes, seed, flip
        self._order = DataOrder(source, seed)
        self.training = len(source) - source.held_out_rows if isinstance(source, PairFolder) else None
        self._empty = {name: value.cpu() for name, value in base.call.encode_prompts([""]).items()}
        self._held_out = [self._encoded([pair]) for pair in source.held_out()]
        self.held_out = len(self._held_out)

    def batch(self, part: BatchPart, size: int) -> CachedBatch:
        """This part of the step's `size` pairs; parts have to be asked for in their order."""
        positions, micro_batch = part.positions(size), size * self._processes // part.of
        pairs = self._order.take(micro_batch, part.index % self._processes, self._processes)
        return self._encoded(pairs, row_generators(self._seed, positions, "flip") if self._flip else None)

    def held_out_batch(self, places: range) -> CachedBatch:
        """Some of the held-out pairs."""
        return _together([self._held_out[place] for place in places])

    def empty_prompt(self) -> Conditions:
        """What the denoiser is told of a prompt that is dropped."""
        return self._empty

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands, as plain JSON."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""
        self._order.load_state_dict(state)

    @torch.autocast("cuda", enabled=False)
    @torch.autocast("cpu", enabled=False)
    def _encoded(
        self, pairs: Sequence[PreferencePair], chances: Sequence[torch.Generator | None] | None = None
    ) -> CachedBatch:
        views = [
            pair_pixels(pair, self._resolution, flip=chance is not None, generator=chance)
            for pair, chance in zip(pairs, chances or [None] * len(pairs), strict=True)
        ]
        latents = self._base.encode_images(torch.cat([view.pixels for view in views])).unflatten(0, (-1, 2)).cpu()
        texts = [pair.prompt for pair in pairs]
        prompts = {name: value.cpu() for name, value in self._base.call.encode_prompts(texts).items()}
        return CachedBatch(latents, torch.stack([view.time_ids for view in views]), prompts, texts)


def _together(batches: Sequence[CachedBatch]) -> CachedBatch:
    return CachedBatch(
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.time_ids for batch in batches]),
        {name: torch.cat([batch.prompts[name] for batch in batches]) for name in batches[0].prompts},
        [text for batch in batches for text in batch.texts],
    )
