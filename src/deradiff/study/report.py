"""What an analysis is written as: figures with their numbers (AIG, figures 6 to 8), and a summary in words."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deradiff.experiments.reporting.exhibits import Exhibit, table, write_exhibit
from deradiff.files.outputs import replaced
from deradiff.files.pages import counted
from deradiff.study import figures
from deradiff.study.analysis import ALL, Analysis, Line
from deradiff.study.preferences import Rate

NOTES = """\
In brackets stand 95% intervals, by bootstrap over participants. "by person" gives each participant the same weight.
Sign tests leave Equal out, and people who preferred neither. Over votes, p takes every vote for independent, which
votes of one person are not; by person, everybody counts once, by what they preferred more often. No p is corrected for
the number of tests."""


def write(analysis: Analysis, out: Path) -> list[Path]:
    """Write summary, tables and figures into `out`, made where there is none; returns the summary first.

    They take the places of an earlier analysis. Raises as `replaced` does.
    """
    with replaced(out, "analysis", ["summary.txt"]) as folder:
        summary = folder / "summary.txt"
        summary.write_text(summary_of(analysis), encoding="utf-8")
        files = [
            summary,
            *(file for exhibit in exhibits(analysis) for file in write_exhibit(exhibit, (), folder).files),
        ]
    return [out / file.name for file in files]


def exhibits(analysis: Analysis) -> Iterator[Exhibit]:
    """Figures and their numbers: configurations together and one by one, also with participants weighing the same."""
    for key, number, lines in (("overall", "6", analysis.overall), ("configurations", "7", analysis.by_configuration)):
        for normalised in (False, True):
            of = "mean of participants' shares" if normalised else "share of votes"
            yield Exhibit(
                f"{key}-normalised" if normalised else key,
                "Preferences",
                f"{key}, {of}",
                f"After AIG's figure {8 if normalised else number}; lines are 95% intervals over participants.",
                *table(list(map(row, lines))),
                figures.shares(panels(lines, normalised), f"{of}, with 95% intervals"),
            )
    yield Exhibit(
        "participants",
        "Preferences",
        "pairs that participants answered",
        "After AIG's figure 8b.",
        ("pairs_answered",),
        tuple((count,) for count in sorted(analysis.pairs)),
        figures.histogram(analysis.pairs),
    )


def row(line: Line) -> dict[str, Any]:
    """A line of a table: shares lie between 0 and 1, with the ends of their 95% intervals; `wins` leave Equal out."""
    preference, sides = line.preference, ("first", "equal", "second")
    cells: dict[str, Any] = {
        **{name: value for name, value in vars(line).items() if name != "preference"},
        "participants": preference.participants,
        "votes": sum(preference.votes),
        **{f"votes_{side}": count for side, count in zip(sides, preference.votes, strict=True)},
    }
    rates = [*preference.shares, *preference.normalised, preference.wins]
    names = [f"{kind}_{side}" for kind in ("share", "normalised") for side in sides] + ["wins_first"]
    for name, rate in zip(names, rates, strict=True):
        cells |= {name: rate.value, f"{name}_low": rate.low, f"{name}_high": rate.high}
    return cells | {"p_votes": preference.p_votes, "p_participants": preference.p_participants}


def panels(lines: Sequence[Line], normalised: bool) -> list[figures.SharesPanel]:
    """A panel for every two methods, with a group of bars for each configuration."""
    groups_of: dict[tuple[str, str], dict[str, list[figures.Bar]]] = {}
    for line in lines:
        group = "" if line.configuration == ALL else line.configuration
        preference = line.preference
        bar = figures.Bar(
            line.question, sum(preference.votes), preference.normalised if normalised else preference.shares
        )
        groups_of.setdefault((line.first, line.second), {}).setdefault(group, []).append(bar)
    return [figures.SharesPanel(first, second, groups) for (first, second), groups in groups_of.items()]


# -- the summary ------------------------------------------------------------------------------------------------------


def summary_of(analysis: Analysis) -> str:
    """The analysis in words and tables of plain text."""
    parts = [*_who(analysis), "", NOTES]
    for heading, lines in (("All configurations", analysis.overall), ("By configuration", analysis.by_configuration)):
        parts += ["", heading, "-" * len(heading)]
        for title in dict.fromkeys(map(_title, lines)):
            parts += ["", title, _columns("", "", "n", "first", "equal", "second", "sign test")]
            parts += [text for line in lines if _title(line) == title for text in _rows(line)]
    return "\n".join(part.rstrip() for part in parts) + "\n"


def _who(analysis: Analysis) -> Iterator[str]:
    plan, (left, right) = analysis.plan, analysis.left_side
    people, pairs = counted(analysis.participants, "participant"), counted(sum(analysis.pairs), "pair")
    yield f"{plan.name}: {people}, {pairs}, {counted(len(plan.questions), 'question')} about each."
    if plan.attention_checks:
        allowed = f"more than {plan.mistakes_allowed}" if plan.mistakes_allowed else "any"
        yield f"Left out: {counted(analysis.failed, 'participant')} who got {allowed} of the attention checks wrong."
    if analysis.unchecked and plan.attention_checks:
        yield f"Counted unchecked: {counted(analysis.unchecked, 'participant')} who stopped before an attention check."
    if left + right:
        yield f"Of the answers that are not Equal, {left / (left + right):.1%} are for the set on the left."


def _title(line: Line) -> str:
    where = "" if line.configuration == ALL else f"{line.configuration} (prompts: {line.prompt_set}): "
    return f"{where}{line.first} (first) against {line.second} (second)"


def _rows(line: Line) -> Iterator[str]:
    preference = line.preference
    votes = sum(preference.votes)
    first, equal, second = map(_rate, preference.shares)
    yield _columns(line.question, "votes", f"{votes:,}", first, equal, second, f"p = {preference.p_votes:.2g}")
    first, equal, second = map(_rate, preference.normalised)
    yield _columns(
        "", "by person", f"{preference.participants:,}", first, equal, second, f"p = {preference.p_participants:.2g}"
    )
    if votes > preference.votes[1]:
        lost = Rate(1 - preference.wins.value, 1 - preference.wins.high, 1 - preference.wins.low)
        yield _columns(
            "", "without Equal", f"{votes - preference.votes[1]:,}", _rate(preference.wins), "", _rate(lost), ""
        )


def _columns(question: str, kind: str, number: str, first: str, equal: str, second: str, test: str) -> str:
    return f"  {question:<16} {kind:<14} {number:>6}  {first:<21}  {equal:<21}  {second:<21}  {test}"


def _rate(rate: Rate) -> str:
    interval = "" if math.isnan(rate.low) else f" [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"
    return f"{rate.value:.1%}{interval}"
