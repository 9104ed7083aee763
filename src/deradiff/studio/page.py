"""The studio's page: its components, made where they stand. What happens by what is in `wiring`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from deradiff.studio import curves, drawing, html, scenes
from deradiff.sweep.settings import Settings

SANS, MONO = ("system-ui", "Segoe UI", "Helvetica", "Arial", "sans-serif"), ("ui-monospace", "Menlo", "monospace")

PREVIEWS = {"A third of the steps": "steps", "Carry predictions over": "carry", "None": "none"}

STRIP = "0:1.5:0.25"

FAMILIES = {
    "constant": "None: λ stays the same",
    "power": "Power: λ = s^p",
    "step": "Step: from 0 to λ at once",
    "sigmoid": "Sigmoid",
    "spline": "Drawn: a monotone spline",
}

LARGEST_UPLOAD = 16 * 2**20
"""Bytes of a PNG file whose settings are read."""


def forgive_cleared_numbers() -> None:
    """Have Gradio's sliders do nothing while their number is cleared on the way to another, instead of failing.

    Changed in the class: Gradio makes sliders anew for every session, and writes a stub file beside the module of every
    subclass of a component.
    """
    read = gr.Slider.preprocess
    if getattr(read, "forgiving", False):
        return

    def preprocess(self: gr.Slider, payload: float | None) -> float:
        if payload is None:
            raise gr.Error("no number yet", visible=False, print_exception=False)
        return read(self, payload)

    preprocess.forgiving = True  # type: ignore[attr-defined]
    gr.Slider.preprocess = preprocess  # type: ignore[method-assign]


class Page:
    """The page laid out, inside a `gr.Blocks`: its components by name.

    `start` are the settings that it opens with; `references` and `anchors` are what may be chosen.
    """

    def __init__(self, start: Settings, references: list[str], anchors: list[str]) -> None:
        forgive_cleared_numbers()
        self.models = gr.State([start.reference, *start.anchors.values()])
        """The reference and the anchors that images are drawn with: the last ones that could be loaded."""
        self.shown = gr.State(None)
        """The last exact image: its file and its caption."""
        self.side_a, self.side_b = gr.State(None), gr.State(None)
        self.strip_lams_drawn = gr.State([])
        gr.HTML("<h1>deradiff studio</h1><p>One dial for how aligned a model is.</p>", elem_classes="title")
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="front"):
                self._front(start)
            with gr.Column(elem_id="right"), gr.Tabs():
                with gr.Tab("Image", id="image"):
                    self._image()
                with gr.Tab("Strip over λ", id="strip"):
                    self._strip()
                with gr.Tab("Compare", id="compare"):
                    self._comparison()
                with gr.Tab("Keep and share", id="share"):
                    self._sharing()
            with gr.Column(elem_id="back"):
                with gr.Accordion("Annealing curve", open=True, elem_id="curve-panel"):
                    self._curve(start)
                with gr.Accordion("Sampling", open=False, elem_id="sampling-panel"):
                    self._sampling(start)
                with gr.Accordion("Models", open=False, elem_id="models-panel"):
                    self._models(start, references, anchors)

    def dial(self) -> list[Any]:
        """What decides the image; its settings are read from here alone."""
        sampling = [self.scheduler, self.steps, self.guidance_scale, self.seed, self.width, self.height]
        return [self.models, self.prompt, self.negative_prompt, *self.lams, self.curve, *sampling, self.preview]

    def view(self) -> list[Any]:
        """What shows the image, and what is known about it."""
        image = [self.meaning, self.picture, self.status, self.facts, self.judgement, self.download, self.shown]
        return [*image, self.python, self.shell, self.link]

    def _front(self, start: Settings) -> None:
        self.prompt = gr.Textbox(
            start.prompts[0],
            label="Prompt",
            lines=2,
            max_lines=6,
            elem_id="prompt",
            autofocus=True,
            max_length=scenes.LONGEST_PROMPT,
        )
        with gr.Row(elem_id="go"):
            self.draw = gr.Button("Draw", variant="primary", elem_id="draw")
            self.cancel = gr.Button("Cancel", elem_id="cancel")
        given = scenes.strengths(start)
        with gr.Group(elem_classes="dial"):
            self.lams = [
                gr.Slider(
                    0,
                    scenes.LARGEST_LAM,
                    value=given[i] if i < len(given) else 0.0,
                    step=0.01,
                    label="λ",
                    elem_id=f"lam-{i}",
                    visible=i < len(given),
                    buttons=["reset"],
                )
                for i in range(scenes.MOST_ANCHORS)
            ]
            gr.HTML(html.scale(), padding=True)
            self.meaning = gr.HTML(elem_id="meaning", padding=True)

    def _curve(self, start: Settings) -> None:
        with gr.Row():
            families = [(label, name) for name, label in FAMILIES.items()]
            self.family = gr.Dropdown(families, value="constant", label="Start from", elem_id="family")
            self.parameter = gr.Number(2.0, label="Its parameter, p or κ", elem_id="parameter", minimum=0)
        self.curve = gr.HTML(
            {"schedule": None, "steps": start.steps},
            html_template=(html.PAGES / "curve.html").read_text(encoding="utf-8"),
            js_on_load=(html.PAGES / "curve.js").read_text(encoding="utf-8"),
            server_functions=[curves.answer],
            elem_id="curve",
            padding=True,
            label="Annealing curve",
            closest=curves.CLOSEST,
            most_points=curves.MOST_POINTS,
        )
        self.curve_export = _code("As a schedule of the library", "curve-export", "python", show_line_numbers=False)
        with gr.Row():
            self.kept_curves = gr.Dropdown([], label="Kept curves", elem_id="kept-curves", value=None)
            self.curve_name = gr.Textbox(label="Keep this curve as", elem_id="curve-name", max_length=60)
        with gr.Row():
            self.keep_curve = gr.Button("Keep the curve", size="sm", elem_id="keep-curve")
            self.delete_curve = gr.Button("Delete the chosen curve", size="sm", elem_id="delete-curve")

    def _sampling(self, start: Settings) -> None:
        with gr.Row():
            self.scheduler = gr.Dropdown([("the model's own", "")], value="", label="Scheduler", elem_id="scheduler")
            self.steps = gr.Slider(1, curves.MOST_STEPS, start.steps, step=1, label="Steps", elem_id="steps")
        with gr.Row():
            self.guidance_scale = gr.Number(
                None,
                label="Guidance scale",
                info="Empty for the usual one, 1.5 with the digits",
                elem_id="guidance",
                minimum=0,
                maximum=scenes.LARGEST_GUIDANCE,
            )
            self.seed = gr.Number(0, label="Seed", info="Of the noise", precision=0, elem_id="seed", minimum=0)
        self.new_seed = gr.Button("Another seed", elem_id="new-seed", size="sm")
        with gr.Row():
            self.width = gr.Number(None, label="Width", info="Empty for the usual", elem_id="width", precision=0)
            self.height = gr.Number(None, label="Height", info="Empty for the usual", elem_id="height", precision=0)
        self.negative_prompt = gr.Textbox(
            "", label="Negative prompt", elem_id="negative-prompt", max_length=scenes.LONGEST_PROMPT
        )
        self.preview = gr.Radio(
            list(PREVIEWS.items()), value="steps", label="Preview while the dial moves", elem_id="preview"
        )

    def _models(self, start: Settings, references: list[str], anchors: list[str]) -> None:
        self.reference = gr.Dropdown(
            references,
            value=start.reference,
            label="Reference",
            allow_custom_value=True,
            elem_id="reference",
            info="digits, a folder of the list, or a hub id",
        )
        self.anchors = gr.Dropdown(
            anchors,
            value=list(start.anchors.values()),
            label="Anchors",
            multiselect=True,
            max_choices=scenes.MOST_ANCHORS,
            allow_custom_value=True,
            elem_id="anchors",
            info=f"The aligned models, {scenes.MOST_ANCHORS} at most; each gets a dial",
        )
        self.load = gr.Button("Load these models", elem_id="load")
        self.models_status = _status("models-status")

    def _image(self) -> None:
        self.picture = gr.Image(
            None,
            type="filepath",
            format="png",
            label="Image",
            interactive=False,
            height=440,
            buttons=["fullscreen"],
            elem_id="picture",
            elem_classes="picture",
        )
        self.status = _status("status", html.status("Loading …"))
        with gr.Row(elem_id="with-image"):
            self.download = gr.DownloadButton("Download the PNG", elem_id="download", interactive=False)
            self.keep_a = gr.Button("Keep as A", elem_id="keep-a")
            self.keep_b = gr.Button("Keep as B", elem_id="keep-b")
        self.facts = gr.HTML(elem_classes="facts", elem_id="facts")
        self.judge = gr.Button(f"Judge it by {drawing.JUDGED} seeds", size="sm", elem_id="judge")
        self.judgement = gr.HTML(elem_id="judgement", padding=True)

    def _strip(self) -> None:
        with gr.Row():
            self.strip_lams = gr.Textbox(
                STRIP,
                label="λ",
                info="A list or ranges, 0:1.5:0.25; of several anchors all dials are multiplied",
                elem_id="strip-lams",
                max_length=200,
            )
            self.draw_strip = gr.Button(
                "Draw the strip", variant="primary", elem_id="draw-strip", scale=0, min_width=170
            )
        self.strip_status = _status("strip-status")
        self.strip = gr.Gallery(
            None,
            label="Choose an image to turn the dial there",
            columns=4,
            object_fit="contain",
            format="png",
            interactive=False,
            preview=False,
            elem_id="strip",
            elem_classes="strip",
            height="auto",
        )
        self.strip_table = gr.HTML(elem_classes="table", elem_id="strip-table")
        self.strip_download = gr.DownloadButton("Download the sheet", elem_id="strip-download", interactive=False)

    def _comparison(self) -> None:
        self.sides = gr.HTML(html.sides(None, None), elem_id="sides")
        self.comparison = gr.ImageSlider(
            None,
            type="filepath",
            format="png",
            label="A on the left, B on the right; drag the divider",
            interactive=False,
            elem_id="comparison",
            elem_classes="comparison",
            max_height=480,
        )

    def _sharing(self) -> None:
        self.share_status = _status("share-status")
        with gr.Row():
            self.presets = gr.Dropdown([], value=None, label="Presets", elem_id="presets")
            self.preset_name = gr.Textbox(label="Keep these settings as", elem_id="preset-name", max_length=60)
        with gr.Row():
            self.keep_preset = gr.Button("Keep the settings", size="sm", elem_id="keep-preset")
            self.delete_preset = gr.Button("Delete the chosen preset", size="sm", elem_id="delete-preset")
        self.link = _code("Link to these settings", "link", None, show_line_numbers=False)
        with gr.Row():
            self.paste = gr.Textbox(
                label="A link or settings string", elem_id="paste", max_length=scenes.LONGEST_LINK, max_lines=3
            )
            self.use_paste = gr.Button("Use it", elem_id="use-paste", scale=0)
        self.upload = gr.File(
            label="A PNG that deradiff wrote: its settings are taken",
            file_types=[".png"],
            type="filepath",
            elem_id="upload",
            height=150,
        )
        self.python = _code("The same in Python", "python", "python")
        self.shell = _code("The same as a command", "shell", "shell")


def _status(name: str, message: str | None = None) -> gr.HTML:
    return gr.HTML(message, elem_classes="status", elem_id=name)


def _code(label: str, name: str, language: Any, **how: Any) -> gr.Code:
    return gr.Code("", language=language, label=label, interactive=False, lines=1, elem_id=name, wrap_lines=True, **how)


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
        color_accent="#0b5a8f",
        color_accent_soft_dark="#0b3a5a",
    )
