"""How far beyond λ = 1 realignment holds where everything is known: `python -m studies.closed_forms.extrapolation`.

One and the same aligned model, at β, is asked of anchors that were aligned more weakly, at λβ: the further the anchor,
the larger λ. Each row is of the error of the expected reward, as a share of its exact shift, over worlds and β: of
Algorithm 1 and of the weighted mean of the same samples, from what the exactly aligned model gives through the same
sampler and from the same noise.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deradiff.files.writing import write_json
from studies.closed_forms.cases import WORLDS, Case
from studies.closed_forms.comparison import compute

LAMS, TARGETS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0), (0.5, 1.0)
WAYS = ("plain", "weighted")
SAMPLES, STEPS = 10_000, 100


def case_of(world: str, beta: float, lam: float) -> Case:
    """The model at `beta`, of an anchor at `lam` times that."""
    return Case(
        study="grid",
        world=world,
        rewards=tuple(WORLDS[world]().rewards)[:1],
        eta=1.0,
        beta=lam * beta,
        lam=lam,
        steps=STEPS,
        samples=SAMPLES,
        count=SAMPLES,
    )


def row_of(case: Case) -> dict[str, Any]:
    """What is kept of a case: errors as shares of the exact shift, each with its standard error."""
    found = compute(case)
    arms = found["arms"]
    about = {"world": case.world, "beta": case.beta / case.lam, "lam": case.lam}
    return about | {way: arms[way]["against_aligned"] for way in WAYS} | {"ess": found["verdict"]["evenness"]}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """By λ: the median and the largest error over worlds and β of each way, and the median effective share."""
    by_lam = {lam: [row for row in rows if row["lam"] == lam] for lam in LAMS}
    found = []
    for lam, some in by_lam.items():
        line: dict[str, Any] = {"lam": lam, "cases": len(some), "ess": float(np.median([row["ess"] for row in some]))}
        for way in WAYS:
            errors = [abs(row[way][0]) for row in some]
            line[way] = {
                "median": float(np.median(errors)),
                "worst": max(errors),
                "noise": float(np.median([row[way][1] for row in some])),
            }
        found.append(line)
    return found


def main() -> None:
    """Compare what is not compared yet, and print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, default=Path("extrapolation"), help="folder; an interrupted run continues")
    options.add_argument("--json", type=Path, help="a file for the table besides")
    chosen, console = options.parse_args(), Console()
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in [case_of(world, beta, lam) for world in WORLDS for beta in TARGETS for lam in LAMS]:
        file = chosen.out / f"{case.name}.json"
        if not file.exists():
            write_json(file, row_of(case))
            console.print(f"{case.world}: β = {case.beta / case.lam:g} by λ = {case.lam:g}")
        rows.append(json.loads(file.read_text()))
    lines = summary(rows)
    table = Table("λ", "effective share", *WAYS, "noise", title="error of the expected reward, % of its shift")
    for line in lines:
        ways = (f"{line[way]['median']:.1%} (worst {line[way]['worst']:.0%})" for way in WAYS)
        table.add_row(f"{line['lam']:g}", f"{line['ess']:.2f}", *ways, f"{line['plain']['noise']:.1%}")
    console.print(table)
    if chosen.json is not None:
        settings = {"worlds": list(WORLDS), "beta": list(TARGETS), "samples": SAMPLES, "steps": STEPS, "eta": 1.0}
        write_json(chosen.json, {"settings": settings, "rows": lines})


if __name__ == "__main__":
    main()
