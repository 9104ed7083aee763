"""`python -m studies.closed_forms`: realignment against worlds whose aligned models are known exactly."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deradiff.cli import terminal

if TYPE_CHECKING:
    from studies.closed_forms.cases import Plan
    from studies.closed_forms.comparison import Record


app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def compare(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the results. An interrupted comparison continues there.")
    ] = Path("truth"),
    samples: Annotated[int | None, typer.Option(help="Samples of every run; 20000, or 2000 with --quick.")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps; 100, or 50 with --quick.")] = None,
    world: Annotated[
        list[str] | None,
        typer.Option(
            "--world",
            "-w",
            help="crossing, gaussian, random-2-peaked, random-4-linear or random-16-peaked; may be repeated. All by "
            "default, without the peaked ones with --quick.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A reduced grid: fewer worlds, samples and steps.")] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each; one per processor by default.")
    ] = None,
) -> None:
    """Compare every way of realigned sampling with the exact answer, in worlds where there is one.

    Writes a report with figures and tables, and the numbers of every case as JSON. Hundreds of runs: give it time.
    """
    with terminal.refusing_wrong_input(), terminal.progress("comparing") as on_step:
        from deradiff.sweep.workers import cores
        from studies.closed_forms import cases, comparison, report

        plan = cases.planned(quick=quick, worlds=tuple(world or ()), samples=samples, steps=steps)
        records = comparison.run(plan, out, on_step, workers or cores())
        files = report.write(records, plan, out)
    _print(records, plan)
    page, *pictures = files
    terminal.files([page, out / "cases", *pictures])


def _print(records: "list[Record]", plan: "Plan") -> None:
    from rich.table import Table

    from studies.closed_forms import report, tables

    console = terminal.LiteralConsole()
    table = Table(
        caption="The worst errors against the exactly aligned model, as shares of the exact shift, after two standard "
        "errors."
    )
    for heading in ("world", "runs", "Algorithm 1", "weighted mean", "particles"):
        table.add_column(heading, justify="left" if heading == "world" else "right")
    for row in tables.summary(records):
        table.add_row(*row)
    console.print(table)
    console.print(report.bounds_sentence(plan))
    for goal in tables.goals(records):
        words = f"{goal.words} {goal.worst:.2%}, at most {goal.limit:.0%} ({goal.runs} runs)"
        console.print(f"{'met' if goal.met else 'missed':<6}  {words}", style="green" if goal.met else "red")
    console.print(report.verdict_sentence(records).partition(" Dots")[0])


if __name__ == "__main__":
    app(prog_name="python -m studies.closed_forms")
