"""Adapters as trainers write them: at λ = 1 the reference with their changes merged by hand, or refused by name."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from deradiff import realign
from deradiff.anchors import Anchor, AnchorError, denoiser_of, load_anchor
from lora_dialects import DIALECTS, table, write
from lora_families import FAMILIES
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
    for path, module in reference.named_modules():
        layer: Any = module
        if isinstance(module, BaseTunerLayer):
            weights[f"{path}.weight"] += layer.get_delta_weight(anchor.adapter)
    return weights


@pytest.mark.parametrize(("name", "family", "outcome"), CASES)
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
        torch.testing.assert_close(
            weights[key], tensor, rtol=1e-4, atol=1e-5, msg=f"{key} is not that of the merged model"
        )
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
    coarse, same = (load_anchor(tmp_path / f"{name}.safetensors", pipe, name=name) for name in ("coarse", "same"))
    weights = weights_of(coarse, pipe.unet) if coarse.module is not None else None
    others = weights_of(same, pipe.unet) if same.module is not None else None
    if weights is None or others is None:
        assert coarse.adapter is not None and same.adapter is not None
        return
    assert all(torch.equal(weights[key], others[key]) for key in others)


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
