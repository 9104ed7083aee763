"""Every test runs with the library's tensor shapes checked: annotations are asserted at each call."""

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

assert "deradiff.algorithm.gaussian" not in sys.modules, "deradiff was imported before shape checking was switched on"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub; the hub's own tests run a local server

# Before the hook: modules that are imported below it are compiled anew, with bytecode of their own.
for library in ("peft", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion"):
    importlib.import_module(library)
install_import_hook("deradiff", "typechecker.check")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every test that is marked `attack(kind)` tell its kind: `benchmarks/attack.py` counts by it."""
    for item in items:
        if mark := item.get_closest_marker("attack"):
            item.user_properties.append(("attack", mark.args[0]))


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
