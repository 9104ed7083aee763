"""All results together: one JSON with a line for every pipeline, and a table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from results import CHECKS, WORST_LAST, Outcome, Result, worst

_STYLES: dict[Outcome, str] = {
    "passes": "green",
    "refused": "cyan",
    "not tried": "dim",
    "crashes": "bold red",
    "wrong": "bold red",
}
_SIGNS: dict[Outcome, str] = {
    "passes": "✓",
    "refused": "refused",
    "not tried": "·",
    "crashes": "crash",
    "wrong": "WRONG",
}

PACKAGES = ("deradiff", "diffusers", "torch", "transformers", "peft")


def summary(
    results: Sequence[Result], checkout_date: str, problems: dict[str, str], left_out: dict[str, str]
) -> dict[str, Any]:
    """What a run came to: versions, counts of verdicts, and every pipeline class with the worst of its tests."""
    pipelines = {
        name: _pipeline([result for result in results if result.pipeline == name])
        for name in sorted({result.pipeline for result in results})
    }
    return {
        "versions": {package: version(package) for package in PACKAGES},
        "checkout": checkout_date,
        "checks": CHECKS,
        "counts": _counts(pipelines),
        "not imported": problems,
        "left out": left_out,
        "pipelines": pipelines,
    }


def _counts(pipelines: dict[str, Any]) -> dict[Outcome, int]:
    counts = Counter(pipeline["verdict"] for pipeline in pipelines.values())
    return {outcome: counts[outcome] for outcome in reversed(WORST_LAST)}


def added(record: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run came to, with the pipelines of a `new` one added, or put in the place of theirs.

    Raises `ValueError` where the two are not of the same versions, checkout and checks.
    """
    for name in ("versions", "checkout", "checks"):
        if record[name] != new[name]:
            raise ValueError(f"another run, with other {name}: {record[name]} and {new[name]}")
    pipelines = dict(sorted((record["pipelines"] | new["pipelines"]).items()))
    # The head of the record is the new one's, and ends with its pipelines.
    return new | {"counts": _counts(pipelines), "not imported": record["not imported"], "pipelines": pipelines}


def _pipeline(results: Sequence[Result]) -> dict[str, Any]:
    """One pipeline class, over its tests."""
    checks: dict[str, Any] = {}
    for name in CHECKS:
        made = [result.checks[name] for result in results if name in result.checks]
        if made:
            checks[name] = [worst(check.outcome for check in made)]
            if numbers := [check.difference for check in made if check.difference is not None]:
                checks[name].append(float(f"{max(numbers):.1e}"))
    return {
        "verdict": worst(result.verdict for result in results),
        "reasons": list(dict.fromkeys(reason for result in results for reason in result.reasons)),
        "checks": checks,
        "tests": [result.test for result in results],
    }


def write(record: dict[str, Any], file: Path) -> None:
    """Write a summary, a pipeline a line, so that two of them can be compared line by line."""
    lines = [
        f" {json.dumps(name)}: {json.dumps(pipeline, ensure_ascii=False)}"
        for name, pipeline in record["pipelines"].items()
    ]
    head = json.dumps(record | {"pipelines": None}, indent=1, ensure_ascii=False)
    body = ",\n ".join(lines)
    file.write_text(head.replace('"pipelines": null', '"pipelines": {\n ' + body + "\n }") + "\n")


def line(result: Result) -> str:
    """A test class in one line, in Rich's markup."""
    verdict = result.verdict
    signs = " ".join(f"{name} {_SIGNS[check.outcome]}" for name, check in result.checks.items())
    text = f"{result.test}  {signs}" if not result.refused else f"{result.test}  {result.refused[:100]}"
    stopped = f"  ({result.stopped[:160]})" if result.stopped else ""
    return f"[{_STYLES[verdict]}]{verdict:<9}[/] {result.seconds:5.0f} s  " + (text + stopped).replace("[", "\\[")


def show(record: dict[str, Any], console: Console) -> None:
    """The table of pipelines, the reasons of those that are wrong or crash, and the counts."""
    table = Table()
    table.add_column("pipeline", overflow="fold")
    for heading in ("verdict", *CHECKS):
        table.add_column(heading.replace("_", " "), no_wrap=True)
    for name, pipeline in record["pipelines"].items():
        signs = [_SIGNS[pipeline["checks"][check][0]] if check in pipeline["checks"] else "" for check in CHECKS]
        style = _STYLES[pipeline["verdict"]]
        table.add_row(name, f"[{style}]{pipeline['verdict']}[/]", *signs)
    console.print(table)
    for name, pipeline in record["pipelines"].items():
        if pipeline["verdict"] in ("wrong", "crashes"):
            console.print(f"{name}: " + "; ".join(pipeline["reasons"]), style="red", markup=False)
    console.print(", ".join(f"{count} {verdict}" for verdict, count in record["counts"].items() if count))
