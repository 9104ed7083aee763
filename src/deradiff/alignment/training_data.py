"""What the methods of alignment train on: made under the folder of the result, or found there."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deradiff.alignment.fitting import base_of, prompts_of, require_held_out, require_pairs, reward_of, sampling_of
from deradiff.alignment.latent_cache import LatentCache, write_cache
from deradiff.alignment.own_pairs import draw_pairs
from deradiff.alignment.own_samples import OwnSamples, draw_samples
from deradiff.alignment.pair_streams import PairStream
from deradiff.alignment.pairs import PairFolder, open_pairs
from deradiff.alignment.pixels import vae_fingerprint
from deradiff.alignment.rwr import ReferenceSamples
from deradiff.alignment.settings import Preset
from deradiff.rewards import Reward
from deradiff.sweep import pipelines
from deradiff.sweep.jobs import Report

OWN_PAIRS = 2000

# -- preference pairs -------------------------------------------------------------------------------------------------


AnyPairs = LatentCache | PairFolder | PairStream


def prepare_pairs(pipe: Any, settings: Preset, out: Path, count: int | None, seed: int, report: Report) -> AnyPairs:
    """The pairs, drawn where they are the model's own; as latents in `out/cache` if `settings.cache`."""
    own = settings.data == "own"
    require_pairs(settings, count)
    source = own_pairs(pipe, settings, out / "pairs", count or OWN_PAIRS, seed, report) if own else settings.data
    if not settings.cache:
        return open_pairs(source, held_out=settings.held_out)
    pairs, base = open_pairs(source), base_of(pipe, settings)
    planned = count or (len(pairs) if hasattr(pairs, "__len__") else 0)
    write_cache(
        out / "cache",
        pairs,
        base.encode_images,
        base.call.encode_prompts,
        base=settings.model,
        resolution=settings.resolution,
        flip=settings.flip,
        vae=vae_fingerprint(pipe.vae),
        limit=count,
        shard=256,
        report=lambda done, line: report("encoding pairs", done, max(planned, done), line),
    )
    return LatentCache(out / "cache", held_out=settings.held_out)


def own_pairs(pipe: Any, settings: Preset, folder: Path, count: int, seed: int, report: Report) -> Path:
    """Pairs of the model's own pictures, compared by the reward."""
    sampling = settings.sampling
    pipe.scheduler = pipelines.scheduler_like(pipe.scheduler, sampling["scheduler"])
    return draw_pairs(
        folder,
        pipe,
        settings.base,
        prompts_of(settings, count, seed),
        reward_of(settings, pipe.device),
        temperature=0.25,
        steps=sampling["steps"],
        guidance_scale=sampling["guidance_scale"],
        seed=seed,
        report=partial(report, "drawing pairs"),
    )


# -- prompts and a reward ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingPrompts:
    """Prompts to train on, and others that only measure progress; samples of the base for ReFL's other loss."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]
    reward: Reward
    fingerprint: dict[str, Any]
    samples: ReferenceSamples | None = None


def prepare_prompts(
    pipe: Any, settings: Preset, out: Path, count: int | None, seed: int, report: Report
) -> TrainingPrompts:
    """The prompts of `settings.data`, of which the last are held out; nothing is written."""
    texts = prompts_of(settings, count, seed)
    require_held_out(settings, len(texts), "prompts")
    digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    fingerprint = {"kind": "prompts", "prompts": len(texts), "source": settings.data, "sha256": digest}
    trained_on = len(texts) - settings.held_out
    return TrainingPrompts(
        tuple(texts[:trained_on]), tuple(texts[trained_on:]), reward_of(settings, pipe.device), fingerprint
    )


def prepare_refl(
    pipe: Any, settings: Preset, out: Path, count: int | None, seed: int, report: Report
) -> TrainingPrompts:
    """As `prepare_prompts`; for a pre-training loss two samples of the base for each prompt, in `out/samples`."""
    data = prepare_prompts(pipe, settings, out, count, seed, report)
    if not settings.options["pretraining"]:
        return data
    drawn = _own_samples(pipe, settings, out, data.training, 2, data.reward, seed, report)
    return replace(data, samples=drawn.samples)


# -- own samples ------------------------------------------------------------------------------------------------------


def prepare_samples(pipe: Any, settings: Preset, out: Path, count: int | None, seed: int, report: Report) -> OwnSamples:
    """Samples of the base itself for the prompts of `settings.data`, drawn and scored into `out/samples`."""
    prompts, reward = prompts_of(settings, count, seed), reward_of(settings, pipe.device)
    return _own_samples(pipe, settings, out, prompts, settings.options["per_prompt"], reward, seed, report)


def _own_samples(
    pipe: Any,
    settings: Preset,
    out: Path,
    prompts: Sequence[str],
    per_prompt: int,
    reward: Reward,
    seed: int,
    report: Report,
) -> OwnSamples:
    return draw_samples(
        out / "samples",
        base_of(pipe, settings),
        settings.model,
        prompts,
        per_prompt,
        reward,
        sampling_of(settings),
        seed=seed,
        report=partial(report, "drawing samples"),
    )
