"""Hyperparameters by name: published ones, whose `notes` say what a paper leaves open, and the shipped models'."""

from dataclasses import replace
from typing import Any

from deradiff.alignment.digits_presets import DIGITS_PRESETS
from deradiff.alignment.lora_targets import JOINT_TARGETS, LORA_TARGETS
from deradiff.alignment.settings import Preset
from deradiff.alignment.training import TrainingPlan
from deradiff.worlds import find

SDXL, SD14 = "stabilityai/stable-diffusion-xl-base-1.0", "CompVis/stable-diffusion-v1-4"
SD35 = "stabilityai/stable-diffusion-3.5-medium"
SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""A copy of `runwayml/stable-diffusion-v1-5`, which has gone from the hub."""


_DPO_NOTES = (
    "Table 4 prints a rate of 1e-8, that of Diffusion-DPO's launchers (SalesforceAIResearch/DiffusionDPO), which "
    "multiply it by GPUs x batch x accumulation (--scale_lr), as is done here: as it is, it teaches almost nothing. "
    "From the same script and not from Table 4: all weights, fp16, weight decay 0.01, gradients clipped to 1, 20% of "
    "the prompts dropped, each picture mirrored with probability ½ (once, where pairs are cached; latents are means of "
    "the VAE's distribution, where the script draws from it)"
)
_DRAFT_NOTES = (
    "Batch, rate, clipping and precision are the paper's (A.7.1): 4 hours on 8 H100. From its authors' code "
    "(NVIDIA/NeMo-Aligner) and not from the paper: a LoRA of rank 32, 10,000 steps, weight decay 0.0005, λ_KL times a "
    "mean over the elements of a latent where equation 4 prints a sum, rewards times the CLIP model's logit scale of "
    "100. That code clips to 10 and averages weights by 0.9999; here it is done as the paper says. 50,000 prompts of "
    "Pick-a-Pic (--count 50000 draws as many). The paper trains on HPSv2 and on PickScore (--reward pickscore). "
    "λ_KL = 0 is DRaFT without KL."
)
_UNSCALED, _SCALED = ({"reward_scale": scale, "reward_dropout": 0.0} for scale in (1.0, 100.0))
_NOT_IN_THE_PAPERS = "The two papers do not train with it: rate, steps, batch and LoRA are a start of deradiff's own."

_PLAIN = TrainingPlan(
    steps=1000, learning_rate=1e-5, warmup=0, adam_betas=(0.9, 0.999), average=0.0, checkpoint_seconds=600
)
_DPO = replace(_PLAIN, weight_decay=0.01, accumulate=64)
_DRAFT = replace(
    _PLAIN,
    steps=10_000,
    learning_rate=2.5e-4,
    weight_decay=0.0005,
    accumulate=4,
    max_norm=0.1,
    evaluate_every=250,
)
_START = replace(_PLAIN, steps=2000, learning_rate=1e-4, warmup=100, accumulate=16)

_DERADIFF = Preset(
    source="DeRaDiff, Table 4 and §5.1",
    method="dpo",
    base=SD15,
    data="pickapic-v1",
    plan=replace(_DPO, steps=2000, warmup=500, learning_rate=1e-8 * 64),
    batch=64,
    resolution=512,
    flip=True,
    prompt_dropout=0.2,
    betas=(500, 1000, 2000, 5000, 8000, 10_000),
    precision="fp16",
    sampling={"scheduler": "euler-a", "steps": 50, "guidance_scale": 7.5},
    notes=f"1 GPU x batch 1 x 64 accumulated. {_DPO_NOTES}, AdamW.",
)
_AIG = Preset(
    source="Annealed Importance Guidance, §4 and A.7.1",
    method="draft",
    base=SD14,
    data="pickapic-v1",
    plan=_DRAFT,
    batch=32,
    resolution=512,
    betas=(0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0),
    lora_rank=32,
    precision="bf16",
    sampling={"scheduler": "ddim", "steps": 25, "guidance_scale": 7.5},
    reward="hps-v2.0",
    options={"keep": 1, **_SCALED},
    notes=_DRAFT_NOTES,
)
_OURS = Preset(
    source="deradiff's own",
    method="ddpo",
    base=SD15,
    data="pickapic-v1",
    plan=_START,
    batch=64,
    resolution=512,
    lora_rank=64,
    precision="bf16",
    sampling={"scheduler": "ddim", "steps": 50, "guidance_scale": 5.0},
    reward="pickscore",
    options={"per_prompt": 4, **_UNSCALED},
    notes=_NOT_IN_THE_PAPERS,
)
_FLOW_NOTES = (
    "Batch, rate, weight decay, LoRA, resolution and strength are the released configuration's. It has no number of "
    "steps, for a run is stopped by hand: 2000 here. What differs: the LoRA's alpha is its rank, there twice that, and "
    "its first weights are PEFT's own, there normal; rewards are divided by their spread among the pictures of a "
    "prompt, there by that of a whole round; prompts have the pipeline's 256 tokens, there 128; micro-batches hold a "
    "prompt's 24 pictures (1 process; more of them need a smaller --accumulate), so activations are computed anew. "
)
_GRPO_NOTES = (
    f"{_FLOW_NOTES}The noise of a step is that of the exact transition, less than that of the released "
    "Euler-Maruyama step where steps are few; steps 1 to 8 of 10 are learned from, there 1 to 9; pictures of prompts "
    "whose rewards are all equal stay in the batch. The moving average of 0.974 at every step is that of 0.9 twice in "
    "eight steps, as the code does it. A round is 48 prompts x 24 pictures and 2 updates. "
)
_NFT_NOTES = (
    f"{_FLOW_NOTES}It draws by a solver of second order, here by Euler's method, and learns at 9 of the sampler's 10 "
    "times, here at all. A round is 48 prompts x 24 pictures. "
)
_PICKAPIC_LISTED = "The prompts are those of Pick-a-Pic as that repository lists them (--data)."
_OWN_REWARD = "Its prompts are in that repository (--data); its reward is a program of its own: name one (--reward)."
_FLOW_GRPO = Preset(
    source="Liu et al. 2025, arXiv 2505.05470, config/grpo.py of yifan123/flow_grpo",
    method="flow-grpo",
    base=SD35,
    data="pickapic-v1",
    plan=replace(_PLAIN, steps=2000, learning_rate=3e-4, weight_decay=1e-4, accumulate=24, average=0.974),
    batch=576,
    resolution=512,
    betas=(0.01,),
    lora_rank=32,
    lora_targets=JOINT_TARGETS,
    held_out=64,
    precision="fp16",
    gradient_checkpointing=True,
    # Its noise of 0.7 √(t/(1-t)), in shares of the memoryless √(2t/(1-t)).
    sampling={"scheduler": "flow-sde", "steps": 10, "guidance_scale": 4.5, "eta": 0.495},
    reward="pickscore",
    options={"per_prompt": 24, "updates": 2, "clip": 1e-4, **_UNSCALED},
    notes=_GRPO_NOTES + _PICKAPIC_LISTED,
)
_NFT = replace(
    _FLOW_GRPO,
    source="Zheng et al. 2025, arXiv 2509.16117, config/nft.py of NVlabs/DiffusionNFT",
    method="diffusion-nft",
    plan=replace(_FLOW_GRPO.plan, accumulate=48, average=0.9),
    batch=1152,
    betas=(0.0001,),
    sampling={"scheduler": "flow-euler", "steps": 10, "guidance_scale": 1.0},
    options={"per_prompt": 24, "updates": 1, "mixing": 1.0, "memory": (0, 0.001, 0.5), **_UNSCALED},
    notes=_NFT_NOTES + _PICKAPIC_LISTED,
)
_UNREWARDED: dict[str, Any] = {"data": "", "reward": None}
PRESETS: dict[str, Preset] = {
    "deradiff-sdxl": replace(
        _DERADIFF,
        base=SDXL,
        plan=replace(
            _DPO, steps=30_000, warmup=200, learning_rate=1e-8 * 128, optimizer="adafactor", evaluate_every=500
        ),
        batch=128,
        resolution=1024,
        gradient_checkpointing=True,
        vae="madebyollin/sdxl-vae-fp16-fix",
        sampling={"scheduler": "euler-a", "steps": 50, "guidance_scale": 5.0},
        notes="2 GPUs x batch 1 x 64 accumulated; appendix A.6 aligns at 250 to 2000 as well. "
        f"{_DPO_NOTES}, Adafactor and gradient checkpointing.",
    ),
    "deradiff-sd15": _DERADIFF,
    "aig-sdxl": replace(
        _AIG,
        base=SDXL,
        resolution=1024,
        sampling={"scheduler": "euler", "steps": 25, "guidance_scale": 5.0},
        notes="The paper samples with EDM; its authors' code with Euler's first order on the model's own noise levels. "
        + _DRAFT_NOTES,
    ),
    "aig-sd14": _AIG,
    "mapo": replace(
        _DERADIFF,
        source="Hong et al. 2024, arXiv 2406.06424, the launcher of mapo-t2i/mapo",
        method="mapo",
        base=SDXL,
        data="pickapic-v2",
        plan=replace(_PLAIN, steps=2000, weight_decay=0.01, accumulate=2, optimizer="adamw8bit"),
        batch=16,
        resolution=1024,
        prompt_dropout=0.0,
        betas=(0.1,),
        gradient_checkpointing=True,
        vae="madebyollin/sdxl-vae-fp16-fix",
        sampling={"scheduler": "euler", "steps": 50, "guidance_scale": 5.0},
        notes="The launcher's figures, for one GPU and a small set of pairs; those of the published model it does not "
        "give.",
    ),
    "alignprop": replace(
        _OURS,
        source="Prabhudesai et al. 2023, arXiv 2310.03739, and mihirp1998/AlignProp",
        method="alignprop",
        plan=replace(_PLAIN, learning_rate=1e-3, weight_decay=1e-4, accumulate=16),
        batch=128,
        betas=(0.0,),
        lora_rank=4,
        precision="fp16",
        reward="hps-v2.0",
        options={"window": (1, 49), **_UNSCALED},
        notes="Rate, weight decay, batch and sampling are the code's, but for its η = 1 (here 0); the window is that "
        "of its `uniform`; its default lies around the last 8 steps. Rank and number of steps are deradiff's own.",
    ),
    "refl": replace(
        _OURS,
        source="Xu et al. 2023, arXiv 2304.05977, Algorithm 1, and the launcher of THUDM/ImageReward",
        method="refl",
        base=SD14,
        plan=replace(_PLAIN, steps=100, weight_decay=0.01, accumulate=4, average=0.9999),
        lora_rank=None,
        precision="fp16",
        gradient_checkpointing=True,
        sampling={"scheduler": "ddpm", "steps": 40, "guidance_scale": 1.0},
        reward="image-reward",
        betas=(0.0,),
        options={"window": (31, 40), "ceiling": 2.0, "pretraining": 0.0, **_UNSCALED},
        notes="As launched, 8 GPUs x batch 2 x 4 accumulated; the prompts are in that repository (--data). The paper's "
        "pre-training loss is not in that code: --pretraining 1000 weighs it as the paper does, over the model's own "
        "samples.",
    ),
    "rwr": replace(
        _OURS,
        method="rwr",
        prompt_dropout=0.1,
        sampling={"scheduler": "ddim", "steps": 50, "guidance_scale": 1.0},
        options={"per_prompt": 16},
        notes="β is in points of the reward. " + _NOT_IN_THE_PAPERS,
    ),
    "ddpo": _OURS,
    "flow-grpo-pickscore": _FLOW_GRPO,
    "flow-grpo-geneval": replace(_FLOW_GRPO, betas=(0.04,), notes=_GRPO_NOTES + _OWN_REWARD, **_UNREWARDED),
    "flow-grpo-ocr": replace(_FLOW_GRPO, betas=(0.04,), notes=_GRPO_NOTES + _OWN_REWARD, **_UNREWARDED),
    "diffusion-nft-pickscore": _NFT,
    "diffusion-nft-geneval": replace(_NFT, notes=_NFT_NOTES + _OWN_REWARD, **_UNREWARDED),
    "diffusion-nft-ocr": replace(
        _NFT,
        plan=replace(_NFT.plan, accumulate=24),
        batch=576,
        options=_NFT.options | {"updates": 2, "mixing": 0.1, "memory": (75, 0.0075, 0.999)},
        notes=_NFT_NOTES + _OWN_REWARD,
        **_UNREWARDED,
    ),
    **DIGITS_PRESETS,
}
"""By name: `deradiff align --show-preset NAME` prints one."""


def usual(base: str | None, method: str) -> Preset:
    """What `method` starts from where no preset is named: that of a world that ships, or the plainest way to train.

    All weights in float32 at a constant rate, nothing accumulated, pictures as they are; sampler and options are those
    of the method's first preset. Raises `ValueError` for a world that `method` does not align.
    """
    of_method = [preset for preset in PRESETS.values() if preset.method == method]
    if world := find(base):
        of_world = [preset for preset in of_method if preset.base == world.name]
        if not of_world:
            methods = ", ".join(sorted({known.method for known in PRESETS.values() if known.base == world.name}))
            raise ValueError(f"{world.title} are not aligned by {method}: take {methods}")
        return of_world[0]
    plain = replace(of_method[0], betas=(), vae=None, plan=_PLAIN, precision="no", lora_rank=None, notes="")
    plain = replace(plain, lora_targets=LORA_TARGETS)
    return replace(plain, flip=False, gradient_checkpointing=False)


def preset(name: str) -> Preset:
    """The preset called `name`. Raises `ValueError` listing those there are."""
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}: choose from {', '.join(PRESETS)}")
    return PRESETS[name]
