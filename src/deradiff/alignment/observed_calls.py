"""A pipeline's own call, run as far as needed while its denoiser, its scheduler and its decoder are listened to.

Nothing of it is copied from diffusers: what a denoiser is told, how latents are packed and how times are shifted is
what the pipeline itself does.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deradiff.anchors.checks import denoiser_of, unwrapped
from deradiff.sampling.truncation import watched


class _Enough(Exception):
    """Ends a call of which enough has been seen."""


class ObservedStep(NamedTuple):
    """What a scheduler's step was given, and how many evaluations of the denoiser came before it in the run."""

    prediction: Tensor
    timestep: Tensor
    sample: Tensor
    evaluations: int


@dataclass
class ObservedCall:
    """What was seen of one call of a pipeline.

    `arguments` are those of the denoiser, by name, evaluation by evaluation, and `outputs` what it answered.
    `scheduler` is the one that the pipeline set the timesteps of; `mu` what it shifted them by, if it said so.
    `decoded` is what was given to the decoder.
    """

    scheduler: Any
    arguments: list[dict[str, Any]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    steps: list[ObservedStep] = field(default_factory=list)
    mu: float | None = None
    decoded: Tensor | None = None


def observed(
    pipe: Any,
    call: dict[str, Any],
    enough: Callable[[ObservedCall], bool],
    *,
    scheduler: Any = None,
    answer: Callable[[dict[str, Any]], Any] | None = None,
    moved: Callable[[Tensor], Tensor] | None = None,
) -> ObservedCall:
    """Call `pipe` with `call` until `enough`, asked at every evaluation and every step, and give it back as it was.

    Args:
        pipe: a pipeline with one denoiser.
        call: the arguments of the call.
        enough: of what has been seen so far.
        scheduler: takes the place of the pipeline's own; a copy either way.
        answer: what the denoiser says, from its arguments, in place of an evaluation.
        moved: what a step makes of a sample, in place of the scheduler's own step.

    Raises whatever the pipeline raises. Its prompts that are cut are warned of (`truncation.PromptCut`).
    """
    name, _ = denoiser_of(pipe)
    seen = ObservedCall(copy.deepcopy(pipe.scheduler if scheduler is None else scheduler))
    model = unwrapped(getattr(pipe, name))
    signature = inspect.signature(type(model).forward)
    forward, step, set_timesteps = model.forward, seen.scheduler.step, seen.scheduler.set_timesteps

    def evaluated(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(model, *args, **kwargs).arguments)
        arguments.pop("self")
        seen.arguments.append(_kept(arguments | arguments.pop("kwargs", {})))
        if enough(seen):
            raise _Enough
        seen.outputs.append(forward(*args, **kwargs) if answer is None else answer(seen.arguments[-1]))
        return seen.outputs[-1]

    @functools.wraps(step)
    def stepped(prediction: Tensor, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        at = torch.as_tensor(timestep)
        seen.steps.append(ObservedStep(prediction, at, sample, len(seen.arguments)))
        if enough(seen):
            raise _Enough
        result = step(prediction, timestep, sample, *args, **kwargs)
        return result if moved is None else (moved(sample),)

    @functools.wraps(set_timesteps)
    def timed(*args: Any, **kwargs: Any) -> Any:
        seen.mu = kwargs.get("mu")
        return set_timesteps(*args, **kwargs)

    def decode(latents: Tensor, *_: Any, **__: Any) -> Any:
        seen.decoded = latents
        raise _Enough

    with ExitStack() as stack:
        stack.enter_context(_in_place_of(model, "forward", evaluated))
        stack.enter_context(_in_place_of(seen.scheduler, "step", stepped))
        stack.enter_context(_in_place_of(seen.scheduler, "set_timesteps", timed))
        stack.enter_context(_in_place_of(pipe, "scheduler", seen.scheduler))
        stack.enter_context(_in_place_of(pipe, "_progress_bar_config", {"disable": True}))
        if getattr(pipe, "vae", None) is not None:
            stack.enter_context(_in_place_of(pipe.vae, "decode", decode))
        stack.enter_context(watched(pipe))
        with suppress(_Enough):
            pipe(**call)
    return seen


def _kept(value: Any) -> Any:
    """The same in containers of their own: Z-Image's denoiser writes into the lists that it is given."""
    if isinstance(value, dict):
        return {key: _kept(entry) for key, entry in value.items()}
    return [_kept(entry) for entry in value] if isinstance(value, list) else value


@contextmanager
def _in_place_of(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object is `value` while this lasts."""
    held = vars(owner).get(name, _in_place_of)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if held is _in_place_of:
            delattr(owner, name)
        else:
            setattr(owner, name, held)
