"""Pipelines with several denoisers, an anchor and λ for each: Wan 2.2's for high and low noise."""

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_families
from deradiff import realign
from deradiff.algorithm.comparisons import compare
from deradiff.anchors import AnchorError
from deradiff.worlds.gaussian_mixture import MixtureDenoiser, World, crossing
from oracle import lock_step
from realigned_worlds import FAMILIES
from tiny import assert_close, distance, noise, tensors_in
from tiny_families import anchors_of, around, built

NAMES = ("transformer", "transformer_2")
_, CALL = built("wan22")


def wan(anchors: Mapping[str, Any] | None = None) -> Any:
    return around("wan22", anchors or {})


def drawn(pipe: Any) -> Tensor:
    return tiny_families.drawn(pipe, CALL)[0]


def test_each_denoiser_has_its_own_anchor():
    pipe, anchors = wan(), anchors_of(wan())
    plain, aligned = drawn(wan()), drawn(wan(anchors_of(wan())))
    dial = realign(pipe, anchors, 0.0)
    assert torch.equal(drawn(pipe), plain)
    dial.lam = 1.0
    assert torch.equal(drawn(pipe), aligned)
    dial.lam = 0.4
    assert_close(drawn(pipe), lock_step([wan(), wan(anchors_of(wan()))], CALL, 0.4, read=tensors_in)[0])
    assert dial.anchors == ("anchor",) and dial.lam == 0.4
    dial.remove()
    assert torch.equal(drawn(pipe), plain)


def test_each_denoiser_has_its_own_lam():
    pipe = wan()
    own = anchors_of(pipe)
    with realign(pipe, own, {"transformer": 1.0, "transformer_2": 0.0}) as dial:
        assert torch.equal(drawn(pipe), drawn(wan({"transformer": anchors_of(wan())["transformer"]})))
        dial.lam = {"transformer": 0.0, "transformer_2": 1.0}
        assert torch.equal(drawn(pipe), drawn(wan({"transformer_2": anchors_of(wan())["transformer_2"]})))
        assert dial.lam == {"transformer": 0.0, "transformer_2": 1.0}
        with pytest.raises(ValueError, match=r"transformer_2"):
            dial.lam = {"transformer": 0.5}


def test_what_is_left_out_stays_the_references_and_that_is_said():
    pipe = wan()
    with (
        pytest.warns(UserWarning, match="transformer_2"),
        realign(pipe, {"transformer": anchors_of(pipe)["transformer"]}, 1.0),
    ):
        assert torch.equal(drawn(pipe), drawn(wan({"transformer": anchors_of(wan())["transformer"]})))


def lora(module: nn.Module, seed: int) -> dict[str, Tensor]:
    """A LoRA of rank 2 on the attention's projections, under the module's own names."""
    layers = [name for name, _ in module.named_modules() if name.endswith((".to_q", ".to_v"))]
    tensors = {}
    for k, name in enumerate(layers):
        out, into = cast(nn.Linear, module.get_submodule(name)).weight.shape
        tensors[f"{name}.lora_A.weight"] = noise(2, into, seed=seed + 2 * k)
        tensors[f"{name}.lora_B.weight"] = noise(out, 2, seed=seed + 2 * k + 1)
    return tensors


def test_loras_come_as_a_pair_of_files_or_as_one_whose_keys_name_the_denoiser(tmp_path):
    pipe = wan()
    own = {name: lora(getattr(pipe, name), 100 * seed) for seed, name in enumerate(NAMES, 1)}
    for name, tensors in own.items():
        save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, tmp_path / f"{name}.safetensors")
    both = {f"{name}.{key}": tensor for name, tensors in own.items() for key, tensor in tensors.items()}
    save_file(both, tmp_path / "both.safetensors")
    plain = drawn(pipe)
    with realign(pipe, {name: tmp_path / f"{name}.safetensors" for name in NAMES}, 0.5):
        pair = drawn(pipe)
    assert torch.equal(drawn(pipe), plain)
    with realign(pipe, tmp_path / "both.safetensors", 0.5):
        assert torch.equal(drawn(pipe), pair)
    assert distance(pair, plain) > 1e-3
    with realign(pipe, {name: tmp_path / f"{name}.safetensors" for name in NAMES}, 1.0, batched=False):
        aligned = drawn(pipe)
    loaded = wan()
    for name in NAMES:
        prefixed = {f"transformer.{key}": tensor for key, tensor in own[name].items()}
        getattr(loaded, name).load_lora_adapter(prefixed, prefix="transformer")
    assert_close(drawn(loaded), aligned)


def test_a_pipeline_is_an_anchor_for_all_its_denoisers(tmp_path):
    aligned = wan(anchors_of(wan()))
    for name in NAMES:
        getattr(aligned, name).save_pretrained(tmp_path / name)
    aligned.save_config(tmp_path)
    pipe = wan()
    with realign(pipe, tmp_path, 1.0):
        assert torch.equal(drawn(pipe), drawn(aligned))


@pytest.mark.parametrize("form", ["module", "file"])
def test_one_anchor_for_several_denoisers_has_to_say_which_it_is_for(form, tmp_path):
    pipe = wan()
    plain = drawn(pipe)
    source: Any = anchors_of(pipe)["transformer"]
    if form == "file":
        source = tmp_path / "lora.safetensors"
        save_file({f"transformer.{key}": value for key, value in lora(pipe.transformer, 5).items()}, source)
    with pytest.raises(AnchorError, match=r"transformer and transformer_2"):
        realign(pipe, source)
    with pytest.raises(ValueError, match=r"transformer_3"):
        realign(pipe, {"transformer": source, "transformer_3": source})
    assert torch.equal(drawn(pipe), plain)


# -- weights across the stages: a world drawn by one denoiser for much noise and another for little ------------------


class Stages(DiffusionPipeline):
    """A closed-form world by two denoisers, of which the second takes over in the middle of the run."""

    def __init__(self, transformer: MixtureDenoiser, transformer_2: MixtureDenoiser, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, transformer_2=transformer_2, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(count, self.transformer.config.dim, generator=generator, dtype=torch.float64)
        self.scheduler.set_timesteps(steps)
        for i, t in enumerate(self.scheduler.timesteps):
            stage = self.transformer if i < steps // 2 else self.transformer_2
            x = self.scheduler.step(stage(x, t, return_dict=False)[0], t, x, generator=generator, return_dict=False)[0]
        return x


def staged(world: World, lam: Any, count: int = 4000, steps: int = 60, tilt: float = 2.0) -> tuple[Tensor, Any]:
    pipe = Stages(world.denoiser({}), world.denoiser({}), FAMILIES["DDPM"]())
    anchors = {name: world.denoiser({"slope": tilt}) for name in NAMES}
    with realign(pipe, anchors, lam) as dial:
        return pipe(count, steps, torch.Generator().manual_seed(1)), dial


def test_weights_run_on_across_the_stages_and_the_verdict_judges_the_whole_run():
    world = crossing()
    one = world.pipeline(FAMILIES["DDPM"]())
    one.set_progress_bar_config(disable=True)
    with realign(one, world.denoiser({"slope": 2.0}), 0.25) as alone:
        pictures = one(
            num_images_per_prompt=4000, num_inference_steps=60, generator=torch.Generator().manual_seed(1)
        ).images
    x, dial = staged(world, 0.25)
    assert torch.equal(x, pictures)
    ours, theirs = dial.importance_weights, alone.importance_weights
    torch.testing.assert_close(ours.log_weights, theirs.log_weights)
    torch.testing.assert_close(ours.path_kl, theirs.path_kl)
    assert ours.obstacles == theirs.obstacles == frozenset()
    scores = world.rewards["slope"](x)
    assert dial.verdict(scores).words == alone.verdict(scores).words
    # And they lead to the retrained model, from which Algorithm 1 is a third of the shift away.
    truth = world.aligned({"slope": 0.5}).expected(world.rewards["slope"])
    comparison = compare(scores, ours.log_weights)
    shift = truth - world.reference.expected(world.rewards["slope"])
    assert abs(comparison.weighted.value - truth) < 4 * comparison.weighted.error + 0.03 * shift
    assert truth - comparison.plain.value > 0.2 * shift


def test_another_lam_in_each_stage_has_no_exact_target_and_says_so():
    _, dial = staged(crossing(), {"transformer": 0.5, "transformer_2": 0.25}, count=8, steps=10)
    assert "annealing" in dial.importance_weights.obstacles
