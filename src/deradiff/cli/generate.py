"""`deradiff generate`: prompts and seeds at many λ, from the same noise, as single images and one labelled sheet."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import DIAL, OUTPUT, SAMPLING
from deradiff.sweep import notation


class SamplingMethod(StrEnum):
    """How λ is applied."""

    mixture = "mixture"
    interpolate = "interpolate"


class MixtureSpace(StrEnum):
    """Where the mixture is taken."""

    auto = "auto"
    prediction = "prediction"
    posterior = "posterior"


def generate(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    prompt: options.Prompt = None,
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
            help=f"How λ grows from noise to image: {options.SCHEDULES}",
            rich_help_panel=DIAL,
        ),
    ] = "constant",
    over: options.Over = options.ScheduleClock.steps,
    anchor_beta: Annotated[
        float | None,
        typer.Option(
            help="The β the anchor was aligned at, to print β/λ (known for the digits).", rich_help_panel=DIAL
        ),
    ] = None,
    method: Annotated[
        SamplingMethod,
        typer.Option(
            help="Mix the models' predictions, or run one model with interpolated weights (half the cost, inexact).",
            rich_help_panel=DIAL,
        ),
    ] = SamplingMethod.mixture,
    path: Annotated[
        MixtureSpace,
        typer.Option(
            help="Mix predictions or explicit posteriors; auto takes predictions where both agree.",
            rich_help_panel=DIAL,
        ),
    ] = MixtureSpace.auto,
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
    seed: options.Seeds = ["0"],  # noqa: B006
    scheduler: options.Scheduler = None,
    steps: options.Steps = 25,
    guidance_scale: options.GuidanceScale = None,
    negative_prompt: options.NegativePrompt = None,
    height: options.Side = None,
    width: options.Side = None,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: options.Dtype = options.NumberFormat.auto,
    offload: options.Offload = False,
    revision: options.Revision = None,
    anchor_revision: options.AnchorRevision = None,
    allow_pickle: options.AllowPickle = False,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A new or empty folder for the results.", rich_help_panel=OUTPUT)
    ] = Path("deradiff-out"),
    force: options.Force = False,
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
    reasons = {judged["words"].partition(". As a diagnostic")[0] for judged in mixed}
    shared = reasons.pop() if len(reasons) == 1 else None
    for judged in verdicts:
        lam = judged["lam"]
        by_name = lam if isinstance(lam, dict) else {"": lam}
        named = " ".join(f"{name} {notation.plain(x)}".strip() for name, x in by_name.items())
        drawn_from = judged.get("particles", judged.get("images"))
        several = drawn_from and drawn_from > judged.get("prompts", 0)
        effective = f"{judged['effective']:.3g} of {drawn_from}" if several else ""
        kl = judged.get("path_kl")
        verdict = judged["words"]
        if shared and judged["kind"] == "no target":
            verdict = verdict.removeprefix(shared).removeprefix(". As a diagnostic, ") or "no exact target"
        table.add_row(named, effective, "" if not kl or kl[0] is None else f"{kl[0]:.3g}", verdict)
    console = terminal.LiteralConsole()
    console.print(table)
    if shared:
        console.print(f"{shared[0].upper()}{shared[1:]}.", soft_wrap=True)
