"""What running an experiment costs beside its models, and what a second worker is worth.

    python benchmarks/experiments.py [overhead] [ray]

Each part writes its numbers into `benchmarks/experiments.json`. They need an idle machine with two processors.

- overhead: the share of a run on the digits in which the workers compute nothing, start-up of the workers apart.
- ray: the same work by one and by two Ray workers on a CPU, each timed once its workers have loaded their models.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from recording import keep_parts

from deradiff.experiments import executors, running
from deradiff.experiments.plan import Plan, parse_plan

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
    running.run(small, folder / "warm", lambda: executors.InProcess(small, "cpu", 1), lambda *_: None)
    shares = []
    for number in range(3):
        found = running.run(small, folder / f"{number}", lambda: executors.InProcess(small, "cpu", 1), lambda *_: None)
        shares.append(found.overhead)
    images = found.drawn
    return {"images": images, "share": median(shares), "shares": shares}


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

    running.run(small, folder, lambda: executors.RayActors(small, "cpu", 1, size, 0.0, None), report)
    # Every worker has its models once it has done a batch.
    (start, first), (end, last) = times[size - 1], times[-1]
    return (last - first) / (end - start)


def parts(asked: list[str]) -> Iterator[tuple[str, Any]]:
    """The parts that were asked for; all by default."""
    known = {"overhead": overhead, "ray": ray}
    for name in asked or known:
        with tempfile.TemporaryDirectory() as folder:
            yield name, known[name](Path(folder))


if __name__ == "__main__":
    keep_parts(parts(sys.argv[1:]), OUT)
