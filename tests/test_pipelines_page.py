"""What the documentation says about pipelines is what tests/conformance found."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

import deradiff

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "docs/data/pipelines.json").read_text(encoding="utf-8"))
    return found


def test_the_page_is_drawn_from_the_record(record: dict[str, Any]) -> None:
    spec = importlib.util.spec_from_file_location("write_pipelines", ROOT / "docs/write_pipelines.py")
    assert spec is not None and spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert (ROOT / "docs/tasks/pipelines.md").read_text(encoding="utf-8") == writer.page(record)


def test_nothing_is_wrong_in_silence_and_every_refusal_has_a_reason(record: dict[str, Any]) -> None:
    assert record["counts"]["wrong"] == record["counts"]["crashes"] == 0
    refused = [pipeline for pipeline in record["pipelines"].values() if pipeline["verdict"] == "refused"]
    assert len(refused) == record["counts"]["refused"]
    assert all(pipeline["reasons"] for pipeline in refused)


def test_readme_and_docstring_say_how_many(record: dict[str, Any]) -> None:
    share = f"{record['counts']['passes']} of the {len(record['pipelines'])} pipeline classes"
    version = record["versions"]["diffusers"]
    assert deradiff.realign.__doc__ is not None
    for text in ((ROOT / "README.md").read_text(encoding="utf-8"), deradiff.realign.__doc__):
        words = " ".join(text.split())
        assert share in words and f"diffusers {version}" in words
