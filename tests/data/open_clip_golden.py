"""Makes `open_clip_golden.safetensors`: a tiny random open_clip model, pictures and prompts, and what open_clip says.

`test_rewards_hps.py` converts the model and must find the same embeddings and scores. Pictures go through torchvision
in the order of HPS v2's own code (to a float tensor first, then resized); tokens are padded with 0 as open_clip does.

It was run once, in an environment of its own, as none of this may be installed beside the library:

    python3.11 -m venv oc
    oc/bin/pip install torch==2.14.1 torchvision==0.29.1 open_clip_torch==3.3.0
    oc/bin/python tests/data/open_clip_golden.py

The file's metadata has the prompts, the versions, and the shapes of open_clip's ViT-H-14, of whose blocks the first
stands for all. Tensors: `model.*` the state dict, `picture.N` pictures as (height, width, 3) in 8 bits, `tokens`,
`pixels` as the image tower gets them, `images` and `texts` the normalised embeddings, `scores` their cosines.
"""

import json
import re
from pathlib import Path

import open_clip
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

SIDE, CONTEXT, START, END = 32, 12, 62, 63
SIZES = [(32, 32), (41, 60), (40, 84), (90, 37), (11, 14)]
"""Height and width: as it is, smaller, with half a pixel of margin that goes to the even side, upright, larger."""
PROMPTS = ["a", "b c", "some words", "z z z z", "longer than the context is"]


def tokens_of(prompt: str) -> list[int]:
    """Letters are 1 to 26, and every letter is a word: START, letters, END, zeros; END closes what is cut."""
    letters = [ord(letter) - ord("a") + 1 for letter in prompt.replace(" ", "")]
    kept = [START, *letters[: CONTEXT - 2], END]
    return kept + [0] * (CONTEXT - len(kept))


def main() -> None:
    """Write the file beside this one."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        16,
        {"layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "image_size": SIDE},
        {"layers": 2, "width": 24, "heads": 3, "context_length": CONTEXT, "vocab_size": END + 1},
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases are zero and norms one in a new model, which would hide mistakes
            parameter.add_(0.1 * torch.randn_like(parameter))
    smooth = [torch.nn.functional.interpolate(torch.rand(1, 3, 5, 5), size, mode="bicubic")[0] for size in SIZES]
    noisy = [picture + 0.3 * torch.randn_like(picture) for picture in smooth]
    pictures = [(255 * picture.clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous() for picture in noisy]
    prepare = Compose(
        [
            ToTensor(),
            Resize(SIDE, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(SIDE),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    pixels = torch.stack([prepare(Image.fromarray(picture.numpy())) for picture in pictures])
    tokens = torch.tensor([tokens_of(prompt) for prompt in PROMPTS])
    with torch.no_grad():
        images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)
    with torch.device("meta"):
        huge = open_clip.model.CLIP(**open_clip.get_model_config("ViT-H-14")).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in huge.items() if not re.search(r"resblocks\.[1-9]", name)}
    versions = {"torch": torch.__version__, "torchvision": torchvision.__version__, "open_clip": open_clip.__version__}
    save_file(
        {
            **{f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()},
            **{f"picture.{place}": picture for place, picture in enumerate(pictures)},
            "tokens": tokens,
            "pixels": pixels,
            "images": images,
            "texts": texts,
            "scores": (images * texts).sum(1),
        },
        Path(__file__).with_suffix(".safetensors"),
        metadata={
            "prompts": json.dumps(PROMPTS),
            "versions": json.dumps(versions),
            "vit_h_14": json.dumps({"tensors": len(huge), "shapes": shapes}),
        },
    )


if __name__ == "__main__":
    main()
