"""Text encoders that answer with each model's own prompt embeddings (`realign(..., text_encoder="both")`).

What they return is `PerModel`: whatever the pipeline makes of it is made for each model by itself, and the denoiser
evaluates each model at its own. Algorithm 1 asks for each model's prediction and leaves open from which text it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from deradiff.anchors import Anchor
from deradiff.anchors.adapters import adapter_layers
from deradiff.anchors.full_weights import DIAL
from deradiff.sampling import blocked_methods
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.module_hook import hook_module
from deradiff.sampling.per_model import merged


@dataclass(frozen=True)
class _BeforeAllSteps:
    """The origin of prompt embeddings: earlier than every evaluation of the denoiser."""

    owner: Any
    """Stands for the dial whose models the embeddings are for."""
    serial: int = -1


class RealignedTextEncoder:
    """The text encoder `component` of a pipeline, for the reference and `anchors`; some have adapters in it.

    Raises `DialError` for an encoder that answers for the models of another dial.
    """

    def __init__(self, component: str, encoder: nn.Module, anchors: Sequence[Anchor]):
        if DIAL in encoder.__dict__:
            raise DialError(
                f"{component} answers for the models of another pipeline that is realigned with "
                'text_encoder="both": give this pipeline a copy of it, or remove the other one\'s dial first'
            )
        own = [replace(a, module=None, adapter=a.text_adapters.get(component), text_adapters={}) for a in anchors]
        self._component, self._models = component, Denoisers(encoder, own, batched=False)

    def hook(self, dial: Any, lock: AbstractContextManager[Any], owner: Any) -> Callable[[], None]:
        """Answer for the encoder from now on, one thread at a time, for the dial for which `owner` stands.

        Returns what undoes this.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return self._answer(args, kwargs, _BeforeAllSteps(owner))

        unhook = hook_module(self._models.reference, dial, call, {"save_pretrained": blocked_methods.saving})

        def undo() -> None:
            unhook()
            self._models.undo()

        return undo

    def _answer(self, args: tuple, kwargs: dict[str, Any], origin: _BeforeAllSteps) -> Any:
        """What the encoder returns for each model: an anchor without parts here has what the reference has."""
        if any(layer.merged for _, layer in adapter_layers(self._models.reference)):
            raise UnmirroredState(
                f"a LoRA is fused into {self._component}, and would keep the anchor's own part from acting: call "
                "pipe.unfuse_lora()"
            )
        models = range(len(self._models.names))
        own = [k for k in models if k == 0 or self._models.anchors[k - 1].adapter]
        self._models.begin()
        outputs = self._models.predict(own, args, kwargs)
        return merged({k: outputs.get(k, outputs[0]) for k in models}, origin)
