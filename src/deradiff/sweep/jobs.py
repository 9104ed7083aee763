"""Independent jobs in processes of one thread each, with their progress in one place."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.queues import Queue
from queue import Empty

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deradiff.sweep.workers import Processes, Todo, work

Report = Callable[[str, int, int, str], None]
"""Called with (stage, steps done, steps planned, a line of words)."""

Job = Callable[[Report], None]

Progress = tuple[str, int, int, str]


def run_jobs(jobs: list[Job], workers: int, report: Report) -> None:
    """Run `jobs`, which do not depend on each other, in `workers` processes of one thread each.

    For networks so small that two threads spend much of their time waiting for each other: two jobs side by side are
    then faster than one after the other on two threads. The bits do not depend on the number of workers. A job whose
    process was killed is begun again by another, as `work` says.
    """
    if workers == 1:
        for job in jobs:
            _run_alone(job, report)
        return
    # Not a manager's queue: a manager is one more process, which outlives a parent that was killed.
    reports: Queue[Progress] = multiprocessing.get_context("spawn").Queue()

    def pass_on(timeout: float = 0.0) -> None:
        with suppress(Empty):
            while True:
                report(*reports.get(timeout > 0, timeout))

    todos = [Todo(None, lambda job=job: job) for job in jobs]  # type: ignore[misc]
    with Processes(workers, _run_in_worker, _begin, reports, meanwhile=pass_on) as processes:
        for _ in work(todos, processes, in_flight=1):  # jobs take long: none is to wait for one worker alone
            pass
    pass_on(0.1)  # the workers have ended, and with them all that was on its way


_reports: "Queue[Progress] | None" = None
"""In a worker: where its progress goes."""


def _begin(reports: "Queue[Progress]") -> None:
    global _reports
    _reports = reports


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
