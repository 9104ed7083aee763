"""A study's server under fifty participants who vote at once, and under SIGKILL.

    python benchmarks/study.py [load] [kills]

Each part writes its numbers into `benchmarks/study.json`. Participants are threads of this process and the server is a
process of its own, on loopback; the images are noise of 512 pixels, so that no model is needed.

- load: fifty participants answer every pair as fast as pages come, with the eighteen images of each. Times are from a
  request's first byte to its answer's last, as participants have them.
- kills: the same, and the server is killed with SIGKILL at ten random moments and started again. A vote that got no
  answer is sent again, as a person would.

Both compare what was acknowledged with what the database holds.
"""

import hashlib
import http.client
import io
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from recording import keep_parts

from deradiff.experiments import plan as experiments
from deradiff.experiments.running import contents
from deradiff.experiments.store import Store
from deradiff.study import sources
from deradiff.study.plan import ANSWERS, QUESTIONS, StudyPlan, parse_plan, write_plan
from deradiff.study.votes import file_of
from deradiff.sweep.description import metadata

OUT = Path(__file__).with_suffix(".json")
PARTICIPANTS, PAIRS, CHECKS, KILLS = 50, 10, 2, 10
PAIR = r'name="pair" value="([^"]+)"'
RESTART = 120.0
"""Seconds that the server may take to come back."""


# -- a study of noise -------------------------------------------------------------------------------------------------


def experiment(folder: Path) -> None:
    """Twelve seeds of ten prompts by two models, as an experiment that was run would hold them."""
    plan = experiments.parse_plan(
        {
            "name": "benchmark",
            "reference": "digits",
            "models": {name: {"source": "digits:250"} for name in ("one", "other")},
            "prompts": {"all": {"prompts": [f"picture {n}" for n in range(PAIRS)], "seeds": "0:11"}},
            "sampling": {"plain": {"steps": 1}},
            "methods": [{"method": "model"}],
        },
        "the benchmark",
    )
    with Store(folder, create=True) as store:
        store.remember("plan", plan.model_dump(mode="json", exclude_unset=True))
        store.remember("fingerprints", {name: {"sha256": name} for name in ("", *plan.models)})
        for cell, item in contents(plan, store, fresh=False).cells.items():
            store.add_batches([[(item, metadata(cell.drawing))]])
            store.put([(item, noise(item), {})], 0.0)


def noise(name: str) -> bytes:
    """A picture of its own for every name: coarse noise, made smooth."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    coarse = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC).save(held, format="PNG", compress_level=1)
    return held.getvalue()


def plan_of(folder: Path) -> StudyPlan:
    """Each participant sees every prompt once."""
    drafted = sources.drafted(folder / "experiment", ["one,other"], folder).model_dump(mode="json")
    return parse_plan(drafted | {"pairs_per_participant": PAIRS, "attention_checks": CHECKS}, "the benchmark")


# -- server and participants ------------------------------------------------------------------------------------------


class Server:
    """`deradiff study serve` as a process of its own, always on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it says where it is."""
        command = [sys.executable, "-m", "deradiff", "study", "serve", str(self.folder / "study.yaml")]
        command += ["--out", str(self.folder / "study"), "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline().strip().rstrip("/").rpartition(":")[2])

    def kill(self) -> None:
        """End it without a word."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


@dataclass
class Log:
    """What participants have seen."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    acknowledged: dict[str, dict[str, str]] = field(default_factory=dict)
    """The answers of every pair whose vote got an answer."""
    resent: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def timed(self, kind: str, seconds: float) -> None:
        """Keep how long a request took."""
        with self.lock:
            self.seconds.setdefault(kind, []).append(seconds)


class Participant:
    """A browser's worth of HTTP: one connection, kept open, and its cookies; a request that fails is sent again."""

    def __init__(self, port: int, log: Log) -> None:
        self.port, self.log, self.cookie = port, log, ""
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def asks(self, kind: str, method: str, path: str, form: dict[str, str] | None = None) -> str:
        """The answer to a request."""
        until = time.monotonic() + RESTART
        while True:
            try:
                return self._once(kind, method, path, form)
            except (OSError, http.client.HTTPException):
                if time.monotonic() > until:
                    raise
                self._connection.close()
                with self.log.lock:
                    self.log.resent += kind == "vote"
                time.sleep(0.2)

    def _once(self, kind: str, method: str, path: str, form: dict[str, str] | None) -> str:
        headers = {"Cookie": self.cookie} if self.cookie else {}
        body = None if form is None else urlencode(form)
        began = time.perf_counter()
        self._connection.request(method, path, body, headers)
        answer = self._connection.getresponse()
        content = answer.read()
        self.log.timed(kind, time.perf_counter() - began)
        if answer.status not in (200, 303):
            raise RuntimeError(f"{method} {path}: {answer.status} {content[:300]!r}")
        if set_cookie := answer.getheader("set-cookie"):
            self.cookie = set_cookie.split(";")[0]
        return content.decode("latin-1")

    def takes_part(self, images: bool) -> None:
        """From the first page to thanks."""
        chance = random.Random(threading.get_ident())
        self.asks("first page", "GET", "/")
        self.asks("begin", "POST", "/begin", {})
        while (found := re.search(PAIR, page := self.asks("pair", "GET", "/pair"))) is not None:
            if images:
                for path in re.findall(r'<img src="([^"]+)"', page):
                    self.asks("image", "GET", path)
            answers: dict[str, str] = {question.key: chance.choice(ANSWERS) for question in QUESTIONS}
            self.asks("vote", "POST", "/vote", {"pair": found[1]} | answers)
            with self.log.lock:
                self.log.acknowledged[found[1]] = answers
        assert "Thank you" in page


def compared(log: Log, folder: Path) -> dict[str, int]:
    """What was acknowledged, beside what the database holds."""
    with sqlite3.connect(file_of(folder / "study")) as db:
        rows = list(db.execute("SELECT pair, question, answer FROM votes"))
        people = db.execute("SELECT COUNT(*) FROM participants").fetchone()[0]
    stored: dict[str, dict[str, str]] = {}
    for pair, question, answer in rows:
        stored.setdefault(pair, {})[question] = answer
    return {
        "participants": people,
        "pairs_acknowledged": len(log.acknowledged),
        "pairs_stored": len(stored),
        "lost_or_altered": sum(stored.get(pair) != answers for pair, answers in log.acknowledged.items()),
        "doubled": sum(count > 1 for count in Counter(row[:2] for row in rows).values()),
        "stored_but_not_acknowledged": len(stored.keys() - log.acknowledged.keys()),
    }


def everybody(server: Server, log: Log, images: bool) -> float:
    """All participants at once; returns the seconds they took."""
    began = time.perf_counter()
    with ThreadPoolExecutor(PARTICIPANTS) as pool:
        for done in [pool.submit(Participant(server.port, log).takes_part, images) for _ in range(PARTICIPANTS)]:
            done.result()
    return time.perf_counter() - began


# -- parts ------------------------------------------------------------------------------------------------------------


def load(folder: Path) -> dict[str, Any]:
    """Fifty participants, with images and without: a page's time is then the server's alone."""
    found: dict[str, Any] = {}
    for name, images in (("with_images", True), ("pages_and_votes_alone", False)):
        server, log = Server(folder), Log()
        try:
            seconds = everybody(server, log, images)
        finally:
            server.stop()
        every = [one for some in log.seconds.values() for one in some]
        times = {kind: milliseconds(some) for kind, some in ({"all": every} | log.seconds).items()}
        found[name] = {
            "seconds": round(seconds, 2),
            "requests": len(every),
            "milliseconds": times,
            **compared(log, folder),
        }
        for file in (folder / "study").glob("study.sqlite*"):
            file.unlink()
        for file in (folder / "study" / "images").iterdir():
            file.unlink()
        (folder / "study" / "images").rmdir()
    return found


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    return {"median": round(1e3 * median(seconds), 1), "p95": round(1e3 * quantiles(seconds, n=20)[-1], 1)}


def kills(folder: Path) -> dict[str, Any]:
    """Ten kills while fifty vote."""
    server, log, chance = Server(folder), Log(), random.Random(0)
    killed, votes_before = 0, []
    voting = threading.Thread(target=everybody, args=(server, log, True))
    try:
        voting.start()
        while voting.is_alive() and killed < KILLS:
            time.sleep(chance.uniform(0.1, 0.6))
            votes_before.append(len(log.acknowledged))
            server.kill()
            killed += 1
            server.start()
        voting.join()
    finally:
        server.stop()
    return {"killed": killed, "acknowledged_before_each": votes_before, "resent": log.resent} | compared(log, folder)


def parts(asked: list[str]) -> Iterator[tuple[str, Any]]:
    """The parts that were asked for; all by default."""
    known = {"load": load, "kills": kills}
    for name in asked or known:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            experiment(folder / "experiment")
            (folder / "study.yaml").write_text(write_plan(plan_of(folder)), encoding="utf-8")
            yield name, known[name](folder)


if __name__ == "__main__":
    keep_parts(parts(sys.argv[1:]), OUT)
