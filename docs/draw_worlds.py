"""Draws docs/images/world-*.png: the closed-form examples behind annealed importance guidance."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps, pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from deradiff.worlds.gaussian_mixture import (
    GaussianMixture,
    Noise,
    QuadraticReward,
    crossing,
    linear_reward,
    variance_preserving,
)
from deradiff.worlds.gaussian_presets import (
    collapse,
    dropout_average,
    mixing,
    off_segment,
    parametrised_peak,
    peak,
    reverse,
    sampled_reverse,
    tikhonov,
    total_variance,
    two_modes,
)

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#555555"
RAMP = colormaps["viridis"]
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
}

IMAGES = Path(__file__).parent / "images"
LINE = torch.linspace(-3.2, 3.2, 1281, dtype=torch.float64)
BETAS = torch.logspace(2, -4, 121, dtype=torch.float64)
RATES = {0.0: BLUE, 0.5: ORANGE, 0.95: GREEN}
"""Dropout rates; AIG's point is that those above 0.95 collapse too."""


def density(model: GaussianMixture) -> Tensor:
    """The density of a one-dimensional model along `LINE`."""
    return model.log_density(LINE[:, None]).exp()


def histogram(ax: Axes, samples: Tensor, colour: str, label: str, share: float = 1.0) -> None:
    """Samples as a histogram whose area is `share`."""
    weights = np.full(len(samples), share / (len(samples) * 0.08))
    ax.hist(
        samples.flatten(),
        bins=np.arange(-3.2, 3.21, 0.08).tolist(),
        weights=weights,
        color=colour,
        alpha=0.45,
        label=label,
    )


# -- figure 9 of the paper ---------------------------------------------------------------------------------------------

TIMESTEPS = [50, 200, 350, 600, 990]


def draw_forward(ax: Axes, model: GaussianMixture, noise: Noise, images: Tensor, noises: Tensor) -> None:
    """Noised images in the colour of the mode they came from, and the exact density of either."""
    noised, marginal = noise.alpha * images + noise.sigma * noises, model.noised(noise)
    origin = model.modes_of(images).argmax(1)
    exact = marginal.log_joint(LINE[:, None]).exp()
    for k, (name, colour) in enumerate({"from the right mode": BLUE, "from the left mode": RED}.items()):
        histogram(ax, noised[origin == k], colour, share=float(model.mode_weights[k]), label=name)
        ax.plot(LINE, exact[:, k], color="black", linewidth=1.2)


def draw_reverse(ax: Axes, exact: GaussianMixture, samples: Tensor) -> None:
    """Samples of one reverse conditional beside its exact density."""
    histogram(ax, samples, GREEN, label="sampled by DDIM, η = 1, with the exact score")
    ax.plot(LINE, density(exact), color="black", linewidth=1.2, label="exact density")


def draw_mixing() -> Figure:
    """Forward mixing, one reverse step, the whole reverse process; below, both as functions of t (AIG, figure 9)."""
    model = two_modes().reference
    chance = torch.Generator().manual_seed(4)
    images = model.sample(6000, chance)
    noises = torch.randn(images.shape, dtype=torch.float64, generator=chance)
    figure = pyplot.figure(figsize=(10.5, 8.6), layout="constrained")
    grid = figure.add_gridspec(4, len(TIMESTEPS))
    columns = [[figure.add_subplot(grid[row, column]) for row in range(3)] for column in range(len(TIMESTEPS))]
    for (forward, step, whole), timestep in zip(columns, TIMESTEPS, strict=True):
        now, then = variance_preserving(timestep), variance_preserving(timestep - 10)
        point = now.alpha * torch.tensor([1.1], dtype=torch.float64) + now.sigma * -0.6
        draw_forward(forward, model, now, images, noises)
        forward.set_title(f"t = {timestep}", fontweight="bold")
        exact = reverse(model, point, now, then)
        samples = sampled_reverse(model, point, timestep, timestep - 10, count=6000, stride=10, generator=chance)
        draw_reverse(step, exact, samples)
        step.set_title(f"standard deviation {total_variance(exact) ** 0.5:.2f}", fontsize=9)
        exact = reverse(model, point, now)
        draw_reverse(whole, exact, sampled_reverse(model, point, timestep, count=6000, generator=chance))
        whole.set_title(f"{exact.mode_weights[1]:.0%} left, {exact.mode_weights[0]:.0%} right", fontsize=9)
        for ax in (forward, step, whole):
            ax.axvline(float(point), color=ORANGE, linestyle="--", linewidth=1.5, label="the $x_t$ to go back from")
            ax.set(yticks=[], xlim=(-3.2, 3.2), xticks=[-2, 0, 2])
            ax.tick_params(labelbottom=ax is whole)
    rows = (
        "noised images\n$q_t(x_t)$",
        "one step back\n$p(x_{t-10}\\,|\\,x_t)$",
        "all the way back\n$p(x_0\\,|\\,x_t)$",
    )
    for ax, label in zip(columns[0], rows, strict=True):
        ax.set_ylabel(label)
    named = {
        label: handle for ax in columns[0][:2] for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=5, columnspacing=1.2)
    draw_recovery(figure.add_subplot(grid[3, :]), model)
    return figure


def draw_recovery(ax: Axes, model: GaussianMixture) -> None:
    """How open the image and its mode still are at every timestep."""
    timesteps = list(range(0, 1000, 10))
    numbers = [mixing(model, t) for t in timesteps]
    marks = [timesteps.index(t) for t in TIMESTEPS]
    for values, colour in (([n.variance for n in numbers], GREEN), ([n.guess for n in numbers], BLUE)):
        ax.plot(timesteps, values, "o-", color=colour, markevery=marks, markersize=5)
    ax.text(390, 0.2, "how much of the images' variance $x_t$ leaves open", color=GREEN)
    ax.text(620, 0.44, "how often the mode of origin can be told from $x_t$", color=BLUE)
    ax.set(xlabel="timestep t", ylabel="share", xlim=(0, 1000), ylim=(0, 1.05))


# -- Lemma 1 -----------------------------------------------------------------------------------------------------------


def draw_densities(ax: Axes, model: GaussianMixture, reward: QuadraticReward, betas: list[float]) -> None:
    """The reference and the models aligned at `betas`, with the reward's maximiser."""
    ax.fill_between(LINE, density(model), color=GREY, alpha=0.2, linewidth=0, label="reference")
    for beta, shade in zip(betas, np.linspace(0.85, 0.1, len(betas)), strict=True):
        ax.plot(LINE, density(model.tilted(reward / beta)[0]), color=RAMP(shade), label=f"β = {beta:g}")
    ax.axvline(float(peak(reward)), color=RED, linestyle="--", linewidth=1.5, label="maximiser")
    ax.set(xlim=(-2, 2.6), xlabel="x", ylabel="density", title="models aligned to a reward with a peak")
    ax.legend(loc="upper left")


def draw_collapse() -> Figure:
    """What is left of the reference as β falls (AIG, Lemma 1)."""
    world = two_modes()
    model, reward = world.reference, world.rewards["peak"]
    figure, ((first, second), (third, fourth)) = pyplot.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    draw_densities(first, model, reward, [1, 0.1, 0.03, 0.01])
    numbers = [collapse(model, reward, float(beta)) for beta in BETAS]
    second.loglog(BETAS, [n.variance for n in numbers], color=BLUE, label="total variance")
    second.loglog(BETAS, [n.distance for n in numbers], color=RED, label="distance of the mean to the maximiser")
    second.loglog(BETAS, BETAS / reward.curvature, color=GREY, linestyle=":", label="β / curvature")
    second.set(title="what is left", ylabel="variance, distance", ylim=(3e-5, 200))
    third.semilogx(BETAS, [n.divergence for n in numbers], color=GREEN, label="KL to the reference")
    limit = numbers[-1].divergence - (BETAS / BETAS[-1]).log() / 2
    third.semilogx(BETAS, limit, color=GREY, linestyle=":", label="½ log(1/β) + constant")
    third.set(title="what it costs", ylabel="nats", ylim=(-0.5, 10))
    for k, (name, colour) in enumerate({"right mode": BLUE, "left mode": RED}.items()):
        fourth.semilogx(BETAS, [n.mode_weights[k] for n in numbers], color=colour, label=name)
    fourth.set(title="which modes survive", ylabel="weight", ylim=(-0.03, 1.03))
    for ax in (second, third, fourth):
        ax.set(xlabel="β, from weak alignment to strong", xlim=(1e2, 1e-4))
    second.legend(loc="upper right")
    third.legend(loc="upper left")
    fourth.legend(loc="center right")
    return figure


# -- appendix A.1.1 ----------------------------------------------------------------------------------------------------


def draw_dropout() -> Figure:
    """Dropout in the reward: the average is another reward, and alignment to it collapses as ever (AIG, A.1.1)."""
    world = two_modes()
    model, plain = world.reference, world.rewards["peak"]
    parameters = torch.cat([peak(plain), plain.curvature])
    figure, ((first, second), (third, fourth)) = pyplot.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    draw_linear_dropout(first)
    draws = {"nothing dropped": [1.0, 1.0], "target dropped": [0.0, 1.0], "curvature dropped": [1.0, 0.0]}
    for (name, mask), colour in zip(draws.items(), (BLUE, GREEN, GREY), strict=True):
        reward = parametrised_peak(parameters * torch.tensor(mask, dtype=torch.float64))
        second.plot(LINE, reward(LINE[:, None]), color=colour, linewidth=1.2, linestyle="--", label=name)
    average = dropout_average(parametrised_peak, parameters, 0.5)
    second.plot(LINE, average(LINE[:, None]), color=RED, linewidth=2.5, label="average over dropout")
    second.set(
        title="a reward with a peak under dropout, ξ = 0.5",
        xlabel="x",
        ylabel="reward",
        xlim=(-2, 2.6),
        ylim=(-5, 0.3),
    )
    second.legend(loc="lower center")
    draw_densities(third, model, average, [1, 0.1, 0.03, 0.01])
    third.set_title("models aligned to that average")
    for rate, colour in RATES.items():
        reward = dropout_average(parametrised_peak, parameters, rate)
        variances = [collapse(model, reward, float(beta)).variance for beta in BETAS]
        fourth.loglog(BETAS, variances, color=colour, label=f"ξ = {rate:g}")
    fourth.set(
        title="the collapse comes at every rate",
        xlabel="β, from weak alignment to strong",
        ylabel="total variance",
        xlim=(1e2, 1e-4),
    )
    fourth.legend()
    return figure


def draw_linear_dropout(ax: Axes) -> None:
    """A mode's weight against β under dropout of a linear reward: the plain model's, at another β."""
    world = crossing()
    phi = world.rewards["slope"].linear
    plain = world.rewards["slope"]
    for rate, colour in RATES.items():
        reward = dropout_average(linear_reward, phi, rate)
        weights = [float(world.reference.tilted(reward / float(beta))[0].mode_weights[0]) for beta in BETAS]
        ax.semilogx(BETAS, weights, color=colour, label=f"dropout ξ = {rate:g}")
        markers = BETAS[::6]
        shifted = [float(world.reference.tilted(plain / (float(b) / (1 - rate)))[0].mode_weights[0]) for b in markers]
        ax.semilogx(markers, shifted, "o", color=colour, markersize=4)
    ax.semilogx([], [], "o", color=GREY, markersize=4, label="no dropout, at β/(1-ξ)")
    ax.set(
        title="a linear reward on four modes",
        xlabel="β, from weak alignment to strong",
        ylabel="weight of the best mode",
    )
    ax.set(xlim=(1e2, 1e-2), ylim=(0.2, 1.02))
    ax.legend(loc="upper left")


# -- Lemma 2 -----------------------------------------------------------------------------------------------------------

ALPHAS = torch.logspace(-3, 3, 121, dtype=torch.float64)
BASE, TUNED = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 1.0], dtype=torch.float64)


def hessian(condition: float) -> Tensor:
    """A Hessian of eigenvalues 1 and `condition`, turned so that the segment is no eigenvector."""
    angle = torch.tensor(1.25, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return turn @ torch.diag(torch.tensor([condition, 1.0], dtype=torch.float64)) @ turn.T


def draw_interpolation() -> Figure:
    """Interpolated weights as minimisers of a penalised loss: in the Hessian's metric, and plain L2 (AIG, Lemma 2)."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained", width_ratios=[1.25, 1])
    curvature, identity = hessian(12), torch.eye(2, dtype=torch.float64)
    xs, ys = torch.meshgrid(torch.linspace(-0.5, 3.1, 200), torch.linspace(-0.9, 1.7, 200), indexing="xy")
    offset = torch.stack([xs, ys], -1).double() - TUNED
    loss = torch.einsum("...i,ij,...j->...", offset, curvature, offset) / 2
    left.contour(xs, ys, loss, levels=[0.05, 0.25, 0.8, 2, 4], colors=GREY, linewidths=0.8, alpha=0.6)
    left.plot(*zip(BASE, TUNED, strict=True), color=BLUE, linewidth=5, alpha=0.3, label="interpolated weights")
    marks = [0.1, 0.3, 1, 3, 10]
    for metric, colour, name in (
        (curvature, BLUE, "penalty in the Hessian's metric"),
        (identity, RED, "plain L2 penalty"),
    ):
        path = torch.stack([tikhonov(BASE, TUNED, curvature, float(alpha), metric) for alpha in ALPHAS])
        stops = torch.stack([tikhonov(BASE, TUNED, curvature, alpha, metric) for alpha in marks])
        left.plot(*path.T, color=colour, linewidth=1.5)
        left.plot(*stops.T, "o", color=colour, markersize=5, label=name)
    left.plot(*BASE, "s", color="black")
    left.plot(*TUNED, "*", color="black", markersize=12)
    left.annotate("$\\theta_{base}$", BASE, xytext=(-8, -14), textcoords="offset points")
    left.annotate("$\\theta_d$", TUNED, xytext=(8, 6), textcoords="offset points")
    left.set(aspect="equal", xlabel="$\\theta_1$", ylabel="$\\theta_2$", title="minimisers at α = 0.1, 0.3, 1, 3, 10")
    left.legend(loc="lower right", frameon=True, framealpha=1, edgecolor="none")
    for condition, shade in ((1, 0.85), (3, 0.6), (12, 0.35), (50, 0.1)):
        h = hessian(condition)
        gaps = [off_segment(tikhonov(BASE, TUNED, h, float(alpha), identity), BASE, TUNED) for alpha in ALPHAS]
        right.semilogx(ALPHAS, gaps, color=RAMP(shade), label=f"{condition}")
    right.set(
        xlabel="weight α of the L2 penalty",
        ylabel="distance / length of the segment",
        title="how far plain L2 leaves the segment",
        ylim=(-0.02, 0.5),
    )
    right.legend(title="condition number of H", loc="upper left")
    return figure


FIGURES = {
    "world-mixing": draw_mixing,
    "world-collapse": draw_collapse,
    "world-dropout": draw_dropout,
    "world-interpolation": draw_interpolation,
}


def main() -> None:
    """Draw every figure into docs/images."""
    pyplot.rcParams.update(STYLE)
    for name, draw in FIGURES.items():
        buffer = BytesIO()
        draw().savefig(buffer, dpi=150)
        # 128 colours are plenty for lines, and halve the files; matplotlib's version is lost with the metadata, so that
        # a picture changes only when what it shows does.
        Image.open(buffer).convert("RGB").quantize(128).save(IMAGES / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
