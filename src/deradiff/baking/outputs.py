"""Folders that are whole or not there, and what stands in them: an ordinary pipeline, or an ordinary LoRA."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from deradiff.anchors import denoiser_of
from deradiff.anchors.adapters import adapter_layers, adapters_of
from deradiff.anchors.checks import base_tensors, unwrapped
from deradiff.files.folders import assembled, contents, finish_moving, named_files
from deradiff.files.locks import discard, taken

RECORD = "baking.json"
"""What tells a baked model from any other folder, and names its files."""

_WORK = "distillation"
"""Where, in the folder's private one, a distillation keeps what it has."""


@contextmanager
def baking_folder(out: Path, method: str, force: bool) -> Iterator[tuple[Path, Path]]:
    """Hold `out`; yields an empty folder whose files move there if the block succeeds, and one for an interrupted work.

    With `force` they take the place of an older baked model, of which only what its record names is removed. The second
    folder goes when the model is there.

    Raises:
        FolderInUse: another process holds `out`.
        FileExistsError: `out` is a file, holds something that may not be replaced, or an interrupted distillation while
            `method` is another.
        OSError: it cannot be written to, or the disk is full; what was there is then still there.
    """
    with taken(out, "a baked model") as private:
        finish_moving(out, private, RECORD)
        _require_free(out, force)
        work = private / _WORK
        if method != "distill" and work.exists():
            raise FileExistsError(
                f"{out} holds an interrupted distillation: finish it by the same command, name another folder, or "
                f"delete {work}"
            )
        with assembled(out, private, RECORD) as folder:
            yield folder, work
        discard(work)


def _require_free(out: Path, force: bool) -> None:
    """Raise `FileExistsError` where something stands in `out`, unless it is a baked model and `force` is set."""
    if not contents(out):
        return
    if not force:
        raise FileExistsError(f"{out} already holds files: name another folder, or replace what was baked with --force")
    if not (out / RECORD).is_file():
        raise FileExistsError(f"{out} holds no baked model (no {RECORD}), so nothing in it is replaced: name another")
    if len(named_files(out, RECORD)) < 2:
        raise FileExistsError(
            f"{out / RECORD} does not say which files are the model's (deradiff 0.1 wrote it, or it is damaged), so "
            "nothing is replaced: name another folder, or delete this one"
        )


def size_of(pipe: DiffusionPipeline) -> int:
    """Bytes of the weights of all models of the pipeline, adapters left out."""
    models = [unwrapped(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    plain = [(name, tensor) for model in models for name, tensor in base_tensors(model) if ".lora_" not in name]
    return sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in plain)


def save_pipeline(pipe: Any, folder: Path, write: Callable[[Path], object]) -> None:
    """`pipe.save_pretrained(folder)`, with `write(folder of the denoiser)` in place of the denoiser's own saving."""
    _, denoiser = denoiser_of(pipe)
    module = unwrapped(denoiser)

    def save_pretrained(save_directory: str, **_: Any) -> None:
        write(Path(save_directory))

    before = module.__dict__.get("save_pretrained")
    module.__dict__["save_pretrained"] = save_pretrained
    try:
        pipe.save_pretrained(folder, safe_serialization=True)
    finally:
        module.__dict__.pop("save_pretrained")
        if before is not None:
            module.__dict__["save_pretrained"] = before


# -- a sum of LoRAs as one --------------------------------------------------------------------------------------------


def can_be_joined(denoiser: nn.Module, adapters: Sequence[str]) -> bool:
    """Whether these adapters are plain LoRAs: a sum of such is one, of the sum of their ranks."""
    layers = [layer for _, layer in adapter_layers(denoiser)]
    return all(
        isinstance(layer, LoraLayer)
        and name in layer.lora_A
        and name not in layer.lora_variant
        and not layer.lora_bias[name]
        for layer in layers
        for name in adapters
        if name in adapters_of(layer)
    )


@torch.no_grad()
def joined_loras(parts: Sequence[tuple[nn.Module, str, float]]) -> dict[str, Tensor]:
    """`Σ scale · B A` of plain LoRAs `(denoiser, adapter, scale)` as one LoRA, under PEFT's names and in float32.

    Every layer gets the same rank, the sum of the adapters' highest, filled up with zeros: diffusers takes alpha to be
    the rank where a file states none, and misreads it where ranks differ.
    """
    factors_by_layer: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    ranks = [0] * len(parts)
    for number, (denoiser, adapter, scale) in enumerate(parts):
        for path, layer in adapter_layers(denoiser):
            if adapter not in adapters_of(layer):
                continue
            down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            ranks[number] = max(ranks[number], len(down))
            factors_by_layer.setdefault(path, []).append((number, down, up * (scale * layer.scaling[adapter])))
    rank = sum(ranks)
    state = {}
    for path, factors in factors_by_layer.items():
        _, down, up = factors[0]
        whole_down, whole_up = down.new_zeros(rank, *down.shape[1:]), up.new_zeros(len(up), rank, *up.shape[2:])
        for number, down, up in factors:
            place = slice(sum(ranks[:number]), sum(ranks[:number]) + len(down))
            whole_down[place], whole_up[:, place] = down, up
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = whole_down.cpu(), whole_up.cpu()
    return state
