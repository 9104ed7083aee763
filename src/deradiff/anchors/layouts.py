"""Where the layers of a file lie in a denoiser: by its own names, or by those that its model was published with.

diffusers knows the published names: its converters of whole checkpoints rename, split and reorder them. Here such a
converter is given symbols in the place of tensors, and what has become of them tells which rows of which parameters are
a layer of the file. That holds for any kind of change of the layer, and for files of a few layers as well as of all.
"""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from torch import Tensor

PREFIX = re.compile(
    r"(?:(?:lora|oft)_unet_|lora_transformer_|lycoris_|(?:model\.)?diffusion_model\.|(?:model|unet|transformer)\.)?"
)
"""How trainers begin the names of a denoiser's layers."""

_ENDS = (".weight", ".bias", "")
_ORIGINAL = "model.diffusion_model."
# The lists of blocks that converters count, by their published names.
_LISTS = {
    "double_blocks": "transformer_blocks",
    "single_blocks": "single_transformer_blocks",
    "joint_blocks": "transformer_blocks",
    "blocks": "transformer_blocks",
    "distilled_guidance_layer.layers": "distilled_guidance_layer.layers",
}
# What the converter of UNets demands of those that are told sizes.
_SIZE_EMBEDDINGS = ("label_emb.0.0", "label_emb.0.2")
_MOST_CANDIDATES = 1024

# ComfyUI's names for HunyuanVideo's layers, and those of its own code.
_HUNYUAN_IN_COMFY = {
    r"_attn\.(qkv|proj)\.": r"_attn_\1.",
    r"_attn\.norm\.(q|k)(?:uery|ey)_norm\.(?:scale|weight)$": r"_attn_\1_norm.weight",
    r"_mlp\.0\.": "_mlp.fc1.",
    r"_mlp\.2\.": "_mlp.fc2.",
    r"(_mod|modulation)\.lin\.": r"\1.linear.",
}
# From HunyuanVideo 1.5's own code to diffusers'.
_HUNYUAN_15 = {
    r"^double_blocks\.": "transformer_blocks.",
    r"\.img_attn_([qkv])\.": r".attn.to_\1.",
    r"\.txt_attn_([qkv])\.": r".attn.add_\1_proj.",
    r"\.img_attn_proj\.": ".attn.to_out.0.",
    r"\.txt_attn_proj\.": ".attn.to_add_out.",
    r"\.img_attn_([qk])_norm\.": r".attn.norm_\1.",
    r"\.txt_attn_([qk])_norm\.": r".attn.norm_added_\1.",
    r"\.img_mlp\.fc1\.": ".ff.net.0.proj.",
    r"\.img_mlp\.fc2\.": ".ff.net.2.",
    r"\.txt_mlp\.fc1\.": ".ff_context.net.0.proj.",
    r"\.txt_mlp\.fc2\.": ".ff_context.net.2.",
    r"\.img_mod\.linear\.": ".norm1.linear.",
    r"\.txt_mod\.linear\.": ".norm1_context.linear.",
}

Shapes = Mapping[str, tuple[int, ...]]
Way = tuple[tuple[int, int], ...]
"""From a tensor to some of its rows: (i, n) for the i-th of n parts, over again for parts of parts."""


@dataclass(frozen=True)
class Rows:
    """Some of a parameter's rows: the `part`-th of `parts` equal ones, each of `length`."""

    parameter: str
    length: int
    part: int = 0
    parts: int = 1

    def of(self, parameter: Tensor) -> Tensor:
        """A view of these rows."""
        return parameter.narrow(0, self.part * self.length, self.length) if self.parts > 1 else parameter


def locate(layers: Iterable[str], denoiser: ModelMixin, shapes: Shapes) -> dict[str, list[Rows]]:
    """Where the parameters of a file's `layers` are: `layer + ".weight"`, `".bias"` or `""` to rows, in their order.

    Rows of several parameters are one layer of the file, whose change covers them all. `shapes` are the denoiser's, by
    name. A layer without a place has no entry, nor has one of which only a part has a place.
    """
    plain = {layer: PREFIX.sub("", layer, count=1) for layer in layers}
    flat = {name.replace(".", "_"): name for name in shapes}
    own = {layer: _own_rows(layer, name, flat, shapes) for layer, name in plain.items()}
    if all(own.values()):
        return {name: rows for found in own.values() for name, rows in found.items()}
    # The published names of a model may be diffusers' for another layer (Wan's norms), so they count first here.
    published = _published_names(
        {name for layer, name in plain.items() if not own[layer] or "." in name}, denoiser, shapes
    )
    converted = _converted([name + end for name in published.values() for end in _ENDS], denoiser, shapes)
    places: dict[str, list[Rows]] = {}
    for layer, name in plain.items():
        theirs = published.get(name, "")
        ends = {layer + end: converted[theirs + end] for end in _ENDS if theirs and theirs + end in converted}
        places |= ends or own[layer]
    return places


def _own_rows(layer: str, plain: str, flat: Mapping[str, str], shapes: Shapes) -> dict[str, list[Rows]]:
    """Where a layer is by diffusers' own names, of which `flat` knows those with underscores."""
    rows: dict[str, list[Rows]] = {}
    for name, end in itertools.product((layer, plain), _ENDS):
        dotted = f"{name}{end}"
        parameter = dotted if dotted in shapes else flat.get(dotted.replace(".", "_"))
        if parameter is not None:
            rows.setdefault(layer + end, [Rows(parameter, _rows(shapes[parameter]))])
    return rows


def _published_names(layers: Collection[str], denoiser: ModelMixin, shapes: Shapes) -> dict[str, str]:
    """The published names of `layers`, in which trainers may have written underscores for dots.

    Which underscores were dots is tried out once for all layers that differ in nothing but numbers.
    """
    names: dict[str, str] = {}
    dots: dict[str, str | None] = {}
    for layer in layers:
        shape = re.sub(r"\d+", "0", layer)
        if shape not in dots:
            dots[shape] = next(
                (name for name in _candidates(layer) if _converted([name + end for end in _ENDS], denoiser, shapes)),
                None,
            )
        if (example := dots[shape]) is not None:
            gaps = re.split(r"\d+", example)
            numbers = [*re.findall(r"\d+", layer), ""]
            names[layer] = "".join(itertools.chain(*zip(gaps, numbers, strict=True)))
    return names


def _candidates(layer: str) -> Iterator[str]:
    """`layer`, and, where it has no dots, what it may have been before they became underscores."""
    if "." in layer:
        yield layer
        return
    words = layer.split("_")
    fixed = ["." if one.isdigit() or other.isdigit() else "" for one, other in itertools.pairwise(words)]
    choices = itertools.product(*(dot or "_." for dot in fixed))
    for separators in itertools.islice(choices, _MOST_CANDIDATES):
        yield "".join(itertools.chain(*zip(words, [*separators, ""], strict=True)))


class _Symbol:
    """What stands for a tensor in a converter: some of the rows of one, or of none that is there (no pieces).

    A piece is the tensor's name and the way to its rows.
    """

    shape = (1 << 20, 1)
    ndim = 2

    def __init__(self, *pieces: tuple[str, Way]):
        self.pieces = pieces

    def chunk(self, chunks: int, dim: int = 0) -> "list[_Symbol]":
        """The parts that it is split into, by rows."""
        if dim != 0 or len(self.pieces) > 1:
            raise NotImplementedError
        return [_Symbol(*((name, (*way, (i, chunks))) for name, way in self.pieces)) for i in range(chunks)]

    def split(self, sizes: Any, dim: int = 0) -> "list[_Symbol]":
        """As `chunk`; how many rows a part has, the denoiser tells, whatever size the published model has."""
        return self.chunk(len(sizes), dim)

    def size(self, dim: int) -> int:
        """A number that no arithmetic of sizes makes negative."""
        return self.shape[dim]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func in (torch.chunk, torch.split):
            settings = list(args[1:]) + list((kwargs or {}).values())
            parts = settings[0] if isinstance(settings[0], int) else len(settings[0])
            return args[0].chunk(parts, *settings[1:])
        if func is torch.cat:
            return cls(*(piece for symbol in args[0] for piece in symbol.pieces))
        raise NotImplementedError


class _Checkpoint(dict[str, _Symbol]):
    """A checkpoint that holds whatever a converter asks for."""

    def __missing__(self, name: str) -> _Symbol:
        return _Symbol()

    def pop(self, name: str, *default: Any) -> Any:
        """The entry, the default, or a symbol of nothing."""
        return super().pop(name, *(default or (_Symbol(),)))


def _converted(names: Sequence[str], denoiser: ModelMixin, shapes: Shapes) -> dict[str, list[Rows]]:
    """Where tensors with these published names end up; those that do not, or only in part, are missing.

    Some converters want a layer's weights and biases together, and others stumble over a name that is not theirs: all
    are tried together, and where that fails, each kind, and at last each one.
    """
    places = _convert(names, denoiser, shapes)
    if places is not None or len(names) < 2:
        return places or {}
    kinds = [[name for name in names if name.rpartition(".")[2] == kind] for kind in ("weight", "bias")]
    kinds.append([name for name in names if name not in kinds[0] and name not in kinds[1]])
    several = sum(map(bool, kinds)) > 1
    parts = [kind for kind in kinds if kind] if several else [[name] for name in names]
    return {name: rows for part in parts for name, rows in _converted(part, denoiser, shapes).items()}


def _convert(names: Sequence[str], denoiser: ModelMixin, shapes: Shapes) -> dict[str, list[Rows]] | None:
    """As `_converted`; None where the converter fails."""
    kind = type(denoiser).__name__
    converter = _CONVERTERS.get(kind) or SINGLE_FILE_LOADABLE_CLASSES.get(kind, {}).get("checkpoint_mapping_fn")
    if converter is None or not names:
        return {}
    prefix = _ORIGINAL if _is_unet(denoiser) else ""
    checkpoint = _Checkpoint({prefix + name: _Symbol() for name in _blocks(denoiser)})
    renamed = _HUNYUAN_IN_COMFY if kind.startswith("HunyuanVideo") else {}
    checkpoint |= {prefix + _replaced(name, renamed): _Symbol((name, ())) for name in names}
    try:
        converted = converter(checkpoint=checkpoint, config=dict(denoiser.config))
    except Exception:  # a converter raises whatever it stumbles over
        return None
    pieces: dict[str, dict[Way, Rows]] = {}
    for parameter, symbol in converted.items():
        if parameter in shapes and isinstance(symbol, _Symbol):
            parts = len(symbol.pieces)
            for part, (name, way) in enumerate(symbol.pieces):
                pieces.setdefault(name, {})[way] = Rows(parameter, _rows(shapes[parameter]) // parts, part, parts)
    return {name: [ways[way] for way in sorted(ways)] for name, ways in pieces.items() if _whole(ways)}


def _replaced(name: str, patterns: Mapping[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name)
    return name


def _hunyuan_video_15(checkpoint: Mapping[str, _Symbol], **_: Any) -> dict[str, _Symbol]:
    """The blocks of HunyuanVideo 1.5, for which diffusers has no converter; others are left as they are."""
    converted: dict[str, _Symbol] = {}
    for name, symbol in checkpoint.items():
        plain = _replaced(name, _HUNYUAN_15)
        fused = re.search(r"(.*\.)(img|txt)_attn_qkv\.(\w+)$", plain)
        if fused is None:
            converted[plain] = symbol
            continue
        to = ("to_q", "to_k", "to_v") if fused[2] == "img" else ("add_q_proj", "add_k_proj", "add_v_proj")
        converted |= {f"{fused[1]}attn.{own}.{fused[3]}": part for own, part in zip(to, symbol.chunk(3), strict=True)}
    return converted


_CONVERTERS: dict[str, Callable[..., dict[str, _Symbol]]] = {"HunyuanVideo15Transformer3DModel": _hunyuan_video_15}


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _whole(ways: Collection[Way]) -> bool:
    """Whether these parts of parts make up all."""
    if () in ways:
        return len(ways) == 1
    counts = {way[0][1] for way in ways}
    if len(counts) > 1:
        return False
    first = {part: [way[1:] for way in ways if way[0][0] == part] for part in range(counts.pop())}
    return all(rest and _whole(rest) for rest in first.values())


def _is_unet(denoiser: ModelMixin) -> bool:
    return hasattr(denoiser, "down_blocks")


def _blocks(denoiser: ModelMixin) -> list[str]:
    """Names that tell a converter how many blocks there are: all numbers, for it may take any for the last."""
    lists = {name: len(_list(denoiser, own)) for name, own in _LISTS.items()}
    demanded: list[str] = []
    if _is_unet(denoiser):
        count = len(denoiser.down_blocks) * (int(denoiser.config.get("layers_per_block", 1)) + 1)
        lists = {"input_blocks": count, "output_blocks": count, "middle_block": 3}
        demanded = [f"{name}.{end}" for name in _SIZE_EMBEDDINGS for end in ("weight", "bias")]
    return demanded + [f"{name}.{i}.none" for name, length in lists.items() for i in range(length)]


def _list(denoiser: ModelMixin, path: str) -> Any:
    try:
        return denoiser.get_submodule(path)
    except AttributeError:
        return ()
