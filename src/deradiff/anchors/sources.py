"""Where an anchor's files are (a file, a folder, a model on the hub), and which of them are needed."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from deradiff.anchors.errors import AnchorError, AnchorNotFound, IncompatibleAnchor, PickledAnchor
from deradiff.files.waiting import from_the_hub

SAFE = (".safetensors",)
QUANTISED = (".gguf",)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:/(?P<file>.+))?")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})")
_VARIANTS = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Repository:
    """A place that holds an anchor: names are known at once, contents after `fetch`."""

    label: str
    names: tuple[str, ...]
    """Files as POSIX paths, those directly inside and those one folder below."""
    fetch: Callable[[Iterable[str]], Path]
    """Makes the named files available and returns the folder they are in."""
    chosen: str | None = None
    """The one file that was asked for by name."""


@dataclass(frozen=True)
class Files:
    """The files that make up one anchor, all on this machine."""

    label: str
    kind: Literal["denoiser", "peft", "file"]
    weights: tuple[Path, ...]
    config: Path | None = None
    """`config.json` of a denoiser, `adapter_config.json` of a PEFT adapter."""
    pipeline: Path | None = None
    """The folder of the whole pipeline that the denoiser was taken from."""


def locate(
    source: str | os.PathLike[str], subfolder: str | None, revision: str | None, local_files_only: bool
) -> Repository:
    """Find `source` on this machine, or else on the hub (`owner/name`, or `owner/name/file.safetensors`).

    Raises `AnchorNotFound` where there is neither; the hub is only asked about strings that can be hub ids.
    """
    text = os.fspath(source)
    if not text.strip():
        raise AnchorNotFound("the anchor's name is empty: pass a path ('.' is the current folder) or a hub id.")
    if re.match(r"(https?|hf)://", text):
        raise AnchorNotFound(
            f"{text!r} is a web address: pass the hub id, 'owner/name' or 'owner/name/file.safetensors'."
        )
    try:
        path = Path(text).expanduser()
        here = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~somebody without a home
        raise AnchorNotFound(f"{text[:80]!r} is no path that can be looked up: {error}") from error
    if here:
        if revision is not None:
            raise AnchorError(f"revision={revision!r} is for models on the hub, but {path} is on this machine.")
        return _on_this_machine(path, subfolder)
    hub_id = _HUB_ID.fullmatch(text) if isinstance(source, str) else None
    if hub_id is None or (hub_id["file"] is None and text.endswith(SAFE + PICKLES)):
        raise AnchorNotFound(
            f"no such file or folder: {path.absolute()}. (A model on the hub is written 'owner/name', "
            "one file of it 'owner/name/file.safetensors'.)"
        )
    if hub_id["file"] is not None and not text.endswith(SAFE + PICKLES + QUANTISED):
        raise AnchorNotFound(
            f"no such folder: {path.absolute()}. For a folder inside the hub's model {hub_id['repo']!r} pass "
            f"subfolder={hub_id['file']!r}."
        )
    return _on_the_hub(hub_id["repo"], hub_id["file"], subfolder, revision, local_files_only)


def _on_this_machine(path: Path, subfolder: str | None) -> Repository:
    if path.is_file():
        if subfolder is not None:
            raise AnchorError(f"subfolder={subfolder!r} was given, but {path} is a single file.")
        siblings = tuple(sorted(p.name for p in path.parent.iterdir() if p.is_file()))
        return Repository(str(path), siblings, lambda names: path.parent, chosen=path.name)
    if not path.is_dir():
        raise AnchorError(f"{path} is neither a file nor a folder, but a device, a pipe or a socket.")
    folder = path / subfolder if subfolder else path
    if not folder.is_dir():
        raise AnchorNotFound(f"{path} has no folder {subfolder!r}; it holds {some(p.name for p in path.iterdir())}.")
    files = sorted(p for pattern in ("*", "*/*") for p in folder.glob(pattern) if p.is_file())
    return Repository(str(folder), tuple(p.relative_to(folder).as_posix() for p in files), lambda names: folder)


def _on_the_hub(
    repo: str, file: str | None, subfolder: str | None, revision: str | None, local_files_only: bool
) -> Repository:
    parent, _, chosen = file.rpartition("/") if file else (subfolder.strip("/") if subfolder else "", "", "")
    if file and subfolder:
        raise AnchorError(f"subfolder={subfolder!r} was given, but {repo}/{file} already names one file.")
    prefix = f"{parent}/" if parent else ""
    label = f"{repo}/{prefix}{chosen}".rstrip("/") + (f" (revision {revision!r})" if revision else "")

    with _hub_errors(repo, revision):
        everything = _hub_names(repo, revision, local_files_only)
    names = tuple(name.removeprefix(prefix) for name in everything if name.startswith(prefix))
    if not names or (chosen and chosen not in names):
        raise AnchorNotFound(f"{repo} has no {file or subfolder!r}; it holds {some(everything)}.")

    def fetch(wanted: Iterable[str]) -> Path:
        files = [prefix + name for name in wanted]
        with _hub_errors(repo, revision), from_the_hub(label):
            root = snapshot_download(
                repo,
                revision=revision,
                allow_patterns=[glob.escape(name) for name in files],
                local_files_only=local_files_only,
            )
        absent = [name for name in files if not Path(root, name).is_file()]
        if absent:
            raise AnchorNotFound(f"{some(absent)} of {label} could not be downloaded and is not in the cache.")
        return Path(root, parent)

    return Repository(label, names, fetch, chosen=chosen or None)


def _hub_names(repo: str, revision: str | None, local_files_only: bool) -> list[str]:
    """Every file of the model; of the cached copy where the hub may not or cannot be asked."""
    unreachable: Exception | None = None
    if not local_files_only and not constants.HF_HUB_OFFLINE:
        try:
            return sorted(entry.rfilename for entry in HfApi().model_info(repo, revision=revision).siblings or [])
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
            raise
        except Exception as error:  # the transport library's own errors, or a server in trouble
            unreachable = error
    try:
        cached = Path(snapshot_download(repo, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        raise unreachable or AnchorNotFound(
            f"{repo} is not in the cache ({constants.HF_HUB_CACHE}) and the hub may not be asked "
            f"({'local_files_only=True' if local_files_only else 'HF_HUB_OFFLINE is set'})."
        ) from unreachable
    return sorted(path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file())


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Say what the hub's errors mean for the person who passed the id."""
    try:
        yield
    except AnchorError:
        raise
    except GatedRepoError as error:
        raise AnchorNotFound(
            f"{repo} is gated: accept its conditions at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise AnchorNotFound(f"{repo} has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise AnchorNotFound(
            f"{repo!r} is neither a file or folder here ({Path(repo).absolute()}) nor a model on the hub "
            f"({constants.ENDPOINT}). A private model needs a login: `hf auth login`."
        ) from error
    except EntryNotFoundError as error:
        raise AnchorNotFound(f"not all files of {repo} are in the cache, and the hub was not asked: {error}") from error
    except HfHubHTTPError as error:
        raise AnchorNotFound(f"the hub refused {repo}: {error}") from error
    except Exception as error:
        raise AnchorNotFound(
            f"{repo} could not be downloaded: {type(error).__name__}: {error}. Nothing was loaded; trying again "
            "continues where the download broke off."
        ) from error


def select(repository: Repository, component: str, dtype: torch.dtype, allow_pickle: bool) -> Files:
    """Choose the files of `repository` that make an anchor for a pipeline's `component`, and fetch them.

    A half-precision reference (`dtype`) takes the variant stored in its own precision where there is one.
    """
    label, names = repository.label, repository.names
    if repository.chosen is not None:
        folder, wanted = "", [repository.chosen]
        _refuse_pickles(wanted, label, allow_pickle)
        if repository.chosen.endswith(QUANTISED):
            raise AnchorError(
                f"{label} holds quantised weights (GGUF), which are another model than the one that was aligned: its "
                "rounding would be mixed in with the alignment. Pass the .safetensors file that it was made from."
            )
        if not repository.chosen.endswith(SAFE + PICKLES):
            raise AnchorError(f"{label} is not a weights file: expected .safetensors.")
        kind: Literal["denoiser", "peft", "file"] = "file"
        if repository.chosen.startswith("adapter_model.") and "adapter_config.json" in names:
            kind = "peft"
        elif repository.chosen.startswith("diffusion_pytorch_model.") and "config.json" in names:
            kind = "denoiser"
    else:
        kind, folder, preferred = _classify(label, names, component)
        inside = [name for name in names if name.startswith(folder) and "/" not in name.removeprefix(folder)]
        if not any(name.endswith(SAFE + PICKLES) for name in inside):
            raise AnchorNotFound(
                f"no weights (.safetensors) {f'in {folder} of' if folder else 'directly in'} {label}; it holds "
                f"{some(names) or 'no files'}. If they are further down, name the folder with subfolder=."
            )
        wanted = choose_checkpoint(inside, preferred, dtype, allow_pickle, label)

    whole = "model_index.json" in names and folder == f"{component}/"
    config = {"denoiser": f"{folder}config.json", "peft": "adapter_config.json", "file": None}[kind]
    beside = ["model_index.json", "scheduler/scheduler_config.json"] if whole else []
    root = repository.fetch([*wanted, *([config] if config else []), *(name for name in beside if name in names)])
    return Files(
        label,
        kind,
        tuple(root / name for name in wanted),
        root / config if config else None,
        root if whole else None,
    )


def _classify(
    label: str, names: Sequence[str], component: str
) -> tuple[Literal["denoiser", "peft", "file"], str, tuple[str, ...]]:
    """What lies here, in which folder of it, and the file stems to look for there."""
    has_denoiser = f"{component}/config.json" in names
    if "model_index.json" in names and not has_denoiser:
        folders = sorted({name.partition("/")[0] for name in names if "/" in name})
        raise IncompatibleAnchor(
            f"{label} is a pipeline without a {component!r}, which is what the reference denoises with; "
            f"it has {some(folders)}."
        )
    if "config.json" in names and any(name.startswith("diffusion_pytorch_model") for name in names):
        return "denoiser", "", ("diffusion_pytorch_model",)
    if has_denoiser:
        return "denoiser", f"{component}/", ("diffusion_pytorch_model",)
    if "adapter_config.json" in names:
        return "peft", "", ("adapter_model",)
    return "file", "", ("pytorch_lora_weights", "diffusion_pytorch_model")


def choose_checkpoint(
    names: Sequence[str], preferred: Sequence[str], dtype: torch.dtype, allow_pickle: bool, label: str
) -> list[str]:
    """The files of one checkpoint (all its shards) among `names`: the first preferred stem, or the only one there.

    Raises `AnchorError` where the choice is not clear, `PickledAnchor` where all are pickled.
    """
    checkpoints = _checkpoints([name for name in names if name.endswith(SAFE)])
    if not checkpoints:
        pickles = [name for name in names if name.endswith(PICKLES)]
        _refuse_pickles(pickles, label, allow_pickle)
        checkpoints = _checkpoints(pickles)

    stem = next((stem for stem in preferred if any(stem == name for name, _ in checkpoints)), None)
    variants = {variant: files for (name, variant), files in checkpoints.items() if name == stem}
    if stem is None and len(checkpoints) == 1:
        variants = {"": next(iter(checkpoints.values()))}
    for variant in (_VARIANTS.get(dtype, ""), "", *(variants if len(variants) == 1 else ())):
        if variant in variants:
            return _whole(variants[variant], label)
    raise AnchorError(
        f"several weights in {label}: {some(n for files in checkpoints.values() for n in files)}. "
        "Name one: the file's path, or 'owner/name/file.safetensors' on the hub; or a folder of it with subfolder=."
    )


def _checkpoints(names: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Group files into checkpoints: `(stem, variant) -> files`, from `stem[.variant][-00001-of-00002].suffix`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        stem, _, rest = _SHARD.sub("", name.rpartition("/")[2]).partition(".")
        groups.setdefault((stem, rest.rpartition(".")[0]), []).append(name)
    return groups


def _whole(files: list[str], label: str) -> list[str]:
    """The unsharded file of a checkpoint, or else all its shards."""
    shards = {name: match for name in files if (match := _SHARD.search(name))}
    unsharded = [name for name in files if name not in shards]
    if unsharded:
        return unsharded[:1]
    total = int(next(iter(shards.values()))[2])
    absent = sorted(set(range(1, total + 1)) - {int(match[1]) for match in shards.values()})
    if absent:
        raise AnchorNotFound(
            f"{label} is incomplete: of {total} shards, {absent} are missing; {some(shards)} is there."
        )
    return sorted(shards)


def _refuse_pickles(names: Sequence[str], label: str, allow_pickle: bool) -> None:
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles and not allow_pickle:
        raise PickledAnchor(
            f"{label} holds its weights only as pickle ({some(pickles)}), a format that can run code when opened. "
            "Use a .safetensors version, or pass allow_pickle=True if you trust its author."
        )


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few names, for a message."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")
