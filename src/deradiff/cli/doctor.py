"""`deradiff doctor`: does realignment work with this pipeline and this anchor? The answer by drawing with both."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import dial_option, sampling_option

if TYPE_CHECKING:
    from deradiff.sampling.doctor import PipelineCheck, PipelineReport

_VERDICTS = {True: "holds", False: "FAILS", None: "-"}


def doctor(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    lam: Annotated[
        float, dial_option("--lam", "-l", help="Where it is held against the mixture by hand, besides 0 and 1.")
    ] = 0.5,
    prompt: Annotated[str | None, sampling_option("--prompt", "-p", help="A prompt of your own.")] = None,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 2,
    guidance_scale: options.GuidanceScale = None,
    height: options.Side = None,
    width: options.Side = None,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    revision: options.Revision = None,
    anchor_revision: options.AnchorRevision = None,
    allow_pickle: options.AllowPickle = False,
) -> None:
    """See on your own models that λ does what it should: latents of two steps, held against plain pipelines.

    Exit status 0 where everything holds, 1 where something fails or is refused, 2 for wrong input.
    """
    with terminal.refusing_wrong_input("try --dtype float16 or bfloat16, or a smaller --height and --width"):
        anchors = arguments.anchors(anchor)
        with terminal.progress("checking"):
            from deradiff.sweep.examining import examined, usual_prompt
            from deradiff.sweep.settings import Settings

            given = arguments.values(context, Settings.model_fields)
            prompts = [usual_prompt(reference) if prompt is None else prompt]
            chosen: dict[str, Any] = {"anchors": anchors, "prompts": prompts, "columns": [{"lam": lam}], "seeds": [0]}
            report = examined(Settings(**given | chosen), lam)
    _print(report)
    raise typer.Exit(0 if report.holds else 1)


def _print(report: "PipelineReport") -> None:
    """What was looked at, a line for every check, and what it comes to."""
    for name, words in report.facts.items():
        terminal.echo(f"{name}: {words}")
    terminal.echo("")
    for check in report.checks:
        terminal.echo(_line(check))
    terminal.echo("")
    failed = sum(check.holds is False for check in report.checks)
    if report.refused is not None:
        terminal.echo(f"refused: {' '.join(report.refused.split())}")
    elif failed:
        terminal.echo(f"{failed} of {len(report.checks)} checks fail: do not trust λ with this pipeline as it is.")
    else:
        terminal.echo("It works with these models.")


def _line(check: "PipelineCheck") -> str:
    number = "" if check.number is None else f"{check.number:.2g}"
    return f"{_VERDICTS[check.holds]:<5}  {check.name}: {' '.join(f'{number} {check.words}'.split())}".rstrip(": ")
