"""The checks of whole pipeline calls, λ by λ. Each returns a `Check`, or raises `NotTried`, or fails as it happens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import deradiff
from arrays import Arrays, difference, equal, halves, is_twice
from cases import Baseline, Case, Changes, copied
from oracles import Oracles
from progress import told_progress
from results import Check, NotTried, Outcome, described

SLOW = 1.5
"""Seconds for one run: beyond, checks that repeat what another has shown are left out."""

_IMAGES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def anchor_of(anchors: Mapping[str, nn.Module]) -> Any:
    """What `realign` is given: copies; of several denoisers, all by name."""
    modules = copied(anchors)
    return next(iter(modules.values())) if len(modules) == 1 else modules


class Checks:
    """The checks of one case. The first few share one realigned pipeline and its dial."""

    def __init__(self, case: Case, base: Baseline):
        self.case, self.base = case, base
        self.pipe = case.build()
        self.dial = deradiff.realign(self.pipe, anchor_of(base.anchors), lam=0.0)
        self.path: str = self.dial.path
        self.oracles = Oracles(case, base.anchors, self.path)
        self.two = two_images(case)
        self._problems: dict[Changes, str] = {}

    @contextmanager
    def realigned(self, lam: Any) -> Iterator[tuple[Any, Any]]:
        """A pipeline of its own at λ, and its dial."""
        pipe = self.case.build()
        with deradiff.realign(pipe, anchor_of(self.base.anchors), lam=lam) as dial:
            yield pipe, dial

    def reference(self) -> Check:
        """λ = 0."""
        self.dial.lam = 0.0
        return self._same(self.case.run(self.pipe), self.base.reference)

    def anchor(self) -> Check:
        """λ = 1."""
        self.dial.lam = 1.0
        return self._same(self.case.run(self.pipe), self.base.anchor)

    def half(self) -> Check:
        """λ = ½."""
        self.dial.lam = 0.5
        return self.oracles.judged(
            self.case.run(self.pipe), self.base.scale, self.base.same(self.base.scale), both=True
        )

    def remove(self) -> Check:
        """The pipeline as it was."""
        self.dial.remove()
        return self._same(self.case.run(self.pipe), self.base.reference)

    def progress(self) -> Check:
        """At every step, where the dial says it is, and where the scheduler's timesteps say it is."""
        with self.realigned(deradiff.schedules.Power(1)) as (pipe, dial):
            runs = told_progress(self.case, pipe, dial)
        if not runs:
            raise NotTried("no scheduler took a step")
        told = [[step.told for step in run] for run in runs]
        expected = [[step.expected for step in run] for run in runs]
        outcome: Outcome = "passes" if told == expected else "wrong"
        why = "" if told == expected else f"progress is {told}, but the scheduler's steps are at {expected}"
        return Check(outcome, why, {"told": told})

    def per_image(self) -> Check:
        """λ for either image of two."""
        return self._images(self._two())

    def sweep(self) -> Check:
        """λ for either image of two that begin with one noise."""
        if self.base.seconds > SLOW:
            raise NotTried("left out, for the pipeline is slow")
        return self._images(with_noise(self._two(), 5, 5))

    def micro_batch(self) -> Check:
        """The rows of a batch one by one, where there are two images or guidance makes two of one."""
        changes = dict if self.two is None or self._problem_with(self.two) else self.two
        with self.realigned(0.5) as (pipe, dial):
            whole = self.case.run(pipe, changes)
            dial.micro_batch = 1
            parts = self.case.run(pipe, changes)
        away, same = difference(whole, parts) / self.base.scale, self.base.same(self.base.scale)
        if away < same:
            return Check("passes", "", {"the same": same}, away)
        return Check("wrong", f"{away:.1e} of the anchor's effect from the whole batch", {"the same": same}, away)

    def _same(self, output: Arrays, expected: Arrays) -> Check:
        away = difference(output, expected) / self.base.scale
        if equal(output, expected):
            return Check("passes", difference=away)
        return Check("wrong", f"not the same bits, {away:.1e} of the anchor's effect away", difference=away)

    def _two(self) -> Changes:
        if self.two is None:
            raise NotTried("the pipeline takes no number of images, and the test gives no prompt")
        return self.two

    def _problem_with(self, changes: Changes) -> str:
        """What keeps the plain pipeline from drawing two images that can be told apart; empty where nothing does."""
        if changes not in self._problems:
            self._problems[changes] = self._found_problem(changes)
        return self._problems[changes]

    def _found_problem(self, changes: Changes) -> str:
        try:
            plain = self.case.run(self.case.build(), changes)
        except Exception as error:
            return f"the plain pipeline cannot draw two images: {described(error)}"
        if not is_twice(plain, self.base.reference):
            shapes = [array.shape for array in plain], [array.shape for array in self.base.reference]
            return f"two images come out as {shapes[0]}, one as {shapes[1]}"
        if not equal(plain, self.case.run(self.case.build(), changes)):
            return "two images do not come out the same twice"
        return ""

    def images_depend(self, changes: Changes) -> bool:
        """Whether the plain pipeline's first image becomes another one where the second begins with other noise."""
        firsts = []
        for seed in (6, 7):
            try:
                both = self.case.run(self.case.build(), with_noise(changes, 5, seed))
            except Exception:  # it takes one generator only
                return False
            firsts.append(halves(both)[0])
        return not equal(*firsts)

    def _images(self, changes: Changes) -> Check:
        if problem := self._problem_with(changes):
            raise NotTried(problem)
        run = functools.partial(self.case.run, changes=changes)
        reference = run(self.case.build())
        anchor = run(self.case.build(copied(self.base.anchors)))
        scale = difference(reference, anchor)
        with self.realigned(0.5) as (pipe, dial):
            half = run(pipe)
            dial.lam = [0, 0.5]
            rising = halves(run(pipe))
            dial.lam = [1, 0]
            falling = halves(run(pipe))
        numbers: dict[str, Any] = {
            "[0, ·]": difference(rising[0], halves(reference)[0]) / scale,
            "[·, ½]": difference(rising[1], halves(half)[1]) / scale,
            "[1, ·]": difference(falling[0], halves(anchor)[0]) / scale,
            "[·, 0]": difference(falling[1], halves(reference)[1]) / scale,
        }
        away, same = max(numbers.values()), self.base.same(scale)
        if away >= same and self.images_depend(changes):
            raise NotTried("in the plain pipeline an image depends on the others of its batch")
        judged = self.oracles.judged(half, scale, same, changes)
        numbers |= judged.numbers | {"the same": same}
        if away >= same:
            return Check("wrong", f"an image differs from what it is at its own λ by {away:.1e}", numbers, away)
        away = max(away, judged.difference or 0.0)
        return Check(judged.outcome, judged.why and f"both at ½: {judged.why}", numbers, away)


def two_images(case: Case) -> Changes | None:
    """What has a pipeline draw two images of one prompt; None where nothing has."""
    for name in _IMAGES:
        if name in case.call:
            return lambda: {name: 2}
    inputs = case.inputs()
    prompts = {name: inputs[name] for name in ("prompt", "negative_prompt") if isinstance(inputs.get(name), str)}
    if "prompt" not in prompts:
        return None
    return lambda: {name: [prompt] * 2 for name, prompt in prompts.items()}


def with_noise(changes: Changes, *seeds: int) -> Changes:
    """The same with a generator for every image."""
    return lambda: changes() | {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}
