"""Which pictures a sheet of the report shows, and how they become an exhibit.

Nothing is picked by hand: prompts are the first of their set and seeds the first of their list, for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image, ImageDraw

from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results
from deradiff.files.images import read_rgb
from deradiff.files.records import slug
from deradiff.sweep import notation
from deradiff.sweep.description import NoiseOptimization
from deradiff.sweep.sheets import GAP, LARGEST_CELL, MARGIN, ROW_LABEL_WIDTH, SMALLEST_CELL, contact_sheet, panel_sheet

SHEET_WIDTH = 2200
"""What a sheet may be wide in pixels before its images are reduced; they are never smaller than `SMALLEST_CELL`."""

SAME_NOISE = "All images of a seed start from the same noise"

ABSENT = (225, 225, 228)


class SheetImage(NamedTuple):
    """What a picture is of, whoever drew it."""

    prompt: str
    seed: int


class SheetColumn(NamedTuple):
    """The pictures of one arm, and what a sheet calls them."""

    label: str
    arm: Arm


@dataclass(frozen=True)
class StoredPicture:
    """A picture that is there: its prompt set and its place in it."""

    prompts: str
    row: int
    column: int
    path: Path

    @property
    def file(self) -> str:
        """The file's name relative to the experiment's folder."""
        return "/".join(self.path.parts[-3:])


# -- which pictures ---------------------------------------------------------------------------------------------------


def shots(results: Results, prompts: str, seeds: int = 1) -> list[SheetImage]:
    """The first prompts of a set, as many as the plan wants pictured, each with the first seeds."""
    texts = results.contents.texts[prompts][: results.plan.report.pictures]
    return [SheetImage(text, seed) for text in texts for seed in results.plan.prompts[prompts].seeds[:seeds]]


def stored_picture(results: Results, arm: Arm, shot: SheetImage) -> StoredPicture | None:
    """Where an arm's picture of a prompt and a seed is, in whichever set; None where it is not there."""
    for name in results.plan.sets(arm.prompts):
        texts, seeds = results.contents.texts[name], results.plan.prompts[name].seeds
        if shot.prompt in texts and shot.seed in seeds:
            row, column = texts.index(shot.prompt), seeds.index(shot.seed)
            path = results.image(arm, name, row, column)
            if path is not None and path.is_file():
                return StoredPicture(name, row, column, path)
    return None


def drawn(results: Results, arms: Iterable[Arm], of: Sequence[SheetImage]) -> list[Arm]:
    """Those of `arms` that have any of the pictures."""
    return [arm for arm in arms if any(stored_picture(results, arm, shot) for shot in of)]


def best_set(results: Results, arms: Sequence[Arm]) -> str:
    """The prompt set of whose first prompts most of `arms` have any picture; of several, the plan's first."""
    return max(results.plan.prompts, key=lambda name: len(drawn(results, arms, shots(results, name))))


def pictured(results: Results, arms: Sequence[Arm], prompts: str) -> int:
    """How many pictures of a set's first prompts `arms` have."""
    return sum(stored_picture(results, arm, shot) is not None for arm in arms for shot in shots(results, prompts))


# -- what they are called ---------------------------------------------------------------------------------------------


def label(plan: Plan, arm: Arm) -> str:
    """What was done, and below it with what."""
    of, swarm = " + ".join(name for name, _ in arm.anchors), f"{arm.particles} particles" if arm.particles else ""
    lines: tuple[str | None, ...]
    match arm.method:
        case "model":
            lines = of, strength(plan, of, 1.0)
        case "realign":
            lines = "DeRaDiff", of, f"λ = {arm.lam:.3g}", swarm or strength(plan, of, arm.lam or 0.0)
        case "combine":
            lines = "combined", *(f"{lam:g} {name}" for name, lam in arm.anchors), swarm
        case "anneal":
            lines = "annealed guidance", of, shape_of(arm)
        case "interpolate":
            lines = "interpolated weights", of, f"λ = {arm.lam:.3g}"
        case "optimize-noise":
            noise = arm.reward_guidance
            assert isinstance(noise, NoiseOptimization)
            lines = "optimised noise", noise.pipeline, f"{noise.reward}, {noise.iterations} iterations"
        case _:
            lines = (arm.name,)
    return "\n".join(filter(None, lines))


def shape_of(arm: Arm) -> str:
    """The schedule of an annealed arm in words."""
    reach = "" if arm.lam == 1 else f" up to {arm.lam:g}"
    return f"{notation.schedule(arm.schedule, 'steps')}{reach}"


def strength(plan: Plan, model: str, lam: float) -> str:
    """The KL strength that a model has at λ, in words; nothing where its own is not known."""
    beta = plan.models[model].beta
    if beta is None or lam <= 0:
        return ""
    reached = beta / lam
    return f"{'β' if lam == 1 else 'β/λ'} = {f'{reached:.0f}' if reached >= 1000 else f'{reached:.4g}'}"


def uncurated(results: Results, prompts: str, of: Sequence[SheetImage]) -> str:
    """The sentence by which a caption says which pictures these are, and what their prompts stand for."""
    texts, seeds = list(dict.fromkeys(shot.prompt for shot in of)), list(dict.fromkeys(shot.seed for shot in of))
    first = results.contents.texts[prompts].index(texts[0])
    which = f"prompt {first + 1}" if len(texts) == 1 else f"the first {len(texts)} prompts"
    seed = f"seed {seeds[0]}" if len(seeds) == 1 else f"the first {len(seeds)} seeds"
    return f"Uncurated: {which} of “{prompts}”, {seed}.{substitute(results.plan, prompts)}"


def substitute(plan: Plan, prompts: str) -> str:
    """What a caption adds where the prompts are not the paper's own."""
    meant = plan.prompts[prompts].substitute_for
    return f" “{prompts}” is a substitute for {meant}, which were not published." if meant else ""


# -- exhibits ---------------------------------------------------------------------------------------------------------


def listed(results: Results, columns: Sequence[SheetColumn], of: Sequence[SheetImage]) -> tuple[tuple[Any, ...], ...]:
    """A row for every picture that is there: whose it is, its file and its scores, NaN for one that it has not."""
    rows = []
    for shot in of:
        for _, arm in columns:
            place = stored_picture(results, arm, shot)
            if place is not None:
                tables = (results.scores(arm, place.prompts, name) for name in results.plan.scores)
                scores = (float(table[place.row, place.column]) for table in tables)
                rows.append((shot.prompt, shot.seed, arm.name, place.file, *scores))
    return tuple(rows)


def sheet(
    results: Results,
    key: str,
    title: str,
    caption: str,
    columns: Sequence[SheetColumn],
    of: Sequence[SheetImage],
    *,
    section: str = "Pictures",
    upright: bool = False,
) -> Exhibit:
    """A sheet with a row for every shot and a column for every arm, or, `upright`, the other way round.

    A shot that nobody has is left out; the caption counts it among what is not there.
    """
    planned = len(columns) * len(of)
    of = [shot for shot in of if any(stored_picture(results, column.arm, shot) for column in columns)]
    across = len(of) if upright else len(columns)
    side = max(SMALLEST_CELL, min(LARGEST_CELL, (SHEET_WIDTH - 2 * MARGIN - ROW_LABEL_WIDTH) // across - GAP))
    grid = filled([[_picture(results, column.arm, shot, side) for column in columns] for shot in of])
    labels = [column.label for column in columns]
    names = [shot.prompt if upright else f"{shot.prompt}\nseed {shot.seed}" for shot in of]
    if upright:
        grid, labels, names = [list(row) for row in zip(*grid, strict=True)], names, labels
    picture = contact_sheet(grid, labels, names)
    return _exhibit(results, key, section, title, caption, columns, of, picture, planned)


def panels(
    results: Results, key: str, title: str, caption: str, columns: Sequence[SheetColumn], of: Sequence[SheetImage]
) -> Exhibit:
    """A titled panel for every arm, with its pictures of all shots of one prompt."""
    grid = filled([[_picture(results, column.arm, shot, LARGEST_CELL) for shot in of] for column in columns])
    picture = panel_sheet(grid, [column.label for column in columns], of[0].prompt)
    return _exhibit(results, key, "Pictures", title, caption, columns, of, picture, len(columns) * len(of))


def _exhibit(
    results: Results,
    key: str,
    section: str,
    title: str,
    caption: str,
    columns: Sequence[SheetColumn],
    of: Sequence[SheetImage],
    picture: Image.Image,
    planned: int,
) -> Exhibit:
    header, rows = ("prompt", "seed", "arm", "file", *results.plan.scores), listed(results, columns, of)
    if len(rows) < planned:
        caption += f" {planned - len(rows)} of {planned} pictures are not there: they are crossed out or left out."
    return Exhibit(key, section, title, caption, header, rows, picture=picture)


def key(*parts: str) -> str:
    """A file name."""
    return "-".join(slug(part) for part in parts)


def _picture(results: Results, arm: Arm, shot: SheetImage, side: int) -> Image.Image | None:
    place = stored_picture(results, arm, shot)
    if place is None:
        return None
    try:
        picture = read_rgb(place.path)
    except (OSError, ValueError):  # damaged since it was drawn: the next run finds out and draws it again
        return None
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)  # never enlarges
    return picture


def filled(grid: Sequence[Sequence[Image.Image | None]]) -> list[list[Image.Image]]:
    """The grid with a crossed-out picture where there is none."""
    some = next((image for row in grid for image in row if image is not None), None)
    absent = Image.new("RGB", (SMALLEST_CELL, SMALLEST_CELL) if some is None else some.size, ABSENT)
    right, bottom = absent.width - 1, absent.height - 1
    draw = ImageDraw.Draw(absent)
    for line in ((0, 0, right, bottom), (0, bottom, right, 0)):
        draw.line(line, fill=(150, 150, 155))
    return [[image or absent for image in row] for row in grid]
