"""What the comparison on the digits says: rows of numbers, and two figures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED, TRUSTING
from deradiff.files.figure_styles import ARMS, LOOK, Style
from deradiff.worlds.digits.data import INKS
from studies.digits import truth_files
from studies.digits.truth import REWARDS, Record

SHOWN = {
    "algorithm 1": ARMS["plain"],
    "weighted": ARMS["weighted"],
    "particles 4": Style("particles, K = 4", "#A6D9C9", "D"),
    "particles 16": Style("particles, K = 16", ARMS["particles"].colour, "D"),
    "particles 64": Style("particles, K = 64", "#00543C", "D"),
    "interpolated": ARMS["interpolated"],
}
"""How each way of sampling is drawn."""

INK_COLOURS = {
    "green": "#2E8B57",
    "purple": "#7B3FA0",
    "black": "#222222",
    "orange": "#E69F00",
    "blue": "#2F6DB5",
    "red": "#C8352B",
}
INK_MARKERS = dict(zip(INKS, "osD^vP", strict=True))

ENOUGH = 3.0
"""Algorithm 1 misses the retrained model where its error exceeds so many standard errors."""


@dataclass(frozen=True)
class Row:
    """One reward of one case: how far the retrained model moved it, and how far off each way of sampling is."""

    family: str
    target: str
    guidance_scale: float
    reward: str
    shift: Estimate
    errors: dict[str, Estimate]
    verdict: str
    words: str

    @property
    def missed(self) -> bool:
        """Whether Algorithm 1 is off by more than `ENOUGH` standard errors."""
        error = self.errors["algorithm 1"]
        return abs(error.value) > ENOUGH * error.error

    @property
    def beyond(self) -> float:
        """Algorithm 1's error beyond two standard errors, as a share of the shift."""
        error = self.errors["algorithm 1"]
        return max(0.0, abs(error.value) - 2 * error.error) / abs(self.shift.value)

    def removed(self, arm: str) -> float | None:
        """The share of Algorithm 1's error that `arm` removes; negative where it adds. None if it was not drawn."""
        if arm not in self.errors:
            return None
        return 1 - abs(self.errors[arm].value) / abs(self.errors["algorithm 1"].value)

    @property
    def judgement(self) -> str:
        """The verdict beside the truth: right, a miss, a false alarm, or open where nothing was claimed.

        "Off" claims that the weighted mean is nearer: where it is not, that was a false alarm.
        """
        if self.verdict in TRUSTING:
            return "right" if self.beyond <= TRUSTED else "miss"
        if self.verdict == "off":
            nearer = abs(self.errors["weighted"].value) < abs(self.errors["algorithm 1"].value)
            return "right" if self.beyond > 0 and nearer else "false alarm"
        return "open"


def rows(records: Iterable[Record]) -> list[Row]:
    """A row for every reward that a case's target tilts: the other reward has no shift to compare with."""
    found = []
    for record in records:
        case = record["case"]
        target = " + ".join(f"{name} λ = {lam:g}" for name, lam in case["target"].items())
        for reward in case["target"]:
            measured, verdict = record["errors"][reward], record["verdicts"][reward]
            errors = {arm: Estimate(gap["value"], gap["error"]) for arm, gap in measured["gaps"].items()}
            found.append(
                Row(
                    case["family"],
                    target,
                    case["guidance_scale"],
                    reward,
                    Estimate(measured["shift"]["value"], measured["shift"]["error"]),
                    errors,
                    verdict["kind"],
                    verdict["words"],
                )
            )
    return found


def summary(records: Sequence[Record]) -> list[Record]:
    """The records without what is kept per prompt: small enough to be committed."""
    return [
        record
        | {
            "arms": {
                arm: {key: value for key, value in measured.items() if key != "by_prompt"}
                for arm, measured in record["arms"].items()
            }
        }
        for record in records
    ]


def anchors_table(records: Sequence[Record]) -> str:
    """In Markdown: which part of its anchor's own shift the retrained model has, and Algorithm 1; of single rewards."""
    lines = ["| models | target | guidance | retrained | Algorithm 1 |", "|---|---|---|---|---|"]
    for record in records:
        case, arms = record["case"], record["arms"]
        if len(case["target"]) > 1:
            continue
        ((reward, lam),) = case["target"].items()
        value = {arm: measured[reward]["value"] - arms["reference"][reward]["value"] for arm, measured in arms.items()}
        parts = [f"{value[arm] / value[f'anchor {reward}']:.0%}" for arm in ("retrained", "algorithm 1")]
        line = [case["family"], f"{reward} λ = {lam:g}", f"{case['guidance_scale']:g}", *parts]
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def training(models: Path) -> Record:
    """What every trained model was to reach and reached, with its curve, by `family/target`."""
    files = sorted(models.glob("*/*/truth.json"))
    return {f"{file.parent.parent.name}/{file.parent.name}": truth_files.trained(file, set(REWARDS)) for file in files}


def table(records: Sequence[Record]) -> str:
    """The errors in Markdown: every row's shift, the error of every way of sampling, the verdict."""
    heading = (
        "| models | target | guidance | reward | shift | Algorithm 1 | weighted | K = 4 | K = 16 | K = 64 | "
        "interpolated | verdict | which is |"
    )
    lines = [heading, "|" + "---|" * heading.count(" | ") + "---|"]
    for row in rows(records):
        errors = [_signed(row.errors.get(arm)) for arm in SHOWN]
        lines.append(
            f"| {row.family} | {row.target} | {row.guidance_scale:g} | {row.reward} | {_signed(row.shift)} | "
            + " | ".join(errors)
            + f" | {row.verdict} | {row.judgement} |"
        )
    return "\n".join(lines) + "\n"


def shares(records: Sequence[Record]) -> str:
    """The errors in Markdown as shares of the shift, and how much of Algorithm 1's error K = 16 particles remove."""
    lines = ["| models | target | guidance | reward | Algorithm 1 | in s.e. | weighted | K = 16 | K = 16 removes |"]
    lines.append("|" + "---|" * 9)
    for row in rows(records):
        error, removed = row.errors["algorithm 1"], row.removed("particles 16")
        parts = [_percent(row.errors.get(arm), row.shift) for arm in ("algorithm 1", "weighted", "particles 16")]
        parts.insert(1, f"{abs(error.value) / error.error:.1f}")
        lines.append(
            f"| {row.family} | {row.target} | {row.guidance_scale:g} | {row.reward} | "
            + " | ".join(parts)
            + (f" | {_removed(removed)} |" if row.missed and removed is not None else " | |")
        )
    return "\n".join(lines) + "\n"


def _removed(share: float) -> str:
    return f"{100 * share:.0f}%" if share > 0 else "none, adds to it"


def _percent(estimate: Estimate | None, whole: Estimate) -> str:
    if estimate is None:
        return ""
    return f"{100 * estimate.value / abs(whole.value):+.1f} ± {100 * estimate.error / abs(whole.value):.1f}%"


def training_table(trained: Record) -> str:
    """In Markdown: the shift of the mean reward that each model's weights demand, and the one it reached.

    A weighted model is measured against its control, one of Diffusion-DPO, whose weights demand nothing in numbers,
    against the reference's samples.
    """
    lines = ["| model | reward | demanded | reached | share |", "|---|---|---|---|---|"]
    for name, record in trained.items():
        control = trained.get("weighted/control", {}).get("reached") if record["family"] == "weighted" else None
        for reward in record["λ"] or record["reached"]:
            ended = record["reached"][reward]
            began = control[reward]["model"] if control and record["λ"] else ended["reference"]
            reached = _less(ended["model"], began)
            demanded = record.get("mean_rewards", {}).get(reward)
            asked = _less(demanded["tilted"], demanded["reference"]) if demanded and record["λ"] else None
            share = f"{100 * reached.value / asked.value:.0f}%" if asked else ""
            lines.append(f"| {name} | {reward} | {_signed(asked)} | {_signed(reached)} | {share} |")
    return "\n".join(lines) + "\n"


def _less(measured: Record, other: Record) -> Estimate:
    """Their difference, as of independent samples."""
    return Estimate(measured["value"] - other["value"], math.hypot(measured["error"], other["error"]))


def inks_table(records: Sequence[Record]) -> str:
    """In Markdown: the share of pictures in every ink, by family, guidance and λ, for every way of getting there."""
    lines = ["| models | guidance | λ | drawn by | " + " | ".join(INKS) + " |", "|" + "---|" * (4 + len(INKS))]
    for record in _alone(records, "ink"):
        case = record["case"]
        ways = {"reference": 0, "anchor ink": 1} | dict.fromkeys(
            ("retrained", "algorithm 1", "particles 16"), case["target"]["ink"]
        )
        for arm, lam in ways.items():
            inks = record["arms"][arm]["inks"]
            parts = [f"{100 * inks[ink]['value']:.1f} ± {100 * inks[ink]['error']:.1f}%" for ink in INKS]
            lines.append(f"| {case['family']} | {case['guidance_scale']:g} | {lam:g} | {arm} | {' | '.join(parts)} |")
    return "\n".join(dict.fromkeys(lines)) + "\n"


def _alone(records: Sequence[Record], reward: str) -> list[Record]:
    return [record for record in records if list(record["case"]["target"]) == [reward]]


def _signed(estimate: Estimate | None) -> str:
    return "" if estimate is None else f"{estimate.value:+.3f} ± {estimate.error:.3f}"


# -- figures ----------------------------------------------------------------------------------------------------------


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """`errors.png`, and `inks.png` where the ink's reward was a target of its own; returns their paths."""
    with rc_context(LOOK):
        paths = [_errors(rows(records), folder / "errors.png")]
        alone = _alone(records, "ink")
        if alone:
            paths.append(_inks(alone, folder / "inks.png"))
    return paths


def _errors(found: Sequence[Row], path: Path) -> Path:
    """A line for every row, a mark for every way of sampling, bars of two standard errors, in per cent of the shift."""
    groups = list(dict.fromkeys((row.family, row.guidance_scale) for row in found))
    counts = [sum((row.family, row.guidance_scale) == group for row in found) for group in groups]
    figure = Figure(figsize=(8.4, 1.5 + 0.75 * len(found) + 0.4 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=counts)[:, 0]
    for axes, (family, scale) in zip(panels, groups, strict=True):
        mine = [row for row in found if (row.family, row.guidance_scale) == (family, scale)]
        for place, row in enumerate(mine):
            for offset, (arm, style) in enumerate(SHOWN.items()):
                if arm not in row.errors:
                    continue
                error, whole = row.errors[arm], abs(row.shift.value)
                height = place + 0.12 * (offset - (len(SHOWN) - 1) / 2)
                axes.errorbar(
                    100 * error.value / whole,
                    height,
                    xerr=200 * error.error / whole,
                    color=style.colour,
                    marker=style.marker,
                    markersize=5,
                    linewidth=1.2,
                    linestyle="none",
                    label=style.label if place == 0 and axes is panels[0] else None,
                )
        axes.axvline(0, color="#222222", linewidth=1)
        axes.set_yticks(range(len(mine)), [f"{row.reward}, under\n{row.target}" for row in mine])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{_family(family)}, guidance {scale:g}", loc="left")
    panels[-1].set_xlabel("mean reward less the retrained model's, % of the shift from the reference (bars: 2 s.e.)")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)
    return path


def _family(name: str) -> str:
    return {"weighted": "Trained on samples weighted by exp(λ r/β)", "dpo": "Trained by Diffusion-DPO at β/λ"}[name]


def _inks(records: Sequence[Record], path: Path) -> Path:
    """The share of every ink against λ, from the reference to the anchor, for three ways of getting there."""
    groups = list(dict.fromkeys((record["case"]["family"], record["case"]["guidance_scale"]) for record in records))
    ways = {"retrained": "retrained models", "algorithm 1": "Algorithm 1", "particles 16": "particles, K = 16"}
    figure = Figure(figsize=(9.6, 1.0 + 3.0 * len(groups)), layout="constrained")
    grid = figure.subplots(len(groups), len(ways), squeeze=False, sharex=True, sharey=True)
    for line, (family, scale) in zip(grid, groups, strict=True):
        mine = sorted(
            (r for r in records if (r["case"]["family"], r["case"]["guidance_scale"]) == (family, scale)),
            key=lambda r: r["case"]["target"]["ink"],
        )
        for axes, (arm, label) in zip(line, ways.items(), strict=True):
            _shares(axes, mine, arm)
            axes.set_title(label + (f"\n{family}, guidance {scale:g}" if axes is line[0] else "\n"), loc="left")
        line[0].set_ylabel("share of pictures, %")
    for axes in grid[-1]:
        axes.set_xlabel("λ (0: reference, 1: anchor)")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(INKS))
    figure.savefig(path, dpi=150)
    return path


def _shares(axes: Axes, records: Sequence[Record], arm: str) -> None:
    ends = records[0]["arms"]
    points: list[tuple[float, Any]] = [(0.0, ends["reference"])]
    points += [(record["case"]["target"]["ink"], record["arms"][arm]) for record in records]
    points += [(1.0, ends["anchor ink"])]
    points.sort(key=lambda point: point[0])
    for ink in INKS:
        shares = [measured["inks"][ink] for _, measured in points]
        axes.errorbar(
            [lam for lam, _ in points],
            [100 * share["value"] for share in shares],
            yerr=[200 * share["error"] for share in shares],
            color=INK_COLOURS[ink],
            marker=INK_MARKERS[ink],
            markersize=5,
            linewidth=1.4,
            label=ink,
        )
    axes.set_ylim(bottom=0)
