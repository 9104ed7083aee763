"""The options that several commands have, each with its help written once, and the panels of `--help`."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import typer

from deradiff.algorithm import schedules

NumberFormat = Literal["auto", "float32", "float16", "bfloat16"]
"""What models are computed in."""


def panel(name: str) -> Callable[..., Any]:
    """`typer.Option` for the options that stand in one panel of `--help`."""
    return partial(typer.Option, rich_help_panel=name)


model_option, dial_option, sampling_option = panel("Models"), panel("The dial"), panel("Sampling")
machine_option, output_option, page_option = panel("Machine"), panel("Output"), panel("The page")

LARGEST_SEED = 2**31 - 1
"""Of a training: a step's own seed holds this one and the number of the step."""


# -- help that options in different panels share ----------------------------------------------------------------------

SCHEDULES = "constant, power:P, step:P, sigmoid:KAPPA or spline:S/λ,S/λ,...; multiplied with --lam."
LORA_RANK = "Rank of the LoRA; 0 trains all weights."
GRADIENT_CHECKPOINTING = "Compute activations anew in the backward pass: less memory, more time."

# -- models -----------------------------------------------------------------------------------------------------------

Reference = Annotated[
    str, typer.Argument(help="The pretrained pipeline: a folder, a hub id, or `digits` or `digits-flow`, which ship.")
]
Anchor = Annotated[
    list[str],
    model_option(
        "--anchor",
        "-a",
        help="The aligned model: a folder, a hub id, a LoRA or single-file checkpoint, digits:BETA, digits-flow:grpo. "
        "Several, each as NAME=SOURCE.",
    ),
]
Revision = Annotated[str | None, model_option(help="The reference's revision on the hub.")]
AnchorRevision = Annotated[str | None, model_option(help="The anchors' revision on the hub.")]
AllowPickle = Annotated[
    bool, model_option("--allow-pickle", help="Read .bin and .ckpt files, which can run code on your machine.")
]

# -- the dial and the sampling ----------------------------------------------------------------------------------------

Over = Annotated[schedules.Over, dial_option(help="What the schedule runs over.")]
Prompt = Annotated[list[str] | None, sampling_option("--prompt", "-p", help="A prompt; may be repeated.")]
Seeds = Annotated[
    list[str], sampling_option("--seed", "-s", help="Seeds of every prompt: 7, a list (1,2,3) or a range (0:7).")
]
Scheduler = Annotated[
    str | None,
    sampling_option(
        help="ddim, ddpm, euler, euler-a, heun, dpmpp, dpmpp-1, dpmpp-3, dpmpp-sde, unipc, lms, pndm, kdpm2, edm, "
        "flow-euler, flow-sde or flow-euler-sde; the model's own by default."
    ),
]
Steps = Annotated[int, sampling_option(min=1, help="Sampling steps.")]
GuidanceScale = Annotated[
    float | None, sampling_option(help="The pipeline's own by default, 1.5 for the digits, 1.1 for the flow digits.")
]
NegativePrompt = Annotated[str | None, sampling_option()]
Side = Annotated[int | None, sampling_option(min=1, help="In pixels.")]
TrainingSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Decides all noise, and in training the order and a LoRA's start.")
]

# -- a server's pages -------------------------------------------------------------------------------------------------

Host = Annotated[str, page_option(help="Where to listen; anything but this machine itself needs a token.")]
Port = Annotated[int, page_option(min=0, max=65535, help="0 takes one that is free.")]
RootPath = Annotated[str, page_option(help="The path under which a reverse proxy serves the pages, such as /deradiff.")]

# -- the machine and the output ---------------------------------------------------------------------------------------

BatchSize = Annotated[int, machine_option(min=1, help="Images sampled together, those of every λ counted.")]
Device = Annotated[str, machine_option(help="auto, cpu, cuda, cuda:1, mps, ...")]
Dtype = Annotated[NumberFormat, machine_option(help="auto is float32 on a CPU and float16 elsewhere.")]
Offload = Annotated[bool, machine_option("--offload", help="Keep on the device only the part that works.")]
Force = Annotated[bool, output_option("--force", help="Replace the earlier result that the folder holds.")]
