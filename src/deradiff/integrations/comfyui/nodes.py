"""The nodes as plain data, and what each does: `registering` makes of them what a version of ComfyUI wants to have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from deradiff.algorithm.schedules import Constant
from deradiff.sweep import notation

CATEGORY = "deradiff"

CURVE, STRIP = "REALIGN_CURVE", "REALIGN_STRIP"
"""Types of our own: a schedule, and a tuple of λ."""

WIDGETS = ("FLOAT", "STRING", "COMBO")
"""Types that a person sets on the node, unless the field is a socket."""


@dataclass(frozen=True)
class NodeInput:
    """An input: its type, a tooltip, and what a widget needs (default, min, max, step; options of a COMBO)."""

    name: str
    type: str
    tooltip: str
    options: Mapping[str, Any] = field(default_factory=dict)
    required: bool = True
    socket: bool = False
    files: str = ""
    """The folder of the host's whose files a COMBO offers."""

    @property
    def widget(self) -> bool:
        """Whether it is set on the node."""
        return self.type in WIDGETS and not self.socket


@dataclass(frozen=True)
class NodeOutput:
    """An output: its type, and a tooltip."""

    name: str
    type: str
    tooltip: str


@dataclass(frozen=True)
class NodeDescription:
    """A node: how it is called, what it takes and makes, and the function of its inputs that makes it."""

    id: str
    title: str
    description: str
    inputs: tuple[NodeInput, ...]
    outputs: tuple[NodeOutput, ...]
    run: Callable[..., tuple[Any, ...]]


GUIDED = (
    "Each model's own guided prediction is mixed, with whatever guidance it has: CFG, rescaled or not. Options set "
    "behind this node (RescaleCFG, a shift) act on both models; so no kind of guidance is approximated"
)

REFERENCE = NodeInput("reference", "MODEL", "The model as it was before alignment: λ = 0")
ALIGNED = NodeInput(
    "aligned", "MODEL", "The aligned model: λ = 1. Another checkpoint, or the reference behind a LoRA loader"
)
DIAL = (
    NodeInput(
        "lam",
        "FLOAT",
        "λ: 0 is the reference, 1 the aligned model; above 1 and below 0 it goes further than either",
        {"default": 0.5, "min": -5.0, "max": 5.0, "step": 0.01, "round": 0.0001},
    ),
    NodeInput(
        "schedule",
        "COMBO",
        "How λ grows from noise to image (annealed importance guidance). constant: it stays",
        {"options": ["constant", *notation.FAMILIES], "default": "constant"},
    ),
    NodeInput(
        "parameter",
        "FLOAT",
        "The schedule's number: the exponent of power; of step, the part of the run at the end that is aligned (0 to "
        "1); how steep the sigmoid is (10)",
        {"default": 2.0, "min": 0.0, "max": 100.0, "step": 0.05, "round": 0.0001},
    ),
    NodeInput(
        "method",
        "COMBO",
        "mixture: both models' predictions, two evaluations a step. interpolate: one model with interpolated weights, "
        "half the cost and inexact, for a model and its LoRA",
        {"options": ["mixture", "interpolate"], "default": "mixture"},
    ),
    NodeInput(
        "tolerance",
        "FLOAT",
        "0 is exact. Above, predictions are carried over between steps, with at most about this error relative to λ's "
        "own effect (0.05): up to nearly half the cost. For samplers that evaluate once a step",
        {"default": 0.0, "min": 0.0, "max": 0.9, "step": 0.01, "round": 0.0001},
    ),
    NodeInput("curve", CURVE, "λ over the run from Realign Curve, multiplied by lam, in place of schedule", {}, False),
    NodeInput(
        "values",
        "FLOAT",
        "λ over the run as a list of numbers from another node, one per step, multiplied by lam, in place of schedule",
        {},
        False,
        True,
    ),
    NodeInput(
        "strip", STRIP, "Several λ from Realign Strip, in place of lam: one image for each, same noise", {}, False
    ),
)
GUIDANCE = (
    NodeInput("positive", "CONDITIONING", "The prompt, for both models"),
    NodeInput("negative", "CONDITIONING", "What not to draw, for both models"),
    NodeInput(
        "cfg", "FLOAT", "Guidance, of each model by itself", {"default": 7.0, "min": 0.0, "max": 100.0, "step": 0.1}
    ),
)
REALIGNED = NodeOutput("realigned", "MODEL", "The mixture, for KSampler and every guider. " + GUIDED)


def realign_model(reference: Any, aligned: Any, **dial: Any) -> tuple[Any]:
    """Two models as one."""
    from deradiff.integrations.comfyui.realigned_model import realigned

    return (realigned(reference, aligned, dial_of(**dial)),)


def realign_guider(reference: Any, aligned: Any, positive: Any, negative: Any, cfg: float, **dial: Any) -> tuple[Any]:
    """The host's own guider, on two models as one."""
    from comfy.samplers import CFGGuider

    guider = CFGGuider(*realign_model(reference, aligned, **dial))
    guider.set_conds(positive, negative)
    guider.set_cfg(cfg)
    return (guider,)


def realign_lora(reference: Any, lora_name: str, strength: float, **dial: Any) -> tuple[Any, Any]:
    """A model and a LoRA of it as one; and that model with the LoRA, by itself."""
    from deradiff.integrations.comfyui.lora_files import with_lora

    aligned = with_lora(reference, lora_name, strength)
    return (*realign_model(reference, aligned, **dial), aligned)


def realign_curve(json: str) -> tuple[Any]:
    """The curve in a text."""
    from deradiff.integrations.comfyui.runs import curve_of

    return (curve_of(json),)


def realign_strip(lams: str) -> tuple[tuple[float, ...]]:
    """The λ in a text."""
    return (tuple(notation.numbers(lams, "λ")),)


def dial_of(
    lam: float,
    schedule: str = "constant",
    parameter: float = 2.0,
    method: Any = "mixture",
    tolerance: float = 0.0,
    curve: Any = None,
    values: Any = None,
    strip: tuple[float, ...] | None = None,
) -> Any:
    """What the nodes' widgets say of λ, as a `DialSettings`. Raises `ValueError` for what is outside its range."""
    from deradiff.integrations.comfyui.runs import DialSettings, schedule_of
    from deradiff.sampling.reuse import Reuse

    shape = schedule_of(1.0, schedule, parameter, curve, values)
    lams = (lam,) if strip is None else strip
    schedules = tuple(Constant(number) if shape == Constant(1.0) else shape.scaled(number) for number in lams)
    return DialSettings(schedules, method, Reuse(tolerance=tolerance) if tolerance else None)


NODES = (
    NodeDescription(
        "RealignModel",
        "Realign Model",
        "The strength of an alignment as a dial between two models, for KSampler and every other sampler. " + GUIDED,
        (REFERENCE, ALIGNED, *DIAL),
        (REALIGNED,),
        realign_model,
    ),
    NodeDescription(
        "RealignGuider",
        "Realign Guider",
        "The strength of an alignment as a dial between two models, for SamplerCustomAdvanced. " + GUIDED,
        (REFERENCE, ALIGNED, *GUIDANCE, *DIAL),
        (NodeOutput("guider", "GUIDER", "For SamplerCustomAdvanced"),),
        realign_guider,
    ),
    NodeDescription(
        "RealignLora",
        "Realign LoRA",
        "A LoRA whose strength mixes predictions, not weights; the model is in memory once. The LoRA's part for text "
        "encoders is left out, so that both models see the same prompt. " + GUIDED,
        (
            REFERENCE,
            NodeInput("lora_name", "COMBO", "The LoRA that aligns the model (.safetensors)", {}, files="loras"),
            NodeInput(
                "strength",
                "FLOAT",
                "The LoRA's own strength, at which it is the aligned model: 1, unless its author says otherwise",
                {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01},
            ),
            *DIAL,
        ),
        (REALIGNED, NodeOutput("aligned", "MODEL", "The model with the LoRA, for Realign Guider")),
        realign_lora,
    ),
    NodeDescription(
        "RealignCurve",
        "Realign Curve",
        "A curve that deradiff's studio kept: paste the JSON of its file. The workflow then says all of it.",
        (
            NodeInput(
                "json",
                "STRING",
                "As the studio keeps it",
                {"default": '{"schedule": "Power", "p": 2.0, "lam": 1.0, "over": "steps"}', "multiline": True},
            ),
        ),
        (NodeOutput("curve", CURVE, "For the nodes with a dial"),),
        realign_curve,
    ),
    NodeDescription(
        "RealignStrip",
        "Realign Strip",
        "Several λ, each an image from the same noise: numbers and ranges, as in 0:1:0.25 or 0, 0.5, 1, 1.5.",
        (NodeInput("lams", "STRING", "Numbers with commas, and ranges FIRST:LAST:STEP", {"default": "0:1:0.25"}),),
        (NodeOutput("strip", STRIP, "For the nodes with a dial"),),
        realign_strip,
    ),
)
