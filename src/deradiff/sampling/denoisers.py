"""The reference and its anchors, evaluated at one input: what each returns, as its own pipeline would get it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from accelerate.utils.operations import send_to_device
from torch import Tensor

from deradiff.algorithm.lams import Lams
from deradiff.anchors import Anchor
from deradiff.sampling.argument_stores import ArgumentStores
from deradiff.sampling.batch_axes import Batch, UnknownBatch
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from deradiff.sampling.call_arguments import (
    is_only_rows,
    joined_outputs,
    output_rows,
    tensors_of,
    timestep_argument,
    written_to,
)
from deradiff.sampling.denoiser_states import bring_in, splits_batches
from deradiff.sampling.evaluation import BLEND
from deradiff.sampling.lora_anchors import LoraAnchors
from deradiff.sampling.per_model import is_divided, of_model, same_noise
from deradiff.sampling.reuse import AUTO, INTERPOLATE, Reuse
from deradiff.sampling.shared_settings import Mirror
from deradiff.sampling.torch_hooks import noting_changes
from deradiff.sampling.unshared_state import HookWatch


class Denoisers:
    """The models of a mixture, reference first.

    Models with full weights are evaluated one after the other. LoRA anchors share the reference's weights: they and the
    reference go through one forward pass of a repeated batch, each row with its own adapter (PEFT's mixed batches), or
    through one pass per model where `batched` is false or PEFT cannot (DoRA, LoKr, LoHa; a style LoRA active beside; a
    model that changes the batch inside, as AnimateDiff's does).
    """

    def __init__(self, reference: Any, anchors: Sequence[Anchor], batched: bool = True):
        self.reference, self.anchors, self.batched = reference, tuple(anchors), batched
        self.names = ("reference", *(anchor.name for anchor in anchors))
        self.own_embeddings = any(anchor.text_adapters for anchor in anchors)
        # Taken before the pipeline's calls are intercepted, or the reference's own evaluation would be intercepted too.
        self.reference_call = reference._compiled_call_impl or reference._call_impl
        self._parameters = list(inspect.signature(type(reference).forward).parameters)[1:]
        self._timestep = timestep_argument(self._parameters)
        self._mirrors = {a.name: Mirror(reference, a.module, a.name) for a in anchors if a.module is not None}
        self._hooks = HookWatch(reference, [a.module for a in anchors if a.module is not None])
        self._synced: list[Mirror] = []
        self.micro_batch: int | None = None
        self._divisible = True
        self._rows_changed = False
        """Whether a forward hook has changed something since hooks were registered last."""
        self._stores = ArgumentStores()
        self._loras = LoraAnchors(reference, anchors)
        self._blended: tuple[tuple[tuple[Anchor, float], ...], dict[str, Tensor]] | None = None

    def begin(self) -> None:
        """A run begins. Weights may have been loaded since the last one."""
        self.forget_blend()
        self._hooks.begin()
        for mirror in self._mirrors.values():
            mirror.begin()

    def undo(self) -> None:
        """Leave reference and anchors as they were found, and let go of them."""
        self._loras.undo()
        for mirror in self._mirrors.values():
            mirror.undo()
        for anchor in self.anchors:
            if anchor.device is not None and anchor.module is not None:
                anchor.module.to(self.reference.device)
            anchor.unload(self.reference)
        self.anchors = tuple(Anchor(anchor.name, anchor.source) for anchor in self.anchors)
        self._mirrors, self._synced = {}, []
        self._hooks = HookWatch(self.reference)
        self.forget_blend()

    def argument(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument of a call to the denoiser: "input", its first one, the noisy latents, or "timestep".

        None where the call has no timestep.
        """
        parameter = self._parameters[0] if name == "input" else self._timestep
        if parameter is None:
            return None
        position = self._parameters.index(parameter)
        return args[position] if position < len(args) else kwargs.get(parameter)

    def predict(
        self,
        models: Sequence[int],
        args: tuple,
        kwargs: dict[str, Any],
        blend: Mapping[int, Any] | None = None,
        *,
        share: int | None = None,
    ) -> dict[int, Any]:
        """What each of `models` (0 is the reference, k the k-th anchor) returns for one call, by its number.

        `blend` adds one more as the last, `BLEND`, or alone where there are no `models`: the weight-interpolated model,
        `Σ blend[k] θ_k`, a LoRA at scale `blend[k]`; a number each, or of LoRAs one per row. It is the first-order
        approximation of mixing predictions (LoRA scaling in annealed importance guidance, §3.2.2).

        Where memory runs out, `micro_batch` is halved and the evaluation begins again. `share` is a number of images,
        which guidance repeats along the batch: those whose inputs are all equal are evaluated once, as are those of a
        sweep at its first step.

        Raises `NonFinitePrediction` naming the model whose prediction has NaN or infinity in it, and `UnmirroredState`
        before anything is evaluated.
        """
        if self.own_embeddings and any(models) and not is_divided((args, kwargs)):
            raise DialError(
                'with text_encoder="both" each model has its own prompt embeddings, and these are the same for all: '
                "give the pipeline prompts, or what its encode_prompt makes while it is realigned"
            )
        self._make_ready({*models, *(blend or ())})
        rows = len(self.argument("input", args, kwargs))
        share = None if self._hooks.draws else share
        if share and share > 1 and rows % share == 0 and blend is None and (batch := self._batch(args, kwargs)):
            chosen, back = batch.distinct_images(share)
            if len(chosen) < rows:
                few = batch.chosen(chosen)
                if outputs := self._of_rows(partial(self.predict, models, *few), len(chosen)):
                    return {k: output_rows(output, back) for k, output in outputs.items()}
        while True:
            try:
                return self._predict_in_parts(models, args, kwargs, blend, rows)
            except RuntimeError as error:
                part = min(rows, self.micro_batch or rows)
                if part == 1 or not should_reduce_batch_size(error) or not self._batch(args, kwargs):
                    raise
                self.micro_batch = (part + 1) // 2
            clear_device_cache(garbage_collection=True)

    def _batch(self, args: tuple, kwargs: dict[str, Any]) -> Batch | None:
        """The call's arguments as a batch whose rows can be chosen; None where they cannot."""
        if not self._divisible or self._hooks.foreign or self._rows_changed or is_divided((args, kwargs)):
            return None
        if splits_batches(self.reference):
            return None
        rows = len(self.argument("input", args, kwargs))
        try:
            return Batch(type(self.reference), self._parameters, args, kwargs, rows)
        except UnknownBatch:
            return None

    def _of_rows(self, evaluate: Callable[[], dict[int, Any]], rows: int) -> dict[int, Any] | None:
        """What the models return for `rows` that were put together otherwise than the pipeline has them.

        None where they cannot be: what comes back cannot be taken apart by rows, or a forward hook of a person's own
        changes something, maybe by its row's place. From then on batches stay as they are.
        """
        with noting_changes(self._hooks.hooked) as changed:
            outputs = evaluate()
        self._divisible &= all(is_only_rows(output, rows) for output in outputs.values())
        self._rows_changed |= bool(changed)
        return outputs if self._divisible and not changed else None

    def _predict_in_parts(
        self, models: Sequence[int], args: tuple, kwargs: dict[str, Any], blend: Mapping[int, Any] | None, rows: int
    ) -> dict[int, Any]:
        if self.micro_batch is None or rows <= self.micro_batch:
            return self._predict(models, args, kwargs, blend)
        if (batch := self._batch(args, kwargs)) is None:
            raise UnmirroredState(
                f"dial.micro_batch divides the batch, and of this call of {type(self.reference).__name__} it is not "
                "known where that is in every argument and in what comes back, or something may act by the place of a "
                f"row in it ({self._hooks.foreign or 'perturbed-attention guidance, processors of your own'}, or a "
                'forward hook), or text_encoder="both" gives each model its own prompt embeddings: set '
                "dial.micro_batch = None and draw fewer images at a time"
            )
        parts = []
        for part in torch.arange(rows).split(self.micro_batch):
            weights = blend and {k: w[part] if isinstance(w, Tensor) else w for k, w in blend.items()}
            call = batch.chosen(part)
            outputs = self._of_rows(partial(self._predict, models, *call, weights), len(part))
            if outputs is None:
                return self._predict_in_parts(models, args, kwargs, blend, rows)  # which refuses
            parts.append(outputs)
        return {k: joined_outputs([part[k] for part in parts]) for k in parts[0]}

    def _predict(
        self, models: Sequence[int], args: tuple, kwargs: dict[str, Any], blend: Mapping[int, Any] | None
    ) -> dict[int, Any]:
        self._stores.begin((args, kwargs), [*models, *([] if blend is None else [BLEND])])
        outputs = self._predict_models(models, args, kwargs) if models else {}
        if blend is not None:
            outputs[BLEND] = self._predict_blend(blend, args, kwargs, 0 not in models)
        self._stores.end((args, kwargs))
        return outputs

    def _predict_models(self, models: Sequence[int], args: tuple, kwargs: dict[str, Any]) -> dict[int, Any]:
        adapters = [k for k in models if k and self.anchors[k - 1].adapter]
        if len(models) > 1 and adapters and self._can_batch(models, kwargs) and (batch := self._batch(args, kwargs)):
            try:
                if (predictions := self._predict_batched(models, batch)) is not None:
                    return predictions
            except ValueError as error:
                if "adapter_names" not in str(error):
                    raise
                self.batched = False
        # What is on another device begins first, and works while the reference does.
        elsewhere = sorted(models, key=lambda model: not model or self.anchors[model - 1].device is None)
        predicted = self._predict_each(elsewhere, args, kwargs)
        home = tensors_of(self.argument("input", args, kwargs))[0].device
        outputs = {}
        for model in models:
            away = bool(model) and self.anchors[model - 1].device is not None
            outputs[model] = send_to_device(predicted[model], home) if away else predicted[model]
            _require_finite(outputs[model], self.names[model])
        return outputs

    def _predict_each(self, models: Sequence[int], args: tuple, kwargs: dict[str, Any]) -> dict[int, Any]:
        alone, before, predicted = 0 not in models, written_to((args, kwargs)), {}
        with same_noise(self._hooks.draws) as rewind:
            for model in models:
                rewind()
                predicted[model] = self._predict_one(model, args, kwargs, alone)
                if len(models) > 1 and written_to((args, kwargs)) != before:
                    raise UnmirroredState(
                        f"{type(self.reference).__name__} writes into what it is handed, as into a cache that the "
                        "pipeline made, and the models of a mixture would write into the same: λ = 0 and 1 alone are "
                        "possible here"
                    )
        return predicted

    def _predict_blend(self, blend: Mapping[int, Any], args: tuple, kwargs: dict[str, Any], alone: bool) -> Any:
        args, kwargs = self._stores.of_model((of_model(args, BLEND), of_model(kwargs, BLEND)), BLEND)
        anchors = {self.anchors[k - 1]: weight for k, weight in blend.items() if k}
        with self._loras.active({a.adapter: weight for a, weight in anchors.items() if a.adapter}, kwargs) as kwargs:
            if any(a.module for a in anchors):
                carrier, theta = self._blend(tuple((a, weight) for a, weight in anchors.items() if a.module))
                carrier.sync_adapters()
                with carrier.layers.like_the_reference(alone):
                    output = torch.func.functional_call(carrier.anchor, theta, args, kwargs)
            else:
                output = self._call_reference(args, kwargs)
        _require_finite(output, "weight-interpolated model")
        return output

    @property
    def blends_rows(self) -> bool:
        """Whether the weight-interpolated model can have weights of its own in every row: LoRAs have scales."""
        return self._loras.scale_rows and not self.own_embeddings

    def require_blendable(self, lams: Lams, method: str, reuse: Reuse | None) -> None:
        """Raise `ValueError` for interpolated weights that cannot be, and for what reuse cannot be."""
        if reuse is not None and method == "interpolate":
            raise ValueError(
                "interpolated weights are one model, with nothing to carry over: reuse is for method='mixture'"
            )
        carriers = (AUTO, INTERPOLATE, *self.names)
        if reuse is not None and reuse.carrier not in carriers:
            raise ValueError(f"the carrier is one of {', '.join(carriers)}; got {reuse.carrier!r}")
        if method != "interpolate" and (reuse is None or reuse.carrier != INTERPOLATE):
            return
        if self.own_embeddings:
            raise ValueError(
                "interpolated weights are one model with one text encoder: leave text_encoder out, or mix predictions "
                "(method='mixture', reuse carried by the reference or an anchor)"
            )
        if any(anchor.device is not None for anchor in self.anchors):
            raise ValueError("interpolated weights need all models on one device: leave anchor_device out")
        if lams.images is not None and not self.blends_rows:
            raise ValueError(
                f"λ per image ({lams.images} of them) needs one model for each: interpolated weights are one for all, "
                "unless the anchors are LoRAs. Use method='mixture', carried by the reference or an anchor"
            )

    def forget_blend(self) -> None:
        """Drop the interpolated weights kept between steps (the models moved, or were cast)."""
        self._blended = None

    def load_style(self, *args: Any, **kwargs: Any) -> None:
        """Load a style LoRA into the reference; beside LoRA anchors it is active as it would be without them."""
        self._loras.load_style(*args, **kwargs)

    @torch.compiler.disable
    def _blend(self, weights: tuple[tuple[Anchor, float], ...]) -> tuple[Mirror, dict[str, Tensor]]:
        """An anchor to run, and the parameters to run it with: kept while λ stays."""
        modules: list[tuple[Any, float]] = [(anchor.module, weight) for anchor, weight in weights]
        if self._blended is None or self._blended[0] != weights:
            parameters = [(dict(module.named_parameters()), weight) for module, weight in modules]
            rest = 1 - sum(weight for _, weight in modules)  # LoRA anchors live on the reference's weights
            blend = {}
            for name, theta in self.reference.named_parameters():
                if any(own[name] is not theta for own, _ in parameters):  # a style LoRA's are shared
                    _require_numbers(name, theta)
                    wide = rest * theta.float() + sum(weight * own[name].float() for own, weight in parameters)
                    blend[name] = wide.to(theta.dtype)
            self._blended = (weights, blend)
        return self._mirrors[weights[0][0].name], self._blended[1]

    def _predict_one(self, model: int, args: tuple, kwargs: dict[str, Any], alone: bool) -> Any:
        args, kwargs = self._stores.of_model((of_model(args, model), of_model(kwargs, model)), model)
        if model == 0:
            return self._call_reference(args, kwargs)
        anchor = self.anchors[model - 1]
        if anchor.module is not None:
            if anchor.device is not None:
                args, kwargs = send_to_device((args, kwargs), anchor.device, non_blocking=True)
            layers = self._mirrors[anchor.name].layers
            if not layers.differ:
                return anchor.module(*args, **kwargs)
            with layers.like_the_reference(alone):
                return anchor.module(*args, **kwargs)
        with self._loras.active({anchor.adapter: 1.0}, kwargs) as kwargs:
            return self._call_reference(args, kwargs)

    def _call_reference(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not any(mirror.layers.differ for mirror in self._synced):
            return self.reference_call(*args, **kwargs)
        with ExitStack() as stack:
            for mirror in self._synced:
                stack.enter_context(mirror.layers.reference_watched())
            return self.reference_call(*args, **kwargs)

    @torch.compiler.disable
    def _make_ready(self, models: Collection[int]) -> None:
        """What has to be right before any of `models` is evaluated."""
        bring_in(self.reference)
        if self._loras.find():
            self.forget_blend()
        changes = self._hooks.look()
        if any(models) and torch.is_grad_enabled():
            self._hooks.require_no_store()
        self._rows_changed &= not changes.forward_hooks
        for mirror in self._mirrors.values():
            mirror.layers.changed(changes)
        names = [anchor.name for k, anchor in enumerate(self.anchors, 1) if k in models and anchor.module is not None]
        self._synced = [self._mirrors[name] for name in names]
        for mirror in self._synced:
            mirror.sync()

    def _can_batch(self, models: Sequence[int], kwargs: Mapping[str, Any]) -> bool:
        loras = all(not k or self.anchors[k - 1].adapter for k in models)
        return self.batched and loras and not self._hooks.draws and self._loras.can_batch(kwargs)

    def _predict_batched(self, models: Sequence[int], batch: Batch) -> dict[int, Any] | None:
        """All models in one pass; None where what comes back cannot be told apart."""
        copies = len(models)
        adapters = [self.anchors[k - 1].adapter or "" if k else "__base__" for k in models] * batch.rows
        args, kwargs = batch.repeated(copies)
        rows = batch.rows * copies
        with self._loras.by_row(adapters, kwargs) as kwargs:
            together = self._of_rows(lambda: {0: self._call_reference(args, kwargs)}, rows)
        if together is None:
            return None
        output = together[0]
        outputs = {k: output_rows(output, torch.arange(i, rows, copies)) for i, k in enumerate(models)}
        for model in models:
            _require_finite(outputs[model], self.names[model])
        return outputs


class NonFinitePrediction(FloatingPointError):
    """A model predicted NaN or infinity. `model` names it."""

    def __init__(self, model: str):
        super().__init__(f"the prediction of the {model} contains NaN or infinity")
        self.model = model


def _require_numbers(name: str, theta: Tensor) -> None:
    """Raise `UnmirroredState` for weights that are stored in a form in which their mean says nothing."""
    if not theta.is_floating_point() or theta.element_size() == 1 or type(theta.data) is not Tensor:
        raise UnmirroredState(
            f"interpolated weights need weights that can be averaged, and {name} is stored as a "
            f"{type(theta.data).__name__} in {theta.dtype} (quantised, or cast for storage by layerwise casting): use "
            "method='mixture'"
        )


@torch.compiler.disable
def _require_finite(output: Any, model: str) -> None:
    for tensor in tensors_of(output):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFinitePrediction(model)
