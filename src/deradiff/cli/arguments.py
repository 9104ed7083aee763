"""What people write on the command line, read into values. Every refusal says what was written and what to write."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from deradiff.notation import decimal, numbers


class Dtype(StrEnum):
    """Number formats."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


DTYPES = "auto is float32 on a CPU and float16 elsewhere."


def anchors(texts: Sequence[str]) -> dict[str, str]:
    """Read `SOURCE` or `NAME=SOURCE` for each anchor; with several, each needs a name."""
    if not texts:
        raise ValueError("name at least one anchor with --anchor: a folder, a hub id, a LoRA file, or digits:BETA.")
    found: dict[str, str] = {}
    for text in texts:
        named = None if Path(text).exists() else re.fullmatch(r"([A-Za-z_][\w-]*)=(.+)", text)
        if not named and len(texts) > 1:
            raise ValueError(f"with several anchors each needs a name: write NAME=SOURCE instead of {text!r}.")
        name, source = named.groups() if named else ("anchor", text)
        if name in found:
            raise ValueError(f"two anchors are called {name!r}.")
        found[name] = source
    return found


def lams(texts: Sequence[str], anchors: Sequence[str]) -> tuple[float | dict[str, float], ...]:
    """Read λ: numbers and ranges for one anchor, `style=0.5,text=0.2` for each column of several."""
    if any("=" in text for text in texts) or len(anchors) > 1:
        return tuple(_per_anchor(text, anchors) for text in texts)
    return tuple(dict.fromkeys(lam for text in texts for lam in numbers(text, "--lam")))


def _per_anchor(text: str, anchors: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(anchors, 0.0)
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            example = ",".join(f"{anchor}=0.5" for anchor in anchors)
            raise ValueError(f"with several anchors λ names them, as in --lam {example}; got {text!r}.")
        if name not in found:
            raise ValueError(f"--lam names the anchor {name!r}, but there are only {', '.join(anchors)}.")
        found[name] = float(decimal(value, text, "--lam"))
    return found


def prompts(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The prompts of `--prompt`, then those of the file: one per line, or a list in YAML or JSON; each once."""
    found = [*given, *(_prompt_file(file) if file else [])]
    if not found:
        raise ValueError("no prompt was given: use --prompt, or --prompts with a file.")
    if any(not prompt.strip() for prompt in found):
        raise ValueError("a prompt is empty.")
    return tuple(dict.fromkeys(found))


def _prompt_file(file: Path) -> list[str]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no prompt file {file}.")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a text file in UTF-8: {error.reason} at byte {error.start}.") from None
    found = _listed(file, text) if file.suffix in _LISTS else [line.strip() for line in text.splitlines()]
    found = [prompt for prompt in found if prompt]
    if not found:
        raise ValueError(f"{file} holds no prompt.")
    return found


_LISTS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    ".yaml": ("YAML", yaml.safe_load),
    ".yml": ("YAML", yaml.safe_load),
    ".json": ("JSON", json.loads),
}


def _listed(file: Path, text: str) -> list[str]:
    form, read = _LISTS[file.suffix]
    try:
        content = read(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not {form}: {' '.join(str(error).split())}") from None
    listed = content.get("prompts") if isinstance(content, dict) else content
    if listed is None:
        listed = []
    if not isinstance(listed, list) or not all(isinstance(prompt, str) for prompt in listed):
        raise ValueError(
            f"{file} must hold a list of prompts, or 'prompts:' with one; quote prompts that look like numbers."
        )
    return listed
