"""What happens by what: the components of the page, tied to its reactions."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff.studio import page, presets
from deradiff.studio.annealing import Annealing
from deradiff.studio.comparisons import Comparing
from deradiff.studio.image_requests import Desk
from deradiff.studio.library import Library
from deradiff.studio.page_settings import Keeping
from deradiff.studio.previews import Turning
from deradiff.studio.session import Session
from deradiff.sweep.settings import Settings


def connect(blocks: gr.Blocks, desk: Desk, start: Settings, library: Path) -> None:
    """Lay out the page in `blocks`, and say what happens by what."""
    sources = desk.models.sources
    dial, view, on = page.page(start, sources.references(), sources.anchors())
    session = Session(desk, start, dial, view, on)
    curves, kept = Library(library / "curves", "curve"), Library(library / "presets", "preset")
    turning, annealing, comparing = Turning(session), Annealing(curves), Comparing(session)
    keeping = Keeping(session, kept, curves, presets.shipped(sources.hub))

    asked, shows = {*dial.components(), view.shown}, view.components()
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    quick: dict[str, Any] = private | {"queue": False}

    def then_exact(previewed: Any) -> None:
        previewed.then(turning.exact, asked, shows, trigger_mode="multiple", **private)

    def then_draw(event: Any) -> None:
        """A preview and the exact image, if the event came to its end."""
        then_exact(event.success(turning.preview, asked, shows, trigger_mode="always_last", **private))

    turned = [
        *(lam.input for lam in dial.lams),
        dial.curve.input,
        dial.prompt.submit,
        on.draw.click,
        dial.scheduler.input,
        dial.steps.input,
        dial.guidance_scale.submit,
        dial.seed.submit,
        dial.width.submit,
        dial.height.submit,
        dial.negative_prompt.submit,
    ]
    then_exact(gr.on(turned, turning.preview, asked, shows, trigger_mode="always_last", **private))
    on.judge.click(turning.judge, asked, view.judgement, **private)
    on.cancel.click(turning.cancel, None, None, **quick)
    then_draw(on.new_seed.click(lambda: random.randrange(2**31), None, dial.seed, **quick))

    curve_parts = [dial.curve, on.family, on.parameter, on.curve_export]
    dial.steps.input(annealing.restep, [dial.curve, dial.steps], dial.curve, **quick)
    dial.curve.input(annealing.drawn, dial.curve, curve_parts[1:], **quick)
    then_draw(on.family.input(annealing.family, [on.family, dial.curve], curve_parts, **private))
    then_draw(on.parameter.submit(annealing.parameter, [on.family, on.parameter, dial.curve], curve_parts, **private))
    then_draw(on.kept_curves.input(annealing.use, [on.kept_curves, dial.curve], curve_parts, **private))
    kept_parts = [on.kept_curves, on.curve_name, view.status]
    on.keep_curve.click(annealing.keep, [on.curve_name, dial.curve], kept_parts, **private)
    on.delete_curve.click(annealing.delete, on.kept_curves, kept_parts, **private)

    everything = [*keeping.components(), *shows, on.models_status, on.share_status]
    for event, reaction, needs in (
        (blocks.load, keeping.first, set()),
        (on.load.click, keeping.load, {on.reference, on.anchors}),
        (on.use_paste.click, keeping.use_paste, {on.paste}),
        (on.upload.upload, keeping.use_file, {on.upload}),
        (on.presets.input, keeping.use_preset, {on.presets}),
    ):
        then_draw(event(reaction, {*asked, *needs}, everything, **private))
    preset_parts = [on.presets, on.preset_name, on.share_status]
    on.keep_preset.click(keeping.keep, {*asked, on.preset_name}, preset_parts, **private)
    on.delete_preset.click(keeping.delete, {on.presets}, preset_parts, **private)

    strip_parts = [on.strip_status, on.strip, on.strip_table, on.strip_download, on.strip_lams_drawn]
    gr.on([on.draw_strip.click, on.strip_lams.submit], comparing.strip, {on.strip_lams, *asked}, strip_parts, **private)
    then_draw(on.strip.select(comparing.pick, [on.strip_lams_drawn, *dial.lams], dial.lams, **quick))
    for letter, button, side in (("A", on.keep_a, on.side_a), ("B", on.keep_b, on.side_b)):
        keep = partial(comparing.keep, letter)
        button.click(keep, view.shown, [side, view.status], **private).success(
            comparing.compare, [on.side_a, on.side_b], [on.comparison, on.sides], **quick
        )
    blocks.unload(turning.left)
