"""What is kept of guided images is enough for the verdict that the whole run has."""

import json

import torch

from deradiff.algorithm.guided_weights import GuidedWeights
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.verdict import verdict
from deradiff.experiments.arms import Arm
from deradiff.experiments.results import _weights
from deradiff.experiments.store import StoredDiagnostics
from deradiff.sweep.batches import Diagnostics

IMAGES = 64


def test_a_guided_run_is_judged_by_the_parts_of_its_weights() -> None:
    conditional, unconditional, scores = torch.randn(3, IMAGES, dtype=torch.float64) * torch.tensor([[0.3], [0.1], [1]])
    guidance = GuidedWeights(1.5, conditional, unconditional, torch.full((IMAGES,), 1e-4, dtype=torch.float64))
    run = ImportanceWeights(
        log_weights=conditional,
        log_ratios={},
        path_kl=None,
        memoryless=True,
        lams=torch.full((1, IMAGES), 0.5, dtype=torch.float64),
        obstacles=frozenset({"guidance"}),
        predictions=4,
        guidance=guidance,
    )
    kept = [json.loads(json.dumps(Diagnostics(run.rows(slice(i, i + 1))).stored())) for i in range(IMAGES)]
    arm = Arm("a", "realign", (("anchor", 0.5),))
    again = _weights(arm, kept)
    assert again.guidance is not None and torch.allclose(again.guidance.combined, guidance.combined)
    judged, whole = (verdict(weights, scores, baseline=-3.0) for weights in (again, run))
    assert judged.words == whole.words and judged.kind != "no target" and "1.5" in judged.words
    old = [{name: value for name, value in record.items() if name != "guidance"} for record in kept]
    assert verdict(_weights(arm, old), scores, baseline=-3.0).kind == "no target"  # of stores that do not have it
    assert StoredDiagnostics.model_validate(old[0]).guidance is None
