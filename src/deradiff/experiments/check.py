"""Before the first image: what a plan needs that is not on this machine, and how to get it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE

from deradiff.alignment.presets import PRESETS
from deradiff.alignment.prompts import LISTS, PICKAPIC, HubList, load_prompts
from deradiff.anchors.errors import AnchorError, IncompatibleAnchor
from deradiff.anchors.sources import locate, select
from deradiff.experiments.characters import examination, examined, missing
from deradiff.experiments.plan import Plan, Prompts
from deradiff.experiments.sources import resolve
from deradiff.files.hub import Kind, cached, download_command, instead_of, refused
from deradiff.files.tables import INSTALL
from deradiff.measures import features, inception
from deradiff.rewards.published import FILES as REWARD_FILES
from deradiff.rewards.published import WEIGHTS, HubFiles
from deradiff.sweep.pipelines import DTYPES
from deradiff.worlds import find, find_anchor

PIPELINE_FILES = (
    "model_index.json",
    "*/*.json",
    "*/*.txt",
    "*/model*.safetensors",
    "*/diffusion_pytorch_model*.safetensors",
)
"""What `sweep.pipelines.load_pipeline` reads of a repository; not the half-precision copies and single files beside."""

NO_WEIGHTS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")
"""The endings of pipeline components' classes that are configurations alone."""

_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:-(\d{5})-of-(\d{5}))?\.safetensors")

VAE_FILES = (("config.json",), ("diffusion_pytorch_model.safetensors",))

BYTES_PER_PIXEL = 3
"""Of a picture in a PNG file, at most, but for some header."""


@dataclass(frozen=True)
class Need:
    """Something that a plan needs."""

    what: str
    """What it is for, and its name."""
    missing: str = ""
    """Why it cannot be had as things are; empty where it is there."""
    how: tuple[str, ...] = ()
    """The commands that get it."""
    repo: tuple[str, Kind] | None = None
    """Where on the hub it is from."""


def needs(plan: Plan) -> list[Need]:
    """Everything that drawing and scoring `plan` needs, each once. Nothing is downloaded.

    Weights are read only of models whose character the plan names, for their hash.
    """
    anchors = list(_anchors(plan))
    commands = dict.fromkeys(command for need in anchors for command in need.how)
    found = [*_pipelines(plan), *_prompts(plan), *_scorers(plan)]
    found += [need for command in commands for need in _alignment(shlex.split(command))]
    # Last what the others are needed for.
    return list(dict.fromkeys([*_packages(plan, found), *found, *anchors, *_characters(plan), *_machine(plan)]))


def asked_of_the_hub(known: Iterable[Need]) -> list[str]:
    """What the hub says of the repositories that these needs name, where it would not give them.

    Raises `OSError` where the hub gives no answer.
    """
    repos = dict.fromkeys(need.repo for need in known if need.repo is not None)
    return [f"{repo} {why}" for repo, kind in repos if (why := refused(repo, kind))]


# -- models -----------------------------------------------------------------------------------------------------------


def _pipelines(plan: Plan) -> Iterator[Need]:
    yield _pipeline("reference", plan.reference, plan.revision, plan.allow_pickle)
    for arm in plan.arms():
        if arm.reward_guidance is not None and arm.reward_guidance.pipeline:
            yield _pipeline("pipeline", arm.reward_guidance.pipeline, None, plan.allow_pickle)


def _pipeline(role: str, source: str, revision: str | None, allow_pickle: bool) -> Need:
    what, path = f"{role} {source}", Path(source)
    if find(source):
        return Need(what)
    if path.exists():
        absent = absent_parts(path, allow_pickle)
        return Need(what, f"lacks {', '.join(absent)}" if absent else "")
    if not is_hub_id(source):
        return Need(what, "is neither a folder here nor a hub id")
    folder = cached(source, "model", revision)
    absent = [] if folder is None else absent_parts(folder, allow_pickle)
    if folder is not None and not absent:
        return Need(what, repo=(source, "model"))
    why = f"lacks {', '.join(absent)} in the hub's cache" if absent else "is not in the hub's cache"
    command = download_command(source, PIPELINE_FILES, "model", revision, leave_out=("*.fp16.*", "*.non_ema.*"))
    return Need(what, why + instead_of(source), (command,), (source, "model"))


def is_hub_id(source: str) -> bool:
    """Whether a source that is not here can be a model on the hub."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", source) is not None


def absent_parts(folder: Path, allow_pickle: bool = False) -> list[str]:
    """The components in the `model_index.json` of a pipeline's folder whose files are not there."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ["model_index.json"]
    absent = []
    for name, component in index.items():
        if not isinstance(component, list) or len(component) != 2 or component[0] is None:
            continue
        part = folder / name
        if str(component[1]).endswith(NO_WEIGHTS):
            complete = any(part.glob("*.json"))
        else:
            complete = (part / "config.json").is_file() and (_whole(part) or (allow_pickle and any(part.glob("*.bin"))))
        absent += [] if complete else [f"{name}/"]
    return absent


def _whole(part: Path) -> bool:
    """Whether a component's weights are there, all shards of them."""
    shards = [match for file in part.iterdir() if (match := _WEIGHTS.fullmatch(file.name))]
    if any(match[1] is None for match in shards):
        return True
    return bool(shards) and len(shards) == int(shards[0][2])


def _anchors(plan: Plan) -> Iterator[Need]:
    for name, model in plan.models.items():
        what, source, made = f"model {name!r}, {model.source}", model.source, (model.made_by,) if model.made_by else ()
        if find_anchor(source) or not (why := _unusable(source, plan)):
            yield Need(what)
        elif Path(source).exists() or not is_hub_id(source) or made:
            yield Need(what, why if Path(source).exists() else "is not here", made)
        else:
            command = download_command(source, ("*.json", "*.safetensors"))
            yield Need(what, why + instead_of(source), (command,), (source, "model"))


def _characters(plan: Plan) -> Iterator[Need]:
    for name, model in examined(plan):
        why = missing(plan, model)
        how = (examination(plan, model),) if why else ()
        yield Need(f"character of model {name!r}, {model.character}", why, how)


def _alignment(words: list[str]) -> Iterator[Need]:
    """What a command that aligns needs beside the base: the data, the VAE and the reward of its preset."""
    options = {word: value for word, value in pairwise(words) if word.startswith("--")}
    preset = PRESETS.get(options.get("--preset", "")) if words[:2] == ["deradiff", "align"] else None
    if preset is None:
        return
    data = options.get("--data", preset.data)
    if is_named(data, PICKAPIC):
        yield _stream("data to align with", PICKAPIC[data])
    if preset.vae is not None:
        yield from _model_files(
            "VAE to align with", (HubFiles(preset.vae, VAE_FILES, ("config.json", "*.safetensors")),), ""
        )
    if reward := options.get("--reward", preset.reward):
        yield from _score(reward)


def _unusable(source: str, plan: Plan) -> str:
    """Why no anchor can be taken from `source` with what is on this machine; empty where one can."""
    for component in ("unet", "transformer"):
        try:
            select(locate(source, None, None, True), component, DTYPES[plan.dtype], plan.allow_pickle)
        except IncompatibleAnchor:
            continue
        except (AnchorError, OSError) as error:
            return " ".join(str(error).split())
        return ""
    return "is a pipeline without a unet or a transformer"


# -- prompts ----------------------------------------------------------------------------------------------------------


def sources_of(wanted: Prompts) -> tuple[str, ...]:
    """Where the prompts of a set are from."""
    return (wanted.source,) if isinstance(wanted.source, str) else wanted.source or ()


def is_named(source: str, names: Iterable[str]) -> bool:
    """Whether a source of prompts is the list of that name, and no file here."""
    return source in names and not Path(source).is_file()


def _prompts(plan: Plan) -> Iterator[Need]:
    for name, wanted in plan.prompts.items():
        for source in sources_of(wanted):
            what = f"prompts {name!r}, {source}"
            if is_named(source, LISTS):
                yield _hub_list(what, LISTS[source])
            elif is_named(source, PICKAPIC):
                yield _stream(what, PICKAPIC[source])
            else:
                yield Need(what, *_unreadable(source, wanted))


def _stream(what: str, repo: str) -> Need:
    if not HF_HUB_OFFLINE:
        return Need(f"{what}, {repo}", repo=(repo, "dataset"))
    folder = repo.partition("/")[2]
    why = f"is read from the hub, which HF_HUB_OFFLINE forbids: fetch it, and name {folder} or a file of it instead"
    command = f"{download_command(repo, ['*.parquet'], 'dataset')} --local-dir {folder}"
    return Need(f"{what}, {repo}", why, (command,), (repo, "dataset"))


def _hub_list(what: str, known: HubList) -> Need:
    folder = cached(known.repo, "dataset")
    absent = [file for file in known.files if folder is None or not (folder / file).is_file()]
    if not absent:
        return Need(what, repo=(known.repo, "dataset"))
    why = f"{', '.join(absent)} of {known.repo} is not in the hub's cache"
    return Need(what, why, (download_command(known.repo, absent, "dataset"),), (known.repo, "dataset"))


def _unreadable(source: str, wanted: Prompts) -> tuple[str, tuple[str, ...]]:
    made = (wanted.made_by,) if wanted.made_by else ()
    try:
        if not find(source):
            load_prompts(source)
    except FileNotFoundError:
        return "is no file here", made
    except ImportError as error:
        return str(error), (INSTALL,)
    except (OSError, ValueError) as error:
        return str(error), made
    return "", ()


# -- scores and features ----------------------------------------------------------------------------------------------


def _scorers(plan: Plan) -> Iterator[Need]:
    guiding = [arm.reward_guidance.reward for arm in plan.arms() if arm.reward_guidance is not None]
    for name in [*plan.scores, *guiding]:
        yield from _score(name)
    for name in plan.features:
        kind, _, chosen = name.partition("=")
        if kind == "inception":
            yield _inception(name, chosen)
        else:
            repo = {"dinov2": features.DINOV2, "clip": features.CLIP}.get(kind)
            files = (HubFiles(repo, WEIGHTS, ("config.json", "model.safetensors")),) if repo else ()
            yield from _model_files(f"features {name}", files, chosen)


def _score(name: str) -> Iterator[Need]:
    kind, _, chosen = name.partition("=")
    yield from _model_files(f"score {name}", REWARD_FILES.get(kind, ()), chosen)


def _model_files(what: str, published: tuple[HubFiles, ...], chosen: str) -> Iterator[Need]:
    if chosen and Path(chosen).exists():
        published = ()
    elif chosen:
        published = (HubFiles(chosen, *published[0][1:]), *published[1:])
    if not published:
        yield Need(what)
    for files in published:
        folder = cached(files.repo)
        absent = [
            group[0] for group in files.needed if folder is None or not any((folder / f).is_file() for f in group)
        ]
        why = f"{', '.join(absent)} of {files.repo} is not in the hub's cache{instead_of(files.repo)}"
        repo: tuple[str, Kind] = (files.repo, "model")
        yield Need(what, why, (download_command(*files[::2]),), repo) if absent else Need(what, repo=repo)


def _inception(name: str, chosen: str) -> Need:
    file = Path(torch.hub.get_dir()) / "checkpoints" / inception.WEIGHTS.rpartition("/")[2]
    if chosen:
        try:
            inception.weights_file(chosen)
        except ValueError as error:
            return Need(f"features {name}", str(error))
    elif not file.is_file():
        how = f"curl --location --create-dirs --output {file} {inception.WEIGHTS}"
        return Need(f"features {name}", f"Inception's weights are not at {file}", (how,))
    return Need(f"features {name}")


# -- the machine ------------------------------------------------------------------------------------------------------


def _packages(plan: Plan, known: Iterable[Need]) -> Iterator[Need]:
    sources = [source for wanted in plan.prompts.values() for source in sources_of(wanted)]
    wanted = {
        "datasets": any(need.repo is not None and need.repo[0] in PICKAPIC.values() for need in known),
        "pyarrow": any(source.endswith(".parquet") for source in sources),
    }
    for package in (name for name, is_wanted in wanted.items() if is_wanted):
        yield (
            Need(f"package {package}")
            if find_spec(package)
            else Need(f"package {package}", "is not installed", (INSTALL,))
        )


def _machine(plan: Plan) -> Iterator[Need]:
    if find(plan.reference):
        return
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    yield Need("a GPU", "" if has_gpu else "torch sees none here: run the plan on a machine that has one")
    count, side = images(plan), _side(plan)
    size, free = count * side**2 * BYTES_PER_PIXEL / 1e9, shutil.disk_usage(".").free / 1e9
    what = f"disk for {count:,} images of {side} x {side}, {size:,.0f} GB at most"
    yield Need(what, "" if free > size else f"{free:,.0f} GB are free here: take an --out on another disk")


def images(plan: Plan) -> int:
    """How many images there are, as far as the lengths of prompt lists are known; what arms share counts twice."""
    lengths = {name: _length(wanted) * len(wanted.seeds) for name, wanted in plan.prompts.items()}
    return sum(lengths[name] for arm in plan.arms() for name in plan.sets(arm.prompts))


def _length(wanted: Prompts) -> int:
    if wanted.prompts or wanted.count:
        return len(wanted.prompts) or wanted.count or 0
    known = [LISTS[source].size if is_named(source, LISTS) else 0 for source in sources_of(wanted)]
    try:
        return sum(known) or len(resolve(wanted))
    except (OSError, ValueError, ImportError):
        return 0


def _side(plan: Plan) -> int:
    """Of the largest pictures; where the reference is not here to be asked, what it is aligned at, or 1024."""
    given = [sampling.height for sampling in plan.sampling.values() if sampling.height]
    folder = Path(plan.reference) if Path(plan.reference).is_dir() else cached(plan.reference, "model", plan.revision)
    try:
        config = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8")) if folder else {}
        return max(given) if given else 8 * int(config["sample_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return next((preset.resolution for preset in PRESETS.values() if preset.base == plan.reference), 1024)
