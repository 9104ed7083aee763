"""Makes `image_reward_golden.safetensors`: a tiny random ImageReward of the authors' own code, and what it says.

`test_rewards_image_reward.py` converts the model and must find the same scores. The authors' code is not installed but
imported from a checkout, without the parts that need CLIP, diffusers and datasets; it was run once, in an environment
of its own, as none of this may be installed beside the library:

    git clone https://github.com/zai-org/ImageReward && git -C ImageReward checkout c1392c6
    python3.11 -m venv ir
    ir/bin/pip install torch==2.14.1 torchvision==0.29.1 transformers==4.40.2 timm==0.9.16 fairscale==0.4.13 \
        "numpy<2" safetensors==0.8.0
    ir/bin/python tests/data/image_reward_golden.py ImageReward

Sizes are replaced by tiny ones and the vocabulary by letters; what computes is theirs. Tensors: `model.*` the state
dict in half precision (the scores are those of these values in float32), `picture.N` pictures as (height, width, 3) in
8 bits, `tokens` the prompts' ids, padded to 35, `pixels` as the image tower gets them, `scores` by pairs, `gradient`
that of the first score with respect to the first picture's pixels. The file's metadata has the prompts, the vocabulary,
the versions, and of the published sizes the tensors' shapes (the first block of each tower stands for all), the heads,
the epsilons, and the mean and standard deviation that the score is normalised by.
"""

import json
import re
import string
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torchvision
import transformers
from PIL import Image
from safetensors.torch import save_file

SIDE, PATCH, WIDTH, HIDDEN = 32, 8, 32, 24
SIZES = [(32, 32), (40, 57), (40, 84), (64, 37), (11, 14)]
"""Height and width: as it is; with half a pixel of margin on the lower side; wide and upright, with half a pixel on the
upper side; larger. Pillow's order of rows and columns, which depends on its version, is the same for all of them."""
PROMPTS = [
    "a red cat",
    "Two CATS, and a dog!",
    "",
    "caf\u00e9 na\u00efve [ENC] \u4e2d [dec]",
    "a prompt that goes on for so long that the tokenizer has to cut what it says about the cat",
]
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "cat",
    "dog",
    "red",
    "two",
    "and",
    "the",
    "!",
    ",",
    "[",
    "]",
    *string.ascii_lowercase,
    *(f"##{letter}" for letter in string.ascii_lowercase),
]


def authors(checkout: Path) -> tuple[ModuleType, ModuleType, ModuleType]:
    """The modules of the checkout that score: the reward, its BLIP, and BLIP's parts."""
    for name, folder in {"ImageReward": "ImageReward", "ImageReward.models": "ImageReward/models"}.items():
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(checkout / folder)]
    names = ("ImageReward.ImageReward", "ImageReward.models.BLIP.blip_pretrain", "ImageReward.models.BLIP.blip")
    reward, pretrain, blip = (import_module(name) for name in names)
    return reward, pretrain, blip


def large(reward: ModuleType, config: Path) -> dict[str, Any]:
    """What the published model is like."""
    model = reward.ImageReward(config)
    state = model.state_dict()
    vision, text = model.blip.visual_encoder, model.blip.text_encoder
    return {
        "tensors": len(state),
        "shapes": {
            name: list(tensor.shape) for name, tensor in state.items() if not re.search(r"(blocks|layer)\.[1-9]", name)
        },
        "heads": [vision.blocks[0].attn.num_heads, text.encoder.layer[0].attention.self.num_attention_heads],
        "epsilons": [vision.norm.eps, text.embeddings.LayerNorm.eps],
        "numbers": [model.mean, model.std],
    }


def tiny(reward: ModuleType, pretrain: ModuleType, folder: Path) -> Any:
    """A model of random weights that half precision can hold."""
    sizes = {
        "vocab_size": len(VOCABULARY) + 2,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "max_position_embeddings": 40,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(sizes))
    tower = sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer(
        img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=2, num_heads=4
    )
    pretrain.create_vit = lambda *_: (tower, WIDTH)  # type: ignore[attr-defined]
    model = reward.ImageReward(folder / "med_config.json")
    model.preprocess = reward._transform(SIDE)
    linear = [place for place, layer in enumerate(model.mlp.layers) if isinstance(layer, torch.nn.Linear)]
    widths = [HIDDEN, 20, 12, 8, 6, 1]
    for place, before, after in zip(linear, widths, widths[1:], strict=False):
        model.mlp.layers[place] = torch.nn.Linear(before, after)
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero and norms one in a new model, which would hide mistakes
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).half())
    return model.eval()


def pictures() -> list[torch.Tensor]:
    """Blots with noise, as (height, width, 3) in 8 bits."""
    blots = [torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), size, mode="bicubic")[0] for size in SIZES]
    noisy = [picture + 0.3 * torch.randn_like(picture) for picture in blots]
    return [(255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous() for picture in noisy]


def main(checkout: Path, folder: Path) -> None:
    """Write the file beside this one."""
    torch.manual_seed(0)
    reward, pretrain, blip = authors(checkout)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    letters = {"from_pretrained": lambda _: transformers.BertTokenizer(folder / "vocab.txt")}
    blip.BertTokenizer = type("Letters", (), letters)  # type: ignore[attr-defined]
    published = large(reward, checkout / "train/src/config/med_config.json")
    model = tiny(reward, pretrain, folder)
    images = pictures()
    opened = [Image.fromarray(image.numpy()) for image in images]
    scores = torch.tensor([model.score(prompt, image) for prompt, image in zip(PROMPTS, opened, strict=True)])
    pixels = torch.stack([model.preprocess(image) for image in opened])
    tokens = model.blip.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    first = pixels[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        model.score_gard(tokens.input_ids[:1], tokens.attention_mask[:1], first).sum(), first
    )
    versions = {module.__name__: module.__version__ for module in (torch, torchvision, transformers, timm)}
    save_file(
        {
            **{
                f"model.{name}": (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
                for name, tensor in model.state_dict().items()
            },
            **{f"picture.{place}": picture for place, picture in enumerate(images)},
            "tokens": tokens.input_ids,
            "pixels": pixels,
            "scores": scores,
            "gradient": gradient[0],
        },
        Path(__file__).with_suffix(".safetensors"),
        metadata={
            "prompts": json.dumps(PROMPTS),
            "vocabulary": json.dumps(VOCABULARY),
            "versions": json.dumps(versions),
            "published": json.dumps(published),
        },
    )
    print(scores)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(sys.argv[1]), Path(scratch))
