"""A plan: the models, prompts, methods and numbers that an experiment consists of, read from YAML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from deradiff import notation
from deradiff.files import plans
from deradiff.files.plans import Name, Part, Several
from deradiff.notation import plain
from deradiff.pipelines import SCHEDULERS, require_both_sides
from deradiff.realignment import lam_for_beta

ALL: Final = "all"
"""Written in place of a list of names."""

DIGITS = "digits"
"""The source of prompts for the digits model."""

Names = Several[str] | Literal["all"]

Lams = Several[float]


# -- what there is ----------------------------------------------------------------------------------------------------


class Model(Part):
    """An aligned model: any source that `realign` takes, and the strength it was aligned with."""

    source: str
    beta: float | None = Field(default=None, gt=0)
    """The KL strength β. Models of one `family` are aligned alike, so that their β mean the same."""
    family: str = "aligned"


class Prompts(Part):
    """A set of prompts, each drawn with every seed."""

    source: str | Several[str] | None = None
    """What `alignment.prompts.load_prompts` takes, several for their union, or `digits`."""
    prompts: Several[str] = ()
    """The prompts themselves, instead of a source."""
    count: int | None = Field(default=None, ge=1)
    draw_seed: int | None = None
    """The `count` prompts are drawn with this seed; without it they are the first."""
    split: str = "train"
    """Of Pick-a-Pic."""
    seeds: Several[int] = (0,)
    substitute_for: str = ""
    """What these prompts stand for that was never published; the report says so."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _read_seeds(cls, given: Any) -> Any:
        return notation.listed_seeds(given)

    @model_validator(mode="after")
    def _either(self) -> Prompts:
        if (self.source is None) == (not self.prompts):
            raise ValueError("prompts come from a source or are listed under prompts: give one of both")
        if self.prompts and len({*self.prompts}) < len(self.prompts):
            raise ValueError("a prompt is listed twice")
        if not all(prompt.strip() for prompt in self.prompts):
            raise ValueError("a prompt is empty")
        if self.prompts and (self.count is not None or self.draw_seed is not None or self.split != "train"):
            raise ValueError("count, draw_seed and split choose among the prompts of a source, and these are listed")
        if not self.seeds:
            raise ValueError("at least one seed is needed")
        return self


class Sampling(Part):
    """How images are sampled; what is not given is the pipeline's own."""

    scheduler: str | None = None
    steps: int = Field(default=25, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    negative_prompt: str | None = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _both_sides(self) -> Sampling:
        require_both_sides(self.width, self.height)
        return self

    @field_validator("scheduler")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in SCHEDULERS:
            raise ValueError(f"there is no scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}")
        return name


# -- what is done with it ---------------------------------------------------------------------------------------------


class NoiseOptimization(Part):
    """Gradient ascent on the initial noise (`alignment.noise_optimization`): ReNO with one step, DOODL-like with more.

    The defaults are ReNO's.
    """

    reward: str
    iterations: int = Field(default=50, ge=1)
    learning_rate: float = Field(default=5.0, gt=0)
    norm_weight: float = Field(default=0.01, ge=0)
    pipeline: str | None = None
    """Another pipeline than the reference, such as a one-step model."""
    steps: int | None = Field(default=None, ge=1)
    """Other steps than the sampling's, such as one."""


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


class _Method(Part):
    prompts: Names = ALL
    """The prompt sets that this method is drawn for."""


class Reference(_Method):
    """The reference as it is."""

    method: Literal["reference"]

    def arms(self, plan: Plan) -> Iterator[Arm]:
        """One."""
        yield Arm("reference", self.method, prompts=self.prompts)


class AsIs(_Method):
    """Aligned models as they are: retrained ones, KL-regularised ones, ReFL, ..."""

    method: Literal["model"]
    models: Names = ALL

    def arms(self, plan: Plan) -> Iterator[Arm]:
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

    def arms(self, plan: Plan) -> Iterator[Arm]:
        """One for each anchor and λ."""
        suffix = f", {self.particles} particles" if self.particles else ""
        for name in plan.named(self.anchors):
            for lam in self.lam:
                yield Arm(
                    f"{name}, λ = {plain(lam)}{suffix}",
                    self.method,
                    ((name, lam),),
                    "",
                    self.particles,
                    prompts=self.prompts,
                )
            for target in plan.named(self.targets) if self.targets else ():
                anchor, other = plan.models[name], plan.models[target]
                if anchor.beta is None or other.beta is None or anchor.family != other.family:
                    if self.targets == ALL:  # those that there can be
                        continue
                    raise ValueError(
                        f"{name} cannot stand for {target}: both need a beta, and the same family, since λ = β/β'"
                    )
                lam = lam_for_beta(anchor.beta, other.beta)
                named = f"{name} → {target}{suffix}"
                yield Arm(named, self.method, ((name, lam),), "", self.particles, target, prompts=self.prompts)


class Combine(_Method):
    """Several rewards at once: λ for each of several anchors (DeRaDiff, appendix A.4)."""

    method: Literal["combine"]
    lams: Several[dict[str, float]] = Field(min_length=1)
    particles: int = Field(default=0, ge=0)

    def arms(self, plan: Plan) -> Iterator[Arm]:
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

    def arms(self, plan: Plan) -> Iterator[Arm]:
        """One for each anchor, λ and schedule."""
        for name in plan.named(self.anchors):
            for lam in self.lam:
                for schedule in self.schedules:
                    reach = "" if lam == 1 else f" up to {plain(lam)}"
                    yield Arm(f"{name}, {schedule}{reach}", self.method, ((name, lam),), schedule, prompts=self.prompts)


class Interpolate(_OfAnchors):
    """Weight interpolation, which for a LoRA is LoRA scaling."""

    method: Literal["interpolate"]
    lam: Lams = Field(min_length=1)

    def arms(self, plan: Plan) -> Iterator[Arm]:
        """One for each anchor and λ."""
        for name in plan.named(self.anchors):
            for lam in self.lam:
                yield Arm(f"{name}, weights at {plain(lam)}", self.method, ((name, lam),), prompts=self.prompts)


class OptimizeNoise(_Method, NoiseOptimization):
    """The reference, or another pipeline, from noise that was optimised for a reward."""

    method: Literal["optimize-noise"]

    def arms(self, plan: Plan) -> Iterator[Arm]:
        """One."""
        noise = NoiseOptimization(**{name: getattr(self, name) for name in NoiseOptimization.model_fields})
        usual = NoiseOptimization(reward=self.reward)
        which = f" of {self.pipeline}" if self.pipeline else ""
        unusual = [
            f"{word} {plain(getattr(noise, name))}"
            for name, word in (("learning_rate", "rate"), ("norm_weight", "norm weight"), ("steps", "steps"))
            if getattr(noise, name) != getattr(usual, name)
        ]
        name = ", ".join([f"noise{which} for {self.reward}", f"{self.iterations} iterations", *unusual])
        yield Arm(name, self.method, noise=noise, prompts=self.prompts)


Method = Annotated[
    Reference | AsIs | Realign | Combine | Anneal | Interpolate | OptimizeNoise, Field(discriminator="method")
]


# -- what is wanted of it ---------------------------------------------------------------------------------------------


class Wanted(Part):
    """What the report makes of the images; what is left out is chosen from the plan, or left out of the report."""

    diversity_on: str | None = None
    """The prompt set whose images diversity is measured with."""
    neighbours: int = Field(default=10, ge=1)
    """k of precision and recall."""
    healthy: str | None = None
    """The model that counts as not reward-hacked, for DeRaDiff's Table 3."""
    hacked: Several[str] = ()
    unregularised: str | None = None
    """The model that the fronts mark as aligned without regularisation."""
    pictures: int = Field(default=6, ge=1)
    """How many prompts the picture sheets show."""
    alignment_gpu_hours: float = Field(default=336.0, gt=0)
    """What aligning once costs (DeRaDiff, §6: 336 for SDXL)."""


class Plan(Part):
    """An experiment. Raises `ValueError` (pydantic's) for anything that does not exist or does not fit."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    reference: str
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    allow_pickle: bool = False
    models: dict[Name, Model] = Field(min_length=1)
    prompts: dict[Name, Prompts] = Field(min_length=1)
    sampling: dict[Name, Sampling] = Field(min_length=1)
    methods: Several[Method] = Field(min_length=1)
    scores: Several[str] = ()
    """Rewards by name (`rewards.load`); the first is the one that the fronts are drawn for."""
    features: Several[str] = ()
    """Feature extractors by name (`measures.features`), for FID, recall, SCD, LSCD and Vendi."""
    path_kl: bool = True
    """Evaluate the reference beside models drawn as they are, for their path KL; costs their sampling once more."""
    batch_size: int = Field(default=8, ge=1)
    """Images computed together: it decides their last bits, so it is a part of the plan."""
    report: Wanted = Wanted()

    @model_validator(mode="after")
    def _complete(self) -> Plan:
        for name in self.scores:
            _require_score(name)
        for name in self.features:
            _require_extractor(name)
        wanted = self.report
        self.named(tuple(filter(None, (wanted.healthy, *wanted.hacked, wanted.unregularised))))
        if wanted.diversity_on is not None:
            self.sets((wanted.diversity_on,))
        for arm in self.arms():
            if arm.noise is not None:
                _require_score(arm.noise.reward)
                _require_plain_sampling(arm, self.sampling[arm.sampling])
                if arm.noise.pipeline in self.models:
                    raise ValueError(f"a model and a pipeline are called {arm.noise.pipeline!r}: rename the model")
        return self

    def named(self, names: Names) -> tuple[str, ...]:
        """The models of these names. Raises `ValueError` for one that there is not."""
        return _chosen(names, self.models, "model")

    def sets(self, names: Names) -> tuple[str, ...]:
        """The prompt sets of these names. Raises `ValueError` for one that there is not."""
        return _chosen(names, self.prompts, "prompt set")

    def arms(self) -> list[Arm]:
        """Every way to get an image: the methods' arms, for each way of sampling.

        One that several methods ask for is there once, for the prompt sets of them all, by the name that the first of
        them gives it. Raises `ValueError` where two that differ have one name.
        """
        different: dict[Any, Arm] = {}
        for arm in (arm for method in self.methods for arm in method.arms(self)):
            first = different.get(arm.content, arm)
            sets = {*self.sets(arm.prompts), *(first.prompts if arm.content in different else ())}
            different[arm.content] = replace(first, prompts=tuple(name for name in self.prompts if name in sets))
        names = [arm.name for arm in different.values()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two arms that differ are called {twice[0]!r}: give the models other names")
        return [replace(arm, sampling=sampling) for sampling in self.sampling for arm in different.values()]


def _chosen(names: Names, known: Mapping[str, Any], what: str) -> tuple[str, ...]:
    if names == ALL:
        return tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no {what} {', '.join(map(repr, unknown))}; the plan has {', '.join(known)}")
    return tuple(names)


def _require_plain_sampling(arm: Arm, sampling: Sampling) -> None:
    """Raise `ValueError` for what sampling from optimised noise cannot do."""
    if sampling.negative_prompt is not None:
        raise ValueError(f"{arm.name!r} takes no negative_prompt: sample it without one, as {arm.sampling!r} does not")
    if sampling.width != sampling.height:
        raise ValueError(f"{arm.name!r} draws squares: sample it at one width and height, as {arm.sampling!r} does not")
    if sampling.guidance_scale is not None and sampling.guidance_scale < 1:
        raise ValueError(f"{arm.name!r} needs a guidance_scale of 1 (none) or more, and {arm.sampling!r} has less")


def _require_score(name: str) -> None:
    from deradiff.rewards import COMPUTED, LEARNED

    if name.partition("=")[0] not in {*COMPUTED, *LEARNED}:
        raise ValueError(f"there is no score {name!r}: choose among {', '.join([*LEARNED, *COMPUTED])}")


def _require_extractor(name: str) -> None:
    from deradiff.measures.features import EXTRACTORS, DigitsExtractor

    known = (*EXTRACTORS, DigitsExtractor.name)
    if name.partition("=")[0] not in known:
        raise ValueError(f"there is no feature extractor {name!r}: choose among {', '.join(known)}")


# -- files ------------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; raises as `plans.read` does."""
    return plans.read(Plan, path, "plan", "deradiff experiment plan --preset digits")


def parse_plan(content: Any, where: str) -> Plan:
    """The plan that is plain data; raises as `plans.parse` does."""
    return plans.parse(Plan, content, where, "plan")


def write_plan(plan: Plan) -> str:
    """The plan as YAML that `read_plan` reads: what was given, not what was left at its default."""
    data = plan.model_dump(mode="json", exclude_unset=True)
    for one in data["prompts"].values():
        if "seeds" in one:
            one["seeds"] = plans.seed_range(one["seeds"])
    data["methods"] = [{"method": method.pop("method"), **method} for method in data["methods"]]
    return plans.write(data)
