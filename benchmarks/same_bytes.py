"""Does this version draw and train what 0.1 did, to the byte? python benchmarks/same_bytes.py

It runs the commands of tests/data/written_by_0_1/README.md again, with one thread, and compares the SHA-256 of every
picture's pixels and of all weights with those of 0.1's (`hashes.json` there, made on the same kind of machine: another
processor or another torch may round otherwise). Some minutes.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from recording import keep_parts

WRITTEN = Path(__file__).parents[1] / "tests/data/written_by_0_1"
DIGITS = ["generate", "digits", "-a", "digits:100", "-p", "a red seven"]
ALIGN = ["align", "digits", "--cpu", "--held-out", "4", "--batch", "4"]
COMMANDS = {
    "generate": [*DIGITS, "-p", "a blue two", "--seed", "0:1", "--lam", "0,0.5,1.5", "--steps", "4"],
    "annealed": [
        *[
            "generate",
            "digits",
            "-a",
            "style=digits:30",
            "-a",
            "healthy=digits:1000",
            "-p",
            "a red seven",
            "--seed",
            "3",
        ],
        *["--lam", "style=0.4,healthy=0.3", "--scheduler", "euler-a", "--steps", "4", "--schedule", "power:2"],
    ],
    "blended": [*DIGITS, "--seed", "0", "--lam", "0.5", "--method", "interpolate", "--steps", "4"],
    "experiment": ["experiment", "run", str(WRITTEN / "plan.yaml"), "--device", "cpu"],
    "aligned": [*ALIGN, "--beta", "500", "--count", "24", "--steps", "6"],
    "aligned-rwr": [
        *[*ALIGN, "--method", "rwr", "--beta", "0.5", "--per-prompt", "2", "--reward", "ink"],
        *["--count", "12", "--steps", "2", "--sampling-steps", "4"],
    ],
    "baked": [
        *["bake", "digits", "--anchor", "digits:30", "--lam", "0.5", "--method", "distill", "--images", "0"],
        *["--samples", "32", "--train-steps", "3", "--batch", "4", "--steps", "3"],
    ],
}


def hashes(folder: Path) -> dict[str, str]:
    """Every picture's pixels and every file of weights below `folder`, hashed, by their paths in it."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".png":
            with Image.open(path) as image:
                found[path.relative_to(folder).as_posix()] = hashlib.sha256(image.tobytes()).hexdigest()
        elif path.name in ("pytorch_lora_weights.safetensors", "diffusion_pytorch_model.safetensors"):
            found[path.relative_to(folder).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def main() -> None:
    """Run every command and compare."""
    then, single = json.loads((WRITTEN / "hashes.json").read_text()), {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in COMMANDS.items():
            out = Path(folder) / name
            subprocess.run(
                [sys.executable, "-m", "deradiff", *words, "--out", str(out)],
                env=os.environ | single,
                check=True,
                stdout=subprocess.DEVNULL,
                cwd=folder,
            )
            now = hashes(out)
            same = sum(now.get(path) == known for path, known in then[name].items())
            rows[name] = {"files": len(then[name]), "same bytes": same}
            print(f"{name:<12} {same} of {len(then[name])} pictures and weights are the same")
    keep_parts([("same bytes as 0.1", rows)], Path(__file__).with_suffix(".json"))


if __name__ == "__main__":
    main()
