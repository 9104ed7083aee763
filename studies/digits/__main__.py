"""`python -m studies.digits`: the embedded model, made again from nothing, measured, and held against the truth."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from deradiff.cli import terminal

app = typer.Typer(
    help="The embedded digits model: make it again from nothing, measure it, or hold it against the truth.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="Build folder. An interrupted build continues where it was.")],
) -> None:
    """Train autoencoder, reference, six anchors and a LoRA from scikit-learn's digits: one to two hours on two cores.

    The result is OUT/files, the folder that ships with the package. On one machine it is the same bits every time.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits.build import Settings
        from studies.digits.build import build as build_all

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        files = build_all(out, Settings(), report)
    size = sum(path.stat().st_size for path in files.rglob("*") if path.is_file()) / 1e6
    console.print(f"{files}: {size:.1f} MB. To ship it, copy it to src/deradiff/worlds/digits/files.")


@app.command()
def truth(
    out: Annotated[Path, typer.Option("--out", help="Folder of models and results. An interrupted run continues.")],
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each; they change no bit.")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this target, such as dpo/ink-0.5, with the models it needs. May be repeated."),
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Compare at this guidance alone, 1 or 1.5; by default at both.")
    ] = None,
) -> None:
    """Train models at the very strengths that λ stands for, and compare every way of sampling with them: hours.

    The models lie in OUT/models, the numbers of every comparison in OUT/results and, less those of single prompts, in
    OUT/truth.json, beside two figures.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from deradiff.files.outputs import replaced
        from deradiff.files.writing import write_json
        from studies.digits import truth_report
        from studies.digits.truth import Plan, needed, require_compared, run
        from studies.digits.truth_models import TruthSettings, train_truth

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        require_compared(Plan(), guidance_scale)
        targets = only or []
        train_truth(out / "models", TruthSettings(), report, workers, needed(targets))
        records = run(out / "models", out / "results", Plan(), report, workers, targets, guidance_scale)
        told = {"training": truth_report.training(out / "models"), "cases": truth_report.summary(records)}
        with replaced(out, "truth", ["truth.json"]) as folder:
            write_json(folder / "truth.json", told)
            figures = truth_report.draw(records, folder)
    for record in records:
        _print_truth(console, record)
    terminal.files([out / "truth.json", *(out / figure.name for figure in figures)])


def _print_truth(console: Any, record: dict[str, Any]) -> None:
    """How far every way of sampling is from the retrained model, beside what the verdict had said."""
    from rich.table import Table

    case = record["case"]
    target = " + ".join(f"{name} at λ = {lam:g}" for name, lam in case["target"].items())
    table = Table(title=f"{case['family']}: {target}, guidance {case['guidance_scale']:g}", title_justify="left")
    table.add_column("less the retrained model")
    for name in record["errors"]:
        table.add_column(name, justify="right")
    for arm in next(iter(record["errors"].values()))["gaps"]:
        gaps = [errors["gaps"][arm] for errors in record["errors"].values()]
        table.add_row(arm, *(f"{gap['value']:+.3f} ± {gap['error']:.3f}" for gap in gaps))
    table.add_section()
    table.add_row("verdict on Algorithm 1", *(record["verdicts"][name]["words"] for name in record["errors"]))
    console.print(table)


@app.command()
def learned(
    out: Annotated[Path, typer.Option("--out", help="Folder of models and cells. An interrupted run continues.")],
    family: Annotated[str | None, typer.Option(help="Only this one: dpo, weighted, draft or ddpo.")] = None,
    reward: Annotated[str | None, typer.Option(help="Only this one: bold or ink.")] = None,
    seed: Annotated[int | None, typer.Option(help="Only this seed of training: 0 or 1.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A miniature, which proves nothing.")] = False,
) -> None:
    """Judge verdicts by four families of learned models, cell by cell: hours, on one thread.

    A cell is a family, a reward and a seed of training. Its file, OUT/cells/FAMILY-REWARD-SEED.json, can be committed
    by itself (docs/data/learned); `learned-tables` makes tables of those that are there.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits import learned as study

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        todo = study.cells(family, reward, seed)
        files = study.run(out, todo, study.quick() if quick else study.Plan(), report)
    terminal.files(files)


@app.command()
def learned_tables(
    data: Annotated[Path, typer.Argument(help="Folder of cells.")] = Path("docs/data/learned"),
) -> None:
    """Print what the cells in a folder say, and which of the study's are missing."""
    with terminal.refusing_wrong_input():
        terminal.pass_on_warnings()
        from studies.digits import learned as study
        from studies.digits import learned_report

        found = study.load(data)
        if not found:
            raise ValueError(f"{data} holds no cells of the study: run `python -m studies.digits learned --out OUT`")
        print(learned_report.report(found))


@app.command()
def calibration(
    out: Annotated[Path, typer.Option("--out", help="The folder of `learned`, whose cells of Diffusion-DPO are read.")],
) -> None:
    """Hold a calibrated λ against β/λ, on the shipped anchors and on the cells that OUT has, into OUT/calibration.json.

    Run it again once there are more cells.
    """
    console = terminal.LiteralConsole()
    with console.status("Loading torch and diffusers …"):
        terminal.pass_on_warnings()
        from studies.digits import calibration_study
        from studies.digits.learned import Plan

    with terminal.refusing_wrong_input(), terminal.stages(console) as report:
        file = calibration_study.run(out, Plan(), report)
    print(calibration_study.report_of(file))


@app.command()
def quality(
    samples: Annotated[int, typer.Option(min=100, help="Pictures to draw from the reference.")] = 1000,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 25,
    guidance_scale: Annotated[float, typer.Option(min=1.0, help="Classifier-free guidance; 1 is none.")] = 1.5,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and noise.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this new file as well.")
    ] = None,
) -> None:
    """Measure the shipped reference beside real handwriting: legibility, colours, variety, memorisation."""
    from rich.progress import Progress

    from deradiff.algorithm.schedules import finite
    from deradiff.files.outputs import new_file, require_new
    from deradiff.files.writing import json_text

    console = terminal.LiteralConsole()
    with terminal.refusing_wrong_input():
        terminal.require_writable("--json", json_path)
        if json_path is not None:
            require_new(json_path)
        finite(guidance_scale, "--guidance-scale")
        with console.status("Loading torch and diffusers …"):
            terminal.pass_on_warnings()
            from deradiff.worlds.digits import load_pipeline
            from deradiff.worlds.digits.quality import measure
            from studies.digits.quality_table import show

            pipe = load_pipeline()
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("Drawing", total=samples)
            found = measure(
                pipe, samples, steps, guidance_scale, seed, tick=lambda done: progress.update(bar, completed=done)
            )
        show(console, found)
        if json_path is not None:
            with new_file(json_path) as temporary:
                temporary.write_text(json_text({**asdict(found), "goals": found.goals()}), encoding="utf-8")


if __name__ == "__main__":
    app(prog_name="python -m studies.digits")
