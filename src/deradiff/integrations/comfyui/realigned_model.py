"""Two models as one MODEL of ComfyUI's, for every sampler and every guider that it has.

A wrapper around a run of the reference has the host prepare the aligned model for the same run, with its own
conditioning, hooks and options. A wrapper around a prediction (`guidance`) then mixes what the guider makes of either
model: each model's *own* guided prediction, as in lines 7 and 8 of Algorithm 1 (DeRaDiff), whatever guidance that is.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from deradiff.algorithm.schedules import Schedule
from deradiff.integrations.comfyui import strips
from deradiff.integrations.comfyui.checks import require_compatible, require_latents
from deradiff.integrations.comfyui.guidance import Ask, Guidance, Options
from deradiff.integrations.comfyui.options import additions, with_additions
from deradiff.integrations.comfyui.predictions import ALIGNED, MixedRun
from deradiff.integrations.comfyui.runs import DialSettings, RunClock
from deradiff.integrations.comfyui.shared_weights import Patch, SharedWeights, added_patches
from deradiff.sampling.reuse import INTERPOLATE, REFERENCE

KEY = "deradiff"
"""What the wrappers' keys begin with."""


def realigned(reference: Any, aligned: Any, dial: DialSettings) -> Any:
    """The reference (a clone of it) whose predictions are mixed with those of `aligned`.

    `aligned` may be a clone of `reference` with further LoRAs: these are then switched, and memory holds the weights
    once. Raises `ValueError` for models that cannot be mixed.
    """
    from comfy.patcher_extension import WrappersMP

    require_compatible(reference, aligned)
    for model in (reference, aligned):
        if any(str(key).startswith(KEY) for key in model.wrappers.get(WrappersMP.OUTER_SAMPLE, {})):
            raise ValueError("a model that is realigned already cannot be realigned again: connect the plain ones")
    model, key = reference.clone(), f"{KEY} {uuid4()}"
    shared = None
    if reference.is_clone(aligned):
        shared = AddedParts(
            added_patches(reference, aligned), additions(aligned.model_options, reference.model_options)
        )
        if not shared.patches and not shared.options:
            logging.warning(
                "deradiff: both inputs are the same model with the same weights, so that λ changes nothing. Connect "
                "the aligned checkpoint, or the reference with its LoRA"
            )
            return model
    elif dial.method == "interpolate":
        raise ValueError(
            "interpolated weights need a model and its LoRA, which share their weights: these are two checkpoints. "
            "Take the method mixture, or merge them by ModelMergeSimple"
        )
    else:
        model.set_additional_models(key, [aligned])
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, RealignedSampling(key, dial, shared, Fixed.of(model)))
    return model


@dataclass(frozen=True)
class AddedParts:
    """What makes the aligned model of the reference: weight patches, and options."""

    patches: dict[str, list[Patch]]
    options: Options


@dataclass(frozen=True)
class Fixed:
    """What a model was when it was realigned; options that it is given afterwards are meant for both models."""

    weights: Any
    options: Options
    model_sampling: Any

    @classmethod
    def of(cls, model: Any) -> Fixed:
        """As `model` is now."""
        from comfy.model_patcher import create_model_options_clone

        options = create_model_options_clone(model.model_options)
        return cls(model.patches_uuid, options, model.object_patches.get("model_sampling"))


@dataclass(frozen=True)
class Sampling:
    """What the host runs a guider with."""

    noise: Tensor
    latent_image: Tensor
    sampler: Any
    sigmas: Tensor
    denoise_mask: Tensor | None = None
    callback: Callable[..., Any] | None = None
    disable_pbar: bool = False
    seed: int | None = None


class RealignedSampling:
    """The wrapper around a run: one run for every λ of a strip."""

    def __init__(self, key: str, dial: DialSettings, lora: AddedParts | None, fixed: Fixed) -> None:
        self._key, self._dial, self._lora, self._fixed = key, dial, lora, fixed

    def __call__(self, executor: Any, *arguments: Any, **named: Any) -> Tensor:
        """Run what the host asks for; raises `ValueError` for what cannot be realigned."""
        shapes = named.pop("latent_shapes", None)
        more = {} if shapes is None else {"latent_shapes": shapes}
        asked = Sampling(*arguments, **named)
        guider = executor.class_obj
        self._require(guider, asked, shapes)
        conds = guider.conds
        rows = []
        for schedule, callback in zip(
            self._dial.schedules, strips.callbacks(asked.callback, len(self._dial.schedules)), strict=True
        ):
            guider.conds = {name: [cond.copy() for cond in kept] for name, kept in conds.items()}

            def run(callback: Any = callback) -> Tensor:
                samples: Tensor = executor(
                    asked.noise,
                    asked.latent_image,
                    asked.sampler,
                    asked.sigmas,
                    asked.denoise_mask,
                    callback,
                    asked.disable_pbar,
                    asked.seed,
                    **more,
                )
                return samples

            mixed = self._mixed_run(guider, schedule, asked.sigmas)
            if self._lora is None:
                rows.append(self._with_second_model(guider, mixed, run, asked))
            else:
                rows.append(_with_switched_layers(guider, mixed, run, self._lora))
            if (reused := mixed.end()) is not None:
                logging.info("deradiff: %s", reused.words)
        return torch.cat(rows) if len(rows) > 1 else rows[0]

    def _require(self, guider: Any, asked: Sampling, shapes: Any) -> None:
        if guider.model_patcher.patches_uuid != self._fixed.weights:
            raise ValueError(
                "weights were patched after the model was realigned (a LoRA loader behind the Realign node?): that "
                "would change the reference alone. Put it before, on the reference and on the aligned model"
            )
        if shapes is not None and len(shapes) > 1:
            raise ValueError("latents of several parts (video with sound) cannot be realigned yet")
        require_latents(asked.latent_image, guider.model_patcher.model)

    def _mixed_run(self, guider: Any, schedule: Schedule, sigmas: Tensor) -> MixedRun:
        from comfy.model_sampling import CONST

        model_sampling = guider.model_patcher.get_model_object("model_sampling")
        clock = RunClock(tuple(sigmas.tolist()), time_of(model_sampling))
        return MixedRun(self._dial, schedule, clock, isinstance(model_sampling, CONST), self._lora is not None)

    def _with_second_model(self, guider: Any, mixed: MixedRun, run: Callable[[], Tensor], asked: Sampling) -> Tensor:
        """The run, within one of the aligned model's, for which the reference's run stands as the sampler.

        So the host prepares either model as it prepares any. The reference comes last, with the aligned model as one
        that it needs besides: memory is shared out to both at once.
        """
        second = copy.copy(guider)
        second.model_patcher = self._aligned(guider.model_patcher)
        later = additions(guider.model_options, self._fixed.options)
        second.model_options = with_additions(second.model_patcher.model_options, later)
        within = ReferenceRun(guider, second, mixed, run)
        second.sample(asked.noise, asked.latent_image, within, asked.sigmas, asked.denoise_mask, None, True, asked.seed)
        return within.samples

    def _aligned(self, reference: Any) -> Any:
        """The aligned model, with the shift or the kind of prediction that the realigned one was given afterwards."""
        (aligned,) = reference.get_additional_models_with_key(self._key)
        later = reference.object_patches.get("model_sampling")
        if later is not self._fixed.model_sampling:
            aligned = aligned.clone()
            aligned.add_object_patch("model_sampling", later)
            reference.set_additional_models(self._key, [aligned])
        return aligned


class ReferenceRun:
    """The reference's run, as what the host takes for the aligned model's sampler."""

    samples: Tensor

    def __init__(self, guider: Any, second: Any, mixed: MixedRun, run: Callable[[], Tensor]) -> None:
        self._guider, self._second, self._mixed, self._run = guider, second, mixed, run

    def sample(
        self, wrapped: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any, noise: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Run the reference, the aligned model being ready; what is returned is of no use to anybody."""

        def evaluate(name: str, ask: Ask) -> Tensor:
            if name == REFERENCE:
                return ask.of_reference()
            options = (
                with_additions(extra_args["model_options"], ask.added) if ask.added else extra_args["model_options"]
            )
            denoised: Tensor = self._second(ask.x, ask.timestep, model_options=options, seed=ask.seed)
            return denoised

        with Guidance(self._guider, self._mixed, evaluate).in_force():
            self.samples = self._run()
        return noise


def _with_switched_layers(guider: Any, mixed: MixedRun, run: Callable[[], Tensor], lora: AddedParts) -> Tensor:
    """The run, with the LoRA's part switched at every evaluation."""
    layers = SharedWeights(lora.patches)

    def evaluate(name: str, ask: Ask) -> Tensor:
        if name == REFERENCE:
            return ask.of_reference()
        layers.attach(guider.model_patcher.model)  # by now it is loaded
        with layers.at({ALIGNED: 1.0, INTERPOLATE: mixed.lam}[name]):
            return ask.of_reference(with_additions(ask.options, lora.options))

    try:
        with Guidance(guider, mixed, evaluate).in_force():
            samples = run()
    finally:
        layers.detach()
    if layers.called and (unheard := layers.never_called):
        logging.warning("deradiff: the LoRA had no effect on %d layers, as on %s", len(unheard), unheard[0])
    return samples


def time_of(model_sampling: Any) -> Callable[[float], float]:
    """The model's own diffusion time at a noise level σ, 0 at pure noise and 1 at the image."""
    least, most = float(model_sampling.sigma_min), float(model_sampling.sigma_max)

    def told(sigma: float) -> float:
        return float(model_sampling.timestep(torch.tensor([sigma])))

    begin, end = told(most), told(least)

    @lru_cache(maxsize=4096)
    def time(sigma: float) -> float:
        if sigma <= least or begin == end:
            return 1.0 if sigma <= least else 0.0
        return min(max((begin - told(sigma)) / (begin - end), 0.0), 1.0)

    return time
