"""Realignment as a guider of diffusers, the component of modular pipelines that mixes predictions.

    guider = RealignGuider("mhdang/dpo-sdxl-text2image-v1", lam=0.5, guider=ClassifierFreeGuidance(7.5), pipe=pipe)
    pipe.update_components(guider=guider)

A denoising step asks its guider for batches of inputs, evaluates the denoiser on each between `prepare_models` and
`cleanup_models`, and has the guider make one prediction of what came back. `RealignGuider` asks for the batches of the
guider inside once for every model, has each model answer its own, guides each by itself (Algorithm 1, lines 7 and 8)
and mixes (lines 9 to 12, in predictions).
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from diffusers.guiders import BaseGuidance
from torch import Tensor, nn

from deradiff.algorithm.lams import parse_lam
from deradiff.algorithm.noise_levels import progress
from deradiff.algorithm.schedules import Progress
from deradiff.algorithm.step import with_reference_weight
from deradiff.anchors import Anchor, load_anchor
from deradiff.anchors.checks import Pipeline, unwrapped
from deradiff.integrations.attached_denoisers import (
    Attached,
    AttachedDenoiser,
    guider_of,
    only_denoiser,
    require_affine,
)
from deradiff.integrations.guided_mixture import mixture_of
from deradiff.integrations.guider_config import (
    plain_anchors,
    plain_guider,
    plain_lam,
    read_anchors,
    read_guider,
    read_lam,
    remembers,
)
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.dial import Lam
from deradiff.sampling.evaluation import wrong_count
from deradiff.sampling.per_model import noise_from_here
from deradiff.sampling.realigned_components import require_free
from deradiff.sampling.realignment import Source

_RESCALED = ("QwenImageTransformer2DModel",)
"""Denoisers whose modular pipelines bring the guider's prediction to the norm of the one with the prompt."""


class RealignGuider(BaseGuidance):
    """Guides the reference and its anchors each by itself, and mixes their predictions at λ (DeRaDiff, Algorithm 1).

    λ = 0 and λ = 1 evaluate one model, and are its own pipeline bit for bit. In between every model is evaluated on
    what the guider inside asks for, with a copy of that guider of its own (adaptive projected guidance has a momentum),
    and the mixture is `Σ w_k pred_k`, the reference's weight `1 - Σ λ`. That is Algorithm 1 where the scheduler's step
    is affine in the prediction; with another scheduler a run is refused.

    Qwen-Image's blocks rescale what the guider returns, token by token, by `‖pred_cond‖ / ‖pred‖`. Each model's own
    pipeline would do that to its own prediction, so that is what is mixed: `Σ w_k pred_k ‖cond_k‖ / ‖pred_k‖`. It is
    returned as `pred` and as `pred_cond`, for which the pipeline's factor is exactly 1.

    `enable()` and `disable()` are about guidance, as everywhere in diffusers, and so are `num_conditions` and the
    settings of the guider inside (`guider.guidance_scale`), which are read and set through this one. A model's
    predictions are mixed with guidance and without; λ = 0 is the reference alone.

    Attributes:
        guiders: each model's own guider, the reference's first.
        names: what the models are called, in the same order.

    Args:
        anchor: the aligned model in any form that `realign` takes, or several by name. None only where it follows in
            `new`.
        lam: λ as `realign` takes it: a number or a `Schedule` (annealed importance guidance is `Power(2)`), a list with
            one per image, with several anchors a dictionary by name. Also what a saved configuration holds instead.
        guider: the guider inside, such as `ClassifierFreeGuidance(7.5)`; None copies that of `pipe`.
        pipe: the pipeline to attach to, see `attach`.
        component: which of several denoisers it guides, as "transformer_2" of Wan 2.2, whose guider is "guider_2".
        anchor_subfolder: where in the anchor's folder or repository the denoiser lies, if not in the usual places.
        anchor_revision: the hub revision of the anchor.

    Raises:
        ValueError: λ that is not finite or not one for every anchor; no anchor; no guider, or one that cannot guide
            each model by itself; and what `attach` raises.
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012 (diffusers asks for a list; those of the guiders inside are used)

    guiders: tuple[BaseGuidance, ...]

    def __init__(
        self,
        anchor: Source | Mapping[str, Source] | None = None,
        lam: Lam | Mapping[str, Any] = 1.0,
        guider: BaseGuidance | Mapping[str, Any] | None = None,
        *,
        pipe: Pipeline | None = None,
        component: str | None = None,
        anchor_subfolder: str | None = None,
        anchor_revision: str | None = None,
    ):
        super().__init__()
        self._sources = read_anchors(anchor)
        self._where = {"component": component, "subfolder": anchor_subfolder, "revision": anchor_revision}
        self.names = ("reference", *self._sources)
        own = guider_of(pipe, component) if guider is None else read_guider(guider)
        if isinstance(own, RealignGuider):
            raise ValueError("the guider inside is a RealignGuider itself: several anchors go into one, by name")
        self.guiders = tuple(copy.deepcopy(own) for _ in self.names)
        self._attached = Attached()
        self._models: tuple[int, ...] = ()
        self._plan: list[tuple[int, str]] = []
        self._thread: int | None = None
        self._steps: dict[int, int] = {}
        """The last step of each thread's present run."""
        self._ended: Callable[[], None] | None = None
        """What ends the present turn of a model."""
        self.register_to_config(
            anchor=plain_anchors(self._sources),
            guider=plain_guider(own),
            component=component,
            anchor_subfolder=anchor_subfolder,
            anchor_revision=anchor_revision,
        )
        self.lam = lam
        if pipe is not None:
            self.attach(pipe)

    # -- λ, and what it is attached to --------------------------------------------------------------------------------

    @property
    def lam(self) -> Any:
        """λ as it was set. A new one counts from the next step; a bad one raises `ValueError` and changes nothing."""
        return self._lams.raw

    @lam.setter
    def lam(self, lam: Lam | Mapping[str, Any]) -> None:
        self._lams = parse_lam(read_lam(lam), self.names[1:])
        self.register_to_config(lam=plain_lam(self._lams.raw))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The loaded anchors that are denoisers of their own, by name; of several pipelines, the last one's."""
        anchors = [anchor for own in self._attached.attached for anchor in own.denoisers.anchors]
        return {anchor.name: anchor.module for anchor in anchors if anchor.module is not None}

    def attach(self, pipe: Pipeline) -> RealignGuider:
        """Load the anchors as counterparts of the pipeline's denoiser; returns this guider, for `update_components`.

        A guider may be attached to several pipelines, also around one denoiser, whose runs come one after the other.
        The reference of each is as it was until one of their steps asks this guider.

        Raises:
            ValueError: a pipeline without a guider (Flux, for one: use `realign`); several denoisers, none of which is
                named; a scheduler whose step is not affine in the prediction; `anchors.AnchorError` for an anchor that
                cannot be used, of another architecture for instance.
            DialError: the denoiser is realigned already.
        """
        component = self._where["component"] or only_denoiser(pipe)
        guider_of(pipe, component)
        require_affine(pipe.scheduler)
        denoiser = getattr(pipe, component)
        if self._attached.of(denoiser) is None:
            require_free(unwrapped(denoiser))
            self._attached.add(Denoisers(unwrapped(denoiser), self._loaded(pipe, component), batched=False))
        self._attached.add_pipeline(pipe)
        return self

    def remove(self) -> None:
        """Let go of the anchors, and leave all denoisers as they were found; give the pipelines another guider.

        So do the guiders that `new` made of this one. Calling it again does nothing.
        """
        self._attached.undo()

    def new(self, **changes: Any) -> RealignGuider:
        """A guider with the same settings but for `changes`, which shares the loaded anchors where these stay."""
        same = not {"anchor", "component", "anchor_subfolder", "anchor_revision"} & {*changes}
        kept = {"anchor": self._sources, "lam": self.lam, "guider": self.guiders[0]}
        pipe = changes.pop("pipe", None)
        twin = type(self).from_config(self.config, **(kept | changes))
        if same:
            twin._attached = self._attached
        return twin if pipe is None else twin.attach(pipe)

    def _loaded(self, pipe: Pipeline, component: str) -> list[Anchor]:
        anchors: list[Anchor] = []
        where: dict[str, Any] = self._where | {"component": component}
        try:
            for name, source in self._sources.items():
                anchors.append(load_anchor(source, pipe, name=name, **where))
        except BaseException:
            while anchors:
                anchors.pop().unload(unwrapped(getattr(pipe, component)))
            raise
        return anchors

    # -- guidance: the settings and switches of the guider inside -----------------------------------------------------

    @property
    def _enabled(self) -> bool:
        return bool(self.guiders[0]._enabled)

    @_enabled.setter
    def _enabled(self, enabled: bool) -> None:
        for guider in self.__dict__.get("guiders", ()):
            guider._enabled = enabled

    def __getattr__(self, name: str) -> Any:
        guiders = self._with_setting(name)
        return getattr(guiders[0], name) if guiders else super().__getattr__(name)

    def _with_setting(self, name: str) -> tuple[BaseGuidance, ...]:
        """The guiders inside, where `name` is a setting of theirs."""
        guiders = self.__dict__.get("guiders", ())
        return guiders if guiders and name[0] != "_" and name in vars(guiders[0]) else ()

    def __setattr__(self, name: str, value: Any) -> None:
        if guiders := self._with_setting(name):
            for guider in guiders:
                setattr(guider, name, value)
                if name in getattr(guider, "config", ()):
                    guider.register_to_config(**{name: value})
            self.register_to_config(guider=plain_guider(guiders[0]))
        else:
            super().__setattr__(name, value)

    @property
    def num_conditions(self) -> int:
        """How many conditions each model is asked for, as by the guider inside."""
        return int(self.guiders[0].num_conditions)

    @property
    def is_conditional(self) -> bool:
        """Whether the present turn is a prediction with the prompt."""
        model = self._plan[self._count_prepared - 1][0] if 0 < self._count_prepared <= len(self._plan) else 0
        return bool(self.guiders[model].is_conditional)

    # -- a step -------------------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        """A step begins: which models it mixes, and with which weights.

        Raises `DialError` where the guider is attached to no pipeline, where another thread is in the middle of a run,
        and where λ turned in mid-run to a model whose guider needs to have seen the earlier steps; `ValueError` for
        another scheduler than one whose step is affine in the prediction.
        """
        begins = step <= self._steps.get(threading.get_ident(), step)
        if not begins:
            self._require_own_thread()
        self._end_turn()
        scheduler = self._attached.scheduler(timestep)
        super().set_state(step, num_inference_steps, timestep)
        for guider in self.guiders:
            guider.set_state(step, num_inference_steps, timestep)
        if begins:
            require_affine(scheduler)
            self._attached.begin()
            self._thread = threading.get_ident()
        self._steps[threading.get_ident()] = step
        here = Progress(0.0, 0.0) if self._lams.is_constant else progress(scheduler, timestep)
        weights = with_reference_weight(self._lams.at(here, self._lams.images or 1))
        # A guider with a memory has to see every step of its model, also those where a schedule is at λ = 0.
        throughout = not self._lams.is_constant and remembers(self.guiders[0])
        models = tuple(k for k in range(len(weights)) if throughout or weights[k].any())
        if not begins and remembers(self.guiders[0]) and not {*models} <= {*self._models}:
            raise DialError(
                f"λ was turned to {self.lam!r} in mid-run, and a {type(self.guiders[0]).__name__} remembers "
                "earlier steps, at which not all of these models were evaluated: turn λ between runs, or use a schedule"
            )
        self._models, self._weights = models, weights[list(models)]
        self._rewind = noise_from_here()

    def prepare_inputs(self, data: dict[str, tuple[Any, Any]]) -> list[Any]:
        """The batches of the guider inside, for every model that has a weight at this step, the reference's first."""
        return self._prepared(lambda guider: guider.prepare_inputs(data))

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """As `prepare_inputs`, of what a pipeline's blocks have in common."""
        return self._prepared(lambda guider: guider.prepare_inputs_from_block_state(data, input_fields))

    def _prepared(self, prepare: Callable[[BaseGuidance], list[Any]]) -> list[Any]:
        self._plan, batches = [], []
        for model in self._models:
            for batch in prepare(self.guiders[model]):
                identifier = getattr(batch, self._identifier_key)
                self._plan.append((model, identifier))
                # Pipelines name what they keep between steps by it, and models must not share that.
                setattr(batch, self._identifier_key, f"{identifier} of {self.names[model]}" if model else identifier)
                batches.append(batch)
        if batches:
            # A pipeline that fails between two calls of its denoiser cleans up nothing, but lets go of its batches.
            weakref.finalize(batches[0], self._abandon, self._plan).atexit = False
        return batches

    def prepare_models(self, denoiser: nn.Module) -> None:
        """The turn of the next batch's model: until `cleanup_models` it answers the calls of `denoiser`.

        Raises `DialError` for a denoiser that this guider is not attached to.
        """
        self._require_own_thread()
        own = self._attached.of(denoiser)
        if own is None:
            raise DialError(
                f"this guider is not attached to the {type(unwrapped(denoiser)).__name__} that the pipeline denoises "
                "with: call guider.attach(pipe), again where the pipeline was given another one"
            )
        if self._count_prepared == len(self._plan):
            raise DialError(
                f"the pipeline evaluates its denoiser more often than the {len(self._plan)} times asked for"
            )
        model, _ = self._plan[self._count_prepared]
        if self._count_prepared and self._plan[self._count_prepared - 1][0] != model:
            self._rewind()  # what is dropped at random is the same for every model
        self._rescales = type(own.denoisers.reference).__name__ in _RESCALED
        self._count_prepared += 1
        self._begin_turn(own, model, denoiser)

    def _begin_turn(self, own: AttachedDenoiser, model: int, denoiser: nn.Module) -> None:
        guider = self.guiders[model]

        def end() -> None:
            self._ended = None
            own.end_turn()
            guider.cleanup_models(denoiser)

        self._ended = end
        guider.prepare_models(denoiser)
        own.give_turn(model, self._break_off)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """The turn is over: adapters, and the hooks of the guider inside, are off again."""
        self._end_turn()

    def _end_turn(self) -> None:
        if self._ended is not None:
            self._ended()

    def _break_off(self) -> None:
        """The run failed."""
        self._end_turn()
        self._steps.pop(threading.get_ident(), None)

    def __call__(self, data: list[Any]) -> Any:
        """Each model's predictions guided by its own guider, and mixed."""
        self._require_own_thread()
        if len(data) != len(self._plan):
            raise ValueError(f"{len(self._plan)} predictions were asked for, {len(data)} came back")
        turns: dict[int, list[Any]] = {model: [] for model in self._models}
        for batch, (model, identifier) in zip(data, self._plan, strict=True):
            setattr(batch, self._identifier_key, identifier)
            turns[model].append(batch)
        guided = [self.guiders[model](batches) for model, batches in turns.items()]
        if self._lams.images not in (None, len(guided[0].pred)):
            raise wrong_count(self._lams.images, len(guided[0].pred))
        return guided[0] if len(guided) == 1 else mixture_of(guided, self._weights, self._rescales)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not by itself: what is mixed are the predictions of several models, see `__call__`."""
        raise NotImplementedError("a RealignGuider mixes what its guiders return: call it with the prepared batches")

    def _abandon(self, plan: list[tuple[int, str]]) -> None:
        """The batches of `plan` are gone, and where a turn of theirs is not over, the run failed.

        A later step has a plan of its own.
        """
        if self._plan is plan and self._ended is not None:
            self._break_off()

    def _require_own_thread(self) -> None:
        if self._thread != threading.get_ident():
            raise DialError(
                "two runs use this guider at once, from different threads: give each pipeline one of its own, made by "
                "guider.new()"
            )
