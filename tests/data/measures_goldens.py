"""Makes `measures_goldens.json`: what other people's code says about the sets and pictures of `measures_inputs.py`.

`test_measures_precision_recall.py`, `test_measures_frechet.py` and `test_measures_inception.py` must find the same:

- precision and recall by `prdc`, that of Naeem et al. 2020;
- the Fréchet distance by `torchmetrics`, from means and covariances in float64;
- features by torch-fidelity's Inception v3, with random weights, every 64th of each picture.

None of these is installed beside the library. It was run once, in an environment of its own that sees the library's
packages. torch-fidelity needs torchvision, but its Inception does not: that module is imported alone.

    python -m venv gold
    echo "$PWD/.venv/lib/python3.11/site-packages" > gold/lib/python3.11/site-packages/library.pth
    gold/bin/pip install --no-deps prdc==0.2 torchmetrics==1.9.0 lightning-utilities==0.15.3 torch-fidelity==0.4.0
    PYTHONPATH=tests gold/bin/python tests/data/measures_goldens.py
"""

import hashlib
import json
import sys
import tempfile
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from prdc import compute_prdc

from measures_inputs import FEATURE_SETS, NEIGHBOURS, feature_sets, pictures, random_weights


def modules_alone(package: str) -> None:
    """Make the modules of `package` importable one by one, without what the package itself imports."""
    spec = find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None
    sys.modules[package] = alone = ModuleType(package)
    alone.__spec__, alone.__path__ = spec, list(spec.submodule_search_locations)


def precision_and_recall(name: str) -> dict[str, dict[str, float]]:
    """By k."""
    reference, generated = (features.numpy() for features in feature_sets(name))
    found = {k: compute_prdc(reference, generated, nearest_k=k) for k in NEIGHBOURS}
    return {str(k): {which: float(each[which]) for which in ("precision", "recall")} for k, each in found.items()}


def frechet(name: str) -> float:
    """One number."""
    moments = [moment for x in feature_sets(name) for moment in (x.mean(0), torch.cov(x.T))]
    return float(import_module("torchmetrics.image.fid")._compute_fid(*moments))


def inception() -> dict[str, Any]:
    """The names and shapes of the tensors, hashed, and the features of the pictures."""
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(self: torch.nn.Module, state: Any) -> None:
        shapes.update({n: tuple(t.shape) for n, t in self.state_dict().items() if "tracked" not in n})
        torch.nn.Module.load_state_dict(self, random_weights(shapes), strict=False)

    module.FeatureExtractorInceptionV3.load_state_dict = remember
    with tempfile.NamedTemporaryFile() as nothing:
        torch.save({}, nothing.name)
        network = module.FeatureExtractorInceptionV3("inception", ["2048"], nothing.name)
    features = [network(picture[None])[0][0, ::64].tolist() for picture in pictures()]
    listed = "\n".join(f"{name} {shapes[name]}" for name in sorted(shapes))
    return {"tensors": len(shapes), "sha256": hashlib.sha256(listed.encode()).hexdigest(), "features": features}


def main() -> None:
    """Write the file beside this one."""
    modules_alone("torch_fidelity")  # torchmetrics imports it too
    goldens = {
        "versions": {name: version(name) for name in ("prdc", "torchmetrics", "torch-fidelity", "torch")},
        "precision and recall": {name: precision_and_recall(name) for name in FEATURE_SETS},
        "frechet": {name: frechet(name) for name in FEATURE_SETS},
        "inception": inception(),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(goldens, indent=2) + "\n")


if __name__ == "__main__":
    main()
