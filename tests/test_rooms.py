"""Which room may import which: the contracts of `.importlinter` hold, and are broken by an arrow upwards."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    for name in ("src/deradiff", "studies"):
        shutil.copytree(ROOT / name, folder / Path(name).name, ignore=shutil.ignore_patterns("files", "__pycache__"))
    shutil.copytree(ROOT / "src/deradiff/files", folder / "deradiff/files")
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


def linted(folder: Path) -> subprocess.CompletedProcess[str]:
    lint = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    )
    return subprocess.run([sys.executable, "-c", lint], cwd=folder, capture_output=True, text=True)


def test_the_contracts_hold(copy: Path) -> None:
    assert linted(copy).returncode == 0, linted(copy).stdout


@pytest.mark.parametrize(
    ("file", "arrow"),
    [
        ("deradiff/files/writing.py", "from deradiff.algorithm import gaussian"),
        ("deradiff/sampling/dial.py", "import deradiff.cli"),
        ("deradiff/study/plan.py", "def late():\n    from deradiff.studio import page"),
        ("deradiff/rewards/__init__.py", "import studies.digits"),
        ("deradiff/experiments/store.py", "from deradiff.search import loop"),
    ],
)
def test_an_arrow_upwards_is_found(copy: Path, file: str, arrow: str) -> None:
    text = (copy / file).read_text()
    try:
        (copy / file).write_text(f"{text}\n{arrow}\n")
        found = linted(copy)
    finally:
        (copy / file).write_text(text)
    assert found.returncode == 1 and "BROKEN" in found.stdout, found.stdout + found.stderr


def test_a_new_room_has_to_be_given_its_place(copy: Path) -> None:
    (copy / "deradiff" / "attic").mkdir()
    (copy / "deradiff" / "attic" / "__init__.py").touch()
    try:
        found = linted(copy)
    finally:
        shutil.rmtree(copy / "deradiff" / "attic")
    assert found.returncode == 1 and "attic" in found.stdout, found.stdout + found.stderr


def test_the_top_of_the_package_stays_small() -> None:
    assert len(list((ROOT / "src" / "deradiff").glob("*.py"))) <= 5


def test_a_class_name_occurs_once() -> None:
    places: dict[str, list[str]] = {}
    for file in sorted((ROOT / "src" / "deradiff").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(file.relative_to(ROOT).as_posix())
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_files_and_functions_stay_short() -> None:
    """400 lines a file, 80 a function; of a command, whose signature is its options, the body counts."""
    long = []
    for file in sorted((ROOT / "src" / "deradiff").rglob("*.py")):
        text, place = file.read_text(), file.relative_to(ROOT).as_posix()
        if text.count("\n") > 400:
            long.append(place)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                start = node.body[0].lineno if file.parent.name == "cli" else node.lineno
                if node.end_lineno is not None and node.end_lineno - start >= 80:
                    long.append(f"{place}: {node.name}")
    assert long == []
