"""`deradiff generate`: prompts and seeds at many λ, from the same noise, as single images and one labelled sheet."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from deradiff.cli import arguments, terminal
from deradiff.sweep import notation


class Over(StrEnum):
    """The clocks of a schedule."""

    steps = "steps"
    time = "time"


class Method(StrEnum):
    """How λ is applied."""

    mixture = "mixture"
    interpolate = "interpolate"


class Space(StrEnum):
    """Where the mixture is taken."""

    auto = "auto"
    prediction = "prediction"
    posterior = "posterior"


MODELS, DIAL, SAMPLING, MACHINE, OUTPUT = "Models", "The dial", "Sampling", "Machine", "Output"


def generate(
    context: arguments.Context,
    reference: Annotated[
        str, typer.Argument(help="The pretrained pipeline: a folder, a hub id, or `digits`, which ships with deradiff.")
    ],
    anchor: Annotated[
        list[str],
        typer.Option(
            "--anchor",
            "-a",
            help="The aligned model: a folder, a hub id, a LoRA or single-file checkpoint, digits:BETA or digits:lora. "
            "Several, each as NAME=SOURCE.",
            rich_help_panel=MODELS,
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.", rich_help_panel=SAMPLING)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file of prompts (.txt, .yaml, .json, .jsonl, .csv, .tsv, .parquet), or a list by name "
            "(partiprompts, ...).",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    lam: Annotated[
        list[str],
        typer.Option(
            "--lam",
            "-l",
            help="λ: a list (0,0.5,1) or an inclusive range (0:1.5:0.25). With several anchors, one column at a time: "
            "style=0.5,text=0.2 (may be repeated).",
            rich_help_panel=DIAL,
        ),
    ] = ["0:1.5:0.25"],  # noqa: B006 (Typer never changes it)
    schedule: Annotated[
        str,
        typer.Option(
            help="How λ grows from noise to image: constant, power:P, step:P, sigmoid:KAPPA or spline:S/λ,S/λ,...; "
            "multiplied with each --lam.",
            rich_help_panel=DIAL,
        ),
    ] = "constant",
    over: Annotated[Over, typer.Option(help="What the schedule runs over.", rich_help_panel=DIAL)] = Over.steps,
    anchor_beta: Annotated[
        float | None,
        typer.Option(
            help="The β the anchor was aligned at, to print β/λ (known for the digits).", rich_help_panel=DIAL
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="Mix the models' predictions, or run one model with interpolated weights (half the cost, inexact).",
            rich_help_panel=DIAL,
        ),
    ] = Method.mixture,
    path: Annotated[
        Space,
        typer.Option(
            help="Mix predictions or explicit posteriors; auto takes predictions where both agree.",
            rich_help_panel=DIAL,
        ),
    ] = Space.auto,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Carry predictions over between steps, with at most this error relative to λ's own effect (0.05): up "
            "to nearly half the cost, inexact.",
            rich_help_panel=DIAL,
        ),
    ] = None,
    reuse: Annotated[
        int | None,
        typer.Option(min=1, help="The same by a fixed rule: all models at every so many steps.", rich_help_panel=DIAL),
    ] = None,
    particles: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Draw every image from this many weighted particles: exact as they grow, at so many times the cost.",
            rich_help_panel=DIAL,
        ),
    ] = None,
    seed: Annotated[
        list[str],
        typer.Option("--seed", "-s", help="Seeds: 7, a list (1,2,3) or a range (0:7).", rich_help_panel=SAMPLING),
    ] = ["0"],  # noqa: B006
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, euler, euler-a, heun, dpmpp, dpmpp-1, dpmpp-3, dpmpp-sde, unipc, lms, pndm, kdpm2, edm, "
            "flow-euler, flow-sde or flow-euler-sde; the model's own by default.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=SAMPLING)] = 25,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The pipeline's own by default, 1.5 for the digits.", rich_help_panel=SAMPLING)
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(rich_help_panel=SAMPLING)] = None,
    height: Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=SAMPLING)] = None,
    width: Annotated[int | None, typer.Option(min=1, help="In pixels.", rich_help_panel=SAMPLING)] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images sampled together; each λ is one.", rich_help_panel=MACHINE)
    ] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...", rich_help_panel=MACHINE)] = "auto",
    dtype: Annotated[
        arguments.Dtype, typer.Option(help=arguments.DTYPES, rich_help_panel=MACHINE)
    ] = arguments.Dtype.auto,
    offload: Annotated[
        bool, typer.Option("--offload", help="Keep on the device only the part that works.", rich_help_panel=MACHINE)
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="The reference's revision on the hub.", rich_help_panel=MODELS)
    ] = None,
    anchor_revision: Annotated[
        str | None, typer.Option(help="The anchors' revision on the hub.", rich_help_panel=MODELS)
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read .bin and .ckpt files, which can run code on your machine.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new or empty folder for the results.", rich_help_panel=OUTPUT)
    ] = Path("deradiff-out"),
    force: Annotated[
        bool, typer.Option("--force", help="Replace the run that the folder holds.", rich_help_panel=OUTPUT)
    ] = False,
) -> None:
    """Sample prompts at many λ, from the same noise for every λ: a contact sheet, single images, a JSON record."""
    with terminal.refusing_wrong_input():
        anchors = arguments.anchors(anchor)
        shape = notation.schedule(schedule, over.value)
        if shape is None:
            arguments.refuse(context, ["over"], "a λ that stays the same runs over nothing; name a --schedule")
        else:
            arguments.refuse(context, ["anchor_beta"], "β/λ is of a λ that stays the same, without a --schedule")
        annealed = shape.to_dict() if shape else None
        chosen: dict[str, Any] = {
            "reference": reference,
            "anchors": anchors,
            "prompts": arguments.prompts(prompt or (), prompts),
            "columns": [{"lam": lam, "schedule": annealed} for lam in arguments.lams(lam, tuple(anchors))],
            "seeds": notation.seeds(seed),
            "scheduler": scheduler,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "negative_prompt": negative_prompt,
            "height": height,
            "width": width,
            "method": method.value,
            "path": path.value,
            "dtype": dtype.value,
            "device": device,
            "offload": offload,
            "revision": revision,
            "anchor_revision": anchor_revision,
            "allow_pickle": allow_pickle,
            "batch_size": batch_size,
            "particles": particles,
            "reuse": reuse,
            "tolerance": tolerance,
        }
        with terminal.progress("sampling") as on_step:
            from deradiff.files.folders import RunFolder
            from deradiff.sweep.drawing import draw, realigned
            from deradiff.sweep.pipelines import known_beta
            from deradiff.sweep.settings import Settings

            if anchor_beta is None and len(anchors) == 1:
                anchor_beta = known_beta(*anchors.values())
            settings = Settings(**chosen, anchor_beta=anchor_beta)
            with RunFolder(out, force=force) as folder, realigned(settings) as (pipe, dial):
                verdicts = draw(settings, pipe, dial, folder, on_step)
    _print_verdicts(verdicts)
    count = len(settings.rows) * len(settings.columns)
    terminal.files([folder.sheet, folder.record, f"{folder.images} ({count} images)"])


def _print_verdicts(verdicts: list[dict[str, Any]]) -> None:
    """What every λ is worth, one line each; what is true of all of them only once."""
    from rich.table import Table

    table = Table("λ", "effective", "path KL", "verdict", title="How far to trust it", title_justify="left")
    mixed = [judged for judged in verdicts if judged["kind"] == "no target"]
    words = {judged["words"].partition(". As a diagnostic")[0] for judged in mixed}
    shared = words.pop() if len(words) == 1 else None
    for judged in verdicts:
        lam = judged["lam"]
        by_name = lam if isinstance(lam, dict) else {"": lam}
        named = " ".join(f"{name} {notation.plain(x)}".strip() for name, x in by_name.items())
        drawn_from = judged.get("particles", judged.get("images"))
        several = drawn_from and drawn_from > judged.get("prompts", 0)
        effective = f"{judged['effective']:.3g} of {drawn_from}" if several else ""
        kl = judged.get("path_kl")
        said = judged["words"]
        if shared and judged["kind"] == "no target":
            said = said.removeprefix(shared).removeprefix(". As a diagnostic, ") or "no exact target"
        table.add_row(named, effective, "" if not kl or kl[0] is None else f"{kl[0]:.3g}", said)
    console = terminal.LiteralConsole()
    console.print(table)
    if shared:
        console.print(f"{shared[0].upper()}{shared[1:]}.", soft_wrap=True)
