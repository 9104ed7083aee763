"""Settings as a whole: those the page opens with, of models, links, images and presets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class Keeping:
    """What changes all of the page at once."""

    def __init__(self, session: Session, kept: Library, kept_curves: Library, shipped: Mapping[str, Settings]) -> None:
        self.session, self.presets, self.curves, self.shipped = session, kept, kept_curves, shipped

    def first(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The page was opened, perhaps by a link with settings in it."""
        on = self.session.controls
        lists = {
            on.kept_curves: gr.update(choices=self.curves.names(), value=None),
            on.presets: gr.update(choices=self._preset_names(), value=None),
        }
        query = {name: value for name, value in request.query_params.items() if name not in ("token", "__theme")}
        start = settings = self.session.start
        if query:
            try:
                settings = self._known(scenes.read(str(request.query_params)))
            except ValueError as error:
                gr.Warning(escape(str(error)), title="The link was not followed", duration=30)
        yield lists | self._fill(settings)  # so that the page is whole, whatever becomes of the models
        if settings != start:
            models = {self.session.dial.models: [settings.reference, *settings.anchors.values()]}
            try:
                yield from self._take(settings, {**data, **models}, request, self.session.view.status)
                return
            except gr.Error as error:
                if error.message == CANCELLED:
                    raise
                gr.Warning(error.message, title="The link was not followed", duration=30)
                yield self._fill(start)
        yield from self._take(start, data, request, self.session.view.status)

    def load(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the models that were chosen; where they cannot be had, the last ones stay."""
        on = self.session.controls
        reference, anchors = data[on.reference] or "", data[on.anchors] or []
        dialled = dict(
            zip(data[self.session.dial.models][1:], (data[lam] for lam in self.session.dial.lams), strict=False)
        )
        lams = [dialled.get(source, 0.0) for source in anchors]
        if anchors and not any(source in dialled for source in anchors):
            lams[0] = data[self.session.dial.lams[0]]
        if reference != data[self.session.dial.models][0]:  # what was usual for another model is not for this one
            dial = self.session.dial
            data = {**data, dial.guidance_scale: None, dial.width: None, dial.height: None, dial.scheduler: ""}
        try:
            settings = self.session.scene(data, [reference, *anchors], lams)
        except ValueError as error:
            yield self._refused(data, error, on.models_status)
            raise refusal(error) from None
        yield from self._take(settings, data, request, on.models_status)

    def use_paste(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of a link."""
        yield from self._taken(lambda: scenes.read(data[self.session.controls.paste] or ""), data, request)

    def use_file(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of an image that deradiff wrote."""
        file = data[self.session.controls.upload]
        if file is None:
            yield {self.session.controls.share_status: gr.skip()}  # what yields nothing would empty the page
            return
        yield from self._taken(lambda: scenes.of_record(_in_png(Path(file))), data, request)

    def use_preset(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take a preset."""
        name = data[self.session.controls.presets] or ""
        yield from self._taken(
            lambda: self.shipped[name] if name in self.shipped else scenes.of_record(self.presets.load(name)),
            data,
            request,
        )

    def keep(self, data: dict[Any, Any]) -> Updates:
        """Keep the page's settings by name."""
        on = self.session.controls
        with refusing():
            name = self.presets.save(data[on.preset_name] or "", self.session.scene(data).model_dump())
        return {
            on.presets: gr.update(choices=self._preset_names(), value=name),
            on.preset_name: "",
            on.share_status: html.status(f"Kept the settings as {name}"),
        }

    def delete(self, data: dict[Any, Any]) -> Updates:
        """Forget a preset of the person's own."""
        on = self.session.controls
        name = data[on.presets] or ""
        with refusing():
            if name in self.shipped:
                raise ValueError("this preset comes with the studio, and stays")
            self.presets.delete(name)
        return {
            on.presets: gr.update(choices=self._preset_names(), value=None),
            on.share_status: html.status(f"Deleted the preset {name}"),
        }

    def _taken(self, find: Any, data: Mapping[Any, Any], request: gr.Request) -> Iterator[Updates]:
        on = self.session.controls
        try:
            settings = find()
        except (ValueError, OSError) as error:
            yield {on.share_status: html.wrong(error)}
            raise refusal(error) from None
        yield from self._take(settings, data, request, on.share_status)

    def _take(self, settings: Settings, data: Mapping[Any, Any], request: gr.Request, status: Any) -> Iterator[Updates]:
        """Load what `settings` need and show them in every component. Raises `gr.Error` where it cannot be had."""
        try:
            for news in self.session.desk.loaded(page_of(request), settings):
                if (line := progress(news)) is not None:
                    yield {status: line}
        except Cancelled as stopped:
            if stopped.why == "cancelled":
                yield {status: html.status("Cancelled"), **self._chosen(data[self.session.dial.models])}
            raise gr.Error(CANCELLED, visible=False, print_exception=False) from None
        except Exception as error:
            yield {**self._chosen(data[self.session.dial.models]), status: self.session.explanation(error)}
            raise refusal(error) from None
        yield self._fill(settings) | {status: html.status("Ready")}

    def _refused(self, data: Mapping[Any, Any], error: Exception, status: Any) -> Updates:
        return {**self._chosen(data[self.session.dial.models]), status: html.wrong(error)}

    def _chosen(self, models: Sequence[str]) -> Updates:
        """The models that are in force, where a person chooses them."""
        return {self.session.controls.reference: models[0], self.session.controls.anchors: list(models[1:])}

    def _fill(self, settings: Settings) -> Updates:
        """Every component as `settings` have it."""
        dial, on, held = self.session.dial, self.session.controls, self.session.desk.models
        models = [settings.reference, *settings.anchors.values()]
        shape = scenes.curve(settings)
        family, parameter = curves.family_of(shape)
        lams = scenes.strengths(settings)
        sliders = {}
        for i, slider in enumerate(dial.lams):
            if i < len(lams):
                named = list(settings.anchors)[i]
                label = "λ" if len(lams) == 1 else f"λ of {named}"
                sliders[slider] = gr.update(visible=True, value=lams[i], label=label)
            else:
                sliders[slider] = gr.update(visible=False)
        fitting = [("the model's own", ""), *([settings.scheduler] if settings.scheduler else [])]
        if settings.reference in held.references:
            own = (f"the model's own ({held.usual(settings.reference)})", "")
            fitting = [own, *held.schedulers(settings.reference)]
        return {
            dial.models: models,
            **self._chosen(models),
            **sliders,
            dial.prompt: settings.prompts[0],
            dial.negative_prompt: settings.negative_prompt or "",
            dial.curve: {"schedule": None if shape is None else shape.to_dict(), "steps": settings.steps},
            on.family: family,
            on.parameter: gr.skip() if parameter is None else parameter,
            on.curve_export: exported(shape),
            dial.scheduler: gr.update(choices=fitting, value=settings.scheduler or ""),
            dial.steps: settings.steps,
            dial.guidance_scale: settings.guidance_scale,
            dial.seed: settings.seeds[0],
            dial.width: settings.width,
            dial.height: settings.height,
            self.session.view.meaning: self.session.meaning(settings),
        }

    def components(self) -> list[Any]:
        """Everything that a change of all settings reaches, but for the image."""
        dial, on = self.session.dial, self.session.controls
        own = [component for component in dial.components() if component is not dial.preview]
        return [*own, on.reference, on.anchors, on.family, on.parameter, on.curve_export, on.kept_curves, on.presets]

    def _known(self, settings: Settings) -> Settings:
        """`settings` of a link, if all they load is listed here: a link alone makes nothing be downloaded."""
        sources = self.session.desk.models.sources
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
