"""Who does the work: this process, several processes, or Ray's actors; and how tasks are handed to them."""

from __future__ import annotations

import logging
import multiprocessing
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from deradiff.experiments.plan import Plan
from deradiff.experiments.worker import Done, Task, Worker
from deradiff.jobs import end_with_parent

TRIES = 3
"""How often a task may take its worker down with it."""

IN_FLIGHT = 2
"""Tasks that a worker has at a time: the next one waits for it, instead of it for the next one."""


class WorkerLost(RuntimeError):
    """A worker ended before its task did."""


@dataclass
class Todo:
    """A task that is made when a worker is there for it, since the images to be scored need not all be in memory."""

    group: Any
    make: Callable[[], Task]
    tries: int = 0


@runtime_checkable
class Crew(Protocol):
    """Workers, by number."""

    size: int

    def submit(self, worker: int, task: Task) -> Any:
        """Give a worker a task; returns what `wait` and `result` know it by."""
        ...

    def wait(self, pending: Collection[Any]) -> Any:
        """One of them that is done."""
        ...

    def result(self, ticket: Any) -> Done:
        """What became of it. Raises `WorkerLost` if its worker ended, and has put another in its place."""
        ...

    def close(self) -> None:
        """End the workers."""
        ...


def work(todos: Sequence[Todo], crew: Crew) -> Iterator[tuple[Task, Done]]:
    """Have all tasks done, and yield each as it is. Those of a worker that died are done again, by another.

    Raises `WorkerLost` for a task that took `TRIES` workers with it, and whatever a task raised.
    """
    queue = _Queue(todos)
    idle = [worker for worker in range(crew.size) for _ in range(IN_FLIGHT)]
    last: dict[int, Any] = {}
    busy: dict[Any, tuple[int, Todo, Task]] = {}
    while busy or queue:
        while idle and queue:
            worker = idle.pop(0)
            todo = queue.take(last.get(worker), [last[other] for other in last if other != worker])
            last[worker] = todo.group
            task = todo.make()
            busy[crew.submit(worker, task)] = worker, todo, task
        ticket = crew.wait(busy.keys())
        worker, todo, task = busy.pop(ticket)
        idle.append(worker)
        try:
            done = crew.result(ticket)
        except WorkerLost as error:
            todo.tries += 1
            if todo.tries == TRIES:
                raise WorkerLost(f"{error}; the same work has now ended {TRIES} workers") from None
            queue.put_back(todo)
            continue
        yield task, done


class _Queue:
    """Tasks by group. A worker is given those of the group that it has the models of, then of one that nobody has."""

    def __init__(self, todos: Sequence[Todo]) -> None:
        self._groups: dict[Any, deque[Todo]] = {}
        for todo in todos:
            self._groups.setdefault(todo.group, deque()).append(todo)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def take(self, mine: Any, others: Collection[Any]) -> Todo:
        """The next task for a worker that has done `mine`, while the others are at `others`."""
        group = mine
        if group not in self._groups:
            free = [name for name in self._groups if name not in others]
            group = free[0] if free else max(self._groups, key=lambda name: len(self._groups[name]))
        todo = self._groups[group].popleft()
        if not self._groups[group]:
            del self._groups[group]
        return todo

    def put_back(self, todo: Todo) -> None:
        self._groups.setdefault(todo.group, deque()).appendleft(todo)


class Here:
    """This process."""

    size = 1

    def __init__(self, plan: Plan, device: str, threads: int) -> None:
        self._worker = Worker(plan, device, threads)
        self._tasks: dict[int, Task] = {}
        self._count = 0

    def submit(self, worker: int, task: Task) -> int:
        """Give a worker a task."""
        self._count += 1
        self._tasks[self._count] = task
        return self._count

    def wait(self, pending: Collection[int]) -> int:
        """One that is done."""
        return min(pending)

    def result(self, ticket: int) -> Done:
        """What became of it."""
        return self._worker.do(self._tasks.pop(ticket))

    def close(self) -> None:
        """End the workers."""
        self._worker.release()


class Processes:
    """Processes of this machine, each a pool of its own: so a task can be meant for one of them."""

    def __init__(self, plan: Plan, device: str, threads: int, size: int) -> None:
        self.size = size
        self._made_of = plan, device, threads
        self._pools = [self._pool() for _ in range(size)]
        self._owners: dict[Future[Done], int] = {}

    def _pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=self._made_of)

    def submit(self, worker: int, task: Task) -> Future[Done]:
        """Give a worker a task."""
        try:
            future = self._pools[worker].submit(_do, task)
        except BrokenProcessPool:
            self._pools[worker] = self._pool()
            future = self._pools[worker].submit(_do, task)
        self._owners[future] = worker
        return future

    def wait(self, pending: Collection[Future[Done]]) -> Future[Done]:
        """One that is done."""
        return next(iter(wait(pending, return_when=FIRST_COMPLETED).done))

    def result(self, ticket: Future[Done]) -> Done:
        """What became of it."""
        worker = self._owners.pop(ticket)
        try:
            return ticket.result()
        except BrokenProcessPool:
            raise WorkerLost(f"worker {worker} ended before its work did (killed, or out of memory)") from None

    def close(self) -> None:
        """End the workers."""
        for pool in self._pools:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: Worker | None = None


def _begin(plan: Plan, device: str, threads: int) -> None:
    global _worker
    end_with_parent()
    _worker = Worker(plan, device, threads, alone=True)


def _do(task: Task) -> Done:
    assert _worker is not None
    return _worker.do(task)


class OnRay:
    """Actors of a Ray cluster, `gpus` of a GPU each. Raises `ImportError` where Ray is not installed."""

    def __init__(self, plan: Plan, device: str, threads: int, size: int, gpus: float, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise ImportError("running on Ray needs the ray extra: pip install 'deradiff[ray]'") from None
        self.size = size
        self._ray: Any = ray
        self._ours = not self._ray.is_initialized()
        if self._ours:
            own: dict[str, Any] = {} if address else {"num_cpus": size * threads, "include_dashboard": False}
            self._ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **own)
        self._kind = self._ray.remote(num_cpus=threads if not gpus else 1, num_gpus=gpus)(Worker)
        self._made_of = plan, device, threads, True
        self._actors = [self._kind.remote(*self._made_of) for _ in range(size)]
        self._owners: dict[Any, tuple[int, Any]] = {}

    def submit(self, worker: int, task: Task) -> Any:
        """Give a worker a task."""
        actor = self._actors[worker]
        ticket = actor.do.remote(task)
        self._owners[ticket] = worker, actor
        return ticket

    def wait(self, pending: Collection[Any]) -> Any:
        """One that is done."""
        return self._ray.wait(list(pending), num_returns=1)[0][0]

    def result(self, ticket: Any) -> Done:
        """What became of it."""
        worker, actor = self._owners.pop(ticket)
        try:
            return self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            if self._actors[worker] is actor:
                self._actors[worker] = self._kind.remote(*self._made_of)
            raise WorkerLost(
                f"worker {worker} of the cluster was lost ({' '.join(str(error).split())[:200]})"
            ) from None

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()
