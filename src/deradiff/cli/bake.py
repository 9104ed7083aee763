"""`deradiff bake`: a chosen λ as one ordinary checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from deradiff.algorithm.schedules import Over
from deradiff.cli import arguments, options, terminal
from deradiff.cli.options import dial_option, machine_option, output_option, sampling_option
from deradiff.sweep import notation

if TYPE_CHECKING:
    from deradiff.baking import Distillation

training_option = options.panel("Training (distill)")
lora_option = options.panel("LoRA")
TRAINING = (
    *("fold_guidance", "span", "lora_rank", "samples", "train_steps"),
    *("batch", "accumulate", "gradient_checkpointing", "learning_rate"),
)
"""The parameters that are of a distillation alone."""


def bake(
    context: arguments.Context,
    reference: options.Reference,
    anchor: options.Anchor,
    lam: Annotated[str, dial_option("--lam", "-l", help="λ; with several anchors style=0.5,text=0.2.")],
    out: Annotated[Path, output_option("--out", "-o", help="A new or empty folder.")],
    method: Annotated[
        Literal["interpolate", "distill"],
        dial_option(
            help="Interpolate weights: seconds, right to first order. Or train a student from there: hours on a GPU, "
            "minutes for the digits, nearer."
        ),
    ] = "interpolate",
    as_form: Annotated[
        Literal["pipeline", "lora"] | None,
        lora_option(
            "--as", help="A whole pipeline, or a LoRA whose strength 1 is λ. By default what the method makes."
        ),
    ] = None,
    rank: Annotated[int | None, lora_option(help="Of every layer of the LoRA.")] = None,
    error: Annotated[
        float | None,
        lora_option(help="In place of a rank: as few numbers as keep the images' error below, such as 0.02 for 2%."),
    ] = None,
    dialect: Annotated[
        Literal["diffusers", "kohya", "peft"],
        lora_option(help="Whose names the LoRA has. kohya's, which ComfyUI reads, carry changes of norms, too."),
    ] = "diffusers",
    schedule: Annotated[
        str, dial_option(help=f"How λ grows from noise to image (distill): {options.SCHEDULES}")
    ] = "constant",
    over: options.Over = "steps",
    prompt: options.Prompt = None,
    prompts: Annotated[
        str | None,
        sampling_option(
            help="A file or list of prompts, as in `deradiff generate`, to measure the result with; with distill all "
            "but the last fifth are for training. The digits have their own."
        ),
    ] = None,
    images: Annotated[int, sampling_option(min=0, help="Compare so many with realigned ones; 0: none.")] = 32,
    scheduler: options.Scheduler = None,
    steps: options.Steps = 25,
    guidance_scale: options.GuidanceScale = None,
    fold_guidance: Annotated[
        bool,
        training_option(
            "--fold-guidance", help="Make guidance a part of the model: half the cost again, for good at one scale."
        ),
    ] = False,
    span: Annotated[
        str | None,
        training_option(
            help="One student for every λ between two, LOW,HIGH, told as guidance_scale = 1 + λ, guidance folded in.",
            metavar="LOW,HIGH",
        ),
    ] = None,
    lora_rank: Annotated[int | None, training_option(min=0, help=options.LORA_RANK)] = None,
    samples: Annotated[int | None, training_option(min=2, help="Drawn from the realigned model.")] = None,
    train_steps: Annotated[int | None, training_option(min=1, help="Training steps.")] = None,
    batch: Annotated[int | None, training_option(min=1, help="Rows per step.")] = None,
    accumulate: Annotated[int | None, training_option(min=1, help="Micro-batches per step, for less memory.")] = None,
    gradient_checkpointing: Annotated[
        bool, training_option("--gradient-checkpointing", help=options.GRADIENT_CHECKPOINTING)
    ] = False,
    learning_rate: Annotated[float | None, training_option(help="Peak rate.")] = None,
    seed: options.TrainingSeed = 0,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    dtype: Annotated[
        options.NumberFormat, machine_option(help="Of the result; auto is float32 on a CPU and float16 elsewhere.")
    ] = "auto",
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
        if method == "interpolate":
            why = "only for --method distill; interpolated weights are not trained"
            arguments.refuse(context, TRAINING, why)
        if method == "interpolate" and not images:
            unused = ["prompt", "prompts", "steps", "guidance_scale", "seed", "batch_size"]
            arguments.refuse(context, unused, "of no use with --images 0, which samples nothing")
        if as_form != "lora":
            arguments.refuse(context, ["rank", "error", "dialect"], "of a LoRA: add --as lora")
        elif method == "distill":
            arguments.refuse(context, ["lora_rank", "span"], "of a whole pipeline; --rank is that of --as lora")
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
                dtype=DTYPES[automatic if dtype == "auto" else dtype],
                scheduler=scheduler,
                revision=revision,
                allow_pickle=allow_pickle,
            ).to(place)
            scale = usual_guidance(reference) if guidance_scale is None else guidance_scale
        with terminal.stages(console) as report:
            baked = baking.bake(
                pipe,
                {name: anchor_source(source) for name, source in anchors.items()},
                chosen,
                out,
                method=method,
                images=images,
                prompts=texts or (_own_prompts(reference) if images or method == "distill" else []),
                sampler=baking.Sampler(steps, scale, batch_size),
                distillation=_distillation(context, method, reference),
                lora=baking.AsLora(rank, error, dialect) if as_form == "lora" else None,
                seed=seed,
                force=force,
                name=reference,
                revision=anchor_revision,
                allow_pickle=allow_pickle,
                report=report,
            )
    for line in baked.said:
        console.print(f"{line[0].upper()}{line[1:]}.", soft_wrap=True)
    for judgement in baked.judgements:
        console.print(f"{judgement.words[0].upper()}{judgement.words[1:]}.", soft_wrap=True)
    terminal.files([baked.folder])


def _lam(text: str, anchors: tuple[str, ...], schedule: str, over: Over) -> Any:
    """λ as a dial takes it, by name."""
    lams = arguments.lams([text], anchors)
    if len(lams) != 1:
        raise ValueError(f"--lam {text}: a checkpoint has one λ, so name one")
    by_name = lams[0] if isinstance(lams[0], dict) else {anchors[0]: lams[0]}
    shape = notation.schedule(schedule, over)
    return by_name if shape is None else {name: shape.scaled(lam) for name, lam in by_name.items()}


def _span(text: str) -> tuple[float, float]:
    ends = notation.numbers(text, "--span")
    if len(ends) != 2:
        raise ValueError(f"--span {text}: name two numbers, such as 0,1")
    return ends[0], ends[1]


def _distillation(context: arguments.Context, method: str, reference: str) -> "Distillation":
    """The usual settings with the options that were given in their place."""
    from dataclasses import replace

    from deradiff.baking.distillation import Distillation, usual

    if method == "interpolate":
        return Distillation()
    given = arguments.given(context, *TRAINING)
    if "span" in given:
        given["span"] = _span(given["span"])
    if "train_steps" in given:
        given["steps"] = given.pop("train_steps")
    if given.get("lora_rank") == 0:
        given["lora_rank"] = None
    start = usual(reference)
    return replace(start, **given, held_out=min(start.held_out, max(1, given.get("samples", start.samples) // 8)))


def _own_prompts(reference: str) -> list[str]:
    """Those of a world that ships; of another model nobody knows what it is asked for."""
    from deradiff.worlds import find

    world = find(reference)
    return world.sample_prompts(600, 1) if world else []
