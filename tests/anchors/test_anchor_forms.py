"""Whole models and LoRAs in whatever form: recognised, or refused in our own words; and any file whatsoever."""

import json
import random
import re
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anchor_files import kohya, lora, lora_weights, made, module_of, original_layout, original_sd3_layout, predict
from deradiff.anchors import AnchorError, CorruptAnchor, IncompatibleAnchor, load_anchor
from messages import naming
from tiny import denoiser

forms = pytest.mark.attack("forms taken for another form")
fuzzed = pytest.mark.attack("any file as an anchor")


def written(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, path)
    return path


# --- whole models -----------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "pixart"])
@pytest.mark.cases(2)
def test_names_behind_a_prefix(kind, tmp_path):
    pipe, aligned = made(kind)
    expected = predict(pipe, aligned)
    for k, prefix in enumerate(("module.", "_orig_mod.", "module._orig_mod.", "unet.", "model.", "x.y.")):
        state = {f"{prefix}{name}": tensor for name, tensor in aligned.state_dict().items()}
        anchor = load_anchor(written(state, tmp_path / f"{k}.safetensors"), pipe)
        assert torch.equal(predict(pipe, module_of(anchor)), expected)


@forms
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_the_original_layout_with_and_without_its_prefix(kind, tmp_path):
    pipe, aligned = made(kind)
    state = original_sd3_layout(aligned) if kind == "sd3" else original_layout(aligned)
    expected = predict(pipe, aligned)
    for k, prefix in enumerate(("", "model.diffusion_model.", "diffusion_model.", "module.", "unet.")):
        renamed = {prefix + name.removeprefix("model.diffusion_model."): tensor for name, tensor in state.items()}
        anchor = load_anchor(written(renamed, tmp_path / f"{k}.safetensors"), pipe)
        torch.testing.assert_close(predict(pipe, module_of(anchor)), expected, rtol=1e-5, atol=1e-6)


NESTS: dict[str, Callable[[Any], Any]] = {
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "epoch": 3},
    "state_dict": lambda state: {"state_dict": state, "lr_schedulers": []},
    "twice": lambda state: {"model": {"state_dict": state}},
    "ema": lambda state: {"ema": state, "step": 3},
    "loose scalars": lambda state: {"iteration": torch.tensor(5), "loss": torch.tensor(0.5), "model": state},
    "module": lambda state: {"module": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
}


@forms
@pytest.mark.parametrize("nest", NESTS)
def test_models_inside_a_training_checkpoint(nest, tmp_path):
    pipe, aligned = made("sd")
    torch.save(NESTS[nest](aligned.state_dict()), tmp_path / "model.ckpt")
    anchor = load_anchor(tmp_path / "model.ckpt", pipe, allow_pickle=True)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


@forms
def test_several_models_in_one_file_are_refused(tmp_path):
    pipe, aligned = made("sd")
    state = aligned.state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "two.ckpt")
    with pytest.raises(CorruptAnchor, match=naming("two.ckpt", "model, ema")):
        load_anchor(tmp_path / "two.ckpt", pipe, allow_pickle=True)
    both = {f"{prefix}.{name}": tensor for prefix in ("student", "teacher") for name, tensor in state.items()}
    with pytest.raises(IncompatibleAnchor, match=r"'student\.', 'teacher\.'"):
        load_anchor(written(both, tmp_path / "two.safetensors"), pipe)


@forms
def test_what_else_stands_in_a_file_of_a_whole_pipeline(tmp_path):
    pipe, aligned = made("sd")
    state = {f"unet.{name}": tensor for name, tensor in aligned.state_dict().items()}
    whole = state | {"text_encoder.a.weight": torch.ones(2), "vae.b.weight": torch.ones(2)}
    anchor = load_anchor(written(whole, tmp_path / "model.safetensors"), pipe)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))
    with pytest.raises(IncompatibleAnchor, match=r"unknown tensors: controlnet\.c\.weight"):
        load_anchor(written(state | {"controlnet.c.weight": torch.ones(2)}, tmp_path / "more.safetensors"), pipe)
    first = next(iter(state))
    lacking = {name: tensor for name, tensor in state.items() if name != first}
    with pytest.raises(IncompatibleAnchor, match=f"missing tensors: {re.escape(first.removeprefix('unet.'))}"):
        load_anchor(written(lacking, tmp_path / "less.safetensors"), pipe)


@forms
@pytest.mark.parametrize("other", ["control_model.a.weight", "model_ema.decay.x", "something.else"])
def test_what_an_original_checkpoint_holds_beside_the_known_parts_is_named(other, tmp_path):
    pipe, aligned = made("sd")
    known = {"first_stage_model.a.weight": torch.ones(2), "alphas_cumprod": torch.ones(2), "ztsnr": torch.ones(1)}
    state = original_layout(aligned) | known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_anchor(written(state, tmp_path / "whole.safetensors"), pipe)
    with pytest.warns(UserWarning, match=naming(1, other)):
        anchor = load_anchor(written(state | {other: torch.ones(2)}, tmp_path / "more.safetensors"), pipe)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))


@forms
@pytest.mark.parametrize("wrap", ["module.{}", "module.unet.{}", "unet._orig_mod.{}"])
def test_loras_behind_what_training_puts_there(wrap, tmp_path):
    pipe, _ = made("sd")
    adapted = lora(pipe.unet)
    names = lora_weights(adapted)
    plain = load_anchor(written({f"unet.{name}": t for name, t in names.items()}, tmp_path / "a.safetensors"), pipe)
    wrapped = load_anchor(
        written({wrap.format(name): t for name, t in names.items()}, tmp_path / "b.safetensors"), pipe
    )
    state = pipe.unet.state_dict()
    pairs = [(name, name.replace(plain.adapter, wrapped.adapter)) for name in state if f".{plain.adapter}." in name]
    assert pairs and all(torch.equal(state[one], state[other]) for one, other in pairs)


@forms
@pytest.mark.parametrize("kind", ["sd", "sd3", "flux", "pixart"])
def test_an_unknown_form_is_refused_with_its_names_and_those_that_are_known(kind, tmp_path):
    pipe, _ = made(kind)
    with pytest.raises(IncompatibleAnchor) as refusal:
        load_anchor(written({"encoder.block.0.weight": torch.ones(4, 4)}, tmp_path / "t5.safetensors"), pipe)
    text = str(refusal.value)
    assert "encoder.block.0.weight" in text and type(denoiser(pipe)).__name__ in text and "Error" not in text
    assert next(name for name, _ in denoiser(pipe).named_parameters()) in text


@forms
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.int8, True), (torch.bool, True), (torch.float8_e4m3fn, False), (torch.complex64, True)]
)
def test_weights_that_are_no_numbers_of_floating_point(dtype, error, tmp_path):
    pipe, aligned = made("sd")
    state = aligned.state_dict()
    name = next(iter(state))
    torch.save(state | {name: state[name].to(dtype)}, tmp_path / "model.bin")
    if error:
        with pytest.raises(CorruptAnchor, match=name):
            load_anchor(tmp_path / "model.bin", pipe, allow_pickle=True)
    else:
        load_anchor(tmp_path / "model.bin", pipe, allow_pickle=True)


@forms
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_with_nan_are_refused_where_they_are_read(value, tmp_path):
    pipe, aligned = made("sd")
    broken = lora_weights(lora(pipe.unet, ("to_q",)))
    for state, form in ((aligned.state_dict(), "whole"), (original_layout(aligned), "original"), (broken, "lora")):
        name = list(state)[3]
        state = state | {name: torch.full_like(state[name], value)}
        with pytest.raises(CorruptAnchor, match=naming(name, "NaN")):
            load_anchor(written(state, tmp_path / f"{form}.safetensors"), pipe)


@forms
def test_shards_that_overlap_or_are_missing(tmp_path):
    pipe, aligned = made("sd")
    aligned.save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists()
    anchor = load_anchor(tmp_path, pipe)
    assert torch.equal(predict(pipe, module_of(anchor)), predict(pipe, aligned))
    first, second = load_file(shards[0]), load_file(shards[1])
    name = next(iter(first))
    written(second | {name: first[name] + 1}, shards[1])
    with pytest.raises(CorruptAnchor, match=re.escape(name)):
        load_anchor(tmp_path, pipe)
    shards[1].unlink()
    with pytest.raises(AnchorError, match=naming(len(shards), [2])):
        load_anchor(tmp_path, pipe)


# --- any file ---------------------------------------------------------------------------------------------------------

FOREIGN = re.compile(r"\b(?:Key|Index|Attribute|Type|Value|Runtime|Assertion|NotImplemented|Unicode|Recursion)Error\b")


def attempt(source: Path, pipe: Any) -> None:
    """Load it, or be refused in our own words, and be left as before."""
    before = {name: tensor.clone() for name, tensor in denoiser(pipe).state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_anchor(source, pipe, allow_pickle=True).unload(denoiser(pipe))
        except AnchorError as refusal:
            assert not FOREIGN.search(str(refusal)), str(refusal)
    after = denoiser(pipe).state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], tensor) for name, tensor in before.items())


def mutated(state: dict[str, Tensor], chance: random.Random) -> dict[str, Tensor]:
    """The tensors with one to three things wrong."""
    state = dict(state)
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(state))
        tensor = state[name]
        place = chance.randrange(len(name))
        changes: list[Callable[[], dict[str, Tensor]]] = [
            lambda: {k: v for k, v in state.items() if k != name},  # noqa: B023
            lambda: {k.replace(name, name[:place] + name[place + 1 :]): v for k, v in state.items()},  # noqa: B023
            lambda: {k: v for k, v in state.items() if chance.random() < 0.5} or state,  # noqa: B023
            lambda: {chance.choice(["module.", "lora_unet_", "unet.", "."]) + k: v for k, v in state.items()},  # noqa: B023
            lambda: {name: tensor},  # noqa: B023
            *(
                lambda new=new: state | {name: new}  # noqa: B023
                for new in (
                    tensor.to(chance.choice([torch.int64, torch.bool, torch.float8_e4m3fn, torch.float16])),
                    tensor.flatten(),
                    tensor[..., :0] if tensor.ndim else tensor,
                    torch.tensor(1.5),
                    torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor,
                    tensor.repeat(2, *[1] * (tensor.ndim - 1)) if tensor.ndim else tensor,
                    tensor.unsqueeze(-1),
                )
            ),
            *(
                lambda new=new: state | {f"{name.rpartition('.')[0]}{new}": tensor}  # noqa: B023
                for new in (".diff", ".alpha", ".lora_A.weight", ".lokr_w1", ".lora_B.bias", "..", ".lora_mid.weight")
            ),
        ]
        state = chance.choice(changes)()
    return state


@fuzzed
@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.cases(2)
def test_files_with_something_wrong_in_them(kind, tmp_path):
    pipe, aligned = made(kind)
    weights = lora_weights(lora(denoiser(pipe), ("to_q", "to_out.0")))
    bases = [kohya(weights, lambda _: 2.0), weights, {f"lora.{name}": tensor for name, tensor in weights.items()}]
    bases += [aligned.state_dict(), *([original_layout(aligned)] if kind.startswith("sd") and kind != "sd3" else [])]
    chance = random.Random(kind)
    for k in range(40):
        attempt(written(mutated(chance.choice(bases), chance), tmp_path / f"{k}.safetensors"), pipe)


@fuzzed
def test_bytes_that_are_no_file_of_weights(tmp_path):
    pipe, aligned = made("sd")
    sound = written(lora_weights(lora(pipe.unet, ("to_q",))), tmp_path / "sound.safetensors").read_bytes()
    torch.save({"model": aligned.state_dict()}, tmp_path / "sound.bin")
    pickled = (tmp_path / "sound.bin").read_bytes()
    chance = random.Random(0)
    header = json.dumps({"__metadata__": {"lora_adapter_metadata": "[" * 100_000}, "a.lora_A.weight": None}).encode()
    contents = [b"", b"{}", sound[:8], sound[:-1], struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 2**60) + b"{}"]
    contents += [struct.pack("<Q", len(header)) + header, pickled[: len(pickled) // 2], pickled[:10], b"\x80\x04."]
    for whole in (sound, pickled):
        for _ in range(40):
            place, damaged = chance.randrange(min(len(whole), 3000)), bytearray(whole)
            damaged[place : place + chance.choice([1, 4, 64])] = chance.randbytes(chance.choice([1, 4, 64]))
            contents.append(bytes(damaged))
    for k, content in enumerate(contents):
        for suffix in ("safetensors", "bin"):
            (tmp_path / f"{k}.{suffix}").write_bytes(content)
            attempt(tmp_path / f"{k}.{suffix}", pipe)


VALUES: list[Any] = [None, [], {}, 3, "x", [[]], {"a": {}}, 10**400, True, -1.5, "[" * 1000]


@fuzzed
@pytest.mark.parametrize("form", ["peft", "metadata", "denoiser", "pipeline"])
@pytest.mark.cases(2)
def test_settings_with_something_wrong_in_them(form, tmp_path):
    pipe, aligned = made("sd")
    wrapped = lora(pipe.unet, ("to_q",))
    if form == "peft":
        wrapped.save_pretrained(tmp_path)
        path = tmp_path / "adapter_config.json"
    elif form == "denoiser":
        aligned.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
    elif form == "pipeline":
        pipe.save_pretrained(tmp_path)
        path = tmp_path / "scheduler" / "scheduler_config.json"
    else:
        path = tmp_path / "metadata.json"
        settings = wrapped.peft_config["default"].to_dict()
        path.write_text(json.dumps({f"unet.{name}": value for name, value in settings.items()}, default=list))
    sound = json.loads(path.read_text())
    chance = random.Random(form)
    texts = ["", "[]", "{}", "null", "[" * 100_000, '{"a":' * 50_000, "\udc80", str(sound)[:50]]
    names = [name for name in sound if not name.startswith("_diffusers")]
    texts += [
        json.dumps(sound | {chance.choice(names): chance.choice(VALUES)})
        for _ in range(6 if form == "pipeline" else 25)
    ]
    texts += [json.dumps({k: v for k, v in sound.items() if chance.random() < 0.7}) for _ in range(5)]
    for text in texts:
        raw = text.encode("utf-8", "surrogateescape")
        if form == "metadata":
            if b"\x80" in raw:
                continue
            weights = {f"unet.{name}": tensor for name, tensor in lora_weights(wrapped).items()}
            save_file(weights, tmp_path / "lora.safetensors", metadata={"lora_adapter_metadata": text})
            attempt(tmp_path / "lora.safetensors", pipe)
        else:
            path.write_bytes(raw)
            attempt(tmp_path, pipe)
