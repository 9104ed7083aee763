"""One tensor for each model of a mixture, in the place of the one tensor that a pipeline expects.

A pipeline's denoiser answers with the predictions of all models as a `PerModel` tensor. Every torch operation on it is
done for each model by itself: so the pipeline's own arithmetic between denoiser and scheduler (guidance, rescaling,
dropping learned variances, combining with the sample) runs as it would with that model alone, whatever it does with
the axes of its tensors. At the scheduler's step the models' guided predictions are taken out again.

What leaves torch on the way, or asks for a value in which the models differ, cannot be followed: `DialError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deradiff.sampling.blocked_methods import DialError

_IN_PLACE = frozenset(f"__{name}__" for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ipow", "iand", "ior"))
_RANDOM = ("rand", "normal", "bernoulli", "dropout", "multinomial", "poisson", "uniform", "exponential", "cauchy")
PLAIN = (bool, int, float, complex, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout)


class PerModel(Tensor):
    """The tensors of several models, treated by torch as if each of them were alone.

    Attributes:
        parts: every model's, of one shape, by the model's number.
        origin: the evaluation that they come from; of several, the latest.
    """

    parts: dict[int, Tensor]
    origin: Any

    @staticmethod
    def of(parts: Mapping[int, Tensor], origin: Any) -> PerModel:
        """The tensors of `parts` as one. Raises `DialError` where their shapes or precisions differ."""
        kinds = {(tuple(part.shape), part.dtype) for part in parts.values()}
        if len(kinds) > 1:
            _refuse(f"their tensors differ: {' and '.join(f'{list(shape)} in {dtype}' for shape, dtype in kinds)}")
        return _with_parts(next(iter(parts.values())).detach(), dict(parts), origin)

    def stacked(self) -> Tensor:
        """The models' tensors along a new first axis."""
        return torch.stack(list(self.parts.values()))

    @classmethod
    def __torch_function__(
        cls, operation: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if operation is Tensor.__iter__:
            return iter(args[0].unbind(0))
        models, origin = _common([*divided((args, kwargs))])
        target = kwargs.get("out", args[0] if args and _in_place(operation) else None)
        if isinstance(target, Tensor) and not isinstance(target, PerModel):
            _divide(target, models, origin)
        with _same_noise(operation, kwargs.get("generator")) as rewind:
            results = {}
            for k in models:
                rewind()
                results[k] = operation(*of_model(args, k), **of_model(kwargs, k))
        if isinstance(target, Tensor):
            return None if next(iter(results.values())) is None else target
        if operation in (Tensor.__repr__, Tensor.__format__):
            return " | ".join(map(str, results.values()))
        return merged(results, origin, getattr(operation, "__name__", str(operation)))


class ModelsOwn:
    """What is no tensor and of which every model has its own, as a cache of keys. What it is asked, each is."""

    def __init__(self, parts: Mapping[int, Any], origin: Any):
        self.parts, self.origin = dict(parts), origin

    def __getitem__(self, index: Any) -> Any:
        return merged({k: part[index] for k, part in self.parts.items()}, self.origin, "[]")

    def __getattr__(self, name: str) -> Any:
        own = {k: getattr(part, name) for k, part in self.parts.items()}
        if not all(callable(value) for value in own.values()):
            return merged(own, self.origin, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            results = {k: call(*of_model(args, k), **of_model(kwargs, k)) for k, call in own.items()}
            return merged(results, self.origin, name)

        return method


@torch.compiler.disable
def merged(outputs: Mapping[int, Any], origin: Any, operation: str | None = None) -> Any:
    """What every model returned, as one value of the same form: tensors become `PerModel`, other things `ModelsOwn`.

    Raises `DialError` for numbers and the like in which the models differ; where it is `operation` on their tensors
    that returned them, for anything but tensors.
    """
    first, *others = outputs.values()
    if isinstance(first, Tensor):
        return PerModel.of(outputs, origin)
    if isinstance(first, PLAIN):
        if any(type(other) is not type(first) or other != first for other in others):
            _refuse(f"{operation or 'their output'} is {' and '.join(map(str, outputs.values()))}")
        return first
    flat = {k: pytree.tree_flatten(output) for k, output in outputs.items()}
    leaves, form = flat[next(iter(flat))]
    if any(other != form for _, other in flat.values()):
        _refuse(f"{operation or 'their output'} has another form for each")
    if len(leaves) == 1 and leaves[0] is first:
        if operation is not None:
            _refuse(f"{operation} makes a {type(first).__name__} of what is different for each")
        return ModelsOwn(outputs, origin)
    rows = zip(*(own for own, _ in flat.values()), strict=True)
    return pytree.tree_unflatten([merged(dict(zip(flat, row, strict=True)), origin, operation) for row in rows], form)


@torch.compiler.disable
def alone(output: Any, model: int, origin: Any) -> Any:
    """What the one model that was evaluated returned: tensors as they are, other things `ModelsOwn`, of it alone."""

    def own(leaf: Any) -> Any:
        return leaf if isinstance(leaf, (Tensor, *PLAIN)) else ModelsOwn({model: leaf}, origin)

    return pytree.tree_map(own, output)


@torch.compiler.disable
def of_model(value: Any, model: int) -> Any:
    """`value` as the model with this number has it: lists, tuples and dictionaries of its own, in these its tensors.

    Raises `DialError` for what comes from a step at which this model was not evaluated.
    """
    if isinstance(value, (PerModel, ModelsOwn)):
        if model not in value.parts:
            raise unseen()
        return value.parts[model]
    if type(value) in (list, tuple):
        return type(value)([of_model(entry, model) for entry in value])
    if type(value) is dict:
        return {key: of_model(entry, model) for key, entry in value.items()}
    return value


@torch.compiler.disable
def is_divided(value: Any) -> bool:
    """Whether anything in `value` is different for each model."""
    return any(True for _ in divided(value))


def divided(value: Any) -> Iterator[PerModel | ModelsOwn]:
    """All in `value` that is different for each model."""
    if isinstance(value, (PerModel, ModelsOwn)):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from divided(entry)
    elif isinstance(value, dict):
        yield from divided(list(value.values()))


def _common(operands: Sequence[PerModel | ModelsOwn]) -> tuple[tuple[int, ...], Any]:
    """The models of all operands, and their latest origin."""
    tensors = [operand for operand in operands if isinstance(operand, PerModel)]
    models = {tuple(operand.parts) for operand in operands}
    origins = {id(tensor.origin): tensor.origin for tensor in tensors}
    if len(models) > 1 or (len(origins) > 1 and _miss_a_model([*origins.values()])):
        raise remembered()
    return models.pop(), max((tensor.origin for tensor in tensors), key=lambda origin: origin.serial, default=None)


def _miss_a_model(origins: Sequence[Any]) -> bool:
    """Whether they are of several steps of a run that has evaluated other models at some of them.

    A tensor kept from such a step would be one model's, and nobody's.
    """
    steps = [origin for origin in origins if getattr(origin, "run", None) is not None]
    return any(step.at != steps[0].at for step in steps) and any(len(step.run.evaluated) > 1 for step in steps)


def remembered() -> DialError:
    """A prediction is combined with one of a step at which other models were evaluated."""
    return DialError(
        "the pipeline's guidance combines predictions of steps at which other models were evaluated, as one that "
        "remembers earlier predictions does: set dial.watching = True, and dial.reuse = None, so that every model is "
        "evaluated at every step"
    )


def unseen() -> DialError:
    """What a model keeps from step to step is not there, for it was not evaluated when it should have been made."""
    return DialError(
        "the denoiser is handed what it returned at an earlier step, as a cache of keys, and one of the models "
        "was not evaluated there: set dial.watching = True, so that every model is at every step, and no reuse"
    )


def foreign() -> DialError:
    """Something is different for each model of another realignment, whose models are not these."""
    return DialError(
        "here is what was made for the models of another realignment, such as prompt embeddings made while that was in "
        'force with text_encoder="both": make them anew with this pipeline'
    )


def _in_place(operation: Callable[..., Any]) -> bool:
    name = getattr(operation, "__name__", "")
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _same_noise(operation: Callable[..., Any], generator: Any) -> AbstractContextManager[Callable[[], None]]:
    name = getattr(operation, "__name__", "")
    return same_noise(any(random in name for random in _RANDOM), generator)


@contextmanager
def same_noise(draws: bool, generator: Any = None) -> Iterator[Callable[[], None]]:
    """Yields what to call before each model's turn, so that what draws noise draws the same for all of them."""
    if not draws:
        yield lambda: None
    elif generator is not None:
        state = generator.get_state()
        yield lambda: generator.set_state(state) and None
    else:
        yield noise_from_here()


def noise_from_here() -> Callable[[], None]:
    """What brings torch's global generators back to where they are now."""
    state = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def rewind() -> None:
        torch.set_rng_state(state)
        torch.cuda.set_rng_state_all(devices)

    return rewind


def _divide(tensor: Tensor, models: Sequence[int], origin: Any) -> PerModel:
    """Make one tensor, and what it is a view of, into one for each model: something different is written into it."""
    base = tensor._base
    if base is None:
        return _with_parts(tensor, {k: tensor.clone() for k in models}, origin)
    where = tensor.size(), tensor.stride(), tensor.storage_offset()
    divided = base if isinstance(base, PerModel) else _divide(base, models, origin)
    return _with_parts(tensor, {k: divided.parts[k].as_strided(*where) for k in models}, origin)


def _with_parts(tensor: Tensor, parts: dict[int, Tensor], origin: Any) -> PerModel:
    if type(tensor) is not Tensor:
        _refuse(f"the pipeline writes into a {type(tensor).__name__}")
    tensor.__class__ = PerModel
    assert isinstance(tensor, PerModel)
    tensor.parts, tensor.origin = parts, origin
    return tensor


def _refuse(what: str) -> NoReturn:
    raise DialError(
        "this pipeline cannot be realigned: between the denoiser and the scheduler's step the models of a mixture have "
        f"to go the same way, and {what}"
    )
