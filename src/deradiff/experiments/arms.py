"""What a plan does with its models: methods, and the arms, ways to get an image, that they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Final, Literal, Protocol, TypeVar, runtime_checkable

from pydantic import Field, field_validator, model_validator

from deradiff.algorithm.schedules import taking_turns
from deradiff.files.plans import PlanPart, Several
from deradiff.sampling.realignment import lam_for_beta
from deradiff.sweep import notation
from deradiff.sweep.description import (
    ManifoldGuidance,
    NoiseOptimization,
    ReversibleNoise,
    RewardGuidance,
    RewardParticles,
)
from deradiff.sweep.notation import plain

ALL: Final = "all"
"""Written in place of a list of names."""

Names = Several[str] | Literal["all"]

Lams = Several[float]

BY_WEIGHTS: Final = ("interpolate", "soup")
"""Methods that interpolate weights."""

TURNS: Final = "db-mpa-ls"
"""The method by which one model is drawn for every step."""

Guidance = TypeVar("Guidance", bound=RewardGuidance)


class Model(PlanPart):
    """An aligned model: any source that `realign` takes, and the strength it was aligned with."""

    source: str
    beta: float | None = Field(default=None, gt=0)
    """The KL strength β. Models of one `family` are aligned alike, so that their β mean the same."""
    family: str = "aligned"
    reward: str = ""
    """The reward it was aligned for, if one: where a plan's models have several, fronts of one leave the others out."""
    character: str = ""
    """The file that `deradiff examine` wrote of it as an anchor of the plan's reference: verdicts go by it."""
    made_by: str = ""
    """The command that makes it, for where it is not there."""


@runtime_checkable
class Models(Protocol):
    """What methods know of their plan."""

    @property
    def models(self) -> Mapping[str, Model]:
        """Its models by name."""
        ...

    def named(self, names: Names) -> tuple[str, ...]:
        """The models of these names. Raises `ValueError` for one that there is not."""
        ...


@dataclass(frozen=True)
class Arm:
    """One way to get an image for a prompt and a seed: what the rows of every table are."""

    name: str
    method: str
    anchors: tuple[tuple[str, float], ...] = ()
    """The models that take part and their λ; none is the reference."""
    schedule: str = ""
    """How λ grows, in the notation of `notation.schedule`; empty where it stays."""
    particles: int = 0
    target: str = ""
    """The model that this arm approximates."""
    reward_guidance: RewardGuidance | None = None
    prompts: Names = ALL
    """The prompt sets that it is drawn for."""
    sampling: str = ""
    """The name of how it is sampled."""

    @property
    def lam(self) -> float | None:
        """λ where there is one anchor."""
        return self.anchors[0][1] if len(self.anchors) == 1 else None

    @property
    def content(self) -> tuple[Any, ...]:
        """All that it does, however it is worded: arms are the same where this is."""
        shape = notation.schedule(self.schedule, "steps") if self.schedule else None
        return self.method, tuple(sorted(self.anchors)), shape, self.particles, self.target, self.reward_guidance


class _Method(PlanPart):
    prompts: Names = ALL
    """The prompt sets that this method is drawn for."""
    sampling: Names = ALL
    """The ways of sampling that it is drawn by."""


class Reference(_Method):
    """The reference as it is."""

    method: Literal["reference"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One."""
        yield Arm("reference", self.method, prompts=self.prompts)


class AsIs(_Method):
    """Aligned models as they are: retrained ones, KL-regularised ones, ReFL, ..."""

    method: Literal["model"]
    models: Names = ALL

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each model."""
        for name in plan.named(self.models):
            yield Arm(name, self.method, ((name, 1.0),), prompts=self.prompts)


class _OfAnchors(_Method):
    anchors: Names = Field(default=ALL)
    lam: Lams = ()

    @field_validator("lam", mode="before")
    @classmethod
    def _read_lam(cls, given: Any) -> Any:
        if isinstance(given, str):
            return tuple(notation.numbers(given, "lam"))
        return (given,) if isinstance(given, int | float) else given

    def _each(self, plan: Models) -> Iterator[tuple[str, float]]:
        """Every anchor at every λ."""
        return product(plan.named(self.anchors), self.lam)


class Realign(_OfAnchors):
    """DeRaDiff: one anchor at several λ, or at those λ that stand for the β of other models of its family.

    Reinforcement Learning Guidance (Jin et al. 2025, arXiv 2508.21016, `(1 - w) v_ref + w v_RL`, mostly at w above 1)
    and DB-KLA of Diffusion Blend (Cheng et al. 2025, arXiv 2505.18547) are the same λ under other names: wherever a
    sampler's step is affine in the prediction, the mixture of posteriors is the step of mixed predictions.
    """

    method: Literal["realign", "rlg", "db-kla"]
    targets: Names = ()
    particles: int = Field(default=0, ge=0)
    """Particles for every image, of which one is drawn by weight; 0 for Algorithm 1."""

    @model_validator(mode="after")
    def _one_kind(self) -> Realign:
        if bool(self.lam) == bool(self.targets):
            raise ValueError("realign needs λ as `lam`, or the models it stands for as `targets`: give one of both")
        return self

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each anchor and λ."""
        suffix = f", {self.particles} particles" if self.particles else ""
        for name in plan.named(self.anchors):
            for lam in self.lam:
                named = f"{name}, λ = {plain(lam)}{suffix}"
                yield Arm(named, "realign", ((name, lam),), "", self.particles, prompts=self.prompts)
            for target in plan.named(self.targets) if self.targets else ():
                anchor, other = plan.models[name], plan.models[target]
                if anchor.beta is None or other.beta is None or anchor.family != other.family:
                    # `all` are those that there can be, which for an anchor that is named and has no β are none.
                    if self.targets == ALL and (anchor.beta is not None or self.anchors == ALL):
                        continue
                    without = " and ".join(m for m in (name, target) if plan.models[m].beta is None)
                    why = f"{without} has no beta" if without else f"{anchor.family!r} is not {other.family!r}"
                    raise ValueError(
                        f"{name} cannot stand for {target}: both need a beta, and the same family, since λ = β/β', and "
                        f"{why}"
                    )
                lam = lam_for_beta(anchor.beta, other.beta)
                named = f"{name} → {target}{suffix}"
                yield Arm(named, "realign", ((name, lam),), "", self.particles, target, prompts=self.prompts)


class _OfSeveral(_Method):
    method: str
    lams: Several[dict[str, float]] = Field(min_length=1)

    def _each(self, plan: Models) -> Iterator[tuple[str, tuple[tuple[str, float], ...]]]:
        """Every combination, in words and as λ of its anchors. Raises `ValueError` for one of fewer than two."""
        for lams in self.lams:
            if len(plan.named(tuple(lams))) < 2:
                raise ValueError(f"{self.method} needs λ of two anchors or more, got {lams}: one is for realign")
            yield " + ".join(f"{plain(lam)} {anchor}" for anchor, lam in lams.items()), tuple(lams.items())


class Combine(_OfSeveral):
    """Several rewards at once: λ for each of several anchors (DeRaDiff, appendix A.4).

    Where the λ sum to one it is DB-MPA of Diffusion Blend (Cheng et al. 2025, arXiv 2505.18547).
    """

    method: Literal["combine", "db-mpa"]
    particles: int = Field(default=0, ge=0)

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each combination."""
        suffix = f", {self.particles} particles" if self.particles else ""
        for name, anchors in self._each(plan):
            yield Arm(f"{name}{suffix}", "combine", anchors, "", self.particles, prompts=self.prompts)


class Soup(_OfSeveral):
    """Rewarded soups (Ramé et al. 2023, arXiv 2306.04488): the weights of several anchors, interpolated.

    `θ = (1 - Σ λ_i) θ_0 + Σ λ_i θ_i`, one model; in the paper the λ sum to one.
    """

    method: Literal["soup"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each combination."""
        for name, anchors in self._each(plan):
            yield Arm(f"soup, {name}", self.method, anchors, prompts=self.prompts)


class TakeTurns(_OfSeveral):
    """DB-MPA-LS of Diffusion Blend (Cheng et al. 2025): at each step one anchor, drawn with probability λ.

    It approximates `combine` by one evaluation a step. What the λ leave of 1 is the reference's. All images of a seed
    have the same turns.
    """

    method: Literal["db-mpa-ls"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each combination."""
        for name, anchors in self._each(plan):
            taking_turns(dict(anchors), 0)
            yield Arm(f"turns, {name}", self.method, anchors, prompts=self.prompts)


class Anneal(_OfAnchors):
    """Annealed importance guidance: λ grows from 0 along a schedule."""

    method: Literal["anneal"]
    schedules: Several[str] = Field(min_length=1)
    lam: Lams = (1.0,)

    @field_validator("schedules")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for text in given:
            if notation.schedule(text, "steps", "schedules") is None:
                raise ValueError("a constant λ is no annealing: take realign")
        return given

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each anchor, λ and schedule."""
        for (name, lam), schedule in product(self._each(plan), self.schedules):
            reach = "" if lam == 1 else f" up to {plain(lam)}"
            yield Arm(f"{name}, {schedule}{reach}", self.method, ((name, lam),), schedule, prompts=self.prompts)


class Interpolate(_OfAnchors):
    """Weight interpolation, which for a LoRA is LoRA scaling."""

    method: Literal["interpolate"]
    lam: Lams = Field(min_length=1)

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each anchor and λ."""
        for name, lam in self._each(plan):
            yield Arm(f"{name}, weights at {plain(lam)}", self.method, ((name, lam),), prompts=self.prompts)


class _ByReward(_Method, RewardGuidance):
    def _guidance(self, kind: type[Guidance], **chosen: Any) -> Guidance:
        """Its settings alone, with those `chosen`."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields if name not in chosen}, **chosen)

    def _name(self, what: str, guidance: RewardGuidance, *words: str, **unusual: str) -> str:
        """An arm in words: `unusual` are settings, by field, that are named where they are not the usual ones."""
        of = f" of {self.pipeline}" if self.pipeline else ""
        fields = type(guidance).model_fields
        others = [
            f"{word} {plain(getattr(guidance, field))}"
            for field, word in unusual.items()
            if getattr(guidance, field) != fields[field].default
        ]
        return ", ".join([f"{what}{of} for {self.reward}", *words, *others])


class OptimizeNoise(NoiseOptimization, _ByReward):
    """The reference, or another pipeline, from noise that was optimised for a reward."""

    method: Literal["optimize-noise"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One."""
        noise = self._guidance(NoiseOptimization)
        unusual = {
            "learning_rate": "rate",
            "norm_weight": "norm weight",
            "steps": "steps",
            "guidance_scale": "guidance",
        }
        name = self._name("noise", noise, f"{self.iterations} iterations", **unusual)
        yield Arm(name, self.method, reward_guidance=noise, prompts=self.prompts)


class Doodl(ReversibleNoise, _ByReward):
    """DOODL (Wallace et al. 2023, arXiv 2303.13703): the noise of EDICT, optimised for a reward."""

    method: Literal["doodl"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One."""
        noise = self._guidance(ReversibleNoise)
        unusual = {"learning_rate": "rate", "clip": "clip", "steps": "steps"}
        name = self._name("DOODL", noise, f"{self.iterations} iterations", **unusual)
        yield Arm(name, self.method, reward_guidance=noise, prompts=self.prompts)


class ByParticles(_ByReward):
    """Particles with a reward as potential: DAS (Kim et al. 2025), TDS (Wu et al. 2023), or weighed alone, without the
    reward's gradient (Feynman-Kac steering, Singhal et al. 2025); see `alignment.reward_particles`.
    """

    method: Literal["das", "tds", "fk-steering"]
    beta: Lams = Field(min_length=1)
    particles: int = 4

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each β."""
        switches = {"gradient": self.method != "fk-steering", "tempered": self.method == "das"}
        for beta in self.beta:
            guidance = self._guidance(RewardParticles, beta=beta, **switches)
            what = "steering" if self.method == "fk-steering" else self.method.upper()
            words = f"β = {plain(beta)}", f"{self.particles} particles"
            name = self._name(what, guidance, *words, steps="steps")
            yield Arm(name, self.method, reward_guidance=guidance, prompts=self.prompts)


class ByManifold(_ByReward):
    """Manifold-preserving guidance (MPGD; He et al. 2024); see `alignment.manifold_guidance`."""

    method: Literal["mpgd"]
    beta: Lams = Field(min_length=1)

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each β."""
        for beta in self.beta:
            guidance = self._guidance(ManifoldGuidance, beta=beta)
            name = self._name("MPGD", guidance, f"β = {plain(beta)}", steps="steps")
            yield Arm(name, self.method, reward_guidance=guidance, prompts=self.prompts)


Method = Annotated[
    Reference
    | AsIs
    | Realign
    | Combine
    | Soup
    | TakeTurns
    | Anneal
    | Interpolate
    | OptimizeNoise
    | Doodl
    | ByParticles
    | ByManifold,
    Field(discriminator="method"),
]
