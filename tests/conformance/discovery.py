"""The pipeline tests of a checkout of diffusers, imported from there, and the cases of our own."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from adjustments import adjust_tests
from own_cases import OWN_CASES
from results import described
from trial import name_of

_NO_TESTS = ("test_pipelines", "test_pipeline_utils")
"""Modules of tests about all pipelines."""


def discover(checkout: Path, parts: Sequence[str] = ()) -> tuple[list[Any], dict[str, str]]:
    """The test classes whose name has one of `parts` in it, all by default; and what kept modules from importing.

    The first class of each pipeline comes first. The cases of our own are `own.NameOfThePipeline`.

    Raises `FileNotFoundError` for a folder without such tests.
    """
    if not (checkout / "tests" / "pipelines").is_dir():
        raise FileNotFoundError(f"{checkout} has no tests/pipelines: name a checkout of diffusers")
    sys.path.insert(0, str(checkout.resolve()))
    classes: dict[Any, type] = {}
    problems = {}
    for file in sorted((checkout / "tests" / "pipelines").rglob("test_*.py")):
        name = ".".join(file.relative_to(checkout).with_suffix("").parts)
        if "onnx" in file.name or file.name.startswith(_NO_TESTS) or not _may_have(parts, name, file):
            continue
        try:
            module = importlib.import_module(name)
        except BaseException as error:  # pytest's skip is no Exception
            problems[name.removeprefix("tests.pipelines.")] = described(error)
            continue
        adjust_tests(module)
        for test_class in vars(module).values():
            if _is_pipeline_test(test_class, name) and _is_wanted(parts, name_of(test_class)):
                key = test_class.pipeline_class, test_class.get_dummy_components, test_class.get_dummy_inputs
                classes.setdefault(key, test_class)
    own = [case.test_class() for case in OWN_CASES]
    return _firsts_first([*classes.values(), *(c for c in own if _is_wanted(parts, name_of(c)))]), problems


def _is_wanted(parts: Sequence[str], name: str) -> bool:
    return not parts or any(part.lower() in name.lower() for part in parts)


def _may_have(parts: Sequence[str], module: str, file: Path) -> bool:
    """Whether a class in this file may be wanted: importing all takes a minute."""
    text = f"{module}\n{file.read_text()}".lower()
    return not parts or any(part.lower().rpartition(".")[2] in text for part in parts)


def _is_pipeline_test(test_class: Any, module: str) -> bool:
    """Whether it is a class of this module that makes a pipeline's components without being told anything."""
    if not inspect.isclass(test_class) or test_class.__module__ != module:
        return False
    pipeline = getattr(test_class, "pipeline_class", None)
    if pipeline is None or isinstance(pipeline, property):
        return False
    components: Any = getattr(test_class, "get_dummy_components", None)
    if components is None or not hasattr(test_class, "get_dummy_inputs"):
        return False
    parameters = list(inspect.signature(components).parameters.values())[1:]
    return all(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)


def _firsts_first(classes: list[Any]) -> list[Any]:
    known: set[Any] = set()
    firsts: list[Any] = []
    others: list[Any] = []
    for test_class in classes:
        (others if test_class.pipeline_class in known else firsts).append(test_class)
        known.add(test_class.pipeline_class)
    return firsts + others


def date_of(checkout: Path) -> str:
    """The day of the checkout's last commit; of the tests' last change, where there is no history."""
    git = ["git", "-C", str(checkout), "log", "-1", "--format=%cs"]
    if (checkout / ".git").exists():
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    files = (checkout / "tests").rglob("*.py")
    return date.fromtimestamp(max(file.stat().st_mtime for file in files)).isoformat()
