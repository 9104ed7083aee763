"""Workers and executors: real images of the digits, by this process, by several, and by Ray; and workers that die."""

import copy
import os
import signal
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deradiff
from deradiff.algorithm.schedules import taking_turns
from deradiff.experiments import executors, running
from deradiff.experiments.drawings import drawing_of, planned_images
from deradiff.experiments.plan import Plan
from deradiff.experiments.results import Results
from deradiff.experiments.store import Store
from deradiff.experiments.worker import Done, Draw, Score, Worker, _pixels
from deradiff.rewards import load
from deradiff.sweep.description import Drawing
from deradiff.sweep.pipelines import scheduler_like
from deradiff.sweep.prompt_embeddings import Remembering
from deradiff.sweep.workers import Todo, WorkerLost, work
from deradiff.worlds import digits
from messages import naming
from small_experiment import SMALL, Fake, fake_png, files, silent, small

ALL_METHODS = [
    {"method": "reference"},
    {"method": "model"},
    {"method": "realign", "anchors": ["strong"], "targets": ["weak"]},
    {"method": "realign", "anchors": ["strong"], "lam": [0.5], "particles": 2},
    {"method": "combine", "lams": [{"strong": 0.3, "weak": 0.3}]},
    {"method": "anneal", "anchors": ["strong"], "schedules": ["power:2"]},
    {"method": "interpolate", "anchors": ["strong"], "lam": [0.5]},
    {"method": "soup", "lams": [{"strong": 0.3, "weak": 0.3}]},
    {"method": "db-mpa-ls", "lams": [{"strong": 0.3, "weak": 0.3}]},
    {"method": "optimize-noise", "reward": "digits", "iterations": 1},
    {"method": "doodl", "reward": "digits", "iterations": 1, "steps": 2},
    {"method": "das", "reward": "digits", "beta": [0.5], "particles": 2},
    {"method": "mpgd", "reward": "digits", "beta": [0.5]},
]


def pipeline() -> Any:
    pipe = digits.load_pipeline()
    pipe.scheduler = scheduler_like(pipe.scheduler, "euler-a")
    return pipe


def draw(plan: Plan, drawings: list[Drawing]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    done = Worker(plan).do(Draw(0, tuple(drawings), tuple(range(len(drawings)))))
    return [(_pixels(png), told) for png, told in done.results]


def plainly(pipe: Any, drawing: Drawing) -> torch.Tensor:
    """What a person would write."""
    image = pipe(
        [drawing.prompt],
        generator=[torch.Generator().manual_seed(drawing.seed)],
        num_inference_steps=3,
        guidance_scale=1.0,
    ).images[0]
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)


ONE_LEVEL = 1.01 / 255
"""Another batch rounds sums otherwise, and a picture's levels with them."""


def test_images_are_those_of_the_pipeline_itself() -> None:
    plan = small(methods=ALL_METHODS)
    arms = {arm.name: arm for arm in plan.arms()}
    of = {name: drawing_of(plan, arms[name], "the digit three", 5) for name in arms}
    pipe = pipeline()
    (reference, told), *_ = draw(plan, [of["reference"]])
    assert told == {}
    assert (reference - plainly(pipe, of["reference"])).abs().max() <= ONE_LEVEL
    with deradiff.realign(pipe, digits.anchor_path(30), 30 / 500) as dial:
        by_hand = plainly(pipe, of["strong → weak"])
        weights = dial.importance_weights
    (mixed, told), *_ = draw(plan, [of["strong → weak"]])
    assert (mixed - by_hand).abs().max() <= ONE_LEVEL
    assert told["log_weight"] == pytest.approx(float(weights.log_weights), rel=1e-3)
    with deradiff.realign(pipe, digits.anchor_path(30), 0.5, method="interpolate"):
        by_hand = plainly(pipe, of["strong, weights at 0.5"])
    assert (draw(plan, [of["strong, weights at 0.5"]])[0][0] - by_hand).abs().max() <= ONE_LEVEL
    with deradiff.realign(pipe, digits.anchor_path(30), deradiff.schedules.Power(2)):
        by_hand = plainly(pipe, of["strong, power:2"])
    assert (draw(plan, [of["strong, power:2"]])[0][0] - by_hand).abs().max() <= ONE_LEVEL


def test_soups_are_sums_of_weights_and_turns_are_one_model_in_every_step() -> None:
    plan = small(methods=ALL_METHODS)
    arms = {arm.name: arm for arm in plan.arms()}
    paths = {"strong": digits.anchor_path(30), "weak": digits.anchor_path(500)}
    pipe = pipeline()
    with deradiff.realign(pipe, paths, dict.fromkeys(paths, 0.5)) as dial:
        models: dict[str, Any] = dict(dial.modules)
    models["reference"] = pipe.unet

    shares = {"reference": 0.4, "strong": 0.3, "weak": 0.3}
    states = {name: model.state_dict() for name, model in models.items()}
    pipe.unet = copy.deepcopy(pipe.unet)
    pipe.unet.load_state_dict({key: sum(w * states[name][key] for name, w in shares.items()) for key in states["weak"]})
    soup = drawing_of(plan, arms["soup, 0.3 strong + 0.3 weak"], "the digit three", 5)
    assert (draw(plan, [soup])[0][0] - plainly(pipe, soup)).abs().max() <= ONE_LEVEL

    turns = drawing_of(plan, arms["turns, 0.3 strong + 0.3 weak"], "the digit three", 2)
    taken = taking_turns({"strong": 0.3, "weak": 0.3}, 2)
    own = [next((name for name, turn in taken.items() if turn(i / 3)), "reference") for i in range(3)]
    assert len({*own}) > 1, "a seed of which models change"
    pipe.unet = models[own[0]]

    def change(pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe.unet = models[own[min(step + 1, 2)]]
        return tensors

    by_hand = pipe(
        [turns.prompt],
        generator=[torch.Generator().manual_seed(turns.seed)],
        num_inference_steps=3,
        guidance_scale=1.0,
        callback_on_step_end=change,
    ).images[0]
    drawn = draw(plan, [turns])[0][0]
    levels = torch.from_numpy(np.asarray(by_hand, dtype=np.float32) / 255).permute(2, 0, 1)
    assert (drawn - levels).abs().max() <= ONE_LEVEL


def test_a_model_alone_knows_its_path_kl_and_stays_what_it_is() -> None:
    plan = small()
    arm = next(arm for arm in plan.arms() if arm.name == "strong")
    drawing = drawing_of(plan, arm, "the digit three", 5)
    (watched, told), *_ = draw(plan, [drawing])
    (alone, nothing), *_ = draw(small(path_kl=False), [drawing])
    assert torch.equal(watched, alone)
    assert told["path_kl"] > 1 and told["log_weight"] == 0
    assert nothing["path_kl"] is None


def test_a_scorer_that_fails_is_asked_for_each_image() -> None:
    plan = small()
    good = fake_png(next(planned_images(plan, {"few": ("a",)})).drawing)
    task = Score("scores", "digits", (good, b"no picture", good), ("the digit one",) * 3)
    (first, none), (nothing, error), (last, _) = Worker(plan).do(task).results
    assert first == last and none is None
    assert nothing is None and error.startswith("ValueError")


def test_scores_are_those_of_the_reward() -> None:
    plan = small()
    cells = list(planned_images(plan, {"few": ("the digit one", "the digit two")}))[:3]
    pngs = tuple(fake_png(cell.drawing) for cell in cells)
    prompts = tuple(cell.drawing.prompt for cell in cells)
    found = [value for value, _ in Worker(plan).do(Score("scores", "bold", pngs, prompts)).results]
    assert found == pytest.approx(load("bold")(torch.stack([_pixels(png) for png in pngs]), prompts).tolist())


# -- prompt embeddings -------------------------------------------------------------------------------------------------


def test_prompts_are_encoded_once_and_as_the_pipeline_does() -> None:
    pipe, calls = digits.load_pipeline(), []
    own = pipe.encode_prompt

    def counted(prompt: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(prompt)
        return own(prompt, *arguments, **options)

    remembering = Remembering(counted)
    prompts = ["the digit one", "the digit two", "the digit one"]
    wanted = own(prompts, "cpu", 1, True, ["", "a negative", ""])
    found = remembering(prompts, "cpu", 1, True, ["", "a negative", ""])
    for theirs, mine in zip(wanted, found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert calls == ["the digit one", "the digit two"]
    remembering("the digit two", "cpu", 1, True, "a negative")
    assert len(calls) == 2
    remembering("the digit two", "cpu", 1, True, "another")
    assert len(calls) == 3


def test_what_has_no_rows_is_the_same_for_all_prompts() -> None:
    ids = torch.zeros(7, 3)
    remembering = Remembering(lambda prompt, **_: (torch.full((1, 7, 4), len(prompt)), None, ids))
    embeds, nothing, positions = remembering(prompt=["a", "bb"])
    assert embeds.shape == (2, 7, 4) and nothing is None and positions is ids


# -- executors ---------------------------------------------------------------------------------------------------------


def drawn_by(folder: Path, plan: Plan, executor: Any) -> running.Outcome:
    return running.run(plan, folder, lambda: executor, silent)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """All methods, by this process."""
    plan, folder = small(methods=ALL_METHODS), tmp_path_factory.mktemp("runs") / "here"
    drawn_by(folder, plan, executors.InProcess(plan, "cpu", 1))
    return plan, folder


def test_results_hold_what_was_drawn(here: tuple[Plan, Path]) -> None:
    plan, folder = here
    with Store(folder, write=False) as store:
        results = Results(plan, store)
        for arm in results.arms:
            assert results.done(arm) == (4, 4)
            table = results.scores(arm, "few", "digits")
            assert table.shape == (2, 2) and np.isfinite(table).all()
            path = results.image(arm, "few", 1, 0)
            assert path is not None
            score = load("digits")(_pixels(path.read_bytes())[None], ["the digit two"])
            assert table[1, 0] == pytest.approx(float(score), rel=1e-5)
        (pair,) = results.pairs()
        assert (pair.anchor, pair.target, pair.lam) == ("strong", "weak", 0.06)
        reference = results.reference
        assert reference is not None and (results.path_kl(reference, "few") == 0).all()
        strong, weak = (results.model(name) for name in ("strong", "weak"))
        assert strong is not None and weak is not None
        assert results.path_kl(strong, "few").mean() > results.path_kl(weak, "few").mean() > 0
        judged = results.verdict(strong, "few", "digits")
        assert judged is not None and judged.kind == "exact"


def test_processes_draw_the_same_bytes_and_are_replaced_when_they_die(here: tuple[Plan, Path], tmp_path: Path) -> None:
    plan, folder = here
    executor = executors.processes(plan, "cpu", 1, 2)
    killed: list[int] = []

    def report(stage: str, done: int, *_: Any) -> None:
        if stage == "drawing" and done and not killed:
            killed.extend(executor._pools[0]._processes)
            os.kill(killed[0], signal.SIGKILL)

    outcome = running.run(plan, tmp_path / "two", lambda: executor, report)
    assert killed and outcome.drawn == len(files(folder))
    assert files(tmp_path / "two") == files(folder)


def test_ray_draws_the_same_bytes_and_another_worker_does_what_a_dead_one_did_not(
    here: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    plan, folder = here
    made: list[Any] = []
    killed: list[int] = []

    def executor() -> Any:
        made.append(executors.RayActors(plan, "cpu", 1, 2, 0.0, None))
        return made[0]

    def report(stage: str, done: int, *_: Any) -> None:
        if stage == "drawing" and done and not killed:
            killed.append(ray.get(made[0]._actors[1].pid.remote()))
            os.kill(killed[0], signal.SIGKILL)

    outcome = running.run(plan, tmp_path / "ray", executor, report)
    assert killed and outcome.drawn == len(files(folder))
    assert files(tmp_path / "ray") == files(folder)
    assert not ray.is_initialized()


class Dying(Fake):
    """Loses its worker at every task that holds this prompt."""

    def result(self, ticket: int) -> Done:
        task = self._tasks[ticket]
        if isinstance(task, Draw) and task.drawings[0].prompt == "deadly":
            raise WorkerLost("worker 0 ended")
        return super().result(ticket)


def test_a_task_that_kills_every_worker_ends_the_run() -> None:
    plan = small()
    drawing = drawing_of(plan, plan.arms()[0], "deadly", 0)
    with pytest.raises(WorkerLost, match=naming("worker 0", 3)):
        list(work([Todo("a", lambda: Draw(0, (drawing,), (0,)))], Dying()))


class Two(Fake):
    """Two workers, and which of them got what."""

    def __init__(self) -> None:
        super().__init__(size=2)
        self.given: list[tuple[int, Any]] = []

    def submit(self, worker: int, task: Any) -> int:
        self.given.append((worker, task.name))
        return super().submit(worker, task)


def test_workers_keep_their_models_as_long_as_there_is_work_for_them() -> None:
    executor = Two()

    def todos() -> Iterator[Todo]:
        for group in ("a", "b"):
            for _ in range(6):
                yield Todo(group, lambda group=group: Score("scores", group, (), ()))  # type: ignore[misc]

    assert len(list(work(list(todos()), executor))) == 12
    changes = {worker: [name for to, name in executor.given if to == worker] for worker in (0, 1)}
    for names in changes.values():
        assert sum(one != other for one, other in pairwise(names)) <= 1
    assert changes[0][0] != changes[1][0]


def test_noise_has_a_guidance_of_its_own() -> None:
    noise = {"method": "optimize-noise", "reward": "digits", "iterations": 1}
    guided = SMALL["sampling"]["ancestral"] | {"guidance_scale": 0.5}  # which optimised noise cannot be sampled with
    alone = small(sampling={"plain": guided}, methods=[noise | {"guidance_scale": 1.0}])
    plain = small(methods=[noise])
    (own,), (as_sampled,) = (
        draw(plan, [drawing_of(plan, arm, "a red two", 3) for arm in plan.arms()]) for plan in (alone, plain)
    )
    assert torch.equal(own[0], as_sampled[0]) and own[1]["forward"] == as_sampled[1]["forward"]
    with pytest.raises(ValueError, match=naming("guidance_scale", 1)):
        small(sampling={"plain": guided}, methods=[noise])
