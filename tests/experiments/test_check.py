"""What a plan needs and is not here: all of it is named, with the command that gets it, and nothing that is here."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from deradiff.cli import app
from deradiff.experiments import check
from deradiff.experiments.check import asked_of_the_hub, needs
from deradiff.experiments.plan import Plan, read_plan, write_plan
from deradiff.experiments.presets import PRESETS, TEST_PROMPTS, preset
from deradiff.files import hub
from hub_server import Hub, standing_in
from small_experiment import SMALL, small

CLIP_H, TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "tokenizer.json"
MODEL = ("config.json", "model.safetensors")
PIPELINE = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json")
STYLES = tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo"))
SCORES = {
    "models--yuvalkirstain--PickScore_v1": (*MODEL, TOKENIZER),
    "models--xswu--HPSv2": ("HPS_v2_compressed.pt",),
    f"models--{CLIP_H.replace('/', '--')}": (*MODEL, TOKENIZER),
    "datasets--zhwang--HPDv2": STYLES,
    "datasets--nateraw--parti-prompts": ("PartiPrompts.tsv",),
}
SDXL, SDXL_VAE = "models--stabilityai--stable-diffusion-xl-base-1.0", "models--madebyollin--sdxl-vae-fp16-fix"
TURBO, SD14 = "models--stabilityai--sdxl-turbo", "models--CompVis--stable-diffusion-v1-4"
IMAGE_REWARD = {
    "models--THUDM--ImageReward": ("ImageReward.pt",),
    "models--google-bert--bert-base-uncased": (TOKENIZER,),
}
WANTED: dict[str, Mapping[str, tuple[str, ...]]] = {
    "deradiff-sdxl": SCORES | {SDXL: PIPELINE},
    "deradiff-sd15": SCORES | {"models--stable-diffusion-v1-5--stable-diffusion-v1-5": PIPELINE},
    "aig-sdxl": SCORES | {SDXL: PIPELINE, TURBO: PIPELINE},
    "aig-sd14": SCORES | {SD14: PIPELINE, TURBO: PIPELINE},
    "digits": {},
}
"""What each of the papers' plans draws and scores with, in the cache's own names."""

TO_ALIGN: dict[str, Mapping[str, tuple[str, ...]]] = {
    "deradiff-sdxl": {SDXL_VAE: ("config.json", "diffusion_pytorch_model.safetensors")},
    "aig-sdxl": IMAGE_REWARD,
    "aig-sd14": IMAGE_REWARD,
}
"""What aligning needs beside that."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with a GPU, room, no packages of the hub's and empty caches, whose folder is the working one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(check, "find_spec", lambda name: None)
    room = shutil.disk_usage(tmp_path)._replace(free=10**15)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    yield tmp_path


def sources_of(plan: Plan) -> list[str]:
    return [model.source for model in plan.models.values()]


def written(file: Path, content: str = "{}") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)


def put(folder: Path, repo: str, files: tuple[str, ...]) -> Path:
    """A repository in the hub's cache."""
    snapshot = folder / "cache" / repo / "snapshots" / "c0ffee"
    written(folder / "cache" / repo / "refs" / "main", "c0ffee")
    for file in files:
        written(snapshot / file)
    if files == PIPELINE:
        index = {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"], "safety_checker": [None, None]}
        written(
            snapshot / "model_index.json", json.dumps(index | {"scheduler": ["diffusers", "EulerDiscreteScheduler"]})
        )
    return snapshot


def missing(plan: Plan) -> list[str]:
    return [f"{need.what}: {need.missing}" for need in needs(plan) if need.missing]


def furnish(folder: Path, name: str) -> None:
    """Put everything there that a plan needs."""
    for repo, files in WANTED[name].items():
        put(folder, repo, files)
    for source in sources_of(preset(name)):
        if not source.startswith("digits:"):
            written(folder / source / "pytorch_lora_weights.safetensors")
    written(folder / TEST_PROMPTS, "test_prompts:\n- a cat\n- a dog\n")
    written(folder / "torch" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth")


@pytest.mark.parametrize("name", PRESETS)
def test_all_that_is_missing_is_named_and_nothing_else(name: str, here: Path) -> None:
    plan, aside = preset(name), here / "aside"
    furnish(here, name)
    assert missing(plan) == []
    for repo, files in WANTED[name].items():
        lost = here / "cache" / repo / "snapshots" / "c0ffee" / files[-1]
        lost.rename(aside)
        named = missing(plan)
        assert named and all(repo.partition("--")[2].replace("--", "/") in line for line in named), repo
        aside.rename(lost)
    own = [TEST_PROMPTS] if name.startswith("deradiff") else []
    for source in (*own, *list(source for source in sources_of(plan) if (here / source).exists())[-1:]):
        (here / source).rename(aside)
        assert any(f", {source}: is n" in line for line in missing(plan)), source
        aside.rename(here / source)


@pytest.mark.parametrize("name", PRESETS)
def test_what_gets_it_is_a_command(name: str, here: Path) -> None:
    known = [need for need in needs(preset(name)) if need.missing]
    commands = [command for need in known for command in need.how]
    assert all(need.how for need in known)
    for repo in (*WANTED[name], *TO_ALIGN.get(name, {})):
        kind, _, shown = repo.partition("--")
        download = f"hf download {shown.replace('--', '/')} " + ("--repo-type dataset " if kind == "datasets" else "")
        assert any(command.startswith(download) for command in commands), repo
    made = [model.made_by for model in preset(name).models.values() if model.made_by]
    assert [command for command in commands if command.startswith("deradiff align")] == made
    assert ("pip install 'deradiff[align]'" in commands) == bool(made)


@pytest.mark.parametrize("name", ["aig-sdxl"])
def test_the_commands_of_a_plan_make_the_models_that_it_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def align_all(settings: object, betas: list[float], out: Path, *_: object, **__: object) -> list[Path]:
        made.extend(f"{out}/beta-{beta:g}" for beta in betas)
        return []

    monkeypatch.setattr("deradiff.alignment.runs.align_all", align_all)
    plan = preset(name, "a folder")
    for model in plan.models.values():
        words = check.shlex.split(model.made_by)
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    assert made == sources_of(plan)


def test_parts_of_a_pipeline_and_shards(here: Path) -> None:
    snapshot = put(here, SD14, PIPELINE)
    unet = snapshot / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    assert check.absent_parts(snapshot) == ["unet/"]
    written(unet / "diffusion_pytorch_model-00001-of-00002.safetensors")
    assert check.absent_parts(snapshot) == ["unet/"]
    written(unet / "diffusion_pytorch_model-00002-of-00002.safetensors")
    assert check.absent_parts(snapshot) == []
    (snapshot / "scheduler" / "scheduler_config.json").unlink()
    assert check.absent_parts(snapshot) == ["scheduler/"]


def test_files_of_ones_own(here: Path) -> None:
    written(here / "anchor" / "notes.md")
    written(here / "mine.txt", "a cat\n")
    changed = {
        "reference": str(here / "nowhere"),
        "models": {"broken": {"source": "anchor"}, "hub": {"source": "somebody/anchor"}},
        "prompts": {"a": {"source": "mine.txt"}, "b": {"source": "pickapic-v2"}, "c": {"source": "gone.parquet"}},
        "methods": [{"method": "model"}],
        "scores": [f"pickscore={here}"],
        "features": ["inception=gone.pth"],
    }
    known = {need.what: need for need in needs(small(**changed))}
    assert {what for what, need in known.items() if not need.missing} == {
        "prompts 'a', mine.txt",
        f"score pickscore={here}",
        "a GPU",
        *(what for what in known if what.startswith("disk")),
    }
    (streamed,) = (need for what, need in known.items() if what.startswith("prompts 'b', pickapic-v2"))
    assert "HF_HUB_OFFLINE" in streamed.missing and "--local-dir pick-a-pic-v2" in streamed.how[0]
    assert "no weights" in known["model 'broken', anchor"].missing
    assert known["model 'hub', somebody/anchor"].how[0].startswith("hf download somebody/anchor ")
    assert known["package datasets"].how == known["package pyarrow"].how == ("pip install 'deradiff[align]'",)
    assert known["features inception=gone.pth"].missing.startswith("gone.pth")


def test_a_plan_of_version_0_1_is_checked_too(here: Path) -> None:
    plan = read_plan(Path(__file__).parents[1] / "data" / "written_by_0_1" / "plan.yaml")
    assert missing(plan) == []
    old = small(
        reference="runwayml/stable-diffusion-v1-5",
        models={"beta-500": {"source": "aligned/beta-500", "beta": 500, "family": "Diffusion-DPO"}},
        prompts={"preference": {"source": ["pickapic-v1", "hpdv2"], "split": "test_unique", "count": 500}},
        methods=[{"method": "model"}],
    )
    assert [line.partition(":")[0] for line in missing(old)] == [
        "package datasets",
        "reference runwayml/stable-diffusion-v1-5",
        "prompts 'preference', pickapic-v1, pickapic-anonymous/pickapic_v1",
        "prompts 'preference', hpdv2",
        "model 'beta-500', aligned/beta-500",
    ]


def test_what_the_hub_took_down_or_guards(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone, guarded = "runwayml/stable-diffusion-v1-5", "somebody/guarded"
    plan = small(reference=gone, models={"a": {"source": guarded}}, methods=[{"method": "model"}])
    assert hub.GONE[gone] in next(need.missing for need in needs(plan) if gone in need.what)
    with standing_in(here, monkeypatch) as server:
        served: Hub = server
        written(here / "guarded" / "a.safetensors")
        served.add(guarded, here / "guarded")
        served.gated.add(guarded)
        first, second = asked_of_the_hub(needs(plan))
        assert first.startswith(f"{gone} is not on the hub") and hub.GONE[gone] in first
        assert second.startswith(f"{guarded} is gated") and f"{server.url}/{guarded}" in second
        served.broken = True
        with pytest.raises(OSError, match="did not answer"):
            asked_of_the_hub(needs(plan))


def test_the_command(here: Path) -> None:
    def run(content: str) -> tuple[int, str]:
        written(here / "plan.yaml", content)
        result = CliRunner().invoke(app, ["experiment", "check", "plan.yaml"])
        return result.exit_code, result.output

    code, said = run(yaml.safe_dump(SMALL))
    assert code == 0 and "missing" not in said
    code, said = run(write_plan(preset("deradiff-sd15")))
    assert code == 1
    assert said.index("pip install 'deradiff[align]'") < said.index("deradiff align --preset deradiff-sd15 --beta 250")
