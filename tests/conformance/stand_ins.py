"""Nothing is downloaded: `from_pretrained` of a hub id makes a tiny random model or a tokenizer of bytes instead.

The same ones at every call. What there is no stand-in for raises `OSError`, as without a network.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import transformers

import stand_in_models
import stand_in_tokenizers as tokenizers


def install() -> None:
    """From now on."""
    import diffusers
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.processing_utils import ProcessorMixin

    for owner in (
        *(PreTrainedTokenizerBase, PreTrainedModel, AutoTokenizer, AutoConfig, AutoProcessor),
        *(ProcessorMixin, ImageProcessingMixin, FeatureExtractionMixin),
    ):
        _stand_in_front_of(owner, made)
    _stand_in_front_of(diffusers.UNet2DModel, _unet)
    for name in ("Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor", "PixtralProcessor"):
        if not _is_usable(name, ProcessorMixin):  # a dummy that asks for torchvision
            members = {"from_pretrained": classmethod(lambda cls, id, **_: tokenizers.QwenProcessor())}
            setattr(transformers, name, type(name, (tokenizers.QwenProcessor,), members))


def _is_usable(name: str, base: type) -> bool:
    try:
        found = getattr(transformers, name)
    except Exception:
        return False
    return isinstance(found, type) and issubclass(found, base)


def _stand_in_front_of(owner: Any, make: Callable[[Any, str, dict[str, Any]], Any]) -> None:
    own = getattr(owner.from_pretrained, "__func__", owner.from_pretrained)

    def from_pretrained(cls: Any, id: Any, *args: Any, **settings: Any) -> Any:
        if isinstance(id, str) and not os.path.exists(id) and id.count("/") == 1:
            return make(cls, id, settings)
        return own(cls, id, *args, **settings)

    owner.from_pretrained = classmethod(from_pretrained)


def _unet(cls: Any, id: str, settings: dict[str, Any]) -> Any:
    if id != "diffusers/consistency-models-test":
        raise OSError(f"no stand-in for {id!r}")
    return stand_in_models.consistency_unet(cls, settings["subfolder"])


def made(cls: Any, id: str, settings: dict[str, Any]) -> Any:
    """The stand-in for `cls.from_pretrained(id, **settings)`. Raises `OSError` where there is none."""
    name, short = cls.__name__, id.rpartition("/")[2].lower()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        if "tokenizer" in name.lower():
            tokenizer = _tokenizer(cls, short, settings)
            if tokenizer is not None:
                return tokenizer
        if "Processor" in name and "mistral" in short:
            return tokenizers.mistral_processor()
        if "Processor" in name and "qwen" in short:
            return tokenizers.QwenProcessor()
        if name == "AutoConfig" and "t5" in short:
            return stand_in_models.t5_config()
        if name in stand_in_models.MODELS:
            return stand_in_models.MODELS[name](cls)
        if name.startswith("SiglipImageProcessor"):
            return transformers.SiglipImageProcessor(**_only(settings, "size"))
        if name == "ClapFeatureExtractor":
            return transformers.ClapFeatureExtractor(**_only(settings, "hop_length"))
        if name.startswith("DPTImageProcessor"):
            return transformers.DPTImageProcessor(size={"height": 32, "width": 32})
    raise OSError(f"no stand-in for {name}.from_pretrained({id!r}), which would download it")


def _only(settings: dict[str, Any], name: str) -> dict[str, Any]:
    return {name: settings[name]} if name in settings else {}


_TOKENIZERS: tuple[tuple[str, Callable[[], Any]], ...] = (
    ("chatglm", tokenizers.ChatGLMTokenizer),
    ("glm", tokenizers.glm),
    ("qwen", tokenizers.qwen),
    ("cosmos", tokenizers.qwen),
    ("gemma", tokenizers.gemma),
    ("llama", tokenizers.llama),
    ("hunyaun", tokenizers.hunyuan),  # so the repository's name is spelled
    ("roberta", tokenizers.roberta),
    ("mclip", tokenizers.roberta),
    ("bert", tokenizers.bert),
    ("clip", tokenizers.clip),
    ("t5", tokenizers.t5),
)
"""The first whose word is in the id."""


def _tokenizer(cls: Any, short: str, settings: dict[str, Any]) -> Any:
    make = next((make for word, make in _TOKENIZERS if word in short), None)
    if make is None:
        return None
    if make not in (tokenizers.roberta, tokenizers.t5):
        return make()
    tokenizer = make(**_only(settings, "model_max_length"))
    # Pipelines ask which class it is.
    asked = "Roberta" in cls.__name__ if make is tokenizers.roberta else cls.__name__.startswith("T5")
    if asked and issubclass(cls, transformers.PreTrainedTokenizerFast):
        tokenizer.__class__ = cls
    return tokenizer
