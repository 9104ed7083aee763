"""Plans: what is refused, what a plan consists of, and the papers' own."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deradiff.algorithm.schedules import Power, taking_turns
from deradiff.experiments import sources
from deradiff.experiments.drawings import drawing_of, group_of, planned_images
from deradiff.experiments.plan import Plan, Prompts, parse_plan, read_plan, write_plan
from deradiff.experiments.presets import FINE_STRENGTHS, KL_STRENGTHS, POWERS, PRESETS, STRENGTHS, TEST_PROMPTS, preset
from deradiff.experiments.running import in_batches
from deradiff.files.prompts import Entry
from deradiff.sweep import fingerprints
from deradiff.sweep.description import NoiseOptimization, ReversibleNoise
from messages import naming
from small_experiment import SMALL, small


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"colour": "red"}, ["colour"]),
        ({"name": "../up"}, ["name", "'../up'"]),
        ({"scores": ["beauty"]}, ["'beauty'", "pickscore"]),
        ({"features": ["vgg"]}, ["'vgg'"]),
        ({"batch_size": 0}, ["batch_size", 1, 0]),
        ({"methods": []}, ["methods:", 1, 0]),
        ({"methods": [{"method": "magic"}]}, ["methods.0", "'magic'"]),
        ({"methods": [{"method": "realign", "anchors": ["other"], "lam": [1]}]}, ["'other'"]),
        ({"methods": [{"method": "realign"}]}, ["`lam`", "`targets`"]),
        ({"methods": [{"method": "realign", "lam": [0.5], "targets": "all"}]}, ["`lam`", "`targets`"]),
        ({"methods": [{"method": "realign", "lam": "half"}]}, ["lam", "'half'"]),
        ({"methods": [{"method": "realign", "lam": [float("nan")]}]}, ["lam.0", "nan"]),
        ({"methods": [{"method": "realign", "lam": [1], "particles": -1}]}, ["particles", -1]),
        ({"methods": [{"method": "combine", "lams": [{"strong": 1.0}]}]}, ["combine", {"strong": 1.0}]),
        ({"methods": [{"method": "anneal", "schedules": ["power:0"]}]}, ["p", 0.0]),
        ({"methods": [{"method": "anneal", "schedules": ["constant"]}]}, ["constant", "realign"]),
        ({"methods": [{"method": "interpolate", "lam": []}]}, ["interpolate.lam", 1, 0]),
        ({"methods": [{"method": "optimize-noise", "reward": "luck"}]}, ["'luck'"]),
        ({"methods": [{"method": "soup", "lams": [{"strong": 1.0}]}]}, ["soup", {"strong": 1.0}]),
        ({"methods": [{"method": "db-mpa-ls", "lams": [{"strong": 0.6, "weak": 0.5}]}]}, [0.6, 0.5]),
        ({"methods": [{"method": "das", "reward": "digits", "beta": [0]}]}, ["beta", 0]),
        ({"methods": [{"method": "tds", "reward": "digits", "beta": [1], "particles": 0}]}, ["particles", 1, 0]),
        (
            {"methods": [{"method": "das", "reward": "digits", "beta": [1]}], "sampling": {"x": {"scheduler": "ddim"}}},
            ["DAS", "'x'", "ddim", "ddpm", "euler-a"],
        ),
        (
            {
                "methods": [{"method": "mpgd", "reward": "digits", "beta": [1]}],
                "sampling": {"x": {"scheduler": "unipc"}},
            },
            ["MPGD", "'x'", "unipc", "ddim"],
        ),
        ({"methods": [{"method": "reference", "prompts": ["many"]}]}, ["'many'", "few"]),
        ({"prompts": {"few": {"prompts": ["a", "a"]}}}, ["prompts.few", "twice"]),
        ({"prompts": {"few": {}}}, ["prompts.few", "source", "prompts"]),
        ({"prompts": {"few": {"prompts": ["a"], "seeds": "-1"}}}, ["seed", -1]),
        ({"sampling": {"x": {"scheduler": "euler-b"}}}, ["'euler-b'"]),
        ({"report": {"healthy": "nobody"}}, ["'nobody'"]),
        ({"models": {"strong": {"source": "digits:30", "beta": 0}}}, ["models.strong.beta", 0]),
    ],
)
def test_what_is_no_plan(changes: dict[str, Any], values: list[Any]) -> None:
    with pytest.raises(ValueError, match=naming(*values)):
        small(**changes)


def test_the_baselines_of_the_digits_are_a_plan() -> None:
    plan = read_plan(Path(__file__).parents[2] / "studies/digits/baselines.yaml")
    named = {"soup", "db-mpa-ls", "optimize-noise", "doodl", "das", "tds", "fk-steering", "mpgd", "realign", "combine"}
    assert {arm.method for arm in plan.arms()} >= named


def test_baselines_that_are_a_lam_of_the_dial_are_its_arms() -> None:
    lams, several = {"anchors": ["strong"], "lam": [0.5, 2]}, {"lams": [{"strong": 0.4, "weak": 0.6}]}
    for names, settings in ((("realign", "rlg", "db-kla"), lams), (("combine", "db-mpa"), several)):
        known, *others = (small(methods=[{"method": name, **settings}]).arms() for name in names)
        assert all(arms == known for arms in others)
    soup, turns = small(
        methods=[{"method": "soup", **several}, {"method": "db-mpa-ls", **several}, {"method": "model"}]
    ).arms()[:2]
    plan = small(methods=[{"method": "model"}])
    mixed, taken = drawing_of(plan, soup, "a", 0), drawing_of(plan, turns, "a", 3)
    assert (mixed.method, mixed.lams) == ("interpolate", {"strong": 0.4, "weak": 0.6})
    assert (taken.method, taken.lams) == ("mixture", taking_turns({"strong": 0.4, "weak": 0.6}, 3))
    assert group_of(taken) != group_of(drawing_of(plan, turns, "a", 4)) == group_of(drawing_of(plan, turns, "b", 4))


def test_a_target_needs_a_beta_of_the_same_family() -> None:
    models = SMALL["models"] | {"refl": {"source": "digits:30", "family": "refl"}}
    with pytest.raises(ValueError, match=naming("refl", "weak", "beta")):
        small(models=models, methods=[{"method": "realign", "anchors": ["refl"], "targets": ["weak"]}])
    with pytest.raises(ValueError, match=naming("refl", "no beta")):
        small(models=models, methods=[{"method": "realign", "anchors": ["refl"], "targets": "all"}])
    with pytest.raises(ValueError, match=naming("'other'", "'dpo'")):
        alien = {"alien": {"source": "digits:100", "beta": 100, "family": "other"}}
        small(models=models | alien, methods=[{"method": "realign", "anchors": ["alien"], "targets": ["weak"]}])
    # `all` means those that there can be.
    arms = small(models=models, methods=[{"method": "realign", "anchors": ["strong"], "targets": "all"}]).arms()
    assert [arm.target for arm in arms] == ["strong", "weak"]
    assert "refl" not in {arm.target for arm in small(models=models).arms()}


def test_files_that_hold_no_plan(tmp_path: Path) -> None:
    broken, listed = tmp_path / "broken.yaml", tmp_path / "list.yaml"
    broken.write_text("name: [")
    listed.write_text("- a\n- !!python/object/apply:os.getcwd []\n")
    with pytest.raises(FileNotFoundError, match=naming(tmp_path / "none.yaml", "experiment plan --preset")):
        read_plan(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=naming(broken, "YAML")):
        read_plan(broken)
    with pytest.raises(ValueError, match=naming(listed, "YAML")):
        read_plan(listed)


def test_lam_stands_for_the_quotient_of_strengths() -> None:
    arms = {arm.name: arm for arm in small().arms()}
    assert arms["strong → weak"].lam == pytest.approx(30 / 500)
    assert arms["weak → strong"].lam == pytest.approx(500 / 30)
    assert arms["strong → strong"].lam == 1.0
    assert set(arms) == {
        "reference",
        "strong",
        "weak",
        *(f"{a} → {b}" for a in ("strong", "weak") for b in ("strong", "weak")),
    }


def test_one_image_however_it_is_asked_for() -> None:
    plan = small(
        methods=[
            {"method": "reference"},
            {"method": "model", "models": ["strong"]},
            {"method": "realign", "anchors": ["strong"], "lam": [0, 1]},
            {"method": "interpolate", "anchors": ["strong"], "lam": [0, 1]},
            {"method": "anneal", "anchors": ["strong"], "schedules": ["power:2"], "lam": [0]},
        ]
    )
    drawings = [drawing_of(plan, arm, "a", 0) for arm in plan.arms()]
    reference, model = drawings[:2]
    assert drawings[2:] == [reference, model, reference, model, reference]


def test_methods_that_ask_for_the_same_share_it() -> None:
    plan = small(
        prompts=SMALL["prompts"] | {"more": {"prompts": ["three"]}},
        methods=[
            {"method": "model", "models": ["weak"], "prompts": ["more"]},
            {"method": "model", "models": "all", "prompts": ["few"]},
        ],
    )
    assert {arm.name: arm.prompts for arm in plan.arms()} == {"weak": ("few", "more"), "strong": ("few",)}


def test_the_dial_of_a_drawing() -> None:
    plan = small(
        methods=[
            {"method": "combine", "lams": [{"strong": 0.25, "weak": 0.5}]},
            {"method": "anneal", "anchors": ["weak"], "schedules": ["power:2"], "lam": [0.5]},
        ]
    )
    combined, annealed = (drawing_of(plan, arm, "a", 0) for arm in plan.arms())
    assert combined.lams == {"strong": 0.25, "weak": 0.5}
    assert annealed.lams == {"weak": Power(2, 0.5)}


def test_batches_hold_all_lam_of_a_prompt_and_one_set_of_networks() -> None:
    plan = small(methods=[{"method": "realign", "anchors": ["strong"], "lam": [0, 0.25, 0.5, 1]}])
    cells = [(cell, f"{number}") for number, cell in enumerate(planned_images(plan, {"few": ("one", "two")}))]
    batches = [[drawing for _, drawing in batch] for batch in in_batches(plan, cells)]
    mixed = [batch for batch in batches if len(d_lams(batch)) > 1]
    assert [
        [(d["prompt"], d["seed"], {name: d["lam"] for name in d["settings"]["anchors"]}) for d in batch]
        for batch in mixed
    ] == [
        [
            ("one", 0, {"strong": 0.25}),
            ("one", 0, {"strong": 0.5}),
            ("one", 1, {"strong": 0.25}),
            ("one", 1, {"strong": 0.5}),
        ],
        [
            ("two", 0, {"strong": 0.25}),
            ("two", 0, {"strong": 0.5}),
            ("two", 1, {"strong": 0.25}),
            ("two", 1, {"strong": 0.5}),
        ],
    ]
    assert len(batches) == 4  # the reference and the anchor, which need one network, have one each


def d_lams(batch: list[dict[str, Any]]) -> set[Any]:
    return {drawing["lam"] for drawing in batch}


def test_a_method_is_kept_to_some_ways_of_sampling() -> None:
    ways = {name: {"steps": steps} for name, steps in (("short", 3), ("long", 9))}
    methods = [{"method": "reference"}, {"method": "model", "models": ["weak"], "sampling": ["long"]}]
    assert [(arm.name, arm.sampling) for arm in small(sampling=ways, methods=methods).arms()] == [
        ("reference", "short"),
        ("reference", "long"),
        ("weak", "long"),
    ]
    with pytest.raises(ValueError, match=naming("way of sampling", "'wide'", "short, long")):
        small(sampling=ways, methods=[{"method": "reference", "sampling": ["wide"]}])


def test_particles_count_as_so_many_images() -> None:
    plan = small(methods=[{"method": "realign", "anchors": ["strong"], "lam": [0.5], "particles": 2}])
    cells = [(cell, f"{number}") for number, cell in enumerate(planned_images(plan, {"few": ("one", "two")}))]
    assert [len(batch) for batch in in_batches(plan, cells)] == [2, 2]


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_prompts_of_several_sources_are_drawn_from_their_union(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("\n".join(f"a{i}" for i in range(20)) + "\nshared\n")
    second.write_text("\n".join(f"b{i}" for i in range(20)) + "\nshared\n")
    wanted = Prompts(source=(str(first), str(second)), count=30, draw_seed=3)
    found = sources.resolve(wanted)
    assert found == sources.resolve(wanted)
    assert len({*found}) == 30
    assert found != sources.resolve(wanted.model_copy(update={"draw_seed": 4}))
    assert {text[0] for text in found} >= {"a", "b"}
    everything = sources.resolve(Prompts(source=(str(first), str(second))))
    assert len(everything) == 41
    with pytest.raises(ValueError, match=naming(first, second, 41, 42)):
        sources.resolve(Prompts(source=(str(first), str(second)), count=42))


def test_a_split_is_of_the_lists_that_have_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a cat\n")
    asked = []

    def of_captions(repo: str, split: str) -> list[Entry]:
        asked.append((repo, split))
        return [Entry("a dog", None, "")]

    monkeypatch.setattr("deradiff.alignment.prompts._of_captions", of_captions)
    wanted = Prompts(source=("pickapic-v1", str(tmp_path / "a.txt")), split="test_unique")  # as plans of 0.1 have it
    assert sources.resolve(wanted) == ("a dog", "a cat")
    assert asked == [("pickapic-anonymous/pickapic_v1", "test_unique")]


def test_the_digits_have_different_prompts() -> None:
    found = sources.resolve(Prompts(source="digits", count=250, draw_seed=0))
    assert len({*found}) == 250
    with pytest.raises(ValueError, match=naming("digits", 100000)):
        sources.resolve(Prompts(source="digits", count=100_000))


def test_a_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "weights.safetensors").write_bytes(b"one")
    first = fingerprints.fingerprint(str(model))
    assert fingerprints.fingerprint(str(model), known=first) == first
    (model / "notes.md").write_text("not a weight")
    assert fingerprints.fingerprint(str(model))["sha256"] == first["sha256"]
    (model / "weights.safetensors").write_bytes(b"two")
    assert fingerprints.fingerprint(str(model), known=first)["sha256"] != first["sha256"]


def test_a_source_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(OSError, match=naming("nobody/nothing", "no route")):
        fingerprints.fingerprint("nobody/nothing")


# -- the papers' -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_read_as_they_are_written(name: str) -> None:
    for models in (None, "elsewhere"):
        plan = preset(name, models)
        assert parse_plan(yaml.safe_load(write_plan(plan)), name) == plan


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match=naming("'sdxl'", "deradiff-sdxl")):
        preset("sdxl")


def pairs(plan: Plan, prompts: str) -> set[tuple[float, float]]:
    return {
        (plan.models[arm.anchors[0][0]].beta or 0, plan.models[arm.target].beta or 0)
        for arm in plan.arms()
        if arm.target and prompts in arm.prompts
    }


@pytest.mark.parametrize(("name", "guidance"), [("deradiff-sdxl", 5.0), ("deradiff-sd15", 7.5)])
def test_deradiff_s_own_plan(name: str, guidance: float) -> None:
    plan = preset(name)
    every = {(a, b) for a in STRENGTHS for b in STRENGTHS} | {(a, b) for a in (750, 1000) for b in FINE_STRENGTHS}
    assert pairs(plan, "preference") == every
    assert pairs(plan, "hacking") == {(a, 2000) for a in (250, 500, 750)}
    sampling = plan.sampling["paper"]
    assert (sampling.scheduler, sampling.steps, sampling.guidance_scale) == ("euler-a", 50, guidance)
    preference = plan.prompts["preference"]
    assert preference.source == TEST_PROMPTS and preference.seeds == (0,) and "631" in preference.substitute_for
    assert preference.made_by.startswith(f"curl --location --output {TEST_PROMPTS} https://")
    assert plan.prompts["hacking"].count == 1000 and plan.prompts["hacking"].substitute_for


@pytest.mark.parametrize(
    ("name", "scheduler", "guidance"), [("aig-sdxl", "euler-trailing", 5.0), ("aig-sd14", "ddim", 7.5)]
)
def test_aig_s_own_plan(name: str, scheduler: str, guidance: float) -> None:
    plan = preset(name)
    sampling = plan.sampling["paper"]
    assert (sampling.scheduler, sampling.steps, sampling.guidance_scale) == (scheduler, 25, guidance)
    arms = [arm for arm in plan.arms() if arm.sampling == "paper"]
    assert len([arm for arm in arms if arm.method == "anneal"]) == 2 * len(POWERS) == 14
    # 149,600 images for each of the rewards, in the paper's round numbers of prompts.
    own = [arm for arm in arms if arm.method in ("model", "anneal", "interpolate") and "pickscore" in arm.name]
    assert (1 + len(own)) * (1600 + 3200 + 40 * 50) == 149_600
    stochastic = [arm for arm in plan.arms() if arm.sampling == "stochastic"]
    assert {arm.method for arm in stochastic} == {"reference", "model"} and len(stochastic) == 1 + len(plan.models)
    one_step, reversible = [arm.reward_guidance for arm in arms if arm.reward_guidance is not None]
    assert isinstance(one_step, NoiseOptimization) and isinstance(reversible, ReversibleNoise)
    assert (one_step.guidance_scale, one_step.learning_rate) == (1.0, 5.0)
    assert (reversible.steps, reversible.iterations) == (50, 50)
    assert len([model for model in plan.models.values() if model.beta]) == 2 * len(KL_STRENGTHS) == 16
    assert plan.prompts["coverage"].count == 40 and len(plan.prompts["coverage"].seeds) == 50
    assert {*plan.prompts} >= {"partiprompts", "anime", "concept-art", "paintings", "photo"}
