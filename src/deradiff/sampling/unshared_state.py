"""State that is on one of two models only: mirrored for a call where that is exact, refused by name where it is not.

`shared_settings.Mirror` passes on what diffusers keeps as settings. What remains is found here, layer by layer: hooks
of diffusers (those of its guiders, of layerwise casting, of caches), forward hooks of torch, replaced `forward`s,
quantised or patched layers, layers in another precision. All of it is compared when a run begins. Guiders put hooks on
the reference and take them off around single calls: they show in the `forward`s of its layers, which are looked at
before each call.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from diffusers.hooks import HookRegistry
from diffusers.hooks.group_offloading import (
    GroupOffloadingHook,
    LayerExecutionTrackerHook,
    LazyPrefetchGroupOffloadingHook,
)
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, FeedForwardSkipHook, TransformerBlockSkipHook
from diffusers.hooks.layerwise_casting import LayerwiseCastingHook, apply_layerwise_casting_hook
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceHook
from torch import nn
from torch.utils.hooks import RemovableHandle

from deradiff.sampling.blocked_methods import UnmirroredState
from deradiff.sampling.layer_pairs import (
    LayerPair,
    hooks_of,
    layer_pairs,
    place,
    replaced_forward,
    require_same_forward,
    require_same_kind,
    require_same_settings,
    require_same_tensors,
)
from deradiff.sampling.torch_hooks import guarded, hooked, tried_on

_PLACING = (GroupOffloadingHook, LazyPrefetchGroupOffloadingHook, LayerExecutionTrackerHook)
_PERTURBING = (AttentionProcessorSkipHook, FeedForwardSkipHook, TransformerBlockSkipHook, SmoothedEnergyGuidanceHook)
"""What guiders hook: without a memory, and of one layer's input alone, so that a copy does the same on another."""

_KNOWN_CODE = ("torch", "diffusers", "peft", "transformers", "deradiff", "bitsandbytes", "torchao", "optimum")
"""Whose layers treat the rows of a batch alike."""


class Changes(NamedTuple):
    """What was done to a model since the last look, or a run has begun: then everything may have been."""

    layers: bool
    """Layers were replaced, put in or taken out."""
    hooks: bool
    """Hooks of diffusers came or went, or a layer got another `forward`."""
    forward_hooks: bool
    """Forward hooks of torch were registered, on whatever model."""


class HookWatch:
    """Notices what is done to the layers of a model, and refuses hooks of diffusers that remember earlier calls.

    `anchors` are the models beside it, whose forward hooks of torch may take a batch apart, too.
    """

    def __init__(self, model: nn.Module, anchors: Sequence[nn.Module] = ()):
        self._model, self._anchors = model, anchors
        self._modules: list[tuple[str, nn.Module]] = []
        self._layers: list[Any] = []
        self._tables: tuple[dict[str, Any], ...] | None = None
        self._children: tuple[dict[str, Any], ...] = ()
        self._seen: tuple[list[Any], list[Any], int] = [], [], -1
        self.draws = False
        """Whether a hook drops values at random, as AutoGuidance's with a dropout below 1 do."""
        self.foreign: str | None = None
        """Code that is not diffusers' and runs in a layer, in words: it may take a batch apart. None without any."""
        self.hooked: list[Any] = []
        """The layers with forward hooks of torch."""

    def begin(self) -> None:
        """A run begins, or it is all over: layers may have been replaced since the last one, and are let go of."""
        self._modules, self._tables, self._children, self._seen = [], None, (), ([], [], -1)
        self._layers, self.hooked = [], []

    def look(self) -> Changes:
        """What was done since the last look. Cheap where nothing was: it is asked before every evaluation.

        A hook of diffusers sets the `forward` of its layer's instance; torch numbers the hooks that it registers.
        Raises `UnmirroredState` for a hook that remembers earlier calls: models that take turns would be handed one
        another's memory, and those with weights of their own would not have it at all.
        """
        layers, forwards, number = self._seen
        now = [child for table in self._children for child in table.values()]
        began = self._tables is None or now != layers
        if began:
            self._modules = list(self._model.named_modules())
            self._layers = [layer for model in (self._model, *self._anchors) for layer in model.modules()]
            self._tables = tuple(one.__dict__ for _, one in self._modules)
            self._children = tuple(one._modules for _, one in self._modules if one._modules)
            now = [child for table in self._children for child in table.values()]
        assert self._tables is not None
        present = [table["forward"] for table in self._tables if "forward" in table]
        changes = Changes(began, began or present != forwards, began or RemovableHandle.next_id != number)
        if changes.hooks:
            self._look_at_hooks()
            self.foreign = _foreign(self._model, self._modules)
        if changes.forward_hooks:
            # Where each row of a batch has its own adapter, that is every time: walking the trees would show.
            self.hooked = [layer for layer in self._layers if layer._forward_hooks or layer._forward_pre_hooks]
        self._seen = now, present, RemovableHandle.next_id
        return changes

    def require_no_store(self) -> None:
        """Raise `UnmirroredState` where the pipeline's own attention processors keep what they see, to be derived from.

        Attend-and-excite and pix2pix-zero take the gradient of what theirs have kept, which would be every model's in
        turn: both models have the same processors.
        """
        for _, module in self._modules:
            processor = module.__dict__.get("processor")
            if type(processor).__module__.startswith("diffusers.pipelines.") and (kept := _store_of(processor)):
                raise UnmirroredState(
                    f"this pipeline takes gradients of what its {type(processor).__name__} keeps in {kept!r}, and the "
                    "models of a mixture would keep theirs in the same: λ = 0 alone is possible here"
                )

    def _look_at_hooks(self) -> None:
        self.draws = False
        for path, module in self._modules:
            for name, hook in hooks_of(module).items():
                require_no_memory(hook, name, path, "reference")
                self.draws |= isinstance(hook, _PERTURBING) and 0 < getattr(hook, "dropout", 0) < 1


def _store_of(processor: Any) -> str | None:
    """The first attribute of an attention processor that is no setting; None where all are."""
    settings = bool, int, float, str, type(None)
    return next((name for name, value in vars(processor).items() if not isinstance(value, settings)), None)


def _foreign(model: nn.Module, modules: Sequence[tuple[str, Any]]) -> str | None:
    """The first layer with a class or `forward` from elsewhere; a whole model from elsewhere has its own word."""
    if type(model).__module__.partition(".")[0] not in _KNOWN_CODE:
        return None
    for path, module in modules:
        kind = type(module)
        if kind.__module__.partition(".")[0] not in _KNOWN_CODE:
            return f"{kind.__name__} at {place(path)}"
        if "forward" in module.__dict__ and (name := replaced_forward(module)) is not None:
            return f"{name} as the forward of {place(path)}"
    return None


def require_no_memory(hook: Any, name: str, path: str, owner: str) -> None:
    """Raise `UnmirroredState` for a hook of diffusers that keeps something from one call to the next: a cache's."""
    if hook._is_stateful:
        raise UnmirroredState(
            f"a cache is on the denoiser: {type(hook).__name__} on {place(path)} of the {owner} remembers earlier "
            "calls, and would hand one model what it remembers of another. Take it off to realign, with "
            "disable_cache() where enable_cache() has set it, and else "
            f"diffusers.hooks.HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook({name!r})"
        )


class Counterparts:
    """The layers of `reference` and those of `anchor`, called `name`, that stand beside them."""

    def __init__(self, reference: nn.Module, anchor: nn.Module, name: str):
        self._reference, self._anchor, self._name = reference, anchor, name
        self._pairs: list[LayerPair] | None = None
        self._compared = False
        self._looked_on: list[LayerPair] = []
        self._perturbed: list[tuple[Any, str, Any]] = []

    def begin(self) -> None:
        """A run begins: everything may have changed since the last one."""
        self._pairs, self._compared = None, False

    def changed(self, changes: Changes) -> None:
        """What was done to the reference since the last comparison is to be compared anew."""
        if changes.layers:
            self.begin()
        elif changes.hooks:
            self._compared = False
        if changes.forward_hooks and self._pairs is not None:
            self._looked_on = hooked(self._pairs)

    def compare(self) -> None:
        """Raise `UnmirroredState` for what is on one of the two alone; layerwise casting is set on the anchor, too.

        All of it is looked at once in a run, hooks of diffusers and replaced `forward`s again where they changed.
        """
        if self._compared:
            return
        pairs = layer_pairs(self._reference, self._anchor) if self._pairs is None else self._pairs
        if self._pairs is None:
            for pair in pairs:
                require_same_kind(pair, self._name)
            self._looked_on = hooked(pairs)
        self._perturbed = []
        for pair in pairs:
            if "forward" in pair.original.__dict__ or "forward" in pair.counterpart.__dict__:
                self._compare_hooks(pair)
                require_same_forward(pair, self._name)
        if self._pairs is None:
            for pair in pairs:
                require_same_settings(pair, self._name)
                require_same_tensors(pair, self._name)
        self._pairs, self._compared = pairs, True  # where nothing was raised: what was is refused at every call

    def _compare_hooks(self, pair: LayerPair) -> None:
        own, others = hooks_of(pair.original), hooks_of(pair.counterpart)
        for name, hook in others.items():
            require_no_memory(hook, name, pair.path, f"anchor {self._name!r}")
            if not isinstance(hook, _PLACING) and name not in own:
                raise self._one_sided(hook, pair.path, f"anchor {self._name!r}", "reference")
        for name, hook in own.items():
            if isinstance(hook, _PLACING):
                continue
            if name in others:
                self._require_same_settings(pair.path, hook, others[name])
            elif isinstance(hook, LayerwiseCastingHook):
                dtypes = hook.storage_dtype, hook.compute_dtype
                apply_layerwise_casting_hook(pair.counterpart, *dtypes, hook.non_blocking)
            elif isinstance(hook, _PERTURBING):
                self._perturbed.append((pair.counterpart, name, hook))
            else:
                raise self._one_sided(hook, pair.path, "reference", f"anchor {self._name!r}")

    def _one_sided(self, hook: Any, path: str, owner: str, other: str) -> UnmirroredState:
        return UnmirroredState(
            f"the hook {type(hook).__name__} is on {place(path)} of the {owner} and not of the {other}, which would go "
            "without it: apply it to both (dial.modules has the anchors), or remove it"
        )

    def _require_same_settings(self, path: str, hook: Any, other: Any) -> None:
        settings, others = (
            {k: v for k, v in vars(one).items() if k[0] != "_" and k != "fn_ref"} for one in (hook, other)
        )
        if type(hook) is not type(other) or settings != others:
            raise UnmirroredState(
                f"the hooks on {place(path)} differ: {type(hook).__name__} with {settings} in the reference and "
                f"{type(other).__name__} with {others} in the anchor {self._name!r}. Apply the same to both"
            )

    @property
    def differ(self) -> bool:
        """Whether the evaluation of either model needs `reference_watched` or `like_the_reference` around it."""
        return bool(self._perturbed or self._looked_on)

    @contextmanager
    def reference_watched(self) -> Iterator[None]:
        """The reference is evaluated: forward hooks of torch that it alone has may look on."""
        with guarded(self._looked_on, 1, "reference", f"anchor {self._name!r}"):
            yield

    @contextmanager
    def like_the_reference(self, alone: bool) -> Iterator[None]:
        """The anchor is evaluated: it has the guider's hooks that the reference has now.

        Forward hooks of torch that it alone has may look on; so may the reference's, where the anchor is `alone`.
        """
        names = f"anchor {self._name!r}", "reference"
        with ExitStack() as stack:
            stack.enter_context(guarded(self._looked_on, 2, *names))
            if alone:
                stack.enter_context(tried_on(self._looked_on, *reversed(names)))
            for layer, name, hook in self._perturbed:
                stack.enter_context(_with_hook(layer, name, copy.copy(hook)))
            yield


@contextmanager
def _with_hook(layer: Any, name: str, hook: Any) -> Iterator[None]:
    """`layer` with a hook of diffusers, and then as it was."""
    own = layer.__dict__
    before = {key: own[key] for key in ("forward", "_diffusers_hook") if key in own}
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(hook, name)
    try:
        yield
    finally:
        registry.remove_hook(name, recurse=False)
        for key in {"forward", "_diffusers_hook"} - {*before}:
            own.pop(key, None)
