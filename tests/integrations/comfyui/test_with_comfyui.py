"""Realigned models in ComfyUI's own code: held against that host's own sampling, and against Algorithm 1 by hand.

`make test-comfyui COMFYUI=path` gives the checkout; without one these tests are skipped.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import comfyui_host
from comfyui_models import FAMILIES, Drawing, conditioning, draw, model, noise
from deradiff.algorithm.schedules import Constant, Power, Schedule
from deradiff.integrations.comfyui.installing import SOURCE
from deradiff.integrations.comfyui.lora_files import with_lora_weights
from deradiff.integrations.comfyui.nodes import NODES
from deradiff.integrations.comfyui.realigned_model import realigned
from deradiff.integrations.comfyui.runs import DialSettings
from deradiff.sampling.reuse import Reuse

pytestmark = pytest.mark.skipif(comfyui_host.PATH is None, reason=comfyui_host.WITHOUT)


@pytest.fixture(scope="module", autouse=True)
def host() -> None:
    comfyui_host.require_comfyui()


def at(reference: Any, aligned: Any, *lams: float, **dial: Any) -> Any:
    return realigned(reference, aligned, DialSettings(tuple(map(Constant, lams)), **dial))


def by_hand(reference: Any, aligned: Any, drawing: Drawing, lam: Schedule) -> Tensor:
    """Algorithm 1 under Euler, DDPM's step or Euler ancestral's, with ComfyUI's σ and its two guided predictions."""
    from comfy import sampler_helpers, samplers

    sigmas = samplers.KSampler(reference, drawing.steps, "cpu", drawing.sampler, drawing.scheduler).sigmas
    start = noise(drawing.family)
    zero = torch.zeros_like(start)

    def guided(patcher: Any) -> Callable[[Tensor, Tensor], Tensor]:
        converted = {
            "positive": sampler_helpers.convert_cond(conditioning(drawing.family, 1)),
            "negative": sampler_helpers.convert_cond(conditioning(drawing.family, 2)),
        }
        samplers.comfy.model_management.load_models_gpu([patcher])
        patcher.pre_run()
        conds = samplers.process_conds(patcher.model, start, converted, torch.device("cpu"), zero, None, 9)

        def predicted(x: Tensor, sigma: Tensor) -> Tensor:
            without, with_prompt = conds["negative"], conds["positive"]
            denoised: Tensor = samplers.sampling_function(
                patcher.model, x, sigma * x.new_ones(1), without, with_prompt, drawing.cfg, patcher.model_options
            )
            return denoised

        return predicted

    first, second = guided(reference), guided(aligned)
    sampling = reference.get_model_object("model_sampling")
    x = sampling.noise_scaling(sigmas[0], start.clone(), zero, True)
    for i in range(len(sigmas) - 1):
        here, after = sigmas[i], sigmas[i + 1]
        weight = lam(i / (len(sigmas) - 1))
        # 7 and 8: both guided predictions, as ε or velocity; 11 and 12: equal variances, so means are mixed.
        means = [x + (x - D(x, here)) / here * (after - here) for D in (first, second)]
        x = (1 - weight) * means[0] + weight * means[1]
    return reference.model.process_latent_out(sampling.inverse_noise_scaling(sigmas[-1], x))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "dpmpp_2m", "dpmpp_2m_sde", "uni_pc", "heun", "ddpm"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_ends_are_the_hosts_own_sampling_bit_by_bit(family: str, sampler: str) -> None:
    reference, aligned = model(family, 1), model(family, 2)
    drawing = Drawing(family, sampler, batch=2)
    plain, other = draw(reference, drawing), draw(aligned, drawing)
    assert not torch.equal(plain, other) and plain.isfinite().all() and other.isfinite().all()
    assert torch.equal(draw(at(reference, aligned, 0.0), drawing), plain)
    assert torch.equal(draw(at(reference, aligned, 1.0), drawing), other)
    assert torch.equal(draw(reference, drawing), plain)  # and nothing is left behind


@pytest.mark.parametrize("lam", [Constant(0.5), Constant(-0.25), Power(2)])
@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_the_mixture_is_algorithm_1_by_hand(family: str, lam: Schedule) -> None:
    reference, aligned = model(family, 1), model(family, 2)
    drawing = Drawing(family)
    ours = draw(realigned(reference, aligned, DialSettings((lam,))), drawing)
    right = by_hand(reference, aligned, drawing, lam)
    assert (ours - right).norm() <= 1e-5 * right.norm()


def test_each_model_keeps_its_own_guidance() -> None:
    """Rescaled guidance of one model is of that model's prediction, not of the mixture."""
    from comfy_extras.nodes_model_advanced import RescaleCFG

    reference, aligned = model("sd15", 1), model("sd15", 2)
    (rescaled,) = RescaleCFG().patch(aligned, 0.7)
    drawing = Drawing("sd15")
    ours = draw(at(reference, rescaled, 0.5), drawing)
    right = by_hand(reference, rescaled, drawing, Constant(0.5))
    assert (ours - right).norm() <= 1e-5 * right.norm()
    assert (ours - draw(at(reference, aligned, 0.5), drawing)).norm() > 1e-3 * right.norm()


def test_options_set_afterwards_are_of_both_models() -> None:
    from comfy_extras.nodes_model_advanced import RescaleCFG

    reference, aligned = model("sd15", 1), model("sd15", 2)
    rescale = RescaleCFG().patch
    drawing = Drawing("sd15")
    behind = draw(rescale(at(reference, aligned, 0.5), 0.7)[0], drawing)
    before = draw(at(rescale(reference, 0.7)[0], rescale(aligned, 0.7)[0], 0.5), drawing)
    assert torch.equal(behind, before)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"])
def test_samplers_that_look_at_the_unprompted_prediction_are_shown_the_mixtures(sampler: str) -> None:
    reference, aligned = model("sd15", 1), model("sd15", 2)
    drawing = Drawing("sd15", sampler, cfg=1.5)
    ends = [draw(at(reference, aligned, lam), drawing) for lam in (0.0, 1.0)]
    assert torch.equal(ends[0], draw(reference, drawing)) and torch.equal(ends[1], draw(aligned, drawing))
    # Both inputs alike but apart in memory: the mixture is either, whatever the sampler looks at.
    twin = draw(at(reference, model("sd15", 1), 0.5), drawing)
    assert (twin - ends[0]).norm() <= 1e-5 * ends[0].norm()


def lora(family: str, seed: int = 3) -> dict[str, Tensor]:
    """A LoRA of every kind of layer there is: linear and convolutional, in the names that trainers of ComfyUI's use."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, weight in model(family, 1).model.diffusion_model.named_parameters():
        if not name.endswith(".weight") or weight.ndim < 2 or "embed" in name:
            continue
        key = f"diffusion_model.{name.removesuffix('.weight')}"
        weights[f"{key}.lora_up.weight"] = torch.randn(len(weight), 2, *[1] * (weight.ndim - 2), generator=generator)
        weights[f"{key}.lora_down.weight"] = 0.1 * torch.randn(2, *weight.shape[1:], generator=generator)
        weights[f"{key}.alpha"] = torch.tensor(1.0)
    return weights


@pytest.mark.parametrize("kind", ["plain", "loha"])
@pytest.mark.parametrize("family", ["sd15", "flux", "sd3"])
def test_a_lora_makes_what_two_full_models_make(family: str, kind: str) -> None:
    """Weights once: the two predictions differ, and are those of the model and of a second one with the LoRA merged."""
    weights = lora(family)
    if kind == "loha":  # acts on weights as they are used
        weights = as_loha(weights)
    reference = model(family, 1)
    aligned = with_lora_weights(reference, weights, 0.8, "lora")
    apart = with_lora_weights(model(family, 1), weights, 0.8, "lora")
    assert aligned.model is reference.model and apart.model is not reference.model
    drawing = Drawing(family, "euler_ancestral")
    ends = [draw(at(reference, aligned, lam), drawing) for lam in (0.0, 1.0)]
    full = [draw(reference, drawing), draw(apart, drawing)]
    assert (ends[0] - ends[1]).norm() > 1e-2 * ends[0].norm()
    assert torch.equal(ends[0], full[0]) and (ends[1] - full[1]).norm() <= 1e-4 * full[1].norm()
    half, right = draw(at(reference, aligned, 0.5), drawing), draw(at(reference, apart, 0.5), drawing)
    assert (half - right).norm() <= 1e-4 * right.norm()
    assert torch.equal(draw(reference, drawing), full[0])


def as_loha(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {}
    for name, tensor in weights.items():
        key, _, part = name.partition(".lora_")
        if part == "up.weight" and tensor.ndim == 2:
            made[f"{key}.hada_w1_a"] = made[f"{key}.hada_w2_a"] = tensor
        elif part == "down.weight" and tensor.ndim == 2:
            made[f"{key}.hada_w1_b"], made[f"{key}.hada_w2_b"] = tensor, tensor.flip(0)
    return made


def test_interpolated_weights_are_the_lora_at_that_strength() -> None:
    reference = model("sd15", 1)
    aligned = with_lora_weights(reference, lora("sd15"), 1.0, "lora")
    drawing = Drawing("sd15")
    ours = draw(at(reference, aligned, 0.3, method="interpolate"), drawing)
    right = draw(with_lora_weights(reference, lora("sd15"), 0.3, "lora"), drawing)
    assert (ours - right).norm() <= 1e-5 * right.norm()


def test_a_strip_is_the_single_runs_from_one_noise() -> None:
    reference, aligned = model("sd15", 1), model("sd15", 2)
    seen: list[tuple[int, int, int]] = []
    drawing = Drawing("sd15", "euler_ancestral", callback=lambda i, x0, x, steps: seen.append((i, len(x0), steps)))
    strip = draw(at(reference, aligned, 0.0, 0.5, 1.0), drawing)
    single = [draw(at(reference, aligned, lam), Drawing("sd15", "euler_ancestral")) for lam in (0.0, 0.5, 1.0)]
    assert torch.equal(strip, torch.cat(single))
    assert [i for i, _, _ in seen] == list(range(12)) and seen[-1] == (11, 3, 12)


def test_carried_over_predictions_cost_less_and_err_little() -> None:
    reference, aligned = model("sd3", 1), model("sd3", 1)
    for parameter in aligned.model.diffusion_model.parameters():
        parameter.add_(0.02 * parameter)
    calls = [0]
    aligned.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    drawing = Drawing("sd3", steps=24, scheduler="simple")
    exact, plain = draw(at(reference, aligned, 0.5), drawing), draw(reference, drawing)
    all_steps, calls[0] = calls[0], 0
    close = draw(at(reference, aligned, 0.5, reuse=Reuse(tolerance=0.1)), drawing)
    assert calls[0] < all_steps
    assert 0 < (close - exact).norm() <= 0.2 * (exact - plain).norm()


def test_what_artists_do_besides() -> None:
    """Part of the noise, a mask, guidance of 1, odd batches: λ = 0 and 1 stay the host's own."""
    reference, aligned = model("sd15", 1), model("sd15", 2)
    latent = torch.randn(3, 4, 8, 8)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for drawing in (
        Drawing("sd15", "dpmpp_2m", batch=3, latent=latent, denoise=0.5),
        Drawing("sd15", "euler", batch=3, latent=latent, mask=mask),
        Drawing("sd15", "euler", cfg=1.0),
        Drawing("sd15", "dpm_adaptive"),
    ):
        for lam, plain in ((0.0, reference), (1.0, aligned)):
            assert torch.equal(draw(at(reference, aligned, lam), drawing), draw(plain, drawing)), drawing.sampler


def test_models_that_cannot_be_mixed_are_refused() -> None:
    reference = model("sd15", 1)
    with pytest.raises(ValueError, match=r"BaseModel.*SDXL"):
        at(reference, model("sdxl", 1), 0.5)
    one, other = (with_lora_weights(reference, lora("sd15", seed), 1.0, "lora") for seed in (3, 4))
    with pytest.raises(ValueError, match="BaseModel"):
        at(one, other, 0.5)
    with pytest.raises(ValueError, match="realigned"):
        at(at(reference, model("sd15", 2), 0.5), model("sd15", 2), 0.5)
    with pytest.raises(ValueError, match="ModelMergeSimple"):
        at(reference, model("sd15", 2), 0.5, method="interpolate")
    later = with_lora_weights(at(reference, model("sd15", 2), 0.5), lora("sd15"), 1.0, "lora")
    with pytest.raises(ValueError, match="LoRA"):
        draw(later, Drawing("sd15"))
    with pytest.raises(ValueError, match=r"16.*BaseModel.*4"):
        draw(at(reference, model("sd15", 2), 0.5), Drawing("sd15", latent=torch.ones(1, 16, 8, 8)))


def test_the_same_model_twice_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    reference = model("sd15", 1)
    same = at(reference, reference.clone(), 0.5)
    assert "same model" in caplog.text
    assert torch.equal(draw(same, Drawing("sd15")), draw(reference, Drawing("sd15")))


def test_loras_for_other_models_are_refused() -> None:
    reference = model("sd15", 1)
    with pytest.raises(ValueError, match=r"other\.safetensors.*BaseModel"):
        with_lora_weights(reference, lora("flux"), 1.0, "other.safetensors")
    wide = {
        name: tensor.repeat(2, *[1] * (tensor.ndim - 1)) if "up" in name else tensor
        for name, tensor in lora("sd15").items()
    }
    with pytest.raises(ValueError, match="64"):
        draw(at(reference, with_lora_weights(reference, wide, 1.0, "wide"), 0.5), Drawing("sd15"))
    assert torch.equal(draw(reference, Drawing("sd15")), draw(model("sd15", 1), Drawing("sd15")))


def test_a_sampler_that_goes_past_the_guider_is_refused() -> None:
    from comfy import samplers

    def past(
        wrapped: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        conds = wrapped.inner_model.conds
        samplers.calc_cond_batch(
            wrapped.inner_model.inner_model, [conds["positive"]], x, sigmas[:1], extra_args["model_options"]
        )
        return x

    guider = samplers.CFGGuider(at(model("sd15", 1), model("sd15", 2), 0.5))
    guider.set_conds(conditioning("sd15", 1), conditioning("sd15", 2))
    with pytest.raises(ValueError, match="sampler"):
        guider.sample(noise("sd15"), torch.zeros(1, 4, 8, 8), samplers.KSAMPLER(past), torch.tensor([1.0, 0.0]), seed=1)


def test_an_interrupt_leaves_both_models_as_they_were() -> None:
    import comfy.model_management as management

    reference = model("sd15", 1)
    aligned = with_lora_weights(reference, lora("sd15"), 1.0, "lora")
    plain = draw(reference, Drawing("sd15"))

    def stop(step: int, *_: Any) -> None:
        raise management.InterruptProcessingException

    for second in (aligned, model("sd15", 2)):
        with pytest.raises(management.InterruptProcessingException):
            draw(at(reference, second, 0.5), Drawing("sd15", callback=stop))
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in reference.model.modules())
        assert torch.equal(draw(reference, Drawing("sd15")), plain)


def test_the_current_api_and_the_mappings_say_the_same() -> None:
    import asyncio

    from deradiff.integrations.comfyui.registering import class_mappings, comfy_entrypoint

    classes, titles = class_mappings()
    nodes = asyncio.run(comfy_entrypoint().get_node_list())
    assert [node.GET_SCHEMA().node_id for node in nodes] == list(classes) == [node.id for node in NODES]
    for node in nodes:
        old, new = classes[node.GET_SCHEMA().node_id], node.INPUT_TYPES()
        assert {k: list(v) for k, v in old.INPUT_TYPES().items() if v} == {k: list(v) for k, v in new.items() if v}
        assert list(old.RETURN_TYPES) == list(node.RETURN_TYPES) and titles[node.GET_SCHEMA().node_id]


@pytest.mark.parametrize(
    ("workflow", "images", "node", "lam"),
    [
        ("two-checkpoints", 1, "RealignModel", 0.5),
        ("lora-strip", 5, "RealignLora", 0.5),
        ("annealed-guider", 1, "RealignGuider", 0.8),
    ],
)
def test_a_workflow_runs_from_json_to_png(workflow: str, images: int, node: str, lam: float, tmp_path: Path) -> None:
    """Through ComfyUI's loader of custom nodes, its executor and its SaveImage; the PNG says λ."""
    program = Path(__file__).with_name("run_workflow.py")
    file = SOURCE / "example_workflows" / f"{workflow}.json"
    done = subprocess.run([sys.executable, program, tmp_path, file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    written = sorted(tmp_path.glob("*.png"))
    assert len(written) == images and len({path.read_bytes() for path in written}) == images
    with Image.open(written[0]) as image:
        prompt = json.loads(image.info["prompt"])
        assert json.loads(image.info["workflow"])["nodes"]
    assert [step["inputs"]["lam"] for step in prompt.values() if step["class_type"] == node] == [lam]
