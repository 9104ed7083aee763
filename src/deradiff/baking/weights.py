"""Interpolated weights, tensor by tensor: the model that `realign(..., method="interpolate")` computes with, as files.

No second model is ever in memory. An anchor's weights are read from their files when their turn comes, mixed with the
reference's, written and let go; a LoRA anchor is an adapter in the reference, and its share is computed layer by layer.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from deradiff.anchors import Anchor, AnchorError, Source, denoiser_of, load_anchor
from deradiff.anchors.adapters import adapter_layers, adapters_of
from deradiff.anchors.checks import (
    base_tensors,
    differing_text_encoders,
    require_same_config,
    require_same_prediction,
    require_same_shapes,
    scheduler_prediction,
    unwrapped,
)
from deradiff.anchors.full_weights import empty_copy
from deradiff.anchors.lora_files import is_adapter
from deradiff.anchors.reading import read_json, read_tensors
from deradiff.anchors.sources import Files, locate, select

FORMATS: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What a .safetensors file calls a number format."""


STRIP = 1 << 18
"""Numbers of a tensor that are mixed at a time."""


# -- anchors ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StoredAnchor:
    """An anchor whose weights stay in their files, under the names that the reference's have."""

    name: str
    source: str
    files: Mapping[str, Path]
    """Where each tensor is."""

    def rows(self, name: str, rows: Any) -> Tensor:
        """Some rows of a tensor, or all of it (`...`). Memory holds them until they are let go."""
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name) if rows is ... else file.get_slice(name)[rows]


Opened = Anchor | StoredAnchor


def open_anchor(source: Source, pipe: DiffusionPipeline, name: str, **where: Any) -> Opened:
    """`load_anchor` with the same checks, but full weights in diffusers' layout stay in their .safetensors files.

    `where` are its further arguments. Other forms are loaded as it does: LoRAs into the reference as an adapter; a
    single file in the original layout, and pickles, as a second model. Raises `AnchorError`.
    """
    if not isinstance(source, str | os.PathLike):
        return load_anchor(source, pipe, name=name, **where)
    component, denoiser = denoiser_of(pipe)
    reference = unwrapped(denoiser)
    allow_pickle = where.get("allow_pickle", False)
    repository = locate(source, where.get("subfolder"), where.get("revision"), where.get("local_files_only", False))
    files = select(repository, component, reference.dtype, allow_pickle)
    stored = _stored(files, pipe, reference, name)
    return load_anchor(source, pipe, name=name, **where) if stored is None else stored


def _stored(files: Files, pipe: DiffusionPipeline, reference: Any, name: str) -> StoredAnchor | None:
    """The anchor in these files if it can stay there, else None."""
    if files.kind == "peft" or any(path.suffix != ".safetensors" for path in files.weights):
        return None
    shapes = {key: tuple(tensor.shape) for key, tensor in read_tensors(files.weights).items()}
    own = {key: tuple(tensor.shape) for key, tensor in empty_copy(reference).state_dict().items()}
    # A few names are the same in every layout.
    foreign = files.config is None and 2 * len(own.keys() & shapes.keys()) < len(shapes)
    if is_adapter(shapes) or foreign:
        return None
    if files.pipeline is not None:
        predicted = scheduler_prediction(files.pipeline)
        if predicted is not None:
            require_same_prediction(predicted, files.label, pipe)
        if differing := differing_text_encoders(files.pipeline, pipe):
            warnings.warn(
                f"{files.label} has another {' and '.join(differing)} than the reference pipeline, whose own is baked: "
                "only denoisers are mixed.",
                stacklevel=4,
            )
    if files.config is not None:
        require_same_config(read_json(files.config), files.label, reference)
    require_same_shapes(shapes, own, files.label)
    places = {key: path for path in files.weights for key in read_tensors([path])}
    anchor = StoredAnchor(name, files.label, places)
    pairs = ((anchor.rows(key, ...), tensor) for key, tensor in base_tensors(reference) if key in places)
    if all(torch.equal(stored.to(tensor.device, tensor.dtype), tensor) for stored, tensor in pairs):
        warnings.warn(f"{files.label} has the same weights as the reference: so has what is baked of it.", stacklevel=4)
    return anchor


# -- mixing them ------------------------------------------------------------------------------------------------------


class Blend:
    """`(1 - Σ λ_i) θ_0 + Σ λ_i θ_i`, and a LoRA at scale λ_i: every tensor is made when it is asked for.

    The arithmetic is that of `method="interpolate"`, in single precision and then in the reference's own; a LoRA is
    added by PEFT's merging. To first order in the difference of the weights, it is the mixture of predictions (see AIG,
    §3.2.2, for a LoRA).

    Raises `AnchorError` for a reference whose weights are out of reach, are not floating point numbers, or have a LoRA
    of somebody else's around them.
    """

    def __init__(self, reference: Any, anchors: Sequence[tuple[Opened, float]]) -> None:
        self.reference = reference
        chosen = [(anchor, lam) for anchor, lam in anchors if lam]
        self._full = [(_tensors_of(anchor), lam) for anchor, lam in chosen if not _adapter(anchor)]
        self._scales = {_adapter(anchor): lam for anchor, lam in chosen if _adapter(anchor)}
        self._layers = dict(adapter_layers(reference))
        stored = empty_copy(reference).state_dict()
        self._own = {name: tensor for name, tensor in base_tensors(reference) if name in stored}
        parameters = {name.replace(".base_layer.", ".") for name, _ in reference.named_parameters()}
        self._mixed = {name for name in self._own if name in parameters}
        require_plain(reference, {name for anchor, _ in anchors if (name := _adapter(anchor))})

    @property
    def names(self) -> list[str]:
        """The tensors of the model, as its files name them."""
        return list(self._own)

    def like(self, name: str) -> Tensor:
        """The reference's tensor of that name, which has the shape and format of the mixed one."""
        return self._own[name]

    def tensor(self, name: str) -> Tensor:
        """The mixed tensor, whole; a buffer is the reference's."""
        strips = list(self.strips(name))
        return strips[0] if len(strips) == 1 else torch.cat(strips)

    @torch.no_grad()
    def strips(self, name: str) -> Iterator[Tensor]:
        """The mixed tensor in strips of its rows, so that memory holds no second one of its size.

        One with a LoRA around it comes whole. Raises `AnchorError` where it is not finite.
        """
        own = self._own[name]
        path, _, leaf = name.rpartition(".")
        if name not in self._mixed:
            yield own
        elif (layer := self._layers.get(path)) is None:
            for rows in _strips(own):
                yield _finite(self._interpolated(name, rows).to(own.dtype), name)
        else:
            yield _finite(_merged(layer, leaf, self._interpolated(name, ...), self._scales).to(own.dtype), name)

    @torch.no_grad()
    def difference(self, name: str) -> Tensor:
        """The mixed tensor less the reference's, in single precision; zero for a buffer."""
        own = self._own[name]
        if name not in self._mixed:
            return torch.zeros_like(own, dtype=torch.float32)
        path, _, leaf = name.rpartition(".")
        mixed = self._interpolated(name, ...)
        layer = self._layers.get(path)
        return (mixed if layer is None else _merged(layer, leaf, mixed, self._scales)) - own.float()

    def _interpolated(self, name: str, rows: Any) -> Tensor:
        """Of full weights, in single precision."""
        own = self._own[name][rows]
        wide = (1 - sum(lam for _, lam in self._full)) * own.float()
        for read, lam in self._full:
            wide += lam * read(name, rows).to(own.device, own.dtype).float()
        return wide


def _finite(tensor: Tensor, name: str) -> Tensor:
    if not tensor.sum(dtype=torch.float32).isfinite():
        raise AnchorError(
            f"{name} is no number any more in {tensor.dtype}: an anchor holds NaN or infinity, or λ is too far outside "
            "[0, 1] for this precision"
        )
    return tensor


def _strips(tensor: Tensor) -> list[Any]:
    if not tensor.ndim:
        return [...]
    step = max(1, STRIP * len(tensor) // max(1, tensor.numel()))
    return [slice(start, start + step) for start in range(0, max(1, len(tensor)), step)]


def require_plain(reference: Any, ours: set[str]) -> None:
    """Raise `AnchorError` unless the weights can be read, and no LoRA but `ours` is around them."""
    foreign = sorted({name for _, layer in adapter_layers(reference) for name in adapters_of(layer)} - ours)
    if foreign:
        raise AnchorError(
            f"the reference's denoiser carries the LoRA {', '.join(foreign)}, of which a checkpoint would know "
            "nothing: pipe.unload_lora_weights() first, and load it again with what is baked"
        )
    for name, tensor in base_tensors(reference):
        if tensor.is_meta:
            raise AnchorError(
                f"the reference's weights are out of reach ({name} is on the meta device, as with sequential offload): "
                "load the pipeline without it to bake"
            )
    packed = [name for name, p in reference.named_parameters() if not p.is_floating_point()]
    if packed:
        raise AnchorError(
            f"the reference is quantised ({packed[0]} holds no floating point numbers), so its weights cannot be "
            "interpolated: load the pipeline in float16, bfloat16 or float32 to bake"
        )


def _adapter(anchor: Opened) -> str:
    return (anchor.adapter or "") if isinstance(anchor, Anchor) else ""


def _tensors_of(anchor: Opened) -> Callable[[str, Any], Tensor]:
    if isinstance(anchor, StoredAnchor):
        return anchor.rows
    assert anchor.module is not None
    tensors = dict(base_tensors(anchor.module))
    return lambda name, rows: tensors[name][rows]


def _merged(layer: Any, leaf: str, wide: Tensor, scales: Mapping[str, float]) -> Tensor:
    """`wide`, the `leaf` of the layer below the adapters, with those in `scales` added at their scales."""
    names = [name for name in scales if name in adapters_of(layer)]
    if not names:
        return wide
    base = layer.get_base_layer()
    with _undone(layer, base):
        # Merging adds in place.
        for other, parameter in base.named_parameters():
            parameter.data = wide if other == leaf else parameter.data.clone()
        for name in names:
            layer.scaling[name] *= scales[name]
        try:
            layer.merge(safe_merge=False, adapter_names=names)
        except (ValueError, RuntimeError) as error:
            raise AnchorError(f"a LoRA cannot be fused into {leaf} of {type(base).__name__}: {error}") from error
        return base.get_parameter(leaf).data


@contextmanager
def _undone(layer: Any, base: nn.Module) -> Iterator[None]:
    """Afterwards the layer has the weights, scales and merged adapters that it had."""
    weights = [(parameter, parameter.data) for parameter in base.parameters()]
    scaling, merged = dict(layer.scaling), list(layer.merged_adapters)
    try:
        yield
    finally:
        layer.scaling.update(scaling)
        layer.merged_adapters[:] = merged
        for parameter, data in weights:
            parameter.data = data


# -- writing them -----------------------------------------------------------------------------------------------------


def write_blend(blend: Blend, folder: Path) -> dict[str, str]:
    """Write the denoiser into `folder` as diffusers does: configuration and one file of weights.

    Returns the SHA-256 of that file by its name. Memory holds a strip of a tensor. Raises `OSError` for want of room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blend.reference.save_config(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    return {file.name: write_tensors(file, {name: blend.like(name) for name in blend.names}, blend.strips)}


def write_tensors(path: Path, like: Mapping[str, Tensor], strips: Callable[[str], Iterable[Tensor]]) -> str:
    """Write a .safetensors file, tensor after tensor and each in `strips(name)` of its rows; return its SHA-256.

    `like` has their names, shapes and number formats, which the file states before them. The form is that of the
    safetensors documentation: the length of the header in 8 bytes, the header as JSON, the tensors in its order. Those
    of wide numbers come first, so that all are aligned. Raises `ValueError` for a number format that the form has no
    name for.
    """
    unknown = {str(tensor.dtype) for tensor in like.values()} - {str(dtype) for dtype in FORMATS}
    if unknown:
        raise ValueError(f"a .safetensors file cannot hold numbers of {', '.join(sorted(unknown))}")
    names = sorted(like, key=lambda name: (-like[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + like[name].numel() * like[name].dtype.itemsize
        header[name] = {
            "dtype": FORMATS[like[name].dtype],
            "shape": list(like[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            digest.update(part)
            file.write(part)
        for name in names:
            for strip in strips(name):
                content = content_of(strip)
                digest.update(content)
                file.write(content)
    return digest.hexdigest()


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, in the order of its elements."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, formats, shapes and contents of a model's own tensors, whatever files they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(module)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(content_of(tensor))
    return digest.hexdigest()
