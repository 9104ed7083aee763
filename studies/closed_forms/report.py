"""The report of a comparison: one HTML page that holds its tables and figures, and a sentence over every figure.

Sentences are made from the numbers. A comparison that comes out otherwise reads otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from deradiff.algorithm.comparisons import EVEN
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import TRUSTED, TRUSTING
from deradiff.files.figure_styles import ARMS
from deradiff.files.outputs import replaced
from deradiff.files.pages import counted, templates
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from studies.closed_forms import figures
from studies.closed_forms.cases import Plan
from studies.closed_forms.comparison import Record
from studies.closed_forms.tables import error, evenness_rows, goals, place, select, true_error, verdict_rows


def write(records: Sequence[Record], plan: Plan, out: Path) -> list[Path]:
    """Draw the figures and write `report.html` and `summary.json` into `out`; returns the paths, the report first.

    The summary holds the report's tables as data: bounds, verdicts against true errors, errors by evenness.
    Raises as `replaced` does.
    """
    with replaced(out, "comparison", ["report.html", "summary.json"]) as folder:
        files = _written(records, plan, folder)
    return [out / file.name for file in files]


def _written(records: Sequence[Record], plan: Plan, out: Path) -> list[Path]:
    drawn = figures.draw(records, out)
    report, summary = out / "report.html", out / "summary.json"
    report.write_text(page(records, plan, drawn), encoding="utf-8")
    tables: dict[str, Sequence[Any]] = {
        "bounds": goals(records),
        "verdicts": verdict_rows(records),
        "evenness": evenness_rows(records),
    }
    settings = {"worlds": list(plan.worlds), "samples": plan.samples, "steps": plan.steps, "cases": len(records)}
    rows = {name: [row._asdict() for row in table] for name, table in tables.items()}
    write_json(summary, {"settings": settings, "versions": versions()} | rows)
    return [report, summary, *drawn.values()]


def page(records: Sequence[Record], plan: Plan, figures: dict[str, Path]) -> str:
    """The report as HTML that needs no other file."""
    worlds = list(dict.fromkeys(record["case"]["world"] for record in records))
    sentences: list[tuple[str, str, Callable[[Sequence[Record]], str], list[Record]]] = [
        ("modes", "Mode weights", modes_sentence, select(records, world="crossing", study="grid")),
        ("particles", "Error against the number of particles", particles_sentence, select(records, study="particles")),
        ("steps", "Error against the number of steps", steps_sentence, select(records, study="steps")),
    ]
    for world in worlds:
        grid = select(records, world=world, study="grid")
        both = select(records, world=world, study="two rewards")
        sentences += [
            (f"reward-{world}", f"Expected reward against λ: {world}", rewards_sentence, grid),
            (f"error-{world}", f"Error against λ: {world}", errors_sentence, grid),
            (f"two-rewards-{world}", f"Two rewards mixed, λ each: {world}", errors_sentence, both),
        ]
    return (
        templates(Path(__file__).parent)
        .get_template("report.html")
        .render(
            title="Realignment against the truth",
            lead=(
                f"{len(records)} cases in {counted(len(worlds), 'closed-form world')} ({', '.join(worlds)}): DDIM on "
                f"Stable Diffusion's schedule, {plan.steps} steps, {plan.samples:,} samples a case. Errors are shares "
                "of the exact reward shift, the exact expected reward at λ minus the reference's; ± is one standard "
                "error in tables and two in figures."
            ),
            figures=figures,
            bounds=bounds_sentence(plan),
            goals=goals(records),
            verdict=verdict_sentence(records),
            verdicts=_verdicts(records),
            evenness=evenness_sentence(records),
            evenness_table=_evenness(records),
            sections=[(name, title, sentence(some)) for name, title, sentence, some in sentences if name in figures],
            cases=[_cases(select(records, world=world)) for world in worlds],
        )
    )


# -- sentences --------------------------------------------------------------------------------------------------------


def bounds_sentence(plan: Plan) -> str:
    """What the bounds are about, and when they mean little."""
    words = (
        "The worst run of each kind, after two standard errors (mode weights: after what sampling error makes of them)."
    )
    if plan.samples < Plan().samples:
        words += f" They are meant for {Plan().samples:,} samples: with {plan.samples:,}, chance alone can break them."
    return words


def verdict_sentence(records: Sequence[Record]) -> str:
    """How often the verdict was right."""
    rows = verdict_rows(records)
    trusted = sum(row.runs for row in rows if row.kind in TRUSTING)
    alarms, misses = sum(row.false_alarms for row in rows), sum(row.misses for row in rows)
    others = sum(row.runs for row in rows) - trusted
    off = sum(row.runs for row in rows if row.kind == "off")
    needless = sum(row.false_alarms for row in rows if row.kind == "off")
    return (
        f"Of {counted(trusted, 'run')} called exact or trustworthy, {misses} truly miss by more than {TRUSTED:.0%} "
        f"beyond Monte Carlo error (misses). Of the {others} others, {alarms} are within {TRUSTED:.0%} (false alarms); "
        f"{needless} of these are among the {off} called off, the rest among those that cannot tell. Dots on the "
        f"diagonal are errors that the verdict estimated right, and the band is {TRUSTED:.0%} of the shift; runs of "
        "one model alone (exact) have no error and are not drawn."
    )


def evenness_sentence(records: Sequence[Record]) -> str:
    """What even weights are worth, and what uneven ones are not."""
    rows = evenness_rows(records)
    even = [row for row in rows if row.low >= EVEN]
    uneven = [row for row in rows if row.high <= EVEN]
    words = [
        f"{name} the weighted mean misses the exactly aligned model by "
        f"{max(row.worst for row in part):.1%} at worst beyond Monte Carlo error, with a median standard error of at "
        f"most {max(row.noise for row in part):.1%} in every bin"
        for name, part in ((f"From ESS/n = {EVEN:g} on", even), (f"Below ESS/n = {EVEN:g}", uneven))
        if part
    ]
    return ". ".join(words) + "."


def rewards_sentence(records: Sequence[Record]) -> str:
    """Where Algorithm 1 is farthest off, and what the same samples say when they are weighted."""
    worst = _worst(records, "plain")
    annealed = error(worst, "annealed")
    aside = "" if annealed is None else f" Annealed guidance, which has no such target, is off by {_signed(annealed)}."
    return f"Algorithm 1 is farthest from the exact curve at {_at(worst)}: {_off(worst)}.{aside}"


def errors_sentence(records: Sequence[Record]) -> str:
    """The worst error of every way of sampling."""
    arms = [arm for arm in ARMS if arm != "annealed" and any(arm in record["arms"] for record in records)]
    parts = []
    for arm in arms:
        worst = _worst(records, arm)
        estimate = error(worst, arm)
        assert estimate is not None
        parts.append(f"{ARMS[arm].label} {_signed(estimate)} ({_at(worst)})")
    return "The largest errors: " + "; ".join(parts) + "."


def modes_sentence(records: Sequence[Record]) -> str:
    """Where Algorithm 1 misplaces most probability between modes."""
    beta = min(record["case"]["beta"] for record in records)
    worst = max(select(records, beta=beta), key=lambda record: record["arms"]["plain"]["modes_off"])
    parts = [
        f"{ARMS[arm].label} {worst['arms'][arm]['modes_off']:.3f}"
        for arm in ("plain", "weighted", "particles")
        if arm in worst["arms"]
    ]
    return (
        f"Total variation from the exact mode weights at {_at(worst)}, where Algorithm 1 misplaces most at this β: "
        f"{', '.join(parts)}; sampling error alone makes {worst['arms']['plain']['modes_allowance']:.3f}."
    )


def particles_sentence(records: Sequence[Record]) -> str:
    """From how many particles on nothing is left of the error."""
    parts = []
    for beta, lam in dict.fromkeys((record["case"]["beta"], record["case"]["lam"]) for record in records):
        found = select(records, beta=beta, lam=lam)
        few, many = found[0], found[-1]
        least, most = error(few, "particles"), error(many, "particles")
        assert least is not None and most is not None
        parts.append(
            f"{_signed(least)} with K = {few['case']['count']} and {_signed(most)} with K = {many['case']['count']} "
            f"at β = {beta:g}, λ = {lam:g}"
        )
    return "The weighted mean, averaged over prompts of K particles each, is off by " + "; ".join(parts) + "."


def steps_sentence(records: Sequence[Record]) -> str:
    """What more steps do to Algorithm 1 and to its weighted mean."""
    beta, lam = records[0]["case"]["beta"], records[0]["case"]["lam"]
    parts = []
    for eta in sorted({record["case"]["eta"] for record in records}, reverse=True):
        found = select(records, beta=beta, lam=lam, eta=eta)
        for arm in ("plain", "weighted"):
            first, last = error(found[0], arm), error(found[-1], arm)
            assert first is not None and last is not None
            parts.append(f"{ARMS[arm].label} from {_signed(first)} to {_signed(last)} at η = {eta:g}")
    ends = f"{found[0]['case']['steps']} to {found[-1]['case']['steps']}"
    return f"From {ends} steps, at β = {beta:g}, λ = {lam:g}: " + "; ".join(parts) + "."


def _worst(records: Sequence[Record], arm: str) -> Record:
    found = [record for record in records if error(record, arm) is not None]
    return max(found, key=lambda record: abs((error(record, arm) or Estimate(0, 0)).value))


def _off(record: Record) -> str:
    parts = [
        f"{_signed(estimate)} of the shift by {'its plain mean' if arm == 'plain' else ARMS[arm].label}"
        for arm in ("plain", "weighted", "particles")
        if (estimate := error(record, arm)) is not None
    ]
    return ", ".join(parts)


def _at(record: Record) -> str:
    return place(record).partition(", ")[2]


def _signed(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} ± {100 * estimate.error:.1f}%"


# -- tables -----------------------------------------------------------------------------------------------------------


Table: TypeAlias = tuple[Sequence[str], list[tuple[str, ...]]]
"""Headings and rows."""


def _verdicts(records: Sequence[Record]) -> Table:
    rows = verdict_rows(records)
    cells = [
        (
            row.kind,
            f"{row.eta:g}",
            str(row.runs),
            str(row.within),
            str(row.runs - row.within),
            str(row.false_alarms),
            str(row.misses),
            f"{row.worst:.1%}",
        )
        for row in rows
    ]
    total = (
        "all",
        "",
        str(sum(row.runs for row in rows)),
        str(sum(row.within for row in rows)),
        str(sum(row.runs - row.within for row in rows)),
        str(sum(row.false_alarms for row in rows)),
        str(sum(row.misses for row in rows)),
        f"{max((row.worst for row in rows), default=0):.1%}",
    )
    limit = f"{TRUSTED:.0%}"
    return (
        ("verdict", "η", "runs", f"true error ≤ {limit}", f"> {limit}", "false alarms", "misses", "largest true error"),
        [*cells, total],
    )


def _evenness(records: Sequence[Record]) -> Table:
    return (
        (
            "ESS/n",
            "sampler",
            "runs",
            "Algorithm 1, median error",
            "weighted, median error",
            "its median standard error",
            "largest beyond Monte Carlo error",
        ),
        [
            (
                f"{row.low:g}–{row.high:g}",
                "η > 0" if row.stochastic else "η = 0",
                str(row.runs),
                f"{row.plain:.1%}",
                f"{row.weighted:.1%}",
                f"{row.noise:.1%}",
                f"{row.worst:.1%}",
            )
            for row in evenness_rows(records)
        ],
    )


def _cases(records: Sequence[Record]) -> tuple[str, Sequence[str], list[dict[str, Any]]]:
    """The world, and the headings and rows of its table."""
    arms = [arm for arm in ARMS if any(arm in record["arms"] for record in records)]
    judgement = ("ESS/n", "verdict", "estimated", "true", "path KL", "KL")
    headings = ("case", "exact", *(ARMS[arm].label for arm in arms), *judgement)
    rows = []
    for record in records:
        case, exact = record["case"], record["exact"]
        rows.append(
            {
                "name": f"η = {case['eta']:g}, β = {case['beta']:g}, λ = {case['lam']:g}",
                "details": f"{case['study']}, {case['steps']} steps, K = {case['count']}",
                "exact": f"{exact['reward']:.3f}",
                "shift": f"shift {exact['shift']:.3f}",
                "arms": [_arm(record, arm) for arm in arms],
                "verdict": _judgement(record) if record.get("verdict") else None,
                "divergence": f"{exact['divergence']:.3f}",
            }
        )
    return records[0]["case"]["world"], headings, rows


def _arm(record: Record, arm: str) -> dict[str, str] | None:
    estimate = error(record, arm)
    if estimate is None:
        return None
    measured = record["arms"][arm]
    value, deviation = measured["reward"]
    even = f", ESS/n {measured['evenness']:.2f}" if "evenness" in measured else ""
    return {
        "value": f"{value:.3f} ± {deviation:.3f}",
        "error": _signed(estimate),
        "modes": f"TV {measured['modes_off']:.3f} ({measured['modes_allowance']:.3f}){even}",
    }


def _judgement(record: Record) -> dict[str, str]:
    verdict = record["verdict"]
    return {
        "evenness": f"{verdict['evenness']:.2f}",
        "kind": verdict["kind"],
        "words": verdict["words"],
        "estimated": "" if verdict["error"] is None else _signed(Estimate(-verdict["error"][0], verdict["error"][1])),
        "true": _signed(true_error(record)),
        "path_kl": "" if verdict["path_kl"] is None else f"{verdict['path_kl'][0]:.3f}",
    }
