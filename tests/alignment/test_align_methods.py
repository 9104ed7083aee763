"""`deradiff align --method`: every method makes an anchor that realign loads, and says how far it went."""

import json
import re
from pathlib import Path

import pytest
import torch

from deradiff.alignment import methods, runs
from deradiff.alignment.presets import PRESETS, usual
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import DigitsReward
from test_align_command import command, sampled

SMALL = [
    "--cpu",
    "--count",
    12,
    "--held-out",
    4,
    "--steps",
    2,
    "--batch",
    4,
    "--sampling-steps",
    4,
    "--learning-rate",
    0.01,
]
OPTIONS: dict[str, list[object]] = {
    "dpo": ["--beta", 100],
    "draft": ["--beta", 0.01, "--keep", 2],
    "refl": ["--beta", 0, "--window", "2,3", "--reward", "bold"],
    "rwr": ["--beta", 0.5, "--per-prompt", 2, "--reward", "ink"],
    "ddpo": ["--beta", 0.01, "--per-prompt", 2, "--reward", "legible", "--guidance-scale", 2],
}


@pytest.mark.parametrize("method", OPTIONS)
def test_every_method_makes_an_anchor_and_its_card(method: str, tmp_path: Path) -> None:
    done = command("digits", "--method", method, "--out", tmp_path, *SMALL, *OPTIONS[method])
    assert done.exit_code == 0, done.output
    (anchor,) = (Path(line) for line in done.output.splitlines() if "beta-" in line and "━" not in line)
    assert not torch.equal(sampled(None), sampled(anchor))
    record = json.loads((anchor / "alignment.json").read_text())
    away = record["path_kl"]
    assert away["value"] > 0 and away["error"] > 0 and (away["scheduler"], away["steps"]) == ("ddim", 4)
    card = (anchor / "README.md").read_text()
    assert f"aligned by {methods.METHODS[method].title} at" in card and "| path KL to the base |" in card
    settings = record["made_of"]["settings"]
    assert settings["method"] == method and settings["reward"] in card
    again = command("digits", "--method", method, "--out", tmp_path, *SMALL, *OPTIONS[method])
    assert again.exit_code == 0 and json.loads((anchor / "alignment.json").read_text()) == record


def test_prompts_that_measure_are_not_trained_on(tmp_path: Path) -> None:
    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join(captions.caption(captions.Parts(digit)) for digit in range(10)))
    pipe = runs.load_base(PRESETS["digits"])
    from dataclasses import replace

    settings = replace(usual("digits", "draft"), data=str(listed), held_out=3)
    data = methods.prepare_prompts(pipe, settings, tmp_path, None, 0, lambda *_: None)
    method = methods.METHODS["draft"]
    assert method.prompts(data, settings, 64) == ["a seven", "a eight", "a nine"] and not set(data.training) & set(
        data.held_out
    )
    assert method.prompts(data, settings, 2) == ["a seven", "a eight"] and isinstance(data.reward, DigitsReward)
    other = methods.prepare_prompts(pipe, settings, tmp_path, 5, 1, lambda *_: None)
    assert other.fingerprint != data.fingerprint and len(other.training) == 2
    with pytest.raises(ValueError, match="10 of 10 prompts are to be held out"):
        methods.prepare_prompts(pipe, replace(settings, held_out=10), tmp_path, None, 0, lambda *_: None)


def test_a_method_without_preset_starts_from_its_own_and_not_from_another_models_parts() -> None:
    for method in OPTIONS:
        start = usual(None, method)
        assert start.method == method and start.vae is None and not start.betas
        # A preset's options are those of its method: none is unknown where it is trained.
        assert set(start.options) == set(usual("digits", method).options) | ({"ceiling"} if method == "refl" else set())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digits", "--method", "rwr", "--beta", "0"], "0 is no strength; β must be positive"),
        (["digits", "--method", "draft", "--beta", "-1"], "λ_KL must be 0 or more"),
        (["digits", "--method", "draft", "--window", "3,4"], "--window: not for draft, which has --keep"),
        (["digits", "--method", "refl", "--window", "late"], "name two numbers of steps, such as 30,39"),
        (["digits", "--method", "refl", "--window", "20,40"], "stopping after 20 to 40 of 25 steps"),
        (["digits", "--method", "draft", "--resolution", "64"], "the digits have 32 pixels a side"),
        (["digits", "--method", "draft", "--no-cache"], "draft has no pairs to cache"),
        (["digits", "--method", "draft", "--keep", "99"], "gradients through 99 of 25 steps"),
        (["digits", "--method", "draft", "--reward", "beauty"], "there is no reward 'beauty': choose among pickscore"),
        (["digits", "--method", "ddpo", "--batch", "6"], "per_prompt = 4"),
        (["digits", "--data", "pairs", "--reward", "bold"], "--reward compares own pairs alone"),
        (["some/model", "--method", "ddpo"], "--learning-rate, --reward as well"),
        (["digits", "--method", "draft", "--count", "50"], "100 of 50 prompts are to be held out"),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    refused = command(*arguments, "--out", tmp_path / "out", "--cpu")
    assert refused.exit_code == 2 and words in " ".join(refused.output.split()), refused.output


@pytest.mark.parametrize("method", ["dpo", "rwr", "ddpo", "draft"])
def test_half_precision_draws_and_trains(method: str, tmp_path: Path) -> None:
    done = command("digits", "--method", method, "--out", tmp_path, *SMALL, *OPTIONS[method], "--precision", "bf16")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.glob("beta-*/pytorch_lora_weights.safetensors"))


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = command("digits", "--method", "draft", "--out", tmp_path / "file" / "below", *SMALL)
    assert refused.exit_code == 2 and "cannot be written" in refused.output and "━" not in refused.output
    (tmp_path / "taken" / "beta-1").mkdir(parents=True)
    refused = command("digits", "--method", "draft", "--out", tmp_path / "taken", "--beta", 1, *SMALL)
    assert refused.exit_code == 2 and "holds no alignment" in " ".join(refused.output.split())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    strong = ["--steps", 1, "--learning-rate", 1e38, "--ema", 0]
    stopped = command("digits", "--method", "dpo", "--out", tmp_path, *SMALL, *strong)
    assert stopped.exit_code == 2 and "lower the learning rate" in " ".join(stopped.output.split()), stopped.output
    assert not list(tmp_path.glob("beta-*/alignment.json"))


def test_a_ceiling_belongs_to_its_reward(tmp_path: Path) -> None:
    small = [*SMALL, "--accumulate", 1, "--window", "2,3", "--data", "own", "--lora-rank", 4]
    done = command("digits", "--preset", "refl", "--reward", "digits", "--beta", 0, "--out", tmp_path, *small)
    assert done.exit_code == 0 and not torch.equal(sampled(None), sampled(tmp_path / "beta-0")), done.output
    low = command("digits", "--method", "refl", "--ceiling", 0.1, "--beta", 0, "--out", tmp_path / "low", *small)
    assert low.exit_code == 0 and torch.equal(sampled(None), sampled(tmp_path / "low" / "beta-0")), low.output


def test_few_prompts_that_outweigh_the_others_are_told_of(tmp_path: Path) -> None:
    told = command("digits", "--method", "rwr", "--out", tmp_path, *SMALL, "--per-prompt", 2, "--beta", 0.1).output
    assert re.search(r"the weights count \d+ of 12 prompts", " ".join(told.split()))


def test_a_reward_that_is_no_number_stops_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DigitsReward, "__call__", lambda self, images, prompts: images.mean((1, 2, 3)) * torch.nan)
    for method in ("dpo", "draft", "rwr", "ddpo"):
        stopped = command("digits", "--method", method, "--out", tmp_path / method, *SMALL)
        assert stopped.exit_code == 2 and "nan" in stopped.output, stopped.output
        assert not list((tmp_path / method).glob("beta-*"))
