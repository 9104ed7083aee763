"""Pipelines with several denoisers, an anchor and λ for each: Wan 2.2's for high and low noise."""

from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import tiny_families
from deradiff import realign
from deradiff.anchors import AnchorError
from oracle import lock_step
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
