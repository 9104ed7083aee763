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
    """Train the reference: an hour on one core."""
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits_flow.build import build as build_all
        from studies.digits_flow.settings import FlowSettings

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        made = build_all(out, FlowSettings(), report)
    console.print(str(made))


if __name__ == "__main__":
    app()
