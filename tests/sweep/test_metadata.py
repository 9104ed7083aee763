"""What the file of an image says decided it: the same words from every command, read back by the studio."""

import json
from typing import Any

import pytest

from deradiff.algorithm.schedules import Power
from deradiff.experiments.drawings import drawing_of
from deradiff.studio import scenes
from deradiff.sweep.description import Drawing, SamplingSettings, about, metadata
from deradiff.sweep.settings import Column, Settings
from messages import naming
from small_experiment import small

SWEEP = Settings(
    reference="digits",
    anchors={"a": "digits:100", "b": "digits:500"},
    prompts=("the digit three", "the digit five"),
    columns=(
        Column(lam={"a": 0.5, "b": 0.2}),
        Column(lam={"a": 0.1, "b": 0.9}, schedule=Power(2, over="time").to_dict()),
    ),
    seeds=(0, 7),
    scheduler="euler-a",
    steps=4,
    guidance_scale=3.0,
    negative_prompt="blå",
    width=64,
    height=64,
)


def written(drawing: Drawing) -> dict[str, Any]:
    """What comes back from a file."""
    return json.loads(json.dumps(metadata(drawing)))


def test_the_settings_in_an_image_draw_it_alone() -> None:
    for drawing in SWEEP.drawings:
        assert Settings.model_validate(written(drawing)["settings"]).drawings == [drawing]


def test_the_studio_shows_an_image_of_a_sweep_and_one_of_an_experiment() -> None:
    for drawing in SWEEP.drawings:
        shown = scenes.of_record(written(drawing))
        assert (*shown.prompts, *shown.seeds) == (drawing.prompt, drawing.seed)
        assert dict(zip(shown.anchors.values(), scenes.strengths(shown), strict=True)) == dict(
            zip(drawing.sources, dict(drawing.anchors).values(), strict=True)
        )
        assert scenes.curve(shown) == drawing.schedule
        assert shown.negative_prompt == "blå" and (shown.width, shown.steps) == (64, 4)
    plan = small(methods=[{"method": "realign", "anchors": ["strong"], "lam": [0.5]}])
    shown = scenes.of_record(written(drawing_of(plan, plan.arms()[0], "the digit one", 5)))
    assert (shown.reference, shown.anchors, shown.scheduler) == ("digits", {"anchor": "digits:30"}, "euler-a")
    assert (shown.prompts, shown.seeds, scenes.strengths(shown)) == (("the digit one",), (5,), [0.5])


@pytest.mark.parametrize(
    ("method", "what"),
    [
        ({"method": "interpolate", "anchors": ["strong"], "lam": [0.5]}, "weights"),
        ({"method": "realign", "anchors": ["strong"], "lam": [0.5], "particles": 2}, "particles"),
        ({"method": "optimize-noise", "reward": "digits"}, "noise"),
        ({"method": "reference"}, "anchors"),
    ],
)
def test_the_studio_refuses_what_it_cannot_draw(method: dict[str, Any], what: str) -> None:
    plan = small(methods=[method])
    with pytest.raises(ValueError, match=what):
        scenes.of_record(written(drawing_of(plan, plan.arms()[0], "the digit one", 5)))


OF_VERSION_0_1 = json.loads("""
{
 "beta": null,
 "device": "cpu",
 "dtype": "float32",
 "guidance_scale": 1.5,
 "lam": {
  "a": 0.5,
  "b": 0.2
 },
 "log_weight": -73.09346008300781,
 "mixed": "prediction",
 "prompt": "the digit three",
 "schedule": null,
 "scheduler": "DDIMScheduler",
 "seed": 0,
 "settings": {
  "allow_pickle": false,
  "anchor_beta": null,
  "anchor_revision": null,
  "anchors": {
   "a": "digits:100",
   "b": "digits:500"
  },
  "batch_size": 3,
  "columns": [
   {
    "lam": {
     "a": 0.5,
     "b": 0.2
    },
    "schedule": null
   },
   {
    "lam": {
     "a": 0.1,
     "b": 0.9
    },
    "schedule": null
   }
  ],
  "device": "cpu",
  "dtype": "auto",
  "guidance_scale": null,
  "height": null,
  "method": "mixture",
  "negative_prompt": null,
  "offload": false,
  "particles": null,
  "path": "auto",
  "prompts": [
   "the digit three",
   "the digit five"
  ],
  "reference": "digits",
  "reuse": null,
  "revision": null,
  "scheduler": null,
  "seeds": [
   0
  ],
  "steps": 4,
  "tolerance": null,
  "width": null
 }
}
""")
"""Of an image of a sweep, whose settings are those of the whole sweep."""


def test_an_image_of_version_0_1_is_read() -> None:
    shown = scenes.of_record(OF_VERSION_0_1)
    assert (shown.prompts, shown.seeds) == (("the digit three",), (0,))
    assert list(shown.anchors.values()) == ["digits:100", "digits:500"] and scenes.strengths(shown) == [0.5, 0.2]


def test_a_list_names_one_lam_as_a_number_and_several_by_name() -> None:
    alone = Drawing("a", 1, SamplingSettings(), "digits", (("x", 0.3),), ("digits:30",))
    assert about(alone) == {"prompt": "a", "seed": 1, "lam": 0.3, "schedule": None}
    assert about(SWEEP.drawings[0])["lam"] == {"a": 0.5, "b": 0.2}


@pytest.mark.parametrize("lam", [0.5, {"a": 0.5}, {"a": 0.5, "b": 0.5, "c": 0.5}])
def test_every_anchor_has_a_lam(lam: Any) -> None:
    with pytest.raises(ValueError, match=naming("λ", "a, b", lam)):
        SWEEP.model_copy(update={"columns": (Column(lam=lam),)}).drawings  # noqa: B018
