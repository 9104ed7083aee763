"""`deradiff demo`: the dial on the digits that ship with deradiff, in pictures and in numbers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from deradiff.cli import terminal

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
PROMPTS = ("a handwritten three", "a red seven", "a five on yellow paper", "a blue eight on white paper")
SEED = 0
MEASURED = 60
"""Images of every column that the table is made from, each of a prompt of its own."""


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The folder for the images; an older demo in it is replaced.")
    ] = Path("demo"),
) -> None:
    """Turn the dial on the digits that ship with deradiff: no download, no GPU, about a minute."""
    with terminal.refusing_wrong_input(), terminal.progress("sampling") as on_step:
        from deradiff.algorithm.schedules import Power
        from deradiff.files.folders import RunFolder
        from deradiff.sweep.drawing import draw, realigned
        from deradiff.sweep.settings import Column, Settings
        from deradiff.worlds import digits

        beta = digits.BETAS[-2]  # an anchor that over-optimises, so that there is something to dial back
        columns = (*(Column(lam=lam) for lam in LAMS), Column(lam=1.0, schedule=Power(2).to_dict()))
        settings = Settings(
            reference="digits",
            anchors={"anchor": f"digits:{beta:g}"},
            prompts=PROMPTS,
            columns=columns,
            seeds=(SEED,),
            guidance_scale=digits.GUIDANCE,
            anchor_beta=beta,
            batch_size=len(PROMPTS) * len(columns),
        )
        with RunFolder(out, force=True, kind="measured") as folder, realigned(settings) as (pipe, dial):
            measured: list[dict[str, Any]] = []
            for column in columns:
                on_step(len(measured), len(columns) + 1)
                measured.append(_measure(pipe, dial, column, beta))
            draw(settings, pipe, dial, folder, measured=measured, measured_images=MEASURED)
    _print_table(measured)
    terminal.files(["", "Images (the same noise in every column):", folder.sheet, folder.images, folder.record])


def _measure(pipe: Any, dial: Any, column: Any, anchor_beta: float) -> dict[str, Any]:
    """Reward and legibility at one λ: the same prompts and noise for every column, so that columns compare pairwise."""
    from deradiff.algorithm.estimates import mean
    from deradiff.worlds.digits import captions, quality
    from deradiff.worlds.digits.rewards import DigitsReward

    dial.lam = column.dial()
    prompts = captions.sample_prompts(MEASURED, SEED)
    images = quality.draw(pipe, prompts, SEED)
    reward, legible = mean(DigitsReward()(images, prompts)), quality.score(images, prompts).legible
    return {
        "lam": column.lam,
        "schedule": column.schedule,
        "beta": column.beta(anchor_beta),
        "reward": reward.value,
        "reward_error": reward.error,
        "legible": legible.value,
        "legible_error": legible.error,
    }


def _print_table(measured: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(
        caption=f"{MEASURED} images a row; ± is the standard error. Legible: to an SVM trained on real digits."
    )
    for heading in ("λ", "β/λ", "reward", "legible"):
        table.add_column(heading, justify="right")
    for row in measured:
        beta = "∞" if row["lam"] == 0 else f"{row['beta']:.4g}" if row["beta"] else "annealed"
        table.add_row(
            f"0 → {row['lam']:g}" if row["schedule"] else f"{row['lam']:g}",
            beta,
            f"{row['reward']:.3f} ± {row['reward_error']:.3f}",
            f"{row['legible']:.1%} ± {row['legible_error']:.1%}",
        )
    terminal.LiteralConsole().print(table)
