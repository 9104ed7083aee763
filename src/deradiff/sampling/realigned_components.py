"""The denoisers of a pipeline that are realigned, each with its anchors and λ; most pipelines have one.

Wan 2.2 has one for high noise and one for low, Ideogram 4 one for what is guided away from, Stable Cascade one for each
stage. They share the dial, its scheduler hooks and its runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from deradiff.algorithm.lams import Lams, parse_lam
from deradiff.anchors.full_weights import DIAL
from deradiff.sampling import blocked_methods
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers, NonFinitePrediction
from deradiff.sampling.module_hook import hook_module
from deradiff.sampling.per_model import alone, merged
from deradiff.sampling.realigned_steps import RealignedSteps
from deradiff.sampling.runs import Run

_DISTILLED = ("guidance", "timestep_cond")
"""What tells a denoiser a guidance scale: Flux's argument, and that of latent consistency models."""


@dataclass(eq=False)
class RealignedComponent:
    """One denoiser of a pipeline: `name` is its component's, `reference` the module itself."""

    name: str
    denoisers: Denoisers
    lams: Lams
    steps: RealignedSteps
    owner: Any
    """Stands for the dial, of which this is a component."""

    @property
    def reference(self) -> Any:
        """The module that the pipeline calls."""
        return self.denoisers.reference

    def hook(self, dial: Any, call: Callable[..., Any]) -> Callable[[], None]:
        """From now on `call` answers for the reference; returns what undoes this."""
        return hook_denoisers(self.denoisers, dial, call)

    def answer(self, run: Run, watching: bool, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the reference is called for, of every model that has a weight at this step of `run`.

        Raises `FloatingPointError` where a prediction is not finite.
        """
        evaluation = self.steps.evaluation(
            run,
            self,
            self.denoisers.argument("timestep", args, kwargs),
            rows=len(self.denoisers.argument("input", args, kwargs)),
            distilled=any(kwargs.get(name) is not None for name in _DISTILLED),
            watching=watching,
        )
        run.evaluated.add((evaluation.evaluated, evaluation.blend is None))
        if self.steps.method == "mixture" or len(evaluation.models) == 1:
            run.pending = evaluation
        share = evaluation.images if run.fresh else None  # all λ of one noise begin alike
        try:
            outputs = self.denoisers.predict(evaluation.evaluated, args, kwargs, evaluation.blend, share=share)
            if len(outputs) > 1:
                evaluation.returned.append(outputs)
                return merged(outputs, evaluation)
            ((model, output),) = outputs.items()
            return alone(output, model, evaluation)
        except NonFinitePrediction as error:
            run.pending, problem = None, str(error)
        raise FloatingPointError(
            f"{problem} at {evaluation.progress.steps:.0%} of the sampling steps (timestep "
            f"{run.scheduler.timesteps[evaluation.at]:g}): sampling stopped. In half precision, try bfloat16 or "
            "float32; with λ outside [0, 1], one nearer to it"
        )


def hook_denoisers(denoisers: Denoisers, owner: Any, call: Callable[..., Any]) -> Callable[[], None]:
    """From now on `call` answers for the reference of `denoisers`, in the name of `owner`; returns what undoes this.

    Wherever the reference is sent, whatever precision it is brought to, the anchors go too. What a realigned denoiser
    cannot do is refused.
    """

    def apply(*args: Any, **kwargs: Any) -> nn.Module:
        module = type(denoisers.reference)._apply(denoisers.reference, *args, **kwargs)
        for anchor in denoisers.anchors:
            if anchor.module is not None:
                anchor.module._apply(_staying(args[0], anchor.device), *args[1:], **kwargs)
        denoisers.forget_blend()
        return module

    methods: dict[str, Callable[..., Any]] = {"_apply": apply, "fuse_lora": blocked_methods.fusing}
    if any(anchor.adapter for anchor in denoisers.anchors):
        methods["load_lora_adapter"] = denoisers.load_style
        methods["save_pretrained"] = blocked_methods.saving
        methods["fuse_qkv_projections"] = blocked_methods.fusing_projections
    return hook_module(denoisers.reference, owner, call, methods)


def require_free(denoiser: nn.Module) -> None:
    """Raise `DialError` where a denoiser is realigned already, by a dial or by what a guider has attached."""
    if (owner := denoiser.__dict__.get(DIAL)) is not None:
        by = getattr(owner, "called", "dial")
        raise DialError(f"this pipeline is already realigned, {owner!r}: turn {by}.lam, or call {by}.remove() first")


def lams_by_component(lam: Any, anchors: Mapping[str, Sequence[str]]) -> dict[str, Lams]:
    """λ of every component, whose `anchors` are given: one for all of them, or a dictionary with theirs.

    Raises `ValueError` where `parse_lam` does, and for a dictionary in which a component is missing.
    """
    if len(anchors) == 1 or not isinstance(lam, Mapping) or not {*lam} & {*anchors}:
        return {name: parse_lam(lam, own) for name, own in anchors.items()}
    if {*lam} != {*anchors}:
        raise ValueError(f"λ by component is one for each of {list(anchors)}; got {list(lam)}")
    return {name: parse_lam(lam[name], own) for name, own in anchors.items()}


def as_given(lams: Mapping[str, Lams]) -> Any:
    """λ as it can be read back: that of the components where they have the same, a dictionary of theirs otherwise."""
    raws = [own.raw for own in lams.values()]
    return raws[0] if all(raw == raws[0] for raw in raws) else MappingProxyType(dict(zip(lams, raws, strict=True)))


def _staying(change: Callable[[Tensor], Tensor], device: torch.device | None) -> Callable[[Tensor], Tensor]:
    """`change` of a tensor's device and dtype, but for its device where there is one to stay on."""
    return change if device is None else lambda tensor: tensor.to(change(tensor.new_empty(0)).dtype)
