"""How figures look: the same colour and marker for the same way of sampling in all of them."""

from typing import Any, NamedTuple


class Style(NamedTuple):
    """How a way of sampling is drawn."""

    label: str
    colour: str
    marker: str


# Okabe and Ito's colours, which colour-blind people tell apart.
ARMS = {
    "aligned": Style("aligned, same sampler", "#8A8A8A", "o"),
    "plain": Style("Algorithm 1", "#D55E00", "s"),
    "weighted": Style("weighted mean", "#0072B2", "^"),
    "particles": Style("particles", "#009E73", "D"),
    "annealed": Style("annealed guidance", "#E69F00", "v"),
    "interpolated": Style("interpolated weights", "#CC79A7", "P"),
}
KINDS = {
    "trust": Style("trust", "#56B4E9", "o"),
    "off": Style("off", "#000000", "^"),
    "unclear": Style("unclear", "#B07AA1", "s"),
    "uneven": Style("uneven", "#8C510A", "X"),
    "few": Style("few", "#E69F00", "P"),
}

LOOK: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
}
