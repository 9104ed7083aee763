"""Every method of alignment that has a name is tried by `test_align_methods`, where one that is added needs options."""

from deradiff.alignment.methods import METHODS
from test_align_methods import OPTIONS


def test_every_method_is_tried() -> None:
    assert OPTIONS.keys() == METHODS.keys()
