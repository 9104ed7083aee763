"""The cases of our own of tests/conformance: every pipeline class of diffusers is built, or left out with a reason."""

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest

TESTS = Path(__file__).parent
RECORD = json.loads((TESTS.parent / "docs/data/pipelines.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def table() -> Any:
    sys.path.insert(0, str(TESTS / "conformance"))
    try:
        import own_cases

        yield own_cases
    finally:
        sys.path.remove(str(TESTS / "conformance"))


def test_every_case_is_of_a_class_that_there_is_and_of_no_other_cases(table: Any) -> None:
    names = [case.pipeline for case in table.OWN_CASES]
    assert len({*names}) == len(names)
    for case in table.OWN_CASES:
        assert issubclass(case.pipeline_class, diffusers.DiffusionPipeline), case.pipeline
        assert case.test_class().__module__ == table.MODULE


def test_the_record_has_these_cases_and_no_class_of_diffusers_is_forgotten(table: Any) -> None:
    own = {name for name, pipeline in RECORD["pipelines"].items() if pipeline["tests"] == [f"own.{name}"]}
    assert own == {case.pipeline for case in table.OWN_CASES}
    assert RECORD["left out"] == table.LEFT_OUT and not own & {*table.LEFT_OUT}
    exported = {name for group in diffusers.pipelines._import_structure.values() for name in group}
    pipelines = {name for name in exported if "Pipeline" in name and not name.startswith(("Auto", "Flax", "Onnx"))}
    pipelines = {name for name in pipelines if not name.endswith("Output")} - {"DiffusionPipeline"}
    known = {name.removesuffix("Wrapper") for name in RECORD["pipelines"]}
    # Tests of some of Cosmos' name the class that they put around it.
    known |= {f"{name}Pipeline" for name in known} | {*table.LEFT_OUT}
    assert pipelines <= known, sorted(pipelines - known)


@pytest.mark.parametrize("name", ["DDPMPipeline", "ErnieImagePipeline"])
def test_a_case_that_needs_no_sibling_runs(table: Any, name: str) -> None:
    (case,) = (case for case in table.OWN_CASES if case.pipeline == name)
    pipe = case.pipeline_class(**case.made_components())
    pipe.set_progress_bar_config(disable=True)
    assert pipe(**case.made_inputs()).images is not None
