"""What the measures cost at the size of published FIDs, and how exact FID is: python benchmarks/measures.py

Two sets of 10,000 images with 2,048 features each, random and correlated, as many as Inception's `pool3` has; features
are given, so no network is timed. The Fréchet distance is compared with the formula written out on float64 covariances
with SciPy's matrix square root, also where there are fewer images than features. Times are of one run each, in seconds
of this machine, with two threads where nothing else is said. Processor seconds stand beside them, and the load average
of the minute before: on a machine that does other things at the same time two threads also wait for each other, which
both clocks count, so the processor seconds of one thread say best what the computation takes. The result goes to
benchmarks/measures.json.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.measures import frechet_distance, precision_and_recall, spectral_distance

IMAGES, FEATURES, FEW, THREADS = 10_000, 2_048, 500, 2
FID_SECONDS, FID_AGREEMENT = 20.0, 1e-6


def sets(images: int) -> tuple[Tensor, Tensor]:
    """Two sets whose variances fall off from axis to axis, as features' do, along axes of their own."""
    random = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(FEATURES, FEATURES, generator=random)).Q
    scales = torch.arange(1, FEATURES + 1) ** -0.5
    first = torch.randn(images, FEATURES, generator=random) * scales
    second = torch.randn(images, FEATURES, generator=random) * (0.9 * scales) @ axes + 0.01
    return first, second


def by_matrix_root(first: Tensor, second: Tensor) -> float:
    x, y = first.double().numpy(), second.double().numpy()
    covariances = [np.cov(each, rowvar=False) for each in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return float((np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)).real)


@dataclass(frozen=True)
class Seconds:
    """Of a clock on the wall, and of the processor, all threads together."""

    wall: float
    processor: float


def timed(work: Callable[[], Any]) -> tuple[Any, Seconds]:
    start, busy = time.perf_counter(), time.process_time()
    found = work()
    return found, Seconds(time.perf_counter() - start, time.process_time() - busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    load, (first, second) = os.getloadavg()[0], sets(IMAGES)
    seconds: dict[str, Seconds] = {}
    for threads in (1, THREADS):
        torch.set_num_threads(threads)
        found, seconds[f"Fréchet distance, threads: {threads}"] = timed(lambda: frechet_distance(first, second))
    _, seconds["SCD and LSCD"] = timed(lambda: spectral_distance(first, second))
    _, seconds["precision and recall, k = 10"] = timed(lambda: precision_and_recall(first, second))
    expected, seconds["Fréchet distance by SciPy's matrix root"] = timed(lambda: by_matrix_root(first, second))
    few = first[:FEW], second[:FEW]
    few_found, seconds[f"Fréchet distance, 2 x {FEW} images"] = timed(lambda: frechet_distance(*few))
    errors = {
        f"2 x {IMAGES} images": abs(found.value / expected - 1),
        f"2 x {FEW} images": abs(few_found.value / by_matrix_root(*few) - 1),
    }
    is_fast = {what: each.wall <= FID_SECONDS for what, each in seconds.items() if "threads:" in what}
    table = Table("what", "seconds", "of the processor")
    for what, each in seconds.items():
        table.add_row(what, f"{each.wall:.2f}", f"{each.processor:.2f}")
    Console().print(table)
    for what, error in errors.items():
        print(f"Fréchet distance against SciPy's matrix root, {what}: relative error {error:.1e}")
    settings = {
        "images": [IMAGES, IMAGES],
        "features": FEATURES,
        "threads": THREADS,
        "load average before": load,
        "versions": versions() | {"scipy": scipy.__version__},
    }
    goals = {
        f"at most {FID_SECONDS:g} seconds": is_fast,
        f"relative errors at most {FID_AGREEMENT:g}": max(errors.values()) <= FID_AGREEMENT,
    }
    times = {what: asdict(each) for what, each in seconds.items()}
    write_json(options.out, settings | {"seconds": times, "relative errors": errors, "goals": goals})
    print(options.out)


if __name__ == "__main__":
    main()
