"""The studio's page: what stands where. What happens is in `handlers`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff.settings import Settings
from deradiff.studio import curves, drawing, scenes, words

PAGES = Path(__file__).parent / "pages"

SANS, MONO = ("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"), ("ui-monospace", "Menlo", "monospace")

PREVIEWS = {"A third of the steps": "steps", "Carry predictions over": "carry", "None": "none"}

STRIP = "0:1.5:0.25"

FAMILIES = {
    "constant": "None: λ stays the same", "power": "Power: λ = s^p", "step": "Step: from 0 to λ at once",
    "sigmoid": "Sigmoid", "spline": "Drawn: a monotone spline",
}  # fmt: skip

LARGEST_UPLOAD = 16 * 2**20
"""Bytes of a PNG file whose settings are read."""


@dataclass(frozen=True)
class Dial:
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
        found: list[Any] = []
        for its in fields(self):
            value = getattr(self, its.name)
            found += value if isinstance(value, list) else [value]
        return found


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
    """The last exact image: its file, its caption and its settings string."""
    python: gr.Code
    shell: gr.Code
    link: gr.Textbox

    def components(self) -> list[Any]:
        """All of them, in order."""
        return [getattr(self, its.name) for its in fields(self)]


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
    curve_export: gr.Textbox
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


def page(start: Settings, references: list[str], anchors: list[str]) -> tuple[Dial, View, Controls]:
    """Lay the page out, inside a `gr.Blocks`; `start` are the settings that it opens with."""
    gr.HTML("<h1>deradiff studio</h1><p>One dial for how aligned a model is.</p>", elem_classes="title")
    models = gr.State([start.reference, *start.anchors.values()])
    shown, side_a, side_b = gr.State(None), gr.State(None), gr.State(None)
    strip_lams_drawn = gr.State([])
    kept: dict[str, Any] = {}
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                start.prompts[0], label="Prompt", lines=2, max_lines=6, elem_id="prompt", autofocus=True,
                submit_btn=False, max_length=scenes.LONGEST_PROMPT,
            )  # fmt: skip
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                cancel = gr.Button("Cancel", elem_id="cancel")
            with gr.Group(elem_classes="dial"):
                lams = [
                    gr.Slider(
                        0, scenes.LARGEST_LAM, value=1.0, step=0.01, label="λ", elem_id=f"lam-{i}",
                        visible=i == 0, buttons=["reset"],
                    )
                    for i in range(scenes.MOST_ANCHORS)
                ]  # fmt: skip
                gr.HTML(words.SCALE, padding=True)
                meaning = gr.HTML(elem_id="meaning", padding=True)
            with gr.Accordion("Annealing curve", open=True, elem_id="curve-panel"):
                with gr.Row():
                    family = gr.Dropdown(
                        [(told, name) for name, told in FAMILIES.items()], value="constant", label="Start from",
                        elem_id="family",
                    )  # fmt: skip
                    parameter = gr.Number(2.0, label="Its parameter, p or κ", elem_id="parameter", minimum=0)
                curve = gr.HTML(
                    {"schedule": None, "steps": start.steps},
                    html_template=(PAGES / "curve.html").read_text(encoding="utf-8"),
                    js_on_load=(PAGES / "curve.js").read_text(encoding="utf-8"),
                    server_functions=[curves.answer], elem_id="curve", padding=True, label="Annealing curve",
                    closest=curves.CLOSEST, most_points=curves.MOST_POINTS,
                )  # fmt: skip
                curve_export = gr.Textbox(
                    "",
                    label="As a schedule of the library",
                    interactive=False,
                    buttons=["copy"],
                    elem_id="curve-export",
                )
                with gr.Row():
                    kept["curves"] = gr.Dropdown([], label="Kept curves", elem_id="kept-curves", value=None)
                    kept["curve_name"] = gr.Textbox(label="Keep this curve as", elem_id="curve-name", max_length=60)
                with gr.Row():
                    kept["keep_curve"] = gr.Button("Keep the curve", size="sm", elem_id="keep-curve")
                    kept["delete_curve"] = gr.Button("Delete the chosen curve", size="sm", elem_id="delete-curve")
            with gr.Accordion("Sampling", open=False, elem_id="sampling-panel"):
                with gr.Row():
                    scheduler = gr.Dropdown([("the model's own", "")], value="", label="Scheduler", elem_id="scheduler")
                    steps = gr.Slider(1, curves.MOST_STEPS, start.steps, step=1, label="Steps", elem_id="steps")
                with gr.Row():
                    guidance = gr.Number(
                        None, label="Guidance scale", info="Empty for the model's usual one", elem_id="guidance",
                        minimum=0, maximum=scenes.LARGEST_GUIDANCE,
                    )  # fmt: skip
                    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", minimum=0)
                new_seed = gr.Button("Another seed", elem_id="new-seed", size="sm")
                with gr.Row():
                    width = gr.Number(None, label="Width", info="Empty for the usual", elem_id="width", precision=0)
                    height = gr.Number(None, label="Height", info="Empty for the usual", elem_id="height", precision=0)
                negative = gr.Textbox(
                    "", label="Negative prompt", elem_id="negative-prompt", max_length=scenes.LONGEST_PROMPT
                )
                preview = gr.Radio(
                    list(PREVIEWS.items()), value="steps", label="Preview while the dial moves", elem_id="preview"
                )
            with gr.Accordion("Models", open=False, elem_id="models-panel"):
                reference = gr.Dropdown(
                    references, value=start.reference, label="Reference", allow_custom_value=True, elem_id="reference",
                    info="digits, a folder of the list, or a hub id",
                )  # fmt: skip
                chosen = gr.Dropdown(
                    anchors, value=list(start.anchors.values()), label="Anchors", multiselect=True,
                    max_choices=scenes.MOST_ANCHORS, allow_custom_value=True, elem_id="anchors",
                    info="The aligned models, three at most; each gets a dial",
                )  # fmt: skip
                load = gr.Button("Load these models", elem_id="load")
                models_status = gr.HTML(elem_classes="status", elem_id="models-status")
        with gr.Column(scale=6, min_width=320, elem_id="right"), gr.Tabs():
            with gr.Tab("Image", id="image"):
                picture = gr.Image(
                    None, type="filepath", format="png", label="Image", interactive=False, height=440,
                    buttons=["fullscreen"], elem_id="picture", elem_classes="picture",
                )  # fmt: skip
                status = gr.HTML(words.status("Loading …"), elem_classes="status", elem_id="status")
                with gr.Row(elem_id="with-image"):
                    download = gr.DownloadButton("Download the PNG", elem_id="download", interactive=False)
                    keep_a = gr.Button("Keep as A", elem_id="keep-a")
                    keep_b = gr.Button("Keep as B", elem_id="keep-b")
                facts = gr.HTML(elem_classes="facts", elem_id="facts")
                judge = gr.Button(f"Judge it by {drawing.JUDGED} seeds", size="sm", elem_id="judge")
                judgement = gr.HTML(elem_id="judgement", padding=True)
            with gr.Tab("Strip over λ", id="strip"):
                with gr.Row():
                    strip_lams = gr.Textbox(
                        STRIP, label="λ", info="A list or ranges, 0:1.5:0.25", elem_id="strip-lams", max_length=200
                    )
                    draw_strip = gr.Button("Draw the strip", variant="primary", elem_id="draw-strip", scale=0)
                strip_status = gr.HTML(elem_classes="status", elem_id="strip-status")
                strip = gr.Gallery(
                    None, label="Choose an image to turn the dial there", columns=4, object_fit="contain", format="png",
                    interactive=False, preview=False, elem_id="strip", elem_classes="strip", height="auto",
                )  # fmt: skip
                strip_table = gr.HTML(elem_classes="table", elem_id="strip-table")
                strip_download = gr.DownloadButton("Download the sheet", elem_id="strip-download", interactive=False)
            with gr.Tab("Compare", id="compare"):
                sides = gr.HTML(words.sides(None, None), elem_id="sides")
                comparison = gr.ImageSlider(
                    None, type="filepath", format="png", label="A on the left, B on the right; drag the divider",
                    interactive=False, elem_id="comparison", elem_classes="comparison", max_height=480,
                )  # fmt: skip
            with gr.Tab("Keep and share", id="share"):
                share_status = gr.HTML(elem_classes="status", elem_id="share-status")
                with gr.Row():
                    presets = gr.Dropdown([], value=None, label="Presets", elem_id="presets")
                    preset_name = gr.Textbox(label="Keep these settings as", elem_id="preset-name", max_length=60)
                with gr.Row():
                    keep_preset = gr.Button("Keep the settings", size="sm", elem_id="keep-preset")
                    delete_preset = gr.Button("Delete the chosen preset", size="sm", elem_id="delete-preset")
                link = gr.Textbox(
                    "", label="Link to these settings", interactive=False, buttons=["copy"], elem_id="link", max_lines=4
                )
                with gr.Row():
                    paste = gr.Textbox(
                        label="A link or settings string", elem_id="paste", max_length=scenes.LONGEST_LINK, max_lines=3
                    )
                    use_paste = gr.Button("Use it", elem_id="use-paste", scale=0)
                upload = gr.File(
                    label="A PNG that deradiff wrote: its settings are taken", file_types=[".png"], type="filepath",
                    elem_id="upload", height=150,
                )  # fmt: skip
                python = gr.Code(
                    "",
                    language="python",
                    label="The same in Python",
                    elem_id="python",
                    interactive=False,
                    wrap_lines=True,
                )
                shell = gr.Code(
                    "",
                    language="shell",
                    label="The same as a command",
                    elem_id="shell",
                    interactive=False,
                    wrap_lines=True,
                )
    dial = Dial(
        models, prompt, negative, lams, curve, scheduler, steps, guidance, seed, width, height, preview
    )  # fmt: skip
    view = View(meaning, picture, status, facts, judgement, download, shown, python, shell, link)
    controls = Controls(
        draw, cancel, judge, new_seed, family, parameter, kept["curves"], kept["curve_name"], kept["keep_curve"],
        kept["delete_curve"], curve_export, reference, chosen, load, models_status, strip_lams, draw_strip,
        strip_status, strip, strip_table, strip_download, strip_lams_drawn, keep_a, keep_b, side_a, side_b, comparison,
        sides, presets, preset_name, keep_preset, delete_preset, paste, use_paste, upload, share_status,
    )  # fmt: skip
    return dial, view, controls


def theme() -> gr.themes.Base:
    """System fonts, and texts that stand out from what is behind them."""
    return gr.themes.Base(primary_hue="blue", neutral_hue="gray", font=SANS, font_mono=MONO).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_800",
        button_primary_background_fill="#0b5a8f",
        button_primary_background_fill_hover="#084670",
        button_primary_text_color="white",
        button_cancel_background_fill="#a01b1b",
        button_cancel_background_fill_hover="#7f1515",
        button_cancel_text_color="white",
        slider_color="#0b5a8f",
    )
