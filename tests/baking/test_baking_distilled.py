"""Students of the mixture: what they are taught, by whom, at which λ, and that it brings them nearer."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

import deradiff
import tiny
from anchor_files import lora, lora_weights
from deradiff import baking
from deradiff.algorithm.lams import parse_lam
from deradiff.algorithm.schedules import Power, Schedule, Step
from deradiff.algorithm.step import mixed
from deradiff.alignment.base import Base
from deradiff.alignment.data_order import row_generators
from deradiff.alignment.sampling import conditions, unconditional
from deradiff.alignment.training import TrainingRun
from deradiff.anchors import load_anchor
from deradiff.baking import Distillation, Sampler, bake
from deradiff.baking.distillation import (
    SHIPPED,
    RealignedSamples,
    Teacher,
    distil,
    lam_by_timestep,
    lam_embedding,
    student_of,
)
from deradiff.baking.weights import Blend
from deradiff.sampling.denoisers import Denoisers
from deradiff.worlds import digits
from deradiff.worlds.digits.captions import sample_prompts
from messages import naming
from test_baking import FAST, sampled_without_deradiff

SHORT = Distillation(lora_rank=4, samples=6, held_out=2, steps=4, batch=4, learning_rate=1e-2, per_pass=3)
QUICK = Sampler(steps=3, guidance_scale=2.0, batch_size=4)
PROMPTS = [f"{animal} number {i}" for i in range(4) for animal in ("a red fox", "two blue owls")]


def anchors_of(pipe: Any, tmp_path: Path) -> dict[str, Any]:
    """A full anchor and a LoRA."""
    save_file(lora_weights(lora(tiny.denoiser(pipe))), tmp_path / "lora.safetensors")
    return {"full": tiny.anchor_of(pipe), "lora": tmp_path / "lora.safetensors"}


# -- the teacher -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_the_teacher_says_what_a_dial_steps_with(tmp_path: Path, kind: str) -> None:
    pipe, _, call = tiny.make(kind)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    anchors = anchors_of(pipe, tmp_path)
    lam: dict[str, Schedule | float] = {"full": Power(2, lam=0.8), "lora": 0.4}
    seen: list[tuple[Any, torch.Tensor]] = []

    def look(pipe: Any, step: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        assert dial.last is not None
        seen.append((dial.last, mixed(dial.last.predictions, dial.last.mixture_weights)))
        return kwargs

    with deradiff.realign(pipe, anchors, lam) as dial:
        tiny.sample(pipe, call, guidance_scale=1.0, negative_prompt=None, callback_on_step_end=look)
    base = Base(pipe)
    table = lam_by_timestep(parse_lam(lam, ("full", "lora")), base.call.prepared(pipe.scheduler, 4))
    opened = [load_anchor(source, pipe, name=name) for name, source in anchors.items()]
    teacher = Teacher(base, Denoisers(base.denoiser, opened))
    assert len(seen) == 4
    for last, expected in seen:
        t = torch.tensor([int(last.timestep)] * 2)
        predicted = teacher(last.sample, t, conditions(base, call["prompt"]), table[:, t])
        tiny.assert_close(predicted, expected)


@pytest.mark.parametrize("family", [DDIMScheduler, EulerDiscreteScheduler])
def test_lam_by_timestep_is_the_samplers_lam_at_its_steps(family: Any) -> None:
    scheduler = family(timestep_spacing="trailing")
    lams = parse_lam({"a": Power(2), "b": Step(0.5, over="time"), "c": 0.3}, ("a", "b", "c"))
    scheduler.set_timesteps(20)
    table = lam_by_timestep(lams, scheduler)
    assert table.shape == (3, 1000)
    for i, t in enumerate(scheduler.timesteps.round().long().tolist()):
        assert table[0, t].item() == pytest.approx((i / 20) ** 2, abs=1e-6)
        assert table[1, t].item() == (1.0 if t <= 500 else 0.0)
    assert (table[0].diff() <= 0).all() and (table[2] == 0.3).all()
    assert torch.equal(lam_by_timestep(parse_lam(0.3, ("c",)), scheduler), table[2:])


# -- the student -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("span", [None, (0.0, 1.0)])
def test_a_student_starts_as_interpolated_weights(rank: int | None, span: tuple[float, float] | None) -> None:
    pipe, aligned, _ = tiny.make("sd")
    blend = Blend(pipe.unet, [(load_anchor(aligned, pipe), 0.5)])
    student = student_of(blend, replace(SHORT, lora_rank=rank, span=span), seed=0)
    call = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, pipe.unet.config.cross_attention_dim))
    with torch.no_grad():
        for own, other in zip(pipe.unet.parameters(), aligned.parameters(), strict=True):
            own.lerp_(other, 0.5)
        told = {} if span is None else {"timestep_cond": lam_embedding(torch.tensor([0.2, 0.9]))}
        tiny.assert_close(student(*call, **told).sample, pipe.unet(*call).sample)
    trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    assert trained and all(rank is None or "lora" in name or "cond_proj" in name for name in trained)
    assert any("cond_proj" in name for name in trained) == (span is not None)


def test_lam_is_embedded_as_a_plain_pipeline_embeds_its_guidance_scale() -> None:
    pipe, _, _ = tiny.make("sd")
    lams = torch.tensor([-0.3, 0.0, 0.25, 1.7])
    tiny.assert_close(lam_embedding(lams), pipe.get_guidance_scale_embedding(lams, embedding_dim=256))


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_the_loss_is_the_distance_to_the_mixed_prediction(tmp_path: Path, guided: bool) -> None:
    pipe, aligned, _ = tiny.make("sd")
    base, settings = Base(pipe), replace(SHORT, fold_guidance=guided)
    opened = [load_anchor(aligned, pipe)]
    student = student_of(Blend(pipe.unet, [(opened[0], 0.5)]), settings, 0)
    start = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    latents, table = torch.randn(6, 4, 8, 8), torch.linspace(0, 1, 1000, dtype=torch.float64)[None]
    samples = RealignedSamples(latents, torch.arange(6) % 3, None)
    curve = distil(
        base,
        Teacher(base, Denoisers(pipe.unet, opened)),
        student,
        samples,
        PROMPTS[:3],
        table,
        settings,
        2.5,
        TrainingRun(7, tmp_path / "checkpoint", lambda *_: None),
    )
    moved = student.state_dict()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in start.items())
    student.load_state_dict(start)
    told, untold, total = conditions(base, PROMPTS[:3]), unconditional(base, 1), 0.0
    for row, generator in zip((4, 5), row_generators(7, range(4, 6), "held out"), strict=True):
        noise, t = torch.randn(4, 8, 8, generator=generator), torch.randint(1000, (1,), generator=generator)
        x = base.noising.noised(latents[row : row + 1], noise[None], t)
        with torch.no_grad():

            def mixture(prompt: Any, x: torch.Tensor = x, t: torch.Tensor = t) -> torch.Tensor:
                lam = float(table[0, t])
                return (1 - lam) * pipe.unet(x, t, prompt).sample + lam * aligned(x, t, prompt).sample

            prompt = told["prompt_embeds"][row % 3][None]
            without = mixture(untold["prompt_embeds"])
            target = without + 2.5 * (mixture(prompt) - without) if guided else mixture(prompt)
            total += (student(x, t, prompt).sample - target).square().mean().item()
    assert curve.held_out[0] == pytest.approx(total / 2, rel=1e-4)


# -- from end to end ---------------------------------------------------------------------------------------------------


@pytest.mark.timeout(1200)
@pytest.mark.cases(0)
def test_a_few_steps_bring_the_digits_nearer(tmp_path: Path) -> None:
    pipe, prompts, sampler = digits.load_pipeline(), sample_prompts(40, 3), Sampler(6, 1.5, 20)
    anchor = digits.anchor_path(30.0)
    before = bake(pipe, anchor, 0.5, tmp_path / "weights", prompts=prompts[-8:], images=8, sampler=sampler)
    settings = replace(SHIPPED, samples=40, held_out=4, steps=30, batch=16)
    after = bake(
        pipe,
        anchor,
        0.5,
        tmp_path / "student",
        method="distill",
        prompts=prompts,
        images=8,
        sampler=sampler,
        distillation=settings,
    )
    start, end = before.judgements[0].error, after.judgements[0].error
    assert end.value < 0.75 * start.value and start.value > 0.1
    record = json.loads((tmp_path / "student/baking.json").read_text())
    assert record["curve"]["held_out"][-1] < record["curve"]["held_out"][0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "weights"]


def baked(tmp_path: Path, out: str = "out", report: Callable[..., None] = lambda *_: None, **changed: Any) -> Any:
    """A short distillation of a tiny model; `changed` are arguments of `bake` and fields of `Distillation`."""
    pipe, aligned, _ = tiny.make("sd")
    fields = {name: changed.pop(name) for name in list(changed) if name in Distillation.__dataclass_fields__}
    options: dict[str, Any] = (
        {
            "anchor": aligned,
            "lam": 0.5,
            "prompts": PROMPTS,
            "sampler": QUICK,
            "distillation": replace(SHORT, **fields),
        }
        | FAST
        | changed
    )
    return bake(
        pipe, options.pop("anchor"), options.pop("lam"), tmp_path / out, method="distill", report=report, **options
    )


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("unet/*.safetensors")))


class Interrupted(Exception):
    """Stands for a machine that went away."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], dict[str, torch.Tensor]]:
    """The weights of a distillation that nothing interrupted, by the rank of its LoRA."""

    @cache
    def of(rank: int | None) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("unbroken")
        baked(folder, lora_rank=rank)
        return weights_in(folder / "out")

    return of


@pytest.mark.parametrize(("stage", "rank"), [("drawing samples", 4), ("training", 4), ("training", None)])
@pytest.mark.cases(1)
def test_an_interrupted_distillation_ends_with_the_same_bits(
    tmp_path: Path,
    stage: str,
    rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
    unbroken: Callable[[int | None], dict[str, torch.Tensor]],
) -> None:
    eager = Distillation.plan
    monkeypatch.setattr(Distillation, "plan", lambda self: replace(eager(self), checkpoint_seconds=0))
    told: list[tuple[str, int]] = []

    def stop(at: str, done: int, planned: int, line: str) -> None:
        if at == stage and done >= 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        baked(tmp_path, "broken", stop, lora_rank=rank)
    assert [path.name for path in (tmp_path / "broken").iterdir()] == [".deradiff"]
    with pytest.raises(ValueError, match=naming(tmp_path / "broken", "distillation.steps 4", 5)):
        baked(tmp_path, "broken", lora_rank=rank, steps=5)
    baked(tmp_path, "broken", lambda stage, done, *_: told.append((stage, done)), lora_rank=rank)
    if stage == "training":
        assert ("training", 1) not in told and ("training", 3) in told
    again = weights_in(tmp_path / "broken")
    assert all(torch.equal(again[name], tensor) for name, tensor in unbroken(rank).items())
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("rank", [4, None])
def test_half_precision_and_savings_of_memory(tmp_path: Path, rank: int | None) -> None:
    pipe, aligned, _ = tiny.make("sdxl")
    settings = replace(SHORT, lora_rank=rank, span=(0.0, 1.0), accumulate=2, gradient_checkpointing=True)
    bake(
        pipe.to(torch.bfloat16),
        aligned,
        0.5,
        tmp_path / "out",
        method="distill",
        prompts=PROMPTS,
        sampler=QUICK,
        distillation=settings,
        **FAST,
    )
    baked = weights_in(tmp_path / "out")
    assert baked["conv_in.weight"].dtype == torch.bfloat16 and baked["time_embedding.cond_proj.weight"].any()


def test_a_lora_anchor_is_distilled_into_one_lora(tmp_path: Path) -> None:
    pipe, _, call = tiny.make("sd")
    adapter = tmp_path / "lora.safetensors"
    save_file(lora_weights(lora(pipe.unet)), adapter)
    done = baked(tmp_path, anchor=adapter, lam=Power(1), learning_rate=1e-12, images=2)
    assert done.form == "lora" and done.judgements[0].images == 2
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"pytorch_lora_weights.safetensors", "README.md", "baking.json", "sheet.png"}
    assert "load_lora_weights" in (tmp_path / "out/README.md").read_text()
    # Untrained, it is the anchor at the mean of λ over the noise schedule.
    pipe.save_pretrained(tmp_path / "base")
    images = sampled_without_deradiff(tmp_path / "base", call, tmp_path, tmp_path / "out")
    clock = Base(pipe).call.prepared(type(pipe.scheduler).from_config(pipe.scheduler.config), 3)
    mean = float(lam_by_timestep(parse_lam(Power(1), ("a",)), clock).mean())
    with deradiff.realign(pipe, adapter, mean, method="interpolate"):
        tiny.assert_close(images, tiny.sample(pipe, call), 1e-4)


def test_a_student_for_a_span_is_told_lam_by_a_plain_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    wearing = baking.wearing

    def counted(*asked: Any) -> Any:
        loaded.append(asked)
        return wearing(*asked)

    monkeypatch.setattr(baking, "wearing", counted)
    done = baked(tmp_path, span=(0.0, 1.5), lam=0.5, images=2)
    assert [judgement.lam for judgement in done.judgements] == ["λ = 0.5", "λ = 1.5"]
    assert len(loaded) == 1
    assert "guidance_scale=1 + λ" in (tmp_path / "out/README.md").read_text(encoding="utf-8")
    pipe: Any = StableDiffusionPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    told: list[tuple[int, torch.Tensor]] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        told.append((len(args[0]), kwargs["timestep_cond"]))

    pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    call = {"prompt": "a fox", "num_inference_steps": 2, "output_type": "latent"}
    images = [tiny.sample(pipe, call, guidance_scale=1 + lam) for lam in (0.0, 0.3, 1.0)]
    assert [rows for rows, _ in told] == [1] * 6  # guided by nothing else
    for lam, (_, condition) in zip((0.0, 0.3, 1.0), told[::2], strict=True):
        tiny.assert_close(condition, lam_embedding(torch.tensor([lam])), 1e-4)
    assert not torch.equal(images[0], images[2])


def test_folded_guidance_is_compared_without_guiding_again(tmp_path: Path) -> None:
    done = baked(tmp_path, fold_guidance=True, lora_rank=None, images=2)
    assert done.judgements[0].error.value > 0
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "call it with `guidance_scale=1`" in card and "Guidance of 2 is part of the model" in card


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"span": (0.0, 1.0), "lam": 1.2}, naming("λ = 1.2", "span", 0, 1)),
        ({"span": (0.0, 1.0), "lam": Power(2)}, naming("span", "schedule")),
        ({"prompts": ["one"]}, "1 different"),
        ({"lam": [0.5, 0.6]}, naming("λ", 2)),
    ],
)
def test_wrong_input_is_said(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        baked(tmp_path, **changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"lora_rank": 0}, "lora_rank = 0"),
        ({"held_out": 1024}, naming("1024 of 1024")),
        ({"batch": 10, "accumulate": 3}, naming(10, 3)),
        ({"learning_rate": float("nan")}, naming("learning rate", "nan")),
        ({"learning_rate": 0.0}, naming("learning rate", 0)),
        ({"dropout": 1.0}, naming("dropout", 1)),
        ({"span": (1.0, 0.0)}, naming("λ", 1, 0)),
        ({"span": (0.0, float("inf"))}, naming("span", "inf")),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Distillation(**fields)
    with pytest.raises(ValueError, match=naming(0, "steps", 1)):
        Sampler(steps=0)


def test_models_that_cannot_be_distilled(tmp_path: Path) -> None:
    pipe, aligned, _ = tiny.make("sd")
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(ValueError, match="time_cond_proj_dim"):
        bake(pipe, aligned, 0.5, tmp_path / "out", method="distill", prompts=PROMPTS)
    assert not list(tmp_path.iterdir())
