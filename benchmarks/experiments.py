"""What running an experiment costs beside its models, what killing it leaves, and what a second worker is worth.

    python benchmarks/experiments.py [overhead] [kills] [ray]

Each part writes its numbers into `benchmarks/experiments.json`. They need an idle machine with two processors.

- overhead: the share of a run on the digits in which the workers compute nothing, start-up of the workers apart.
- kills: a run that is killed with SIGKILL at 20 random moments, against one that is not: the same items, each once, the
  same bytes.
- ray: the same work by one and by two Ray workers on a CPU, each timed once its workers have loaded their models.
"""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from recording import keep_parts

from deradiff.experiments import crews, running
from deradiff.experiments.plan import Plan, parse_plan, write_plan

OUT = Path(__file__).with_suffix(".json")


def plan(prompts: int, seeds: int) -> Plan:
    """Anchors, targets, annealing and scores on the digits, in so many images of each."""
    return parse_plan(
        {
            "name": "benchmark",
            "reference": "digits",
            "models": {f"beta-{b}": {"source": f"digits:{b}", "beta": b, "family": "dpo"} for b in (30, 250)},
            "prompts": {"digits": {"source": "digits", "count": prompts, "seeds": f"0:{seeds - 1}"}},
            "sampling": {"ancestral": {"scheduler": "euler-a", "steps": 25, "guidance_scale": 1.0}},
            "methods": [
                {"method": "reference"},
                {"method": "model"},
                {"method": "realign", "targets": "all"},
                {"method": "anneal", "anchors": ["beta-30"], "schedules": ["power:2"]},
            ],
            "scores": ["digits", "legible"],
            "features": ["digits"],
            "batch_size": 32,
        },
        "the benchmark",
    )


def overhead(folder: Path) -> dict[str, Any]:
    """One process, one thread: what is not spent in models and scorers."""
    small = plan(16, 2)
    running.run(small, folder / "warm", lambda: crews.Here(small, "cpu", 1), lambda *_: None)
    shares = []
    for number in range(3):
        found = running.run(small, folder / f"{number}", lambda: crews.Here(small, "cpu", 1), lambda *_: None)
        shares.append(found.overhead)
    images = found.drawn
    return {"images": images, "share": median(shares), "shares": shares}


def contents(folder: Path) -> tuple[dict[str, str], list[tuple[Any, ...]]]:
    """Every file of an experiment by its hash, and the rows of its store that a repetition must give again."""
    files = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "images").rglob("*"))
        if path.is_file()
    }
    with sqlite3.connect(folder / "store.sqlite") as db:
        rows = list(db.execute("SELECT id, sha256, batch, place FROM items ORDER BY id"))
        rows += list(db.execute("SELECT item, name, value FROM scores ORDER BY item, name"))
    return files, rows


def kills(folder: Path) -> dict[str, Any]:
    """Twenty moments, from start-up to where a quarter of an unbroken run would be done.

    A run goes on where it was killed, so twenty later moments would find it finished before they come.
    """
    file = folder / "plan.yaml"
    file.write_text(write_plan(plan(16, 4)))

    def command(out: Path) -> list[str]:
        return [sys.executable, "-m", "deradiff", "experiment", "run", str(file), "--out", str(out), "--workers", "1"]

    began = time.monotonic()
    subprocess.run(command(folder / "whole"), check=True, capture_output=True)
    whole = time.monotonic() - began
    chance, killed, moments = random.Random(0), 0, []
    for _ in range(20):
        process = subprocess.Popen(command(folder / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        moments.append(chance.uniform(0, whole / 4))
        time.sleep(moments[-1])
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    subprocess.run(command(folder / "killed"), check=True, capture_output=True)
    files, rows = contents(folder / "killed")
    expected_files, expected_rows = contents(folder / "whole")
    return {
        "seconds_unbroken": whole,
        "moments": moments,
        "killed_while_running": killed,
        "images": len(files),
        "same_files_and_bytes": files == expected_files,
        "same_items_and_scores": rows == expected_rows,
    }


def ray(folder: Path) -> dict[str, Any]:
    """Images per second with one and with two workers, three times each in turn."""
    small = plan(16, 2)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(3):
        for size in rates:
            rates[size].append(_rate(small, folder / f"{number}-{size}", size))
    speedups = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    return {"images_per_second": rates, "speedup": median(speedups), "speedups": speedups}


def _rate(small: Plan, folder: Path, size: int) -> float:
    """From the first batch that is done to the last image: until then workers start and load."""
    times: list[tuple[float, int]] = []

    def report(stage: str, done: int, *_: Any) -> None:
        if stage == "drawing" and done:
            times.append((time.perf_counter(), done))

    running.run(small, folder, lambda: crews.OnRay(small, "cpu", 1, size, 0.0, None), report)
    # Every worker has its models once it has done a batch.
    (start, first), (end, last) = times[size - 1], times[-1]
    return (last - first) / (end - start)


def parts(asked: list[str]) -> Iterator[tuple[str, Any]]:
    """The parts that were asked for; all by default."""
    known = {"overhead": overhead, "kills": kills, "ray": ray}
    for name in asked or known:
        with tempfile.TemporaryDirectory() as folder:
            yield name, known[name](Path(folder))


if __name__ == "__main__":
    keep_parts(parts(sys.argv[1:]), OUT)
