"""`python -m studies.digits_flow`: the digits' flow, made from nothing and measured."""

from pathlib import Path
from typing import Annotated

import typer

from deradiff.cli import terminal
from deradiff.worlds.digits_flow import GUIDANCE, reference_path

REFERENCE = reference_path()

app = typer.Typer(
    help="The digits' flow: make it from nothing, and measure it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="Build folder. An interrupted build continues where it was.")],
) -> None:
    """Train the reference, four anchors and two LoRAs: hours on two cores. Once made, the bits are the same every time.

    The result is OUT/files, the folder that ships with the package.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits_flow.build import build as build_all
        from studies.digits_flow.settings import FlowSettings

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        files = build_all(out, FlowSettings(), report)
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file()) / 1e6
    console.print(f"{files}: {size:.1f} MB. To ship it, copy it to src/deradiff/worlds/digits_flow/files.")


@app.command()
def truth(
    out: Annotated[Path, typer.Option("--out", help="Folder of models and cells. An interrupted run continues.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each; they change no bit.")] = 2,
    only: Annotated[str | None, typer.Option(help="Only this cell: dpo-0, rwr-0, dpo-1 or rwr-1.")] = None,
) -> None:
    """Train flows at the very strengths that λ stands for, and compare every way of sampling with them: hours.

    A cell is a method and a seed of training: OUT/cells/METHOD-SEED.json. `truth-table` prints what they say.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits_flow.truth import FlowTruth, run

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        files = run(out, FlowTruth.planned(), report, workers, only)
    terminal.files(files)


@app.command()
def truth_table(
    data: Annotated[Path, typer.Argument(help="Folder of cells.")] = Path("docs/data/digits-flow-truth"),
) -> None:
    """Print, in Markdown, what the cells in a folder say."""
    with terminal.refusing_wrong_input():
        terminal.pass_on_warnings()
        from studies.digits_flow import truth_report

        found = truth_report.load(data)
        if not found:
            raise ValueError(f"{data} holds no cells of the study: run `python -m studies.digits_flow truth --out OUT`")
        print(truth_report.table(found))


@app.command()
def quality(
    folder: Annotated[Path, typer.Argument(help="The folder of a pipeline.")] = REFERENCE,
    samples: Annotated[int, typer.Option(min=10, help="Pictures to draw.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Euler's method.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=1, help="Classifier-free guidance.")] = GUIDANCE,
    seed: Annotated[int, typer.Option(help="Of noise and prompts.")] = 0,
) -> None:
    """Measure legibility, colours, variety and memorisation, as `python -m studies.digits quality` does."""
    from rich.progress import Progress

    console = terminal.LiteralConsole()
    with terminal.refusing_wrong_input():
        with console.status("Loading torch and diffusers …"):
            terminal.pass_on_warnings()
            from deradiff.worlds.digits.quality import measure
            from studies.digits.quality_table import show
            from studies.digits_flow.models import EqualTokensPipeline
            from studies.digits_flow.reference import load

            pipe = EqualTokensPipeline.around(load(folder))
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("Drawing", total=samples)
            found = measure(
                pipe, samples, steps, guidance_scale, seed, tick=lambda done: progress.update(bar, completed=done)
            )
        show(console, found)


if __name__ == "__main__":
    app(prog_name="python -m studies.digits_flow")
