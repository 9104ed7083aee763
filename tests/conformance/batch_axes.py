"""Where the batch is in the arguments of every denoiser: the shapes of calls for one image and for two, compared.

What comes out is `src/deradiff/sampling/batch_axes.json`: by class and argument the axis of the batch, null where
there is none, "rows" for a list with an entry for each row. An argument of which the tests do not show it is left out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cases import Case, Changes
from results import NotTried, Result

ROWS, UNKNOWN = "rows", "?"

READ: dict[str, dict[str, int | None]] = {
    "UNet2DConditionModel": {"timestep": 0, "added_cond_kwargs.image_embeds.*": 0, "encoder_attention_mask": 0},
    "UNet2DModel": {"sample": 0, "timestep": 0, "class_labels": 0},
    "DiTTransformer2DModel": {"hidden_states": 0, "timestep": 0, "class_labels": 0},
    "FluxTransformer2DModel": {"guidance": 0},
    "CogVideoXTransformer3DModel": {"image_rotary_emb.*": None, "ofs": None},
    "StableCascadeUNet": {"clip_text": 0, "clip_img": 0, "effnet": 0, "pixels": 0},
    "HunyuanVideo15Transformer3DModel": {
        "hidden_states": 0,
        "timestep": 0,
        "timestep_r": 0,
        "encoder_hidden_states": 0,
        "encoder_hidden_states_2": 0,
        "encoder_attention_mask": 0,
        "encoder_attention_mask_2": 0,
        "image_embeds": 0,
    },
    "PixArtTransformer2DModel": {"added_cond_kwargs.resolution": 0, "added_cond_kwargs.aspect_ratio": 0},
    "WanVACETransformer3DModel": {
        "hidden_states": 0,
        "timestep": 0,
        "encoder_hidden_states": 0,
        "control_hidden_states": 0,
        "control_hidden_states_scale": None,
    },
}
"""Arguments that no test of diffusers hands over for one image and for two, as the classes' docstrings have them."""

NO_ROWS = ("OmniGenTransformer2DModel",)
"""Models whose rows are no images by themselves: what OmniGen answers for one depends on how the others are padded."""

Shapes = dict[str, list[Any]]
"""Of one call: the shapes of the tensors at each path, and the lengths of lists."""


def batch_axes(case: Case, two: Changes) -> dict[str, dict[str, list[Any]]]:
    """For every denoiser of a case its class's arguments, and every axis that was seen in them.

    Raises `NotTried` where the calls for two images cannot be laid beside those for one.
    """
    axes: dict[str, dict[str, list[Any]]] = {}
    for name, module in case.denoisers.items():
        one, other = (_calls(case, name, changes) for changes in (dict, two))
        if len(one) != len(other) or any(b[0] != 2 * a[0] for a, b in zip(one, other, strict=True)):
            raise NotTried("two images do not make twice the rows in every call of the denoiser")
        seen = axes.setdefault(type(module).__name__, {})
        for (rows, shapes), (more, others) in zip(one, other, strict=True):
            for path in shapes.keys() | others.keys():
                axis = _axis(shapes.get(path), others.get(path), rows, more)
                if axis not in seen.setdefault(path, []):
                    seen[path].append(axis)
    return axes


def table(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """What all results say together: an argument whose axis is the same wherever it was seen."""
    seen: dict[str, dict[str, list[Any]]] = {}
    for result in results:
        for model, arguments in result.axes.items():
            for path, axes in arguments.items():
                seen.setdefault(model, {}).setdefault(path, []).extend(axes)
    seen = {model: arguments for model, arguments in seen.items() if model not in NO_ROWS}
    known = {
        model: {path: axes[0] for path, axes in arguments.items() if all(axis == axes[0] != UNKNOWN for axis in axes)}
        for model, arguments in seen.items()
    }
    for model, read in READ.items():
        known[model] = known.get(model, {}) | read
    return known


def write_table(results: Iterable[Result], file: Path) -> None:
    """Write it as the package has it. What `file` already says of arguments that no result has seen stays."""
    results = list(results)
    seen = {(model, path) for result in results for model, paths in result.axes.items() for path in paths}
    known = table(results)
    for model, paths in (json.loads(file.read_text()) if file.exists() else {}).items():
        unseen = {path: axis for path, axis in paths.items() if (model, path) not in seen and model not in NO_ROWS}
        if unseen:
            known[model] = unseen | known.get(model, {})
    file.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _calls(case: Case, name: str, changes: Changes) -> list[tuple[int, Shapes]]:
    """For every call of a denoiser in a run, how many rows it has, and its arguments' shapes."""
    pipe, calls = case.build(), list[tuple[int, Shapes]]()
    module = getattr(pipe, name)
    forward, signature = module.forward, inspect.signature(type(module).forward)

    def noting(*args: Any, **kwargs: Any) -> Any:
        arguments = dict(signature.bind(module, *args, **kwargs).arguments)
        arguments.pop("self")
        arguments |= arguments.pop("kwargs", {})
        shapes: Shapes = {}
        for argument, value in arguments.items():
            for path, shape in _shapes(argument, value):
                shapes.setdefault(path, []).append(shape)
        calls.append((len(next(iter(arguments.values()))), shapes))
        return forward(*args, **kwargs)

    module.forward = noting
    try:
        case.run(pipe, changes)
    finally:
        del module.forward  # some tests hand the same module to every pipeline
    return calls


def _shapes(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        if value.ndim:
            yield path, tuple(value.shape)
    elif isinstance(value, list | tuple):
        yield path, len(value)
        for entry in value:
            yield from _shapes(f"{path}.*", entry)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _shapes(f"{path}.{key}", entry)
    elif value is not None and not isinstance(value, bool | int | float | str):
        yield path, type(value).__name__


def _axis(one: list[Any] | None, two: list[Any] | None, rows: int, more: int) -> Any:
    """The axis that has the rows in all of these shapes; `UNKNOWN` where that is not the only thing that changed."""
    if one is None or two is None or any(isinstance(shape, str) for shape in one):
        return UNKNOWN
    if isinstance(one[0], int):  # a list; of tensors for each row, or of something else
        return ROWS if (one, two) == ([rows], [more]) else None if one == two else UNKNOWN
    if len(one) != len(two):  # entries of a list that has one for each row
        return None if (len(one), len(two)) == (rows, more) and one[0] == two[0] else UNKNOWN
    axes = {_changed(a, b, rows, more) for a, b in zip(one, two, strict=True)}
    return axes.pop() if len(axes) == 1 else UNKNOWN


def _changed(one: tuple[int, ...], two: tuple[int, ...], rows: int, more: int) -> Any:
    if len(one) != len(two):
        return UNKNOWN
    changed = [axis for axis, (a, b) in enumerate(zip(one, two, strict=True)) if a != b]
    if not changed:
        return None
    return changed[0] if len(changed) == 1 and (one[changed[0]], two[changed[0]]) == (rows, more) else UNKNOWN
