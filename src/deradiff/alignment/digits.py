"""The build of the digits world, from scikit-learn's digits to seven aligned models, stage by stage.

Each stage writes its result under the build folder once it is complete and is skipped when the result is there; long
stages checkpoint on the way. The same settings, machine and thread count give the same bits, interrupted or not.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from queue import Empty, Queue

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from deradiff.alignment.digits_anchors import draw_pairs, train_anchor, train_lora
from deradiff.alignment.digits_export import export
from deradiff.alignment.digits_reference import train_autoencoder, train_reference
from deradiff.alignment.digits_settings import Report, Settings, claim


def build(folder: Path, settings: Settings, report: Report) -> Path:
    """Make everything under `folder` and return `folder/files`: what ships, its loss curves and its measurements.

    Raises `ValueError` if `folder` holds a build with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, settings, "build")
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _reproducible(settings.threads):
        vae = train_autoencoder(folder, settings, report)
        train_reference(folder, settings, vae, report)
    run_jobs([partial(draw_pairs, folder, settings, number) for number in range(settings.chunks)], settings, report)
    anchors = [partial(train_anchor, folder, settings, beta) for beta in settings.betas]
    run_jobs([*anchors, partial(train_lora, folder, settings)], settings, report)
    with _reproducible(settings.threads):
        return export(folder, settings, partial(report, "export"))


Job = Callable[[Report], None]


def run_jobs(jobs: list[Job], settings: Settings, report: Report) -> None:
    """Run `jobs`, which do not depend on each other, in `settings.workers` processes of one thread each.

    These networks are so small that two threads spend much of their time waiting for each other: two jobs side by side
    are faster than one after the other on two threads. The bits do not depend on the number of workers.
    """
    if settings.workers == 1:
        for job in jobs:
            _run_alone(job, report)
        return
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(settings.workers, mp_context=context) as pool:
        queue = manager.Queue()
        pending = [pool.submit(_run_alone, job, partial(_send, queue)) for job in jobs]
        try:
            while not all(future.done() for future in pending) or not queue.empty():
                with suppress(Empty):
                    report(*queue.get(timeout=0.5))
                for future in pending:
                    if future.done():
                        future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _send(queue: "Queue[tuple[str, int, int, str]]", stage: str, done: int, planned: int, line: str) -> None:
    queue.put((stage, done, planned, line))


def _run_alone(job: Job, report: Report) -> None:
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    with _reproducible(1):
        job(report)


@contextmanager
def _reproducible(threads: int) -> Iterator[None]:
    """Deterministic algorithms on so many threads: how a sum is split between threads decides its last bits."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])
