"""Where images are asked for: a page's job, its turn, the models, the drawing; and the files that come of it."""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from deradiff import rewards
from deradiff.files.records import write_png
from deradiff.sampling.dial import Dial
from deradiff.servers.gate import without_values
from deradiff.studio import drawing
from deradiff.studio.drawing import DrawnImage, StepReport
from deradiff.studio.examined_anchors import ExaminedAnchors
from deradiff.studio.jobs import PageJob, Pages, Turns, streamed
from deradiff.studio.models import LoadedModels
from deradiff.sweep.characters import KnownCharacter
from deradiff.sweep.settings import Settings
from deradiff.worlds import find

log = logging.getLogger(__name__)

MOST_FILES = 400
"""Images whose files are kept for downloading; the oldest goes first."""

REST = 0.3
"""Seconds that a dial rests before the exact image is begun."""


class Waiting(NamedTuple):
    """How many images of other pages come first."""

    ahead: int


class Loading(NamedTuple):
    """Models are being loaded."""

    reference: str


class UnscoredImages(NamedTuple):
    """The images, while the rewards still look at them."""

    images: list[DrawnImage]


class Desk:
    """Draws for every page, one image at a time."""

    def __init__(
        self, models: LoadedModels, scored_by: Sequence[str] = (), examined: ExaminedAnchors | None = None
    ) -> None:
        self.models, self._examined = models, examined
        self.pages, self.turns = Pages(), Turns()
        self._scored_by = tuple(scored_by)
        self._rewards: dict[str, rewards.PictureReward] = {}
        self._scoring = threading.Lock()
        self.folder = Path(mkdtemp(prefix="deradiff-studio-"))
        self._files: list[Path] = []
        self._warming = PageJob()
        self._warmer: threading.Thread | None = None

    def close(self) -> None:
        """Stop what is being drawn, and delete the files."""
        self.pages.cancel_all()
        self._warming.stop("left")
        if self._warmer is not None:
            self._warmer.join(30)  # a thread of torch's that outlives its process ends it with an error
        shutil.rmtree(self.folder, ignore_errors=True)

    def drawn(
        self,
        page: str,
        settings: Settings,
        *,
        preview: bool = False,
        rest: float = 0.0,
        kind: str = "image",
        goes_on: bool = False,
    ) -> Iterator[Waiting | Loading | StepReport | UnscoredImages | list[DrawnImage]]:
        """Draw `settings` for a page, in place of what it waited for of that `kind`; the images come last.

        The work is begun after `rest` seconds; `goes_on` is of `jobs.Pages.begin`. Raises `jobs.Cancelled`,
        `jobs.QueueFull`, what loading and sampling raise, and `MemoryError` that says what to lower.
        """
        job = self.pages.begin(page, kind, goes_on)

        def work(report: Callable[[Any], None]) -> list[DrawnImage]:
            job.rest(rest)
            with self._models_for(settings, job, report) as (own, pipe, dial):
                images = drawing.draw(own, pipe, dial, job, report, preview, self.character(own))
                warned = self.models.warned(own.reference)
            images = [replace(drawn, warned=(*warned, *drawn.warned)) for drawn in images]
            if preview:
                return images
            report(UnscoredImages(images))
            return self._scored(images)

        return streamed(work, job)

    def judged(self, page: str, settings: Settings) -> Iterator[Waiting | Loading | StepReport | list[str]]:
        """How far the page's image can be trusted, in words (`drawing.judged`); they come last. Raises as `drawn`."""
        job = self.pages.begin(page, "judge")

        def work(report: Callable[[Any], None]) -> list[str]:
            judges = self._judges(settings)
            with self._models_for(settings, job, report) as (own, pipe, dial):
                return drawing.judged(own, pipe, dial, job, report, judges, self.character(own))

        return streamed(work, job)

    def character(self, settings: Settings) -> KnownCharacter | None:
        """What kind of anchor the image of `settings` is of, where the studio was told."""
        return None if self._examined is None else self._examined.of(settings)

    def loaded(self, page: str, settings: Settings) -> Iterator[Waiting | Loading | None]:
        """Load the models of `settings` for a page; None comes last. Raises as `drawn`."""
        job = self.pages.begin(page, "load")

        def work(report: Callable[[Any], None]) -> None:
            with self._models_for(settings, job, report):
                pass

        return streamed(work, job)

    def warm_up(self, settings: Settings) -> threading.Thread:
        """Load what `settings` need and make ready what is slow at first; what fails is told to the page that asks."""

        def work() -> None:
            job, small = self._warming, settings.model_copy(update={"steps": 2})
            with suppress(Exception):
                with self._models_for(small, job, lambda _: None) as (own, pipe, dial):
                    images = drawing.draw(own, pipe, dial, job, lambda _: None)
                self._scored(images)

        self._warmer = threading.Thread(target=work, name="studio-warm-up", daemon=True)
        self._warmer.start()
        return self._warmer

    @contextmanager
    def _models_for(
        self, settings: Settings, job: PageJob, report: Callable[[Any], None]
    ) -> Iterator[tuple[Settings, DiffusionPipeline, Dial]]:
        """Hold the models of `settings`, in turn; with them come the settings on this machine.

        Where memory runs out, what can be is let go, and `MemoryError` says what to lower.
        """
        with self.turns.taken(job, lambda ahead: report(Waiting(ahead))):
            if settings.reference not in self.models.references:
                report(Loading(settings.reference))
            own = settings.model_copy(update=asdict(self.models.machine))
            try:
                yield own, *self.models.realigned(own)
            except (torch.OutOfMemoryError, MemoryError) as error:
                self.models.let_go(but=settings.reference)
                raise MemoryError(_lower(own)) from error

    def _judges(self, settings: Settings) -> list[rewards.PictureReward]:
        world = find(settings.reference)
        names = self._scored_by or (world.rewards if world else ())
        with self._scoring:
            for name in names:
                if name not in self._rewards:
                    self._rewards[name] = rewards.load(name)
            return [self._rewards[name] for name in names]

    def _scored(self, images: list[DrawnImage]) -> list[DrawnImage]:
        """The images with their scores; where scoring fails, with words in place of them: the images stand."""
        try:
            judges = self._judges(images[0].settings)
            with self._scoring:
                return drawing.scored(images, judges)
        except (torch.OutOfMemoryError, MemoryError):
            self.models.let_go(but=images[0].settings.reference)
            reason = "none: out of memory while scoring. Lower the width and the height, or ask for fewer rewards"
        except Exception as error:
            log.error("an image could not be scored: %s", without_values(error))
            reason = f"none: {' '.join(str(error).split()) or type(error).__name__}"
        return [replace(drawn, scores={"scores": reason}) for drawn in images]

    def save(self, name: str, image: Image.Image, record: dict[str, Any]) -> Path:
        """An image as a PNG file that holds its record, under that name."""
        folder = self.folder / secrets.token_hex(8)
        folder.mkdir()
        file = folder / name
        write_png(file, image, record)
        self._files.append(file)
        while len(self._files) > MOST_FILES:
            shutil.rmtree(self._files.pop(0).parent, ignore_errors=True)
        return file


def _lower(settings: Settings) -> str:
    """What to do where memory runs out, for what was asked."""
    pieces = ["lower the width and the height"]
    if len(settings.columns) > 1:
        pieces.append("ask for fewer λ at once")
    if len(settings.anchors) > 1:
        pieces.append("take fewer anchors")
    if not settings.offload:
        pieces.append("open the studio with --offload")
    return f"out of memory; the studio goes on, with what it had. To have this image, {_either(pieces)}"


def _either(pieces: Sequence[str]) -> str:
    *most, last = pieces
    return " or ".join([", ".join(most), last]) if most else last
