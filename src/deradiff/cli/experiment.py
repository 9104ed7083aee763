"""`deradiff experiment`: a plan, run, looked at, exported and reported."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import machine_option

if TYPE_CHECKING:
    from deradiff.experiments.plan import Plan
    from deradiff.experiments.store import Store
    from deradiff.sweep.workers import Executor

app = typer.Typer(
    help="Every table and figure of both papers for models of your own, from one plan.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="The folder of the experiment.")]


@app.command()
def plan(
    preset: Annotated[
        str, typer.Option(help="deradiff-sdxl, deradiff-sd15, aig-sdxl, aig-sd14 (the papers' own), or digits.")
    ],
    models: Annotated[
        str | None,
        typer.Option(help="The folder of the aligned models (aligned). With it, the digits mix two rewards as well."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A new file; printed by default.")] = None,
) -> None:
    """Write a plan: one of the papers' experiments, to be run as it is or changed first."""
    with terminal.refusing_wrong_input():
        from deradiff.experiments.plan import write_plan
        from deradiff.experiments.presets import preset as plan_called
        from deradiff.files.outputs import new_file

        text = write_plan(plan_called(preset, models))
        if out is None:
            terminal.echo(text, nl=False)
            return
        terminal.require_writable("--out", out)
        with new_file(out) as temporary:
            temporary.write_text(text, encoding="utf-8")
    terminal.files([out])


@app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in YAML.")],
    online: Annotated[
        bool, machine_option("--online", help="Ask the hub as well whether it still has what the plan names.")
    ] = False,
) -> None:
    """Say what the plan needs that is not here, and the commands that get it, before anything is drawn.

    Models, rewards, prompts, packages, the GPU and the disk are looked for on this machine; nothing is downloaded.
    """
    console = terminal.LiteralConsole()
    with terminal.refusing_wrong_input(), console.status("Looking …"):
        terminal.pass_on_warnings()
        from deradiff.experiments.check import asked_of_the_hub, needs
        from deradiff.experiments.plan import read_plan

        known = needs(read_plan(file))
        refused = asked_of_the_hub(known) if online else []
    missing = [need for need in known if need.missing]
    for need in missing:
        console.print(f"missing: {need.what}: {need.missing}", soft_wrap=True)
    for line in refused:
        console.print(f"hub: {line}", soft_wrap=True)
    if commands := list(dict.fromkeys(command for need in missing for command in need.how)):
        console.print("\nThese commands get it:\n")
        for command in commands:
            terminal.echo(command)
        console.print()
    console.print(f"{len(known) - len(missing)} of {len(known)} things that the plan needs are here.")
    if missing or refused:
        raise typer.Exit(1)


@app.command()
def run(
    context: arguments.Context,
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in YAML.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The experiment's folder. One that was begun there goes on.")
    ],
    workers: Annotated[
        int | None,
        machine_option(min=1, help="Processes, or Ray's actors. By default one on a GPU, one per processor on a CPU."),
    ] = None,
    device: options.Device = "auto",
    threads: Annotated[
        int, machine_option(min=1, help="Threads of every worker on a CPU. They decide the last bits.")
    ] = 1,
    ray: Annotated[bool, machine_option("--ray", help="Work with Ray's actors instead of processes.")] = False,
    ray_address: Annotated[
        str | None, machine_option(help="A Ray cluster's address, or auto; by default one is started here.")
    ] = None,
    gpus: Annotated[float, machine_option(min=0, help="The share of a GPU that every actor takes.")] = 1.0,
    verify: Annotated[bool, typer.Option("--verify", help="Read all images and check their hashes first.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what could not be drawn or scored.")] = False,
) -> None:
    """Draw and score what the plan wants and the folder does not hold. Killed at any time, the same command goes on."""
    console = terminal.LiteralConsole(stderr=True)
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from deradiff.experiments import executors, running
        from deradiff.experiments.plan import read_plan
        from deradiff.experiments.store import IMAGE
        from deradiff.sampling.devices import device_called, device_name
        from deradiff.sweep.workers import cores

    with terminal.refusing_wrong_input("take a smaller batch_size in the plan"), terminal.stages(console) as report:
        planned = read_plan(file)
        place = device_called(device)
        if not (ray or ray_address):
            arguments.refuse(context, ["gpus"], "the share of a GPU of every actor of Ray's; add --ray")
        elif place == "cpu":
            arguments.refuse(context, ["gpus"], "there is no GPU to share on the device cpu")
        if place != "cpu":
            arguments.refuse(context, ["threads"], f"of workers on a CPU, and the device is {place}")

        def executor() -> "Executor":
            size = workers or (cores() if place == "cpu" else 1)
            if ray or ray_address:
                return executors.RayActors(planned, place, threads, size, gpus if place != "cpu" else 0.0, ray_address)
            return executors.local(planned, place, threads, size)

        about = {"device": device_name(place), "threads": threads if place == "cpu" else None}
        outcome = running.run(planned, out, executor, report, about=about, thoroughly=verify, again=retry)
    if outcome.lost:
        console.print(f"{outcome.lost} images were gone or altered, and were drawn again.")
    console.print(
        f"{outcome.drawn} images drawn, {outcome.scored} scores and features computed in {outcome.seconds:.0f} s, "
        f"{outcome.overhead:.1%} of it outside models and scorers."
    )
    if outcome.blacked_out:
        console.print(
            f"{outcome.blacked_out} images were blacked out by the pipeline's safety checker: they are no pictures, "
            "and have no scores.",
            highlight=False,
        )
    terminal.files([out])
    if outcome.failures:
        undrawn = sum(name == IMAGE for name, _, _ in outcome.failures)
        terminal.listed("error", [f"{name} of {item}: {error}" for name, item, error in outcome.failures])
        console.print(
            f"{undrawn} images could not be drawn, {len(outcome.failures) - undrawn} scores could not be computed. The "
            "rest is done; --retry tries them again."
        )
        raise typer.Exit(1)


@app.command()
def status(folder: Folder) -> None:
    """What is there of every arm, and what is missing."""
    from rich.table import Table

    with terminal.refusing_wrong_input(), _opened(folder) as (planned, store):
        from deradiff.experiments.results import Results

        console = terminal.LiteralConsole()
        for sampling in planned.sampling:
            results = Results(planned, store, sampling)
            table = Table(title=f"{planned.name}, {sampling}", title_justify="left")
            for heading in ("arm", "images", "planned", *planned.scores, *planned.features):
                table.add_column(heading, justify="left" if heading == "arm" else "right")
            for arm in results.arms:
                done, wanted = results.done(arm)
                measured = results.measured(arm)
                table.add_row(
                    arm.name,
                    f"{done:,}",
                    f"{wanted:,}",
                    *(f"{measured[name]:,}" for name in (*planned.scores, *planned.features)),
                )
            console.print(table)
        for name, wanted_prompts in planned.prompts.items():
            if wanted_prompts.substitute_for:
                console.print(f"{name}: a substitute for {wanted_prompts.substitute_for}.")
        if results.blacked_out:
            console.print(f"{len(results.blacked_out)} images were blacked out by the safety checker.")
        terminal.listed("warning", [cut.words for cut in results.cut])
        terminal.listed("could not be done", [f"{name} of {item}: {error}" for name, item, error in store.failures()])


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the tables, which replace its last ones.")],
    form: Annotated[
        Literal["csv", "parquet"], typer.Option("--format", help="csv, or parquet (needs pyarrow).")
    ] = "csv",
) -> None:
    """Write a table of all images, with what decided each, what it was made with and its scores."""
    with terminal.refusing_wrong_input(), _opened(folder) as (planned, store):
        from deradiff.experiments.export import write

        files = write(planned, store, out, form)
    terminal.files(files)


@app.command()
def report(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Where the report goes, replacing its last one; FOLDER/report by default."),
    ] = None,
) -> None:
    """Draw the papers' tables and figures from what is there: one HTML page, and PNG, SVG and CSV of each."""
    console = terminal.LiteralConsole(stderr=True)
    with (
        terminal.refusing_wrong_input(),
        console.status("Measuring and drawing …"),
        _opened(folder) as (planned, store),
    ):
        from deradiff.experiments.reporting.report import write

        files, failed = write(planned, store, out or folder / "report")
    terminal.files(files[:1])
    for key, error in failed:
        terminal.messages.print(f"error: {key} could not be drawn: {error}", style="red")
    if failed:
        raise typer.Exit(1)


@contextmanager
def _opened(folder: Path) -> Iterator["tuple[Plan, Store]"]:
    """The plan and the store of an experiment that was begun, to be read."""
    terminal.pass_on_warnings()
    from deradiff.experiments.plan import parse_plan
    from deradiff.experiments.store import Store

    with Store(folder, write=False) as store:
        planned = parse_plan(store.fact("plan"), f"the plan in {store.file}")
        if lost := store.altered():
            terminal.messages.print(
                f"{len(lost)} images in {folder} are gone or were altered since they were drawn: "
                "`deradiff experiment run` draws them again.",
                style="yellow",
                markup=False,
            )
        yield planned, store
