"""The page that lists both papers row by row: what it names is there."""

import ast
import re
from pathlib import Path

import pytest
import typer

from deradiff.cli import app

ROOT = Path(__file__).parents[1]
ROWS = [line for line in (ROOT / "docs" / "papers.md").read_text().splitlines() if re.match(r"\| (?!in the|---)", line)]
CODE = re.compile(r"`([^`]+)`")


def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip()[:40])
def test_every_row_names_a_test_a_command_and_files_that_are_there(row: str) -> None:
    what, here, held_by, command = (cell.strip() for cell in row.strip("|").split(" | "))
    file, _, name = CODE.findall(held_by)[0].partition("::")
    assert what and name in functions(file)
    for path in (text for text in CODE.findall(here) if text.startswith("docs/")):
        assert (ROOT / path).is_file()
    if report := re.match(r"report: `([^`]+)`", here):
        drawn = ast.parse((ROOT / "tests/cli/test_experiment_command.py").read_text())
        begins = [node.value for node in ast.walk(drawn) if isinstance(node, ast.Constant)]
        assert any(isinstance(text, str) and text and report[1].startswith(text) for text in begins), report[1]
    (typed,) = CODE.findall(command)
    words = typed.split()
    if words[0] == "deradiff":
        commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        assert words[1] in commands
        if words[1] in ("experiment", "study"):
            assert words[2] in commands[words[1]].commands
    elif words[:2] == ["python", "-m"]:
        place = ROOT / words[2].replace(".", "/")
        assert place.exists() or place.with_suffix(".py").exists()
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()


def test_no_paper_is_left_out() -> None:
    text = "\n".join(ROWS)
    for table in range(1, 6):
        assert re.search(rf"\bTable {table}\b", text)
    assert "Tables 6 to 17" in text
