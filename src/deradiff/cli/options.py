"""The options that several commands have, each with its help written once, and the panels of `--help`."""

from enum import StrEnum
from typing import Annotated

import typer

MODELS, DIAL, SAMPLING, MACHINE, OUTPUT = "Models", "The dial", "Sampling", "Machine", "Output"

LARGEST_SEED = 2**31 - 1
"""Of a training: a step's own seed holds this one and the number of the step."""


class NumberFormat(StrEnum):
    """What models are computed in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class ScheduleClock(StrEnum):
    """What an annealed λ follows."""

    steps = "steps"
    time = "time"


# -- help that options in different panels share ----------------------------------------------------------------------

SCHEDULES = "constant, power:P, step:P, sigmoid:KAPPA or spline:S/λ,S/λ,...; multiplied with --lam."
DEVICES = "auto, cpu, cuda, cuda:1, mps, ..."
LORA_RANK = "Rank of the LoRA; 0 trains all weights."
GRADIENT_CHECKPOINTING = "Compute activations anew in the backward pass: less memory, more time."
HOST = "Where to listen; anything but this machine itself needs a token."
PORT = "0 takes one that is free."
ROOT_PATH = "The path under which a reverse proxy serves the pages, such as /deradiff."

# -- models -----------------------------------------------------------------------------------------------------------

Reference = Annotated[
    str, typer.Argument(help="The pretrained pipeline: a folder, a hub id, or `digits`, which ships with deradiff.")
]
Anchor = Annotated[
    list[str],
    typer.Option(
        "--anchor",
        "-a",
        help="The aligned model: a folder, a hub id, a LoRA or single-file checkpoint, digits:BETA or digits:lora. "
        "Several, each as NAME=SOURCE.",
        rich_help_panel=MODELS,
    ),
]
Revision = Annotated[str | None, typer.Option(help="The reference's revision on the hub.", rich_help_panel=MODELS)]
AnchorRevision = Annotated[str | None, typer.Option(help="The anchors' revision on the hub.", rich_help_panel=MODELS)]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Read .bin and .ckpt files, which can run code on your machine.",
        rich_help_panel=MODELS,
    ),
]

# -- the dial and the sampling ----------------------------------------------------------------------------------------

Over = Annotated[ScheduleClock, typer.Option(help="What the schedule runs over.", rich_help_panel=DIAL)]
Prompt = Annotated[
    list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.", rich_help_panel=SAMPLING)
]
Seeds = Annotated[
    list[str],
    typer.Option(
        "--seed", "-s", help="Seeds of every prompt: 7, a list (1,2,3) or a range (0:7).", rich_help_panel=SAMPLING
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        help="ddim, ddpm, euler, euler-a, heun, dpmpp, dpmpp-1, dpmpp-3, dpmpp-sde, unipc, lms, pndm, kdpm2, edm, "
        "flow-euler, flow-sde or flow-euler-sde; the model's own by default.",
        rich_help_panel=SAMPLING,
    ),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=SAMPLING)]
GuidanceScale = Annotated[
    float | None, typer.Option(help="The pipeline's own by default, 1.5 for the digits.", rich_help_panel=SAMPLING)
]
NegativePrompt = Annotated[str | None, typer.Option(rich_help_panel=SAMPLING)]
Side = Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=SAMPLING)]
TrainingSeed = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Decides all noise, and in training the order and a LoRA's start.")
]

# -- the machine and the output ---------------------------------------------------------------------------------------

BatchSize = Annotated[
    int, typer.Option(min=1, help="Images sampled together, those of every λ counted.", rich_help_panel=MACHINE)
]
Device = Annotated[str, typer.Option(help=DEVICES, rich_help_panel=MACHINE)]
Dtype = Annotated[
    NumberFormat, typer.Option(help="auto is float32 on a CPU and float16 elsewhere.", rich_help_panel=MACHINE)
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Keep on the device only the part that works.", rich_help_panel=MACHINE)
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the earlier result that the folder holds.", rich_help_panel=OUTPUT)
]
