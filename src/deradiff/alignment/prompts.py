"""Prompt lists: the papers' benchmarks on the hub, and files of one's own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import ENDPOINT

from deradiff.alignment.data_order import seeded
from deradiff.files.prompts import Entry, read_prompts
from deradiff.files.tables import INSTALL
from deradiff.files.waiting import from_the_hub

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The four lists of the HPDv2 benchmark, of 800 prompts each."""

NAMES = ("partiprompts", "hpdv2", *(f"hpdv2/{style}" for style in HPD_STYLES), "pickapic-v1", "pickapic-v2")
"""Lists on the hub.

PartiPrompts: `PartiPrompts.tsv` of `nateraw/parti-prompts`, 1632 prompts in 12 categories. HPDv2: `benchmark/*.json` of
`zhwang/HPDv2`, the style as the category. Pick-a-Pic: the captions of the datasets without images,
`yuvalkirstain/pickapic_v1_no_images` and `..._v2_no_images`, which need the `datasets` library.
"""


@dataclass(frozen=True)
class PromptList:
    """Prompts, each once, with the category of each where the source gives one.

    `duplicates` counts the entries dropped because an earlier one had the same text.
    """

    prompts: tuple[str, ...]
    categories: tuple[str | None, ...]
    duplicates: int
    source: str

    def __len__(self) -> int:
        return len(self.prompts)

    def by_category(self) -> dict[str | None, tuple[str, ...]]:
        """The prompts of each category, in order."""
        grouped: dict[str | None, list[str]] = {}
        for prompt, category in zip(self.prompts, self.categories, strict=True):
            grouped.setdefault(category, []).append(prompt)
        return {category: tuple(prompts) for category, prompts in grouped.items()}


def load_prompts(
    source: str | Path, count: int | None = None, seed: int | None = None, *, split: str | None = None
) -> PromptList:
    """The prompts of `source`, without duplicates.

    Args:
        source: one of `NAMES`, or a file in one of the forms of `files.prompts.read_prompts`.
        count: so many prompts; all by default.
        seed: the `count` prompts are drawn at random with this seed. Without it they are the first.
        split: of Pick-a-Pic alone: train (by default), validation, test, validation_unique, test_unique.

    Raises:
        FileNotFoundError: there is no such file or name.
        ValueError: no source is named; it is empty, unreadable, holds something else than text, or fewer prompts than
            `count`; a `split` of what has none.
        ImportError: Pick-a-Pic is asked for without the `datasets` library, or Parquet without pyarrow.
        OSError: the hub cannot be reached, or the file cannot be read.
    """
    categories: dict[str, str | None] = {}
    entries = duplicates = 0
    # Pick-a-Pic's captions come one by one: those not asked for are not downloaded.
    enough = count if count is not None and seed is None else None
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    for text, category, _ in _entries(source, split):
        entries += 1
        if text in categories:
            duplicates += 1
            continue
        categories[text] = category
        if len(categories) == enough:
            break
    if not categories:
        raise ValueError(f"{source} holds no prompt")
    if count is not None and len(categories) < count:
        raise ValueError(
            f"{source} holds {len(categories)} different prompts ({duplicates} of its {entries} entries are "
            f"duplicates), {count} were asked for"
        )
    prompts = list(categories)
    if seed is not None:
        order = torch.randperm(len(prompts), generator=seeded(seed, "prompts")).tolist()
        prompts = [prompts[i] for i in order[:count]]
    return PromptList(tuple(prompts), tuple(categories[prompt] for prompt in prompts), duplicates, str(source))


def _entries(source: str | Path, split: str | None) -> Iterable[Entry]:
    if not str(source).strip():
        raise ValueError(f"no path was given: name a file of prompts, or one of the lists {', '.join(NAMES)}")
    if source in ("pickapic-v1", "pickapic-v2") and not Path(source).is_file():
        return _of_captions(f"yuvalkirstain/pickapic_{str(source)[-2:]}_no_images", split or "train")
    if split is not None:
        raise ValueError(f"{source} has no splits, of which {split!r} was asked for: leave split out")
    path = Path(source)
    if source == "partiprompts" and not path.is_file():
        return read_prompts(_download("nateraw/parti-prompts", "PartiPrompts.tsv"))
    if source in NAMES and not path.is_file():
        styles = HPD_STYLES if source == "hpdv2" else (str(source).removeprefix("hpdv2/"),)
        return [entry for style in styles for entry in _of_style(style)]
    if not path.exists():
        raise FileNotFoundError(f"there is no file {source}; lists known by name are {', '.join(NAMES)}")
    if path.is_dir():
        raise ValueError(f"{source} is a folder: name the file of prompts in it")
    return read_prompts(path)


# -- hub lists --------------------------------------------------------------------------------------------------------


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with from_the_hub(f"{file} of {repo}"):
            return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except OSError as error:
        cure = _gate(repo, error) or "check the connection, or download it elsewhere and name the file"
        raise OSError(f"{file} of {repo} cannot be fetched from the hub ({error}): {cure}") from error


def _of_style(style: str) -> list[Entry]:
    path = _download("zhwang/HPDv2", f"benchmark/{style}.json")
    return [entry._replace(category=style) for entry in read_prompts(path)]


def hub_dataset(repo: str, split: str, revision: str | None = None) -> Any:
    """A dataset of the hub, whose rows are downloaded as they are read.

    Raises `ImportError` without the `datasets` library, `OSError` where the dataset cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{repo} is read with the datasets library, which is missing: {INSTALL}") from error
    try:
        return load_dataset(repo, split=split, revision=revision, streaming=True)
    except OSError as error:
        elsewhere = "check its name and the connection, or name a folder with a copy of its Parquet files"
        cure = _gate(repo, error) or elsewhere
        raise OSError(f"the dataset {repo} cannot be reached ({error}): {cure}") from error


def _gate(repo: str, error: OSError) -> str:
    """How to be let in where a dataset asks for it; otherwise nothing. (`datasets` has only words for it.)"""
    if "gated" not in f"{type(error).__name__} {error}".lower():
        return ""
    return f"accept its licence at {ENDPOINT}/datasets/{repo}, then log in with `hf auth login`, or set HF_TOKEN"


def _of_captions(repo: str, split: str) -> Iterator[Entry]:
    for number, row in enumerate(hub_dataset(repo, split)):
        caption = row["caption"]
        # People also voted with nothing written.
        if isinstance(caption, str) and caption.strip():
            yield Entry(caption.strip(), None, f"{repo} ({split}), row {number}")
