"""Algorithm 1 of DeRaDiff written out by hand, sharing no line with the code under test.

`algorithm_1` is the paper's listing, loop and all, for Stable Diffusion under DDPM, DDIM and Euler ancestral sampling.
`lock_step` reaches every other pipeline and scheduler: the models' untouched pipelines run side by side, one thread
each, and meet in `scheduler.step`, where lines 9 to 14 are done on the predictions they bring; copies of the scheduler
that a pipeline makes in a call meet too.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from types import MethodType
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from tiny import seeded

Lam = float | Tensor  # for the whole batch, or one value per image
Lams = Lam | Sequence[Lam]  # one per anchor
Posterior = Callable[..., tuple[Tensor, Tensor]]


def weights_of(lams: Lams, like: Tensor) -> Tensor:
    """Exponents of the models, reference first: `(model, batch, 1, ...)` in double precision, summing to one."""
    per_anchor: Any = lams if isinstance(lams, (list, tuple)) else [lams]
    ones = torch.ones(like.shape[0], dtype=torch.float64)
    anchors = torch.stack([lam * ones for lam in per_anchor])
    everybody = torch.cat([1 - anchors.sum(0, keepdim=True), anchors])
    return everybody.reshape(*everybody.shape, *[1] * (like.dim() - 1))


def mixture(means: Tensor, variances: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Lines 11 and 12. Where nothing is random, their limit for equal variances: the means, mixed."""
    if not variances.any():
        return (weights * means).sum(0), variances[0]
    variance = 1 / (weights / variances).sum(0)
    return variance * (weights / variances * means).sum(0), variance


# --- the listing, for Stable Diffusion --------------------------------------------------------------------------------


def algorithm_1(
    pipe: DiffusionPipeline,
    anchors: Sequence[nn.Module],
    call: dict[str, Any],
    lam: Lams | Callable[[int], Lams],
    posterior: Posterior,
    seed: int = 11,
    **posterior_kwargs: Any,
) -> Tensor:
    """Latents of Algorithm 1 for a pristine Stable Diffusion pipeline. `lam` may be a function of the step's number."""
    generator = torch.Generator().manual_seed(seed)
    scheduler, guidance = pipe.scheduler, call["guidance_scale"]
    with torch.no_grad():
        prompt, null = pipe.encode_prompt(call["prompt"], "cpu", 1, True, call["negative_prompt"])
        scheduler.set_timesteps(call["num_inference_steps"])
        x = torch.randn(len(prompt), 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
        for i, t in enumerate(scheduler.timesteps):
            posteriors = []
            for model in (pipe.unet, *anchors):
                twice = torch.cat([x / (1 + noise_level(scheduler, t) ** 2).sqrt()] * 2).float()
                uncond, cond = model(twice, t, encoder_hidden_states=torch.cat([null, prompt])).sample.double().chunk(2)
                guided = uncond + guidance * (cond - uncond)
                posteriors.append(posterior(scheduler, guided, t, x.double(), **posterior_kwargs))
            means, variances = (torch.stack(torch.broadcast_tensors(*part)) for part in zip(*posteriors, strict=True))
            mean, variance = mixture(means, variances, weights_of(lam(i) if callable(lam) else lam, x))
            x = mean.float()
            if variance.any():
                x = (mean + variance.sqrt() * torch.randn(x.shape, generator=generator)).float()
    return x


# --- any pipeline, any scheduler --------------------------------------------------------------------------------------


def lock_step(
    pipes: Sequence[DiffusionPipeline],
    call: dict[str, Any],
    lam: Lams | Callable[[int], Lams],
    posterior: Posterior | None = None,
    seed: int = 11,
    read: Callable[[Any], Any] = attrgetter("images"),
    **changes: Any,
) -> Any:
    """Latents of a realigned run: `pipes` are pristine, the reference's first, and share nothing that has state.

    `read` takes them out of what the pipelines return: a tensor or several.

    Without a `posterior` the guided predictions are mixed and the scheduler takes the step; with one (for DDPM and
    DDIM, which keep no count of their steps), means and variances are mixed and the step is drawn by hand. `lam` may be
    a function of the number of calls of `step` so far.
    """
    count = len(pipes)
    arrived: list[Any] = [None] * count
    leaving: list[Any] = [None] * count
    latents: list[Any] = [None] * count
    errors: list[BaseException] = []
    calls = 0

    def meet() -> None:
        nonlocal calls
        outputs, timesteps, samples, kwargs, steps = zip(*arrived, strict=True)
        assert all(torch.equal(sample, samples[0]) for sample in samples), "the models must see the same x_t"
        weights = weights_of(lam(calls) if callable(lam) else lam, samples[0])
        calls += 1
        if posterior is None:
            mixed = (weights * torch.stack(outputs).double()).sum(0).to(outputs[0].dtype)
            state = torch.get_rng_state()
            for k, step in enumerate(steps):
                torch.set_rng_state(state)
                leaving[k] = step(mixed.clone(), timesteps[k], samples[k], **kwargs[k])
            return
        own = [
            posterior(pipe.scheduler, output.double(), timesteps[0], samples[0].double(), **kwargs[0])
            for pipe, output in zip(pipes, outputs, strict=True)
        ]
        means, variances = (torch.stack(torch.broadcast_tensors(*part)) for part in zip(*own, strict=True))
        mean, variance = mixture(means, variances, weights)
        for k in range(count):
            x = mean
            if variance.any():
                x = mean + variance.sqrt() * torch.randn(mean.shape, generator=kwargs[k]["generator"])
            leaving[k] = (x.to(samples[0].dtype),)

    barrier = threading.Barrier(count, action=meet, timeout=60)

    def run(k: int) -> None:
        try:
            with stepping_through(pipes[k], k, arrived, leaving, barrier):
                generator = torch.Generator().manual_seed(seed)
                latents[k] = read(pipes[k](generator=generator, **(call | changes)))
        except threading.BrokenBarrierError:
            pass
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    with seeded(seed):
        threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    everything = [x if isinstance(x, tuple) else (x,) for x in latents]
    assert calls > 0
    for own in everything:
        assert all(map(torch.equal, own, everything[0])), "the models must end at the same latents"
    return latents[0]


@contextmanager
def stepping_through(
    pipe: DiffusionPipeline, k: int, arrived: list[Any], leaving: list[Any], barrier: threading.Barrier
) -> Iterator[None]:
    """Within, `pipe.scheduler.step` brings its arguments to the barrier and returns what was decided there."""
    step = type(pipe.scheduler).step
    parameters = inspect.signature(step).parameters

    @functools.wraps(step)  # pipelines read its signature: who takes `eta`, who a `generator`
    def meeting(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip([*parameters][1:], args, strict=False)) | kwargs
        output, timestep, sample = (given.pop(name) for name in ("model_output", "timestep", "sample"))
        arrived[k] = (output, timestep, sample, given, MethodType(step, scheduler))
        barrier.wait()
        return leaving[k]

    pipe.scheduler.step = MethodType(meeting, pipe.scheduler)  # a copy of the scheduler has its own
    try:
        yield
    finally:
        del pipe.scheduler.step


# --- SchedulerPosterior, from the textbooks ---------------------------------------------------------------------------


def alphas(scheduler: Any, t: Any) -> tuple[Tensor, Tensor]:
    """ᾱ at this step's timestep and at the next one's."""
    cumulative = scheduler.alphas_cumprod.double()
    before = int(t) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    end = getattr(scheduler, "final_alpha_cumprod", torch.tensor(1.0)).double()
    return cumulative[int(t)], cumulative[before] if before >= 0 else end


def bounded(scheduler: Any, x0: Tensor) -> Tensor:
    """Dynamic thresholding (Saharia et al. 2022) or plain clipping of the predicted image, as the scheduler is set."""
    config = scheduler.config
    if config.thresholding:
        flat = x0.abs().flatten(1)
        s = torch.quantile(flat, config.dynamic_thresholding_ratio, dim=1).clamp(1, config.sample_max_value)
        s = s[:, None, None, None]
        return x0.clamp(-s, s) / s
    return x0.clamp(-config.clip_sample_range, config.clip_sample_range) if config.clip_sample else x0


def origin(scheduler: Any, output: Tensor, abar: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted image and noise, whatever it is that the model predicts."""
    kind = scheduler.config.prediction_type
    if kind == "sample":
        return output, (x - abar.sqrt() * output) / (1 - abar).sqrt()
    if kind == "v_prediction":
        return abar.sqrt() * x - (1 - abar).sqrt() * output, abar.sqrt() * output + (1 - abar).sqrt() * x
    return (x - (1 - abar).sqrt() * output) / abar.sqrt(), output


def ddpm(scheduler: Any, output: Tensor, t: Any, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """Ho et al. 2020, equations 6 and 7; variance β̃ ("fixed small") or learned between β̃ and β (Nichol & Dhariwal)."""
    abar, before = alphas(scheduler, t)
    alpha = abar / before
    small, large = (1 - alpha) * (1 - before) / (1 - abar), 1 - alpha
    variance = small
    if scheduler.config.variance_type == "learned_range":
        output, v = output.chunk(2, dim=1)
        log_small, log_large = small.clamp(min=1e-20).log(), large.log()
        variance = (log_small + (v + 1) / 2 * (log_large - log_small)).exp()
    x0 = bounded(scheduler, origin(scheduler, output, abar, x)[0])
    mean = before.sqrt() * (1 - alpha) / (1 - abar) * x0 + alpha.sqrt() * (1 - before) / (1 - abar) * x
    return mean, (variance if int(t) > 0 else torch.zeros_like(variance)).reshape(
        [1] * 4 if variance.dim() == 0 else variance.shape
    )


def ddim(scheduler: Any, output: Tensor, t: Any, x: Tensor, eta: float = 0.0, **_: Any) -> tuple[Tensor, Tensor]:
    """Song et al. 2021, equations 12 and 16."""
    abar, before = alphas(scheduler, t)
    variance = eta**2 * (1 - before) / (1 - abar) * (1 - abar / before)
    x0, epsilon = origin(scheduler, output, abar, x)
    mean = before.sqrt() * bounded(scheduler, x0) + (1 - before - variance).sqrt() * epsilon
    return mean, variance.reshape(1, 1, 1, 1)


def noise_level(scheduler: Any, t: Any) -> Tensor:
    """σ where the scheduler's samples are image plus σ times noise (k-diffusion's convention); 0 where they are not."""
    if not hasattr(scheduler, "sigmas"):
        return torch.tensor(0.0)
    return scheduler.sigmas[scheduler.timesteps.tolist().index(float(t))].double()


def euler_ancestral(scheduler: Any, output: Tensor, t: Any, x: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """k-diffusion's `sample_euler_ancestral`, ε-prediction."""
    sigma, to = noise_level(scheduler, t), scheduler.sigmas[scheduler.timesteps.tolist().index(float(t)) + 1].double()
    up = to**2 * (sigma**2 - to**2) / sigma**2
    down = (to**2 - up).sqrt()
    return x + (down - sigma) * output, up.reshape(1, 1, 1, 1)
