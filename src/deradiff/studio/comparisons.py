"""Images side by side: a strip over λ, and two under a divider."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from deradiff.studio import drawing, html, scenes
from deradiff.studio.drawing import DrawnImage
from deradiff.studio.session import Session, Updates, page_of, refusal
from deradiff.sweep import notation
from deradiff.sweep.settings import Settings, caption
from deradiff.sweep.sheets import contact_sheet, covered

MOST_STRIP = 25


class Comparing(Session):
    """What happens on the strip's and the comparison's tabs."""

    def strip(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The image at many λ, from the same noise."""
        status = self.page.strip_status
        settings = yield from self.asked(status, lambda: self._strip_settings(data))
        if settings is None:
            return

        def finished(images: Any) -> Updates:
            return self._strip_finished(settings, images) if isinstance(images, list) else {status: gr.skip()}

        work = self.desk.drawn(page_of(request), settings, kind="strip")
        yield from self.updates(work, data, status, finished)

    def _strip_settings(self, data: dict[Any, Any]) -> Settings:
        lams = notation.numbers(data[self.page.strip_lams] or "", "λ")
        if not 1 <= len(lams) <= MOST_STRIP or not all(0 <= lam <= scenes.LARGEST_LAM for lam in lams):
            raise ValueError(f"a strip has 1 to {MOST_STRIP} λ from 0 to {scenes.LARGEST_LAM:g}")
        settings = drawing.strip_of(self.scene(data), lams)
        dials = [lam for column in settings.columns for lam in scenes.values_of(column.lam)]
        if max(dials) > scenes.LARGEST_LAM:
            raise ValueError(
                f"with several anchors λ multiplies what their dials say, and {max(dials):g} is above "
                f"{scenes.LARGEST_LAM:g}: lower the dials, or the strip's λ"
            )
        return settings

    def _strip_finished(self, settings: Settings, images: list[DrawnImage]) -> Updates:
        page, first = self.page, images[0]
        labels = [column.label(settings.anchor_beta) for column in settings.columns]
        sheet = contact_sheet(
            [[covered(drawn.image) if drawn.blacked_out else drawn.image for drawn in images]],
            labels,
            [f"{settings.prompts[0]}\nseed {settings.seeds[0]}"],
            caption(settings, first.record["scheduler"], first.record["guidance_scale"]),
        )
        record = first.record | {"settings": settings.model_dump(), "images": [drawn.record for drawn in images]}
        try:
            file = str(self.desk.save("strip.png", sheet, record))
            gallery = [
                (str(self.desk.save(drawn.name, drawn.image, drawn.record)), label.partition("\n")[0])
                for drawn, label in zip(images, labels, strict=True)
            ]
        except OSError as error:
            return {page.strip_status: html.wrong(f"the images could not be kept ({error.strerror})")}
        return {
            page.strip: gallery,
            page.strip_table: html.strip(images),
            page.strip_status: html.status(f"{len(images)} images in {first.seconds:.2f} s")
            + "".join(map(html.wrong, dict.fromkeys(warning for drawn in images for warning in drawn.warned))),
            page.strip_download: gr.update(value=file, interactive=True),
            page.strip_lams_drawn: [scenes.strengths(drawn.settings) for drawn in images],
        }

    def pick(self, event: gr.SelectData, drawn: list[list[float]], *lams: float) -> list[float]:
        """An image of the strip was chosen: its λ."""
        chosen = drawn[event.index] if 0 <= event.index < len(drawn) else []
        return [chosen[i] if i < len(chosen) else lam for i, lam in enumerate(lams)]

    def keep(self, letter: str, shown: Any) -> tuple[Any, str]:
        """Keep the image that is shown as one side."""
        if shown is None:
            raise refusal("there is no finished image yet: wait until it is exact")
        return shown, html.status(f"Kept as {letter}, on the tab Compare: {shown['caption']}")

    def compare(self, a: Any, b: Any) -> tuple[Any, str]:
        """Two images under the divider, as soon as there are two."""
        files = (a["file"], b["file"]) if a and b else gr.skip()
        return files, html.sides(a and a["caption"], b and b["caption"])
