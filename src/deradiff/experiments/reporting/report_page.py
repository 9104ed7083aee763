"""The report's page: exhibits by section, and where everything on it comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deradiff.experiments.plan import write_plan
from deradiff.experiments.reporting.exhibits import WrittenExhibit
from deradiff.experiments.results import Results
from deradiff.experiments.store import IMAGE, Store
from deradiff.files.pages import counted, templates
from deradiff.files.records import versions

LONGEST = 300
"""Rows of numbers that the page repeats below a figure; more are in the CSV file alone."""

EXAMPLES = 3
"""Images that are named for every error of a scorer."""


def page(
    every: Sequence[Results], store: Store, written: Sequence[WrittenExhibit], failed: Sequence[tuple[str, str]]
) -> str:
    """The page of a plan, with its results by every way of sampling."""
    first, plan = every[0], every[0].plan
    sections: dict[str, list[WrittenExhibit]] = {}
    for exhibit in written:
        sections.setdefault(exhibit.exhibit.section, []).append(exhibit)
    return (
        templates(Path(__file__).parent)
        .get_template("report_page.html")
        .render(
            title=f"{plan.name}: report",
            lead=_lead(every, store),
            problems=list(_problems(first, store)),
            failed=failed,
            sections=sections,
            longest=LONGEST,
            origins=[
                *_prompts(every[0]),
                *_cut(every[0]),
                *_images(every),
                *_failures(every[0]),
                _runs(every[0], store),
            ],
            plan=write_plan(plan),
            cells=cells,
        )
    )


# -- the head ---------------------------------------------------------------------------------------------------------


def _lead(every: Sequence[Results], store: Store) -> str:
    plan, (there, planned) = every[0].plan, _count(every[0], store)
    models = counted(len(plan.models), "aligned model")
    ways = "" if len(every) == 1 else f", sampled in {counted(len(every), 'way')} ({', '.join(plan.sampling)})"
    return (
        f"{plan.reference} and {models} on {counted(len(plan.prompts), 'prompt set')}{ways}: {there:,} of "
        f"{counted(planned, 'planned image')} are there."
    )


def _problems(results: Results, store: Store) -> Iterator[str]:
    """What a reader has to know before trusting the numbers."""
    there, planned = _count(results, store)
    if there < planned:
        yield (
            f"Missing: {planned - there:,} of {planned:,} images. Means are over those that are there, and change when "
            "the run goes on."
        )
    if undrawn := [failure for failure in _not_scored(results) if failure[0] == IMAGE]:
        yield f"{counted(len(undrawn), 'image')} could not be drawn: they are listed at the end of the page."
    if hidden := results.blacked_out:
        yield (
            f"Blacked out by the pipeline's safety checker: {counted(len(hidden), 'image')}. What it blacks out is no "
            "picture, and has no scores."
        )
    if cut := results.cut:
        yield f"Cut by tokenizers: {counted(len(cut), 'prompt')}, listed at the end of the page."
    if broken := [failure for failure in _not_scored(results) if failure[0] != IMAGE]:
        yield f"{counted(len(broken), 'score')} could not be computed: they are listed at the end of the page."
    for name, wanted in results.plan.prompts.items():
        if wanted.substitute_for:
            yield f"The prompts {name} are a substitute for {wanted.substitute_for}."


# -- tables -----------------------------------------------------------------------------------------------------------


def cells(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[Sequence[str], list[list[str]], set[int]]:
    """A table's headings, its cells as text, and which of its columns hold text."""
    text_columns = {i for i in range(len(header)) if any(isinstance(row[i], str) for row in rows)}
    return header, [[cell(value) for value in row] for row in rows], text_columns


def cell(value: Any) -> str:
    """A value in a table: four figures of a number, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return (f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}").replace("-", "−")
    return f"{value:,}" if isinstance(value, int) else str(value)


# -- where it comes from ----------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """A table at the page's end."""

    heading: str
    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


def _count(results: Results, store: Store) -> tuple[int, int]:
    """How many different images of the plan are there, and how many it has."""
    planned = results.contents.drawings.keys()
    return len(planned & store.drawn().keys()), len(planned)


def _prompts(results: Results) -> Iterator[Origin]:
    rows = []
    for name, wanted in results.plan.prompts.items():
        sources = [wanted.source] if isinstance(wanted.source, str) else list(wanted.source or ())
        drawn = "" if wanted.draw_seed is None else f", drawn with seed {wanted.draw_seed}"
        source = f"{' and '.join(sources)}{drawn}" if sources else "listed in the plan"
        count, seeds = len(results.contents.texts[name]), len(wanted.seeds)
        rows.append((name, count, seeds, source, wanted.substitute_for or None))
    yield Origin("Prompts", ("set", "prompts", "seeds of each", "from", "a substitute for"), rows)


def _cut(results: Results) -> Iterator[Origin]:
    if results.cut:
        rows = [(cut.prompt, " and ".join(cut.tokenizers), cut.limit, cut.lost) for cut in results.cut]
        yield Origin("Prompts that were cut", ("prompt", "cut by", "tokens it reads", "lost"), rows)


def _images(every: Sequence[Results]) -> Iterator[Origin]:
    plan = every[0].plan
    for results in every:
        rows = []
        for arm in results.arms:
            done, planned = results.done(arm)
            measured = results.measured(arm)
            scored = [measured[name] for name in (*plan.scores, *plan.features)]
            rows.append((arm.name, arm.method, done, planned, results.seconds(arm), *scored))
        heads = (*(f"scored by {name}" for name in plan.scores), *(f"{name} features" for name in plan.features))
        yield Origin(
            f"Images, {results.sampling}" if len(every) > 1 else "Images",
            ("arm", "method", "images", "planned", "seconds an image", *heads),
            rows,
            "Arms that ask for the same image share it. Seconds are the mean share of a batch, on whatever device drew "
            "it."
            if results is every[-1]
            else "",
        )


def _not_scored(results: Results) -> list[tuple[str, str, str]]:
    """(score, image, error) of what failed among the plan's own images and scores."""
    names, planned = {IMAGE, *results.plan.scores, *results.plan.features}, results.contents.drawings.keys()
    return [failure for failure in results.failures if failure[0] in names and failure[1] in planned]


def _failures(results: Results) -> Iterator[Origin]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, item, error in _not_scored(results):
        groups.setdefault((name, error), []).append(item)
    if groups:
        rows = [
            (name, len(items), error, ", ".join(items[:EXAMPLES]) + (", …" if len(items) > EXAMPLES else ""))
            for (name, error), items in list(groups.items())[:LONGEST]
        ]
        yield Origin("What could not be drawn or scored", ("score", "images", "error", "which"), rows)


def _runs(results: Results, store: Store) -> Origin:
    planned = results.contents.drawings.keys()
    drawn = Counter(run for item, (_, _, run) in store.diagnostics().items() if item in planned)
    rows = [
        (number, drawn.get(number, 0), "; ".join(f"{name}: {_plain(value)}" for name, value in record.items()))
        for number, record in results.runs.items()
    ]
    caption = f"This page was written with {_plain(versions())}."
    return Origin("Runs", ("run", "images", "made with"), rows, caption)


def _plain(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(held)}" for name, held in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
