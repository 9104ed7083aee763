"""The dial is turned: a preview at once, the exact image when it rests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from deradiff.studio import drawing, html, scenes, snippets
from deradiff.studio.drawing import DrawnImage
from deradiff.studio.image_requests import REST, UnscoredImages
from deradiff.studio.session import Session, Updates, page_of


class Turning(Session):
    """What happens to the page's image."""

    def preview(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial moves: what λ means at once, then a cheap image."""
        page, key = self.page, page_of(request)
        settings = yield from self.asked(page.status, lambda: self.scene(data))
        if settings is None:
            self.desk.pages.begin(key)  # what is drawn is no longer what is asked for
            return
        yield {page.meaning: self.meaning(settings), page.status: html.status("Drawing …")}
        how = data[page.preview]
        if how == "none":
            self.desk.pages.begin(key)  # the last image makes way at once all the same
            return

        def finished(images: list[DrawnImage]) -> Updates:
            return {page.picture: images[0].image, page.status: html.status("Preview; the exact image follows")}

        work = self.desk.drawn(key, drawing.preview_of(settings, how), preview=True)
        yield from self.updates(work, data, page.status, finished)

    def exact(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial rests: the exact image, step by step."""
        page = self.page
        settings = yield from self.asked(page.status, lambda: self.scene(data))
        if settings is None:
            return

        shown: list[DrawnImage] = []

        def finished(drawn: UnscoredImages | list[DrawnImage]) -> Updates:
            scoring = isinstance(drawn, UnscoredImages)
            image = (drawn.images if isinstance(drawn, UnscoredImages) else drawn)[0]
            changed = {} if shown else self._shown(image, request)
            shown.append(image)
            return changed | {page.facts: html.facts(image, scoring)}

        work = self.desk.drawn(page_of(request), settings, rest=REST, goes_on=True)
        yield from self.updates(work, data, page.status, finished)

    def judge(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """A verdict from more images than one."""
        place = self.page.judgement
        settings = yield from self.asked(place, lambda: self.scene(data))
        if settings is None:
            return
        yield {place: html.status(f"Drawing {drawing.JUDGED} images …")}

        def finished(verdicts: list[str]) -> Updates:
            return {place: html.judgement(verdicts, settings, drawing.JUDGED)}

        yield from self.updates(self.desk.judged(page_of(request), settings), data, place, finished)

    def cancel(self, request: gr.Request) -> None:
        """Stop this page's image; what it shows is said by whatever was drawing it."""
        self.desk.pages.cancel(page_of(request))

    def left(self, request: gr.Request) -> None:
        """The page was closed."""
        self.desk.pages.leave(page_of(request))

    def _shown(self, drawn: DrawnImage, request: gr.Request) -> Updates:
        page, machine = self.page, self.desk.models.machine
        try:
            file = str(self.desk.save(drawn.name, drawn.image, drawn.record))
        except OSError as error:
            return {page.status: html.wrong(f"the image could not be kept ({error.strerror})")}
        device, dtype = drawn.record["device"], drawn.record["dtype"]
        warned = "".join(html.wrong(warning) for warning in drawn.warned)
        return {
            page.picture: file,
            page.status: html.status(f"Exact: {drawn.settings.steps} steps in {drawn.seconds:.2f} s") + warned,
            page.download: gr.update(value=file, interactive=True),
            page.shown: {"file": file, "caption": html.label(drawn.settings)},
            page.python: snippets.program(drawn.settings, device, dtype),
            page.shell: snippets.command(drawn.settings, machine.device, machine.dtype),
            page.link: f"{_address(request)}?{scenes.written(drawn.settings)}",
        }


def _address(request: gr.Request) -> str:
    """The page's address, as its browser knows it."""
    asked = request.request
    if asked is None:
        return "/"
    return f"{asked.url.scheme}://{asked.headers.get('host', '')}{asked.scope.get('root_path', '')}/"
