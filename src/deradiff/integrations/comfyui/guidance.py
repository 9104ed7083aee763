"""The wrapper around a prediction: what a guider makes of either model, mixed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deradiff.integrations.comfyui.options import additions
from deradiff.integrations.comfyui.predictions import ALIGNED, MixedRun
from deradiff.integrations.comfyui.runs import mixture
from deradiff.sampling.reuse import REFERENCE

Options = dict[Any, Any]

POST = "sampler_post_cfg_function"
"""Functions that are shown a guided prediction: a model's own, and those of samplers."""


class Ask(NamedTuple):
    """A prediction that a sampler asks a guider for."""

    guider: Callable[..., Tensor]
    """The reference's own prediction, of x, timestep, options and seed."""
    x: Tensor
    timestep: Tensor
    options: Options
    """The reference's options, with what the sampler added."""
    added: Options
    """That alone."""
    seed: Any

    def of_reference(self, options: Options | None = None) -> Tensor:
        """What the guider makes of the reference, with its own options or others."""
        return self.guider(self.x, self.timestep, self.options if options is None else options, self.seed)


class Guidance:
    """A guider's predictions in a run, with the mixture in place of the reference's.

    `evaluate` makes the guided denoised latents by the model of a name. A sampler may look at the prediction without a
    prompt, as those called CFG++ do: it is shown the mixture's.
    """

    def __init__(self, guider: Any, mixed: MixedRun, evaluate: Callable[[str, Ask], Tensor]) -> None:
        self._guider, self._mixed, self._evaluate = guider, mixed, evaluate
        self._inside = False

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Put the wrapper on the guider's options of this run, and refuse evaluations that go past it."""
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        options, key = self._guider.model_options, f"deradiff {id(self)}"
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, key, self._predict, options, is_model_options=True)
        network = self._guider.model_patcher.model.diffusion_model
        handle = network.register_forward_pre_hook(self._refuse_past)
        try:
            yield
        finally:
            handle.remove()
            del options["transformer_options"]["wrappers"][WrappersMP.PREDICT_NOISE][key]

    def _predict(
        self, executor: Any, x: Tensor, timestep: Tensor, model_options: Options | None = None, seed: Any = None
    ) -> Tensor:
        options = model_options or {}
        own = self._guider.model_options.get(POST, [])
        by_sampler = options.get(POST, [])[len(own) :]
        added = {k: v for k, v in additions(options, self._guider.model_options).items() if k != POST}
        shown: dict[str, Options] = {}

        def evaluate(name: str) -> Tensor:
            def show(arguments: Options) -> Any:
                shown[name] = arguments
                return arguments["denoised"]

            ask = Ask(executor, x, timestep, options, added, seed)
            if by_sampler:
                ask = ask._replace(options={**options, POST: [*own, show]}, added=added | {POST: [show]})
            outside, self._inside = self._inside, True
            try:
                return self._evaluate(name, ask)
            finally:
                self._inside = outside

        denoised = self._mixed.denoised(x, float(timestep.max()), evaluate, exactly=bool(by_sampler))
        for look in by_sampler:
            denoised = look({**self._mixed_arguments(shown), "denoised": denoised, "model_options": options})
        return denoised

    def _mixed_arguments(self, shown: dict[str, Options]) -> Options:
        """What a sampler's function is shown: the mixture of what it would be shown of either model."""
        if len(shown) == 1:
            return next(iter(shown.values()))
        arguments = dict(shown[REFERENCE])
        for name in ("cond_denoised", "uncond_denoised"):
            parts = [shown[model].get(name) for model in (REFERENCE, ALIGNED)]
            there = [part for part in parts if part is not None]
            arguments[name] = mixture(torch.stack(there), self._mixed.lam) if len(there) == len(parts) else None
        return arguments

    def _refuse_past(self, network: torch.nn.Module, arguments: Any) -> None:
        if not self._inside:
            raise ValueError(
                "this sampler evaluates the reference model itself, past its guider: what it makes of that would not "
                "be realigned. Take another sampler, or the plain model"
            )
