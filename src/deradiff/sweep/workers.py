"""Workers by number, and tasks handed to them so that each keeps its models; processes of this machine as workers."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any, Protocol, runtime_checkable

from deradiff.files.waiting import LOOK, Patience

TRIES = 3
"""How often a task may take its worker down with it."""

IN_FLIGHT = 2
"""Tasks that a worker has at a time: the next one waits for it, instead of it for the next one."""


class WorkerLost(RuntimeError):
    """A worker ended before its task did."""


@dataclass
class Todo:
    """A task that is made when a worker is there for it, since what it holds need not all be in memory."""

    group: Any
    """Tasks of one group need the same models."""
    make: Callable[[], Any]
    tries: int = 0


@runtime_checkable
class Executor(Protocol):
    """Workers, by number."""

    size: int

    def submit(self, worker: int, task: Any) -> Any:
        """Give a worker a task; returns what `wait` and `result` know it by."""
        ...

    def wait(self, pending: Collection[Any]) -> Any:
        """One of them that is done. Raises `WaitedTooLong` where none of their workers comes up to begin with."""
        ...

    def result(self, ticket: Any) -> Any:
        """What became of it. Raises `WorkerLost` if its worker ended, and has put another in its place."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def work(todos: Sequence[Todo], executor: Executor, in_flight: int = IN_FLIGHT) -> Iterator[tuple[Any, Any]]:
    """Have all tasks done, and yield each with its result as it is. Those of a worker that died are done by another.

    Raises `WorkerLost` for a task that took `TRIES` workers with it, and whatever a task raised.
    """
    queue = _Queue(todos)
    idle = [worker for worker in range(executor.size) for _ in range(in_flight)]
    last: dict[int, Any] = {}
    busy: dict[Any, tuple[int, Todo, Any]] = {}
    while busy or queue:
        while idle and queue:
            worker = idle.pop(0)
            todo = queue.take(last.get(worker), [last[other] for other in last if other != worker])
            last[worker] = todo.group
            task = todo.make()
            busy[executor.submit(worker, task)] = worker, todo, task
        ticket = executor.wait(busy.keys())
        worker, todo, task = busy.pop(ticket)
        idle.append(worker)
        try:
            result = executor.result(ticket)
        except WorkerLost as error:
            todo.tries += 1
            if todo.tries == TRIES:
                raise WorkerLost(f"{error}; the same work has now ended {TRIES} workers") from None
            queue.put_back(todo)
            continue
        yield task, result


class _Queue:
    """Tasks by group. A worker is given those of the group that it has the models of, then of one that nobody has."""

    def __init__(self, todos: Sequence[Todo]) -> None:
        self._groups: dict[Any, deque[Todo]] = {}
        for todo in todos:
            self._groups.setdefault(todo.group, deque()).append(todo)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, last: Any, others: Collection[Any]) -> Todo:
        """The next task for a worker whose `last` group is this, while the others are at `others`."""
        group = last
        if group not in self._groups:
            free = [name for name in self._groups if name not in others]
            group = free[0] if free else max(self._groups, key=lambda name: len(self._groups[name]))
        todo = self._groups[group].popleft()
        if not self._groups[group]:
            del self._groups[group]
        return todo

    def put_back(self, todo: Todo) -> None:
        self._groups.setdefault(todo.group, deque()).appendleft(todo)


class StartingWorkers:
    """The patience with workers that have not come up yet. As long as others work meanwhile, none is given up.

    `kind` and `kinds` are what one and several are called; `lacking` says why they may not come up.
    """

    def __init__(self, kind: str, kinds: str, lacking: Callable[[], str]) -> None:
        self._kind, self._kinds, self._lacking = kind, kinds, lacking
        self._patience: Patience | None = None

    def look(self, late: Collection[int], needed: Collection[int]) -> None:
        """`late` are the workers that have not come up, `needed` those whose work is waited for.

        Raises `WaitedTooLong`.
        """
        if not late:
            self._patience = None
            return
        if self._patience is None:
            kind = self._kinds if len(late) > 1 else self._kind
            self._patience = Patience(f"{len(late)} {kind} to come up", self._lacking)
        if set(needed) <= set(late):
            self._patience.check()
        else:
            self._patience.remind()


# -- processes of this machine ----------------------------------------------------------------------------------------


class Processes(AbstractContextManager["Processes"]):
    """Processes that import anew instead of inheriting locks, and end with their parent.

    Args:
        size: how many.
        do: is called there with every task, and returns its result.
        begin: is called with `arguments` in each of them first.
        meanwhile: is called here, time and again, while tasks are waited for.
    """

    def __init__(
        self,
        size: int,
        do: Callable[..., Any],
        begin: Callable[..., object],
        *arguments: Any,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        self.size = size
        self._do, self._begin, self._arguments, self._meanwhile = do, begin, arguments, meanwhile
        # Each a pool of its own, so that a task can be meant for one of them, and one that died be replaced alone.
        self._pools = [self._pool() for _ in range(size)]
        self._owners: dict[Future[Any], int] = {}
        self._starting = StartingWorkers("worker process", "worker processes", load)

    def _pool(self) -> _PoolOfOne:
        return _PoolOfOne(self._begin, self._arguments)

    def submit(self, worker: int, task: Any) -> Future[Any]:
        """Give a worker a task."""
        try:
            future = self._pools[worker].submit(self._do, task)
        except BrokenProcessPool:
            self._pools[worker] = self._pool()
            future = self._pools[worker].submit(self._do, task)
        self._owners[future] = worker
        return future

    def wait(self, pending: Collection[Future[Any]]) -> Future[Any]:
        """One that is done. Raises `WaitedTooLong`."""
        needed = {self._owners[ticket] for ticket in pending}
        while not (done := wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED).done):
            self._meanwhile()
            self._starting.look([worker for worker in needed if not self._pools[worker].begun], needed)
        self._meanwhile()
        return next(iter(done))

    def result(self, ticket: Future[Any]) -> Any:
        """What became of it. Raises `WorkerLost`, and what the task raised."""
        worker = self._owners.pop(ticket)
        try:
            return ticket.result()
        except BrokenProcessPool:
            raise WorkerLost(f"worker {worker} ended before its work did (killed, or out of memory)") from None

    def close(self) -> None:
        """End them: one that works after its task, one that has not come up at once. What waits is not begun."""
        for ticket in self._owners:
            ticket.cancel()
        for pool in self._pools:
            pool.close()

    def __exit__(self, *raised: object) -> None:
        self.close()


class _PoolOfOne(ProcessPoolExecutor):
    """A process, which is started by its first task."""

    def __init__(self, begin: Callable[..., object], arguments: tuple[Any, ...]) -> None:
        context = multiprocessing.get_context("spawn")
        self._begun = context.Event()
        super().__init__(1, context, _come_up, (self._begun, begin, arguments))

    @property
    def begun(self) -> bool:
        """Whether it has come up: before that it is waited for, then it works."""
        return self._begun.is_set()

    def close(self) -> None:
        """End it."""
        if not self.begun:
            for process in list((self._processes or {}).values()):
                process.kill()
        self.shutdown(wait=True, cancel_futures=True)


def _come_up(begun: Event, begin: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    end_with_parent()
    begin(*arguments)
    begun.set()


def end_with_parent() -> None:
    """End this process when its parent does. A worker would else finish its job, for hours, and for nobody."""
    parent = multiprocessing.parent_process()

    def leave() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=leave, daemon=True).start()


def load() -> str:
    """How busy this machine is, in words."""
    busy = f"load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown load"
    return f"this machine has {cores()} processors, {busy}"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
