"""What an examination saw, drawn: the way from reference to anchor, the slopes, the proportion of pairs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from deradiff.algorithm.pair_terms import FAR, PairTest
from deradiff.algorithm.tilts import TiltTest
from deradiff.files.figure_styles import ARMS, LOOK
from deradiff.files.writing import atomic_file

if TYPE_CHECKING:
    from deradiff.examination import Examination

INK = "#222222"


def draw_examination(found: Examination, path: Path) -> None:
    """Write the figure to `path` as PNG; bars are two standard errors."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = [_means, _slopes] if found.tilt is not None else []
    drawn: list[Any] = [(panel, found.tilt) for panel in panels]
    if found.pairs is not None:
        drawn.append((_proportions, found.pairs))
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(0.6 + 4.3 * max(len(drawn), 1), 4.2), layout="constrained")
        row: Any = figure.subplots(1, max(len(drawn), 1), squeeze=False)[0]
        for axes, (panel, test) in zip(row, drawn, strict=False):
            panel(axes, test)
        if not drawn:
            row[0].set_axis_off()
        figure.suptitle(f"{found.made_of['anchor']}: {found.character.kind}", fontsize=11)
        with atomic_file(path) as temporary:
            figure.savefig(temporary, format="png", dpi=150)


def _means(axes: Any, test: TiltTest) -> None:
    """Plain and weighted means of the reward, beside a tilt's."""
    lams = [one.lam for one in test.at]
    axes.plot(lams, [100 * one.expected for one in test.at], color=INK, linestyle="--", label="a tilt's weighted mean")
    for name in ("plain", "weighted"):
        style, estimates = ARMS[name], [getattr(one, name) for one in test.at]
        axes.errorbar(
            lams,
            [100 * one.value for one in estimates],
            [200 * one.error for one in estimates],
            color=style.colour,
            marker=style.marker,
            capsize=3,
            label=style.label,
        )
    axes.set_xlabel("λ")
    axes.set_ylabel("mean reward, % of the way to the anchor")
    axes.set_title("The way from reference to anchor")
    axes.legend(fontsize="small", loc="best")


def _slopes(axes: Any, test: TiltTest) -> None:
    """The slope of the log path ratio on the reward at each λ."""
    known = [(one.lam, one.slope) for one in test.at if one.slope is not None]
    axes.axhline(test.tilt.value, color=INK, linestyle="--", label="1/β that the two ends show")
    axes.axhline(0, color="#888888", linewidth=0.8)
    if known:
        axes.errorbar(
            [lam for lam, _ in known],
            [slope.value for _, slope in known],
            [2 * slope.error for _, slope in known],
            color=ARMS["weighted"].colour,
            marker="o",
            capsize=3,
            label="slope within prompts",
        )
    axes.set_xlabel("λ")
    axes.set_ylabel("nats per point of the reward")
    axes.set_title("Log path ratio against reward")
    axes.legend(fontsize="small", loc="best")


def _proportions(axes: Any, test: PairTest) -> None:
    """Where the loss of pairs at β/λ is least along the line to the anchor, in units of λ."""
    lams = [*test.proportions]
    axes.axhspan(1 - FAR, 1 + FAR, color="#EEEEEE", label="stepwise")
    axes.axhline(1, color=INK, linestyle="--")
    axes.errorbar(
        lams,
        [one.value for one in test.proportions.values()],
        [2 * one.error for one in test.proportions.values()],
        color=ARMS["plain"].colour,
        marker="s",
        capsize=3,
        linestyle="none",
        label=f"{test.pairs} pairs, β = {test.beta:g}",
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(2.2, max(one.value + 2.5 * one.error for one in test.proportions.values())))
    axes.set_xlabel("λ")
    axes.set_ylabel("s(β/λ) / (λ s(β))")
    axes.set_title("Loss of pairs along the line to the anchor")
    axes.legend(fontsize="small", loc="best")
