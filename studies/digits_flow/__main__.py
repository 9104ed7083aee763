"""`python -m studies.digits_flow`: the digits' flow, made from nothing and measured."""

from pathlib import Path
from typing import Annotated

import typer

from deradiff.cli import terminal

app = typer.Typer(
    help="The digits' flow: make it from nothing, and measure it.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="Build folder. An interrupted build continues where it was.")],
) -> None:
    """Train the reference, on one core."""
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits_flow.build import build as build_all
        from studies.digits_flow.settings import FlowSettings

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        made = build_all(out, FlowSettings(), report)
    console.print(str(made))


@app.command()
def quality(
    folder: Annotated[Path, typer.Argument(help="The folder of a pipeline, OUT/reference of a build.")],
    samples: Annotated[int, typer.Option(min=10, help="Pictures to draw.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of Euler's method.")] = 28,
    guidance_scale: Annotated[float, typer.Option(min=1, help="Classifier-free guidance.")] = 1.5,
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
            from studies.digits_flow.reference import load

            pipe = load(folder)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("Drawing", total=samples)
            found = measure(
                pipe, samples, steps, guidance_scale, seed, tick=lambda done: progress.update(bar, completed=done)
            )
        show(console, found)


if __name__ == "__main__":
    app(prog_name="python -m studies.digits_flow")
