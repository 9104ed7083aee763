"""What a checkpoint holds: tensors in `state.safetensors`, and everything else in `progress.json`.

Both are read by what they should be: the curve and the step by a schema, each tensor by its parameter. Nothing is
run, as a pickle would be.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from deradiff.files import tensors
from deradiff.files.reading import Record

TENSORS, PROGRESS = "state.safetensors", "progress.json"

WHAT, CURE = "checkpoint of an alignment", "delete the folder to begin anew, or name another"

PICKLED = "state.pt"
"""In a checkpoint of version 0.1: a pickle, which is read no more."""

LISTS = ("parameters", "average", "best", "old")
"""Of tensors, one for each parameter, or none."""


class CurveRecord(Record):
    """A `training.LossCurve`."""

    step: list[Annotated[int, Field(ge=0)]]
    train: list[float]
    held_out: list[float]
    stopped: str
    kept_step: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _complete(self) -> CurveRecord:
        if not len(self.step) == len(self.train) == len(self.held_out):
            raise ValueError("step, train and held_out of a curve must be as long as each other")
        if self.step != sorted(set(self.step)):
            raise ValueError("the steps of a curve must ascend")
        return self


class TrainingProgress(Record):
    """How far a training has come, with what of its optimizer is no tensor."""

    identity: str
    step: Annotated[int, Field(ge=0)]
    recent: Annotated[float, Field(allow_inf_nan=False)]
    curve: CurveRecord
    data: dict[str, Any]
    numbers: dict[str, dict[str, bool | int | float]] = Field(default_factory=dict)
    """By parameter and name."""
    scaler: dict[str, int | float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _begun(self) -> TrainingProgress:
        if not self.curve.step or self.curve.step[-1] > self.step:
            raise ValueError(f"its curve ends at {self.curve.step[-1:]}, and it says that {self.step} steps are done")
        return self


@dataclass
class TrainingState:
    """The tensors of a training: whole, in the order of the parameters.

    `optimizer` has for the number of each parameter what its optimizer keeps of it, tensors and numbers. The
    optimizer's settings are not kept: they are a function of the plan.
    """

    parameters: list[Tensor]
    average: list[Tensor]
    best: list[Tensor]
    old: list[Tensor]
    optimizer: dict[int, dict[str, Any]]
    scaler: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, state: TrainingState, progress: Mapping[str, Any]) -> None:
    """Fill `folder`. Raises `OSError`, also where the library of the tensors reports a full disk in its own way."""
    held = {f"{name}.{i}": tensor for name in LISTS for i, tensor in enumerate(getattr(state, name))}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in state.optimizer.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                held[f"optimizer.{index}.{name}"] = value
            elif value is not None:
                numbers.setdefault(str(index), {})[name] = value
    try:
        save_file(_apart(held), folder / TENSORS)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"{TENSORS}: {error}") from error
    content = {**progress, "numbers": numbers, "scaler": state.scaler}
    (folder / PROGRESS).write_text(json.dumps(content), encoding="utf-8")


def read_state(
    folder: Path, progress: TrainingProgress, shapes: Sequence[torch.Size], plan: Any, has_old: bool = False
) -> TrainingState:
    """The tensors of a training whose parameters have these shapes; `has_old`: with a policy of its own that draws.

    Raises `ValueError` for a file that is cut or missing, and for tensors of another model or optimizer.
    """
    path = folder / TENSORS
    try:
        with tensors.opened(path, WHAT, CURE) as file:
            held = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except OSError as error:
        raise ValueError(f"{folder} is no {WHAT}: {error}: {CURE}") from None
    wanted = {"parameters": True, "average": bool(plan.average), "best": bool(plan.patience), "old": has_old}
    lists = {name: [held.pop(f"{name}.{i}", None) for i in range(len(shapes) * wanted[name])] for name in LISTS}
    for name, values in lists.items():
        for i, value in enumerate(values):
            if value is None or value.shape != shapes[i] or not value.is_floating_point():
                other = "missing" if value is None else f"{list(value.shape)} in {value.dtype}"
                raise ValueError(
                    f"{path} is of another model: {name}.{i} is {other}, its parameter has the shape "
                    f"{list(shapes[i])}: {CURE}"
                )
    optimizer = _of_optimizer(path, held, progress, shapes)
    if plan.optimizer == "adamw":
        _require_adamw(path, optimizer, shapes)
    return TrainingState(**lists, optimizer=optimizer, scaler=dict(progress.scaler))


def _of_optimizer(
    path: Path, held: dict[str, Tensor], progress: TrainingProgress, shapes: Sequence[torch.Size]
) -> dict[int, dict[str, Any]]:
    states: dict[int, dict[str, Any]] = {}
    known = {str(i): i for i in range(len(shapes))}
    named = [(name.split(".", 2), value) for name, value in held.items()]
    numbers = [(["optimizer", i, key], value) for i, of in progress.numbers.items() for key, value in of.items()]
    for parts, value in [*named, *numbers]:
        if len(parts) != 3 or parts[0] != "optimizer" or parts[1] not in known:
            raise ValueError(f"{path} is of another training: {'.'.join(parts)[:80]!r} belongs to none here: {CURE}")
        states.setdefault(known[parts[1]], {})[parts[2]] = value
    return states


def _require_adamw(path: Path, optimizer: Mapping[int, Mapping[str, Any]], shapes: Sequence[torch.Size]) -> None:
    for i, values in optimizer.items():
        like = {"step": torch.Size([]), "exp_avg": shapes[i], "exp_avg_sq": shapes[i]}
        if {name: getattr(value, "shape", None) for name, value in values.items()} != like:
            raise ValueError(f"{path} is of another optimizer: it holds {', '.join(values)} of parameter {i}: {CURE}")


def _apart(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are laid out in order and share no memory, as the file asks for; an 8-bit optimizer's tables do."""
    seen: set[int] = set()
    separate = {}
    for name, value in held.items():
        ordered = value.detach().contiguous()
        separate[name] = ordered.clone() if ordered.data_ptr() in seen else ordered
        seen.add(ordered.data_ptr())
    return separate
