"""The tables of benchmarks/price.json."""

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

GOALS: Mapping[tuple[str, int, bool], float] = {
    # mode, steps, whether λ = ¼ (whose effect itself is small)
    ("tolerance 0.05", 50, False): 1.20,
    ("tolerance 0.05", 25, False): 1.35,
    ("tolerance 0.05", 50, True): 1.35,
    ("tolerance 0.05", 25, True): 1.50,
    ("tolerance 0.15", 50, False): 1.10,
    ("tolerance 0.15", 25, False): 1.20,
    ("tolerance 0.05", 28, False): 1.30,
    ("exact", 50, False): 2.04,
    ("exact", 25, False): 2.04,
}


def show(console: Console, found: Mapping[str, Any]) -> None:
    """Print a table for every part that is there."""
    for rows in filter(None, (found.get("errors"), found.get("flow-errors"))):
        table = Table(
            "anchor",
            "sampler",
            "λ",
            "mode",
            "cost",
            "goal",
            "error, whole",
            "median image",
            "changed",
            "estimated",
            "reward error",
            title="Errors relative to λ's own effect",
            title_justify="left",
        )
        for row in rows:
            goal = GOALS.get((row["mode"], row["steps"], row["lam"] == 0.25))
            sampler = f"{row['scheduler']} {row['steps']}" + (", guided" if row["guidance_scale"] != 1 else "")
            table.add_row(
                row["anchor"],
                sampler,
                f"{row['lam']:g}",
                row["mode"],
                f"{row['evaluations']:.2f}",
                "" if goal is None else f"≤ {goal:g} {'met' if row['evaluations'] <= goal else 'MISSED'}",
                f"{row['whole']:.1%}",
                f"{row['median']:.1%}",
                f"{row['changed']:.1%}",
                f"{row['estimated']:.1%}",
                f"{row['reward']['error']:+.1%} ± {row['reward']['standard_error']:.1%}",
            )
        console.print(table)
    if rows := found.get("guided"):
        table = Table(
            "guidance",
            "anchor computed",
            "cost",
            "error, whole",
            "median image",
            "changed",
            title="Guided branches",
            title_justify="left",
        )
        for row in rows:
            table.add_row(
                f"{row['guidance_scale']:g}",
                row["computed"],
                f"{row['evaluations']:.2f}",
                f"{row['whole']:.1%}",
                f"{row['median']:.1%}",
                f"{row['changed']:.1%}",
            )
        console.print(table)
    for rows in filter(None, (found.get("times"), found.get("flow-times"))):
        table = Table("anchor", "steps", "mode", "time / plain", "quartiles", title="Time", title_justify="left")
        for row in rows:
            quartiles = f"{row['low']:.2f} to {row['high']:.2f}"
            table.add_row(row["anchor"], str(row["steps"]), row["mode"], f"{row['ratio']:.2f}", quartiles)
        console.print(table)
    for part in ("sweep", "sd15", "bookkeeping", "accelerator"):
        if part in found:
            console.print(part, json.dumps(found[part], indent=1))
