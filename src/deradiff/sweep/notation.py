"""Ranges, seeds and schedules as people write them, on the command line and in plans, read into values.

Every refusal says what was written and what to write.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from deradiff.algorithm.schedules import Over, Power, Schedule, Sigmoid, Spline, Step, finite

LONGEST_RANGE = 1000

FAMILIES: Mapping[str, tuple[type[Any], str]] = {
    "power": (Power, "p"),
    "step": (Step, "p"),
    "sigmoid": (Sigmoid, "kappa"),
}
"""The schedules that one number shapes, and what it is called there."""


def numbers(text: str, what: str) -> list[float]:
    """Read `0.5`, `0,0.5,1` and inclusive ranges `0:1.5:0.25`, which may be mixed, without doubles."""
    return list(dict.fromkeys(finite(float(number), what) for number in _decimals(text, what)))


def _decimals(text: str, what: str, step: Decimal | None = None) -> list[Decimal]:
    """The numbers of a list of numbers and ranges; with a `step` a range may go without its own."""
    read: list[Decimal] = []
    for item in text.split(","):
        parts = [decimal(part, text, what) for part in item.split(":")]
        if len(parts) == 2 and step is not None:
            parts.append(step)
        if len(parts) == 1:
            read += parts
        elif len(parts) == 3:
            read += _range(item, what, *parts)
        else:
            raise ValueError(f"{what} {item!r} is no number and no range; write FIRST:LAST:STEP, as in 0:1.5:0.25.")
    return read


def _range(item: str, what: str, first: Decimal, last: Decimal, step: Decimal) -> list[Decimal]:
    try:
        length = (last - first) / step
    except ArithmeticError:
        length = Decimal(-1)
    if length < 0:
        raise ValueError(f"{what} {item!r} is an empty or endless range; write FIRST:LAST:STEP, as in 0:1.5:0.25.")
    if length >= LONGEST_RANGE:
        raise ValueError(f"{what} {item!r} has more than the {LONGEST_RANGE} values a range may have: split it.")
    return [first + i * step for i in range(math.floor(length) + 1)]


def decimal(part: str, text: str, what: str) -> Decimal:
    """`part` of `text` as a number that a float can hold. Raises `ValueError` where it is none."""
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        raise ValueError(f"{what} {text!r} is not understood: {part.strip()!r} is not a number.") from None
    if not (number.is_finite() and math.isfinite(float(number))):
        raise ValueError(f"{what} must be finite, got {part.strip()!r}.")
    return number


def seeds(texts: Sequence[str], what: str = "--seed") -> tuple[int, ...]:
    """Read seeds: `7`, `1,2,3`, and inclusive ranges `0:7` or `0:8:2`."""
    read: dict[int, None] = {}
    for text in texts:
        for number in _decimals(text, what, step=Decimal(1)):
            if not 0 <= number < 2**63 or number != int(number):
                raise ValueError(f"a seed is a whole number from 0 to {2**63 - 1}, got {number}.")
            read[int(number)] = None
    return tuple(read)


def listed_seeds(given: object) -> tuple[int, ...]:
    """The seeds of a plan: what `seeds` reads, whole numbers, or a list of both. Raises `ValueError` for others."""
    several = given if isinstance(given, list | tuple) else [given]
    for item in several:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise ValueError(f'seeds are whole numbers, or ranges as text, "0:7"; got {item!r:.80}')
    return seeds([str(item) for item in several], "seeds")


def plain(number: float, digits: int = 6) -> str:
    """A number as short as it can be, and whole: two that differ never look alike."""
    return short if float(short := f"{number:.{digits}g}") == number else repr(float(number))


def schedule(text: str, over: Over, what: str = "--schedule") -> Schedule | None:
    """Read `constant` (None), `power:P`, `step:P`, `sigmoid:KAPPA` or `spline:S/λ,S/λ,...`."""
    family, _, rest = text.partition(":")
    if family == "constant" and not rest:
        return None
    if family in FAMILIES:
        shaped: Schedule = FAMILIES[family][0](float(decimal(rest, text, what)), over=over)
        return shaped
    if family == "spline":
        points = [point.split("/") for point in rest.split(",")]
        if any(len(point) != 2 for point in points):
            raise ValueError(f"{what} {text!r}: a spline's points are S/λ, as in spline:0/0,0.5/0.3,1/1.")
        return Spline([[float(decimal(number, text, what)) for number in point] for point in points], over=over)
    raise ValueError(
        f"{what} {text!r} is unknown; there are constant, power:P, step:P, sigmoid:KAPPA and spline:S/λ,S/λ,..."
    )


def family_of(shape: Schedule) -> tuple[str, float] | None:
    """The family of `FAMILIES` that a schedule up to λ = 1 is of, and its number; None for other schedules."""
    for name, (kind, number) in FAMILIES.items():
        if isinstance(shape, kind) and shape.lam == 1:
            return name, getattr(shape, number)
    return None


def written(shape: Schedule | None) -> str:
    """What `schedule` reads as `shape`: the inverse, but for `over` and for a `lam` other than 1.

    Raises `ValueError` for a schedule that has no such form.
    """
    if shape is None:
        return "constant"
    if isinstance(shape, Spline):
        return "spline:" + ",".join(f"{s!r}/{lam!r}" for s, lam in shape.points)
    if family := family_of(shape):
        return f"{family[0]}:{family[1]!r}"
    raise ValueError(f"{shape!r} has no short form: write it as a spline through some of its points.")
