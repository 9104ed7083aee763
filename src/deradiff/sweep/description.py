"""What decides one image, for every command that draws, and what its file says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from deradiff.algorithm.schedules import Schedule, taking_turns
from deradiff.files.plans import PlanPart
from deradiff.sweep.pipelines import require_both_sides, usual_guidance


class SamplingSettings(PlanPart):
    """How images are sampled; what is not given is the pipeline's own."""

    scheduler: str | None = None
    steps: int = Field(default=25, ge=1)
    guidance_scale: float | None = Field(default=None, ge=0)
    negative_prompt: str | None = None
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _both_sides(self) -> SamplingSettings:
        require_both_sides(self.width, self.height)
        return self


class RewardGuidance(PlanPart):
    """How a reward guides an image while it is drawn, without an aligned model."""

    kind: ClassVar[str]
    schedulers: ClassVar[tuple[str, ...]] = ()
    """Those that it goes with, by their names in `pipelines.SCHEDULERS`; any where there are none."""
    reward: str
    pipeline: str | None = None
    """Another pipeline than the reference, such as a one-step model."""
    steps: int | None = Field(default=None, ge=1)
    """Other steps than the sampling's, such as one."""
    guidance_scale: float | None = Field(default=None, ge=1)
    """Another than the sampling's: 1 is none, which one-step models want."""

    def shown(self) -> dict[str, Any]:
        """As plain data; without what 0.1 did not know where it is not given, since images are named by it."""
        return self.model_dump(exclude={"guidance_scale"} if self.guidance_scale is None else None)


class NoiseOptimization(RewardGuidance):
    """Gradient ascent on the initial noise (`alignment.noise_optimization`): ReNO with one step, DOODL-like with more.

    The defaults are ReNO's.
    """

    kind = "noise"
    iterations: int = Field(default=50, ge=1)
    learning_rate: float = Field(default=5.0, gt=0)
    norm_weight: float = Field(default=0.01, ge=0)


class ReversibleNoise(RewardGuidance):
    """Gradient ascent on the noise of EDICT (`alignment.doodl`), always on DDIM's steps. The defaults are DOODL's."""

    kind = "reversible noise"
    iterations: int = Field(default=50, ge=1)
    learning_rate: float = Field(default=1.0, gt=0)
    clip: float = Field(default=1e-3, gt=0)
    steps: int | None = Field(default=50, ge=1)


class RewardParticles(RewardGuidance):
    """Particles with a reward as their potential (`alignment.reward_particles`), of which the image is drawn by weight.

    The target is `p exp(r/β)`.
    """

    kind = "reward particles"
    schedulers = ("ddpm", "euler-a")
    beta: float = Field(gt=0)
    particles: int = Field(default=4, ge=1)
    gradient: bool = True
    """Whether the reward's gradient moves the proposals."""
    tempered: bool = True
    """Whether the potential grows along the run, as in DAS; else it is whole from the first step."""


class ManifoldGuidance(RewardGuidance):
    """A reward's gradient at the estimates of the clean image (`alignment.manifold_guidance`), at strength 1/β."""

    kind = "manifold guidance"
    schedulers = ("ddim", "ddpm", "euler", "euler-a")
    beta: float = Field(gt=0)


@dataclass(frozen=True)
class Drawing:
    """Everything that decides an image but the weights of its models; equal where the image is the same."""

    prompt: str
    seed: int
    """Of its noise."""
    sampling: SamplingSettings
    reference: str
    anchors: tuple[tuple[str, float], ...] = ()
    """Name and λ of every anchor that takes part; none is the reference alone."""
    sources: tuple[str, ...] = ()
    """Of the anchors, in their order: what `pipelines.anchor_source` takes."""
    schedule: Schedule | None = None
    """Multiplied with every λ; None for λ that stay the same."""
    method: Literal["mixture", "interpolate"] = "mixture"
    path: Literal["auto", "prediction", "posterior"] = "auto"
    particles: int = 0
    """Of which the image is drawn by weight; 0 for Algorithm 1 alone."""
    reuse: int | None = None
    tolerance: float | None = None
    reward_guidance: RewardGuidance | None = None
    """How a reward guides it while it is drawn; None for none."""
    turns: bool = False
    """Whether one model is drawn for every step, each anchor with probability λ, instead of their mixture."""

    @property
    def lam(self) -> float | dict[str, float]:
        """λ of its one anchor, or of each of several by name; 0 for the reference alone."""
        return dict(self.anchors) if len(self.anchors) > 1 else next((lam for _, lam in self.anchors), 0.0)

    @property
    def lams(self) -> dict[str, float | Schedule]:
        """λ of every anchor by name, in the form that a dial takes."""
        if self.turns:
            return dict(taking_turns(dict(self.anchors), self.seed))
        return {name: lam if self.schedule is None else self.schedule.scaled(lam) for name, lam in self.anchors}

    @property
    def name(self) -> str:
        """The image in words."""
        strength = ", ".join(f"{name} {lam}" for name, lam in self.lams.items())
        if len(self.anchors) < 2:
            strength = str(next(iter(self.lams.values()), 0.0))
        return f"the image of {self.prompt!r} with seed {self.seed} at λ = {strength}"


def call_of(sampling: SamplingSettings, reference: str) -> dict[str, Any]:
    """What `sampling` asks of the pipeline's call, but for the steps; the digits have a guidance scale of their own."""
    chosen = {name: getattr(sampling, name) for name in ("guidance_scale", "height", "width", "negative_prompt")}
    if sampling.guidance_scale is None:
        chosen["guidance_scale"] = usual_guidance(reference)
    return {name: value for name, value in chosen.items() if value is not None}


def about(drawing: Drawing) -> dict[str, Any]:
    """What a list of many images says about one of them, beside what they share."""
    guided = {} if drawing.reward_guidance is None else {"reward_guidance": guidance_record(drawing.reward_guidance)}
    turns = {"turns": True} if drawing.turns else {}
    return {"prompt": drawing.prompt, "seed": drawing.seed, **_column(drawing), **guided, **turns}


def guidance_record(guidance: RewardGuidance) -> dict[str, Any]:
    """As plain data, with its kind."""
    return {"kind": guidance.kind, **guidance.shown()}


def metadata(drawing: Drawing, shared: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """What the file of an image says decided it: `about`, and `settings` that draw this image alone (`Settings`).

    `shared` are further settings of the run that it is of. Nothing here depends on when or where it was drawn.
    """
    names = [name for name, _ in drawing.anchors]
    own = {
        "reference": drawing.reference,
        "anchors": dict(zip(names, drawing.sources, strict=True)),
        "prompts": [drawing.prompt],
        "columns": [_column(drawing)],
        "seeds": [drawing.seed],
        "method": drawing.method,
        "path": drawing.path,
        "reuse": drawing.reuse,
        "tolerance": drawing.tolerance,
        "particles": drawing.particles or None,
    }
    return about(drawing) | {"settings": {**shared, **own, **drawing.sampling.model_dump()}}


def _column(drawing: Drawing) -> dict[str, Any]:
    return {"lam": drawing.lam, "schedule": None if drawing.schedule is None else drawing.schedule.to_dict()}
