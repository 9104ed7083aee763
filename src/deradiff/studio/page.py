"""The studio's page: what stands where. What happens by what is in `wiring`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import gradio as gr

from deradiff.studio import curves, drawing, html, scenes
from deradiff.studio.components import Controls, DialComponents, View
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


def page(start: Settings, references: list[str], anchors: list[str]) -> tuple[DialComponents, View, Controls]:
    """Lay the page out, inside a `gr.Blocks`; `start` are the settings that it opens with."""
    forgive_cleared_numbers()
    made: dict[str, Any] = {
        "models": gr.State([start.reference, *start.anchors.values()]),
        "shown": gr.State(None),
        "side_a": gr.State(None),
        "side_b": gr.State(None),
        "strip_lams_drawn": gr.State([]),
    }
    gr.HTML("<h1>deradiff studio</h1><p>One dial for how aligned a model is.</p>", elem_classes="title")
    with gr.Row(elem_id="desk"):
        with gr.Column(elem_id="front"):
            made |= _front(start)
        with gr.Column(elem_id="right"), gr.Tabs():
            with gr.Tab("Image", id="image"):
                made |= _image()
            with gr.Tab("Strip over λ", id="strip"):
                made |= _strip()
            with gr.Tab("Compare", id="compare"):
                made |= _comparison()
            with gr.Tab("Keep and share", id="share"):
                made |= _sharing()
        with gr.Column(elem_id="back"):
            with gr.Accordion("Annealing curve", open=True, elem_id="curve-panel"):
                made |= _curve(start)
            with gr.Accordion("Sampling", open=False, elem_id="sampling-panel"):
                made |= _sampling(start)
            with gr.Accordion("Models", open=False, elem_id="models-panel"):
                made |= _models(start, references, anchors)
    return _of(DialComponents, made), _of(View, made), _of(Controls, made)


def _of(kind: Any, made: dict[str, Any]) -> Any:
    return kind(**{part.name: made[part.name] for part in fields(kind)})


def _front(start: Settings) -> dict[str, Any]:
    prompt = gr.Textbox(
        start.prompts[0],
        label="Prompt",
        lines=2,
        max_lines=6,
        elem_id="prompt",
        autofocus=True,
        max_length=scenes.LONGEST_PROMPT,
    )
    with gr.Row(elem_id="go"):
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        cancel = gr.Button("Cancel", elem_id="cancel")
    given = scenes.strengths(start)
    with gr.Group(elem_classes="dial"):
        lams = [
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
        meaning = gr.HTML(elem_id="meaning", padding=True)
    return {"prompt": prompt, "draw": draw, "cancel": cancel, "lams": lams, "meaning": meaning}


def _curve(start: Settings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        families = [(label, name) for name, label in FAMILIES.items()]
        made["family"] = gr.Dropdown(families, value="constant", label="Start from", elem_id="family")
        made["parameter"] = gr.Number(2.0, label="Its parameter, p or κ", elem_id="parameter", minimum=0)
    made["curve"] = gr.HTML(
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
    made["curve_export"] = gr.Code(
        "",
        language="python",
        label="As a schedule of the library",
        interactive=False,
        lines=1,
        elem_id="curve-export",
        wrap_lines=True,
        show_line_numbers=False,
    )
    with gr.Row():
        made["kept_curves"] = gr.Dropdown([], label="Kept curves", elem_id="kept-curves", value=None)
        made["curve_name"] = gr.Textbox(label="Keep this curve as", elem_id="curve-name", max_length=60)
    with gr.Row():
        made["keep_curve"] = gr.Button("Keep the curve", size="sm", elem_id="keep-curve")
        made["delete_curve"] = gr.Button("Delete the chosen curve", size="sm", elem_id="delete-curve")
    return made


def _sampling(start: Settings) -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        made["scheduler"] = gr.Dropdown([("the model's own", "")], value="", label="Scheduler", elem_id="scheduler")
        made["steps"] = gr.Slider(1, curves.MOST_STEPS, start.steps, step=1, label="Steps", elem_id="steps")
    with gr.Row():
        made["guidance_scale"] = gr.Number(
            None,
            label="Guidance scale",
            info="Empty for the usual one, 1.5 with the digits",
            elem_id="guidance",
            minimum=0,
            maximum=scenes.LARGEST_GUIDANCE,
        )
        made["seed"] = gr.Number(0, label="Seed", info="Of the noise", precision=0, elem_id="seed", minimum=0)
    made["new_seed"] = gr.Button("Another seed", elem_id="new-seed", size="sm")
    with gr.Row():
        made["width"] = gr.Number(None, label="Width", info="Empty for the usual", elem_id="width", precision=0)
        made["height"] = gr.Number(None, label="Height", info="Empty for the usual", elem_id="height", precision=0)
    made["negative_prompt"] = gr.Textbox(
        "", label="Negative prompt", elem_id="negative-prompt", max_length=scenes.LONGEST_PROMPT
    )
    made["preview"] = gr.Radio(
        list(PREVIEWS.items()), value="steps", label="Preview while the dial moves", elem_id="preview"
    )
    return made


def _models(start: Settings, references: list[str], anchors: list[str]) -> dict[str, Any]:
    return {
        "reference": gr.Dropdown(
            references,
            value=start.reference,
            label="Reference",
            allow_custom_value=True,
            elem_id="reference",
            info="digits, a folder of the list, or a hub id",
        ),
        "anchors": gr.Dropdown(
            anchors,
            value=list(start.anchors.values()),
            label="Anchors",
            multiselect=True,
            max_choices=scenes.MOST_ANCHORS,
            allow_custom_value=True,
            elem_id="anchors",
            info=f"The aligned models, {scenes.MOST_ANCHORS} at most; each gets a dial",
        ),
        "load": gr.Button("Load these models", elem_id="load"),
        "models_status": gr.HTML(elem_classes="status", elem_id="models-status"),
    }


def _image() -> dict[str, Any]:
    made: dict[str, Any] = {
        "picture": gr.Image(
            None,
            type="filepath",
            format="png",
            label="Image",
            interactive=False,
            height=440,
            buttons=["fullscreen"],
            elem_id="picture",
            elem_classes="picture",
        ),
        "status": gr.HTML(html.status("Loading …"), elem_classes="status", elem_id="status"),
    }
    with gr.Row(elem_id="with-image"):
        made["download"] = gr.DownloadButton("Download the PNG", elem_id="download", interactive=False)
        made["keep_a"] = gr.Button("Keep as A", elem_id="keep-a")
        made["keep_b"] = gr.Button("Keep as B", elem_id="keep-b")
    made["facts"] = gr.HTML(elem_classes="facts", elem_id="facts")
    made["judge"] = gr.Button(f"Judge it by {drawing.JUDGED} seeds", size="sm", elem_id="judge")
    made["judgement"] = gr.HTML(elem_id="judgement", padding=True)
    return made


def _strip() -> dict[str, Any]:
    made: dict[str, Any] = {}
    with gr.Row():
        made["strip_lams"] = gr.Textbox(
            STRIP,
            label="λ",
            info="A list or ranges, 0:1.5:0.25; of several anchors all dials are multiplied",
            elem_id="strip-lams",
            max_length=200,
        )
        made["draw_strip"] = gr.Button(
            "Draw the strip", variant="primary", elem_id="draw-strip", scale=0, min_width=170
        )
    made["strip_status"] = gr.HTML(elem_classes="status", elem_id="strip-status")
    made["strip"] = gr.Gallery(
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
    made["strip_table"] = gr.HTML(elem_classes="table", elem_id="strip-table")
    made["strip_download"] = gr.DownloadButton("Download the sheet", elem_id="strip-download", interactive=False)
    return made


def _comparison() -> dict[str, Any]:
    return {
        "sides": gr.HTML(html.sides(None, None), elem_id="sides"),
        "comparison": gr.ImageSlider(
            None,
            type="filepath",
            format="png",
            label="A on the left, B on the right; drag the divider",
            interactive=False,
            elem_id="comparison",
            elem_classes="comparison",
            max_height=480,
        ),
    }


def _sharing() -> dict[str, Any]:
    made: dict[str, Any] = {"share_status": gr.HTML(elem_classes="status", elem_id="share-status")}
    with gr.Row():
        made["presets"] = gr.Dropdown([], value=None, label="Presets", elem_id="presets")
        made["preset_name"] = gr.Textbox(label="Keep these settings as", elem_id="preset-name", max_length=60)
    with gr.Row():
        made["keep_preset"] = gr.Button("Keep the settings", size="sm", elem_id="keep-preset")
        made["delete_preset"] = gr.Button("Delete the chosen preset", size="sm", elem_id="delete-preset")
    code: dict[str, Any] = {"interactive": False, "wrap_lines": True, "lines": 1}
    made["link"] = gr.Code(
        "", language=None, label="Link to these settings", elem_id="link", show_line_numbers=False, **code
    )
    with gr.Row():
        made["paste"] = gr.Textbox(
            label="A link or settings string", elem_id="paste", max_length=scenes.LONGEST_LINK, max_lines=3
        )
        made["use_paste"] = gr.Button("Use it", elem_id="use-paste", scale=0)
    made["upload"] = gr.File(
        label="A PNG that deradiff wrote: its settings are taken",
        file_types=[".png"],
        type="filepath",
        elem_id="upload",
        height=150,
    )
    made["python"] = gr.Code("", language="python", label="The same in Python", elem_id="python", **code)
    made["shell"] = gr.Code("", language="shell", label="The same as a command", elem_id="shell", **code)
    return made


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
