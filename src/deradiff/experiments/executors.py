"""Who does the work: this process, several processes, or Ray's actors; and how tasks are handed to them."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from deradiff.experiments.plan import Plan
from deradiff.experiments.worker import Done, Task, Worker
from deradiff.files.waiting import AFTER, LOOK, Patience, announced
from deradiff.sweep.jobs import Pool, load

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
        """One of them that is done. Raises `WaitedTooLong` where none of their workers comes up to begin with."""
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


class _Beginning:
    """The patience with workers that have not come up yet. As long as others work meanwhile, none is given up."""

    def __init__(self, kind: str, lacking: Callable[[], str]) -> None:
        self._kind, self._lacking = kind, lacking
        self._patience: Patience | None = None

    def look(self, late: Collection[int], needed: Collection[int]) -> None:
        """`late` are the workers that have not come up, `needed` those whose work is waited for."""
        if not late:
            self._patience = None
            return
        if self._patience is None:
            self._patience = Patience(f"{len(late)} {self._kind}", self._lacking)
        if set(needed) <= set(late):
            self._patience.check()
        else:
            self._patience.remind()


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
        self._beginning = _Beginning("worker process(es) to come up", load)

    def _pool(self) -> Pool:
        return Pool(1, _begin, *self._made_of)

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
        """One that is done. Raises `WaitedTooLong`."""
        needed = {self._owners[ticket] for ticket in pending}
        while not (done := wait(pending, timeout=LOOK, return_when=FIRST_COMPLETED).done):
            self._beginning.look([worker for worker in needed if not self._pools[worker].begun], needed)
        return next(iter(done))

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
            pool.close()


_worker: Worker | None = None


def _begin(plan: Plan, device: str, threads: int) -> None:
    global _worker
    _worker = Worker(plan, device, threads, alone=True)


def _do(task: Task) -> Done:
    assert _worker is not None
    return _worker.do(task)


def _require_listening(address: str) -> None:
    """Raise `ConnectionError` where nobody listens at HOST:PORT, which Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "/" in host:
        return  # such as auto
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=AFTER).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"there is no Ray cluster at {address} ({error}): start one, or name another") from None


class OnRay:
    """Actors of a Ray cluster, `gpus` of a GPU each.

    Raises `ImportError` where Ray is not installed, `ConnectionError` where there is no cluster at `address`.
    """

    def __init__(self, plan: Plan, device: str, threads: int, size: int, gpus: float, address: str | None) -> None:
        try:
            import ray
        except ImportError:
            raise ImportError("running on Ray needs the ray extra: pip install 'deradiff[ray]'") from None
        self.size = size
        self._ray: Any = ray
        self._ours = not self._ray.is_initialized()
        if self._ours:
            self._connect(address, size * threads)
        self._needs = {"CPU": threads if not gpus else 1, "GPU": gpus}
        self._kind = self._ray.remote(num_cpus=self._needs["CPU"], num_gpus=gpus)(Worker)
        self._made_of = plan, device, threads, True
        self._actors: dict[int, Any] = {}
        self._late: dict[int, Any] = {}
        self._owners: dict[Any, tuple[int, Any]] = {}
        self._beginning = _Beginning("Ray actor(s) to come up", self._lacking)
        for worker in range(size):
            self._hire(worker)

    def _connect(self, address: str | None, cpus: int) -> None:
        own: dict[str, Any] = {} if address else {"num_cpus": cpus, "include_dashboard": False}
        if address:
            _require_listening(address)
        else:
            # Ray's workers have the lowest priority but four, which is kind to who shares a cluster: on a machine that
            # is busy otherwise they get a thirtieth of a processor, and this cluster nobody shares.
            os.environ.setdefault("RAY_worker_niceness", "0")
        with announced(f"the Ray cluster at {address}" if address else "a Ray cluster to start on this machine", load):
            self._ray.init(address=address or "local", logging_level=logging.ERROR, log_to_driver=False, **own)

    def _hire(self, worker: int) -> None:
        """Put a new actor in this place; it is late until it answers for the first time."""
        self._actors[worker] = self._kind.remote(*self._made_of)
        self._late[worker] = self._actors[worker].pid.remote()

    def submit(self, worker: int, task: Task) -> Any:
        """Give a worker a task."""
        actor = self._actors[worker]
        ticket = actor.do.remote(task)
        self._owners[ticket] = worker, actor
        return ticket

    def wait(self, pending: Collection[Any]) -> Any:
        """One that is done. Raises `WaitedTooLong`."""
        needed = {self._owners[ticket][0] for ticket in pending}
        while not (done := self._ray.wait(list(pending), num_returns=1, timeout=LOOK)[0]):
            for worker, answer in list(self._late.items()):
                if self._ray.wait([answer], timeout=0)[0]:
                    del self._late[worker]
            self._beginning.look(self._late, needed)
        return done[0]

    def _lacking(self) -> str:
        """What the actors need beside what the cluster has."""
        has: dict[str, float] = {}
        free: dict[str, float] = {}
        with suppress(Exception):  # of a cluster that does not answer, which is then what is lacking
            has, free = self._ray.cluster_resources(), self._ray.available_resources()
        each = " and ".join(f"{count:g} {name}" for name, count in self._needs.items() if count)
        cluster = ", ".join(f"{has.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in self._needs)
        enough = all(has.get(name, 0) >= self.size * count for name, count in self._needs.items())
        why = (
            f"they may still be starting ({load()})" if enough else "too little: take fewer --workers, or give it more"
        )
        return f"each of the {self.size} needs {each}; the cluster has {cluster}, {why}"

    def result(self, ticket: Any) -> Done:
        """What became of it."""
        worker, actor = self._owners.pop(ticket)
        try:
            return self._ray.get(ticket)
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            if self._actors[worker] is actor:
                self._hire(worker)
            raise WorkerLost(
                f"worker {worker} of the cluster was lost ({' '.join(str(error).split())[:200]})"
            ) from None

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()
