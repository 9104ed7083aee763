"""The report's page: exhibits by section, and where everything on it comes from."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from deradiff.experiments.plan import write_plan
from deradiff.experiments.reporting.exhibits import WrittenExhibit
from deradiff.experiments.results import Results
from deradiff.experiments.store import IMAGE, Store
from deradiff.files import pages
from deradiff.files.pages import counted
from deradiff.files.records import versions

STYLE = """
nav { border: 1px solid #e4e4e8; border-radius: 6px; padding: .4rem 1.2rem; margin: 1.5rem 0; font-size: 15px; }
nav ul { margin: .3rem 0; padding-left: 1.1rem; } nav li { margin: .1rem 0; } nav details { margin: 0; }
nav summary { font-weight: 400; } a { color: #0b5a8f; } h2 { border-top: 1px solid #ccc; padding-top: 1.2rem; }
.caption { color: #333; font-size: 15px; } .files { font-size: 14px; color: #666; }
.note { border-left: 4px solid #b03a00; background: #fdf4ef; padding: .5rem 1rem; max-width: 76ch; }
summary { font-size: 15px; } details .table { max-height: 32rem; overflow-y: auto; }
pre { background: #f6f6f8; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
"""

LONGEST = 300
"""Rows of numbers that the page repeats below a figure; more are in the CSV file alone."""

EXAMPLES = 3
"""Images that are named for every error of a scorer."""


def page(
    every: Sequence[Results], store: Store, drawn: Sequence[WrittenExhibit], failed: Sequence[tuple[str, str]]
) -> str:
    """The page of a plan, with its results by every way of sampling."""
    plan = every[0].plan
    sections: dict[str, list[WrittenExhibit]] = {}
    for one in drawn:
        sections.setdefault(one.exhibit.section, []).append(one)
    title = f"{plan.name}: report"
    parts = [f"<h1>{escape(title)}</h1>", _lead(every, store), *_problems(every, store, failed), _navigation(sections)]
    for number, (section, found) in enumerate(sections.items(), 1):
        parts.append(f'<h2 id="section-{number}">{escape(section)}</h2>')
        parts += [_exhibit(one) for one in found]
    parts += ['<h2 id="about">Where this comes from</h2>', *_prompts(every), *_cut(every[0]), *_images(every)]
    parts += [*_failures(every[0]), *_provenance(every[0], store)]
    return pages.page(title, parts, STYLE)


# -- the head ---------------------------------------------------------------------------------------------------------


def _lead(every: Sequence[Results], store: Store) -> str:
    plan, (there, planned) = every[0].plan, _count(every[0], store)
    models = counted(len(plan.models), "aligned model")
    ways = "" if len(every) == 1 else f", sampled in {counted(len(every), 'way')} ({', '.join(plan.sampling)})"
    return (
        f'<p class="lead">{escape(plan.reference)} and {models} on {counted(len(plan.prompts), "prompt set")}'
        f"{escape(ways)}: {there:,} of {counted(planned, 'planned image')} are there.</p>"
    )


def _problems(every: Sequence[Results], store: Store, failed: Sequence[tuple[str, str]]) -> Iterator[str]:
    """What a reader has to know before trusting the numbers."""
    there, planned = _count(every[0], store)
    if there < planned:
        yield _note(
            f"Missing: {planned - there:,} of {planned:,} images. Means are over those that are there, and change when "
            "the run goes on."
        )
    if undrawn := [failure for failure in _not_scored(every[0]) if failure[0] == IMAGE]:
        yield _note(f"{counted(len(undrawn), 'image')} could not be drawn: they are listed at the end of the page.")
    if hidden := every[0].blacked_out:
        yield _note(
            f"Blacked out by the pipeline's safety checker: {counted(len(hidden), 'image')}. What it blacks out is no "
            "picture, and has no scores."
        )
    if cut := every[0].cut:
        yield _note(f"Cut by tokenizers: {counted(len(cut), 'prompt')}, listed at the end of the page.")
    if broken := [failure for failure in _not_scored(every[0]) if failure[0] != IMAGE]:
        yield _note(f"{counted(len(broken), 'score')} could not be computed: they are listed at the end of the page.")
    for name, wanted in every[0].plan.prompts.items():
        if wanted.substitute_for:
            yield _note(f"The prompts {name} are a substitute for {wanted.substitute_for}.")
    if failed:
        listed = "".join(f"<li>{escape(key)}: {escape(words)}</li>" for key, words in failed)
        yield f'<div class="note"><p>Could not be drawn:</p><ul>{listed}</ul></div>'


def _note(words: str) -> str:
    return f'<p class="note">{escape(words)}</p>'


def _navigation(sections: Mapping[str, Sequence[WrittenExhibit]]) -> str:
    entries = []
    for number, (section, found) in enumerate(sections.items(), 1):
        listed = "".join(f'<li><a href="#{one.exhibit.key}">{escape(one.exhibit.title)}</a></li>' for one in found)
        entries.append(
            f'<li><details><summary><a href="#section-{number}">{escape(section)}</a> <small>{len(found)}</small>'
            f"</summary><ul>{listed}</ul></details></li>"
        )
    return f'<nav><ul>{"".join(entries)}<li><a href="#about">Where this comes from</a></li></ul></nav>'


# -- exhibits ---------------------------------------------------------------------------------------------------------


def _exhibit(one: WrittenExhibit) -> str:
    exhibit = one.exhibit
    parts = [f'<section id="{exhibit.key}"><h3>{escape(exhibit.title)}</h3>']
    numbers = _rows(exhibit.header, exhibit.rows)
    if one.picture is not None:
        parts.append(pages.figure(one.picture, one.kind, exhibit.title, width=one.width))
    else:
        parts.append(numbers)
    parts.append(f'<p class="caption">{escape(exhibit.caption)}</p>')
    parts += [_note(words) for words in one.warnings]
    if one.picture is not None and 0 < len(exhibit.rows) <= LONGEST:
        parts.append(f"<details><summary>Numbers</summary>{numbers}</details>")
    links = ", ".join(f'<a href="{escape(file.name)}">{escape(file.suffix[1:].upper())}</a>' for file in one.files)
    parts.append(f'<p class="files">Files: {links}</p></section>')
    return "\n".join(parts)


def _rows(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    words = {i for i in range(len(header)) if any(isinstance(row[i], str) for row in rows)}
    return pages.table([escape(name) for name in header], [[cell(x) for x in row] for row in rows], words)


def cell(value: Any) -> str:
    """A value in a table, as HTML: four figures of a number, a dash for what is not known."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
        return escape(text.replace("-", "−"))
    return escape(f"{value:,}" if isinstance(value, int) else str(value))


# -- where it comes from ----------------------------------------------------------------------------------------------


def _count(results: Results, store: Store) -> tuple[int, int]:
    """How many different images of the plan are there, and how many it has."""
    planned = results.contents.drawings.keys()
    return len(planned & store.drawn().keys()), len(planned)


def _prompts(every: Sequence[Results]) -> Iterator[str]:
    results = every[0]
    yield "<h3>Prompts</h3>"
    rows = []
    for name, wanted in results.plan.prompts.items():
        sources = [wanted.source] if isinstance(wanted.source, str) else list(wanted.source or ())
        drawn = "" if wanted.draw_seed is None else f", drawn with seed {wanted.draw_seed}"
        source = f"{' and '.join(sources)}{drawn}" if sources else "listed in the plan"
        count, seeds = len(results.contents.texts[name]), len(wanted.seeds)
        rows.append((name, count, seeds, source, wanted.substitute_for or None))
    yield _rows(("set", "prompts", "seeds of each", "from", "a substitute for"), rows)


def _cut(results: Results) -> Iterator[str]:
    if results.cut:
        yield "<h3>Prompts that were cut</h3>"
        rows = [(cut.prompt, " and ".join(cut.tokenizers), cut.limit, cut.lost) for cut in results.cut]
        yield _rows(("prompt", "cut by", "tokens it reads", "lost"), rows)


def _images(every: Sequence[Results]) -> Iterator[str]:
    plan = every[0].plan
    for results in every:
        yield f"<h3>Images{escape(f', {results.sampling}') if len(every) > 1 else ''}</h3>"
        rows = []
        for arm in results.arms:
            done, planned = results.done(arm)
            measured = results.measured(arm)
            scored = [measured[name] for name in (*plan.scores, *plan.features)]
            rows.append((arm.name, arm.method, done, planned, results.seconds(arm), *scored))
        heads = (*(f"scored by {name}" for name in plan.scores), *(f"{name} features" for name in plan.features))
        yield _rows(("arm", "method", "images", "planned", "seconds an image", *heads), rows)
    yield (
        '<p class="caption">Arms that ask for the same image share it. Seconds are the mean share of a batch, on '
        "whatever device drew it.</p>"
    )


def _not_scored(results: Results) -> list[tuple[str, str, str]]:
    """(score, image, error) of what failed among the plan's own images and scores."""
    names, planned = {IMAGE, *results.plan.scores, *results.plan.features}, results.contents.drawings.keys()
    return [failure for failure in results.failures if failure[0] in names and failure[1] in planned]


def _failures(results: Results) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, item, error in _not_scored(results):
        groups.setdefault((name, error), []).append(item)
    if groups:
        yield "<h3>What could not be drawn or scored</h3>"
        rows = [
            (name, len(items), error, ", ".join(items[:EXAMPLES]) + (", …" if len(items) > EXAMPLES else ""))
            for (name, error), items in list(groups.items())[:LONGEST]
        ]
        yield _rows(("score", "images", "error", "which"), rows)


def _provenance(results: Results, store: Store) -> Iterator[str]:
    planned = results.contents.drawings.keys()
    drawn = Counter(run for item, (_, _, run) in store.told().items() if item in planned)
    yield "<h3>Runs</h3>"
    rows = [
        (number, drawn.get(number, 0), "; ".join(f"{name}: {_plain(value)}" for name, value in record.items()))
        for number, record in results.runs.items()
    ]
    yield _rows(("run", "images", "made with"), rows)
    yield f'<p class="caption">This page was written with {escape(_plain(versions()))}.</p>'
    yield f"<details><summary>The plan</summary><pre>{escape(write_plan(results.plan))}</pre></details>"


def _plain(value: Any) -> str:
    """Plain data in one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(held)}" for name, held in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    return str(value)
