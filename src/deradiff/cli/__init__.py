"""The command line. Commands are thin: they parse, call the library, and print; torch is imported by the call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deradiff import __version__
from deradiff.cli import (
    align,
    bake,
    comfyui,
    cost,
    demo,
    doctor,
    examine,
    experiment,
    generate,
    search,
    studio,
    study,
    terminal,
)


class Commands(TyperGroup):
    """The commands, whose refusals of options show what was given without its control characters."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """As Typer's."""
        with _printable_refusals():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """As Typer's."""
        with _printable_refusals():
            return super().invoke(ctx)


@contextmanager
def _printable_refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):  # one of Click's, which newer versions of Typer bring along
            error.message = terminal.printable(error.message)  # type: ignore[attr-defined]
        raise


app = typer.Typer(
    cls=Commands,
    name="deradiff",
    help="One dial for how aligned a diffusion model is: realigned sampling for any diffusers pipeline.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate.generate)
app.command()(align.align)
app.command()(bake.bake)
app.command()(comfyui.comfyui)
app.command()(cost.cost)
app.command()(demo.demo)
app.command()(doctor.doctor)
app.command()(examine.examine)
app.command()(search.search)
app.command()(studio.studio)
app.add_typer(experiment.app, name="experiment")
app.add_typer(study.app, name="study")


def _print_version(asked: bool) -> bool:
    if asked:
        terminal.echo(__version__)
        raise typer.Exit
    return asked


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass
