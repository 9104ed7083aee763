"""`python -m studies.closed_forms.guidance`: weights of guided runs, against retrained models so guided.

Worlds, samplers, β, λ and guidance scales are drawn at random, seeded by the case's number. Reference, anchor and
retrained model are exact with a prompt and without, so the target, the retrained model sampled with the same guidance,
is exact but for the sampler's own steps, which it shares. The verdict's thresholds were chosen on the first cases
(`CHOSEN_ON`) and are judged on the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from rich.table import Table

from deradiff.algorithm.comparisons import EVEN
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.verdict import GUIDED_TRUSTED, MOST_LEFT_OUT, Kind, guided_kind, margin
from deradiff.cli import terminal
from deradiff.files.folders import begin_or_resume
from deradiff.files.locks import taken
from deradiff.files.reading import read
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.sweep.workers import Processes, Todo, cores, work
from studies.closed_forms.guided_cases import ARMS, SAMPLERS, SCALES, Empty, GuidedCase, GuidedRecord, Measured, compute

LEAST_SHIFT = 0.2
"""Standard deviations of the reward that a shift has at least, for errors to be told as shares of it."""

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})

CHOSEN_ON = 80
"""How many cases, the first ones, the verdict's thresholds were chosen with."""

CLAIMS: tuple[Kind, ...] = ("trust", "off", "unclear")
"""The verdicts that say how far off a run is."""


# -- all cases --------------------------------------------------------------------------------------------------------


def run(count: int, steps: int, samples: int, out: Path, workers: int) -> list[GuidedRecord]:
    """The first `count` cases, of which those that `out` does not hold yet are computed.

    Raises what `begin_or_resume` raises.
    """
    begin_or_resume(out, {"steps": steps, "samples": samples}, "comparison under guidance")
    (out / "cases").mkdir(exist_ok=True)
    cases = [GuidedCase.drawn(number, steps, samples) for number in range(count)]
    missing = [case for case in cases if not _file(out, case).exists()]
    with taken(out, "a comparison under guidance"), terminal.progress("comparing") as on_step:
        for done, _ in enumerate(_computed(out, missing, workers), count - len(missing) + 1):
            on_step(done, count)
    return [read(GuidedRecord, _file(out, case), "case", "delete it, and it is computed again") for case in cases]


def _computed(out: Path, cases: Sequence[GuidedCase], workers: int) -> Iterator[Any]:
    with Processes(workers, partial(_store, out), torch.set_num_threads, 1) as processes:
        yield from work([Todo(None, partial(GuidedCase, **vars(case))) for case in cases], processes)


def _file(out: Path, case: GuidedCase) -> Path:
    return out / "cases" / f"{case.number}.json"


def _store(out: Path, case: GuidedCase) -> None:
    write_json(_file(out, case), compute(case))


# -- the report -------------------------------------------------------------------------------------------------------


def _judged(record: GuidedRecord) -> Kind:
    """What `verdict` says of the case, by the reference's mean under the same guidance."""
    if record.evenness["combined"] < EVEN:
        return "uneven"
    error, unknown = _told(record)
    return guided_kind(error, unknown)


def _told(record: GuidedRecord) -> tuple[Estimate, float]:
    """Algorithm 1's error and the bound on what weights leave out, as a run knows them: shares of its own shift."""
    shift = abs(record.mean["combined"][0] - record.baseline)
    bias, error = record.bias["combined"]
    return Estimate(bias / shift, error / shift), record.left_out * record.deviation / shift


def _typical(records: Sequence[GuidedRecord], arm: str) -> Measured | None:
    """The median of an arm's absolute error, its standard error as of a normal sample, and the greatest.

    None for fewer than two cases.
    """
    if len(records) < 2:
        return None
    off = torch.tensor([abs(record.error[arm][0]) for record in records], dtype=torch.float64)
    return [float(off.median()), 1.2533 * float(off.std()) / len(off) ** 0.5, float(off.max())]


def summary(records: Sequence[GuidedRecord]) -> dict[str, Any]:
    """The tables: errors by guidance scale, bound, sampler and kind of empty prompt; the verdict."""
    kept = [record for record in records if abs(record.shift) >= LEAST_SHIFT]

    def row(chosen: Sequence[GuidedRecord]) -> dict[str, Any]:
        claims = sum(_judged(record) in CLAIMS for record in chosen)
        return {"cases": len(chosen), "claims": claims} | {arm: _typical(chosen, arm) for arm in ARMS}

    def by(key: Callable[[GuidedRecord], Any], values: Sequence[Any]) -> dict[str, Any]:
        return {str(value): row([record for record in kept if key(record) == value]) for value in values}

    bounds = {f"up to {low:.0%}": [r for r in kept if _told(r)[1] <= low] for low in (0.05, 0.1, MOST_LEFT_OUT)}
    bounds[f"above {MOST_LEFT_OUT:.0%}"] = [r for r in kept if _told(r)[1] > MOST_LEFT_OUT]
    parts = {"chosen on": [r for r in kept if r.case["number"] < CHOSEN_ON]}
    parts["judged on"] = [r for r in kept if r.case["number"] >= CHOSEN_ON]
    return {
        "versions": versions(),
        "drawn": len(records),
        "steps": records[0].case["steps"],
        "samples": records[0].case["samples"],
        "guidance": by(lambda r: r.case["scale"], SCALES),
        "bound": {name: row(chosen) for name, chosen in bounds.items()},
        "sampler": by(lambda r: r.case["sampler"], list(SAMPLERS)),
        "empty": by(lambda r: r.case["empty"], get_args(Empty)),
        "verdict": {name: _verdicts(part) for name, part in parts.items()},
        "all": [
            {"case": record.case, "shift": record.shift, "bound": _told(record)[1], "kind": _judged(record)}
            | {"error": record.error}
            for record in kept
        ],
    }


def _verdicts(records: Sequence[GuidedRecord]) -> dict[str, Any]:
    """How often something is claimed, and how often it is not so, beyond two standard errors."""
    claims = [record for record in records if _judged(record) in CLAIMS]
    trusted = [record for record in claims if _judged(record) == "trust"]
    wrong = [r for r in claims if abs(r.error["combined"][0]) - 2 * r.error["combined"][1] > margin(_told(r)[1])]
    missed = [r for r in trusted if abs(r.error["plain"][0]) - 2 * r.error["plain"][1] > GUIDED_TRUSTED]
    large = [record for record in claims if abs(record.error["plain"][0]) > 0.05]
    return {
        "cases": len(records),
        "claims": len(claims),
        "beyond the margin": [r.case["number"] for r in wrong],
        "trusted": len(trusted),
        "trusted and off": [r.case["number"] for r in missed],
        "Algorithm 1 off by over 5%": {arm: _typical(large, arm) for arm in ARMS} | {"cases": len(large)},
    }


def _print(told: dict[str, Any]) -> None:
    console = terminal.LiteralConsole()
    for name in ("guidance", "bound", "sampler", "empty"):
        table = Table(caption="median error ± standard error (greatest), as shares of the target's shift")
        for heading in (name, "cases", "claims", *ARMS):
            table.add_column(heading, justify="left" if heading == name else "right")
        for value, row in told[name].items():
            errors = ["-" if (found := row[arm]) is None else _words(found) for arm in ARMS]
            table.add_row(value, str(row["cases"]), str(row["claims"]), *errors)
        console.print(table)
    for part, counts in told["verdict"].items():
        large = counts["Algorithm 1 off by over 5%"]
        console.print(
            f"{part} {counts['cases']} cases: {counts['claims']} claims, of which beyond the margin: cases "
            f"{counts['beyond the margin']}; {counts['trusted']} trusted, of which off by more than "
            f"{GUIDED_TRUSTED:.0%}: {counts['trusted and off']}"
        )
        if large["plain"] is not None:
            console.print(
                f"  where Algorithm 1 is off by over 5% ({large['cases']} of the claims): {_words(large['plain'])}, "
                f"weighted {_words(large['combined'])}"
            )


def _words(typical: Measured) -> str:
    middle, error, most = typical
    return f"{middle:.1%} ± {error:.1%} ({most:.1%})"


@app.command()
def guidance(
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder for the cases; an interrupted run continues.")],
    cases: Annotated[int, typer.Option(min=2, help="How many cases; more of them continue a finished run.")] = 240,
    steps: Annotated[int, typer.Option(min=2, help="Sampling steps.")] = 60,
    samples: Annotated[int, typer.Option(min=100, help="Samples of every run.")] = 4000,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; one per processor by default.")] = None,
) -> None:
    """Weigh guided runs in every way and compare with the retrained model under the same guidance."""
    with terminal.refusing_wrong_input():
        told = summary(run(cases, steps, samples, out, workers or cores()))
        write_json(out / "guidance-truth.json", told)
    _print(told)
    terminal.files([out / "guidance-truth.json", out / "cases"])


if __name__ == "__main__":
    app(prog_name="python -m studies.closed_forms.guidance")
