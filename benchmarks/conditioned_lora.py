"""Does a second LoRA make strength follow the mixture? python benchmarks/conditioned_lora.py [WORLD:ANCHOR ...]

    θ(λ) = θ_0 + λ A + 4 λ (1 - λ) B

A is the anchor's change of the weights as a LoRA: the anchor's own, or the best of a rank. To second order in it, the
mixture `(1 - λ) f(θ_0) + λ f(θ_0 + A)` differs from what A predicts at strength λ by `½ λ (1 - λ) f″ A A`: a term of
just this shape in λ, which B is trained to make up for at λ drawn evenly from 0 to 1. At λ = 0 and 1 it has no part.

Compared at λ = ¼, ½, ¾ with A alone at strength λ: the distance of final latents from the mixture's in units of λ's own
effect, for held-out prompts and other noise, with its standard error; and the ratio of the two errors, by the bootstrap
over images. B would be worth a file where it is at most ½. The table goes to benchmarks/conditioned_lora.json.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from recording import keep_parts
from torch import Tensor, nn

from deradiff.alignment.base import Base
from deradiff.alignment.lora_targets import WIDER_JOINT_TARGETS, WIDER_TARGETS
from deradiff.alignment.training import TrainingRun
from deradiff.anchors import Anchor, denoiser_of, load_anchor
from deradiff.baking import Distillation, Sampler
from deradiff.baking.distillation import Teacher, distil, draw_samples
from deradiff.baking.lora_students import add_lora, plain_copy
from deradiff.baking.low_rank import Factors, change_of
from deradiff.baking.outputs import joined_loras
from deradiff.baking.weights import Blend
from deradiff.sampling.denoisers import Denoisers
from deradiff.sampling.realignment import realign
from deradiff.sweep.jobs import reproducible
from deradiff.worlds import find

STRAIGHT, CURVE = "straight", "curve"
RANK, LAMS, SEED, FIRST_IMAGE = 32, (0.25, 0.5, 0.75), 0, 5000
PLANS: dict[str, dict[str, Any]] = {
    "digits:30": {"steps": 25, "images": 64, "samples": 256, "train": 300, "batch": 32, "rate": 3e-3},
    "digits:lora": {"steps": 25, "images": 64, "samples": 256, "train": 300, "batch": 32, "rate": 5e-4},
    "digits-flow:lora": {"steps": 10, "images": 16, "samples": 64, "train": 120, "batch": 16, "rate": 5e-4},
}
"""How each pair is trained and compared: minutes on one thread, the flow's with fewer of everything."""


class AtOwnLam(nn.Module):
    """A student with both LoRAs, each row of its input at the strengths that belong to its own λ."""

    def __init__(self, student: nn.Module, lams: Tensor) -> None:
        super().__init__()
        self.student, self.rows = [student], {STRAIGHT: lams, CURVE: 4 * lams * (1 - lams)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        def scale(layer: Any, inputs: Any) -> None:
            for name in layer.scaling:
                layer.scaling[name] = self.rows[name].to(inputs[0]).view(-1, *[1] * (inputs[0].ndim - 1))

        handles = [layer.register_forward_pre_hook(scale) for layer in loras(self.student[0])]
        try:
            return self.student[0](*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def loras(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


def straight_of(anchor: Anchor, denoiser: Any) -> dict[str, Factors]:
    """The anchor's change as a LoRA: its own, or the best of rank `RANK`."""
    if anchor.adapter:
        state = joined_loras([(denoiser, anchor.adapter, 1.0)])
        paths = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
        return {path: (state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]) for path in paths}
    blend = Blend(denoiser, [(anchor, 1.0)])
    *_, change = change_of(denoiser, blend.names, blend.difference, RANK)
    return change.of_rank(RANK)


def trained(pipe: Any, source: Any, plan: dict[str, Any], sampler: Sampler, prompts: list[str], folder: Path) -> Any:
    """A copy of the reference with both LoRAs, B trained."""
    settings = Distillation(
        samples=plan["samples"], held_out=32, steps=plan["train"], batch=plan["batch"], learning_rate=plan["rate"]
    )
    base = Base(pipe)
    with realign(pipe, source, 0.5) as dial:
        drawn = (settings.samples, (0.0, 1.0), {"plan": plan}, base.call.latent_shape(None), SEED, lambda *_: None)
        samples = draw_samples(folder / "samples", pipe, dial, prompts, sampler, *drawn)
    denoiser = denoiser_of(pipe)[1]
    anchor = load_anchor(source, pipe)
    student = plain_copy(denoiser)
    add_lora(student, STRAIGHT, straight_of(anchor, denoiser))
    targets = WIDER_TARGETS if hasattr(denoiser, "down_blocks") else WIDER_JOINT_TARGETS
    torch.manual_seed(SEED)
    student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(targets)), CURVE)
    student.set_adapter([STRAIGHT, CURVE])
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(f".{CURVE}." in name)
    denoisers = Denoisers(denoiser, [anchor])
    run = TrainingRun(SEED, folder / "checkpoint", lambda *line: print(*line, flush=True))
    distil(base, Teacher(base, denoisers), student, samples, prompts, torch.zeros(1, 1), settings, 1, run, AtOwnLam)
    denoisers.undo()
    anchor.unload(denoiser)
    return student


def errors(pipe: Any, student: Any, source: Any, sampler: Sampler, prompts: list[str]) -> dict[str, Any]:
    """Of A alone and of both, at each λ."""
    seeds = range(FIRST_IMAGE, FIRST_IMAGE + len(prompts))
    exact = {}
    with realign(pipe, source, 0.0) as dial:
        for lam in (0.0, *LAMS):
            dial.lam = lam
            exact[lam] = sampler.latents(pipe, prompts, seeds)
    setattr(pipe, denoiser_of(pipe)[0], student)
    rows = {}
    for lam in LAMS:
        effect = (exact[lam] - exact[0.0]).flatten(1).norm(dim=1)
        parts = {}
        for name, bend in (("scaled", 0.0), ("conditioned", 4 * lam * (1 - lam))):
            for layer in loras(student):
                layer.scaling.update({key: {STRAIGHT: lam, CURVE: bend}[key] for key in layer.scaling})
            own = sampler.latents(pipe, prompts, seeds)
            parts[name] = ((own - exact[lam]).flatten(1).norm(dim=1) / effect).double()
        rows[f"{lam:g}"] = {name: summary(values) for name, values in parts.items()} | {"ratio": ratio(**parts)}
    return rows


def summary(values: Tensor) -> dict[str, float]:
    return {"value": values.mean().item(), "error": (values.std() / len(values) ** 0.5).item()}


def ratio(scaled: Tensor, conditioned: Tensor, draws: int = 2000) -> dict[str, float]:
    """Of the mean errors, with the standard deviation of the bootstrap over images."""
    rows = torch.randint(len(scaled), (draws, len(scaled)), generator=torch.Generator().manual_seed(SEED))
    drawn = conditioned[rows].mean(1) / scaled[rows].mean(1)
    return {"value": (conditioned.mean() / scaled.mean()).item(), "error": drawn.std().item()}


def measured(name: str) -> dict[str, Any]:
    world = find(name.partition(":")[0])
    assert world is not None
    plan, source = PLANS[name], world.anchors[name.partition(":")[2]].path
    sampler = Sampler(plan["steps"], world.guidance_scale, 64)
    with TemporaryDirectory() as folder:
        pipe: Any = world.load()
        student = trained(pipe, source, plan, sampler, world.sample_prompts(480, 1), Path(folder))
    rows = errors(world.load(), student, source, sampler, world.sample_prompts(plan["images"], 77))
    return {"plan": plan, "rank": RANK, "sampler": asdict(sampler), "errors": rows}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("anchors", nargs="*", default=list(PLANS), metavar="WORLD:ANCHOR")
    options.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    chosen = options.parse_args()
    with reproducible(1):
        keep_parts(((name, measured(name)) for name in chosen.anchors), chosen.json)


if __name__ == "__main__":
    main()
