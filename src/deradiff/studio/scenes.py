"""What one page shows: everything that decides its image, as `Settings` of one prompt, seed and λ.

The same settings as a settings string, which is the query of a link; and as the command and the program that draw the
same image elsewhere.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

from deradiff.algorithm.schedules import Schedule, finite
from deradiff.sampling.reuse import RESERVED
from deradiff.studio import curves
from deradiff.sweep import notation
from deradiff.sweep.alignment_records import known_beta
from deradiff.sweep.description import SamplingSettings
from deradiff.sweep.pipelines import SCHEDULERS
from deradiff.sweep.settings import Column, Settings

LONGEST_PROMPT = 2000
"""Characters. Text encoders read 77 to 512 tokens; what is longer is a mistake."""

LONGEST_LINK = 16_000
MOST_ANCHORS = 3
LARGEST_LAM = 2.0
SMALLEST_SIDE, LARGEST_SIDE = 32, 2048
LARGEST_GUIDANCE = 50.0
LARGEST_SEED = 2**53 - 1
"""A browser's numbers are exact up to here."""


def scene(
    reference: str,
    anchors: Sequence[str],
    prompt: str,
    lams: Sequence[float],
    *,
    schedule: Mapping[str, Any] | None = None,
    negative_prompt: str | None = None,
    seed: float = 0,
    scheduler: str | None = None,
    steps: float = 25,
    guidance_scale: float | None = None,
    width: float | None = None,
    height: float | None = None,
) -> Settings:
    """The settings of a page's image. Raises `ValueError` in words for the page where one of them is out of range."""
    if not 1 <= len(anchors) <= MOST_ANCHORS or len(set(anchors)) < len(anchors):
        raise ValueError(f"choose 1 to {MOST_ANCHORS} different anchors, got {len(anchors)}")
    for source in (reference, *anchors):
        if source != on_one_line(source, "name of the model"):
            raise ValueError(f"the name of the model {source[:80]!r} has line breaks: choose one from the list")
    prompt = on_one_line(prompt, "prompt")
    negative_prompt = on_one_line(negative_prompt or "", "negative prompt")
    if not prompt.strip():
        raise ValueError("write a prompt first")
    for what, text in (("prompt", prompt), ("negative prompt", negative_prompt)):
        if len(text) > LONGEST_PROMPT:
            raise ValueError(
                f"the {what} has {len(text):,} characters, and no text encoder reads so many: shorten it to "
                f"{LONGEST_PROMPT:,} at most"
            )
    if scheduler is not None and scheduler not in SCHEDULERS:
        raise ValueError(f"there is no scheduler {scheduler[:40]!r}; choose one of {', '.join(SCHEDULERS)}")
    if bool(width) != bool(height):
        raise ValueError("give width and height both, or neither")
    strengths = [_number("λ", lam, 0.0, LARGEST_LAM) for lam in lams]
    if len(strengths) != len(anchors):
        raise ValueError(f"{len(anchors)} anchors need as many λ, got {len(strengths)}")
    names = anchor_names(anchors)
    shape = curves.read(schedule)
    lam: Any = strengths[0] if len(names) == 1 else dict(zip(names, strengths, strict=True))
    return Settings(
        reference=reference,
        anchors=dict(zip(names, anchors, strict=True)),
        prompts=(prompt,),
        columns=(Column(lam=lam, schedule=None if shape is None else shape.to_dict()),),
        seeds=(_whole("the seed", seed, 0, LARGEST_SEED),),
        scheduler=scheduler,
        steps=_whole("steps", steps, 1, curves.MOST_STEPS),
        guidance_scale=None if guidance_scale is None else _number("guidance", guidance_scale, 0, LARGEST_GUIDANCE),
        negative_prompt=negative_prompt or None,
        width=None if not width else _whole("the width", width, SMALLEST_SIDE, LARGEST_SIDE),
        height=None if not height else _whole("the height", height, SMALLEST_SIDE, LARGEST_SIDE),
        anchor_beta=known_beta(anchors[0]) if len(anchors) == 1 else None,
    )


def anchor_names(anchors: Sequence[str]) -> list[str]:
    """A name for each anchor: "anchor" for a single one, for several the ends of their sources."""
    if len(anchors) == 1:
        return ["anchor"]
    names: list[str] = []
    for source in anchors:
        end = re.sub(r"\W+", "-", source.rstrip("/").rpartition("/")[2].removesuffix(".safetensors")).strip("-")
        name = end if re.match(r"[A-Za-z_]", end) else f"anchor-{end}"
        while name in names or name in RESERVED:
            name += "-2"
        names.append(name)
    return names


def on_one_line(text: str, what: str) -> str:
    """`text` with spaces for line breaks and tabs, as it can be copied into a shell.

    Raises `ValueError` for other characters that nobody sees and a terminal obeys: controls, such as ESC, those that
    turn the direction of writing, and halves of characters.
    """
    text = re.sub(r"[\t\n\v\f\r\x85\u2028\u2029]", " ", text)
    for character in text:
        if unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in TURNING:
            raise ValueError(f"the {what} holds the character U+{ord(character):04X}, which nobody sees: delete it")
    return text


TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""Characters that have what follows written from the other side."""


def values_of(lam: float | dict[str, float]) -> list[float]:
    """λ of every anchor of a column."""
    return list(lam.values()) if isinstance(lam, dict) else [lam]


def strengths(settings: Settings) -> list[float]:
    """λ of every anchor, in their order."""
    lam = settings.columns[0].lam
    return [lam[name] for name in settings.anchors] if isinstance(lam, dict) else [lam]


def curve(settings: Settings) -> Schedule | None:
    """How λ is annealed; None for a λ that stays the same."""
    record = settings.columns[0].schedule
    return None if record is None else Schedule.from_dict(record)


# -- the settings string ----------------------------------------------------------------------------------------------


def written(settings: Settings) -> str:
    """`settings` as the query of a link, which `read` understands; what is usual is left out."""
    shape = curve(settings)
    pairs: list[tuple[str, Any]] = [("prompt", settings.prompts[0]), ("reference", settings.reference)]
    pairs += [("anchor", source) for source in settings.anchors.values()]
    pairs += [("lam", notation.plain(lam)) for lam in strengths(settings)]
    if shape is not None:
        pairs.append(("schedule", notation.written(shape)))
        pairs += [("over", "time")] if shape.over == "time" else []
    pairs.append(("seed", settings.seeds[0]))
    for name in ("scheduler", "steps", "guidance_scale", "negative_prompt", "width", "height"):
        value = getattr(settings, name)
        if value is not None:
            pairs.append((name, notation.plain(value) if isinstance(value, float) else value))
    return urlencode(pairs, quote_via=quote, safe="/:,")


def read(text: str) -> Settings:
    """What `written` wrote, or a whole link with it. Raises `ValueError` for anything else."""
    if len(text) > LONGEST_LINK:
        raise ValueError(f"a settings string has {LONGEST_LINK:,} characters at most, got {len(text):,}")
    query = text.strip().rpartition("?")[2]
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=60)
    except ValueError:
        raise ValueError(f"{text.strip()[:80]!r} is no settings string: copy all of one from a studio") from None
    fields: dict[str, list[str]] = {}
    for name, value in pairs:
        fields.setdefault(name, []).append(value)
    fields.pop("token", None)
    several = {"anchor", "lam"}
    known = {"prompt", "reference", "schedule", "over", "seed", *several, *SamplingSettings.model_fields}
    if unknown := [name for name in fields if name not in known]:
        raise ValueError(f"the settings string has {unknown[0][:40]!r}, which the studio does not know")
    if twice := [name for name, values in fields.items() if len(values) > 1 and name not in several]:
        raise ValueError(f"the settings string has {twice[0]} twice")
    if missing := [name for name in ("prompt", "reference", "anchor", "lam") if name not in fields]:
        raise ValueError(f"the settings string lacks {', '.join(missing)}: copy all of one from a studio")
    single = {name: values[0] for name, values in fields.items()}
    over = single.get("over", "steps")
    if over not in ("steps", "time"):
        raise ValueError(f"the settings string has over={over[:20]!r}: it is steps or time")
    shape = notation.schedule(single.get("schedule", "constant"), over, "schedule")  # type: ignore[arg-type]
    return scene(
        single["reference"],
        fields["anchor"],
        single["prompt"],
        [_parsed("lam", lam) for lam in fields["lam"]],
        schedule=None if shape is None else shape.to_dict(),
        seed=_parsed("seed", single.get("seed", "0")),
        **{name: _parsed(name, single[name]) for name in SamplingSettings.model_fields if name in single},
    )


def of_record(record: Mapping[str, Any]) -> Settings:
    """The settings of an image that deradiff wrote, or of a preset: the page's part of a record.

    Raises `ValueError` where it holds none, or what the studio has no dial for.
    """
    about = record.get("settings", record)
    try:
        settings = Settings.model_validate(about)
        prompt, seed = record.get("prompt", settings.prompts[0]), record.get("seed", settings.seeds[0])
        lam = record.get("lam", settings.columns[0].lam)
        shape = record.get("schedule", settings.columns[0].schedule)
    except (ValueError, TypeError, AttributeError):
        raise ValueError("this record holds no settings of one image") from None
    if guided := record.get("noise") or record.get("reward_guidance"):  # as 0.1 and later versions have it
        what = guided.get("kind", "noise")
        raise ValueError(f"this image was guided by a reward while it was drawn ({what}), which the studio does not do")
    if record.get("turns"):
        raise ValueError("this image was drawn by models that took turns at random, which the studio does not do")
    if settings.method != "mixture" or settings.particles is not None:
        raise ValueError("this image was drawn with interpolated weights or particles, which the studio does not do")
    if settings.reuse is not None or settings.tolerance is not None or settings.path != "auto":
        raise ValueError("this image carried predictions over, or mixed otherwise than usual: the studio draws exactly")
    if settings.revision is not None or settings.anchor_revision is not None:
        raise ValueError("this image's models were of a revision, which the studio cannot choose")
    lams = [lam.get(name, 0.0) for name in settings.anchors] if isinstance(lam, Mapping) else [lam]
    return scene(
        settings.reference,
        list(settings.anchors.values()),
        str(prompt),
        lams,
        schedule=shape,
        seed=seed,
        **settings.sampling.model_dump(),
    )


def _parsed(name: str, value: str) -> Any:
    return value if name in ("scheduler", "negative_prompt") else float(notation.decimal(value, value, name))


def _number(name: str, value: Any, least: float, most: float) -> float:
    number = finite(value, name)
    if not least <= number <= most:
        raise ValueError(f"{name} goes from {least:g} to {most:g} in the studio, got {number:g}")
    return number


def _whole(name: str, value: Any, least: int, most: int) -> int:
    number = _number(name, value, least, most)
    if number != int(number):
        raise ValueError(f"{name} is a whole number, got {number:g}")
    return int(number)
