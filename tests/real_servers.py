"""Our servers on a real port of this machine, in a thread of the test; and what speaks to them without manners."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import gradio as gr

from deradiff.servers import access, connections
from deradiff.studio import scenes, server
from deradiff.studio.image_requests import Desk
from deradiff.studio.models import LoadedModels, MachineSettings
from deradiff.studio.sources import Sources

START = scenes.scene("digits", ["digits:100"], "a red seven", [0.5])


@contextmanager
def served(application: Any) -> Iterator[int]:
    """An application on a port, until the end of the block."""
    with access.bound("127.0.0.1", 0) as listening:
        running = connections.server(application, listening)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        until = time.monotonic() + 60
        while not running.started:
            assert thread.is_alive() and time.monotonic() < until
            time.sleep(0.01)
        yield listening.getsockname()[1]
        running.should_exit = True
        thread.join(30)


@contextmanager
def studio(library: Path, token: str | None = None, root: str = "") -> Iterator[tuple[int, Desk, Any]]:
    """A studio of the digits: its port, its desk and Gradio's blocks."""
    with ExitStack() as closing:
        desk = Desk(LoadedModels(Sources(), MachineSettings(device="cpu"), lambda: 1.0))
        closing.callback(desk.close)
        application = server.app(desk, START, library, token, root)
        blocks = application.routes[-1].app.get_blocks()  # type: ignore[attr-defined]
        yield closing.enter_context(served(application)), desk, blocks


def asked(
    port: int, path: str, body: Any = None, method: str | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """The answer to a request: status, headers in lower case, body. A body that is no bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    given = dict(headers or {})
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        given.setdefault("Content-Type", "application/json")
    try:
        connection.request(method or ("GET" if body is None else "POST"), path, body, given)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def raw(port: int, said: bytes, seconds: float = 10) -> bytes:
    """All that is answered to these bytes."""
    with socket.create_connection(("127.0.0.1", port), seconds) as opened:
        opened.sendall(said)
        pieces = []
        while piece := opened.recv(65_536):
            pieces.append(piece)
        return b"".join(pieces)


def news(port: int, session: str, events: int, seconds: float = 60) -> bytes:
    """What the server tells a page until so many of its events have come to their end."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    connection.request("GET", f"/gradio_api/queue/data?session_hash={session}")
    answer, told = connection.getresponse(), b""
    while events and (line := answer.readline()):
        told += line
        events -= b'"process_completed"' in line
    connection.close()
    return told


def usual_values(reaction: Any) -> list[Any]:
    """What a page of the studio sends that was just opened."""
    return [None if isinstance(each, gr.State) else each.value for each in reaction.inputs]
