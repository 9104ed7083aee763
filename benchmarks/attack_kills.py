"""Kills in the middle of work, of which the end must not tell: the same files to the last byte.

Each command is begun, killed with SIGKILL a random moment after it has gone on where the last one ended, begun again,
and so on; in the end it runs to its end and is compared with one that was never killed. `attack.py kills` runs all.
"""

import hashlib
import random
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PATIENCE = 120
"""Seconds until a command that does not get to work has failed."""

# Checkpoints after every step, so that none of the kills is far from one; and one thread, so that sums have one order.
EAGER = """
import sys
from dataclasses import replace
import torch
from deradiff.alignment.presets import PRESETS
from deradiff.baking.distillation import Distillation
from deradiff.cli import app
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
PRESETS["digits"] = replace(PRESETS["digits"], plan=replace(PRESETS["digits"].plan, checkpoint_seconds=0))
plan = Distillation.plan
Distillation.plan = lambda self: replace(plan(self), checkpoint_seconds=0)
app(sys.argv[1:])
"""


@dataclass(frozen=True)
class Work:
    """A command that works in a folder, and how to see it work and what it leaves."""

    words: Callable[[Path], list[str]]
    progress: Callable[[Path], Any]
    """Something that changes whenever the command has done a piece of its work."""
    left: Callable[[Path], Any]

    def begin(self, folder: Path) -> subprocess.Popen[bytes]:
        """Start the command."""
        command = [sys.executable, "-c", EAGER, *self.words(folder)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kills(work: Work, folder: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Kill `work` so often in the middle, then compare what it leaves with what is left without a kill."""
    chance, killed, began = random.Random(seed), 0, time.monotonic()
    _to_its_end(work, folder / "whole")
    for number in range(count):
        before, process = work.progress(folder / "killed"), work.begin(folder / "killed")
        deadline = time.monotonic() + PATIENCE
        while work.progress(folder / "killed") == before:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise AssertionError(f"kill {number}: no work was seen: {process.communicate()[1].decode()[-2000:]}")
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        killed += process.poll() is None
        process.kill()
        process.communicate()
    _to_its_end(work, folder / "killed")
    whole, again = work.left(folder / "whole"), work.left(folder / "killed")
    return {
        "kills": count,
        "killed_while_at_work": killed,
        "files": len(whole),
        "same_files_and_bytes": whole == again,
        "seconds": time.monotonic() - began,
    }


def _to_its_end(work: Work, folder: Path) -> None:
    process = work.begin(folder)
    _, told = process.communicate(timeout=1200)
    if process.returncode:
        raise AssertionError(f"exit status {process.returncode}: {told.decode()[-2000:]}")


def _hashes(folder: Path, *suffixes: str) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes
    }


def _checkpoint(folder: Path) -> str:
    """The newest progress of a training; the folder is away for a moment while the next one takes its place."""
    try:
        return folder.read_text()
    except OSError:
        return ""


def align() -> Work:
    """A LoRA of the digits, killed inside the training."""
    small = "--beta 500 --cpu --count 24 --held-out 4 --steps 300 --batch 4"
    return Work(
        words=lambda out: ["align", "digits", *small.split(), "--out", str(out)],
        progress=lambda out: _checkpoint(out / ".deradiff" / "beta-500-checkpoint" / "progress.json"),
        left=lambda out: _hashes(out / "beta-500", ".safetensors"),
    )


def bake() -> Work:
    """A student of the digits, killed inside the distillation."""
    small = "--lam 0.5 --method distill --images 0 --samples 32 --train-steps 150 --batch 4 --steps 3"
    return Work(
        words=lambda out: ["bake", "digits", "--anchor", "digits:30", *small.split(), "--out", str(out)],
        progress=lambda out: _checkpoint(out / ".deradiff" / "distillation" / "checkpoint" / "progress.json"),
        left=lambda out: _hashes(out, ".safetensors"),
    )


def experiment(folder: Path) -> Work:
    """Images and scores of the digits by two workers, killed while they draw."""
    plan = {
        "name": "killed",
        "reference": "digits",
        "models": {f"beta-{b}": {"source": f"digits:{b}", "beta": b, "family": "dpo"} for b in (30, 250)},
        "prompts": {"digits": {"source": "digits", "count": 16, "seeds": "0:3"}},
        "sampling": {"ancestral": {"scheduler": "euler-a", "steps": 25, "guidance_scale": 1.0}},
        "methods": [{"method": "reference"}, {"method": "model"}, {"method": "realign", "targets": "all"}],
        "scores": ["digits"],
        "batch_size": 4,
    }
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    return Work(
        words=lambda out: ["experiment", "run", str(file), "--out", str(out), "--workers", "2"],
        progress=lambda out: len(list((out / "images").rglob("*.png"))),
        left=lambda out: _hashes(out, ".png") | _rows(out),
    )


def _rows(folder: Path) -> dict[str, str]:
    """Every item and score of a store, without times."""
    db = sqlite3.connect(folder / "store.sqlite")
    items = db.execute("SELECT id, drawing, sha256, told FROM items ORDER BY id").fetchall()
    scores = db.execute("SELECT item, name, sha256, value, error FROM scores ORDER BY item, name").fetchall()
    db.close()
    return {"items": str(items), "scores": str(scores)}
