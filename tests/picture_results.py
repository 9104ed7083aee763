"""An experiment whose pictures are plain colours, for what shows them side by side."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deradiff.experiments.plan import Arm, Plan
from deradiff.experiments.reporting.exhibits import Exhibit
from deradiff.experiments.results import Results
from deradiff.experiments.running import contents
from deradiff.experiments.store import Store
from deradiff.sweep.sheets import GAP, MARGIN, ROW_LABEL_WIDTH

WORDS = ("a cat", "a dog", "a fox", "an owl", "a hen")
MODELS = {
    "low": {"source": "l", "beta": 100, "family": "dpo"},
    "high": {"source": "h", "beta": 400, "family": "dpo"},
    "mid": {"source": "m", "beta": 200, "family": "dpo"},
    "refl": {"source": "r", "family": "refl"},
}
METHODS: list[dict[str, Any]] = [
    {"method": "reference"},
    {"method": "model"},
    {"method": "realign", "anchors": ["low", "mid", "high"], "targets": ["low", "mid", "high"]},
    {"method": "realign", "anchors": ["low"], "lam": [0, 0.25, 0.75, 1.5], "prompts": ["main"]},
    {"method": "realign", "anchors": ["low"], "targets": ["high"], "particles": 2, "prompts": ["main"]},
    {"method": "combine", "lams": [{"low": 0.5, "refl": 0.5}]},
    {"method": "anneal", "anchors": ["low"], "schedules": ["power:1", "power:3", "power:2"]},
    {"method": "interpolate", "anchors": ["low"], "lam": [0.2, 0.4, 0.9]},
    {"method": "optimize-noise", "reward": "bold", "iterations": 3, "prompts": ["few"]},
]
SIDE, CELL = 8, 128


def plan_of(**changes: Any) -> Plan:
    prompts = {
        "main": {"prompts": WORDS, "seeds": "3:4"},
        "few": {"prompts": WORDS[1:3], "seeds": 3},
        "wide": {"prompts": WORDS[:2], "seeds": "0:9", "substitute_for": "the 40 prompts"},
    }
    content: dict[str, Any] = {
        "name": "t",
        "reference": "base",
        "models": MODELS,
        "prompts": prompts,
        "sampling": {"s": {"steps": 2}},
        "methods": METHODS,
        "scores": ["bold"],
        "features": ["digits"],
        "report": {"healthy": "high", "hacked": ["low", "mid"], "unregularised": "low", "pictures": 2},
    }
    return Plan.model_validate(content | changes)


def colour_of(item: str) -> tuple[int, int, int]:
    """Every image has a colour of its own, by its identity."""
    return int(item[:2], 16), int(item[2:4], 16), int(item[4:6], 16)


def png(item: str, size: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), colour_of(item)).save(buffer, format="PNG")
    return buffer.getvalue()


def vector_of(item: str) -> np.ndarray:
    return np.random.default_rng(int(item[:12], 16)).normal(size=6).astype(np.float32)


Wanted = Callable[[Any], bool]


def results_of(
    folder: Path, plan: Plan, wanted: Wanted = lambda cell: True, vector: Callable[[Any, str], Any] | None = None
) -> Results:
    """A store with an image for every cell that is wanted, with a score and features."""
    with Store(folder, create=True) as store:
        store.begin({})
        store.remember("fingerprints", {name: {"sha256": name or "base"} for name in ("", *plan.models)})
        cells = {item: cell for cell, item in contents(plan, store, fresh=False).cells.items() if wanted(cell)}
        store.add_batches([[(item, {}) for item in cells]])
        store.put([(item, png(item), {}) for item in cells], 1.0)
        drawn = store.drawn()
        store.put_scores("scores", "bold", [(drawn[item], float(colour_of(item)[0]), None) for item in cells])
        vectors = {item: vector(cell, item) if vector else vector_of(item) for item, cell in cells.items()}
        told = [(drawn[item], each, None) for item, each in vectors.items() if each is not None]
        store.put_scores("features", "digits", told)
        return Results(plan, store)


def colour(results: Results, name: str, prompts: str, row: int, column: int) -> tuple[int, int, int]:
    path = results.image(arm(results, name), prompts, row, column)
    assert path is not None
    return colour_of(path.stem)


def arm(results: Results, name: str) -> Arm:
    named = results.named(name)
    assert named is not None
    return named


def cells(exhibit: Exhibit, rows: int, columns: int) -> list[list[Any]]:
    """The colours in the middle of a contact sheet's cells: its last row ends at the margin."""
    picture = exhibit.picture
    assert picture is not None and exhibit.figure is None
    top = picture.height - MARGIN - rows * (CELL + GAP)
    left = MARGIN + ROW_LABEL_WIDTH
    return [
        [
            picture.getpixel((left + j * (CELL + GAP) + CELL // 2, top + i * (CELL + GAP) + CELL // 2))
            for j in range(columns)
        ]
        for i in range(rows)
    ]
