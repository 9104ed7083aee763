"""Every test class in a process of its own, with limits of time and of memory, a few at once."""

from __future__ import annotations

import faulthandler
import multiprocessing
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from results import CHECKS, Result
from trial import name_of, try_class


@dataclass(frozen=True)
class Limits:
    """What one test class may take."""

    seconds: float
    gigabytes: float


def run_all(
    classes: Sequence[Any], folder: Path, limits: Limits, jobs: int, on_result: Callable[[Result], None]
) -> None:
    """Try all classes; each result lies in `folder` as JSON, and is handed to `on_result` when it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running = list(classes), list[_Child]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_Child(waiting.pop(0), folder, limits))
            time.sleep(0.05)
            for child in [child for child in running if child.is_over()]:
                running.remove(child)
                on_result(child.result())
    finally:
        for child in running:
            child.process.kill()


class _Child:
    """One test class in its process, a fork: what was imported need not be again."""

    def __init__(self, test_class: Any, folder: Path, limits: Limits):
        self.test_class, self.limits = test_class, limits
        self.file = folder / f"{name_of(test_class)}.json"
        self.log = self.file.with_suffix(".log")
        self.file.unlink(missing_ok=True)
        fork = multiprocessing.get_context("fork")
        self.process: BaseProcess = fork.Process(target=_in_child, args=(test_class, self.file, self.log, limits))
        self.process.start()
        self.began = time.monotonic()
        self.late = False

    def is_over(self) -> bool:
        """Whether it has ended; ends it where its time is over."""
        if self.process.is_alive() and time.monotonic() > self.began + self.limits.seconds:
            self.late = True
            self.process.kill()
        if self.process.is_alive():
            return False
        self.process.join()
        return True

    def result(self) -> Result:
        """What it has written, and why it ended early if it did."""
        name, pipeline = name_of(self.test_class), self.test_class.pipeline_class.__name__
        result = Result.load(self.file) if self.file.exists() else Result(name, pipeline)
        if self.late or self.process.exitcode:
            at = next((check for check in CHECKS if check not in result.checks), None)
            where = f" in {at}" if result.checks and at else ""
            why = f"{self.limits.seconds:g} s were over" if self.late else f"its process died ({self._death()})"
            result.stopped = f"{why}{where}"
            result.seconds = round(time.monotonic() - self.began, 1)
            result.save(self.file)
        else:
            self.log.unlink(missing_ok=True)
        return result

    def _death(self) -> str:
        code = self.process.exitcode or 0
        return f"signal {-code}, memory perhaps" if code < 0 else f"exit status {code}"


def _in_child(test_class: Any, file: Path, log: Path, limits: Limits) -> None:
    stack = log.open("w")
    faulthandler.enable(stack)
    faulthandler.dump_traceback_later(max(limits.seconds - 2, 1), file=stack)
    memory = int(limits.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    try_class(test_class, file)
    faulthandler.cancel_dump_traceback_later()
