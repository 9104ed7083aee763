"""The quality of a digits world as a table."""

from typing import Any

from rich.console import Console
from rich.table import Table

from deradiff.worlds.digits.quality import Quality


def show(console: Console, found: Quality) -> None:
    """Print `found` beside what real handwriting scores, and which goals are met."""
    table = Table(title=f"{found.samples} samples, {found.steps} steps, guidance scale {found.guidance_scale:g}")
    table.add_column("")
    for heading in ("generated", "held-out real", "goal"):
        table.add_column(heading, justify="right")

    def percent(estimate: Any) -> str:
        return f"{100 * estimate.value:.1f} ± {100 * estimate.error:.1f}%"

    scores = found.generated
    table.add_row("digit legible to the SVM", percent(scores.legible), percent(found.real_legible), "≥ 97%")
    table.add_row("named ink right", percent(scores.ink_right), "", "≥ 97%")
    table.add_row("named paper right", percent(scores.paper_right), "", "≥ 97%")
    table.add_row("variance within a digit", percent(found.variance_ratio), "100%", "≥ 85%")
    names = ("5th percentile", "quartile", "median")
    for name, generated, real in zip(names, found.nearest_generated, found.nearest_real, strict=True):
        table.add_row(f"nearest training digit, {name}", f"{generated:.3f}", f"{real:.3f}", "no closer")
    console.print(table)
    for goal, met in found.goals().items():
        console.print(f"{'met' if met else 'missed'}  {goal}", style="green" if met else "red")
