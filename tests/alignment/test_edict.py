"""EDICT's pair of latents: its equations written out, the way back, and gradients at the memory of one step."""

from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from deradiff.alignment.edict import Edict
from deradiff.alignment.rewarded_model import RewardedModel
from deradiff.worlds.gaussian_mixture import SCHEDULE, crossing


def modelled(steps: int, prediction: Any = "epsilon") -> RewardedModel:
    """A curved model in double precision, so that order and alternation matter."""
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type=prediction)
    scheduler.set_timesteps(steps)
    denoiser = crossing().denoiser({}, prediction)
    return RewardedModel(scheduler, lambda x, t: denoiser(x, t).sample, crossing().rewards["slope"])


def pair(count: int = 3) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, count, 2, dtype=torch.float64, generator=chance)
    return x, y


def by_the_paper(model: RewardedModel, x: Tensor, y: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Equations 10 to 14 with ᾱ of the scheduler's table, the first of the pair alternating."""
    bars, timesteps = model.scheduler.alphas_cumprod.double(), model.scheduler.timesteps.tolist()
    for number, t in enumerate(timesteps):
        following = timesteps[number + 1] if number + 1 < len(timesteps) else None
        now, then = bars[t], model.scheduler.final_alpha_cumprod if following is None else bars[following]
        a = (then / now) ** 0.5
        b = (1 - then) ** 0.5 - (then * (1 - now) / now) ** 0.5
        at = torch.tensor(t)
        if number % 2 == 0:
            x = a * x + b * model.predict(y, at)
            y = a * y + b * model.predict(x, at)
        else:
            y = a * y + b * model.predict(x, at)
            x = a * x + b * model.predict(y, at)
        x = p * x + (1 - p) * y
        y = p * y + (1 - p) * x
    return x, y


def test_the_steps_are_the_papers_and_run_backwards() -> None:
    model, noise = modelled(50), pair()
    clean = Edict(model).denoised(*noise)
    for drawn, known in zip(clean, by_the_paper(model, *noise, 0.93), strict=True):
        torch.testing.assert_close(drawn, known, rtol=1e-5, atol=1e-5)  # diffusers' table is in single precision
    for back, began in zip(Edict(model).noised(*clean), noise, strict=True):
        torch.testing.assert_close(back, began, rtol=0, atol=1e-9)


def test_gradients_by_running_backwards_are_those_through_all_steps() -> None:
    model, weights = modelled(7), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    gradients = []
    for sampler in (Edict(model, 0.8).denoised, lambda x, y: by_the_paper(model, x, y, 0.8)):
        noise = [part.clone().requires_grad_(True) for part in pair()]
        x, y = sampler(*noise)
        gradients.append(torch.autograd.grad((weights * x).sum() + (y.square() @ weights.T).sum(), noise))
    for reversible, known in zip(*gradients, strict=True):
        torch.testing.assert_close(reversible, known, rtol=1e-4, atol=1e-4)


def test_v_prediction_is_the_same_model() -> None:
    noise = pair()
    for by_v, by_epsilon in zip(
        Edict(modelled(10, "v_prediction")).denoised(*noise), Edict(modelled(10)).denoised(*noise), strict=True
    ):
        torch.testing.assert_close(by_v, by_epsilon, rtol=1e-6, atol=1e-6)
