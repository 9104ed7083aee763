"""The figures of a comparison: the same colour and marker for the same way of sampling in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from deradiff.algorithm.verdict import TRUSTED
from deradiff.files.figure_styles import ARMS, KINDS, LOOK, Style
from studies.closed_forms.cases import WORLDS, Case
from studies.closed_forms.comparison import Exact, Record, exact
from studies.closed_forms.tables import error, judged, select, true_error

CURVE = "#222222"
"""The exact values."""

ORDER = ("exact", *(style.label for style in (*ARMS.values(), *KINDS.values())))
"""The order of legends."""


class _Panels:
    """A grid of panels with one legend above all of them."""

    def __init__(self, rows: int, columns: int, *, height: float = 2.6, **shared: Any) -> None:
        self.figure = Figure(figsize=(11, height * rows + 0.7), layout="constrained")
        self.axes: list[list[Axes]] = self.figure.subplots(rows, columns, squeeze=False, **shared).tolist()

    def save(self, path: Path) -> Path:
        entries: dict[str, Any] = {}
        for ax in (ax for row in self.axes for ax in row):
            handles, labels = ax.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        entries = {label: entries[label] for label in ORDER if label in entries}
        self.figure.legend(
            entries.values(), entries.keys(), loc="outside upper center", ncols=7, columnspacing=1.2, handlelength=1.5
        )
        self.figure.savefig(path, dpi=110)
        return path


def draw(records: Sequence[Record], folder: Path) -> dict[str, Path]:
    """Draw every figure that the records are enough for, into `folder`; returns them by name."""
    found: dict[str, Path] = {}
    with rc_context(LOOK):
        for world in dict.fromkeys(record["case"]["world"] for record in records):
            grid = select(records, world=world, study="grid")
            found[f"reward-{world}"] = rewards(grid, folder / f"reward-{world}.png")
            found[f"error-{world}"] = errors(grid, folder / f"error-{world}.png")
            both = select(records, world=world, study="two rewards")
            if both:
                found[f"two-rewards-{world}"] = errors(both, folder / f"two-rewards-{world}.png")
        crossing = select(records, world="crossing", study="grid")
        if crossing:
            found["modes"] = modes(crossing, folder / "modes.png")
            found["particles"] = particles(select(records, study="particles"), folder / "particles.png")
            found["steps"] = steps(select(records, study="steps"), folder / "steps.png")
        found["verdict"] = verdicts(judged(records), folder / "verdict.png")
    return found


def rewards(records: Sequence[Record], path: Path) -> Path:
    """Expected reward against λ: a row of panels for each β, a column for each η."""
    betas, etas = _values(records, "beta"), _values(records, "eta")[::-1]
    panels = _Panels(len(betas), len(etas), sharex=True, sharey="row")
    for row, beta in zip(panels.axes, betas, strict=True):
        for ax, eta in zip(row, etas, strict=True):
            found = select(records, beta=beta, eta=eta)
            lams, curve = _curve(found[0])
            ax.plot(lams, curve, color=CURVE, linewidth=1.4, label="exact")
            _lines(ax, found, lambda arm: arm["reward"][0])
            _titles(ax, row, panels, eta, f"β = {beta:g}\nexpected reward")
            ax.set_xlabel("λ" if row is panels.axes[-1] else "")
    return panels.save(path)


def errors(records: Sequence[Record], path: Path) -> Path:
    """Error in per cent of the exact shift, with two standard errors; annealed guidance, far off, is left out."""
    betas, etas, lams = _values(records, "beta"), _values(records, "eta")[::-1], _values(records, "lam")
    arms = [arm for arm in ARMS if arm != "annealed" and any(arm in record["arms"] for record in records)]
    panels = _Panels(len(betas), len(etas), sharex=True, sharey="row")
    for row, beta in zip(panels.axes, betas, strict=True):
        for ax, eta in zip(row, etas, strict=True):
            ax.axhline(0, color=CURVE, linewidth=1.2)
            _band(ax)
            for i, arm in enumerate(arms):
                found = [record for record in select(records, beta=beta, eta=eta) if arm in record["arms"]]
                away = (i - (len(arms) - 1) / 2) * 0.8 / len(arms)
                _bars(
                    ax, [lams.index(record["case"]["lam"]) + away for record in found], _percent(found, arm), ARMS[arm]
                )
            _titles(ax, row, panels, eta, f"β = {beta:g}\nerror, % of the shift")
            ax.set_xticks(range(len(lams)), [f"{lam:g}" for lam in lams])
            ax.grid(False, axis="x")
            ax.set_xlabel("λ" if row is panels.axes[-1] else "")
    return panels.save(path)


def modes(records: Sequence[Record], path: Path) -> Path:
    """Mode weights against λ where β is smallest: a row of panels for each mode, a column for each η."""
    beta, etas = _values(records, "beta")[0], _values(records, "eta")[::-1]
    means = WORLDS[records[0]["case"]["world"]]().reference.means.tolist()
    panels = _Panels(len(means), len(etas), height=2.1, sharex=True, sharey="row")
    for k, (row, mean) in enumerate(zip(panels.axes, means, strict=True)):
        for ax, eta in zip(row, etas, strict=True):
            found = select(records, beta=beta, eta=eta)
            lams, curve = _curve(found[0], partial(_exact_share, k))
            ax.plot(lams, curve, color=CURVE, linewidth=1.4, label="exact")
            _lines(ax, found, partial(_share, k))
            _titles(ax, row, panels, eta, f"mode at\n({', '.join(map(_number, mean))})")
            ax.set_xlabel("λ" if row is panels.axes[-1] else "")
        row[0].set_ylim(bottom=0)
    return panels.save(path)


def particles(records: Sequence[Record], path: Path) -> Path:
    """The bias of the weighted mean over K particles of a prompt, averaged over prompts, against K."""
    pairs = list(dict.fromkeys((record["case"]["beta"], record["case"]["lam"]) for record in records))
    panels = _Panels(1, len(pairs), height=3.0, sharey=False)
    for ax, (beta, lam) in zip(panels.axes[0], pairs, strict=True):
        found = select(records, beta=beta, lam=lam)
        ax.axhline(0, color=CURVE, linewidth=1.2, label="exact")
        _band(ax)
        counts = [record["case"]["count"] for record in found]
        _bars(ax, counts, _percent(found, "particles"), ARMS["particles"], line=True)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [str(count) for count in counts])
        ax.set_title(f"β = {beta:g}, λ = {lam:g}")
        ax.set_xlabel("K, particles of a prompt")
    panels.axes[0][0].set_ylabel("error, % of the shift")
    return panels.save(path)


def steps(records: Sequence[Record], path: Path) -> Path:
    """Error against the number of sampling steps: a row of panels for each η, a column for each (β, λ)."""
    pairs = list(dict.fromkeys((record["case"]["beta"], record["case"]["lam"]) for record in records))
    etas = _values(records, "eta")[::-1]
    panels = _Panels(len(etas), len(pairs), height=2.9, sharex=True)
    for row, eta in zip(panels.axes, etas, strict=True):
        for ax, (beta, lam) in zip(row, pairs, strict=True):
            found = select(records, beta=beta, lam=lam, eta=eta)
            numbers = [record["case"]["steps"] for record in found]
            ax.axhline(0, color=CURVE, linewidth=1.2, label="exact")
            _band(ax)
            for arm in (arm for arm in ARMS if all(arm in record["arms"] for record in found)):
                _bars(ax, numbers, _percent(found, arm), ARMS[arm], line=True)
            ax.set_xscale("log")
            ax.minorticks_off()
            ax.set_xticks(numbers, [str(number) for number in numbers])
            if row is panels.axes[0]:
                ax.set_title(f"β = {beta:g}, λ = {lam:g}")
            else:
                ax.set_xlabel("sampling steps")
        row[0].set_ylabel(f"η = {eta:g}\nerror, % of the shift")
    return panels.save(path)


def verdicts(records: Sequence[Record], path: Path) -> Path:
    """The error that the verdict estimates against the true one, by kind of verdict: a panel for each η.

    Runs of one model alone, "exact", have no error of either sort and are left out.
    """
    etas = _values(records, "eta")[::-1]
    panels = _Panels(1, len(etas), height=4.2, sharex=True, sharey=True)
    for ax, eta in zip(panels.axes[0], etas, strict=True):
        _band(ax)
        ax.plot([-100, 100], [-100, 100], color="#888888", linewidth=1)
        for kind, style in KINDS.items():
            found = [record for record in select(records, eta=eta) if record["verdict"]["kind"] == kind]
            found = [record for record in found if record["verdict"]["error"] is not None]
            if found:
                ax.plot(
                    # The verdict counts weighted minus plain, the truth plain minus aligned.
                    [-100 * record["verdict"]["error"][0] for record in found],
                    [100 * true_error(record).value for record in found],
                    style.marker,
                    color=style.colour,
                    markersize=5.5,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                    alpha=0.9,
                    label=style.label,
                )
        for axis in (ax.set_xscale, ax.set_yscale):
            axis("symlog", linthresh=2, linscale=0.8)
        ax.minorticks_off()
        ticks = (-50, -10, -2, 0, 2, 10, 50)
        ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        ax.set_title(f"η = {eta:g}")
        ax.set_xlabel("estimated error, % of the shift")
    panels.axes[0][0].set_ylabel("true error, % of the shift")
    return panels.save(path)


def _exact_share(k: int, truth: Exact) -> float:
    return truth.modes[k]


def _share(k: int, arm: Record) -> float:
    return arm["modes"][k]


def _number(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _values(records: Sequence[Record], key: str) -> list[Any]:
    return sorted({record["case"][key] for record in records})


def _percent(records: Sequence[Record], arm: str) -> list[tuple[float, float]]:
    found = [error(record, arm) for record in records]
    return [(100 * estimate.value, 100 * estimate.error) for estimate in found if estimate is not None]


def _curve(
    record: Record, value: Callable[[Exact], float] = lambda truth: truth.reward
) -> tuple[list[float], list[float]]:
    """An exact value as a function of λ up to 2, everything else as in `record`."""
    lams = [i / 50 for i in range(1, 101)]
    case = record["case"]
    cases = [Case(**{**case, "rewards": tuple(case["rewards"]), "lam": lam}) for lam in lams]
    return lams, [value(exact(case)) for case in cases]


def _lines(ax: Axes, records: Sequence[Record], value: Callable[[Record], float]) -> None:
    for arm, style in ARMS.items():
        found = [record for record in records if arm in record["arms"]]
        if found:
            hollow = "white" if arm == "aligned" else style.colour
            size = 7.5 if arm == "aligned" else 5
            ax.plot(
                [record["case"]["lam"] for record in found],
                [value(record["arms"][arm]) for record in found],
                style.marker,
                color=style.colour,
                markerfacecolor=hollow,
                markersize=size,
                linestyle="-" if arm in ("plain", "annealed") else "none",
                linewidth=1,
                label=style.label,
            )


def _bars(ax: Axes, x: Sequence[float], y: Sequence[tuple[float, float]], style: Style, line: bool = False) -> None:
    ax.errorbar(
        x,
        [value for value, _ in y],
        [2 * deviation for _, deviation in y],
        fmt=style.marker,
        color=style.colour,
        markersize=5,
        linewidth=1.2,
        linestyle="-" if line else "none",
        label=style.label,
    )


def _band(ax: Axes) -> None:
    """Where an error may be trusted to be none."""
    ax.axhspan(-100 * TRUSTED, 100 * TRUSTED, color="#EAF1F6", zorder=0)


def _titles(ax: Axes, row: Sequence[Axes], panels: _Panels, eta: float, name: str) -> None:
    """The sampler over the first row, `name` beside the first column."""
    if row is panels.axes[0]:
        ax.set_title({1.0: "η = 1", 0.0: "η = 0, deterministic"}.get(eta, f"η = {eta:g}"))
    if ax is row[0]:
        ax.set_ylabel(name)
