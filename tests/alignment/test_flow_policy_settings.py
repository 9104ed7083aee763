"""Flow-GRPO and DiffusionNFT by their settings: which models, presets, dry runs, and what the command refuses."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import deradiff
from deradiff.alignment import runs
from deradiff.alignment.base import Base, Policy
from deradiff.alignment.methods import METHODS, fitted
from deradiff.alignment.presets import PRESETS, usual
from deradiff.alignment.rehearsal import rehearse
from deradiff.worlds import find
from messages import naming
from test_align_command import command
from test_flow_policies import PROMPTS, TRAINED
from tiny import make
from trainable_families import trainable as pipeline_of


def test_they_are_for_flows_alone() -> None:
    pipe, _, _ = make("sd")
    for method in TRAINED:
        with pytest.raises(ValueError, match=naming(METHODS[method].title, "some/model", "epsilon", "ddpo")):
            fitted(replace(usual("some/model", method), base="some/model"), pipe)
        with pytest.raises(ValueError, match=naming("digits", method, "ddpo")):
            usual("digits", method)


def test_another_model_gets_a_lora_where_it_has_layers_for_one() -> None:
    pipe, side = pipeline_of("z_image")
    for method in TRAINED:
        settings = usual("some/flow", method)
        Policy(Base(pipe, side), 2, settings.lora_targets)
        pipe.transformer.delete_adapters(pipe.transformer.active_adapters())


def test_noise_in_every_step_of_a_distilled_model_is_warned_of() -> None:
    pipe, _ = pipeline_of("sd3")
    settings = replace(usual("some/flow", "flow-grpo"), base="some/flux-schnell")
    with pytest.warns(UserWarning, match=naming("some/flux-schnell", "flow-euler")):
        fitted(settings, pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(replace(settings, base="some/flux"), pipe)
        fitted(replace(usual("some/flow", "diffusion-nft"), base="some/flux-schnell"), pipe)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        (["--preset", "flow-grpo-ocr"], ["flow-grpo-ocr", "--data", "--reward"]),
        (["--preset", "diffusion-nft-geneval", "--reward", "ink"], ["diffusion-nft-geneval", "--data"]),
        (["--preset", "flow-grpo-pickscore", "--eta", 0], ["eta", 0]),
        (["--preset", "flow-grpo-pickscore", "--eta", 7], ["eta", 7.0]),
        (["--preset", "diffusion-nft-pickscore", "--eta", 0.5], ["--eta", "diffusion-nft", "flow-euler"]),
        (["--preset", "flow-grpo-pickscore", "--density", "logit-normal"], ["--density", "flow-grpo"]),
        (["--preset", "diffusion-nft-pickscore", "--memory", "0,nan,0.5"], ["memory", "nan"]),
        (["--preset", "diffusion-nft-pickscore", "--memory", "0,0.1"], ["--memory", "0,0.1"]),
        (["--preset", "diffusion-nft-pickscore", "--clip", 0.1], ["--clip", "diffusion-nft", "--mixing"]),
        (["digits", "--eta", 0.5], ["--eta", "dpo", "ddim"]),
    ],
)
def test_the_command_refuses_what_has_no_use_before_it_loads_a_model(arguments: list[Any], values: list[Any]) -> None:
    done = command(*arguments)
    assert done.exit_code == 2 and re.search(naming(*values), done.output), done.output


PUBLIC = [name for name, preset in PRESETS.items() if preset.method in TRAINED and not find(preset.base)]


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_configuration_is_tried_on_a_small_model_and_makes_an_anchor(name: str, tmp_path: Path) -> None:
    pipe, side = pipeline_of("sd3")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{text} {number}" for text in PROMPTS for number in range(20)))
    settings = replace(PRESETS[name], data=str(prompts), reward="ink", resolution=side, precision="no")
    lines = list(rehearse(settings, pipe))
    assert f"one step of {settings.sampling['scheduler']}" in "\n".join(lines)
    small = replace(
        settings,
        plan=replace(settings.plan, steps=2, accumulate=1, learning_rate=0.01),
        batch=4,
        held_out=2,
        sampling=settings.sampling | {"steps": 3},
        options=settings.options | {"per_prompt": 2},
    )
    method = METHODS[small.method]
    data = method.prepare(pipe, small, tmp_path, None, 0, lambda *_: None)
    anchor = runs.align(pipe, data, small.betas[0], small, tmp_path / "aligned", lambda *_: None)
    record = json.loads((anchor / "alignment.json").read_text())
    assert record["path_kl"]["value"] > 0 and record["path_kl"]["eta"] == 1.0
    assert method.title in (anchor / "README.md").read_text()
    with deradiff.realign(pipe, anchor, lam=0.5) as dial:
        assert dial.lam == 0.5
