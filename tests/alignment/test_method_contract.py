"""Every method of alignment that has a name is tried, by the command on the digits, or for flows on a small one."""

from deradiff.alignment.methods import METHODS
from test_align_methods import OPTIONS
from test_flow_policies import TRAINED


def test_every_method_is_tried() -> None:
    assert OPTIONS.keys() == {name for name, method in METHODS.items() if method.aligns(is_flow=False)}
    assert TRAINED.keys() == {name for name, method in METHODS.items() if not method.aligns(is_flow=False)}
