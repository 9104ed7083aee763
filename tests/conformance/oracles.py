"""What λ between 0 and 1 has to give, by two ways that share no code with deradiff.

- lock_step: two untouched pipelines whose guided predictions are mixed where they meet at a scheduler's step; where the
  step is not affine in the prediction, their posteriors are.
- wrapper: a module in the denoiser's place that returns the mixed prediction. The same where guidance and step are
  affine in it; it judges where the other cannot be had.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import nn

from arrays import Arrays, difference
from cases import Case, Changes, copied, scheduler_classes
from lock_step import in_lock_step, of_posteriors, of_predictions
from mixing import mixed
from results import Check, NotTried, described

Oracle = Literal["lock_step", "wrapper"]

HALF = 0.5


class Oracles:
    """What a case gives at λ = ½ with these anchors, which take the denoisers' places by name."""

    def __init__(self, case: Case, anchors: Mapping[str, nn.Module], path: str):
        self.case, self.anchors = case, anchors
        posterior = path == "posterior"
        self._combined = (of_posteriors if posterior else of_predictions)(HALF)
        self._oracles: tuple[Oracle, ...] = ("lock_step",) if posterior else get_args(Oracle)
        self.steps: list[str] = []

    def anchor_pipeline(self) -> Any:
        """The untouched pipeline with the anchors in their places."""
        return self.case.build(copied(self.anchors))

    def lock_step(self, changes: Changes = dict) -> Arrays:
        """By two pipelines that meet at every step."""
        pipes = [self.case.build(), self.anchor_pipeline()]
        draws = [functools.partial(self.case.run, pipe, changes) for pipe in pipes]
        output, self.steps = in_lock_step(draws, scheduler_classes(pipes[0]), self._combined)
        return output

    def wrapper(self, changes: Changes = dict) -> Arrays:
        """By a denoiser that is the mixture."""
        own = copied(self.case.denoisers)
        modules = {name: mixed_module(own[name], anchor, HALF) for name, anchor in self.anchors.items()}
        return self.case.run(self.case.build(modules), changes)

    def judged(
        self, output: Arrays, scale: float, same: float, changes: Changes = dict, *, both: bool = False
    ) -> Check:
        """Whether `output` is what the first oracle gives that can be had; where `both`, the other is told as well.

        Differences are in units of `scale`; those below `same` are none.
        """
        numbers: dict[str, Any] = {}
        decided: float | None = None
        for name in self._oracles:
            if decided is not None and not both:
                break
            try:
                expected = getattr(self, name)(changes)
            except Exception as error:
                numbers[f"no {name}"] = described(error)
                continue
            numbers[name] = difference(output, expected) / scale
            decided = numbers[name] if decided is None else decided
        if decided is None:
            raise NotTried("no oracle can be had: " + "; ".join(str(why) for why in numbers.values()))
        if decided < same:
            return Check("passes", numbers=numbers, difference=decided)
        return Check("wrong", f"{decided:.1e} of the anchor's effect from the oracle", numbers, decided)


def mixed_module(reference: nn.Module, anchor: nn.Module, weight: float) -> nn.Module:
    """A copy of the reference whose forward returns the mixture of both models' outputs."""
    mixture: Any = copy.deepcopy(reference)
    models = copy.deepcopy(reference), copy.deepcopy(anchor)
    own = type(mixture).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        for model in models:
            _follow(mixture, model)
        state = torch.get_rng_state()
        outputs = []
        for model in models:
            torch.set_rng_state(state)
            outputs.append(model(*_own(args), **_own(kwargs)))
        return mixed(outputs[0], outputs[1], weight)

    forward.__signature__ = inspect.signature(functools.partial(own, mixture))  # type: ignore[attr-defined]
    mixture.forward = forward
    return mixture


def _follow(mixture: Any, model: Any) -> None:
    """Give `model` the attention processors that the pipeline has set in the call (PAG, IP-Adapter)."""
    for path, module in mixture.named_modules():
        if hasattr(module, "set_processor") and hasattr(module, "processor"):
            target = model.get_submodule(path)
            if target.processor is not module.processor:
                target.set_processor(module.processor)


def _own(value: Any) -> Any:
    """Lists and dictionaries of one's own, for some models take out of what they are given (T2I-Adapters)."""
    if isinstance(value, list):
        return [_own(entry) for entry in value]
    if isinstance(value, tuple):
        return tuple(_own(entry) for entry in value)
    if isinstance(value, dict):
        return {key: _own(entry) for key, entry in value.items()}
    return value
