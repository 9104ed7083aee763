"""What people write on the command line, read into values. Every refusal says what was written and what to write."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from deradiff.schedules import Over, Power, Schedule, Sigmoid, Spline, Step, finite

LONGEST_RANGE = 1000


def numbers(text: str, what: str) -> list[float]:
    """Read `0.5`, `0,0.5,1` and inclusive ranges `0:1.5:0.25`, which may be mixed, without doubles."""
    return list(dict.fromkeys(finite(float(number), what) for number in _decimals(text, what)))


def _decimals(text: str, what: str) -> list[Decimal]:
    found: list[Decimal] = []
    for item in text.split(","):
        parts = [_decimal(part, text, what) for part in item.split(":")]
        if len(parts) == 1:
            found += parts
        elif len(parts) == 3:
            first, last, step = parts
            try:
                length = (last - first) / step
            except ArithmeticError:
                length = Decimal(-1)
            if length < 0:
                raise ValueError(
                    f"{what} {item!r} is an empty or endless range; write FIRST:LAST:STEP, as in 0:1.5:0.25."
                )
            if length >= LONGEST_RANGE:
                raise ValueError(
                    f"{what} {item!r} has more than the {LONGEST_RANGE} values a range may have: split it."
                )
            found += (first + i * step for i in range(math.floor(length) + 1))
        else:
            raise ValueError(f"{what} {item!r} is no number and no range; write FIRST:LAST:STEP, as in 0:1.5:0.25.")
    return found


def _decimal(part: str, text: str, what: str) -> Decimal:
    try:
        number = Decimal(part.strip())
    except InvalidOperation:
        raise ValueError(f"{what} {text!r} is not understood: {part.strip()!r} is not a number.") from None
    if not number.is_finite():
        raise ValueError(f"{what} must be finite, got {part.strip()!r}.")
    return number


def seeds(texts: Sequence[str]) -> tuple[int, ...]:
    """Read seeds: `7`, `1,2,3`, and inclusive ranges `0:7` or `0:8:2`."""
    found: dict[int, None] = {}
    for text in texts:
        items = [item + ":1" if item.count(":") == 1 else item for item in text.split(",")]
        for number in _decimals(",".join(items), "--seed"):
            if not 0 <= number < 2**63 or number != int(number):
                raise ValueError(f"a seed is a whole number from 0 to {2**63 - 1}, got {number}.")
            found[int(number)] = None
    return tuple(found)


def anchors(texts: Sequence[str]) -> dict[str, str]:
    """Read `SOURCE` or `NAME=SOURCE` for each anchor; with several, each needs a name."""
    if not texts:
        raise ValueError("name at least one anchor with --anchor: a folder, a hub id, a LoRA file, or digits:BETA.")
    found: dict[str, str] = {}
    for text in texts:
        named = None if Path(text).exists() else re.fullmatch(r"([A-Za-z_][\w-]*)=(.+)", text)
        if not named and len(texts) > 1:
            raise ValueError(f"with several anchors each needs a name: write NAME=SOURCE instead of {text!r}.")
        name, source = named.groups() if named else ("anchor", text)
        if name in found:
            raise ValueError(f"two anchors are called {name!r}.")
        found[name] = source
    return found


def lams(texts: Sequence[str], anchors: Sequence[str]) -> tuple[float | dict[str, float], ...]:
    """Read λ: numbers and ranges for one anchor, `style=0.5,text=0.2` for each column of several."""
    if any("=" in text for text in texts) or len(anchors) > 1:
        return tuple(_per_anchor(text, anchors) for text in texts)
    return tuple(dict.fromkeys(lam for text in texts for lam in numbers(text, "--lam")))


def _per_anchor(text: str, anchors: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(anchors, 0.0)
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            example = ",".join(f"{anchor}=0.5" for anchor in anchors)
            raise ValueError(f"with several anchors λ names them, as in --lam {example}; got {text!r}.")
        if name not in found:
            raise ValueError(f"--lam names the anchor {name!r}, but there are only {', '.join(anchors)}.")
        found[name] = float(_decimal(value, text, "--lam"))
    return found


def schedule(text: str, over: Over) -> Schedule | None:
    """Read `constant` (None), `power:P`, `step:P`, `sigmoid:KAPPA` or `spline:S/λ,S/λ,...`."""
    family, _, rest = text.partition(":")
    families: Mapping[str, Callable[..., Schedule]] = {"power": Power, "step": Step, "sigmoid": Sigmoid}
    if family == "constant" and not rest:
        return None
    if family in families:
        return families[family](float(_decimal(rest, text, "--schedule")), over=over)
    if family == "spline":
        points = [point.split("/") for point in rest.split(",")]
        if any(len(point) != 2 for point in points):
            raise ValueError(f"--schedule {text!r}: a spline's points are S/λ, as in spline:0/0,0.5/0.3,1/1.")
        return Spline(
            [[float(_decimal(number, text, "--schedule")) for number in point] for point in points], over=over
        )
    raise ValueError(
        f"--schedule {text!r} is unknown; there are constant, power:P, step:P, sigmoid:KAPPA and spline:S/λ,S/λ,..."
    )


def prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts of `--prompt`, then those of the file: one per line, or a list in YAML or JSON; each once."""
    found = [*given, *(_prompt_file(file) if file else [])]
    if not found:
        raise ValueError("no prompt was given: use --prompt, or --prompts with a file.")
    if any(not prompt.strip() for prompt in found):
        raise ValueError("a prompt is empty.")
    return tuple(dict.fromkeys(found))


def _prompt_file(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt file {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}.") from None
    found = _listed(file, text) if file.suffix in _LISTS else [line.strip() for line in text.splitlines()]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise ValueError(f"{file} holds no prompt.")
    return found


_LISTS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    ".yaml": ("YAML", yaml.safe_load),
    ".yml": ("YAML", yaml.safe_load),
    ".json": ("JSON", json.loads),
}


def _listed(file: Path, text: str) -> list[str]:
    form, read = _LISTS[file.suffix]
    try:
        content = read(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not {form}: {' '.join(str(error).split())}") from None
    listed = content.get("prompts") if isinstance(content, dict) else content
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(isinstance(prompt, str) for prompt in listed):
        raise ValueError(
            f"{file} must hold a list of prompts, or 'prompts:' with one; quote prompts that look like numbers."
        )
    return listed
