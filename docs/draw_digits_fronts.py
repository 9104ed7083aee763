"""Brings fronts, equal cost and λ > 1 into the documentation: python docs/draw_digits_fronts.py FRONTS BASELINES

FRONTS and BASELINES are the folders of `deradiff experiment run` for the plans studies/digits/fronts.yaml and
studies/digits/baselines.yaml, with their reports inside. Copies what docs/tasks/digits-fronts.md shows into docs/images
and docs/data/digits-fronts, and prints the page's tables. That of λ > 1 is of docs/data/extrapolation.json and of the
digits experiment.
"""

import csv
import json
import shutil
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
DATA = HERE / "data" / "digits-fronts"
MEASURES = ("FID", "recall", "SCD", "LSCD", "Vendi")

Row = dict[str, str]


def read(folder: Path, name: str) -> list[Row]:
    """The rows of one of a report's tables."""
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def number(row: Row, name: str, error: str | None = None) -> str:
    """A value with its standard error, as short as the page shows it."""
    value, off = row[name], row[error or f"s.e. of {name}"]
    if not value or value == "nan":
        return ""
    if value == "inf":  # a direction in which the arm's images do not differ at all
        return "∞"
    known = off and off != "nan" and float(off) > 0
    return f"{float(value):.3g} ± {float(off):.1g}" if known else f"{float(value):.3g}"


def fronts(report: Path) -> str:
    """Every arm: reward, legibility, diversity and divergence, each series together; "·" marks what nothing beats."""
    away = {row["arm"]: row for row in read(report, "front-path-kl")}
    legible = {row["arm"]: row for row in read(report, "front-legible-digits")}
    columns = ("arm", "reward", "legible", *MEASURES, "path KL, nats")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    rows = sorted(read(report, "front-digits-digits"), key=lambda row: row["series"] != "reference")
    for _, series in groupby(rows, key=lambda row: row["series"]):
        for row in series:
            cells = [row["arm"], number(row, "mean score")]
            cells.append(number(legible[row["arm"]], "mean score") if row["arm"] in legible else "")
            for name in MEASURES:
                best = " ·" if row[f"non-dominated in {name}"] else ""
                cells.append(number(row, name) + best)
            known = away.get(row["arm"])
            best = " ·" if known and known["non-dominated"] else ""
            cells.append(number(known, "path KL, nats", "s.e. of path KL") + best if known else "")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def equal_cost(report: Path) -> str:
    """Every arm of the baselines by what it costs, with what it gains."""
    lines = ["| arm | evaluations, of plain | seconds, of plain | reward | gained |", "|---|---|---|---|---|"]
    for row in sorted(read(report, "equal-cost-digits"), key=lambda row: float(row["evaluations / reference's"])):
        low, high = float(row["95% from"]), float(row["95% to"])
        gained = f"{float(row['difference to the reference']):+.2f} ({low:+.2f} to {high:+.2f})"
        best = " ·" if row["non-dominated"] else ""
        cost, seconds = float(row["evaluations / reference's"]), float(row["seconds / reference's"])
        lines.append(f"| {row['arm']} | {cost:.3g} | {seconds:.2g} | {number(row, 'mean score')}{best} | {gained} |")
    return "\n".join(lines)


def beyond() -> str:
    """λ > 1: closed forms, and the digits against models trained there."""
    lines = ["| λ | worlds in closed form | digits |", "|---|---|---|"]
    closed = {row["lam"]: row for row in json.loads((HERE / "data" / "extrapolation.json").read_text())["rows"]}
    experiment = HERE / "data" / "digits-experiment"
    (reference,) = {
        float(row["mean score"])
        for row in read(experiment, "front-digits-digits")
        if row["arm"] == "reference" and row["prompts"] == "digits"
    }
    off: dict[float, list[float]] = {}
    for row in read(experiment, "agreement-heat-diffusion-dpo-digits-digits"):
        if (lam := float(row["lambda"])) > 1:
            off.setdefault(lam, []).append(float(row["difference"]) / (float(row["retrained"]) - reference))
    for lam in sorted({*closed, *off}):
        world, shares = closed.get(lam), off.get(lam, [])
        left = f"{world['plain']['median']:.1%} (at most {world['plain']['worst']:.0%})" if world else ""
        right = f"{mean(shares):+.1%} ({len(shares)} pairs)" if shares else ""
        lines.append(f"| {lam:.3g} | {left} | {right} |")
    return "\n".join(lines)


def main() -> None:
    """Copy what the page shows and print its tables."""
    runs = dict(zip(("fronts", "baselines"), map(Path, sys.argv[1:3]), strict=True))
    DATA.mkdir(exist_ok=True)
    wanted = {
        "fronts": (
            ("front-digits-digits", "front-path-kl"),
            ("front-digits-digits", "front-legible-digits", "front-path-kl"),
        ),
        "baselines": (("equal-cost-digits",), ("equal-cost-digits",)),
    }
    for run, (figures, tables) in wanted.items():
        for name in figures:
            shutil.copyfile(runs[run] / "report" / f"{name}.png", HERE / "images" / f"digits-{run}-{name}.png")
        for name in tables:
            shutil.copyfile(runs[run] / "report" / f"{name}.csv", DATA / f"{run}-{name}.csv")
    for table in (fronts(runs["fronts"] / "report"), equal_cost(runs["baselines"] / "report"), beyond()):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
