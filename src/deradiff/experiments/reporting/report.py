"""The report of an experiment: every exhibit as PNG, SVG and CSV, and one page that holds them all."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from matplotlib import rc_context

from deradiff.experiments.plan import Plan
from deradiff.experiments.reporting import agreement_exhibits, front_exhibits, picture_exhibits, report_page
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.files.outputs import replaced
from deradiff.files.records import slug

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Gather: TypeAlias = Callable[[Results], Iterator[Exhibit]]

GATHERED: dict[str, Gather] = {
    "agreement": agreement_exhibits.exhibits,
    "fronts": front_exhibits.exhibits,
    "pictures": picture_exhibits.exhibits,
}
"""What a report consists of, in its order."""

DPI = 200
"""Of PNG files."""


class Written(NamedTuple):
    """What a report consists of, and what it lacks."""

    files: list[Path]
    """The page first, then the exhibits' files."""
    failed: list[tuple[str, str]]
    """Exhibits that could not be made, and why; the page names them too."""


@dataclass(frozen=True)
class Drawn:
    """An exhibit whose files are written."""

    exhibit: Exhibit
    files: tuple[Path, ...]
    picture: bytes | None
    """What the page embeds: the smaller of PNG and SVG."""
    kind: Literal["png", "svg+xml"]
    width: int | None
    """How many pixels wide it is meant to be seen."""
    warned: tuple[str, ...]
    """What was warned of while it was made."""


def write(plan: Plan, store: Store, out: Path) -> Written:
    """Draw everything that the store has data for into `out`, made where there is none, and write `report.html`.

    It takes the place of the report that `out` holds, once it is whole. An exhibit that raises is left out and named,
    and the others go on. Raises `OSError` where nothing can be written, and as `replaced` does.
    """
    with replaced(out, "report", ["report.html"]) as folder:
        files, failed = _written(plan, store, folder)
    return Written([out / file.name for file in files], failed)


def _written(plan: Plan, store: Store, out: Path) -> Written:
    every = [Results(plan, store, sampling) for sampling in plan.sampling]
    drawn: list[Drawn] = []
    failed: list[tuple[str, str]] = []
    for results in every:
        sampling = results.sampling if len(every) > 1 else ""
        for sort, found in gathered(results):
            if isinstance(found, Exception):
                failed.append((f"{sort} by {sampling}" if sampling else sort, told(found)))
                continue
            exhibit = placed(found.exhibit, sampling, {one.exhibit.key for one in drawn})
            try:
                drawn.append(draw(exhibit, found.warned, out))
            except OSError:
                raise
            except Exception as error:
                failed.append((exhibit.key, told(error)))
    page = out / "report.html"
    page.write_bytes(report_page.page(every, store, drawn, failed).encode())
    return Written([page, *(file for one in drawn for file in one.files)], failed)


# -- gathering --------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """An exhibit, and what was warned of while it was made."""

    exhibit: Exhibit
    warned: tuple[str, ...]


def gathered(results: Results) -> Iterator[tuple[str, Found | Exception]]:
    """Every exhibit, with the sort it belongs to, or the error for which it could not be made."""
    for sort, gather in GATHERED.items():
        for found in _each(partial(gather, results)):
            yield sort, found


def _each(gather: Callable[[], Iterator[Exhibit]]) -> Iterator[Found | Exception]:
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
            yield Found(exhibit, tuple(dict.fromkeys(str(one.message) for one in caught)))


def told(error: Exception) -> str:
    """An error in words, with the notes that say where it happened."""
    words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    notes = "; ".join(getattr(error, "__notes__", ()))
    return f"{words} ({notes})" if notes else words


def placed(exhibit: Exhibit, sampling: str, taken: set[str]) -> Exhibit:
    """The exhibit under a file name that is not taken yet and a section that name its `sampling`, if that is given."""
    key = first = slug(f"{sampling}-{exhibit.key}" if sampling else exhibit.key, 150)
    number = 1
    while key in taken:
        number += 1
        key = f"{first}-{number}"
    return replace(exhibit, key=key, section=f"{exhibit.section}, {sampling}" if sampling else exhibit.section)


# -- files ------------------------------------------------------------------------------------------------------------


def draw(exhibit: Exhibit, warned: tuple[str, ...], out: Path) -> Drawn:
    """Write an exhibit's files into `out`."""
    shown: dict[str, bytes] = {}
    width = None
    if exhibit.figure is not None:
        shown = {"png": rendered(exhibit.figure, "png"), "svg": rendered(exhibit.figure, "svg")}
        width = round(100 * exhibit.figure.get_figwidth())
    elif exhibit.picture is not None:
        held = io.BytesIO()
        exhibit.picture.save(held, format="PNG")
        shown, width = {"png": held.getvalue()}, exhibit.picture.width
    content = shown | {"csv": as_csv(exhibit.header, exhibit.rows)}
    files = [out / f"{exhibit.key}.{suffix}" for suffix in content]
    for file, data in zip(files, content.values(), strict=True):
        file.write_bytes(data)
    smallest = min(shown, key=lambda suffix: len(shown[suffix]), default=None)
    return Drawn(
        exhibit=replace(exhibit, figure=None, picture=None),
        files=tuple(files),
        picture=None if smallest is None else shown[smallest],
        kind="svg+xml" if smallest == "svg" else "png",
        width=width,
        warned=warned,
    )


def rendered(figure: Figure, form: Literal["png", "svg"]) -> bytes:
    """A figure as a file: the same figure gives the same bytes."""
    held = io.BytesIO()
    with rc_context({"svg.hashsalt": "deradiff"}):
        figure.savefig(held, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return held.getvalue()


def as_csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    """Rows as CSV in UTF-8; what is not known is empty."""
    held = io.StringIO(newline="")
    lines = csv.writer(held, lineterminator="\n")
    lines.writerow(header)
    lines.writerows([None if isinstance(x, float) and math.isnan(x) else x for x in row] for row in rows)
    return held.getvalue().encode()
