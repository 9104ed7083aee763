"""Latents and prompt embeddings computed once: neither the VAE nor the text encoders run, or are held, in training.

A cache is a folder. `settings.json` says what made it. Every `shard-*.safetensors` holds some pairs' latents and the
embeddings of the prompts that are new in it, with the cursor behind its last pair; it is written under a temporary
name, so that a shard that is there is whole. `finished.json` comes last.
"""

import itertools
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from deradiff.alignment.data_order import Cursor, OrderedRow, Unreadable, seeded, split_held_out
from deradiff.alignment.image_transforms import PairPixels, pair_pixels
from deradiff.alignment.latent_shards import (
    ANEW,
    DAMAGED,
    EMBEDDING,
    REWRITE,
    CacheSettings,
    Shard,
    Totals,
    opened,
    require_alike,
)
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.files.folders import FolderSettings, begin_or_resume
from deradiff.files.inventory import inventory, require_whole
from deradiff.files.locks import taken
from deradiff.files.reading import fit, read
from deradiff.files.writing import atomic_file, write_json

FORMAT = 1

EncodeImages = Callable[[Float[Tensor, "batch 3 height width"]], Float[Tensor, "batch *latent"]]
EncodePrompts = Callable[[list[str]], dict[str, Tensor]]
Report = Callable[[int, str], None]
"""Called with (pairs cached, a line of words)."""


@runtime_checkable
class OrderedPairs(Protocol):
    """Pairs that can be read once through, as `PairFolder` and `PairStream` can."""

    fingerprint: dict[str, Any]

    def in_order(self, cursor: Cursor | None) -> Iterator[OrderedRow[Any]]:
        """Every usable row once, from `cursor` on."""
        ...

    def open(self, row: Any) -> PreferencePair:
        """The pair of a row; raises `Unreadable`."""
        ...


@dataclass(frozen=True)
class CachedBatch:
    """Rows of a cache, winner first.

    `prompts` holds for each name what the prompt encoder gave under it; `time_ids` are SDXL's (see `PairPixels`).
    """

    latents: Float[Tensor, "pair 2 *latent"]
    time_ids: Float[Tensor, "pair 2 6"]
    prompts: dict[str, Tensor]
    texts: list[str]


# -- writing ----------------------------------------------------------------------------------------------------------


def write_cache(
    folder: str | Path,
    pairs: OrderedPairs,
    encode_images: EncodeImages,
    encode_prompts: EncodePrompts,
    *,
    base: str,
    resolution: int,
    flip: bool = False,
    vae: str | None = None,
    limit: int | None = None,
    batch: int = 8,
    shard: int = 1024,
    report: Report = lambda cached, line: None,
) -> "LatentCache":
    """Encode `pairs` into `folder`, or finish what an interrupted call began there.

    Images are cropped in the centre: a cache holds one view of each, with `flip` by chance a mirrored one. Distinct
    prompts are encoded once, and the empty one with them; latents are kept in the type that `encode_images` returns.

    Args:
        folder: new, or begun with the same settings.
        pairs: from `open_pairs`; the held-out ones are cached as well.
        encode_images: from RGB in [-1, 1] to scaled latents, for up to `2 * batch` images.
        encode_prompts: from up to `2 * batch` prompts to named tensors, a row per prompt.
        base: the model whose VAE and text encoders these are; a cache serves no other.
        resolution: the side of the training images.
        flip: see `image_transforms.pair_pixels`.
        vae: the `pixels.vae_fingerprint` of the encoder of images; caches of version 0.1 do not say theirs.
        limit: only the first so many pairs.
        batch: pairs encoded together.
        shard: pairs per file.
        report: hears of every shard.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: it holds a cache with other settings, no pair can be read, or an encoder returned
            NaN, infinities, or a wrong number of rows.
        OSError: the disk is full or refuses; whole shards stay, and the same call goes on behind them.
    """
    folder = Path(folder)
    if min(batch, shard) < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch, shard and limit must be at least 1, got {batch}, {shard} and {limit}")
    settings = {"format": FORMAT, "source": pairs.fingerprint, "base": base, "resolution": resolution, "limit": limit}
    settings |= ({"flip": True} if flip else {}) | ({"vae": vae} if vae and not _names_no_vae(folder) else {})
    begin_or_resume(folder, settings, "cache")
    if not (folder / "finished.json").exists():
        encoding = _Encoding(encode_images, encode_prompts, base, resolution, flip, batch)
        with taken(folder, "a cache"):
            _fill(folder, pairs, encoding, limit, shard, report)
    return LatentCache(folder)


def _names_no_vae(folder: Path) -> bool:
    """Whether there is a cache that an earlier version began, which did not say what encoded its pictures."""
    file = folder / "settings.json"
    return file.is_file() and "vae" not in read(FolderSettings, file, "settings of a cache", ANEW).settings


def _fill(
    folder: Path, pairs: OrderedPairs, encoding: "_Encoding", limit: int | None, shard: int, report: Report
) -> None:
    """Write the shards that are not there yet, and that the cache is finished."""
    for leftover in folder.glob(".*.partial"):
        leftover.unlink()
    done = _so_far(folder)
    steps = pairs.in_order(done.cursor)
    while limit is None or done.pairs < limit:
        room = shard if limit is None else min(shard, limit - done.pairs)
        tensors, texts = _next_shard(pairs, steps, done, room, encoding)
        if not tensors:
            break
        state = {"cursor": done.cursor, "unreadable": done.unreadable, "left_out": done.left_out, "texts": texts}
        _save(folder / _shard_name(done.shards), tensors, state, done.pairs)
        done.pairs, done.shards = done.pairs + len(tensors["latents"]), done.shards + 1
        report(done.pairs, f"{done.shards} shards, {len(done.prompts)} distinct prompts")
    if not done.pairs:
        raise ValueError(f"no pair could be read from {pairs.fingerprint} (unreadable: {dict(done.unreadable)})")
    totals = {"pairs": done.pairs, "prompts": len(done.prompts), "shards": done.shards}
    shards = inventory(folder, map(_shard_name, range(done.shards)))
    left = {"unreadable": done.unreadable, "left_out": done.left_out}
    write_json(folder / "finished.json", {**totals, **left, "files": shards})


@dataclass
class _Done:
    """What an unfinished cache holds, and where its source goes on."""

    prompts: dict[str, int] = field(default_factory=dict)
    pairs: int = 0
    shards: int = 0
    cursor: Cursor | None = None
    unreadable: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, int] = field(default_factory=dict)


def _so_far(folder: Path) -> _Done:
    done = _Done()
    for path in _shard_files(folder):
        shard = opened(path, len(done.prompts))
        done.prompts |= {text: number for number, text in enumerate(shard.state.texts, len(done.prompts))}
        done.pairs += shard.pairs
        done.shards += 1
        done.cursor, done.left_out = shard.state.cursor, shard.state.left_out
        done.unreadable = Counter(shard.state.unreadable)
    return done


@dataclass(frozen=True)
class _Encoding:
    encode_images: EncodeImages
    encode_prompts: EncodePrompts
    base: str
    resolution: int
    flip: bool
    batch: int

    @torch.no_grad()
    def of_images(self, views: list[PairPixels]) -> Float[Tensor, "pair 2 *latent"]:
        pixels = torch.cat([view.pixels for view in views])
        latents = self.encode_images(pixels).cpu()
        if len(latents) != len(pixels):
            raise ValueError(f"the image encoder returned {len(latents)} latents for {len(pixels)} images")
        cure = "encode in float32, or with a VAE made for half precision"
        _require_finite(latents, f"the VAE of {self.base}", cure)
        return latents.unflatten(0, (-1, 2))

    @torch.no_grad()
    def of_prompts(self, texts: list[str]) -> dict[str, Tensor]:
        encoded = {name: value.cpu() for name, value in self.encode_prompts(texts).items()}
        for name, value in encoded.items():
            if len(value) != len(texts):
                raise ValueError(f"the prompt encoder returned {len(value)} rows of {name} for {len(texts)} prompts")
            _require_finite(value, f"the prompt encoder's {name}", "encode in float32")
        return encoded


def _next_shard(
    pairs: OrderedPairs, steps: Iterator[OrderedRow[Any]], done: _Done, room: int, encoding: _Encoding
) -> tuple[dict[str, Tensor], list[str]]:
    """Up to `room` pairs encoded, and the texts that are new in them; nothing where the pairs have ended.

    Moves `done` on to the last row read.
    """
    waiting: list[PairPixels] = []
    numbers: list[int] = []
    latents, time_ids = [], []
    # Training drops captions, which takes the embedding of the empty prompt.
    texts = [] if done.prompts else [""]
    done.prompts.setdefault("", 0)
    for step in steps:
        done.cursor, done.left_out = step.cursor, dict(step.skipped)
        try:
            pair = pairs.open(step.row)
        except Unreadable as error:
            done.unreadable[error.reason] += 1
            continue
        if pair.prompt not in done.prompts:
            done.prompts[pair.prompt] = len(done.prompts)
            texts.append(pair.prompt)
        chance = seeded(0, f"flip {done.pairs + len(numbers)}")
        numbers.append(done.prompts[pair.prompt])
        waiting.append(pair_pixels(pair, encoding.resolution, flip=encoding.flip, generator=chance))
        time_ids.append(waiting[-1].time_ids)
        if len(waiting) == encoding.batch:
            latents.append(encoding.of_images(waiting))
            waiting = []
        if len(numbers) == room:
            break
    if not numbers:
        return {}, []
    if waiting:
        latents.append(encoding.of_images(waiting))
    tensors = {"latents": torch.cat(latents), "time_ids": torch.stack(time_ids), "prompt": torch.tensor(numbers)}
    together = 2 * encoding.batch
    parts = [encoding.of_prompts(texts[i : i + together]) for i in range(0, len(texts), together)]
    for name in parts[0] if parts else []:
        tensors[EMBEDDING + name] = torch.cat([part[name] for part in parts])
    return tensors, texts


def _require_finite(values: Tensor, what: str, cure: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"{what} returned NaN or infinities in {values.dtype}: {cure}. Nothing of it was cached")


def _save(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], cached: int) -> None:
    # As bytes and through Python's own file: a full disk is then an OSError, whatever the library would make of it.
    content = save({name: value.contiguous() for name, value in tensors.items()}, {"state": json.dumps(state)})
    try:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise type(error)(
            f"{error}; a shard takes {len(content) / 1e6:.1f} MB. The {cached} pairs before {path.name} are intact in "
            f"{path.parent}: call again, and it goes on behind them"
        ) from error


# -- reading ----------------------------------------------------------------------------------------------------------


class LatentCache:
    """A finished cache, memory-mapped; `training` and `held_out` are the numbers of its rows.

    Args:
        folder: what `write_cache` made.
        held_out: how many pairs never train; which ones, the number of pairs alone decides.

    Raises:
        FileNotFoundError: the folder is no cache.
        ValueError: it was not finished, or a shard is damaged or missing.
    """

    def __init__(self, folder: str | Path, held_out: int = 0) -> None:
        self.folder = Path(folder)
        if not (self.folder / "settings.json").is_file():
            raise FileNotFoundError(f"{folder} is no cache of latents: it has no settings.json")
        settings = self.folder / "settings.json"
        self.settings: dict[str, Any] = read(FolderSettings, settings, "settings of a cache", ANEW).settings
        fit(CacheSettings, self.settings, str(settings), "settings of a cache", ANEW)
        files = _shard_files(self.folder)
        if not (self.folder / "finished.json").is_file():
            raise ValueError(f"{folder} was not finished ({len(files)} shards): run what writes it again, it goes on")
        finished = read(Totals, self.folder / "finished.json", "totals of a cache", REWRITE)
        self.totals: dict[str, Any] = finished.model_dump(exclude={"files"})
        require_whole(self.folder, finished.files or {}, "cache", DAMAGED)
        self._shards: list[Any] = []
        first: Shard | None = None
        self.texts: list[str] = []
        # Where each shard begins, among the pairs and among the prompts.
        self._pairs, self._prompts = [0], [0]
        for path in files:
            shard = opened(path, len(self.texts))
            first = first or shard
            require_alike(shard, first, path)
            self._shards.append(shard.file)
            self.texts += shard.state.texts
            self._pairs.append(self._pairs[-1] + shard.pairs)
            self._prompts.append(len(self.texts))
        if [self._pairs[-1], len(self.texts)] != [self.totals["pairs"], self.totals["prompts"]]:
            raise ValueError(f"{folder} lacks shards: it should hold {self.totals}, and holds {self._pairs[-1]} pairs")
        self._embeddings = [name for name in self._shards[0].keys() if name.startswith(EMBEDDING)]  # noqa: SIM118
        self.fingerprint = {"kind": "latents", "pairs": len(self), **self.settings}
        self.training, self.held_out = (rows.tolist() for rows in split_held_out(len(self), held_out))

    def __len__(self) -> int:
        return self._pairs[-1]

    def empty_prompt(self) -> dict[str, Tensor]:
        """The embeddings of the empty prompt, one row each: for dropped captions and for guidance."""
        return {name.removeprefix(EMBEDDING): _gathered([(self._shards[0], 0)], name) for name in self._embeddings}

    def take(self, rows: Sequence[int]) -> CachedBatch:
        """The given rows, in that order. Raises `IndexError` outside [0, len)."""
        if not rows:
            raise ValueError("take at least one row")
        for row in rows:
            if not 0 <= row < len(self):
                raise IndexError(f"row {row} of a cache of {len(self)} pairs")
        located = [self._row(self._pairs, row) for row in rows]
        prompts = [int(file.get_slice("prompt")[place : place + 1]) for file, place in located]
        places = [self._row(self._prompts, prompt) for prompt in prompts]
        return CachedBatch(
            latents=_gathered(located, "latents"),
            time_ids=_gathered(located, "time_ids"),
            prompts={name.removeprefix(EMBEDDING): _gathered(places, name) for name in self._embeddings},
            texts=[self.texts[prompt] for prompt in prompts],
        )

    def _row(self, begins: list[int], row: int) -> tuple[Any, int]:
        """The file that holds a pair or a prompt, and its place there."""
        shard = bisect_right(begins, row) - 1
        return self._shards[shard], row - begins[shard]


def _gathered(places: list[tuple[Any, int]], name: str) -> Tensor:
    return torch.cat([file.get_slice(name)[place : place + 1] for file, place in places])


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _shard_files(folder: Path) -> list[Path]:
    """The shards in order, up to the first that is missing."""
    numbered = (folder / _shard_name(number) for number in itertools.count())
    return list(itertools.takewhile(Path.exists, numbered))
