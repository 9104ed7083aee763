"""Find the λ that a score likes best, in a handful of evaluations (DeRaDiff, appendix A.5).

`run` searches by an experiment in a folder. `maximise` is the search itself, for scores of any origin, and
`algorithm_2` what the paper prints. `Goal.read` says what is wanted; `spaces` has what can be searched.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.search import spaces as spaces
    from deradiff.search.goals import Goal as Goal
    from deradiff.search.goals import Tables as Tables
    from deradiff.search.loop import PointRefused as PointRefused
    from deradiff.search.loop import maximise as maximise
    from deradiff.search.running import run as run

if missing := [name for name in ("botorch", "gpytorch") if find_spec(name) is None]:
    raise ImportError(
        f"searching λ needs {' and '.join(missing)}, the search extra: pip install 'deradiff[search]' (an existing "
        "torch stays)"
    )

# BoTorch takes seconds to import: a name is fetched from its module when somebody asks for it.
_HOME = {
    "Goal": "deradiff.search.goals",
    "PointRefused": "deradiff.search.loop",
    "Tables": "deradiff.search.goals",
    "maximise": "deradiff.search.loop",
    "run": "deradiff.search.running",
}
__all__ = ["Goal", "PointRefused", "Tables", "maximise", "run", "spaces"]


def __getattr__(name: str) -> Any:
    if name == "spaces":
        return import_module("deradiff.search.spaces")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deradiff.search' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
