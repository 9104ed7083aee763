"""The papers' own experiments as plans, and the digits' that runs on a laptop.

Aligned models were not published: a plan takes them from a folder of `deradiff align`, `MODELS/beta-500` and so on, and
names the command that makes each, which `deradiff experiment check` prints where one is not there. Prompts that were
not published are drawn with a seed; the plans say so.
"""

from __future__ import annotations

import shlex
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

SCALES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of LoRA scaling, and of λ beside it. The paper does not say which it took, but how many: its 149,600 images for each
configuration are 22 times the 6,800 of PartiPrompts, HPDv2 and coverage prompts, and 17 arms are accounted for."""

DIGITS_SCALES = (0.2, 0.4, 0.6, 0.8)

TEST_PROMPTS = "deradiff-test-prompts.yaml"
TEST_PROMPTS_URL = "https://raw.githubusercontent.com/itsShahain/DeRaDiff/e3e760a738ffd8aa638683fbbfdeb5a7c9d93beb/data/test_prompts.yaml"
"""The prompts that DeRaDiff's authors evaluate with, 631 with seed 0, in their repository; the paper speaks of 500."""

RENO = {"pipeline": "stabilityai/sdxl-turbo", "steps": 1, "guidance_scale": 1.0}
"""ReNO's one-step model, sampled without guidance at 512 pixels, which its default rate is for. SD-Turbo, the other one
of its size, was withdrawn."""


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
        "models": {
            _beta(beta): {
                **_aligned(models, beta, "--preset", name),
                "beta": beta,
                "family": "Diffusion-DPO",
            }
            for beta in every
        },
        "prompts": {
            "preference": {
                "source": TEST_PROMPTS,
                "made_by": shlex.join(["curl", "--location", "--output", TEST_PROMPTS, TEST_PROMPTS_URL]),
                "substitute_for": "the 500 prompts of DeRaDiff, §5.1: these are the 631 that its authors published",
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
    rewards = ("pickscore", "hps-v2.0")
    aligned: dict[str, dict[str, Any]] = {}
    for reward in rewards:
        options = (f"{models}/{reward}", "--preset", name, "--reward", reward)
        draft = _aligned(options[0], 0, *options[1:])
        aligned[f"{reward} DRaFT"] = {**draft, "family": f"DRaFT on {reward}", "reward": reward}
        for strength in KL_STRENGTHS:
            about = {"beta": strength, "family": f"DRaFT + KL on {reward}", "reward": reward}
            aligned[f"{reward} KL {strength:g}"] = _aligned(options[0], strength, *options[1:]) | about
    size = ("--resolution", "1024") if reference == SDXL else ()
    refl = _aligned(f"{models}/refl", 0, reference, "--preset", "refl", *size)
    aligned["ReFL"] = {**refl, "family": "ReFL", "reward": "image-reward"}
    unregularised = [f"{reward} DRaFT" for reward in rewards]
    styles = {style: {"source": f"hpdv2/{style}"} for style in HPD_STYLES}
    return {
        "name": name,
        "reference": reference,
        "dtype": "float16",
        "models": aligned,
        "prompts": {
            "partiprompts": {"source": "partiprompts"},
            **styles,
            "coverage": {
                "source": "partiprompts/complex",
                "count": 40,
                "draw_seed": 0,
                "seeds": "0:49",
                "substitute_for": "the 40 complex prompts that were chosen by hand from PartiPrompts for Annealed "
                "Importance Guidance, §4.1: these are drawn from those that PartiPrompts calls complex",
            },
            "qualitative": {"source": "partiprompts", "count": 8, "draw_seed": 1},
        },
        "sampling": {
            "paper": {"scheduler": scheduler, "steps": 25, "guidance_scale": guidance_scale},
            # The paper samples deterministically, where a path has no KL: its figure 3a is drawn by this one.
            "stochastic": {"scheduler": "euler-a", "steps": 25, "guidance_scale": guidance_scale},
        },
        "methods": [
            {"method": "reference", "sampling": ["paper"]},
            {"method": "model", "sampling": ["paper"]},
            _paper("anneal", anchors=unregularised, schedules=[f"power:{p:g}" for p in POWERS]),
            _paper("interpolate", anchors=unregularised, lam=SCALES),
            _paper("realign", anchors=unregularised, lam=SCALES),
            _paper("optimize-noise", reward=rewards[0], **RENO, prompts=["qualitative"]),
            _paper("doodl", reward=rewards[0], prompts=["qualitative"]),
            {"method": "reference", "sampling": ["stochastic"], "prompts": ["partiprompts"]},
            {"method": "model", "sampling": ["stochastic"], "prompts": ["partiprompts"]},
        ],
        "scores": [*rewards, "clip"],
        "features": ["inception"],
        "batch_size": 8,
        "report": {"diversity_on": "coverage", "unregularised": unregularised},
    }


def _paper(method: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "sampling": ["paper"], **options}


def _aligned(folder: str, beta: float, *options: str) -> dict[str, Any]:
    """A model that `deradiff align` makes at one strength."""
    command = ["deradiff", "align", *options, "--beta", f"{beta:g}", "--out", folder]
    return {"source": f"{folder}/{_beta(beta)}", "made_by": shlex.join(command)}


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
        {"method": "interpolate", "anchors": [_beta(30)], "lam": DIGITS_SCALES},
        {"method": "optimize-noise", "reward": "digits", "iterations": 10, "learning_rate": 0.5, "prompts": ["noise"]},
    ]
    if models is not None:
        two = ("bold", "ink")
        for name in two:
            made = _aligned(f"{models}/{name}", 250, "digits", "--reward", name)
            aligned[name] = {**made, "beta": 250, "family": name}
        methods += [
            {"method": "model", "models": two, "prompts": main},
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
    "aig-sdxl": lambda models: aig("aig-sdxl", SDXL, "euler-trailing", 5.0, models or "aligned"),
    "aig-sd14": lambda models: aig("aig-sd14", SD14, "ddim", 7.5, models or "aligned"),
    "digits": digits,
}
"""Plans as plain data, of the folder that their models are in."""


def preset(name: str, models: str | None = None) -> Plan:
    """The plan of that name. Raises `ValueError` for a name that there is not."""
    if name not in PRESETS:
        raise ValueError(f"there is no plan {name!r}: choose among {', '.join(PRESETS)}")
    return Plan.model_validate(PRESETS[name](models))
