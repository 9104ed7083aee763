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


def equal_cost(report: Path, prompts: str) -> str:
    """Every arm of the baselines by what it costs, with what it gains on one of the sets."""
    lines = ["| arm | evaluations, of plain | seconds, of plain | reward | gained |", "|---|---|---|---|---|"]
    for row in sorted(read(report, f"equal-cost-{prompts}"), key=lambda row: float(row["evaluations / reference's"])):
        low, high = float(row["95% from"]), float(row["95% to"])
        gained = f"{float(row['difference to the reference']):+.2f} ({low:+.2f} to {high:+.2f})"
        best = " ·" if row["non-dominated"] else ""
        cost, seconds = float(row["evaluations / reference's"]), float(row["seconds / reference's"])
        lines.append(f"| {row['arm']} | {cost:.3g} | {seconds:.2g} | {number(row, 'mean score')}{best} | {gained} |")
    return "\n".join(lines)


def beyond() -> str:
    """λ > 1 in closed form: errors of Algorithm 1 and of the weighted mean, as shares of the shift."""
    lines = ["| λ | Algorithm 1 | weighted mean | effective share |", "|---|---|---|---|"]
    for row in json.loads((HERE / "data" / "extrapolation.json").read_text())["rows"]:
        ways = (f"{row[way]['median']:.1%} (at most {row[way]['worst']:.0%})" for way in ("plain", "weighted"))
        lines.append(f"| {row['lam']:g} | {' | '.join(ways)} | {row['ess']:.2f} |")
    return "\n".join(lines)


def trained_there() -> str:
    """λ > 1 on the digits: what Algorithm 1 makes of weaker anchors, against models trained there."""
    experiment = HERE / "data" / "digits-experiment"
    rows = read(experiment, "front-digits-digits")
    (reference,) = {float(row["mean score"]) for row in rows if (row["arm"], row["prompts"]) == ("reference", "digits")}
    lines = ["| λ | anchor → target | retrained | realigned | error, of the shift |", "|---|---|---|---|---|"]
    pairs = read(experiment, "agreement-heat-diffusion-dpo-digits-digits")
    for row in sorted(pairs, key=lambda row: float(row["lambda"])):
        if float(row["lambda"]) > 1:
            retrained, found = float(row["retrained"]), float(row["approximated"])
            off, error = (float(row[name]) / (retrained - reference) for name in ("difference", "standard_error"))
            name = f"{row['anchor_beta'].removesuffix('.0')} → {row['target_beta'].removesuffix('.0')}"
            lam = f"{float(row['lambda']):.3g}"
            lines.append(f"| {lam} | {name} | {retrained:.2f} | {found:.2f} | {off:+.1%} ± {error:.1%} |")
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
        "baselines": (("equal-cost-eight", "equal-cost-few"), ("equal-cost-eight", "equal-cost-few")),
    }
    for run, (figures, tables) in wanted.items():
        for name in figures:
            shutil.copyfile(runs[run] / "report" / f"{name}.png", HERE / "images" / f"digits-{run}-{name}.png")
        for name in tables:
            shutil.copyfile(runs[run] / "report" / f"{name}.csv", DATA / f"{run}-{name}.csv")
    for table in (
        fronts(runs["fronts"] / "report"),
        *(equal_cost(runs["baselines"] / "report", prompts) for prompts in ("eight", "few")),
        beyond(),
        trained_there(),
    ):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
