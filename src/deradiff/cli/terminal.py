"""How the commands talk: a progress bar, warnings as one line, a wrong input as one clear sentence."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from deradiff.files.disks import in_words, may_write

PACKAGE = Path(__file__).parents[1]

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""What moves a terminal's cursor, colours it or rings its bell, and halves of characters, which cannot be printed."""


def printable(text: str) -> str:
    """`text` with control characters but for line breaks and tabs written out, such as ESC as \\x1b."""
    return _CONTROLS.sub(lambda control: repr(control[0])[1:-1], text)


class LiteralConsole(Console):
    """A console that prints what a person wrote as it was written.

    `[bold]` and `:smile:` are text, numbers and paths get no colours, and control characters are written out.
    """

    def __init__(self, *, stderr: bool = False, soft_wrap: bool = False) -> None:
        super().__init__(stderr=stderr, soft_wrap=soft_wrap, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """As Rich's, of printable text."""
        return super().render_str(printable(text), **how)


LISTED = 10
"""How many lines of one kind are printed."""

messages = LiteralConsole(stderr=True, soft_wrap=True)


@contextmanager
def refusing_wrong_input(out_of_memory: str = "try a smaller --batch-size, or --offload") -> Iterator[None]:
    """Print what the library says about a wrong input, in red and without a traceback, and exit with status 2.

    Of other errors only those that deradiff itself defines are for the user's eyes; the rest keeps its traceback. What
    deradiff warns of is a line in yellow.
    """
    _said.clear()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warning_shown(warnings.showwarning)
            yield
    except Exception as error:
        kind = type(error)
        if kind.__name__ == "OutOfMemoryError":  # torch's, which is not to be imported for this
            messages.print(f"error: out of memory; {out_of_memory}.", style="bold red")
            raise typer.Exit(1) from None
        wrong_input = isinstance(error, (ValueError, OSError, FloatingPointError, ImportError))
        if not wrong_input and not kind.__module__.startswith("deradiff."):
            raise
        messages.print(f"error: {_sentence(error)}", style="bold red")
        raise typer.Exit(2) from None


def _warning_shown(others: Callable[..., None]) -> Callable[..., None]:
    """What shows a warning of deradiff as a line, and leaves those of other libraries to `others`."""

    def show(message: Warning | str, category: type[Warning], filename: str, *rest: Any, **named: Any) -> None:
        if Path(filename).is_relative_to(PACKAGE):
            _say_once(str(message))
        else:
            others(message, category, filename, *rest, **named)

    return show


_said: set[str] = set()
"""The warnings that the command has printed."""


def _say_once(text: str) -> None:
    """A warning as a line, unless the command has printed it, whoever gave it."""
    line = " ".join(text.split())
    if line not in _said:
        _said.add(line)
        messages.print(f"warning: {line}", style="yellow")


def _sentence(error: Exception) -> str:
    import pydantic

    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        return f"{place}: {message}; got {first['input']!r}." if place else message
    words = in_words(error) if isinstance(error, OSError) else None
    return " ".join((words or str(error)).split()) or type(error).__name__


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A Rich progress bar on stderr; yields the function that moves it, `on_step(done, total)`.

    Warnings are printed above the bar, a line each (see `pass_on_warnings`).
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with warnings.catch_warnings(), Progress(*columns, console=messages, transient=True) as bar:
        pass_on_warnings()
        task = bar.add_task("loading the models", total=None)

        def on_step(done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield on_step


@contextmanager
def stages(console: Console) -> Iterator[Callable[[str, int, int, str], None]]:
    """A progress bar for every stage of long work; yields `report(stage, done, planned, a line of words)`."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<18}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[line]}", markup=False),
    )
    with Progress(*columns, console=console) as bars:
        begun: dict[str, Any] = {}

        def report(stage: str, done: int, planned: int, line: str) -> None:
            if stage not in begun:
                begun[stage] = bars.add_task(printable(stage), total=planned, line="")
            bars.update(begun[stage], completed=done, total=planned, line=printable(line))

        yield report


def pass_on_warnings() -> None:
    """Print what deradiff and the libraries below warn of, a line each and each once; their bars stay off.

    What is not passed on stands in `library_messages.MUTED`. Of many prompts that were cut, `LISTED` are named.
    """
    from deradiff.sweep import library_messages

    cut = 0

    def say(line: str, category: type[Warning] | None) -> None:
        nonlocal cut
        if category is not None and category.__name__ == "PromptCut":
            cut += 1
            if cut > LISTED:
                line = "more prompts were cut, which are not named here"
                if cut > LISTED + 1:
                    return
        _say_once(line)

    library_messages.relay(say)


def listed(kind: str, lines: Sequence[str]) -> None:
    """Print such lines on stderr, the first `LISTED` of them."""
    style = "yellow" if kind == "warning" else "red"
    for line in lines[:LISTED]:
        messages.print(f"{kind}: {line}", style=style)
    if len(lines) > LISTED:
        messages.print(f"... and {len(lines) - LISTED} more", style=style)


def require_writable(option: str, path: Path | None) -> None:
    """Raise `OSError` if the file that an option names cannot be written: before hours of work, not after."""
    if path is None:
        return
    if path.is_dir() or not path.parent.is_dir():
        raise FileNotFoundError(f"{option} {path} cannot be written: name a file in a folder that exists.")
    if not may_write(path.parent):
        raise PermissionError(
            f"{option} {path} cannot be written: {path.parent} may not be written to by you (permission denied)."
        )


def require_folder(option: str, path: Path) -> None:
    """Raise `FileExistsError` where the folder that an option names is a file, or would lie in one."""
    if wrong := next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None):
        raise FileExistsError(f"{option} {path}: {wrong} is a file; name a folder.")


def files(paths: Iterable[Any]) -> None:
    """Print where the results are, one path a line, on stdout."""
    for path in paths:
        echo(str(path).replace("\n", "\\n"))


def echo(text: str, *, nl: bool = True) -> None:
    """Print plain text on stdout."""
    typer.echo(printable(text), nl=nl)
