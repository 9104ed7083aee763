"""Every test runs with the library's tensor shapes checked: annotations are asserted at each call."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

assert "deradiff.algorithm.gaussian" not in sys.modules, "deradiff was imported before shape checking was switched on"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub; the hub's own tests run a local server

SOURCES = Path(__file__).parent.parent / "src"
SHAPED = [
    ".".join(file.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
    for file in sorted(SOURCES.rglob("*.py"))
    if "from jaxtyping import" in file.read_text(encoding="utf-8")
]
"""The modules whose annotations have shapes. Types alone are checked by mypy, which costs nothing at each call."""

# Before the hook: modules that are imported below it are compiled anew, with bytecode of their own.
for library in ("peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
    importlib.import_module(library)
install_import_hook(SHAPED, "typechecker.check")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="run every case of tests that are marked cases(n)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what `cases(n)` says, and have every test that is marked `attack(kind)` tell its kind.

    A test that is named by itself keeps all its cases.
    """
    for item in items:
        if mark := item.get_closest_marker("attack"):
            item.user_properties.append(("attack", mark.args[0]))
    if config.getoption("all_cases") or any("::" in argument for argument in config.args):
        return
    spared = {item for cases in _marked(items).values() for item in _spared(cases)}
    config.hook.pytest_deselected(items=list(spared))
    items[:] = [item for item in items if item not in spared]


def _marked(items: list[pytest.Item]) -> dict[str, list[pytest.Item]]:
    """The cases of each test that is marked `cases(n)`."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("cases"):
            tests.setdefault(item.nodeid.split("[")[0], []).append(item)
    return tests


def _spared(cases: list[pytest.Item]) -> list[pytest.Item]:
    """All but n of a test's cases, those that are left evenly spread and the first among them."""
    mark = cases[0].get_closest_marker("cases")
    kept = mark.args[0] if mark else len(cases)
    left = {i * len(cases) // kept for i in range(kept)}
    return [case for i, case in enumerate(cases) if i not in left]


def pytest_collection_finish() -> None:
    """Spare the garbage collector the libraries, which stay: a fifth of what tests that train cost was walking them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, the system's own; a run in CI needs it, another goes on without."""
    import browsing

    with browsing.chromium() as browser:
        yield browser
