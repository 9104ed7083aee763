"""A search whose scores are formulas of λ, drawn by an executor that draws nothing."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from deradiff.algorithm.gaussian import IllConditionedMixture
from deradiff.experiments.plan import Plan
from deradiff.experiments.worker import Done, Draw
from deradiff.search import Goal, run, spaces
from deradiff.search.running import SearchOutcome
from deradiff.sweep.description import Drawing
from small_experiment import Fake, silent, small

PROMPTS = [f"the digit {name}" for name in ("zero", "one", "two", "three", "four", "five", "six", "seven")]
SPACE = spaces.lam("strong")
GOAL = Goal.read(["legible"])


def plan(**changes: Any) -> Plan:
    given: dict[str, Any] = {
        "prompts": {"few": {"prompts": PROMPTS, "seeds": "0:1"}},
        "methods": [{"method": "reference"}],
        "scores": ["legible", "bold"],
        "batch_size": 5,
    }
    return small(**given | changes)


def about(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        found: dict[str, Any] = json.loads(image.text["about"])  # type: ignore[attr-defined]
    return found


@dataclass
class Smooth(Fake):
    """Draws pictures that know their λ, and scores them by it; what shares a batch shows in the bytes, as it does."""

    best: float = 0.4
    ends_after: int = 10**6
    no_mixture_beyond: float = 10.0
    broken: tuple[tuple[float, int], ...] = ()
    """(λ, seed) of pictures that no score can be computed of."""
    log_weight: float = 0.0
    log_ratio: float = 0.0
    obstacles: tuple[str, ...] = ()
    done: int = 0
    identities: list[tuple[Any, ...]] = field(default_factory=list)

    def result(self, ticket: int) -> Done:
        task = self._tasks.pop(ticket)
        self.done += 1
        if self.done > self.ends_after:
            raise KeyboardInterrupt
        if isinstance(task, Draw):
            if any(sum(lam for _, lam in drawing.anchors) > self.no_mixture_beyond for drawing in task.drawings):
                raise IllConditionedMixture("λ must stay under the bound")
            self.identities += [
                (d.anchors, d.schedule, d.prompt, d.seed) for d in map(task.drawings.__getitem__, task.wanted)
            ]
            drawn = [(self.png(task.drawings, place), self.told(task.drawings[place])) for place in task.wanted]
            return Done(drawn, 0.001)
        if task.table == "features":
            return Done([(self.vector(about(png)), None) for png in task.images], 0.001)
        return Done([self.score(task.name, about(png)) for png in task.images], 0.001)

    def png(self, drawings: Sequence[Drawing], place: int) -> bytes:
        drawing, info, buffer = drawings[place], PngImagePlugin.PngInfo(), io.BytesIO()
        lam = sum(lam for _, lam in drawing.anchors)
        if drawing.schedule is not None:
            lam *= sum(drawing.schedule(k / 10) for k in range(11)) / 11
        info.add_text("about", json.dumps({"lam": lam, "prompt": drawing.prompt, "seed": drawing.seed}))
        info.add_text("batch", repr([one.seed for one in drawings]))
        Image.new("RGB", (4, 4), (round(100 * lam), 20 * drawing.seed, len(drawing.prompt))).save(
            buffer, "PNG", pnginfo=info
        )
        return buffer.getvalue()

    def told(self, drawing: Drawing) -> dict[str, Any]:
        mixed = [lam for _, lam in drawing.anchors if lam not in (0.0, 1.0)]
        return {
            "log_weight": self.log_weight * drawing.seed if mixed else 0.0,
            "path_kl": 2.0,
            "log_ratios": {"anchor": self.log_ratio * drawing.seed} if mixed and self.log_ratio else {},
            "memoryless": True,
            "obstacles": list(self.obstacles) if mixed else [],
            "predictions": 3,
        }

    def score(self, name: str, picture: dict[str, Any]) -> tuple[Any, Any]:
        lam, ease = picture["lam"], len(picture["prompt"]) / 10 + picture["seed"]
        if (lam, picture["seed"]) in self.broken:
            return None, "ValueError: the score is not finite"
        if name == "bold":
            return 3 * lam + ease, None
        return ease - (lam - self.best) ** 2 * (1 + 0.1 * len(picture["prompt"])), None

    def vector(self, picture: dict[str, Any]) -> Any:
        chance = np.random.default_rng([picture["seed"], *picture["prompt"].encode()])
        return chance.normal(size=4).astype(np.float32) * (1 - 0.9 * min(picture["lam"], 1.0))


def search(folder: Path, executor: Any, goal: Goal = GOAL, given: Plan | None = None, **options: Any) -> SearchOutcome:
    space = options.pop("space", SPACE)
    return run(
        given or plan(), space, goal, folder, lambda: executor, silent, **{"budget": 4, "fraction": 0.0} | options
    )
