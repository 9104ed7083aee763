"""Independent jobs in processes of one thread each, with their progress in one place."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from queue import Empty
from typing import Any, TypeVar

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deradiff.files.waiting import LOOK, Patience

Value = TypeVar("Value")

Report = Callable[[str, int, int, str], None]
"""Called with (stage, steps done, steps planned, a line of words)."""

Job = Callable[[Report], None]

Progress = tuple[str, int, int, str]


def run_jobs(jobs: list[Job], workers: int, report: Report) -> None:
    """Run `jobs`, which do not depend on each other, in `workers` processes of one thread each.

    For networks so small that two threads spend much of their time waiting for each other: two jobs side by side are
    then faster than one after the other on two threads. The bits do not depend on the number of workers.
    """
    if workers == 1:
        for job in jobs:
            _run_alone(job, report)
        return
    # Not a manager's queue: a manager is one more process, which outlives a parent that was killed.
    reports: Queue[Progress] = multiprocessing.get_context("spawn").Queue()
    with Pool(workers, _begin, reports) as pool:
        pending = [pool.submit(_run_in_worker, job) for job in jobs]
        patience = pool.patience()
        while not all(future.done() for future in pending):
            with suppress(Empty):
                report(*reports.get(timeout=LOOK))
            if not pool.begun:
                patience.check()
            for future in pending:
                if future.done():
                    future.result()
    # The workers have ended, and with them all that was on its way.
    with suppress(Empty):
        while True:
            report(*reports.get(timeout=0.1))


class Pool(ProcessPoolExecutor):
    """Processes that import anew instead of inheriting locks, and end with their parent.

    `begin` is called with `arguments` in each of them first. Where the block fails, the rest is not begun.
    """

    def __init__(self, workers: int, begin: Callable[..., object], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._size, self._begun = workers, context.Event()
        super().__init__(workers, context, _come_up, (self._begun, begin, arguments))

    @property
    def begun(self) -> bool:
        """Whether one of them has come up: before that they are waited for, then they work."""
        return self._begun.is_set()

    def patience(self) -> Patience:
        """For how long they are waited for."""
        return Patience(f"{self._size} worker process{'es' if self._size > 1 else ''} to come up", load)

    def done(self, pending: Collection[Future[Value]]) -> Iterator[Future[Value]]:
        """Each of these as it is done. Raises `WaitedTooLong` where no process comes up."""
        patience, left = self.patience(), set(pending)
        while left:
            ready, left = wait(left, timeout=LOOK, return_when=FIRST_COMPLETED)
            if not ready and not self.begun:
                patience.check()
            yield from ready

    def close(self) -> None:
        """End them: one that works after its task, one that has not come up at once."""
        if not self.begun:
            for process in list((self._processes or {}).values()):
                process.kill()
        self.shutdown(wait=True, cancel_futures=True)

    def __exit__(self, *raised: object) -> None:
        self.close()


def _come_up(begun: "Event", begin: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    begin(*arguments)
    begun.set()


def load() -> str:
    """How busy this machine is, in words."""
    busy = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown load"
    return f"this machine has {cores()} processors, {busy}"


_reports: "Queue[Progress] | None" = None
"""In a worker: where its progress goes."""


def _begin(reports: "Queue[Progress]") -> None:
    global _reports
    _reports = reports


def end_with_parent() -> None:
    """End this process when its parent does. A worker would else finish its job, for hours, and for nobody."""
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def _run_in_worker(job: Job) -> None:
    def send(stage: str, done: int, planned: int, line: str) -> None:
        if _reports is not None:
            _reports.put((stage, done, planned, line))

    _run_alone(job, send)


def _run_alone(job: Job, report: Report) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with reproducible(1):
        job(report)


@contextmanager
def reproducible(threads: int) -> Iterator[None]:
    """Deterministic algorithms on so many threads: how a sum is split between threads decides its last bits."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
