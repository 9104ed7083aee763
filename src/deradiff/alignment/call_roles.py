"""Which argument of a captured call is what: the sample, the time, what differs between prompts, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from deradiff.alignment.observed_calls import ObservedCall

Conditions = dict[str, Tensor]
"""What a denoiser is told besides latents and time, a row per sample."""

LENGTHS = "lengths"
"""Under this name, how many tokens each row has where a pipeline's batches are as long as their longest prompt."""

_TIMES = ("timestep", "timesteps", "t", "timestep_ratio")


class CannotCapture(ValueError):
    """A pipeline whose call of its denoiser cannot be captured."""

    def __init__(self, pipe: Any, reason: str) -> None:
        super().__init__(f"{type(pipe).__name__} cannot be aligned here: {reason}")


def _stacked(value: Any) -> Tensor | None:
    """A tensor, or the tensors of a list as one; None for anything else."""
    if isinstance(value, Tensor):
        return value
    rows = isinstance(value, list) and bool(value) and all(isinstance(row, Tensor) for row in value)
    return torch.stack(value) if rows and len({row.shape for row in value}) == 1 else None


# -- sample, time and answer ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SampleArgument:
    """The argument that holds the noisy latents, one tensor or a list with one for each row."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_list: bool

    @classmethod
    def of(cls, pipe: Any, arguments: Mapping[str, Any], sample: Tensor) -> SampleArgument:
        """The one among `arguments` that is the scheduler's `sample`. Raises `CannotCapture` where none is."""
        for name, value in arguments.items():
            together = _stacked(value)
            if together is None or together.numel() != sample.numel() or len(together) != len(sample):
                continue
            if torch.equal(together.reshape(sample.shape), sample.to(together.dtype)):
                return cls(name, tuple(together.shape[1:]), together.dtype, isinstance(value, list))
        raise CannotCapture(pipe, "its denoiser is not shown the latents as the scheduler holds them, and nothing else")

    def rows(self, arguments: Mapping[str, Any]) -> int:
        """How many samples a call has."""
        return len(arguments[self.path])

    def made(self, noisy: Float[Tensor, "batch *latent"]) -> Any:
        """The argument for these latents."""
        shown = noisy.to(self.dtype if noisy.dtype != torch.float64 else noisy.dtype).reshape(len(noisy), *self.shape)
        return list(shown.unbind()) if self.is_list else shown


@dataclass(frozen=True)
class TimeArgument:
    """The argument that tells the time: `scale * t + offset` for the scheduler's t, from 0 to its training steps."""

    path: str
    scale: float
    offset: float
    shape: tuple[int, ...]
    """Of a row: empty but for models that have a time for every token."""
    dtype: torch.dtype

    @classmethod
    def of(cls, pipe: Any, seen: ObservedCall, denoiser: nn.Module) -> TimeArgument:
        """From two steps. Raises `CannotCapture` where time is told in another way, or not the same to every token."""
        path = next((name for name in _TIMES if name in seen.arguments[0]), None)
        told = [torch.as_tensor(arguments[path]).double() for arguments in seen.arguments[:2]] if path else []
        if path is None or any(value.min() != value.max() for value in told):
            raise CannotCapture(pipe, f"of its denoiser's arguments none is one of {', '.join(_TIMES)} with one time")
        times = [float(step.timestep.flatten()[0]) for step in seen.steps[:2]]
        values = [float(value.max()) for value in told]
        steps = float(seen.scheduler.config.num_train_timesteps)
        stretched = getattr(denoiser, "config", {}).get("timestep_scale")
        known = [(1.0, 0.0), (1 / steps, 0.0), (-1 / steps, 1.0), *([(stretched, 0.0)] if stretched else [])]
        for scale, offset in known:
            made = [scale * t + offset for t in times]
            if all(
                abs(a - b) <= 0.01 * max(abs(b), abs(scale) * steps * 0.01) for a, b in zip(made, values, strict=True)
            ):
                argument = torch.as_tensor(seen.arguments[0][path])
                return cls(path, scale, offset, tuple(argument.shape[1:]), argument.dtype)
        raise CannotCapture(pipe, f"its denoiser is told {values} at the scheduler's times {times}")

    def made(self, timesteps: Shaped[Tensor, " batch"]) -> Tensor:
        """The argument at these times."""
        at = timesteps
        if (self.scale, self.offset) != (1.0, 0.0):
            at = self.scale * at.double() + self.offset
        if self.dtype.is_floating_point:
            at = at.to(self.dtype)
        elif at.dtype == torch.float64:
            at = at.float()
        return at.view(-1, *[1] * len(self.shape)).expand(len(at), *self.shape)


@dataclass(frozen=True)
class Answer:
    """What becomes of the denoiser's answer before it reaches the scheduler: a sign, the first half of the channels."""

    sign: int
    halved: bool

    @classmethod
    def of(cls, pipe: Any, output: Any, prediction: Tensor) -> Answer:
        """From an answer and what the scheduler was given. Raises `CannotCapture` where the pipeline does more."""
        answered = _first(output)
        if answered is None or len(answered) != len(prediction):
            raise CannotCapture(pipe, "its denoiser answers with something else than a tensor for each sample")
        halved = answered.numel() == 2 * prediction.numel()
        if halved:
            answered = answered.chunk(2, dim=1)[0]
        if answered.numel() == prediction.numel():
            made = answered.reshape(prediction.shape).float()
            for sign in (1, -1):
                if torch.allclose(sign * made, prediction.float(), atol=1e-6, rtol=1e-3):
                    return cls(sign, halved)
        raise CannotCapture(
            pipe, "what it makes of its denoiser's answer is neither that, nor minus that, nor half of it"
        )

    def prediction(self, output: Any, shape: torch.Size) -> Tensor:
        """The prediction in an answer, of that shape."""
        answered = _first(output)
        if answered is None:
            raise TypeError(f"the denoiser answered with {type(output).__name__}")
        if self.halved:
            answered = answered.chunk(2, dim=1)[0]
        return self.sign * answered.reshape(shape) if self.sign != 1 else answered.reshape(shape)


def _first(output: Any) -> Tensor | None:
    if not isinstance(output, Tensor | list):
        output = output[0]
    return _stacked(output)


# -- the other arguments ----------------------------------------------------------------------------------------------


class Role(NamedTuple):
    """An argument with a row for each sample: told of its prompt, or the same `value` for all of them.

    `axis` is that of the batch; None for a list with an entry per row. `ragged` is the axis of a row that is as long as
    the prompt, if one is, of which `longest` is the most.
    """

    is_told: bool
    axis: int | None
    value: Any = None
    ragged: int | None = None
    longest: int = 0
    is_mask: bool = False


Roles = dict[str, Role]
"""By dotted path; an argument that is not there is the same in every call."""


def roles_of(pipe: Any, two: Any, three: Any, own: set[str], longest: int | None) -> Roles:
    """The roles of all arguments but `own`, from calls for two rows and for three, the last with a longer prompt.

    Raises `CannotCapture` where an argument changes with the batch in a way that is not understood.
    """
    roles: Roles = {}
    for path, before, after in _leaves(pipe, "", two, three):
        if path not in own and (role := _role(pipe, path, before, after)) is not None:
            roles[path] = role
    lengths = {
        _entry(three, path).shape[role.ragged + (role.ragged >= role.axis)]
        for path, role in roles.items()
        if role.axis is not None and role.ragged is not None
    }
    for path, role in roles.items():
        # A mask that pipelines leave out where it hides nothing.
        if role.is_mask and _entry(two, path) is None and _entry(three, path).shape[1] in lengths:
            roles[path] = role._replace(ragged=0)
    if any(role.ragged is not None for role in roles.values()):
        if longest is None:
            raise CannotCapture(pipe, "its prompts are of any length, and it does not say what the longest may be")
        roles = {path: role._replace(longest=longest) for path, role in roles.items()}
    return roles


def _leaves(pipe: Any, path: str, two: Any, three: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(two, Mapping) and isinstance(three, Mapping):
        for key in three:
            yield from _leaves(pipe, f"{path}.{key}".lstrip("."), two.get(key), three[key])
    elif isinstance(two, list | tuple) and isinstance(three, list | tuple) and len(two) == len(three):
        for number, pair in enumerate(zip(two, three, strict=True)):
            yield from _leaves(pipe, f"{path}.{number}", *pair)
    else:
        yield path, two, three


def _entry(arguments: Any, path: str) -> Any:
    for key in path.split("."):
        arguments = arguments[int(key)] if isinstance(arguments, list | tuple) else arguments.get(key)
    return arguments


def _role(pipe: Any, path: str, two: Any, three: Any) -> Role | None:
    """The role of one argument; None for one that does not know the batch."""
    if isinstance(three, list | tuple):
        if two is None or (len(two), len(three)) != (2, 3):
            raise CannotCapture(pipe, f"it is not known what {path} of its denoiser is")
        if not all(isinstance(row, Tensor) for row in three):
            if any(row != three[0] for row in three):
                raise CannotCapture(pipe, f"{path} of its denoiser differs between prompts, and is no tensor")
            return Role(False, None, three[0])
        return Role(True, None, ragged=_differing(pipe, path, two[0].shape, three[2].shape))
    if not isinstance(three, Tensor):
        return None
    if two is None:
        if three.ndim != 2 or len(three) != 3:
            raise CannotCapture(pipe, f"{path} of its denoiser is there for some prompts and not for others")
        return Role(True, 0, is_mask=True)
    axis = next((k for k, sizes in enumerate(zip(two.shape, three.shape, strict=True)) if sizes == (2, 3)), None)
    if axis is None:
        if two.shape != three.shape:
            raise CannotCapture(pipe, f"{path} of its denoiser changes with the prompts, and has no row for each")
        return None
    rows = three.movedim(axis, 0)
    if torch.equal(rows[0], rows[2]) and path != "guidance":
        return Role(False, axis, rows[0])
    ragged = _differing(pipe, path, two.movedim(axis, 0).shape[1:], rows.shape[1:])
    return Role(True, axis, ragged=ragged, is_mask=rows.ndim == 2 and not rows.is_floating_point())


def _differing(pipe: Any, path: str, two: torch.Size, three: torch.Size) -> int | None:
    axes = [axis for axis, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(axes) > 1:
        raise CannotCapture(pipe, f"several axes of {path} of its denoiser change with the prompts")
    return axes[0] if axes else None


# -- rows of prompts --------------------------------------------------------------------------------------------------


def told_rows(roles: Roles, arguments: Any, count: int) -> Conditions:
    """What a call tells of its `count` prompts, a row each: rows as long as their prompt are padded with zeros."""
    told: Conditions = {}
    lengths: Tensor | None = None
    for path, role in roles.items():
        if not role.is_told:
            continue
        value = _entry(arguments, path)
        if value is None:
            continue
        rows = list(value) if role.axis is None else list(value.movedim(role.axis, 0))
        if role.ragged is not None:
            sizes = torch.tensor([row.shape[role.ragged] for row in rows])
            lengths = sizes if lengths is None else lengths
            if role.is_mask:
                lengths = torch.stack([row.sum() for row in rows]).cpu()
                rows = [row.long() for row in rows]
            rows = [_padded(row, role.ragged, role.longest) for row in rows]
        told[path] = torch.stack(rows)
    if lengths is not None:
        told[LENGTHS] = lengths.long()
        for path, role in roles.items():
            if role.is_told and role.is_mask and path not in told:
                told[path] = (torch.arange(role.longest) < lengths[:, None]).long()
    return told


def _padded(row: Tensor, axis: int, longest: int) -> Tensor:
    room = longest - row.shape[axis]
    return F.pad(row, [0, 0] * (row.ndim - 1 - axis) + [0, room]) if room > 0 else row.narrow(axis, 0, longest)


def assembled(
    roles: Roles, template: Any, own: Mapping[str, Any], conditions: Conditions, rows: int, device: torch.device
) -> dict[str, Any]:
    """The arguments of a call for so many rows: `own`, what `conditions` tell, and the rest as in `template`."""
    lengths = conditions[LENGTHS].tolist() if LENGTHS in conditions else []

    def told(path: str, role: Role) -> Any:
        values = conditions[path]
        if role.ragged is not None and role.axis is not None:
            values = values.narrow(1 + role.ragged, 0, max(lengths))
        if role.axis is not None:
            return values.movedim(0, role.axis)
        if role.ragged is None:
            return list(values.unbind())
        return [row.narrow(role.ragged, 0, size) for row, size in zip(values.unbind(), lengths, strict=True)]

    def repeated(role: Role) -> Any:
        if role.axis is None:
            return [role.value] * rows
        value = role.value.to(device)
        return value.expand(rows, *value.shape).movedim(0, role.axis)

    def at(path: str, value: Any) -> Any:
        if path in own:
            return own[path]
        if path in roles:
            role = roles[path]
            return told(path, role) if role.is_told else repeated(role)
        if isinstance(value, Mapping):
            return {key: at(f"{path}.{key}".lstrip("."), entry) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(at(f"{path}.{number}", entry) for number, entry in enumerate(value))
        return value.to(device) if isinstance(value, Tensor) else value

    return at("", template)
