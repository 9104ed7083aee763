"""Damaged files of every kind that a command reads back: how many are refused in a sentence, and how many are not.

    python benchmarks/attack_files.py [COUNT]

A traceback is an error that a command would let through (`damaging.is_sentence`). The files and their damage are
those of the tests: `tests/written_files.py` and `tests/damaging.py`.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))


@dataclass
class Tally:
    """What became of the damaged files of one kind."""

    files: int = 0
    refused: int = 0
    """With a sentence. The others were still what they should be, or are read no further than to where they differ."""
    tracebacks: list[str] = field(default_factory=list)


def fuzz(count: int = 10_000, seed: int = 0, report: Callable[[str], None] = print) -> dict[str, Tally]:
    """Damage and read `count` files, and say a line of each kind; kinds that take long to read have fewer."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    import written_files

    for logging in (of_diffusers, of_transformers):  # they have much to say of damaged configurations
        logging.set_verbosity(of_transformers.CRITICAL)
        logging.disable_progress_bar()
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = written_files.written(Path(folder))
        weights = sum(file.weight for file in files)
        done = 0
        for i, file in enumerate(files):
            share = round(count * sum(each.weight for each in files[: i + 1]) / weights) - done
            done += share
            tally = tallies[file.kind] = Tally()
            began = time.perf_counter()
            for number in range(share):
                _tried(file, random.Random(f"{seed} {file.kind} {number}"), tally)
            seconds = time.perf_counter() - began
            found = f"{tally.files:5} files, {tally.refused:5} refused, {len(tally.tracebacks)} tracebacks"
            report(f"{file.kind:45} {found}, {seconds:5.1f} s")
    return tallies


def _tried(file: object, choices: random.Random, tally: Tally) -> None:
    import damaging
    from restorable import Written

    assert isinstance(file, Written)
    damaging.damage(file, choices)
    tally.files += 1
    try:
        file.read()
    except Exception as error:
        if damaging.is_sentence(error):
            tally.refused += 1
        else:
            tally.tracebacks.append("".join(traceback.format_exception(error)))
    finally:
        file.restore()


def main() -> None:
    found = fuzz(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
    wrong = [text for tally in found.values() for text in tally.tracebacks]
    print(f"{sum(tally.files for tally in found.values()):,} files, {len(wrong)} tracebacks")
    if wrong:
        print(wrong[0])
        sys.exit(1)


if __name__ == "__main__":
    main()
