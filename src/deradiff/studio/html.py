"""What the studio says on its pages, as HTML. Whatever a person or a model named is escaped by the templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deradiff.files.pages import templates
from deradiff.studio import scenes
from deradiff.studio.drawing import DrawnImage
from deradiff.sweep.settings import Settings

PAGES = Path(__file__).parent / "pages"

_messages: Any = templates(PAGES).get_template("messages.html").module


def status(message: str, done: int = 0, total: int = 0) -> str:
    """What is going on, with a bar where it is known how far it is."""
    return str(_messages.status(message, done, total))


def wrong(error: BaseException | str) -> str:
    """Why something was not done."""
    return str(_messages.wrong(" ".join(str(error).split()) or type(error).__name__))


def scale() -> str:
    """What stands below the sliders."""
    return str(_messages.scale())


def meaning(lam: float, beta: float | None, name: str | None = None, annealed: bool = False) -> str:
    """What a λ is, as a line below its slider: the strength β/λ where β is known, and λ has one."""
    return str(_messages.meaning(lam, beta, name, annealed))


def label(settings: Settings) -> str:
    """An image's settings in one line, as a caption: text, not HTML."""
    lams = scenes.strengths(settings)
    single = len(lams) == 1
    lam = f"λ {lams[0]:g}" if single else ", ".join(f"{n} {x:g}" for n, x in zip(settings.anchors, lams, strict=True))
    shape = scenes.curve(settings)
    parts = [lam, *([str(shape)] if shape is not None else []), f"seed {settings.seeds[0]}", f"{settings.steps} steps"]
    return " · ".join([*parts, *([settings.scheduler] if settings.scheduler else []), f"“{settings.prompts[0][:60]}”"])


def facts(drawn: DrawnImage, scoring: bool = False) -> str:
    """What is known about one image, as a table; `scoring` says that its scores are still to come."""
    rows = [(name, _score(value)) for name, value in drawn.scores.items()]
    if scoring:
        rows = [("scores", "…")]
    elif not rows:
        rows.append(("scores", "none: open the studio with --reward pickscore, for instance"))
    rows.append(("path KL", _path_kl(drawn)))
    rows += [("anchor", drawn.anchor)] if drawn.anchor else []
    rows.append(("trust", drawn.verdict))
    rows.append(("drawn in", f"{drawn.seconds:.2f} s, {label(drawn.settings)}"))
    return str(_messages.facts(rows))


def strip(images: Sequence[DrawnImage]) -> str:
    """What is known about the images of a strip, a row for every λ; below it, what they are worth."""
    scores = list(images[0].scores)
    betas = [drawn.settings.columns[0].beta(drawn.settings.anchor_beta) for drawn in images]
    rows: list[list[str]] = []
    verdicts: dict[str, list[str]] = {}
    for drawn, beta in zip(images, betas, strict=True):
        lam = ", ".join(f"{lam:g}" for lam in scenes.strengths(drawn.settings))
        cells = [lam, *(["∞" if beta is None else f"{beta:.4g}"] if any(betas) else [])]
        cells += ["–" if isinstance(score := drawn.scores[name], str) else _score(score) for name in scores]
        rows.append([*cells, "–" if drawn.path_kl is None else f"{drawn.path_kl:.4g}"])
        verdicts.setdefault(drawn.verdict, []).append(lam)
    headings = ["λ", *(["β/λ"] if any(betas) else []), *scores, "path KL"]
    return str(_messages.strip(headings, rows, verdicts))


def _score(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _path_kl(drawn: DrawnImage) -> str:
    if drawn.path_kl is None:
        return "unknown: this scheduler's steps draw no noise (ddpm and euler-a do)"
    return f"{drawn.path_kl:.4g} nats from the reference along this path"


def sides(a: str | None, b: str | None) -> str:
    """Which images the divider lies between."""
    return str(_messages.sides(a, b))


def judgement(verdicts: Sequence[str], settings: Settings, images: int) -> str:
    """What so many images say about how far λ can be trusted."""
    first = settings.seeds[0]
    return str(_messages.judgement(verdicts, images, first, first + images - 1, label(settings)))
