"""How a pipeline calls its denoiser, captured from a call of its own.

Two steps of the pipeline with the denoiser listened to tell which of its arguments is the sample, which the time, and
what becomes of its answer; the same for one more prompt tells where the batch is, and what differs between prompts. So
packing, position ids, masks, pooled text and guidance embeddings are the pipeline's own, and new pipelines need no
code.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from deradiff.alignment.call_roles import (
    Answer,
    CannotCapture,
    Conditions,
    Roles,
    SampleArgument,
    TimeArgument,
    assembled,
    roles_of,
    told_rows,
)
from deradiff.alignment.observed_calls import ObservedCall, observed
from deradiff.alignment.pixels import Packing, placed
from deradiff.anchors.checks import denoiser_of
from deradiff.sampling.call_arguments import output_rows

SHORT, LONG = "a fox", "two blue owls"
"""Prompts of different lengths, to see what differs between prompts."""

GUIDED = 4.0
"""Any guidance scale at which a pipeline evaluates what it draws without a prompt."""


class CapturedCall:
    """The calls that `pipe` makes of its denoiser for pictures of `resolution` pixels a side (by default its own size).

    A video pipeline draws single frames. Latents are those that its scheduler steps, packed where the pipeline packs
    them.

    Raises `CannotCapture`, naming the pipeline's class and the reason, where its call says too little: pipelines that
    need more than a prompt, put other things beside the sample, or tell the denoiser the time in a way of their own.
    """

    def __init__(self, pipe: DiffusionPipeline, resolution: int | None = None) -> None:
        self.pipe: Any = pipe
        self.resolution = resolution
        self._name, denoiser = denoiser_of(pipe)
        self._parameters = inspect.signature(type(pipe).__call__).parameters
        if "prompt" not in self._parameters:
            raise CannotCapture(pipe, "it is not called with a prompt")
        self.guidance_is_embedded = bool(getattr(denoiser, "config", {}).get("guidance_embeds"))
        two, self._sample = self._unguided()
        three = self._observed([SHORT, SHORT, LONG], lambda seen: bool(seen.arguments), steps=self._usual_steps())
        self.mu = two.mu
        """What the pipeline shifts the times of its scheduler by at this resolution, if it does."""
        self._time = TimeArgument.of(pipe, two, denoiser)
        self._answer = Answer.of(pipe, two.outputs[0], two.steps[0].prediction)
        self._like = two.outputs[0]
        self._template = two.arguments[0]
        self._shape = tuple(two.steps[0].sample.shape[1:])
        self._roles: Roles = roles_of(
            pipe, two.arguments[0], three.arguments[0], {self._sample.path, self._time.path}, self._longest()
        )
        self._unprompted: Conditions | None = None
        self._schedulers: dict[Any, Any] = {}

    # -- what a call is made with

    def _unguided(self) -> tuple[ObservedCall, SampleArgument]:
        """Two steps without guidance, which is off at a scale of 1 for most, and at 0 for Z-Image."""
        refused: CannotCapture | None = None
        for self._off in (1.0, 0.0):
            seen = self._observed([SHORT] * 2, lambda seen: len(seen.steps) == 2, steps=self._usual_steps())
            try:
                if [step.evaluations for step in seen.steps] != [1, 2]:
                    raise CannotCapture(self.pipe, "its steps do not evaluate the denoiser once each without guidance")
                return seen, SampleArgument.of(self.pipe, seen.arguments[0], seen.steps[0].sample)
            except CannotCapture as error:
                refused = refused or error
        assert refused is not None
        raise refused

    def _usual_steps(self) -> int:
        """As many as the pipeline takes by default: Flux.2 shifts its times by their number as well."""
        usual = self._parameters["num_inference_steps"].default if "num_inference_steps" in self._parameters else 2
        return max(2, usual) if isinstance(usual, int) else 2

    def _longest(self) -> int | None:
        parameter = self._parameters.get("max_sequence_length")
        return parameter.default if parameter is not None and isinstance(parameter.default, int) else None

    def _call(
        self, prompts: Sequence[str], steps: int, guided: bool, guidance_scale: float | None, output: str
    ) -> dict[str, Any]:
        known = self._parameters
        call: dict[str, Any] = {"prompt": list(prompts), "num_inference_steps": steps, "output_type": output}
        call["generator"] = torch.Generator().manual_seed(0)
        call |= {"num_frames": 1, "use_resolution_binning": False}
        if self.resolution is not None:
            call |= {"height": self.resolution, "width": self.resolution}
        dial = "true_cfg_scale" if "true_cfg_scale" in known else "guidance_scale"
        if dial == "true_cfg_scale" or not self.guidance_is_embedded:
            call[dial] = GUIDED if guided else self._off
        if self.guidance_is_embedded and guidance_scale is not None:
            call["guidance_scale"] = guidance_scale
        if guided:
            call["negative_prompt"] = [""] * len(prompts)
        return {name: value for name, value in call.items() if name in known}

    def _observed(
        self,
        prompts: Sequence[str],
        enough: Any,
        *,
        steps: int = 1,
        guided: bool = False,
        guidance_scale: float | None = None,
        output: str = "latent",
        **more: Any,
    ) -> ObservedCall:
        call = self._call(prompts, steps, guided, guidance_scale, output)
        try:
            return observed(self.pipe, call, enough, **more)
        except (TypeError, ValueError, AttributeError, AssertionError) as error:
            raise CannotCapture(self.pipe, f"it refuses a call with prompts alone: {error}") from error

    # -- what the denoiser is told

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], guidance_scale: float | None = None) -> Conditions:
        """What the denoiser is told of `prompts`, a row each; a guidance embedding says `guidance_scale`."""
        seen = self._observed(prompts, lambda seen: bool(seen.arguments), guidance_scale=guidance_scale)
        return told_rows(self._roles, seen.arguments[0], len(prompts))

    @torch.no_grad()
    def unprompted(self, count: int) -> Conditions:
        """What the denoiser is told without a prompt, as the pipeline has it for guidance, `count` times.

        Raises `ValueError` for a pipeline that takes no guidance, as one of a model that was distilled with it.
        """
        if self._unprompted is None:
            self._unprompted = self._without_prompt()
        return {name: rows.expand(count, *rows.shape[1:]) for name, rows in self._unprompted.items()}

    def _without_prompt(self) -> Conditions:
        def rows(seen: ObservedCall) -> int:
            return sum(self._sample.rows(arguments) for arguments in seen.arguments)

        def answered(arguments: dict[str, Any]) -> Any:
            return self._answer_rows(self._sample.rows(arguments))

        seen = self._observed([LONG], lambda seen: rows(seen) > 1 or bool(seen.steps), guided=True, answer=answered)
        if rows(seen) != 2:
            raise ValueError(
                f"{type(self.pipe).__name__} draws this model without classifier-free guidance: leave the guidance "
                "scale at 1"
            )
        parts = [told_rows(self._roles, arguments, self._sample.rows(arguments)) for arguments in seen.arguments]
        both = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        known = self.encode_prompts([LONG])
        away = [
            sum(float((values[row].float() - known[name][0].float()).abs().sum()) for name, values in both.items())
            for row in (0, 1)
        ]
        negative = int(away[1] > away[0])
        return {name: values[negative : negative + 1] for name, values in both.items()}

    def with_sizes(self, conditions: Conditions, sizes: Tensor | None = None) -> Conditions:
        """`conditions` as they are: the sizes of pictures are those of the call."""
        return conditions

    # -- what it is called with, and what it answers

    def predict(
        self,
        denoiser: nn.Module,
        noisy: Float[Tensor, "batch *latent"],
        timesteps: Shaped[Tensor, " batch"],
        conditions: Conditions,
    ) -> Float[Tensor, "batch *latent"]:
        """The prediction of `denoiser` as the scheduler would get it."""
        own = {self._sample.path: self._sample.made(noisy), self._time.path: self._time.made(timesteps)}
        arguments = assembled(self._roles, self._template, own, conditions, len(noisy), noisy.device)
        return self._answer.prediction(denoiser(**arguments), noisy.shape)

    def _answer_rows(self, rows: int) -> Any:
        return output_rows(self._like, torch.zeros(rows, dtype=torch.long))

    def latent_shape(self, resolution: int | None) -> tuple[int, ...]:
        """The shape of one picture's latents. Raises `ValueError` for another resolution than that of the capture."""
        if resolution not in (None, self.resolution):
            raise ValueError(f"the call was captured at {self.resolution} pixels, not at {resolution}")
        return self._shape

    def prepared(self, scheduler: Any, steps: int) -> Any:
        """A copy of `scheduler` with the timesteps that the pipeline sets for so many steps."""
        key = type(scheduler).__name__, repr(sorted(scheduler.config.items(), key=str)), steps
        if key not in self._schedulers:
            seen = self._observed([SHORT], lambda seen: bool(seen.arguments), steps=steps, scheduler=scheduler)
            self._schedulers[key] = seen.scheduler
        return copy.deepcopy(self._schedulers[key])

    def packing(self) -> Packing:
        """As the pipeline itself unpacks what it decodes. Raises `CannotCapture` where it mixes latents."""
        try:
            return placed(self._decoder_input, self._shape)
        except CannotCapture:
            raise
        except ValueError as error:
            raise CannotCapture(self.pipe, str(error)) from error

    @torch.no_grad()
    def _decoder_input(self, latents: Float[Tensor, "batch *latent"]) -> Tensor:
        seen = self._observed(
            [SHORT] * len(latents),
            lambda seen: False,
            output="pt",
            answer=lambda arguments: self._answer_rows(self._sample.rows(arguments)),
            moved=lambda sample: latents.to(sample),
        )
        if seen.decoded is None:
            raise CannotCapture(self.pipe, "it decodes no pictures of its latents with a VAE")
        return seen.decoded
