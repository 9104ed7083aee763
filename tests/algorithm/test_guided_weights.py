"""Weights under guidance, against the retrained model sampled with the same guidance, and where they claim nothing."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from deradiff import realign
from deradiff.algorithm.comparisons import compare
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.guided_weights import GuidanceFit, GuidedWeights, left_out
from deradiff.algorithm.path_weights import ImportanceWeights, Obstacle, joined
from deradiff.algorithm.verdict import GUIDED_TRUSTED, MOST_LEFT_OUT, guided_kind, verdict
from deradiff.worlds.gaussian_mixture import World, crossing
from realigned_worlds import FAMILIES, realigned, sample
from tiny import make
from tiny_families import anchors_of, built

SCALE, LAM, TILT = 3.0, 0.25, 2.0


@pytest.fixture(scope="module")
def guided_run():
    """A guided run stepped by hand, with what it wrote down and the same sums written out from exact predictions."""
    torch.manual_seed(0)
    plain = crossing()
    world = World("crossing", plain.reference, plain.rewards, {"wide": [3.0, 3.0, 0.0, 0.0]})
    pipe, target = world.pipeline(FAMILIES["DDPM"]()), world.denoiser({"slope": LAM * TILT})
    x, chance = torch.randn(3000, 2, dtype=torch.float64), torch.Generator().manual_seed(1)
    condition = torch.tensor([[0.0] * 4, world.prompts["wide"]]).repeat_interleave(len(x), 0).double()
    names = ("unconditional", "conditional", "strength", "unknown")
    steps: list[tuple[float, dict[str, torch.Tensor]]] = []
    with realign(pipe, world.denoiser({"slope": TILT}), LAM) as dial:
        pipe.scheduler.set_timesteps(60)
        for t in pipe.scheduler.timesteps:
            rows = torch.cat([x, x])
            prediction = pipe.unet(rows, t, encoder_hidden_states=condition).sample
            empty, prompted = prediction.chunk(2)
            mine, theirs = prediction.stacked().chunk(2, 1), target(rows, t, condition).sample.chunk(2)
            apart = [(part[1] - part[0]).square().sum(1) for part in mine]
            prompt = ((1 - LAM) * (mine[1] - mine[0])[0] + LAM * (mine[1] - mine[0])[1]).square().sum(1)
            retrained = (theirs[1] - theirs[0]).square().sum(1)
            now = [-LAM * (1 - LAM) * apart[0] / 2, -LAM * (1 - LAM) * apart[1] / 2, prompt]
            now.append(-SCALE * (SCALE - 1) / 2 * (retrained - prompt))
            abar = float(pipe.scheduler.alphas_cumprod[int(t)])
            steps.append((math.log(abar / (1 - abar)), dict(zip(names, now, strict=True))))
            guided = empty + SCALE * (prompted - empty)
            x = pipe.scheduler.step(guided, t, x, generator=chance).prev_sample
        run = dial.importance_weights
    written_out = {
        name: sum((b - a) * (at[name] + then[name]) / 2 for (a, at), (b, then) in pairwise(steps)) for name in names
    }
    return world, x, run, written_out


def test_both_parts_of_a_guided_run_are_what_they_are_written_out(guided_run):
    _, _, run, written_out = guided_run
    assert run.guidance.scale == pytest.approx(SCALE, abs=1e-5)
    for name in ("conditional", "unconditional", "strength"):
        torch.testing.assert_close(getattr(run.guidance, name), written_out[name], rtol=1e-4, atol=1e-4)


def test_what_guided_weights_leave_out_is_the_retrained_models_own_guidance(guided_run):
    """The formula of `guided_weights`, with the integral that only a closed-form world knows, meets the target."""
    world, x, run, written_out = guided_run
    call: dict[str, Any] = {"prompt": "wide", "guidance_scale": SCALE, "steps": 60, "samples": 3000}
    reward = world.rewards["slope"]
    target = reward(sample(world, FAMILIES["DDPM"], {"slope": LAM * TILT}, **call))
    shift = float(target.mean() - reward(sample(world, FAMILIES["DDPM"], {}, **call)).mean())
    gaps = {}
    weights = run.guidance.combined
    for name, logs in {"plain": 0 * weights, "known": weights, "whole": weights + written_out["unknown"]}.items():
        gaps[name] = (compare(reward(x), logs).weighted.value - float(target.mean())) / shift
    assert gaps["plain"] < -0.4 and -0.15 < gaps["known"] < -0.03 and abs(gaps["whole"]) < 0.05
    # The bound holds, and is no small one: about this run the verdict keeps silent.
    unknown = left_out(run.guidance) * float(reward(x).std()) / abs(shift)
    assert unknown > abs(gaps["known"]) and unknown > MOST_LEFT_OUT
    baseline = float(target.mean()) - shift
    assert "no claim" in verdict(run, reward(x), baseline=baseline).words


def test_little_guidance_is_claimed_and_weights_mend_what_algorithm_1_is_off_by():
    world, family = crossing(), FAMILIES["DDPM"]
    call: dict[str, Any] = {"prompt": "right", "guidance_scale": 1.1}
    reward = world.rewards["slope"]
    x, dial = realigned(world, family, {"a": {"slope": 1.0}}, 0.5, steps=50, **call)
    target, reference = (reward(sample(world, family, tilt, steps=50, **call)) for tilt in ({"slope": 0.5}, {}))
    found = dial.verdict(reward(x), baseline=float(reference.mean()))
    assert found.kind == "off" and "guidance 1.1" in found.words
    shift, noise = float(target.mean() - reference.mean()), float(target.std()) / len(target) ** 0.5
    assert abs(found.comparison.weighted.value - float(target.mean())) < 0.02 * shift + 4 * noise
    assert float(target.mean()) - found.comparison.plain.value > 0.04 * shift


# -- the scale --------------------------------------------------------------------------------------------------------


def fitted(combine, steps: int = 4) -> GuidedWeights | None:
    """What is found where `combine(first, second, step)` is the pipeline's guidance."""
    chance, fit = torch.Generator().manual_seed(0), GuidanceFit()
    for step in range(steps):
        first, apart = torch.randn(2, 2, 3, 16, generator=chance)
        parts = torch.stack([first, first + 0.3 * apart], 1)
        fit.add(parts, combine(*parts.unbind(1), step))
    return fit.weights(torch.full((3,), 1.0), torch.full((3,), 2.0), torch.zeros(3))


def test_the_scale_is_found_whichever_part_comes_first_and_whatever_the_sign():
    for sign in (1, -1):
        weights = fitted(lambda u, c, _, sign=sign: sign * (u + 7.5 * (c - u)))
        assert weights is not None and weights.scale == pytest.approx(7.5, rel=1e-4)
        assert weights.conditional.tolist() == [2.0] * 3
        weights = fitted(lambda c, u, _, sign=sign: sign * (u + 7.5 * (c - u)))
        assert weights is not None and weights.scale == pytest.approx(7.5, rel=1e-4)
        assert weights.conditional.tolist() == [1.0] * 3
        assert weights.combined.tolist() == pytest.approx([7.5 - 6.5 * 2] * 3, rel=1e-3)
    halved = fitted(lambda u, c, _: (u + 5 * (c - u)).half().float())
    assert halved is not None and halved.scale == pytest.approx(5, rel=1e-3)


@pytest.mark.parametrize(
    "combine",
    [
        lambda u, c, step: u + (5 if step < 2 else 1) * (c - u),
        lambda u, c, step: 0.9 * (u + 5 * (c - u)),
        lambda u, c, step: (g := u + 5 * (c - u)) * c.std() / g.std(),
        lambda u, c, step: (u + 5 * (c - u)).clamp(-2, 2),
    ],
    ids=["interval", "scaled", "rescaled", "thresholded"],
)
def test_guidance_that_is_no_constant_scale_has_no_weights(combine):
    assert fitted(combine) is None


def test_pipelines_that_guide_in_one_call_or_in_two_tell_their_scale():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5) as dial:
        pipe(**call | {"guidance_scale": 4.0})
        guidance = dial.importance_weights.guidance
        assert guidance is not None and guidance.scale == pytest.approx(4, rel=1e-3)
        pipe(**call | {"guidance_scale": 4.0, "guidance_rescale": 0.7})
        assert dial.importance_weights.guidance is None and dial.importance_weights.obstacles == {"guidance"}
        pipe(**call | {"guidance_scale": 1.0})
        assert dial.importance_weights.guidance is None and not dial.importance_weights.obstacles
    pipe, call = built("wan")
    with realign(pipe, anchors_of(pipe)["transformer"], 0.5) as dial:
        pipe(**call | {"guidance_scale": 3.0})
        guidance = dial.importance_weights.guidance
        assert guidance is not None and guidance.scale == pytest.approx(3, rel=1e-3)


# -- the verdict ------------------------------------------------------------------------------------------------------


def test_guided_claims_end_where_the_bound_does():
    assert guided_kind(Estimate(0.0, 0.0), 0.0) == "trust"
    assert guided_kind(Estimate(GUIDED_TRUSTED, 0.0), 0.0) == "off"
    assert guided_kind(Estimate(0.3, 0.01), MOST_LEFT_OUT) == "off"
    assert guided_kind(Estimate(0.02, 0.01), 0.1) == "unclear"
    for bound in (MOST_LEFT_OUT * 1.01, math.inf, math.nan):
        assert guided_kind(Estimate(0.0, 0.0), bound) == "no target"


def run_of(
    x: torch.Tensor, scale: float, lams: list[float], *others: Obstacle, apart: float = 0.0
) -> ImportanceWeights:
    """A guided run of a deterministic sampler, whose two weights are alike but for `apart`."""
    return ImportanceWeights(
        log_weights=x,
        log_ratios={},
        path_kl=None,
        memoryless=False,
        lams=torch.tensor(lams)[:, None].expand(-1, len(x)),
        obstacles=frozenset({"guidance", *others}),
        predictions=9,
        guidance=GuidedWeights(scale, 0.01 * x, (0.01 - apart) * x, torch.ones_like(x)),
    )


def test_claims_are_for_one_anchor_between_0_and_1_and_for_guidance_alone():
    x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = run_of(x, 2.0, [0.5])
    assert verdict(run, x, baseline=-1.0).kind == "trust" and verdict(run).kind == "trust"
    assert verdict(run, x).kind == "depends"
    for without in (
        run_of(x, 2.0, [0.5], apart=0.5),
        run_of(x, 2.0, [1.5]),
        run_of(x, 2.0, [0.2, 0.3]),
        run_of(x, 2.0, [0.5], "reuse"),
        replace(run, guidance=None),
    ):
        assert verdict(without, x, baseline=-1.0).kind == "no target"
    together = joined([run, run.rows(slice(0, 3))]).guidance
    assert together is not None and together.combined.shape == (403,)
    assert joined([run, run_of(x, 2.1, [0.5])]).guidance is None


def test_the_bound_is_within_prompts():
    """Its parts have other means for each prompt, of which only the strength's counts."""
    x = torch.tensor([0.0, 1.0, 10.0, 11.0], dtype=torch.float64)
    guidance = GuidedWeights(2.0, x, 0 * x, torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert left_out(guidance, torch.tensor([0, 0, 1, 1])) == pytest.approx(2 * (2 * 0.5) ** 0.5)
