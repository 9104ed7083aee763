"""Several threads around one realigned denoiser: each draws what it would draw alone, or is told why not."""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, cast

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

from anchor_files import lora
from deradiff import realign, sample_particles
from deradiff.sampling.blocked_methods import DialError
from deradiff.sampling.pictures import draw
from tiny import make, sample

attack = pytest.mark.attack("two threads, one dial")


def together(*works: Callable[[], Any]) -> list[Any]:
    """What these return, or raise, when each is done in a thread of its own, begun at once."""
    barrier, results = threading.Barrier(len(works)), [cast(Any, None)] * len(works)

    def run(k: int, work: Callable[[], Any]) -> None:
        barrier.wait(30)
        try:
            results[k] = work()
        except BaseException as error:
            results[k] = error

    threads = [threading.Thread(target=run, args=(k, work), name=f"drawer {k}") for k, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return results


def in_a_thread(work: Callable[[], Any]) -> Any:
    return together(work)[0]


def another(pipe: Any, scheduler: Any = DDIMScheduler) -> Any:
    """A second pipeline of the same parts, with a scheduler of its own."""
    other = StableDiffusionPipeline(**pipe.components)
    other.scheduler = scheduler.from_config(pipe.scheduler.config)
    other.set_progress_bar_config(disable=True)
    return other


class Turns:
    """Callbacks that make two runs take their steps in turn, so that they overlap for certain."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)

    def __call__(self, *args: Any) -> Any:
        with suppress(threading.BrokenBarrierError):  # the other was refused, or has more steps
            self.barrier.wait(5)
        return args[-1] if args else None


@attack
@pytest.mark.parametrize("form", ["module", "lora"])
@pytest.mark.parametrize("options", [{}, {"method": "interpolate"}, {"reuse": 2}, {"batched": False}])
@pytest.mark.cases(3)
def test_two_pipelines_around_one_denoiser_draw_what_each_draws_alone(form, options, tmp_path):
    pipe, anchor, call = make("sd")
    if form == "lora":
        lora(pipe.unet).save_pretrained(tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    other = another(pipe, EulerAncestralDiscreteScheduler)
    with realign(pipe, tmp_path if form == "lora" else anchor, 0.5, **options) as dial:
        dial.attach(other)
        alone = [sample(pipe, call, 1), sample(other, call, 2, prompt=["x"] * 3, negative_prompt=["y"] * 3)]
        weights = dial.importance_weights.log_weights if dial.method == "mixture" else None
        turns = Turns()
        drawn = together(
            lambda: sampled(pipe, call, 1, callback_on_step_end=turns),
            lambda: (
                sampled(other, call, 2, prompt=["x"] * 3, negative_prompt=["y"] * 3, callback_on_step_end=turns),
                dial.importance_weights.log_weights if weights is not None else None,
            ),
        )
    assert torch.equal(drawn[0], alone[0]) and torch.equal(drawn[1][0], alone[1])
    assert weights is None or torch.equal(drawn[1][1], weights)


def sampled(pipe: Any, call: dict[str, Any], seed: int, **changes: Any) -> torch.Tensor:
    """`tiny.sample` without touching torch's global generator, which threads share."""
    return pipe(generator=torch.Generator().manual_seed(seed), **(call | changes)).images


@attack
def test_one_pipeline_in_two_threads_refuses_the_second_and_finishes_the_first():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5):
        alone = sample(pipe, call, 1)
        refusals = []

        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            if step == 1:
                refusals.append(in_a_thread(lambda: sampled(pipe, call, 2, guidance_scale=9.0)))
            return kwargs

        assert torch.equal(sampled(pipe, call, 1, callback_on_step_end=at_a_step), alone)
        (refusal,) = refusals
        assert isinstance(refusal, DialError) and "MainThread" in str(refusal) and "attach" in str(refusal)
        assert torch.equal(in_a_thread(lambda: sampled(pipe, call, 1)), alone), "in use for ever"


@attack
@pytest.mark.parametrize("attached", [True, False])
def test_one_scheduler_in_two_threads_refuses_the_second_and_finishes_the_first(attached):
    pipe, anchor, call = make("sd")
    other = StableDiffusionPipeline(**pipe.components)  # the scheduler, too
    with realign(pipe, anchor, 0.5) as dial:
        if attached:
            dial.attach(other)
        alone, refusals = sample(pipe, call, 1), []

        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            if step == 2:
                refusals.append(in_a_thread(lambda: sampled(other, call, 2)))
            return kwargs

        assert torch.equal(sampled(pipe, call, 1, callback_on_step_end=at_a_step), alone)
        assert isinstance(refusals[0], DialError) and "scheduler" in str(refusals[0])
        assert torch.equal(in_a_thread(lambda: sampled(other, call, 1)), alone)


@attack
def test_a_pipeline_that_the_dial_does_not_know_is_told_to_attach():
    pipe, anchor, call = make("sd")
    other = another(pipe)
    with realign(pipe, anchor, 0.5):
        alone, refusals = sample(pipe, call, 1), []

        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            if step == 0:
                refusals.append(in_a_thread(lambda: sampled(other, call, 2)))
            return kwargs

        assert torch.equal(sampled(pipe, call, 1, callback_on_step_end=at_a_step), alone)
        assert isinstance(refusals[0], DialError) and "dial.attach" in str(refusals[0])


@attack
def test_loops_written_by_hand_in_two_threads():
    """One scheduler each: both are right. One scheduler: whoever began first is told at the next step."""
    pipe, anchor, _ = make("sd")
    text, noise = torch.zeros(1, 5, 16), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def loop(scheduler: Any, at_a_step: Callable[[], Any] = lambda: None) -> torch.Tensor:
        scheduler.set_timesteps(4)
        latents = noise
        for t in scheduler.timesteps:
            output = pipe.unet(scheduler.scale_model_input(latents, t), t, text).sample
            latents = scheduler.step(output, t, latents).prev_sample
            at_a_step()
        return latents

    with realign(pipe, anchor, 0.5) as dial:
        other = another(pipe)
        dial.attach(other)
        expected = [loop(pipe.scheduler), loop(other.scheduler)]
        turns = Turns()
        drawn = together(lambda: loop(pipe.scheduler, turns), lambda: loop(other.scheduler, turns))
        assert all(torch.equal(a, b) for a, b in zip(drawn, expected, strict=True))
        begun, over = threading.Event(), threading.Event()
        results: list[Any] = []

        def wait() -> None:
            begun.set()
            over.wait(60)

        def first() -> torch.Tensor:
            return loop(pipe.scheduler, wait)

        def second() -> torch.Tensor:
            begun.wait(60)
            try:
                return loop(pipe.scheduler)
            finally:
                over.set()

        results = together(first, second)
        assert isinstance(results[0], DialError) and torch.equal(results[1], expected[0])
        assert torch.equal(loop(pipe.scheduler), expected[0])


@attack
def test_timesteps_set_in_one_thread_and_steps_taken_in_another():
    pipe, anchor, _ = make("sd")
    text, noise = torch.zeros(1, 5, 16), torch.ones(1, 4, 8, 8)
    with realign(pipe, anchor, 0.5), torch.no_grad():
        finals = []
        calls: list[Callable[[Callable[[], Any]], Any]] = [no_grad, lambda work: in_a_thread(partial(no_grad, work))]
        for call in calls:
            pipe.scheduler.set_timesteps(3)
            latents = noise
            for t in pipe.scheduler.timesteps:
                output = call(partial(pipe.unet, latents, t, text)).sample
                latents = pipe.scheduler.step(output, t, latents).prev_sample
            finals.append(latents)
    assert torch.equal(*finals)


def no_grad(work: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return work()


@attack
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_a_run_that_breaks_off_does_not_keep_the_dial(error):
    pipe, anchor, call = make("sd")

    def break_off(*_: Any) -> Any:
        raise error

    with realign(pipe, anchor, 0.5):
        alone = sample(pipe, call, 1)
        for broken in (lambda: sampled(pipe, call, 2, callback_on_step_end=break_off),) * 2:
            assert isinstance(in_a_thread(broken), error)
        with pytest.raises(error):
            sampled(pipe, call, 2, callback_on_step_end=break_off)
        assert torch.equal(in_a_thread(lambda: sampled(pipe, call, 1)), alone)
        assert torch.equal(sampled(pipe, call, 1), alone)


@attack
def test_lambda_set_by_another_thread_takes_effect_at_the_next_step():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.2, reuse=2) as dial:

        def here(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            if step == 1:
                dial.lam = 0.9
            return kwargs

        def elsewhere(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            if step == 1:
                in_a_thread(lambda: setattr(dial, "lam", 0.9))
            return kwargs

        finals = []
        for turn in (here, elsewhere):
            dial.lam = 0.2
            finals.append(sample(pipe, call, 1, callback_on_step_end=turn))
        dial.lam = 0.2
        assert torch.equal(*finals) and not torch.equal(finals[0], sample(pipe, call, 1))
        assert dial.last is not None and float(dial.last.mixture_weights[1]) == pytest.approx(0.2)


@attack
def test_two_dials_in_two_threads():
    made = [make("sd"), make("sdxl")]
    dials = [realign(pipe, anchor, 0.5) for pipe, anchor, _ in made]
    alone = [sample(pipe, call, 1) for pipe, _, call in made]
    turns = Turns()
    drawn = together(
        *(lambda pipe=pipe, call=call: sampled(pipe, call, 1, callback_on_step_end=turns) for pipe, _, call in made)
    )
    assert all(torch.equal(a, b) for a, b in zip(drawn, alone, strict=True))
    for dial in dials:
        dial.remove()


@attack
def test_particles_in_one_thread_are_not_those_of_another():
    pipe, anchor, call = make("sd")
    call = {"num_inference_steps": 4, "output_type": "latent", "height": 16, "width": 16, "guidance_scale": 1.0}
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    other, third = another(pipe, DDPMScheduler), another(pipe)

    def particles(which: Any, seed: int, **changes: Any) -> Any:
        generator = torch.Generator().manual_seed(seed)
        return sample_particles(which, "a red fox", 4, ess_threshold=1.0, generator=generator, **call, **changes)

    with realign(pipe, anchor, 0.5) as dial:
        dial.attach(other)
        dial.attach(third)
        plain = call | {"prompt": ["x", "y"]}
        alone = particles(pipe, 1), particles(other, 2), sampled(third, plain, 3)
        turns = Turns()
        turns.barrier = threading.Barrier(3)
        drawn = together(
            lambda: particles(pipe, 1, callback_on_step_end=turns),
            lambda: particles(other, 2, callback_on_step_end=turns),
            lambda: sampled(third, plain, 3, callback_on_step_end=turns),
        )
    for expected, got in zip(alone[:2], drawn[:2], strict=True):
        assert torch.equal(got.images, expected.images) and torch.equal(got.log_weights, expected.log_weights)
    assert torch.equal(drawn[2], alone[2])


@attack
def test_a_dial_is_not_removed_in_the_middle_of_another_threads_image():
    pipe, anchor, call = make("sd")
    dial = realign(pipe, anchor, 0.5)
    alone, refusals = sample(pipe, call, 1), []

    def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
        if step == 1:
            refusals.append(in_a_thread(dial.remove))
        return kwargs

    assert torch.equal(sampled(pipe, call, 1, callback_on_step_end=at_a_step), alone)
    assert isinstance(refusals[0], DialError) and "MainThread" in str(refusals[0])
    dial.remove()
    assert type(pipe) is StableDiffusionPipeline


@attack
def test_a_pipelines_class_is_its_own_for_all_who_ask(tmp_path):
    pipe, anchor, call = make("sd")
    plain = sample(pipe, call)
    with realign(pipe, anchor, 0.5):
        assert type(pipe).__name__ == "StableDiffusionPipeline" and isinstance(pipe, StableDiffusionPipeline)
        made = type(pipe)(**{**pipe.components, "scheduler": DDIMScheduler()})
        assert type(made) is StableDiffusionPipeline
        assert type(type(pipe).from_pipe(pipe)) is StableDiffusionPipeline
        pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(sample(again, call), plain)


@attack
def test_the_dial_may_be_read_and_set_while_another_thread_draws():
    pipe, anchor, call = make("sd")
    with realign(pipe, anchor, 0.5) as dial:
        alone, answers = sample(pipe, call, 1), []

        def ask() -> Any:
            dial.reuse = dial.reuse
            dial.watching = False
            return dial.path, dial.why, dial.anchors, repr(dial), dial.reused, dial.last

        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            answers.append(in_a_thread(ask))
            return kwargs

        assert torch.equal(sampled(pipe, call, 1, callback_on_step_end=at_a_step), alone)
        assert all(isinstance(answer, tuple) and answer[0] == "prediction" for answer in answers)
        assert [answer[-1].at for answer in answers] == list(range(len(answers)))


@attack
@pytest.mark.parametrize("ends_first", ["the one that began", "the one that came"])
def test_pipelines_that_share_a_decoder_and_a_tokenizer_hear_their_own_alone(ends_first):
    """One of them draws NaN: the other's images are sound, and the shared parts are afterwards what they were."""
    pipe, _, call = make("sd")
    call, other = call | {"output_type": "pt"}, another(pipe)
    kinds = type(pipe.tokenizer), type(pipe.vae).decode
    began, came, ended = threading.Event(), threading.Event(), threading.Event()
    waits = ended if ends_first == "the one that came" else came

    def sound() -> Any:
        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            began.set()
            assert waits.wait(60)
            return kwargs

        drawn = draw(pipe, **call, callback_on_step_end=at_a_step)
        ended.set()
        return drawn.flaws

    def spoiled() -> Any:
        assert began.wait(60)

        def at_a_step(_: Any, step: int, __: Any, kwargs: Any) -> Any:
            came.set()
            if ends_first != "the one that came":
                assert ended.wait(60)
            return kwargs | {"latents": kwargs["latents"] * torch.nan}

        drawn = draw(other, **call, callback_on_step_end=at_a_step, callback_on_step_end_tensor_inputs=["latents"])
        ended.set()
        return drawn.flaws

    flaws, others = together(sound, spoiled)
    assert flaws == [None] * len(flaws) and all(flaw.origin == "latents" for flaw in others) and len(others) > 0
    assert (type(pipe.tokenizer), type(pipe.vae).decode) == kinds
    assert "decode" not in vars(pipe.vae) and "postprocess" not in vars(pipe.image_processor)
