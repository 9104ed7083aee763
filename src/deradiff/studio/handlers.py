"""What happens on the studio's page: each thing a person does, and what changes by it."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff import notation, records
from deradiff.pipelines import known_beta, usual_guidance
from deradiff.settings import Settings, caption
from deradiff.sheets import contact_sheet
from deradiff.studio import curves, drawing, page, presets, scenes, snippets, words
from deradiff.studio.desk import REST, Desk, Loading, Unscored, Waiting
from deradiff.studio.drawing import Drawn, Step
from deradiff.studio.jobs import Cancelled
from deradiff.studio.library import Kept

log = logging.getLogger(__name__)

Updates = dict[Any, Any]

EXPECTED = (ValueError, OSError, ImportError, FloatingPointError, MemoryError)

MOST_STRIP = 25


class Handlers:
    """The page's reactions. Each takes the values of the components it names, and returns what changes."""

    def __init__(self, desk: Desk, start: Settings, library: Path) -> None:
        self.desk, self.start = desk, start
        self.curves, self.presets = Kept(library / "curves", "curve"), Kept(library / "presets", "preset")
        self.shipped = presets.shipped(desk.models.sources.hub)

    def connect(self, blocks: gr.Blocks) -> None:
        """Lay out the page in `blocks`, and say what happens by what."""
        sources = self.desk.models.sources
        self.dial, self.view, self.controls = page.page(self.start, sources.references(), sources.anchors())
        dial, view, on = self.dial, self.view, self.controls
        asked, shows = {*dial.components(), view.shown}, self._shows()
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        quick: dict[str, Any] = private | {"queue": False}

        def then_exact(previewed: Any) -> None:
            previewed.then(self.exact, asked, shows, trigger_mode="multiple", **private)

        def then_draw(event: Any) -> None:
            """A preview and the exact image, if the event came to its end."""
            then_exact(event.success(self.preview, asked, shows, trigger_mode="always_last", **private))

        turned = gr.on(
            [
                *(lam.input for lam in dial.lams), dial.curve.input, dial.prompt.submit, on.draw.click,
                dial.scheduler.input, dial.steps.input, dial.guidance_scale.submit, dial.seed.submit,
                dial.width.submit, dial.height.submit, dial.negative_prompt.submit,
            ],
            self.preview, asked, shows, trigger_mode="always_last", **private,
        )  # fmt: skip
        then_exact(turned)
        on.cancel.click(self.cancel, None, None, **quick)
        then_draw(on.new_seed.click(lambda: random.randrange(2**31), None, dial.seed, **quick))

        curve_parts = [dial.curve, on.family, on.parameter, on.curve_export, view.status]
        dial.steps.input(self.restep, [dial.curve, dial.steps], dial.curve, **quick)
        dial.curve.input(self.curve_drawn, dial.curve, [on.family, on.curve_export], **quick)
        by_family = gr.on(
            [on.family.input], self.family_chosen, [on.family, dial.curve], curve_parts, **quick
        )  # fmt: skip
        then_draw(by_family)
        by_parameter = on.parameter.submit(
            self.parameter_set, [on.family, on.parameter, dial.curve], curve_parts, **quick
        )
        then_draw(by_parameter)
        on.keep_curve.click(
            self.keep_curve, [on.curve_name, dial.curve], [on.kept_curves, on.curve_name, view.status], **quick
        )
        then_draw(on.kept_curves.input(self.use_curve, [on.kept_curves, dial.curve], curve_parts, **quick))
        on.delete_curve.click(self.delete_curve, on.kept_curves, [on.kept_curves, view.status], **quick)

        everything = [*self._filled(), *shows, on.models_status, on.share_status]
        chosen = {on.reference, on.anchors, *asked}
        then_draw(on.load.click(self.load, chosen, everything, **private))
        then_draw(on.use_paste.click(self.use_paste, {on.paste, *asked}, everything, **private))
        then_draw(on.upload.upload(self.use_file, {on.upload, *asked}, everything, **private))
        then_draw(on.presets.input(self.use_preset, {on.presets, *asked}, everything, **private))
        on.keep_preset.click(
            self.keep_preset, {on.preset_name, *asked}, [on.presets, on.preset_name, on.share_status], **quick
        )
        on.delete_preset.click(self.delete_preset, on.presets, [on.presets, on.share_status], **quick)

        strip_parts = [on.strip_status, on.strip, on.strip_table, on.strip_download, on.strip_lams_drawn]
        gr.on([on.draw_strip.click, on.strip_lams.submit], self.strip, {on.strip_lams, *asked}, strip_parts, **private)
        then_draw(
            on.strip.select(self.pick, [on.strip_lams_drawn, *dial.lams], dial.lams, **quick)
        )  # fmt: skip
        sides = [on.comparison, on.sides]
        for button, side in ((on.keep_a, on.side_a), (on.keep_b, on.side_b)):
            button.click(lambda shown: shown, view.shown, side, **quick).then(
                self.compare, [on.side_a, on.side_b], sides, **quick
            )
        then_draw(blocks.load(self.first, asked, everything, **private))
        blocks.unload(self.left)

    # -- the image ----------------------------------------------------------------------------------------------------

    def preview(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial moves: what λ means at once, then a cheap image."""
        view = self.view
        try:
            settings = self._scene(data)
        except ValueError as error:
            self.desk.pages.cancel(_page(request))
            yield {view.status: words.wrong(error)}
            return
        yield {view.meaning: self._meaning(settings)}
        how = data[self.dial.preview]
        if how == "none":
            return
        for news in self._drawing(drawing.preview_of(settings, how), request, data, preview=True):
            if isinstance(news, dict):
                yield news
            elif isinstance(news, list):
                yield {view.picture: news[0].image, view.status: words.status("Preview; the exact image follows")}

    def exact(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The dial rests: the exact image, step by step."""
        view = self.view
        try:
            settings = self._scene(data)
        except ValueError as error:
            yield {view.status: words.wrong(error)}
            return
        for news in self._drawing(settings, request, data, rest=REST):
            if isinstance(news, dict):
                yield news
            elif isinstance(news, Step):
                changed: Updates = {view.status: words.status(f"Step {news.done} of {news.total}", *news[:2])}
                if news.glimpse is not None:
                    changed[view.picture] = news.glimpse
                yield changed
            elif isinstance(news, Unscored):
                yield self._finished(news.images[0], request)
            elif isinstance(news, list):
                yield {view.facts: words.facts(news[0])}

    def cancel(self, request: gr.Request) -> None:
        """Stop this page's image; what it shows is said by whatever was drawing it."""
        self.desk.pages.cancel(_page(request))

    def left(self, request: gr.Request) -> None:
        """The page was closed."""
        self.desk.pages.leave(_page(request))

    def _drawing(
        self, settings: Settings, request: gr.Request, data: Mapping[Any, Any], *, status: Any = None, **how: Any
    ) -> Iterator[Any]:
        """What the desk tells about an image; what every image says alike comes as updates of `status`."""
        status = self.view.status if status is None else status
        try:
            for news in self.desk.drawn(_page(request), settings, **how):
                if isinstance(news, Waiting):
                    yield {status: words.status(f"Waiting: {news.ahead} before this one")}
                elif isinstance(news, Loading):
                    yield {status: words.status(f"Loading {news.reference} …")}
                else:
                    yield news
        except Cancelled as stopped:
            if stopped.why == "cancelled":
                shown = data.get(self.view.shown)
                restored = {self.view.picture: shown["file"]} if shown and status is self.view.status else {}
                yield {status: words.status("Cancelled. The last finished image is shown."), **restored}
        except Exception as error:
            yield {status: self._said(error)}

    def _said(self, error: Exception) -> str:
        """An error in words for the page; one that nobody expected is told in full in the terminal."""
        if isinstance(error, EXPECTED) or type(error).__module__.startswith("deradiff."):
            return words.wrong(error)
        log.exception("an image could not be drawn")
        return words.wrong(f"something went wrong ({type(error).__name__}); the terminal says more")

    def _finished(self, drawn: Drawn, request: gr.Request) -> Updates:
        view, machine = self.view, self.desk.models.machine
        file, query = str(self.desk.save(drawn)), scenes.written(drawn.settings)
        device, dtype = drawn.record["device"], drawn.record["dtype"]
        warned = "".join(words.wrong(warning) for warning in self.desk.models.warned)
        return {
            view.picture: file,
            view.status: words.status(f"Exact: {drawn.settings.steps} steps in {drawn.seconds:.2f} s") + warned,
            view.facts: words.facts(drawn, scoring=True),
            view.download: gr.update(value=file, interactive=True),
            view.shown: {"file": file, "caption": words.label(drawn.settings), "query": query},
            view.python: snippets.program(drawn.settings, device, dtype),
            view.shell: snippets.command(drawn.settings, machine.device, machine.dtype),
            view.link: f"{_address(request)}/?{query}",
        }

    # -- the curve ----------------------------------------------------------------------------------------------------

    def restep(self, curve: Any, steps: float) -> Any:
        """The number of steps changed, and with it where the curve is read."""
        return {"schedule": _record(curve), "steps": int(steps)}

    def curve_drawn(self, curve: Any) -> tuple[Any, str]:
        """The curve was changed by hand."""
        schedule = curves.read(_record(curve))
        family, _ = curves.family_of(schedule)
        return gr.update(value=family), _export(schedule)

    def family_chosen(self, family: str, curve: Any) -> tuple[Any, ...]:
        """Start from a family, at its usual parameter; "drawn" makes points of what is there."""
        if family in curves.FAMILIES:
            letter, usual, *_ = curves.FAMILIES[family]
            return self._curve_now(
                curves.of_family(family, usual), curve, gr.update(value=usual, label=f"Its {letter}")
            )
        if family == "constant":
            return self._curve_now(None, curve, gr.skip())
        present = curves.read(_record(curve))
        points = [(0.0, 0.0), (1.0, 1.0)] if present is None else curves.points_of(present)
        return self._curve_now(curves.through(points), curve, gr.skip())

    def parameter_set(self, family: str, parameter: float, curve: Any) -> tuple[Any, ...]:
        """The family's parameter was set."""
        if family not in curves.FAMILIES:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), words.wrong("choose power, step or sigmoid first")
        try:
            return self._curve_now(curves.of_family(family, parameter), curve, gr.skip())
        except ValueError as error:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), words.wrong(error)

    def keep_curve(self, name: str, curve: Any) -> tuple[Any, ...]:
        """Keep the curve by name."""
        try:
            schedule = curves.read(_record(curve))
            if schedule is None:
                raise ValueError("λ stays the same: there is no curve to keep")
            kept = self.curves.save(name, schedule.to_dict())
        except (ValueError, OSError) as error:
            return gr.skip(), gr.skip(), words.wrong(error)
        return gr.update(choices=self.curves.names(), value=kept), "", words.status(f"Kept the curve as {kept}")

    def use_curve(self, name: str, curve: Any) -> tuple[Any, ...]:
        """Take a curve that was kept."""
        try:
            return self._curve_now(curves.read(self.curves.load(name)), curve, gr.skip())
        except (ValueError, TypeError) as error:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip(), words.wrong(error)

    def delete_curve(self, name: str | None) -> tuple[Any, str]:
        """Forget a curve that was kept."""
        try:
            self.curves.delete(name or "")
        except (ValueError, OSError) as error:
            return gr.skip(), words.wrong(error)
        return gr.update(choices=self.curves.names(), value=None), words.status(f"Deleted {name}")

    def _curve_now(self, schedule: Any, curve: Any, parameter: Any) -> tuple[Any, ...]:
        record = None if schedule is None else schedule.to_dict()
        family, value = curves.family_of(schedule)
        if value is not None and not isinstance(parameter, dict | type(gr.skip())):
            parameter = value
        steps = (curve or {}).get("steps", self.start.steps)
        return {"schedule": record, "steps": steps}, family, parameter, _export(schedule), gr.skip()

    # -- settings as a whole ------------------------------------------------------------------------------------------

    def first(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The page was opened, perhaps by a link with settings in it."""
        on = self.controls
        lists = {
            on.kept_curves: gr.update(choices=self.curves.names(), value=None),
            on.presets: gr.update(choices=self._preset_names(), value=None),
        }
        query = {name: value for name, value in request.query_params.items() if name not in ("token", "__theme")}
        settings, said = self.start, ""
        if query:
            try:
                settings = self._known(scenes.read(str(request.query_params)))
            except ValueError as error:
                said = words.wrong(error)
        yield lists
        yield from self._take(settings, data, request, self.view.status)
        if said:
            yield {self.view.status: said, on.share_status: said}

    def load(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the models that were chosen; where they cannot be had, the last ones stay."""
        on = self.controls
        reference, anchors = data[on.reference] or "", data[on.anchors] or []
        lams = [data[lam] for lam in self.dial.lams]
        try:
            settings = self._scene(data, [reference, *anchors], [*lams, 0.0, 0.0][: len(anchors)])
        except ValueError as error:
            yield self._refused(data, error, on.models_status)
            raise gr.Error(str(error), print_exception=False) from None
        yield from self._take(settings, data, request, on.models_status)

    def use_paste(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of a link."""
        yield from self._taken(lambda: scenes.read(data[self.controls.paste] or ""), data, request)

    def use_file(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take the settings of an image that deradiff wrote."""
        file = data[self.controls.upload]
        if file is None:
            return
        yield from self._taken(lambda: scenes.of_record(records.read_png(file)), data, request)

    def use_preset(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """Take a preset."""
        name = data[self.controls.presets] or ""
        yield from self._taken(
            lambda: self.shipped[name] if name in self.shipped else scenes.of_record(self.presets.load(name)),
            data,
            request,
        )

    def keep_preset(self, data: dict[Any, Any]) -> Updates:
        """Keep the page's settings by name."""
        on = self.controls
        try:
            name = self.presets.save(data[on.preset_name] or "", self._scene(data).model_dump())
        except (ValueError, OSError) as error:
            return {on.share_status: words.wrong(error)}
        return {
            on.presets: gr.update(choices=self._preset_names(), value=name), on.preset_name: "",
            on.share_status: words.status(f"Kept the settings as {name}"),
        }  # fmt: skip

    def delete_preset(self, name: str | None) -> tuple[Any, str]:
        """Forget a preset of the person's own."""
        try:
            if name in self.shipped:
                raise ValueError("this preset comes with the studio, and stays")
            self.presets.delete(name or "")
        except (ValueError, OSError) as error:
            return gr.skip(), words.wrong(error)
        return gr.update(choices=self._preset_names(), value=None), words.status(f"Deleted {name}")

    def _taken(self, find: Any, data: Mapping[Any, Any], request: gr.Request) -> Iterator[Updates]:
        on = self.controls
        try:
            settings = find()
        except (ValueError, OSError) as error:
            yield {on.share_status: words.wrong(error)}
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        yield from self._take(settings, data, request, on.share_status)

    def _take(self, settings: Settings, data: Mapping[Any, Any], request: gr.Request, status: Any) -> Iterator[Updates]:
        """Load what `settings` need and show them in every component. Raises `gr.Error` where it cannot be had."""
        try:
            for news in self.desk.loaded(_page(request), settings):
                match news:
                    case Waiting(ahead):
                        yield {status: words.status(f"Waiting: {ahead} images before this")}
                    case Loading(reference):
                        yield {status: words.status(f"Loading {reference} …")}
        except Cancelled as stopped:
            if stopped.why == "cancelled":
                yield {status: words.status("Cancelled"), **self._chosen(data[self.dial.models])}
            raise gr.Error("cancelled", visible=False, print_exception=False) from None
        except Exception as error:
            yield {**self._chosen(data[self.dial.models]), status: self._said(error)}
            raise gr.Error(" ".join(str(error).split()), print_exception=False) from None
        yield self._fill(settings) | {status: words.status("Ready")}

    def _refused(self, data: Mapping[Any, Any], error: Exception, status: Any) -> Updates:
        return {**self._chosen(data[self.dial.models]), status: words.wrong(error)}

    def _chosen(self, models: Sequence[str]) -> Updates:
        """The models that are in force, where a person chooses them."""
        return {self.controls.reference: models[0], self.controls.anchors: list(models[1:])}

    def _fill(self, settings: Settings) -> Updates:
        """Every component as `settings` have it; their models are in memory."""
        dial, on, held = self.dial, self.controls, self.desk.models
        models = [settings.reference, *settings.anchors.values()]
        shape = scenes.curve(settings)
        family, parameter = curves.family_of(shape)
        usual = usual_guidance(settings.reference)
        lams = scenes.strengths(settings)
        sliders = {}
        for i, slider in enumerate(dial.lams):
            if i < len(lams):
                named = list(settings.anchors)[i]
                label = "λ" if len(lams) == 1 else f"λ of {named}"
                sliders[slider] = gr.update(visible=True, value=lams[i], label=label)
            else:
                sliders[slider] = gr.update(visible=False)
        fitting = [(f"the model's own ({held.usual(settings.reference)})", ""), *held.schedulers(settings.reference)]
        guidance = settings.guidance_scale if settings.guidance_scale is not None else usual
        return {
            dial.models: models, **self._chosen(models), **sliders,
            dial.prompt: settings.prompts[0], dial.negative_prompt: settings.negative_prompt or "",
            dial.curve: {"schedule": None if shape is None else shape.to_dict(), "steps": settings.steps},
            on.family: family, on.parameter: gr.skip() if parameter is None else parameter,
            on.curve_export: _export(shape),
            dial.scheduler: gr.update(choices=fitting, value=settings.scheduler or ""), dial.steps: settings.steps,
            dial.guidance_scale: guidance, dial.seed: settings.seeds[0],
            dial.width: settings.width, dial.height: settings.height, self.view.meaning: self._meaning(settings),
        }  # fmt: skip

    def _filled(self) -> list[Any]:
        dial, on = self.dial, self.controls
        own = [component for component in dial.components() if component is not dial.preview]
        return [*own, on.reference, on.anchors, on.family, on.parameter, on.curve_export, on.kept_curves, on.presets]

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

    # -- strip and comparison -----------------------------------------------------------------------------------------

    def strip(self, data: dict[Any, Any], request: gr.Request) -> Iterator[Updates]:
        """The image at many λ, from the same noise."""
        on = self.controls
        try:
            lams = notation.numbers(data[on.strip_lams] or "", "λ")
            if not 1 <= len(lams) <= MOST_STRIP or not all(0 <= lam <= scenes.LARGEST_LAM for lam in lams):
                raise ValueError(f"a strip has 1 to {MOST_STRIP} λ from 0 to {scenes.LARGEST_LAM:g}")
            settings = drawing.strip_of(self._scene(data), lams)
        except ValueError as error:
            yield {on.strip_status: words.wrong(error)}
            return
        for news in self._drawing(settings, request, data, status=on.strip_status):
            if isinstance(news, dict):
                yield news
            elif isinstance(news, Step):
                yield {on.strip_status: words.status(f"Step {news.done} of {news.total}", *news[:2])}
            elif isinstance(news, list):
                yield self._strip_finished(settings, news, lams)

    def _strip_finished(self, settings: Settings, images: list[Drawn], lams: list[float]) -> Updates:
        on, first = self.controls, images[0]
        labels = [column.label(settings.anchor_beta) for column in settings.columns]
        sheet = contact_sheet(
            [[drawn.image for drawn in images]],
            labels,
            [f"{settings.prompts[0]}\nseed {settings.seeds[0]}"],
            caption(settings, first.record["scheduler"], first.record["guidance_scale"]),
        )
        record = first.record | {"settings": settings.model_dump(), "images": [drawn.record for drawn in images]}
        file = str(self.desk.save_sheet("strip.png", sheet, record))
        gallery = [
            (str(self.desk.save(drawn)), label.replace("\n", " · "))
            for drawn, label in zip(images, labels, strict=True)
        ]
        return {
            on.strip: gallery,
            on.strip_table: words.strip(images),
            on.strip_status: words.status(f"{len(images)} images in {first.seconds:.2f} s"),
            on.strip_download: gr.update(value=file, interactive=True),
            on.strip_lams_drawn: [scenes.strengths(drawn.settings) for drawn in images],
        }

    def pick(self, event: gr.SelectData, drawn: list[list[float]], *lams: float) -> list[float]:
        """An image of the strip was chosen: its λ."""
        chosen = drawn[event.index] if 0 <= event.index < len(drawn) else []
        return [chosen[i] if i < len(chosen) else lam for i, lam in enumerate(lams)]

    def compare(self, a: Any, b: Any) -> tuple[Any, str]:
        """Two images under the divider, as soon as there are two."""
        said = words.sides(a and a["caption"], b and b["caption"])
        return ((a["file"], b["file"]) if a and b else gr.skip()), said

    # -- values -------------------------------------------------------------------------------------------------------

    def _scene(
        self, data: Mapping[Any, Any], models: Sequence[str] | None = None, lams: Sequence[float] | None = None
    ) -> Settings:
        """The settings that the page's values make; raises `ValueError` in words for the page."""
        dial = self.dial
        reference, *anchors = data[dial.models] if models is None else models
        if lams is None:
            lams = [data[lam] for lam in dial.lams[: len(anchors)]]
        return scenes.scene(
            reference, anchors, data[dial.prompt] or "", lams,
            schedule=_record(data[dial.curve]), negative_prompt=data[dial.negative_prompt],
            seed=data[dial.seed] or 0, scheduler=data[dial.scheduler] or None, steps=data[dial.steps],
            guidance_scale=data[dial.guidance_scale], width=data[dial.width], height=data[dial.height],
        )  # fmt: skip

    def _meaning(self, settings: Settings) -> str:
        single = len(settings.anchors) == 1
        return "".join(
            words.meaning(lam, known_beta(source), None if single else name)
            for lam, (name, source) in zip(scenes.strengths(settings), settings.anchors.items(), strict=True)
        )

    def _shows(self) -> list[Any]:
        view = self.view
        return [
            view.meaning, view.picture, view.status, view.facts, view.download, view.shown, view.python, view.shell,
            view.link,
        ]  # fmt: skip


def _page(request: gr.Request) -> str:
    return request.session_hash or "nobody"


def _address(request: gr.Request) -> str:
    """What the page's address begins with, as its browser knows it."""
    asked = request.request
    return "" if asked is None else f"{asked.url.scheme}://{asked.headers.get('host', '')}"


def _record(curve: Any) -> Any:
    """The schedule's record in a curve as a page sends it."""
    if curve is None:
        return None
    if not isinstance(curve, dict):
        raise ValueError("the curve is not one that this page drew: reload the page")
    return curve.get("schedule")


def _export(schedule: Any) -> str:
    return "" if schedule is None else f"schedules.{schedule!r}"
