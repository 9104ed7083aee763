"""Is an anchor the reference tilted by its reward? python benchmarks/log_ratios.py --models OUT/models

of `python -m studies.digits truth --out OUT`. If it is, the log ratio of the two models' paths is r/β and a constant,
whatever path noise took to the picture (docs/limits.md). Here pictures of the reference are noised along several paths
each, step by step, and the log ratio of the reverse steps is added up along every one. Of its variance among the
pictures of one caption it is told how much is the path's and not the picture's, and by how many nats it rises per
point of the reward. Beside that stands the tilt that the anchor's own samples show: so many nats per point, on the
reference's samples, give their mean reward. For an exact tilt both are 1/β. Weights of realigned samples come from the
same differences of predictions: they correct towards the log ratio, whether samples follow it or not. The table goes
to docs/data/digits-log-ratios.json.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from scipy.stats import linregress
from torch import Tensor

from deradiff.algorithm import posteriors
from deradiff.algorithm.estimates import Estimate
from deradiff.alignment.base import Base
from deradiff.cli import terminal
from deradiff.files.writing import write_json
from deradiff.sweep.jobs import reproducible
from deradiff.worlds import digits
from studies.digits.truth_models import Pool, TruthSettings, load_pool

CAPTIONS, PICTURES, PATHS, STEPS = 48, 8, 3, 50


def chosen(pool: Pool) -> Tensor:
    """Rows of the pool: `PICTURES` of each of `CAPTIONS` conditions that leave the ink open."""
    conditions = pool.conditions()
    is_open = torch.tensor([digits.captions.parse(text).ink is None for text in pool.captions])
    rows = [(conditions == c).nonzero().flatten() for c in conditions[is_open].unique()[:CAPTIONS]]
    return torch.stack([row[:PICTURES] for row in rows])


@torch.no_grad()
def log_ratios(
    base: Base, anchor: UNet2DConditionModel, latents: Float[Tensor, "row *latent"], prompts: list[str], seed: int
) -> Float[Tensor, " row"]:
    """`Σ_t log p_anchor(x_{t-1} | x_t) / p_base(x_{t-1} | x_t)` along one noising path of each row, in nats.

    The step to the clean picture, which has no density, is left out.
    """
    scheduler = DDPMScheduler.from_config(base.pipe.scheduler.config, timestep_spacing="linspace", clip_sample=False)
    scheduler.set_timesteps(STEPS)
    upwards, kept = scheduler.timesteps.flip(0), scheduler.alphas_cumprod
    generator, told = torch.Generator().manual_seed(seed), base.call.encode_prompts(prompts)
    x, before, total = latents, torch.tensor(1.0), torch.zeros(len(latents), dtype=torch.float64)
    for number, t in enumerate(upwards):
        share = kept[t] / before
        noised = share.sqrt() * x + (1 - share).sqrt() * torch.randn(x.shape, generator=generator)
        if number:
            at = t.expand(len(x))
            known, other = (
                posteriors.posterior(scheduler, base.call.predict(model, noised, at, told), t, noised)
                for model in (base.denoiser, anchor)
            )
            squares = (x - known.mean).square() - (x - other.mean).square()
            total += (squares / (2 * known.variance)).flatten(1).sum(1).double()
        x, before = noised, kept[t]
    return total


def tilt_of(pool: Pool, reward: str, shift: float) -> float:
    """How many nats per point raise the mean reward of the pool by `shift` points, captions apart."""
    values, conditions = pool.rewards[reward].double(), pool.conditions()
    groups = [values[conditions == c] for c in range(int(conditions.max()) + 1)]

    def raised(tilt: float) -> float:
        gained = [len(group) * ((torch.softmax(tilt * group, 0) * group).sum() - group.mean()) for group in groups]
        return (torch.stack(gained).sum() / len(values)).item() - shift

    return brentq(raised, -20.0, 20.0)


def measured(models: Path, name: str, pool: Pool) -> dict[str, Any]:
    """One anchor beside what its family starts from."""
    reward = name.partition("/")[2].rpartition("-")[0]
    pipe, rows = digits.load_pipeline(), chosen(pool)
    told = json.loads((models / name / "truth.json").read_text())["reached"][reward]
    start = told["reference"]["value"]
    if name.startswith("weighted"):
        control = models / "weighted" / "control"
        pipe.unet = UNet2DConditionModel.from_pretrained(control)
        start = json.loads((control / "truth.json").read_text())["reached"][reward]["model"]["value"]
    anchor, flat = UNet2DConditionModel.from_pretrained(models / name), rows.flatten()
    texts = [pool.captions[int(row)] for row in flat]
    ratios = torch.stack(
        [log_ratios(Base(pipe), anchor, pool.latents[flat], texts, path).view(rows.shape) for path in range(PATHS)]
    )
    # Of the variance among a caption's pictures: the path's part, and the picture's.
    by_path = ratios.var(0).mean()
    by_picture = ratios.mean(0).var(1).mean() - by_path / PATHS
    log_ratio, scores = (
        (values - values.mean(1, keepdim=True)).flatten()
        for values in (ratios.mean(0), pool.rewards[reward][rows].double())
    )
    rise = linregress(scores.numpy(), log_ratio.numpy())
    return {
        "reward": reward,
        "deviation by picture": by_picture.clamp(min=0).sqrt().item(),
        "deviation by path": by_path.sqrt().item(),
        "path's share": (by_path / (by_path + by_picture)).item(),
        "nats per point": asdict(Estimate(float(rise.slope), float(rise.stderr))),
        "nats per point of its samples": tilt_of(pool, reward, told["model"]["value"] - start),
        "pictures": rows.numel(),
        "paths": PATHS,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", type=Path, required=True, help="OUT/models of `studies.digits truth`")
    options.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs/data/digits-log-ratios.json")
    given = options.parse_args()
    terminal.pass_on_warnings()
    pool, rows = load_pool(given.models, TruthSettings()), {}
    table = Table("anchor", "deviation by picture, nats", "by path", "path's share", "nats per point", "of its samples")
    with reproducible(1):
        for name in sorted(f"{path.parent.name}/{path.name}" for path in given.models.glob("*/*-1")):
            if (given.models / name / "truth.json").exists():
                rows[name] = row = measured(given.models, name, pool)
                rise = row["nats per point"]
                table.add_row(
                    name,
                    f"{row['deviation by picture']:.1f}",
                    f"{row['deviation by path']:.1f}",
                    format(row["path's share"], ".2f"),
                    f"{rise['value']:.2f} ± {rise['error']:.2f}",
                    f"{row['nats per point of its samples']:.2f}",
                )
    Console().print(table)
    write_json(given.json, {"steps": STEPS, "models": rows})


if __name__ == "__main__":
    main()
