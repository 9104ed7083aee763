"""What every form of an anchor has to pass; a form that is added gets a row in `FORMS`.

The same aligned model in each form: sampling at λ = 0 is the reference's bit for bit, at λ = 1 the aligned model's own,
in between neither, and afterwards the pipeline is what it was.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from anchor_files import kohya, lora, lora_weights, merged, original_layout, saved, state_of
from deradiff import realign
from tiny import denoiser, distance, make, sample

ALPHA_PER_RANK = 2 / 4  # of `anchor_files.lora`

Form = Callable[[Any, Path], Any]
"""Writes an aligned denoiser, or a PEFT model with a LoRA, into an empty folder; gives what `realign` is given."""


def one_file(name: str, tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / name)
    return folder / name


def diffusers_lora(adapted: Any, folder: Path) -> Path:
    named = {f"unet.{name}": tensor for name, tensor in lora_weights(adapted).items()}
    scaled = {f"unet.{name.split('.lora_')[0]}.alpha": torch.tensor(2.0) for name in lora_weights(adapted)}
    return one_file("pytorch_lora_weights.safetensors", named | scaled, folder)


def peft_lora(adapted: Any, folder: Path) -> Path:
    adapted.save_pretrained(folder)
    return folder


WHOLE: dict[str, Form] = {
    "loaded": lambda aligned, folder: copy.deepcopy(aligned),
    "denoiser folder": saved,
    "file in diffusers' layout": lambda aligned, folder: one_file("a.safetensors", aligned.state_dict(), folder),
    "file in the original layout": lambda aligned, folder: one_file("a.safetensors", original_layout(aligned), folder),
}
LORA: dict[str, Form] = {
    "LoRA in diffusers' form": diffusers_lora,
    "LoRA in PEFT's form": peft_lora,
    "LoRA in kohya's form": lambda adapted, folder: one_file(
        "a.safetensors", kohya(lora_weights(adapted), lambda layer: 2.0), folder
    ),
}


@pytest.mark.parametrize("form", [*WHOLE, *LORA])
@pytest.mark.cases(4)
def test_a_form_is_the_aligned_model_and_leaves_nothing(form: str, tmp_path: Path) -> None:
    pipe, aligned, call = make("sd")
    if form in LORA:
        adapted = lora(pipe.unet)
        source: Any = LORA[form](adapted, tmp_path)
        aligned = merged(pipe.unet, lora_weights(adapted), lambda layer: ALPHA_PER_RANK)
    else:
        source = WHOLE[form](aligned, tmp_path)
    own = make("sd")[0]
    own.unet.load_state_dict(aligned.state_dict())
    plain, expected, before = sample(pipe, call), sample(own, call), state_of(pipe)
    with realign(pipe, source, 0.0) as dial:
        assert torch.equal(sample(pipe, call), plain)
        dial.lam = 1.0
        at_one = sample(pipe, call)
        # A LoRA's layers add what merged weights hold: the same up to rounding.
        assert torch.equal(at_one, expected) if form in WHOLE else distance(at_one, expected) < 1e-4
        dial.lam = 0.4
        assert min(distance(sample(pipe, call), image) for image in (plain, expected)) > 1e-3
    assert torch.equal(sample(pipe, call), plain)
    after = state_of(pipe)
    assert {key: after[key] for key in after if key != "random"} == {
        key: before[key] for key in after if key != "random"
    }
    assert denoiser(pipe) is pipe.unet
