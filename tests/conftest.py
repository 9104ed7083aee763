"""Every test runs with the library's tensor shapes checked: annotations are asserted at each call."""

import os
import sys

import pytest
import torch
from jaxtyping import install_import_hook

assert "deradiff.gaussian" not in sys.modules, "deradiff was imported before shape checking was switched on"
install_import_hook("deradiff", "typechecker.check")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub; the hub's own tests run a local server


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
