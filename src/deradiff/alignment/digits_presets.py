"""Hyperparameters of alignments of the models that ship: the digits, and the flow digits."""

from dataclasses import replace
from typing import Any

from deradiff.alignment.lora_targets import WIDER_JOINT_TARGETS, WIDER_TARGETS
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import TrainingPlan

_UNSCALED, _DIGITS_SCALED = ({"reward_scale": scale, "reward_dropout": 0.0} for scale in (1.0, 300.0))
_DIGITS_NOTES = (
    "The reward scale of 300 is chosen so that Annealed Importance Guidance's λ_KL, 0.1 to 50, goes from the hacked "
    "model to the base here, too"
)
_DIGITS = Preset(
    source="deradiff's own, for the model that ships with it",
    method="dpo",
    base="digits",
    data="own",
    plan=TrainingPlan(
        steps=300, learning_rate=4e-4, warmup=20, adam_betas=(0.9, 0.99), average=0.97, evaluate_every=25
    ),
    batch=64,
    resolution=32,
    betas=(250,),
    lora_rank=16,
    lora_targets=WIDER_TARGETS,
    held_out=100,
    sampling={"scheduler": "ddim", "steps": 25, "guidance_scale": 1.0},
    reward="digits",
)
_DIGITS_BY_REWARD = replace(_DIGITS, plan=replace(_DIGITS.plan, steps=100, learning_rate=1e-3), batch=32)
_DIGITS_BY_GRADIENT = replace(_DIGITS_BY_REWARD, notes=_DIGITS_NOTES)
_FLOW_DIGITS = replace(
    _DIGITS,
    base="digits-flow",
    batch=32,
    lora_targets=WIDER_JOINT_TARGETS,
    density="logit-normal",
    sampling={"scheduler": "flow-euler", "steps": 16, "guidance_scale": 1.0},
)
_AS_FOR_THE_DIGITS = "Rates, steps and strength are those for the digits, and were not tuned on the flow digits."
_FLOW_DIGITS_BY_REWARD = replace(_FLOW_DIGITS, plan=_DIGITS_BY_REWARD.plan, density=None, notes=_AS_FOR_THE_DIGITS)
_FLOW_DIGITS_BY_POLICY = replace(
    _FLOW_DIGITS_BY_REWARD,
    batch=64,
    betas=(0.0,),
    sampling={"scheduler": "flow-sde", "steps": 10, "guidance_scale": 1.0, "eta": 0.495},
)
_WEIGHTED: dict[str, Any] = {
    "method": "rwr",
    "plan": replace(_DIGITS.plan, steps=600, learning_rate=1e-3, cosine=600),
    "betas": (0.5,),
    "prompt_dropout": 0.1,
    "options": {"per_prompt": 16},
}

DIGITS_PRESETS: dict[str, Preset] = {
    # Diffusion-DPO sees β times a difference of errors: with a rate proportional to 1/β any β takes as many steps.
    "digits": replace(_DIGITS, rate_times_beta=0.1, prompt_dropout=0.1),
    "digits-mapo": replace(_DIGITS, method="mapo", betas=(0.1,), prompt_dropout=0.1),
    "digits-draft": replace(_DIGITS_BY_GRADIENT, method="draft", betas=(2.0,), options={"keep": 1, **_DIGITS_SCALED}),
    "digits-alignprop": replace(
        _DIGITS_BY_GRADIENT, method="alignprop", betas=(2.0,), options={"window": (1, 25), **_DIGITS_SCALED}
    ),
    "digits-refl": replace(
        _DIGITS_BY_GRADIENT,
        method="refl",
        betas=(3000.0,),
        options={"window": (20, 25), "pretraining": 0.0, **_DIGITS_SCALED},
    ),
    "digits-rwr": replace(_DIGITS, **_WEIGHTED),
    "digits-ddpo": replace(
        _DIGITS_BY_REWARD, method="ddpo", batch=64, betas=(0.005,), options={"per_prompt": 4, **_UNSCALED}
    ),
    "digits-flow": replace(_FLOW_DIGITS, betas=(100,), rate_times_beta=0.03, prompt_dropout=0.1),
    "digits-flow-draft": replace(
        _FLOW_DIGITS_BY_REWARD, method="draft", betas=(2.0,), options={"keep": 1, **_DIGITS_SCALED}
    ),
    "digits-flow-alignprop": replace(
        _FLOW_DIGITS_BY_REWARD, method="alignprop", betas=(2.0,), options={"window": (1, 16), **_DIGITS_SCALED}
    ),
    "digits-flow-refl": replace(
        _FLOW_DIGITS_BY_REWARD,
        method="refl",
        betas=(3000.0,),
        options={"window": (12, 16), "pretraining": 0.0, **_DIGITS_SCALED},
    ),
    "digits-flow-rwr": replace(_FLOW_DIGITS, **_WEIGHTED, notes=_AS_FOR_THE_DIGITS),
    "digits-flow-grpo": replace(
        _FLOW_DIGITS_BY_POLICY,
        method="flow-grpo",
        plan=replace(_DIGITS_BY_REWARD.plan, steps=200),
        notes="",
        options={"per_prompt": 8, "updates": 2, "clip": 1e-3, **_UNSCALED},
    ),
    "digits-flow-nft": replace(
        _FLOW_DIGITS_BY_POLICY,
        method="diffusion-nft",
        sampling={"scheduler": "flow-euler", "steps": 10, "guidance_scale": 1.0},
        options={"per_prompt": 8, "updates": 1, "mixing": 1.0, "memory": (0, 0.001, 0.5), **_UNSCALED},
    ),
}
"""By name."""
