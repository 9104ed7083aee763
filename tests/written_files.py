"""Every kind of file that a command reads back: a valid one by its real writer, and the function that reads it.

For the tests that damage them, and for `benchmarks/attack_files.py`. A `Written` lies in a folder of its own, which
`restore` makes what it was.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import small_study
from deradiff import bake
from deradiff.alignment import folders, own_samples, runs, sharding
from deradiff.alignment.base import Base
from deradiff.alignment.checkpoints import read_state
from deradiff.alignment.data_order import DataOrder, permuted
from deradiff.alignment.loop import train
from deradiff.alignment.methods import prepare_pairs
from deradiff.alignment.pairs import open_pairs
from deradiff.alignment.presets import Preset, usual
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.training import BatchPart, LossCurve, TrainingPlan, TrainingRun
from deradiff.anchors import load_anchor
from deradiff.baking import distillation
from deradiff.baking.drawing import Sampler
from deradiff.experiments import export as experiment_export
from deradiff.experiments import plan, results
from deradiff.experiments.store import Store
from deradiff.files.folders import RunFolder, begin_or_resume
from deradiff.files.records import read_png, versions, write_png
from deradiff.sampling.dial import Dial
from deradiff.sampling.full_steps import FullSteps
from deradiff.sampling.reuse import Reuse
from deradiff.search import running as search
from deradiff.search import spaces
from deradiff.search.evaluation import PointEvaluator
from deradiff.studio import curves, scenes
from deradiff.studio.library import Library
from deradiff.study import ballots, votes
from deradiff.study import plan as study_plan
from deradiff.study import sources as study_sources
from deradiff.sweep.pipelines import known_beta, load_pipeline
from deradiff.sweep.settings import Column, Settings
from deradiff.worlds import digits
from deradiff.worlds.digits.rewards import DigitsReward
from small_clip import written as written_clip
from small_clip import written_predictor
from small_experiment import SMALL, silent
from studies.closed_forms import comparison
from studies.closed_forms.cases import Case
from studies.digits import anchors, export, truth, truth_files, truth_models, truth_report
from studies.digits.settings import Settings as BuildSettings


@dataclass
class Written:
    """A valid file, and how a command reads it."""

    kind: str
    path: Path
    read: Callable[[], object]
    form: str
    """json, yaml, text, tensors, picture or sqlite: how it can be damaged."""
    weight: int = 10
    """How often it is damaged, compared with others: less often where reading takes long."""
    folder: Path = Path()
    content: bytes = b""
    _others: dict[Path, tuple[bytes, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.content = self.path.read_bytes()
        files = [path for path in self.folder.rglob("*") if path.is_file() and not path.is_symlink()]
        self._others = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}

    def restore(self) -> None:
        """Make the folder what it was."""
        for path in [path for path in self.folder.rglob("*") if path.is_file() and path not in self._others]:
            path.unlink(missing_ok=True)  # SQLite removes its own
        for path, (content, time) in self._others.items():
            if not path.is_file() or path.stat().st_mtime_ns != time:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, ns=(time, time))


Maker = Callable[[Path], Iterator[Written]]


@lru_cache(maxsize=1)
def pipe() -> Any:
    """The digits, once."""
    return digits.load_pipeline()


# -- plans and records -------------------------------------------------------------------------------------------------


def plans(folder: Path) -> Iterator[Written]:
    """Of an experiment and of a study."""
    file = folder / "experiment" / "plan.yaml"
    file.parent.mkdir()
    file.write_text(plan.write_plan(plan.parse_plan(SMALL, "the small plan")), encoding="utf-8")
    yield Written("plan of an experiment", file, lambda: plan.read_plan(file), "yaml", 20, file.parent)
    other = folder / "study" / "plan.yaml"
    other.parent.mkdir()
    other.write_text(study_plan.write_plan(small_study.planned()), encoding="utf-8")
    yield Written("plan of a study", other, lambda: study_plan.read_plan(other), "yaml", 20, other.parent)


SETTINGS = Settings(
    reference="digits", anchors={"anchor": "digits:500"}, prompts=("a seven",), columns=(Column(lam=0.5),), seeds=(3,)
)


def records(folder: Path) -> Iterator[Written]:
    """Of runs, of images, and what the studio keeps."""
    begun = folder / "claimed"
    begin_or_resume(begun, {"seed": 1, "prompts": ["a seven"]}, "cache")
    read: Callable[[], object] = lambda: begin_or_resume(begun, {"seed": 1, "prompts": ["a seven"]}, "cache")  # noqa: E731
    yield Written("settings.json", begun / "settings.json", read, "json", 20, begun)

    out, about = folder / "run", SETTINGS.model_dump(mode="json")
    image = Image.new("RGB", (8, 8), (200, 10, 10))
    with RunFolder(out) as run:
        drawn = run.add("one.png", image, {"settings": about, "prompt": "a seven", "seed": 3, "lam": 0.5})
        listed = [{"file": drawn}]
        run.finish(image, {"settings": about, "versions": versions(), "images": listed})

    def again() -> None:
        with RunFolder(out, force=True):
            pass

    yield Written("record.json", out / "record.json", again, "json", 20, out)
    picture = out / "images" / "one.png"
    for form in ("picture", "chunk"):
        yield Written(f"image ({form})", picture, lambda: scenes.of_record(read_png(picture)), form, 20, out)

    kept = Library(folder / "kept", "preset")
    kept.save("mine", about)
    kept.save("curve", {"schedule": "Spline", "points": [[0, 0], [0.5, 0.2], [1, 1]], "over": "steps"})
    preset, curve = folder / "kept" / "mine.json", folder / "kept" / "curve.json"
    yield Written("preset", preset, lambda: scenes.of_record(kept.load("mine")), "json", 20, folder / "kept")
    yield Written("curve", curve, lambda: curves.read(kept.load("curve")), "json", 20, folder / "kept")

    file = folder / "full_steps" / "full_steps.json"
    file.parent.mkdir()
    FullSteps(Reuse(steps=(0, 2), carrier="reference"), 0.1, 0.05, 0.0, 1.2, "DDIMScheduler", 3, 4).save(file)
    yield Written("full steps", file, lambda: FullSteps.load(file), "json", 20, file.parent)


# -- alignments --------------------------------------------------------------------------------------------------------


class Numbers:
    """A source of numbers, for a data order."""

    fingerprint: dict[str, Any] = {"kind": "numbers", "count": 6}  # noqa: RUF012
    held_out_rows = 0

    def steps(self, seed: int, cursor: Any) -> Any:
        return permuted(torch.arange(6), seed, cursor)

    def open(self, row: int) -> int:
        return row


class Stopped(Exception):
    """The machine went away."""


LINE = TrainingPlan(4, 0.01, warmup=0, average=0.5, evaluate_every=1, patience=5, checkpoint_seconds=1e9)


def fitted(checkpoint: Path, stop_at: int | None = None, seconds: float = 1e9) -> LossCurve:
    """A line through numbers, which is interrupted at a step."""
    torch.manual_seed(0)
    order = DataOrder(Numbers(), seed=1)

    def loss(model: nn.Module, _: torch.Generator, part: BatchPart) -> Tensor:
        if part.step == stop_at:
            raise Stopped
        return (model(torch.tensor(order.take(2)).float()[:, None]) - 1).square().mean()

    return train(
        nn.Linear(1, 1),
        loss,
        lambda model: float(model(torch.ones(1, 1)).square()),
        replace(LINE, checkpoint_seconds=seconds),
        run=TrainingRun(
            seed=0,
            checkpoint=checkpoint,
            report=silent,
            identity="a line",
        ),
        data=order,
    )


def checkpoints(folder: Path) -> Iterator[Written]:
    """Of an interrupted training."""
    place = folder / "checkpoint"
    with suppress(Stopped):
        fitted(place, stop_at=3, seconds=0)
    for name, form in (("progress.json", "json"), ("state.safetensors", "tensors")):
        yield Written(f"checkpoint's {name}", place / name, lambda: resumed(place), form, 20, folder)


def resumed(place: Path) -> None:
    """What `train` does with a checkpoint, but for the training."""
    progress = folders.read(place, "a line", LINE.steps)
    parameters = [torch.zeros(1, 1), torch.zeros(1)]
    state = read_state(place, progress, [value.shape for value in parameters], LINE)
    DataOrder(Numbers(), seed=1).load_state_dict(progress.data)
    sharding.optimizer_parts({"state": state.optimizer, "param_groups": []}, parameters)
    LossCurve(**progress.curve.model_dump())


def small_preset() -> Preset:
    """Of the digits, for six pairs."""
    preset = usual("digits", "dpo")
    return replace(preset, held_out=2, batch=2, plan=replace(preset.plan, steps=1, warmup=0, patience=None))


def alignments(folder: Path) -> Iterator[Written]:
    """All that `align` leaves: own pairs, cache, an anchor."""
    settings, out = small_preset(), folder / "aligned"
    [anchor] = runs.align_all(settings, [100.0], out, silent, count=6, cpu=True)
    made_of = json.loads((anchor / "alignment.json").read_text())["made_of"]

    def prepared() -> object:
        return prepare_pairs(pipe(), settings, out, 6, 0, silent).take([0, 3])  # type: ignore[union-attr]

    def finished() -> None:
        known_beta(str(anchor))
        runs.require_finished(anchor, made_of)

    for name, form, weight in (
        ("pairs/settings.json", "json", 4),
        ("pairs/chunks/00000.json", "json", 8),
        ("pairs/pairs.jsonl", "json", 3),
        ("cache/settings.json", "json", 5),
        ("cache/finished.json", "json", 8),
        ("cache/shard-00000.safetensors", "tensors", 8),
    ):
        yield Written(f"align's {name}", out / name, prepared, form, weight, out)
    yield Written("align's picture", next((out / "pairs/images").glob("*.png")), prepared, "picture", 3, out)
    yield Written("alignment.json", anchor / "alignment.json", finished, "json", 20, out)
    weights = next(anchor.glob("*.safetensors"))
    yield Written("an anchor's weights, found finished", weights, finished, "tensors", 10, out)

    listed = folder / "listed"
    shutil.copytree(out / "pairs", listed)
    yield Written("list of pairs", listed / "pairs.jsonl", lambda: open_pairs(listed), "json", 10, listed)


def samples(folder: Path) -> Iterator[Written]:
    """What reward-weighted denoising and distillation draw."""
    out, base = folder / "samples", Base(pipe())

    def drawn() -> object:
        sampling = SamplerSettings("ddim", 1, 1.0)
        return own_samples.draw_samples(out, base, "digits", ["a seven"], 2, DigitsReward(), sampling, seed=0, chunk=2)

    drawn()
    yield Written("own samples", out / "samples-0000000.safetensors", drawn, "tensors", 8, out)

    other, settings = folder / "of-student", distillation.Distillation(samples=4, held_out=1, steps=1, batch=1)

    def of_student() -> object:
        dial = object.__new__(Dial)  # which is only asked for students of many λ
        sampler = Sampler(1, 1.0, 2)
        return distillation.draw_samples(other, pipe(), dial, ["a seven"], sampler, settings, {"a": 1}, 0, silent)

    of_student()
    yield Written("samples of a student", other / "samples-0000002.safetensors", of_student, "tensors", 8, other)


# -- the digits --------------------------------------------------------------------------------------------------------


def builds(folder: Path) -> Iterator[Written]:
    """Chunks and curves of the digits' build, and of their ground truth."""
    shutil.copytree(digits.reference_path(), folder / "build" / "reference")
    settings = BuildSettings(pairs=4, pairs_chunk=2, sampling_steps=1)
    for number in range(2):
        anchors.draw_pairs(folder / "build", settings, number, silent)
    shutil.rmtree(folder / "build" / "reference")
    chunk = folder / "build" / "pairs-001.safetensors"
    read: Callable[[], object] = lambda: anchors.load_pairs(folder / "build", settings)  # noqa: E731
    yield Written("chunk of the build's pairs", chunk, read, "tensors", 8, folder / "build")
    curve = folder / "curve" / "vae-curve.json"
    curve.parent.mkdir()
    curve.write_text(json.dumps(asdict(LossCurve([0, 1], [1.0, 0.5], [1.0, 0.5], "flat", 1))))
    yield Written("loss curve", curve, lambda: export.curves(curve.parent), "json", 20, curve.parent)

    pool = truth_models.TruthSettings(samples=4, samples_chunk=2, sampling_steps=1, sampling_batch=2)
    (folder / "pool").mkdir()
    for number in range(2):
        truth_models.draw_pool(folder / "pool", pool, number, silent)
    chunk = folder / "pool" / "pool-000.safetensors"
    read_pool: Callable[[], object] = lambda: truth_models.load_pool(folder / "pool", pool)  # noqa: E731
    yield Written("chunk of the pool", chunk, read_pool, "tensors", 8, folder / "pool")

    target = folder / "truth" / "weighted" / "bold-1"
    target.parent.mkdir(parents=True)
    ends = {"reference": {"value": 0.0, "error": 0.1}, "model": {"value": 1.0, "error": 0.1}}
    reached = {"bold": ends, "ink": ends}
    record = {"family": "weighted", "λ": {"bold": 1.0}, "reached": reached}
    truth_models._save(digits.load_pipeline().unet, record, LossCurve([0], [1.0], [1.0], "flat", 0), target)

    def trained() -> object:
        truth_models._is_trained(target)
        return truth_report.training_table(truth_report.training(folder / "truth"))

    yield Written("truth.json", target / "truth.json", trained, "json", 10, folder / "truth")


def comparisons(folder: Path) -> Iterator[Written]:
    """Cases in closed form and on the digits, and models that several cases share."""
    case = Case("grid", "crossing", ("slope",), 1.0, 1.0, 0.5, 4, 8, 8)
    (closed := folder / "closed").mkdir()
    comparison._store(closed, case)
    file = comparison._file(closed, case)
    yield Written("case in closed form", file, lambda: comparison._read(closed, case), "json", 20, closed)

    trained, out = folder / "trained" / "weighted", folder / "out"
    trained.mkdir(parents=True)
    for name, beta in (("bold-1", 250.0), ("bold-0.5", 500.0), ("control", 1000.0)):
        (trained / name).symlink_to(digits.anchor_path(beta))
    small = truth.Plan(prompts=2, images=2, counts=(2,), guided_counts=(), steps=2, guidance_scales=(1.0,))

    def run() -> object:
        found = truth.run(trained.parent, out, small, silent, workers=1)
        return truth_report.summary(found), truth_report.table(found), truth_report.shares(found)

    run()
    [compared] = truth.cases(trained.parent, small)
    yield Written("case on the digits", out / f"{compared.name}.json", run, "json", 10, out)
    measured = next((out / "models").glob("*.json"))
    read: Callable[[], object] = lambda: truth_files.model(measured, set(truth.REWARDS), 2)  # noqa: E731
    yield Written("measured model", measured, read, "json", 20, out)


# -- models ------------------------------------------------------------------------------------------------------------


def models(folder: Path) -> Iterator[Written]:
    """Baked, as an anchor, and as a reward."""
    baked = folder / "baked"
    bake(digits.load_pipeline(), digits.anchor_path(500.0), 0.5, baked, images=0)
    load: Callable[[], object] = lambda: load_pipeline(str(baked), dtype=torch.float32)  # noqa: E731
    for name, weight in (("baking.json", 2), ("model_index.json", 2), ("unet/config.json", 2)):
        yield Written(f"a pipeline's {name}", baked / name, load, "json", weight, baked)
    weights = baked / "unet" / "diffusion_pytorch_model.safetensors"
    yield Written("a pipeline's weights", weights, load, "tensors", 2, baked)
    old = folder / "old"
    shutil.copytree(baked, old)
    (old / "baking.json").unlink()
    load_old: Callable[[], object] = lambda: load_pipeline(str(old), dtype=torch.float32)  # noqa: E731
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json"):
        yield Written(f"a plain pipeline's {name}", old / name, load_old, "json", 1, old)

    anchor = folder / "anchor"
    shutil.copytree(digits.anchor_path(500.0), anchor)
    load_it: Callable[[], object] = lambda: load_anchor(anchor, pipe())  # noqa: E731
    yield Written("an anchor's config.json", anchor / "config.json", load_it, "json", 2, anchor)
    weights = next(anchor.glob("*.safetensors"))
    yield Written("an anchor's weights", weights, load_it, "tensors", 2, anchor)

    from deradiff import rewards

    for name, write in (("clip", written_clip), ("aesthetic", written_predictor)):
        place = folder / name
        place.mkdir()
        write(place)
        spec = f"{name}={place}"
        score: Callable[[], object] = lambda spec=spec: rewards.load(spec)  # type: ignore[misc]  # noqa: E731
        yield Written(f"a reward's config.json ({name})", place / "config.json", score, "json", 2, place)
        yield Written(f"a reward's weights ({name})", place / "model.safetensors", score, "tensors", 2, place)


# -- databases ---------------------------------------------------------------------------------------------------------


def databases(folder: Path) -> Iterator[Written]:
    """Of an experiment and of a study."""
    with small_study.begun(folder) as opened:
        for _ in range(2):
            key = opened.begin().result()
            shown = opened.current(key)
            assert shown is not None
            opened.vote(key, shown.id, small_study.answers()).result()
    out = folder / "experiment"
    evaluator = object.__new__(PointEvaluator)
    evaluator.space = spaces.lam("strong")
    with Store(out) as store:
        store.begin({"versions": {}, "plan": "small"})
        store.put_scores("features", "x", [(image, np.ones(3), None) for image in store.drawn().values()])
        store.remember(search.FACT, {"identity": "it", "points": [[0.5], [1.0]]})

    def read() -> None:
        with study_sources.opened(out) as (planned, store):
            found = results.Results(planned, store)
            for arm in found.arms:
                found.measured(arm), found.path_kl(arm, "few"), found.seconds(arm), found.mean(arm, "few", "digits")
            list(experiment_export.rows(planned, store))
            store.features("x"), store.batches(), store.known(), search._known(store, evaluator, "it")

    def read_study() -> None:
        planned = votes.plan_of(folder / "study")
        found = ballots.read(folder / "study", planned)
        ballots.mistakes(found)
        ballots.write_csv(found, folder / "study" / "votes.csv")

    for form in ("cells", "sqlite"):
        yield Written(f"an experiment's store ({form})", out / "store.sqlite", read, form, 6, out)
        study = folder / "study" / "study.sqlite"
        yield Written(f"a study's votes ({form})", study, read_study, form, 6, folder / "study")


MAKERS: tuple[Maker, ...] = (
    plans,
    records,
    checkpoints,
    alignments,
    samples,
    builds,
    comparisons,
    models,
    databases,
)


def written(folder: Path, makers: tuple[Maker, ...] = MAKERS) -> list[Written]:
    """A file of every kind, in folders under `folder`; each can be read as it is."""
    found = []
    for make in makers:
        place = folder / make.__name__
        place.mkdir(parents=True)
        found += list(make(place))
    return found


# -- damage ------------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    [],
    {},
    None,
    True,
    False,
    "",
    0,
    -1,
    1e308,
    -0.5,
    10**400,
    10**19,
    2**63,
    float("nan"),
    float("inf"),
    "NaN",
    "1",
    [[]],
    [{}],
    {"": {}},
    [None],
    "x" * 5000,
    "\x00",
    "\x1b[31m",
    "../../x",
    "🙂",
    ["a"],
    [1.5],
    {"a": 1},
    1,
    3,
)


def damaged(content: bytes, form: str, random: random.Random) -> bytes:
    """The content of a file with something wrong in it."""
    if form in ("json", "yaml", "text") and random.random() < 0.7:
        return _damaged_text(content.decode(), form, random)
    return _damaged_bytes(content, random)


def _damaged_bytes(content: bytes, random: random.Random) -> bytes:
    match random.randrange(5):
        case 0:
            return content[: random.randrange(len(content))]
        case 1:
            return b""
        case 2:
            place = random.randrange(len(content))
            return content[:place] + random.choice([b"\xff", b"\x00", b"\xc3", b"[[", b"}"]) + content[place:]
        case 3:  # in the beginning, where headers are
            place = random.randrange(min(400, len(content)))
            return content[:place] + bytes([random.randrange(256)]) + content[place + 1 :]
    changed = bytearray(content)
    for _ in range(random.randrange(1, 9)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _damaged_text(text: str, form: str, random: random.Random) -> bytes:
    import yaml

    lines = form == "json" and text.count("\n") > 1 and text.startswith("{") and not text.startswith("{\n")
    content = (
        [json.loads(line) for line in text.splitlines()]
        if lines
        else (json.loads(text) if form == "json" else yaml.safe_load(text))
    )
    match random.randrange(8):
        case 0:
            depth = random.choice([200, 5000, 100_000])
            return (random.choice(["[", '{"a":', "- "]) * depth).encode()
        case 1:
            return json.dumps(random.choice(ODD)).encode()
        case 2:
            deep: Any = 1
            for _ in range(random.choice([70, 300])):
                deep = [deep]
            content = replaced(content, deep, random)
        case _:
            for _ in range(random.randrange(1, 3)):
                content = replaced(content, random.choice(ODD), random)
    if lines and isinstance(content, list):
        return "\n".join(json.dumps(row) for row in content).encode()
    return json.dumps(content).encode()  # which is YAML as well


def replaced(content: Any, odd: Any, random: random.Random) -> Any:
    """Plain data with one of its parts replaced by another, removed, or beside another."""
    if not isinstance(content, dict | list) or not content or random.random() < 0.1:
        return odd
    copy = dict(content) if isinstance(content, dict) else list(content)
    place = random.choice(list(copy)) if isinstance(copy, dict) else random.randrange(len(copy))
    match random.randrange(6):
        case 0:
            del copy[place]
        case 1 if isinstance(copy, dict):
            copy[random.choice(["other", "", "\x1b", "extra"])] = odd
        case 1 if isinstance(copy, list):
            copy.insert(place, odd)
        case 2:
            copy[place] = odd
        case _:
            copy[place] = replaced(copy[place], odd, random)
    return copy


def damaged_picture(path: Path, random: random.Random) -> None:
    """Another text, or something else, in the chunk that holds an image's settings."""
    about = replaced(read_png(path), random.choice(ODD), random)
    with Image.open(path) as opened:
        image = opened.copy()
    if random.random() < 0.7:
        write_png(path, image, about)
        return
    from PIL import PngImagePlugin

    info, text = PngImagePlugin.PngInfo(), random.choice(["[]", "", "{", "[" * 100_000, "x" * 3_000_000, "null"])
    if random.random() < 0.5:
        info.add_text("deradiff", text, zip=random.random() < 0.7)
    else:
        info.add_itxt("deradiff", text, zip=random.random() < 0.7)
    image.save(path, format="PNG", pnginfo=info)


def damaged_cell(path: Path, random: random.Random) -> None:
    """Another value in one cell of a database."""
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
        table = random.choice([name for name in tables if db.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0]])
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        column = random.choice(columns)
        cells = [row[0] for row in db.execute(f"SELECT {column} FROM {table}")]
        cell = random.choice(cells)
        value: Any = random.choice([None, "", b"\xff\x00", 1, -1, 2**62, 1.5, "x", "[]", "[" * 5000, "{}", "null"])
        if isinstance(cell, str) and cell.startswith(("[", "{")) and random.random() < 0.7:
            value = _damaged_text(cell, "json", random).decode("utf-8", "surrogateescape")
        with suppress(sqlite3.Error, UnicodeError):  # what the tables themselves do not allow
            db.execute(f"UPDATE OR IGNORE {table} SET {column} = ? WHERE {column} IS ?", (value, cell))


def damage(file: Written, random: random.Random) -> None:
    """Put something wrong into a file."""
    if file.form == "cells":
        damaged_cell(file.path, random)
    elif file.form == "chunk":
        damaged_picture(file.path, random)
    else:
        file.path.write_bytes(damaged(file.content, file.form, random))


def is_sentence(error: BaseException) -> bool:
    """Whether a command says this error as a sentence (`cli.talking.refusing_wrong_input`), in words of ours."""
    if isinstance(error, UnicodeError | json.JSONDecodeError):
        return False
    ours = type(error).__module__.startswith("deradiff.")
    return bool(str(error).strip()) and (ours or isinstance(error, ValueError | OSError | ImportError))
