"""The page's components by name: what decides the image, what shows it, and the rest."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import gradio as gr


@dataclass(frozen=True)
class DialComponents:
    """What decides the image; its settings are read from here alone."""

    models: gr.State
    """The reference and the anchors that images are drawn with: the last ones that could be loaded."""
    prompt: gr.Textbox
    negative_prompt: gr.Textbox
    lams: list[gr.Slider]
    curve: gr.HTML
    scheduler: gr.Dropdown
    steps: gr.Slider
    guidance_scale: gr.Number
    seed: gr.Number
    width: gr.Number
    height: gr.Number
    preview: gr.Radio

    def components(self) -> list[Any]:
        """All of them, in order."""
        values = [getattr(self, part.name) for part in fields(self)]
        return [each for value in values for each in (value if isinstance(value, list) else [value])]


@dataclass(frozen=True)
class View:
    """What shows the image, and what is known about it."""

    meaning: gr.HTML
    picture: gr.Image
    status: gr.HTML
    facts: gr.HTML
    judgement: gr.HTML
    download: gr.DownloadButton
    shown: gr.State
    """The last exact image: its file and its caption."""
    python: gr.Code
    shell: gr.Code
    link: gr.Code

    def components(self) -> list[Any]:
        """All of them, in order."""
        return [getattr(self, part.name) for part in fields(self)]


@dataclass(frozen=True)
class Controls:
    """Buttons, and what they need beside the dial."""

    draw: gr.Button
    cancel: gr.Button
    judge: gr.Button
    new_seed: gr.Button
    family: gr.Dropdown
    parameter: gr.Number
    kept_curves: gr.Dropdown
    curve_name: gr.Textbox
    keep_curve: gr.Button
    delete_curve: gr.Button
    curve_export: gr.Code
    reference: gr.Dropdown
    anchors: gr.Dropdown
    load: gr.Button
    models_status: gr.HTML
    strip_lams: gr.Textbox
    draw_strip: gr.Button
    strip_status: gr.HTML
    strip: gr.Gallery
    strip_table: gr.HTML
    strip_download: gr.DownloadButton
    strip_lams_drawn: gr.State
    keep_a: gr.Button
    keep_b: gr.Button
    side_a: gr.State
    side_b: gr.State
    comparison: gr.ImageSlider
    sides: gr.HTML
    presets: gr.Dropdown
    preset_name: gr.Textbox
    keep_preset: gr.Button
    delete_preset: gr.Button
    paste: gr.Textbox
    use_paste: gr.Button
    upload: gr.File
    share_status: gr.HTML
