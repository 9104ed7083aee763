"""Waiting for what others have to give: said aloud after ten seconds, given up after a bound. Work is not waiting."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

AFTER = 10.0
"""Seconds after which whoever waits says so."""

LOOK = 0.5
"""Seconds between two looks at what is waited for."""

BOUND = "DERADIFF_WAIT"
"""The environment variable that holds how many seconds anything is waited for at most; `inf` is for ever."""

MOST = 600.0
"""Seconds that anything is waited for where `BOUND` is not set."""

log = logging.getLogger(__name__)


class WaitedTooLong(TimeoutError):
    """What was waited for did not come; the message says what it was, and what is lacking."""


class Patience:
    """How long somebody waits for `what`, from now on.

    Args:
        what: goes on after "waiting for".
        lacking: what is known of why it does not come, asked when that is said.
        after: seconds until it is said; `AFTER` where None.
        most: seconds until it is given up; `bound()` where None.
    """

    def __init__(
        self, what: str, lacking: Callable[[], str] = str, *, after: float | None = None, most: float | None = None
    ) -> None:
        self._what, self._lacking, self._after = what, lacking, AFTER if after is None else after
        self._most = bound() if most is None else most
        self._began, self._announced = time.monotonic(), False

    def check(self) -> None:
        """Nothing can be done meanwhile: say so once, if it is late. Raises `WaitedTooLong` where it is too late."""
        waited = time.monotonic() - self._began
        if waited >= self._most:
            raise WaitedTooLong(
                f"waited {waited:.0f} s for {_described(self._what, self._lacking)}. {BOUND} sets for how many seconds "
                "anything is waited for"
            )
        self.remind()

    def remind(self) -> None:
        """Others work meanwhile: say once what is waited for, if it is late."""
        if not self._announced and time.monotonic() - self._began >= self._after:
            self._announced = True
            log.warning("waiting for %s", _described(self._what, self._lacking))


@contextmanager
def announced(what: str, lacking: Callable[[], str] = str, *, after: float | None = None) -> Iterator[None]:
    """Say what the block waits for if it takes long: for calls of other libraries, which have bounds of their own."""
    timer = threading.Timer(
        AFTER if after is None else after, lambda: log.warning("waiting for %s", _described(what, lacking))
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def from_the_hub(source: str) -> AbstractContextManager[None]:
    """Say that a model is loaded if that takes long: whose files are not here come from the hub, without a bar.

    Hugging Face's own bound on a connection that gives nothing is `HF_HUB_DOWNLOAD_TIMEOUT`.
    """
    return announced(f"{source} to be loaded", lambda: "what is not on this disk is fetched from the hub")


def bound() -> float:
    """How many seconds anything is waited for. Raises `ValueError` where the environment says no positive number."""
    text = os.environ.get(BOUND, "").strip()
    try:
        seconds = float(text) if text else MOST
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"{BOUND} is {text!r}: set it to a number of seconds above 0, or to inf")
    return seconds


def _described(what: str, lacking: Callable[[], str]) -> str:
    reason = lacking()
    return f"{what}: {reason}" if reason else what
