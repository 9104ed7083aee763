"""The papers' own experiments as plans, and the digits' that runs on a laptop.

Aligned models were not published: a plan takes them from a folder of `deradiff align`, `MODELS/beta-500` and so on.
Prompts that were not published are drawn with a seed; the plans say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deradiff.alignment.presets import SD14, SD15, SDXL
from deradiff.alignment.prompts import HPD_STYLES
from deradiff.experiments.plan import Plan

STRENGTHS = (500, 1000, 2000, 5000, 8000, 10_000)
"""DeRaDiff, §5.1."""

FINE_STRENGTHS = (250, 500, 750, 1000, 1250, 1500, 2000)
"""DeRaDiff, appendix A.6.1."""

HACKED, HEALTHY = (250, 500, 750), 2000
"""DeRaDiff, appendix A.6.2."""

POWERS = (1, 1.25, 1.5, 2, 3, 4, 5)
"""Annealed Importance Guidance, appendix A.7.3."""

KL_STRENGTHS = (0.1, 0.5, 1, 2, 5, 10, 20, 50)
"""Annealed Importance Guidance, §4.2."""

SCALES = (0.2, 0.4, 0.6, 0.8)
"""Of LoRA scaling and of λ; the paper does not say which it took."""


def deradiff(name: str, reference: str, guidance_scale: float, models: str) -> dict[str, Any]:
    """DeRaDiff, §5, §6 and appendices A.6, A.8 to A.11, on SDXL or SD1.5."""
    every = sorted({*STRENGTHS, *FINE_STRENGTHS})
    main = [_beta(beta) for beta in STRENGTHS]
    fine = [_beta(beta) for beta in FINE_STRENGTHS]
    hacked, healthy = [_beta(beta) for beta in HACKED], _beta(HEALTHY)
    return {
        "name": name,
        "reference": reference,
        "dtype": "float16",
        "models": {_beta(b): {"source": f"{models}/beta-{b:g}", "beta": b, "family": "Diffusion-DPO"} for b in every},
        "prompts": {
            "preference": {
                "source": ["pickapic-v1", "hpdv2"],
                "split": "test_unique",
                "count": 500,
                "draw_seed": 0,
                "substitute_for": "the 500 prompts of Pick-a-Pic v1 and HPS of DeRaDiff, §5.1",
            },
            "hacking": {
                "source": ["hpdv2", "partiprompts"],
                "count": 1000,
                "draw_seed": 0,
                "substitute_for": "the 1,000 prompts of HPSv2 and PartiPrompts of DeRaDiff, A.6.2",
            },
        },
        "sampling": {"paper": {"scheduler": "euler-a", "steps": 50, "guidance_scale": guidance_scale}},
        "methods": [
            {"method": "reference"},
            {"method": "model", "prompts": ["preference"]},
            {"method": "model", "models": [*hacked, healthy], "prompts": ["hacking"]},
            {"method": "realign", "anchors": main, "targets": main, "prompts": ["preference"]},
            {"method": "realign", "anchors": [_beta(750), _beta(1000)], "targets": fine, "prompts": ["preference"]},
            {"method": "realign", "anchors": hacked, "targets": [healthy], "prompts": ["hacking"]},
            {"method": "realign", "anchors": [_beta(500)], "lam": [0.25, 0.5, 0.75], "prompts": ["preference"]},
        ],
        "scores": ["pickscore", "hps-v2.0", "clip"],
        "features": ["inception"],
        "batch_size": 8,
        "report": {"diversity_on": "hacking", "healthy": healthy, "hacked": hacked, "unregularised": _beta(250)},
    }


def aig(name: str, reference: str, scheduler: str, guidance_scale: float, models: str) -> dict[str, Any]:
    """Annealed Importance Guidance, §4, A.2 and A.3, on SD1.4 or SDXL: both of its two configurations each."""
    one_step = "stabilityai/sdxl-turbo" if reference == SDXL else "stabilityai/sd-turbo"
    rewards = ("pickscore", "hps-v2.0")
    aligned: dict[str, tuple[str, float | None, str]] = {
        f"{reward} DRaFT": (f"{models}/{reward}/beta-0", None, f"DRaFT on {reward}") for reward in rewards
    }
    aligned |= {
        f"{reward} KL {strength:g}": (f"{models}/{reward}/beta-{strength:g}", strength, f"DRaFT + KL on {reward}")
        for reward in rewards
        for strength in KL_STRENGTHS
    }
    aligned["ReFL"] = (f"{models}/refl", None, "ReFL")
    unregularised = [f"{reward} DRaFT" for reward in rewards]
    styles = {style: {"source": f"hpdv2/{style}"} for style in HPD_STYLES}
    return {
        "name": name,
        "reference": reference,
        "dtype": "float16",
        "models": {
            name: {"source": source, "beta": beta, "family": family} for name, (source, beta, family) in aligned.items()
        },
        "prompts": {
            "partiprompts": {"source": "partiprompts"},
            **styles,
            "coverage": {
                "source": "partiprompts",
                "count": 40,
                "draw_seed": 0,
                "seeds": "0:49",
                "substitute_for": "the 40 coverage prompts of Annealed Importance Guidance, §4.1",
            },
            "qualitative": {"source": "partiprompts", "count": 8, "draw_seed": 1},
        },
        "sampling": {"paper": {"scheduler": scheduler, "steps": 25, "guidance_scale": guidance_scale}},
        "methods": [
            {"method": "reference"},
            {"method": "model"},
            {"method": "anneal", "anchors": unregularised, "schedules": [f"power:{p:g}" for p in POWERS]},
            {"method": "interpolate", "anchors": unregularised, "lam": SCALES},
            {"method": "realign", "anchors": unregularised, "lam": SCALES},
            {
                "method": "optimize-noise",
                "reward": rewards[0],
                "pipeline": one_step,
                "steps": 1,
                "prompts": ["qualitative"],
            },
            {"method": "optimize-noise", "reward": rewards[0], "prompts": ["qualitative"]},
        ],
        "scores": [*rewards, "clip"],
        "features": ["inception"],
        "batch_size": 8,
        "report": {"diversity_on": "coverage", "unregularised": unregularised[0]},
    }


def digits(models: str | None) -> dict[str, Any]:
    """Everything of both on the model that ships with deradiff; with `models`, two rewards at once as well.

    `MODELS/bold/beta-250` and `MODELS/ink/beta-250` are `deradiff align digits --reward bold` and `ink`.
    """
    from deradiff.worlds.digits import BETAS

    names = [_beta(beta) for beta in BETAS]
    main, coverage = ["digits"], ["coverage"]
    aligned = {_beta(b): {"source": f"digits:{b:g}", "beta": b, "family": "Diffusion-DPO"} for b in BETAS}
    methods: list[dict[str, Any]] = [
        {"method": "reference"},
        {"method": "model", "models": names},
        {"method": "realign", "anchors": names, "targets": names, "prompts": main},
        {"method": "realign", "anchors": [_beta(30)], "targets": names, "prompts": coverage},
        {
            "method": "realign",
            "anchors": [_beta(100)],
            "targets": [_beta(250), _beta(500)],
            "particles": 8,
            "prompts": main,
        },
        {"method": "anneal", "anchors": [_beta(30)], "schedules": [f"power:{p:g}" for p in POWERS]},
        {"method": "interpolate", "anchors": [_beta(30)], "lam": SCALES},
        {"method": "optimize-noise", "reward": "digits", "iterations": 10, "learning_rate": 0.5, "prompts": ["noise"]},
    ]
    if models is not None:
        two = {name: f"{models}/{name}/beta-250" for name in ("bold", "ink")}
        aligned |= {name: {"source": source, "beta": 250, "family": name} for name, source in two.items()}
        methods += [
            {"method": "model", "models": list(two), "prompts": main},
            {
                "method": "combine",
                "prompts": main,
                "lams": [{"bold": lam, "ink": 1 - lam} for lam in (0.25, 0.5, 0.75)],
            },
        ]
    return {
        "name": "digits",
        "reference": "digits",
        "models": aligned,
        "prompts": {
            "digits": {"source": "digits", "count": 250, "draw_seed": 0, "seeds": "0:3"},
            "coverage": {"source": "digits", "count": 20, "draw_seed": 1, "seeds": "0:49"},
            "noise": {"source": "digits", "count": 20, "draw_seed": 1},
        },
        # Without guidance, so that every λ has a target, and by a sampler that forgets the noise it began with.
        "sampling": {"ancestral": {"scheduler": "euler-a", "steps": 25, "guidance_scale": 1.0}},
        "methods": methods,
        "scores": ["digits", "legible", "colours", "bold", "ink"],
        "features": ["digits"],
        "batch_size": 64,
        "report": {
            "diversity_on": "coverage",
            "healthy": _beta(500),
            "hacked": [_beta(30), _beta(100)],
            "unregularised": _beta(30),
        },
    }


def _beta(beta: float) -> str:
    return f"beta-{beta:g}"


PRESETS: dict[str, Callable[[str | None], dict[str, Any]]] = {
    "deradiff-sdxl": lambda models: deradiff("deradiff-sdxl", SDXL, 5.0, models or "aligned"),
    "deradiff-sd15": lambda models: deradiff("deradiff-sd15", SD15, 7.5, models or "aligned"),
    "aig-sdxl": lambda models: aig("aig-sdxl", SDXL, "euler", 5.0, models or "aligned"),
    "aig-sd14": lambda models: aig("aig-sd14", SD14, "ddim", 7.5, models or "aligned"),
    "digits": digits,
}
"""Plans as plain data, of the folder that their models are in."""


def preset(name: str, models: str | None = None) -> Plan:
    """The plan of that name. Raises `ValueError` for a name that there is not."""
    if name not in PRESETS:
        raise ValueError(f"there is no plan {name!r}: choose among {', '.join(PRESETS)}")
    return Plan.model_validate(PRESETS[name](models))
