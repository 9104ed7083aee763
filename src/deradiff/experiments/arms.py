"""What a plan does with its models: methods, and the arms, ways to get an image, that they come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Final, Literal, Protocol, runtime_checkable

from pydantic import Field, field_validator, model_validator

from deradiff.files.plans import PlanPart, Several
from deradiff.sampling.realignment import lam_for_beta
from deradiff.sweep import notation
from deradiff.sweep.description import NoiseOptimization
from deradiff.sweep.notation import plain

ALL: Final = "all"
"""Written in place of a list of names."""

Names = Several[str] | Literal["all"]

Lams = Several[float]


class Model(PlanPart):
    """An aligned model: any source that `realign` takes, and the strength it was aligned with."""

    source: str
    beta: float | None = Field(default=None, gt=0)
    """The KL strength β. Models of one `family` are aligned alike, so that their β mean the same."""
    family: str = "aligned"
    reward: str = ""
    """The reward it was aligned for, if one: where a plan's models have several, fronts of one leave the others out."""
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
    noise: NoiseOptimization | None = None
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
        return self.method, tuple(sorted(self.anchors)), shape, self.particles, self.target, self.noise


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
    """DeRaDiff: one anchor at several λ, or at those λ that stand for the β of other models of its family."""

    method: Literal["realign"]
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
                yield Arm(named, self.method, ((name, lam),), "", self.particles, prompts=self.prompts)
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
                yield Arm(named, self.method, ((name, lam),), "", self.particles, target, prompts=self.prompts)


class Combine(_Method):
    """Several rewards at once: λ for each of several anchors (DeRaDiff, appendix A.4)."""

    method: Literal["combine"]
    lams: Several[dict[str, float]] = Field(min_length=1)
    particles: int = Field(default=0, ge=0)

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One for each combination."""
        suffix = f", {self.particles} particles" if self.particles else ""
        for lams in self.lams:
            if len(plan.named(tuple(lams))) < 2:
                raise ValueError(f"combine needs λ of two anchors or more, got {lams}: one is for realign")
            name = " + ".join(f"{plain(lam)} {anchor}" for anchor, lam in lams.items())
            yield Arm(f"{name}{suffix}", self.method, tuple(lams.items()), "", self.particles, prompts=self.prompts)


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


class OptimizeNoise(_Method, NoiseOptimization):
    """The reference, or another pipeline, from noise that was optimised for a reward."""

    method: Literal["optimize-noise"]

    def arms(self, plan: Models) -> Iterator[Arm]:
        """One."""
        noise = NoiseOptimization(**{name: getattr(self, name) for name in NoiseOptimization.model_fields})
        usual = NoiseOptimization(reward=self.reward)
        which = f" of {self.pipeline}" if self.pipeline else ""
        unusual = [
            f"{word} {plain(getattr(noise, name))}"
            for name, word in (
                ("learning_rate", "rate"),
                ("norm_weight", "norm weight"),
                ("steps", "steps"),
                ("guidance_scale", "guidance"),
            )
            if getattr(noise, name) != getattr(usual, name)
        ]
        name = ", ".join([f"noise{which} for {self.reward}", f"{self.iterations} iterations", *unusual])
        yield Arm(name, self.method, noise=noise, prompts=self.prompts)


Method = Annotated[
    Reference | AsIs | Realign | Combine | Anneal | Interpolate | OptimizeNoise, Field(discriminator="method")
]
