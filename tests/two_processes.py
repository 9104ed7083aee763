"""A script run by two processes on the CPU, as `accelerate launch` runs one on two GPUs."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

BEGINS = f"""
import sys
from dataclasses import replace
from pathlib import Path
import torch
from accelerate import Accelerator
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parent / "alignment")!r}]
torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
"""


def run_by_two(script: str, folder: Path) -> Any:
    """What `script` leaves in `result`, of the first process. It finds `accelerator` and, in `folder`, its folder."""
    file, out = folder / "two.py", folder / "result.pt"
    ends = f"\nif accelerator.is_main_process:\n    torch.save(result, {str(out)!r})\n"
    file.write_text(f"{BEGINS}folder = Path({str(folder)!r})\n{script}{ends}")
    # For processors alone `accelerate launch` would want MPI.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(file)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out, weights_only=True)
