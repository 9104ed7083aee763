"""Pairs in training: from a cache or encoded on the way, the same; a stream that goes on where it was."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deradiff.alignment.base import Base, Policy
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.latent_cache import LatentCache, write_cache
from deradiff.alignment.pair_streams import PairStream
from deradiff.alignment.pairs import PairFolder
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.alignment.training_pairs import CachedPairs, EncodedPairs
from deradiff.worlds import digits
from messages import naming

PLAN = TrainingPlan(steps=4, learning_rate=1e-3, warmup=0, average=0.0, evaluate_every=2, checkpoint_seconds=0)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 32, 3), np.uint8))


def folder_of(path: Path, pairs: int) -> Path:
    path.mkdir()
    for i in range(2 * pairs):
        picture(i).save(path / f"{i}.png")
    rows = [{"prompt": f"a {i % 3}", "winner": f"{2 * i}.png", "loser": f"{2 * i + 1}.png"} for i in range(pairs)]
    (path / "pairs.json").write_text(json.dumps(rows))
    return path


class InMemory:
    """Two shards of pairs as a hub would give them."""

    fingerprint: dict[str, Any] = {"kind": "test"}  # noqa: RUF012

    def __len__(self) -> int:
        return 2

    def rows(self, shard: int, start: int) -> Any:
        return ({"prompt": f"{shard}{i}", "winner": picture(i), "loser": picture(i + 50)} for i in range(start, 9))

    def name(self, shard: int) -> str:
        return f"shard {shard}"


@pytest.fixture(scope="module")
def base() -> Base:
    return Base(digits.load_pipeline())


def test_encoded_on_the_way_is_what_the_cache_gives(base: Base, tmp_path: Path) -> None:
    source = PairFolder(folder_of(tmp_path / "pairs", 12), held_out=3)
    write_cache(tmp_path / "cache", source, base.encode_images, base.call.encode_prompts, base="digits", resolution=32)
    cached = CachedPairs(LatentCache(tmp_path / "cache", held_out=3), seed=5)
    encoded = EncodedPairs(base, source, 32, seed=5)
    assert (cached.training, cached.held_out) == (9, 3) == (encoded.training, encoded.held_out)
    for step in range(4):
        for index in range(2):
            ours, theirs = (pairs.batch(BatchPart(step, index, 2), 4) for pairs in (encoded, cached))
            assert ours.texts == theirs.texts and torch.equal(ours.time_ids, theirs.time_ids)
            torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ours.prompts, theirs.prompts, atol=1e-5, rtol=1e-5)
    ours, theirs = encoded.held_out_batch(range(1, 3)), cached.held_out_batch(range(1, 3))
    assert ours.texts == theirs.texts
    torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-5, rtol=1e-5)


def test_processes_get_the_parts_of_one_batch_mirrored_alike(base: Base) -> None:
    def pairs(flip: bool = True, processes: int = 1) -> EncodedPairs:
        return EncodedPairs(base, PairStream(InMemory(), held_out=2, buffer=4), 32, 1, processes, flip)

    alone, shared, plain = pairs(), [pairs(processes=2) for _ in "ab"], pairs(flip=False)
    torch.testing.assert_close(alone.held_out_batch(range(2)).latents, plain.held_out_batch(range(2)).latents)
    same = 0
    for step in range(3):
        whole = alone.batch(BatchPart(step), 8)
        # Two micro-batches of two processes each.
        parts = [shared[index % 2].batch(BatchPart(step, index, 4), 8) for index in range(4)]
        assert [text for part in parts for text in part.texts] == whole.texts
        torch.testing.assert_close(torch.cat([part.latents for part in parts]), whole.latents, atol=1e-4, rtol=1e-4)
        apart = (whole.latents - plain.batch(BatchPart(step), 8).latents).flatten(2).abs().amax(2)
        same += int((apart < 1e-3).sum())
    assert 12 < same < 36
    with pytest.raises(ValueError, match=naming("batch", 8, 3)):
        alone.batch(BatchPart(0, 0, 3), 8)


class Interrupted(Exception):
    """Stands for a machine that went away."""


def test_a_stream_goes_on_where_it_was(base: Base, tmp_path: Path) -> None:
    def aligned(name: str, stop_at: int | None = None) -> tuple[dict[str, torch.Tensor], LossCurve]:
        def report(done: int, planned: int, line: str) -> None:
            if done == stop_at:
                raise Interrupted

        policy = Policy(base, seed=3)
        pairs = EncodedPairs(base, PairStream(InMemory(), held_out=2, buffer=4), 32, seed=1)
        curve = train_dpo(
            base,
            policy,
            pairs,
            500.0,
            replace(PLAN, evaluate_every=1),
            batch=3,
            dropout=0.1,
            run=TrainingRun(
                seed=1,
                checkpoint=tmp_path / name,
                report=report,
            ),
        )
        return policy.model.state_dict(), curve

    whole, curve = aligned("whole")
    with pytest.raises(Interrupted):
        aligned("broken", stop_at=3)
    progress = json.loads((tmp_path / "broken" / "progress.json").read_text())
    assert progress["step"] == 2 and progress["data"]["cursor"]
    again, same = aligned("broken")
    assert same == curve and all(torch.equal(again[name], value) for name, value in whole.items())
