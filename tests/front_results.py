"""An experiment with images and features of every method, for what is said of fronts and of cost."""

from pathlib import Path
from typing import Any

import numpy as np

from deradiff.experiments.drawings import kind_of
from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.results import Results
from deradiff.experiments.running import contents
from deradiff.experiments.store import Store

STEPS = 8
PLAN: dict[str, Any] = {
    "name": "made-up",
    "reference": "nowhere",
    "models": {
        "strong": {"source": "s", "beta": 100, "family": "dpo"},
        "weak": {"source": "w", "beta": 400, "family": "dpo"},
        "other": {"source": "o", "family": "free"},
    },
    "prompts": {
        "main": {"prompts": [f"a {number}" for number in range(6)], "seeds": "0:2"},
        "cover": {"prompts": [f"b {number}" for number in range(4)], "seeds": "0:4", "substitute_for": "lost ones"},
    },
    "sampling": {"plain": {"scheduler": "euler-a", "steps": STEPS, "guidance_scale": 1.0}},
    "methods": [
        {"method": "realign", "anchors": ["strong"], "lam": [1.5, 0, 0.5, 0.25, 1]},
        {"method": "reference"},
        {"method": "model"},
        {"method": "realign", "anchors": ["strong", "weak"], "targets": ["strong", "weak"]},
        {"method": "realign", "anchors": ["strong"], "targets": ["weak"], "particles": 4},
        {"method": "combine", "lams": [{"strong": 0.3, "other": 0.3}, {"strong": 0.7, "weak": 0.2, "other": 0.1}]},
        {"method": "anneal", "anchors": ["strong"], "schedules": ["power:4", "power:2", "step:0.5"]},
        {"method": "interpolate", "anchors": ["strong"], "lam": [0.5]},
        {"method": "optimize-noise", "reward": "digits", "iterations": 2, "prompts": ["main"]},
    ],
    "scores": ["digits", "bold"],
    "features": ["digits"],
    "report": {"diversity_on": "cover", "neighbours": 3, "unregularised": "strong"},
}


def filled(folder: Path, plan: Plan, lost: str = "") -> Results:
    """An experiment whose every image has made-up scores and features, decided by its identity; `lost` has one less."""
    with Store(folder, create=True) as store:
        store.remember("fingerprints", {"": {"sha256": "0"}} | {name: {"sha256": name} for name in plan.models})
        store.begin({})
        whole = contents(plan, store, fresh=False)
        drawings = whole.drawings
        gone = {item for cell, item in whole.cells.items() if cell.arm.name == lost and cell[1:4] == ("cover", 1, 2)}
        store.add_batches([[(item, {}) for item in drawings]])
        for item, drawing in drawings.items():
            told: dict[str, Any] = {"forward": 20 + drawing.seed, "backward": 10} if drawing.reward_guidance else {}
            reach = sum(lam for _, lam in drawing.anchors)
            random = np.random.default_rng(int(item[:12], 16))
            if drawing.anchors and kind_of(drawing) == "mixture":
                told = {"path_kl": float(random.uniform(1, 9)) * reach}
            if item not in gone:
                store.put([(item, item.encode(), told)], float(random.uniform(1, 2)))
        images = list(store.drawn().values())
        reaches = {image.id: sum(lam for _, lam in drawings[image.id].anchors) for image in images}
        randoms = {image.id: np.random.default_rng(int(image.id[12:24], 16)) for image in images}
        for name in plan.scores:
            scores = [(image, float(randoms[image.id].normal() + reaches[image.id]), None) for image in images]
            store.put_scores("scores", name, scores)
        for name in plan.features:
            vectors = [randoms[i.id].normal(size=3) * (1 + reaches[i.id]) + reaches[i.id] for i in images]
            store.put_scores("features", name, [(i, v, None) for i, v in zip(images, vectors, strict=True)])
        return Results(plan, store)


def named(results: Results, name: str) -> Arm:
    arm = results.named(name)
    assert arm is not None
    return arm
