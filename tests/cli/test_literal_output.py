"""What a person wrote is printed as it was written: no markup, no emoji, nothing that moves a terminal's cursor."""

import io
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner, Result

from deradiff.cli import app, terminal
from deradiff.experiments import running
from small_experiment import Fake, silent, small

pytestmark = pytest.mark.attack("what a person wrote is never markup")

ODD = "[red]x[/] :smile: [bold]"


def run(*words: str, color: bool = False) -> Result:
    return CliRunner().invoke(app, list(words), color=color, env={"COLUMNS": "200"})


DIGITS = ("generate", "digits", "--anchor", "digits:100")


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ((*DIGITS, "-p", "x", "--seed", "0:-1"), "--seed '0:-1'"),
        ((*DIGITS, "--prompts", f"{ODD}.txt"), f"{ODD}.txt"),
        ((*DIGITS, "-p", "x", "--scheduler", ODD), ODD),
        ((*DIGITS, "-p", "x", "--lam", "\x1b[31m1"), r"\x1b[31m1"),
        ((*DIGITS, "--prompts", "\x1b[2J\x07.txt"), r"\x1b[2J\x07.txt"),
        (("experiment", "status", ODD), ODD),
        (("experiment", "run", f"{ODD}\x1b[1m.yaml", "--out", "x"), rf"{ODD}\x1b[1m.yaml"),
        (("study", "analyse", f"{ODD}\x9b", "--out", "x"), rf"{ODD}\x9b"),
        (("align", "digits", "--window", ODD), ODD),
        (("generate", "digits", "--steps", "[red]:smile:\x1b[31m"), "--steps"),
        (("\x1b[31m:smile:[red]",), r"\x1b[31m:smile:[red]"),
        (("experiment", "status", f"--{ODD}\x1b"), r"\x1b"),
        ((f"--{ODD}\x1b",), r"\x1b"),
    ],
)
def test_refusals_show_what_was_written(words: tuple[str, ...], shown: str) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert shown in result.stderr and "\x1b" not in result.output and "\x9b" not in result.output


def test_a_name_that_is_no_text_is_printed(tmp_path: Path) -> None:
    result = run("experiment", "status", str(tmp_path / "caf\udce9"))
    assert result.exit_code == 2 and r"caf\udce9" in result.stderr


def test_tables_and_paths_show_names_as_they_are(tmp_path: Path) -> None:
    models = {f"{ODD}\x1b[31m": {"source": "digits:30"}}
    folder = tmp_path / f"{ODD}\x1b[0m"
    prompts = {":smile:": {"prompts": ["a"], "substitute_for": "[red]:cat:\x1b"}}
    running.run(small(models=models, methods=[{"method": "model"}], prompts=prompts), folder, Fake, silent)
    status = run("experiment", "status", str(folder))
    assert rf"{ODD}\x1b[31m" in status.stdout and all(
        text in status.stdout for text in (":smile::", r"[red]:cat:\x1b.")
    )
    exported = run("experiment", "export", str(folder), "--out", str(tmp_path / f"{ODD}\x1b"))
    assert exported.stdout.splitlines()[0].endswith(rf"{ODD}\x1b/images.csv")
    assert "\x1b" not in status.output + exported.output


def test_what_fails_is_shown_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ValueError(f"{ODD}\x1b[31m\n more")

    monkeypatch.setattr("deradiff.experiments.plan.read_plan", fails)
    result = run("experiment", "run", "plan.yaml", "--out", str(tmp_path), color=True)
    assert rf"error: {ODD}\x1b[31m more" in result.stderr


def test_progress_shows_what_it_is_given() -> None:
    console = terminal.LiteralConsole()
    console.file, console._force_terminal = io.StringIO(), True
    with terminal.stages(console) as report:
        report(f"{ODD}\x1b[5m", 1, 2, f"{ODD}\x1b[5m")
    assert console.file.getvalue().count(rf"{ODD}\x1b[5m") >= 2 and "\x1b[5m" not in console.file.getvalue()


def test_every_kind_of_printing_is_literal(capsys: pytest.CaptureFixture[str]) -> None:
    console = terminal.LiteralConsole()
    table = Table(ODD, title=ODD, caption=ODD)
    table.add_row(f"{ODD}\x07")
    console.print(ODD, style="red")
    console.print(table)
    terminal.echo(f"{ODD}\x1b")
    shown = capsys.readouterr().out
    assert shown.count(":smile:") == 6 and r"\x07" in shown and "\x1b" not in shown and "\x07" not in shown


def test_warnings_are_a_line_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"- {json.dumps(ODD)}\n- a [red]mug[/] #1\n")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        result = run(*DIGITS, "--prompts", str(file), "--lam", "nan")
    assert "warning: " in result.stderr and "'a [red]mug[/]'" in result.stderr
    assert "UserWarning" not in result.stderr
