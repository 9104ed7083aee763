"""`deradiff generate`: prompts and seeds at many λ, from the same noise, as single images and one labelled sheet."""

from pathlib import Path
from typing import Annotated, Any, Literal

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import dial_option, output_option, sampling_option
from deradiff.sweep import notation


def generate(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    prompt: options.Prompt = None,
    prompts: Annotated[
        str | None,
        sampling_option(
            help="A file of prompts (.txt, .yaml, .json, .jsonl, .csv, .tsv, .parquet), or a list by name "
            "(partiprompts, ...)."
        ),
    ] = None,
    lam: Annotated[
        list[str],
        dial_option(
            "--lam",
            "-l",
            help="λ: a list (0,0.5,1) or an inclusive range (0:1.5:0.25). With several anchors, one column at a time: "
            "style=0.5,text=0.2 (may be repeated).",
        ),
    ] = ["0:1.5:0.25"],  # noqa: B006 (Typer never changes it)
    schedule: Annotated[str, dial_option(help=f"How λ grows from noise to image: {options.SCHEDULES}")] = "constant",
    over: options.Over = "steps",
    anchor_beta: Annotated[
        float | None, dial_option(help="The β the anchor was aligned at, to print β/λ (known for the digits).")
    ] = None,
    method: Annotated[
        Literal["mixture", "interpolate"],
        dial_option(
            help="Mix the models' predictions, or run one model with interpolated weights (half the cost, inexact)."
        ),
    ] = "mixture",
    path: Annotated[
        Literal["auto", "prediction", "posterior"],
        dial_option(help="Mix predictions or explicit posteriors; auto takes predictions where both agree."),
    ] = "auto",
    text_encoder: Annotated[
        Literal["reference", "both"],
        dial_option(
            help="Whose text encoders encode prompts: the reference's for all models, or for an anchor these with the "
            "parts that its LoRA has for them."
        ),
    ] = "reference",
    tolerance: Annotated[
        float | None,
        dial_option(
            help="Carry predictions over between steps, with at most this error relative to λ's own effect (0.05): up "
            "to nearly half the cost, inexact."
        ),
    ] = None,
    reuse: Annotated[
        int | None, dial_option(min=1, help="The same by a fixed rule: all models at every so many steps.")
    ] = None,
    particles: Annotated[
        int | None,
        dial_option(
            min=1,
            help="Draw every image from this many weighted particles: exact as they grow, at so many times the cost.",
        ),
    ] = None,
    character: Annotated[
        Path | None,
        dial_option(help="What `deradiff examine` wrote of this anchor, for a verdict that knows its kind."),
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
    dtype: options.Dtype = "auto",
    offload: options.Offload = False,
    revision: options.Revision = None,
    anchor_revision: options.AnchorRevision = None,
    allow_pickle: options.AllowPickle = False,
    out: Annotated[Path, output_option("--out", "-o", help="A new or empty folder for the results.")] = Path(
        "deradiff-out"
    ),
    force: options.Force = False,
) -> None:
    """Sample prompts at many λ, from the same noise for every λ: a contact sheet, single images, a JSON record."""
    with terminal.refusing_wrong_input():
        anchors = arguments.anchors(anchor)
        if len(anchors) > 1:
            arguments.refuse(context, ["character"], "a character is one anchor's, and there are several")
        shape = notation.schedule(schedule, over)
        if shape is None:
            arguments.refuse(context, ["over"], "a λ that stays the same runs over nothing; name a --schedule")
        else:
            arguments.refuse(context, ["anchor_beta"], "β/λ is of a λ that stays the same, without a --schedule")
        annealed = shape.to_dict() if shape else None
        chosen: dict[str, Any] = {
            "anchors": anchors,
            "prompts": arguments.prompts(prompt or (), prompts),
            "columns": [{"lam": lam, "schedule": annealed} for lam in arguments.lams(lam, tuple(anchors))],
            "seeds": notation.seeds(seed),
        }
        with terminal.progress("sampling") as on_step:
            from deradiff.files.folders import RunFolder
            from deradiff.sweep.alignment_records import known_beta
            from deradiff.sweep.drawing import draw, realigned
            from deradiff.sweep.settings import Settings

            if anchor_beta is None and len(anchors) == 1:
                chosen["anchor_beta"] = known_beta(*anchors.values())
            settings = Settings(**arguments.values(context, Settings.model_fields) | chosen)
            known_character = None
            if character is not None:
                from deradiff.sweep.characters import load_character

                (source,) = anchors.values()
                known_character = load_character(
                    character, reference, source, revision=revision, anchor_revision=anchor_revision
                )
            with RunFolder(out, force=force) as folder, realigned(settings) as (pipe, dial):
                verdicts = draw(settings, pipe, dial, folder, on_step, known_character=known_character)
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
