"""The methods of alignment by name: what each one trains on, how it trains, and what its strength means."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from accelerate import Accelerator
from diffusers import DiffusionPipeline

from deradiff import pipelines
from deradiff.alignment.base import Base
from deradiff.alignment.dpo import train_dpo
from deradiff.alignment.latent_cache import LatentCache, write_cache
from deradiff.alignment.loop import Curve
from deradiff.alignment.own_pairs import draw_pairs
from deradiff.alignment.pair_streams import PairStream
from deradiff.alignment.pairs import PairFolder, open_pairs
from deradiff.alignment.presets import Preset
from deradiff.alignment.training_pairs import CachedPairs, EncodedPairs
from deradiff.jobs import Report
from deradiff.rewards.digits import DigitsReward
from deradiff.worlds.digits import captions

OWN_PAIRS = 2000


@runtime_checkable
class Data(Protocol):
    """What a method trains on."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from other data, as plain data."""
        ...


@dataclass(frozen=True)
class Method:
    """One way to align.

    `prepare(pipe, settings, out, count, seed, report)` makes the data under `out`, or finds it there. `train(base,
    policy, data, beta, settings, *, seed, checkpoint, report, accelerator, identity)` aligns the policy.
    """

    title: str
    symbol: str
    strength: str
    """What its strength, `symbol`, multiplies: for the model card."""
    loss: str
    """What the held-out loss is."""
    unit: str
    """What a batch counts; the data's fingerprint has their number under this name."""
    decodes: bool
    """Whether training needs VAE and text encoders, with all data prepared."""
    prepare: Callable[[DiffusionPipeline, Preset, Path, int | None, int, Report], Any]
    train: Callable[..., Curve]


# -- preference pairs -------------------------------------------------------------------------------------------------


def prepare_pairs(
    pipe: Any, settings: Preset, out: Path, count: int | None, seed: int, report: Report
) -> LatentCache | PairFolder | PairStream:
    """The pairs, drawn where they are the model's own; as latents in `out/cache` if `settings.cache`."""
    own = settings.data == "own"
    source = own_pairs(pipe, settings, out / "pairs", count or OWN_PAIRS, seed, report) if own else settings.data
    if not settings.cache:
        if count and not own:
            raise ValueError("--pairs limits what is cached; without a cache all pairs are used")
        return open_pairs(source, held_out=settings.held_out)
    pairs, base = open_pairs(source), Base(pipe)
    planned = count or (len(pairs) if hasattr(pairs, "__len__") else 0)
    write_cache(
        out / "cache", pairs, base.encode_images, base.encode_prompts,
        base=" with ".join(filter(None, (settings.base, settings.vae))), resolution=settings.resolution, limit=count,
        shard=256, report=lambda done, line: report("encoding pairs", done, max(planned, done), line),
    )  # fmt: skip
    return LatentCache(out / "cache", held_out=settings.held_out)


def own_pairs(pipe: Any, settings: Preset, folder: Path, count: int, seed: int, report: Report) -> Path:
    """Pairs of the model's own pictures. Raises `ValueError` for a model without prompts and a reward of its own."""
    if settings.base != "digits":
        raise ValueError("own pairs need prompts and a reward, which only the digits bring along: name --data")
    sampling = settings.sampling
    pipe.scheduler = pipelines.scheduler_like(pipe.scheduler, sampling["scheduler"])
    return draw_pairs(
        folder, pipe, settings.base, captions.sample_prompts(count, seed), DigitsReward(), temperature=0.25,
        steps=sampling["steps"], guidance_scale=sampling["guidance_scale"], seed=seed,
        report=partial(report, "drawing pairs"),
    )  # fmt: skip


def _dpo(
    base: Base, policy: Any, data: LatentCache | PairFolder | PairStream, beta: float, settings: Preset, *, seed: int,
    accelerator: Accelerator | None, **common: Any,
) -> Curve:  # fmt: skip
    processes = accelerator.num_processes if accelerator else 1
    pairs = (
        CachedPairs(data, seed)
        if isinstance(data, LatentCache)
        else EncodedPairs(base, data, settings.resolution, seed, processes)
    )
    return train_dpo(
        base, policy, pairs, beta, settings.plan_at(beta), batch=settings.batch, dropout=settings.prompt_dropout,
        seed=seed, accelerator=accelerator, **common,
    )  # fmt: skip


METHODS: dict[str, Method] = {
    "dpo": Method(
        title="Diffusion-DPO",
        symbol="β",
        strength="β multiplies half a difference of ε-errors averaged over the elements of a latent, the convention of "
        "the method's released code.",
        loss="log 2 = 0.69315 before alignment",
        unit="pairs",
        decodes=False,
        prepare=prepare_pairs,
        train=_dpo,
    ),
}
"""By name: `deradiff align --method NAME`."""
