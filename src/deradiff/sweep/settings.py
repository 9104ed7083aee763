"""Everything that decides the images of a sweep, as plain data, and how such images are named and labelled."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from deradiff.algorithm.schedules import Schedule
from deradiff.files import records
from deradiff.files.plans import PlanPart, Several
from deradiff.sampling.reuse import current_word
from deradiff.sweep.description import Drawing, SamplingSettings
from deradiff.sweep.notation import plain

LONGEST_NAME = 180
"""Bytes of a file's name, less its ending: file systems take 255, some less."""

Strength = float | dict[str, float]
"""λ of one column: a number for one anchor, or one for each of several anchors by name."""


class Column(PlanPart):
    """One column of a sweep: a λ, and how it is reached if it is annealed."""

    lam: Strength
    schedule: dict[str, Any] | None = None
    """A `Schedule.to_dict()` whose values are multiplied with `lam`; None for a λ that stays the same."""

    def dial(self) -> Any:
        """This column's λ in the form that a dial takes."""
        if isinstance(self.lam, dict):
            return {name: self._of(lam) for name, lam in self.lam.items()}
        return self._of(self.lam)

    def _of(self, lam: float) -> float | Schedule:
        if self.schedule is None:
            return lam
        return Schedule.from_dict(self.schedule).scaled(lam)

    def beta(self, anchor_beta: float | None) -> float | None:
        """The strength β/λ; None where it has no meaning: λ <= 0 or annealed, several anchors, an unknown β."""
        if anchor_beta is None or self.schedule is not None or isinstance(self.lam, dict) or self.lam <= 0:
            return None
        return anchor_beta / self.lam

    def label(self, anchor_beta: float | None) -> str:
        """What stands over the column: λ, and below it what that is."""
        annealed = [] if self.schedule is None else [str(Schedule.from_dict(self.schedule))]
        if isinstance(self.lam, dict):
            return "\n".join([*(f"{name} {plain(lam)}" for name, lam in self.lam.items()), *annealed])
        if annealed:
            return f"λ → {plain(self.lam)}\n{annealed[0]}"
        beta = self.beta(anchor_beta)
        if self.lam <= 0:
            meaning = "reference" if self.lam == 0 else "away from the anchor"
        elif self.lam == 1:
            meaning = "anchor" if beta is None else f"anchor, β = {beta:.4g}"
        else:
            meaning = "" if beta is None else f"β/λ = {beta:.4g}"
        return f"λ = {plain(self.lam)}\n{meaning}".strip()

    def slug(self) -> str:
        """The column in a file name."""
        lams = self.lam if isinstance(self.lam, dict) else {"lam": self.lam}
        name = "-".join(f"{name}{plain(lam)}" for name, lam in lams.items())
        return name if self.schedule is None else f"{name}-{records.slug(self.schedule['schedule'])}"


class Settings(SamplingSettings):
    """Everything that decides a sweep's images; its JSON form stands in the record, and its own part in every image."""

    reference: str
    anchors: dict[str, str]
    prompts: Several[str] = Field(min_length=1)
    columns: Several[Column] = Field(min_length=1)
    seeds: Several[int] = Field(min_length=1)
    method: Annotated[Literal["mixture", "interpolate"], BeforeValidator(current_word)] = "mixture"
    reuse: int | None = None
    """Every how many steps all models are evaluated; None for all."""
    tolerance: float | None = None
    """The error that carrying predictions over between steps may make, relative to λ's effect; None for exactness."""
    path: Literal["auto", "prediction", "posterior"] = "auto"
    text_encoder: Literal["reference", "both"] = "reference"
    """Whether the reference's text encoders serve all models, or an anchor has the parts that its LoRA has for them."""
    anchor_beta: float | None = Field(default=None, gt=0)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device: str = "auto"
    offload: bool = False
    revision: str | None = None
    anchor_revision: str | None = None
    allow_pickle: bool = False
    batch_size: int = Field(default=8, ge=1)
    particles: int | None = Field(default=None, ge=1)
    """Particles for every image, of which one is drawn; None for Algorithm 1 alone."""

    @model_validator(mode="after")
    def _fits(self) -> Settings:
        if self.method == "interpolate":
            asked = {"path": self.path != "auto", "reuse": self.reuse, "tolerance": self.tolerance}
            asked |= {"text_encoder": self.text_encoder != "reference"}
            if unheeded := [name for name, given in (asked | {"particles": self.particles}).items() if given]:
                raise ValueError(f"interpolated weights are one model, and take no {', '.join(unheeded)}")
        if self.anchor_beta is not None and len(self.anchors) > 1:
            raise ValueError("anchor_beta is the β of a single anchor, and there are several: leave it out")
        return self

    @property
    def rows(self) -> list[tuple[str, int]]:
        """A prompt and a seed for every row of the sheet."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]

    @property
    def sampling(self) -> SamplingSettings:
        """How every image is sampled, whatever its prompt, seed and λ."""
        return SamplingSettings(**{name: getattr(self, name) for name in SamplingSettings.model_fields})

    @property
    def drawings(self) -> list[Drawing]:
        """Every image: row by row, the columns of a row beside each other."""
        sampling = self.sampling
        return [
            Drawing(
                prompt=prompt,
                seed=seed,
                sampling=sampling,
                reference=self.reference,
                anchors=anchors,
                sources=tuple(self.anchors[name] for name, _ in anchors),
                schedule=None if column.schedule is None else Schedule.from_dict(column.schedule),
                method=self.method,
                path=self.path,
                particles=self.particles or 0,
                reuse=self.reuse,
                tolerance=self.tolerance,
            )
            for prompt, seed in self.rows
            for column in self.columns
            for anchors in [self._strengths(column)]
        ]

    def _strengths(self, column: Column) -> tuple[tuple[str, float], ...]:
        """The λ of every anchor by name. Raises `ValueError` for one that is not there, or has none."""
        lams = column.lam
        if not isinstance(lams, dict) and len(self.anchors) == 1:
            lams = dict.fromkeys(self.anchors, lams)
        if not isinstance(lams, dict) or lams.keys() != self.anchors.keys():
            raise ValueError(f"λ of {', '.join(self.anchors)} is needed, got {lams}")
        return tuple(lams.items())


def file_name(settings: Settings, place: int) -> str:
    """What the file of the drawing in this place is called, which tells its prompt, seed and λ."""
    row, column = divmod(place, len(settings.columns))
    number, repeat = divmod(row, len(settings.seeds))
    prompt = f"{number:03d}-{records.slug(settings.prompts[number])}"
    name = f"{prompt}-seed{settings.seeds[repeat]}-{column:02d}-{settings.columns[column].slug()}"
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}.png"


def caption(settings: Settings, scheduler: str, guidance_scale: float | None) -> str:
    """What stands under a sheet: the models and how they were sampled."""
    anchors = [source if name == "anchor" else f"{name}: {source}" for name, source in settings.anchors.items()]
    parts = [
        f"{settings.reference} → {' + '.join(anchors)}",
        f"{scheduler.removesuffix('Scheduler')}, {settings.steps} steps",
    ]
    if guidance_scale is not None:
        parts.append(f"guidance {guidance_scale:g}")
    if clocks := sorted({column.schedule["over"] for column in settings.columns if column.schedule is not None}):
        parts.append(f"λ annealed over {' and '.join(clocks)}")
    if settings.method == "interpolate":
        parts.append("interpolated weights")
    if settings.tolerance is not None:
        parts.append(f"approximate: within {settings.tolerance:g} of λ's effect")
    if settings.reuse is not None:
        parts.append(f"approximate: all models every {settings.reuse} steps")
    if settings.particles is not None:
        parts.append(f"{settings.particles} particles each")
    return " · ".join(parts)
