"""Adapters as trainers write them: at λ = 1 the reference with their changes merged by hand, or refused by name."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deradiff import realign
from deradiff.anchors import Anchor, AnchorError, denoiser_of, load_anchor
from lora_dialects import DIALECTS, table, write
from lora_families import FAMILIES
from messages import naming
from tiny import denoiser, distance, make, sample

PAGE = Path(__file__).parents[2] / "docs" / "tasks" / "anchors.md"
CASES = [(name, family, outcome) for name, dialect in DIALECTS.items() for family, outcome in dialect.cases()]


def weights_of(anchor: Anchor, reference: Any) -> dict[str, Tensor]:
    """The weights that the anchor predicts with."""
    if anchor.module is not None:
        return dict(anchor.module.state_dict())
    assert anchor.adapter is not None
    own = {name: t for name, t in reference.state_dict().items() if anchor.adapter not in name}
    weights = {name.replace(".base_layer.", "."): tensor.clone() for name, tensor in own.items()}
    layers: dict[str, Any] = dict(reference.named_modules())
    for path, layer in layers.items():
        if anchor.adapter in getattr(layer, "lora_A", ()):
            weights[f"{path}.weight"] += layer.get_delta_weight(anchor.adapter)
    return weights


@pytest.mark.parametrize(("name", "family", "outcome"), CASES)
@pytest.mark.cases(54)
def test_a_file_is_the_merged_model_or_is_refused(name: str, family: str, outcome: str, tmp_path: Path) -> None:
    dialect = DIALECTS[name]
    pipe = FAMILIES[family].make()
    _, module = denoiser_of(pipe)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    file, expected = write(dialect, family, module, tmp_path)
    if outcome == "refused":
        with pytest.raises(AnchorError) as refusal:
            load_anchor(file, pipe)
        assert any(key in str(refusal.value) for key in load_file(file)), str(refusal.value)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        anchor = load_anchor(file, pipe)
    said = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    assert all(dialect.left_out and dialect.left_out in message for message in said) and (said or not dialect.left_out)
    assert (anchor.module is None) == (outcome == "adapter")
    weights = weights_of(anchor, module)
    assert weights.keys() == expected.keys()
    changed = 0
    for key, tensor in expected.items():
        assert torch.allclose(weights[key], tensor, rtol=1e-4, atol=1e-5), key
        changed += not torch.equal(tensor, before[key])
    assert changed, "the file changes nothing: no test"
    anchor.unload(module)
    after = module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    "name", ["kohya sd-scripts", "ComfyUI, with norms and biases; lightx2v, CausVid", "DoRA by rows"]
)
@pytest.mark.parametrize("family", ["SDXL", "Flux"])
def test_a_realigned_pipeline_draws_what_the_merged_model_does(name: str, family: str, tmp_path: Path) -> None:
    (pipe, _, call), (own, _, _) = make(family.lower()), make(family.lower())
    file, expected = write(DIALECTS[name], family, denoiser(pipe), tmp_path)
    denoiser(own).load_state_dict(expected)
    plain, aligned = sample(pipe, call), sample(own, call)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dial = realign(pipe, file, 1.0)
    assert distance(sample(pipe, call), aligned) < 1e-3 < distance(plain, aligned)
    dial.lam = 0.0
    assert torch.equal(sample(pipe, call), plain)
    dial.remove()
    assert torch.equal(sample(pipe, call), plain)


@pytest.mark.parametrize("name", ["ComfyUI", "DoRA by columns"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_storage_in_coarse_precision(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = FAMILIES["SDXL"].make()
    file, _ = write(DIALECTS[name], "SDXL", pipe.unet, tmp_path)
    stored = {key: tensor.to(dtype) if tensor.ndim else tensor for key, tensor in load_file(file).items()}
    save_file(stored, tmp_path / "coarse.safetensors")
    save_file({key: tensor.float() for key, tensor in stored.items()}, tmp_path / "same.safetensors")
    weights = []
    for stored_as in ("coarse", "same"):
        anchor = load_anchor(tmp_path / f"{stored_as}.safetensors", pipe)
        weights.append(weights_of(anchor, pipe.unet))
        anchor.unload(pipe.unet)
    assert all(torch.allclose(weights[0][key], tensor, rtol=1e-4, atol=1e-5) for key, tensor in weights[1].items())


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "flux-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(AnchorError, match=naming("flux-Q4_0.gguf", "GGUF")):
        load_anchor(tmp_path / "flux-Q4_0.gguf", FAMILIES["Flux"].make())


@pytest.mark.parametrize("end", ["diff", "diff_b", "dora_scale", "oft_blocks", "lokr_w1", "hada_w1_a", "scalar"])
@pytest.mark.parametrize("where", ["layer", "nowhere"])
def test_what_has_no_place_is_named(end: str, where: str, tmp_path: Path) -> None:
    pipe = FAMILIES["Wan"].make()
    file, _ = write(DIALECTS["ComfyUI, with norms and biases; lightx2v, CausVid"], "Wan", pipe.transformer, tmp_path)
    name = f"diffusion_model.{'blocks.0.cross_attn.v' if where == 'layer' else 'blocks.7.norm3'}.{end}"
    save_file(load_file(file) | {name: torch.ones(3, 3)}, tmp_path / "more.safetensors")
    with pytest.raises(AnchorError) as refusal:
        load_anchor(tmp_path / "more.safetensors", pipe)
    assert name in str(refusal.value) and "Error" not in str(refusal.value)


def test_the_page_has_the_table_of_the_tests() -> None:
    assert table() in PAGE.read_text(), f"docs/tasks/anchors.md should hold:\n{table()}"
