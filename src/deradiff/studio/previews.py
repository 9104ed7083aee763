"""The dial is turned: a preview at once, the exact image when it rests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from deradiff.studio import drawing, html, scenes, snippets
from deradiff.studio.drawing import DrawnImage
from deradiff.studio.image_requests import REST, UnscoredImages
from deradiff.studio.session import Session, Updates, page_of
from deradiff.sweep.settings import Settings


class Turning:
    """What happens to the page's image."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def preview(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial moves: what λ means at once, then a cheap image."""
        view = self.session.view
        yield {view.status: gr.skip()}  # what yields nothing would empty the page
        try:
            settings = self.session.scene(data)
        except ValueError as error:
            self.session.desk.pages.begin(page_of(request))  # what is drawn is no longer what is asked for
            yield {view.status: html.wrong(error)}
            return
        yield {view.meaning: self.session.meaning(settings), view.status: html.status("Drawing …")}
        how = data[self.session.dial.preview]
        if how == "none":
            self.session.desk.pages.begin(page_of(request))  # the last image makes way at once all the same
            return
        for news in self._images(drawing.preview_of(settings, how), request, data, preview=True):
            if isinstance(news, dict):
                yield news
            elif isinstance(news, list):
                yield {view.picture: news[0].image, view.status: html.status("Preview; the exact image follows")}

    def exact(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial rests: the exact image, step by step."""
        view = self.session.view
        yield {view.status: gr.skip()}  # what yields nothing would empty the page
        try:
            settings = self.session.scene(data)
        except ValueError as error:
            yield {view.status: html.wrong(error)}
            return
        early: list[DrawnImage] = []
        for news in self._images(settings, request, data, rest=REST, goes_on=True):
            if isinstance(news, dict):
                yield news
            elif isinstance(news, UnscoredImages):
                early = news.images
                yield self._finished(early[0], request) | {view.facts: html.facts(early[0], scoring=True)}
            elif isinstance(news, list):
                changed: Updates = {} if early else self._finished(news[0], request)
                yield changed | {view.facts: html.facts(news[0])}

    def judge(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """A verdict from more images than one."""
        view = self.session.view
        try:
            settings = self.session.scene(data)
        except ValueError as error:
            yield {view.judgement: html.wrong(error)}
            return
        yield {view.judgement: html.status(f"Drawing {drawing.JUDGED} images …")}
        steps = self.session.updates(self.session.desk.judged(page_of(request), settings), data, status=view.judgement)
        for news in steps:
            if isinstance(news, dict):
                yield news
            elif isinstance(news, list):
                yield {view.judgement: html.judgement(news, settings, drawing.JUDGED)}

    def cancel(self, request: gr.Request) -> None:
        """Stop this page's image; what it shows is said by whatever was drawing it."""
        self.session.desk.pages.cancel(page_of(request))

    def left(self, request: gr.Request) -> None:
        """The page was closed."""
        self.session.desk.pages.leave(page_of(request))

    def _images(self, settings: Settings, request: gr.Request, data: dict[Any, Any], **how: Any) -> Iterator[Any]:
        return self.session.updates(self.session.desk.drawn(page_of(request), settings, **how), data)

    def _finished(self, drawn: DrawnImage, request: gr.Request) -> Updates:
        view, machine = self.session.view, self.session.desk.models.machine
        try:
            file = str(self.session.desk.save(drawn.name, drawn.image, drawn.record))
        except OSError as error:
            return {view.status: html.wrong(f"the image could not be kept ({error.strerror})")}
        device, dtype = drawn.record["device"], drawn.record["dtype"]
        warned = "".join(html.wrong(warning) for warning in drawn.warned)
        return {
            view.picture: file,
            view.status: html.status(f"Exact: {drawn.settings.steps} steps in {drawn.seconds:.2f} s") + warned,
            view.download: gr.update(value=file, interactive=True),
            view.shown: {"file": file, "caption": html.label(drawn.settings)},
            view.python: snippets.program(drawn.settings, device, dtype),
            view.shell: snippets.command(drawn.settings, machine.device, machine.dtype),
            view.link: f"{_address(request)}?{scenes.written(drawn.settings)}",
        }


def _address(request: gr.Request) -> str:
    """The page's address, as its browser knows it."""
    asked = request.request
    if asked is None:
        return "/"
    return f"{asked.url.scheme}://{asked.headers.get('host', '')}{asked.scope.get('root_path', '')}/"
