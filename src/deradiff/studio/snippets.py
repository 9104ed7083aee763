"""The program and the command that draw a page's image without the studio."""

from __future__ import annotations

import shlex
from pathlib import Path

from deradiff.studio import scenes
from deradiff.sweep import notation
from deradiff.sweep.description import call_of
from deradiff.sweep.notation import plain
from deradiff.sweep.pipelines import SCHEDULERS, anchor_source
from deradiff.sweep.settings import Settings
from deradiff.worlds import find, find_anchor


def command(settings: Settings, device: str = "auto", dtype: str = "auto") -> str:
    """The `deradiff generate` that draws the same image, for a POSIX shell."""
    single = len(settings.anchors) == 1
    lams = scenes.strengths(settings)
    command = ["deradiff", "generate", settings.reference]
    for name, source in settings.anchors.items():
        command += ["--anchor", source if single else f"{name}={source}"]
    command += [*_option("--prompt", settings.prompts[0]), "--lam"]
    named = ",".join(f"{name}={plain(lam)}" for name, lam in zip(settings.anchors, lams, strict=True))
    command.append(plain(lams[0]) if single else named)
    shape = scenes.curve(settings)
    if shape is not None:
        command += ["--schedule", notation.written(shape), *(["--over", "time"] if shape.over == "time" else [])]
    command += ["--seed", str(settings.seeds[0]), "--steps", str(settings.steps)]
    for option, value in (
        ("--scheduler", settings.scheduler),
        ("--guidance-scale", settings.guidance_scale),
        ("--negative-prompt", settings.negative_prompt),
        ("--width", settings.width),
        ("--height", settings.height),
    ):
        if value is not None:
            command += _option(option, plain(value) if isinstance(value, float) else str(value))
    command += [*(["--device", device] if device != "auto" else []), *(["--dtype", dtype] if dtype != "auto" else [])]
    command += ["--out", "image"]
    return shlex.join(command)


def _option(name: str, value: str) -> list[str]:
    """An option and its value; one that begins with a hyphen would be taken for an option of its own."""
    return [f"{name}={value}"] if value.startswith("-") else [name, value]


def program(settings: Settings, device: str, dtype: str) -> str:
    """Python that draws the same image; `device` and `dtype` ("float32") are the studio's own."""
    shape, lams = scenes.curve(settings), scenes.strengths(settings)
    imports, lines = ["import torch"], []
    if world := find(settings.reference):
        lines.append(f"pipe = {world.module}.load_pipeline(torch_dtype=torch.{dtype})")
    else:
        imports.append("from diffusers import DiffusionPipeline")
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({settings.reference!r}, dtype=torch.{dtype})")
    if settings.scheduler is not None:
        lines.append(_scheduler(settings.scheduler, imports))
    imports += ["", "import deradiff"]
    if shape is not None:
        imports.append("from deradiff import schedules")
    models = (settings.reference, *settings.anchors.values())
    worlds = dict.fromkeys(world.module for source in models if (world := find(source.partition(":")[0])))
    imports += [f"from deradiff.worlds import {module}" for module in worlds]
    sources = {name: _source(source) for name, source in settings.anchors.items()}
    curves = {name: _lam(lam, shape) for name, lam in zip(sources, lams, strict=True)}
    if len(sources) == 1:
        (source,), (lam,) = sources.values(), curves.values()
        lines.append(f"dial = deradiff.realign(pipe, {source}, lam={lam})")
    else:
        lines.append("dial = deradiff.realign(")
        lines.append("    pipe,")
        lines.append("    {" + ", ".join(f"{name!r}: {source}" for name, source in sources.items()) + "},")
        lines.append("    lam={" + ", ".join(f"{name!r}: {lam}" for name, lam in curves.items()) + "},")
        lines.append(")")
    lines += [f"pipe.to({device!r})", "", "image = pipe("]
    lines.append(f"    {settings.prompts[0]!r},")
    for name, value in call_of(settings, settings.reference).items():
        lines.append(f"    {name}={value!r},")
    lines.append(f"    num_inference_steps={settings.steps},")
    lines.append(f'    generator=torch.Generator("cpu").manual_seed({settings.seeds[0]}),')
    lines.append(").images[0]")
    return "\n".join([*imports, "", *lines]) + "\n"


def _scheduler(name: str, imports: list[str]) -> str:
    family, options = SCHEDULERS[name]
    place = "deradiff.schedulers" if family == "FlowMatchSDEScheduler" else "diffusers"
    imports.append(f"from {place} import {family}")
    given = "".join(f", {option}={value!r}" for option, value in options.items())
    return f"pipe.scheduler = {family}.from_config(pipe.scheduler.config{given})"


def _source(source: str) -> str:
    if anchor := find_anchor(source):
        return anchor.code
    return repr(str(anchor_source(source)) if not Path(source).is_absolute() else source)


def _lam(lam: float, shape: object) -> str:
    if shape is None:
        return plain(lam)
    return f"schedules.{shape!r}" if lam == 1 else f"schedules.{shape!r}.scaled({plain(lam)})"
