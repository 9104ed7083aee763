"""Checkpoints that replace each other: one that is there is whole."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from deradiff.alignment.checkpoints import CURE, PICKLED, PROGRESS, TENSORS, WHAT, TrainingProgress
from deradiff.files import reading


def _temporary(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tmp")


def _former(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def write(folder: Path, save: Callable[[Path], None]) -> None:
    """Let `save` fill a temporary folder, then swap it for `folder`.

    If that fails, for want of space or otherwise, `folder` stays what it was; of a full disk a warning tells, since an
    earlier checkpoint and the training in memory are worth more than stopping.
    """
    fresh, former = _temporary(folder), _former(folder)
    try:
        fresh.mkdir(parents=True, exist_ok=True)
        save(fresh)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as a RuntimeError
        shutil.rmtree(fresh, ignore_errors=True)
        remaining = "the last good one stays" if folder.exists() else "there is none yet"
        warnings.warn(f"no checkpoint could be written to {folder} ({error}): make room; {remaining}", stacklevel=2)
        return
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        folder.replace(former)
    fresh.replace(folder)
    shutil.rmtree(former, ignore_errors=True)


def recover(folder: Path, first: bool) -> None:
    """Undo what a kill in the middle of `write` left behind; only the first of several processes acts."""
    if not first:
        return
    shutil.rmtree(_temporary(folder), ignore_errors=True)
    if not folder.exists() and _former(folder).exists():
        _former(folder).replace(folder)
    shutil.rmtree(_former(folder), ignore_errors=True)


def read(folder: Path, identity: str, steps: int | None = None) -> TrainingProgress:
    """The progress that a checkpoint records, of at most so many `steps`.

    Raises `ValueError` if it cannot be read, or belongs to a run with another `identity`.
    """
    if not (folder / TENSORS).exists() and (folder / PICKLED).exists():
        raise ValueError(
            f"{folder} is the checkpoint of a training that deradiff 0.1 began ({PICKLED}), which is not read any "
            "more: finish it with that version (pip install deradiff==0.1.0), or delete the folder to begin anew"
        )
    try:
        progress = reading.read(TrainingProgress, folder / PROGRESS, WHAT, CURE)
    except OSError as error:
        raise ValueError(f"{folder} is no {WHAT}: {error}: {CURE}") from None
    if steps is not None and progress.step > steps:
        raise ValueError(f"{folder} is the {WHAT} at step {progress.step}, and {steps} are planned: {CURE}")
    if progress.identity != identity:
        raise ValueError(
            f"{folder} is the checkpoint of another run ({progress.identity!r}, this is {identity!r}): "
            "name another folder, or delete it to start anew"
        )
    return progress
