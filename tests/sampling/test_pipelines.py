"""Every pipeline a text-to-image user meets, realigned, against the models' own pipelines and Algorithm 1 by hand."""

import pytest
import torch

from deradiff import realign
from oracle import lock_step
from tiny import KINDS, Counter, assert_close, denoiser, distance, make, sample, with_denoiser


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cases(3)
def test_at_zero_and_one_a_single_model_runs_and_gives_its_own_pipelines_latents(kind):
    pipe, anchor, call = make(kind)
    plain, aligned = sample(pipe, call), sample(with_denoiser(kind, anchor), call)
    original = denoiser(pipe)

    dial = realign(pipe, anchor, 0.0)
    with Counter(original) as reference_calls, Counter(anchor) as anchor_calls:
        assert torch.equal(sample(pipe, call), plain)
        assert reference_calls.number > 0 and anchor_calls.number == 0
        once = reference_calls.number

        dial.lam = 1.0
        assert torch.equal(sample(pipe, call), aligned)
        assert reference_calls.number == once and anchor_calls.number == once

        dial.lam = 0.5
        assert distance(sample(pipe, call), plain) > 1e-2
        assert reference_calls.number == 2 * once and anchor_calls.number == 2 * once

    dial.remove()
    assert torch.equal(sample(pipe, call), plain)
    assert denoiser(pipe) is original
    assert torch.equal(sample(with_denoiser(kind, anchor), call), aligned), "the anchor must be left as it was, too"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cases(3)
def test_between_and_beyond_it_is_algorithm_1(kind):
    pipe, anchor, call = make(kind)
    own = [make(kind)[0], with_denoiser(kind, anchor)]
    plain, aligned = sample(own[0], call), sample(own[1], call)
    with realign(pipe, anchor) as dial:
        for lam in (0.37, 1.4, -0.3):
            dial.lam = lam
            realigned = sample(pipe, call)
            assert_close(realigned, lock_step(own, call, lam))
            assert min(distance(realigned, plain), distance(realigned, aligned)) > 1e-2


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
def test_removal_leaves_no_trace(kind):
    pipe, anchor, call = make(kind)
    sample(pipe, call), sample(with_denoiser(kind, anchor), call)

    def traces():
        things = pipe, denoiser(pipe), anchor, pipe.scheduler, pipe.vae
        hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in denoiser(pipe).modules()]
        return [(type(thing), set(vars(thing))) for thing in things], hooks, dict(pipe.config), set(pipe.components)

    before = traces()
    with realign(pipe, anchor, 0.5):
        sample(pipe, call)
    assert traces() == before
