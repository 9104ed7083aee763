"""The methods of alignment by name: what each one trains on, how it trains, and what its strength means."""

import hashlib
import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline

from deradiff.algorithm.estimates import effective_sample_size
from deradiff.alignment.base import Base
from deradiff.alignment.dpo import train_dpo, train_mapo
from deradiff.alignment.draft import train_alignprop, train_draft
from deradiff.alignment.fitting import (
    base_of,
    prompts_of,
    require_held_out,
    require_pairs,
    reward_of,
    sampling_of,
)
from deradiff.alignment.latent_cache import LatentCache, write_cache
from deradiff.alignment.own_pairs import draw_pairs
from deradiff.alignment.own_samples import OwnSamples, draw_samples
from deradiff.alignment.pair_streams import PairStream
from deradiff.alignment.pairs import PairFolder, open_pairs
from deradiff.alignment.pixels import vae_fingerprint
from deradiff.alignment.policy_gradient import train_ddpo
from deradiff.alignment.presets import Preset
from deradiff.alignment.refl import train_refl
from deradiff.alignment.rwr import ReferenceSamples, tilted_weights, train_rwr
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.training import LossCurve, TrainingRun
from deradiff.alignment.training_pairs import CachedPairs, EncodedPairs
from deradiff.anchors.checks import prediction_type
from deradiff.rewards import Reward
from deradiff.sweep import pipelines
from deradiff.sweep.jobs import Report

OWN_PAIRS = 2000


@runtime_checkable
class Data(Protocol):
    """What a method trains on."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from other data, as plain data."""
        ...


@dataclass(frozen=True)
class TrainingMethod:
    """One way to align.

    `prepare(pipe, settings, out, count, seed, report)` makes the data under `out`, or finds it there. `train(base,
    policy, data, beta, settings, run)` aligns the policy.
    """

    title: str
    symbol: str
    may_be_zero: bool
    """Whether a strength of 0, no regularisation, means something."""
    strength: str
    """What its strength, `symbol`, multiplies: for the model card."""
    loss: str
    """What the held-out loss is."""
    unit: str
    """What the data count; their fingerprint has the number under this name."""
    batch: str
    """What a batch counts."""
    decodes: bool
    """Whether training needs VAE and text encoders, with all data prepared."""
    prepare: Callable[[DiffusionPipeline, Preset, Path, int | None, int, Report], Any]
    train: Callable[..., LossCurve]
    prompts: Callable[[Any, Preset, int], list[str]]
    """Of the data and the settings, so many of the prompts that are not trained on, or fewer."""
    for_flows: bool = True
    """Whether it aligns models that predict the velocity of a flow."""


def fitted(settings: Preset, pipe: Any) -> Preset:
    """`settings` for the kind of model that `pipe` is: a flow is sampled by Euler's method where they name no other.

    Raises `ValueError` for a method that is not for flows.
    """
    method = METHODS[settings.method]
    if prediction_type(type(pipe.scheduler).__name__, pipe.scheduler.config) != "flow":
        return settings
    if not method.for_flows:
        others = ", ".join(name for name, other in METHODS.items() if other.for_flows)
        raise ValueError(
            f"{method.title} is for models that predict ε or v, and {settings.base} is a flow: take {others}"
        )
    if not settings.sampling or settings.sampling["scheduler"].startswith("flow"):
        return settings
    return replace(settings, sampling={**settings.sampling, "scheduler": "flow-euler"})


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


def _with_pairs(train: Callable[..., LossCurve]) -> Callable[..., LossCurve]:
    """The trainer of a method that compares pairs."""

    def trained(base: Base, policy: Any, data: AnyPairs, beta: float, settings: Preset, run: TrainingRun) -> LossCurve:
        if isinstance(data, LatentCache):
            pairs: CachedPairs | EncodedPairs = CachedPairs(data, run.seed)
        else:
            processes = run.accelerator.num_processes if run.accelerator else 1
            pairs = EncodedPairs(base, data, settings.resolution, run.seed, processes, settings.flip)
        plan, dropout = settings.plan_at(beta), settings.prompt_dropout
        return train(base, policy, pairs, beta, plan, batch=settings.batch, dropout=dropout, run=run)

    return trained


def _pairs_held_out(data: AnyPairs, settings: Preset, count: int) -> list[str]:
    if isinstance(data, LatentCache):
        return data.take(data.held_out[:count]).texts
    return [pair.prompt for pair in itertools.islice(data.held_out(), count)]


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


def _with_reward(train: Callable[..., LossCurve]) -> Callable[..., LossCurve]:
    """The trainer of a method that samples for prompts and scores what it drew."""

    def trained(
        base: Base, policy: Any, data: TrainingPrompts, beta: float, settings: Preset, run: TrainingRun
    ) -> LossCurve:
        options, held_by = dict(settings.options), {"samples": data.samples} if data.samples else {}
        task = RewardTask(
            base,
            policy,
            data.training,
            data.held_out,
            data.reward,
            beta,
            settings.plan,
            run,
            settings.batch,
            sampling_of(settings),
            scale=options.pop("reward_scale"),
            dropout=options.pop("reward_dropout"),
        )
        return train(task, **options, **held_by)

    return trained


def _prompts_held_out(data: TrainingPrompts, settings: Preset, count: int) -> list[str]:
    return list(data.held_out[:count])


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


def _rwr(base: Base, policy: Any, data: OwnSamples, beta: float, settings: Preset, run: TrainingRun) -> LossCurve:
    conditions = data.conditions()
    weights = tilted_weights(data.rewards / beta, conditions)
    totals = torch.zeros(int(conditions.max()) + 1, dtype=weights.dtype).index_add(0, conditions, weights)
    effective = float(effective_sample_size(totals.log()))
    if effective < len(totals) / 2:
        warnings.warn(
            f"β = {beta:g}: the weights count {effective:.0f} of {len(totals)} prompts, so that a few lucky samples "
            "are trained on again and again. Raise β, or draw more samples of every prompt (--per-prompt)",
            stacklevel=2,
        )
    held_out, batch, dropout = settings.held_out, settings.batch, settings.prompt_dropout
    plan, samples = settings.plan, data.samples
    return train_rwr(base, policy, samples, weights, plan, held_out=held_out, batch=batch, dropout=dropout, run=run)


def _samples_held_out(data: OwnSamples, settings: Preset, count: int) -> list[str]:
    return list(dict.fromkeys(data.samples.prompts[-settings.held_out :]))[:count]


_paired = partial(
    TrainingMethod,
    symbol="β",
    unit="pairs",
    batch="pairs",
    decodes=False,
    prepare=prepare_pairs,
    prompts=_pairs_held_out,
)
"""A method that compares pairs."""

_rewarded = partial(
    TrainingMethod,
    symbol="λ_KL",
    may_be_zero=True,
    loss="minus the mean reward of pictures for held-out prompts, with the term of the strength",
    unit="prompts",
    decodes=True,
    prepare=prepare_prompts,
    prompts=_prompts_held_out,
)
"""A method that samples for prompts and scores what it drew."""

_DISTANCE = (
    "λ_KL multiplies the squared distance between the predictions of model and reference, averaged over the elements "
    "of a latent,"
)

METHODS: dict[str, TrainingMethod] = {
    "dpo": _paired(
        title="Diffusion-DPO",
        may_be_zero=False,
        strength="β multiplies half a difference of squared errors averaged over the elements of a latent: of ε, as in "
        "the method's released code, or for a flow of the velocity (Flow-DPO with a constant β).",
        loss="log 2 = 0.69315 before alignment",
        train=_with_pairs(train_dpo),
    ),
    "mapo": _paired(
        title="MaPO",
        for_flows=False,
        may_be_zero=True,
        strength="β multiplies the term of the margin between winner and loser, beside the winners' own denoising "
        "loss: a larger β moves farther, and there is no reference. 0 is fine-tuning on the winners.",
        loss="the winners' denoising loss with the term of the margin",
        train=_with_pairs(train_mapo),
    ),
    "draft": _rewarded(
        title="DRaFT",
        strength=f"{_DISTANCE} summed over the last K steps (Annealed Importance Guidance, equation 4, divided by the "
        "number of elements as in its authors' code); 0 leaves it out.",
        batch="prompts",
        train=_with_reward(train_draft),
    ),
    "alignprop": _rewarded(
        title="AlignProp",
        strength=f"{_DISTANCE} summed over the last steps that gradients go through, whose number is drawn for every "
        "training step; 0, as published, leaves it out.",
        batch="prompts",
        train=_with_reward(train_alignprop),
    ),
    "refl": _rewarded(
        title="ReFL",
        strength=f"{_DISTANCE} at the step that gradients go through; 0, as published, leaves it out.",
        batch="prompts",
        prepare=prepare_refl,
        train=_with_reward(train_refl),
    ),
    "rwr": TrainingMethod(
        title="reward-weighted denoising",
        symbol="β",
        may_be_zero=False,
        strength="The base's own samples are weighted by exp(r/β), with β in points of the reward: the exact target of "
        "alignment that a KL divergence of strength β regularises.",
        loss="weighted denoising loss of held-out samples",
        unit="samples",
        batch="samples",
        decodes=True,
        prepare=prepare_samples,
        train=_rwr,
        prompts=_samples_held_out,
    ),
    "ddpo": _rewarded(
        title="DDPO",
        for_flows=False,
        strength="λ_KL multiplies the KL divergence between the paths of model and reference, in points of the scaled "
        "reward per nat (DPOK); 0 leaves it out (DDPO).",
        batch="pictures",
        train=_with_reward(train_ddpo),
    ),
}
"""By name: `deradiff align --method NAME`."""
