"""The methods of alignment by name: what each one trains on, how it trains, and what its strength means."""

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from diffusers import DiffusionPipeline

from deradiff.algorithm.estimates import effective_sample_size
from deradiff.alignment import diffusion_nft, flow_grpo, policy_gradient
from deradiff.alignment.base import Base
from deradiff.alignment.dpo import train_dpo, train_mapo
from deradiff.alignment.draft import train_alignprop, train_draft
from deradiff.alignment.fitting import sampling_of
from deradiff.alignment.latent_cache import LatentCache
from deradiff.alignment.own_samples import OwnSamples
from deradiff.alignment.refl import train_refl
from deradiff.alignment.rwr import tilted_weights, train_rwr
from deradiff.alignment.scoring import RewardTask
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import LossCurve, TrainingRun
from deradiff.alignment.training_data import (
    AnyPairs,
    TrainingPrompts,
    prepare_pairs,
    prepare_prompts,
    prepare_refl,
    prepare_samples,
)
from deradiff.alignment.training_pairs import CachedPairs, EncodedPairs
from deradiff.anchors.checks import prediction_type
from deradiff.sweep import pipelines
from deradiff.sweep.jobs import Report


@runtime_checkable
class Data(Protocol):
    """What a method trains on."""

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What tells it from other data, as plain data."""
        ...


def _nothing_more(base: Base, settings: Preset) -> None:
    """For methods that refuse nothing before they train."""


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
    require: Callable[[Base, Preset], None] = _nothing_more
    """Raises `ValueError` for settings that training would refuse before its first step."""
    models: Literal["all", "noise", "flows"] = "all"
    """What it aligns: models that predict ε or v, the velocity of a flow, or both."""

    def aligns(self, is_flow: bool) -> bool:
        """Whether it aligns flows, or what predicts ε or v."""
        return self.models in ("all", "flows" if is_flow else "noise")


def fitted(settings: Preset, pipe: Any) -> Preset:
    """`settings` for the kind of model that `pipe` is: a flow is sampled by Euler's method where they name no other.

    Warns of noise in every step of a flow that was distilled to few. Raises `ValueError` for a method that is not for
    it.
    """
    method = METHODS[settings.method]
    prediction = prediction_type(type(pipe.scheduler).__name__, pipe.scheduler.config)
    is_flow = prediction == "flow"
    if not method.aligns(is_flow):
        others = ", ".join(name for name, other in METHODS.items() if other.aligns(is_flow))
        wanted, is_now = ("ε or v", "is a flow") if is_flow else ("the velocity of a flow", f"predicts {prediction}")
        raise ValueError(
            f"{method.title} is for models that predict {wanted}, and {settings.base} {is_now}: take {others}"
        )
    if not is_flow:
        return settings
    if settings.sampling and not settings.sampling["scheduler"].startswith("flow"):
        settings = replace(settings, sampling={**settings.sampling, "scheduler": "flow-euler"})
    if settings.sampling:
        scheduler = pipelines.scheduler_like(pipe.scheduler, settings.sampling["scheduler"])
        pipelines.warn_of_noise(settings.base, pipe, scheduler)
    return settings


# -- preference pairs -------------------------------------------------------------------------------------------------


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


OF_ALL = ("reward_scale", "reward_dropout")
"""Options of all methods that maximise a reward."""


def _requiring(require: Callable[..., Any]) -> Callable[[Base, Preset], None]:
    """What a method whose policy draws refuses."""

    def required(base: Base, settings: Preset) -> None:
        own = {name: value for name, value in settings.options.items() if name not in OF_ALL}
        require(base, sampling_of(settings), settings.batch, settings.plan.accumulate, **own)

    return required


def _prompts_held_out(data: TrainingPrompts, settings: Preset, count: int) -> list[str]:
    return list(data.held_out[:count])


# -- own samples ------------------------------------------------------------------------------------------------------


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
        models="noise",
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
        models="noise",
        strength="λ_KL multiplies the KL divergence between the paths of model and reference, in points of the scaled "
        "reward per nat (DPOK); 0 leaves it out (DDPO).",
        batch="pictures",
        train=_with_reward(policy_gradient.train_ddpo),
        require=_requiring(policy_gradient.require),
    ),
    "flow-grpo": _rewarded(
        title="Flow-GRPO",
        models="flows",
        strength="λ_KL multiplies the KL divergence of each step of the sampler from the reference's times the step's "
        "length, averaged over steps and elements, and is weighed against advantages, in standard deviations of the "
        "reward among the pictures of a prompt; 0 leaves it out.",
        batch="pictures",
        train=_with_reward(flow_grpo.train_flow_grpo),
        require=_requiring(flow_grpo.require),
    ),
    "diffusion-nft": _rewarded(
        title="DiffusionNFT",
        models="flows",
        strength="λ_KL multiplies the squared distance between the velocities of model and reference, averaged over "
        "elements and times, and is weighed against advantages, in standard deviations of the reward among the "
        "pictures of a prompt; 0 leaves it out.",
        batch="pictures",
        train=_with_reward(diffusion_nft.train_diffusion_nft),
        require=_requiring(diffusion_nft.require),
    ),
}
"""By name: `deradiff align --method NAME`."""
