"""Rewards that read the digits' captions, against the classifier they follow and against paint."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image

from deradiff.rewards import load
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.caption_rewards import ColourReward, LegibleReward, machine, margins
from deradiff.worlds.digits.classifier import features, read, recover_ink_map, svm
from deradiff.worlds.digits.data import INKS, PAPERS, render
from messages import naming


def asked(digit: int, ink: int | None = None, paper: int | None = None) -> str:
    return captions.caption(
        captions.Parts(digit, None if ink is None else list(INKS)[ink], None if paper is None else list(PAPERS)[paper])
    )


def test_margins_are_those_of_scikit_learn() -> None:
    maps = features(recover_ink_map(render("held-out", 60, seed=3).images))
    contests = svm()
    before = contests.decision_function_shape
    try:
        contests.decision_function_shape = "ovo"
        expected = torch.from_numpy(contests.decision_function(maps.numpy().astype("float64")))
    finally:
        contests.decision_function_shape = before
    assert len(machine().contestants) == expected.shape[1] == 45
    assert torch.allclose(margins(maps), expected, atol=1e-9)


def test_legibility_tells_the_digit_that_is_there_from_the_others() -> None:
    pictures = render("held-out", 200, seed=4)
    right = LegibleReward()(pictures.images, [asked(int(d)) for d in pictures.digits])
    wrong = LegibleReward()(pictures.images, [asked((int(d) + 3) % 10) for d in pictures.digits])
    seen = read(pictures.images).digits == pictures.digits
    assert right[seen].mean() > 0.95 and wrong.mean() < 0.7 and ((right > wrong) == seen).float().mean() > 0.97
    assert right.min() >= 0 and right.max() <= 1


def test_colours_agree_with_the_paint_and_open_ones_count_nothing() -> None:
    pictures = render("held-out", 120, seed=5)
    seen = read(pictures.images)

    def score(text: Callable[[int, int, int], str]) -> torch.Tensor:
        rows = zip(pictures.digits.tolist(), seen.inks.tolist(), seen.papers.tolist(), strict=True)
        return ColourReward()(pictures.images, [text(*row) for row in rows])

    both = score(lambda d, i, p: asked(d, i, p))
    assert both.mean() > 0.9 and both.max() <= 1
    other_ink, other_both = (
        score(lambda d, i, p: asked(d, (i + 1) % 6, p)),
        score(lambda d, i, p: asked(d, (i + 2) % 6, (p + 2) % 5)),
    )
    assert (other_ink < both).all() and (other_both < other_ink).float().mean() > 0.95 and other_both.mean() < 0.1
    assert torch.equal(score(lambda d, i, p: asked(d)), torch.ones(120))
    alone = score(lambda d, i, p: asked(d, None, p)) + score(lambda d, i, p: asked(d, i))
    assert torch.allclose(alone / 2, both, atol=1e-6)


@pytest.mark.parametrize("reward", [LegibleReward(), ColourReward()])
def test_scores_rise_along_their_gradient(reward: LegibleReward | ColourReward) -> None:
    pictures = render("held-out", 16, seed=6)
    prompts = [asked((int(d) + 1) % 10, 0, 0) for d in pictures.digits]
    # Flat colours tie in every median, and where pixels tie nothing is differentiable.
    noise = 0.02 * torch.randn(16, 3, 32, 32, dtype=torch.float64)
    images = (0.8 * pictures.images.double() + 0.1 + noise).requires_grad_(True)
    before = reward(images, prompts)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    # Finite differences along the gradient itself.
    step = 1e-6 / gradient.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, 1, 1, 1)
    rise = (reward(images + step * gradient, prompts) - reward(images - step * gradient, prompts)) / 2e-6
    slope = gradient.flatten(1).norm(dim=1)
    # One or two of the sixteen may stand at a kink of a median.
    assert torch.isclose(rise, slope, rtol=1e-3, atol=1e-6).sum() >= 14


@pytest.mark.parametrize("reward", [LegibleReward(), ColourReward()])
def test_wrong_prompts_are_named(reward: LegibleReward | ColourReward) -> None:
    images = render("held-out", 2, seed=6).images
    with pytest.raises(ValueError, match=naming(2, "images", 1, "prompts")):
        reward(images, ["a seven"])
    with pytest.raises(ValueError, match=naming("'a cat'")):
        reward(images, ["a seven", "a cat"])


@pytest.mark.parametrize("name", ["digits", "bold", "ink", "legible", "colours"])
def test_what_is_no_picture_of_the_digits(name: str) -> None:
    reward, picture = load(name), render("held-out", 1, seed=7).images
    assert reward(torch.full_like(picture, torch.nan), ["a seven"]).isnan().all()
    assert reward(torch.full_like(picture, torch.nan), ["a red seven on white paper"]).isnan().all()
    assert reward(picture.half(), ["a seven"]).dtype == torch.float32
    with pytest.raises(ValueError, match=naming([0, 1])):
        reward(2 * picture - 1, ["a seven"])
    with pytest.raises(ValueError, match="no images"):
        reward([], [])
    with pytest.raises(ValueError, match="size"):
        reward([Image.new("RGB", (32, 32)), Image.new("RGB", (16, 16))], ["a seven", "a two"])


@pytest.mark.parametrize("name", ["digits", "bold", "ink", "legible", "colours"])
def test_pil_images_score_what_their_tensor_does(name: str) -> None:
    pictures = render("held-out", 3, seed=7)
    levels = (pictures.images * 255).round().to(torch.uint8)
    files = [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in levels]
    reward, prompts = load(name), [asked(int(d), 1, 2) for d in pictures.digits]
    assert torch.allclose(reward(files, prompts), reward(levels / 255, prompts), atol=1e-5)
