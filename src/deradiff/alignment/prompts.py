"""Prompt lists: the papers' benchmarks on the hub, and files of one's own."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deradiff.alignment.data_order import seeded
from deradiff.files import hub, tables
from deradiff.files.prompts import WHAT, Entry, read_prompts
from deradiff.files.tables import INSTALL
from deradiff.files.waiting import from_the_hub

HPD_STYLES = ("anime", "concept-art", "paintings", "photo")
"""The four lists of the HPDv2 benchmark, of 800 prompts each."""


class HubList(NamedTuple):
    """Prompts in files of one dataset on the hub."""

    repo: str
    files: tuple[str, ...]
    size: int
    """How many entries they have."""


_PARTI = "nateraw/parti-prompts", ("PartiPrompts.tsv",)
_HPD = {style: HubList("zhwang/HPDv2", (f"benchmark/{style}.json",), 800) for style in HPD_STYLES}

LISTS: dict[str, HubList] = {
    "partiprompts": HubList(*_PARTI, 1632),
    "partiprompts/complex": HubList(*_PARTI, 113),
    "hpdv2": HubList("zhwang/HPDv2", tuple(f"benchmark/{style}.json" for style in HPD_STYLES), 3200),
    **{f"hpdv2/{style}": of_style for style, of_style in _HPD.items()},
}
"""Lists on the hub that are files. PartiPrompts has 12 categories, and `complex` are those whose challenge it calls
Complex; of HPDv2's benchmark the style is the category."""

PICKAPIC = {"pickapic-v1": "pickapic-anonymous/pickapic_v1", "pickapic-v2": "liuhuohuo2/pick-a-pic-v2"}
"""Pick-a-Pic on the hub, which the `datasets` library reads. Copies by others: the authors' own, `yuvalkirstain/...`,
were taken off the hub. They hold 0.6 to 1 million rows; their captions include unsafe ones."""

NAMES = (*LISTS, *PICKAPIC)
"""Lists that are known by name; of Pick-a-Pic the captions."""


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
    path = Path(source)
    named = str(source) if not path.is_file() else ""
    if named in PICKAPIC:
        return _of_captions(PICKAPIC[named], split or "train")
    if split is not None:
        raise ValueError(f"{source} has no splits, of which {split!r} was asked for: leave split out")
    if named in LISTS:
        return _of_hub_list(named)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {source}; lists known by name are {', '.join(NAMES)}")
    if path.is_dir():
        raise ValueError(f"{source} is a folder: name the file of prompts in it")
    return read_prompts(path)


# -- hub lists --------------------------------------------------------------------------------------------------------


def _of_hub_list(name: str) -> list[Entry]:
    of_name = LISTS[name]
    entries = []
    for file in of_name.files:
        path = _download(of_name.repo, file)
        category = path.stem if path.suffix == ".json" else None
        entries += [entry._replace(category=category or entry.category) for entry in read_prompts(path)]
    if name == "partiprompts/complex":
        rows = tables.read_tsv(tables.read_text(path, WHAT), str(path))
        return [entry for entry, row in zip(entries, rows, strict=True) if row.cells.get("Challenge") == "Complex"]
    return entries


def _download(repo: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with from_the_hub(f"{file} of {repo}"):
            return Path(hf_hub_download(repo, file, repo_type="dataset"))
    except OSError as error:
        cure = _gate(repo, error) or "check the connection, or download it elsewhere and name the file"
        raise OSError(f"{file} of {repo} cannot be fetched from the hub ({error}): {cure}") from error


def hub_dataset(repo: str, split: str, revision: str | None = None, columns: list[str] | None = None) -> Any:
    """A dataset of the hub, whose rows are downloaded as they are read; of Parquet files only these `columns`.

    Raises `ImportError` without the `datasets` library, `OSError` where the dataset cannot be reached.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f"{repo} is read with the datasets library, which is missing: {INSTALL}") from error
    chosen = {} if columns is None else {"columns": columns}
    try:
        return load_dataset(repo, split=split, revision=revision, streaming=True, **chosen)
    except OSError as error:
        elsewhere = "check its name and the connection, or name a folder with a copy of its Parquet files"
        cure = _gate(repo, error) or elsewhere
        raise OSError(f"the dataset {repo} cannot be reached ({error}){hub.instead_of(repo)}: {cure}") from error


def _gate(repo: str, error: OSError) -> str:
    """How to be let in where a dataset asks for it; otherwise nothing. (`datasets` has only words for it.)"""
    return hub.how_to_enter(repo, "dataset") if "gated" in f"{type(error).__name__} {error}".lower() else ""


def _of_captions(repo: str, split: str) -> Iterator[Entry]:
    for number, row in enumerate(hub_dataset(repo, split, columns=["caption"])):
        caption = row["caption"]
        # People also voted with nothing written.
        if isinstance(caption, str) and caption.strip():
            yield Entry(caption.strip(), None, f"{repo} ({split}), row {number}")
