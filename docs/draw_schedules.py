"""Draws docs/images/schedules.png: the four families of annealed λ."""

from pathlib import Path

from matplotlib import pyplot

from deradiff.algorithm.schedules import Power, Schedule, Sigmoid, Spline, Step

FAMILIES: dict[str, list[Schedule]] = {
    "power": [Power(1), Power(2), Power(4)],
    "step": [Step(0.25), Step(0.5), Step(0.75)],
    "sigmoid": [Sigmoid(5), Sigmoid(10), Sigmoid(20)],
    "spline": [Spline([(0, 0), (0.5, 0.3), (1, 1)]), Spline([(0.2, 0), (0.4, 0.9), (1, 1)])],
}

figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), sharey=True, layout="constrained")
for ax, (name, schedules) in zip(axes, FAMILIES.items(), strict=True):
    for schedule in schedules:
        schedule.plot(ax)
    ax.set_title(name)
    if ax is not axes[0]:
        ax.set_ylabel("")
figure.savefig(Path(__file__).parent / "images" / "schedules.png", dpi=110)
