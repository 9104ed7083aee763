"""Whoever waits says so, and gives up; whoever works is left to it."""

import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from deradiff.alignment import processes
from deradiff.cli import app
from deradiff.experiments import executors
from deradiff.experiments.drawings import drawing_of
from deradiff.experiments.worker import Draw
from deradiff.files import waiting
from deradiff.files.waiting import Patience, WaitedTooLong, announced, bound
from deradiff.sweep import jobs
from deradiff.sweep.workers import StartingWorkers, Todo, work
from messages import naming
from small_experiment import SMALL, small

attack = pytest.mark.attack("waiting without a word")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second until it is said, two until it is given up."""
    monkeypatch.setenv(waiting.BOUND, "2")
    monkeypatch.setattr(waiting, "AFTER", 0.5)


@attack
def test_it_is_said_once_and_then_given_up(caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience("a cup of tea", lambda: "the kettle is cold", after=0.02, most=0.2)
    patience.check()
    assert not caplog.messages
    with pytest.raises(WaitedTooLong, match=rf"a cup of tea.*the kettle is cold.*{waiting.BOUND}"):
        while True:
            patience.check()
            time.sleep(0.01)
    assert len(caplog.messages) == 1 and "a cup of tea" in caplog.text and "the kettle is cold" in caplog.text


@attack
def test_what_others_work_at_meanwhile_is_said_and_not_given_up(caplog: pytest.LogCaptureFixture) -> None:
    patience = Patience("a cup of tea", after=0.0, most=0.0)
    patience.remind()
    patience.remind()
    assert len(caplog.messages) == 1


@attack
def test_a_call_of_another_library_is_announced_when_it_is_late(caplog: pytest.LogCaptureFixture) -> None:
    with announced("the ferry", after=60):
        pass
    assert not caplog.messages
    with announced("the ferry", lambda: "the tide is out", after=0.0):
        until = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.005)
    assert "the ferry" in caplog.text and "the tide is out" in caplog.text


@attack
@pytest.mark.parametrize("text", ["soon", "0", "-3", "nan"])
def test_a_bound_that_is_none_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.BOUND, text)
    with pytest.raises(ValueError, match=naming(waiting.BOUND, f"'{text}'")):
        bound()


@pytest.mark.parametrize(("text", "seconds"), [("", waiting.MOST), ("7.5", 7.5), ("inf", float("inf"))])
def test_the_environment_says_how_long(text: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(waiting.BOUND, text)
    assert bound() == seconds


# -- processes ---------------------------------------------------------------------------------------------------------


def never(*_: Any) -> None:
    time.sleep(600)


@attack
def test_processes_that_do_not_come_up_are_given_up(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_begin", never)
    with pytest.raises(WaitedTooLong, match=naming("2 worker processes", "load")):
        jobs.run_jobs([never, never], 2, lambda *_: None)


@attack
def test_a_worker_that_does_not_come_up_is_given_up(impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "_begin", never)
    plan = small()
    task = Draw(0, (drawing_of(plan, plan.arms()[0], "the digit one", 0),), (0,))
    executor = executors.processes(plan, "cpu", 1, 1)
    try:
        with pytest.raises(WaitedTooLong, match="1 worker process"):
            list(work([Todo("a", lambda: task)], executor))
    finally:
        executor.close()


@attack
def test_work_that_is_long_is_not_waiting(impatient: None, caplog: pytest.LogCaptureFixture) -> None:
    beginning = StartingWorkers("actor", "actors", lambda: "none is free")
    until = time.monotonic() + 3
    while time.monotonic() < until:  # one works, the other has not come up
        beginning.look([1], [0, 1])
        time.sleep(0.05)
    assert caplog.text.count("none is free") == 1
    beginning.look([], [0, 1])
    beginning.look([1], [1])  # a successor, whom nobody has waited for yet
    with pytest.raises(WaitedTooLong, match="1 actor"):
        while True:
            beginning.look([1], [1])
            time.sleep(0.05)


# -- Ray ---------------------------------------------------------------------------------------------------------------


@attack
def test_a_cluster_that_is_not_there_is_named(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(SMALL))
    result = CliRunner().invoke(
        app, ["experiment", "run", str(plan), "--out", str(tmp_path / "x"), "--ray-address", "127.0.0.1:1"]
    )
    assert result.exit_code == 2 and "127.0.0.1:1" in result.output, result.output


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one processor."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield ray
    ray.shutdown()


@attack
def test_actors_that_no_room_is_found_for_are_given_up(cluster: Any, impatient: None) -> None:
    plan = small()
    executor = executors.RayActors(plan, "cpu", 2, 1, 0.0, None)
    task = Draw(0, (drawing_of(plan, plan.arms()[0], "the digit one", 0),), (0,))
    try:
        with pytest.raises(WaitedTooLong, match=naming("2 CPU", "1 CPU", "1 free", "--workers")):
            list(work([Todo("a", lambda: task)], executor))
    finally:
        executor.close()
    assert cluster.is_initialized()  # it is not ours to end


# -- processes that train together -------------------------------------------------------------------------------------

TOGETHER = """
from torch import distributed
from deradiff.alignment import processes
meeting = processes.meet()
distributed.init_process_group("gloo")
distributed.barrier()
print("together", distributed.get_world_size())
"""


def rank(number: int, port: int) -> dict[str, str]:
    """What the environment of a process of two holds."""
    return {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@attack
@pytest.mark.parametrize("number", [0, 1])
def test_processes_that_never_begin_are_given_up(number: int, impatient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in rank(number, port).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(WaitedTooLong, match=naming(2, f"127.0.0.1:{port}", f"number {number}")):
        processes.meet()


def test_processes_that_begin_work_together() -> None:
    port = free_port()
    begun = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER], env=os.environ | rank(number, port), stdout=subprocess.PIPE, text=True
        )
        for number in (0, 1)
    ]
    assert [process.communicate(timeout=280)[0].strip() for process in begun] == ["together 2"] * 2


def test_a_process_alone_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert processes.meet() is None
