"""The file that `deradiff examine` writes, as later runs read it: an anchor's kind, and what it was found with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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

    @property
    def known(self) -> KnownCharacter:
        """What verdicts go by."""
        return KnownCharacter(Character(self.kind, self.why), self.examined)


@dataclass(frozen=True)
class KnownCharacter:
    """A character that belongs to the models at hand."""

    character: Character
    examined: Examined

    def remark(self, scheduler: str | None, guidance_scale: float | None) -> str:
        """What has to be said of a run that is sampled otherwise, in words; "" for one that is not.

        None is what the pipeline itself has, where that is not known.
        """
        was = self.examined
        differing = []
        if scheduler != was.scheduler:
            differing.append(f"with {was.scheduler}, this run with {scheduler or OWN}")
        if guidance_scale != was.guidance_scale:
            differing.append(f"at guidance {_plain(was.guidance_scale)}, this run at {_plain(guidance_scale)}")
        return f"the anchor was examined {' and '.join(differing)}" if differing else ""

    def said(self, kind: str, words: str, scheduler: str | None, guidance_scale: float | None) -> str:
        """A verdict's words with that remark; of one model alone, which goes by no character, without."""
        remark = "" if kind == "exact" else self.remark(scheduler, guidance_scale)
        return f"{words} ({remark})" if remark else words


OWN = "the pipeline's own"


def _plain(scale: float | None) -> str:
    return OWN if scale is None else format(scale, "g")


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
        OSError: a model that is not here and whose hub cannot be reached.
        ValueError: it is no such file, or that of other weights.
    """
    known = read_character(file)
    named = {"reference": (reference, revision), "anchor": (anchor, anchor_revision)}
    present = {name: (source, fingerprint(source, at)["sha256"]) for name, (source, at) in named.items()}
    return belonging(known, file, present)


def read_character(file: str | Path) -> CharacterFile:
    """What `file` holds, whatever models it is of. Raises `FileNotFoundError`, and `ValueError` for another file."""
    return read(CharacterFile, Path(file), WHAT, CURE)


def belonging(known: CharacterFile, file: str | Path, present: Mapping[str, tuple[str, str]]) -> KnownCharacter:
    """The character that `file` holds, if it is that of the models present.

    `present` has the source and the hash of the weights (`fingerprint`) of the "reference" and of the "anchor". Raises
    `ValueError` where the file is of other weights.
    """
    for name, (source, sha256) in present.items():
        examined = known.sha256.get(name, "")
        if sha256 != examined:
            was = known.reference if name == "reference" else known.anchor
            raise ValueError(
                f"{file} is the character of other weights: the {name} {source} has the hash {sha256[:12]}, and that "
                f"of {was}, which was examined, {examined[:12] or 'none'}; {CURE}"
            )
    return known.known
