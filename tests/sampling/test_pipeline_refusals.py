"""What a realigned pipeline refuses and how it is left then: bad λ, NaN, copies, other models, a second dial."""

import copy
from typing import Any

import pytest
import torch

from deradiff import realign
from messages import naming
from oracle import lock_step
from tiny import assert_close, denoiser, make, sample, trio

# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("inf"), -float("inf"), "0.5", None, True, [], [0.1, float("nan")], {"wrong": 1.0}],
    ids=str,
)
@pytest.mark.cases(3)
def test_a_bad_lambda_is_refused_and_the_old_one_stays(bad):
    pipe, anchor, call, own = trio()
    with pytest.raises((ValueError, TypeError)):
        realign(pipe, anchor, bad)
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    with realign(pipe, anchor, 1.0) as dial:
        with pytest.raises((ValueError, TypeError)):
            dial.lam = bad
        assert dial.lam == 1.0
        assert torch.equal(sample(pipe, call), sample(own[1], call))


def test_a_list_of_the_wrong_length_names_both_lengths():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, [0.1, 0.2, 0.3]) as dial:
        with pytest.raises(ValueError, match=naming(3, 2)):
            sample(pipe, call)
        dial.lam = [0.5]
        with pytest.raises(ValueError, match=naming("λ", 1, 2)):
            sample(pipe, call)
        dial.lam = 0.37
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))


@pytest.mark.parametrize("lam", [0.5, 1.0])
@pytest.mark.parametrize("culprit", ["reference", "anchor"])
@pytest.mark.cases(2)
def test_nan_in_a_prediction_stops_the_run(culprit, lam):
    pipe, anchor, call, _ = trio()
    model: Any = anchor if culprit == "anchor" else denoiser(pipe)
    if lam == 1.0 and culprit == "reference":
        lam = 0.0
    calls = 0

    models: list[Any] = [denoiser(pipe), anchor]

    def poison(module, _, output):
        nonlocal calls
        calls += module is model.conv_out
        return output * float("nan") if calls == 3 and module is model.conv_out else output

    with realign(pipe, anchor, lam):
        handles = [each.conv_out.register_forward_hook(poison) for each in models]
        with pytest.raises(FloatingPointError, match=naming(culprit, 251)):
            sample(pipe, call)
        for handle in handles:
            handle.remove()
        assert sample(pipe, call).isfinite().all()


def test_realigning_twice_is_refused():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 1.0):
        with pytest.raises((RuntimeError, ValueError), match=naming("lam=1.0", "dial.remove()")):
            realign(pipe, anchor, 0.5)
        assert torch.equal(sample(pipe, call), sample(own[1], call))
    with realign(pipe, anchor, 0.0):
        assert torch.equal(sample(pipe, call), sample(own[0], call))


def test_a_deep_copy_is_refused():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 1.0):
        for thing in (pipe, pipe.unet):
            with pytest.raises((TypeError, RuntimeError), match=r"dial\.remove\(\)"):
                copy.deepcopy(thing)
        assert torch.equal(sample(pipe, call), sample(own[1], call))
    assert torch.equal(sample(copy.deepcopy(pipe), call), sample(own[0], call))


def test_another_pipelines_reference_is_no_anchor():
    pipe, anchor, call, own = trio()
    with realign(pipe, anchor, 0.37):
        with pytest.raises(ValueError, match=naming("anchor", "dial.remove()")):
            realign(make("sd", seed=5)[0], pipe.unet)
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))


def test_a_denoiser_replaced_while_realigned_is_noticed():
    pipe, anchor, call, own = trio()
    reference, other = pipe.unet, make("sd", seed=5)[0]
    with realign(pipe, anchor, 0.37) as dial:
        pipe.unet = other.unet
        with pytest.raises(RuntimeError, match=naming("pipe.unet", "UNet2DConditionModel")):
            sample(pipe, call)
        with pytest.raises(RuntimeError, match=r"pipe\.unet"):
            dial.attach(other)
        pipe.unet = reference
        assert_close(sample(pipe, call), lock_step(own, call, 0.37))


def test_a_pipeline_without_a_denoiser_is_refused():
    _, anchor, _ = make("sd")
    pipe, _, _ = make("sd")
    pipe.unet = None
    for not_a_pipeline in (pipe, object()):
        with pytest.raises((ValueError, TypeError), match=r"(?i)unet|denoiser|pipeline"):
            realign(not_a_pipeline, anchor)


def test_another_architecture_is_refused_and_the_pipeline_left_alone():
    pipe, _, call, own = trio()
    for other in ("sdxl", "sd_inpaint_9_channels", "sd3"):
        with pytest.raises(ValueError):
            realign(pipe, denoiser(make(other)[0]))
    assert torch.equal(sample(pipe, call), sample(own[0], call))


def test_the_pipelines_own_model_as_anchor_is_worth_a_warning():
    pipe, _, _ = make("sd")
    with pytest.warns(UserWarning, match=naming("'anchor'", "reference")):
        realign(pipe, copy.deepcopy(pipe.unet), 0.5).remove()


def test_removing_is_final_and_may_be_repeated():
    pipe, anchor, call, own = trio()
    dial = realign(pipe, anchor, 1.0)
    dial.remove()
    dial.remove()
    for turn in (lambda: dial.attach(pipe), lambda: setattr(dial, "lam", 0.7)):
        with pytest.raises(RuntimeError, match=r"realign\(\)"):
            turn()
    assert dial.path == "prediction" and dial.why and dial.lam == 1.0
    assert torch.equal(sample(pipe, call), sample(own[0], call))
    with pytest.raises(KeyError), realign(pipe, anchor, 1.0):
        raise KeyError
    assert torch.equal(sample(pipe, call), sample(own[0], call))
