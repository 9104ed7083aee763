"""`deradiff cost`: what a sweep of strengths costs, and what aligning once and realigning costs instead."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deradiff.cli import arguments, options, terminal


def cost(
    context: arguments.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="Count a model: a folder or hub id of Stable Diffusion or SDXL (no weights are read), or `digits`."
        ),
    ] = None,
    strengths: Annotated[int, typer.Option(min=1, help="How many β a sweep aligns at.")] = 6,
    preset: Annotated[
        str | None, typer.Option(help="Take model, steps, batch and LoRA from a preset of `deradiff align`.")
    ] = None,
    train_steps: Annotated[int | None, typer.Option(min=1, help="Training steps of one alignment.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pairs per training step.")] = None,
    lora_rank: Annotated[int | None, typer.Option(min=0, help=options.LORA_RANK)] = None,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward.")
    ] = False,
    images: Annotated[int, typer.Option(min=0, help="Pictures sampled at every strength.")] = 500,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Sampling steps per picture.")] = 50,
    guided: Annotated[
        bool, typer.Option("--guided/--unguided", help="Whether guidance doubles the evaluations.")
    ] = True,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this new file as well.")
    ] = None,
) -> None:
    """Count the operations of one alignment, of a sweep and of realignment; without a model, the DeRaDiff paper's."""
    from deradiff.files.outputs import new_file, require_new

    console = terminal.LiteralConsole()
    with terminal.refusing_wrong_input():
        terminal.require_writable("--json", json_path)
        if json_path is not None:
            require_new(json_path)
        with console.status("Counting …"):
            terminal.pass_on_warnings()
            from deradiff.experiments import cost as costs
            from deradiff.files.writing import json_text

            if model is None and preset is None:
                counted_of_models = ["train_steps", "batch", "lora_rank", "checkpointing", "images", "sampling_steps"]
                why = "without a model the paper's own arithmetic is printed; name a model, or a --preset"
                arguments.refuse(context, [*counted_of_models, "guided"], why)
                record = _paper(console, costs, strengths)
            else:
                from deradiff.alignment.presets import preset as called
                from deradiff.alignment.presets import usual
                from deradiff.worlds import find

                settings = usual(model, "dpo") if preset is None and find(model) else called(preset or "deradiff-sdxl")
                if settings.method != "dpo":
                    raise ValueError(f"{preset} is for {settings.method}: costs are counted for Diffusion-DPO")
                rank = settings.lora_rank if lora_rank is None else lora_rank
                source = model or settings.base
                config, world = costs.denoiser_config(source), find(source)
                denoiser = costs.denoiser_cost(
                    config,
                    lora_rank=rank or None,
                    lora_targets=settings.lora_targets,
                    checkpointing=checkpointing,
                    tokens=world.tokens if world else 77,
                )
                counted = costs.costs(
                    denoiser,
                    strengths=strengths,
                    train_steps=train_steps or settings.plan.steps,
                    batch=batch or settings.batch,
                    images=images,
                    sampling_steps=sampling_steps,
                    guided=guided,
                )
                record = costs.record(counted)
                method = f"{train_steps or settings.plan.steps:,} steps of {batch or settings.batch} pairs"
                _print(console, f"{source}, {method}", counted, strengths, images)
        if json_path is not None:
            with new_file(json_path) as temporary:
                temporary.write_text(json_text(record), encoding="utf-8")


def _paper(console: Any, costs: Any, strengths: int) -> dict[str, Any]:
    """The arithmetic of §6, line by line."""
    inputs = costs.PaperInputs()
    console.print("DeRaDiff §6: one alignment of SDXL, its GPUs at half of an A100's peak in FP16")
    lines = [
        f"{inputs.gpu_hours:g} GPU-hours x {inputs.peak_tflops:g} TFLOPS x {inputs.utilisation:g} "
        f"= {inputs.tflop_hours:,.0f} TFLOP-hours",
        f"{inputs.tflop_hours:,.0f} TFLOP-hours x 3,600 s = {inputs.exaflops:.1f} EFLOPs",
        *(
            f"aligning once in place of {n} times saves {100 * costs.saved(n):.1f}%, "
            f"{inputs.exaflops * (n - 1):,.1f} EFLOPs"
            for n in sorted({3, 5, 10, strengths})
        ),
    ]
    for line in lines:
        console.print(line)
    console.print("Sampling is left out there; name a model to count it, or --preset.")
    return {
        "tflop_hours": inputs.tflop_hours,
        "exaflops": inputs.exaflops,
        "saved": {str(n): costs.saved(n) for n in sorted({3, 5, 10, strengths})},
        "exaflops_saved": {str(n): inputs.exaflops * (n - 1) for n in sorted({3, 5, 10, strengths})},
    }


def _print(console: Any, source: str, counted: Any, strengths: int, images: int) -> None:
    from rich.table import Table

    table = Table(title=f"{source}: {strengths} strengths, {images} pictures each", title_justify="left")
    table.add_column("")
    table.add_column("operations", justify="right")
    rows = {
        "one prediction": counted.denoiser.forward,
        "one sample, forward and backward": counted.denoiser.training,
        "one alignment (Diffusion-DPO)": counted.alignment,
        "pictures of one strength": counted.sampling,
        f"a sweep: {strengths} alignments, {strengths} x pictures": counted.sweep,
        f"realignment: 1 alignment, {strengths} x pictures at twice the price": counted.realignment,
    }
    for name, operations in rows.items():
        table.add_row(name, _operations(operations))
    console.print(table)
    more = "saves" if counted.saved >= 0 else "costs"
    console.print(f"Realignment {more} {abs(100 * counted.saved):.1f}% of the sweep.")
    console.print(
        "Counted: matrix products, convolutions and attention of the denoiser. Not counted: elementwise work, the "
        "optimizer, VAE and text encoders."
    )


def _operations(count: float) -> str:
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:,.4g} {unit}FLOP"
    return f"{count:g} FLOP"
