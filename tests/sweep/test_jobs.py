"""Jobs in processes: all done, progress in one place, errors passed on, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from deradiff.sweep.jobs import Report, run_jobs


def touch(folder: Path, number: int, report: Report) -> None:
    (folder / str(number)).write_text(str(os.getpid()))
    report("touching", number, 3, "done")


def fail(report: Report) -> None:
    raise ValueError("this one cannot")


@pytest.mark.parametrize("workers", [1, 2])
def test_all_jobs_are_done_and_reported(tmp_path: Path, workers: int) -> None:
    seen: list[int] = []
    run_jobs([partial(touch, tmp_path, i) for i in range(3)], workers, lambda _, done, __, ___: seen.append(done))
    assert sorted(seen) == [0, 1, 2] and {path.name for path in tmp_path.iterdir()} == {"0", "1", "2"}
    alone = {path.read_text() for path in tmp_path.iterdir()} == {str(os.getpid())}
    assert alone == (workers == 1)


def test_the_error_of_a_job_is_raised() -> None:
    with pytest.raises(ValueError, match="this one cannot"):
        run_jobs([fail], 2, lambda *_: None)


def die_once(folder: Path, report: Report) -> None:
    if not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "done").touch()


def test_a_job_whose_process_was_killed_is_begun_again(tmp_path: Path) -> None:
    run_jobs([partial(die_once, tmp_path)], 2, lambda *_: None)
    assert {path.name for path in tmp_path.iterdir()} == {"died", "done"}


DRIVER = """
import os, sys, time
from functools import partial
from pathlib import Path
from deradiff.sweep.jobs import run_jobs

def wait(folder, number, report):
    (Path(folder) / str(number)).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    run_jobs([partial(wait, sys.argv[1], i) for i in range(2)], 2, lambda *_: None)
"""


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_leave_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script, folder = tmp_path / "driver.py", tmp_path / "pids"
    script.write_text(DRIVER)
    folder.mkdir()
    driver = subprocess.Popen([sys.executable, str(script), str(folder)])
    deadline = time.monotonic() + 200
    while len(list(folder.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    pids = [int(path.read_text()) for path in folder.iterdir()]
    assert len(pids) == 2 and all(map(alive, pids))
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(map(alive, pids))
