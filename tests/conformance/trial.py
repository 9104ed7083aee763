"""All checks of one test class, one after the other: a check that fails is noted, and the next one begins."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

import deradiff
from adjustments import adjust_pipelines
from arrays import ShapesDiffer
from batch_axes import batch_axes
from cases import Case, baseline
from checks import Checks, two_images
from lora_checks import lora
from results import CHECKS, Check, NotTried, Result, described, is_refusal


def try_class(test_class: Any, file: Path) -> None:
    """Make all checks of `test_class`, and write what came out into `file`, after each anew."""
    result = Result(name_of(test_class), test_class.pipeline_class.__name__)
    began = time.monotonic()

    def save() -> None:
        result.seconds = round(time.monotonic() - began, 1)
        result.save(file)

    try:
        _try(test_class, result, save)
    except NotTried as why:
        result.stopped = str(why)
    except Exception as error:
        result.stopped = f"the case cannot be made: {described(error)}"
    save()


def name_of(test_class: type) -> str:
    """What a test class is called here: its place below `tests/pipelines`."""
    return f"{test_class.__module__.removeprefix('tests.pipelines.')}.{test_class.__name__}"


def _try(test_class: type, result: Result, save: Callable[[], None]) -> None:
    adjust_pipelines()
    case = Case(test_class)
    if not case.denoisers:
        result.refused = _refusal(case)
        return
    pipe = case.build()
    result.about = {
        "denoisers": {name: type(module).__name__ for name, module in case.denoisers.items()},
        "scheduler": type(getattr(pipe, "scheduler", None)).__name__,
    }
    base = baseline(case)
    result.about |= {
        "compared": "latents" if case.latent else "outputs",
        "seconds a run": round(base.seconds, 2),
        "anchor's effect": base.scale,
        "the same": base.same(base.scale),
    }
    two = two_images(case)
    if two is not None:
        with contextlib.suppress(Exception):  # what is not shown is not known
            result.axes = batch_axes(case, two)
    try:
        checks = Checks(case, base)
    except Exception as error:
        if not is_refusal(error):
            raise
        result.refused = described(error)
        return
    result.about["path"] = checks.path
    for name in CHECKS:
        check = functools.partial(lora, checks) if name == "lora" else getattr(checks, name)
        result.checks[name] = tried(check)
        save()
    result.about["steps"] = checks.oracles.steps


def _refusal(case: Case) -> str:
    """How realign() refuses a pipeline in which no denoiser was found."""
    try:
        deradiff.realign(case.build(), nn.Linear(1, 1))
    except Exception as error:
        if is_refusal(error):
            return described(error)
        raise
    raise NotTried("realign() accepts the pipeline, but its denoiser is not where these checks look for it")


def tried(check: Callable[[], Check]) -> Check:
    """A check's outcome, whatever it raises."""
    try:
        return check()
    except NotTried as why:
        return Check("not tried", str(why))
    except ShapesDiffer as error:
        return Check("wrong", str(error))
    except Exception as error:
        return Check("refused" if is_refusal(error) else "crashes", described(error))
