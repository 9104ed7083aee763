"""`deradiff bake`: a chosen λ as one ordinary checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import DIAL, MACHINE, OUTPUT, SAMPLING
from deradiff.sweep import notation

if TYPE_CHECKING:
    from deradiff.baking import Distillation

TRAINING = "Training (distill)"


class BakingMethod(StrEnum):
    """How to bake."""

    interpolate = "interpolate"
    distill = "distill"


def bake(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    lam: Annotated[
        str,
        typer.Option("--lam", "-l", help="λ; with several anchors style=0.5,text=0.2.", rich_help_panel=DIAL),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.", rich_help_panel=OUTPUT)],
    method: Annotated[
        BakingMethod,
        typer.Option(
            help="Interpolate weights: seconds, right to first order. Or train a student from there: hours on a GPU, "
            "minutes for the digits, nearer.",
            rich_help_panel=DIAL,
        ),
    ] = BakingMethod.interpolate,
    schedule: Annotated[
        str,
        typer.Option(
            help=f"How λ grows from noise to image (distill): {options.SCHEDULES}",
            rich_help_panel=DIAL,
        ),
    ] = "constant",
    over: options.Over = options.ScheduleClock.steps,
    prompt: options.Prompt = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="A file or list of prompts, as in `deradiff generate`, to measure the result with; with distill all "
            "but the last fifth are for training. The digits have their own.",
            rich_help_panel=SAMPLING,
        ),
    ] = None,
    images: Annotated[
        int, typer.Option(min=0, help="Compare so many with realigned ones; 0: none.", rich_help_panel=SAMPLING)
    ] = 32,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 25,
    guidance_scale: options.GuidanceScale = None,
    fold_guidance: Annotated[
        bool,
        typer.Option(
            "--fold-guidance",
            help="Make guidance a part of the model: half the cost again, for good at one scale.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    span: Annotated[
        str | None,
        typer.Option(
            help="One student for every λ between two, LOW,HIGH, told as guidance_scale = 1 + λ, guidance folded in.",
            metavar="LOW,HIGH",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    lora_rank: Annotated[
        int | None,
        typer.Option(min=0, help=options.LORA_RANK, rich_help_panel=TRAINING),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Drawn from the realigned model.", rich_help_panel=TRAINING)
    ] = None,
    train_steps: Annotated[int | None, typer.Option(min=1, help="Training steps.", rich_help_panel=TRAINING)] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows per step.", rich_help_panel=TRAINING)] = None,
    accumulate: Annotated[
        int | None, typer.Option(min=1, help="Micro-batches per step, for less memory.", rich_help_panel=TRAINING)
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help=options.GRADIENT_CHECKPOINTING,
            rich_help_panel=TRAINING,
        ),
    ] = False,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", rich_help_panel=TRAINING)] = None,
    seed: options.TrainingSeed = 0,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: Annotated[
        options.NumberFormat,
        typer.Option(help="Of the result; auto is float32 on a CPU and float16 elsewhere.", rich_help_panel=MACHINE),
    ] = options.NumberFormat.auto,
    revision: options.Revision = None,
    anchor_revision: options.AnchorRevision = None,
    allow_pickle: options.AllowPickle = False,
    force: options.Force = False,
) -> None:
    """Bake λ into one checkpoint that diffusers loads by itself, and measure how near it comes.

    An interrupted distillation goes on where it was if the same command is given again.
    """
    console = terminal.LiteralConsole()
    with terminal.refusing_wrong_input(out_of_memory="try a smaller --batch, a smaller --batch-size or --images 0"):
        anchors = arguments.anchors(anchor)
        chosen = _lam(lam, tuple(anchors), schedule, over)
        if schedule == "constant":
            arguments.refuse(context, ["over"], "a λ that stays the same runs over nothing; name a --schedule")
        if method is BakingMethod.interpolate and not images:
            unused = ["prompt", "prompts", "steps", "guidance_scale", "seed", "batch_size"]
            arguments.refuse(context, unused, "of no use with --images 0, which samples nothing")
        texts = arguments.prompts(prompt or (), prompts) if prompt or prompts else ()
        with console.status("Loading torch and diffusers …"):
            terminal.pass_on_warnings()
            from deradiff import baking
            from deradiff.sampling.devices import device_called
            from deradiff.sweep.pipelines import DTYPES, anchor_source, load_pipeline, usual_guidance

            place = device_called(device)
            automatic = "float32" if place == "cpu" else "float16"
            pipe = load_pipeline(
                reference,
                dtype=DTYPES[automatic if dtype is options.NumberFormat.auto else dtype.value],
                scheduler=scheduler,
                revision=revision,
                allow_pickle=allow_pickle,
            ).to(place)
            given = {
                "fold_guidance": fold_guidance or None,
                "span": _span(span),
                "lora_rank": lora_rank,
                "samples": samples,
                "steps": train_steps,
                "batch": batch,
                "learning_rate": learning_rate,
                "accumulate": accumulate,
                "gradient_checkpointing": gradient_checkpointing or None,
            }
            scale = usual_guidance(reference) if guidance_scale is None else guidance_scale
        with terminal.stages(console) as report:
            baked = baking.bake(
                pipe,
                {name: anchor_source(source) for name, source in anchors.items()},
                chosen,
                out,
                method=method.value,
                images=images,
                prompts=texts or (_own_prompts(reference) if images or method is BakingMethod.distill else []),
                sampler=baking.Sampler(steps, scale, batch_size),
                distillation=_distillation(method, reference, given),
                seed=seed,
                force=force,
                name=reference,
                revision=anchor_revision,
                allow_pickle=allow_pickle,
                report=report,
            )
    for judgement in baked.judgements:
        console.print(f"{judgement.words[0].upper()}{judgement.words[1:]}.", soft_wrap=True)
    terminal.files([baked.folder])


def _lam(text: str, anchors: tuple[str, ...], schedule: str, over: options.ScheduleClock) -> Any:
    """λ as a dial takes it, by name."""
    lams = arguments.lams([text], anchors)
    if len(lams) != 1:
        raise ValueError(f"--lam {text}: a checkpoint has one λ, so name one")
    by_name = lams[0] if isinstance(lams[0], dict) else {anchors[0]: lams[0]}
    shape = notation.schedule(schedule, over.value)
    return by_name if shape is None else {name: shape.scaled(lam) for name, lam in by_name.items()}


def _span(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    ends = notation.numbers(text, "--span")
    if len(ends) != 2:
        raise ValueError(f"--span {text}: name two numbers, such as 0,1")
    return ends[0], ends[1]


def _distillation(method: BakingMethod, reference: str, given: dict[str, Any]) -> "Distillation":
    """The usual settings with the options that were given in their place."""
    from dataclasses import replace

    from deradiff.baking.distillation import Distillation, usual

    named = {name: value for name, value in given.items() if value is not None}
    if method is BakingMethod.interpolate and named:
        options = {"steps": "train-steps"}
        listed = ", ".join(f"--{options.get(name, name).replace('_', '-')}" for name in named)
        raise ValueError(f"{listed}: only for --method distill; interpolated weights are not trained")
    if method is BakingMethod.interpolate:
        return Distillation()
    if named.get("lora_rank") == 0:
        named["lora_rank"] = None
    start = usual(reference)
    return replace(start, **named, held_out=min(start.held_out, max(1, named.get("samples", start.samples) // 8)))


def _own_prompts(reference: str) -> list[str]:
    """Those of a world that ships; of another model nobody knows what it is asked for."""
    from deradiff.worlds import find

    world = find(reference)
    return world.sample_prompts(600, 1) if world else []
