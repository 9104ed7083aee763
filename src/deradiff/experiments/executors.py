"""Who does the work of an experiment: this process, several processes, or Ray's actors."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Collection
from contextlib import suppress
from typing import Any

from deradiff.experiments.plan import Plan
from deradiff.experiments.worker import Done, Task, Worker
from deradiff.files.waiting import AFTER, LOOK, announced
from deradiff.sweep.workers import Processes, StartingWorkers, WorkerLost, load


class InProcess:
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


def processes(plan: Plan, device: str, threads: int, size: int) -> Processes:
    """So many processes of this machine."""
    return Processes(size, _do, _begin, plan, device, threads)


def local(plan: Plan, device: str, threads: int, size: int) -> InProcess | Processes:
    """So many workers on this machine; a single one is this process."""
    return InProcess(plan, device, threads) if size == 1 else processes(plan, device, threads, size)


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


class RayActors:
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
        self._starting = StartingWorkers("Ray actor", "Ray actors", self._lacking)
        for worker in range(size):
            self._start(worker)

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

    def _start(self, worker: int) -> None:
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
            self._starting.look(self._late, needed)
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
                self._start(worker)
            raise WorkerLost(
                f"worker {worker} of the cluster was lost ({' '.join(str(error).split())[:200]})"
            ) from None

    def close(self) -> None:
        """End the workers."""
        for actor in self._actors.values():
            self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()
