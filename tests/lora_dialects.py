"""Files of adapters as trainers write them, each with the weights that a denoiser has after it, computed by hand here.

The names of keys were read in the trainers' own code: kohya's sd-scripts and musubi-tuner, OneTrainer, ai-toolkit,
diffusion-pipe, DiffSynth-Studio, LyCORIS and ComfyUI, which reads VideoX-Fun's as well.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import OFTConfig
from safetensors.torch import save_file
from torch import Tensor

from anchor_files import lora, lora_weights, trained
from lora_families import FAMILIES, Family
from tiny_parts import noise

RANK, ALPHA = 4, 2.0
State = dict[str, Tensor]


@dataclass
class File:
    """The tensors of a file, and what the denoiser's own become."""

    state: State
    """The denoiser's tensors, changed in place by `add` and the like."""
    family: Family
    tensors: State = field(default_factory=dict)

    def rows(self, paths: Iterable[str], kind: str = "weight") -> Tensor:
        """What diffusers keeps in several layers, as the one layer that it was."""
        return torch.cat([self.state[f"{path}.{kind}"] for path in paths])

    def put(self, name: str, paths: list[str], rows: Tensor, kind: str = "weight") -> None:
        """Give diffusers' layers their new rows."""
        if name in self.family.swapped:
            rows = torch.cat(rows.chunk(2)[::-1])
        for path, part in zip(paths, rows.split([len(self.state[f"{p}.{kind}"]) for p in paths]), strict=True):
            self.state[f"{path}.{kind}"] = part.reshape(self.state[f"{path}.{kind}"].shape)

    def taken(self, name: str, paths: list[str], kind: str = "weight") -> Tensor:
        """The rows of a published layer, in its own order."""
        rows = self.rows(paths, kind)
        return torch.cat(rows.chunk(2)[::-1]) if name in self.family.swapped else rows


def own_names(family: Family) -> dict[str, list[str]]:
    """Layers by diffusers' names."""
    return {path: [path] for path in family.layers}


def published(family: Family) -> dict[str, list[str]]:
    """Layers by published names, which may be diffusers'."""
    return family.published or own_names(family)


Names = Callable[[Family], dict[str, list[str]]]
Named = Callable[[str], str]


def dotted(prefix: str) -> Named:
    return lambda name: prefix + name


def flat(prefix: str) -> Named:
    return lambda name: prefix + name.replace(".", "_")


def factors(weight: Tensor, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Down and up of a LoRA, as a convolution has them where the layer is one."""
    kernel = weight.shape[2:]
    down, up = noise(rank, *weight.shape[1:], seed=seed), noise(weight.shape[0], rank, seed=seed + 100)
    return 0.2 * down, 0.2 * up.reshape(*up.shape, *[1] * len(kernel))


def low_rank(down: Tensor, up: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", up.flatten(1), down)


UNET, COMFY = flat("lora_unet_"), dotted("diffusion_model.")


# --- LoRA -------------------------------------------------------------------------------------------------------------


def lora_file(
    names: Names, named: Named, ends: tuple[str, str], alpha: bool = True, scale: float = 1.0
) -> Callable[[File], None]:
    """Writes a LoRA with these names of layers and factors, a scale for each layer or none; then it is `scale`."""

    def write(file: File) -> None:
        for k, (name, paths) in enumerate(names(file.family).items()):
            weight = file.taken(name, paths)
            rank = RANK + 2 * (k == 1)  # one layer has a rank of its own
            down, up = factors(weight, seed=k, rank=rank)
            own = ALPHA + k
            file.tensors |= {f"{named(name)}.{ends[0]}": down, f"{named(name)}.{ends[1]}": up}
            if alpha:
                file.tensors[f"{named(name)}.alpha"] = torch.tensor(own)
            file.put(name, paths, weight + (own / rank if alpha else scale) * low_rank(down, up))

    return write


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
DEFAULT = ("lora_A.default.weight", "lora_B.default.weight")


def component_of(family: Family) -> str:
    return "unet" if any(path.startswith(("down_blocks", "mid_block")) for path in family.layers) else "transformer"


def diffusers_file(file: File) -> None:
    lora_file(own_names, dotted(f"{component_of(file.family)}."), PEFT, alpha=False)(file)


def kohya_file(file: File) -> None:
    """sd-scripts: Stable Diffusion 1's UNet has diffusers' names, all others the published ones; text encoders too."""
    names = own_names if file.family is FAMILIES["SD"] else published
    lora_file(names, flat("lora_unet_"), KOHYA)(file)
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    file.tensors |= {f"{text}.lora_down.weight": torch.ones(4, 8), f"{text}.lora_up.weight": torch.ones(8, 4)}


def onetrainer_file(file: File) -> None:
    """OneTrainer, with the embeddings that it trained beside the LoRA."""
    lora_file(own_names, flat(f"lora_{component_of(file.family)}_"), KOHYA)(file)
    file.tensors["bundle_emb.token.string_to_param.*"] = torch.ones(2, 16)


def xlabs_file(file: File) -> None:
    names = {
        "qkv_lora1": "double_blocks.0.img_attn.qkv",
        "qkv_lora2": "double_blocks.0.txt_attn.qkv",
        "proj_lora1": "double_blocks.0.img_attn.proj",
        "proj_lora2": "double_blocks.0.txt_attn.proj",
    }
    for k, (end, name) in enumerate(names.items()):
        paths = file.family.published[name]
        down, up = factors(file.rows(paths), seed=k)
        stem = f"double_blocks.0.processor.{end}"
        file.tensors |= {f"{stem}.down.weight": down, f"{stem}.up.weight": up}
        file.put(name, paths, file.rows(paths) + up @ down)


# --- what is more than a LoRA -----------------------------------------------------------------------------------------


def changed_norms(file: File, named: Named, ends: tuple[str, str]) -> None:
    """Changes of the weights and biases of norms."""
    for k, (name, path) in enumerate(file.family.norms.items()):
        for kind, end in zip(("weight", "bias"), ends, strict=True):
            if f"{path}.{kind}" in file.state:
                change = 0.3 * noise(*file.state[f"{path}.{kind}"].shape, seed=k + 50)
                file.tensors[f"{named(name)}.{end}"] = change
                file.state[f"{path}.{kind}"] = file.state[f"{path}.{kind}"] + change


def with_differences(file: File) -> None:
    """Norms and biases beside a LoRA, as ComfyUI extracts them."""
    lora_file(published, COMFY, KOHYA)(file)
    changed_norms(file, COMFY, ("diff", "diff_b"))
    for k, (name, paths) in enumerate(published(file.family).items()):
        if all(f"{path}.bias" in file.state for path in paths):
            bias = file.taken(name, paths, "bias")
            change = 0.3 * noise(*bias.shape, seed=k + 70)
            file.tensors[f"{COMFY(name)}.diff_b"] = change
            file.put(name, paths, bias + change, "bias")


def changed_file(
    change: Callable[[Tensor, int], tuple[State, Tensor]], names: Names, named: Named
) -> Callable[[File], None]:
    """Writes what `change` makes of every layer's weights: the factors, and the new weights."""

    def write(file: File) -> None:
        for k, (name, paths) in enumerate(names(file.family).items()):
            weight = file.taken(name, paths)
            tensors, new = change(weight, k)
            file.tensors |= {f"{named(name)}.{end}": tensor for end, tensor in tensors.items()}
            file.put(name, paths, new)

    return write


def full(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    change = 0.2 * noise(*weight.shape, seed=seed)
    return {"diff": change}, weight + change


def loha(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    out, into = weight.shape[0], weight[0].numel()
    a1, a2 = (0.4 * noise(out, RANK, seed=seed + k) for k in (0, 1))
    b1, b2 = (0.4 * noise(RANK, into, seed=seed + k) for k in (2, 3))
    tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": torch.tensor(ALPHA)}
    return tensors, weight + (ALPHA / RANK) * ((a1 @ b1) * (a2 @ b2)).reshape(weight.shape)


def lokr(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    """A Kronecker product, of which the second side is of low rank."""
    small = noise(2, 2, seed=seed)
    a, b = noise(weight.shape[0] // 2, RANK, seed=seed + 1), 0.2 * noise(RANK, weight[0].numel() // 2, seed=seed + 2)
    large = (a @ b).reshape(weight.shape[0] // 2, weight.shape[1] // 2, *weight.shape[2:])
    change = torch.stack([torch.cat([small[i, j] * large for j in range(2)], dim=1) for i in range(2)], dim=0).reshape(
        weight.shape
    )
    tensors = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(ALPHA)}
    return tensors, weight + (ALPHA / RANK) * change


def lokr_whole(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    """Both sides whole, as ai-toolkit writes them: the scale says nothing then."""
    small = noise(2, 2, seed=seed)
    large = 0.2 * noise(weight.shape[0] // 2, weight.shape[1] // 2, *weight.shape[2:], seed=seed + 1)
    blocks = [torch.cat([small[i, j] * large for j in range(2)], dim=1) for i in range(2)]
    tensors = {"lokr_w1": small, "lokr_w2": large, "alpha": torch.tensor(9999220736.0)}
    return tensors, weight + torch.cat(blocks)


def dora(by_row: bool) -> Callable[[Tensor, int], tuple[State, Tensor]]:
    def change(weight: Tensor, seed: int) -> tuple[State, Tensor]:
        down, up = factors(weight, seed)
        merged = weight + (ALPHA / RANK) * low_rank(down, up)
        other = [axis for axis in range(weight.ndim) if axis != (0 if by_row else 1)]
        norm = merged.pow(2).sum(other, keepdim=True).sqrt()
        lengths = 1 + noise(*norm.shape, seed=seed + 9).abs()
        tensors = {KOHYA[0]: down, KOHYA[1]: up, "alpha": torch.tensor(ALPHA), "dora_scale": lengths}
        return tensors, merged / norm * lengths

    return change


def oft(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    """Rotations of two blocks of rows, the last so far that the constraint holds them back."""
    half = weight.shape[0] // 2
    blocks, constraint = 0.3 * noise(2, half, half, seed=seed), 1.0 if seed == 0 else 0.05
    skew = blocks - blocks.mT
    skew = skew * min(1.0, constraint * weight.shape[0] / float(skew.norm()))
    one = torch.eye(half)
    rotations = [torch.linalg.solve(one - q, one + q) for q in skew]
    new = [r.T @ rows.flatten(1) for r, rows in zip(rotations, weight.chunk(2), strict=True)]
    return {"oft_blocks": blocks, "alpha": torch.tensor(constraint)}, torch.cat(new).reshape(weight.shape)


def tucker(weight: Tensor, seed: int) -> tuple[State, Tensor]:
    """LyCORIS' LoCon with a middle factor for convolutions, plain for the rest."""
    if weight.ndim < 4:
        down, up = factors(weight, seed)
        return {KOHYA[0]: down, KOHYA[1]: up}, weight + low_rank(down, up)
    core = noise(RANK, RANK, *weight.shape[2:], seed=seed)
    down, up = 0.2 * noise(RANK, weight.shape[1], seed=seed + 1), 0.2 * noise(weight.shape[0], RANK, seed=seed + 2)
    tensors = {KOHYA[0]: down[..., None, None], KOHYA[1]: up[..., None, None], "lora_mid.weight": core}
    return tensors, weight + torch.einsum("oa,abhw,bi->oihw", up, core, down)


def norms(file: File) -> None:
    lora_file(published, flat("lora_unet_"), KOHYA)(file)
    changed_norms(file, UNET, ("w_norm", "b_norm"))


def peft_oft(file: File) -> None:
    """PEFT's own writer is used in the test."""


def rest(end: str, *shape: int) -> Callable[[Tensor, int], tuple[State, Tensor]]:
    return lambda weight, seed: ({end: noise(*shape, seed=seed)}, weight)


# --- the table --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """How files of one kind are written, and what becomes of them, family by family."""

    write: Callable[[File], None]
    adapter: str = ""
    """Families, by comma, in which it becomes an adapter inside the reference."""
    copy: str = ""
    """Families in which it is merged into a copy of the reference's weights."""
    refused: str = ""
    """Families in which it is refused."""
    reason: str = ""
    """Why it is."""
    folder: Mapping[str, Any] | None = None
    """The adapter_config.json beside it."""
    left_out: str = ""
    """What is named in a warning."""

    def cases(self) -> list[tuple[str, str]]:
        """Families and outcomes."""
        outcomes = {"adapter": self.adapter, "copy": self.copy, "refused": self.refused}
        return [
            (family, outcome) for outcome, families in outcomes.items() for family in families.split(", ") if family
        ]


def peft_folder(file: File) -> None:
    """PEFT's own writer is used in the test."""


EVERY = ", ".join(FAMILIES)
PUBLISHED = ", ".join(name for name, family in FAMILIES.items() if family.published)
LOADING = ", ".join(name for name in FAMILIES if name not in ("AudioLDM2", "Stable Audio"))
NORMED = ", ".join(name for name, family in FAMILIES.items() if family.norms)
LYCORIS = "SD, SDXL, SD3, Flux"

DIALECTS: dict[str, Dialect] = {
    "diffusers": Dialect(diffusers_file, LOADING, "AudioLDM2, Stable Audio"),
    "PEFT folder (Flow-GRPO's)": Dialect(peft_folder, EVERY),
    "kohya sd-scripts": Dialect(kohya_file, "SD, SDXL, SD3, Flux, Chroma, Lumina2", left_out="te1"),
    "musubi-tuner": Dialect(
        lora_file(published, UNET, KOHYA), "Flux, Flux.2, Qwen-Image, Z-Image, Wan, HunyuanVideo, HunyuanVideo 1.5"
    ),
    "VideoX-Fun": Dialect(lora_file(published, flat("lora_unet__"), KOHYA), "Wan"),
    "OneTrainer": Dialect(onetrainer_file, "SD, SDXL, SD3, Flux, Chroma", left_out="bundle_emb"),
    "OneTrainer, newer": Dialect(
        lora_file(own_names, dotted("transformer."), KOHYA), "Qwen-Image, Z-Image, Chroma, HiDream, Sana, Flux.2"
    ),
    "ai-toolkit": Dialect(
        lora_file(published, COMFY, PEFT, alpha=False), "Flux.2, Qwen-Image, Chroma, HiDream, Wan, LTX-2"
    ),
    "diffusion-pipe": Dialect(
        lora_file(published, COMFY, PEFT, alpha=False, scale=2.0),
        "Flux.2, Qwen-Image, Chroma, Lumina2, HiDream, Wan, LTX-2, HunyuanVideo",
        folder={"peft_type": "LORA", "r": 4, "lora_alpha": 8},
    ),
    "DiffSynth-Studio": Dialect(
        lora_file(published, dotted(""), DEFAULT, alpha=False), "Flux.2, Qwen-Image, Z-Image, Wan, LTX-2"
    ),
    "XLabs": Dialect(xlabs_file, "Flux"),
    "ComfyUI": Dialect(lora_file(published, COMFY, KOHYA), PUBLISHED + ", Qwen-Image, HiDream"),
    "ComfyUI, with norms and biases; lightx2v, CausVid": Dialect(with_differences, copy=NORMED),
    "LyCORIS full": Dialect(changed_file(full, published, UNET), copy=LYCORIS),
    "LyCORIS norms": Dialect(norms, copy="SD, SDXL, Flux"),
    "LoCon with a middle factor": Dialect(changed_file(tucker, published, UNET), copy="SD, SDXL"),
    "LoHa": Dialect(changed_file(loha, published, UNET), copy=LYCORIS + ", Wan, HunyuanVideo"),
    "LoKr": Dialect(changed_file(lokr, published, UNET), copy=LYCORIS + ", Wan, HunyuanVideo"),
    "LoKr of ai-toolkit": Dialect(
        changed_file(lokr_whole, published, COMFY), copy="Flux.2, Qwen-Image, Z-Image, Wan, Chroma"
    ),
    "DoRA by rows": Dialect(changed_file(dora(True), published, UNET), copy=LYCORIS),
    "DoRA by columns": Dialect(changed_file(dora(False), published, UNET), copy=LYCORIS),
    "OFT (kohya's, LyCORIS')": Dialect(changed_file(oft, published, flat("oft_unet_")), copy=LYCORIS),
    "PEFT folder of OFT": Dialect(peft_oft, copy="SD, SDXL, SD3, Flux, Qwen-Image"),
    "OFT of OneTrainer": Dialect(
        changed_file(rest("oft_R.weight", 2, 3), own_names, flat("lora_unet_")),
        refused="SD, SDXL",
        reason="oft_R.weight: whether its rotations are scaled does not stand in the file",
    ),
    "BOFT": Dialect(
        changed_file(rest("oft_blocks", 2, 2, 2, 2), published, UNET),
        refused=LYCORIS,
        reason="oft_blocks with four axes: butterflies of rotations",
    ),
    "(IA)³": Dialect(
        changed_file(rest("on_input", 1), published, UNET), refused=LYCORIS, reason="on_input: scales of activations"
    ),
    "GLoRA": Dialect(
        changed_file(rest("a1.weight", 2, 2), published, UNET),
        refused=LYCORIS,
        reason="a1, a2, b1, b2: two more factors",
    ),
}


def write(dialect: Dialect, family: str, denoiser: Any, folder: Path) -> tuple[Path, State]:
    """A file of that dialect for that family, and the denoiser's tensors after it."""
    own = {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    file = File(own, FAMILIES[family])
    if dialect.write is peft_folder:
        adapted = lora(denoiser, tuple(FAMILIES[family].layers))
        adapted.save_pretrained(folder)
        weights = lora_weights(adapted)
        for path in {name.partition(".lora_")[0] for name in weights}:
            down, up = (weights[f"{path}.lora_{side}.weight"] for side in "AB")
            own[f"{path}.weight"] += 0.5 * low_rank(down, up)
        return folder, own
    if dialect.write is peft_oft:
        adapted = trained(denoiser, OFTConfig(oft_block_size=2, target_modules=list(FAMILIES[family].layers)))
        adapted.save_pretrained(folder)
        return folder, adapted.merge_and_unload().state_dict()
    dialect.write(file)
    name = "adapter_model.safetensors" if dialect.folder else "file.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in file.tensors.items()}, folder / name)
    if dialect.folder:
        (folder / "adapter_config.json").write_text(json.dumps(dialect.folder))
        return folder, own
    return folder / name, own


def table() -> str:
    """The dialects and what becomes of them, for the page."""
    rows = ["| file | an adapter | a copy | refused |", "|---|---|---|---|"]
    for name, dialect in DIALECTS.items():
        refused = f"{dialect.refused}: {dialect.reason}" if dialect.refused else ""
        adapter = {EVERY: "every family", LOADING: "every other family"}.get(dialect.adapter, dialect.adapter)
        rows.append(f"| {name} | {adapter} | {dialect.copy} | {refused} |")
    return "\n".join(rows)
