"""`deradiff align` on the digits, small: pairs, cache, anchors that realign loads, and what it refuses."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import deradiff
from deradiff.alignment.own_pairs import draw_pairs
from deradiff.alignment.presets import PRESETS
from deradiff.alignment.runs import load_base
from deradiff.cli import app
from deradiff.worlds import digits
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import DigitsReward
from messages import naming
from tiny import make

SMALL = ["--cpu", "--count", "12", "--held-out", "4", "--steps", "3", "--batch", "4", "--sampling-steps", "2"]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["align", *map(str, arguments)], env={"COLUMNS": "200"})


def sampled(anchor: Path | None) -> torch.Tensor:
    pipe = digits.load_pipeline()
    if anchor is not None:
        deradiff.realign(pipe, anchor, lam=1.0)
    generator = torch.Generator().manual_seed(0)
    return pipe(["a seven"], num_inference_steps=2, output_type="latent", generator=generator).images


def test_digits_are_aligned_at_every_strength_and_again_for_nothing(tmp_path: Path) -> None:
    done = command("digits", "--beta", "100,500", "--out", tmp_path, *SMALL)
    assert done.exit_code == 0, done.output
    assert [line for line in done.output.splitlines() if "beta-" in line] == [
        str(tmp_path / "beta-100"),
        str(tmp_path / "beta-500"),
    ]
    plain, made = sampled(None), sampled(tmp_path / "beta-100")
    assert not torch.equal(plain, made)
    record = json.loads((tmp_path / "beta-100" / "alignment.json").read_text())
    assert record["curve"]["step"] == [0, 3] and record["curve"]["held_out"][0] == pytest.approx(0.6931, abs=1e-4)
    assert "aligned by Diffusion-DPO at β = 100" in (tmp_path / "beta-100" / "README.md").read_text()
    assert not list(tmp_path.glob("*checkpoint*"))

    written = (tmp_path / "beta-100" / "alignment.json").stat().st_mtime_ns
    again = command("digits", "--beta", "100,500", "--out", tmp_path, *SMALL)
    assert again.exit_code == 0 and (tmp_path / "beta-100" / "alignment.json").stat().st_mtime_ns == written
    other = command("digits", "--beta", "100", "--out", tmp_path, *SMALL, "--warmup", "7")
    assert other.exit_code == 2 and re.search(r"warmup \d+\b.*\b7\b", " ".join(other.output.split()))

    others = ["--no-cache", "--lora-rank", 0, "--gradient-checkpointing", "--ema", 0, "--schedule", "cosine"]
    whole = command("digits", "--beta", "500", "--out", tmp_path / "whole", "--precision", "bf16", *others, *SMALL)
    assert whole.exit_code == 0, whole.output
    assert not torch.equal(sampled(tmp_path / "whole" / "beta-500"), plain)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], ["--preset", "`digits`"]),
        (["digits", "--beta", "0"], ["--beta 0", 0]),
        (["digits", "--beta", "500,-1"], ["--beta 500,-1", -1]),
        (["digits", "--beta", "strong"], ["--beta strong"]),
        (["digits", "--preset", "mine"], ["'mine'", "deradiff-sdxl"]),
        (["somewhere/model"], ["somewhere/model", "--data, --resolution, --batch, --steps, --learning-rate"]),
        (["digits", "--seed", "2147483648"], ["seed", 2147483647]),
        (["digits", "--method", "dpo", "--preset", "aig-sdxl"], ["aig-sdxl", "draft", "--method dpo"]),
        (["digits", "--no-cache", "--count", "3", "--data", "some"], ["--count"]),
        (["digits", "--data", "missing"], ["missing"]),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path: Path, arguments: list[str], values: list[Any]) -> None:
    refused = command(*arguments, "--out", tmp_path / "out", "--cpu")
    assert refused.exit_code == 2, refused.output
    assert re.search(naming(*values), " ".join(refused.output.split())), refused.output


def test_presets_are_shown_as_yaml(tmp_path: Path) -> None:
    shown = yaml.safe_load(command("--show-preset", "all").output)
    assert set(shown) == set(PRESETS)
    # DeRaDiff, Table 4.
    assert [shown["deradiff-sdxl"]["plan"][key] for key in ("steps", "learning_rate", "warmup", "accumulate")] == [
        30_000,
        1.28e-6,
        200,
        64,
    ]
    # The script that its rate is from (SalesforceAIResearch/DiffusionDPO).
    assert [shown["deradiff-sdxl"][key] for key in ("flip", "prompt_dropout", "gradient_checkpointing")] == [
        True,
        0.2,
        True,
    ]
    assert [shown[name]["plan"]["optimizer"] for name in ("deradiff-sdxl", "deradiff-sd15")] == ["adafactor", "adamw"]
    assert shown["deradiff-sd15"]["plan"]["learning_rate"] == pytest.approx(6.4e-7)
    assert [shown["deradiff-sd15"][key] for key in ("batch", "betas")] == [64, [500, 1000, 2000, 5000, 8000, 10_000]]
    # Annealed Importance Guidance, A.7.1.
    assert [shown["aig-sd14"]["plan"][key] for key in ("learning_rate", "max_norm", "accumulate")] == [2.5e-4, 0.1, 4]
    # Its authors' code (NVIDIA/NeMo-Aligner).
    for name in ("aig-sd14", "aig-sdxl"):
        assert shown[name]["options"]["reward_scale"] == 100 and shown[name]["lora_rank"] == 32
        assert shown[name]["betas"] == [0, 0.1, 0.5, 1, 2, 5, 10, 20, 50] and shown[name]["plan"]["steps"] == 10_000
    assert "choose from" in command("--show-preset", "none").output


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_model_that_lacks_a_weight_is_refused(tmp_path: Path, part: str) -> None:
    make("sd")[0].save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if "norm" in key)
    save_file({key: value for key, value in weights.items() if key != name}, file, {"format": "pt"})
    settings = replace(PRESETS["digits"], base=str(tmp_path / "model"))
    with pytest.raises(ValueError, match=naming(str(tmp_path / "model"), 1, f"{part}.{name}")):
        load_base(settings)
    if part == "vae":
        make("sd")[0].save_pretrained(tmp_path / "whole")
        with pytest.raises(ValueError, match=naming(str(file.parent), 1, f"vae.{name}")):
            load_base(replace(settings, base=str(tmp_path / "whole"), vae=str(file.parent)))


def test_own_pairs_prefer_the_reward_and_resume(tmp_path: Path) -> None:
    prompts = captions.sample_prompts(7, 1)

    def draw(folder: Path, **options: object) -> Path:
        pipe = digits.load_pipeline()
        settings = {"temperature": 0.0, "steps": 2, "guidance_scale": 1.0, "seed": 3, "chunk": 3} | options
        return draw_pairs(folder, pipe, "digits", prompts, DigitsReward(), **settings)  # type: ignore[arg-type]

    class Interrupted(Exception):
        pass

    def interrupt(done: int, planned: int, line: str) -> None:
        raise Interrupted

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    draw(whole)
    with pytest.raises(Interrupted):
        draw(broken, report=interrupt)
    draw(broken)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert all((whole / path).read_bytes() == (broken / path).read_bytes() for path in files) and len(files) == 19
    rows = [json.loads(line) for line in (whole / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts

    def score(name: str) -> float:
        import numpy as np
        from PIL import Image

        picture = torch.from_numpy(np.array(Image.open(whole / name))).permute(2, 0, 1)[None] / 255
        return DigitsReward()(picture, [""]).item()

    assert all(score(row["winner"]) > score(row["loser"]) - 0.02 for row in rows)
    with pytest.raises(ValueError, match=naming(whole, "seed", 4)):
        draw(whole, seed=4)
    with pytest.raises(ValueError, match=naming("temperature", -1.0)):
        draw(tmp_path / "cold", temperature=-1.0)


KILLED = """
import sys
from dataclasses import replace
import torch
from deradiff.alignment.presets import PRESETS
from deradiff.cli import app
torch.set_num_threads(1)
digits = PRESETS["digits"]
PRESETS["digits"] = replace(digits, plan=replace(digits.plan, checkpoint_seconds=0))
app(["align", *sys.argv[1:]])
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """How a sum is split between threads decides its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_killed_command_goes_on_and_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is killed is a process; the other two runs, unbroken and resumed, need none of their own.
    digits = PRESETS["digits"]
    monkeypatch.setitem(PRESETS, "digits", replace(digits, plan=replace(digits.plan, checkpoint_seconds=0)))

    def words(out: Path) -> list[str]:
        return ["digits", "--beta", "500", "--out", str(out), *SMALL, "--steps", "12"]

    def weights(out: Path) -> bytes:
        return (out / "beta-500" / "pytorch_lora_weights.safetensors").read_bytes()

    def step() -> int:
        progress = broken / ".deradiff" / "beta-500-checkpoint" / "progress.json"
        # The folder is away for a moment while the next checkpoint takes its place.
        with suppress(FileNotFoundError):
            return json.loads(progress.read_text())["step"]
        return 0

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    killed = subprocess.Popen([sys.executable, "-c", KILLED, *words(broken)], stdout=subprocess.DEVNULL)
    while step() < 3:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    assert not (broken / "beta-500").exists()
    for out in (broken, whole):
        assert command(*words(out)).exit_code == 0
    assert weights(broken) == weights(whole) and not (broken / ".deradiff").exists()


def test_out_of_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("deradiff.alignment.training_data.write_cache", full)
    stopped = command("digits", "--out", tmp_path, *SMALL)
    assert stopped.exit_code == 1 and "add --gradient-checkpointing, raise --accumulate" in " ".join(
        stopped.output.split()
    )
