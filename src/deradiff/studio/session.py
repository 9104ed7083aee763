"""What all of the page's reactions share: the desk, the page's components, and how its values become settings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from deradiff.servers.gate import without_values
from deradiff.studio import html, scenes
from deradiff.studio.drawing import StepReport
from deradiff.studio.image_requests import Desk, Loading, Waiting
from deradiff.studio.jobs import Cancelled
from deradiff.studio.page import Page
from deradiff.sweep.alignment_records import known_beta
from deradiff.sweep.settings import Settings

log = logging.getLogger(__name__)

Updates = dict[Any, Any]

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)


@dataclass(frozen=True)
class Session:
    """The page as its reactions see it."""

    desk: Desk
    start: Settings
    page: Page

    def scene(
        self, data: Mapping[Any, Any], models: Sequence[str] | None = None, lams: Sequence[float] | None = None
    ) -> Settings:
        """The settings that the page's values make; raises `ValueError` in words for the page."""
        dial = self.page
        reference, *anchors = data[dial.models] if models is None else models
        if lams is None:
            lams = [data[lam] for lam in dial.lams[: len(anchors)]]
        return scenes.scene(
            reference,
            anchors,
            data[dial.prompt] or "",
            lams,
            schedule=record_of(data[dial.curve]),
            negative_prompt=data[dial.negative_prompt],
            seed=data[dial.seed] or 0,
            scheduler=data[dial.scheduler] or None,
            steps=data[dial.steps],
            guidance_scale=data[dial.guidance_scale],
            width=data[dial.width],
            height=data[dial.height],
        )

    def meaning(self, settings: Settings) -> str:
        """What the λ of `settings` are, in words."""
        single, annealed = len(settings.anchors) == 1, settings.columns[0].schedule is not None
        return "".join(
            html.meaning(lam, known_beta(source), None if single else name, annealed)
            for lam, (name, source) in zip(scenes.strengths(settings), settings.anchors.items(), strict=True)
        )

    def asked(self, status: Any, settings: Callable[[], Settings]) -> Generator[Updates, None, Settings | None]:
        """What `settings` makes of the page's values; None, and why as an update of `status`, where they are none."""
        yield {status: gr.skip()}  # what yields nothing would empty the page
        try:
            return settings()
        except ValueError as error:
            yield {status: html.wrong(error)}
            return None

    def updates(
        self, work: Iterator[Any], data: Mapping[Any, Any], status: Any, finished: Callable[[Any], Updates]
    ) -> Iterator[Updates]:
        """What the desk tells about work, as updates of `status`, and what `finished` makes of what comes of it."""
        own = status is self.page.status
        try:
            for news in work:
                if (line := progress(news)) is None:
                    yield finished(news)
                elif own and isinstance(news, StepReport) and news.glimpse is not None:
                    yield {status: line, self.page.picture: news.glimpse}
                else:
                    yield {status: line}
        except Cancelled as stopped:
            if stopped.why == "cancelled":
                shown = data[self.page.shown]
                restored = {self.page.picture: shown["file"]} if shown and own else {}
                last = " The last finished image is shown." if restored else ""
                yield {status: html.status(f"Cancelled.{last}"), **restored}
        except Exception as error:
            yield {status: self.explanation(error)}

    def explanation(self, error: Exception) -> str:
        """An error in words for the page; one that nobody expected is told in full in the terminal."""
        if isinstance(error, EXPECTED) or type(error).__module__.startswith("deradiff."):
            return html.wrong(error)
        log.error("an image could not be drawn: %s", without_values(error))
        return html.wrong(f"something went wrong ({type(error).__name__}); the terminal says more")


def progress(news: Any) -> str | None:
    """How far work is, as HTML; None for news of another kind."""
    match news:
        case Waiting(ahead):
            return html.status(f"Waiting: {ahead} before this one")
        case Loading(reference):
            return html.status(f"Loading {reference} …")
        case StepReport(done, total):
            return html.status(f"Step {done} of {total}", done, total)
    return None


def refusal(error: Exception | str) -> gr.Error:
    """An error of the person's, to be raised: it is shown, and what would come next does not."""
    return gr.Error(escape(" ".join(str(error).split())), print_exception=False, title="That was not done")


@contextmanager
def refusing() -> Iterator[None]:
    """Raise what is wrong with a person's wish, or cannot be written, as `refusal` does."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise refusal(error) from None


def page_of(request: gr.Request) -> str:
    """The key of the page that asks."""
    return request.session_hash or "nobody"


def record_of(curve: Any) -> Any:
    """The schedule's record in a curve as a page sends it."""
    if curve is None:
        return None
    if not isinstance(curve, dict):
        raise ValueError("the curve is not one that this page drew: reload the page")
    return curve.get("schedule")
