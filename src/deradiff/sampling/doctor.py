"""Does realignment work with this pipeline and this anchor? Latents of a few steps, held against plain pipelines.

At the ends of λ a realigned pipeline is a plain one around one of the models, bit for bit. Between them it is held
against the mixture by hand (`lock_step`), which shares no code with the dial. `examine` takes a pipeline as it was
loaded: what was set on its denoiser since, such as an IP-Adapter, is not on the anchors' plain pipelines.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import SchedulerMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from deradiff.algorithm.posterior_families import learns_variance
from deradiff.algorithm.schedules import finite
from deradiff.algorithm.step import Space
from deradiff.anchors import AnchorError, AnchorNotFound, denoisers_of, load_anchor
from deradiff.anchors.checks import Pipeline, unwrapped
from deradiff.sampling.batch_axes import Batch, UnknownBatch
from deradiff.sampling.blocked_methods import DialError, UnmirroredState
from deradiff.sampling.call_arguments import tensors_of
from deradiff.sampling.denoiser_states import splits_batches
from deradiff.sampling.lock_step import Draw, NoLockStep, in_lock_step, plain_pipeline
from deradiff.sampling.pipeline_checks import ROUNDING, PipelineCheck, close, distance, equal
from deradiff.sampling.realignment import Sources, realign, sources_by_component
from deradiff.sampling.scheduler_hook import schedulers_of

Modules = Mapping[str, Mapping[str, nn.Module]]
"""The anchors as denoisers, by component and name."""

_REFUSALS = (DialError, UnmirroredState, AnchorError, ValueError)


@dataclass
class PipelineReport:
    """What `examine` saw. `refused` says why this pipeline or anchor cannot be realigned; None where it can be."""

    facts: dict[str, str]
    checks: list[PipelineCheck] = field(default_factory=list)
    refused: str | None = None

    @property
    def holds(self) -> bool:
        """Whether nothing is refused and no check fails."""
        return self.refused is None and all(check.holds is not False for check in self.checks)


@dataclass
class _SeenSteps:
    """The calls of a pipeline's denoisers: how many passes through them, and the last call's arguments by component."""

    passes: int = 0
    calls: dict[str, tuple[Any, Any]] = field(default_factory=dict)


@dataclass
class _Realigned:
    """What a realigned pipeline drew, or raised, by the λ of all anchors."""

    names: tuple[str, ...]
    modules: Modules
    space: Space
    why: str
    drawn: dict[tuple[float, ...], Tensor | Exception] = field(default_factory=dict)
    passes: int = 0
    """Of the last one drawn."""


def examine(
    pipe: Pipeline,
    anchors: Sources,
    call: Mapping[str, Any],
    lam: float = 0.5,
    *,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> PipelineReport:
    """Draw with `pipe`, plain and realigned, and see whether λ does what it should; the pipeline is then as it was.

    Args:
        pipe: a pipeline as it was loaded, on its device.
        anchors: what `realign` takes; several share `lam`.
        call: the arguments of the pipeline's call, but for a generator: two steps, and latents, are enough.
        lam: where it is held against the mixture by hand, besides 0 and 1.
        seed: of all noise.
        revision: the hub revision of the anchors.
        allow_pickle: read pickled weights too.

    Raises `ValueError` for a λ of 0 or 1, `AnchorNotFound`, and what the plain pipeline raises.
    """
    if finite(lam, "λ") in (0.0, 1.0):
        raise ValueError(f"λ = 0 and λ = 1 are looked at anyway: give one besides, got {lam:g}")
    draw: Draw = partial(drawn, call=call, seed=seed)
    loading = {"revision": revision, "allow_pickle": allow_pickle}
    denoisers = {name: unwrapped(module) for name, module in denoisers_of(pipe).items()}
    with _observed(denoisers) as seen:
        plain = draw(pipe)
    before = _state(pipe, denoisers)
    report = PipelineReport(_classes(pipe, denoisers) | {"batch can be divided": _divisible(denoisers, seen.calls)})
    report.checks.append(_same_again(plain, draw(pipe)))
    if not torch.isfinite(plain).all():
        return report
    try:
        realigned = _realigned(pipe, anchors, lam, draw, denoisers, loading)
    except _REFUSALS as error:
        if isinstance(error, AnchorNotFound):
            raise
        report.refused = str(error)
        return report
    report.facts["mixed in"] = f"{realigned.space}s: {realigned.why}"
    report.refused = next((str(one) for one in realigned.drawn.values() if isinstance(one, _REFUSALS)), None)
    removed = _removed(plain, _attempted(draw, pipe), before == _state(pipe, denoisers))
    if removed.holds:
        modules = _with_loras(pipe, anchors, realigned.modules, loading)
        if any({*named} - {*realigned.modules.get(component, ())} for component, named in modules.items()):
            once = realigned.passes == seen.passes
            report.facts["LoRAs in one batch"] = "yes" if once else "no: a pass for each model"
        twins = [plain_pipeline(pipe, {})]
        for name in realigned.names:
            twins.append(plain_pipeline(pipe, {one: named[name] for one, named in modules.items() if name in named}))
        own = [draw(twin) for twin in twins]
        report.checks += _ends(realigned, own)
        report.checks += _between(realigned, twins, own, draw, _rounding(denoisers))
    report.checks.append(removed)
    return report


def drawn(pipe: Any, call: Mapping[str, Any], seed: int) -> Tensor:
    """All that a call returns in tensors, as one row of double precision. Raises `ValueError` where that is nothing."""
    taken = inspect.signature(type(pipe).__call__).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())
    own = {"generator": torch.Generator("cpu").manual_seed(seed)} if takes_any or "generator" in taken else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        output = pipe(**call, **own)
    if not (tensors := tensors_of(output)):
        raise ValueError(
            f"this call of {type(pipe).__name__} returns no tensor: ask it for latents, output_type='latent'"
        )
    return torch.cat([tensor.detach().cpu().double().flatten() for tensor in tensors])


# -- the realigned pipeline, and the plain ones beside it --------------------------------------------------------------


def _realigned(
    pipe: Any, anchors: Sources, lam: float, draw: Draw, denoisers: Mapping[str, Any], loading: Mapping[str, Any]
) -> _Realigned:
    """What the pipeline draws at λ = 0, at 1 of each anchor, and between, before the dial is removed again."""
    sources, _ = sources_by_component(anchors, pipe)
    names = tuple(dict.fromkeys(name for named in sources.values() for name in named))
    ends = [tuple(float(name == end) for name in names) for end in ("", *names)]
    with realign(pipe, anchors, _as_lam(names, ends[0]), **loading) as dial:
        modules = dial.modules if len(sources) > 1 else {next(iter(sources)): dial.modules}
        realigned = _Realigned(names, modules, dial.path, dial.why)
        for lams in (*ends, tuple(lam / len(names) for _ in names)):
            dial.lam = _as_lam(names, lams)
            with _observed(denoisers) as seen:
                realigned.drawn[lams] = _attempted(draw, pipe)
            realigned.passes = seen.passes
    return realigned


def _attempted(draw: Draw, pipe: Any) -> Tensor | Exception:
    """What is drawn, or why it could not be; raises where memory runs out."""
    try:
        return draw(pipe)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return error


def _as_lam(names: Sequence[str], lams: Sequence[float]) -> Any:
    return dict(zip(names, lams, strict=True)) if len(names) > 1 else lams[0]


def _with_loras(pipe: Any, anchors: Sources, modules: Modules, loading: Mapping[str, Any]) -> Modules:
    """The anchors as denoisers; of a LoRA, a copy of the reference in which it is active."""
    sources, shared = sources_by_component(anchors, pipe)
    complete = {component: dict(modules.get(component, {})) for component in sources}
    for component, named in sources.items():
        for name, source in named.items():
            if name in complete[component]:
                continue
            stages = tuple(sources) if shared else ()
            anchor = load_anchor(source, pipe, name=name, component=component, stages=stages, **loading)
            reference = unwrapped(getattr(pipe, component))
            try:
                complete[component][name] = _with_adapter(copy.deepcopy(reference), anchor.adapter)
            finally:
                anchor.unload(reference)
    return complete


def _with_adapter(module: nn.Module, adapter: str | None) -> nn.Module:
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer) and adapter is not None:
            layer.set_adapter([*layer.active_adapters, adapter])
    return module


@contextmanager
def _observed(denoisers: Mapping[str, Any]) -> Iterator[_SeenSteps]:
    seen = _SeenSteps()

    def see(name: str, _: Any, args: Any, kwargs: Any) -> None:
        seen.passes += 1
        seen.calls[name] = args, kwargs

    handles = [
        module.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, module in denoisers.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# -- what has to hold --------------------------------------------------------------------------------------------------


def _same_again(plain: Tensor, again: Tensor) -> PipelineCheck:
    name = "the plain pipeline draws the same twice"
    if not torch.isfinite(plain).all():
        return PipelineCheck(name, False, None, "its latents are NaN or infinite: try --dtype float32 or bfloat16")
    return equal(
        name, again, plain, "a model draws noise of its own, or the device adds in changing order: try the CPU"
    )


def _ends(realigned: _Realigned, plain: list[Tensor]) -> list[PipelineCheck]:
    """λ = 0 and λ = 1, for what the models' own pipelines draw, the reference's first."""
    checks = []
    for lams, expected in zip(list(realigned.drawn)[:-1], plain, strict=True):
        which = "" if len(lams) == 1 or not any(lams) else f" of {realigned.names[lams.index(1.0)]}"
        whose = "the anchor's plain pipeline" if any(lams) else "the plain pipeline"
        name = f"λ{which} = {max(lams):g} is {whose}, to the bit"
        checks += _judged(realigned.drawn[lams], name, partial(equal, name, expected=expected))
    return checks


def _between(
    realigned: _Realigned, twins: Sequence[Any], plain: Sequence[Tensor], draw: Draw, rounding: float
) -> list[PipelineCheck]:
    """λ between its ends: held against the mixture by hand, and apart from what the models' own pipelines draw."""
    lams, output = list(realigned.drawn.items())[-1]
    lam = f"λ = {sum(lams):g}"
    by_hand = f"{lam} is the mixture by hand"
    if isinstance(output, Exception):
        return _judged(output, by_hand, None)
    effect = max(distance(one, plain[0]) for one in plain[1:])
    far = min(distance(output, one) for one in plain)
    least = 0.1 * effect * min(*map(abs, lams), *(abs(1 - one) for one in lams))
    name = f"{lam} is neither of its ends"
    if effect == 0:
        same = "the anchor draws what the reference draws: look whether it is the right file"
        return [PipelineCheck(name, False, 0.0, same)]
    apart = PipelineCheck(name, far > least, far / effect, "of the anchor's effect")
    try:
        expected = _mixture(realigned, twins, draw, lams)
    except NoLockStep as reason:
        return [PipelineCheck(by_hand, None, None, f"not judged: {reason}"), apart]
    return [close(by_hand, output, expected, effect, rounding), apart]


def _mixture(realigned: _Realigned, twins: Sequence[Any], draw: Draw, lams: tuple[float, ...]) -> Tensor:
    if realigned.space == "posterior" and any(map(learns_variance, schedulers_of(twins[0]))):
        raise NoLockStep("posteriors are mixed here whose variances the models predict, so that samples do not show it")
    return in_lock_step(twins, draw, [1 - sum(lams), *lams], realigned.space)


def _removed(plain: Tensor, after: Tensor | Exception, same_state: bool) -> PipelineCheck:
    name = "after remove() the pipeline is what it was"
    if isinstance(after, Exception):
        return PipelineCheck(name, False, None, f"{type(after).__name__}: {after}")
    if not same_state:
        return PipelineCheck(name, False, None, "its classes or the names of its weights are others")
    return equal(name, after, plain)


def _judged(output: Tensor | Exception, name: str, judge: Any) -> list[PipelineCheck]:
    """`judge` of what was drawn; a failure for what was raised instead, and nothing for a refusal."""
    if isinstance(output, _REFUSALS):
        return []
    if isinstance(output, Exception):
        return [PipelineCheck(name, False, None, f"{type(output).__name__}: {output}")]
    return [judge(output)]


def _rounding(denoisers: Mapping[str, Any]) -> float:
    return max(ROUNDING.get(module.dtype, ROUNDING[torch.bfloat16]) for module in denoisers.values())


# -- what is what ------------------------------------------------------------------------------------------------------


def _classes(pipe: Any, denoisers: Mapping[str, Any]) -> dict[str, str]:
    numbers = {str(module.dtype).removeprefix("torch.") for module in denoisers.values()}
    return {
        "pipeline": type(pipe).__name__,
        "denoiser": ", ".join(f"{name}: {type(module).__name__}" for name, module in denoisers.items()),
        "scheduler": ", ".join(type(scheduler).__name__ for scheduler in schedulers_of(pipe)),
        "computed in": f"{', '.join(sorted(numbers))} on {next(iter(denoisers.values())).device}",
    }


def _divisible(denoisers: Mapping[str, Any], calls: Mapping[str, tuple[Any, Any]]) -> str:
    """Whether `dial.micro_batch` can divide the batch of these calls, and λ be different for equal images."""
    for name, (args, kwargs) in calls.items():
        model = type(denoisers[name])
        parameters = list(inspect.signature(model.forward).parameters)[1:]
        if splits_batches(denoisers[name]):
            return "no: its attention takes the batch apart"
        try:
            Batch(model, parameters, args, kwargs, len(args[0] if args else kwargs[parameters[0]]))
        except UnknownBatch as reason:
            return f"no: {reason}"
    return "yes"


def _state(pipe: Any, denoisers: Mapping[str, Any]) -> Any:
    """Classes of a pipeline and its parts, and the names of its denoisers' weights."""
    parts = {name: type(part) for name, part in vars(pipe).items() if isinstance(part, (nn.Module, SchedulerMixin))}
    return type(pipe), parts, {name: tuple(module.state_dict()) for name, module in denoisers.items()}
