"""A study's plan: what is compared, what is asked, and how much of it a participant sees; read from YAML."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, field_validator, model_validator

from deradiff.files import plans, reading
from deradiff.files.plans import PlanPart, Several
from deradiff.sweep import notation

TILES = 9
"""Images in a grid, three by three (AIG, A.4)."""

Answer: TypeAlias = Literal["left", "equal", "right"]

ANSWERS: tuple[Answer, ...] = ("left", "equal", "right")

PAIR = "pair"
"""The field of a form that says which pair is answered; the others are questions."""

INTRODUCTION = (
    "You will see two sets of nine images, A and B, that computer programs drew for the same text. Look at both and "
    "answer a few short questions. There is no right or wrong: your own impression counts. Choose Equal where you "
    "see no difference."
)


class StudyQuestion(PlanPart):
    """What is asked of every pair."""

    key: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$")
    """Its name in tables and figures."""
    text: str = Field(min_length=1, max_length=300)
    checked: bool = False
    """Whether an attention check expects the set of real images as the answer."""


QUESTIONS = (
    StudyQuestion(key="diversity", text="Which set is more varied?"),
    StudyQuestion(key="aesthetics", text="Which set looks better?", checked=True),
    StudyQuestion(key="agreement", text="Which set fits the text better?", checked=True),
)
"""The paper's three: diversity, quality, and agreement with the prompt. Noise may well pass for varied."""


class Configuration(PlanPart):
    """Methods that are compared with each other: arms of one experiment, sampled alike, for prompts of one set."""

    name: str = Field(min_length=1, max_length=80)
    experiment: str = Field(min_length=1)
    """The experiment's folder; a relative path counts from the plan."""
    sampling: str
    prompt_set: str
    methods: dict[str, str] = Field(min_length=2)
    """The arm that each method is here. Methods of one name are pooled over configurations."""
    seeds: Several[int]
    """Those that nine are drawn from for every pair."""
    prompts: Several[str] = Field(min_length=1)

    @field_validator("methods")
    @classmethod
    def _different(cls, given: dict[str, str]) -> dict[str, str]:
        for (first, arm), (second, same) in combinations(given.items(), 2):
            if arm == same:
                raise ValueError(f"{first!r} and {second!r} are both the arm {arm!r}: compare two that differ")
        return given

    @field_validator("seeds", mode="before")
    @classmethod
    def _read_seeds(cls, given: Any) -> Any:
        return notation.listed_seeds(given)

    @field_validator("seeds")
    @classmethod
    def _enough(cls, given: tuple[int, ...]) -> tuple[int, ...]:
        if len(given) < TILES:
            raise ValueError(
                f'a grid needs {TILES} seeds and there are {len(given)}: run the experiment with seeds "0:8" or more'
            )
        return given

    @field_validator("prompts")
    @classmethod
    def _once(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        if len({*given}) < len(given):
            raise ValueError("a prompt is listed twice: list it once")
        return given


class StudyCell(NamedTuple):
    """Two methods of a configuration."""

    configuration: int
    first: str
    second: str


class StudyImage(NamedTuple):
    """Which image of a study: the configuration's and the prompt's number, the method, the seed."""

    configuration: int
    method: str
    prompt: int
    seed: int


NOISE = StudyImage(-1, "", 0, 0)
"""The image that attention checks show instead of a method's."""


class StudyPlan(PlanPart):
    """A study. Raises `ValueError` (pydantic's) for what does not fit together."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    title: str = Field(default="Which images do you prefer?", min_length=1, max_length=200)
    """The heading of the first page."""
    introduction: str = INTRODUCTION
    """What the first page says; an empty line begins a new paragraph."""
    pairs_per_participant: int = Field(default=20, ge=1, le=1000)
    attention_checks: int = Field(default=2, ge=0)
    """Pairs, beside those, in which one set is noise."""
    mistakes_allowed: int = Field(default=0, ge=0)
    """Checks that a participant may answer wrongly and still be counted."""
    most_participants: int = Field(default=1000, ge=1)
    """Nobody is let in beyond so many."""
    questions: Several[StudyQuestion] = Field(default=QUESTIONS, min_length=1)
    configurations: Several[Configuration] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> StudyPlan:
        _require_once([item.name for item in self.configurations], "configurations are")
        _require_once([item.key for item in self.questions], "questions are")
        if any(item.key == PAIR for item in self.questions):
            raise ValueError(f"a question is called {PAIR!r}, which is the form's own: give it another name")
        if self.pairs_per_participant > self.different_pairs:
            raise ValueError(
                f"pairs_per_participant is {self.pairs_per_participant}, but there are {self.different_pairs} pairs of "
                "methods and prompts, and nobody is shown one twice: lower it, or add prompts"
            )
        if self.attention_checks > self.pairs_per_participant:
            raise ValueError(
                f"{self.attention_checks} attention_checks among {self.pairs_per_participant} pairs are too many: have "
                "at most as many as pairs"
            )
        if self.attention_checks and not any(question.checked for question in self.questions):
            raise ValueError(
                "attention_checks need a question that they can be told by: mark one with `checked: true`, or have "
                "no checks"
            )
        return self

    @property
    def shown(self) -> int:
        """How many pairs a participant sees, attention checks included."""
        return self.pairs_per_participant + self.attention_checks

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, in the order in which the plan names them."""
        return tuple(dict.fromkeys(name for configuration in self.configurations for name in configuration.methods))

    @property
    def cells(self) -> tuple[StudyCell, ...]:
        """Every two methods that are compared, configuration by configuration, in the order of `methods`."""
        order = self.methods
        return tuple(
            StudyCell(number, first, second)
            for number, configuration in enumerate(self.configurations)
            for first, second in combinations(sorted(configuration.methods, key=order.index), 2)
        )

    @property
    def different_pairs(self) -> int:
        """How many pairs there are that differ in more than their seeds."""
        return sum(len(self.configurations[cell.configuration].prompts) for cell in self.cells)


def read_plan(path: Path) -> StudyPlan:
    """The plan in a YAML file; raises as `plans.read` does."""
    return plans.read(StudyPlan, path, "plan of a study", "deradiff study plan EXPERIMENT")


def parse_plan(content: Any, where: str) -> StudyPlan:
    """The plan that is plain data; raises as `reading.fit` does."""
    return reading.fit(StudyPlan, content, where, "plan of a study")


def write_plan(plan: StudyPlan) -> str:
    """The plan as YAML that `read_plan` reads, with all that can be changed."""
    data = plan.model_dump(mode="json")
    for configuration in data["configurations"]:
        configuration["seeds"] = plans.seed_range(configuration["seeds"])
    return plans.write(data)


def _require_once(names: list[str], what: str) -> None:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two {what} called {', '.join(map(repr, twice))}: give each its own name")
