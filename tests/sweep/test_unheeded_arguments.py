"""An argument that does not apply is refused, in the library, in plans and by every command."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from typer.testing import CliRunner

import deradiff
import tiny
from deradiff import baking
from deradiff.alignment.sampling import SamplerSettings
from deradiff.alignment.training import TrainingPlan
from deradiff.anchors import AnchorError
from deradiff.baking import Distillation, Sampler
from deradiff.cli import app, arguments
from deradiff.study.plan import parse_plan as parse_study
from deradiff.sweep import batches, notation
from deradiff.sweep.fingerprints import fingerprint
from deradiff.sweep.pipelines import load_pipeline
from deradiff.sweep.settings import Column, Settings
from messages import naming
from programs import invoked
from small_experiment import SMALL, small
from small_study import data as study_data

pytestmark = pytest.mark.attack("an argument that does not apply is dropped")


# -- plans and settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"methods": [{"method": "realign", "lam": [True]}]}, ["lam.0", True]),
        ({"methods": [{"method": "realign", "lam": True}]}, ["lam.0", True]),
        ({"methods": [{"method": "realign", "lam": ["0.5"]}]}, ["lam.0", "'0.5'"]),
        ({"methods": [{"method": "realign", "lam": [10**400]}]}, ["lam.0", "1" + "0" * 55]),
        ({"methods": [{"method": "combine", "lams": [{"strong": True, "weak": 0.5}]}]}, ["lams.0.strong", True]),
        ({"batch_size": 4.0}, ["batch_size", 4.0]),
        ({"batch_size": "4"}, ["batch_size", "'4'"]),
        ({"batch_size": True}, ["batch_size", True]),
        ({"path_kl": 1}, ["path_kl", 1]),
        ({"allow_pickle": "yes"}, ["allow_pickle", "'yes'"]),
        ({"sampling": {"x": {"steps": 3.0}}}, ["sampling.x.steps", 3.0]),
        ({"sampling": {"x": {"width": 64}}}, ["sampling.x", "width", "height"]),
        ({"sampling": {"x": {"height": 64}}}, ["sampling.x", "height", "width"]),
        ({"sampling": {"x": {"guidance_scale": -1.0}}}, ["sampling.x.guidance_scale", -1.0]),
        ({"sampling": {"x": {"guidance_scale": math.nan}}}, ["sampling.x.guidance_scale", "nan"]),
        ({"models": {"strong": {"source": "digits:30", "beta": "30"}}}, ["models.strong.beta", "'30'"]),
        ({"models": {"": {"source": "digits:30"}}}, ["models..[key]", "''"]),
        ({"prompts": {"few": {"prompts": ["a"], "seeds": [True]}}}, ["prompts.few.seeds", True]),
        ({"prompts": {"few": {"prompts": ["a"], "seeds": [1.0]}}}, ["prompts.few.seeds", 1.0]),
        ({"prompts": {"few": {"prompts": ["a"], "seeds": None}}}, ["prompts.few.seeds", None]),
        ({"prompts": {"few": {"prompts": ["a"], "seeds": {"a": 1}}}}, ["prompts.few.seeds", {"a": 1}]),
        ({"prompts": {"few": {"prompts": ["a", "b"], "count": 1}}}, ["prompts.few", "count", "draw_seed", "split"]),
        ({"prompts": {"few": {"prompts": ["a"], "draw_seed": 1}}}, ["prompts.few", "count", "draw_seed", "split"]),
        ({"prompts": {"few": {"prompts": ["a"], "split": "test"}}}, ["prompts.few", "count", "draw_seed", "split"]),
        ({"prompts": {"few": {"prompts": [" "]}}}, ["prompts.few", "empty"]),
        (
            {
                "methods": [{"method": "optimize-noise", "reward": "digits"}],
                "sampling": {"x": {"negative_prompt": "ugly"}},
            },
            ["negative_prompt", "'x'"],
        ),
        (
            {
                "methods": [{"method": "optimize-noise", "reward": "digits"}],
                "sampling": {"x": {"width": 64, "height": 32}},
            },
            ["width", "height", "'x'"],
        ),
        (
            {"methods": [{"method": "optimize-noise", "reward": "digits"}], "sampling": {"x": {"guidance_scale": 0.0}}},
            ["guidance_scale", 1, "'x'"],
        ),
    ],
)
def test_a_plan_takes_no_value_of_another_kind(changes: dict[str, Any], values: list[Any]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        small(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"pairs_per_participant": 3.0},
        {"attention_checks": True},
        {"mistakes_allowed": "0"},
        {"configurations": [{**study_data()["configurations"][0], "seeds": [True] * 9}]},
    ],
)
def test_a_study_takes_no_value_of_another_kind(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=naming(*changes)):
        parse_study(study_data() | changes, "it")


USUAL: dict[str, Any] = {
    "reference": "digits",
    "anchors": {"anchor": "digits:100"},
    "prompts": ("a",),
    "columns": (Column(lam=0.5),),
    "seeds": (0,),
}


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"width": 64}, ["width", "height", 64]),
        ({"height": 64}, ["height", "width", 64]),
        ({"guidance_scale": math.nan}, ["guidance_scale", "nan"]),
        ({"guidance_scale": math.inf}, ["guidance_scale", "inf"]),
        ({"guidance_scale": -0.5}, ["guidance_scale", -0.5]),
        ({"steps": 3.0}, ["steps", 3.0]),
        ({"seeds": (True,)}, ["seeds.0", True]),
        ({"columns": ({"lam": True},)}, ["columns.0.lam", True]),
        ({"columns": ({"lam": math.nan},)}, ["columns.0.lam", "nan"]),
        ({"method": "interpolate", "path": "posterior"}, ["no path"]),
        ({"method": "interpolate", "tolerance": 0.1, "particles": 4}, ["tolerance, particles"]),
        ({"anchors": {"a": "x", "b": "y"}, "anchor_beta": 3.0}, ["anchor_beta", "β"]),
    ],
)
def test_settings_hold_nothing_that_does_nothing(changes: dict[str, Any], values: list[Any]) -> None:
    assert Settings(**USUAL).steps == 25
    with pytest.raises(ValueError, match=naming(*values)):
        Settings(**USUAL | changes)


# -- the library -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "said"), [(0.0, "0"), (-1e-4, "-0.0001"), (math.nan, "nan"), (math.inf, "inf"), (True, "True")]
)
def test_a_rate_that_moves_nothing(rate: float, said: str) -> None:
    with pytest.raises(ValueError, match=naming("learning rate", said)):
        TrainingPlan(steps=1, learning_rate=rate)
    with pytest.raises(ValueError, match=naming("learning rate", said)):
        Distillation(learning_rate=rate)


@pytest.mark.parametrize("average", [1.0, -0.1, math.nan])
def test_an_average_that_keeps_nothing_new(average: float) -> None:
    with pytest.raises(ValueError, match=naming("moving average", f"{average:g}")):
        TrainingPlan(steps=1, learning_rate=1e-3, average=average)


@pytest.mark.parametrize("scale", [math.nan, math.inf, -1.0])
def test_a_guidance_scale_that_is_none(scale: float) -> None:
    with pytest.raises(ValueError, match=naming("guidance scale", f"{scale:g}")):
        Sampler(guidance_scale=scale)
    with pytest.raises(ValueError, match=naming("guidance scale", scale)):
        SamplerSettings("ddim", 1, scale)


def test_what_says_where_weights_lie_is_for_weights_that_are_read(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    for about in ({"revision": "main"}, {"subfolder": "unet"}):
        with pytest.raises(
            AnchorError, match=naming(*(f"{name}={value!r}" for name, value in about.items()), "'anchor'")
        ):
            deradiff.realign(pipe, anchor, 0.5, **about)  # type: ignore[arg-type]
    pipe.save_pretrained(tmp_path / "model")
    for source in ("digits", str(tmp_path / "model")):
        with pytest.raises(ValueError, match=naming("revision 'main'", source)):
            load_pipeline(source, dtype=pipe.dtype, revision="main")
        with pytest.raises(ValueError, match=naming("revision 'main'", source)):
            fingerprint(source, "main")


def test_interpolated_weights_take_what_they_can_use(tmp_path: Path) -> None:
    pipe, anchor, _ = tiny.make("sd")
    with pytest.raises(ValueError, match="path='posterior'"):
        deradiff.realign(pipe, anchor, 0.5, method="interpolate", path="posterior")
    for given, said in (
        ({"distillation": Distillation(steps=3)}, "method='distill'"),
        ({"prompts": ["a"]}, "0 images"),
    ):
        with pytest.raises(ValueError, match=said):
            baking.bake(pipe, anchor, 0.5, tmp_path / "out", images=0, **given)


def test_a_negative_prompt_that_is_not_read() -> None:
    pipe, _, _ = tiny.make("sd")
    for call in ({"guidance_scale": 1.0}, {"guidance_scale": 0.0}):
        with pytest.raises(ValueError, match=naming("StableDiffusionPipeline", "negative_prompt", "guidance_scale")):
            batches.require_heeded(pipe, {"negative_prompt": "ugly", **call})
        batches.require_heeded(pipe, {"negative_prompt": "", **call})
    batches.require_heeded(pipe, {"negative_prompt": "ugly"})
    batches.require_heeded(pipe, {"negative_prompt": "ugly", "guidance_scale": 2.0})


def test_a_pipeline_of_true_guidance_that_is_off() -> None:
    class Told(DiffusionPipeline):
        def __init__(self) -> None: ...

        def __call__(
            self, prompt: Any, guidance_scale: float = 3.5, true_cfg_scale: float = 1.0, negative_prompt: Any = None
        ) -> None: ...

    with pytest.raises(ValueError, match=naming("Told", "negative_prompt", "guidance_scale")):
        batches.require_heeded(Told(), {"negative_prompt": "ugly", "guidance_scale": 5.0})


def test_another_size_than_was_asked_for() -> None:
    pipe, _, _ = tiny.make("sd")
    batches.require_size(pipe, Image.new("RGB", (64, 32)), {"width": 64, "height": 32})
    batches.require_size(pipe, Image.new("RGB", (64, 32)), {})
    with pytest.raises(ValueError, match=naming("64x32", "70x32")):
        batches.require_size(pipe, Image.new("RGB", (64, 32)), {"width": 70, "height": 32})


# -- the command line --------------------------------------------------------------------------------------------------


def test_lam_of_an_anchor_is_given_once() -> None:
    with pytest.raises(ValueError, match=naming("'a=0.5,a=0.7'", "'a'")):
        arguments.lams(["a=0.5,a=0.7"], ["a", "b"])
    with pytest.raises(ValueError, match=naming("--lam", "'1e400'")):
        arguments.lams(["a=1e400"], ["a", "b"])
    assert arguments.lams(["b=0.7"], ["a", "b"]) == ({"a": 0.0, "b": 0.7},)


@pytest.mark.parametrize("text", ["1e400", "-1e400", "nan", "sNaN", "inf", "0:1e400:1"])
def test_numbers_are_finite(text: str) -> None:
    number = text.removeprefix("0:").removesuffix(":1")
    with pytest.raises(ValueError, match=naming("λ", f"'{number}'")):
        notation.numbers(text, "λ")


GENERATE = ("generate", "digits", "-a", "digits:100", "-p", "x")
BAKE = ("bake", "digits", "-a", "digits:100", "-l", "0.5")
SEARCH = ("search", "digits", "-a", "digits:100", "-m", "legible", "-p", "x")


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ((*GENERATE, "--over", "time"), ["--over:"]),
        ((*GENERATE, "--schedule", "power:2", "--anchor-beta", "3"), ["--anchor-beta:"]),
        ((*GENERATE, "--width", "32"), ["width", "height"]),
        ((*GENERATE, "--height", "32"), ["height", "width"]),
        ((*GENERATE, "--guidance-scale", "nan"), ["guidance_scale:", "nan"]),
        ((*GENERATE, "--guidance-scale", "1", "--negative-prompt", "y"), ["negative_prompt", "guidance_scale"]),
        ((*GENERATE, "--method", "interpolate", "--path", "prediction"), ["no path"]),
        ((*GENERATE, "--method", "interpolate", "--reuse", "2"), ["no reuse"]),
        ((*GENERATE, "--reuse", "2", "--tolerance", "0.1"), ["reuse", "tolerance"]),
        ((*GENERATE, "--revision", "main"), ["digits", "revision 'main'"]),
        ((*GENERATE, "--anchor-revision", "main"), ["beta-100", "revision='main'"]),
        ((*BAKE, "--over", "time"), ["--over:"]),
        ((*BAKE, "--images", "0", "--prompt", "x", "--seed", "3", "--steps", "4"), ["--prompt, --steps, --seed:"]),
        ((*BAKE, "--guidance-scale", "nan"), ["guidance scale", "nan"]),
        ((*BAKE, "--guidance-scale", "-1"), ["guidance scale", -1]),
        ((*BAKE, "--method", "distill", "--learning-rate", "0"), ["learning rate", 0]),
        ((*SEARCH, "--count", "3"), ["--count", "--prompts"]),
        ((*SEARCH, "--neighbours", "3"), ["--neighbours:"]),
        ((*SEARCH, "--width", "32"), ["width", "height"]),
        (("align", "digits", "--learning-rate", "0"), ["learning rate", 0]),
        (("align", "digits", "--learning-rate", "nan"), ["learning rate", "nan"]),
        (("align", "digits", "--method", "draft", "--guidance-scale", "inf"), ["guidance scale", "inf"]),
        (("studies.digits", "truth", "--guidance-scale", "3"), ["guidance", 3]),
    ],
)
def test_an_option_that_does_nothing_is_refused(words: tuple[str, ...], values: list[Any], tmp_path: Path) -> None:
    result = invoked([*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2, result.output
    assert re.search(naming(*values), " ".join(result.stderr.split())), result.stderr
    assert not list((tmp_path / "out").glob("**/*.png"))


@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("--batch=3", "--batch"),
        ("--unguided", "--guided"),
        ("--train-steps=4", "--train-steps"),
        ("--images=0", "--images"),
        ("--checkpointing", "--checkpointing"),
    ],
)
def test_the_paper_s_arithmetic_takes_no_options_of_models(option: str, name: str) -> None:
    result = CliRunner().invoke(app, ["cost", option])
    assert result.exit_code == 2 and f"{name}:" in result.stderr


@pytest.mark.parametrize("options", [["--gpus", "0.5"], ["--ray", "--gpus", "0.5", "--device", "cpu"]])
def test_the_share_of_a_gpu_is_for_actors_on_gpus(options: list[str], tmp_path: Path) -> None:
    import yaml

    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(SMALL))
    result = CliRunner().invoke(
        app,
        ["experiment", "run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out"), "--device", "cpu", *options],
    )
    assert result.exit_code == 2 and "--gpus: " in result.stderr
