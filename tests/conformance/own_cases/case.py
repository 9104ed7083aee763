"""What a case of our own is: a pipeline class, components that it is built of, and the inputs of a call."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adjustments import adjust_tests
from cases import seed_all, test_inputs

Made = Callable[[], dict[str, Any]]
"""Makes components or inputs, anew at every call; `dict` makes none."""

MODULE = "own"
"""Where the test classes made here say that they are from: `own.ChromaInpaintPipeline`."""


@dataclass(frozen=True)
class Sibling:
    """The test class of a related pipeline, by its module below `tests.pipelines` and its name."""

    module: str
    name: str

    def test(self) -> Any:
        """One of it. The checkout has to be importable."""
        return getattr(_module(self.module), self.name)()

    def components(self) -> dict[str, Any]:
        """Its pipeline's components."""
        made: dict[str, Any] = self.test().get_dummy_components()
        return made

    def inputs(self) -> dict[str, Any]:
        """Its pipeline's inputs."""
        return test_inputs(self.test())


@functools.cache
def _module(name: str) -> Any:
    module = importlib.import_module(f"tests.pipelines.{name}")
    adjust_tests(module)
    return module


@dataclass(frozen=True)
class OwnCase:
    """A pipeline built of what it takes of its sibling's components, and of its own; called in the same way."""

    pipeline: str
    sibling: Sibling | None = None
    components: Made = dict
    inputs: Made = dict
    without: tuple[str, ...] = ()
    """Inputs of the sibling that are left out though the pipeline takes them."""
    module: str = "diffusers"
    """Where the class is; diffusers itself exports a placeholder where a package is missing."""

    @property
    def pipeline_class(self) -> Any:
        """The class in diffusers."""
        return getattr(importlib.import_module(self.module), self.pipeline)

    def made_components(self) -> dict[str, Any]:
        """All components, the sibling's and the case's own."""
        theirs = self.sibling.components() if self.sibling else {}
        seed_all()
        own = self.components()
        return _taken(theirs, self.pipeline_class.__init__, [*own]) | own

    def made_inputs(self) -> dict[str, Any]:
        """All inputs, the sibling's and the case's own."""
        theirs = self.sibling.inputs() if self.sibling else {}
        own = self.inputs()
        return _taken(theirs, self.pipeline_class.__call__, [*own, *self.without]) | own

    def test_class(self) -> type:
        """The case as a test class, which says what diffusers' own say."""
        members = {
            "pipeline_class": self.pipeline_class,
            "get_dummy_components": lambda test: self.made_components(),
            "get_dummy_inputs": lambda test: self.made_inputs(),
            "__module__": MODULE,
        }
        return type(self.pipeline, (), members)


def _taken(values: Mapping[str, Any], function: Any, but: list[str]) -> dict[str, Any]:
    """Those of `values` that `function` takes, but for some."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if name in parameters and name not in but}
