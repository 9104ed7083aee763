"""Numbers about sets of images: how diverse, how far from another set, how well scores agree.

Images become features (`features.load`), features become numbers: `frechet_distance`, `precision_and_recall` and
`spectral_distance` of a set against a reference's, `mean_pairwise_distance` and `vendi_score` of the images of a prompt
among themselves. Scores become statistics: `agreement_of` and its relatives for approximated against retrained models,
`paired_difference` for two methods, `non_dominated` for trade-offs.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deradiff.measures import features as features
    from deradiff.measures.agreement import agreement_by_lam as agreement_by_lam
    from deradiff.measures.agreement import agreement_of as agreement_of
    from deradiff.measures.agreement import error_distribution as error_distribution
    from deradiff.measures.agreement import paired_difference as paired_difference
    from deradiff.measures.agreement import scatter_of as scatter_of
    from deradiff.measures.diversity import mean_pairwise_distance as mean_pairwise_distance
    from deradiff.measures.diversity import vendi_score as vendi_score
    from deradiff.measures.frechet import frechet_distance as frechet_distance
    from deradiff.measures.fronts import non_dominated as non_dominated
    from deradiff.measures.precision_recall import precision_and_recall as precision_and_recall
    from deradiff.measures.spectral import reference_mismatch as reference_mismatch
    from deradiff.measures.spectral import spectral_distance as spectral_distance
    from deradiff.measures.spectral import spectrum as spectrum
    from deradiff.measures.statistics import Statistics as Statistics

# torch, SciPy and transformers take seconds to import: a name is fetched from its module when somebody asks for it.
_NAMES = {
    "agreement": ("agreement_by_lam", "agreement_of", "error_distribution", "paired_difference", "scatter_of"),
    "diversity": ("mean_pairwise_distance", "vendi_score"),
    "frechet": ("frechet_distance",),
    "fronts": ("non_dominated",),
    "precision_recall": ("precision_and_recall",),
    "spectral": ("reference_mismatch", "spectral_distance", "spectrum"),
    "statistics": ("Statistics",),
}
_HOME = {name: f"deradiff.measures.{module}" for module, names in _NAMES.items() for name in names}
__all__ = [
    "Statistics",
    "agreement_by_lam",
    "agreement_of",
    "error_distribution",
    "features",
    "frechet_distance",
    "mean_pairwise_distance",
    "non_dominated",
    "paired_difference",
    "precision_and_recall",
    "reference_mismatch",
    "scatter_of",
    "spectral_distance",
    "spectrum",
    "vendi_score",
]


def __getattr__(name: str) -> Any:
    if name == "features":
        return import_module("deradiff.measures.features")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'deradiff.measures' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
