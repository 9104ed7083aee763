"""A cache holds what the encoders give, survives interruption at any point, and is read row by row."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from deradiff.alignment import latent_cache
from deradiff.alignment.data_order import Cursor, OrderedRow, Unreadable
from deradiff.alignment.image_transforms import pair_pixels
from deradiff.alignment.latent_cache import LatentCache, write_cache
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.alignment.pairs import PairFolder
from messages import naming

COUNT = 11
PROMPTS = ["a cat", "a dog", "a cat", "a cat", "a cat", "a cat", "a dog", "?", "a fish", "a cat", "a bird"]
DAMAGED = 4


def encode_images(pixels: Tensor) -> Tensor:
    return F.avg_pool2d(pixels, 4).half()


def encode_prompts(texts: list[str]) -> dict[str, Tensor]:
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    numbers = torch.tensor([list(digest[:6]) for digest in digests], dtype=torch.bfloat16)
    return {"hidden": numbers.view(-1, 3, 2), "pooled": numbers[:, :1].float()}


@pytest.fixture
def pairs(tmp_path: Path) -> PairFolder:
    root = tmp_path / "pairs"
    root.mkdir()
    rows = []
    for i, prompt in enumerate(PROMPTS):
        for role, red in (("winner", 10 * i), ("loser", 10 * i + 100)):
            Image.new("RGB", (9 + i, 8), (red, 0, 255)).save(root / f"{i}{role}.png")
        rows.append({"prompt": prompt, "winner": f"{i}winner.png", "loser": f"{i}loser.png"})
    (root / f"{DAMAGED}loser.png").write_bytes(b"nothing")
    (root / "pairs.json").write_text(json.dumps(rows))
    return PairFolder(root)


def write(folder: Path, pairs: Any, **others: Any) -> LatentCache:
    options: dict[str, Any] = {"base": "tiny", "resolution": 8, "batch": 2, "shard": 3}
    options |= {"encode_images": encode_images, "encode_prompts": encode_prompts}
    return write_cache(folder, pairs, **(options | others))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def readable() -> list[int]:
    return [i for i in range(COUNT) if i != DAMAGED]


def test_the_cache_holds_what_the_encoders_give(pairs: PairFolder, tmp_path: Path) -> None:
    cache = write(tmp_path / "cache", pairs)
    assert len(cache) == COUNT - 1 and cache.totals["unreadable"] == {"corrupt image": 1}
    rows = [7, 0, 3, 9, 3]
    batch = cache.take(rows)
    for place, row in enumerate(rows):
        pair = pairs.open(readable()[row])
        view = pair_pixels(pair, 8)
        assert torch.equal(batch.latents[place], encode_images(view.pixels)) and batch.latents.dtype == torch.float16
        assert torch.equal(batch.time_ids[place], view.time_ids)
        assert batch.texts[place] == pair.prompt
        for name, value in encode_prompts([pair.prompt]).items():
            assert torch.equal(batch.prompts[name][place], value[0]) and batch.prompts[name].dtype == value.dtype
        assert torch.equal(cache.take([row]).latents[0], batch.latents[place])
    assert all(torch.equal(cache.empty_prompt()[name], value) for name, value in encode_prompts([""]).items())
    # The winner comes first: it is the darker one of these pictures.
    assert (batch.latents[:, 0, 0] < batch.latents[:, 1, 0]).all()


def test_every_distinct_prompt_is_encoded_once(pairs: PairFolder, tmp_path: Path) -> None:
    encoded: list[str] = []

    def counted(texts: list[str]) -> dict[str, Tensor]:
        assert len(texts) <= 4
        encoded.extend(texts)
        return encode_prompts(texts)

    cache = write(tmp_path / "cache", pairs, encode_prompts=counted)
    assert sorted(encoded) == ["", "?", "a bird", "a cat", "a dog", "a fish"] == sorted(cache.texts)


def test_shard_and_batch_sizes_change_nothing(pairs: PairFolder, tmp_path: Path) -> None:
    one = write(tmp_path / "one", pairs).take(range(10))
    other = write(tmp_path / "other", pairs, batch=4, shard=100).take(range(10))
    assert torch.equal(one.latents, other.latents) and one.texts == other.texts
    assert all(torch.equal(one.prompts[name], other.prompts[name]) for name in one.prompts)


def test_pictures_are_mirrored_by_their_place_alone(
    pairs: PairFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ramp = Image.linear_gradient("L").rotate(90).resize((8, 8)).convert("RGB")
    monkeypatch.setattr(pairs, "open", lambda row: PreferencePair("a", ramp, ramp))
    one = write(tmp_path / "one", pairs, flip=True).take(range(COUNT))
    other = write(tmp_path / "other", pairs, flip=True, batch=4, shard=100).take(range(COUNT))
    assert torch.equal(one.latents, other.latents)
    rising = one.latents[..., 0, 0, 0] < one.latents[..., 0, 0, -1]
    assert rising.any(0).all() and not rising.all(0).any() and (rising[:, 0] != rising[:, 1]).any()
    with pytest.raises(ValueError, match="flip"):
        write(tmp_path / "one", pairs)


def test_interrupted_at_any_call_it_ends_with_the_same_files(pairs: PairFolder, tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    calls: list[str] = []

    def noted(kind: str, encode: Any, fail_at: int) -> Any:
        def call(given: Any) -> Any:
            calls.append(kind)
            if len(calls) == fail_at:
                raise Interrupted
            return encode(given)

        return call

    def run(folder: Path, fail_at: int) -> None:
        calls.clear()
        images, prompts = noted("images", encode_images, fail_at), noted("prompts", encode_prompts, fail_at)
        write(folder, pairs, encode_images=images, encode_prompts=prompts)

    run(tmp_path / "unbroken", 0)
    expected, total = contents(tmp_path / "unbroken"), len(calls)
    assert total > 8
    for fail_at in range(1, total + 1):
        folder = tmp_path / str(fail_at)
        with pytest.raises(Interrupted):
            run(folder, fail_at)
        # A killed process leaves its temporary file.
        (folder / ".shard-00001.safetensors.123.partial").write_bytes(b"half")
        with pytest.raises(ValueError, match=naming(folder, "shards")):
            LatentCache(folder)
        finished = len(list(folder.glob("shard-*")))
        run(folder, 0)
        assert contents(folder) == expected
        assert len(calls) == total if not finished else len(calls) < total, "whole shards are not encoded again"
    run(tmp_path / "unbroken", 0)
    assert not calls, "a finished cache is only opened"


def test_a_full_disk_keeps_the_shards_before_it(
    pairs: PairFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, synced = tmp_path / "cache", []

    def fsync(handle: int) -> None:
        synced.append(handle)
        if len(synced) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(latent_cache.os, "fsync", fsync)
        with pytest.raises(OSError, match=naming("shard-00002.safetensors", "6 pairs")):
            write(folder, pairs)
    assert sorted(contents(folder)) == ["settings.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    write(folder, pairs)
    write(tmp_path / "other", pairs)
    assert contents(folder) == contents(tmp_path / "other")


@pytest.mark.parametrize(
    "changed, values",
    [
        ({"base": "other"}, ['base "tiny"', '"other"']),
        ({"resolution": 16}, ["resolution 8", 16]),
        ({"limit": 5}, ["limit null", 5]),
    ],
)
def test_a_cache_made_with_other_settings_is_refused(
    changed: dict[str, Any], values: list[object], pairs: PairFolder, tmp_path: Path
) -> None:
    write(tmp_path / "cache", pairs)
    before = contents(tmp_path / "cache")
    with pytest.raises(ValueError, match=naming(tmp_path / "cache", *values)):
        write(tmp_path / "cache", pairs, **changed)
    assert contents(tmp_path / "cache") == before


def test_other_pairs_and_other_folders_are_refused(pairs: PairFolder, tmp_path: Path) -> None:
    write(tmp_path / "cache", pairs)
    (pairs.folder / "pairs.json").write_text((pairs.folder / "pairs.json").read_text() + "\n")
    with pytest.raises(ValueError, match=naming(tmp_path / "cache", "source")):
        write(tmp_path / "cache", PairFolder(pairs.folder))
    with pytest.raises(FileExistsError, match=naming(pairs.folder)):
        write(pairs.folder, pairs)
    with pytest.raises(FileNotFoundError, match=naming(pairs.folder, "settings.json")):
        LatentCache(pairs.folder)
    settings = tmp_path / "cache" / "settings.json"
    pairs = PairFolder(pairs.folder)
    record = json.loads(settings.read_text())
    record["settings"]["source"], record["versions"] = pairs.fingerprint, {"torch": "1.0"}
    settings.write_text(json.dumps(record))
    with pytest.warns(UserWarning, match=naming({"torch": "1.0"})):
        write(tmp_path / "cache", pairs)


def test_a_limit_takes_the_first_pairs(pairs: PairFolder, tmp_path: Path) -> None:
    cache, everything = write(tmp_path / "few", pairs, limit=5), write(tmp_path / "all", pairs)
    assert len(cache) == 5 and torch.equal(cache.take(range(5)).latents, everything.take(range(5)).latents)


def test_nan_and_miscounted_encodings_are_refused(pairs: PairFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=naming("tiny", "NaN", "torch.float32")):
        write(tmp_path / "a", pairs, encode_images=lambda pixels: F.avg_pool2d(pixels, 4) / 0)
    with pytest.raises(ValueError, match=naming(3, "latents", 4)):
        write(tmp_path / "b", pairs, encode_images=lambda pixels: pixels[1:])
    with pytest.raises(ValueError, match=naming("pooled", "NaN")):
        write(tmp_path / "c", pairs, encode_prompts=lambda texts: {"pooled": torch.full((len(texts), 1), torch.nan)})
    with pytest.raises(ValueError, match=naming(1, "pooled", 3)):
        write(tmp_path / "d", pairs, encode_prompts=lambda texts: {"pooled": torch.zeros(1, 1)})
    assert not list(tmp_path.glob("[abcd]/shard-*"))


def test_damaged_and_missing_shards_are_named(pairs: PairFolder, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    write(folder, pairs)
    content = (folder / "shard-00001.safetensors").read_bytes()
    (folder / "shard-00001.safetensors").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=naming("shard-00001.safetensors", f"{len(content):,}")):
        LatentCache(folder)
    (folder / "shard-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=naming(folder / "shard-00001.safetensors")):
        LatentCache(folder)


def test_a_source_of_nothing_readable_is_refused(tmp_path: Path) -> None:
    class Nothing:
        fingerprint: dict[str, Any] = {"kind": "test"}  # noqa: RUF012

        def in_order(self, cursor: Cursor | None) -> Iterator[OrderedRow[int]]:
            return (OrderedRow(i, {"next": i + 1}, {"tie": 3}) for i in range(4))

        def open(self, row: int) -> PreferencePair:
            raise Unreadable("corrupt image", f"row {row}")

    with pytest.raises(ValueError, match=naming("'corrupt image': 4")):
        write(tmp_path / "cache", Nothing())


def test_held_out_rows_do_not_train_and_rows_are_checked(pairs: PairFolder, tmp_path: Path) -> None:
    write(tmp_path / "cache", pairs)
    cache = LatentCache(tmp_path / "cache", held_out=3)
    assert len(cache.held_out) == 3 and sorted(cache.training + cache.held_out) == list(range(10))
    assert LatentCache(tmp_path / "cache", held_out=3).held_out == cache.held_out
    for rows, error in (([10], IndexError), ([-1], IndexError), ([], ValueError)):
        with pytest.raises(error):
            cache.take(rows)
