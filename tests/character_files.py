"""Files as `deradiff examine` writes them, of a kind that a test chooses."""

from pathlib import Path
from typing import Any

from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.sweep.fingerprints import fingerprint

EXAMINED = {"scheduler": "DDPMScheduler", "guidance_scale": 1.0, "steps": 25}


def character_file(path: Path, kind: str, anchor: str = "digits:100", **changes: Any) -> Path:
    """The character of an anchor of the digits."""
    hashes = {"reference": fingerprint("digits")["sha256"], "anchor": fingerprint(anchor)["sha256"]}
    known = {"kind": kind, "why": "of the test", "reference": "digits", "anchor": anchor, "sha256": hashes}
    write_json(path, known | {"examined": EXAMINED, "versions": versions()} | changes)
    return path
