"""Prompt embeddings that are computed once, however often a pipeline is asked for them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch

REMEMBERED = 2048
"""How many prompts' embeddings are kept."""


class Remembering:
    """A pipeline's `encode_prompt` that computes the embeddings of a prompt once.

    Each prompt is encoded by itself, so that its embeddings do not depend on what else is in the batch.
    """

    def __init__(self, encode: Callable[..., Any]) -> None:
        self._encode = encode
        self._known: OrderedDict[str, Any] = OrderedDict()

    def __call__(self, prompt: Any = None, *arguments: Any, **options: Any) -> Any:
        """What the pipeline's own method returns; embeddings that are given are passed through."""
        if "prompt" in options:
            prompt = options.pop("prompt")
        if prompt is None:
            return self._encode(prompt, *arguments, **options)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        embeddings = []
        for row, text in enumerate(prompts):
            others = [_of_row(value, row, len(prompts)) for value in arguments]
            named = {name: _of_row(value, row, len(prompts)) for name, value in options.items()}
            key = json.dumps([text, others, named], default=str, sort_keys=True)
            if key not in self._known:
                self._known[key] = self._encode(text, *others, **named)
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            self._known.move_to_end(key)
            embeddings.append(self._known[key])
        try:
            return tuple(_joined(parts) for parts in zip(*embeddings, strict=True))
        except RuntimeError:  # an encoder that pads to the longest prompt of its batch: there they belong together
            return self._encode(prompts, *arguments, **options)


def _of_row(value: Any, row: int, rows: int) -> Any:
    """A prompt's own part of an argument that is a list with one for each: negative prompts, second prompts."""
    is_list = isinstance(value, list) and len(value) == rows and all(isinstance(item, str) for item in value)
    return value[row] if is_list else value


def _joined(parts: Sequence[Any]) -> Any:
    """The rows of all prompts together. What has none (Flux's position ids) or is not there is the same for all."""
    first = parts[0]
    if not isinstance(first, torch.Tensor) or first.ndim < 2 or (first.ndim == 2 and first.shape[-1] == 3):
        return first
    return torch.cat(list(parts))
