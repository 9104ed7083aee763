"""One image at a time, in the order in which they were asked for; each page has one job, which can be stopped."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

LOOK = 0.02
"""Seconds between two looks at whether a job that waits was stopped."""

MOST_PAGES = 1000
"""Pages whose jobs are remembered; the oldest is forgotten first."""


Why = Literal["cancelled", "superseded", "left"]
"""By its page's cancel, by a newer job of the same page, or because the page was closed."""


class Cancelled(Exception):
    """The job was stopped; `why` says what by."""

    def __init__(self, why: Why = "cancelled") -> None:
        super().__init__(f"the image was {why}")
        self.why: Why = why


class QueueFull(RuntimeError):
    """More images wait than the studio takes."""


class PageJob:
    """What a page is waiting for."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._why: Why = "cancelled"

    def stop(self, why: Why) -> None:
        """Have the job end at its next step. What it was stopped by first counts."""
        if not self._stopped.is_set():
            self._why = why
            self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether it was told to end."""
        return self._stopped.is_set()

    @property
    def why(self) -> Why | None:
        """What it was stopped by; None where it was not."""
        return self._why if self.stopped else None

    def check(self) -> None:
        """Raise `Cancelled` if the job was stopped."""
        if self.stopped:
            raise Cancelled(self._why)

    def rest(self, seconds: float) -> None:
        """Wait; raises `Cancelled` as soon as the job is stopped."""
        self._stopped.wait(seconds)
        self.check()


class Pages:
    """What every open page waits for, by the page's key. Work of one kind takes the place of the last of that kind."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: dict[str, dict[str, PageJob]] = {}

    def begin(self, page: str, kind: str = "image", goes_on: bool = False) -> PageJob:
        """A new job for `page`, whose last one of that kind is stopped.

        One that `goes_on` where the last ended, as the exact image does after its preview, is stopped with it: a cancel
        counts for both, whenever it came.
        """
        with self._lock:
            jobs = self._jobs.setdefault(page, {})
            last, job = jobs.get(kind), PageJob()
            if last is not None:
                if goes_on and last.why == "cancelled":
                    job.stop("cancelled")
                last.stop("superseded")
            jobs[kind] = job
            self._jobs[page] = self._jobs.pop(page)
            while len(self._jobs) > MOST_PAGES:
                _stop(self._jobs.pop(next(iter(self._jobs))), "left")
            return job

    def cancel(self, page: str) -> None:
        """Stop what `page` is waiting for, and nobody else's."""
        with self._lock:
            _stop(self._jobs.get(page, {}), "cancelled")

    def leave(self, page: str) -> None:
        """The page was closed."""
        with self._lock:
            _stop(self._jobs.pop(page, {}), "left")

    def cancel_all(self) -> None:
        """Stop everything: the studio closes."""
        with self._lock:
            for jobs in self._jobs.values():
                _stop(jobs, "left")


def _stop(jobs: dict[str, PageJob], why: Why) -> None:
    for job in jobs.values():
        job.stop(why)


class Turns:
    """Who may use the models: one at a time, first come first served, with at most `most` waiting."""

    def __init__(self, most: int = 16) -> None:
        self.most = most
        self._changed = threading.Condition()
        self._line: deque[PageJob] = deque()

    @contextmanager
    def taken(self, job: PageJob, on_wait: Callable[[int], None] | None = None) -> Iterator[None]:
        """Hold the models for the block; `on_wait(ahead)` is told how many are before this one.

        Raises `QueueFull`, and `Cancelled` where the job is stopped before its turn.
        """
        with self._changed:
            if len(self._line) > self.most:
                raise QueueFull(f"{len(self._line)} images wait already: try again in a moment")
            self._line.append(job)
        try:
            reported = 0
            with self._changed:
                while self._line[0] is not job:
                    job.check()
                    ahead = self._line.index(job)
                    if on_wait is not None and ahead != reported:
                        on_wait(reported := ahead)
                    self._changed.wait(LOOK)
            job.check()
            yield
        finally:
            with self._changed:
                self._line.remove(job)
                self._changed.notify_all()


def streamed(work: Callable[[Callable[[Any], None]], Any], job: PageJob) -> Iterator[Any]:
    """Do `work(report)` in a thread; yield what it reports, of several at once the newest, and last what it returns.

    Raises what the work raises. Where whoever listens stops listening, the job is stopped, and the thread has ended
    before this returns.
    """
    changed = threading.Condition()
    news: deque[Any] = deque(maxlen=1)
    ended: list[Any] = []

    def report(what: Any) -> None:
        with changed:
            news.append(what)
            changed.notify()

    def run() -> None:
        try:
            outcome: Any = work(report)
        except BaseException as error:
            outcome = error
        with changed:
            ended.append(outcome)
            changed.notify()

    thread = threading.Thread(target=run, name="studio-image", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: news or ended)
                latest = news.popleft() if news and not ended else None
            if latest is not None:
                yield latest
            elif ended:
                break
        if isinstance(ended[0], BaseException):
            raise ended[0]
        yield ended[0]
    finally:
        if thread.is_alive():
            job.stop("left")
            thread.join()
