"""What the libraries below have to say, as single lines: everything but a short list, which deradiff says itself."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

MUTED = {
    r"following part of your input was truncated": "`truncation` names the prompt, and shows the words that were lost",
    r"Token indices sequence length is longer than": "the same",
    r"invalid value encountered in cast": "`pictures.NotFinite` says which image, where NaN came from, and what to do",
    r"requires torchvision \(not installed\)": "the processors without it are the ones meant",
    r"should be kept in float32: \[\]": "it names nothing",
    r"`upcast_vae` is deprecated": "diffusers' own pipeline calls it",
    r"=None of type <class 'NoneType'> cannot be saved": "a part that was left out has nothing to save",
    r"You have disabled the safety checker": "whoever saved the pipeline did; the person who draws was not asked",
}
"""What is not passed on, as regular expressions, and why."""

SOURCES = ("diffusers", "transformers", "peft", "accelerate")
"""Libraries that log what a person should know."""

LONGEST = 600
"""Characters of a line."""


def relay(say: Callable[[str, type[Warning] | None], None]) -> None:
    """Have warnings, and what `SOURCES` log, said by `say(line, category)`, each line once; their bars stay off.

    A log has no category. Python's own filters decide about warnings as ever: deprecations, for instance, are for
    programmers. `DIFFUSERS_VERBOSITY` and `TRANSFORMERS_VERBOSITY` go on deciding what is logged.
    """
    import diffusers.utils.logging
    import transformers.utils.logging

    messages: set[str] = set()

    def tell(text: str, category: type[Warning] | None) -> None:
        line = " ".join(text.split())
        if line not in messages and not any(re.search(pattern, line) for pattern in MUTED):
            messages.add(line)
            say(line if len(line) <= LONGEST else f"{line[:LONGEST]} …", category)

    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
        library.get_logger()  # makes its default handler, which is to go
    for name in SOURCES:
        logger = logging.getLogger(name)
        logger.handlers = [_Lines(tell)]
        logger.propagate = False

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        tell(str(message), category)

    warnings.showwarning = show


class _Lines(logging.Handler):
    """Passes messages on, after the name of the library."""

    def __init__(self, tell: Callable[[str, type[Warning] | None], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a message on."""
        self._tell(f"{record.name.partition('.')[0]}: {record.getMessage()}", None)
