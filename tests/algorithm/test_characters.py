"""What kind of anchor it is, in worlds where the truth is a formula, and what a verdict then says."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from deradiff import realign
from deradiff.algorithm.characters import Character, CharacterKind, character_of
from deradiff.algorithm.estimates import Estimate
from deradiff.algorithm.pair_terms import PairTerms, pair_test
from deradiff.algorithm.path_weights import ImportanceWeights
from deradiff.algorithm.tilts import TiltTest, record, tilt_test
from deradiff.algorithm.verdict import verdict
from deradiff.worlds.gaussian_mixture import MixtureDenoiser, World, crossing
from messages import naming
from realigned_worlds import FAMILIES

LAMS = (0.0, 0.25, 0.5, 0.75, 1.0)


def world() -> World:
    """The crossing, with six prompts that each favour other modes."""
    shifts: list[list[float]] = [
        [1, -1, 0, 0],
        [-1, 1, 0, 0],
        [0, 0, 1, -1],
        [0, 0, -1, 1],
        [0.5, 0, 0.5, 0],
        [0, 0.5, 0, 0.5],
    ]
    own = crossing()
    return World(own.name, own.reference, own.rewards, {f"prompt {k}": row for k, row in enumerate(shifts)})


def drawn(anchor: MixtureDenoiser, family: str, images: int, steps: int) -> dict[str, Tensor]:
    """Samples of the world at five λ, from the same noise, with their log weights and path ratios."""
    own = world()
    pipe = own.pipeline(FAMILIES[family]())
    pipe.set_progress_bar_config(disable=True)
    names, rows = [*own.prompts], 6 * images
    noise = torch.randn(rows, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).repeat(len(LAMS), 1)
    chances = [torch.Generator().manual_seed(10 + row) for _ in LAMS for row in range(rows)]
    with realign(pipe, {"a": anchor}, {"a": [lam for lam in LAMS for _ in range(rows)]}) as dial:
        dial.watching = True
        x = pipe(names * len(LAMS), images, steps, generator=chances, latents=noise).images
        run = dial.importance_weights
    shape = (len(LAMS), 6, images)
    ratios = run.log_ratios.get("a", torch.zeros(len(x)))
    return {"x": x.double(), "log_weights": run.log_weights.view(shape), "log_ratios": ratios.view(shape)}


def found_of(
    anchor: MixtureDenoiser, reward: str = "slope", family: str = "DDPM", images: int = 48, steps: int = 50
) -> TiltTest:
    known = drawn(anchor, family, images, steps)
    scores = world().rewards[reward](known["x"]).view(len(LAMS), 6, images)
    return tilt_test(LAMS, scores, known["log_weights"], known["log_ratios"] if family == "DDPM" else None)


@pytest.mark.parametrize("family", ["DDPM", "DPM-Solver++"])
def test_an_exact_tilt_is_one_by_any_sampler(family):
    found = found_of(world().denoiser({"slope": 0.8}), family=family)
    assert found.answer == "yes", found
    assert found.tilt.value == pytest.approx(0.8, abs=3 * found.tilt.error + 0.04)
    for one in found.at if family == "DDPM" else ():
        assert one.slope is not None and one.slope.value == pytest.approx(0.8, abs=4 * one.slope.error + 0.05)
    assert character_of(found, None).kind == "tilt" and record(found)["answer"] == "yes"
    # The ends are what they are, whatever the weights say.
    assert found.at[0].weighted.value == pytest.approx(0) and found.at[-1].weighted.value == pytest.approx(1)


def made_up(tug: float, slopes: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> TiltTest:
    """Rewards that rise evenly in λ, weights that favour better images by `tug`, and path ratios of such slopes."""
    chance = torch.Generator().manual_seed(5)
    scores = 0.4 * torch.randn(3, 8, 32, generator=chance) + torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    log_weights = tug * scores * torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    ratios = scores * torch.tensor(slopes)[:, None, None] + 0.1 * torch.randn(3, 8, 32, generator=chance)
    return tilt_test((0.0, 0.5, 1.0), scores, log_weights, ratios)


def test_weights_that_leave_the_way_of_a_tilt_betray_an_anchor():
    assert made_up(0.0).answer == "yes"
    overshooting = made_up(3.0)
    assert overshooting.answer == "no" and overshooting.at[1].misfit.value > 0.3
    assert character_of(overshooting, None).kind == "unknown"
    assert character_of(overshooting, None, "draft").kind == "neither"


@pytest.mark.parametrize("slopes", [(8.0, 2.0, 1.0), (3.0, 1.0, -1.0)])
def test_slopes_that_differ_betray_an_anchor_whose_means_do_not(slopes):
    found = made_up(0.0, slopes)
    assert found.answer == "no" and "slope" in found.why
    assert [one.slope.value for one in found.at if one.slope] == pytest.approx(list(slopes), abs=0.1)


def test_weights_too_uneven_to_be_believed_tell_nothing():
    chance = torch.Generator().manual_seed(6)
    scores = 0.1 * torch.randn(3, 8, 32, generator=chance) + torch.tensor([0.0, 0.5, 1.0])[:, None, None]
    heavy = 9 * torch.randn(3, 8, 32, generator=chance) * torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    found = tilt_test((0.0, 0.5, 1.0), scores, heavy)
    assert found.answer == "open" and "uneven" in found.why


def test_a_reward_that_the_anchor_does_not_move_tells_nothing():
    chance = torch.Generator().manual_seed(2)
    same = torch.rand(1, 4, 9, generator=chance).expand(3, 4, 9)
    found = tilt_test((0.0, 0.5, 1.0), same, torch.zeros(3, 4, 9))
    assert found.answer == "open" and character_of(found, None).kind == "unknown"
    assert record(found)["tilt"] == [0.0, 0.0] and record(found)["at"][1]["weighted"] == [None, None]


def test_few_images_are_too_noisy():
    assert found_of(world().denoiser({"slope": 0.3}), images=8, steps=10).answer == "open"


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"lams": (0.0, 0.5)}, (0.0, 0.5)),
        ({"lams": (0.0, 1.0)}, (0.0, 1.0)),
        ({"scores": torch.full((3, 4, 9), 2.5)}, (2.5,)),
        ({"scores": torch.full((3, 4, 9), math.nan)}, ()),
        ({"scores": torch.rand(3, 2, 9), "log_weights": torch.zeros(3, 2, 9)}, (9, 2)),
        ({"scores": torch.rand(3, 4, 7), "log_weights": torch.zeros(3, 4, 7)}, (7, 4)),
    ],
)
def test_what_the_test_refuses(change, values):
    given: dict[str, Any] = {
        "lams": (0.0, 0.5, 1.0),
        "scores": torch.rand(3, 4, 9),
        "log_weights": torch.zeros(3, 4, 9),
    }
    with pytest.raises(ValueError, match=naming(*values) if values else ""):
        tilt_test(**(given | change))


# -- pairs ------------------------------------------------------------------------------------------------------------


def terms(linear: tuple[float, float], square: tuple[float, float], pairs: int = 400) -> PairTerms:
    """Terms whose `β l` and `½ β q` have these means and standard deviations at β = 100."""
    chance = torch.Generator().manual_seed(4)
    noise = torch.randn(2, 8, pairs, generator=chance, dtype=torch.float64)
    return PairTerms((linear[0] + linear[1] * noise[0]) / 100, 2 * (square[0] + square[1] * noise[1]) / 100)


WEAK, HACKED = ((0.5, 1.0), (0.0, 0.06)), ((0.16, 0.6), (-0.8, 1.1))
"""Much as pairs of the digits have them at β = 2000 and 30."""


def test_without_squares_the_distance_goes_as_one_over_beta():
    found = pair_test(terms(*WEAK), 100.0)
    assert found.answer == "yes" and found.square.value < 0.1
    for proportion in found.proportions.values():
        assert proportion.value == pytest.approx(1, abs=0.05)
    assert character_of(None, found).kind == "stepwise"
    assert character_of(None, found, "dpo").kind == "stepwise"
    assert character_of(None, found, "rwr").kind == "unknown"


def test_where_the_square_is_large_the_dial_falls_short():
    found = pair_test(terms(*HACKED), 100.0)
    assert found.answer == "no" and found.proportions[0.25].value > 1.3 and found.square.value > 1
    tilt = TiltTest("no", "no tilt", Estimate(1, 0.1), Estimate(1, 0.1), ())
    assert character_of(tilt, found, "dpo").kind == "neither"


def test_the_least_loss_is_found_where_it_is():
    one = terms(*WEAK)
    at = one.best(100.0)
    assert all(one.loss(at, 100.0) <= one.loss(at + away, 100.0) for away in (-0.02, 0.02, 1.0))


def test_pairs_that_the_anchor_does_not_prefer_are_said_to_be_anothers():
    found = pair_test(terms((0.0, 1.0), (0.0, 0.06)), 100.0)
    assert found.answer == "open" and "another" in found.why
    assert character_of(None, found).kind == "unknown"


@pytest.mark.parametrize(("beta", "pairs"), [(0.0, 400), (math.inf, 400), (100.0, 19)])
def test_pairs_that_tell_nothing_are_refused(beta, pairs):
    with pytest.raises(ValueError, match=naming(beta if pairs == 400 else pairs)):
        pair_test(terms(*WEAK, pairs=pairs), beta)
    with pytest.raises(ValueError, match="finite"):
        pair_test(PairTerms(torch.full((1, 30), math.nan), torch.zeros(1, 30)), 1.0)


# -- verdicts ---------------------------------------------------------------------------------------------------------


def run_of(log_weights: Tensor, lam: float = 0.5, **changes: Any) -> ImportanceWeights:
    known: dict[str, Any] = {
        "log_weights": log_weights.double(),
        "log_ratios": {},
        "path_kl": None,
        "memoryless": False,
        "lams": torch.full((1, len(log_weights)), lam),
        "obstacles": frozenset(),
        "predictions": 10,
    }
    return ImportanceWeights(**(known | changes))


def told(kind: CharacterKind | None, run: ImportanceWeights, x: Tensor) -> Any:
    character = None if kind is None else Character(kind, "so it was found")
    return verdict(run, x, baseline=-1.0, character=character)


def test_a_verdict_names_its_target_by_the_kind_of_anchor():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    off = run_of(0.1 * x)
    assert told(None, off, x).kind == "off" and "if the anchor is the optimum" in told(None, off, x).words
    tilt = told("tilt", off, x)
    assert tilt.kind == "off" and "if the anchor" not in tilt.words and "β/λ" in tilt.target
    plain = told("stepwise", off, x)
    assert (
        plain.kind == "plain" and plain.words.startswith("plain samples") and plain.record()["target"] == plain.target
    )
    for kind in ("neither", "unknown"):
        nothing = told(kind, off, x)
        assert nothing.kind == "no target" and nothing.words.startswith("no claim") and nothing.target == "none"


def test_what_both_readings_say_stands_for_an_unknown_anchor():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    even = run_of(1e-5 * x)
    kinds: list[CharacterKind] = ["tilt", "unknown", "stepwise", "neither"]
    assert [told(kind, even, x).kind for kind in kinds] == ["trust", "trust", "plain", "no target"]


def test_a_stepwise_anchor_needs_no_target_of_weights_but_a_lam_that_was_found_of():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert told("stepwise", run_of(0.1 * x, obstacles=frozenset({"guidance"})), x).kind == "plain"
    assert told("stepwise", run_of(0.1 * x, obstacles=frozenset({"annealing"})), x).kind == "no target"
    for lam in (-0.5, 0.1, 1.5):
        assert told("stepwise", run_of(0.1 * x, lam=lam), x).kind == "no target"
    assert told("neither", run_of(0.1 * x, lam=1.0), x).kind == "exact"


def test_a_character_is_one_anchors():
    x = torch.randn(40)
    with pytest.raises(ValueError, match=naming(2)):
        told("tilt", run_of(0.1 * x, lams=torch.full((2, 40), 0.25)), x)
