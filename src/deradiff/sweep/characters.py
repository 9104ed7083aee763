"""The file that `deradiff examine` writes, as later runs read it: an anchor's kind, and what it was found with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.algorithm.characters import Character, CharacterKind
from deradiff.files.reading import Record, read
from deradiff.sweep.fingerprints import fingerprint

WHAT, CURE = "record of an examined anchor", "examine the anchor again (deradiff examine)"


class Examined(Record):
    """How an anchor was sampled when it was examined."""

    scheduler: str
    guidance_scale: float | None
    steps: int


class CharacterFile(Record):
    """What later runs need of the file; the tests' numbers stand beside it."""

    kind: CharacterKind
    why: str
    reference: str
    anchor: str
    sha256: dict[str, str]
    """Of the weights: `reference` and `anchor`."""
    examined: Examined
    versions: dict[str, str]


@dataclass(frozen=True)
class KnownCharacter:
    """A character that belongs to the models at hand."""

    character: Character
    examined: Examined

    def remark(self, scheduler: str, guidance_scale: float | None) -> str:
        """What has to be said of a run that is sampled otherwise, in words; "" for one that is not."""
        was = self.examined
        differing = []
        if scheduler != was.scheduler:
            differing.append(f"with {was.scheduler}, this run with {scheduler}")
        if guidance_scale != was.guidance_scale:
            differing.append(f"at guidance {_plain(was.guidance_scale)}, this run at {_plain(guidance_scale)}")
        return f"the anchor was examined {' and '.join(differing)}" if differing else ""

    def said_of(self, verdict: Mapping[str, Any], scheduler: str, guidance_scale: float | None) -> dict[str, Any]:
        """A verdict's record with that remark in its words."""
        remark = self.remark(scheduler, guidance_scale)
        return dict(verdict) | ({"words": f"{verdict['words']} ({remark})"} if remark else {})


def _plain(scale: float | None) -> str:
    return "unknown" if scale is None else format(scale, "g")


def load_character(
    file: str | Path, reference: str, anchor: str, *, revision: str | None = None, anchor_revision: str | None = None
) -> KnownCharacter:
    """The character in `file`, if it is that of these models.

    Args:
        file: written by `deradiff examine`.
        reference: a folder, a hub id or a world, as on the command line.
        anchor: likewise.
        revision: of the reference on the hub.
        anchor_revision: of the anchor.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or that of other weights.
    """
    known = read(CharacterFile, Path(file), WHAT, CURE)
    for name, source, at in (("reference", reference, revision), ("anchor", anchor, anchor_revision)):
        present, examined = fingerprint(source, at)["sha256"], known.sha256.get(name, "")
        if present != examined:
            was = known.reference if name == "reference" else known.anchor
            raise ValueError(
                f"{file} is the character of other weights: the {name} {source} has the hash {present[:12]}, and that "
                f"of {was}, which was examined, {examined[:12] or 'none'}; {CURE}"
            )
    return KnownCharacter(Character(known.kind, known.why), known.examined)
