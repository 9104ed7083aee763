"""A small experiment on the digits, and workers that need no model: for the tests of plans, stores and runs."""

import hashlib
import io
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deradiff.experiments.plan import Plan, parse_plan
from deradiff.experiments.reporting.report_page import page
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.experiments.worker import Done, Draw, Score, Task
from deradiff.sweep.description import Drawing

SMALL: dict[str, Any] = {
    "name": "small",
    "reference": "digits",
    "models": {
        "strong": {"source": "digits:30", "beta": 30, "family": "dpo"},
        "weak": {"source": "digits:500", "beta": 500, "family": "dpo"},
    },
    "prompts": {"few": {"prompts": ["the digit one", "the digit two"], "seeds": "0:1"}},
    "sampling": {"ancestral": {"scheduler": "euler-a", "steps": 3, "guidance_scale": 1.0}},
    "methods": [{"method": "reference"}, {"method": "model"}, {"method": "realign", "targets": "all"}],
    "scores": ["digits"],
    "batch_size": 4,
}


def small(**changes: Any) -> Plan:
    """The small plan with other values for some keys."""
    return parse_plan(SMALL | changes, "the small plan")


def silent(*_: Any) -> None:
    """A report that nobody reads."""


def fake_png(drawing: Drawing) -> bytes:
    """A picture that only the drawing decides."""
    level = hashlib.sha256(repr(drawing).encode()).digest()
    buffer = io.BytesIO()
    Image.fromarray(np.frombuffer(level[:27], dtype=np.uint8).reshape(3, 3, 3).copy()).save(buffer, format="PNG")
    return buffer.getvalue()


@dataclass
class Fake:
    """A executor of one that draws without models, and remembers what it was asked for."""

    size: int = 1
    fail_on: tuple[bytes, ...] = ()
    draws: list[Draw] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    _tasks: dict[int, Task] = field(default_factory=dict)

    def submit(self, worker: int, task: Task) -> int:
        ticket = len(self.draws) + len(self.scores)
        if isinstance(task, Draw):
            self.draws.append(task)
        else:
            self.scores.append(task)
        self._tasks[ticket] = task
        return ticket

    def wait(self, pending: Collection[int]) -> int:
        return min(pending)

    def result(self, ticket: int) -> Done:
        task = self._tasks.pop(ticket)
        if isinstance(task, Draw):
            drawn = [(fake_png(task.drawings[place]), {"log_weight": 0.0}) for place in task.wanted]
            return Done(drawn, 0.001)
        values = [
            (None, "ValueError: no") if png in self.fail_on else (float(len(prompt)), None)
            for png, prompt in zip(task.images, task.prompts, strict=True)
        ]
        return Done(values, 0.001)

    def close(self) -> None:
        pass


def files(folder: Path) -> dict[str, str]:
    """Every file under the images of an experiment, by its hash."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "images").rglob("*"))
        if path.is_file()
    }


def reported(folder: Path) -> str:
    """The report's page of an experiment, without its exhibits."""
    with Store(folder, write=False) as store:
        return page([Results(parse_plan(store.fact("plan"), "the plan"), store)], store, [], [])
