"""`deradiff bake`: a chosen λ as one ordinary checkpoint."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deradiff.cli import arguments, terminal
from deradiff.cli.generate import DIAL, MACHINE, MODELS, OUTPUT, SAMPLING, Over
from deradiff.sweep import notation

if TYPE_CHECKING:
    from deradiff.baking import Distillation

TRAINING = "Training (distill)"

LARGEST_SEED = 2**31 - 1
"""A training step's own seed holds this one and the number of the step."""


class Method(StrEnum):
    """How to bake."""

    interpolate = "interpolate"
    distill = "distill"


def bake(
    context: arguments.Context,
    reference: Annotated[
        str, typer.Argument(help="The pretrained pipeline: a folder, a hub id, or `digits`, which ships with deradiff.")
    ],
    anchor: Annotated[
        list[str],
        typer.Option(
            "--anchor",
            "-a",
            help="The aligned model: a folder, a hub id, a LoRA or single-file checkpoint, digits:BETA or digits:lora. "
            "Several, each as NAME=SOURCE.",
            rich_help_panel=MODELS,
        ),
    ],
    lam: Annotated[
        str,
        typer.Option("--lam", "-l", help="λ; with several anchors style=0.5,text=0.2.", rich_help_panel=DIAL),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new or empty folder.", rich_help_panel=OUTPUT)],
    method: Annotated[
        Method,
        typer.Option(
            help="Interpolate weights: seconds, right to first order. Or train a student from there: hours on a GPU, "
            "minutes for the digits, nearer.",
            rich_help_panel=DIAL,
        ),
    ] = Method.interpolate,
    schedule: Annotated[
        str,
        typer.Option(
            help="How λ grows from noise to image (distill): constant, power:P, step:P, sigmoid:KAPPA or "
            "spline:S/λ,S/λ,...; multiplied with --lam.",
            rich_help_panel=DIAL,
        ),
    ] = "constant",
    over: Annotated[Over, typer.Option(help="What the schedule runs over.", rich_help_panel=DIAL)] = Over.steps,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A prompt; may be repeated.", rich_help_panel=SAMPLING)
    ] = None,
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
    scheduler: Annotated[
        str | None,
        typer.Option(help="As in `deradiff generate`; the model's own by default.", rich_help_panel=SAMPLING),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=SAMPLING)] = 25,
    guidance_scale: Annotated[
        float | None, typer.Option(help="The pipeline's own by default, 1.5 for the digits.", rich_help_panel=SAMPLING)
    ] = None,
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
        typer.Option(min=0, help="Of the LoRA that is trained; 0 trains all weights.", rich_help_panel=TRAINING),
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
            help="Compute activations anew in the backward pass: less memory, more time.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate.", rich_help_panel=TRAINING)] = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Decides all noise.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images sampled together.", rich_help_panel=MACHINE)] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, ...", rich_help_panel=MACHINE)] = "auto",
    dtype: Annotated[
        arguments.Dtype,
        typer.Option(help="Of the result; auto is float32 on a CPU and float16 elsewhere.", rich_help_panel=MACHINE),
    ] = arguments.Dtype.auto,
    revision: Annotated[
        str | None, typer.Option(help="The reference's revision on the hub.", rich_help_panel=MODELS)
    ] = None,
    anchor_revision: Annotated[
        str | None, typer.Option(help="The anchors' revision on the hub.", rich_help_panel=MODELS)
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read .bin and .ckpt files, which can run code on your machine.",
            rich_help_panel=MODELS,
        ),
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the baked model that the folder holds.", rich_help_panel=OUTPUT)
    ] = False,
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
        if method is Method.interpolate and not images:
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
                dtype=DTYPES[automatic if dtype is arguments.Dtype.auto else dtype.value],
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
                prompts=texts or (_own_prompts(reference) if images or method is Method.distill else []),
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


def _lam(text: str, anchors: tuple[str, ...], schedule: str, over: Over) -> Any:
    """λ as a dial takes it, by name."""
    found = arguments.lams([text], anchors)
    if len(found) != 1:
        raise ValueError(f"--lam {text}: a checkpoint has one λ, so name one")
    by_name = found[0] if isinstance(found[0], dict) else {anchors[0]: found[0]}
    shape = notation.schedule(schedule, over.value)
    return by_name if shape is None else {name: shape.scaled(lam) for name, lam in by_name.items()}


def _span(text: str | None) -> tuple[float, float] | None:
    if text is None:
        return None
    ends = notation.numbers(text, "--span")
    if len(ends) != 2:
        raise ValueError(f"--span {text}: name two numbers, such as 0,1")
    return ends[0], ends[1]


def _distillation(method: Method, reference: str, given: dict[str, Any]) -> "Distillation":
    """The usual settings with the options that were given in their place."""
    from dataclasses import replace

    from deradiff.baking import Distillation
    from deradiff.baking.distillation import DIGITS

    named = {name: value for name, value in given.items() if value is not None}
    if method is Method.interpolate and named:
        options = {"steps": "train-steps"}
        listed = ", ".join(f"--{options.get(name, name).replace('_', '-')}" for name in named)
        raise ValueError(f"{listed}: only for --method distill; interpolated weights are not trained")
    if named.get("lora_rank") == 0:
        named["lora_rank"] = None
    start = DIGITS if reference == "digits" else Distillation()
    return replace(start, **named, held_out=min(start.held_out, max(1, named.get("samples", start.samples) // 8)))


def _own_prompts(reference: str) -> list[str]:
    """The digits' own captions; of another model nobody knows what it is asked for."""
    if reference != "digits":
        return []
    from deradiff.worlds.digits.captions import sample_prompts

    return sample_prompts(600, seed=1)
