"""LoRA files: every tensor of one under the denoiser's own names, or named in a refusal or a warning.

Files of other trainers are renamed by diffusers, whose converters drop what they do not know without a word. Every
tensor is therefore followed through the conversion, and none may get lost on the way.
"""

import inspect
import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from deradiff.anchors.checks import Pipeline, require_numbers
from deradiff.anchors.errors import AnchorError, CorruptAnchor, IncompatibleAnchor
from deradiff.anchors.layouts import PREFIX
from deradiff.anchors.sources import some

PEFT_PREFIX = "base_model.model."
MARK = re.compile(r"(?:^|[._])(?:lora\d*|lokr|hada|dora|b?oft|hra)[._]")
"""What ends a layer's name in the names of its factors."""

_FILE_MARK = re.compile(MARK.pattern + r"|\.(?:diff|diff_b|set_weight|[wb]_norm|oft_\w+|boft_\w+)$")
FACTOR = re.compile(
    r"(?P<layer>.+)\.(?:lora_A|lora_down|lora\.down|(?P<up>lora_B|lora_up|lora\.up))(?:\.default)?\.(?P<kind>weight|bias)"
)
_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")
# What PEFT has a use for.
_PEFT_ENDS = (
    re.compile(r"\.lora_(?:A\.weight|B\.weight|B\.bias|magnitude_vector(?:\.weight)?)$"),
    re.compile(r"\.lokr_(?:w[12](?:_[ab])?|t2)$"),
)
# What training with several processes, or compiled, puts into names; and VideoX-Fun, lora_unet__blocks_0.
_WRAPPED = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.|(?<=^lora_unet_)_")
# How the names of the parts begin that serve both models.
_SHARED = re.compile(
    r"(?:lora_(?:prior_)?)?(?:te\d?|text_encoders\.\w+|text_encoder(?:_\d)?|text_model|clip_[lgh]|t5xxl|bundle_emb)"
    r"(?=[._])"
)
# What else there is in such files, by the end of its name.
_KINDS = {
    r"\.diff_b$": "changes of biases (diff_b)",
    r"\.diff$": "changes of whole weights or norms (diff)",
    r"dora_scale|magnitude": "magnitudes of a DoRA (dora_scale)",
    r"\.lora_mid\.": "middle factors of convolutions (lora_mid)",
    r"\.hada_": "factors of a LoHa (hada_)",
    r"\.lokr_": "factors of a LoKr (lokr_)",
    r"\.[wb]_norm$": "changes of norms (w_norm, b_norm)",
    r"oft_": "factors of an orthogonal fine-tune (oft)",
    r"\.alpha$": "scales without factors of their layer (alpha)",
    r"[._]lora[._]|lora_[AB]\.": "factors of a layer that it has not, or without the other factor",
}


@dataclass(frozen=True)
class LoraParts:
    """The tensors of a file, by what they are for."""

    own: Mapping[str, Tensor]
    """Of the denoiser."""
    shared: Mapping[str, str]
    """Of parts that serve both models; by name, which part."""
    idle: Sequence[str]
    """The names of changes that are zero."""


def is_adapter(names: Iterable[str]) -> bool:
    """Whether tensors of these names are a LoRA (or LoKr, LoHa, DoRA, changes of biases) rather than a model."""
    return any(_FILE_MARK.search(name) for name in names)


def read_lora(
    tensors: Mapping[str, Tensor], label: str, pipe: Pipeline, component: str, denoiser: ModelMixin
) -> dict[str, Tensor]:
    """The LoRA in a file, in diffusers', kohya's or another trainer's form, under PEFT's names for `denoiser`.

    Its scales (alpha) are multiplied in: a layer's change is `lora_B @ lora_A`, and `lora_B.bias` of its bias. Parts
    for text encoders are left out with a warning. Raises `AnchorError` naming the tensors without a place.
    """
    parts = parts_of(tensors, label, denoiser)
    own, shared = parts.own, dict(parts.shared)
    if not hasattr(denoiser, "load_lora_adapter"):
        raise IncompatibleAnchor(
            f"{label} is a LoRA in a form that diffusers cannot load into {type(denoiser).__name__}: save it in PEFT's "
            "form (adapter_config.json with adapter_model.safetensors)."
        )
    if lone := _without_partner(own):
        raise in_part(lone, label, denoiser)
    followed = {name: _Followed.named(name, tensor) for name, tensor in scaled(own, label).items()}
    state = _own_names(followed, label, component, denoiser)
    if state is None:
        state = _converted(followed, label, pipe, component, denoiser)
    for key in [key for key in state if _SHARED.match(key)]:
        shared |= dict.fromkeys(_sources(state.pop(key), key), key.partition(".")[0])
    weights = convert_unet_state_dict_to_peft(
        {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
    )
    require_places(weights, label, component, denoiser)
    arrived = Counter[str]()  # numbers, for half a tensor could get lost, too
    for key in _usable(weights):
        arrived.update(dict.fromkeys(_sources(weights[key], key), int(weights[key].count_nonzero())))
    placed = shared.keys() | {name for name in arrived if arrived[name] >= int(followed[name].count_nonzero())}
    scales = {f"{_layer(name)}.alpha" for name in placed}
    if lost := [name for name in own if name not in placed and name not in scales]:
        raise in_part(lost, label, denoiser)
    warn_left_out(replace(parts, shared=shared), label)
    return {key: tensor.as_subclass(Tensor).clone() for key, tensor in weights.items()}


def parts_of(tensors: Mapping[str, Tensor], label: str, denoiser: ModelMixin) -> LoraParts:
    """Sort the tensors of a file by what they are for. Raises `AnchorError` where none is for the denoiser."""
    plain = {_WRAPPED.sub("", name): tensor for name, tensor in tensors.items()}
    tensors = plain if len(plain) == len(tensors) else tensors
    _require_readable(tensors, label)
    tensors = {name: t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t for name, t in tensors.items()}
    shared = {name: match[0] for name in tensors if (match := _SHARED.match(name))}
    idle = [name for name in tensors if name.endswith((".diff", ".diff_b")) and not tensors[name].any()]
    own = {name: tensor for name, tensor in tensors.items() if name not in shared and name not in idle}
    if not own:
        raise IncompatibleAnchor(
            f"{label} changes nothing of the reference's {type(denoiser).__name__}: {some(tensors)}. Only denoisers "
            "are mixed; text encoders serve both models."
        )
    require_numbers({name: t for name, t in own.items() if not name.endswith(".alpha")}, label)
    return LoraParts(own, shared, idle)


def with_scale(tensors: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The tensors with a scale for every layer of a LoRA, where it stands beside the file."""
    downs = {name: match for name in tensors if (match := FACTOR.fullmatch(name)) and match["up"] is None}
    ranks = {match["layer"]: tensors[name].shape[0] for name, match in downs.items() if tensors[name].ndim}
    alphas = {f"{layer}.alpha": torch.tensor(float(scale * rank)) for layer, rank in ranks.items()}
    return {**tensors, **alphas}


def _require_readable(tensors: Mapping[str, Tensor], label: str) -> None:
    """Raise `AnchorError` for a form that says too little."""
    if any(name.startswith(PEFT_PREFIX) for name in tensors) and not any("double_blocks." in name for name in tensors):
        raise AnchorError(
            f"{label} is a PEFT adapter without its adapter_config.json, which holds its scale: put that file beside "
            "it, under PEFT's names (adapter_config.json, adapter_model.safetensors)."
        )


def _without_partner(names: Collection[str]) -> list[str]:
    """Factors without the other one of their layer, and scales without any."""
    sides: dict[str, set[bool]] = {}
    for name in names:
        if (match := FACTOR.fullmatch(name)) and match["kind"] == "weight":
            sides.setdefault(match["layer"], set()).add(match["up"] is None)
    layers = {_layer(name) for name in names if not name.endswith(".alpha")}
    return [
        name
        for name in names
        if (name.endswith(".alpha") and name.removesuffix(".alpha") not in layers)
        or ((match := FACTOR.fullmatch(name)) and len(sides.get(match["layer"], ())) < 2)
    ]


def _usable(weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors that PEFT has a use for: those of LoRA, or those of LoKr where there are no others."""
    kinds = [{key for key in weights if end.search(key)} for end in _PEFT_ENDS]
    return [key for key in weights if key in (kinds[0] or kinds[1])]


class _Followed(Tensor):
    """A tensor that knows from which tensors of the file it was made."""

    sources: frozenset[str]

    @classmethod
    def named(cls, name: str, tensor: Tensor) -> "_Followed":
        followed = tensor.as_subclass(cls)
        followed.sources = frozenset([name])
        return followed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        sources = frozenset(name for tensor in _within((args, kwargs)) for name in getattr(tensor, "sources", ()))
        changed = args[0] if func is Tensor.__setitem__ else result
        for tensor in _within(changed):
            if isinstance(tensor, cls):
                tensor.sources = sources
        return result


def _within(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _within(entry)


def scaled(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    """The tensors with every layer's alpha/rank multiplied into its two factors.

    So no scale depends on whether a converter minds it. One that insists on finding alphas, kohya's, finds the rank.
    Half of a scale goes into either factor, by a power of two, or small weights would vanish in half precision.
    """
    scaled = dict(tensors)
    for name in [name for name in tensors if name.endswith(".alpha")]:
        layer = name.removesuffix(".alpha")
        down = next((layer + end for end in _DOWN if layer + end in tensors), None)
        up = next((layer + end for end in _UP if layer + end in tensors), None)
        if down is None or up is None or not tensors[down].ndim:  # of a LoKr, which knows its rank; or no factor at all
            continue
        alpha = tensors[name]
        if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(float(alpha)):
            raise CorruptAnchor(f"{label}: {name} is no scale, but {alpha.flatten()[:3].tolist()}.")
        rank = tensors[down].shape[0]
        scale = float(alpha) / rank
        half = 2.0 ** round(math.log2(abs(scale)) / 2) if scale else 1.0
        scaled[down], scaled[up] = tensors[down].float() * (scale / half), tensors[up].float() * half
        if "." in layer:
            del scaled[name]
        else:
            scaled[name] = alpha.new_tensor(rank, dtype=scaled[down].dtype)
    return scaled


def _own_names(
    tensors: Mapping[str, _Followed], label: str, component: str, denoiser: ModelMixin
) -> dict[str, _Followed] | None:
    """The tensors under PEFT's names where all are named after the denoiser's own layers, with dots or underscores."""
    paths = [path.replace(".base_layer", "") for path, _ in denoiser.named_modules()]
    layers = {path.replace(".", "_"): path for path in paths}
    layers |= {path: path for path in paths}
    names: dict[str, str] = {}
    for name in tensors:
        if name.endswith(".alpha"):
            continue
        match = FACTOR.fullmatch(name)
        layer = match and layers.get(match["layer"], layers.get(PREFIX.sub("", match["layer"], count=1)))
        if not match or not layer:
            return None
        key = f"{component}.{layer}.{'lora_B' if match['up'] else 'lora_A'}.{match['kind']}"
        if key in names:
            raise IncompatibleAnchor(f"{label} changes {layer} twice: by {names[key]} and by {name}.")
        names[key] = name
    return {key: tensors[name] for key, name in names.items()}


def _converted(
    tensors: Mapping[str, _Followed], label: str, pipe: Pipeline, component: str, denoiser: ModelMixin
) -> dict[str, _Followed]:
    """The tensors under diffusers' names, by the converter of the pipeline's class; those it drops are missing."""
    # Some pipelines (T2I-Adapter's) load no LoRA themselves; their UNet is Stable Diffusion's all the same.
    reader = type(pipe) if hasattr(pipe, "lora_state_dict") else StableDiffusionLoraLoaderMixin
    if reader is not type(pipe) and component != "unet":
        raise _no_place(list(tensors), True, label, component, denoiser)
    accepted = inspect.signature(reader.lora_state_dict).parameters
    try:
        state, *_ = reader.lora_state_dict(
            dict(tensors),
            unet_config=denoiser.config,
            return_lora_metadata=True,
            **({"return_alphas": True} if "return_alphas" in accepted else {}),
        )
    except Exception as error:  # diffusers raises whatever the conversion stumbles over
        odd = [name for name in tensors if not FACTOR.fullmatch(name) and _kind(name)]
        if odd := [name for name in odd if not name.endswith(".alpha")]:
            raise in_part(odd, label, denoiser) from error
        named = [name for name in tensors if _plain(name) in _plain(str(error))]
        heads = Counter(re.split(r"[._]", name)[0] for name in tensors)  # the odd ones first
        rare = sorted(tensors, key=lambda name: heads[re.split(r"[._]", name)[0]])
        raise _no_place(named or rare, not named, label, component, denoiser) from error
    if not any(key.startswith((f"{component}.", "text_encoder")) for key in state):
        return {f"{component}.{key}": tensor for key, tensor in state.items()}  # as the denoiser itself saves it
    return dict(state)


def require_places(weights: Mapping[str, Tensor], label: str, component: str, denoiser: ModelMixin) -> None:
    """Raise `IncompatibleAnchor` for tensors that belong to no module of the denoiser, by their names in the file."""
    modules = {path.replace(".base_layer", "") for path, _ in denoiser.named_modules() if path}
    strange = [key for key in weights if MARK.split(key)[0] not in modules]
    if strange or not weights:
        names = list(dict.fromkeys(name for key in strange for name in sorted(_sources(weights[key], key))))
        raise _no_place(names, len(strange) == len(weights), label, component, denoiser)


def in_part(names: list[str], label: str, denoiser: ModelMixin) -> IncompatibleAnchor:
    """The refusal of a LoRA of which these tensors would be lost."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_kind(name) or "others", []).append(name)
    return IncompatibleAnchor(
        f"{label} would be loaded only in part: {len(names)} of its tensors have no place beside the reference's "
        f"{type(denoiser).__name__}: "
        + "; ".join(f"{kind}: {some(members)}" for kind, members in kinds.items())
        + ". Merge it into its base model and save that as the anchor, or save it in PEFT's form "
        "(adapter_config.json with adapter_model.safetensors) where PEFT has one for it."
    )


def _no_place(
    strange: list[str], none_fits: bool, label: str, component: str, denoiser: ModelMixin
) -> IncompatibleAnchor:
    example = next((path for path, module in denoiser.named_modules() if isinstance(module, nn.Linear)), "")
    layer = example.replace(".base_layer", "")
    how_many = "none of its keys fits" if none_fits else f"{len(strange)} of its keys have no place in"
    return IncompatibleAnchor(
        f"{label}: {how_many} the reference's {type(denoiser).__name__}: {some(strange)}. Expected are that model's "
        f"own layers, in diffusers' form ({component}.{layer}.lora_A.weight), kohya's "
        f"(lora_unet_{layer.replace('.', '_')}.lora_down.weight) or PEFT's (with adapter_config.json), or a form that "
        "diffusers converts for this pipeline: is this LoRA made for another model?"
    )


def warn_left_out(parts: LoraParts, label: str) -> None:
    """Warn about what serves both models, and about changes that are none."""
    if parts.shared:
        warnings.warn(
            f"{label} also changes {', '.join(sorted(set(parts.shared.values())))}, which is left out: the reference's "
            'text encoders serve both models. Give realign() text_encoder="both" for an anchor with its own prompt '
            "embeddings, or load that part on the pipeline if both models should have it. "
            f"({len(parts.shared)} tensors: {some(parts.shared)}.)",
            stacklevel=6,
        )
    if parts.idle:
        warnings.warn(
            f"{label} holds {len(parts.idle)} changes that are zero and so are left out: {some(parts.idle)}.",
            stacklevel=6,
        )


def _sources(tensor: Tensor, key: str) -> frozenset[str]:
    """The tensors of the file that this one was made from; its own name where it was never converted."""
    return getattr(tensor, "sources", frozenset([key]))


def _layer(name: str) -> str:
    """The layer that a tensor of a file belongs to."""
    return re.split(r"\.(?=lora_|lora\.|lokr_|hada_)", name)[0]


def _plain(name: str) -> str:
    """A name as it may stand in a message of a converter, which has changed its beginning and its dots."""
    return PREFIX.sub("", name, count=1).replace(".", "_")


def _kind(name: str) -> str | None:
    return next((words for end, words in _KINDS.items() if re.search(end, name)), None)
