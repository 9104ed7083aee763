"""`deradiff study` from the command line."""

import csv
import socket
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.study import server
from deradiff.study.plan import read_plan
from deradiff.study.votes import Votes
from holding import another_process
from small_study import answers, experiment


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["study", *map(str, arguments)])


def told(*arguments: object) -> str:
    """The message of a command that refuses."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


def test_a_study_from_plan_to_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment(tmp_path / "experiment")
    plan, folder = tmp_path / "study.yaml", tmp_path / "study"
    made = run("plan", tmp_path / "experiment", "--methods", "strong,weak", "--out", plan)
    assert (made.exit_code, made.stdout.strip()) == (0, str(plan))
    served: list[Votes] = []
    monkeypatch.setattr(server, "app", lambda votes, token, root: served.append(votes))

    def vote(application: Any, listening: socket.socket) -> None:
        (votes,) = served
        for answer in ("left", "right", "equal"):
            key = votes.begin().result()
            while (shown := votes.current(key)) is not None:
                # Nobody is fooled by noise.
                real = "right" if len({*shown.left}) == 1 else "left" if len({*shown.right}) == 1 else answer
                votes.vote(key, shown.id, answers(real)).result()
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serve", vote)
    opened = run("serve", plan, "--out", folder, "--port", 0)
    assert opened.exit_code == 0, opened.output
    assert opened.stdout.startswith("http://127.0.0.1:")
    exported = run("export", folder)
    assert exported.stdout.strip() == str(folder / "votes.csv")
    with (folder / "votes.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 3 * 5 * 3
    analysed = run("analyse", folder, "--out", tmp_path / "analysis")
    assert analysed.exit_code == 0, analysed.output
    assert "3 participants, 9 pairs, 3 questions about each" in analysed.stdout
    assert str(tmp_path / "analysis" / "overall.png") in analysed.stdout


@pytest.mark.attack("two processes, one folder")
def test_a_second_server_of_a_study_is_told_of_the_first(tmp_path: Path) -> None:
    experiment(tmp_path / "experiment")
    plan = tmp_path / "study.yaml"
    run("plan", tmp_path / "experiment", "--methods", "strong,weak", "--out", plan)
    with another_process(tmp_path / "study") as process:
        assert str(process.pid) in told("serve", plan, "--out", tmp_path / "study", "--port", 0)
    assert not (tmp_path / "study").exists()


def test_what_is_refused(tmp_path: Path) -> None:
    experiment(tmp_path / "experiment")
    plan = tmp_path / "study.yaml"
    assert "'gone'" in told("plan", tmp_path / "experiment", "--methods", "strong,gone", "--out", plan)
    assert "`deradiff experiment run`" in told("plan", tmp_path, "--methods", "strong,weak", "--out", plan)
    assert str(tmp_path / "a" / "b") in told(
        "plan", tmp_path / "experiment", "-m", "strong,weak", "-o", tmp_path / "a" / "b"
    )
    run("plan", tmp_path / "experiment", "--methods", "strong,weak", "--out", plan)
    assert str(plan) in told("plan", tmp_path / "experiment", "-m", "strong,weak", "--out", plan)
    folder = tmp_path / "study"
    assert "--host 0.0.0.0" in told("serve", plan, "--out", folder, "--host", "0.0.0.0")
    assert "16 to 200" in told("serve", plan, "--out", folder, "--token", "short")
    assert str(tmp_path / "none.yaml") in told("serve", tmp_path / "none.yaml", "--out", folder, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}" in told("serve", plan, "--out", folder, "--port", port)
    assert not folder.exists()
    for command in (("export", tmp_path), ("analyse", tmp_path, "--out", tmp_path / "x")):
        assert f"{tmp_path} " in told(*command)
    Votes(folder, read_plan(plan)).__exit__()
    assert "voted" in told("analyse", folder, "--out", tmp_path / "x")
