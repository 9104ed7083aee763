"""Flows are examined as others are: by their own sampler with noise, and by the errors of their velocities."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from typer.testing import CliRunner

from deradiff.algorithm.pair_terms import terms
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.pair_rows import PreferencePair
from deradiff.cli import app
from deradiff.examination import pairs as examined_pairs
from deradiff.sweep.settings import Column, Settings
from deradiff.worlds import digits_flow


def test_the_terms_of_pairs_are_those_of_velocities(monkeypatch: Any) -> None:
    monkeypatch.setattr(examined_pairs, "DRAWS", 1)
    texts = ["a red two", "a five"]
    pictures = [Image.effect_noise((32, 32), spread).convert("RGB") for spread in (20, 60, 100, 140)]
    pairs = [PreferencePair(text, pictures[2 * k], pictures[2 * k + 1]) for k, text in enumerate(texts)]
    columns, anchors = (Column(lam=1.0),), {"anchor": "digits-flow:5"}
    settings = Settings(reference="digits-flow", anchors=anchors, prompts=tuple(texts), columns=columns, seeds=(0,))
    pipe: Any = digits_flow.load_pipeline()
    found = examined_pairs.terms_of(pipe, settings, pairs, 3, lambda *_: None)
    assert found is not None and found.linear.shape == (1, 2)

    pixels = torch.stack([pipe.image_processor.preprocess(picture)[0] for picture in pictures])
    with torch.no_grad():
        clean = pipe.vae.encode(pixels).latent_dist.mode()[[0, 2, 1, 3]]
        told, _, pooled, _ = pipe.encode_prompt(texts, None, None, device=torch.device("cpu"))
        generators = row_generators(3, range(2), "examined 0")
        noise = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).repeat(2, 1, 1, 1)
        share = torch.cat([torch.rand(1, generator=g) for g in generators])
        sigma = (2 * share / (1 + share)).repeat(2)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        told, pooled = told.repeat(2, 1, 1), pooled.repeat(2, 1)
        anchor = SD3Transformer2DModel.from_pretrained(digits_flow.anchor_path(5), dtype=torch.float32)
        velocities = [model(noisy, told, pooled, 1000 * sigma).sample for model in (pipe.transformer, anchor)]
    linear, square = terms(noise - clean, *velocities)
    torch.testing.assert_close(found.linear[0].float(), linear, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.square[0].float(), square, rtol=1e-3, atol=1e-4)


def test_a_flow_is_drawn_by_its_own_noise(tmp_path: Path) -> None:
    command = ["examine", "digits-flow", "--anchor", "digits-flow:5", "--images", "8", "--steps", "3"]
    command += ["--prompt", "a two", "--prompt", "a five", "--prompt", "a seven", "--out", str(tmp_path / "c.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    known = json.loads((tmp_path / "c.json").read_text())
    assert known["examined"]["scheduler"] == "FlowMatchSDEScheduler" and known["tilt"] is not None
