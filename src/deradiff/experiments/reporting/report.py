"""The report of an experiment: every exhibit as PNG, SVG and CSV, and one page that holds them all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeAlias

from deradiff.experiments.plan import Plan
from deradiff.experiments.reporting import (
    agreement_exhibits,
    front_exhibits,
    picture_exhibits,
    report_page,
    trust_exhibits,
)
from deradiff.experiments.reporting.exhibits import Exhibit, WrittenExhibit, write_exhibit
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.files.outputs import replaced
from deradiff.files.records import slug

Gather: TypeAlias = Callable[[Results], Iterator[Exhibit]]

GATHERED: dict[str, Gather] = {
    "trust": trust_exhibits.exhibits,
    "agreement": agreement_exhibits.exhibits,
    "fronts": front_exhibits.exhibits,
    "pictures": picture_exhibits.exhibits,
}
"""What a report consists of, in its order."""


class WrittenReport(NamedTuple):
    """What a report consists of, and what it lacks."""

    files: list[Path]
    """The page first, then the exhibits' files."""
    failed: list[tuple[str, str]]
    """Exhibits that could not be made, and why; the page names them too."""


def write(plan: Plan, store: Store, out: Path) -> WrittenReport:
    """Draw everything that the store has data for into `out`, made where there is none, and write `report.html`.

    It takes the place of the report that `out` holds, once it is whole. An exhibit that raises is left out and named,
    and the others go on. Raises `OSError` where nothing can be written, and as `replaced` does.
    """
    with replaced(out, "report", ["report.html"]) as folder:
        files, failed = _written(plan, store, folder)
    return WrittenReport([out / file.name for file in files], failed)


def _written(plan: Plan, store: Store, out: Path) -> WrittenReport:
    every = [Results(plan, store, sampling) for sampling in plan.sampling]
    written: list[WrittenExhibit] = []
    failed: list[tuple[str, str]] = []
    for results in every:
        sampling = results.sampling if len(every) > 1 else ""
        for sort, outcome in gathered(results):
            if isinstance(outcome, Exception):
                failed.append((f"{sort} by {sampling}" if sampling else sort, message_of(outcome)))
                continue
            exhibit = placed(outcome.exhibit, sampling, {other.exhibit.key for other in written})
            try:
                written.append(write_exhibit(exhibit, outcome.warnings, out))
            except OSError:
                raise
            except Exception as error:
                failed.append((exhibit.key, message_of(error)))
    page = out / "report.html"
    page.write_bytes(report_page.page(every, store, written, failed).encode())
    return WrittenReport([page, *(file for exhibit in written for file in exhibit.files)], failed)


# -- gathering --------------------------------------------------------------------------------------------------------


class GatheredExhibit(NamedTuple):
    """An exhibit, and what was warned of while it was made."""

    exhibit: Exhibit
    warnings: tuple[str, ...]


def gathered(results: Results) -> Iterator[tuple[str, GatheredExhibit | Exception]]:
    """Every exhibit, with the sort it belongs to, or the error for which it could not be made."""
    for sort, gather in GATHERED.items():
        for outcome in _each(partial(gather, results)):
            yield sort, outcome


def _each(gather: Callable[[], Iterator[Exhibit]]) -> Iterator[GatheredExhibit | Exception]:
    """What `gather` iterates over. After an error it is asked on: a generator then ends, others may have more."""
    iterator: Iterator[Exhibit] | None = None
    while True:
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                if iterator is None:
                    iterator = iter(gather())
                exhibit = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            yield error
            if iterator is None:
                return
        else:
            yield GatheredExhibit(exhibit, tuple(dict.fromkeys(str(warning.message) for warning in caught)))


def message_of(error: Exception) -> str:
    """An error in words, with the notes that say where it happened."""
    message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{message} ({notes})" if notes else message


def placed(exhibit: Exhibit, sampling: str, taken: set[str]) -> Exhibit:
    """The exhibit under a file name that is not taken yet and a section that name its `sampling`, if that is given."""
    key = first = slug(f"{sampling}-{exhibit.key}" if sampling else exhibit.key, 150)
    number = 1
    while key in taken:
        number += 1
        key = f"{first}-{number}"
    return replace(exhibit, key=key, section=f"{exhibit.section}, {sampling}" if sampling else exhibit.section)
