"""The Hugging Face hub as plans need it: what of it is in the cache, what is gone, and how to get the rest."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

Kind = Literal["model", "dataset"]

GONE = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/sd-turbo": "stabilityai/sdxl-turbo",
    "yuvalkirstain/pickapic_v1": "pickapic-anonymous/pickapic_v1",
    "yuvalkirstain/pickapic_v2": "liuhuohuo2/pick-a-pic-v2",
}
"""Repositories that their owners took off the hub or withdrew, by public reports, and what to take instead: copies by
others, and for SD-Turbo the model of its kind that is left."""


def cached(repo: str, kind: Kind = "model", revision: str | None = None) -> Path | None:
    """The folder of `repo` in the hub's cache, whole or not; None where there is none, or `repo` is no id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def download_command(
    repo: str, files: Sequence[str], kind: Kind = "model", revision: str | None = None, leave_out: Sequence[str] = ()
) -> str:
    """What to type to have these files (patterns) of a repository in the cache."""
    words = ["hf", "download", repo]
    words += [] if kind == "model" else ["--repo-type", kind]
    words += [] if revision is None else ["--revision", revision]
    words += [word for file in files for word in ("--include", file)]
    return shlex.join([*words, *(word for file in leave_out for word in ("--exclude", file))])


def how_to_enter(repo: str, kind: Kind = "model") -> str:
    """What to do about a repository whose owner asks everybody to accept a licence first."""
    from huggingface_hub.constants import ENDPOINT

    page = f"{ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    return f"accept its conditions at {page} with your account, then log in here with `hf auth login`"


def refused(repo: str, kind: Kind = "model") -> str | None:
    """Ask the hub about a repository: None where it may be read, else why not and what to do.

    Raises `OSError` where the hub gives no answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        HfApi().auth_check(repo, repo_type=kind)
    except GatedRepoError:
        return f"is gated: {how_to_enter(repo, kind)}"
    except RepositoryNotFoundError:
        return f"is not on the hub, or private{instead_of(repo)}"
    except Exception as error:  # the transport library's own errors, or a server in trouble
        raise OSError(f"the hub did not answer ({type(error).__name__}: {' '.join(str(error).split())})") from error
    return None


def instead_of(repo: str) -> str:
    """What to take in the place of a repository that was removed, as the end of a sentence."""
    return f"; it was removed: take {GONE[repo]} instead" if repo in GONE else ""
