"""A test class of diffusers as a case: its dummy pipeline around any denoiser, its inputs, and what comes out."""

from __future__ import annotations

import copy
import inspect
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import nn

from adjustments import adjust_inputs, adjust_pipeline
from arrays import Arrays, arrays_of, difference, equal, is_finite, largest
from results import TOLERANCE, NotTried, described

Changes = Callable[[], dict[str, Any]]
"""Makes arguments of a call that take the place of the test's own; `dict` makes none."""

DENOISERS = (
    ("unet",),
    ("transformer", "transformer_2", "unconditional_transformer"),
    ("prior", "prior_prior", "decoder"),
)
"""The attributes that hold denoisers: the first family of which a pipeline has one."""

_SHARED = ("text_encoder", "vae", "image_encoder", "prior", "vocoder", "safety")
"""Components that no check changes: all pipelines of a case have the same."""

_STATISTICS = ("clip_mean", "clip_std")
"""Parameters of a prior that scale embeddings, and that nothing trains."""

_FEWEST_STEPS = 3


def seed_all() -> None:
    """Put all global generators at their beginning."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def test_inputs(test: Any) -> dict[str, Any]:
    """A test's arguments of a call. Some tests make them for a device, others for the only one."""
    takes_device = "device" in inspect.signature(test.get_dummy_inputs).parameters
    return dict(test.get_dummy_inputs("cpu") if takes_device else test.get_dummy_inputs())


class Case:
    """One test class. `denoisers` are those of its pipeline by name: all of them are perturbed to make the anchor."""

    def __init__(self, test_class: type):
        self.test: Any = test_class()
        self.pipeline_class: type[DiffusionPipeline] = self.test.pipeline_class
        self.call = inspect.signature(self.pipeline_class.__call__).parameters
        self.latent = False
        self.steps: int | None = None
        seed_all()
        self.components: dict[str, Any] = self.test.get_dummy_components()
        self.denoisers: dict[str, nn.Module] = {}
        self.denoisers = denoisers_of(self.build())

    @property
    def main(self) -> str:
        """The first denoiser's name."""
        return next(iter(self.denoisers))

    def build(self, denoisers: Mapping[str, nn.Module] | None = None) -> Any:
        """The pipeline, anew, with these denoisers put in the place of its own."""
        pipe = self.pipeline_class(**self._copied_components())
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval()
        pipe.set_progress_bar_config(disable=True)
        adjust_pipeline(pipe)
        parts = [part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline)]
        for name, denoiser in (denoisers or {}).items():
            own = getattr(pipe, name)
            for holder in (pipe, *parts):  # a part may call it otherwise: `prior_prior` is its prior's `prior`
                for attribute in [key for key, value in vars(holder).items() if value is own]:
                    setattr(holder, attribute, denoiser)
        return pipe

    def _copied_components(self) -> dict[str, Any]:
        seed_all()
        shared = {
            id(component): component
            for name, component in self.components.items()
            if isinstance(component, nn.Module) and name.startswith(_SHARED) and name not in self.denoisers
        }
        try:
            return copy.deepcopy(self.components, shared)
        except Exception:  # a component that cannot be copied is made again
            seed_all()
            made: dict[str, Any] = self.test.get_dummy_components()
            return made

    def inputs(self) -> dict[str, Any]:
        """The arguments of a call, anew: the test's, as latents or arrays, in a few steps."""
        seed_all()
        inputs = test_inputs(self.test)
        if "output_type" in self.call and inputs.get("output_type", "pil") == "pil":
            inputs["output_type"] = "np"
        if "output_type" in self.call and self.latent:
            inputs["output_type"] = "latent"
        if self.steps is not None:
            inputs["num_inference_steps"] = self.steps
        return adjust_inputs(self.pipeline_class.__name__, inputs, self.call)

    def run(self, pipe: Any, changes: Changes = dict) -> Arrays:
        """What the pipeline returns for the test's inputs."""
        inputs = self.inputs() | changes()
        seed_all()
        with torch.no_grad():
            if hasattr(self.test, "get_dummy_inversion_inputs"):
                self._invert(pipe)
                inputs.pop("num_inference_steps", None)
                inputs["output_type"] = "latent" if self.latent else "np"
            return arrays_of(pipe(**inputs))

    def _invert(self, pipe: Any) -> None:
        """LEdits++ begins with an image's noise, which the model itself finds."""
        inversion = self.test.get_dummy_inversion_inputs("cpu")
        inversion["image"] = inversion["image"][0]
        pipe.invert(**inversion)

    def run_with(self, denoisers: Mapping[str, nn.Module], changes: Changes = dict) -> Arrays:
        """What the untouched pipeline around copies of these denoisers returns."""
        return self.run(self.build(copied(denoisers)), changes)


def denoisers_of(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's denoisers by name; none for a pipeline that has them elsewhere."""
    for family in DENOISERS:
        modules = {name: getattr(pipe, name, None) for name in family}
        present = {name: module for name, module in modules.items() if isinstance(module, nn.Module)}
        if present:
            return present
    return {}


def copied(denoisers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies, which may be changed."""
    return {name: copy.deepcopy(denoiser) for name, denoiser in denoisers.items()}


def scheduler_classes(pipe: Any) -> set[type[SchedulerMixin]]:
    """The classes of all schedulers of a pipeline and of the pipelines that it holds."""
    parts = [part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline)]
    held = [value for owner in (pipe, *parts) for value in vars(owner).values()]
    return {type(value) for value in held if isinstance(value, SchedulerMixin)}


@dataclass
class Baseline:
    """What the untouched pipelines return, and how far the two models are apart: the unit of all differences."""

    anchors: dict[str, nn.Module]
    reference: Arrays
    anchor: Arrays
    scale: float
    seconds: float
    """For one run."""
    rounding: float
    """How far the reference moves when the last bits of its denoiser do."""

    def same(self, scale: float) -> float:
        """What is the same, in units of `scale`: pipelines that clip or threshold make much of the last bits."""
        return max(TOLERANCE, 10 * self.rounding / scale)


def baseline(case: Case) -> Baseline:
    """Run the test's own pipeline, and the one with a perturbed denoiser. Raises `NotTried` where that fails."""
    reference = _first_run(case)
    began = time.monotonic()
    if not equal(reference, case.run(case.build())):
        raise NotTried("the plain pipeline does not return the same twice")
    seconds = time.monotonic() - began
    if not is_finite(reference):
        raise NotTried("the plain pipeline returns NaN or infinity")
    for strength in (1, 4, 16):
        anchors = perturbed(case.denoisers, strength)
        try:
            anchor = case.run_with(anchors)
        except Exception as error:
            raise NotTried(f"the plain pipeline fails with a perturbed denoiser: {described(error)}") from error
        scale = difference(reference, anchor)
        if scale > 1e-2 * largest(reference):
            break
    if not scale > 1e-6:
        raise NotTried(f"another denoiser makes no other output (they differ by {scale:g})")
    rounding = difference(reference, case.run_with(with_other_last_bits(case.denoisers)))
    return Baseline(anchors, reference, anchor, scale, seconds, rounding)


def _first_run(case: Case) -> Arrays:
    """As latents where the pipeline can, for these show most; in three steps at least, where it lets itself be told."""
    steps = case.inputs().get("num_inference_steps", 2)
    short = "num_inference_steps" in case.call and isinstance(steps, int) and steps < _FEWEST_STEPS
    problem: Exception | None = None
    for latent in (True, False) if "output_type" in case.call else (False,):
        for case.steps in (_FEWEST_STEPS, None) if short else (None,):
            case.latent = latent
            try:
                if output := case.run(case.build()):
                    return output
            except Exception as error:
                problem = error
    why = "it returns nothing" if problem is None else described(problem)
    raise NotTried(f"the plain pipeline does not run: {why}") from problem


def with_other_last_bits(denoisers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Copies of which about half of the weights are the next number in single precision."""
    generator = torch.Generator().manual_seed(2)
    others = copied(denoisers)
    with torch.no_grad():
        for weight in (weight for other in others.values() for weight in other.parameters()):
            if weight.is_floating_point():
                up = torch.rand(weight.shape, generator=generator) < 0.5
                weight.copy_(torch.where(up, weight * (1 + 2**-23), weight))
    return others


def perturbed(denoisers: Mapping[str, nn.Module], strength: float) -> dict[str, nn.Module]:
    """Copies whose weights are moved by noise.

    They are frozen, as `realign` freezes its anchors: torch multiplies by a matrix that requires a gradient in another
    order (`at::matmul` folds the batch), also where none is taken, and the last bits depend on it.
    """
    generator = torch.Generator().manual_seed(1)
    others = copied(denoisers)
    with torch.no_grad():
        for name, weight in (named for other in others.values() for named in other.eval().named_parameters()):
            if weight.is_floating_point() and name not in _STATISTICS:
                spread = float(weight.float().std()) if weight.numel() > 1 else 0.0
                noise = torch.randn(weight.shape, generator=generator) * (0.1 * spread + 0.01) * strength
                weight.add_(noise.to(weight.dtype))
            weight.requires_grad_(False)
    return others
