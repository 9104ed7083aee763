"""Images for pages: the same as the library's, cancelled at once, with what is known about them."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import deradiff
from deradiff.algorithm.schedules import Power
from deradiff.files.records import read_png
from deradiff.studio import drawing, html, scenes
from deradiff.studio import image_requests as desks
from deradiff.studio.drawing import DrawnImage, StepReport
from deradiff.studio.image_requests import Desk, Loading, UnscoredImages, Waiting
from deradiff.studio.jobs import Cancelled
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources
from deradiff.sweep.settings import Settings
from deradiff.worlds import digits
from messages import naming


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    desk = Desk(LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0))
    yield desk
    desk.close()
    assert not desk.folder.exists()


def scene(lam: float = 0.5, **changes: Any) -> Settings:
    return scenes.scene("digits", ["digits:100"], "a red seven", [lam], **{"steps": 8, **changes})


def last(news: Iterator[Any]) -> Any:
    *_, outcome = news
    return outcome


def by_hand(settings: Settings, lam: Any) -> Image.Image:
    pipe = digits.load_pipeline()
    deradiff.realign(pipe, digits.anchor_path(100), lam=lam)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        [settings.prompts[0]],
        num_inference_steps=settings.steps,
        guidance_scale=1.5,
        generator=[torch.Generator("cpu").manual_seed(settings.seeds[0])],
    ).images[0]


@pytest.mark.parametrize(("lam", "schedule"), [(0.0, None), (0.5, None), (1.0, None), (1.5, None), (0.8, Power(2))])
@pytest.mark.cases(2)
def test_the_exact_image_is_the_librarys(desk: Desk, lam: float, schedule: Power | None) -> None:
    settings = scene(lam, schedule=None if schedule is None else schedule.to_dict(), seed=3)
    [found] = last(desk.drawn("page", settings))
    expected = by_hand(settings, lam if schedule is None else schedule.scaled(lam))
    assert np.array_equal(np.asarray(found.image), np.asarray(expected))
    assert found.path_kl is None
    assert found.kind == ("exact" if lam in (0, 1) else "few" if 0 < lam < 1 and schedule is None else "no target")


def test_turning_the_dial_changes_the_image_and_its_scores(desk: Desk) -> None:
    low, high = (last(desk.drawn("page", scene(lam)))[0] for lam in (0.0, 1.0))
    assert np.abs(np.asarray(low.image, float) - np.asarray(high.image, float)).mean() > 1
    assert set(low.scores) == {"bold and vivid", "legible", "colours"}
    assert high.scores["bold and vivid"] > low.scores["bold and vivid"]
    from deradiff.worlds.digits.rewards import DigitsReward

    expected = float(DigitsReward()([high.image], ["a red seven"]))
    assert high.scores["bold and vivid"] == pytest.approx(expected)


def test_the_path_kl_is_known_at_every_lam_where_steps_draw_noise(desk: Desk) -> None:
    found = [last(desk.drawn("page", scene(lam, scheduler="ddpm")))[0].path_kl for lam in (0.0, 0.5, 1.0)]
    assert found[0] == 0 and 0 < found[1] < found[2]


@pytest.mark.parametrize(("scheduler", "evaluated"), [(None, 0), ("ddpm", 5)])
def test_a_model_without_weight_is_evaluated_only_for_the_path_kl(
    desk: Desk, scheduler: str | None, evaluated: int
) -> None:
    _, dial = desk.models.realigned(scene())
    calls: list[int] = []
    handle = dial.modules["anchor"].register_forward_hook(lambda *_: calls.append(1))
    try:
        last(desk.drawn("page", scene(0.0, scheduler=scheduler, steps=5)))
    finally:
        handle.remove()
    assert len(calls) == evaluated


def test_news_come_in_order_with_glimpses(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "OFTEN", 0.0)
    monkeypatch.setattr(drawing, "GLIMPSES", 1.0)
    fresh = Desk(LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0))
    news: list[Any] = list(fresh.drawn("page", scene(steps=30)))
    fresh.close()
    assert isinstance(news[0], Loading) and news[0].reference == "digits"
    steps = [what for what in news if isinstance(what, StepReport)]
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert all(step.total == 30 for step in steps)
    glimpses = [step.glimpse for step in steps if step.glimpse is not None]
    final = np.asarray(news[-1][0].image, float)
    assert len(glimpses) > 2 and glimpses[-1].size == news[-1][0].image.size
    away = [np.abs(np.asarray(glimpse, float) - final).mean() for glimpse in (glimpses[0], glimpses[-1])]
    assert away[1] < 10 and away[1] < away[0]  # a late glimpse is nearly the image
    after = news[max(i for i, what in enumerate(news) if isinstance(what, StepReport)) + 1 : -1]
    assert all(isinstance(what, UnscoredImages) for what in after)


def test_cancel_really_stops(desk: Desk) -> None:
    last(desk.drawn("page", scene()))
    calls = []
    denoiser = desk.models.realigned(scene())[0].unet
    handle = denoiser.register_forward_hook(lambda *_: calls.append(1))
    try:
        news = desk.drawn("page", scene(steps=200))
        for what in news:
            if isinstance(what, StepReport):
                break
        desk.pages.cancel("page")
        with pytest.raises(Cancelled) as stopped:
            list(news)
    finally:
        handle.remove()
    assert stopped.value.why == "cancelled" and 0 < len(calls) < 150
    [after] = last(desk.drawn("page", scene(0.5)))  # and what comes next is what it would have been
    assert np.array_equal(np.asarray(after.image), np.asarray(by_hand(scene(0.5), 0.5)))


def test_one_pages_cancel_does_not_stop_anothers_image(desk: Desk) -> None:
    results: dict[str, Any] = {}

    def ask(page: str) -> None:
        try:
            results[page] = list(desk.drawn(page, scene(steps=40, seed=len(page))))
        except Cancelled as stopped:
            results[page] = stopped

    threads = [threading.Thread(target=ask, args=(page,)) for page in ("mine", "others")]
    threads[0].start()
    while "mine" not in desk.pages._jobs:
        pass
    threads[1].start()
    while "others" not in desk.pages._jobs:
        pass
    desk.pages.cancel("mine")
    for thread in threads:
        thread.join(60)
    assert isinstance(results["mine"], Cancelled)
    assert isinstance(results["others"][-1][0], DrawnImage)
    expected = by_hand(scene(steps=40, seed=6), 0.5)
    assert np.array_equal(np.asarray(results["others"][-1][0].image), np.asarray(expected))


def test_who_waits_is_told(desk: Desk) -> None:
    from deradiff.studio.jobs import PageJob

    with desk.turns.taken(PageJob()):
        news = desk.drawn("waiting", scene())
        assert next(news) == Waiting(1)
    assert isinstance(last(news)[0], DrawnImage)


def test_a_newer_image_of_a_page_takes_the_place_of_the_last(desk: Desk) -> None:
    first = desk.drawn("page", scene(steps=200))
    next(first)
    second = last(desk.drawn("page", scene(1.0)))
    with pytest.raises(Cancelled) as stopped:
        list(first)
    assert stopped.value.why == "superseded" and isinstance(second[0], DrawnImage)


def test_an_image_waits_until_the_dial_rests(desk: Desk) -> None:
    last(desk.drawn("page", scene()))
    news = desk.drawn("page", scene(), rest=60)
    threading.Timer(0.1, desk.pages.cancel, ["page"]).start()
    with pytest.raises(Cancelled):
        list(news)


def test_previews_are_near_and_say_so(desk: Desk) -> None:
    settings = scenes.scene("digits", ["digits:100"], "a blue eight on white paper", [0.5])
    exact = np.asarray(last(desk.drawn("page", settings))[0].image, float)
    for how in ("steps", "carry"):
        [found] = last(desk.drawn("page", drawing.preview_of(settings, how), preview=True))
        assert found.scores == {}
        assert np.abs(np.asarray(found.image, float) - exact).mean() < 20
    assert found.kind == "approximate" and found.record["settings"]["tolerance"] == drawing.PREVIEW_TOLERANCE
    assert np.array_equal(np.asarray(last(desk.drawn("page", settings))[0].image, float), exact)


def test_the_file_holds_the_settings(desk: Desk) -> None:
    settings = scene(0.5, seed=9)
    [found] = last(desk.drawn("page", settings))
    file = desk.save(found.name, found.image, found.record)
    assert file.name == "000-a-red-seven-seed9-00-lam0.5.png" and file.is_relative_to(desk.folder)
    assert scenes.of_record(read_png(file)) == settings
    assert read_png(file)["beta"] == 200 and read_png(file)["scheduler"] == "DDIMScheduler"


def test_files_do_not_pile_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "MOST_FILES", 3)
    [found] = last(desk.drawn("page", scene(steps=1)))
    files = [desk.save(found.name, found.image, found.record) for _ in range(5)]
    assert [file.exists() for file in files] == [False, False, True, True, True]


def test_a_strip_has_an_image_for_every_lam(desk: Desk) -> None:
    lams = [0.0, 0.5, 1.0]
    strip = last(desk.drawn("page", drawing.strip_of(scene(), lams)))
    for lam, found in zip(lams, strip, strict=True):
        alone = by_hand(scene(lam), lam)
        assert np.abs(np.asarray(found.image, int) - np.asarray(alone, int)).max() <= 1
        assert scenes.of_record(found.record) == scene(lam)


def test_a_verdict_is_drawn_from_many_seeds(desk: Desk) -> None:
    said = last(desk.judged("page", scene(guidance_scale=1.0, scheduler="euler-a", steps=6)))
    assert said and not any("cannot tell: 1 image" in sentence for sentence in said)
    assert any(word in " ".join(said) for word in ("bold and vivid", "legible", "colours", "effective"))
    [guided] = last(desk.judged("page", scene(steps=4)))[:1]
    assert "cannot tell: weights too uneven" in guided


def test_out_of_memory_says_what_to_lower_and_the_studio_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    real = drawing.draw
    monkeypatch.setattr(drawing, "draw", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    with pytest.raises(MemoryError, match=r"width.*height.*λ.*--offload"):
        last(desk.drawn("page", drawing.strip_of(scene(), [0.0, 1.0])))
    monkeypatch.setattr(drawing, "draw", real)
    assert isinstance(last(desk.drawn("page", scene()))[0], DrawnImage)


def test_out_of_memory_while_scoring_leaves_the_image(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "scored", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
    [found] = last(desk.drawn("page", scene()))
    assert "out of memory while scoring" in str(found.scores["scores"])
    monkeypatch.setattr(drawing, "scored", lambda *_: (_ for _ in ()).throw(OSError("no such model")))
    [found] = last(desk.drawn("page", scene()))
    assert found.scores == {"scores": "none: no such model"}


def test_what_loading_warned_about_comes_with_the_image(desk: Desk) -> None:
    models = LoadedModels(Sources([digits.reference_path().parent]), MachineSettings(device="cpu"), lambda: 1.0)
    fresh = Desk(models)
    same = scenes.scene("digits", [str(digits.reference_path().resolve())], "a red seven", [0.5], steps=2)
    last(fresh.loaded("page", same))
    [found] = last(fresh.drawn("page", same))
    fresh.close()
    assert any("every λ gives the same images" in warning for warning in found.warned)
    assert last(desk.drawn("page", scene()))[0].warned == ()


def test_long_names_make_a_file_all_the_same(desk: Desk) -> None:
    from deradiff.sweep.settings import file_name

    names = {"a" * 111: "digits:100", "b" * 111: "digits:30"}
    settings = scene().model_copy(update={"anchors": names, "columns": (_column(dict.fromkeys(names, 0.5)),)})
    name = file_name(settings, 0)
    assert len(name.encode()) < 255 and name.endswith(".png")


def _column(lam: dict[str, float]) -> Any:
    from deradiff.sweep.settings import Column

    return Column(lam=lam)


def test_nan_is_an_error_in_words(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = desk.models.realigned(scene())
    weight = pipe.unet.conv_in.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        with pytest.raises(FloatingPointError, match=naming("reference", "NaN")):
            last(desk.drawn("page", scene()))
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert isinstance(last(desk.drawn("page", scene()))[0], DrawnImage)


def test_the_warm_up_makes_ready_and_keeps_its_errors_to_itself() -> None:
    fresh = Desk(LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0))
    fresh.warm_up(scene()).join(60)
    assert fresh.models.references == ["digits"] and set(fresh._rewards) == {"digits", "legible", "colours"}
    fresh.warm_up(scene(scheduler="flow-sde")).join(60)
    fresh.close()


# -- words ------------------------------------------------------------------------------------------------------------


def test_whatever_was_named_is_escaped(desk: Desk) -> None:
    prompt = "<img src=x onerror=alert(1)>\"'&"
    settings = scene().model_copy(update={"prompts": (prompt,)})
    [found] = last(desk.drawn("page", settings))
    markup = "".join(
        [
            html.facts(found),
            html.strip([found, found]),
            html.wrong(ValueError(prompt)),
            html.status(prompt),
            html.sides(prompt, prompt),
            html.judgement([prompt], settings, 16),
            html.meaning(0.5, None, prompt),
        ]
    )
    assert "<img" not in markup and "&lt;img src=x onerror" in markup


def test_lam_in_words() -> None:
    assert "strength β/λ = 200 (the anchor's β is 100)" in html.meaning(0.5, 100.0)
    assert "β/λ" not in html.meaning(0.5, None) and "β/λ" not in html.meaning(0.0, 100.0)
    assert "less regularised" in html.meaning(1.2, 100.0) and "regularised" not in html.meaning(1.2, None)
    assert "extrapolation" in html.meaning(1.2, None) and "extrapolation" in html.meaning(1.2, 100.0)
    assert "extrapolation" not in html.meaning(1.0, 100.0)
    assert "β/λ" not in html.meaning(0.5, 100.0, annealed=True)  # an annealed λ stands for no strength


def test_a_score_that_there_is_not_is_said_and_the_others_stand(desk: Desk) -> None:
    [found] = last(desk.drawn("page", scene().model_copy(update={"prompts": ("a cat",)})))
    assert isinstance(found.scores["bold and vivid"], float)
    assert "is not a caption of the digits" in str(found.scores["legible"])
    assert "a caption of the digits" in html.facts(found)
    said = last(desk.judged("page", scene(steps=3).model_copy(update={"prompts": ("a cat",)})))
    assert said and "caption" not in said[0]
