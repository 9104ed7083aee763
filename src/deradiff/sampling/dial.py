"""The handle of a realigned pipeline: it answers for the denoiser, takes the scheduler's steps, and turns λ.

Where calls are intercepted, and why there:

- The denoiser at `Module.__call__` (its instance's `_call_impl`), outside every forward hook and wrapper: offloading,
  `torch.compile` and group offload keep working in any order, and the module keeps its class, which `from_pipe` asks.
- The scheduler by attributes of its instance (`scheduler_hook`); a scheduler that the pipeline gets later is hooked at
  its first use. The pipeline by a subclass, for nothing but to know when a call begins and ends.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

from diffusers import SchedulerMixin
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from jaxtyping import Float, Int
from torch import Tensor

from deradiff.algorithm.characters import Character
from deradiff.algorithm.lams import Lams
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.schedules import Schedule
from deradiff.algorithm.step import Space, StepRecord, space_of
from deradiff.algorithm.verdict import Verdict, verdict
from deradiff.anchors import denoisers_of
from deradiff.anchors.checks import Pipeline, unwrapped
from deradiff.anchors.full_weights import DIAL
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.evaluation import brought
from deradiff.sampling.per_model import divided, foreign, is_divided
from deradiff.sampling.realigned_components import RealignedComponent, as_given, lams_by_component
from deradiff.sampling.realigned_steps import Method, RealignedSteps, Where
from deradiff.sampling.reuse import Reuse, Reused, require_affine
from deradiff.sampling.runs import Runs
from deradiff.sampling.scheduler_hook import hook_pipeline, hook_scheduler, owner_of, schedulers_of
from deradiff.sampling.text_encoders import RealignedTextEncoder
from deradiff.sampling.truncation import taking_turns

Lam = float | Schedule | Sequence[float | Schedule] | Float[Tensor, " batch"]


class Dial:
    """The handle of a realigned pipeline. Made by `realign`.

    `lam` may be read and set at any time; a new value takes effect at the next step, also in mid-image. Used as a
    context manager, the dial removes itself at the end of the block. `last` is the record of the most recent step.
    While `watching` is set, models without weight are evaluated as well: images stay what they are, and
    `importance_weights` then knows the path KL and the implicit reward of a single model too, at the price of the other
    models' evaluations.

    Threads may draw at once with pipelines of their own around the denoiser, each attached and with its own scheduler.
    Whatever is said of the present or last run is then of this thread's, or of any where this thread has drawn nothing.
    """

    def __init__(
        self,
        pipe: Pipeline,
        denoisers: Mapping[str, Denoisers],
        lams: Mapping[str, Lams],
        method: Method,
        path: Where,
        reuse: Reuse | None = None,
        text_encoders: Sequence[RealignedTextEncoder] = (),
    ):
        self.method: Method = method
        self.watching = False
        self._path = path
        self._runs = Runs()
        self._own = threading.local()
        self._pipes: list[weakref.ref[Pipeline]] = []
        self._undo: list[Callable[[], None]] = []
        self._owner = object()  # what is different for each of this dial's models is known by it
        self._removed = False
        self._reuse = reuse
        self._components: dict[str, RealignedComponent] = {}
        for name, own in denoisers.items():
            own.require_blendable(lams[name], method, reuse)
            self._components[name] = RealignedComponent(
                name, own, lams[name], RealignedSteps(own, method, path), self._owner
            )
        try:
            for component in self._components.values():
                self._undo.append(component.hook(self, partial(self._call, component)))
            self._undo += [encoder.hook(self, self._runs.lock, self._owner) for encoder in text_encoders]
            self.attach(pipe)
        except BaseException:
            while self._undo:
                self._undo.pop()()
            raise

    def __repr__(self) -> str:
        denoisers = [component.denoisers for component in self._components.values()]
        models = " and ".join(type(own.reference).__name__ for own in denoisers)
        anchors = {anchor.name: anchor.source for own in denoisers for anchor in own.anchors}
        how = f"method={self.method!r}" if self._reuse is None else f"approximate: {self._reuse}"
        return f"Dial({models}, anchors={anchors}, lam={self.lam!r}, {how})"

    @property
    def lam(self) -> Any:
        """λ as it was set; see `realign`. Setting a bad value raises `ValueError` and leaves the old one in force.

        What is read cannot be changed in place: lists and tensors come back as tuples. To change one λ, set them all.
        """
        return as_given({name: component.lams for name, component in self._components.items()})

    @lam.setter
    def lam(self, lam: Lam | Mapping[str, Lam]) -> None:
        self._require_in_force()
        components = self._components.values()
        lams = lams_by_component(lam, {one.name: one.denoisers.names[1:] for one in components})
        for component in components:
            component.denoisers.require_blendable(lams[component.name], self.method, self._reuse)
        for component in components:
            component.lams = lams[component.name]  # all that a thread in mid-image will see of this one

    @property
    def reuse(self) -> Reuse | None:
        """How predictions are carried over between steps; None, the default, evaluates all and is exact.

        A new value counts from the next run. Raises `ValueError` for what `realign` refuses.
        """
        return self._reuse

    @reuse.setter
    def reuse(self, reuse: Reuse | int | None) -> None:
        self._require_in_force()
        reuse = Reuse.parse(reuse, None)
        for component in self._components.values():
            component.denoisers.require_blendable(component.lams, self.method, reuse)
        if reuse is not None:
            require_affine(self._scheduler, self._path)
        self._reuse = reuse

    @property
    def reused(self) -> Reused | None:
        """What reuse came to in the present or last run, its estimated error among it; None for exact runs."""
        estimator = self._runs.shown.estimator
        return None if estimator is None else estimator.result()

    @property
    def last(self) -> StepRecord | None:
        """The most recent step of the present or last run; None before the first."""
        return self._runs.shown.last

    @property
    def population(self) -> Callable[..., Tensor] | None:
        """What is handed every step of the runs in this thread, and may reorder its images (`particles`)."""
        return getattr(self._own, "population", None)

    @population.setter
    def population(self, population: Callable[..., Tensor] | None) -> None:
        self._own.population = population

    @property
    def blends_rows(self) -> bool:
        """Whether interpolated weights can have a λ for each image: where all anchors are LoRAs."""
        return all(component.denoisers.blends_rows for component in self._components.values())

    @property
    def one_lam(self) -> bool:
        """Whether every image of a batch has the same λ."""
        return all(component.lams.images is None for component in self._components.values())

    @property
    def micro_batch(self) -> int | None:
        """How many rows of a batch the networks are given at a time; None for all. Results do not depend on it."""
        return next(iter(self._components.values())).denoisers.micro_batch

    @micro_batch.setter
    def micro_batch(self, rows: int | None) -> None:
        for component in self._components.values():
            component.denoisers.micro_batch = rows

    @property
    def anchors(self) -> tuple[str, ...]:
        """The names of the anchors."""
        names = [name for component in self._components.values() for name in component.denoisers.names[1:]]
        return tuple(dict.fromkeys(names))

    @property
    def modules(self) -> dict[str, Any]:
        """The anchors that are denoisers of their own, by name; a LoRA is none. `realign` takes them as anchors too.

        By component first, where the pipeline has several denoisers.
        """
        modules = {
            component.name: {one.name: one.module for one in component.denoisers.anchors if one.module is not None}
            for component in self._components.values()
        }
        return modules if len(modules) > 1 else next(iter(modules.values()))

    @property
    def importance_weights(self) -> ImportanceWeights:
        """What Algorithm 1 left out of the present or last run: log weights, path divergence, implicit rewards.

        Raises `RuntimeError` before the first step, and for interpolated weights, which leave out something else.
        """
        if self.method == "interpolate":
            raise RuntimeError("interpolated weights are one model, whose error has no weight: use method='mixture'")
        return self._runs.shown.path_weights.result()

    def verdict(
        self,
        scores: Float[Tensor, " image"] | None = None,
        groups: Int[Tensor, " image"] | None = None,
        *,
        baseline: float | None = None,
        name: str = "score",
        character: Character | None = None,
    ) -> Verdict:
        """How far the present or last run can be trusted, for a score of its images: see `verdict.verdict`."""
        return verdict(self.importance_weights, scores, groups, baseline=baseline, name=name, character=character)

    @property
    def path(self) -> Space:
        """Where the mixture is taken with the present scheduler: in mixed predictions or explicit posteriors."""
        return space_of(self._scheduler, self._path)[0]

    @property
    def why(self) -> str:
        """Why `path` is what it is, in words."""
        return space_of(self._scheduler, self._path)[1]

    def attach(self, pipe: Pipeline) -> None:
        """Also serve `pipe`, another pipeline around the same denoiser (`from_pipe`) with a scheduler of its own.

        Raises `DialError` for a pipeline around another denoiser, and where the dial was removed.
        """
        self._require_in_force()
        self._require_references(pipe)
        for scheduler in schedulers_of(pipe):
            self._hook(scheduler, own=False)
        if owner_of(pipe) is None:
            self._undo.append(hook_pipeline(pipe, self))
            self._pipes.append(weakref.ref(pipe))

    def remove(self) -> None:
        """Give the pipeline back as it was, and let go of the anchors. Calling it again does nothing.

        Raises `DialError` while another thread is in the middle of an image.
        """
        if self._removed:
            return
        with self._runs.lock:
            self._runs.require_quiet()
            self._removed = True
            while self._undo:
                self._undo.pop()()
            for component in self._components.values():
                component.denoisers.undo()
            self._runs.detach()

    def _require_in_force(self) -> None:
        if self._removed:
            raise DialError("this dial was removed, and its pipeline is realigned no more: call realign() again")

    def _require_denoisers(self, scheduler: SchedulerMixin) -> None:
        """Raise `DialError` where a pipeline with this scheduler was given another denoiser."""
        for pipe in self._living_pipes():
            if any(own is scheduler for own in schedulers_of(pipe)):
                self._require_references(pipe)

    def _require_references(self, pipe: Pipeline) -> None:
        """Raise `DialError` for a pipeline without the denoisers that were realigned."""
        own = {name: unwrapped(denoiser) for name, denoiser in denoisers_of(pipe).items()}
        for name, component in self._components.items():
            if own.get(name, component.reference) is not component.reference or not own.keys() & {*self._components}:
                raise DialError(
                    f"pipe.{name} is not the {type(component.reference).__name__} that this dial realigned, so the "
                    "pipeline would run without its anchors: put the realigned one back, or call dial.remove() and "
                    "realign anew"
                )

    def __enter__(self) -> Dial:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __deepcopy__(self, memo: dict) -> NoReturn:
        raise TypeError(
            "a realigned pipeline or denoiser cannot be copied or pickled, the copy would still run the original's "
            "models: call dial.remove() first, copy, and realign both"
        )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        self.__deepcopy__({})

    # -- the denoiser: evaluate every model that has a weight ---------------------------------------------------------

    def _call(self, component: RealignedComponent, *args: Any, **kwargs: Any) -> Any:
        """Answers for a component's reference whenever a pipeline calls it."""
        if is_divided(component.denoisers.argument("input", args, kwargs)):
            raise DialError(
                "the models' predictions came back to the denoiser without having passed a scheduler's step that the "
                "dial takes: a second pipeline uses this denoiser with a scheduler of its own (call "
                "dial.attach(that_pipeline)), or this one takes steps by itself, which cannot be realigned"
            )
        if any(value.origin.owner is not self._owner for value in divided((args, kwargs))):
            raise foreign()
        with self._runs.lock:
            self._hook_new()
            return component.answer(self._runs.present(), self.watching, args, kwargs)

    # -- the scheduler: mix, and take the step ------------------------------------------------------------------------

    @property
    def _scheduler(self) -> SchedulerMixin:
        """The scheduler of the present or last run."""
        self._hook_new()
        return self._runs.shown.scheduler

    def _hook_new(self) -> None:
        """Hook a scheduler that a pipeline was given meanwhile: in a call of a pipeline, that one's alone."""
        pipes = [] if self._removed else self._living_pipes()
        for pipe in pipes:
            if not self._runs.is_called() or self._runs.is_called(pipe):
                for scheduler in schedulers_of(pipe):
                    self._hook(scheduler)
        self._runs.follow([scheduler for pipe in pipes for scheduler in schedulers_of(pipe)])

    def _living_pipes(self) -> list[Pipeline]:
        return [pipe for ref in self._pipes if (pipe := ref()) is not None]

    @contextmanager
    def _calling(self, pipe: Pipeline) -> Iterator[None]:
        """A call of `pipe`, however it ends."""
        copies = self._own.__dict__.setdefault("copies", [])
        before = len(copies)
        with self._runs.call(pipe), taking_turns(pipe):
            self._hook_new()
            try:
                yield
            finally:
                while len(copies) > before:
                    scheduler, undo = copies.pop()
                    undo()
                    self._runs.forget(scheduler)

    def _hook(self, scheduler: SchedulerMixin, *, own: bool = True) -> None:
        with self._runs.lock:
            if (owner := owner_of(scheduler)) is not None:
                if owner is not self:
                    raise DialError("this scheduler belongs to another realigned pipeline: give each pipeline its own")
                return
            self._undo.append(hook_scheduler(scheduler, self))
            self._start(scheduler, own=own)  # its first run has set its timesteps already

    @contextmanager
    def _begin(self, scheduler: SchedulerMixin) -> Iterator[None]:
        """A run begins (`set_timesteps`)."""
        self._require_denoisers(scheduler)
        with self._runs.lock:
            self._start(scheduler)
            yield

    def _start(self, scheduler: SchedulerMixin, *, own: bool = True, copied: bool = False) -> None:
        """Whatever an earlier or interrupted run left behind is void."""
        self._runs.begin(scheduler, self._reuse, own=own, copied=copied)
        for component in self._components.values():
            component.denoisers.begin()

    def _copied(self, scheduler: SchedulerMixin) -> None:
        """A pipeline copies its scheduler in the middle of a call: the copy's steps are the mixture's too."""
        if self._runs.is_called():
            with self._runs.lock:
                self._own.copies.append((scheduler, hook_scheduler(scheduler, self)))
                self._start(scheduler, own=False, copied=True)

    def _step(self, scheduler: SchedulerMixin, own_step: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """Algorithm 1, lines 9 to 14, from the guided predictions of all models."""
        with self._runs.lock:
            run = self._runs.of(scheduler)
            pending, run.pending, run.fresh = run.pending, None, False
            evaluation, prediction = brought(arguments["model_output"], pending, self._owner)
            if evaluation is None:  # another model's step through this scheduler, or interpolated weights
                self._require_denoisers(scheduler)
                return own_step(**arguments)
            if evaluation.run is not run:
                evaluation.run.path_weights.add_obstacle("several schedulers")
            output = evaluation.component.steps.take(run, evaluation, prediction, own_step, arguments)
        run.path_weights.after_step(output[0])
        if self.population is not None:
            chosen = self.population(run.path_weights, scheduler, output[0])
            output = (chosen, *output[1:]) if isinstance(output, tuple) else SchedulerOutput(prev_sample=chosen)
        return output


def dial_of(pipe: Pipeline) -> Dial | None:
    """The dial of a realigned pipeline, None for another."""
    owners = (unwrapped(denoiser).__dict__.get(DIAL) for denoiser in denoisers_of(pipe).values())
    return next((owner for owner in owners if isinstance(owner, Dial)), None)
