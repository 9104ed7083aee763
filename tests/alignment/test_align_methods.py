"""`deradiff align --method`: every method makes an anchor that realign loads, and says how far it went."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from deradiff.alignment import methods, runs, training_data
from deradiff.alignment.presets import PRESETS, usual
from deradiff.sweep.alignment_records import known_beta
from deradiff.worlds.digits import captions
from deradiff.worlds.digits.rewards import DigitsReward
from messages import naming
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
    "mapo": ["--beta", 0.1, "--flip"],
    "draft": ["--beta", 0.01, "--keep", 2],
    "alignprop": ["--beta", 0, "--window", "1,3"],
    "refl": ["--beta", 0, "--window", "2,3", "--reward", "bold", "--pretraining", 10],
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
    strength = "without KL" if anchor.name == "beta-0" else f"at {methods.METHODS[method].symbol} ="
    assert f"aligned by {methods.METHODS[method].title} {strength}" in card and "| path KL to the base |" in card
    has_beta = anchor.name != "beta-0" and method != "mapo"  # the β of MaPO weighs a margin
    assert ("Read it at any strength" in card, "no KL strength" in card) == (has_beta, not has_beta)
    assert known_beta(str(anchor)) == (record["made_of"]["beta"] if has_beta else None)
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
    data = training_data.prepare_prompts(pipe, settings, tmp_path, None, 0, lambda *_: None)
    method = methods.METHODS["draft"]
    assert method.prompts(data, settings, 64) == ["a seven", "a eight", "a nine"] and not set(data.training) & set(
        data.held_out
    )
    assert method.prompts(data, settings, 2) == ["a seven", "a eight"] and isinstance(data.reward, DigitsReward)
    other = training_data.prepare_prompts(pipe, settings, tmp_path, 5, 1, lambda *_: None)
    assert other.fingerprint != data.fingerprint and len(other.training) == 2
    with pytest.raises(ValueError, match=naming("10 of 10", "--held-out")):
        training_data.prepare_prompts(pipe, replace(settings, held_out=10), tmp_path, None, 0, lambda *_: None)


def test_a_method_without_preset_starts_from_its_own_and_not_from_another_models_parts() -> None:
    for method in OPTIONS:
        start = usual(None, method)
        assert start.method == method and start.vae is None and not start.betas
        # A preset's options are those of its method: none is unknown where it is trained.
        assert set(start.options) == set(usual("digits", method).options) | ({"ceiling"} if method == "refl" else set())


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["digits", "--method", "rwr", "--beta", "0"], ["--beta 0", "β"]),
        (["digits", "--method", "draft", "--beta", "-1"], ["--beta -1", "λ_KL", 0]),
        (["digits", "--method", "draft", "--window", "3,4"], ["--window:", "draft", "--keep"]),
        (["digits", "--method", "refl", "--window", "late"], ["--window late"]),
        (["digits", "--method", "refl", "--window", "20,40"], ["20,40", 25]),
        (["digits", "--method", "draft", "--resolution", "64"], ["digits", 32, "--resolution"]),
        (["digits", "--method", "draft", "--no-cache", "--flip"], ["--no-cache, --flip:", "draft"]),
        (["digits", "--method", "draft", "--reward-scale", "0"], ["reward scale", 0]),
        (["digits", "--method", "ddpo", "--reward-scale", "-1"], ["reward scale", -1]),
        (["digits", "--method", "draft", "--reward-dropout", "0.9"], ["bold and vivid", "--reward-dropout"]),
        (["digits", "--method", "dpo", "--reward-scale", "2"], ["--reward-scale:", "dpo"]),
        (["digits", "--method", "draft", "--keep", "99"], ["99 of 25"]),
        (["digits", "--method", "draft", "--reward", "beauty"], ["'beauty'", "pickscore"]),
        (["digits", "--method", "ddpo", "--batch", "6"], ["per_prompt = 4"]),
        (["digits", "--data", "pairs", "--reward", "bold"], ["pairs", "--reward"]),
        (["some/model", "--method", "ddpo"], ["some/model", "--learning-rate, --reward"]),
        (["digits", "--method", "draft", "--count", "50"], ["100 of 50"]),
    ],
)
def test_wrong_input_is_one_sentence(tmp_path: Path, arguments: list[str], values: list[Any]) -> None:
    refused = command(*arguments, "--out", tmp_path / "out", "--cpu")
    assert refused.exit_code == 2, refused.output
    assert re.search(naming(*values), " ".join(refused.output.split())), refused.output


@pytest.mark.parametrize("method", ["dpo", "rwr", "ddpo", "draft"])
@pytest.mark.cases(2)
def test_half_precision_draws_and_trains(method: str, tmp_path: Path) -> None:
    done = command("digits", "--method", method, "--out", tmp_path, *SMALL, *OPTIONS[method], "--precision", "bf16")
    assert done.exit_code == 0, done.output
    assert list(tmp_path.glob("beta-*/pytorch_lora_weights.safetensors"))


def test_where_nothing_can_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = command("digits", "--method", "draft", "--out", tmp_path / "file" / "below", *SMALL)
    assert refused.exit_code == 2 and str(tmp_path / "file" / "below") in refused.output and "━" not in refused.output
    (tmp_path / "taken" / "beta-1").mkdir(parents=True)
    refused = command("digits", "--method", "draft", "--out", tmp_path / "taken", "--beta", 1, *SMALL)
    assert refused.exit_code == 2 and str(tmp_path / "taken" / "beta-1") in " ".join(refused.output.split())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    strong = ["--steps", 1, "--learning-rate", 1e38, "--ema", 0]
    stopped = command("digits", "--method", "dpo", "--out", tmp_path, *SMALL, *strong)
    assert stopped.exit_code == 2 and "learning rate (1e+38)" in " ".join(stopped.output.split()), stopped.output
    assert not list(tmp_path.glob("beta-*/alignment.json"))


def test_a_ceiling_belongs_to_its_reward(tmp_path: Path) -> None:
    small = [*SMALL, "--accumulate", 1, "--window", "2,3", "--data", "own", "--lora-rank", 4]
    done = command("digits", "--preset", "refl", "--reward", "digits", "--beta", 0, "--out", tmp_path, *small)
    assert done.exit_code == 0 and not torch.equal(sampled(None), sampled(tmp_path / "beta-0")), done.output
    low = command("digits", "--method", "refl", "--ceiling", 0.1, "--beta", 0, "--out", tmp_path / "low", *small)
    assert low.exit_code == 0 and torch.equal(sampled(None), sampled(tmp_path / "low" / "beta-0")), low.output


def test_few_prompts_that_outweigh_the_others_are_told_of(tmp_path: Path) -> None:
    told = command("digits", "--method", "rwr", "--out", tmp_path, *SMALL, "--per-prompt", 2, "--beta", 0.1).output
    assert re.search(r"\b\d+ of 12\b", " ".join(told.split()))


def test_a_reward_that_is_no_number_stops_before_anything_is_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DigitsReward, "__call__", lambda self, images, prompts: images.mean((1, 2, 3)) * torch.nan)
    for method in ("dpo", "draft", "rwr", "ddpo"):
        stopped = command("digits", "--method", method, "--out", tmp_path / method, *SMALL)
        assert stopped.exit_code == 2 and "nan" in stopped.output, stopped.output
        assert not list((tmp_path / method).glob("beta-*"))
