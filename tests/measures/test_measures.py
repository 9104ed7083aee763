"""The face of `deradiff.measures`: every name can be had, and importing it imports nothing heavy."""

import pytest

from deradiff import measures
from test_package import HEAVY, modules_after


def test_importing_imports_nothing_heavy() -> None:
    assert modules_after("import deradiff.measures; dir(deradiff.measures)") & HEAVY == set()


def test_every_export_can_be_had_and_an_unknown_one_is_an_attribute_error() -> None:
    assert {"features", "frechet_distance", "agreement_of"} <= set(measures.__all__) <= set(dir(measures))
    for name in measures.__all__:
        assert getattr(measures, name) is getattr(measures, name)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        _ = measures.nothing_of_the_kind
