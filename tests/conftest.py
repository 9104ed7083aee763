"""Every test runs with the library's tensor shapes checked: annotations are asserted at each call."""

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

assert "deradiff.algorithm.gaussian" not in sys.modules, "deradiff was imported before shape checking was switched on"
install_import_hook("deradiff", "typechecker.check")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub; the hub's own tests run a local server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have every test that is marked `attack(kind)` tell its kind: `benchmarks/attack.py` counts by it."""
    for item in items:
        if mark := item.get_closest_marker("attack"):
            item.user_properties.append(("attack", mark.args[0]))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A headless Chromium, the system's own; a run in CI needs it, another goes on without."""
    import browsing

    with browsing.chromium() as browser:
        yield browser
