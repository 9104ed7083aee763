"""What must not go wrong for anybody, tried: a table of every kind, and how many of it held.

    python benchmarks/attack.py [kinds] [servers] [files] [kills]

By default the first three, which take less than ten minutes on two processors; kills take longer. Each part writes its
numbers into `benchmarks/attack.json`. Traffic goes to this machine alone, and every loop has an end.

- kinds: every test that is marked `attack(kind)`, by its kind.
- servers: what a visitor waits for while others hold silent connections.
- files: files of ours, changed at random and read back by what a command reads them with.
- kills: SIGKILL in the middle of training, drawing and distilling, and whether the end tells.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import attack_files
import attack_kills
import attack_servers
import pytest
from recording import keep_parts

OUT = Path(__file__).with_suffix(".json")
TESTS = Path(__file__).parent.parent / "tests"


def kinds(folder: Path) -> dict[str, Any]:
    """The marked tests by kind, which `tests/conftest.py` has them tell: tried, held, skipped."""
    began, results = time.monotonic(), folder / "results.xml"
    how = ["-m", "attack", "--all-cases", "-n", "2", "--dist", "loadfile", "-q", "--tb=short"]
    status = subprocess.run(
        [sys.executable, "-m", "pytest", str(TESTS), *how, f"--basetemp={folder / 'tests'}", f"--junitxml={results}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).returncode
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {status!r}")
    counts: dict[str, Counter[str]] = {}
    for test in ElementTree.parse(results).iter("testcase"):
        told = {one.get("name"): one.get("value") for one in test.iter("property")}
        outcome = next((tag for tag in ("failure", "error", "skipped") if test.find(tag) is not None), "held")
        counts.setdefault(str(told.get("attack", "not told")), Counter())[outcome] += 1
    rows = {}
    for kind, count in sorted(counts.items()):
        tried = count.total() - count["skipped"]
        rows[kind] = {"tried": tried, "held": count["held"], "skipped": count["skipped"]}
        print(f"{kind:<50} {count['held']:>5} of {tried} held, {count['skipped']} skipped")
    return {"kinds": rows, "seconds": time.monotonic() - began}


def servers(folder: Path) -> dict[str, Any]:
    """600 silent sockets at each server, and the seconds that a visitor's page takes meanwhile."""
    return {kind: attack_servers.silent_sockets(kind) for kind in ("studio", "study")}


def files(folder: Path) -> dict[str, Any]:
    """10,000 changed files over all kinds, and the tracebacks that they gave."""
    began, tallies = time.monotonic(), attack_files.fuzz(10_000)
    rows = {
        # The errors by their last lines: the others name the folders of this machine.
        kind: vars(tally) | {"tracebacks": [text.strip().rpartition("\n")[2] for text in tally.tracebacks]}
        for kind, tally in tallies.items()
    }
    total = {
        "files": sum(tally.files for tally in tallies.values()),
        "tracebacks": sum(len(tally.tracebacks) for tally in tallies.values()),
    }
    return total | {"kinds": rows, "seconds": time.monotonic() - began}


def kills(folder: Path) -> dict[str, Any]:
    """20 of `align`, 20 of `experiment` with two workers, 10 of `bake`."""
    works = {"align": (attack_kills.align(), 20), "experiment": (attack_kills.experiment(folder), 20)}
    works["bake"] = attack_kills.bake(), 10
    return {name: attack_kills.kills(work, folder / name, count) for name, (work, count) in works.items()}


PARTS = {"kinds": kinds, "servers": servers, "files": files, "kills": kills}


def parts(asked: list[str]) -> Iterator[tuple[str, Any]]:
    """The parts that were asked for."""
    for name in asked or ("kinds", "servers", "files"):
        with tempfile.TemporaryDirectory() as folder:
            yield name, PARTS[name](Path(folder))


if __name__ == "__main__":
    keep_parts(parts(sys.argv[1:]), OUT)
