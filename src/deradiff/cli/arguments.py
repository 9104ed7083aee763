"""What people write on the command line, read into values. Every refusal says what was written and what to write."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from deradiff.sweep.notation import decimal, numbers

if TYPE_CHECKING:
    from typer import Context
else:
    Context = typer.Context.__base__  # Click's, which commands are given, be it that which newer Typers bring along


def refuse(context: Context, names: Sequence[str], why: str) -> None:
    """Raise `ValueError` where one of these parameters was given in the command line, which has no use for it."""
    given = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in names and _source(context, parameter.name) not in ("DEFAULT", "DEFAULT_MAP")
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: {why}")


def values(context: Context, names: Iterable[str]) -> dict[str, Any]:
    """The values of the command's parameters among these names."""
    return {name: value for name, value in context.params.items() if name in names}


def given(context: Context, *names: str) -> dict[str, Any]:
    """`values` of these parameters, but for those that are as they are by default."""
    usual = {parameter.name: parameter.default for parameter in context.command.params}
    return {name: value for name, value in values(context, names).items() if value != usual[name]}


def _source(context: Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def anchors(texts: Sequence[str]) -> dict[str, str]:
    """Read `SOURCE` or `NAME=SOURCE` for each anchor; with several, each needs a name."""
    if not texts:
        raise ValueError("name at least one anchor with --anchor: a folder, a hub id, a LoRA file, or digits:BETA.")
    sources: dict[str, str] = {}
    for text in texts:
        named = None if Path(text).exists() else re.fullmatch(r"([A-Za-z_][\w-]*)=(.+)", text)
        if not named and len(texts) > 1:
            raise ValueError(f"with several anchors each needs a name: write NAME=SOURCE instead of {text!r}.")
        name, source = named.groups() if named else ("anchor", text)
        if name in sources:
            raise ValueError(f"two anchors are called {name!r}.")
        sources[name] = source
    return sources


def lams(texts: Sequence[str], anchors: Sequence[str]) -> tuple[float | dict[str, float], ...]:
    """Read λ: numbers and ranges for one anchor, `style=0.5,text=0.2` for each column of several."""
    if any("=" in text for text in texts) or len(anchors) > 1:
        return tuple(_per_anchor(text, anchors) for text in texts)
    return tuple(dict.fromkeys(lam for text in texts for lam in numbers(text, "--lam")))


def _per_anchor(text: str, anchors: Sequence[str]) -> dict[str, float]:
    given: dict[str, float] = {}
    for item in text.split(","):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            example = ",".join(f"{anchor}=0.5" for anchor in anchors)
            raise ValueError(f"with several anchors λ names them, as in --lam {example}; got {text!r}.")
        if name not in anchors:
            raise ValueError(f"--lam names the anchor {name!r}, but there are only {', '.join(anchors)}.")
        if name in given:
            raise ValueError(f"--lam {text!r} names the anchor {name!r} twice: give each one λ.")
        given[name] = float(decimal(value, text, "--lam"))
    return dict.fromkeys(anchors, 0.0) | given


def prompts(given: Sequence[str], source: str | Path | None) -> tuple[str, ...]:
    """The prompts of `--prompt`, then those of the file or list that `--prompts` names; each once."""
    if any(not prompt.strip() for prompt in given):
        raise ValueError("a prompt is empty.")
    listed: Sequence[str] = ()
    if source is not None:
        from deradiff.alignment.prompts import load_prompts

        listed = load_prompts(source).prompts
    if not (given or listed):
        raise ValueError("no prompt was given: use --prompt, or --prompts with a file.")
    return tuple(dict.fromkeys([*given, *listed]))
