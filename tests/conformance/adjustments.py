"""What diffusers' tests need changed to run here: parts of torchvision, and sizes that a small machine bears."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import torch


def adjust_inputs(pipeline: str, inputs: dict[str, Any], call: Mapping[str, Any]) -> dict[str, Any]:
    """A test's inputs, with which its pipeline does something and works at the tiny size of its parts."""
    if pipeline == "FluxControlInpaintPipeline":  # the test's mask is empty
        inputs["mask_image"] = PIL.Image.new("L", (32, 32), 255)
    if pipeline == "Kandinsky5I2IPipeline":  # a token for every letter: the image's would be cut off
        inputs["max_sequence_length"] = 512
    if "Sana" in pipeline and "use_resolution_binning" in call:
        inputs["use_resolution_binning"] = False
    return inputs


def adjust_pipeline(pipe: Any) -> None:
    """Let a pipeline that has a list of sizes, all of them megapixels, draw small ones (Kandinsky 5)."""
    if hasattr(pipe, "resolutions"):
        pipe.resolutions = [(128, 128)]


def adjust_pipelines() -> None:
    """Change the modules of diffusers that have been imported by now and need it; once for each."""
    for name, change in _PIPELINE_MODULES.items():
        module = sys.modules.get(name)
        if module is not None and not hasattr(module, "_adjusted"):
            change(module)
            module._adjusted = True  # type: ignore[attr-defined]


def adjust_tests(module: ModuleType) -> None:
    """Make the models of a module of tests smaller whose components would have gigabytes."""
    if hasattr(module, "SmolLM3Config"):
        module.SmolLM3Config = functools.partial(  # type: ignore[attr-defined]
            _with_defaults, module.SmolLM3Config, {"num_hidden_layers": 4, "intermediate_size": 64}
        )
    if "fibo" in module.__name__ and hasattr(module, "AutoencoderKLWan"):
        module.AutoencoderKLWan = functools.partial(  # type: ignore[attr-defined]
            _with_settings, module.AutoencoderKLWan, {"base_dim": 16, "decoder_base_dim": 16}
        )


def _with_defaults(make: Callable[..., Any], defaults: dict[str, Any], **settings: Any) -> Any:
    return make(**{**defaults, **settings})


def _with_settings(make: Callable[..., Any], fixed: dict[str, Any], **settings: Any) -> Any:
    return make(**{**settings, **fixed})


def _resize(images: torch.Tensor, size: Any, interpolation: Any = None) -> torch.Tensor:
    return torch.nn.functional.interpolate(images.float(), size=tuple(size), mode="nearest").to(images.dtype)


def _compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    return lambda image: functools.reduce(lambda value, step: step(value), steps, image)


def _to_tensor() -> Callable[[Any], torch.Tensor]:
    return lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def _normalize(mean: Any, std: Any, inplace: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda image: (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _without_torchvision_resize(module: Any) -> None:
    module.transforms = SimpleNamespace(
        functional=SimpleNamespace(resize=_resize), InterpolationMode=SimpleNamespace(NEAREST="nearest")
    )


def _without_torchvision_omnigen(module: Any) -> None:
    processor: Any = importlib.import_module("diffusers.pipelines.omnigen.processor_omnigen")
    processor.transforms = SimpleNamespace(
        Compose=_compose, Lambda=lambda step: step, ToTensor=_to_tensor, Normalize=_normalize
    )
    module.OmniGenMultiModalProcessor = processor.OmniGenMultiModalProcessor


def _small_pictures(module: Any) -> None:
    """These make a megapixel of any picture."""
    module.calculate_dimensions = lambda area, ratio: (64, 64, None)


def _small_pictures_plus(module: Any) -> None:
    module.calculate_dimensions = lambda area, ratio: (64, 64)


_PIPELINE_MODULES: dict[str, Callable[[Any], None]] = {
    "diffusers.models.transformers.transformer_cosmos": _without_torchvision_resize,
    "diffusers.models.controlnets.controlnet_cosmos": _without_torchvision_resize,
    "diffusers.pipelines.omnigen.pipeline_omnigen": _without_torchvision_omnigen,
    "diffusers.pipelines.longcat_image.pipeline_longcat_image_edit": _small_pictures_plus,
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit": _small_pictures,
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_inpaint": _small_pictures,
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus": _small_pictures_plus,
    "diffusers.pipelines.qwenimage.pipeline_qwenimage_layered": _small_pictures_plus,
}
