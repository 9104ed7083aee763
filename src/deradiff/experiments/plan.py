"""A plan: the models, prompts, methods and numbers that an experiment consists of, read from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from deradiff.experiments.arms import ALL, Arm, Method, Model, Names
from deradiff.files import plans, reading
from deradiff.files.plans import Name, PlanPart, Several
from deradiff.sweep import notation
from deradiff.sweep.description import RewardGuidance, SamplingSettings
from deradiff.sweep.pipelines import SCHEDULERS

# -- what there is ----------------------------------------------------------------------------------------------------


class Prompts(PlanPart):
    """A set of prompts, each drawn with every seed."""

    source: str | Several[str] | None = None
    """What `alignment.prompts.load_prompts` takes, several for their union, or a world that ships."""
    prompts: Several[str] = ()
    """The prompts themselves, instead of a source."""
    count: int | None = Field(default=None, ge=1)
    draw_seed: int | None = None
    """The `count` prompts are drawn with this seed; without it they are the first."""
    split: str = "train"
    """Of Pick-a-Pic; other sources beside it have none."""
    seeds: Several[int] = (0,)
    substitute_for: str = ""
    """What these prompts stand for that was never published; the report says so."""
    made_by: str = ""
    """The command that makes the file of the source, for where it is not there."""

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


def _known_scheduler(sampling: SamplingSettings) -> SamplingSettings:
    if sampling.scheduler is not None and sampling.scheduler not in SCHEDULERS:
        raise ValueError(f"there is no scheduler {sampling.scheduler!r}; choose one of {', '.join(SCHEDULERS)}")
    return sampling


# -- what is wanted of it ---------------------------------------------------------------------------------------------


class Wanted(PlanPart):
    """What the report makes of the images; what is left out is chosen from the plan, or left out of the report."""

    diversity_on: str | None = None
    """The prompt set whose images diversity is measured with."""
    neighbours: int = Field(default=10, ge=1)
    """k of precision and recall."""
    healthy: str | None = None
    """The model that counts as not reward-hacked, for DeRaDiff's Table 3."""
    hacked: Several[str] = ()
    unregularised: str | Several[str] = ()
    """The models that the fronts mark as aligned without regularisation."""
    pictures: int = Field(default=6, ge=1)
    """How many prompts the picture sheets show."""
    alignment_gpu_hours: float = Field(default=336.0, gt=0)
    """What aligning once costs (DeRaDiff, §6: 336 for SDXL)."""

    @property
    def every_unregularised(self) -> tuple[str, ...]:
        """`unregularised` as a list."""
        return (self.unregularised,) if isinstance(self.unregularised, str) else self.unregularised


class Plan(PlanPart):
    """An experiment. Raises `ValueError` (pydantic's) for anything that does not exist or does not fit."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    reference: str
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    allow_pickle: bool = False
    models: dict[Name, Model] = Field(min_length=1)
    prompts: dict[Name, Prompts] = Field(min_length=1)
    sampling: dict[Name, Annotated[SamplingSettings, AfterValidator(_known_scheduler)]] = Field(min_length=1)
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
        _require_measures(self.scores, self.features)
        wanted = self.report
        self.named((*filter(None, [wanted.healthy]), *wanted.hacked, *wanted.every_unregularised))
        if wanted.diversity_on is not None:
            self.sets((wanted.diversity_on,))
        for arm in self.arms():
            if (guidance := arm.reward_guidance) is not None:
                _require_measures([guidance.reward])
                _require_plain_sampling(arm, guidance, self.sampling[arm.sampling])
                if guidance.pipeline in self.models:
                    raise ValueError(f"a model and a pipeline are called {guidance.pipeline!r}: rename the model")
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
        return [replace(arm, sampling=sampling) for sampling in self.sampling for arm in self._arms_by(sampling)]

    def _arms_by(self, sampling: str) -> list[Arm]:
        methods = [m for m in self.methods if sampling in _chosen(m.sampling, self.sampling, "way of sampling")]
        different: dict[Any, Arm] = {}
        for arm in (arm for method in methods for arm in method.arms(self)):
            first = different.get(arm.content, arm)
            sets = {*self.sets(arm.prompts), *(first.prompts if arm.content in different else ())}
            different[arm.content] = replace(first, prompts=tuple(name for name in self.prompts if name in sets))
        names = [arm.name for arm in different.values()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two arms that differ are called {twice[0]!r}: give the models other names")
        return list(different.values())


def _chosen(names: Names, known: Mapping[str, Any], what: str) -> tuple[str, ...]:
    if names == ALL:
        return tuple(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"there is no {what} {', '.join(map(repr, unknown))}; the plan has {', '.join(known)}")
    return tuple(names)


def _require_plain_sampling(arm: Arm, guidance: RewardGuidance, sampling: SamplingSettings) -> None:
    """Raise `ValueError` for what sampling that a reward guides cannot do."""
    if guidance.schedulers and (sampling.scheduler or "ddim") not in guidance.schedulers:
        raise ValueError(
            f"{arm.name!r} does not go with the sampler of {arm.sampling!r}, {sampling.scheduler or 'ddim'}: take one "
            f"of {', '.join(guidance.schedulers)}"
        )
    if sampling.negative_prompt is not None:
        raise ValueError(f"{arm.name!r} takes no negative_prompt: sample it without one, as {arm.sampling!r} does not")
    if sampling.width != sampling.height:
        raise ValueError(f"{arm.name!r} draws squares: sample it at one width and height, as {arm.sampling!r} does not")
    if guidance.guidance_scale is None and sampling.guidance_scale is not None and sampling.guidance_scale < 1:
        raise ValueError(f"{arm.name!r} needs a guidance_scale of 1 (none) or more, and {arm.sampling!r} has less")


def _require_measures(scores: Iterable[str], features: Iterable[str] = ()) -> None:
    """Raise `ValueError` for a reward or an extractor that there is not."""
    from deradiff import rewards
    from deradiff.measures import features as extractors

    every = (*rewards.LEARNED, *rewards.COMPUTED), (*extractors.EXTRACTORS, *extractors.COMPUTED)
    for names, known, what in zip((scores, features), every, ("score", "feature extractor"), strict=True):
        for name in names:
            if name.partition("=")[0] not in known:
                raise ValueError(f"there is no {what} {name!r}: choose among {', '.join(known)}")


# -- files ------------------------------------------------------------------------------------------------------------


def read_plan(path: Path) -> Plan:
    """The plan in a YAML file; raises as `plans.read` does."""
    return plans.read(Plan, path, "plan", "deradiff experiment plan --preset digits")


def parse_plan(content: Any, where: str) -> Plan:
    """The plan that is plain data; raises as `reading.fit` does."""
    return reading.fit(Plan, content, where, "plan")


def write_plan(plan: Plan) -> str:
    """The plan as YAML that `read_plan` reads: what was given, not what was left at its default."""
    data = plan.model_dump(mode="json", exclude_unset=True)
    for prompts in data["prompts"].values():
        if "seeds" in prompts:
            prompts["seeds"] = plans.seed_range(prompts["seeds"])
    data["methods"] = [{"method": method.pop("method"), **method} for method in data["methods"]]
    return plans.write(data)
