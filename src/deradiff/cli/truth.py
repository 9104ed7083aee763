"""`deradiff truth`: realignment against worlds whose aligned models are known exactly."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deradiff.cli import talking

if TYPE_CHECKING:
    from deradiff.worlds.comparison import Record
    from deradiff.worlds.comparison_cases import Plan


def truth(
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
    with talking.refusing_wrong_input(), talking.progress("comparing") as on_step:
        from deradiff.jobs import cores
        from deradiff.worlds import comparison, comparison_cases, comparison_report

        plan = comparison_cases.planned(quick=quick, worlds=tuple(world or ()), samples=samples, steps=steps)
        records = comparison.run(plan, out, on_step, workers or cores())
        files = comparison_report.write(records, plan, out)
    _print(records, plan)
    report, *figures = files
    talking.files([report, out / "cases", *figures])


def _print(records: "list[Record]", plan: "Plan") -> None:
    from rich.table import Table

    from deradiff.worlds import comparison_report, comparison_tables

    console = talking.LiteralConsole()
    table = Table(
        caption="The worst errors against the exactly aligned model, as shares of the exact shift, after two standard "
        "errors."
    )
    for heading in ("world", "runs", "Algorithm 1", "weighted mean", "particles"):
        table.add_column(heading, justify="left" if heading == "world" else "right")
    for row in comparison_tables.summary(records):
        table.add_row(*row)
    console.print(table)
    console.print(comparison_report.bounds_sentence(plan))
    for goal in comparison_tables.goals(records):
        words = f"{goal.words} {goal.worst:.2%}, at most {goal.limit:.0%} ({goal.runs} runs)"
        console.print(f"{'met' if goal.met else 'missed':<6}  {words}", style="green" if goal.met else "red")
    console.print(comparison_report.verdict_sentence(records).partition(" Dots")[0])
