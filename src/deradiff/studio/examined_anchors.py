"""What kind of anchor each is that was examined (`deradiff examine`): the studio's verdicts go by it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from deradiff.studio.sources import Sources
from deradiff.sweep.characters import CURE, CharacterFile, KnownCharacter, load_character, read_character
from deradiff.sweep.settings import Settings


class ExaminedAnchors:
    """The characters of the studio's anchors, read once, when it is opened.

    Args:
        files: what `deradiff examine` wrote, at most one of each reference and anchor.
        sources: the models of the studio.
        opened: the models that it opens with, the reference first. A file whose own models are not the studio's, such
            as that of a folder which was moved since, has to be of these.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a model that cannot be read.
        ValueError: it is no such file, or that of other weights; two files are of the same models.
    """

    def __init__(self, files: Iterable[Path], sources: Sources, opened: Sequence[str]) -> None:
        self._known: dict[tuple[str, str], KnownCharacter] = {}
        for file in files:
            models, character = _placed(file, sources, opened)
            if models in self._known:
                raise ValueError(
                    f"{file} is a second character of the anchor {models[1]}: give the file of one examination"
                )
            self._known[models] = character

    def of(self, settings: Settings) -> KnownCharacter | None:
        """The character that verdicts on an image of `settings` go by; a character is one anchor's, never several'."""
        if len(settings.anchors) != 1:
            return None
        (anchor,) = settings.anchors.values()
        return self._known.get((_place(settings.reference), _place(anchor)))


def _placed(file: Path, sources: Sources, opened: Sequence[str]) -> tuple[tuple[str, str], KnownCharacter]:
    """Which of the studio's models a file is of, and their character: the models that it names, or those `opened`."""
    held = read_character(file)
    listed = {*map(_place, sources.references()), *map(_place, sources.anchors())}
    own = _place(held.reference), _place(held.anchor)
    if listed.issuperset(own):
        return own, load_character(file, held.reference, held.anchor)
    reference, *anchors = opened
    for anchor in anchors:
        try:
            return (_place(reference), _place(anchor)), load_character(file, reference, anchor)
        except ValueError:
            if len(anchors) == 1:
                raise
    raise ValueError(_of_no_model(file, held))


def _of_no_model(file: Path, held: CharacterFile) -> str:
    return f"{file} is of the anchor {held.anchor}, which is no model of this studio: name it with --anchor, or {CURE}"


def _place(source: str) -> str:
    """A source by one name, however it is written: the whole path of what lies on this machine."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
