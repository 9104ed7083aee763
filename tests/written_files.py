"""Every kind of file that a command reads back: a valid one by its real writer, and the function that reads it.

For the tests that damage them (`damaging`), and for `benchmarks/attack_files.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import small_study
from deradiff import bake
from deradiff.alignment.training import LossCurve
from deradiff.anchors import load_anchor
from deradiff.experiments import export as experiment_export
from deradiff.experiments import plan, results
from deradiff.experiments.store import Store
from deradiff.files.folders import RunFolder, begin_or_resume
from deradiff.files.records import read_png, versions
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
from deradiff.sweep.pipelines import load_pipeline
from deradiff.sweep.settings import Column, Settings
from deradiff.worlds import digits
from restorable import Maker, Written, pipe
from small_clip import written as written_clip
from small_clip import written_predictor
from small_experiment import SMALL, silent
from studies.closed_forms import comparison
from studies.closed_forms.cases import Case
from studies.digits import anchors, export, truth, truth_files, truth_models, truth_report
from studies.digits.settings import Settings as BuildSettings
from written_alignments import alignments, checkpoints, samples

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
