"""What came out: of one check, of one test class, and what they are worth together."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Outcome = Literal["passes", "not tried", "refused", "crashes", "wrong"]

WORST_LAST: tuple[Outcome, ...] = ("not tried", "passes", "refused", "crashes", "wrong")
"""Of several outcomes the last in this order counts."""

CHECKS = {
    "reference": "λ = 0 is the untouched pipeline, bit for bit",
    "anchor": "λ = 1 is the pipeline with the anchor put in, bit for bit",
    "half": "λ = ½ is what an independent oracle makes of both",
    "remove": "the pipeline is what it was after remove()",
    "progress": "dial.last.progress follows the scheduler's own order of steps",
    "per_image": "λ per image: each image is what it is at its own λ",
    "sweep": "the same where both images begin with one noise",
    "micro_batch": "dial.micro_batch = 1 changes nothing",
    "lora": "a LoRA file as anchor",
}
"""In the order in which they are made."""

ESSENTIAL = ("reference", "anchor", "half")
"""A pipeline that cannot do one of these cannot be realigned; what it cannot do of the others is a remark."""

TOLERANCE = 1e-4
"""How far from an oracle is still the same, relative to the anchor's own effect."""


class NotTried(Exception):
    """A check that does not apply, or that cannot be made with what the test gives. The message says why."""


@dataclass
class Check:
    """One check's outcome, why it is no better, and the numbers: differences relative to the anchor's own effect."""

    outcome: Outcome
    why: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    difference: float | None = None
    """The number that decided."""


@dataclass
class Result:
    """All checks of one test class. `stopped` says why they ended early, or never began."""

    test: str
    pipeline: str
    about: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, Check] = field(default_factory=dict)
    stopped: str = ""
    refused: str = ""
    seconds: float = 0.0
    axes: dict[str, dict[str, list[Any]]] = field(default_factory=dict)
    """Where the batch is in the denoisers' arguments: see `batch_axes`."""

    @property
    def verdict(self) -> Outcome:
        """What all checks come to: nothing, where an essential one is missing."""
        if self.refused:
            return "refused"
        bad = [check.outcome for check in self.checks.values() if is_bad(check)]
        essential = [self.checks[name].outcome if name in self.checks else "not tried" for name in ESSENTIAL]
        if "not tried" in essential:
            return worst(["not tried", *bad])
        return worst([*essential, *bad])

    @property
    def reasons(self) -> list[str]:
        """What keeps it from passing, and what was left out."""
        whole = [reason for reason in (self.refused, self.stopped) if reason]
        return whole + [
            f"{name}: {check.outcome}, {check.why}" for name, check in self.checks.items() if check.outcome != "passes"
        ]

    def save(self, file: Path) -> None:
        """Write it as JSON, whole or not at all."""
        draft = file.with_suffix(".part")
        draft.write_text(json.dumps(asdict(self) | {"verdict": self.verdict}, indent=1, default=str) + "\n")
        draft.replace(file)

    @classmethod
    def load(cls, file: Path) -> Result:
        """Read what `save` wrote."""
        record = json.loads(file.read_text())
        record.pop("verdict")
        checks = {name: Check(**check) for name, check in record.pop("checks").items()}
        return cls(**record, checks=checks)


def is_bad(check: Check) -> bool:
    """Whether it counts against the pipeline whichever check it is."""
    return check.outcome in ("crashes", "wrong")


def worst(outcomes: Iterable[Outcome]) -> Outcome:
    """The outcome that counts of several."""
    return max(outcomes, key=WORST_LAST.index)


def described(error: BaseException) -> str:
    """An error's type, its message, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f", in {_short(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}{where}"


def is_refusal(error: BaseException) -> bool:
    """Whether deradiff itself raised it, in words: a wrong value or a state that cannot be served.

    A plain `RuntimeError` is torch's, whose own code leaves no frames.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = bool(frames) and "/deradiff/" in frames[-1].filename
    return own and isinstance(error, ValueError | RuntimeError) and type(error) is not RuntimeError


def _short(file: str) -> str:
    for folder in ("site-packages/", "/src/", "/tests/"):
        file = file.rpartition(folder)[2] if folder in file else file
    return file
