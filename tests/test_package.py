"""What is true of the package as a whole: it imports quickly, ships what it needs, and says one version everywhere."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import deradiff

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HEAVY = {"torch", "diffusers", "transformers", "peft", "scipy", "sklearn", "matplotlib", "numpy", "PIL"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh Python has imported after `code`."""
    printed = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint('MODULES', *sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {name.partition(".")[0] for name in printed.rpartition("MODULES")[2].split()}


GONE = {
    *("asynchat", "asyncore", "distutils", "imp", "smtpd"),  # from Python 3.12 on
    *("aifc", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "mailcap", "msilib", "nis", "nntplib"),  # 3.13
    *("ossaudiodev", "pipes", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib", "lib2to3"),
}


@pytest.mark.parametrize("folder", ["src", "studies", "benchmarks", "examples", "tests"])
def test_nothing_is_imported_that_newer_pythons_have_not(folder: str) -> None:
    imported = {
        name.partition(".")[0]
        for file in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and not node.level
            else []
        )
    }
    assert "pathlib" in imported and not imported & GONE


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert modules_after("import deradiff; deradiff.schedules; dir(deradiff)") & HEAVY == set()


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["demo", "--help"], ["study", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"from deradiff.cli import app\ntry: app({arguments})\nexcept SystemExit: pass"
    assert modules_after(code) & HEAVY == set()


def test_every_export_can_be_had_and_an_unknown_one_is_an_attribute_error() -> None:
    assert {"realign", "Dial", "lam_for_beta", "schedules"} <= set(deradiff.__all__) <= set(dir(deradiff))
    for name in deradiff.__all__:
        assert getattr(deradiff, name) is getattr(deradiff, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = deradiff.nothing_of_the_kind


def test_one_version_everywhere() -> None:
    assert deradiff.__version__ == PROJECT["version"] == version("deradiff")
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text()


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): pin for name, pin in (line.split("==") for line in lines)}


def test_constraints_pin_every_dependency_within_its_bounds() -> None:
    declared = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for requirement in map(Requirement, declared):
        if requirement.name != "deradiff":
            assert pins()[canonicalize_name(requirement.name)] in requirement.specifier, requirement
            assert re.search(r">=", str(requirement.specifier)), f"{requirement} has no lower bound"


def test_torchvision_is_nowhere_in_the_environment() -> None:
    assert "torchvision" not in pins()
    assert not any("torchvision" in requirement for requirement in PROJECT["dependencies"])


def test_the_wheel_holds_the_package_and_its_worlds_and_nothing_else(tmp_path: Path) -> None:
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    here = {
        file.relative_to(ROOT / "src").as_posix()
        for file in (ROOT / "src" / "deradiff").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {name for name in names if not name.startswith("deradiff-")} == here
    assert "deradiff/py.typed" in names
    for module, largest in (("digits", 40e6), ("digits_flow", 20e6)):
        weights = [name for name in names if name.startswith(f"deradiff/worlds/{module}/files/")]
        assert any(name.endswith(".safetensors") for name in weights)
        assert sum((ROOT / "src" / name).stat().st_size for name in weights) < largest
    assert not any(name.endswith((".bin", ".pt", ".ckpt", ".pkl")) for name in names)
    assert Path(wheel).stat().st_size < 55e6
