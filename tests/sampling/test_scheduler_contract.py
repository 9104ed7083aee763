"""What every scheduler that has a name on the command line has to pass: it is added to `SCHEDULERS`, and tried here.

λ = 0 and 1 are the models' own images bit for bit; in between an image follows Algorithm 1 by hand where the step
of the scheduler is affine in the prediction, which is where `path` says "prediction".
"""

import pytest
import torch

import oracle
from deradiff import realign
from deradiff.sweep.pipelines import SCHEDULERS, scheduler_like
from tiny import assert_close, distance, make, sample, with_denoiser


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.cases(4)
def test_a_scheduler_is_realigned(name: str) -> None:
    kind = "sd3" if name.startswith("flow") else "sd"
    pipe, anchor, call = make(kind)
    call = call | {"num_inference_steps": 4}
    pipes = [pipe, make(kind)[0], with_denoiser(kind, anchor)]
    for each in pipes:
        if name == "edm":  # it fits models of its own kind alone, and there is no pipeline of them
            import diffusers

            each.scheduler = diffusers.EDMEulerScheduler(prediction_type="epsilon")
        each.scheduler = scheduler_like(each.scheduler, name)
    plain, aligned = sample(pipes[1], call), sample(pipes[2], call)
    assert distance(plain, aligned) > 1e-2
    with realign(pipe, anchor, 0.0) as dial:
        assert torch.equal(sample(pipe, call), plain)
        dial.lam = 1.0
        assert torch.equal(sample(pipe, call), aligned)
        dial.lam = 0.37
        between = sample(pipe, call)
        assert min(distance(between, image) for image in (plain, aligned)) > 1e-2
        if dial.path == "prediction":
            assert_close(between, oracle.lock_step(pipes[1:], call, 0.37), tolerance=3e-5)
    assert torch.equal(sample(pipe, call), plain)
