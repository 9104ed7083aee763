"""What prompts lose to tokenizers, against what the pipelines' encoders were really given; and what libraries say."""

import csv
import json
import logging
import warnings
from pathlib import Path
from threading import Event, Thread, current_thread, main_thread
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import tiny
import tiny_parts
from deradiff import baking
from deradiff.alignment.base import Base
from deradiff.cli import app, terminal
from deradiff.experiments import executors, running
from deradiff.experiments.plan import parse_plan
from deradiff.experiments.store import Store
from deradiff.sampling import truncation
from deradiff.sampling.truncation import PromptCut, cuts, watched
from deradiff.studio import drawing
from deradiff.studio.jobs import PageJob
from deradiff.sweep import library_messages
from deradiff.sweep.drawing import realigned
from deradiff.sweep.settings import Column, Settings
from small_experiment import SMALL, reported, silent

cut_prompts = pytest.mark.attack("a prompt cut in silence")
muted = pytest.mark.attack("muted libraries")

LONG = "abcd efgh ijkl mnop qrst uvwx"
"""24 tokens of the tiny tokenizer, which keeps 20, two of them its own."""
LOST = "st uvwx"
QUICK: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 3.0, "output_type": "latent"}


def sentencepiece() -> PreTrainedTokenizerFast:
    """A tokenizer of T5's kind: a piece for every letter, an end and no beginning."""
    letters = [("▁", -3.0), *((letter, -2.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    backend = Tokenizer(Unigram([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], 2, False))
    backend.pre_tokenizer = Metaspace()
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@cut_prompts
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_what_is_lost_is_what_the_encoder_never_saw(kind: str) -> None:
    pipe, _, _ = tiny.make(kind)
    seen: list[list[int]] = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda _, given: seen.append(given[0][0].tolist()))
    with pytest.warns(PromptCut) as warned, watched(pipe):
        pipe(prompt=LONG, negative_prompt=LONG[::-1], **QUICK)
    hook.remove()
    told = {cut.prompt: cut for cut in cuts(pipe)}
    assert set(told) == {LONG, LONG[::-1]} and sum(warning.category is PromptCut for warning in warned) == 2
    assert told[LONG].lost == LOST and told[LONG].limit == 20
    assert told[LONG].tokenizers == (("tokenizer",) if kind == "sd" else ("tokenizer", "tokenizer_2"))
    shown = pipe.tokenizer.decode(seen[0], skip_special_tokens=True)
    assert shown.replace(" ", "") + told[LONG].lost.replace(" ", "") == LONG.replace(" ", "")
    assert len(seen[0]) == 20


@cut_prompts
def test_the_last_token_that_fits_is_not_called_lost() -> None:
    pipe, _, _ = tiny.make("sd")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromptCut)
        with watched(pipe):
            pipe(prompt="abcdefghijklmnopqr", **QUICK)  # 18 letters and 2 of its own
    with pytest.warns(PromptCut), watched(pipe):
        pipe(prompt="abcdefghijklmnopqrs", **QUICK)
    assert [cut.lost for cut in cuts(pipe)] == ["s"]


@cut_prompts
@pytest.mark.parametrize(("given", "limit"), [({}, 128), ({"max_sequence_length": 30}, 30)])
def test_the_limit_is_that_of_the_pipelines_call(given: dict[str, int], limit: int) -> None:
    class Encoder:
        def __init__(self) -> None:
            self.tokenizer = sentencepiece()
            self.components = {"tokenizer": self.tokenizer, "scheduler": None}

        def __call__(self, prompt: list[str], max_sequence_length: int = 128) -> Any:
            return self.tokenizer(
                prompt, padding="max_length", max_length=max_sequence_length, truncation=True, return_tensors="pt"
            )

    pipe, long = Encoder(), "a red fox jumps over " * 12
    plain = pipe([long, "short"], **given)["input_ids"]
    with pytest.warns(PromptCut), watched(pipe):
        assert torch.equal(pipe([long, "short"], **given)["input_ids"], plain)
    [cut] = cuts(pipe)
    kept = pipe.tokenizer.decode(plain[0], skip_special_tokens=True).replace("▁", "")
    assert (cut.prompt, cut.limit) == (long, limit) and plain.shape[1] == limit
    assert kept.replace(" ", "") + cut.lost.replace(" ", "") == long.replace(" ", "")


@cut_prompts
def test_observing_changes_neither_images_nor_tokenizers() -> None:
    pipe, _, call = tiny.make("sdxl")
    call |= {"prompt": [LONG, "a"], "negative_prompt": ["b", LONG]}
    kinds = type(pipe.tokenizer), type(pipe.tokenizer_2)
    expected = tiny.sample(pipe, call)
    with pytest.warns(PromptCut), watched(pipe):
        assert torch.equal(tiny.sample(pipe, call), expected)
    assert (type(pipe.tokenizer), type(pipe.tokenizer_2)) == kinds
    with pytest.raises(ZeroDivisionError), watched(pipe):
        raise ZeroDivisionError
    assert (type(pipe.tokenizer), type(pipe.tokenizer_2)) == kinds


@cut_prompts
def test_a_prompt_inside_another_is_not_the_one_that_was_cut() -> None:
    pipe, _, _ = tiny.make("sd")
    with pytest.warns(PromptCut), watched(pipe):
        pipe(prompt=[LONG, "abcd"], **QUICK)
    assert cuts(pipe, ["abcd"]) == [] and [cut.prompt for cut in cuts(pipe, [LONG.upper()])] == [LONG]


# -- every maker of images ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    pipe, anchor, _ = tiny.make("sd")
    pipe.save_pretrained(folder / "reference")
    anchor.save_pretrained(folder / "anchor")  # type: ignore[operator]
    return folder / "reference", folder / "anchor"


@cut_prompts
def test_generate_says_it_once_and_records_it(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["generate", models[0], "-a", models[1], "-p", LONG, "-p", "a", "--negative-prompt", f"no {LONG}"]
    words += ["--lam", "0,1", "--seed", "0:1", "--steps", "2", "--batch-size", "2", "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert result.stderr.count(f"'{LONG}'") == 1 and result.stderr.count(f"'no {LONG}'") == 1
    assert LOST in result.stderr and "truncated" not in result.stderr and "Token indices" not in result.stderr
    record = json.loads((tmp_path / "out" / "record.json").read_text(encoding="utf-8"))
    assert {cut["prompt"]: cut["limit"] for cut in record["cut_prompts"]} == {LONG: 20, f"no {LONG}": 20}
    for image in record["images"]:
        assert {cut["prompt"] for cut in image["cut_prompts"]} == {f"no {LONG}", image["prompt"]} - {"a"}


@cut_prompts
def test_an_experiment_tells_in_run_status_report_and_table(tmp_path: Path) -> None:
    prompt = "the digit one " * 30
    plan = SMALL | {"prompts": {"few": {"prompts": [prompt, "the digit one"], "seeds": "0:1"}}}
    (tmp_path / "plan.yaml").write_text(json.dumps(plan))
    run = ["experiment", "run", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "run"), "--workers", "1"]
    result = CliRunner().invoke(app, run)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("was cut") == 1
    assert CliRunner().invoke(app, run).stderr.count("was cut") == 1  # also where nothing is left to draw
    assert "was cut" in CliRunner().invoke(app, ["experiment", "status", str(tmp_path / "run")]).stderr
    assert "Prompts that were cut" in reported(tmp_path / "run")
    CliRunner().invoke(app, ["experiment", "export", str(tmp_path / "run"), "--out", str(tmp_path / "table")])
    rows = list(csv.DictReader((tmp_path / "table" / "images.csv").open(encoding="utf-8")))
    assert all(bool(row["cut_prompts"]) == (row["prompt"].strip() != "the digit one") for row in rows)


@cut_prompts
def test_workers_of_their_own_tell_the_driver(models: tuple[Path, Path], tmp_path: Path) -> None:
    plan = parse_plan(
        {
            "name": "cut",
            "reference": str(models[0]),
            "models": {"a": {"source": str(models[1])}},
            "prompts": {"few": {"prompts": [LONG], "seeds": [0]}},
            "sampling": {"two": {"steps": 2}},
            "methods": [{"method": "reference"}, {"method": "realign", "anchors": ["a"], "lam": [0.5]}],
            "scores": [],
            "features": [],
        },
        "the plan",
    )
    with pytest.warns(PromptCut):
        outcome = running.run(plan, tmp_path / "run", lambda: executors.processes(plan, "cpu", 1, 1), silent)
    assert [cut.lost for cut in outcome.cut] == [LOST]
    with Store(tmp_path / "run", write=False) as store:
        assert all(told["cut_prompts"] for told, _, _ in store.diagnostics().values())


@cut_prompts
def test_baking_aligning_and_the_studio_tell(models: tuple[Path, Path], tmp_path: Path) -> None:
    pipe = tiny.make("sd")[0]
    with pytest.warns(PromptCut):
        baking.bake(pipe, models[1], 0.5, tmp_path / "baked", prompts=[LONG], images=1, sampler=baking.Sampler(2))
    with pytest.warns(PromptCut):
        Base(tiny.make("sd")[0]).call.encode_prompts([LONG])
    settings = Settings(
        reference=str(models[0]),
        anchors={"anchor": str(models[1])},
        prompts=(LONG,),
        columns=(Column(lam=0.5),),
        seeds=(0,),
        steps=2,
        device="cpu",
    )
    with realigned(settings) as (own, dial), warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCut)
        for _ in range(2):  # also where the prompt was encoded before
            [drawn] = drawing.draw(settings, own, dial, PageJob(), lambda _: None)
            assert any(LOST in words for words in drawn.warned)


# -- libraries ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def relayed() -> Any:
    """The lines that libraries say."""
    lines: list[str] = []
    held = {
        name: (logging.getLogger(name).handlers, logging.getLogger(name).propagate) for name in library_messages.SOURCES
    }
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        library_messages.relay(lambda line, _: lines.append(line))
        yield lines
    for name, (handlers, propagate) in held.items():
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = handlers, propagate


@muted
def test_what_matters_comes_through_as_one_line_and_once(relayed: list[str], tmp_path: Path) -> None:
    pipe = tiny.make("sd")[0]
    for _ in range(2):
        type(pipe.unet).from_config(dict(pipe.unet.config) | {"strange_setting": 3})
        warnings.warn("lines\n  of a library", UserWarning, stacklevel=1)
        logging.getLogger("peft.tuners").warning("Found missing adapter keys: a.b")
    assert sum("strange_setting" in line for line in relayed) == 1
    assert relayed.count("lines of a library") == 1
    assert relayed.count("peft: Found missing adapter keys: a.b") == 1
    assert not any("\n" in line for line in relayed)


@muted
def test_only_what_is_listed_is_kept_back(relayed: list[str]) -> None:
    import numpy as np

    pipe = tiny.make("sd")[0]
    pipe(prompt=LONG, **QUICK)
    np.array([np.nan]).astype("uint8")
    assert not relayed
    assert all(why for why in library_messages.MUTED.values())


@muted
def test_many_cut_prompts_are_not_many_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        terminal.pass_on_warnings()
        for number in range(100):
            warnings.warn(f"prompt {number} was cut", PromptCut, stacklevel=1)
    assert capsys.readouterr().err.count("\n") == terminal.LISTED + 1


@muted
def test_ordinary_commands_say_nothing_more(models: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["generate", models[0], "-a", models[1], "-p", "a", "--lam", "0.5", "--steps", "2", "--out", tmp_path / "o"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0 and "warning" not in result.stderr, result.stderr


@pytest.mark.parametrize("other", ["__call__", "encode", "tokenize"])
def test_threads_that_share_a_tokenizer_take_turns(other: str) -> None:
    """A fast tokenizer keeps a call's padding in itself: another thread's between setting and using it must wait."""
    tokenizer: Any = tiny_parts.tokenizer()
    asked, done = Event(), Event()
    set_padding = tokenizer.set_truncation_and_padding

    def set_and_let_the_other_come(*args: Any, **kwargs: Any) -> None:
        set_padding(*args, **kwargs)
        if current_thread() is main_thread() and not asked.is_set():
            asked.set()
            done.wait(0.3)  # for nothing, where it has to wait

    def encode_otherwise() -> None:
        assert asked.wait(30)
        with truncation._observed(tokenizer, None):
            getattr(type(tokenizer), other)(tokenizer, "a fox")
        done.set()

    with patch.object(tokenizer, "set_truncation_and_padding", set_and_let_the_other_come):
        thread = Thread(target=encode_otherwise)
        thread.start()
        with truncation._observed(tokenizer, None):
            encoded = tokenizer("a fox", padding="max_length", max_length=20, truncation=True)
        thread.join(30)
    assert len(encoded["input_ids"]) == 20 and done.is_set()
