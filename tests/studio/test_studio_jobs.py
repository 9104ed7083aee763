"""One image at a time, in order; a page's job can be stopped, and no other page's."""

import threading
import time
from typing import Any

import pytest

from deradiff.studio.jobs import Cancelled, PageJob, Pages, QueueFull, Turns, streamed
from messages import naming


def test_a_newer_job_of_a_page_takes_the_place_of_the_last() -> None:
    pages = Pages()
    first, other = pages.begin("a"), pages.begin("b")
    second = pages.begin("a")
    with pytest.raises(Cancelled) as stopped:
        first.check()
    assert stopped.value.why == "superseded"
    second.check()
    other.check()


def test_one_pages_cancel_does_not_stop_anothers_image() -> None:
    pages = Pages()
    mine, theirs = pages.begin("mine"), pages.begin("theirs")
    pages.cancel("mine")
    pages.cancel("nobody")
    theirs.check()
    with pytest.raises(Cancelled) as stopped:
        mine.rest(10)
    assert stopped.value.why == "cancelled"
    pages.leave("theirs")
    assert theirs.stopped and pages.begin("theirs").stopped is False


def test_what_a_job_was_stopped_by_first_counts() -> None:
    job = PageJob()
    job.stop("cancelled")
    job.stop("superseded")
    with pytest.raises(Cancelled) as stopped:
        job.check()
    assert stopped.value.why == "cancelled"


def test_rest_waits_and_ends_at_once_when_stopped() -> None:
    job, begun = PageJob(), time.perf_counter()
    job.rest(0.05)
    assert time.perf_counter() - begun >= 0.05
    threading.Timer(0.05, job.stop, ["cancelled"]).start()
    with pytest.raises(Cancelled):
        job.rest(30)
    assert time.perf_counter() - begun < 5


def in_line(turns: Turns, count: int) -> None:
    """Wait until so many have asked for their turn, however busy the machine is."""
    until = time.monotonic() + 60
    while len(turns._line) < count:
        assert time.monotonic() < until
        time.sleep(0.002)


def test_turns_are_taken_one_at_a_time_in_the_order_of_asking() -> None:
    turns, order, inside = Turns(), [], []

    def work(name: int) -> None:
        with turns.taken(PageJob()):
            inside.append(name)
            assert len(inside) == 1
            time.sleep(0.01)
            order.append(name)
            inside.remove(name)

    gate = PageJob()
    threads = []
    with turns.taken(gate):
        for name in range(6):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            in_line(turns, 2 + name)
    for thread in threads:
        thread.join(10)
    assert order == list(range(6))


def test_who_waits_is_told_how_many_come_first_and_may_give_up() -> None:
    turns, told, job = Turns(), list[int](), PageJob()

    def tell(ahead: int) -> None:
        told.append(ahead)
        threading.Timer(0.05, job.stop, ["cancelled"]).start()

    with turns.taken(PageJob()), pytest.raises(Cancelled), turns.taken(job, tell):
        pytest.fail("it was another's turn")
    assert told == [1]
    with turns.taken(PageJob()):
        pass


def test_the_line_is_bounded() -> None:
    turns = Turns(most=1)
    waiting = PageJob()
    with turns.taken(PageJob()):
        thread = threading.Thread(target=_ignore, args=(turns, waiting))
        thread.start()
        in_line(turns, 2)
        with pytest.raises(QueueFull, match=naming("2 images")), turns.taken(PageJob()):
            pass
        waiting.stop("left")
        thread.join(10)


def _ignore(turns: Turns, job: PageJob) -> None:
    with pytest.raises(Cancelled), turns.taken(job):
        pass


def test_an_error_gives_the_turn_on() -> None:
    turns = Turns()
    with pytest.raises(ValueError, match="mine"), turns.taken(PageJob()):
        raise ValueError("mine")
    with turns.taken(PageJob()):
        pass


def test_news_come_while_the_work_goes_on_and_the_outcome_last() -> None:
    heard, goes_on = [], threading.Event()

    def work(report: Any) -> str:
        report(1)
        assert goes_on.wait(10)
        for number in range(2, 50):
            report(number)
        return "done"

    for news in streamed(work, PageJob()):
        heard.append(news)
        goes_on.set()
    assert heard[0] == 1 and heard[-1] == "done"
    assert heard[:-1] == sorted(heard[:-1])  # those between may be skipped, and none comes late


def test_what_the_work_raises_reaches_who_listens() -> None:
    def work(report: Any) -> None:
        raise OSError("no such model")

    with pytest.raises(OSError, match="no such model"):
        list(streamed(work, PageJob()))


def test_work_that_nobody_listens_to_any_more_has_ended() -> None:
    job, ended = PageJob(), threading.Event()

    def work(report: Any) -> None:
        try:
            while True:
                job.check()
                report("working")
                time.sleep(0.005)
        finally:
            ended.set()

    news = streamed(work, job)
    assert next(news) == "working"
    news.close()  # type: ignore[attr-defined]
    assert ended.is_set()


def test_work_of_another_kind_goes_on() -> None:
    pages = Pages()
    image, load = pages.begin("a"), pages.begin("a", "load")
    pages.begin("a")
    assert image.why == "superseded" and load.why is None
    pages.cancel("a")
    assert load.why == "cancelled"  # a page's cancel is for all that it waits for


def test_a_cancel_counts_for_what_goes_on_whenever_it_came() -> None:
    pages = Pages()
    preview = pages.begin("a")
    pages.cancel("a")  # while it was drawn, or after it had ended
    exact = pages.begin("a", goes_on=True)
    assert preview.why == exact.why == "cancelled"
    pages.begin("a")
    assert pages.begin("a", goes_on=True).why is None
