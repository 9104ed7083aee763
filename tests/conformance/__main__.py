"""`python tests/conformance CHECKOUT`: deradiff held against diffusers' own pipeline tests. See README.md."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded: see stand_ins.py

app = typer.Typer(context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def main(
    checkout: Annotated[Path, typer.Argument(help="A checkout of diffusers, near the installed version.")],
    parts: Annotated[
        list[str] | None, typer.Argument(help="Parts of tests' names, as sd3 or flux.test_flux_fill. All by default.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the results; those of other tests stay there.")
    ] = Path("conformance-results"),
    limit: Annotated[float, typer.Option(min=1, help="Seconds for one test class.")] = 90,
    memory: Annotated[float, typer.Option(min=1, help="Gigabytes for one test class.")] = 8,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Test classes at once, of one thread each.")] = 1,
    axes: Annotated[
        Path | None, typer.Option(help="Write the table of batch axes too, as src/deradiff/sampling/batch_axes.json.")
    ] = None,
    add: Annotated[
        Path | None, typer.Option(help="Add the pipelines of this run to those in this pipelines.json, too.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out tests whose results lie in OUT.")] = False,
) -> None:
    """Hold deradiff against diffusers' own pipeline tests, all of them or some: all take hours on one core."""
    from rich.console import Console

    from report import added, line, show, summary, write

    console = Console()
    if not console.is_terminal:
        console.width = 160
    with console.status("Importing the tests …"):
        classes, problems = _prepared(checkout, parts or [])
        from batch_axes import write_table
        from children import Limits, run_all
        from discovery import date_of
        from own_cases import LEFT_OUT
        from results import Result
        from trial import name_of

    results = out / "results"
    if resume:
        classes = [c for c in classes if not (results / f"{name_of(c)}.json").exists()]
    console.print(f"{len(classes)} test classes; {len(problems)} modules do not import", *problems.values(), sep="\n")
    run_all(classes, results, Limits(limit, memory), jobs, lambda result: console.print(line(result)))
    known = [Result.load(file) for file in sorted(results.glob("*.json"))]
    record = summary(known, date_of(checkout), problems, LEFT_OUT)
    if axes is not None:
        write_table(known, axes)
    write(record, out / "pipelines.json")
    if add is not None:
        try:
            write(added(json.loads(add.read_text(encoding="utf-8")), record), add)
        except ValueError as error:
            raise typer.BadParameter(f"{add} is of {error}") from None
    show(record, console)
    console.print(f"{out / 'pipelines.json'}, {results}")


def _prepared(checkout: Path, parts: list[str]) -> tuple[list[type], dict[str, str]]:
    """The test classes, with stand-ins for what they would download."""
    import warnings

    import torch
    import transformers
    from diffusers.utils import logging

    from stand_ins import install  # isort: skip

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    install()
    from discovery import discover

    try:
        return discover(checkout, parts)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None


if __name__ == "__main__":
    app(prog_name="python tests/conformance")
