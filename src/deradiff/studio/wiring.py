"""What happens by what: the components of the page, tied to its reactions."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff.studio import presets
from deradiff.studio.annealing import Annealing
from deradiff.studio.comparisons import Comparing
from deradiff.studio.image_requests import Desk
from deradiff.studio.library import Library
from deradiff.studio.page import Page
from deradiff.studio.page_settings import Keeping
from deradiff.studio.previews import Turning
from deradiff.sweep.settings import Settings


def connect(blocks: gr.Blocks, desk: Desk, start: Settings, library: Path) -> None:
    """Lay out the page in `blocks`, and say what happens by what."""
    sources = desk.models.sources
    page = Page(start, sources.references(), sources.anchors())
    curves, kept = Library(library / "curves", "curve"), Library(library / "presets", "preset")
    turning, annealing, comparing = Turning(desk, start, page), Annealing(curves), Comparing(desk, start, page)
    keeping = Keeping(desk, start, page, kept, curves, presets.shipped(sources.hub))

    asked, shows = {*page.dial(), page.shown}, page.view()
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    quick: dict[str, Any] = private | {"queue": False}

    def then_exact(previewed: Any) -> None:
        previewed.then(turning.exact, asked, shows, trigger_mode="multiple", **private)

    def then_draw(event: Any) -> None:
        """A preview and the exact image, if the event came to its end."""
        then_exact(event.success(turning.preview, asked, shows, trigger_mode="always_last", **private))

    turned = [
        *(lam.input for lam in page.lams),
        page.curve.input,
        page.prompt.submit,
        page.draw.click,
        page.scheduler.input,
        page.steps.input,
        page.guidance_scale.submit,
        page.seed.submit,
        page.width.submit,
        page.height.submit,
        page.negative_prompt.submit,
    ]
    then_exact(gr.on(turned, turning.preview, asked, shows, trigger_mode="always_last", **private))
    page.judge.click(turning.judge, asked, page.judgement, **private)
    page.cancel.click(turning.cancel, None, None, **quick)
    then_draw(page.new_seed.click(lambda: random.randrange(2**31), None, page.seed, **quick))

    curve_parts = [page.curve, page.family, page.parameter, page.curve_export]
    page.steps.input(annealing.restep, [page.curve, page.steps], page.curve, **quick)
    page.curve.input(annealing.drawn, page.curve, curve_parts[1:], **quick)
    then_draw(page.family.input(annealing.family, [page.family, page.curve], curve_parts, **private))
    then_draw(
        page.parameter.submit(annealing.parameter, [page.family, page.parameter, page.curve], curve_parts, **private)
    )
    then_draw(page.kept_curves.input(annealing.use, [page.kept_curves, page.curve], curve_parts, **private))
    kept_parts = [page.kept_curves, page.curve_name, page.status]
    page.keep_curve.click(annealing.keep, [page.curve_name, page.curve], kept_parts, **private)
    page.delete_curve.click(annealing.delete, page.kept_curves, kept_parts, **private)

    everything = [*keeping.components(), *shows, page.models_status, page.share_status]
    for event, reaction, needs in (
        (blocks.load, keeping.first, set()),
        (page.load.click, keeping.load, {page.reference, page.anchors}),
        (page.use_paste.click, keeping.use_paste, {page.paste}),
        (page.upload.upload, keeping.use_file, {page.upload}),
        (page.presets.input, keeping.use_preset, {page.presets}),
    ):
        then_draw(event(reaction, {*asked, *needs}, everything, **private))
    preset_parts = [page.presets, page.preset_name, page.share_status]
    page.keep_preset.click(keeping.keep, {*asked, page.preset_name}, preset_parts, **private)
    page.delete_preset.click(keeping.delete, {page.presets}, preset_parts, **private)

    strip_parts = [page.strip_status, page.strip, page.strip_table, page.strip_download, page.strip_lams_drawn]
    gr.on(
        [page.draw_strip.click, page.strip_lams.submit],
        comparing.strip,
        {page.strip_lams, *asked},
        strip_parts,
        **private,
    )
    then_draw(page.strip.select(comparing.pick, [page.strip_lams_drawn, *page.lams], page.lams, **quick))
    for letter, button, side in (("A", page.keep_a, page.side_a), ("B", page.keep_b, page.side_b)):
        keep = partial(comparing.keep, letter)
        button.click(keep, page.shown, [side, page.status], **private).success(
            comparing.compare, [page.side_a, page.side_b], [page.comparison, page.sides], **quick
        )
    blocks.unload(turning.left)
