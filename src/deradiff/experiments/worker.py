"""What a worker does: it draws batches of images and scores stored ones. Plain data goes in and comes out."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image, PngImagePlugin

from deradiff.experiments.drawings import group_of, kind_of
from deradiff.experiments.plan import Plan
from deradiff.files.images import read_rgb
from deradiff.files.records import CHUNK
from deradiff.sampling.pictures import NotFinite
from deradiff.sampling.truncation import cuts
from deradiff.sweep.batches import attempts
from deradiff.sweep.description import Drawing, call_of, metadata
from deradiff.sweep.jobs import reproducible
from deradiff.sweep.library_messages import relay
from deradiff.sweep.prompt_embeddings import Remembering


@dataclass(frozen=True)
class Draw:
    """Draw a batch; of its images, those in `wanted` (places) are kept."""

    number: int
    drawings: tuple[Drawing, ...]
    wanted: tuple[int, ...]

    @property
    def group(self) -> Any:
        """Tasks of one group need the same models."""
        return group_of(self.drawings[0])


@dataclass(frozen=True)
class Score:
    """Score images, PNG files, by one scorer: a reward for the table `scores`, an extractor for `features`."""

    table: str
    name: str
    images: tuple[bytes, ...]
    prompts: tuple[str, ...]
    token: Any = None
    """What the driver recognises the images by; workers have no use for it."""

    @property
    def group(self) -> Any:
        """Tasks of one group need the same model."""
        return self.table, self.name


Task = Draw | Score

Attempt = tuple[Image.Image | FloatingPointError, dict[str, Any]]
"""An image, or why it is none, and what is known about it."""


@dataclass(frozen=True)
class Done:
    """What became of a task: of `Draw` (PNG file, diagnostics) for each wanted image, of `Score` (value, error).

    Where an image is none, there is no file, and the diagnostics have the reason: `blacked_out`, or `failed` in words.
    """

    results: list[Any]
    seconds: float
    """In the models and scorers alone."""
    warned: tuple[tuple[str, type[Warning]], ...] = ()
    """What was warned of in a process of its own, each line once, and its category."""


@dataclass
class Worker:
    """Holds the pipeline, the anchors of the present group and the scorers that it has needed so far."""

    plan: Plan
    device: str = "cpu"
    threads: int = 1
    alone: bool = False
    """Whether it has its process to itself: what the libraries warn of there is part of its results."""
    _warned: list[tuple[str, type[Warning]]] = field(default_factory=list, repr=False)
    _held: ExitStack = field(default_factory=ExitStack, repr=False)
    _now: Any = None
    _pipes: dict[str, tuple[Any, Any]] = field(default_factory=dict, repr=False)
    """Each pipeline, and the scheduler that it came with."""
    _scorers: dict[Any, Any] = field(default_factory=dict, repr=False)
    _dial: Any = None

    def __post_init__(self) -> None:
        if self.alone:
            relay(lambda line, category: self._warned.append((line, category or UserWarning)))

    def do(self, task: Task) -> Done:
        """Do a task. Raises what the models raise; a scorer's failures are part of its result."""
        with self._fixed():
            began = time.perf_counter()
            results = self._draw(task) if isinstance(task, Draw) else self._score(task)
            warned = tuple(self._warned)
            self._warned.clear()
            return Done(results, time.perf_counter() - began, warned)

    def pid(self) -> int:
        """The process that this worker is in."""
        return os.getpid()

    def release(self) -> None:
        """Give the pipeline back as it was."""
        self._held.close()
        self._now = self._dial = None

    @contextmanager
    def _fixed(self) -> Iterator[None]:
        """On a CPU the number of threads decides the last bits of sums."""
        if self.device == "cpu":
            with reproducible(self.threads):
                yield
        else:
            yield

    # -- drawing ------------------------------------------------------------------------------------------------------

    def _draw(self, task: Draw) -> list[tuple[bytes | None, dict[str, Any]]]:
        attempts = self._attempts(task.drawings)
        return [_result(*attempts[place], task.drawings[place]) for place in task.wanted]

    def _attempts(self, drawings: Sequence[Drawing]) -> list[Attempt]:
        """Images, or why they are none. Where a batch fails as a whole, each is drawn alone, to find out which."""
        try:
            guided = drawings[0].reward_guidance is not None
            return self._guided(drawings) if guided else self._realigned(drawings)
        except FloatingPointError as error:
            if len(drawings) == 1:
                return [(_named(error, drawings[0]), {})]
        return [attempt for drawing in drawings for attempt in self._attempts([drawing])]

    def _realigned(self, drawings: Sequence[Drawing]) -> list[Attempt]:
        pipe = self._pipe(drawings[0])
        size = self.plan.batch_size if drawings[0].particles else len(drawings)
        tried = {attempt.place: attempt for attempt in attempts(pipe, self._dial, drawings, batch_size=size)}
        return [(tried[place].image, tried[place].diagnostics.stored()) for place in range(len(drawings))]

    def _guided(self, drawings: Sequence[Drawing]) -> list[Attempt]:
        from deradiff.alignment.base import stable_diffusion
        from deradiff.experiments import reward_drawing

        first, guidance = drawings[0], drawings[0].reward_guidance
        assert guidance is not None
        base = stable_diffusion(self._pipe(first), "guidance by a reward")
        reward = self._scorer("scores", guidance.reward)
        scale = guidance.guidance_scale
        if scale is None:
            scale = call_of(first.sampling, self.plan.reference).get("guidance_scale") or 1.0
        drawn = reward_drawing.draw(base, drawings, reward, scale, self.plan.batch_size)
        images = _pictures(torch.stack([image for image, _ in drawn]))
        return [
            (image, known | _cut(base.pipe, [drawing.prompt]))
            for image, (_, known), drawing in zip(images, drawn, drawings, strict=True)
        ]

    def _pipe(self, drawing: Drawing) -> Any:
        """The pipeline with its scheduler, the anchors of this group on the dial; those of the last are let go."""
        key = group_of(drawing)
        if self._now != key:
            self._held.close()
            self._held, self._now, self._dial = ExitStack(), key, None
        guidance = drawing.reward_guidance
        source = (guidance.pipeline if guidance else None) or self.plan.reference
        if source not in self._pipes:
            pipe = self._loaded(source)
            self._pipes[source] = pipe, pipe.scheduler
        pipe, own = self._pipes[source]
        if self._dial is None and guidance is None:
            self._take(pipe, own, drawing)
        return pipe

    def _loaded(self, source: str) -> Any:
        from deradiff.sweep.pipelines import DTYPES, load_pipeline

        pipe: Any = load_pipeline(
            source,
            dtype=DTYPES[self.plan.dtype],
            revision=self.plan.revision if source == self.plan.reference else None,
            allow_pickle=self.plan.allow_pickle,
        ).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.encode_prompt = Remembering(pipe.encode_prompt)
        return pipe

    def _take(self, pipe: Any, own: Any, drawing: Drawing) -> None:
        """Put the group's scheduler and anchors on the pipeline."""
        from deradiff.sampling.realignment import realign
        from deradiff.sweep.pipelines import anchor_source, scheduler_like

        name = drawing.sampling.scheduler
        pipe.scheduler = type(own).from_config(own.config) if name is None else scheduler_like(own, name)
        if not drawing.anchors:
            return
        sources = zip(drawing.anchors, drawing.sources, strict=True)
        anchors = {name: anchor_source(source) for (name, _), source in sources}
        self._dial = self._held.enter_context(
            realign(
                pipe,
                anchors,
                dict.fromkeys(anchors, 1.0),
                method=drawing.method,
                allow_pickle=self.plan.allow_pickle,
            )
        )
        self._dial.watching = self.plan.path_kl and kind_of(drawing) == "mixture"

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _score(self, task: Score) -> list[tuple[Any, str | None]]:
        """Values and errors of the images. What fails in a batch is tried image by image, to find out which it is."""
        if not task.images:
            return []
        scorer = self._scorer(task.table, task.name)
        try:
            return [(value, None) for value in self._values(scorer, task, range(len(task.images)))]
        except Exception:
            return [self._alone(scorer, task, row) for row in range(len(task.images))]

    def _alone(self, scorer: Any, task: Score, row: int) -> tuple[Any, str | None]:
        try:
            return self._values(scorer, task, [row])[0], None
        except Exception as error:
            return None, f"{type(error).__name__}: {' '.join(str(error).split())}"

    @torch.no_grad()
    def _values(self, scorer: Any, task: Score, rows: Sequence[int]) -> list[Any]:
        images = torch.stack([_pixels(task.images[row]) for row in rows]).to(self.device)
        if task.table == "features":
            vectors = scorer(images).float().cpu().numpy()
            if not np.isfinite(vectors).all():
                raise ValueError("a feature is not finite")
            return list(vectors)
        scores = scorer(images, [task.prompts[row] for row in rows]).double().cpu().tolist()
        if not np.isfinite(scores).all():
            raise ValueError("the score is not finite")
        return list(scores)

    def _scorer(self, table: str, name: str) -> Any:
        if (table, name) not in self._scorers:
            where = import_module("deradiff.measures.features" if table == "features" else "deradiff.rewards")
            self._scorers[table, name] = where.load(name, device=self.device)
        return self._scorers[table, name]


def _cut(pipe: Any, prompts: Sequence[str | None]) -> dict[str, Any]:
    """What these prompts lost to the pipeline's tokenizers, if anything."""
    lost = [cut.record() for cut in cuts(pipe, prompts)]
    return {"cut_prompts": lost} if lost else {}


def _named(error: FloatingPointError, drawing: Drawing) -> FloatingPointError:
    """The same error, with the image that it is about."""
    if repr(drawing.prompt) in str(error):
        return error
    name = f"the image of {drawing.prompt!r} with seed {drawing.seed}"
    return error.of(name) if isinstance(error, NotFinite) else FloatingPointError(f"{name}: {error}")


def _result(
    image: Image.Image | FloatingPointError, diagnostics: dict[str, Any], drawing: Drawing
) -> tuple[bytes | None, dict[str, Any]]:
    if isinstance(image, FloatingPointError):
        return None, diagnostics | {"failed": " ".join(str(image).split())}
    if diagnostics.get("blacked_out"):  # nobody is to take it for a picture
        return None, diagnostics
    return _png(image, drawing), diagnostics


def _png(image: Image.Image, drawing: Drawing) -> bytes:
    """A PNG file that carries what decided it. Nothing in it depends on when or where it was drawn."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, json.dumps(metadata(drawing), ensure_ascii=False, sort_keys=True))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _pixels(png: bytes) -> torch.Tensor:
    return torch.from_numpy(np.asarray(read_rgb(png), dtype=np.float32) / 255).permute(2, 0, 1)


def _pictures(images: torch.Tensor) -> list[Image.Image]:
    levels = images.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(level) for level in levels]
