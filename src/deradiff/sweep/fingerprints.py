"""Which weights a source stands for: a hash of its files, or the commit of one on the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from deradiff.files.reading import Record, text_of
from deradiff.sweep.pipelines import anchor_source, require_on_hub
from deradiff.worlds import find

_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".json", ".txt", ".model")


class Fingerprint(Record):
    """What is remembered of a source: see `fingerprint`."""

    sha256: str
    files: dict[str, list[int]] = Field(default_factory=dict)


def fingerprint(source: str, revision: str | None = None, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`{"sha256": ..., "files": ...}` of a local source, `{"sha256": <commit>, "files": {}}` of one on the hub."""
    require_on_hub(source, revision)
    path = _local(source)
    if path is None:
        return {"sha256": _commit(source, revision), "files": {}}
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in _WEIGHTS and f.is_file())
    state = {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    if known is not None and known["files"] == state:
        return dict(known)
    whole = hashlib.sha256()
    for file in files:
        whole.update(file.relative_to(path).as_posix().encode() if file != path else b"")
        with file.open("rb") as content:
            whole.update(hashlib.file_digest(content, "sha256").digest())
    return {"sha256": whole.hexdigest(), "files": state}


def _local(source: str) -> Path | None:
    if world := find(source):
        return world.reference
    path = Path(anchor_source(source))
    return path if path.exists() else None


def _commit(source: str, revision: str | None) -> str:
    """The commit that a hub id stands for now, or without a connection the one in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return str(HfApi().model_info(source, revision=revision, timeout=20).sha)
    except Exception as error:
        cached = Path(HF_HUB_CACHE) / f"models--{source.replace('/', '--')}" / "refs" / (revision or "main")
        if cached.is_file():
            commit = text_of(cached, "commit of a model in the hub's cache", 1000).strip()
            if not re.fullmatch(r"[0-9a-f]{7,64}", commit):
                raise ValueError(f"{cached} names no commit of {source}: delete it, or the model's cache") from None
            return commit
        raise OSError(
            f"{source} is neither a file nor a folder, and as a hub id it cannot be reached "
            f"({' '.join(str(error).split())}): check the name, or the connection"
        ) from None
