"""Settings as a whole: those the page opens with, of models, links, images and presets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff.files import records
from deradiff.studio import curves, html, scenes
from deradiff.studio.annealing import exported
from deradiff.studio.jobs import Cancelled
from deradiff.studio.library import Library
from deradiff.studio.session import Session, Updates, page_of, progress, refusal, refusing
from deradiff.sweep.settings import Settings

CANCELLED = "cancelled"

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Keeping(Session):
    """What changes all of the page at once."""

    presets: Library
    curves: Library
    shipped: Mapping[str, Settings]

    def first(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The page was opened, perhaps by a link with settings in it."""
        page, start = self.page, self.start
        lists = {
            page.kept_curves: gr.update(choices=self.curves.names(), value=None),
            page.presets: gr.update(choices=self._preset_names(), value=None),
        }
        query = {name: value for name, value in request.query_params.items() if name not in ("token", "__theme")}
        settings = start
        if query:
            try:
                settings = self._known(scenes.read(str(request.query_params)))
            except ValueError as error:
                gr.Warning(escape(str(error)), title="The link was not followed", duration=30)
        yield lists | self._fill(settings)  # so that the page is whole, whatever becomes of the models
        if settings != start:
            models = {page.models: [settings.reference, *settings.anchors.values()]}
            try:
                yield from self._take(settings, {**data, **models}, request, page.status)
                return
            except gr.Error as error:
                if error.message == CANCELLED:
                    raise
                gr.Warning(error.message, title="The link was not followed", duration=30)
                yield self._fill(start)
        yield from self._take(start, data, request, page.status)

    def load(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the models that were chosen; where they cannot be had, the last ones stay."""
        page = self.page
        reference, anchors = data[page.reference] or "", data[page.anchors] or []
        before, *sources = data[page.models]
        dialled = dict(zip(sources, (data[lam] for lam in page.lams), strict=False))
        lams = [dialled.get(source, 0.0) for source in anchors]
        if anchors and not any(source in dialled for source in anchors):
            lams[0] = data[page.lams[0]]
        if reference != before:  # what was usual for another model is not for this one
            data = {**data, page.guidance_scale: None, page.width: None, page.height: None, page.scheduler: ""}
        try:
            settings = self.scene(data, [reference, *anchors], lams)
        except ValueError as error:
            yield {**self._chosen(data[page.models]), page.models_status: html.wrong(error)}
            raise refusal(error) from None
        yield from self._take(settings, data, request, page.models_status)

    def use_paste(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of a link."""
        yield from self._taken(lambda: scenes.read(data[self.page.paste] or ""), data, request)

    def use_file(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of an image that deradiff wrote."""
        file = data[self.page.upload]
        if file is None:
            yield {self.page.share_status: gr.skip()}  # what yields nothing would empty the page
            return
        yield from self._taken(lambda: scenes.of_record(_in_png(Path(file))), data, request)

    def use_preset(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take a preset."""
        name = data[self.page.presets] or ""
        kept = self.shipped.get(name)
        yield from self._taken(lambda: kept or scenes.of_record(self.presets.load(name)), data, request)

    def keep(self, data: dict[Any, Any]) -> Updates:
        """Keep the page's settings by name."""
        with refusing():
            name = self.presets.save(data[self.page.preset_name] or "", self.scene(data).model_dump())
        return self._presets_now(name, f"Kept the settings as {name}") | {self.page.preset_name: ""}

    def delete(self, data: dict[Any, Any]) -> Updates:
        """Forget a preset of the person's own."""
        name = data[self.page.presets] or ""
        with refusing():
            if name in self.shipped:
                raise ValueError("this preset comes with the studio, and stays")
            self.presets.delete(name)
        return self._presets_now(None, f"Deleted the preset {name}")

    def _presets_now(self, chosen: str | None, said: str) -> Updates:
        presets = gr.update(choices=self._preset_names(), value=chosen)
        return {self.page.presets: presets, self.page.share_status: html.status(said)}

    def _taken(self, find: Callable[[], Settings], data: Mapping[Any, Any], request: gr.Request) -> Iterator[Updates]:
        status = self.page.share_status
        try:
            settings = find()
        except (ValueError, OSError) as error:
            yield {status: html.wrong(error)}
            raise refusal(error) from None
        yield from self._take(settings, data, request, status)

    def _take(self, settings: Settings, data: Mapping[Any, Any], request: gr.Request, status: Any) -> Iterator[Updates]:
        """Load what `settings` need and show them in every component. Raises `gr.Error` where it cannot be had."""
        try:
            for news in self.desk.loaded(page_of(request), settings):
                if (line := progress(news)) is not None:
                    yield {status: line}
        except Cancelled as stopped:
            if stopped.why == "cancelled":
                yield {status: html.status("Cancelled"), **self._chosen(data[self.page.models])}
            raise gr.Error(CANCELLED, visible=False, print_exception=False) from None
        except Exception as error:
            yield {**self._chosen(data[self.page.models]), status: self.explanation(error)}
            raise refusal(error) from None
        yield self._fill(settings) | {status: html.status("Ready")}

    def _chosen(self, models: Sequence[str]) -> Updates:
        """The models that are in force, where a person chooses them."""
        return {self.page.reference: models[0], self.page.anchors: list(models[1:])}

    def _fill(self, settings: Settings) -> Updates:
        """Every component as `settings` have it."""
        page, held = self.page, self.desk.models
        models = [settings.reference, *settings.anchors.values()]
        shape, lams = scenes.curve(settings), dict(zip(settings.anchors, scenes.strengths(settings), strict=True))
        family, parameter = curves.family_of(shape)
        dialled = [
            gr.update(visible=True, value=lam, label="λ" if len(lams) == 1 else f"λ of {name}")
            for name, lam in lams.items()
        ]
        unused = [gr.update(visible=False)] * (len(page.lams) - len(lams))
        fitting = [("the model's own", ""), *([settings.scheduler] if settings.scheduler else [])]
        if settings.reference in held.references:
            own = (f"the model's own ({held.usual(settings.reference)})", "")
            fitting = [own, *held.schedulers(settings.reference)]
        return {
            page.models: models,
            **self._chosen(models),
            **dict(zip(page.lams, [*dialled, *unused], strict=True)),
            page.prompt: settings.prompts[0],
            page.negative_prompt: settings.negative_prompt or "",
            page.curve: {"schedule": None if shape is None else shape.to_dict(), "steps": settings.steps},
            page.family: family,
            page.parameter: gr.skip() if parameter is None else parameter,
            page.curve_export: exported(shape),
            page.scheduler: gr.update(choices=fitting, value=settings.scheduler or ""),
            page.steps: settings.steps,
            page.guidance_scale: settings.guidance_scale,
            page.seed: settings.seeds[0],
            page.width: settings.width,
            page.height: settings.height,
            page.meaning: self.meaning(settings),
        }

    def components(self) -> list[Any]:
        """Everything that a change of all settings reaches, but for the image."""
        page = self.page
        own = [component for component in page.dial() if component is not page.preview]
        return [
            *own,
            page.reference,
            page.anchors,
            page.family,
            page.parameter,
            page.curve_export,
            page.kept_curves,
            page.presets,
        ]

    def _known(self, settings: Settings) -> Settings:
        """`settings` of a link, if all they load is listed here: a link alone makes nothing be downloaded."""
        sources = self.desk.models.sources
        for source, listed in (
            (settings.reference, sources.references()),
            *((source, sources.anchors()) for source in settings.anchors.values()),
        ):
            if source not in listed:
                raise ValueError(
                    f"the link asks for {source}, which this studio does not list: paste the link under “Keep and "
                    "share” and press “Use it” to load it all the same"
                )
        return settings

    def _preset_names(self) -> list[str]:
        return [*self.shipped, *self.presets.names()]


def _in_png(file: Path) -> dict[str, Any]:
    """What deradiff wrote into an image that somebody sent. Raises `ValueError`."""
    with file.open("rb") as opened:
        if opened.read(len(PNG)) != PNG:
            raise ValueError(f"cannot identify image file {file.name!r} as a PNG: send one that deradiff wrote")
    try:
        record = records.read_png(file)
    except Exception:  # Pillow raises of all kinds for a broken file, and they name where it lies
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file.name} carries no deradiff settings: another program wrote it, or saved it anew")
    return record
