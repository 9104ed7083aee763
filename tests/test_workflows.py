"""The hosted workflows say what the package, the Makefile and `.ci/run` say. Nothing here runs them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from test_package import PROJECT, pins

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(path: Path) -> dict[Any, Any]:
    workflow: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return workflow


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_are_two() -> None:
    assert [path.stem for path in WORKFLOWS] == ["build", "test"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_they_may_read_and_nothing_else(path: Path) -> None:
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job and job["timeout-minutes"] <= 60 for job in workflow["jobs"].values())
    assert "pull_request_target" not in workflow[True]  # YAML reads `on` as a truth
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)
    assert "secrets." not in path.read_text(encoding="utf-8")


def test_the_suite_runs_on_every_python_that_the_package_is_for() -> None:
    workflow = read(ROOT / ".github/workflows/test.yml")
    versions = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in PROJECT["classifiers"]]
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"] == [match[1] for match in versions if match]
    command = next(step["run"] for step in steps(workflow) if step.get("name") == "Test")
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_torch_is_the_pinned_one_for_cpus(path: Path) -> None:
    installs = [
        line
        for step in steps(read(path))
        for line in step.get("run", "").splitlines()
        if "download.pytorch.org" in line
    ]
    assert installs and all("--no-deps" in line and "'^torch==' constraints.txt" in line for line in installs)
    assert re.fullmatch(r"\d+\.\d+\.\d+", pins()["torch"])  # without a local tag, which the other build has
