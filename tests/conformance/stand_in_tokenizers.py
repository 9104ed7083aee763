"""Tokenizers whose tokens are bytes, in the places of those that the tests would download."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BatchEncoding, BatchFeature, PreTrainedTokenizerFast

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())

QWEN_TOKENS = {
    "<|endoftext|>": 151643,
    "<|im_start|>": 151644,
    "<|im_end|>": 151645,
    "<|object_ref_start|>": 151646,
    "<|vision_start|>": 151652,
    "<|vision_end|>": 151653,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": 151655,
    "<|video_pad|>": 151656,
}
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}"
    "{% if c['type']=='image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
    "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
)


def of_bytes(
    special: Mapping[str, int], form: str | None = None, offset: int = 0, used: Sequence[str] = (), **settings: Any
) -> Any:
    """A tokenizer of bytes, numbered from `offset` on, with `special` tokens; `form` says which of these it adds."""
    vocabulary = dict(special)
    free = (i for i in range(offset, offset + len(BYTES) + len(special)) if i not in special.values())
    vocabulary |= {byte: next(free) for byte in BYTES}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if form:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=form, special_tokens=[(token, vocabulary[token]) for token in used]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def clip() -> Any:
    return of_bytes(
        {"<unused>": 0, "<|startoftext|>": 514, "<|endoftext|>": 515},  # Shap-E pads with the token 0
        "<|startoftext|> $A <|endoftext|>",
        3,
        ("<|startoftext|>", "<|endoftext|>"),
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        model_max_length=77,
    )


def t5(model_max_length: int = 512) -> Any:
    return of_bytes(
        {"<pad>": 0, "</s>": 1, "<unk>": 2},
        "$A </s>",
        3,
        ("</s>",),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
    )


def bert() -> Any:
    return of_bytes(
        {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3},
        "[CLS] $A [SEP]",
        4,
        ("[CLS]", "[SEP]"),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_max_length=77,
    )


def roberta(model_max_length: int = 77) -> Any:
    return of_bytes(
        {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3},
        "<s> $A </s>",
        4,
        ("<s>", "</s>"),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=model_max_length,
    )


def llama() -> Any:
    return of_bytes(
        {"<unk>": 0, "<s>": 1, "</s>": 2, "<|img|>": 3},
        "<s> $A",
        4,
        ("<s>",),
        pad_token="</s>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=2048,
    )


def glm() -> Any:
    return of_bytes(
        {"<|endoftext|>": 259, "[gMASK]": 260, "<sop>": 261},
        "[gMASK] <sop> $A",
        0,
        ("[gMASK]", "<sop>"),
        pad_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        padding_side="left",
        model_max_length=2048,
    )


def hunyuan() -> Any:
    return of_bytes(
        {"<|begin|>": 0, "</s>": 2, "<pad>": 100, "<image>": 101},
        "<|begin|> $A",
        102,
        ("<|begin|>",),
        pad_token="<pad>",
        bos_token="<|begin|>",
        eos_token="</s>",
        model_max_length=2048,
    )


class QwenTokenizer(PreTrainedTokenizerFast):
    """Says that it has Qwen's vocabulary."""

    vocab_size = property(lambda self: len(self))

    def __len__(self) -> int:
        return 151665


def qwen() -> Any:
    tokenizer = of_bytes(QWEN_TOKENS, pad_token="<|endoftext|>", eos_token="<|im_end|>", model_max_length=4096)
    tokenizer.__class__ = QwenTokenizer
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


def gemma() -> Any:
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    vocabulary = {token: i for i, token in enumerate((*special, "a", "e", "o", "t"))}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    names = {f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk")}
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=2048, **names)
    made.chat_template = GEMMA_TEMPLATE
    return made


class ChatGLMTokenizer:
    """What Kolors asks of its tokenizer: left padding, position ids."""

    model_max_length = 256
    pad_token_id = 0

    def __call__(self, text: Any, padding: str = "max_length", max_length: int = 256, **_: Any) -> BatchEncoding:
        ids, mask, positions = [], [], []
        for prompt in [text] if isinstance(text, str) else text:
            own = [1, 2, *(3 + byte % 60 for byte in prompt.encode()[: max_length - 2])]
            gap = [0] * (max_length - len(own))
            ids.append([*gap, *own])
            mask.append([*gap, *[1] * len(own)])
            positions.append([*gap, *range(len(own))])
        return BatchEncoding(
            {
                "input_ids": torch.tensor(ids),
                "attention_mask": torch.tensor(mask),
                "position_ids": torch.tensor(positions),
            }
        )


class QwenProcessor:
    """A processor of texts with images, as Qwen-VL's."""

    image_token = "<|image_pad|>"
    _text_settings = ("max_length", "truncation", "padding_side", "add_special_tokens", "return_attention_mask")

    def __init__(self, tokenizer: Any = None, **_: Any):
        from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil

        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 16)
        self.tokenizer = tokenizer or qwen()
        self.image_token_id = QWEN_TOKENS["<|image_pad|>"]

    def __call__(
        self, text: Any = None, images: Any = None, videos: Any = None, padding: Any = True, **settings: Any
    ) -> BatchFeature:
        texts = [text] if isinstance(text, str) else list(text)
        pictures: dict[str, Any] = {}
        if images is not None and (not isinstance(images, list | tuple) or len(images)):
            pictures = dict(self.image_processor(images=images, return_tensors="pt"))
            counts = iter((pictures["image_grid_thw"].prod(-1) // 4).tolist())
            texts = [
                re.sub(r"<\|image_pad\|>", lambda _: "\x00" * next(counts), text).replace("\x00", self.image_token)
                for text in texts
            ]
        settings = {name: value for name, value in settings.items() if name in self._text_settings}
        tokens = self.tokenizer(texts, padding=padding, return_tensors="pt", **settings)
        features = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], **pictures}
        features["mm_token_type_ids"] = (features["input_ids"] == self.image_token_id).long()
        return BatchFeature(features)

    def apply_chat_template(
        self,
        messages: Any,
        tokenize: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = False,
        padding: Any = True,
        processor_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        """A conversation, or a batch of them, as text or as tokens."""
        is_batch = isinstance(messages[0], list | tuple)
        batch = messages if is_batch else [messages]
        texts = [
            self.tokenizer.apply_chat_template(one, tokenize=False, add_generation_prompt=add_generation_prompt)
            for one in batch
        ]
        if not tokenize:
            return texts if is_batch else texts[0]
        contents = [part["content"] for one in batch for part in one if not isinstance(part["content"], str)]
        images = [entry["image"] for content in contents for entry in content if "image" in entry]
        features = self(text=texts, images=images or None, padding=padding, **settings, **(processor_kwargs or {}))
        return features if return_dict else features["input_ids"]

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer.batch_decode(*args, **kwargs)


def mistral_processor() -> QwenProcessor:
    tokenizer = llama()
    tokenizer.chat_template = QWEN_TEMPLATE
    return QwenProcessor(tokenizer)
