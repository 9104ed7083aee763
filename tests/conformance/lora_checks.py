"""The check with a LoRA file as anchor, as a plain pipeline saves and loads it: batched with the reference, and not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

import deradiff
from arrays import Arrays, difference, equal, halves, is_twice
from cases import Case, Changes
from checks import SLOW, Checks
from oracles import Oracles
from results import Check, NotTried, described

FILE = "pytorch_lora_weights.safetensors"

LEAST_EFFECT = 1e-3
"""Of a LoRA on the outputs: at less, rounding in single precision is more than a ten-thousandth of it."""

_USUAL_LAYERS = ("to_q", "to_k", "to_v")
_OTHER_LAYERS = (
    *("q", "k", "v", "qkv", "wq", "wk", "wv", "q_proj", "k_proj", "v_proj", "to_qkv", "img_attn_qkv", "qkv_proj"),
    *("query", "key", "value", "to_query", "to_key", "to_value"),
)


def lora(checks: Checks) -> Check:
    """λ = 0, ½ and 1 of a LoRA, and [0, 1] for two images."""
    case = checks.case
    if not hasattr(case.pipeline_class, "load_lora_weights") or not hasattr(case.pipeline_class, "save_lora_weights"):
        raise NotTried("the pipeline loads no LoRA")
    with TemporaryDirectory() as folder:
        return _LoraCheck(checks, folder).made()


class _LoraCheck:
    """One LoRA of a case's first denoiser, and what the plain pipeline makes of it."""

    def __init__(self, checks: Checks, folder: str):
        self.case, self.path, self.two = checks.case, checks.path, checks.two
        self.folder, self.reference = folder, checks.base.reference
        if self.two is not None and checks.images_depend(self.two):
            self.two = None
        self.modes = (True, False) if checks.base.seconds < SLOW else (True,)
        for layers in layers_of(self.case.denoisers[self.case.main]):
            write_lora(self.case, folder, layers)
            try:
                plain = self._loaded()
                self.anchor = self.case.run(plain)
            except Exception as error:
                raise NotTried(f"the plain pipeline cannot load this LoRA: {described(error)}") from error
            self.scale = difference(self.reference, self.anchor)
            if self.scale > LEAST_EFFECT:
                break
        else:
            raise NotTried(f"no LoRA has an effect in the plain pipeline to measure by, at most {self.scale:.1e}")
        self.same = checks.base.same(self.scale)
        self.oracles = _LoraOracles(self.case, {self.case.main: getattr(plain, self.case.main)}, self.path, self)

    def _loaded(self) -> Any:
        """The plain pipeline with the LoRA loaded, as anybody does it."""
        pipe = self.case.build()
        pipe.load_lora_weights(self.folder, weight_name=FILE)
        return pipe

    def made(self) -> Check:
        """The worst of both modes."""
        numbers: dict[str, Any] = {"effect": self.scale}
        problems: list[str] = []
        for batched in self.modes:
            mode = "batched" if batched else "one by one"
            numbers[mode], why = self._in_mode(batched)
            problems += [f"{mode}: {problem}" for problem in why]
        modes = [numbers[mode] for mode in numbers if mode != "effect"]
        told = [value for mode in modes for name, value in mode.items() if name in ("λ=0", "λ=1", "λ=½")]
        away = max((value for value in told if isinstance(value, float)), default=None)
        return Check("wrong" if problems else "passes", "; ".join(problems), numbers, away)

    def _in_mode(self, batched: bool) -> tuple[dict[str, Any], list[str]]:
        """Numbers, and what is wrong with them."""
        case, pipe = self.case, self.case.build()
        file = str(Path(self.folder, FILE))
        # The file does not say whose it is; the plain pipeline takes it for the first one's too.
        anchor = file if len(case.denoisers) == 1 else {case.main: file}
        with deradiff.realign(pipe, anchor, lam=0.0, batched=batched) as dial:
            numbers: dict[str, Any] = {"λ=0": difference(case.run(pipe), self.reference) / self.scale}
            dial.lam = 1.0
            numbers["λ=1"] = difference(case.run(pipe), self.anchor) / self.scale
            dial.lam = 0.5
            judged = self.oracles.judged(case.run(pipe), self.scale, self.same)
            numbers |= {"λ=½": judged.difference, "of": judged.numbers}
            if self.two is not None:
                dial.lam = [0, 1]
                numbers["[0, 1]"] = self._two_images(pipe, self.two)
        problems = [
            f"{name} is {away:.1e} of the LoRA's effect away"
            for name, away in numbers.items()
            if isinstance(away, float) and not away < self.same
        ]
        if not equal(case.run(pipe), self.reference):
            problems.append("remove() leaves something of it")
        return numbers, problems

    def _two_images(self, pipe: Any, two: Changes) -> float | str:
        """The first image without, the second with the LoRA: how far either is from the plain pipeline's."""
        run = functools.partial(self.case.run, changes=two)
        try:
            plain, full = run(self.case.build()), run(self._loaded())
        except Exception as error:
            return f"the plain pipeline cannot draw two images: {described(error)}"
        if not is_twice(plain, self.reference):
            return "two images cannot be told apart"
        both = halves(run(pipe))
        return max(difference(both[0], halves(plain)[0]), difference(both[1], halves(full)[1])) / self.scale


class _LoraOracles(Oracles):
    """Oracles whose anchor pipeline has loaded the file itself, and which are asked once for both modes."""

    def __init__(self, case: Case, anchors: Mapping[str, nn.Module], path: str, check: _LoraCheck):
        super().__init__(case, anchors, path)
        self._check = check
        self._known: dict[str, Arrays] = {}

    def anchor_pipeline(self) -> Any:
        return self._check._loaded()

    def lock_step(self, changes: Changes = dict) -> Arrays:
        if "lock_step" not in self._known:
            self._known["lock_step"] = super().lock_step(changes)
        return self._known["lock_step"]


def write_lora(case: Case, folder: str, layers: list[str]) -> None:
    """A random LoRA of these layers, written by the pipeline itself. Raises `NotTried`."""
    pipe = case.build()
    denoiser: Any = getattr(pipe, case.main)
    if not hasattr(denoiser, "add_adapter"):
        raise NotTried("the denoiser takes no adapter")
    torch.manual_seed(3)
    denoiser.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:
                weight.mul_(3.0)
    taken = inspect.signature(pipe.save_lora_weights).parameters
    names = (f"{case.main}_lora_layers", "transformer_lora_layers", "unet_lora_layers")
    argument = next((name for name in names if name in taken), None)
    if argument is None:
        raise NotTried(f"save_lora_weights takes {', '.join(taken)}")
    try:
        pipe.save_lora_weights(folder, **{argument: get_peft_model_state_dict(denoiser)})
    except Exception as error:
        raise NotTried(f"the plain pipeline cannot save this LoRA: {described(error)}") from error


def layers_of(denoiser: nn.Module) -> list[list[str]]:
    """The names of layers for a LoRA: its attention's projections; all, for attention may be shut off at the start."""
    linear = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)]
    ends = {name.rpartition(".")[2] for name in linear}
    known = [[name for name in names if name in ends] for names in (_USUAL_LAYERS, _OTHER_LAYERS)]
    return [layers for layers in (*known, linear) if layers]
