"""Independent jobs in processes of one thread each, with their progress in one place."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from queue import Empty

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

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
    context = multiprocessing.get_context("spawn")
    # Not a manager's queue: a manager is one more process, which outlives a parent that was killed.
    reports: Queue[Progress] = context.Queue()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin, initargs=(reports,)) as pool:
        pending = [pool.submit(_run_in_worker, job) for job in jobs]
        try:
            while not all(future.done() for future in pending):
                with suppress(Empty):
                    report(*reports.get(timeout=0.5))
                for future in pending:
                    if future.done():
                        future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    # The workers have ended, and with them all that was on its way.
    with suppress(Empty):
        while True:
            report(*reports.get(timeout=0.1))


_reports: "Queue[Progress] | None" = None
"""In a worker: where its progress goes."""


def _begin(reports: "Queue[Progress]") -> None:
    global _reports
    _reports = reports
    end_with_parent()


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
