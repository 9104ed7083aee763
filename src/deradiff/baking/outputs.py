"""Folders that are whole or not there, and what stands in them: an ordinary pipeline, or an ordinary LoRA."""

import errno
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from deradiff.anchors import denoiser_of
from deradiff.anchors.adapters import adapter_layers, adapters_of
from deradiff.anchors.checks import base_tensors, unwrapped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a disk that is full, or a quota, is reported as."""

RECORD = "baking.json"
"""What tells a baked model from any other folder."""


def require_free(out: Path, force: bool) -> None:
    """Raise `FileExistsError` where something stands at `out`.

    An empty folder does not count; with `force`, a baked model does not either. What is none is never replaced.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file: name a folder")
    if not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} already holds files: name another folder, or replace what was baked with --force")
    if not (out / RECORD).is_file():
        raise FileExistsError(f"{out} holds no baked model (no {RECORD}), so nothing in it is replaced: name another")


def require_room(out: Path, needed: int) -> None:
    """Raise `OSError` where the disk under `out` has less than `needed` bytes free: before the work, not after."""
    place = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{out} needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free: make room, or name a folder "
            "on another disk",
        )


def size_of(pipe: DiffusionPipeline) -> int:
    """Bytes of the weights of all models of the pipeline, adapters left out."""
    models = [unwrapped(part) for part in pipe.components.values() if isinstance(part, nn.Module)]
    plain = [(name, tensor) for model in models for name, tensor in base_tensors(model) if ".lora_" not in name]
    return sum(tensor.numel() * tensor.dtype.itemsize for _, tensor in plain)


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yield a folder under a temporary name, which takes the place of `path` if the block succeeds, else is removed.

    Raises `OSError` that says so where the disk fills; what stood at `path` is then still there.
    """
    temporary, former = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.former")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        if former.exists() and not path.exists():  # a kill between the two renamings below
            former.rename(path)
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            shutil.rmtree(former, ignore_errors=True)
            path.rename(former)
        try:
            temporary.rename(path)
        except OSError:
            if former.exists():
                former.rename(path)
            raise
        shutil.rmtree(former, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the safetensors library reports a full disk in its own way
        if isinstance(error, OSError) and error.errno not in FULL:
            raise
        raise OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{path} could not be written ({error}): nothing was left there, and what was there before still is",
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
    found: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    ranks = [0] * len(parts)
    for number, (denoiser, adapter, scale) in enumerate(parts):
        for path, layer in adapter_layers(denoiser):
            if adapter not in adapters_of(layer):
                continue
            down, up = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            ranks[number] = max(ranks[number], len(down))
            found.setdefault(path, []).append((number, down, up * (scale * layer.scaling[adapter])))
    rank = sum(ranks)
    state = {}
    for path, factors in found.items():
        _, down, up = factors[0]
        whole_down, whole_up = down.new_zeros(rank, *down.shape[1:]), up.new_zeros(len(up), rank, *up.shape[2:])
        for number, down, up in factors:
            place = slice(sum(ranks[:number]), sum(ranks[:number]) + len(down))
            whole_down[place], whole_up[:, place] = down, up
        state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"] = whole_down.cpu(), whole_up.cpu()
    return state
