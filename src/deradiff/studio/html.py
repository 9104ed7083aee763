"""What the studio says on its pages, as HTML. Whatever a person or a model named is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from deradiff.studio import scenes
from deradiff.studio.drawing import Drawn
from deradiff.sweep.settings import Settings


def status(words: str, done: int = 0, total: int = 0) -> str:
    """What is going on, with a bar where it is known how far it is."""
    bar = f'<progress max="{total}" value="{done}" aria-label="steps done"></progress>' if total else ""
    return f"<p>{escape(words)}</p>{bar}"


def wrong(error: BaseException | str) -> str:
    """Why something was not done."""
    words = " ".join(str(error).split()) or type(error).__name__
    return f'<p class="wrong" role="alert">{escape(words)}</p>'


def meaning(lam: float, beta: float | None, name: str | None = None, annealed: bool = False) -> str:
    """What a λ is, as a line below its slider: the strength β/λ where β is known, and λ has one."""
    said = f"<strong>λ {'→' if annealed else '='} {lam:g}</strong>"
    parts = [said if name is None else f"{escape(name)}: {said}"]
    if annealed:
        parts.append("reached along the curve, at the image")
    elif beta is not None and lam > 0:
        parts.append(f"strength β/λ = {beta / lam:.4g} (the anchor's β is {beta:g})")
    if lam == 0:
        parts.append("the reference itself")
    elif lam > 1:
        parts.append('<span class="beyond">extrapolation: less regularised than any model that was trained</span>')
    elif not annealed:
        parts.append("the anchor itself" if lam == 1 else "between reference and anchor")
    return f'<p class="meaning">{" · ".join(parts)}</p>'


SCALE = (
    '<div class="scale"><span class="safe">0 to 1: safe, between the models</span>'
    '<span class="beyond">above 1: extrapolation</span></div>'
)


def label(settings: Settings) -> str:
    """An image's settings in one line, as a caption."""
    lams = scenes.strengths(settings)
    single = len(lams) == 1
    lam = f"λ {lams[0]:g}" if single else ", ".join(f"{n} {x:g}" for n, x in zip(settings.anchors, lams, strict=True))
    shape = scenes.curve(settings)
    parts = [lam, *([str(shape)] if shape is not None else []), f"seed {settings.seeds[0]}", f"{settings.steps} steps"]
    return " · ".join([*parts, *([settings.scheduler] if settings.scheduler else []), f"“{settings.prompts[0][:60]}”"])


def facts(drawn: Drawn, scoring: bool = False) -> str:
    """What is known about one image, as a table; `scoring` says that its scores are still to come."""
    rows = [(name, _score(value)) for name, value in drawn.scores.items()]
    if scoring:
        rows = [("scores", "…")]
    elif not rows:
        rows.append(("scores", "none: open the studio with --reward pickscore, for instance"))
    rows.append(("path KL", _path_kl(drawn)))
    rows.append(("trust", drawn.verdict))
    rows.append(("drawn in", f"{drawn.seconds:.2f} s, {label(drawn.settings)}"))
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(words)}</td></tr>' for name, words in rows)
    return f"<table>{cells}</table>"


def strip(images: Sequence[Drawn]) -> str:
    """What is known about the images of a strip, a row for every λ; below it, what they are worth."""
    scores = list(images[0].scores)
    betas = [drawn.settings.columns[0].beta(drawn.settings.anchor_beta) for drawn in images]
    heads = ["λ", *(["β/λ"] if any(betas) else []), *scores, "path KL"]
    rows: list[str] = []
    worth: dict[str, list[str]] = {}
    for drawn, beta in zip(images, betas, strict=True):
        lam = ", ".join(f"{its:g}" for its in scenes.strengths(drawn.settings))
        cells = [lam, *(["∞" if beta is None else f"{beta:.4g}"] if any(betas) else [])]
        cells += ["–" if isinstance(its := drawn.scores[name], str) else _score(its) for name in scores]
        cells.append("–" if drawn.path_kl is None else f"{drawn.path_kl:.4g}")
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
        worth.setdefault(drawn.verdict, []).append(lam)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    said = "".join(
        f"<p><strong>λ {escape('; '.join(lams))}</strong>: {escape(words)}</p>" for words, lams in worth.items()
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{said}"


def _score(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _path_kl(drawn: Drawn) -> str:
    if drawn.path_kl is None:
        return "unknown: this scheduler's steps draw no noise (ddpm and euler-a do)"
    return f"{drawn.path_kl:.4g} nats from the reference along this path"


def sides(a: str | None, b: str | None) -> str:
    """Which images the divider lies between."""
    if a is None or b is None:
        missing = "A and B" if a is None and b is None else "A" if a is None else "B"
        return f"<p>Draw an image and keep it as {missing}, below it; the two are laid over each other here.</p>"
    return f"<p><strong>A</strong>: {escape(a)}<br><strong>B</strong>: {escape(b)}</p>"


def judgement(verdicts: Sequence[str], settings: Settings, images: int) -> str:
    """What so many images say about how far λ can be trusted."""
    head = f"<p><strong>Judged from {images} images</strong> of seeds {settings.seeds[0]} to "
    head += f"{settings.seeds[0] + images - 1}, {escape(label(settings))}:</p>"
    return head + "".join(f"<p>{escape(verdict)}</p>" for verdict in verdicts)
