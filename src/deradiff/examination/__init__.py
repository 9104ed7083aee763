"""What kind of anchor is it? Samples at λ from 0 to 1, and preference pairs, of the reference and the anchor alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deradiff.algorithm import pair_terms, tilts
from deradiff.algorithm.characters import STEPWISE_METHODS, Character, character_of
from deradiff.algorithm.pair_terms import PairTest, pair_test
from deradiff.algorithm.tilts import TiltTest, tilt_test
from deradiff.examination.alignments import origin_of
from deradiff.examination.drawing import LAMS, draw
from deradiff.examination.pairs import PAIRS, compared, given, terms_of
from deradiff.files.records import versions
from deradiff.files.writing import write_json
from deradiff.rewards import Reward, load
from deradiff.sweep.alignment_records import Alignment
from deradiff.sweep.batches import default_of
from deradiff.sweep.drawing import realigned
from deradiff.sweep.fingerprints import fingerprint
from deradiff.sweep.pipelines import noisy_scheduler
from deradiff.sweep.settings import Column, Settings
from deradiff.worlds import find

OnProgress = Callable[[int, int], None]
"""Told how much of the work is done, of how much."""

PROMPTS, IMAGES = 12, 24
"""Prompts of a world that ships where none are given, and images of each at every λ."""


@dataclass(frozen=True)
class Examination:
    """What was found: the kind of anchor, and the tests behind it; None for a test that could not be made."""

    character: Character
    tilt: TiltTest | None
    pairs: PairTest | None
    origin: Alignment
    made_of: dict[str, Any]
    """Settings, models with their hashes, sampler and versions."""

    def record(self) -> dict[str, Any]:
        """As JSON: what `load_character` reads, and all numbers."""
        return {
            "kind": self.character.kind,
            "why": self.character.why,
            "words": self.character.words,
            "aligned_by": self.origin.method,
            "beta": self.origin.beta,
            "tilt": None if self.tilt is None else tilts.record(self.tilt),
            "pairs": None if self.pairs is None else pair_terms.record(self.pairs),
            **self.made_of,
        }

    def save(self, file: str | Path) -> None:
        """Write the record to `file`, whole or not at all. Raises `OSError`, and `ValueError` inside a model's folder.

        A file more there would change the hash of the model.
        """
        path = Path(file).resolve()
        for source in (self.made_of["reference"], self.made_of["anchor"]):
            if Path(source).is_dir() and path.is_relative_to(Path(source).resolve()):
                raise ValueError(f"{file} lies in the folder of the model {source}, whose hash it would change")
        write_json(Path(file), self.record())

    def plot(self, file: str | Path) -> None:
        """Draw the tests into a PNG file."""
        from deradiff.examination.figures import draw_examination

        draw_examination(self, Path(file))


def examine(
    reference: str,
    anchor: str | Path,
    *,
    reward: str | Reward | None = None,
    data: str | Path | None = None,
    aligned_by: str | None = None,
    anchor_beta: float | None = None,
    prompts: Sequence[str] = (),
    images: int = IMAGES,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **sampling: Any,
) -> Examination:
    """Find out whether an anchor is a tilt of its reference, stepwise, or neither (see `algorithm.characters`).

    Takes minutes on the digits. Sampling is that of `deradiff examine`: DDPM, or for flows `flow-sde`, 25 steps and no
    guidance, which are what the tests know most about.

    Args:
        reference: a folder, a hub id or `digits`.
        anchor: the aligned model, as on the command line.
        reward: what the anchor was aligned with, by name or as it is; by default that of its `alignment.json`.
        data: preference pairs, as for `deradiff align`; without, pictures of the reference compared by the reward.
        aligned_by: the method (dpo, rwr, draft, ...); by default that of `alignment.json`.
        anchor_beta: β of Diffusion-DPO, which the test on pairs needs; by default that of `alignment.json`.
        prompts: different prompts, three at least; by default those of a world that ships.
        images: of each prompt at every λ, 8 at least.
        seed: of the first image.
        on_progress: told about the work done, of all work.
        sampling: scheduler, steps, guidance_scale, height, width, batch_size, device, dtype, offload, revision,
            anchor_revision and allow_pickle, as in `sweep.settings.Settings`.

    Raises:
        ValueError: neither a reward nor pairs are known; a reward that is constant; a sampler whose weights have no
            target; pairs that another model drew; too few prompts or images; settings that do not fit.
        OSError: a model or data that cannot be read.
    """
    origin = origin_of(str(anchor), aligned_by, anchor_beta, reward if isinstance(reward, str) else None)
    judge = reward
    if not isinstance(judge, Reward):
        judge = load(origin.reward) if origin.reward else None
    if judge is None and data is None:
        raise ValueError(
            "nothing to examine the anchor by: name the reward that it was aligned with, or give its preference pairs"
        )
    texts = tuple(_prompts(reference, prompts))
    chosen: dict[str, Any] = {"steps": 25, "guidance_scale": 1.0, "batch_size": 60} | sampling
    if chosen.get("scheduler") is None:
        chosen["scheduler"] = noisy_scheduler(reference, chosen.get("revision"))
    settings = Settings(
        reference=reference,
        anchors={"anchor": str(anchor)},
        prompts=texts,
        columns=tuple(Column(lam=lam) for lam in LAMS),
        seeds=tuple(range(seed, seed + images)),
        **chosen,
    )
    pairs = None if data is None else given(data, reference, PAIRS)
    testable = origin.beta is not None and origin.method in (None, *STEPWISE_METHODS)
    tell = _Progress(on_progress, settings if judge is not None else None, testable)
    tilt, drawn = None, None
    with realigned(settings) as (pipe, dial):
        made_of = _made_of(settings, pipe) | {
            "reward": None if judge is None else judge.name,
            "data": None if data is None else str(data),
        }
        if judge is not None:
            drawn = draw(pipe, dial, settings, judge, tell.drawing)
            tilt = tilt_test(LAMS, drawn.scores, drawn.log_weights, drawn.log_ratios)
    if pairs is None and drawn is not None:
        pairs = compared(drawn, settings)
    test = None
    if testable and pairs:
        terms = terms_of(pipe, settings, pairs, seed, tell.pairs)
        test = None if terms is None or origin.beta is None else pair_test(terms, origin.beta)
    return Examination(character_of(tilt, test, origin.method), tilt, test, origin, made_of)


def _made_of(settings: Settings, pipe: Any) -> dict[str, Any]:
    """Models with their hashes, and how they are sampled."""
    (anchor,) = settings.anchors.values()
    scale = default_of(pipe, "guidance_scale") if settings.guidance_scale is None else settings.guidance_scale
    return {
        "reference": settings.reference,
        "anchor": anchor,
        "sha256": {
            "reference": fingerprint(settings.reference, settings.revision)["sha256"],
            "anchor": fingerprint(anchor, settings.anchor_revision)["sha256"],
        },
        "examined": {
            "scheduler": type(pipe.scheduler).__name__,
            "guidance_scale": None if scale is None else float(scale),
            "steps": settings.steps,
        },
        "prompts": list(settings.prompts),
        "images": len(settings.seeds),
        "seed": settings.seeds[0],
        "versions": versions(),
    }


def _prompts(reference: str, given: Sequence[str]) -> list[str]:
    """Different prompts: those given, or a world's, of which longer ones leave less open."""
    if given:
        return list(dict.fromkeys(given))
    world = find(reference)
    if world is None:
        raise ValueError("no prompts were given: name three at least, such as the anchor will be used with")
    texts = dict.fromkeys(world.sample_prompts(20 * PROMPTS, 0))
    return sorted(texts, key=lambda text: len(text.split()))[:PROMPTS]


class _Progress:
    """Two kinds of work as one count of evaluations."""

    def __init__(self, tell: OnProgress | None, settings: Settings | None, pairs: bool) -> None:
        self._tell = tell
        steps = 0 if settings is None else settings.steps * len(settings.rows) * len(settings.columns)
        self._steps, self._pairs = steps, (math.ceil(steps / 4) or 1) if pairs else 0

    def drawing(self, done: int, total: int) -> None:
        """So many sampling steps are done."""
        self._say(done)

    def pairs(self, done: int, total: int) -> None:
        """So many passes over the pairs are done."""
        self._say(self._steps + self._pairs * done // total)

    def _say(self, done: int) -> None:
        if self._tell is not None:
            self._tell(done, self._steps + self._pairs)
