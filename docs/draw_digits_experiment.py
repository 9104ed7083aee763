"""Brings the digits experiment into the documentation: python docs/draw_digits_experiment.py RUN

RUN is the folder of `deradiff experiment run`, with its report in RUN/report. Copies the figures and tables that
docs/tasks/digits-experiment.md shows into docs/images and docs/data/digits-experiment, and prints the page's tables.
"""

import csv
import shutil
import sys
from pathlib import Path

from deradiff.algorithm.estimates import mean
from deradiff.experiments.plan import parse_plan
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store

HERE = Path(__file__).parent
FIGURES = (
    "agreement-heat-diffusion-dpo-digits-digits",
    "agreement-scatter-diffusion-dpo-digits-digits",
    "agreement-particles-diffusion-dpo-digits",
    "hacking-beta-30-beta-500",
    "front-digits-digits",
    "combined-bold-ink",
    "strip-beta-30",
    "equal-cost-digits",
)
TABLES = (
    "agreement-table-1-diffusion-dpo-digits",
    "agreement-table-2-diffusion-dpo-digits",
    "hacking-table-digits",
    "agreement-heat-diffusion-dpo-digits-digits",
    "agreement-statistics-diffusion-dpo-digits-digits",
    "agreement-particles-diffusion-dpo-digits",
    "front-digits-digits",
    "equal-cost-digits",
    "diversity-digits",
)


def read(report: Path, name: str) -> list[dict[str, str]]:
    """The rows of one of the report's tables."""
    with (report / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def errors(report: Path) -> str:
    """The paper's Table 1: how far approximations are from retrained models, λ ≤ 1."""
    lines = ["| score | mean absolute error | % of the mean | of noise alone |", "|---|---|---|---|"]
    for row in read(report, "agreement-table-1-diffusion-dpo-digits"):
        error, own = float(row["MAE"]), float(row["s.e. of the MAE over prompts"])
        share, noise = float(row["MAE, % of μ"]), float(row["MAE of noise alone"])
        lines.append(f"| {row['score']} | {error:.4f} ± {own:.4f} | {share:.1f}% | {noise:.4f} |")
    return "\n".join(lines)


def hacking(report: Path) -> str:
    """The paper's Table 3: Fréchet distance to the healthy model."""
    lines = ["| hacked | realigned | distance before | after | taken off |", "|---|---|---|---|---|"]
    for row in read(report, "hacking-table-digits"):
        cells = [
            f"{float(row[value]):.3g} ± {float(row[error]):.2g}"
            for value, error in (
                ("distance of hacked", "s.e. (hacked)"),
                ("distance of realigned", "s.e. (realigned)"),
                ("Δ in %", "s.e. (Δ in %)"),
            )
        ]
        name = f"{row['realigned']} ({row['prompts']})"
        lines.append(f"| {row['hacked']} | {name} | {' | '.join(cells)}% |")
    return "\n".join(lines)


def together(run: Path) -> str:
    """Two rewards at once: both scores of each anchor alone and of mixtures, the seeds of a prompt averaged."""
    lines = ["| | bold | ink | legible |", "|---|---|---|---|"]
    with Store(run, write=False) as store:
        results = Results(parse_plan(store.fact("plan"), "the run's plan"), store)
        for arm in (results.reference, *map(results.model, ("bold", "ink")), *results.of_method("combine")):
            assert arm is not None
            found = [mean(results.by_prompt(arm, "digits", name).tolist()) for name in ("bold", "ink", "legible")]
            lines.append(f"| {arm.name} | " + " | ".join(f"{one.value:.3f} ± {one.error:.3f}" for one in found) + " |")
    return "\n".join(lines)


def main() -> None:
    """Copy what the page shows and print its tables."""
    run = Path(sys.argv[1])
    report = run / "report"
    data = HERE / "data" / "digits-experiment"
    data.mkdir(exist_ok=True)
    for name in FIGURES:
        shutil.copyfile(report / f"{name}.png", HERE / "images" / f"digits-experiment-{name}.png")
    for name in TABLES:
        shutil.copyfile(report / f"{name}.csv", data / f"{name}.csv")
    for table in (errors(report), hacking(report), together(run)):
        print(table, end="\n\n")


if __name__ == "__main__":
    main()
