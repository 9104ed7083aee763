"""How long a visitor waits for a page while hundreds of connections to the server say nothing.

    python benchmarks/attack_servers.py

Loopback only, less than two minutes for each server.
"""

import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import study
from deradiff.study.plan import write_plan

KINDS = ("studio", "study")

OWING = (
    b"",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    b"POST /begin HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nslow",
)
"""What the connections say, in turn: nothing, half a head, half a body."""

VISITS = 5

ATTEMPTS = 60.0
"""Seconds that a visit may take before it counts as one that failed."""


def silent_sockets(kind: str, sockets: int = 600) -> float:
    """Hold so many silent connections to a server of this kind, "studio" or "study"; the longest visit in seconds.

    A visit is the first page with its scripts, styles and pictures, on connections of its own. Raises `OSError` where
    one fails.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory() as folder, served(kind, Path(folder)) as address, ExitStack() as held:
        alone = visit(address)
        where = urlsplit(address)
        for number in range(sockets):
            opened = held.enter_context(socket.create_connection((str(where.hostname), int(where.port or 0)), 10))
            opened.sendall(OWING[number % len(OWING)])
        longest = max(visit(address) for _ in range(VISITS))
    print(f"{kind}: a page in {alone:.2f} s, and in {longest:.2f} s at most while {sockets} connections say nothing")
    return longest


@contextmanager
def served(kind: str, folder: Path) -> Iterator[str]:
    """The command, until the end of the block; yields the address that it prints."""
    words = ["studio", "--port", "0", "--device", "cpu"]
    if kind == "study":
        study.experiment(folder / "experiment")
        (folder / "study.yaml").write_text(write_plan(study.plan_of(folder)), encoding="utf-8")
        words = ["study", "serve", "study.yaml", "--out", "study", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "deradiff", *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().decode().strip()
    finally:
        process.terminate()
        process.wait(30)


def visit(address: str) -> float:
    """Seconds until the first page and the files that it names are there."""
    begun = time.perf_counter()
    page = fetched(address)
    for piece in page.split(b'"'):
        if piece.startswith((b"/style.css", b"./assets/", b"./static/")):
            fetched(urljoin(address, piece.decode()))
    return time.perf_counter() - begun


def fetched(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=ATTEMPTS) as answer:
        return bytes(answer.read())


if __name__ == "__main__":
    for kind in KINDS:
        silent_sockets(kind)
