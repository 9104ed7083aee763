"""`deradiff study`: a preference study, planned, served, exported and analysed."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from deradiff.cli import options, terminal
from deradiff.cli.options import page_option

app = typer.Typer(
    help="A preference study between methods of an experiment, in people's browsers.", no_args_is_help=True
)

Folder = Annotated[Path, typer.Argument(help="The folder of the study.")]


@app.command()
def plan(
    experiment: Annotated[Path, typer.Argument(help="The folder of a finished experiment.")],
    methods: Annotated[
        list[str],
        typer.Option("--methods", "-m", help="Two of its arms or more, with commas between: beta-250,beta-30."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new file.")],
) -> None:
    """Write a plan of a study that compares arms of an experiment, to be served as it is or changed first."""
    with terminal.refusing_wrong_input():
        terminal.require_writable("--out", out)
        from deradiff.files.outputs import new_file
        from deradiff.study.plan import write_plan
        from deradiff.study.sources import drafted

        terminal.pass_on_warnings()
        with new_file(out) as temporary:
            temporary.write_text(write_plan(drafted(experiment, methods, out.parent)), encoding="utf-8")
    terminal.files([out])


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan in YAML.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The study's folder. One that was begun there goes on.")],
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    token: Annotated[
        str | None,
        page_option(envvar="DERADIFF_STUDY_TOKEN", help="Only who has the link with this token may take part."),
    ] = None,
    root_path: options.RootPath = "",
) -> None:
    """Show participants their pairs and keep their votes, until it is stopped. Killed at any time, it loses none."""
    console = terminal.LiteralConsole(stderr=True)
    with terminal.refusing_wrong_input():
        from deradiff.servers import access

        access.require_token(host, token)
        root = access.require_root(root_path)
        from deradiff.files.locks import taken
        from deradiff.study import server, tiles
        from deradiff.study.plan import read_plan

        planned = read_plan(file)
        with access.bound(host, port) as listening, taken(out, "a study"):
            with terminal.stages(console) as report:
                votes = tiles.ready(out, planned, file.parent, lambda done, total: report("images", done, total, ""))
            with votes, suppress(KeyboardInterrupt):
                console.print("The study is open; Ctrl-C closes it, and the same command opens it again.")
                terminal.echo(access.link(listening, host, token, root))
                server.serve(server.app(votes, token, root), listening)


@app.command()
def export(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="A new file; FOLDER/votes.csv by default, which replaces the last one."),
    ] = None,
) -> None:
    """Write a table of all votes so far, a row for every answer. Participants are numbers."""
    with terminal.refusing_wrong_input():
        from deradiff.files.outputs import new_file, replaced
        from deradiff.study import ballots
        from deradiff.study.votes import plan_of

        terminal.require_writable("--out", out)
        votes = ballots.read(folder, plan_of(folder))
        if out is not None:
            with new_file(out) as temporary:
                ballots.write_csv(votes, temporary)
        else:
            with replaced(folder, "votes", ["votes.csv"]) as inside:
                ballots.write_csv(votes, inside / "votes.csv")
    terminal.files([out or folder / "votes.csv"])


@app.command()
def analyse(
    folder: Folder,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where summary, tables and figures go; they replace the last ones.")
    ],
) -> None:
    """Count the votes so far: shares, intervals and sign tests, over all and by configuration, with figures."""
    with terminal.refusing_wrong_input(), terminal.LiteralConsole(stderr=True).status("Counting and drawing …"):
        from deradiff.study import analysis, ballots, report
        from deradiff.study.votes import plan_of

        planned = plan_of(folder)
        analysed = analysis.analysed(planned, ballots.read(folder, planned))
        files = report.write(analysed, out)
    terminal.echo(report.summary_of(analysed))
    terminal.files(files)
